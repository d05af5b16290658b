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

use moka::future::Cache;
use subtle::ConstantTimeEq;
use tokio::sync::Semaphore;

use crate::{
    domain::{
        caller::{Caller, TenantId},
        clock::{Clock, Timestamp},
        key::{ApiKey, KeyId, Secret, SecretHash},
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
    Store(store::Error),
}

impl Authenticator {
    pub fn new(store: Store, clock: Arc<dyn Clock>) -> Self {
        let keys = Cache::builder().max_capacity(KEYS).time_to_live(KEYS_KNOWN).build();
        Self { store, clock, keys, lookups: Semaphore::new(LOOKUPS), uses: Mutex::default() }
    }

    /// Whose the secret is that was shown.
    pub async fn caller(&self, shown: &str) -> Result<Caller, Refusal> {
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
