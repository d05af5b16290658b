//! `atlus serve`: migrate, then serve until told to stop.

use std::{sync::Arc, time::Duration};

use anyhow::Context;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
};

use super::systemd;
use crate::{
    app::App,
    config::{AccessConfig, Config, ModelConfig, Settings},
    model::http,
    server::{self, ServerSettings},
    telemetry::{self, metrics::METRICS, traces},
};

pub(super) fn run(settings: &Settings) -> anyhow::Result<()> {
    let config = settings.read()?;
    telemetry::start(&config.log);
    for name in Settings::unknown_variables() {
        tracing::warn!("{name} is no setting of this release and means nothing; see `atlus serve --help`");
    }
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(&config))
}

async fn serve(config: &Config) -> anyhow::Result<()> {
    // Before the database is touched: a server that cannot listen should change nothing.
    let listener = TcpListener::bind(config.listen).await.with_context(|| {
        format!(
            "cannot listen on {}; is another server running there? ATLUS_LISTEN names another",
            config.listen
        )
    })?;
    let mut server =
        ServerSettings { max_connections: room_for_connections(config), ..config.server.clone() };
    let sending = match &config.traces {
        Some(settings) => {
            // What is left of the traces is sent within the time that the server has to stop.
            server.grace = server.grace.saturating_sub(LAST_TRACES);
            let client = http::client(&settings.endpoint);
            Some(traces::start(settings, client).map_err(anyhow::Error::msg)?)
        }
        None => None,
    };
    let app = App::start(config).await?;
    stop_on_signal(&app)?;

    METRICS.started(app.store.kind().as_str());
    let address = listener.local_addr()?;
    let (database, model) = (&config.database.url, app.engine.model());
    tracing::info!(%database, model = model.name(), provider = model.provider(), "listening on http://{address}");
    if model.provider() == "builtin" {
        tracing::info!(
            "the built-in responder answers; ATLUS_MODEL_URL and ATLUS_MODEL connect a real model"
        );
    }
    tracing::info!("explore the API at http://{address}/docs");
    match &config.access {
        AccessConfig { required: false, .. } => {
            tracing::info!("callers need no key; ATLUS_AUTH=required asks for one, and {FIRST}");
        }
        AccessConfig { jwt: None, .. } if !app.store.has_keys().await? => {
            tracing::warn!("callers need a key and there is none yet: {FIRST}");
        }
        _ => {}
    }
    systemd::ready(address);
    tokio::spawn(systemd::report(address, app.stopping.clone()));
    server::serve(listener, app, server, config.jobs).await;
    if let Some(sending) = sending {
        sending.finish(LAST_TRACES).await;
    }
    Ok(())
}

/// How long a stopping server may take to send what is left of the traces.
const LAST_TRACES: Duration = Duration::from_secs(5);

/// How the first key is made.
const FIRST: &str = "`atlus keys create --name first --scope read,write,admin` makes one";

/// Files that the server opens for other things than clients, the model and Postgres.
const OTHER_FILES: usize = 100;

/// As many connections as the settings allow, or as the limit of open files has room for.
fn room_for_connections(config: &Config) -> usize {
    let calls = match &config.model {
        ModelConfig::Builtin => 0,
        ModelConfig::Server { concurrency, .. } => *concurrency,
    };
    let others = usize::try_from(config.database.connections).unwrap_or(0) + calls + OTHER_FILES;
    let wanted = config.server.max_connections + others;
    let allowed = server::allow_open_files(wanted as u64);
    let room = usize::try_from(allowed).unwrap_or(usize::MAX).saturating_sub(others).max(1);
    if room < config.server.max_connections {
        tracing::warn!(
            "only {allowed} files may be open, which is room for {room} connections and not for {}: raise the limit \
             (ulimit -n, LimitNOFILE) or lower ATLUS_MAX_CONNECTIONS",
            config.server.max_connections
        );
    }
    room.min(config.server.max_connections)
}

/// The first SIGTERM or SIGINT stops the server in order, the second at once.
fn stop_on_signal(app: &Arc<App>) -> anyhow::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let stopping = app.stopping.clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            if stopping.is_cancelled() {
                tracing::warn!("stopped at once, by a second signal");
                std::process::exit(1);
            }
            stopping.cancel();
        }
    });
    Ok(())
}
