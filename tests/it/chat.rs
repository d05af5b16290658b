//! Chats: what is said, in which order, and what becomes of it when something goes wrong.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use atlus::{
    domain::{
        caller::Caller,
        ids::{RequestId, SessionId},
        json::Metadata,
    },
    store::{
        Admission, Destination, Ended, Kind, Store, TurnKey,
        db::{Reach, Tx},
    },
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::{io::AsyncWriteExt, net::TcpStream, sync::Semaphore, task::JoinHandle};

use crate::{
    harness::{Answer, Database, Server, completion, on_both, scripted},
    models::{Script, Upstream},
};

fn echo(message: &str) -> Script {
    Script::Say(format!("You said: {message}"))
}

/// Begins a turn as a server would that then stops working.
pub async fn abandoned_turn(store: &Store, session: &str, lease: Duration) -> TurnKey {
    let (id, lease_token) = (SessionId::parse(session).unwrap(), 42);
    let admission = Admission {
        session: Destination::Existing { id, user: None },
        message: "lost".into(),
        message_tokens: 1,
        metadata: Metadata::default(),
        request_id: RequestId::random(),
        now: atlus::domain::clock::Timestamp::from_millis(1_704_110_400_000),
        lease_token,
        lease,
        interrupt: false,
        wait: false,
        claim: None,
        budget: None,
    };
    let admitted = store.admit_turn(&Caller::ANYONE, admission).await.unwrap().unwrap();
    TurnKey { tenant: Caller::ANYONE.tenant, session: id, turn: admitted.turn, lease_token }
}

/// Chats to new sessions, and the transaction that holds the rows of these.
async fn chats_behind_held_rows<const N: usize>(server: &Server) -> (Tx, [JoinHandle<(Answer, String)>; N]) {
    let mut sessions = Vec::new();
    for _ in 0..N {
        sessions.push(server.session(json!({})).await);
    }
    let mut held = server.app.store.database().begin(Reach::Everybody).await.unwrap();
    held.sql("UPDATE sessions SET title = 'held'").run().await.unwrap();
    let chats = sessions.into_iter().map(|session| {
        let client = server.client.clone();
        tokio::spawn(async move { (client.chat(&session, "hi").await, session) })
    });
    (held, chats.collect::<Vec<_>>().try_into().unwrap())
}

on_both! {
    async fn a_conversation_is_held_and_remembered(server: Server) {
        let session = server.session(json!({"user_id": "user_123", "metadata": {"source": "web"}})).await;
        let greeting = server.say(&session, "Hello, ATLUS!").await;
        assert!(greeting.starts_with("Hello"), "{greeting}");
        server.say(&session, "Hi, my name is John").await;
        assert!(server.say(&session, "What's my name?").await.contains("Your name is John"));
        assert!(server.say(&session, "What did I just say?").await.contains("What's my name?"));
        let read = server.get(&format!("/sessions/{session}")).await;
        assert_eq!(read.data()["memory"]["conversation_turns"], 4);

        let other = server.session(json!({"user_id": "somebody_else"})).await;
        assert!(!server.say(&other, "What's my name?").await.contains("John"));
    }

    async fn a_chat_moves_activity_and_reading_does_not(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}");
        server.clock.advance(Duration::from_secs(60));
        server.get(&path).await;
        server.chat(&session, "  ").await.refused(400, "INVALID_REQUEST");
        assert_eq!(server.get(&path).await.data()["last_activity"], "2024-01-01T12:00:00.000Z");
        server.say(&session, "hello").await;
        assert_eq!(server.get(&path).await.data()["last_activity"], "2024-01-01T12:01:00.000Z");
    }

    async fn a_turn_is_recorded_with_all_that_belongs_to_it(server: Server) {
        let session = server.session(json!({})).await;
        let request = server.request(Method::POST, "/chat").header("X-Request-ID", "my-request:1");
        let body = json!({"session_id": session, "message": " \n Hello \u{1F600} \t", "metadata": {"page": 3}});
        let answer = server.send(request.json(&body)).await;
        assert_eq!(answer.headers["x-request-id"], "my-request:1");
        let data = answer.data();
        assert_eq!((&data["turn"], &data["session_id"]), (&json!(1), &json!(session)));
        assert_eq!((&data["request_id"], &data["temporary"]), (&json!("my-request:1"), &json!(false)));
        assert_eq!((&data["model"], &data["usage"]), (&json!("builtin"), &Value::Null));

        let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
        assert_eq!(*turn.data(), json!({
            "session_id": session, "turn": 1, "status": "completed", "message": "Hello \u{1F600}",
            "response": data["response"], "error": null, "model": "builtin", "usage": null,
            "execution_time": data["execution_time"], "request_id": "my-request:1", "metadata": {"page": 3},
            "created_at": "2024-01-01T12:00:00.000Z", "completed_at": "2024-01-01T12:00:00.000Z"
        }));
    }

    async fn a_message_outside_its_limits_is_refused(server: Server) {
        let session = server.session(json!({})).await;
        for empty in ["", " ", "\n\t \u{3000}"] {
            server.chat(&session, empty).await.refused(400, "INVALID_REQUEST");
        }
        server.chat(&session, &"ü".repeat(32_001)).await.refused(400, "MESSAGE_TOO_LONG");
        server.chat(&session, "a\u{0}b").await.refused(400, "VALIDATION_ERROR");
        for body in [json!({}), json!({"message": null}), json!({"message": 5}), json!({"message": ["x"]})] {
            let refusal = server.post("/chat", body).await;
            refusal.refused(400, "VALIDATION_ERROR");
            assert_eq!(refusal.body["error"]["details"][0]["field"], "message");
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 0);
        // White space around it does not count.
        server.say(&session, &format!("  {}  ", "x".repeat(32_000))).await;
    }

    async fn options_outside_their_limits_are_refused_with_the_field_named(server: Server) {
        let wrong = [
            ("temperature", json!(2.1)), ("temperature", json!("hot")), ("max_tokens", json!(0)),
            ("max_tokens", json!(1.5)), ("model", json!("")), ("metadata", json!("x")), ("user_id", json!("")),
            ("session_id", json!(5)),
        ];
        for (field, value) in wrong {
            let refusal = server.post("/chat", json!({"message": "hi", field: value})).await;
            refusal.refused(400, "VALIDATION_ERROR");
            assert_eq!(refusal.body["error"]["details"][0]["field"], field, "{refusal:?}");
        }
        let cut = server.post("/chat", json!({"message": "Hello", "max_tokens": 1})).await;
        assert_eq!(cut.data()["response"].as_str().unwrap().chars().count(), 4);
    }

    async fn a_chat_with_no_valid_session_is_refused_by_name(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        for id in ["session_0000000000000000", "nonsense", ""] {
            let message = server.chat(id, "hi").await.refused(404, "INVALID_SESSION").to_owned();
            assert_eq!(message, format!("Invalid or inactive session: {id}"));
        }
        let foreign = json!({"session_id": session, "user_id": "bob", "message": "hi"});
        server.post("/chat", foreign).await.refused(404, "INVALID_SESSION");
        let own = json!({"session_id": session, "user_id": "ann", "message": "hi"});
        assert_eq!(server.post("/chat", own).await.status, 200);
    }

    async fn the_session_is_checked_before_the_message(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.chat("session_0000000000000000", "").await.refused(404, "INVALID_SESSION");
        let foreign = json!({"session_id": session, "user_id": "bob", "message": ""});
        server.post("/chat", foreign).await.refused(404, "INVALID_SESSION");
        server.patch(&format!("/sessions/{session}"), json!({"is_active": false})).await;
        server.chat(&session, &"x".repeat(40_000)).await.refused(404, "INVALID_SESSION");
    }

    async fn a_chat_without_a_session_makes_a_temporary_one_that_can_be_continued(server: Server) {
        let answer = server.post("/chat", json!({"message": "My name is Zoë", "user_id": "zoe"})).await;
        assert_eq!(answer.data()["temporary"], true);
        let session = answer.data()["session_id"].as_str().unwrap().to_owned();
        assert!(server.say(&session, "What's my name?").await.contains("Your name is Zoë"));
        let read = server.get(&format!("/sessions/{session}")).await;
        let data = read.data();
        assert_eq!((&data["user_id"], &data["temporary"]), (&json!("zoe"), &json!(true)));
        assert_eq!((&data["ttl_seconds"], &data["memory"]["conversation_turns"]), (&json!(86_400), &json!(2)));
        assert_eq!(server.get("/sessions").await.items().len(), 0);
        assert_eq!(server.get("/sessions?temporary=true").await.items().len(), 1);

        let anonymous = server.post("/chat", json!({"message": "hi"})).await;
        let session = anonymous.data()["session_id"].as_str().unwrap();
        assert_eq!(server.get(&format!("/sessions/{session}")).await.data()["user_id"], "default_user");
    }

    async fn a_request_id_that_names_a_session_gives_nothing_of_it(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann").await;
        let body = json!({"message": "What's my name?"});
        let request = server.request(Method::POST, "/chat").header("X-Request-ID", &session);
        let answer = server.send(request.json(&body)).await;
        assert_ne!(answer.data()["session_id"], session.as_str());
        assert!(!answer.data()["response"].as_str().unwrap().contains("Ann"));
        assert_eq!(server.get(&format!("/sessions/{session}/turns")).await.items().len(), 1);
    }

    async fn turns_of_many_writers_never_shuffle_double_or_overlap(database: Database) {
        let upstream = Upstream::start(echo).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let writers: Vec<_> = (0..8).map(|writer| {
            let (client, session) = (server.client.clone(), session.clone());
            tokio::spawn(async move {
                for i in 0..10 {
                    client.say(&session, &format!("{writer}.{i}")).await;
                }
            })
        }).collect();
        for writer in writers {
            writer.await.unwrap();
        }
        assert!(!upstream.overlapped());

        let page = server.get(&format!("/sessions/{session}/turns?limit=100")).await;
        let numbers: Vec<_> = page.items().iter().map(|turn| turn["turn"].as_i64().unwrap()).collect();
        assert_eq!(numbers, (1..=80).collect::<Vec<_>>());
        let said: BTreeSet<_> = page.items().iter().map(|turn| turn["message"].as_str().unwrap()).collect();
        assert_eq!(said.len(), 80);

        // Every prompt is the system's, exactly the turns before it, and its own message.
        let history: Vec<_> = page.items().iter()
            .flat_map(|turn| [
                json!({"role": "user", "content": turn["message"]}),
                json!({"role": "assistant", "content": turn["response"]}),
            ])
            .collect();
        for (turn, prompt) in upstream.prompts().into_iter().enumerate() {
            assert_eq!(prompt[1..], history[..=2 * turn], "turn {}", turn + 1);
        }
    }

    async fn more_turns_run_at_once_than_there_are_connections(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let chats: Vec<_> = futures_util::future::join_all((0..24).map(|_| server.session(json!({})))).await
            .into_iter()
            .map(|session| {
                let client = server.client.clone();
                tokio::spawn(async move { client.say(&session, "hi").await })
            })
            .collect();
        upstream.asked_times(24).await;
        gate.add_permits(24);
        for chat in chats {
            chat.await.unwrap();
        }
    }

    async fn a_chat_that_waits_too_long_for_its_turn_is_refused(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            config.chat.max_wait = Duration::from_millis(100);
        })
        .await;
        let session = server.session(json!({})).await;
        let first = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.say(&session, "first").await }
        });
        upstream.asked_times(1).await;
        let refusal = server.chat(&session, "second").await;
        refusal.refused(409, "SESSION_BUSY");
        assert_eq!(refusal.body["error"]["details"], json!([{"field": "turn", "message": "1"}]));
        assert!(refusal.headers.contains_key("retry-after"));

        // So it is by another server, to which only the database can tell that the session is busy.
        let other = Server::beside(server.database.clone(), |config| {
            config.chat.max_wait = Duration::from_millis(100);
        })
        .await;
        let refusal = other.chat(&session, "third").await;
        refusal.refused(409, "SESSION_BUSY");
        assert_eq!(refusal.body["error"]["details"], json!([{"field": "turn", "message": "1"}]));
        gate.add_permits(1);
        first.await.unwrap();
        assert_eq!(server.get(&format!("/sessions/{session}/turns")).await.items().len(), 1);
    }

    async fn a_client_that_leaves_does_not_stop_its_turn(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let body = json!({"session_id": session, "message": "gone"}).to_string();
        let mut client = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
        let request = format!(
            "POST /api/v1/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
             content-length: {}\r\n\r\n{body}", body.len()
        );
        client.write_all(request.as_bytes()).await.unwrap();
        upstream.asked_times(1).await;
        // Lingering for no time makes the system reset the connection, which drops the handler.
        client.set_zero_linger().unwrap();
        drop(client);

        // The next chat waits for the turn that goes on.
        gate.add_permits(2);
        server.say(&session, "after").await;
        let page = server.get(&format!("/sessions/{session}/turns")).await;
        assert_eq!(page.items()[0]["status"], "completed");
        assert_eq!(page.items()[0]["response"], "You said: gone");
    }

    async fn deleting_a_session_while_it_chats_leaves_nothing(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.chat(&session, "hi").await }
        });
        upstream.asked_times(1).await;
        assert_eq!(server.delete(&format!("/sessions/{session}")).await.status, 200);
        gate.add_permits(1);
        chat.await.unwrap().refused(404, "INVALID_SESSION");
        for table in [
            "SELECT COUNT(*) FROM sessions", "SELECT COUNT(*) FROM turns", "SELECT COUNT(*) FROM session_memory",
            "SELECT COUNT(*) FROM erasures",
        ] {
            assert_eq!(server.count(table).await, 0, "{table}");
        }
    }

    async fn a_turn_whose_server_is_gone_is_failed_by_the_next_chat(server: Server) {
        let session = server.session(json!({})).await;
        let key = abandoned_turn(&server.app.store, &session, Duration::ZERO).await;
        server.say(&session, "hello?").await;
        let page = server.get(&format!("/sessions/{session}/turns")).await;
        assert_eq!(page.items()[0]["status"], "failed");
        assert_eq!(page.items()[0]["error"]["code"], "INTERRUPTED");
        assert_eq!((&page.items()[1]["turn"], &page.items()[1]["status"]), (&json!(2), &json!("completed")));

        let late = server.app.store.end_turn(key, completion("late"), Duration::ZERO, false, server.app.clock.now(), None).await.unwrap();
        assert_eq!(late, Ended::LeaseLost);
        assert_eq!(server.get(&format!("/sessions/{session}/turns/1")).await.data()["response"], Value::Null);
    }

    async fn a_turn_whose_server_is_gone_is_failed_by_the_clock(server: Server) {
        let session = server.session(json!({})).await;
        let other = server.session(json!({})).await;
        abandoned_turn(&server.app.store, &session, Duration::ZERO).await;
        let key = abandoned_turn(&server.app.store, &other, Duration::ZERO).await;
        assert!(server.app.store.renew_lease(key, None, Duration::from_secs(60)).await.unwrap());
        server.run_jobs(None).await;
        let status = async |session: &str| {
            server.get(&format!("/sessions/{session}/turns/1")).await.data()["status"].clone()
        };
        assert_eq!(status(&session).await, "failed");
        assert_eq!(status(&other).await, "running");
    }

    async fn a_lease_is_renewed_for_as_long_as_the_model_works(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            (config.chat.lease, config.chat.lease_renewal) = (Duration::from_secs(2), Duration::from_millis(50));
        })
        .await;
        let session = server.session(json!({})).await;
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.say(&session, "take your time").await }
        });
        upstream.asked_times(1).await;
        let lease = async || {
            let (lease,): (i64,) =
                server.app.store.database().read(Reach::Everybody, "SELECT lease_expires_at FROM turns").one().await.unwrap();
            lease
        };
        let first = lease().await;
        while lease().await == first {
            tokio::task::yield_now().await;
        }
        gate.add_permits(1);
        chat.await.unwrap();
    }

    async fn a_message_that_is_not_admitted_in_time_is_refused_and_leaves_nothing(database: Database) {
        let server = Server::with(database, |config| {
            (config.chat.max_entering, config.chat.max_entry_wait) = (1, Duration::from_millis(100));
        })
        .await;
        let (held, chats) = chats_behind_held_rows(&server).await;
        // Whichever came first is let in, and waits for the row.
        let (first_answer, _, others) = futures_util::future::select_all::<[_; 2]>(chats).await;
        let (refusal, session) = first_answer.unwrap();
        refusal.refused(503, "OVERLOADED");
        assert_eq!(refusal.headers["retry-after"], "1");
        held.rollback().await.unwrap();
        for other in others {
            other.await.unwrap().0.data();
        }
        assert_eq!(server.chat(&session, "hi").await.data()["turn"], 1);
    }

    async fn a_message_is_refused_at_once_where_enough_wait_to_be_admitted(database: Database) {
        let server = Server::with(database, |config| {
            (config.chat.max_entering, config.chat.max_entry_waiting) = (1, 1);
            config.chat.max_entry_wait = Duration::from_secs(600);
        })
        .await;
        let (held, chats) = chats_behind_held_rows(&server).await;
        // One is let in and waits for the row, one waits to be let in, and there is no room for the third.
        let (refused, _, others) = futures_util::future::select_all::<[_; 3]>(chats).await;
        let (refusal, session) = refused.unwrap();
        refusal.refused(503, "OVERLOADED");
        assert_eq!(refusal.headers["retry-after"], "1");
        for path in ["/chat", "/chat/stream"] {
            // Nor is anything read of another.
            server.post(path, json!({"message": ["no text"]})).await.refused(503, "OVERLOADED");
        }
        server.get(&format!("/sessions/{session}")).await.data();
        held.rollback().await.unwrap();
        for other in others {
            other.await.unwrap().0.data();
        }
        assert_eq!(server.chat(&session, "hi").await.data()["turn"], 1);
    }

    async fn whoever_waits_for_a_model_keeps_nobody_from_being_admitted(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server =
            Server::with_model(database.kind, &upstream.url, |config| config.chat.max_entering = 1).await;
        let chats = [server.session(json!({})).await, server.session(json!({})).await].map(|session| {
            let client = server.client.clone();
            tokio::spawn(async move { client.say(&session, "hi").await })
        });
        upstream.asked_times(2).await;
        gate.add_permits(2);
        for chat in chats {
            chat.await.unwrap();
        }
    }

    async fn a_turn_that_lost_its_lease_is_refused_and_ends_its_call(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            (config.chat.lease, config.chat.lease_renewal) = (Duration::ZERO, Duration::from_millis(300));
        })
        .await;
        let session = server.session(json!({})).await;
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.chat(&session, "slow").await }
        });
        upstream.asked_times(1).await;
        while server.count("SELECT COUNT(*) FROM turns WHERE status = 'running'").await > 0 {
            server.run_jobs(None).await;
        }
        chat.await.unwrap().refused(503, "OVERLOADED");
        let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
        assert_eq!(turn.data()["error"]["code"], "INTERRUPTED");
    }
}

/// Chats of many writers at these servers over eight sessions, and everything that must hold of them.
async fn many_writers(servers: &[&Server], upstream: &Upstream, writers: usize, chats: usize) {
    let sessions = futures_util::future::join_all((0..8).map(|_| servers[0].session(json!({})))).await;
    let mut tasks = Vec::new();
    for (s, server) in servers.iter().enumerate() {
        for w in 0..writers {
            let (client, sessions) = (server.client.clone(), sessions.clone());
            tasks.push(tokio::spawn(async move {
                for i in 0..chats {
                    let session = &sessions[(w + i) % sessions.len()];
                    // The session comes first, so that the model can tell whose turns overlap.
                    client.say(session, &format!("{session} {s}.{w}.{i}")).await;
                }
            }));
        }
    }
    for task in tasks {
        task.await.unwrap();
    }
    assert!(!upstream.overlapped());
    let mut prompts = upstream.prompts();
    let mut total = 0;
    for session in &sessions {
        let (mut turns, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = servers[0].get(&format!("/sessions/{session}/turns?limit=100{cursor}")).await;
            turns.extend_from_slice(page.items());
            match page.data()["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        total += turns.len();
        let numbers: Vec<_> = turns.iter().map(|turn| turn["turn"].as_u64().unwrap()).collect();
        assert_eq!(numbers, (1..=turns.len() as u64).collect::<Vec<_>>());
        let history: Vec<_> = turns
            .iter()
            .flat_map(|turn| {
                [
                    json!({"role": "user", "content": turn["message"]}),
                    json!({"role": "assistant", "content": turn["response"]}),
                ]
            })
            .collect();
        let of_session = |prompt: &Vec<Value>| {
            prompt.last().unwrap()["content"].as_str().unwrap().starts_with(session.as_str())
        };
        let (mine, others) = prompts.into_iter().partition(of_session);
        prompts = others;
        let mine: Vec<Vec<Value>> = mine;
        assert_eq!(mine.len(), turns.len());
        for (turn, prompt) in mine.iter().enumerate() {
            assert_eq!(prompt[1..], history[..=2 * turn], "turn {} of {session}", turn + 1);
        }
    }
    assert_eq!(total, servers.len() * writers * chats);
}

/// Takes 5 to 50 ms, by the text.
fn at_leisure(message: &str) -> Script {
    let pause = 5 + message.bytes().map(u64::from).sum::<u64>() % 46;
    Script::Late(Duration::from_millis(pause), "noted".into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_keep_the_order_of_every_session() {
    let upstream = Upstream::start(at_leisure).await;
    let change = |config: &mut atlus::config::Config| {
        config.chat.context_tokens = 1_000_000;
        config.model = scripted(&upstream.url);
    };
    let server = Server::with(Database::on(Kind::Postgres).await, change).await;
    let other = Server::beside(server.database.clone(), change).await;
    many_writers(&[&server, &other], &upstream, 16, 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_server_on_sqlite_keeps_the_order_of_every_session() {
    let upstream = Upstream::start(at_leisure).await;
    let server = Server::with(Database::on(Kind::Sqlite).await, |config| {
        config.chat.context_tokens = 1_000_000;
        config.model = scripted(&upstream.url);
    })
    .await;
    many_writers(&[&server], &upstream, 16, 100).await;
}
