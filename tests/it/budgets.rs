//! The tokens that a user may use in a day.

use std::time::Duration;

use atlus::{chat::Extract, jobs, store::Kind};
use serde_json::json;

use crate::{
    harness::{Server, on_both},
    models::{Script, Upstream},
};

/// A server whose users may use 100 tokens a day. Its model says 10 of each chat's usage.
struct Frugal(Server, Upstream);

impl Frugal {
    async fn on(kind: Kind) -> Self {
        Self::with(kind, |message| match message {
            "hang" => Script::Hang,
            "fail" => Script::Raw(400, vec![], String::new()),
            message => Script::Say(format!("You said: {message}")),
        })
        .await
    }

    async fn with(kind: Kind, script: impl Fn(&str) -> Script + Send + Sync + 'static) -> Self {
        let upstream = Upstream::start(script).await;
        let budget = |config: &mut atlus::config::Config| config.chat.tokens_per_user_day = Some(100);
        Self(Server::with_model(kind, &upstream.url, budget).await, upstream)
    }

    /// What everybody has used.
    async fn used(&self) -> i64 {
        self.0.count("SELECT CAST(COALESCE(SUM(tokens), 0) AS BIGINT) FROM token_uses").await
    }
}

on_both! {
    async fn what_the_model_says_it_used_is_taken_off_the_budget(frugal: Frugal) {
        let session = frugal.0.session(json!({"user_id": "jo"})).await;
        let answer = frugal.0.chat(&session, "Hello").await;
        assert_eq!(frugal.used().await, answer.data()["usage"]["total_tokens"].as_i64().unwrap());
    }

    async fn a_message_is_refused_before_the_model_is_asked_once_the_budget_is_used(frugal: Frugal) {
        let session = frugal.0.session(json!({"user_id": "jo"})).await;
        frugal.0.run_sql("INSERT INTO token_uses (tenant_id, user_id, day, work, tokens) \
            VALUES (1, 'jo', 19723, 1, 100)").await;
        let refused = frugal.0.chat(&session, "Hello").await;
        assert!(refused.refused(429, "TOKEN_BUDGET_EXCEEDED").contains("100 tokens"));
        // 12:00 UTC: half a day is left.
        assert_eq!(refused.headers["retry-after"], "43200");
        let stream = json!({"session_id": session, "message": "Hello"});
        frugal.0.post("/chat/stream", stream).await.refused(429, "TOKEN_BUDGET_EXCEEDED");
        frugal.0.post("/chat", json!({"user_id": "jo", "message": "Hello"})).await
            .refused(429, "TOKEN_BUDGET_EXCEEDED");
        assert!(frugal.1.asked().is_empty());
        assert_eq!(frugal.0.get(&format!("/sessions/{session}/turns")).await.items().len(), 0);
    }

    async fn a_refused_message_frees_its_idempotency_key(frugal: Frugal) {
        let session = frugal.0.session(json!({"user_id": "jo"})).await;
        frugal.0.run_sql("INSERT INTO token_uses (tenant_id, user_id, day, work, tokens) \
            VALUES (1, 'jo', 19723, 1, 100)").await;
        let message = json!({"session_id": session, "message": "Hello"});
        frugal.0.post_once("/chat", "k", &message).await.refused(429, "TOKEN_BUDGET_EXCEEDED");
        frugal.0.clock.advance(Duration::from_secs(43_200));
        assert_eq!(frugal.0.post_once("/chat", "k", &message).await.status, 200);
    }

    async fn other_users_and_the_next_day_have_a_budget_of_their_own(frugal: Frugal) {
        frugal.0.run_sql("INSERT INTO token_uses (tenant_id, user_id, day, work, tokens) \
            VALUES (1, 'jo', 19723, 1, 100)").await;
        let (jo, al) = (json!({"user_id": "jo", "message": "Hello"}), json!({"user_id": "al", "message": "Hello"}));
        frugal.0.post("/chat", jo.clone()).await.refused(429, "TOKEN_BUDGET_EXCEEDED");
        assert_eq!(frugal.0.post("/chat", al).await.status, 200);
        frugal.0.clock.advance(Duration::from_secs(43_200));
        assert_eq!(frugal.0.post("/chat", jo).await.status, 200);
    }

    async fn a_bad_session_is_told_before_the_budget(frugal: Frugal) {
        let session = frugal.0.session(json!({"user_id": "jo"})).await;
        frugal.0.patch(&format!("/sessions/{session}"), json!({"is_active": false})).await;
        frugal.0.run_sql("INSERT INTO token_uses (tenant_id, user_id, day, work, tokens) \
            VALUES (1, 'jo', 19723, 1, 100)").await;
        frugal.0.chat(&session, "Hello").await.refused(404, "INVALID_SESSION");
    }

    async fn a_turn_that_failed_or_was_cancelled_has_cost_what_the_model_was_shown(frugal: Frugal) {
        let session = frugal.0.session(json!({"user_id": "jo"})).await;
        frugal.0.chat(&session, "fail").await.refused(502, "UPSTREAM_ERROR");
        let failed = frugal.used().await;
        assert!(failed > 1, "{failed}");
        let (hanging, _) = tokio::join!(frugal.0.chat(&session, "hang"), async {
            frugal.1.asked_times(2).await;
            frugal.0.post(&format!("/sessions/{session}/turns/2/cancel"), json!({})).await
        });
        hanging.refused(409, "TURN_CANCELLED");
        assert_eq!(frugal.used().await, 2 * failed);
    }

    async fn what_is_asked_in_the_background_is_taken_off_too(frugal: Frugal) {
        let upstream = &frugal.1;
        let learning = Server::beside(frugal.0.database.clone(), |config| {
            config.model = crate::harness::scripted(&upstream.url);
            config.chat.tokens_per_user_day = Some(100);
            config.chat.extract = Extract::Model;
        }).await;
        let session = learning.session(json!({"user_id": "jo"})).await;
        let answer = learning.chat(&session, "Hello").await;
        learning.app.finish().await;
        let one = answer.data()["usage"]["total_tokens"].as_i64().unwrap();
        assert!(frugal.used().await >= one);
    }

    async fn erasing_a_user_erases_what_they_used(frugal: Frugal) {
        frugal.0.post("/chat", json!({"user_id": "jo", "message": "Hello"})).await.data();
        frugal.0.delete("/users/jo").await.data();
        assert_eq!(frugal.used().await, 0);
    }

    async fn old_days_are_forgotten(frugal: Frugal) {
        frugal.0.post("/chat", json!({"user_id": "jo", "message": "Hello"})).await.data();
        frugal.0.clock.advance(Duration::from_secs(24 * 60 * 60));
        jobs::budgets::forget_old_days(&frugal.0.app).await.unwrap();
        assert!(frugal.used().await > 0);
        frugal.0.clock.advance(Duration::from_secs(24 * 60 * 60));
        jobs::budgets::forget_old_days(&frugal.0.app).await.unwrap();
        assert_eq!(frugal.used().await, 0);
    }
}
