//! Requests that are sent again, and states that have changed meanwhile.

use std::{collections::HashSet, sync::Arc, time::Duration};

use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::{
    harness::{Answer, Client, Database, Process, Server, on_both, scripted, text_of},
    models::{Script, Upstream},
};

fn echo(message: &str) -> Script {
    Script::Say(format!("You said: {message}"))
}

async fn keyed(client: &Client, path: &str, key: &str, body: &Value) -> Answer {
    client.send(client.request(Method::POST, path).header("Idempotency-Key", key).json(body)).await
}

fn is_replayed(answer: &Answer) -> bool {
    answer.headers.get("idempotency-replayed").is_some_and(|value| value == "true")
}

on_both! {
    async fn a_session_is_created_once_however_often_it_is_asked_for(server: Server) {
        let body = json!({"user_id": "ann", "metadata": {"b": 1.0, "a": "ü"}});
        let first = keyed(&server, "/sessions", "order-17", &body).await;
        server.clock.advance(Duration::from_secs(60));
        let again = keyed(&server, "/sessions", "order-17", &body).await;
        assert_eq!((first.status, again.status), (201, 201));
        assert_eq!(again.data().to_string(), first.data().to_string());
        assert_eq!((is_replayed(&first), is_replayed(&again)), (false, true));
        assert_ne!(again.body["timestamp"], first.body["timestamp"]);
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, 1);
        let other = keyed(&server, "/sessions", "order-18", &body).await;
        assert_ne!(other.data()["session_id"], first.data()["session_id"]);
    }

    async fn a_key_of_another_request_is_refused(server: Server) {
        keyed(&server, "/sessions", "k", &json!({"user_id": "ann"})).await.data();
        keyed(&server, "/sessions", "k", &json!({"user_id": "bob"})).await.refused(422, "IDEMPOTENCY_KEY_REUSED");
        keyed(&server, "/chat", "k", &json!({"message": "hi"})).await.refused(422, "IDEMPOTENCY_KEY_REUSED");
        let stream = keyed(&server, "/chat/stream", "k", &json!({"message": "hi"})).await;
        stream.refused(422, "IDEMPOTENCY_KEY_REUSED");
    }

    async fn a_key_outside_its_limits_is_refused(server: Server) {
        let post = |key: &[u8]| {
            let value = reqwest::header::HeaderValue::from_bytes(key).unwrap();
            server.send(server.request(Method::POST, "/sessions").header("Idempotency-Key", value))
        };
        let long = [b'x'; 256];
        for wrong in [&b""[..], "ü".as_bytes(), b"\xff", &long] {
            let refusal = post(wrong).await;
            refusal.refused(400, "VALIDATION_ERROR");
            assert_eq!(refusal.body["error"]["details"][0]["field"], "Idempotency-Key");
        }
        post(&long[1..]).await.data();
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, 1);
    }

    async fn a_chat_with_a_key_asks_the_model_once_also_as_a_stream(database: Database) {
        let upstream = Upstream::start(echo).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let body = json!({"session_id": session, "message": "hi"});
        let first = keyed(&server, "/chat", "a", &body).await;
        let again = keyed(&server, "/chat", "a", &body).await;
        assert_eq!(again.data().to_string(), first.data().to_string());
        assert!(is_replayed(&again));

        let stream = || server.request(Method::POST, "/chat/stream").header("Idempotency-Key", "b").json(&body);
        let first = server.listen(stream()).await;
        assert!(!first.replayed);
        let first = first.all().await;
        let again = server.listen(stream()).await;
        assert!(again.replayed);
        let again = again.all().await;
        assert_eq!(again.last(), first.last());
        assert_eq!((text_of(&again), &again[0].data["turn"]), (text_of(&first), &first[0].data["turn"]));
        assert_eq!(upstream.asked().len(), 2);
    }

    async fn a_failure_frees_the_key_and_a_cancellation_is_remembered(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "slow" => Script::Stream { pieces: vec!["x ".into(); 9999], pause: Duration::from_millis(10), whole: true },
            _ => Script::Raw(400, vec![], String::new()),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let body = json!({"session_id": session, "message": "fail"});
        for times in 1..=2 {
            keyed(&server, "/chat", "f", &body).await.refused(502, "UPSTREAM_ERROR");
            assert_eq!(upstream.asked().len(), times);
        }
        for unknown in [json!({"session_id": "x", "message": "hi"}), json!({"session_id": session, "message": " "})] {
            for _ in 0..2 {
                assert!(keyed(&server, "/chat", "u", &unknown).await.status < 409);
            }
        }
        let body = json!({"session_id": session, "message": "slow"});
        let request = server.request(Method::POST, "/chat/stream").header("Idempotency-Key", "c").json(&body);
        let mut events = server.listen(request).await;
        let turn = events.next().await.unwrap().data["turn"].as_i64().unwrap();
        server.send(server.request(Method::POST, &format!("/sessions/{session}/turns/{turn}/cancel"))).await.data();
        events.all().await;
        // The turn may have been cancelled before its model was asked.
        let asked = upstream.asked().len();
        let again = keyed(&server, "/chat/stream", "c", &body).await;
        again.refused(409, "TURN_CANCELLED");
        assert!(is_replayed(&again));
        assert_eq!(upstream.asked().len(), asked);
    }

    async fn a_request_whose_turn_was_erased_is_not_done_again(server: Server) {
        let session = server.session(json!({})).await;
        let chat = json!({"session_id": session, "message": "what I regret"});
        keyed(&server, "/chat", "chat", &chat).await.data();
        let turns = json!({"turns": [{"message": "one", "response": "r"}, {"message": "two", "response": "r"}]});
        let path = format!("/sessions/{session}/turns");
        keyed(&server, &path, "turns", &turns).await.data();
        server.delete(&format!("{path}/1")).await.data();
        server.delete(&format!("{path}/3")).await.data();
        keyed(&server, "/chat", "chat", &chat).await.refused(409, "TURN_CANCELLED");
        keyed(&server, &path, "turns", &turns).await.refused(409, "TURN_CANCELLED");
        assert_eq!(server.get(&path).await.items().len(), 3);
    }

    async fn fifty_equal_requests_at_two_servers_ask_the_model_once(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let other = Server::beside(server.database.clone(), |config| config.model = scripted(&upstream.url)).await;
        let session = server.session(json!({})).await;
        let body = json!({"session_id": session, "message": "hi"});
        let requests: Vec<_> = (0..50).map(|i| {
            let (client, body) = (if i % 2 == 0 { server.client.clone() } else { other.client.clone() }, body.clone());
            tokio::spawn(async move { keyed(&client, "/chat", "once", &body).await })
        }).collect();
        upstream.asked_times(1).await;
        gate.add_permits(1);
        let mut data = HashSet::new();
        for request in requests {
            let answer = request.await.unwrap();
            match answer.status {
                200 => drop(data.insert(answer.data().to_string())),
                _ => {
                    answer.refused(409, "IDEMPOTENCY_IN_PROGRESS");
                    assert!(answer.headers.contains_key("retry-after"));
                }
            }
        }
        for i in 0..50 {
            let client = if i % 2 == 0 { &server.client } else { &other.client };
            data.insert(keyed(client, "/chat", "once", &body).await.data().to_string());
        }
        assert_eq!(data.len(), 1);
        assert_eq!(upstream.asked().len(), 1);
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 1);
    }

    async fn a_key_is_held_while_its_message_waits_for_its_session(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            (config.chat.lease, config.chat.lease_renewal) = (Duration::from_secs(2), Duration::from_millis(200));
        })
        .await;
        let session = server.session(json!({})).await;
        let say = |message: &str, key: &'static str| {
            let (client, body) = (server.client.clone(), json!({"session_id": session, "message": message}));
            tokio::spawn(async move { keyed(&client, "/chat", key, &body).await })
        };
        let first = say("first", "one");
        upstream.asked_times(1).await;
        let second = say("second", "two");
        let lease = async || {
            let text = "SELECT COALESCE(MAX(lease_expires_at), 0) FROM idempotency_records WHERE idempotency_key = 'two'";
            let (lease,): (i64,) = server.app.store.database().read(atlus::store::db::Reach::Everybody, text).one().await.unwrap();
            lease
        };
        // Its lease is put off beyond the time for which it was first taken.
        while lease().await == 0 {
            tokio::task::yield_now().await;
        }
        let taken = lease().await;
        while lease().await < taken + 2000 {
            tokio::task::yield_now().await;
        }
        say("second", "two").await.unwrap().refused(409, "IDEMPOTENCY_IN_PROGRESS");
        gate.add_permits(2);
        first.await.unwrap().data();
        second.await.unwrap().data();
        assert_eq!(upstream.asked().len(), 2);
    }

    async fn a_request_repeated_after_kill_9_leaves_one_completed_turn(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let model = [("ATLUS_MODEL_URL", upstream.url.as_str()), ("ATLUS_MODEL", "scripted")];
        let server = Process::start(&database, &model).await;
        let session = server.session(json!({})).await;
        let body = json!({"session_id": session, "message": "hi"});
        let first = tokio::spawn({
            let (client, body) = (server.client.clone(), body.clone());
            async move {
                let request = client.request(Method::POST, "/chat").header("Idempotency-Key", "k").json(&body);
                request.send().await.is_err()
            }
        });
        upstream.asked_times(1).await;
        server.kill().await;
        assert!(first.await.unwrap());
        gate.add_permits(2);
        // As if the leases of the dead server had run out.
        let store = database.store().await;
        let mut tx = store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        for table in ["UPDATE turns SET lease_expires_at = 0", "UPDATE idempotency_records SET lease_expires_at = 0"] {
            tx.sql(table).run().await.unwrap();
        }
        tx.commit().await.unwrap();
        let server = Process::start(&database, &model).await;
        let answer = keyed(&server, "/chat", "k", &body).await;
        assert_eq!(answer.data()["turn"], 2);
        assert!(is_replayed(&keyed(&server, "/chat", "k", &body).await));
        let turns = server.get(&format!("/sessions/{session}/turns")).await;
        let statuses: Vec<_> = turns.items().iter().map(|turn| turn["status"].as_str().unwrap()).collect();
        assert_eq!(statuses, ["failed", "completed"]);
    }

    async fn a_key_is_forgotten_after_a_day(server: Server) {
        let body = json!({"user_id": "ann"});
        let first = keyed(&server, "/sessions", "k", &body).await;
        let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql("UPDATE idempotency_records SET expires_at = expires_at - 86400001").run().await.unwrap();
        tx.commit().await.unwrap();
        let other = keyed(&server, "/sessions", "k", &json!({"user_id": "bob"})).await;
        assert_ne!(other.data()["session_id"], first.data()["session_id"]);
        let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql("UPDATE idempotency_records SET expires_at = expires_at - 86400001").run().await.unwrap();
        tx.commit().await.unwrap();
        atlus::jobs::keys::forget_old_keys(&server.app).await.unwrap();
        assert_eq!(server.count("SELECT COUNT(*) FROM idempotency_records").await, 0);
    }

    async fn a_deleted_session_takes_its_remembered_answers_along(server: Server) {
        let session = keyed(&server, "/sessions", "s", &json!({})).await.data()["session_id"].as_str().unwrap().to_owned();
        keyed(&server, "/chat", "c", &json!({"session_id": session, "message": "hi"})).await.data();
        assert_eq!(server.count("SELECT COUNT(*) FROM idempotency_records").await, 2);
        server.delete(&format!("/sessions/{session}")).await;
        assert_eq!(server.count("SELECT COUNT(*) FROM idempotency_records").await, 0);
    }

    async fn a_session_that_has_changed_is_not_changed_again_unawares(server: Server) {
        let session = server.session(json!({"title": "a"})).await;
        let path = format!("/sessions/{session}");
        let patch = |etag: &str, body: Value| {
            server.send(server.request(Method::PATCH, &path).header("If-Match", etag).json(&body))
        };
        let etag = |answer: &Answer| answer.headers["etag"].to_str().unwrap().to_owned();
        let first = etag(&server.get(&path).await);
        assert_eq!(etag(&server.get(&path).await), first);
        let second = etag(&patch(&first, json!({"title": "b"})).await);
        assert_ne!(second, first);
        assert_eq!(etag(&server.get(&path).await), second);
        patch(&first, json!({"title": "c"})).await.refused(412, "PRECONDITION_FAILED");
        patch(&format!("\"x\", {second}"), json!({"title": "d"})).await.data();
        patch("*", json!({"title": "e"})).await.data();
        server.say(&session, "hi").await;
        let delete = |etag: &str| server.send(server.request(Method::DELETE, &path).header("If-Match", etag));
        delete(&second).await.refused(412, "PRECONDITION_FAILED");
        assert_eq!(server.get(&path).await.data()["title"], "e");
        let now = etag(&server.get(&path).await);
        assert_eq!(delete(&now).await.status, 200);
        delete("*").await.refused(404, "SESSION_NOT_FOUND");
    }
}
