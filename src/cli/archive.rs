//! `atlus export` and `atlus import`: an archive out of the database and into it, without a server.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, bail};
use clap::Args;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc::{self, Receiver},
    time::timeout,
};

use super::block_on;
use crate::{
    config::Settings,
    domain::{
        caller::Caller,
        clock::{Clock, SystemClock},
        ids::SessionId,
        session::UserId,
    },
    store::{DatabaseSettings, Import, Imported, Store, What},
};

/// Bytes of a file read at once.
const PORTION: usize = 64 << 10;
/// How long an import waits for more before it says that it is still there.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Args)]
pub(super) struct Export {
    #[command(flatten)]
    what: Wanted,
    /// The file to write; standard output if absent
    #[arg(long)]
    output: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct Wanted {
    /// One session: session_a1b2c3d4e5f67890
    #[arg(long, value_name = "ID")]
    session: Option<String>,
    /// Every session of a user, and what is known about them
    #[arg(long, value_name = "ID")]
    user: Option<String>,
    /// Everything
    #[arg(long)]
    all: bool,
}

#[derive(Args)]
pub(super) struct Take {
    /// The file to read; standard input if absent
    file: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

impl Export {
    pub fn run(self) -> anyhow::Result<()> {
        let what = self.what.read()?;
        let database = self.settings.read_database()?;
        block_on(async {
            let store = open(&database).await?;
            let written = match &self.output {
                None => write(&store, what, &mut io::stdout().lock()).await,
                Some(file) => write_file(&store, what, file).await,
            };
            store.close().await;
            written
        })
    }
}

impl Wanted {
    fn read(self) -> anyhow::Result<What> {
        match (self.session, self.user) {
            (Some(id), _) => match SessionId::parse(&id) {
                Some(id) => Ok(What::Session(id)),
                None => bail!("{id:?} is no session id: session_ and 16 hex digits"),
            },
            (None, Some(user)) => match UserId::try_from(user) {
                Ok(user) => Ok(What::User(user)),
                Err(problem) => bail!("--user {problem}"),
            },
            (None, None) => Ok(What::Tenant),
        }
    }
}

async fn write(store: &Store, what: What, out: &mut impl Write) -> anyhow::Result<()> {
    let unknown = match &what {
        What::Session(id) => format!("there is no {id}"),
        What::User(user) => format!("there is no user {}", user.as_str()),
        What::Tenant | What::Stated => String::new(),
    };
    let export = store.export(&Caller::ANYONE, what, SystemClock.now()).await?;
    let mut export = export.context(unknown)?;
    while let Some(portion) = export.next().await? {
        out.write_all(&portion).context("the archive cannot be written")?;
    }
    out.flush().context("the archive cannot be written")
}

/// Writes to a file beside the wanted one, which it becomes once it is whole.
async fn write_file(store: &Store, what: What, file: &Path) -> anyhow::Result<()> {
    let name = file.file_name().context("--output must name a file")?.to_string_lossy();
    let part = file.with_file_name(format!(".{name}.{}.part", std::process::id()));
    let whole = async {
        // What people said is for the owner's eyes alone.
        let out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part);
        let mut out = out.with_context(|| format!("{} cannot be written", file.display()))?;
        write(store, what, &mut out).await?;
        out.sync_all()?;
        fs::rename(&part, file).with_context(|| format!("{} cannot be written", file.display()))
    };
    let written = unless_interrupted(whole).await;
    if written.is_err() {
        // It may never have been made.
        let _ = fs::remove_file(&part);
    }
    written
}

impl Take {
    pub fn run(self) -> anyhow::Result<()> {
        let input = match &self.file {
            Some(path) => {
                portions(File::open(path).with_context(|| format!("{} cannot be read", path.display()))?)
            }
            None => portions(io::stdin()),
        };
        let database = self.settings.read_database()?;
        block_on(async {
            let store = open(&database).await?;
            let mut import = store.import(&Caller::ANYONE).await?;
            let taken = unless_interrupted(take(&mut import, input)).await;
            if taken.is_err() {
                import.undo().await?;
            }
            store.close().await;
            let Imported { sessions, turns, facts, skipped_sessions } = taken?;
            println!(
                "imported {sessions} sessions with {turns} turns, and {facts} facts; \
                 skipped {skipped_sessions} sessions that were there already"
            );
            Ok(())
        })
    }
}

async fn take(import: &mut Import, mut input: Receiver<io::Result<Vec<u8>>>) -> anyhow::Result<Imported> {
    loop {
        match timeout(PATIENCE, input.recv()).await {
            Ok(Some(portion)) => import.feed(&portion.context("the archive cannot be read")?).await?,
            Ok(None) => return Ok(import.finish().await?),
            // Whoever writes the archive takes their time. So do we.
            Err(_) => import.feed(&[]).await?,
        }
    }
}

/// Reads in a thread of its own, since reading may wait for ever and cannot be interrupted.
fn portions(mut input: impl Read + Send + 'static) -> Receiver<io::Result<Vec<u8>>> {
    let (sender, receiver) = mpsc::channel(1);
    thread::spawn(move || {
        loop {
            let mut portion = vec![0; PORTION];
            let portion = match input.read(&mut portion) {
                Ok(0) => return,
                Ok(length) => Ok(portion[..length].to_vec()),
                Err(error) => Err(error),
            };
            let failed = portion.is_err();
            // Nobody listens any more where the import was refused.
            if sender.blocking_send(portion).is_err() || failed {
                return;
            }
        }
    });
    receiver
}

/// Runs until the user stops it, so that what is half written can be removed.
pub(super) async fn unless_interrupted<T>(
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::select! {
        done = work => done,
        _ = terminate.recv() => bail!("stopped; run it again to go on"),
        _ = interrupt.recv() => bail!("stopped; run it again to go on"),
    }
}

/// Opens a database as a server would.
async fn open(database: &DatabaseSettings) -> anyhow::Result<Store> {
    Store::migrate(database).await?;
    Ok(Store::connect(database).await?)
}
