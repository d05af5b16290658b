//! The binary as people and orchestrators meet it: started, stopped, killed, misconfigured.

use std::{sync::Arc, time::Duration};

use atlus::store::Kind;
use serde_json::json;
use tokio::sync::Semaphore;

use crate::{
    harness::{Database, Process, atlus, on_both},
    models::{Script, Upstream},
};

/// Runs a command to its end: exit code, standard output, standard error.
async fn run(args: &[&str], variables: &[(&str, &str)]) -> (i32, String, String) {
    let output = tokio::time::timeout(Duration::from_secs(60), atlus(args, variables).output())
        .await
        .unwrap()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

/// As if all leases had run out.
async fn expire_leases(database: &Database) {
    let store = database.store().await;
    let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
    tx.sql("UPDATE turns SET lease_expires_at = 0").run().await.unwrap();
    tx.commit().await.unwrap();
}

on_both! {
    async fn a_conversation_survives_kill_9_between_any_two_lines(database: Database) {
        let server = Process::start(&database, &[]).await;
        let session = server.session(json!({"user_id": "user_123", "metadata": {"source": "web"}})).await;
        let restart = async |server: Process| {
            server.kill().await;
            Process::start(&database, &[]).await
        };
        let server = restart(server).await;
        assert!(server.say(&session, "Hello, ATLUS!").await.starts_with("Hello"));
        let server = restart(server).await;
        server.say(&session, "Hi, my name is John").await;
        let server = restart(server).await;
        assert!(server.say(&session, "What's my name?").await.contains("Your name is John"));
        let server = restart(server).await;
        assert!(server.say(&session, "What did I just say?").await.contains("What's my name?"));
        let server = restart(server).await;
        let read = server.get(&format!("/sessions/{session}")).await;
        assert_eq!(read.data()["memory"]["conversation_turns"], 4);
        assert_ne!(read.data()["last_activity"], read.data()["created_at"]);
        let other = server.session(json!({"user_id": "user_456"})).await;
        let server = restart(server).await;
        assert!(!server.say(&other, "What's my name?").await.contains("John"));
        let temporary = server.post("/chat", json!({"message": "Call me Zoe"})).await;
        let temporary = temporary.data()["session_id"].as_str().unwrap();
        let server = restart(server).await;
        assert!(server.say(temporary, "What's my name?").await.contains("Your name is Zoe"));
        let server = restart(server).await;
        assert_eq!(server.delete(&format!("/sessions/{session}")).await.status, 200);
        let server = restart(server).await;
        server.get(&format!("/sessions/{session}")).await.refused(404, "SESSION_NOT_FOUND");
        server.chat(&session, "anybody?").await.refused(404, "INVALID_SESSION");
    }

    async fn what_was_acknowledged_before_kill_9_is_there_after_it(database: Database) {
        let server = Process::start(&database, &[]).await;
        let mut sessions = Vec::new();
        for _ in 0..8 {
            sessions.push(server.session(json!({})).await);
        }
        // Each writer says what it has an answer for until its server is gone.
        let writers: Vec<_> = sessions.iter().cloned().map(|session| {
            let client = server.client.clone();
            tokio::spawn(async move {
                for i in 0.. {
                    let body = json!({"session_id": session, "message": format!("message {i}")});
                    let sent = client.request(reqwest::Method::POST, "/chat").json(&body).send().await;
                    let Ok(answer) = sent else { return i };
                    let Ok(text) = answer.text().await else { return i };
                    assert!(text.contains("\"success\":true"), "{text}");
                }
                unreachable!()
            })
        }).collect();
        while server.get(&format!("/sessions/{}/turns?direction=desc&limit=1", sessions[7])).await
            .items().first().is_none_or(|turn| turn["turn"].as_i64().unwrap() < 30) {}
        server.kill().await;

        let server = Process::start(&database, &[]).await;
        for (session, writer) in sessions.iter().zip(writers) {
            let acknowledged = writer.await.unwrap();
            let mut said = Vec::new();
            let mut cursor = String::new();
            loop {
                let page = server.get(&format!("/sessions/{session}/turns?limit=100{cursor}")).await;
                said.extend(page.items().iter().map(|turn| (turn["turn"].as_i64().unwrap(), turn["message"].clone())));
                match page.data()["next_cursor"].as_str() {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            // In order, without gaps, and at most the one that was under way beyond what was acknowledged.
            let expected: Vec<_> = (0..i64::try_from(said.len()).unwrap())
                .map(|i| (i + 1, json!(format!("message {i}")))).collect();
            assert_eq!(said, expected);
            assert!(said.len() == acknowledged || said.len() == acknowledged + 1, "{} of {acknowledged}", said.len());
        }
    }

    async fn sigterm_lets_a_chat_under_way_complete(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|_| Script::Say("worth waiting for".into()), gate.clone()).await;
        let model = [("ATLUS_MODEL_URL", upstream.url.as_str()), ("ATLUS_MODEL", "scripted")];
        let mut server = Process::start(&database, &model).await;
        let session = server.session(json!({})).await;
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.say(&session, "hi").await }
        });
        upstream.asked_times(1).await;
        server.signal("-TERM");
        server.line("stopping").await;
        gate.add_permits(1);
        assert_eq!(chat.await.unwrap(), "worth waiting for");
        assert!(server.child.wait().await.unwrap().success());

        let server = Process::start(&database, &[]).await;
        let turns = server.get(&format!("/sessions/{session}/turns")).await;
        assert_eq!(turns.items()[0]["response"], "worth waiting for");
    }

    async fn a_turn_left_by_a_dead_server_is_failed_at_the_next_start(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|_| Script::Say("never heard".into()), gate.clone()).await;
        let model = [("ATLUS_MODEL_URL", upstream.url.as_str()), ("ATLUS_MODEL", "scripted")];
        let server = Process::start(&database, &model).await;
        let session = server.session(json!({})).await;
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move {
                let body = json!({"session_id": session, "message": "hi"});
                client.request(reqwest::Method::POST, "/chat").json(&body).send().await.is_err()
            }
        });
        upstream.asked_times(1).await;
        server.kill().await;
        assert!(chat.await.unwrap());
        expire_leases(&database).await;
        let mut server = Process::start(&database, &[]).await;
        server.line("turn failed: its server is gone").await;
        let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
        assert_eq!((&turn.data()["status"], &turn.data()["error"]["code"]), (&json!("failed"), &json!("INTERRUPTED")));
    }

    async fn a_server_that_was_frozen_cannot_answer_for_a_turn_it_has_lost(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|message| Script::Say(format!("You said: {message}")), gate.clone()).await;
        let model = [("ATLUS_MODEL_URL", upstream.url.as_str()), ("ATLUS_MODEL", "scripted")];
        let frozen = Process::start(&database, &model).await;
        let other = Process::start(&database, &model).await;
        let session = frozen.session(json!({})).await;
        let late = tokio::spawn({
            let (client, session) = (frozen.client.clone(), session.clone());
            async move { client.chat(&session, "first").await }
        });
        upstream.asked_times(1).await;
        frozen.signal("-STOP");
        gate.add_permits(3);
        expire_leases(&database).await;
        assert_eq!(other.say(&session, "second").await, "You said: second");
        frozen.signal("-CONT");
        late.await.unwrap().refused(503, "OVERLOADED");
        let turns = other.get(&format!("/sessions/{session}/turns")).await;
        let turns: Vec<_> = turns.items().iter().map(|turn| {
            (turn["turn"].clone(), turn["status"].clone(), turn["error"]["code"].clone(), turn["response"].clone())
        }).collect();
        assert_eq!(turns, [
            (json!(1), json!("failed"), json!("INTERRUPTED"), json!(null)),
            (json!(2), json!("completed"), json!(null), json!("You said: second")),
        ]);
        assert_eq!(frozen.say(&session, "third").await, "You said: third");
        assert_eq!(upstream.prompts().last().unwrap().len(), 4);
    }

    async fn four_servers_started_at_once_on_an_empty_database_all_serve(database: Database) {
        let empty = Database::empty(database.kind).await;
        let mut servers: Vec<_> = (0..4).map(|_| Process::spawn(&empty, &[])).collect();
        for server in &mut servers {
            server.listening().await;
        }
        let session = servers[0].session(json!({})).await;
        for (turn, server) in (1..).zip(&servers) {
            let answer = server.chat(&session, "Hello").await;
            assert_eq!(answer.data()["turn"], turn);
        }
    }

    async fn migrations_are_told_before_they_are_made(database: Database) {
        let empty = Database::empty(database.kind).await;
        let url = empty.variables();
        let (code, told, _) = run(&["migrate", "--check"], &url).await;
        assert_eq!((code, told.as_str()), (1, "pending: 0001_init\npending: 0002_search_and_memory\npending: 0003_access\npending: 0004_search_places\npending: 0005_inactive_sessions\n"));
        let (code, _, _) = run(&["migrate"], &url).await;
        assert_eq!(code, 0);
        let (code, told, _) = run(&["migrate", "--check"], &url).await;
        assert_eq!(code, 0);
        assert!(told.contains("is up to date"), "{told}");
    }

    async fn the_doctor_says_what_works(database: Database) {
        let (code, told, errors) = run(&["doctor"], &database.variables()).await;
        assert_eq!(code, 0, "{told}{errors}");
        for part in ["settings  ✓", "database  ✓", "schema    ✓", "model     ✓"] {
            assert!(told.contains(part), "{told}");
        }
        let broken = [
            ("ATLUS_DATABASE_URL", database.url.as_str()), ("ATLUS_MODEL_URL", "http://127.0.0.1:1/v1"),
            ("ATLUS_MODEL", "m"),
        ];
        let (code, told, _) = run(&["doctor"], &broken).await;
        assert_eq!(code, 1);
        assert!(told.contains("model     ✗") && told.contains("cannot be reached"), "{told}");
    }
}

#[tokio::test]
async fn what_cannot_start_says_why_and_what_to_mend() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().display();
    std::fs::write(
        folder.path().join("text.db"),
        "this is no database, however long one looks at it".repeat(50),
    )
    .unwrap();
    let listening = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = listening.local_addr().unwrap().to_string();
    let postgres = Database::on(Kind::Postgres).await;
    let unreachable = "postgres://me:secret@127.0.0.1:1/db".to_owned();
    let no_database = postgres.direct.replace("/atlus_", "/absent_");
    let cases = [
        (format!("sqlite://{path}/missing/atlus.db"), "", "missing does not exist; create it"),
        (format!("sqlite://{path}"), "", "is a folder"),
        (format!("sqlite://{path}/text.db"), "", "is not a SQLite database"),
        (unreachable, "", "check that the server runs"),
        (no_database, "", "does not exist; create it first"),
        (format!("sqlite://{path}/a.db"), taken.as_str(), "is another server running there?"),
        ("mysql://x".to_owned(), "", "must begin with sqlite:// or postgres://"),
        ("sqlite::memory:".to_owned(), "", "must name a file"),
    ];
    for (url, listen, advice) in cases {
        let listen = if listen.is_empty() { "127.0.0.1:0" } else { listen };
        let (code, _, told) = run(&[], &[("ATLUS_DATABASE_URL", &url), ("ATLUS_LISTEN", listen)]).await;
        assert_eq!(code, 1, "{url}: {told}");
        assert!(told.contains(advice), "{url}: {told}");
        assert!(!told.contains("secret") && !told.contains("panicked"), "{told}");
    }
}

#[tokio::test]
async fn a_wrong_password_is_told_from_a_server_that_is_gone() {
    let database = Database::on(Kind::Postgres).await;
    // The one role that the test server asks for a password.
    database
        .run_sql("DROP ROLE IF EXISTS atlus_guarded; CREATE ROLE atlus_guarded LOGIN PASSWORD 'right'")
        .await;
    let (_, rest) = database.direct.split_once('@').unwrap();
    let url = format!("postgres://atlus_guarded:wrong-secret@{rest}");
    let (code, _, told) = run(&[], &[("ATLUS_DATABASE_URL", &url), ("ATLUS_LISTEN", "127.0.0.1:0")]).await;
    assert_eq!(code, 1);
    assert!(told.contains("password authentication failed"), "{told}");
    assert!(told.contains("check user and password in the URL") && !told.contains("wrong-secret"), "{told}");
}

#[tokio::test]
async fn all_wrong_settings_are_named_in_one_message() {
    let wrong = [
        ("ATLUS_LOG", "atlus=loud"),
        ("ATLUS_LISTEN", "0.0.0.0:80"),
        ("ATLUS_MODEL_TIMEOUT", "soon"),
        ("ATLUS_MODEL_URL", "http://x/v1"),
        ("ATLUS_DATABASE_CONNECTIONS", "0"),
    ];
    let (code, _, told) = run(&["serve"], &wrong).await;
    assert_eq!(code, 1);
    for name in [
        "ATLUS_LISTEN 0.0.0.0:80", "ATLUS_MODEL_TIMEOUT", "ATLUS_MODEL is not", "ATLUS_DATABASE_CONNECTIONS",
        "ATLUS_LOG must",
    ] {
        assert!(told.contains(name), "{name}: {told}");
    }
}

#[tokio::test]
async fn an_unknown_setting_is_warned_about() {
    let database = Database::empty(Kind::Sqlite).await;
    let mut server = Process::spawn(&database, &[("ATLUS_LISTN", "x")]);
    server.line("ATLUS_LISTN is no setting").await;
    server.listening().await;
    let variables = [("ATLUS_LISTN", "x"), ("ATLUS_SERVER", "x"), ("ATLUS_API_KEY", "x")];
    let (_, told, _) = run(&["doctor"], &[&database.variables()[..], &variables].concat()).await;
    assert_eq!(told.matches("is no setting").count(), 1, "{told}");
}

#[tokio::test]
async fn the_help_lists_every_setting_with_its_default() {
    let (code, told, _) = run(&["serve", "--help"], &[]).await;
    assert_eq!(code, 0);
    for setting in
        ["--listen", "ATLUS_LISTEN", "127.0.0.1:5000", "sqlite://atlus.db", "ATLUS_MODEL_TIMEOUT", "120s"]
    {
        assert!(told.contains(setting), "{setting}: {told}");
    }
}

#[tokio::test]
async fn the_document_is_printed_in_both_forms() {
    let (_, yaml, _) = run(&["openapi"], &[]).await;
    assert_eq!(yaml, std::fs::read_to_string("openapi.yaml").unwrap());
    let (_, json, _) = run(&["openapi", "--format", "json"], &[]).await;
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json, serde_yaml::from_str::<serde_json::Value>(&yaml).unwrap());
}
