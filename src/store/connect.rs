//! Opening a database: where it is, how each of the two is set up, and what is wrong when it cannot be opened.

use std::{
    fmt, fs::OpenOptions, os::unix::fs::OpenOptionsExt, path::Path, str::FromStr, sync::Arc, time::Duration,
};

use sqlx::{
    ConnectOptions, PgConnection, PgPool, SqliteConnection, SqlitePool,
    postgres::{PgConnectOptions, PgPoolOptions},
    sqlite::{
        SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
    },
};

use tokio::time::{Instant, sleep, timeout};

use super::{
    Store,
    db::{Db, Reach},
    migrate,
    reader::Reader,
    row_security, search,
    writer::Writer,
};

/// Connections that read from SQLite beside the one that writes.
const SQLITE_READERS: u32 = 4;
/// Lanes of the writer on Postgres; each has one transaction under way at most.
const POSTGRES_LANES: usize = 2;
/// How long to wait for a free connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long an instance waits for another that migrates the same SQLite file.
const MIGRATION_WAIT: Duration = Duration::from_secs(600);
/// How long a statement on Postgres waits for a row that another transaction holds: less than a statement may take, so
/// that one held row does not stop a whole batch for long. In milliseconds.
const LOCK_TIMEOUT: &str = "2000";
/// How often a SQLite file is tried that another instance is opening for the first time.
const FIRST_OPEN_RETRY: Duration = Duration::from_millis(20);
/// How long to wait for a connection for migrations.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What our own deadline for a statement allows beyond the server's.
const DEADLINE_MARGIN: Duration = Duration::from_secs(2);

/// Which of the two databases.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Sqlite,
    Postgres,
}

impl Kind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Sqlite => "sqlite",
            Self::Postgres => "postgres",
        }
    }
}

/// Where the database is. `Debug` and `Display` leave out the password.
#[derive(Clone)]
pub struct DatabaseUrl(Options);

#[derive(Clone)]
enum Options {
    Sqlite(SqliteConnectOptions),
    Postgres(PgConnectOptions),
}

impl DatabaseUrl {
    pub fn kind(&self) -> Kind {
        match self.0 {
            Options::Sqlite(_) => Kind::Sqlite,
            Options::Postgres(_) => Kind::Postgres,
        }
    }
}

impl FromStr for DatabaseUrl {
    type Err = String;

    /// Reads `sqlite://path` or `postgres://user@host/database`; fails with a sentence on what to mend.
    fn from_str(url: &str) -> Result<Self, String> {
        let options = match url.split_once(':').map(|(scheme, _)| scheme) {
            Some("sqlite") => SqliteConnectOptions::from_str(url).map(Options::Sqlite),
            Some("postgres" | "postgresql") => PgConnectOptions::from_str(url)
                // A start parameter that PgBouncer refuses and that Postgres 12 and newer do not need.
                .map(|options| Options::Postgres(options.extra_float_digits(None))),
            _ => return Err("must begin with sqlite:// or postgres://".to_owned()),
        };
        match options {
            // Each connection would see a database of its own.
            Ok(Options::Sqlite(_)) if url.contains(":memory:") || url.contains("mode=memory") => {
                Err("must name a file: a database in memory is not supported".to_owned())
            }
            Ok(options) => Ok(Self(options)),
            Err(error) => Err(format!("is not a database URL: {error}")),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Options::Sqlite(options) => write!(f, "sqlite://{}", options.get_filename().display()),
            Options::Postgres(options) => {
                let (user, host, port) = (options.get_username(), options.get_host(), options.get_port());
                let database = options.get_database().unwrap_or(user);
                write!(f, "postgres://{user}@{host}:{port}/{database}")
            }
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

/// Where the database is and how to use it.
#[derive(Clone, Debug)]
pub struct DatabaseSettings {
    pub url: DatabaseUrl,
    /// Where migrations connect when the main URL leads through a pooler.
    pub migration_url: Option<DatabaseUrl>,
    /// The most connections to Postgres. SQLite always has one that writes and a few that read.
    pub connections: u32,
    /// The most writes in one transaction.
    pub write_batch: usize,
    /// How long one statement may take.
    pub statement_timeout: Duration,
    /// Whether Postgres is made to hold tenants apart by itself, too.
    pub row_security: bool,
}

/// Why a database cannot be used, in words for whoever started the server.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot open the database {url}: {hint}")]
    Unreachable {
        url: String,
        hint: String,
        #[source]
        source: sqlx::Error,
    },
    #[error(
        "the database {url} needs atlus {minimum} or newer, and this is {}: upgrade this binary",
        migrate::BINARY
    )]
    TooOld { url: String, minimum: String },
    #[error("the database {url} could not be brought up to date")]
    Migration {
        url: String,
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    #[error("the database {url} is not set up yet: run `atlus migrate`")]
    NotSetUp { url: String },
    #[error(
        "ATLUS_ROW_SECURITY is on, but {url} is exempt from row-level security: connect as a role that is no superuser \
         and has no BYPASSRLS"
    )]
    NoRowSecurity { url: String },
}

/// How far a database's schema is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchemaStatus {
    /// Descriptions of migrations that this binary has and the database has not.
    pub pending: Vec<String>,
}

impl Store {
    /// Applies what migrations are pending, one instance at a time while others wait.
    pub async fn migrate(settings: &DatabaseSettings) -> Result<(), ConnectError> {
        let url = settings.migration_url.as_ref().unwrap_or(&settings.url);
        match &url.0 {
            Options::Sqlite(options) => {
                keep_private(options.get_filename());
                let mut patient = sqlite(options, false).busy_timeout(MIGRATION_WAIT);
                // Only before there is anything in the file; after, it would be a commit that changes nothing.
                if is_empty(options.get_filename()) {
                    patient = patient.auto_vacuum(SqliteAutoVacuum::Incremental);
                }
                let mut connection = connect_in_turn(&patient).await.map_err(|e| unreachable(url, e))?;
                migrate::sqlite(&mut connection).await.map_err(|e| e.at(url))
            }
            Options::Postgres(options) => {
                let mut connection = connect_once(url, options).await?;
                migrate::postgres(&mut connection).await.map_err(|e| e.at(url))?;
                if settings.row_security {
                    row_security::enable(&mut connection).await.map_err(|e| unreachable(url, e))?;
                }
                Ok(())
            }
        }
    }

    /// Tells what [`Store::migrate`] would do, and changes nothing.
    pub async fn schema_status(settings: &DatabaseSettings) -> Result<SchemaStatus, ConnectError> {
        let url = settings.migration_url.as_ref().unwrap_or(&settings.url);
        let applied = match &url.0 {
            Options::Sqlite(options) if is_to_be_made(options.get_filename()) => Vec::new(),
            Options::Sqlite(options) => {
                let options = options.clone().create_if_missing(false);
                let mut connection = options.connect().await.map_err(|e| unreachable(url, e))?;
                migrate::applied_sqlite(&mut connection).await.map_err(|e| e.at(url))?
            }
            Options::Postgres(options) => {
                let mut connection = connect_once(url, options).await?;
                migrate::applied_postgres(&mut connection).await.map_err(|e| e.at(url))?
            }
        };
        Ok(SchemaStatus { pending: migrate::pending(url.kind(), &applied) })
    }

    /// Opens a database whose schema is in place; must be called within a Tokio runtime.
    pub async fn connect(settings: &DatabaseSettings) -> Result<Self, ConnectError> {
        let (url, deadline) = (&settings.url, settings.statement_timeout + DEADLINE_MARGIN);
        let (db, lanes) = match &url.0 {
            Options::Sqlite(options) => (sqlite_pools(url, options, deadline).await?, 1),
            Options::Postgres(options) => {
                (postgres_pool(url, options, settings, deadline).await?, POSTGRES_LANES)
            }
        };
        let minimum: Result<(String,), _> =
            db.read(Reach::Everybody, "SELECT minimum_binary FROM schema_info").one().await;
        match minimum {
            Ok((minimum,)) if migrate::is_too_old_for(&minimum) => {
                Err(ConnectError::TooOld { url: url.to_string(), minimum })
            }
            Ok(_) => {
                let direct = settings.migration_url.as_ref().unwrap_or(url);
                let news = match &direct.0 {
                    Options::Postgres(options) => Some(Arc::new(options.clone().application_name("atlus"))),
                    Options::Sqlite(_) => None,
                };
                Ok(Self {
                    writer: Writer::start(&db, lanes, settings.write_batch),
                    sessions: Reader::start(&db),
                    contexts: Reader::start(&db),
                    common: Arc::new(search::common()),
                    db,
                    kind: url.kind(),
                    news,
                })
            }
            // No such table, in the words of SQLite and of Postgres.
            Err(sqlx::Error::Database(e)) if matches!(e.code().as_deref(), Some("1" | "42P01")) => {
                Err(ConnectError::NotSetUp { url: url.to_string() })
            }
            Err(error) => Err(unreachable(url, error)),
        }
    }
}

async fn sqlite_pools(
    url: &DatabaseUrl,
    options: &SqliteConnectOptions,
    deadline: Duration,
) -> Result<Db, ConnectError> {
    // A connection that is never replaced keeps its prepared statements, and a file has no network to lose.
    let pool = |connections| {
        SqlitePoolOptions::new()
            .max_connections(connections)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .idle_timeout(None)
            .max_lifetime(None)
    };
    let connect = |error| unreachable(url, error);
    let writer: SqlitePool = pool(1).connect_with(sqlite(options, false)).await.map_err(connect)?;
    let readers = pool(SQLITE_READERS).connect_with(sqlite(options, true)).await.map_err(connect)?;
    Ok(Db::sqlite(readers, writer, deadline))
}

/// Opens a SQLite file that others may be opening for the first time: while one of them switches it to WAL, it is
/// locked for the rest at once, whatever their busy timeout.
async fn connect_in_turn(options: &SqliteConnectOptions) -> Result<SqliteConnection, sqlx::Error> {
    let deadline = Instant::now() + CONNECT_TIMEOUT;
    loop {
        match options.connect().await {
            Err(sqlx::Error::Database(e))
                if e.code().as_deref() == Some("5") && Instant::now() < deadline =>
            {
                sleep(FIRST_OPEN_RETRY).await;
            }
            connected => return connected,
        }
    }
}

/// Whether a database file is missing and could be made.
fn is_to_be_made(file: &Path) -> bool {
    let folder = file.parent().filter(|folder| !folder.as_os_str().is_empty());
    !file.exists() && folder.is_none_or(Path::exists)
}

/// Whether a database file has nothing in it yet.
fn is_empty(file: &Path) -> bool {
    file.metadata().is_ok_and(|file| file.len() == 0)
}

/// Makes a missing database file, readable by its owner alone; the files beside it follow its permissions.
fn keep_private(file: &Path) {
    // Whatever keeps it from being made is told when it is opened.
    let _ = OpenOptions::new().write(true).create_new(true).mode(0o600).open(file);
}

/// SQLite as a server needs it: an acknowledged write survives a power cut, deleted text is overwritten.
fn sqlite(options: &SqliteConnectOptions, only_read: bool) -> SqliteConnectOptions {
    options
        .clone()
        .create_if_missing(!only_read)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(5))
        .foreign_keys(true)
        .pragma("secure_delete", "ON")
        .pragma("journal_size_limit", "67108864")
        // What a statement would need to be undone by itself, and what it sorts, is small.
        .pragma("temp_store", "MEMORY")
        // In KiB.
        .pragma("cache_size", if only_read { "-4096" } else { "-16384" })
        .pragma("trusted_schema", "OFF")
        .pragma("cell_size_check", "ON")
        // A read-only connection could not open a WAL file that needs recovery; this one merely does not write.
        .pragma("query_only", if only_read { "ON" } else { "OFF" })
        .statement_cache_capacity(256)
        .disable_statement_logging()
}

async fn postgres_pool(
    url: &DatabaseUrl,
    options: &PgConnectOptions,
    settings: &DatabaseSettings,
    deadline: Duration,
) -> Result<Db, ConnectError> {
    let options = options.clone().application_name("atlus").disable_statement_logging();
    let millis = settings.statement_timeout.as_millis().to_string();
    let guarded = options.clone().options([
        ("statement_timeout", millis.as_str()),
        ("lock_timeout", LOCK_TIMEOUT),
        ("idle_in_transaction_session_timeout", millis.as_str()),
        // Each statement is planned once, and by an index, as the tests look at it: by default it is planned again for the
        // lengths of the arrays that it is given, or once and for all while its tables are still small.
        ("plan_cache_mode", "force_generic_plan"),
        ("enable_seqscan", "off"),
        // Where there is no index to take, the plan looks dear enough to be compiled, which takes longer than to run it.
        ("jit", "off"),
    ]);
    // Half the connections write and half read: neither can use up the other's.
    let pool = |connections: u32| {
        PgPoolOptions::new().max_connections(connections.max(1)).acquire_timeout(ACQUIRE_TIMEOUT)
    };
    let writers = settings.connections / 2;
    let readers = settings.connections - writers;
    let connect = |options: PgConnectOptions| async move {
        let first: PgPool = pool(readers).connect_with(options.clone()).await?;
        Ok::<_, sqlx::Error>((first, pool(writers).connect_lazy_with(options)))
    };
    let connected = match connect(guarded).await {
        // PgBouncer takes no such start parameters; our own deadline still holds.
        Err(sqlx::Error::Database(e)) if e.message().contains("startup parameter") => {
            tracing::info!(
                "the database is behind a pooler that takes no settings at connection: set statement_timeout, \
                 lock_timeout, idle_in_transaction_session_timeout, plan_cache_mode, enable_seqscan and jit on the \
                 database role"
            );
            if settings.migration_url.is_none() {
                tracing::warn!(
                    "behind a pooler nothing is heard of turns cancelled at other instances until their lease is \
                     renewed, and migrations may fail: set ATLUS_MIGRATION_DATABASE_URL to a direct URL"
                );
            }
            connect(options).await
        }
        connected => connected,
    };
    let (readers, writers) = connected.map_err(|e| unreachable(url, e))?;
    // Where the policies are on, nothing could be seen without telling them whom a statement is about.
    let active = "SELECT COALESCE((SELECT row_security_active(oid) FROM pg_class \
         WHERE oid = to_regclass('sessions')), false)";
    let row_security = sqlx::query_scalar(active).fetch_one(&readers).await;
    let row_security: bool = row_security.map_err(|e| unreachable(url, e))?;
    if settings.row_security && !row_security {
        return Err(ConnectError::NoRowSecurity { url: url.to_string() });
    }
    Ok(Db::postgres(readers, writers, deadline, row_security))
}

/// Opens one connection, if the server answers in time.
async fn connect_once(url: &DatabaseUrl, options: &PgConnectOptions) -> Result<PgConnection, ConnectError> {
    let connection = timeout(CONNECT_TIMEOUT, options.connect()).await;
    connection.unwrap_or(Err(sqlx::Error::PoolTimedOut)).map_err(|e| unreachable(url, e))
}

/// Puts the reason in words, with what to mend.
fn unreachable(url: &DatabaseUrl, source: sqlx::Error) -> ConnectError {
    let hint = match (&url.0, &source) {
        (Options::Sqlite(options), sqlx::Error::Database(e)) => match e.code().as_deref() {
            Some("14") => sqlite_path_hint(options.get_filename()),
            Some("26") => "the file is not a SQLite database".to_owned(),
            Some("11") => "the file is damaged; restore a backup".to_owned(),
            Some("8" | "1032" | "1544") => "the file is read-only".to_owned(),
            _ => e.message().to_owned(),
        },
        (Options::Postgres(_), sqlx::Error::Database(e)) => match e.code().as_deref() {
            Some("28P01" | "28000") => format!("{}; check user and password in the URL", e.message()),
            Some("3D000") => format!("{}; create it first", e.message()),
            _ => e.message().to_owned(),
        },
        (Options::Postgres(_), sqlx::Error::Io(e)) => {
            format!("{e}; check that the server runs and that host and port in the URL are right")
        }
        (_, sqlx::Error::PoolTimedOut) => {
            "no answer in time; check that the server runs and host and port in the URL are right".into()
        }
        (_, error) => error.to_string(),
    };
    ConnectError::Unreachable { url: url.to_string(), hint, source }
}

fn sqlite_path_hint(file: &Path) -> String {
    match file.parent() {
        Some(folder) if !folder.as_os_str().is_empty() && !folder.exists() => {
            format!("the folder {} does not exist; create it or name another path", folder.display())
        }
        _ if file.is_dir() => format!("{} is a folder; name a file in it", file.display()),
        _ => "the file cannot be opened; check its permissions and those of its folder".to_owned(),
    }
}

impl migrate::Error {
    fn at(self, url: &DatabaseUrl) -> ConnectError {
        match self {
            Self::TooOld { minimum } => ConnectError::TooOld { url: url.to_string(), minimum },
            Self::Failed(source) => ConnectError::Migration { url: url.to_string(), source },
        }
    }
}
