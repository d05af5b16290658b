//! Why the database could not answer.

use std::sync::Arc;

use crate::telemetry::metrics::METRICS;

/// Why the database could not answer. "Not found" is not an error; lookups return `Option`.
///
/// Cheap to clone: one failure is the answer to every write of its batch.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// No connection could be had, or the one in use broke, or the disk is full: trying again may help.
    /// Whether a write took effect is unknown.
    #[error("the database is not available")]
    Unavailable(#[source] Arc<sqlx::Error>),
    /// A unique key is taken.
    #[error("{constraint} is already taken")]
    Taken {
        constraint: String,
        #[source]
        source: Arc<sqlx::Error>,
    },
    /// Anything else: a defect of ours or of the data. A write did not take effect.
    #[error("a database statement failed")]
    Failed(#[source] Arc<sqlx::Error>),
}

pub type Result<T, E = Error> = std::result::Result<T, E>;

/// SQLite's primary result codes BUSY, LOCKED, IOERR, FULL and CANTOPEN, see <https://www.sqlite.org/rescode.html>.
const SQLITE_TRY_AGAIN: [i64; 5] = [5, 6, 10, 13, 14];

/// Postgres codes, or their beginnings, after which another try may succeed: connection lost, no resources, read-only
/// (a standby), shutting down, system error; a conflict with another transaction; given up by one of its timeouts.
const POSTGRES_TRY_AGAIN: [&str; 12] =
    ["08", "53", "58", "25006", "25P03", "40001", "40P01", "55P03", "57014", "57P01", "57P02", "57P03"];

impl Error {
    /// Whether the database itself said no, so that nothing was written; else the connection failed and nobody knows.
    pub(super) fn is_answer(&self) -> bool {
        let (Self::Unavailable(source) | Self::Failed(source) | Self::Taken { source, .. }) = self;
        !matches!(
            **source,
            sqlx::Error::Io(_)
                | sqlx::Error::Tls(_)
                | sqlx::Error::PoolTimedOut
                | sqlx::Error::PoolClosed
                | sqlx::Error::WorkerCrashed
                | sqlx::Error::Protocol(_)
        )
    }
}

impl From<sqlx::Error> for Error {
    fn from(source: sqlx::Error) -> Self {
        let taken = match &source {
            sqlx::Error::Database(e) if e.is_unique_violation() => {
                Some(e.constraint().unwrap_or("a unique value").to_owned())
            }
            _ => None,
        };
        let unavailable = is_unavailable(&source);
        let source = Arc::new(source);
        if taken.is_none() {
            let kind = if unavailable { "unavailable" } else { "failed" };
            METRICS.database_errors.with_label_values(&[kind]).inc();
        }
        match taken {
            Some(constraint) => Self::Taken { constraint, source },
            None if unavailable => Self::Unavailable(source),
            None => Self::Failed(source),
        }
    }
}

fn is_unavailable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(e) => {
            let code = e.code().unwrap_or_default();
            match e.try_downcast_ref::<sqlx::sqlite::SqliteError>() {
                // The low byte of an extended result code is the primary one.
                Some(_) => code.parse().is_ok_and(|code: i64| SQLITE_TRY_AGAIN.contains(&(code & 0xff))),
                None => POSTGRES_TRY_AGAIN.iter().any(|class| code.starts_with(class)),
            }
        }
        _ => false,
    }
}
