//! Every setting once: its flag, its variable, its default, what it means, and whether its value makes sense.
//!
//! clap knows names, defaults and help; values are read here, all of them, so that one message names everything
//! that is wrong.

mod access;

use std::{
    fmt::Display,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
    time::Duration,
};

use clap::{Args, CommandFactory, Parser};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::Url;
use secrecy::SecretString;
use tracing_subscriber::EnvFilter;

pub use access::AccessConfig;

use access::AccessArgs;

use crate::{
    chat::{ChatSettings, Extract},
    domain::session::SystemPrompt,
    jobs::Schedule,
    middleware::origin::{Gate, Hosts, Origins},
    server::ServerSettings,
    store::{DatabaseSettings, DatabaseUrl, Kind},
    telemetry::{LogConfig, traces::TraceSettings},
};

/// The settings as they are given, each as text.
#[derive(Args, Clone, Debug)]
pub struct Settings {
    /// Address and port to listen on
    #[arg(
        long,
        env = "ATLUS_LISTEN",
        help_heading = "Server",
        default_value = "127.0.0.1:5000",
        hide_env_values = true
    )]
    listen: String,

    #[command(flatten)]
    access: AccessArgs,

    /// Hosts that callers without keys may name besides localhost and loopback addresses: names, with commas between,
    /// each with a port or without, or `*` for any. Where keys are needed, every host may be named
    #[arg(long, env = "ATLUS_ALLOWED_HOSTS", help_heading = "Server", hide_env_values = true)]
    allowed_hosts: Option<String>,

    /// Origins whose web pages may call the server, with commas between: https://app.example.com; or, only where keys
    /// are needed, `*` for all. Unset: only pages of the server itself may
    #[arg(long, env = "ATLUS_CORS_ORIGINS", help_heading = "Server", hide_env_values = true)]
    cors_origins: Option<String>,

    /// Connections at once, 1 to 1000000. At the limit, the one that has waited longest for a request is closed for
    /// each new one
    #[arg(
        long,
        env = "ATLUS_MAX_CONNECTIONS",
        help_heading = "Server",
        default_value = "10000",
        hide_env_values = true
    )]
    max_connections: String,

    /// Connections at once of one client: of an IPv4 address or an IPv6 network of 64 bits. Loopback addresses may
    /// have any number
    #[arg(
        long,
        env = "ATLUS_MAX_CONNECTIONS_PER_CLIENT",
        help_heading = "Server",
        default_value = "1000",
        hide_env_values = true
    )]
    max_connections_per_client: String,

    /// Requests under way at once, 1 to 1000000; more are refused. Streams do not count, nor do chats once they are
    /// read
    #[arg(
        long,
        env = "ATLUS_MAX_REQUESTS",
        help_heading = "Server",
        default_value = "4096",
        hide_env_values = true
    )]
    max_requests: String,

    /// The largest request body, 1024 to 1073741824 bytes
    #[arg(
        long,
        env = "ATLUS_MAX_BODY_BYTES",
        help_heading = "Server",
        default_value = "1048576",
        hide_env_values = true
    )]
    max_body_bytes: String,

    /// What to log: a level, or levels by module; else RUST_LOG [default: info]
    #[arg(long, env = "ATLUS_LOG", help_heading = "Server", hide_env_values = true)]
    log: Option<String>,

    /// `text` or `json` [default: text on a terminal, else json]
    #[arg(long, env = "ATLUS_LOG_FORMAT", help_heading = "Server", hide_env_values = true)]
    log_format: Option<String>,

    /// `sqlite://PATH` (created when missing) or `postgres://USER@HOST/DATABASE`; else DATABASE_URL
    /// [default: sqlite://atlus.db]
    #[arg(long, env = "ATLUS_DATABASE_URL", help_heading = "Database", hide_env_values = true)]
    database_url: Option<String>,

    /// A direct URL for migrations where the main one goes through a pooler
    #[arg(long, env = "ATLUS_MIGRATION_DATABASE_URL", help_heading = "Database", hide_env_values = true)]
    migration_database_url: Option<String>,

    /// The most connections to Postgres, 5 to 1000 (SQLite always has one that writes and four that read)
    #[arg(
        long,
        env = "ATLUS_DATABASE_CONNECTIONS",
        help_heading = "Database",
        default_value = "16",
        hide_env_values = true
    )]
    database_connections: String,

    /// The most writes that share a transaction, 1 to 1000; 1 makes each wait for the disk by itself
    #[arg(
        long,
        env = "ATLUS_WRITE_BATCH",
        help_heading = "Database",
        default_value = "256",
        hide_env_values = true
    )]
    write_batch: String,

    /// `on`: Postgres itself holds tenants apart, too, by row-level security; reads take two round trips more. The
    /// database role must not be exempt from it (a superuser is). Else `off`
    #[arg(
        long,
        env = "ATLUS_ROW_SECURITY",
        help_heading = "Database",
        default_value = "off",
        hide_env_values = true
    )]
    row_security: String,

    /// How long one database statement may take
    #[arg(
        long,
        env = "ATLUS_DATABASE_TIMEOUT",
        help_heading = "Database",
        default_value = "10s",
        hide_env_values = true
    )]
    database_timeout: String,

    /// How long inactive sessions are kept, e.g. 90d; unset: for ever. Temporary ones are kept 7 days
    #[arg(long, env = "ATLUS_RETENTION", help_heading = "Database", hide_env_values = true)]
    retention: Option<String>,

    /// `openai`, which many servers speak, or `anthropic`
    #[arg(
        long,
        env = "ATLUS_MODEL_PROVIDER",
        help_heading = "Model",
        default_value = "openai",
        hide_env_values = true
    )]
    model_provider: String,

    /// Base URL, with its /v1, of the model server; unset: the built-in responder
    #[arg(long, env = "ATLUS_MODEL_URL", help_heading = "Model", hide_env_values = true)]
    model_url: Option<String>,

    /// Name of the model to ask for
    #[arg(long, env = "ATLUS_MODEL", help_heading = "Model", hide_env_values = true)]
    model: Option<String>,

    /// Key for the model server
    #[arg(long, env = "ATLUS_MODEL_API_KEY", help_heading = "Model", hide_env_values = true)]
    model_api_key: Option<String>,

    /// Further models on the same server, with commas between, asked in turn where the first cannot answer
    #[arg(long, env = "ATLUS_MODEL_FALLBACK", help_heading = "Model", hide_env_values = true)]
    model_fallback: Option<String>,

    /// Calls to the model server at once, 1 to 10000; four times as many wait, and more are refused
    #[arg(
        long,
        env = "ATLUS_MODEL_CONCURRENCY",
        help_heading = "Model",
        default_value = "64",
        hide_env_values = true
    )]
    model_concurrency: String,

    /// The model's time for a whole answer, retries included
    #[arg(
        long,
        env = "ATLUS_MODEL_TIMEOUT",
        help_heading = "Model",
        default_value = "120s",
        hide_env_values = true
    )]
    model_timeout: String,

    /// What the model is told where a session has no prompt of its own
    #[arg(
        long,
        env = "ATLUS_SYSTEM_PROMPT",
        help_heading = "Conversation",
        default_value = "You are a helpful assistant.",
        hide_env_values = true
    )]
    system_prompt: String,

    /// Tokens that the model is shown at most (estimated), 256 to 10000000; a longer message goes alone
    #[arg(
        long,
        env = "ATLUS_CONTEXT_TOKENS",
        help_heading = "Conversation",
        default_value = "8000",
        hide_env_values = true
    )]
    context_tokens: String,

    /// The last turns that are shown before other parts of the context, as far as tokens reach, 0 to 1000
    #[arg(
        long,
        env = "ATLUS_CONTEXT_TURNS",
        help_heading = "Conversation",
        default_value = "6",
        hide_env_values = true
    )]
    context_turns: String,

    /// How facts about users are learnt from what they say: `rules` (English), `model` (asked after each turn), or
    /// `off`, where no model is asked for anything but an answer [default: model if there is one, else rules]
    #[arg(long, env = "ATLUS_MEMORY_EXTRACT", help_heading = "Conversation", hide_env_values = true)]
    memory_extract: Option<String>,

    /// The tokens that a user may use in a day (UTC), shown to models and answered by them, also in the background; a
    /// message is refused once they are used up. Unset: as many as they like
    #[arg(long, env = "ATLUS_TOKENS_PER_USER_DAY", help_heading = "Conversation", hide_env_values = true)]
    tokens_per_user_day: Option<String>,

    /// The longest message, 1 to 10000000 characters
    #[arg(
        long,
        env = "ATLUS_MAX_MESSAGE_CHARS",
        help_heading = "Conversation",
        default_value = "32000",
        hide_env_values = true
    )]
    max_message_chars: String,
}

/// The settings, read and checked.
#[derive(Clone, Debug)]
pub struct Config {
    pub listen: SocketAddr,
    pub access: AccessConfig,
    pub database: DatabaseSettings,
    pub model: ModelConfig,
    pub chat: ChatSettings,
    pub server: ServerSettings,
    pub jobs: Schedule,
    pub log: LogConfig,
    /// How traces are sent, where they are: see [`TraceSettings::read`].
    pub traces: Option<TraceSettings>,
}

/// Which model answers.
#[derive(Clone, Debug)]
pub enum ModelConfig {
    Builtin,
    Server {
        provider: Provider,
        url: Url,
        model: String,
        key: Option<SecretString>,
        /// Further models on the same server, asked in turn where the first cannot answer.
        fallback: Vec<String>,
        /// Calls at once.
        concurrency: usize,
    },
}

/// Which API a model server speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    OpenAi,
    Anthropic,
}

/// Everything that is wrong with the settings, a line each.
#[derive(Debug, thiserror::Error)]
#[error("the settings cannot be used:\n{}", .0.iter().map(|problem| format!("  - {problem}")).collect::<Vec<_>>().join("\n"))]
pub struct ConfigError(pub Vec<String>);

/// Lets the settings stand alone, where no command line names them.
#[derive(Parser)]
#[command(name = "atlus")]
struct Alone {
    #[command(flatten)]
    settings: Settings,
}

/// Variables of `atlus chat`, which no server needs.
const OF_CHAT: [&str; 2] = ["ATLUS_SERVER", "ATLUS_API_KEY"];

impl Settings {
    /// The settings from environment variables and defaults only.
    pub fn from_environment() -> Self {
        Alone::parse_from(["atlus"]).settings
    }

    /// Variables that begin with `ATLUS_` and mean nothing.
    pub fn unknown_variables() -> Vec<String> {
        let command = Alone::command();
        let known: Vec<_> = command.get_arguments().filter_map(|argument| argument.get_env()).collect();
        let given = std::env::vars_os().map(|(name, _)| name);
        let unknown = given.filter(|name| name.to_string_lossy().starts_with("ATLUS_"));
        let unknown = unknown.filter(|name| !known.contains(&name.as_os_str()));
        let unknown = unknown.filter(|name| !OF_CHAT.iter().any(|known| name == known));
        unknown.map(|name| name.to_string_lossy().into_owned()).collect()
    }

    /// The same for a server that serves only the process it is in: on a port of its own, and quiet.
    #[must_use]
    pub fn private(mut self) -> Self {
        "127.0.0.1:0".clone_into(&mut self.listen);
        self.access.unlimited();
        self.log = given(self.log.as_ref()).or(Some("error")).map(str::to_owned);
        self
    }

    /// Reads every value; fails with all that is wrong.
    pub fn read(&self) -> Result<Config, ConfigError> {
        let mut problems = Problems(Vec::new());
        let listen = self.listen(&mut problems);
        let access = self.access.read(listen, &mut problems);
        let database = self.database_settings(&mut problems);
        let model = self.model_config(&mut problems);
        let model_timeout = problems.duration("ATLUS_MODEL_TIMEOUT", &self.model_timeout);
        let chat = ChatSettings {
            system_prompt: self.system_prompt.clone(),
            context_tokens: problems.within("ATLUS_CONTEXT_TOKENS", &self.context_tokens, 256, 10_000_000),
            context_turns: problems.within("ATLUS_CONTEXT_TURNS", &self.context_turns, 0, 1000),
            extract: self.extract(&mut problems),
            tokens_per_user_day: given(self.tokens_per_user_day.as_ref())
                .map(|tokens| problems.within("ATLUS_TOKENS_PER_USER_DAY", tokens, 1, i64::MAX)),
            max_message_chars: problems
                .within("ATLUS_MAX_MESSAGE_CHARS", &self.max_message_chars, 1, 10_000_000),
            model_timeout,
            lease: Duration::from_secs(15),
            lease_renewal: Duration::from_secs(5),
            max_wait: Duration::from_secs(60),
            // A full batch of the writer: more gain no throughput, and each waits for the rest.
            max_entering: 256,
            max_entry_waiting: 1024,
            max_entry_wait: Duration::from_secs(2),
        };
        if let Err(problem) = SystemPrompt::try_from(self.system_prompt.clone()) {
            problems.0.push(format!("ATLUS_SYSTEM_PROMPT {problem}"));
        }
        let server = self.server_settings(model_timeout, &access, &mut problems);
        let jobs = Schedule {
            often: Duration::from_secs(3),
            seldom: Duration::from_secs(60),
            retention: given(self.retention.as_ref())
                .map(|retention| problems.duration("ATLUS_RETENTION", retention)),
        };
        let log = self.log_config(&mut problems);
        let traces = TraceSettings::read(|name| std::env::var(name).ok(), &mut problems.0);
        match (listen, database, model) {
            (Some(listen), Some(database), Some(model)) if problems.0.is_empty() => {
                Ok(Config { listen, access, database, model, chat, server, jobs, log, traces })
            }
            _ => Err(ConfigError(problems.0)),
        }
    }

    /// Only what concerns the database, for commands that need no more.
    pub fn read_database(&self) -> Result<DatabaseSettings, ConfigError> {
        let mut problems = Problems(Vec::new());
        let database = self.database_settings(&mut problems);
        database.filter(|_| problems.0.is_empty()).ok_or(ConfigError(problems.0))
    }

    /// Only where the server listens, for commands that ask it something.
    pub fn read_listen(&self) -> Result<SocketAddr, ConfigError> {
        let mut problems = Problems(Vec::new());
        self.listen(&mut problems).ok_or(ConfigError(problems.0))
    }

    fn listen(&self, problems: &mut Problems) -> Option<SocketAddr> {
        problems.parse(
            "ATLUS_LISTEN",
            given(Some(&self.listen)).unwrap_or("127.0.0.1:5000"),
            "must be an address and a port: 127.0.0.1:5000",
        )
    }

    fn server_settings(
        &self,
        model_timeout: Duration,
        access: &AccessConfig,
        problems: &mut Problems,
    ) -> ServerSettings {
        let max_body_bytes = problems.within("ATLUS_MAX_BODY_BYTES", &self.max_body_bytes, 1024, 1 << 30);
        let (connections, clients) = (&self.max_connections, &self.max_connections_per_client);
        ServerSettings {
            max_body_bytes,
            max_bodies_bytes: max_body_bytes.max(256 << 20),
            max_requests: problems.within("ATLUS_MAX_REQUESTS", &self.max_requests, 1, 1_000_000),
            max_connections: problems.within("ATLUS_MAX_CONNECTIONS", connections, 1, 1_000_000),
            max_connections_per_client: problems
                .within("ATLUS_MAX_CONNECTIONS_PER_CLIENT", clients, 1, 1_000_000),
            uncounted_peers: [loopback(), access.trusted_proxies.networks().to_vec()].concat(),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(60),
            write_timeout: Duration::from_secs(30),
            // A turn under way may take as long as its model, and a moment to be stored.
            grace: model_timeout + Duration::from_secs(10),
            gate: self.gate(!access.required, problems),
        }
    }

    fn gate(&self, open: bool, problems: &mut Problems) -> Gate {
        let hosts: Option<Hosts> =
            given(self.allowed_hosts.as_ref()).and_then(|hosts| problems.read("ATLUS_ALLOWED_HOSTS", hosts));
        let origins: Option<Origins> = given(self.cors_origins.as_ref())
            .and_then(|origins| problems.read("ATLUS_CORS_ORIGINS", origins));
        let gate = Gate { open, hosts: hosts.unwrap_or_default(), origins: origins.unwrap_or_default() };
        if gate.open && gate.origins.any {
            problems.0.push(
                "ATLUS_CORS_ORIGINS is *, but callers need no keys, so that any web page could read and change \
                 everything: name the origins"
                    .to_owned(),
            );
        }
        gate
    }

    fn extract(&self, problems: &mut Problems) -> Extract {
        let has_model = given(self.model_url.as_ref()).is_some();
        match given(self.memory_extract.as_ref()) {
            None | Some("model") if has_model => Extract::Model,
            None | Some("rules") => Extract::Rules,
            Some("off") => Extract::Off,
            Some("model") => {
                problems.0.push("ATLUS_MEMORY_EXTRACT is model, but ATLUS_MODEL_URL names none".to_owned());
                Extract::Rules
            }
            Some(other) => {
                problems.0.push(format!("ATLUS_MEMORY_EXTRACT must be rules, model or off, not {other:?}"));
                Extract::Rules
            }
        }
    }

    fn database_settings(&self, problems: &mut Problems) -> Option<DatabaseSettings> {
        let fallback = std::env::var("DATABASE_URL").ok();
        let (name, url) = match (given(self.database_url.as_ref()), given(fallback.as_ref())) {
            (Some(url), _) => ("ATLUS_DATABASE_URL", url),
            (None, Some(url)) => ("DATABASE_URL", url),
            (None, None) => ("ATLUS_DATABASE_URL", "sqlite://atlus.db"),
        };
        let url: Option<DatabaseUrl> = problems.read(name, url);
        let migration_url: Option<DatabaseUrl> = given(self.migration_database_url.as_ref())
            .and_then(|url| problems.read("ATLUS_MIGRATION_DATABASE_URL", url));
        let connections = problems.within("ATLUS_DATABASE_CONNECTIONS", &self.database_connections, 5, 1000);
        let write_batch = problems.within("ATLUS_WRITE_BATCH", &self.write_batch, 1, 1000);
        let statement_timeout = problems.duration("ATLUS_DATABASE_TIMEOUT", &self.database_timeout);
        let row_security = match self.row_security.as_str() {
            "on" => true,
            "off" | "" => false,
            other => {
                problems.0.push(format!("ATLUS_ROW_SECURITY must be on or off, not {other:?}"));
                false
            }
        };
        let url = url?;
        if migration_url.as_ref().is_some_and(|migrations| migrations.kind() != url.kind()) {
            problems.0.push(
                "ATLUS_MIGRATION_DATABASE_URL and ATLUS_DATABASE_URL must name the same kind of database"
                    .to_owned(),
            );
        }
        if row_security && url.kind() == Kind::Sqlite {
            problems.0.push("ATLUS_ROW_SECURITY needs Postgres: SQLite has no such thing".to_owned());
        }
        Some(DatabaseSettings {
            url,
            migration_url,
            connections,
            write_batch,
            statement_timeout,
            row_security,
        })
    }

    fn log_config(&self, problems: &mut Problems) -> LogConfig {
        let fallback = std::env::var("RUST_LOG").ok();
        let (name, directives) = match (given(self.log.as_ref()), given(fallback.as_ref())) {
            (Some(directives), _) => ("ATLUS_LOG", directives),
            (None, Some(directives)) => ("RUST_LOG", directives),
            (None, None) => ("ATLUS_LOG", "info"),
        };
        if EnvFilter::try_new(directives).is_err() {
            problems.0.push(format!("{name} must be a level, or levels by module, not {directives:?}"));
        }
        let json = match given(self.log_format.as_ref()) {
            None => None,
            Some("json") => Some(true),
            Some("text") => Some(false),
            Some(other) => {
                problems.0.push(format!("ATLUS_LOG_FORMAT must be text or json, not {other:?}"));
                None
            }
        };
        LogConfig { directives: directives.to_owned(), json }
    }

    fn model_config(&self, problems: &mut Problems) -> Option<ModelConfig> {
        let key = given(self.model_api_key.as_ref()).map(SecretString::from);
        let (url, model) = (given(self.model_url.as_ref()), given(self.model.as_ref()));
        let concurrency = problems.within("ATLUS_MODEL_CONCURRENCY", &self.model_concurrency, 1, 10_000);
        let fallback: Vec<String> = given(self.model_fallback.as_ref())
            .map(|names| names.split(',').map(|name| name.trim().to_owned()).collect())
            .unwrap_or_default();
        if fallback.iter().any(String::is_empty) {
            problems.0.push("ATLUS_MODEL_FALLBACK must be model names with commas between".to_owned());
        }
        let provider = match self.model_provider.as_str() {
            "openai" | "" => Provider::OpenAi,
            "anthropic" => Provider::Anthropic,
            other => {
                problems.0.push(format!("ATLUS_MODEL_PROVIDER must be openai or anthropic, not {other:?}"));
                Provider::OpenAi
            }
        };
        let Some(url) = url else {
            let set = [
                ("ATLUS_MODEL", model.is_some()),
                ("ATLUS_MODEL_API_KEY", key.is_some()),
                ("ATLUS_MODEL_FALLBACK", !fallback.is_empty()),
                ("ATLUS_MODEL_PROVIDER", provider != Provider::OpenAi),
            ];
            for (name, _) in set.into_iter().filter(|(_, set)| *set) {
                problems
                    .0
                    .push(format!("{name} is set, but ATLUS_MODEL_URL is not: name the model server too"));
            }
            return Some(ModelConfig::Builtin);
        };
        if model.is_none() {
            problems.0.push("ATLUS_MODEL_URL is set, but ATLUS_MODEL is not: name the model too".to_owned());
        }
        // A URL may hold credentials, so it is not repeated.
        let url: Option<Url> = url.parse().ok().filter(|url: &Url| matches!(url.scheme(), "http" | "https"));
        if url.is_none() {
            problems.0.push("ATLUS_MODEL_URL must be a URL such as http://127.0.0.1:11434/v1".to_owned());
        }
        Some(ModelConfig::Server {
            provider,
            url: url?,
            model: model?.to_owned(),
            key,
            fallback,
            concurrency,
        })
    }
}

/// A variable that is set to nothing is not set.
fn given(value: Option<&String>) -> Option<&str> {
    value.map(String::as_str).filter(|value| !value.is_empty())
}

/// Where a proxy on this machine connects from, and whoever else is on it.
fn loopback() -> Vec<IpNet> {
    let v4 = Ipv4Net::new_assert(Ipv4Addr::LOCALHOST, 8);
    let v6 = Ipv6Net::new_assert(Ipv6Addr::LOCALHOST, 128);
    vec![v4.into(), v6.into()]
}

/// The durations that settings may have.
const DURATIONS: std::ops::RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(100 * 366 * 24 * 60 * 60);

/// What is wrong so far. Each reader returns a stand-in where it finds something, so that the rest is read too.
struct Problems(Vec<String>);

impl Problems {
    fn parse<T: FromStr>(&mut self, name: &str, text: &str, advice: &str) -> Option<T> {
        let value = text.parse().ok();
        if value.is_none() {
            self.0.push(format!("{name} {advice}, not {text:?}"));
        }
        value
    }

    /// For values that may hold a secret and whose reader says itself what to mend.
    fn read<T: FromStr<Err = String>>(&mut self, name: &str, text: &str) -> Option<T> {
        text.parse().map_err(|problem| self.0.push(format!("{name} {problem}"))).ok()
    }

    fn within<T: FromStr + PartialOrd + Display + Copy>(
        &mut self,
        name: &str,
        text: &str,
        min: T,
        max: T,
    ) -> T {
        match text.parse::<T>() {
            Ok(value) if (min..=max).contains(&value) => value,
            _ => {
                self.0.push(format!("{name} must be a whole number from {min} to {max}, not {text:?}"));
                min
            }
        }
    }

    fn duration(&mut self, name: &str, text: &str) -> Duration {
        match humantime::parse_duration(text) {
            Ok(duration) if DURATIONS.contains(&duration) => duration,
            _ => {
                self.0.push(format!(
                    "{name} must be a duration such as 500ms, 3s, 24h or 90d, at most 100 years, not {text:?}"
                ));
                Duration::from_secs(1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(flags: &[&str]) -> Settings {
        let flags = ["atlus", "--database-url", "sqlite://x.db"].iter().chain(flags);
        Alone::try_parse_from(flags).unwrap().settings
    }

    #[test]
    fn one_message_names_everything_that_is_wrong() {
        let wrong = settings(&[
            "--listen", "here", "--model", "x", "--database-timeout", "soon", "--context-turns", "-",
            "--allowed-hosts", "a,http://b", "--cors-origins", "https://a/b", "--max-requests", "0",
        ]);
        let message = wrong.read().unwrap_err().to_string();
        for name in [
            "ATLUS_LISTEN", "ATLUS_MODEL ", "ATLUS_DATABASE_TIMEOUT", "ATLUS_CONTEXT_TURNS",
            "ATLUS_ALLOWED_HOSTS", "ATLUS_CORS_ORIGINS", "ATLUS_MAX_REQUESTS",
        ] {
            assert!(message.contains(name), "{name} in {message}");
        }
    }

    #[test]
    fn every_setting_reaches_its_place() {
        let config = settings(&[
            "--listen=127.0.0.1:1234",
            "--migration-database-url=sqlite://y.db",
            "--database-connections=33",
            "--write-batch=11",
            "--database-timeout=7s",
            "--model-provider=anthropic",
            "--model-url=http://m/v1",
            "--model=first",
            "--model-api-key=key",
            "--model-fallback=second, third",
            "--model-concurrency=5",
            "--model-timeout=500ms",
            "--system-prompt=Prompt",
            "--context-tokens=300",
            "--context-turns=2",
            "--retention=90d",
            "--max-message-chars=11",
            "--max-body-bytes=2222",
            "--log=debug",
            "--log-format=json",
            "--memory-extract=off",
            "--max-connections=44",
            "--max-connections-per-client=4",
            "--max-requests=55",
            "--allowed-hosts=a.example, b.example:8080",
            "--cors-origins=https://c.example,http://d:1",
        ])
        .read()
        .unwrap();
        assert_eq!(config.listen.port(), 1234);
        assert_eq!(config.database.url.to_string(), "sqlite://x.db");
        assert_eq!(config.database.migration_url.unwrap().to_string(), "sqlite://y.db");
        assert_eq!((config.database.connections, config.database.write_batch), (33, 11));
        assert_eq!(config.database.statement_timeout, Duration::from_secs(7));
        let ModelConfig::Server { provider, url, model, key, fallback, concurrency } = config.model else {
            unreachable!()
        };
        assert_eq!((provider, url.as_str(), model.as_str()), (Provider::Anthropic, "http://m/v1", "first"));
        assert!(key.is_some());
        assert_eq!((fallback, concurrency), (vec!["second".to_owned(), "third".to_owned()], 5));
        assert_eq!(config.chat.model_timeout, Duration::from_millis(500));
        assert_eq!((config.chat.system_prompt.as_str(), config.chat.max_message_chars), ("Prompt", 11));
        assert_eq!((config.chat.context_tokens, config.chat.context_turns), (300, 2));
        assert_eq!(config.chat.extract, Extract::Off);
        assert_eq!(config.jobs.retention, Some(Duration::from_secs(90 * 24 * 60 * 60)));
        let ServerSettings { max_connections, max_connections_per_client, max_requests, gate, .. } =
            config.server;
        assert_eq!((config.server.max_body_bytes, max_requests), (2222, 55));
        assert_eq!((max_connections, max_connections_per_client), (44, 4));
        assert_eq!(gate.hosts, "A.example.,b.example:8080".parse().unwrap());
        assert_eq!(gate.origins, "HTTPS://c.example:443,http://d:1".parse().unwrap());
        assert_eq!((config.log.directives.as_str(), config.log.json), ("debug", Some(true)));
    }

    #[test]
    fn an_address_that_others_reach_is_refused_unless_told_in_plain_words() {
        let message = settings(&["--listen", "0.0.0.0:5000"]).read().unwrap_err().to_string();
        assert!(message.contains("ATLUS_AUTH=off"), "{message}");
        assert!(settings(&["--listen", "0.0.0.0:5000", "--auth", "off"]).read().is_ok());
        assert!(settings(&["--listen", "[::1]:5000"]).read().is_ok());
    }

    #[test]
    fn pages_of_any_origin_are_not_let_in_without_keys() {
        let message = settings(&["--cors-origins", "https://a.example, *"]).read().unwrap_err().to_string();
        assert!(message.contains("ATLUS_CORS_ORIGINS is *"), "{message}");
    }

    #[test]
    fn a_wrong_database_url_is_refused_without_its_password() {
        let flags = ["atlus", "--database-url", "mysql://me:secret@host/db"];
        let message = Alone::try_parse_from(flags).unwrap().settings.read().unwrap_err().to_string();
        assert!(message.contains("sqlite:// or postgres://") && !message.contains("secret"), "{message}");
    }
}
