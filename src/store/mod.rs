//! All SQL. Everything else holds a [`Store`] and asks it in the words of [`crate::domain`].

mod connect;
mod context;
pub mod db;
mod erasures;
mod error;
mod migrate;
mod sessions;
mod turns;
mod writer;

pub use connect::{ConnectError, DatabaseSettings, DatabaseUrl, Kind, SchemaStatus};
pub use context::{Material, PastTurn};
pub use error::{Error, Result};
pub use sessions::{SessionFilter, SessionOrder, SessionPatch};
pub use turns::{Admission, Admitted, Destination, Ended, Ending, Expired, NotAdmitted, TurnKey};

use db::Db;
use writer::Writer;

/// Everything ATLUS keeps. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    db: Db,
    writer: Writer,
    kind: Kind,
}

impl Store {
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Fails if the database does not answer or its schema is missing.
    pub async fn ping(&self) -> Result<()> {
        let (_,): (String,) = self.db.read("SELECT minimum_binary FROM schema_info").one().await?;
        Ok(())
    }

    /// The database's own clock, by which leases are judged.
    pub async fn clock(&self) -> Result<crate::domain::clock::Timestamp> {
        Ok(self.db.clock().await?)
    }

    /// Looks for damage in a SQLite file: `ok`, or what is wrong first.
    pub async fn quick_check(&self) -> Result<String> {
        let (found,) = self.db.read("PRAGMA quick_check(1)").one().await?;
        Ok(found)
    }

    /// Waits for statements under way, then closes every connection.
    pub async fn close(&self) {
        self.db.close().await;
    }

    /// The database itself, for tests that bring it into a state no caller can.
    #[doc(hidden)]
    pub fn database(&self) -> &Db {
        &self.db
    }
}
