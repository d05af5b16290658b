//! `atlus copy`: everything from one database into another, of either kind.
//!
//! Session by session, each as an archive of its own, which is then read back and compared. What the target has
//! already stays as it is, so a copy that was stopped is simply run again. Keys go with their tenants; remembered answers
//! are not copied.

use std::{
    io::{IsTerminal, Write, stderr},
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use sha2::{Digest, Sha256};

use super::{archive::unless_interrupted, block_on};
use crate::{
    domain::{
        archive::digest,
        caller::Caller,
        clock::{Clock, SystemClock, Timestamp},
        key::ApiKey,
        page::{Direction, Page},
        session::Session,
    },
    store::{
        DatabaseSettings, DatabaseUrl, Export, HashedKey, Import, Imported, SessionFilter, SessionOrder,
        Store, What,
    },
};

/// Sessions listed at once.
const PAGE: usize = 20;
/// Sessions that are named where they differ.
const NAMED: usize = 10;
/// How often progress is shown, on a terminal and elsewhere.
const SHOWN: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];

#[derive(Args)]
pub(super) struct Copy {
    /// The database to read: sqlite://PATH or postgres://USER@HOST/DATABASE
    #[arg(long, value_name = "URL")]
    from: String,
    /// The database to write, which is brought up to date first
    #[arg(long, value_name = "URL")]
    to: String,
}

impl Copy {
    pub fn run(self) -> anyhow::Result<()> {
        let (from, to) = (settings("--from", &self.from)?, settings("--to", &self.to)?);
        if place(&from.url) == place(&to.url) {
            bail!("--from and --to are the same database, {}", from.url);
        }
        block_on(async {
            if !Store::schema_status(&from).await?.pending.is_empty() {
                bail!("{} is not up to date: run `atlus migrate` on it first", from.url);
            }
            Store::migrate(&to).await?;
            let stores = Stores { from: Store::connect(&from).await?, to: Store::connect(&to).await? };
            let copied = stores.copy().await;
            stores.from.close().await;
            stores.to.close().await;
            copied
        })
    }
}

fn settings(flag: &str, url: &str) -> anyhow::Result<DatabaseSettings> {
    let url = url.parse().map_err(|problem: String| anyhow::anyhow!("{flag} {problem}"))?;
    Ok(DatabaseSettings {
        url,
        migration_url: None,
        connections: 8,
        write_batch: 256,
        statement_timeout: Duration::from_secs(60),
        row_security: false,
    })
}

/// The same text for the same database, however its URL is written.
fn place(url: &DatabaseUrl) -> String {
    let text = url.to_string();
    let file = text.strip_prefix("sqlite://").and_then(|path| Path::new(path).canonicalize().ok());
    file.map_or(text, |file| file.display().to_string())
}

struct Stores {
    from: Store,
    to: Store,
}

impl Stores {
    async fn copy(&self) -> anyhow::Result<()> {
        let tenants = self.from.tenants().await?;
        let mut copied = Copied::new();
        for (tenant, _) in &tenants {
            copied.total += self.from.count_sessions(&Caller::of(*tenant)).await?;
        }
        for (tenant, name) in tenants {
            let target = self.to.tenant_named(&name, SystemClock.now()).await?;
            let callers = &(Caller::of(tenant), Caller::of(target));
            for temporary in [false, true] {
                self.copy_sessions(callers, temporary, &mut copied).await?;
            }
            self.copy_one(callers, What::Stated, &mut copied).await?;
            self.copy_keys(callers).await?;
        }
        copied.tell()
    }

    /// Copies the tenant's keys, so that callers need not be told of the move; of secrets only hashes are there.
    async fn copy_keys(&self, (source, target): &(Caller, Caller)) -> anyhow::Result<()> {
        let mut after = None;
        loop {
            let page = self.from.keys(source, after, PAGE).await?;
            for HashedKey { key, secret_hash } in page.items {
                let hash = secret_hash.as_slice().try_into().context("a key's hash is damaged")?;
                self.to.insert_key(&ApiKey { tenant: target.tenant, ..key }, hash).await?;
            }
            after = page.next;
            if after.is_none() {
                return Ok(());
            }
        }
    }

    async fn copy_sessions(
        &self,
        callers: &(Caller, Caller),
        temporary: bool,
        copied: &mut Copied,
    ) -> anyhow::Result<()> {
        let filter = SessionFilter { temporary, ..SessionFilter::default() };
        let (order, now) = ((SessionOrder::CreatedAt, Direction::Asc), Timestamp::from_millis(0));
        let mut after = None;
        loop {
            let page: Page<Session> =
                self.from.sessions(&callers.0, &filter, order, after, PAGE, now).await?;
            for session in page.items {
                self.copy_one(callers, What::Session(session.id), copied).await?;
                copied.done += 1;
                copied.show(0, false);
            }
            after = page.next;
            if after.is_none() {
                return Ok(());
            }
        }
    }

    /// Copies an archive's worth, reads it back and compares.
    async fn copy_one(
        &self,
        (source, target): &(Caller, Caller),
        what: What,
        copied: &mut Copied,
    ) -> anyhow::Result<()> {
        let export = self.from.export(source, what.clone(), SystemClock.now()).await?;
        // Deleted since it was listed.
        let Some(mut export) = export else { return Ok(()) };
        let mut import = self.to.import(target).await?;
        let done = unless_interrupted(pass_on(&mut export, &mut import, copied)).await;
        if done.is_err() {
            import.undo().await?;
        }
        let Imported { sessions, turns, facts, skipped_sessions } = done?;
        let sum = &mut copied.imported;
        sum.sessions += sessions;
        sum.turns += turns;
        sum.facts += facts;
        sum.skipped_sessions += skipped_sessions;
        let back = self.to.export(target, what.clone(), SystemClock.now()).await?;
        let mut back = back.context("what was copied has been deleted in the target meanwhile")?;
        while back.next().await?.is_some() {}
        copied.compare(&what, &export.digest(), &back.digest());
        Ok(())
    }
}

async fn pass_on(export: &mut Export, import: &mut Import, copied: &mut Copied) -> anyhow::Result<Imported> {
    while let Some(portion) = export.next().await? {
        import.feed(&portion).await?;
        copied.show(import.counts().turns, false);
    }
    copied.turns += import.counts().turns;
    Ok(import.finish().await?)
}

/// What was copied so far.
struct Copied {
    begun: Instant,
    shown: Instant,
    on_terminal: bool,
    total: i64,
    done: i64,
    turns: i64,
    imported: Imported,
    /// Of what was read from the source, and of what was read back from the target.
    digests: [Sha256; 2],
    different: Vec<String>,
}

impl Copied {
    fn new() -> Self {
        Self {
            begun: Instant::now(),
            shown: Instant::now(),
            on_terminal: stderr().is_terminal(),
            total: 0,
            done: 0,
            turns: 0,
            imported: Imported::default(),
            digests: [Sha256::new(), Sha256::new()],
            different: Vec::new(),
        }
    }

    fn compare(&mut self, what: &What, source: &str, target: &str) {
        self.digests[0].update(source);
        self.digests[1].update(target);
        if source != target {
            self.different.push(match what {
                What::Session(id) => id.to_string(),
                _ => "facts that were stated through the API".to_owned(),
            });
        }
    }

    /// Shows progress if it was not shown lately; `turns` are those of the session that is being copied.
    fn show(&mut self, turns: i64, at_last: bool) {
        let [terminal, elsewhere] = SHOWN;
        let seldom = if self.on_terminal { terminal } else { elsewhere };
        if self.shown.elapsed() < seldom && !at_last {
            return;
        }
        self.shown = Instant::now();
        let (turns, seconds) = (self.turns + turns, self.begun.elapsed().as_secs_f64());
        #[expect(clippy::cast_precision_loss, reason = "a rate for people to read")]
        let rate = turns as f64 / seconds.max(0.001);
        let line =
            format!("{} of {} sessions, {turns} turns, {rate:.0} turns per second", self.done, self.total);
        let mut out = stderr().lock();
        // Progress that cannot be shown is no reason to stop.
        let _ = match (self.on_terminal, at_last) {
            (true, false) => write!(out, "\r\x1b[K{line}").and_then(|()| out.flush()),
            (true, true) => writeln!(out, "\r\x1b[K{line}"),
            (false, _) => writeln!(out, "{line}"),
        };
    }

    fn tell(mut self) -> anyhow::Result<()> {
        self.show(0, true);
        let Imported { sessions, turns, facts, skipped_sessions } = self.imported;
        println!(
            "copied {sessions} sessions with {turns} turns, and {facts} facts; \
             skipped {skipped_sessions} sessions that were there already"
        );
        let count = self.different.len();
        if count > 0 {
            self.different.truncate(NAMED);
            bail!(
                "{count} differ in the target, where what was there before stays as it is: {}{}",
                self.different.join(", "),
                if count > NAMED { " …" } else { "" }
            );
        }
        println!("digest {} (both)", digest(&self.digests[0]));
        Ok(())
    }
}
