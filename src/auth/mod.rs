//! Who calls: what a caller shows is turned into a [`Caller`], and how often they call is counted.

pub mod address;
mod jwks;
pub mod jwt;
pub mod rate;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jwt::{JwtSettings, Token, Verifier};
use moka::future::Cache;
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;

use crate::{
    domain::{
        caller::{Caller, TenantId},
        clock::{Clock, Timestamp},
        key::{ApiKey, KeyId, Scope, Scopes, Secret, SecretHash, TenantName},
        session::UserId,
    },
    store::{self, Store},
};

/// How long what is known of a key is gone by: how long a revoked key works on at other instances.
const KEYS_KNOWN: Duration = Duration::from_secs(3);
/// Keys known at once, those that do not exist among them.
const KEYS: u64 = 10_000;
/// Keys looked up at once, so that a flood of wrong ones does not take every connection.
const LOOKUPS: usize = 4;

/// Tells who calls.
pub struct Authenticator {
    store: Store,
    clock: Arc<dyn Clock>,
    keys: Cache<SecretHash, Option<Arc<ApiKey>>>,
    lookups: Semaphore,
    /// Takes tokens of another issuer, if any are taken.
    tokens: Option<Verifier>,
    /// The tenants that tokens have named.
    tenants: Cache<TenantName, TenantId>,
    /// When each key was last used, as far as that is not yet noted.
    uses: Mutex<HashMap<(TenantId, KeyId), Timestamp>>,
}

/// Why a caller was not let in.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Refusal {
    #[error("this call needs a key: Authorization: Bearer atlus_…")]
    Nothing,
    /// One text for whatever is wrong with it: a stranger learns nothing.
    #[error("the key is not valid: it may be mistyped, expired or revoked")]
    Invalid,
    #[error(transparent)]
    Token(#[from] jwt::Refusal),
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Authenticator {
    /// Takes keys, and tokens as `jwt` says. Fails with what to mend about that.
    pub fn new(store: Store, clock: Arc<dyn Clock>, jwt: Option<JwtSettings>) -> Result<Self, String> {
        let keys = Cache::builder().max_capacity(KEYS).time_to_live(KEYS_KNOWN).build();
        let tokens = jwt.map(Verifier::new).transpose()?;
        let (lookups, uses, tenants) = (Semaphore::new(LOOKUPS), Mutex::default(), Cache::new(KEYS));
        Ok(Self { store, clock, keys, lookups, tokens, tenants, uses })
    }

    /// For whom it speaks what was shown: a key, or a token.
    pub async fn caller(&self, shown: &str) -> Result<Caller, Refusal> {
        match &self.tokens {
            Some(tokens) if !shown.starts_with(Secret::PREFIX) => {
                self.bearer_of(tokens.verify(shown).await?).await
            }
            _ => self.owner_of(shown).await,
        }
    }

    /// A token speaks for its user alone, and so never has `admin`.
    async fn bearer_of(&self, token: Token) -> Result<Caller, Refusal> {
        let user = UserId::try_from(token.user)
            .map_err(|_| jwt::Refusal::Invalid("The token's user is too long"))?;
        let tenant = match token.tenant {
            None => TenantId::DEFAULT,
            Some(name) => {
                let name: TenantName = name
                    .parse()
                    .map_err(|_| jwt::Refusal::Invalid("The token's tenant cannot be one's name"))?;
                let make = self.store.tenant_named(name.as_str(), self.clock.now());
                let tenant = self.tenants.try_get_with(name.clone(), make).await;
                tenant.map_err(|error| Refusal::Store((*error).clone()))?
            }
        };
        let scopes = token.scopes.map_or(Scopes::USUAL, |names| {
            // Of what its issuer allows elsewhere nothing is known here.
            names.iter().filter_map(|name| Scopes::named(name)).collect()
        });
        Ok(Caller { tenant, user: Some(user), scopes: scopes.without(Scope::Admin), key: None })
    }

    /// Whose the key is.
    async fn owner_of(&self, shown: &str) -> Result<Caller, Refusal> {
        let secret = Secret::parse(shown).ok_or(Refusal::Invalid)?;
        let hash = secret.hash();
        let key = self.keys.try_get_with(hash, self.look_up(hash)).await;
        let key = key.map_err(|error| Refusal::Store((*error).clone()))?.ok_or(Refusal::Invalid)?;
        let now = self.clock.now();
        if key.expires_at.is_some_and(|expiry| expiry <= now) {
            return Err(Refusal::Invalid);
        }
        self.uses.lock().unwrap_or_else(PoisonError::into_inner).insert((key.tenant, key.id), now);
        Ok(Caller { tenant: key.tenant, user: key.user_id.clone(), scopes: key.scopes, key: Some(key.id) })
    }

    async fn look_up(&self, hash: SecretHash) -> store::Result<Option<Arc<ApiKey>>> {
        // Never closed, so there is always a place in the end.
        let _place = self.lookups.acquire().await;
        let found = self.store.key_by_hash(&hash).await?;
        let same = |found: &store::HashedKey| found.secret_hash.ct_eq(&hash).into();
        Ok(found.filter(same).map(|found| Arc::new(found.key)))
    }

    /// A key that was revoked here works no more, at once.
    pub async fn forget(&self, hash: &[u8]) {
        if let Ok(hash) = SecretHash::try_from(hash) {
            self.keys.invalidate(&hash).await;
        }
    }

    /// Keys that were removed here, whichever they were, work no more, at once.
    pub fn forget_all(&self) {
        self.keys.invalidate_all();
    }

    /// Notes which keys were used since this was last called; those that could not be noted are noted next time.
    pub async fn note_uses(&self) -> store::Result<()> {
        let uses = std::mem::take(&mut *self.uses.lock().unwrap_or_else(PoisonError::into_inner));
        let list: Vec<_> = uses.iter().map(|((tenant, key), at)| (*tenant, *key, *at)).collect();
        if list.is_empty() {
            return Ok(());
        }
        let noted = self.store.note_key_uses(&list).await;
        match &noted {
            Ok(()) => {
                for (tenant, key, _) in list {
                    tracing::info!(target: "atlus::audit", event = "key_used", %key, tenant = tenant.number());
                }
            }
            Err(_) => {
                let mut now = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
                for (key, at) in uses {
                    now.entry(key).or_insert(at);
                }
            }
        }
        noted
    }
}
