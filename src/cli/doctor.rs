//! `atlus doctor`: check settings, database, schema and model, and say what to mend; or ask a running server how it is.
//! Changes nothing.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use tokio::time::Instant;

use super::{block_on, probe};
use crate::{
    app::connect_model,
    config::{Config, Settings},
    domain::prompt::{Message, Role},
    model::{Ask, Listener, Options},
    store::{DatabaseSettings, Kind, Store},
};

#[derive(Args)]
pub(super) struct Doctor {
    /// Only ask the server that runs at ATLUS_LISTEN whether it is alive
    #[arg(long, conflicts_with = "ready")]
    live: bool,
    /// Only ask it whether it can take requests: whether its database answers and it is not stopping
    #[arg(long)]
    ready: bool,
    #[command(flatten)]
    settings: Settings,
}

impl Doctor {
    pub fn run(self) -> anyhow::Result<()> {
        match self {
            Self { live: true, settings, .. } => ask_server(&settings, "/livez"),
            Self { ready: true, settings, .. } => ask_server(&settings, "/readyz"),
            Self { settings, .. } => check_all(&settings),
        }
    }
}

/// How long a running server may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks the server that runs where the settings say. Opens no database: this is run every few seconds.
fn ask_server(settings: &Settings, path: &'static str) -> anyhow::Result<()> {
    let address = probe::reachable(settings.read_listen()?);
    let url = format!("http://{address}{path}");
    let answer = block_on(probe::ask(address, path, PATIENCE));
    let status = answer.with_context(|| format!("no server answers at {url}"))?;
    if !status.is_success() {
        bail!("{url} answered {status}");
    }
    println!("{url} answered {status}");
    Ok(())
}

fn check_all(settings: &Settings) -> anyhow::Result<()> {
    for name in Settings::unknown_variables() {
        println!("settings  ! {name} is no setting of this release and means nothing");
    }
    let config = match settings.read() {
        Ok(config) => config,
        Err(error) => {
            for problem in &error.0 {
                println!("settings  ✗ {problem}");
            }
            bail!("mend the settings first");
        }
    };
    println!("settings  ✓");
    block_on(async {
        let database = check_database(&config).await;
        let model = check_model(&config).await;
        if !(database && model) {
            bail!("not everything works; see above");
        }
        Ok(())
    })
}

/// How long one look at the database may take.
const LOOK: Duration = Duration::from_secs(60 * 60);

/// Opens the database as a server would, without migrating it.
async fn check_database(config: &Config) -> bool {
    // Looking through a large file for damage takes longer than any statement of a server may.
    let settings = &DatabaseSettings { statement_timeout: LOOK, ..config.database.clone() };
    let status = match Store::schema_status(settings).await {
        Ok(status) => status,
        Err(error) => {
            println!("database  ✗ {error}");
            return false;
        }
    };
    println!("database  ✓ {}", settings.url);
    if !status.pending.is_empty() {
        println!(
            "schema    ! pending: {}; `atlus migrate` or the next start applies it",
            status.pending.join(", ")
        );
        return true;
    }
    match Store::connect(settings).await {
        Ok(store) => {
            println!("schema    ✓ up to date");
            let sound = settings.url.kind() == Kind::Postgres || check_integrity(&store).await;
            store.close().await;
            sound
        }
        Err(error) => {
            println!("schema    ✗ {error}");
            false
        }
    }
}

/// Looks for damage in a SQLite file.
async fn check_integrity(store: &Store) -> bool {
    match store.quick_check().await {
        Ok(found) if found == "ok" => {
            println!("integrity ✓");
            true
        }
        Ok(damage) => {
            println!("integrity ✗ {damage}; restore a backup");
            false
        }
        Err(error) => {
            println!("integrity ✗ {error}");
            false
        }
    }
}

/// Asks the model for a word.
async fn check_model(config: &Config) -> bool {
    let model = match connect_model(&config.model) {
        Ok(model) => model,
        Err(error) => {
            println!("model     ✗ {error}");
            return false;
        }
    };
    let options = Options { max_tokens: Some(16), ..Options::default() };
    let deadline = Instant::now() + config.chat.model_timeout;
    let ask =
        Ask { messages: vec![Message::new(Role::User, "Say hello.")], options, stream: false, deadline };
    let (provider, name) = (model.provider(), model.name());
    match model.reply(&ask, &Deaf).await {
        Ok(_) => {
            println!("model     ✓ {provider}: {name}");
            true
        }
        Err(error) => {
            println!(
                "model     ✗ {provider}: {name}: {error}; check ATLUS_MODEL_URL, ATLUS_MODEL, ATLUS_MODEL_API_KEY"
            );
            false
        }
    }
}

/// Listens to nothing.
struct Deaf;

impl Listener for Deaf {
    fn hear(&self, _: &str) {}
}
