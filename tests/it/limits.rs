//! How often a client may call, over HTTP; how that is counted is shown in `rates`.

use std::time::Duration;

use atlus::{config::Config, store::Kind};
use reqwest::Method;
use serde_json::json;

use crate::harness::{Answer, Client, Database, Server, on_both};

fn limit(text: &'static str) -> impl Fn(&mut Config) {
    move |config| config.access.rate_limit = Some(text.parse().unwrap())
}

/// A server where a client may call four times an hour.
struct Limited(Server);

impl Limited {
    async fn on(kind: Kind) -> Self {
        Self(Server::with(Database::on(kind).await, limit("4/1h")).await)
    }
}

/// The same where callers need keys.
struct Guarded(Server);

impl Guarded {
    async fn on(kind: Kind) -> Self {
        let guarded = Server::with(Database::on(kind).await, |config| {
            limit("4/1h")(config);
            config.access.required = true;
        });
        Self(guarded.await)
    }
}

/// Calls again and again; how many calls passed until one did not, and that one.
async fn until_refused(client: &Client) -> (usize, Answer) {
    let mut passed = 0;
    loop {
        let answer = client.get("/sessions").await;
        match answer.status {
            200 => passed += 1,
            _ => return (passed, answer),
        }
    }
}

/// A call from behind a proxy on this machine.
async fn forwarded(client: &Client, from: &str) -> Answer {
    client.send(client.request(Method::GET, "/sessions").header("X-Forwarded-For", from)).await
}

on_both! {
    async fn a_client_is_told_how_many_calls_are_left(limited: Limited) {
        let first = limited.0.get("/sessions").await;
        assert_eq!(first.headers["ratelimit-limit"], "4");
        assert_eq!(first.headers["ratelimit-remaining"], "3");
        assert_eq!(first.headers["ratelimit-policy"], "4;w=3600");
        let reset: u64 = first.headers["ratelimit-reset"].to_str().unwrap().parse().unwrap();
        assert!((1..=3600).contains(&reset));
        let refused = limited.0.get("/sessions/session_0000000000000000").await;
        refused.refused(404, "SESSION_NOT_FOUND");
        assert_eq!(refused.headers["ratelimit-remaining"], "2");
    }

    async fn more_calls_than_the_limit_are_refused_until_the_window_ends(limited: Limited) {
        let (passed, refused) = until_refused(&limited.0).await;
        assert_eq!(passed, 4);
        assert!(refused.refused(429, "RATE_LIMIT_EXCEEDED").contains("4 calls in 3600 seconds"));
        assert_eq!(refused.headers["ratelimit-remaining"], "0");
        assert_eq!(refused.headers["retry-after"], refused.headers["ratelimit-reset"]);
    }

    async fn creating_and_deleting_sessions_has_half_the_limit_apart(limited: Limited) {
        for _ in 0..2 {
            limited.0.session(json!({})).await;
        }
        limited.0.post("/sessions", json!({})).await.refused(429, "RATE_LIMIT_EXCEEDED");
        limited.0.delete("/sessions/session_0000000000000000").await.refused(429, "RATE_LIMIT_EXCEEDED");
        assert_eq!(until_refused(&limited.0).await.0, 4);
    }

    async fn health_and_documents_are_not_counted(limited: Limited) {
        until_refused(&limited.0).await;
        for path in ["/api/v1/health", "/livez", "/readyz", "/docs", "/openapi.json"] {
            let answer = limited.0.http.get(format!("{}{path}", limited.0.base)).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{path}");
            assert!(!answer.headers().contains_key("ratelimit-limit"), "{path}");
        }
    }

    async fn each_key_has_a_limit_of_its_own(guarded: Guarded) {
        let (one, two) = (guarded.0.client_of("default", "read", None).await,
            guarded.0.client_of("default", "read", None).await);
        assert_eq!(until_refused(&one).await.0, 4);
        assert_eq!(until_refused(&two).await.0, 4);
    }

    async fn whoever_guesses_keys_is_limited_and_keeps_nobody_from_calling(guarded: Guarded) {
        for _ in 0..4 {
            guarded.0.with_key("atlus_guess").get("/sessions").await.refused(401, "UNAUTHORIZED");
        }
        guarded.0.with_key("atlus_guess").get("/sessions").await.refused(429, "RATE_LIMIT_EXCEEDED");
        guarded.0.get("/sessions").await.refused(429, "RATE_LIMIT_EXCEEDED");
        let known = guarded.0.client_of("default", "read", None).await;
        assert_eq!(until_refused(&known).await.0, 4);
    }

    async fn a_client_is_believed_to_be_elsewhere_only_by_a_trusted_proxy(limited: Limited) {
        for from in ["198.51.100.1", "198.51.100.2", "198.51.100.3", "198.51.100.4"] {
            assert_eq!(forwarded(&limited.0, from).await.status, 200);
        }
        forwarded(&limited.0, "198.51.100.5").await.refused(429, "RATE_LIMIT_EXCEEDED");

        let behind = Server::beside(limited.0.database.clone(), |config| {
            limit("4/1h")(config);
            config.access.trusted_proxies = "127.0.0.0/8".parse().unwrap();
        }).await;
        for from in ["198.51.100.6", "198.51.100.7"] {
            for _ in 0..4 {
                assert_eq!(forwarded(&behind, from).await.status, 200);
            }
            forwarded(&behind, from).await.refused(429, "RATE_LIMIT_EXCEEDED");
        }
    }

    async fn an_unlimited_server_tells_of_no_limit(unlimited: Server) {
        assert!(!unlimited.get("/sessions").await.headers.contains_key("ratelimit-limit"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_instances_let_100_of_300_calls_pass() {
    let one = Server::with(Database::on(Kind::Postgres).await, limit("100/1h")).await;
    let two = Server::beside(one.database.clone(), limit("100/1h")).await;
    let calls = (0..300).map(|n| if n % 2 == 0 { one.get("/sessions") } else { two.get("/sessions") });
    let answers = futures_util::future::join_all(calls).await;
    assert_eq!(answers.iter().filter(|answer| answer.status == 200).count(), 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_are_limited_unless_a_setting_says_otherwise() {
    let database = Database::on(Kind::Sqlite).await;
    let settings = database.config().access;
    assert_eq!(settings.rate_limit.unwrap().to_string(), "100;w=60");
    assert_eq!(settings.rate_limit.unwrap().window, Duration::from_secs(60));
}
