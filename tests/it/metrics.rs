//! What operators read at `/metrics`. Each test has a process of its own, since a process counts for all its servers.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use serde_json::json;
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    harness::{Answer, Client, Database, Process, Server, on_both},
    models::{Script, Upstream},
};

async fn scrape(client: &Client) -> Answer {
    client.send(client.http.get(format!("{}/metrics", client.base))).await
}

/// Every sample of a text in Prometheus's format: the series as it is written, and its value.
fn samples(text: &str) -> Vec<(&str, f64)> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').map(|(name, value)| (name, value.parse().unwrap())).unwrap())
        .collect()
}

/// The value of one series; 0 where there is none yet.
async fn value(client: &Client, series: &str) -> f64 {
    let text = scrape(client).await.body;
    samples(text.as_str().unwrap()).iter().find(|(name, _)| *name == series).map_or(0.0, |(_, value)| *value)
}

/// Waits until a series has this value.
async fn becomes(client: &Client, series: &str, wanted: f64) {
    let reached = async {
        while (value(client, series).await - wanted).abs() > f64::EPSILON {
            sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(20), reached)
        .await
        .unwrap_or_else(|_| panic!("{series} does not become {wanted}"));
}

fn requests(operation: &str, status: u16) -> String {
    format!("http_request_duration_seconds_count{{operation=\"{operation}\",status=\"{status}\"}}")
}

/// A process whose model is a scripted server.
async fn with_model(database: &Database, upstream: &Upstream, more: &[(&str, &str)]) -> Process {
    let model = [("ATLUS_MODEL_URL", upstream.url.as_str()), ("ATLUS_MODEL", "scripted")];
    Process::start(database, &[&model, more].concat()).await
}

on_both! {
    async fn requests_are_timed_by_operation_and_status(database: Database) {
        let server = Process::start(&database, &[]).await;
        let session = server.session(json!({})).await;
        server.say(&session, "Hello").await;
        server.get("/sessions/session_0000000000000000").await.refused(404, "SESSION_NOT_FOUND");
        server.get("/no/such/place").await.refused(404, "NOT_FOUND");
        server.get("/another").await.refused(404, "NOT_FOUND");
        let counts = [
            ("createSession", 201, 1.0), ("chat", 200, 1.0), ("getSession", 404, 1.0), ("getSession", 200, 0.0),
            // Any text may be a path.
            ("none", 404, 2.0),
        ];
        for (operation, status, count) in counts {
            becomes(&server, &requests(operation, status), count).await;
        }
    }

    async fn they_are_in_the_format_that_prometheus_reads(database: Database) {
        let server = Process::start(&database, &[]).await;
        let metrics = scrape(&server).await;
        assert_eq!(metrics.headers["content-type"], "text/plain; version=0.0.4");
        let text = metrics.body.as_str().unwrap();
        assert!(samples(text).len() > 30);
        let kind = database.kind.as_str();
        let build = format!("atlus_build_info{{database=\"{kind}\",version=\"{}\"}} 1", env!("CARGO_PKG_VERSION"));
        assert!(text.contains(&build), "{text}");
        assert!(text.contains("process_resident_memory_bytes"));
    }

    async fn turns_and_calls_to_the_model_are_seen_while_they_run(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|_| Script::Say("Done".into()), gate.clone()).await;
        let server = with_model(&database, &upstream, &[("ATLUS_MODEL_CONCURRENCY", "1")]).await;
        let (one, other) = (server.session(json!({})).await, server.session(json!({})).await);
        let chats = [&one, &one, &other].map(|session| {
            let (client, session) = (server.client.clone(), session.clone());
            tokio::spawn(async move { client.chat(&session, "Hello").await.status })
        });
        becomes(&server, "atlus_turns_running", 2.0).await;
        becomes(&server, "atlus_turns_waiting", 1.0).await;
        becomes(&server, "atlus_model_calls_running", 1.0).await;
        becomes(&server, "atlus_model_calls_waiting", 1.0).await;
        gate.add_permits(3);
        for chat in chats {
            assert_eq!(chat.await.unwrap(), 200);
        }
        for level in ["atlus_turns_running", "atlus_turns_waiting", "atlus_model_calls_running", "atlus_model_calls_waiting"] {
            becomes(&server, level, 0.0).await;
        }
        becomes(&server, "atlus_turn_duration_seconds_count{status=\"completed\"}", 3.0).await;
    }

    async fn calls_tokens_and_failures_are_counted_by_model(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "fail" => Script::Raw(400, Vec::new(), "{}".into()),
            _ => Script::Say("Two words".into()),
        }).await;
        let server = with_model(&database, &upstream, &[("ATLUS_MEMORY_EXTRACT", "off")]).await;
        let session = server.session(json!({})).await;
        server.say(&session, "Hello").await;
        server.stream(&session, "Hello again").await.all().await;
        server.chat(&session, "fail").await.refused(502, "UPSTREAM_ERROR");
        for name in ["made-up-1", "made-up-2"] {
            let body = json!({"session_id": session, "message": "Hello", "model": name});
            assert_eq!(server.post("/chat", body).await.status, 200);
        }
        let text = scrape(&server).await.body;
        assert!(!text.as_str().unwrap().contains("made-up"), "callers choose a label");
        for (series, wanted) in [
            ("atlus_model_call_duration_seconds_count{model=\"scripted\"}", 3.0),
            ("atlus_model_call_duration_seconds_count{model=\"other\"}", 2.0),
            ("atlus_model_first_text_seconds_count{model=\"scripted\"}", 1.0),
            ("atlus_model_failures_total{model=\"scripted\",reason=\"refused\"}", 1.0),
            ("atlus_turn_duration_seconds_count{status=\"failed\"}", 1.0),
        ] {
            becomes(&server, series, wanted).await;
        }
        for kind in ["prompt", "completion"] {
            let series = format!("atlus_model_tokens_total{{kind=\"{kind}\",model=\"scripted\"}}");
            assert!(value(&server, &series).await > 0.0, "{series}");
        }
    }

    async fn a_cancelled_turn_is_counted_as_such(database: Database) {
        let upstream = Upstream::start(|_| Script::Hang).await;
        let server = with_model(&database, &upstream, &[]).await;
        let session = server.session(json!({})).await;
        let (client, id) = (server.client.clone(), session.clone());
        let chat = tokio::spawn(async move { client.chat(&id, "Hello").await });
        upstream.asked_times(1).await;
        assert_eq!(server.post(&format!("/sessions/{session}/turns/1/cancel"), json!({})).await.status, 200);
        chat.await.unwrap().refused(409, "TURN_CANCELLED");
        becomes(&server, "atlus_turn_duration_seconds_count{status=\"cancelled\"}", 1.0).await;
    }

    async fn the_database_is_watched(database: Database) {
        let server = Process::start(&database, &[]).await;
        let session = server.session(json!({})).await;
        server.say(&session, "Hello").await;
        // The session, the admission and the end of the turn.
        assert!(value(&server, "atlus_database_commit_duration_seconds_count").await >= 3.0);
        assert!(value(&server, "atlus_database_commit_writes_sum").await >= 3.0);
        assert!(value(&server, "atlus_database_connections_max{pool=\"write\"}").await >= 1.0);
        let idle = value(&server, "atlus_database_connections{pool=\"read\",state=\"idle\"}").await;
        assert!(idle >= 1.0, "{idle}");
        becomes(&server, "atlus_database_writes_waiting", 0.0).await;
    }

    async fn jobs_tell_that_they_run(database: Database) {
        let server = Process::start(&database, &[]).await;
        for job in ["leases", "erasures", "retention"] {
            becomes(&server, &format!("atlus_job_runs_total{{name=\"{job}\",outcome=\"failure\"}}"), 0.0).await;
            let last = format!("atlus_job_last_success_timestamp_seconds{{name=\"{job}\"}}");
            let ran = async {
                while value(&server, &last).await < 1_700_000_000.0 {
                    sleep(Duration::from_millis(20)).await;
                }
            };
            timeout(Duration::from_secs(20), ran).await.unwrap();
        }
    }

    async fn they_need_a_key_that_is_not_bound_to_a_user(database: Database) {
        let server = Server::with(database, |config| config.access.required = true).await;
        scrape(&server).await.refused(401, "UNAUTHORIZED");
        let bound = server.client_of("default", "read,write", Some("jo")).await;
        scrape(&bound).await.refused(403, "FORBIDDEN");
        let writer = server.client_of("default", "write", None).await;
        scrape(&writer).await.refused(403, "FORBIDDEN");
        let reader = server.client_of("default", "read", None).await;
        assert_eq!(scrape(&reader).await.status, 200);
    }

    async fn they_are_free_of_the_rate_limit_and_guessing_keys_is_not(database: Database) {
        let server = Server::with(database, |config| {
            config.access.required = true;
            config.access.rate_limit = Some("3/1h".parse().unwrap());
        }).await;
        let reader = server.client_of("default", "read", None).await;
        for _ in 0..5 {
            assert_eq!(scrape(&reader).await.status, 200);
        }
        for _ in 0..3 {
            scrape(&server).await.refused(401, "UNAUTHORIZED");
        }
        scrape(&server).await.refused(429, "RATE_LIMIT_EXCEEDED");
        assert_eq!(scrape(&reader).await.status, 200);
    }
}

#[tokio::test]
async fn the_documentation_names_every_metric_and_no_other() {
    let server = Process::start(&Database::on(atlus::store::Kind::Sqlite).await, &[]).await;
    server.session(json!({})).await;
    let text = scrape(&server).await.body;
    let described = text.as_str().unwrap().lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let described =
        described.filter_map(|line| line.split(' ').next()).filter(|name| !name.starts_with("process_"));
    let page = std::fs::read_to_string("docs/observability.md").unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next());
    // What is told by model shows once the model is asked.
    let by_model = ["call_duration_seconds", "first_text_seconds", "failures_total", "tokens_total"];
    let by_model = by_model.map(|name| format!("atlus_model_{name}"));
    let at_once = |name: &&str| !by_model.iter().any(|other| other == name);
    let (rows, described): (BTreeSet<_>, BTreeSet<_>) = (rows.filter(at_once).collect(), described.collect());
    assert_eq!(rows, described);
}
