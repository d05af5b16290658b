//! API keys at rest: what is kept of a secret is its hash.

use super::{
    Result, Store,
    db::{Reach, Statement},
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    key::{ApiKey, KeyId, SecretHash},
    page::{Page, Position},
    session::UserId,
};

const KEYS: &str = "SELECT key_id, tenant_id, name, scopes, user_id, created_at, expires_at, last_used_at, secret_hash, \
     (SELECT t.name FROM tenants t WHERE t.tenant_id = api_keys.tenant_id) AS tenant_name FROM api_keys";

/// A key with the hash of its secret.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct HashedKey {
    #[sqlx(flatten)]
    pub key: ApiKey,
    pub secret_hash: Vec<u8>,
}

impl Store {
    /// Keeps a key.
    pub async fn insert_key(&self, key: &ApiKey, hash: &SecretHash) -> Result<()> {
        let mut tx = self.db.begin(key.tenant).await?;
        tx.sql(
            "INSERT INTO api_keys (key_id, tenant_id, name, scopes, user_id, created_at, expires_at, last_used_at, \
                 secret_hash) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (tenant_id, key_id) DO NOTHING",
        )
        .bind(key.id)
        .bind(key.tenant)
        .bind(key.name.as_str())
        .bind(key.scopes.to_string())
        .bind(key.user_id.clone())
        .bind(key.created_at)
        .bind(key.expires_at)
        .bind(key.last_used_at)
        .bind(hash.to_vec())
        .run()
        .await?;
        Ok(tx.commit().await?)
    }

    /// The key with this hash, of whatever tenant: whose it is tells whom the caller speaks for.
    pub async fn key_by_hash(&self, hash: &SecretHash) -> Result<Option<HashedKey>> {
        let key = self.db.read(Reach::Everybody, KEYS).push(" WHERE secret_hash = $1");
        Ok(key.bind(hash.to_vec()).optional().await?)
    }

    /// Whether any tenant has a key.
    pub async fn has_keys(&self) -> Result<bool> {
        let has = "SELECT EXISTS (SELECT 1 FROM api_keys)";
        let (has,) = self.db.read(Reach::Everybody, has).one().await?;
        Ok(has)
    }

    /// A page of the tenant's keys, the newest first.
    pub async fn keys(
        &self,
        caller: &Caller,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Page<HashedKey>> {
        let mut page = self.db.read(caller, KEYS).push(" WHERE tenant_id = $1").bind(caller.tenant);
        page = bound_to(page, caller.user.as_ref());
        if let Some(after) = after {
            page = page.push(" AND (created_at, key_id) < (").push_bind(after.key).push(", ");
            page = page.push_bind(after.id).push(")");
        }
        let page = page.push(" ORDER BY created_at DESC, key_id DESC LIMIT ");
        let rows = page.push_bind(i64::try_from(limit + 1).unwrap_or(i64::MAX)).all().await?;
        let position = |HashedKey { key, .. }: &HashedKey| Position {
            key: key.created_at.as_millis(),
            id: key.id.number(),
        };
        Ok(Page::cut(rows, limit, position))
    }

    /// Removes a key; what it was.
    pub async fn remove_key(&self, caller: &Caller, id: KeyId) -> Result<Option<HashedKey>> {
        let mut tx = self.db.begin(caller).await?;
        let key = tx.sql(KEYS).push(" WHERE key_id = $1 AND tenant_id = $2").bind(id).bind(caller.tenant);
        let key: Option<HashedKey> = bound_to(key, caller.user.as_ref()).optional().await?;
        if key.is_some() {
            let remove = "DELETE FROM api_keys WHERE key_id = $1 AND tenant_id = $2";
            tx.sql(remove).bind(id).bind(caller.tenant).run().await?;
        }
        tx.commit().await?;
        Ok(key)
    }

    /// Notes when keys were last used.
    pub async fn note_key_uses(&self, uses: &[(TenantId, KeyId, Timestamp)]) -> Result<()> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
        for (tenant, key, at) in uses {
            // Another instance may have seen it later.
            let note = "UPDATE api_keys SET last_used_at = $3 WHERE tenant_id = $1 AND key_id = $2 \
                 AND (last_used_at IS NULL OR last_used_at < $3)";
            tx.sql(note).bind(*tenant).bind(*key).bind(*at).run().await?;
        }
        Ok(tx.commit().await?)
    }
}

/// Narrows to keys that are bound to a user, if one is given.
fn bound_to<'c>(keys: Statement<'c>, user: Option<&UserId>) -> Statement<'c> {
    keys.push_some(" AND user_id = ", user)
}
