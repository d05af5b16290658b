//! Tokens of another issuer (JWT) over HTTP: as whom they let in, and for what. Which are good is shown in `jwt`.

use std::sync::LazyLock;

use atlus::{
    auth::jwt::{JwtSettings, KeySource},
    store::Kind,
};
use jsonwebtoken::Algorithm;
use serde_json::{Value, json};

use crate::{
    harness::{Client, Database, Server, on_both},
    jwt::{AUDIENCE, ISSUER, Signer},
};

static SIGNER: LazyLock<Signer> = LazyLock::new(|| Signer::new(Algorithm::ES256));

/// A server that takes keys and tokens.
struct Tokens(Server);

impl Tokens {
    async fn on(kind: Kind) -> Self {
        let server = Server::with(Database::on(kind).await, |config| {
            config.access.required = true;
            config.access.jwt = Some(JwtSettings {
                keys: KeySource::Pem(SIGNER.pem.clone()),
                issuer: ISSUER.to_owned(),
                audience: AUDIENCE.to_owned(),
                tenant_claim: Some("org".to_owned()),
                user_claim: "sub".to_owned(),
                scope_claim: Some("scp".to_owned()),
            });
        });
        Self(server.await)
    }

    fn client(&self, claims: &Value) -> Client {
        self.0.with_key(&SIGNER.token(&json!({}), claims))
    }
}

on_both! {
    async fn a_token_speaks_for_its_user_in_its_tenant(tokens: Tokens) {
        let ada = tokens.client(&json!({"scp": "read write"}));
        let session = ada.session(json!({})).await;
        assert_eq!(ada.read(&format!("/sessions/{session}")).await["user_id"], "ada");
        ada.post("/sessions", json!({"user_id": "bob"})).await.refused(403, "FORBIDDEN");

        let bob = tokens.client(&json!({"sub": "bob", "scp": "read write"}));
        bob.get(&format!("/sessions/{session}")).await.refused(404, "SESSION_NOT_FOUND");
        let stranger = tokens.client(&json!({"org": "other", "scp": "read write"}));
        stranger.get(&format!("/sessions/{session}")).await.refused(404, "SESSION_NOT_FOUND");
        // The same tenant as a key's of that name.
        let key = tokens.0.client_of("acme", "read", None).await;
        assert_eq!(key.read(&format!("/sessions/{session}")).await["user_id"], "ada");
    }

    async fn a_token_allows_what_its_claim_lists_and_never_admin(tokens: Tokens) {
        let reader = tokens.client(&json!({"scp": "atlus:read admin"}));
        assert_eq!(reader.get("/sessions").await.status, 200);
        reader.post("/sessions", json!({})).await.refused(403, "FORBIDDEN");
        reader.get("/keys").await.refused(403, "FORBIDDEN");
        tokens.client(&json!({"scp": "openid"})).get("/sessions").await.refused(403, "FORBIDDEN");
    }

    async fn a_bad_token_is_refused_and_says_why(tokens: Tokens) {
        let expired = tokens.client(&json!({"exp": 1}));
        assert!(expired.get("/sessions").await.refused(401, "UNAUTHORIZED").contains("expired"));
        let other = Signer::new(Algorithm::ES256).token(&json!({}), &json!({}));
        tokens.0.with_key(&other).get("/sessions").await.refused(401, "UNAUTHORIZED");
        tokens.client(&json!({"sub": "x".repeat(129)})).get("/sessions").await.refused(401, "UNAUTHORIZED");
        tokens.client(&json!({"org": "a b"})).get("/sessions").await.refused(401, "UNAUTHORIZED");
    }

    async fn without_the_setting_no_token_is_taken(guarded: GuardedByKeys) {
        let token = SIGNER.token(&json!({}), &json!({}));
        guarded.0.with_key(&token).get("/sessions").await.refused(401, "UNAUTHORIZED");
    }
}

struct GuardedByKeys(Server);

impl GuardedByKeys {
    async fn on(kind: Kind) -> Self {
        Self(Server::guarded(kind).await)
    }
}
