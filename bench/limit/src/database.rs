//! A chat's three steps at a database, without a server around them.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use tokio::sync::{mpsc, oneshot};

use crate::{postgres::Postgres, sql, sqlite::Sqlite};

/// The most writes in one transaction, as in the server.
pub const MAX_BATCH: usize = 256;

/// A message that becomes its session's next turn.
pub struct Admission {
    pub session: i64,
    pub now: i64,
    pub token: i64,
    pub message: String,
}

/// An answer that completes a turn.
pub struct Ending {
    pub session: i64,
    pub turn: i64,
    pub now: i64,
    pub token: i64,
}

impl Ending {
    /// What the turn is found by: scopes, and terms of which one is its own.
    pub fn terms(&self) -> String {
        let (session, own) = (self.session, self.token);
        format!("_t1 _u{session:016x}_1 _session_{session:016x}_1 {} {own:016x}", sql::TERMS)
    }
}

/// What shares a transaction with others; answered after the commit, an admission with its turn's number if the session
/// was free.
pub enum Write {
    Admit(Admission, oneshot::Sender<Option<i64>>),
    End(Ending, oneshot::Sender<()>),
}

pub enum Database {
    Sqlite(Sqlite),
    Postgres(Postgres),
}

impl Database {
    pub async fn open(url: &str) -> Result<Self> {
        Ok(match url.strip_prefix("sqlite://") {
            Some(file) => Self::Sqlite(Sqlite::open(file)?),
            None => Self::Postgres(Postgres::open(url).await?),
        })
    }

    /// Does what a chat does; `false` if the session was busy.
    pub async fn chat(&self, session: i64, token: i64, message: String) -> Result<bool> {
        let now = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?;
        let (done, admitted) = oneshot::channel();
        self.lane(session).send(Write::Admit(Admission { session, now, token, message }, done)).await?;
        let Some(turn) = admitted.await.context("not written")? else { return Ok(false) };
        let context = match self {
            Self::Sqlite(sqlite) => sqlite.context(session, turn, token)?,
            Self::Postgres(postgres) => postgres.context(session, turn, token).await?,
        };
        anyhow::ensure!(context.starts_with('['), "no context");
        let (done, ended) = oneshot::channel();
        self.lane(session).send(Write::End(Ending { session, turn, now, token }, done)).await?;
        ended.await.context("not written")?;
        Ok(true)
    }

    fn lane(&self, session: i64) -> &mpsc::Sender<Write> {
        match self {
            Self::Sqlite(sqlite) => &sqlite.writer,
            Self::Postgres(postgres) => postgres.lane(session),
        }
    }
}
