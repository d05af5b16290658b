//! All SQL. Everything else holds a [`Store`] and asks it in the words of [`crate::domain`].

mod admissions;
mod appends;
mod archive;
mod budgets;
mod connect;
mod context;
pub mod db;
mod endings;
mod erasures;
mod error;
mod forks;
mod idempotency;
mod keys;
mod memory;
mod migrate;
mod rates;
mod reader;
mod row_security;
mod search;
mod sessions;
mod tenants;
mod turns;
mod users;
mod writer;

pub use admissions::{Admission, Admitted, Destination, NotAdmitted};
pub use appends::{Appendix, RememberTurns};
pub use archive::{Export, Import, Imported, NotExported, NotImported, What};
pub use budgets::Account;
pub use connect::{ConnectError, DatabaseSettings, DatabaseUrl, Kind, SchemaStatus};
pub use context::{Material, PastTurn};
pub use db::PoolUse;
pub use endings::{Cancelled, Completion, Ended, Ending, Expired};
pub use erasures::{Deleted, Erased, OnlyIf, Redacted};
pub use error::{Error, Result};
pub use forks::NotForked;
pub use idempotency::{Claim, Claimed, IdempotencyKey};
pub use keys::HashedKey;
pub use memory::Summary;
pub use rates::Share;
use search::Common;
pub use search::{Excerpt, Hit, OldTurn, Search};
pub use sessions::{Cutoffs, NotUpdated, SessionFilter, SessionOrder, SessionPatch};
pub use turns::TurnKey;

use std::sync::Arc;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};

use crate::domain::{caller::TenantId, ids::SessionId};
use context::ReadContext;
use db::{Db, Reach};
use reader::Reader;
use sessions::ReadSession;
use writer::Writer;

/// Everything ATLUS keeps. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    db: Db,
    writer: Writer,
    sessions: Reader<ReadSession>,
    contexts: Reader<ReadContext>,
    common: Arc<Common>,
    kind: Kind,
    /// Where to listen for what other instances tell; Postgres only.
    news: Option<Arc<PgConnectOptions>>,
}

impl Store {
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Fails if the database does not answer or its schema is missing.
    pub async fn ping(&self) -> Result<()> {
        let (_,): (String,) =
            self.db.read(Reach::Everybody, "SELECT minimum_binary FROM schema_info").one().await?;
        Ok(())
    }

    /// How many writes wait for the next transaction.
    pub fn writes_waiting(&self) -> usize {
        self.writer.waiting()
    }

    /// How the connections that read, and those that write, are used just now.
    pub fn pools(&self) -> [PoolUse; 2] {
        self.db.pools()
    }

    /// The database's own clock, by which leases are judged.
    pub async fn clock(&self) -> Result<crate::domain::clock::Timestamp> {
        Ok(self.db.clock().await?)
    }

    /// Hears of turns that were cancelled at any instance, until the connection breaks. On SQLite nothing is heard.
    pub async fn listen(&self, mut cancelled: impl FnMut(TenantId, SessionId, i64)) -> Result<()> {
        let Some(options) = &self.news else { return std::future::pending().await };
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with((**options).clone());
        let mut listener = PgListener::connect_with(&pool).await?;
        // What was missed while the connection was away is found when leases are renewed.
        listener.eager_reconnect(false);
        listener.listen(endings::CANCELLED).await?;
        while let Some(news) = listener.try_recv().await? {
            let numbers: Vec<i64> = news.payload().split(' ').filter_map(|part| part.parse().ok()).collect();
            // Instances of before tenants had keys name none; what they tell is found when leases are renewed.
            if let [tenant, session, turn] = numbers[..] {
                cancelled(TenantId::from_number(tenant), SessionId::from_number(session), turn);
            }
        }
        Ok(())
    }

    /// Looks for damage in a SQLite file: `ok`, or what is wrong first.
    pub async fn quick_check(&self) -> Result<String> {
        let (found,) = self.db.read(Reach::Everybody, "PRAGMA quick_check(1)").one().await?;
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

/// Reads an answer that is one row of JSON.
fn decoded<T: serde::de::DeserializeOwned>((json,): (String,)) -> Result<T> {
    serde_json::from_str(&json).map_err(|error| sqlx::Error::Decode(error.into()).into())
}
