//! The wired parts of a running server; the only place that knows all concrete types.

use std::sync::Arc;

use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    auth::{Authenticator, address::TrustedProxies, rate::Limiter},
    chat::Engine,
    config::{AccessConfig, Config, ModelConfig, Provider},
    domain::clock::{Clock, SystemClock},
    model::{Model, anthropic::Anthropic, builtin::Builtin, calls::Calls, openai::OpenAi},
    store::{ConnectError, Store},
};

/// What handlers work with.
pub struct App {
    pub store: Store,
    pub engine: Engine,
    /// Tells who calls; absent where everybody may.
    pub auth: Option<Authenticator>,
    /// Counts calls; absent where anybody may call as often as they like.
    pub limiter: Option<Limiter>,
    /// Proxies whose word on a client's address is taken.
    pub trusted_proxies: TrustedProxies,
    pub clock: Arc<dyn Clock>,
    /// Work that must finish though its client leaves.
    pub tasks: TaskTracker,
    /// Cancelled once the server begins to stop.
    pub stopping: CancellationToken,
}

/// Why the parts could not be put together.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    #[error(transparent)]
    Database(#[from] ConnectError),
    #[error("{0}")]
    Model(String),
    #[error("{0}")]
    Access(String),
}

impl App {
    /// Migrates and opens the database, and connects the parts as `config` says.
    pub async fn start(config: &Config) -> Result<Arc<Self>, StartError> {
        Self::start_with(config, Arc::new(SystemClock)).await
    }

    /// The same by another clock.
    pub async fn start_with(config: &Config, clock: Arc<dyn Clock>) -> Result<Arc<Self>, StartError> {
        let model = connect_model(&config.model).map_err(StartError::Model)?;
        Store::migrate(&config.database).await?;
        let store = Store::connect(&config.database).await?;
        let engine = Engine::new(store.clone(), model, clock.clone(), config.chat.clone());
        let AccessConfig { required, jwt, rate_limit, trusted_proxies } = config.access.clone();
        let auth = match required {
            true => Some(Authenticator::new(store.clone(), clock.clone(), jwt).map_err(StartError::Access)?),
            false => None,
        };
        let limiter = rate_limit.map(|limit| Limiter::new(limit, &store));
        let (tasks, stopping) = (TaskTracker::new(), CancellationToken::new());
        Ok(Arc::new(Self { store, engine, auth, limiter, trusted_proxies, clock, tasks, stopping }))
    }

    /// Waits for turns and deletions under way, then closes the database.
    pub async fn finish(&self) {
        self.engine.finish().await;
        self.tasks.close();
        self.tasks.wait().await;
        if let Some(auth) = &self.auth
            && let Err(error) = auth.note_uses().await
        {
            tracing::warn!(error = &error as &dyn std::error::Error, "when keys were used is not noted");
        }
        self.store.close().await;
    }
}

/// The model that the settings name, with care for how it is called; fails with what to mend.
pub fn connect_model(config: &ModelConfig) -> Result<Arc<dyn Model>, String> {
    let ModelConfig::Server { provider, url, model, key, fallback, concurrency } = config else {
        return Ok(Arc::new(Builtin));
    };
    let model: Box<dyn Model> = match provider {
        Provider::OpenAi => Box::new(OpenAi::new(url, model.clone(), key.clone())?),
        Provider::Anthropic => Box::new(Anthropic::new(url, model.clone(), key.clone())?),
    };
    Ok(Arc::new(Calls::new(model, fallback.clone(), *concurrency)))
}
