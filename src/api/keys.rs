//! Keys over HTTP: made, listed and revoked by whoever has one with the scope `admin`.

use std::sync::Arc;

use poem::Request;
use poem_openapi::{
    Object, OpenApi,
    param::{Path, Query},
    types::ToJSON,
};
use serde::Deserialize;

use super::{
    Arrival, Tag, audit,
    auth::refuse_foreign,
    envelope::{Created, Found, PageView, created, found},
    error::{ApiError, Code},
    json::Body,
    wire::{Cursor, KeyRef, Limit},
};
use crate::{
    app::App,
    domain::{
        caller::Caller,
        clock::Timestamp,
        key::{ApiKey, KeyId, KeyName, Scope, Scopes, Secret},
        page::Listing,
        session::UserId,
    },
    store::HashedKey,
};

/// A key to be made.
#[derive(Object, Deserialize)]
struct NewKey {
    /// What to call it: 1 to 100 characters.
    name: KeyName,
    /// What it allows, no more than your own key does: `read` every GET but those on keys; `write` every other call on
    /// sessions, chat, turns, memory, search and archives; `admin` keys and erasing users. `read` and `write` if absent.
    #[oai(nullable, validator(min_items = 1))]
    #[serde(default)]
    scopes: Option<Vec<Scope>>,
    /// The only user whose data it may see and change; such a key never has `admin`.
    #[oai(nullable)]
    #[serde(default)]
    user_id: Option<UserId>,
    /// When it stops working; never if absent.
    #[oai(nullable)]
    #[serde(default)]
    expires_at: Option<Timestamp>,
}

/// A key, without its secret.
#[derive(Object)]
#[oai(rename = "Key")]
pub struct KeyView {
    /// Names the key where it is revoked; no secret.
    key_id: KeyId,
    /// What it is called.
    name: String,
    /// Whose data it opens.
    tenant: String,
    /// What it allows.
    scopes: Vec<Scope>,
    /// The only user it speaks for; null if it is bound to none.
    #[oai(nullable)]
    user_id: Option<UserId>,
    /// When it was made.
    created_at: Timestamp,
    /// When it stops working; null if it never does.
    #[oai(nullable)]
    expires_at: Option<Timestamp>,
    /// When it was last used, to about a minute; null if it never was.
    #[oai(nullable)]
    last_used_at: Option<Timestamp>,
}

/// A key with its secret, which is shown this once.
#[derive(Object)]
pub struct KeyWithSecret {
    /// Names the key where it is revoked; no secret.
    key_id: KeyId,
    /// What to send as `Authorization: Bearer …`. Only its hash is kept.
    secret: String,
    /// What it is called.
    name: String,
    /// Whose data it opens.
    tenant: String,
    /// What it allows.
    scopes: Vec<Scope>,
    /// The only user it speaks for; null if it is bound to none.
    #[oai(nullable)]
    user_id: Option<UserId>,
    /// When it was made.
    created_at: Timestamp,
    /// When it stops working; null if it never does.
    #[oai(nullable)]
    expires_at: Option<Timestamp>,
}

impl From<HashedKey> for KeyView {
    fn from(HashedKey { key, .. }: HashedKey) -> Self {
        Self {
            key_id: key.id,
            name: key.name,
            tenant: key.tenant_name,
            scopes: key.scopes.list(),
            user_id: key.user_id,
            created_at: key.created_at,
            expires_at: key.expires_at,
            last_used_at: key.last_used_at,
        }
    }
}

impl KeyView {
    /// An item of `GET /keys`.
    pub fn json(&self) -> String {
        self.to_json_string()
    }
}

impl KeyWithSecret {
    /// A key as it is shown to whoever made it.
    pub fn new(key: ApiKey, secret: &Secret) -> Self {
        Self {
            key_id: key.id,
            secret: secret.reveal().to_owned(),
            name: key.name,
            tenant: key.tenant_name,
            scopes: key.scopes.list(),
            user_id: key.user_id,
            created_at: key.created_at,
            expires_at: key.expires_at,
        }
    }

    /// The `data` of `POST /keys`.
    pub fn json(&self) -> String {
        self.to_json_string()
    }
}

pub struct KeysApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/keys", tag = "Tag::Keys")]
impl KeysApi {
    /// Create a key
    ///
    /// For your own tenant, and with no wider scopes than your own key has. The answer holds the secret, which is shown
    /// this once and kept only as a hash; so no `Idempotency-Key` is taken here.
    #[oai(path = "/", method = "post", operation_id = "createKey")]
    async fn create(
        &self,
        caller: Caller,
        arrival: Arrival,
        request: &Request,
        body: Body<NewKey>,
    ) -> Result<Created<KeyWithSecret>, ApiError> {
        if request.headers().contains_key("Idempotency-Key") {
            let problem = "is not taken here: an answer with a secret is not remembered";
            return Err(ApiError::field("Idempotency-Key", problem));
        }
        let (NewKey { name, scopes, user_id, expires_at }, now) = (body.value, self.0.clock.now());
        let scopes = scopes.map_or(Scopes::USUAL, |scopes| scopes.into_iter().map(Scopes::from).collect());
        if scopes.is_empty() {
            return Err(ApiError::field("scopes", "must name at least one of read, write, admin"));
        }
        if user_id.is_some() && scopes.allow(Scope::Admin) {
            return Err(ApiError::field("scopes", "must not hold admin where the key is bound to a user"));
        }
        if expires_at.is_some_and(|expiry| expiry <= now) {
            return Err(ApiError::field("expires_at", "must be in the future"));
        }
        if !scopes.is_within(caller.scopes) {
            let message = format!("Your key allows {}, and a key that it makes no more", caller.scopes);
            return Err(ApiError::new(Code::Forbidden, message));
        }
        if let Some(user) = &user_id {
            refuse_foreign(&caller, user)?;
        }
        let key = ApiKey {
            tenant_name: self.0.store.tenant_name(&caller).await?,
            user_id: user_id.or_else(|| caller.user.clone()),
            expires_at,
            ..ApiKey::new(caller.tenant, name, scopes, now)
        };
        let secret = Secret::random();
        self.0.store.insert_key(&key, &secret.hash()).await?;
        audit::key("key_created", &arrival, &key.id);
        Ok(created(KeyWithSecret::new(key, &secret), now))
    }

    /// List keys
    ///
    /// Those of your tenant, the newest first, without their secrets.
    #[oai(path = "/", method = "get", operation_id = "listKeys")]
    async fn list(
        &self,
        caller: Caller,
        /// Keys on a page at most: 1 to 100.
        #[oai(default)]
        limit: Query<Limit>,
        /// `next_cursor` of the page before.
        cursor: Query<Option<Cursor>>,
    ) -> Result<Found<PageView<KeyView>>, ApiError> {
        let listing = Listing::of(&["keys"]);
        let after = Cursor::read(cursor.0.as_ref(), listing)?;
        let page = self.0.store.keys(&caller, after, limit.0.0).await?;
        Ok(found(PageView::of(page, listing), self.0.clock.now()))
    }

    /// Revoke a key
    ///
    /// It stops working here at once, and at every other instance within 3 seconds. The answer is the key as it was.
    #[oai(path = "/:key_id", method = "delete", operation_id = "revokeKey")]
    async fn revoke(
        &self,
        caller: Caller,
        arrival: Arrival,
        /// The key's id.
        key_id: Path<KeyRef>,
    ) -> Result<Found<KeyView>, ApiError> {
        let not_found = || ApiError::key_not_found(&key_id.text);
        let id = key_id.id.ok_or_else(not_found)?;
        let key = self.0.store.remove_key(&caller, id).await?.ok_or_else(not_found)?;
        if let Some(auth) = &self.0.auth {
            auth.forget(&key.secret_hash).await;
        }
        audit::key("key_revoked", &arrival, &id);
        Ok(found(key.into(), self.0.clock.now()))
    }
}
