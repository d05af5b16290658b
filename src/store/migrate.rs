//! Bringing the schema up to date: by one instance at a time, and not by a binary too old for it.
//!
//! An older binary that still fits runs on beside a newer schema, so that upgrades can roll; a migration that
//! ends this raises `schema_info.minimum_binary`.

use std::time::Duration;

use sqlx::{
    Connection, PgConnection, SqlSafeStr, SqliteConnection,
    migrate::{Migrate, MigrateError, Migration, MigrationType, Migrator},
};

use super::Kind;

/// This binary's version.
pub(super) const BINARY: &str = env!("CARGO_PKG_VERSION");

/// The key of the advisory lock that migrating instances of ATLUS take on Postgres; any number of our own.
const LOCK: i64 = 0x4154_4c55_5300;
/// How long an instance waits before it asks for the lock again.
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// Where sqlx keeps which migrations were applied.
const TABLE: &str = "_sqlx_migrations";

macro_rules! migrations {
    ($folder:literal: $($version:literal $name:literal),*) => {
        vec![$(Migration::new(
            $version,
            $name.into(),
            MigrationType::Simple,
            include_str!(concat!("../../migrations/", $folder, "/", $name, ".sql")).into_sql_str(),
            false,
        )),*]
    };
}

fn migrations(kind: Kind) -> Vec<Migration> {
    match kind {
        Kind::Sqlite => {
            migrations!("sqlite": 1 "0001_init", 2 "0002_search_and_memory", 3 "0003_access", 4 "0004_search_places", 5 "0005_inactive_sessions")
        }
        Kind::Postgres => {
            migrations!("postgres": 1 "0001_init", 2 "0002_search_and_memory", 3 "0003_access", 4 "0004_search_places", 5 "0005_inactive_sessions")
        }
    }
}

fn migrator(kind: Kind) -> Migrator {
    let mut migrator = Migrator::with_migrations(migrations(kind));
    // A newer release may have added some; whether this binary still fits is said by schema_info.
    migrator.set_ignore_missing(true);
    // We lock ourselves: sqlx takes no lock on SQLite, and waits on Postgres in a way that can deadlock.
    migrator.set_locking(false);
    migrator
}

#[derive(Debug)]
pub(super) enum Error {
    TooOld { minimum: String },
    Failed(MigrateError),
}

impl From<MigrateError> for Error {
    fn from(error: MigrateError) -> Self {
        Self::Failed(error)
    }
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        Self::Failed(error.into())
    }
}

pub(super) async fn sqlite(connection: &mut SqliteConnection) -> Result<(), Error> {
    // Waits for other instances as long as the busy timeout.
    let mut tx = connection.begin_with("BEGIN EXCLUSIVE").await?;
    let set_up = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE name = 'schema_info')";
    if sqlx::query_scalar(set_up).fetch_one(&mut *tx).await? {
        let minimum =
            sqlx::query_scalar("SELECT minimum_binary FROM schema_info").fetch_one(&mut *tx).await?;
        refuse_if_too_old(minimum)?;
    }
    migrator(Kind::Sqlite).run_direct(None, &mut *tx, false).await?;
    Ok(tx.commit().await?)
}

pub(super) async fn postgres(connection: &mut PgConnection) -> Result<(), Error> {
    // Asking again and again, not waiting inside a statement: a waiting statement would hold back an index
    // that another instance's migration builds concurrently.
    let lock = "SELECT pg_try_advisory_lock($1)";
    let mut told = false;
    while !sqlx::query_scalar::<_, bool>(lock).bind(LOCK).fetch_one(&mut *connection).await? {
        if !std::mem::replace(&mut told, true) {
            tracing::info!("waiting for another instance that migrates the database");
        }
        tokio::time::sleep(LOCK_RETRY).await;
    }
    let set_up = "SELECT to_regclass('schema_info') IS NOT NULL";
    if sqlx::query_scalar(set_up).fetch_one(&mut *connection).await? {
        let minimum =
            sqlx::query_scalar("SELECT minimum_binary FROM schema_info").fetch_one(&mut *connection).await?;
        refuse_if_too_old(minimum)?;
    }
    // A migration is about every tenant's rows, also where policies hold for the tables' owner.
    let reach = "SELECT set_config('atlus.tenants', $1, false)";
    sqlx::query(reach).bind("*").execute(&mut *connection).await?;
    migrator(Kind::Postgres).run_direct(None, &mut *connection, false).await?;
    // Both would end with the connection too, but not at a pooler.
    sqlx::query(reach).bind("").execute(&mut *connection).await?;
    sqlx::query("SELECT pg_advisory_unlock($1)").bind(LOCK).execute(connection).await?;
    Ok(())
}

pub(super) async fn applied_sqlite(connection: &mut SqliteConnection) -> Result<Vec<i64>, Error> {
    let known = "SELECT EXISTS (SELECT 1 FROM sqlite_master WHERE name = '_sqlx_migrations')";
    match sqlx::query_scalar(known).fetch_one(&mut *connection).await? {
        true => Ok(versions(connection).await?),
        false => Ok(Vec::new()),
    }
}

pub(super) async fn applied_postgres(connection: &mut PgConnection) -> Result<Vec<i64>, Error> {
    let known = "SELECT to_regclass('_sqlx_migrations') IS NOT NULL";
    match sqlx::query_scalar(known).fetch_one(&mut *connection).await? {
        true => Ok(versions(connection).await?),
        false => Ok(Vec::new()),
    }
}

async fn versions(connection: &mut impl Migrate) -> Result<Vec<i64>, MigrateError> {
    Ok(connection.list_applied_migrations(TABLE).await?.into_iter().map(|applied| applied.version).collect())
}

/// Names of migrations that are not among the applied.
pub(super) fn pending(kind: Kind, applied: &[i64]) -> Vec<String> {
    let new = |migration: &Migration| !applied.contains(&migration.version);
    migrations(kind).into_iter().filter(new).map(|migration| migration.description.into_owned()).collect()
}

fn refuse_if_too_old(minimum: String) -> Result<(), Error> {
    if is_too_old_for(&minimum) { Err(Error::TooOld { minimum }) } else { Ok(()) }
}

/// Whether this binary is older than a schema's minimum. A minimum that cannot be read is newer than we know.
pub(super) fn is_too_old_for(minimum: &str) -> bool {
    match (version(BINARY), version(minimum)) {
        (Some(binary), Some(minimum)) => binary < minimum,
        _ => true,
    }
}

/// Reads `major.minor.patch`.
fn version(text: &str) -> Option<[u64; 3]> {
    let mut parts = text.split('.').map(|part| part.parse().ok());
    let version = [parts.next()??, parts.next()??, parts.next()??];
    parts.next().is_none().then_some(version)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_binary_is_too_old_for_a_newer_minimum_only() {
        assert!(!is_too_old_for(BINARY));
        assert!(!is_too_old_for("0.0.9"));
        assert!(is_too_old_for("999.0.0"));
        assert!(is_too_old_for("whatever comes"));
    }

    #[test]
    fn both_databases_have_the_same_migrations() {
        let names = |kind| pending(kind, &[]);
        assert_eq!(names(Kind::Sqlite), names(Kind::Postgres));
    }
}
