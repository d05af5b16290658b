//! Reading turns, and adding those made elsewhere.

use std::{sync::Arc, time::Duration};

use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::{
    chat::abandoned_turn,
    harness::{Answer, Client, Database, Server, on_both},
    models::{Script, Upstream},
};

fn turn(message: &str) -> Value {
    json!({"message": message, "response": format!("You said: {message}")})
}

async fn append(client: &Client, session: &str, turns: &[Value]) -> Answer {
    client.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await
}

fn numbers(answer: &Answer) -> Vec<i64> {
    answer.items().iter().map(|turn| turn["turn"].as_i64().unwrap()).collect()
}

on_both! {
    async fn turns_are_paged_in_both_directions(server: Server) {
        let session = server.session(json!({})).await;
        for i in 1..=7 {
            server.say(&session, &format!("message {i}")).await;
        }
        for (direction, expected) in [("asc", [1, 2, 3, 4, 5, 6, 7]), ("desc", [7, 6, 5, 4, 3, 2, 1])] {
            let (mut seen, mut cursor) = (Vec::new(), String::new());
            loop {
                let path = format!("/sessions/{session}/turns?direction={direction}&limit=3{cursor}");
                let page = server.get(&path).await;
                seen.extend(page.items().iter().map(|turn| turn["turn"].as_i64().unwrap()));
                // Turns that come in meanwhile belong to the other end, or to the last page.
                match page.data()["next_cursor"].as_str() {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            assert_eq!(seen, expected);
        }
        let unsorted = server.get(&format!("/sessions/{session}/turns")).await;
        assert_eq!(unsorted.items()[0]["turn"], 1);
    }

    async fn turns_are_filtered_by_status(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "fail" => Script::Raw(500, vec![], String::new()),
            other => Script::Say(other.to_owned()),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        for message in ["a", "fail", "b"] {
            server.chat(&session, message).await;
        }
        let numbers = async |status: &str| -> Vec<i64> {
            let page = server.get(&format!("/sessions/{session}/turns?status={status}")).await;
            page.items().iter().map(|turn| turn["turn"].as_i64().unwrap()).collect()
        };
        assert_eq!(numbers("completed").await, [1, 3]);
        assert_eq!(numbers("failed").await, [2]);
        assert_eq!(numbers("running").await, [0; 0]);
        server.get(&format!("/sessions/{session}/turns?status=odd")).await.refused(400, "VALIDATION_ERROR");
    }

    async fn a_cursor_of_another_listing_of_turns_is_refused(server: Server) {
        let (session, other) = (server.session(json!({})).await, server.session(json!({})).await);
        for session in [&session, &other] {
            server.say(session, "one").await;
            server.say(session, "two").await;
        }
        let page = server.get(&format!("/sessions/{session}/turns?limit=1")).await;
        let cursor = page.data()["next_cursor"].as_str().unwrap();
        for listing in [
            format!("{other}/turns?cursor={cursor}"),
            format!("{session}/turns?direction=desc&cursor={cursor}"),
            format!("{session}/turns?status=completed&cursor={cursor}"),
        ] {
            server.get(&format!("/sessions/{listing}")).await.refused(400, "INVALID_CURSOR");
        }
        let sessions = server.get("/sessions?limit=1").await;
        let cursor = sessions.data()["next_cursor"].as_str().unwrap();
        server.get(&format!("/sessions/{session}/turns?cursor={cursor}")).await.refused(400, "INVALID_CURSOR");
    }

    async fn an_unknown_turn_is_refused_by_name(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "hi").await;
        for turn in ["2", "0", "-1", "x", "1.0", "99999999999999999999"] {
            let refusal = server.get(&format!("/sessions/{session}/turns/{turn}")).await;
            assert_eq!(refusal.refused(404, "TURN_NOT_FOUND"), format!("Turn {turn} not found"));
        }
    }
    async fn appended_turns_are_numbered_in_their_order_and_kept_as_sent(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "hi").await;
        let turns = [
            json!({"message": " padded ", "response": "", "metadata": {"b": 1.0, "a": [null]}, "model": "their-model"}),
            json!({"message": "dated", "response": "x", "created_at": "2023-05-06T07:08:09.123987+02:00"}),
            json!({"message": "nulls", "response": "y", "metadata": null, "model": null, "created_at": null}),
        ];
        let added = append(&server, &session, &turns).await;
        assert_eq!(added.status, 201);
        assert_eq!(numbers(&added), [2, 3, 4]);
        let request_id = added.headers["x-request-id"].to_str().unwrap();
        let expected = |turn: i64, message: &str, response: &str, model: Value, metadata: Value, at: &str| json!({
            "session_id": session, "turn": turn, "status": "completed", "message": message, "response": response,
            "error": null, "model": model, "usage": null, "execution_time": null, "request_id": request_id,
            "metadata": metadata, "created_at": at, "completed_at": at,
        });
        let now = "2024-01-01T12:00:00.000Z";
        let expected = [
            expected(2, " padded ", "", json!("their-model"), json!({"b": 1.0, "a": [null]}), now),
            expected(3, "dated", "x", Value::Null, json!({}), "2023-05-06T05:08:09.123Z"),
            expected(4, "nulls", "y", Value::Null, json!({}), now),
        ];
        assert_eq!(added.items(), expected);
        let page = server.get(&format!("/sessions/{session}/turns")).await;
        assert_eq!(page.items()[1..], expected);
        assert_eq!(server.chat(&session, "next").await.data()["turn"], 5);
    }

    async fn up_to_a_hundred_turns_are_appended_at_once(server: Server) {
        let session = server.session(json!({})).await;
        let turns: Vec<_> = (1..=101).map(|i| turn(&format!("message {i}"))).collect();
        assert_eq!(numbers(&append(&server, &session, &turns[..1]).await), [1]);
        assert_eq!(numbers(&append(&server, &session, &turns[..100]).await), (2..=101).collect::<Vec<_>>());
        for refused in [&turns[..0], &turns[..]] {
            append(&server, &session, refused).await.refuses_field("turns");
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 101);
    }

    async fn appended_turns_count_like_any_other(database: Database) {
        let upstream = Upstream::start(|message| Script::Say(message.to_owned())).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({"ttl_seconds": 60})).await;
        server.clock.advance(Duration::from_secs(30));
        append(&server, &session, &[turn("violin"), turn("cello")]).await.data();
        let read = server.read(&format!("/sessions/{session}")).await;
        assert_eq!(read["memory"]["conversation_turns"], 2);
        assert_eq!((&read["last_activity"], &read["expires_at"]), (&json!("2024-01-01T12:00:30.000Z"), &json!("2024-01-01T12:01:30.000Z")));
        assert_eq!(server.get("/search?q=violins").await.items()[0]["turn"], 1);
        server.say(&session, "and?").await;
        let shown: Vec<_> = upstream.prompts()[0][1..].iter().map(|message| message["content"].clone()).collect();
        assert_eq!(shown, ["violin", "You said: violin", "cello", "You said: cello", "and?"]);
    }

    async fn appending_never_moves_activity_backwards(server: Server) {
        let session = server.session(json!({})).await;
        server.run_sql("UPDATE sessions SET last_activity = last_activity + 60000").await;
        let before = server.read(&format!("/sessions/{session}")).await;
        let old = json!({"message": "a", "response": "b", "created_at": "1999-01-01T00:00:00Z"});
        append(&server, &session, &[old]).await.data();
        assert_eq!(server.read(&format!("/sessions/{session}")).await["last_activity"], before["last_activity"]);
    }

    async fn nothing_is_appended_while_a_turn_runs(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|message| Script::Say(message.to_owned()), gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.say(&session, "hi").await }
        });
        upstream.asked_times(1).await;
        let busy = append(&server, &session, &[turn("a")]).await;
        busy.refused(409, "SESSION_BUSY");
        assert_eq!(busy.body["error"]["details"], json!([{"field": "turn", "message": "1"}]));
        assert!(busy.headers.contains_key("retry-after"));
        gate.add_permits(1);
        chat.await.unwrap();
        assert_eq!(numbers(&append(&server, &session, &[turn("a")]).await), [2]);
    }

    async fn a_turn_whose_server_is_gone_does_not_keep_others_from_being_appended(server: Server) {
        let session = server.session(json!({})).await;
        abandoned_turn(&server.app.store, &session, Duration::from_secs(60)).await;
        append(&server, &session, &[turn("a")]).await.refused(409, "SESSION_BUSY");
        server.run_sql("UPDATE turns SET lease_expires_at = 1").await;
        assert_eq!(numbers(&append(&server, &session, &[turn("a")]).await), [2]);
        assert_eq!(server.read(&format!("/sessions/{session}/turns/1")).await["error"]["code"], "INTERRUPTED");
    }

    async fn a_session_that_takes_no_turns_is_refused_before_what_is_wrong_with_them(server: Server) {
        let ended = server.session(json!({})).await;
        server.patch(&format!("/sessions/{ended}"), json!({"is_active": false})).await.data();
        let expired = server.session(json!({"ttl_seconds": 60})).await;
        let deleted = server.session(json!({})).await;
        server.delete(&format!("/sessions/{deleted}")).await;
        server.clock.advance(Duration::from_secs(60));
        for session in [&ended, &expired, &deleted, "session_0000000000000000", "x"] {
            for turns in [[turn("a")], [turn("")], [turn(&"x".repeat(32_001))]] {
                let refusal = append(&server, session, &turns).await;
                assert_eq!(refusal.refused(404, "INVALID_SESSION"), format!("Invalid or inactive session: {session}"));
            }
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 0);
    }

    async fn one_bad_turn_refuses_them_all_and_is_named(server: Server) {
        let session = server.session(json!({})).await;
        let good = || turn("a");
        for (field, bad) in [
            ("message", json!({"message": "", "response": "b"})),
            ("message", json!({"message": " \n\t", "response": "b"})),
            ("message", json!({"message": "a\u{0}", "response": "b"})),
            ("message", json!({"message": 5, "response": "b"})),
            ("message", json!({"message": null, "response": "b"})),
            ("message", json!({"response": "b"})),
            ("response", json!({"message": "a"})),
            ("response", json!({"message": "a", "response": null})),
            ("response", json!({"message": "a", "response": "\u{0}"})),
            ("metadata", json!({"message": "a", "response": "b", "metadata": []})),
            ("metadata", json!({"message": "a", "response": "b", "metadata": {"x": "m".repeat(16 * 1024)}})),
            ("model", json!({"message": "a", "response": "b", "model": ""})),
            ("model", json!({"message": "a", "response": "b", "model": "m".repeat(201)})),
            ("created_at", json!({"message": "a", "response": "b", "created_at": "yesterday"})),
            ("created_at", json!({"message": "a", "response": "b", "created_at": "2024-01-01T12:00:00"})),
            ("created_at", json!({"message": "a", "response": "b", "created_at": 1_704_110_400})),
            ("created_at", json!({"message": "a", "response": "b", "created_at": "9999-12-31T23:59:59-00:01"})),
            ("created_at", json!({"message": "a", "response": "b", "created_at": "0000-01-01T00:00:00+00:01"})),
        ] {
            append(&server, &session, &[good(), bad, good()]).await.refuses_field(&format!("turns[1].{field}"));
        }
        append(&server, &session, &[good(), json!("a")]).await.refuses_field("turns[1]");
        server.post(&format!("/sessions/{session}/turns"), json!({})).await.refuses_field("turns");
        server.post(&format!("/sessions/{session}/turns"), json!({"turns": {}})).await.refuses_field("turns");
        let long = append(&server, &session, &[turn(&"ü".repeat(32_000)), turn(&"ü".repeat(32_001))]).await;
        long.refused(400, "MESSAGE_TOO_LONG");
        assert_eq!(long.body["error"]["details"][0]["field"], "turns[1].message");
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 0);
        assert_eq!(append(&server, &session, &[turn(&"ü".repeat(32_000))]).await.status, 201);
    }

    async fn turns_are_appended_once_however_often_they_are_sent(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/turns");
        let body = json!({"turns": [{"message": "a", "response": "b", "metadata": {"b": 1.0, "a": "ü"}}, turn("c")]});
        let first = server.post_once(&path, "k", &body).await;
        server.clock.advance(Duration::from_secs(5));
        server.patch(&format!("/sessions/{session}"), json!({"is_active": false})).await.data();
        let again = server.post_once(&path, "k", &body).await;
        assert_eq!(again.status, 201);
        assert_eq!(again.data().to_string(), first.data().to_string());
        assert_eq!(again.headers["idempotency-replayed"], "true");
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 2);
        server.post_once(&path, "k", &json!({"turns": [turn("d")]})).await.refused(422, "IDEMPOTENCY_KEY_REUSED");
        // A failure frees the key.
        for _ in 0..2 {
            server.post_once(&path, "l", &json!({"turns": [turn("d")]})).await.refused(404, "INVALID_SESSION");
        }
        server.patch(&format!("/sessions/{session}"), json!({"is_active": true})).await.data();
        assert_eq!(numbers(&server.post_once(&path, "l", &json!({"turns": [turn("d")]})).await), [3]);
    }

    async fn appends_and_chats_at_two_servers_number_one_session_without_gaps(server: Server) {
        let other = Server::beside(server.database.clone(), |_| {}).await;
        let session = server.session(json!({})).await;
        let writers: Vec<_> = (0..12).map(|writer| {
            let client = if writer % 2 == 0 { server.client.clone() } else { other.client.clone() };
            let session = session.clone();
            tokio::spawn(async move {
                let mut given = Vec::new();
                for i in 0..5 {
                    let message = format!("{writer} {i}");
                    if writer % 3 == 0 {
                        given.push((client.chat(&session, &message).await.data()["turn"].as_i64().unwrap(), message));
                        continue;
                    }
                    let turns = [turn(&message), turn(&format!("{message} b")), turn(&format!("{message} c"))];
                    loop {
                        let added = append(&client, &session, &turns).await;
                        if added.status == 201 {
                            let messages = turns.iter().map(|turn| turn["message"].as_str().unwrap().to_owned());
                            given.extend(numbers(&added).into_iter().zip(messages));
                            break;
                        }
                        added.refused(409, "SESSION_BUSY");
                    }
                }
                given
            })
        }).collect();
        let mut given = Vec::new();
        for writer in writers {
            given.extend(writer.await.unwrap());
        }
        given.sort();
        assert_eq!(given.iter().map(|(turn, _)| *turn).collect::<Vec<_>>(), (1..=140).collect::<Vec<_>>());
        let (mut kept, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = server.get(&format!("/sessions/{session}/turns?limit=100{cursor}")).await;
            kept.extend(page.items().iter().map(|turn| {
                (turn["turn"].as_i64().unwrap(), turn["message"].as_str().unwrap().to_owned())
            }));
            match page.data()["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(kept, given);
        assert_eq!(server.read(&format!("/sessions/{session}")).await["memory"]["conversation_turns"], 140);
    }
}
