//! One SQL text, two databases.
//!
//! [`Db::read`] and [`Tx::sql`] start a [`Statement`], [`Statement::bind`] adds values, and `run`, `optional`,
//! `one` or `all` send it. Bounds sit on the value and row types ([`Value`], [`Record`]), so store functions
//! carry no generics and are compiled once; the pools hide behind trait objects, which keeps the compiler from
//! walking both drivers' internals for every async function.
//!
//! Writing needs a [`Tx`]: on SQLite there is one connection that writes and several that only read.

use std::{
    borrow::Cow,
    collections::BTreeSet,
    future::ready,
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use futures_util::TryStreamExt;
use sqlx::{
    Arguments, AssertSqlSafe, Database, Either, Encode, Executor, FromRow, IntoArguments, Pool, Postgres,
    SqlSafeStr, SqlStr, Sqlite, Type,
    error::BoxDynError,
    pool::PoolConnection,
    postgres::{PgArguments, PgRow},
    sqlite::{SqliteArguments, SqliteRow},
};

use super::Kind;
use crate::domain::{
    caller::{Caller, TenantId},
    clock::{Clock, SystemClock, Timestamp},
    ids::SessionId,
    session::TtlSeconds,
};

pub type Result<T, E = sqlx::Error> = std::result::Result<T, E>;
type BoxFuture<'c, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'c>>;

/// A Rust value that both databases can store.
pub trait Value:
    for<'q> Encode<'q, Sqlite> + Type<Sqlite> + for<'q> Encode<'q, Postgres> + Type<Postgres>
{
}
impl<T> Value for T where
    T: for<'q> Encode<'q, Sqlite> + Type<Sqlite> + for<'q> Encode<'q, Postgres> + Type<Postgres>
{
}

/// A row that both databases can return; deriving [`sqlx::FromRow`] is enough.
pub trait Record: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> {}
impl<T> Record for T where T: for<'r> FromRow<'r, SqliteRow> + for<'r> FromRow<'r, PgRow> {}

enum Args {
    Sqlite(SqliteArguments),
    Postgres(PgArguments),
}

enum Row {
    Sqlite(SqliteRow),
    Postgres(PgRow),
}

impl Row {
    fn read<R: Record>(&self) -> Result<R> {
        match self {
            Self::Sqlite(row) => R::from_row(row),
            Self::Postgres(row) => R::from_row(row),
        }
    }
}

/// Whose rows a statement or a transaction is about. Its text has the tenant as a condition; with row-level security,
/// Postgres holds it to that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    Tenants(BTreeSet<TenantId>),
    /// Jobs, and tables that know no tenants.
    Everybody,
}

impl From<TenantId> for Reach {
    fn from(tenant: TenantId) -> Self {
        Self::Tenants(BTreeSet::from([tenant]))
    }
}

impl From<&Caller> for Reach {
    fn from(caller: &Caller) -> Self {
        caller.tenant.into()
    }
}

impl Reach {
    /// As the policies read it (see `store/row_security.rs`): numbers with commas between, or a star.
    fn setting(&self) -> String {
        match self {
            Self::Tenants(tenants) => {
                let numbers: Vec<_> = tenants.iter().map(|tenant| tenant.number().to_string()).collect();
                numbers.join(",")
            }
            Self::Everybody => "*".to_owned(),
        }
    }
}

/// How a pool of connections is used.
#[derive(Clone, Copy, Debug)]
pub struct PoolUse {
    /// `read` or `write`.
    pub name: &'static str,
    pub open: u32,
    pub idle: u32,
    pub max: u32,
}

/// An open database; cheap to clone.
#[derive(Clone)]
pub struct Db(Arc<dyn Driver>);

/// A transaction that may write. It begins with its first statement. Dropping it undoes everything, by closing its
/// connection.
pub struct Tx {
    driver: Box<dyn TxDriver>,
    /// Whether nothing follows the work at hand.
    ends: bool,
    /// The database's clock, as read first in this transaction.
    clock: Option<Timestamp>,
}

impl Db {
    /// A database whose statements are given up after `deadline` on our side, whatever the server does.
    pub fn sqlite(readers: Pool<Sqlite>, writer: Pool<Sqlite>, deadline: Duration) -> Self {
        Self(Arc::new(Pools { readers, writers: writer, deadline, row_security: false }))
    }

    /// See [`Db::sqlite`]. With `row_security` the database is told whom each statement is about, which takes two round
    /// trips more for a read.
    pub fn postgres(
        readers: Pool<Postgres>,
        writers: Pool<Postgres>,
        deadline: Duration,
        row_security: bool,
    ) -> Self {
        Self(Arc::new(Pools { readers, writers, deadline, row_security }))
    }

    /// Starts a statement that reads, and that both databases read the same way. Placeholders are `$1`, `$2`, …
    pub fn read(&self, reach: impl Into<Reach>, text: &'static str) -> Statement<'_> {
        let on = On::Pool(&*self.0, reach.into());
        Statement { text: Cow::Borrowed(text), args: self.0.args(), on, error: None, last: false }
    }

    /// Starts a reading statement that the two databases spell differently.
    pub fn read_each(
        &self,
        reach: impl Into<Reach>,
        sqlite: &'static str,
        postgres: &'static str,
    ) -> Statement<'_> {
        self.read(reach, self.0.args().pick(sqlite, postgres))
    }

    /// `BEGIN IMMEDIATE` on SQLite: two writers queue instead of failing half-way.
    pub async fn begin(&self, reach: impl Into<Reach>) -> Result<Tx> {
        self.0.begin(reach.into()).await
    }

    /// The database's own clock, by which leases are judged whatever the servers' clocks say.
    pub async fn clock(&self) -> Result<Timestamp> {
        match self.0.args() {
            Args::Sqlite(_) => Ok(SystemClock.now()),
            Args::Postgres(_) => {
                self.read(Reach::Everybody, "SELECT ").push(POSTGRES_NOW).one().await.map(|(now,)| now)
            }
        }
    }

    /// How the connections that read, and those that write, are used just now.
    pub fn pools(&self) -> [PoolUse; 2] {
        self.0.pools()
    }

    /// Waits for statements under way, then closes every connection.
    pub async fn close(&self) {
        self.0.close().await;
    }
}

/// SQLite is part of this process, so its clock is this machine's.
pub const POSTGRES_NOW: &str = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)";

impl Tx {
    pub fn sql(&mut self, text: &'static str) -> Statement<'_> {
        Statement {
            text: Cow::Borrowed(text),
            args: self.driver.args(),
            on: On::Tx(&mut *self.driver, self.ends),
            error: None,
            last: false,
        }
    }

    /// Says that nothing follows the work at hand; see [`Statement::last`].
    pub fn nothing_follows(&mut self) {
        self.ends = true;
    }

    pub fn sql_each(&mut self, sqlite: &'static str, postgres: &'static str) -> Statement<'_> {
        self.sql(self.driver.args().pick(sqlite, postgres))
    }

    pub fn kind(&self) -> Kind {
        match self.driver.args() {
            Args::Sqlite(_) => Kind::Sqlite,
            Args::Postgres(_) => Kind::Postgres,
        }
    }

    /// The same, read once in a transaction.
    pub async fn clock(&mut self) -> Result<Timestamp> {
        if let Some(clock) = self.clock {
            return Ok(clock);
        }
        let clock = match self.driver.args() {
            Args::Sqlite(_) => SystemClock.now(),
            Args::Postgres(_) => self.sql("SELECT ").push(POSTGRES_NOW).one().await.map(|(now,)| now)?,
        };
        self.clock = Some(clock);
        Ok(clock)
    }

    /// Says what the database's clock is, as some statement of this transaction has read it.
    pub fn set_clock(&mut self, clock: Timestamp) {
        self.clock = Some(clock);
    }

    /// Tells every instance that listens on `channel`, once this transaction commits. SQLite has no such thing.
    pub async fn notify(&mut self, channel: &'static str, payload: String) -> Result<()> {
        if let Args::Postgres(_) = self.driver.args() {
            self.sql("SELECT pg_notify($1, $2)").bind(channel).bind(payload).run().await?;
        }
        Ok(())
    }

    /// Whether a session may be this caller's: `false` only for one who is bound to a user whose session it is not.
    /// Whose a session is never changes.
    pub async fn may_be_of(&mut self, caller: &Caller, session: SessionId) -> Result<bool> {
        let Some(user) = &caller.user else { return Ok(true) };
        let own = "SELECT EXISTS (SELECT 1 FROM sessions WHERE session_id = $1 AND tenant_id = $2 AND user_id = $3)";
        let (own,) = self.sql(own).bind(session).bind(caller.tenant).bind(user).one().await?;
        Ok(own)
    }

    pub async fn commit(self) -> Result<()> {
        self.driver.end("COMMIT").await
    }

    pub async fn rollback(self) -> Result<()> {
        self.driver.end("ROLLBACK").await
    }
}

/// What both databases keep as an integer.
pub trait Integer {
    fn integer(self) -> Option<i64>;
}

macro_rules! integer {
    ($($type:ty: |$value:ident| $integer:expr;)*) => {
        $(impl Integer for $type {
            fn integer(self) -> Option<i64> {
                let $value = self;
                Some($integer)
            }
        })*
    };
}
integer! {
    i64: |value| value;
    bool: |value| value.into();
    SessionId: |value| value.number();
    TenantId: |value| value.number();
    Timestamp: |value| value.as_millis();
    TtlSeconds: |value| value.seconds();
}

impl<T: Integer> Integer for Option<T> {
    fn integer(self) -> Option<i64> {
        self.and_then(T::integer)
    }
}

/// One column of the rows that go into a statement together; see [`Statement::push_rows`].
pub enum Column<'a> {
    Integers(Vec<Option<i64>>),
    Texts(Vec<Option<&'a str>>),
}

impl<'a> Column<'a> {
    pub fn integers<T, V: Integer>(rows: &[T], value: impl Fn(&T) -> V) -> Self {
        Self::Integers(rows.iter().map(|row| value(row).integer()).collect())
    }

    pub fn texts<T, V: Into<Option<&'a str>>>(rows: &'a [T], value: impl Fn(&'a T) -> V) -> Self {
        Self::Texts(rows.iter().map(|row| value(row).into()).collect())
    }

    /// Postgres' name for the type of its values.
    fn of(&self) -> &'static str {
        match self {
            Self::Integers(_) => "bigint",
            Self::Texts(_) => "text",
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Integers(values) => values.len(),
            Self::Texts(values) => values.len(),
        }
    }

    fn cell(&self, row: usize) -> Cell<'a> {
        match self {
            Self::Integers(values) => Cell::Integer(values[row]),
            Self::Texts(values) => Cell::Text(values[row]),
        }
    }
}

#[derive(serde::Serialize)]
#[serde(untagged)]
enum Cell<'a> {
    Integer(Option<i64>),
    Text(Option<&'a str>),
}

/// An array of its values for each row.
fn rows_as_json(columns: &[Column<'_>]) -> serde_json::Result<String> {
    let rows = columns.first().map_or(0, Column::len);
    let row = |row| columns.iter().map(|column| column.cell(row)).collect::<Vec<_>>();
    serde_json::to_string(&(0..rows).map(row).collect::<Vec<_>>())
}

enum On<'c> {
    Pool(&'c dyn Driver, Reach),
    /// With whether its transaction may be committed with it.
    Tx(&'c mut dyn TxDriver, bool),
}

/// A statement under construction.
#[must_use = "a statement does nothing until it is sent"]
pub struct Statement<'c> {
    text: Cow<'static, str>,
    args: Args,
    on: On<'c>,
    error: Option<sqlx::Error>,
    /// Whether its transaction is committed with it.
    last: bool,
}

impl<'c> Statement<'c> {
    /// Binds the next placeholder.
    pub fn bind(mut self, value: impl Value) -> Self {
        match self.args.add(value) {
            Ok(()) => self,
            Err(error) => self.failed(error),
        }
    }

    fn failed(mut self, error: BoxDynError) -> Self {
        self.error.get_or_insert(sqlx::Error::Encode(error));
        self
    }

    /// Appends SQL. The text is `'static`, so a caller's value cannot be pasted into it.
    pub fn push(mut self, text: &'static str) -> Self {
        self.text.to_mut().push_str(text);
        self
    }

    /// Appends SQL that the two databases spell differently.
    pub fn push_each(self, sqlite: &'static str, postgres: &'static str) -> Self {
        let text = self.args.pick(sqlite, postgres);
        self.push(text)
    }

    /// Appends the next placeholder and binds it.
    pub fn push_bind(mut self, value: impl Value) -> Self {
        let placeholder = format!("${}", self.args.len() + 1);
        self.text.to_mut().push_str(&placeholder);
        self.bind(value)
    }

    /// Appends SQL and a bound value where there is a value.
    pub fn push_some<T: Value>(self, text: &'static str, value: Option<T>) -> Self {
        match value {
            Some(value) => self.push(text).push_bind(value),
            None => self,
        }
    }

    /// Appends rows to select from, named `rows`: JSON on SQLite, an array for each column on Postgres.
    pub fn push_rows<const N: usize>(mut self, columns: [(&'static str, Column<'_>); N]) -> Self {
        let first = self.args.len() + 1;
        let names = columns.each_ref().map(|(name, _)| *name);
        match self.args {
            Args::Sqlite(_) => {
                let name = |(i, name)| format!("value ->> {i} AS {name}");
                let names: Vec<_> = names.into_iter().enumerate().map(name).collect();
                let rows = format!("(SELECT {} FROM jsonb_each(${first})) AS rows", names.join(", "));
                self.text.to_mut().push_str(&rows);
                match rows_as_json(&columns.map(|(_, column)| column)) {
                    Ok(rows) => self.bind(rows),
                    Err(error) => self.failed(error.into()),
                }
            }
            Args::Postgres(_) => {
                let types: Vec<_> = (first..)
                    .zip(&columns)
                    .map(|(i, (_, column))| format!("${i}::{}[]", column.of()))
                    .collect();
                let rows = format!("unnest({}) AS rows ({})", types.join(", "), names.join(", "));
                self.text.to_mut().push_str(&rows);
                columns.into_iter().fold(self, |mut statement, (_, column)| {
                    match statement.args.add_column(column) {
                        Ok(()) => statement,
                        Err(error) => statement.failed(error),
                    }
                })
            }
        }
    }

    /// Appends, for a caller who is bound to a user, that session `$1` of tenant `$2` is that user's.
    pub fn of(self, caller: &Caller) -> Self {
        match &caller.user {
            Some(user) => self
                .push(
                    " AND EXISTS (SELECT 1 FROM sessions own WHERE own.session_id = $1 AND own.tenant_id = $2 \
                     AND own.user_id = ",
                )
                .push_bind(user)
                .push(")"),
            None => self,
        }
    }

    /// Appends the database's clock.
    pub fn push_clock(self) -> Self {
        match self.args {
            Args::Sqlite(_) => self.push_bind(SystemClock.now()),
            Args::Postgres(_) => self.push(POSTGRES_NOW),
        }
    }

    /// Commits with it what was done in its transaction, unless more follows by others' hands: it saves a round trip on
    /// Postgres and a change of threads on SQLite. What its caller sends after it begins anew.
    pub fn last(mut self) -> Self {
        self.last = matches!(self.on, On::Tx(_, true));
        self
    }

    /// Sends it; how many rows changed. Only within a transaction.
    pub fn run(self) -> BoxFuture<'c, u64> {
        match (self.error, self.on) {
            (Some(error), _) => Box::pin(ready(Err(error))),
            (None, On::Pool(..)) => {
                Box::pin(ready(Err(sqlx::Error::Protocol("only a transaction may write".to_owned()))))
            }
            (None, On::Tx(on, _)) => on.execute(safe(self.text), self.args, self.last),
        }
    }

    /// Sends it; every row.
    pub fn all<R: Record>(self) -> impl Future<Output = Result<Vec<R>>> + Send + use<'c, R> {
        let rows = self.rows();
        async move { rows.await?.iter().map(Row::read).collect() }
    }

    /// Sends it; the first row, if any.
    pub fn optional<R: Record>(self) -> impl Future<Output = Result<Option<R>>> + Send + use<'c, R> {
        let rows = self.rows();
        async move { rows.await?.first().map(Row::read).transpose() }
    }

    /// Sends it; the first row. Fails with [`sqlx::Error::RowNotFound`] where there is none.
    pub fn one<R: Record>(self) -> impl Future<Output = Result<R>> + Send + use<'c, R> {
        let row = self.optional();
        async move { row.await?.ok_or(sqlx::Error::RowNotFound) }
    }

    fn rows(self) -> BoxFuture<'c, Vec<Row>> {
        match (self.error, self.on) {
            (Some(error), _) => Box::pin(ready(Err(error))),
            (None, On::Pool(on, reach)) => on.fetch(reach, safe(self.text), self.args),
            (None, On::Tx(on, _)) => on.fetch(safe(self.text), self.args, self.last),
        }
    }
}

tokio::task_local! {
    /// What a task has sent, for tests that look at the plans of what is really sent.
    #[doc(hidden)]
    pub static SENT: Arc<Mutex<Vec<String>>>;
}

/// Texts are built from `'static` pieces and placeholders only; see [`Statement::push`].
fn safe(text: Cow<'static, str>) -> SqlStr {
    // Nobody listens but in tests.
    let _ = SENT.try_with(|sent| sent.lock().unwrap_or_else(PoisonError::into_inner).push(text.to_string()));
    match text {
        Cow::Borrowed(text) => text.into_sql_str(),
        Cow::Owned(text) => AssertSqlSafe(text).into_sql_str(),
    }
}

impl Args {
    fn len(&self) -> usize {
        match self {
            Self::Sqlite(args) => args.len(),
            Self::Postgres(args) => args.len(),
        }
    }

    fn add(&mut self, value: impl Value) -> Result<(), BoxDynError> {
        match self {
            Self::Sqlite(args) => args.add(value),
            Self::Postgres(args) => args.add(value),
        }
    }

    /// Adds an array; SQLite has none.
    fn add_column(&mut self, column: Column<'_>) -> Result<(), BoxDynError> {
        match (self, column) {
            (Self::Postgres(args), Column::Integers(values)) => args.add(values),
            (Self::Postgres(args), Column::Texts(values)) => args.add(values),
            (Self::Sqlite(_), _) => Err("SQLite takes rows as JSON".into()),
        }
    }

    fn pick(&self, sqlite: &'static str, postgres: &'static str) -> &'static str {
        match self {
            Self::Sqlite(_) => sqlite,
            Self::Postgres(_) => postgres,
        }
    }
}

trait Driver: Send + Sync {
    fn args(&self) -> Args;
    fn fetch(&self, reach: Reach, text: SqlStr, args: Args) -> BoxFuture<'_, Vec<Row>>;
    fn begin(&self, reach: Reach) -> BoxFuture<'_, Tx>;
    fn pools(&self) -> [PoolUse; 2];
    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;
}

trait TxDriver: Send {
    fn args(&self) -> Args;
    /// Sends a statement; with `commit`, the last one.
    fn execute(&mut self, text: SqlStr, args: Args, commit: bool) -> BoxFuture<'_, u64>;
    fn fetch(&mut self, text: SqlStr, args: Args, commit: bool) -> BoxFuture<'_, Vec<Row>>;
    fn end(self: Box<Self>, how: &'static str) -> BoxFuture<'static, ()>;
}

/// What differs between the two drivers.
trait Backend: Database {
    const BEGIN: &'static str;
    /// Whether statements with arguments can be sent several at once.
    const SEVERAL: bool;
    fn wrap_args(args: Self::Arguments) -> Args;
    fn unwrap_args(args: Args) -> Result<Self::Arguments>;
    fn wrap_row(row: Self::Row) -> Row;
    fn changed(result: Self::QueryResult) -> u64;
}

macro_rules! backend {
    ($db:ident, $args:ty, $row:ty, $begin:literal, $several:literal) => {
        impl Backend for $db {
            const BEGIN: &'static str = $begin;
            const SEVERAL: bool = $several;
            fn wrap_args(args: $args) -> Args {
                Args::$db(args)
            }
            fn unwrap_args(args: Args) -> Result<$args> {
                match args {
                    Args::$db(args) => Ok(args),
                    _ => Err(sqlx::Error::Protocol("arguments belong to the other database".into())),
                }
            }
            fn wrap_row(row: $row) -> Row {
                Row::$db(row)
            }
            fn changed(result: Self::QueryResult) -> u64 {
                result.rows_affected()
            }
        }
    };
}
backend!(Sqlite, SqliteArguments, SqliteRow, "BEGIN IMMEDIATE", true);
backend!(Postgres, PgArguments, PgRow, "BEGIN", false);

struct Pools<DB: Database> {
    readers: Pool<DB>,
    writers: Pool<DB>,
    deadline: Duration,
    /// Whether the database is told whom a statement is about.
    row_security: bool,
}

/// A connection, given back to its pool only if nothing is left undone on it.
struct Held<DB: Database> {
    connection: PoolConnection<DB>,
    deadline: Duration,
    /// A statement was sent and its end not seen, or a transaction is open.
    dirty: bool,
    /// A transaction is open, or may be.
    begun: bool,
    /// Whom its transactions are about, where the database is told.
    reach: Option<Reach>,
}

impl<DB: Database> Drop for Held<DB> {
    fn drop(&mut self) {
        if self.dirty {
            // Neither a late answer nor an open transaction may meet the next user of the connection.
            self.connection.close_on_drop();
        }
    }
}

impl<DB: Backend> Held<DB>
where
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
{
    async fn of(pool: &Pool<DB>, deadline: Duration) -> Result<Self> {
        Ok(Self { connection: pool.acquire().await?, deadline, dirty: false, begun: false, reach: None })
    }

    /// Waits for a statement at most until the deadline; the server may be gone without a word.
    async fn within<T>(deadline: Duration, statement: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::time::timeout(deadline, statement).await.unwrap_or_else(|_| {
            let late = io::Error::new(io::ErrorKind::TimedOut, "a statement took longer than its deadline");
            Err(sqlx::Error::Io(late))
        })
    }

    /// Sends a statement of a transaction, which begins with the first, and with `commit` ends with this one.
    async fn run(&mut self, text: SqlStr, args: Args, commit: bool) -> Result<(u64, Vec<Row>)> {
        let begin = !self.begun;
        (self.dirty, self.begun) = (true, true);
        let (before, after) = (DB::SEVERAL && begin, DB::SEVERAL && commit);
        // Where they are sent one by one, one alone is a transaction.
        let alone = !DB::SEVERAL && begin && commit && self.reach.is_none();
        match &self.reach {
            Some(reach) if begin => Self::begin_within(&mut self.connection, self.deadline, reach).await?,
            None if begin && !before && !alone => self.send(DB::BEGIN).await?,
            _ => {}
        }
        let text = match (before, after) {
            (false, false) => text,
            (true, false) => AssertSqlSafe(format!("{}; {}", DB::BEGIN, text.as_str())).into_sql_str(),
            (false, true) => AssertSqlSafe(format!("{}; COMMIT", text.as_str())).into_sql_str(),
            (true, true) => AssertSqlSafe(format!("{}; {}; COMMIT", DB::BEGIN, text.as_str())).into_sql_str(),
        };
        let (mut changed, mut rows) = (Vec::new(), Vec::new());
        let outcomes = self.connection.fetch_many(sqlx::query_with(text, DB::unwrap_args(args)?));
        let all = outcomes.try_for_each(|outcome| {
            match outcome {
                Either::Left(done) => changed.push(DB::changed(done)),
                Either::Right(row) => rows.push(DB::wrap_row(row)),
            }
            ready(Ok(()))
        });
        Self::within(self.deadline, all).await?;
        if commit {
            if !after && !alone {
                self.send("COMMIT").await?;
            }
            (self.dirty, self.begun) = (false, false);
        }
        // SQLite tells for what begins and ends a transaction how many rows changed before.
        let own = changed.len().saturating_sub(usize::from(before) + usize::from(after));
        Ok((changed.into_iter().skip(usize::from(before)).take(own).sum(), rows))
    }

    async fn rows(&mut self, text: SqlStr, args: Args) -> Result<Vec<Row>> {
        let query = sqlx::query_with(text, DB::unwrap_args(args)?);
        let rows = Self::within(self.deadline, query.fetch_all(&mut *self.connection)).await?;
        Ok(rows.into_iter().map(DB::wrap_row).collect())
    }

    /// Sends a statement without arguments, unprepared.
    async fn send(&mut self, text: &'static str) -> Result<()> {
        Self::within(self.deadline, self.connection.execute(text)).await.map(|_| ())
    }

    /// Begins a transaction in which the policies let these tenants' rows be seen, in one round trip.
    async fn begin_within(connection: &mut DB::Connection, deadline: Duration, reach: &Reach) -> Result<()> {
        // Numbers and commas, or a star: nothing that would have to be bound.
        let text = format!("{}; SELECT set_config('atlus.tenants', '{}', true)", DB::BEGIN, reach.setting());
        Self::within(deadline, connection.execute(AssertSqlSafe(text))).await.map(|_| ())
    }
}

/// Whether a failed statement leaves its connection in a known state.
fn is_answer(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Database(_) | sqlx::Error::Encode(_) | sqlx::Error::RowNotFound)
}

impl<DB: Backend> Pools<DB>
where
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
{
    async fn reader(&self) -> Result<Held<DB>> {
        let mut held = Held::of(&self.readers, self.deadline).await?;
        held.dirty = true;
        Ok(held)
    }
}

/// Marks a connection clean once its statement has been answered, be it by an error of the database.
fn settle<DB: Database, T>(held: &mut Held<DB>, result: Result<T>) -> Result<T> {
    held.dirty = result.as_ref().is_err_and(|error| !is_answer(error));
    result
}

impl<DB: Backend> Driver for Pools<DB>
where
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
{
    fn args(&self) -> Args {
        DB::wrap_args(DB::Arguments::default())
    }

    fn fetch(&self, reach: Reach, text: SqlStr, args: Args) -> BoxFuture<'_, Vec<Row>> {
        Box::pin(async move {
            let mut held = self.reader().await?;
            if !self.row_security {
                let result = held.rows(text, args).await;
                return settle(&mut held, result);
            }
            Held::<DB>::begin_within(&mut held.connection, self.deadline, &reach).await?;
            let result = held.rows(text, args).await;
            match &result {
                // Else the connection is gone, and closed.
                Err(error) if !is_answer(error) => return result,
                Err(_) => held.send("ROLLBACK").await?,
                Ok(_) => held.send("COMMIT").await?,
            }
            held.dirty = false;
            result
        })
    }

    fn begin(&self, reach: Reach) -> BoxFuture<'_, Tx> {
        Box::pin(async move {
            let mut held = Held::of(&self.writers, self.deadline).await?;
            held.reach = self.row_security.then_some(reach);
            Ok(Tx { driver: Box::new(held), ends: false, clock: None })
        })
    }

    fn pools(&self) -> [PoolUse; 2] {
        [("read", &self.readers), ("write", &self.writers)].map(|(name, pool)| PoolUse {
            name,
            open: pool.size(),
            idle: u32::try_from(pool.num_idle()).unwrap_or(u32::MAX),
            max: pool.options().get_max_connections(),
        })
    }

    fn close(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async move {
            self.readers.close().await;
            self.writers.close().await;
        })
    }
}

impl<DB: Backend> TxDriver for Held<DB>
where
    for<'c> &'c mut DB::Connection: Executor<'c, Database = DB>,
    DB::Arguments: IntoArguments<DB>,
{
    fn args(&self) -> Args {
        DB::wrap_args(DB::Arguments::default())
    }

    fn execute(&mut self, text: SqlStr, args: Args, commit: bool) -> BoxFuture<'_, u64> {
        Box::pin(async move { Ok(self.run(text, args, commit).await?.0) })
    }

    fn fetch(&mut self, text: SqlStr, args: Args, commit: bool) -> BoxFuture<'_, Vec<Row>> {
        Box::pin(async move { Ok(self.run(text, args, commit).await?.1) })
    }

    fn end(mut self: Box<Self>, how: &'static str) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            if self.begun {
                self.send(how).await?;
            }
            self.dirty = false;
            Ok(())
        })
    }
}
