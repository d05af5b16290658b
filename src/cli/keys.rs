//! `atlus keys`: made, listed and revoked on the database itself, so that the first key needs no server.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};

use super::block_on;
use crate::{
    api::keys::{KeyView, KeyWithSecret},
    config::Settings,
    domain::{
        caller::Caller,
        clock::{Clock, SystemClock},
        key::{ApiKey, KeyId, KeyName, Scope, Scopes, Secret, TenantName},
        session::UserId,
    },
    store::Store,
};

#[derive(Args)]
pub(super) struct Keys {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a key; its secret is shown this once
    Create(Create),
    /// List the keys of every tenant, the newest first
    List(List),
    /// Revoke a key: it stops working at every server within 3 seconds
    Revoke(Revoke),
}

#[derive(Args)]
struct Create {
    /// What to call it
    #[arg(long)]
    name: String,
    /// Whose data it opens; a tenant that is not there yet is made
    #[arg(long, default_value = "default")]
    tenant: String,
    /// What it allows, with commas between: read, write, admin
    #[arg(long, default_value = "read,write")]
    scope: String,
    /// The only user whose data it may see and change
    #[arg(long)]
    user: Option<String>,
    /// How long it works, e.g. 90d; without this it does not expire
    #[arg(long)]
    expires: Option<String>,
    /// How it is told
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
struct List {
    /// How it is told
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
struct Revoke {
    /// The key's id: key_ and 16 hex digits
    id: String,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Text,
    Json,
}

/// Keys read at once.
const PAGE: usize = 100;

impl Keys {
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            Command::Create(create) => block_on(create.run()),
            Command::List(list) => block_on(list.run()),
            Command::Revoke(revoke) => block_on(revoke.run()),
        }
    }
}

/// The database, brought up to date first.
async fn open(settings: &Settings) -> anyhow::Result<Store> {
    let settings = settings.read_database()?;
    Store::migrate(&settings).await?;
    Ok(Store::connect(&settings).await?)
}

impl Create {
    async fn run(self) -> anyhow::Result<()> {
        // All that is given is read before the database is touched.
        let wrong = |flag: &'static str| move |problem: String| anyhow::anyhow!("--{flag} {problem}");
        let name = KeyName::try_from(self.name).map_err(wrong("name"))?;
        let tenant: TenantName = self.tenant.parse().map_err(wrong("tenant"))?;
        let user = self.user.map(UserId::try_from).transpose().map_err(wrong("user"))?;
        let scopes = Scopes::parse(&self.scope);
        let scopes =
            scopes.map_err(|name| anyhow::anyhow!("--scope must name read, write, admin, not {name:?}"))?;
        if scopes.is_empty() {
            bail!("--scope must name at least one of read, write, admin");
        }
        if user.is_some() && scopes.allow(Scope::Admin) {
            bail!("--scope must not hold admin where --user binds the key to a user");
        }
        let lasting = self.expires.map(|text| humantime::parse_duration(&text)).transpose();
        let lasting = lasting.ok().filter(|lasting| *lasting != Some(Duration::ZERO));
        let lasting = lasting.context("--expires must be a duration: 12h, 90d")?;

        let (store, now) = (open(&self.settings).await?, SystemClock.now());
        let key = ApiKey {
            tenant_name: tenant.as_str().to_owned(),
            user_id: user,
            expires_at: lasting.map(|lasting| now + lasting),
            ..ApiKey::new(store.tenant_named(tenant.as_str(), now).await?, name, scopes, now)
        };
        let secret = Secret::random();
        store.insert_key(&key, &secret.hash()).await?;
        store.close().await;
        if self.format == Format::Json {
            println!("{}", KeyWithSecret::new(key, &secret).json());
            return Ok(());
        }
        println!("{}", secret.reveal());
        eprintln!("{}", describe(&key));
        eprintln!("Send it as `Authorization: Bearer …`. It is shown this once; only its hash is kept.");
        Ok(())
    }
}

impl List {
    async fn run(self) -> anyhow::Result<()> {
        let store = open(&self.settings).await?;
        let mut views = Vec::new();
        for (tenant, _) in store.tenants().await? {
            let mut after = None;
            loop {
                let page = store.keys(&Caller::of(tenant), after, PAGE).await?;
                views.extend(page.items);
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
        }
        store.close().await;
        views.sort_by_key(|found| std::cmp::Reverse(found.key.created_at));
        for found in views {
            match self.format {
                Format::Json => println!("{}", KeyView::from(found).json()),
                Format::Text => println!("{}", describe(&found.key)),
            }
        }
        Ok(())
    }
}

impl Revoke {
    async fn run(self) -> anyhow::Result<()> {
        let id = KeyId::parse(&self.id)
            .context("a key's id is key_ and 16 hex digits; `atlus keys list` shows them")?;
        let store = open(&self.settings).await?;
        let mut revoked = None;
        for (tenant, _) in store.tenants().await? {
            revoked = revoked.or(store.remove_key(&Caller::of(tenant), id).await?);
        }
        store.close().await;
        let revoked = revoked.with_context(|| format!("there is no key {id}"))?;
        println!("revoked {}", describe(&revoked.key));
        Ok(())
    }
}

/// A key in a line.
fn describe(key: &ApiKey) -> String {
    let user = key.user_id.as_ref().map(|user| format!(", user {}", user.as_str())).unwrap_or_default();
    let expiry = key.expires_at.map(|expiry| format!(", expires {expiry}")).unwrap_or_default();
    let used = key.last_used_at.map(|used| format!(", last used {used}")).unwrap_or_default();
    let ApiKey { id, name, tenant_name, scopes, created_at, .. } = key;
    format!("{id}  {name:?}: tenant {tenant_name}, {scopes}{user}, made {created_at}{expiry}{used}")
}
