//! A real server on a database of its own; one per test.

use std::{
    collections::BTreeSet,
    ops::Deref,
    pin::Pin,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use atlus::{
    app::App,
    chat::Extract,
    config::{Config, ModelConfig, Provider, Settings},
    domain::{
        clock::{Clock, Timestamp},
        key::{ApiKey, KeyName, Scopes, Secret},
        memory::Learnt,
        session::UserId,
    },
    jobs, server,
    store::{Completion, DatabaseSettings, Ending, Kind, Store},
};
use clap::Parser;
use eventsource_stream::{Event, EventStreamError, Eventsource};
use futures_util::{Stream, StreamExt};
use reqwest::{Client as Http, Method, RequestBuilder, header::HeaderMap};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, SqliteConnection};
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::TcpListener,
    process::{Child, Command},
    sync::{OnceCell, mpsc},
};

/// Writes each test twice, once for each database.
macro_rules! on_both {
    ($( $(#[$meta:meta])* async fn $name:ident($arg:ident: $ty:ty) $body:block )*) => { $(
        mod $name {
            use super::*;
            async fn test($arg: $ty) $body
            $(#[$meta])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() { test(<$ty>::on(atlus::store::Kind::Sqlite).await).await }
            $(#[$meta])*
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgres() { test(<$ty>::on(atlus::store::Kind::Postgres).await).await }
        }
    )* };
}
pub(crate) use on_both;

/// An empty database that goes with the test.
pub struct Database {
    pub kind: Kind,
    /// Where servers connect: through the pooler that `ATLUS_TEST_POOLER` names, if it does.
    pub url: String,
    /// Where migrations connect.
    pub direct: String,
    /// Whether servers are to use row-level security.
    pub row_security: bool,
    /// Where its file is, if it has one; removed with it.
    _folder: TempDir,
}

impl Database {
    /// One that has never been migrated.
    pub async fn empty(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let direct = match kind {
            Kind::Sqlite => format!("sqlite://{}", folder.path().join("atlus.db").display()),
            Kind::Postgres if everywhere() => return Self::with_row_security(None).await,
            Kind::Postgres => create_postgres(None).await,
        };
        Self { kind, url: pooled(&direct), direct, row_security: false, _folder: folder }
    }

    /// One on Postgres, or a copy of one, where servers use row-level security: they connect as a role that is not exempt
    /// from it. Migrations, and tests that look around, connect as the superuser.
    pub async fn with_row_security(template: Option<&str>) -> Self {
        let direct = create_postgres(template).await;
        let url = pooled(&of_plain_role(&direct).await);
        Self { kind: Kind::Postgres, url, direct, row_security: true, _folder: tempfile::tempdir().unwrap() }
    }

    /// One with its schema in place.
    pub async fn on(kind: Kind) -> Self {
        match kind {
            Kind::Sqlite => {
                let database = Self::empty(kind).await;
                Store::migrate(&database.settings()).await.unwrap();
                database
            }
            Kind::Postgres if everywhere() => Self::with_row_security(Some(postgres_template().await)).await,
            Kind::Postgres => {
                let direct = create_postgres(Some(postgres_template().await)).await;
                let (url, folder) = (pooled(&direct), tempfile::tempdir().unwrap());
                Self { kind, url, direct, row_security: false, _folder: folder }
            }
        }
    }

    pub fn settings(&self) -> DatabaseSettings {
        self.config().database
    }

    /// The settings of a server on this database.
    pub fn config(&self) -> Config {
        let [(_, url), (_, direct), (_, row_security)] = self.variables();
        let flags =
            ["--database-url", url, "--migration-database-url", direct, "--row-security", row_security];
        let flags = ["atlus", "--listen", "127.0.0.1:0"].into_iter().chain(flags);
        Flags::try_parse_from(flags).unwrap().settings.read().unwrap()
    }

    /// The same for the binary.
    pub fn variables(&self) -> [(&str, &str); 3] {
        let row_security = if self.row_security { "on" } else { "off" };
        [
            ("ATLUS_DATABASE_URL", &self.url),
            ("ATLUS_MIGRATION_DATABASE_URL", &self.direct),
            ("ATLUS_ROW_SECURITY", row_security),
        ]
    }

    pub async fn store(&self) -> Store {
        Store::connect(&self.settings()).await.unwrap()
    }

    /// Runs a statement as whoever migrates.
    pub async fn run_sql(&self, sql: &'static str) {
        match self.kind {
            Kind::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.direct).await.unwrap();
                sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            }
            Kind::Postgres => {
                let mut connection = PgConnection::connect(&self.direct).await.unwrap();
                sqlx::raw_sql(sql).execute(&mut connection).await.unwrap();
            }
        }
    }

    /// A connection as a server has it to Postgres, for the tenant `default`.
    pub async fn as_server(&self) -> PgConnection {
        let url = if self.row_security { &self.url } else { &self.direct };
        let mut connection = PgConnection::connect(url).await.unwrap();
        sqlx::raw_sql("SET atlus.tenants = '1'").execute(&mut connection).await.unwrap();
        connection
    }

    /// Everything that stands in any column of any table, in lower case, each value with its table's name.
    pub async fn contents(&self) -> String {
        let mut values = Vec::new();
        match self.kind {
            Kind::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.direct).await.unwrap();
                let columns = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c \
                     WHERE t.type = 'table'";
                let columns: Vec<(String, String)> =
                    sqlx::query_as(columns).fetch_all(&mut connection).await.unwrap();
                for (table, column) in columns {
                    let sql = format!("SELECT CAST(\"{column}\" AS BLOB) FROM \"{table}\"");
                    let rows: Vec<(Option<Vec<u8>>,)> =
                        sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
                    values.extend(rows.into_iter().filter_map(|(value,)| Some((table.clone(), value?))));
                }
            }
            Kind::Postgres => {
                let mut connection = PgConnection::connect(&self.direct).await.unwrap();
                let tables =
                    "SELECT table_name::text FROM information_schema.tables WHERE table_schema = 'public'";
                let tables: Vec<(String,)> = sqlx::query_as(tables).fetch_all(&mut connection).await.unwrap();
                for (table,) in tables {
                    let sql = format!("SELECT t::text FROM \"{table}\" t");
                    let rows: Vec<(String,)> =
                        sqlx::query_as(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
                    values.extend(rows.into_iter().map(|(row,)| (table.clone(), row.into_bytes())));
                }
            }
        }
        let line =
            |(table, value): (String, Vec<u8>)| format!("{table}: {}\n", String::from_utf8_lossy(&value));
        values.into_iter().map(line).collect::<String>().to_lowercase()
    }

    /// Everything that is kept of a tenant: every row, with its table's name.
    pub async fn rows(&self, tenant: i64) -> BTreeSet<String> {
        let mut rows = BTreeSet::new();
        match self.kind {
            Kind::Sqlite => {
                let mut connection = SqliteConnection::connect(&self.direct).await.unwrap();
                let tables = "SELECT t.name, group_concat('quote(\"' || c.name || '\")', ' || '','' || ') \
                     FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table' \
                     GROUP BY t.name HAVING SUM(c.name = 'tenant_id') > 0";
                let tables: Vec<(String, String)> =
                    sqlx::query_as(tables).fetch_all(&mut connection).await.unwrap();
                for (table, columns) in tables {
                    let sql = format!("SELECT {columns} FROM {table} WHERE tenant_id = {tenant}");
                    let found: Vec<String> =
                        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
                    rows.extend(found.into_iter().map(|row| format!("{table}: {row}")));
                }
            }
            Kind::Postgres => {
                let mut connection = PgConnection::connect(&self.direct).await.unwrap();
                let tables = "SELECT table_name::text FROM information_schema.columns \
                     WHERE table_schema = 'public' AND column_name = 'tenant_id'";
                let tables: Vec<String> =
                    sqlx::query_scalar(tables).fetch_all(&mut connection).await.unwrap();
                for table in tables {
                    let sql = format!("SELECT t::text FROM {table} t WHERE tenant_id = {tenant}");
                    let found: Vec<String> =
                        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_all(&mut connection).await.unwrap();
                    rows.extend(found.into_iter().map(|row| format!("{table}: {row}")));
                }
            }
        }
        rows
    }

    /// The bytes of its files, once nothing waits to be written there; `None` where it has none of its own.
    pub async fn files(&self) -> Option<Vec<u8>> {
        let path = self.direct.strip_prefix("sqlite://")?;
        let mut connection = SqliteConnection::connect(&self.direct).await.unwrap();
        loop {
            let checkpoint = "PRAGMA wal_checkpoint(TRUNCATE)";
            let (busy, ..): (i64, i64, i64) =
                sqlx::query_as(checkpoint).fetch_one(&mut connection).await.unwrap();
            if busy == 0 {
                break;
            }
        }
        let read = |suffix| std::fs::read(format!("{path}{suffix}")).unwrap_or_default();
        Some(["", "-wal", "-shm"].map(read).concat())
    }
}

fn postgres_server() -> String {
    std::env::var("ATLUS_TEST_POSTGRES_URL")
        .expect("ATLUS_TEST_POSTGRES_URL must name a Postgres server for tests; scripts/test starts one")
}

/// Whether every test on Postgres is to use row-level security.
fn everywhere() -> bool {
    std::env::var("ATLUS_TEST_ROW_SECURITY").is_ok_and(|value| value == "on")
}

/// A role that row-level security is not lifted for, with all that a server needs in a database; the URL for it.
async fn of_plain_role(direct: &str) -> String {
    static ROLE: OnceCell<()> = OnceCell::const_new();
    // Some tests look at what connections are doing.
    const CREATE: &str = "DO $$ BEGIN CREATE ROLE atlus_plain LOGIN PASSWORD 'plain' IN ROLE pg_read_all_stats; \
         EXCEPTION WHEN duplicate_object THEN END $$";
    const GRANT: &str = "GRANT ALL ON SCHEMA public TO atlus_plain; \
         GRANT ALL ON ALL TABLES IN SCHEMA public TO atlus_plain; \
         ALTER DEFAULT PRIVILEGES IN SCHEMA public GRANT ALL ON TABLES TO atlus_plain";
    let run = async |sql: &'static str| {
        let mut admin = PgConnection::connect(direct).await.unwrap();
        sqlx::raw_sql(sql).execute(&mut admin).await.unwrap();
        admin.close().await.unwrap();
    };
    ROLE.get_or_init(|| run(CREATE)).await;
    run(GRANT).await;
    let (_, rest) = direct.split_once('@').unwrap();
    format!("postgres://atlus_plain:plain@{rest}")
}

/// The way to a database through the pooler of the test run (`host:port`), if it has one.
fn pooled(direct: &str) -> String {
    match (std::env::var("ATLUS_TEST_POOLER"), direct.split_once('@')) {
        (Ok(pooler), Some((user, rest))) => {
            format!("{user}@{pooler}/{}", rest.split_once('/').unwrap().1)
        }
        _ => direct.to_owned(),
    }
}

/// Makes a database on the test server; its URL.
async fn create_postgres(template: Option<&str>) -> String {
    let server = postgres_server();
    let name = format!("atlus_{}", uuid::Uuid::new_v4().simple());
    let template = template.unwrap_or("template1");
    let mut admin = PgConnection::connect(&server).await.unwrap();
    let sql = format!("CREATE DATABASE {name} TEMPLATE {template}");
    sqlx::query(AssertSqlSafe(sql)).execute(&mut admin).await.unwrap();
    admin.close().await.unwrap();
    let (base, _) = server.rsplit_once('/').unwrap();
    format!("{base}/{name}")
}

/// A migrated database to copy from: copying is faster than migrating.
async fn postgres_template() -> &'static str {
    static TEMPLATE: OnceCell<String> = OnceCell::const_new();
    TEMPLATE
        .get_or_init(|| async {
            let database = Database::empty(Kind::Postgres).await;
            Store::migrate(&database.settings()).await.unwrap();
            database.direct.rsplit_once('/').unwrap().1.to_owned()
        })
        .await
}

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    settings: Settings,
}

/// The end of a turn that was answered so.
pub fn completion(response: &str) -> Ending {
    Ending::Completed(Arc::new(Completion {
        user: UserId::default(),
        message: "message".to_owned(),
        created_at: Timestamp::from_millis(0),
        response: response.to_owned(),
        response_tokens: 1,
        model: "m".to_owned(),
        usage: None,
        learnt: Learnt::default(),
        charge: None,
    }))
}

/// A clock that stands still unless it is told to move.
pub struct TestClock(AtomicI64);

impl TestClock {
    pub fn advance(&self, span: Duration) {
        self.0.fetch_add(i64::try_from(span.as_millis()).unwrap(), Ordering::SeqCst);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Timestamp {
        Timestamp::from_millis(self.0.load(Ordering::SeqCst))
    }
}

/// The settings of a model at an OpenAI-compatible server.
pub fn scripted(url: &str) -> ModelConfig {
    ModelConfig::Server {
        provider: Provider::OpenAi,
        url: url.parse().unwrap(),
        model: "scripted".to_owned(),
        key: Some("sk-test-key-of-ours".into()),
        fallback: Vec::new(),
        concurrency: 64,
    }
}

/// A server in this process.
pub struct Server {
    pub client: Client,
    pub app: Arc<App>,
    pub clock: Arc<TestClock>,
    pub database: Arc<Database>,
}

impl Deref for Server {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Server {
    /// A server with the built-in responder and default settings.
    pub async fn on(kind: Kind) -> Self {
        Self::with(Database::on(kind).await, |_| {}).await
    }

    /// A server with other settings.
    pub async fn with(database: Database, change: impl FnOnce(&mut Config)) -> Self {
        Self::beside(Arc::new(database), change).await
    }

    /// One more server on a database.
    pub async fn beside(database: Arc<Database>, change: impl FnOnce(&mut Config)) -> Self {
        let mut config = database.config();
        // Jobs run when a test runs them.
        (config.jobs.often, config.jobs.seldom) = (Duration::from_secs(3600), Duration::from_secs(3600));
        // Tests call as fast as they can.
        config.access.rate_limit = None;
        change(&mut config);
        // 2024-01-01T12:00:00.000Z
        let clock = Arc::new(TestClock(AtomicI64::new(1_704_110_400_000)));
        let app = App::start_with(&config, clock.clone()).await.unwrap();
        let listener = TcpListener::bind(config.listen).await.unwrap();
        let client = Client::new(&listener.local_addr().unwrap().to_string());
        tokio::spawn(server::serve(listener, app.clone(), config.server, config.jobs));
        Self { client, app, clock, database }
    }

    /// A server that asks for keys.
    pub async fn guarded(kind: Kind) -> Self {
        Self::with(Database::on(kind).await, |config| config.access.required = true).await
    }

    /// A client with a new key: of this tenant, with these scopes, bound to this user if one is named.
    pub async fn client_of(&self, tenant: &str, scopes: &str, user: Option<&str>) -> Client {
        let secret = self.key(tenant, scopes, user).await;
        self.client.with_key(secret.reveal())
    }

    /// A new key; see [`Server::client_of`].
    pub async fn key(&self, tenant: &str, scopes: &str, user: Option<&str>) -> Secret {
        let now = self.clock.now();
        let name = KeyName::try_from("test".to_owned()).unwrap();
        let id = self.app.store.tenant_named(tenant, now).await.unwrap();
        let user_id = user.map(|user| UserId::try_from(user.to_owned()).unwrap());
        let key = ApiKey { user_id, ..ApiKey::new(id, name, Scopes::parse(scopes).unwrap(), now) };
        let secret = Secret::random();
        self.app.store.insert_key(&key, &secret.hash()).await.unwrap();
        secret
    }

    /// A server whose model is an OpenAI-compatible server at `url`.
    pub async fn with_model(kind: Kind, url: &str, change: impl FnOnce(&mut Config)) -> Self {
        Self::with(Database::on(kind).await, |config| {
            config.model = scripted(url);
            // It is asked for answers only, unless a test wants more.
            config.chat.extract = Extract::Off;
            change(config);
        })
        .await
    }

    pub async fn run_jobs(&self, retention: Option<Duration>) {
        jobs::leases::fail_abandoned_turns(&self.app).await.unwrap();
        jobs::erasures::finish_deletions(&self.app).await.unwrap();
        jobs::retention::remove_old_sessions(&self.app, retention).await.unwrap();
    }

    /// Runs a statement that no caller can.
    pub async fn run_sql(&self, sql: &'static str) {
        let mut tx = self.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql(sql).run().await.unwrap();
        tx.commit().await.unwrap();
    }

    /// How many rows of a table satisfy a condition.
    pub async fn count(&self, sql: &'static str) -> i64 {
        let (count,): (i64,) =
            self.app.store.database().read(atlus::store::db::Reach::Everybody, sql).one().await.unwrap();
        count
    }
}

/// Speaks to a server; every answer is checked against the document.
#[derive(Clone)]
pub struct Client {
    pub base: String,
    pub http: Http,
    key: Option<String>,
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: HeaderMap,
    pub body: Value,
}

impl Client {
    pub fn new(address: &str) -> Self {
        // The one client that the library sets up too.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let http = Http::builder().redirect(reqwest::redirect::Policy::none()).no_proxy().build().unwrap();
        Self { base: format!("http://{address}"), http, key: None }
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http.request(method, format!("{}/api/v1{path}", self.base))
    }

    /// The same, showing a key with every request.
    pub fn with_key(&self, secret: &str) -> Self {
        Self { key: Some(secret.to_owned()), ..self.clone() }
    }

    /// Sends a request and checks the answer against the document.
    pub async fn send(&self, request: RequestBuilder) -> Answer {
        let mut request = request.build().unwrap();
        if let Some(key) = &self.key {
            let bearer = format!("Bearer {key}").parse().unwrap();
            request.headers_mut().entry("authorization").or_insert(bearer);
        }
        let (method, path) = (request.method().clone(), request.url().path().to_owned());
        let response = self.http.execute(request).await.unwrap();
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let text = response.text().await.unwrap();
        let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
        crate::schema::check(&method, &path, status, &body);
        assert!(
            headers.contains_key("x-request-id") && headers.contains_key("x-process-time"),
            "{headers:?}"
        );
        Answer { status, headers, body }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(self.request(Method::GET, path)).await
    }

    /// A GET with one query parameter of any text.
    pub async fn get_with(&self, path: &str, name: &str, value: &str) -> Answer {
        let mut request = self.request(Method::GET, path).build().unwrap();
        request.url_mut().query_pairs_mut().append_pair(name, value);
        self.send(RequestBuilder::from_parts(self.http.clone(), request)).await
    }

    pub async fn post(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::POST, path).json(&body)).await
    }

    pub async fn patch(&self, path: &str, body: Value) -> Answer {
        self.send(self.request(Method::PATCH, path).json(&body)).await
    }

    pub async fn delete(&self, path: &str) -> Answer {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// A POST with an idempotency key.
    pub async fn post_once(&self, path: &str, key: &str, body: &Value) -> Answer {
        self.send(self.request(Method::POST, path).header("Idempotency-Key", key).json(body)).await
    }

    /// A GET that must be answered; its `data`.
    pub async fn read(&self, path: &str) -> Value {
        self.get(path).await.data().clone()
    }

    /// Begins to listen to a stream.
    pub async fn listen(&self, request: RequestBuilder) -> Events {
        let request = match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200, "{:?}", response.text().await);
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        assert!(response.headers().contains_key("x-request-id"));
        let replayed = response.headers().contains_key("idempotency-replayed");
        Events { events: Box::pin(response.bytes_stream().eventsource()), replayed }
    }

    /// Sends a message whose answer is streamed.
    pub async fn stream(&self, session: &str, message: &str) -> Events {
        let body = json!({"session_id": session, "message": message});
        self.listen(self.request(Method::POST, "/chat/stream").json(&body)).await
    }

    /// Goes on with the stream of a turn after the event `last`.
    pub async fn resume(&self, session: &str, turn: i64, last: Option<&str>) -> Events {
        let mut request = self.request(Method::GET, &format!("/sessions/{session}/turns/{turn}/stream"));
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        self.listen(request).await
    }

    /// Makes a session; its id.
    pub async fn session(&self, body: Value) -> String {
        let made = self.post("/sessions", body).await;
        assert_eq!(made.status, 201, "{made:?}");
        made.data()["session_id"].as_str().unwrap().to_owned()
    }

    pub async fn chat(&self, session: &str, message: &str) -> Answer {
        self.post("/chat", json!({"session_id": session, "message": message})).await
    }

    /// Says something that must be answered; the answer.
    pub async fn say(&self, session: &str, message: &str) -> String {
        let answer = self.chat(session, message).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.data()["response"].as_str().unwrap().to_owned()
    }
}

/// A stream of events, read by a library for them.
pub struct Events {
    events: Pin<Box<dyn Stream<Item = Result<Event, EventStreamError<reqwest::Error>>> + Send>>,
    pub replayed: bool,
}

/// An event, its data read and checked against the document.
#[derive(Clone, Debug, PartialEq)]
pub struct Heard {
    pub name: String,
    pub id: String,
    pub data: Value,
}

impl Events {
    pub async fn next(&mut self) -> Option<Heard> {
        let event = self.events.next().await?.unwrap();
        let data = serde_json::from_str(&event.data).unwrap();
        crate::schema::check_event(&event.event, &data);
        Some(Heard { name: event.event, id: event.id, data })
    }

    /// Every event to the end.
    pub async fn all(mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        while let Some(event) = self.next().await {
            heard.push(event);
        }
        heard
    }
}

/// The text of all `delta` events.
pub fn text_of(events: &[Heard]) -> String {
    events
        .iter()
        .filter(|event| event.name == "delta")
        .map(|event| event.data["text"].as_str().unwrap())
        .collect()
}

impl Answer {
    #[track_caller]
    pub fn data(&self) -> &Value {
        assert_eq!(self.body["success"], true, "{self:?}");
        &self.body["data"]
    }

    /// Asserts that this is a refusal with this code, in the contract's shape.
    #[track_caller]
    pub fn refused(&self, status: u16, code: &str) -> &str {
        assert_eq!((self.status, &self.body["error"]["code"]), (status, &code.into()), "{self:?}");
        assert_eq!(self.body["success"], false);
        assert_eq!(self.body["error"]["status"], status);
        assert_eq!(self.headers["x-request-id"], self.body["request_id"].as_str().unwrap());
        self.body["error"]["message"].as_str().unwrap()
    }

    /// Asserts that a field of the request is refused.
    #[track_caller]
    pub fn refuses_field(&self, field: &str) {
        self.refused(400, "VALIDATION_ERROR");
        assert_eq!(self.body["error"]["details"][0]["field"], field, "{self:?}");
    }

    pub fn items(&self) -> &[Value] {
        self.data()["items"].as_array().unwrap()
    }
}

/// The binary, running.
pub struct Process {
    pub client: Client,
    pub child: Child,
    lines: mpsc::UnboundedReceiver<String>,
}

impl Deref for Process {
    type Target = Client;
    fn deref(&self) -> &Client {
        &self.client
    }
}

/// The binary's command line, without settings from around the tests.
pub fn atlus(args: &[&str], variables: &[(&str, &str)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_atlus"));
    command.args(args).env_clear().env("ATLUS_LOG_FORMAT", "text").envs(variables.iter().copied());
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

impl Process {
    /// Starts a server and waits until it listens.
    pub async fn start(database: &Database, variables: &[(&str, &str)]) -> Self {
        let mut process = Self::spawn(database, variables);
        process.listening().await;
        process
    }

    /// Starts a server.
    pub fn spawn(database: &Database, variables: &[(&str, &str)]) -> Self {
        Self::of(atlus(&[], variables), database)
    }

    /// Starts a server by a command of its own.
    pub fn of(mut command: Command, database: &Database) -> Self {
        command.envs(database.variables()).env("ATLUS_LISTEN", "127.0.0.1:0").env("ATLUS_RATE_LIMIT", "off");
        let mut child = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let mut output = BufReader::new(child.stderr.take().unwrap()).lines();
        let (sender, lines) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok(Some(line)) = output.next_line().await {
                let _ = sender.send(line);
            }
        });
        Self { client: Client::new(""), child, lines }
    }

    /// Waits until it listens.
    pub async fn listening(&mut self) {
        let line = self.line("listening on http://").await;
        let address = line.split_once("listening on http://").unwrap().1;
        let address = address.split([' ', '"']).next().unwrap();
        self.client = Client::new(address);
    }

    /// Waits for a line of its log.
    pub async fn line(&mut self, containing: &str) -> String {
        let mut seen = Vec::new();
        let found = tokio::time::timeout(Duration::from_secs(60), async {
            while let Some(line) = self.lines.recv().await {
                if line.contains(containing) {
                    return Some(line);
                }
                seen.push(line);
            }
            None
        });
        let found = found.await.ok().flatten();
        found.unwrap_or_else(|| panic!("no line with {containing:?} but {seen:#?}"))
    }

    /// Stops it in order; the lines of its log that nobody has waited for.
    pub async fn stop(mut self) -> Vec<String> {
        self.signal("-TERM");
        let mut lines = Vec::new();
        while let Some(line) = self.lines.recv().await {
            lines.push(line);
        }
        lines
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = std::process::Command::new("kill").args([name, &pid]).status().unwrap();
        assert!(sent.success());
    }

    /// `kill -9`, and waits until it is gone.
    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}
