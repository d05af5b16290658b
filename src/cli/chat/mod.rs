//! `atlus chat`: a conversation in the terminal, with a running server or with a database.
//!
//! It knows ATLUS by its HTTP interface alone. Where no server is named, the one that `atlus serve` runs is started in
//! this process, on a port of its own, and talked to like any other.

mod client;
mod conversation;
mod line;
mod reply;
mod terminal;

use std::{
    io::{self, Write},
    time::Duration,
};

use anyhow::Context;
use clap::Args;
use tokio::{
    net::TcpListener,
    signal::{
        ctrl_c,
        unix::{SignalKind, signal},
    },
    task::JoinHandle,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use self::{
    client::Client,
    conversation::{Conversation, First},
    terminal::Terminal,
};
use crate::{app::App, config::Settings, server, telemetry};

#[derive(Args)]
pub(super) struct Chat {
    /// Go on with this session [default: a new one, made with the first message]
    #[arg(long, value_name = "ID", conflicts_with = "newest")]
    session: Option<String>,

    /// Go on with the user's newest active session
    #[arg(short = 'c', long = "continue")]
    newest: bool,

    /// Whose sessions are listed, continued and made
    #[arg(long, value_name = "ID", default_value = "default_user")]
    user: String,

    /// The server to talk to, e.g. http://127.0.0.1:5000. Without one, a server of its own on the database that the
    /// settings below name; with one, they mean nothing
    #[arg(long, value_name = "URL", env = "ATLUS_SERVER", hide_env_values = true)]
    server: Option<String>,

    /// Key for that server
    #[arg(long, env = "ATLUS_API_KEY", hide_env_values = true)]
    key: Option<String>,

    #[command(flatten)]
    settings: Settings,
}

impl Chat {
    pub fn run(self) -> anyhow::Result<()> {
        // More than one thread: the server in this process goes on while text is written to a slow terminal.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        let well = runtime.block_on(self.talk())?;
        if !well {
            std::process::exit(1);
        }
        Ok(())
    }

    /// Holds the conversation; whether it ended well.
    async fn talk(self) -> anyhow::Result<bool> {
        let given = |value: Option<String>| value.filter(|value| !value.is_empty());
        let (url, own) = match given(self.server) {
            Some(url) => (url, None),
            None => {
                let own = OwnServer::start(self.settings).await?;
                (own.url.clone(), Some(own))
            }
        };
        let first = match self.session {
            Some(id) => First::Session(id),
            None if self.newest => First::Newest,
            None => First::New,
        };
        let client = Client::new(&url, given(self.key).as_deref())?;
        let place = own.as_ref().map_or_else(|| client.address(), |own| own.database.clone());
        let conversation = Conversation::new(client, Terminal::open()?, self.user);
        let outcome = tokio::select! {
            outcome = conversation.hold(&place, first) => outcome,
            told = told_to_end() => told.map(|()| false),
        };
        if let Some(own) = own {
            own.stop().await;
        }
        outcome
    }
}

/// How long a stopping server may take without a word about it.
const QUIET_STOP: Duration = Duration::from_secs(1);

/// The server in this process.
struct OwnServer {
    url: String,
    /// The database, without its password.
    database: String,
    stopping: CancellationToken,
    serving: JoinHandle<()>,
}

impl OwnServer {
    async fn start(settings: Settings) -> anyhow::Result<Self> {
        let config = settings.private().read()?;
        telemetry::start(&config.log);
        let listener = TcpListener::bind(config.listen).await.context("cannot listen on 127.0.0.1")?;
        let url = format!("http://{}", listener.local_addr()?);
        let (app, database) = (App::start(&config).await?, config.database.url.to_string());
        let stopping = app.stopping.clone();
        let serving = tokio::spawn(server::serve(listener, app, config.server, config.jobs));
        Ok(Self { url, database, stopping, serving })
    }

    /// Finishes what is under way: a turn that nobody waits for any more completes all the same.
    async fn stop(mut self) {
        self.stopping.cancel();
        if timeout(QUIET_STOP, &mut self.serving).await.is_err() {
            // The terminal may be gone.
            let _ = writeln!(io::stderr(), "finishing what is under way; Ctrl-C stops at once");
            tokio::select! {
                _ = self.serving => {}
                _ = ctrl_c() => {}
                _ = told_to_end() => {}
            }
        }
    }
}

/// Waits for the signals of those who do not sit at the terminal, or close it.
async fn told_to_end() -> anyhow::Result<()> {
    let (mut terminate, mut hang_up) = (signal(SignalKind::terminate())?, signal(SignalKind::hangup())?);
    tokio::select! {
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    Ok(())
}
