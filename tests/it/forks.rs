//! Forks: copies of a session that go their own way.

use std::{collections::BTreeSet, time::Duration};

use atlus::{
    chat::Extract,
    domain::{caller::Caller, ids::SessionId},
};
use serde_json::{Value, json};

use crate::{
    chat::abandoned_turn,
    harness::{Answer, Client, Database, Server, on_both},
    models::{Script, Upstream},
};

async fn fork(client: &Client, session: &str, body: Value) -> String {
    id_of(&client.post(&format!("/sessions/{session}/fork"), body).await)
}

#[track_caller]
fn id_of(answer: &Answer) -> String {
    assert_eq!(answer.status, 201, "{answer:?}");
    answer.data()["session_id"].as_str().unwrap().to_owned()
}

/// Every turn of a session, without the name of the session.
async fn turns_of(client: &Client, session: &str) -> Vec<Value> {
    let (mut turns, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("/sessions/{session}/turns?limit=100{cursor}")).await;
        turns.extend(page.items().iter().cloned().map(|mut turn| {
            assert_eq!(turn["session_id"], session);
            turn["session_id"].take();
            turn
        }));
        match page.data()["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return turns,
        }
    }
}

async fn conversation_turns(client: &Client, session: &str) -> i64 {
    client.read(&format!("/sessions/{session}")).await["memory"]["conversation_turns"].as_i64().unwrap()
}

/// The sessions in which something is found.
async fn found_in(client: &Client, q: &str) -> BTreeSet<String> {
    let page = client.get_with("/search", "q", q).await;
    page.items().iter().map(|hit| hit["session_id"].as_str().unwrap().to_owned()).collect()
}

on_both! {
    async fn a_fork_holds_what_was_said_and_goes_its_own_way(server: Server) {
        let session = server.session(json!({
            "user_id": "ann", "title": "Trip", "metadata": {"b": 1, "a": "x"}, "system_prompt": "Be kind.", "ttl_seconds": 600,
        })).await;
        for message in ["one", "two", "three"] {
            server.say(&session, message).await;
        }
        server.clock.advance(Duration::from_secs(60));
        let made = server.post(&format!("/sessions/{session}/fork"), json!({})).await;
        let forked = id_of(&made);
        let now = "2024-01-01T12:01:00.000Z";
        assert_eq!(made.data(), &json!({
            "session_id": forked, "user_id": "ann", "title": "Trip", "metadata": {"b": 1, "a": "x"}, "system_prompt": "Be kind.",
            "created_at": now, "last_activity": now, "is_active": true, "temporary": false, "ttl_seconds": 600,
            "expires_at": "2024-01-01T12:11:00.000Z", "ended_at": null, "forked_from": {"session_id": session, "turn": 3},
        }));
        let mut read = server.read(&format!("/sessions/{forked}")).await;
        let memory = read.as_object_mut().unwrap().shift_remove("memory").unwrap();
        assert_eq!((&read, &memory["conversation_turns"]), (made.data(), &json!(3)));
        assert_eq!(turns_of(&server, &forked).await, turns_of(&server, &session).await);

        assert_eq!(server.chat(&forked, "four here").await.data()["turn"], 4);
        assert_eq!(server.chat(&session, "four there").await.data()["turn"], 4);
        assert_eq!(turns_of(&server, &forked).await[3]["message"], "four here");
        assert_eq!(turns_of(&server, &session).await[3]["message"], "four there");
        assert_eq!(server.get("/sessions?user_id=ann").await.items().len(), 2);
    }

    async fn a_fork_ends_at_the_turn_that_is_named(server: Server) {
        let session = server.session(json!({})).await;
        for message in ["one", "two", "three"] {
            server.say(&session, message).await;
        }
        let forked = fork(&server, &session, json!({"turn": 2})).await;
        assert_eq!(turns_of(&server, &forked).await, turns_of(&server, &session).await[..2]);
        assert_eq!(conversation_turns(&server, &forked).await, 2);
        assert_eq!(server.read(&format!("/sessions/{forked}")).await["forked_from"], json!({"session_id": session, "turn": 2}));
        assert_eq!(server.chat(&forked, "next").await.data()["turn"], 3);
        // A fork is forked like any other session.
        let again = fork(&server, &forked, json!({"turn": 1})).await;
        assert_eq!(turns_of(&server, &again).await, turns_of(&server, &session).await[..1]);
    }

    async fn a_session_in_which_nothing_was_said_is_forked(server: Server) {
        let session = server.session(json!({"title": "Empty"})).await;
        let forked = id_of(&server.send(server.request(reqwest::Method::POST, &format!("/sessions/{session}/fork"))).await);
        let read = server.read(&format!("/sessions/{forked}")).await;
        assert_eq!((&read["title"], &read["forked_from"]["turn"]), (&json!("Empty"), &json!(0)));
        assert_eq!(server.chat(&forked, "hi").await.data()["turn"], 1);
    }

    async fn title_and_metadata_may_be_others(server: Server) {
        let session = server.session(json!({"title": "Trip", "metadata": {"a": 1}})).await;
        let body = json!({"title": "Other trip", "metadata": {"b": 2}});
        let made = server.post(&format!("/sessions/{session}/fork"), body).await;
        assert_eq!((&made.data()["title"], &made.data()["metadata"]), (&json!("Other trip"), &json!({"b": 2})));
        let nulls = server.post(&format!("/sessions/{session}/fork"), json!({"title": null, "metadata": null, "turn": null})).await;
        assert_eq!((&nulls.data()["title"], &nulls.data()["metadata"]), (&json!("Trip"), &json!({"a": 1})));
        for (field, value) in [("title", json!("t".repeat(201))), ("metadata", json!([])), ("turn", json!(0)), ("turn", json!(-1)), ("turn", json!("1"))] {
            server.post(&format!("/sessions/{session}/fork"), json!({field: value})).await.refuses_field(field);
        }
    }

    async fn what_is_over_is_forked_into_something_new(server: Server) {
        let ended = server.session(json!({})).await;
        server.say(&ended, "one").await;
        server.patch(&format!("/sessions/{ended}"), json!({"is_active": false})).await.data();
        let expired = server.session(json!({"ttl_seconds": 60})).await;
        server.say(&expired, "one").await;
        let temporary = server.post("/chat", json!({"message": "one"})).await.data()["session_id"].as_str().unwrap().to_owned();
        server.clock.advance(Duration::from_secs(61));
        for (session, ttl) in [(ended, Value::Null), (expired, json!(60)), (temporary, Value::Null)] {
            let forked = fork(&server, &session, json!({})).await;
            let read = server.read(&format!("/sessions/{forked}")).await;
            assert_eq!((&read["is_active"], &read["temporary"], &read["ended_at"]), (&json!(true), &json!(false), &Value::Null));
            assert_eq!(read["ttl_seconds"], ttl);
            assert_eq!(server.chat(&forked, "two").await.data()["turn"], 2);
        }
    }

    async fn turns_that_did_not_complete_keep_their_numbers(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "fail" => Script::Raw(400, vec![], String::new()),
            other => Script::Say(other.to_owned()),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        for message in ["one", "fail", "secret", "four", "fail"] {
            server.chat(&session, message).await;
        }
        let key = abandoned_turn(&server.app.store, &session, Duration::from_secs(60)).await;
        server.post(&format!("/sessions/{session}/turns/{}/cancel", key.turn), json!({})).await.data();
        server.say(&session, "seven").await;
        server.delete(&format!("/sessions/{session}/turns/3")).await.data();
        let forked = fork(&server, &session, json!({})).await;
        let turns = turns_of(&server, &forked).await;
        let statuses: Vec<_> = turns.iter().map(|turn| turn["status"].as_str().unwrap()).collect();
        assert_eq!(statuses, ["completed", "failed", "deleted", "completed", "failed", "cancelled", "completed"]);
        assert_eq!(turns, turns_of(&server, &session).await);
        assert_eq!(conversation_turns(&server, &forked).await, 3);
        server.say(&forked, "next").await;
        let shown: Vec<_> = upstream.prompts().pop().unwrap()[1..].iter().map(|message| message["content"].clone()).collect();
        assert_eq!(shown, ["one", "one", "four", "four", "seven", "seven", "next"]);
        let context = server.read(&format!("/sessions/{forked}/context")).await;
        assert_eq!((&context["included"]["recent_turns"], &context["dropped"]["recent_turns"]), (&json!(4), &json!(0)));
        // Whole means through the last completed turn.
        let before = fork(&server, &session, json!({"turn": 5})).await;
        assert_eq!(turns_of(&server, &before).await.len(), 5);
        let whole = fork(&server, &before, json!({})).await;
        assert_eq!(turns_of(&server, &whole).await.len(), 4);
        assert_eq!(server.chat(&before, "next").await.data()["turn"], 6);
    }

    async fn a_fork_through_what_is_not_there_is_refused(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "one").await;
        for turn in [2, 3, i64::MAX] {
            let refusal = server.post(&format!("/sessions/{session}/fork"), json!({"turn": turn})).await;
            assert_eq!(refusal.refused(404, "TURN_NOT_FOUND"), format!("Turn {turn} not found"));
        }
        for session in ["session_0000000000000000", "x"] {
            server.post(&format!("/sessions/{session}/fork"), json!({})).await.refused(404, "SESSION_NOT_FOUND");
        }
        abandoned_turn(&server.app.store, &session, Duration::from_secs(60)).await;
        let busy = server.post(&format!("/sessions/{session}/fork"), json!({"turn": 2})).await;
        busy.refused(409, "SESSION_BUSY");
        assert_eq!(busy.body["error"]["details"], json!([{"field": "turn", "message": "2"}]));
        // What was completed before it is forked meanwhile.
        let forked = fork(&server, &session, json!({})).await;
        assert_eq!(server.chat(&forked, "two").await.data()["turn"], 2);
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, 2);
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
    }

    async fn memory_and_profile_are_copied(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "Please be brief.").await;
        server.say(&session, "Please be casual.").await;
        let change = json!({"working_memory": {"step": 2}, "behavior_profile": {"depth": "advanced"}});
        server.patch(&format!("/sessions/{session}/memory"), change).await.data();
        server.run_sql("UPDATE session_memory SET summary = 'They met.', summary_tokens = 3, summary_through = 2").await;
        let whole = fork(&server, &session, json!({})).await;
        let memory = server.read(&format!("/sessions/{session}/memory")).await;
        assert_eq!(memory["behavior_profile"], json!({"verbosity": "low", "tone": "casual", "depth": "advanced"}));
        assert_eq!(server.read(&format!("/sessions/{whole}/memory")).await, memory);
        // A summary that says more than was copied is left behind.
        let part = fork(&server, &session, json!({"turn": 1})).await;
        let copied = server.read(&format!("/sessions/{part}/memory")).await;
        assert_eq!(copied["session_memory"], json!({"conversation_turns": 1, "summary": null, "summary_through": null}));
        assert_eq!(copied["working_memory"], json!({"step": 2}));
        assert_eq!(copied["profile_turns"], json!({"verbosity": 1, "tone": null, "depth": null}));
        // From here on each has its own.
        server.patch(&format!("/sessions/{whole}/memory"), json!({"working_memory": {"step": 3}})).await.data();
        assert_eq!(server.read(&format!("/sessions/{session}/memory")).await, memory);
    }

    async fn what_was_learnt_is_known_as_long_as_either_is_there(server: Server) {
        for parent_first in [true, false] {
            let session = server.session(json!({"user_id": "ann"})).await;
            server.say(&session, "My name is Ann").await;
            server.say(&session, "I live in Berlin").await;
            let part = fork(&server, &session, json!({"turn": 1})).await;
            let (first, second) = if parent_first { (&session, &part) } else { (&part, &session) };
            let left = turns_of(&server, second).await;
            assert_eq!(server.delete(&format!("/sessions/{first}")).await.status, 200);
            let facts = server.read("/users/ann/memory").await["facts"].clone();
            assert_eq!((&facts["name"]["value"], &facts["name"]["session_id"]), (&json!("Ann"), &json!(second)));
            // Where one lives was said in a turn that the fork does not hold.
            assert_eq!(facts["location"].is_null(), parent_first, "{facts}");
            assert_eq!(turns_of(&server, second).await, left);
            assert_eq!(found_in(&server, "name").await, BTreeSet::from([second.clone()]));
            server.say(second, "still here").await;
            server.delete(&format!("/sessions/{second}")).await;
            assert_eq!(server.read("/users/ann/memory").await["facts"], json!({}));
        }
    }

    async fn both_are_found_and_each_by_itself(database: Database) {
        let upstream = Upstream::start(|message| Script::Say(format!("You said {message}"))).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| config.chat.extract = Extract::Off).await;
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "the violin").await;
        let forked = fork(&server, &session, json!({})).await;
        assert_eq!(found_in(&server, "violin").await, BTreeSet::from([session.clone(), forked.clone()]));
        for one in [&session, &forked] {
            let found = server.get(&format!("/search?q=violin&session_id={one}")).await;
            assert_eq!((found.items().len(), &found.items()[0]["session_id"]), (1, &json!(one)));
        }
        assert_eq!(server.get("/search?q=violin&user_id=ann").await.items().len(), 2);
        server.delete(&format!("/sessions/{session}/turns/1")).await.data();
        assert_eq!(found_in(&server, "violin").await, BTreeSet::from([forked]));
    }

    async fn a_fork_is_made_once_however_often_it_is_asked_for(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "one").await;
        let (path, body) = (format!("/sessions/{session}/fork"), json!({"turn": 1, "metadata": {"b": 1.0, "a": 2}}));
        let first = server.post_once(&path, "k", &body).await;
        server.clock.advance(Duration::from_secs(5));
        let again = server.post_once(&path, "k", &body).await;
        assert_eq!((first.status, again.status), (201, 201));
        assert_eq!(again.data().to_string(), first.data().to_string());
        assert_eq!(again.headers["idempotency-replayed"], "true");
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, 2);
        server.post_once(&path, "k", &json!({})).await.refused(422, "IDEMPOTENCY_KEY_REUSED");
        // A failure frees the key.
        for _ in 0..2 {
            server.post_once(&path, "l", &json!({"turn": 2})).await.refused(404, "TURN_NOT_FOUND");
        }
        server.say(&session, "two").await;
        assert_eq!(server.post_once(&path, "l", &json!({"turn": 2})).await.status, 201);
        // Deleting the fork forgets the answer with it.
        server.delete(&format!("/sessions/{}", id_of(&first))).await;
        assert_ne!(id_of(&server.post_once(&path, "k", &body).await), id_of(&first));
    }

    async fn a_long_session_is_copied_whole(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        for round in 0..12 {
            let turns: Vec<_> = (0..100).map(|i| json!({"message": format!("message {}", round * 100 + i), "response": "r"})).collect();
            server.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
        }
        let forked = fork(&server, &session, json!({})).await;
        let turns = turns_of(&server, &forked).await;
        assert_eq!(turns.len(), 1200);
        assert_eq!(turns, turns_of(&server, &session).await);
        assert_eq!(conversation_turns(&server, &forked).await, 1200);
        for turn in [1, 500, 501, 1000, 1001, 1200] {
            let found = server.get_with(&format!("/search?session_id={forked}"), "q", &format!("\"message {}\"", turn - 1)).await;
            assert_eq!(found.items()[0]["turn"], turn);
        }
        let part = fork(&server, &session, json!({"turn": 501})).await;
        assert_eq!(conversation_turns(&server, &part).await, 501);
        assert_eq!(server.chat(&part, "next").await.data()["turn"], 502);
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
        server.delete("/users/ann").await.data();
        for table in ["SELECT COUNT(*) FROM turns", "SELECT COUNT(*) FROM search_entries"] {
            assert_eq!(server.count(table).await, 0, "{table}");
        }
    }

    async fn a_fork_whose_server_stopped_half_way_was_never_seen_and_is_cleaned_up(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "the violin").await;
        // As the first page leaves it: turns and what they are found by, marked, without a session.
        let staged = fork(&server, &session, json!({})).await;
        let id = SessionId::parse(&staged).unwrap();
        let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql("DELETE FROM sessions WHERE session_id = $1").bind(id).run().await.unwrap();
        tx.sql("INSERT INTO erasures (session_id, tenant_id, created_at) VALUES ($1, 1, 1704110400000 + 60000)").bind(id).run().await.unwrap();
        tx.commit().await.unwrap();
        for path in ["", "/turns", "/turns/1", "/memory", "/context"] {
            server.get(&format!("/sessions/{staged}{path}")).await.refused(404, "SESSION_NOT_FOUND");
        }
        assert_eq!(found_in(&server, "violin").await, BTreeSet::from([session.clone()]));
        assert_eq!(server.get(&format!("/search?q=violin&session_id={staged}")).await.items().len(), 0);
        assert!(server.app.store.session(&Caller::ANYONE, id).await.unwrap().is_none());
        // While it may still be worked on it is left alone.
        server.clock.advance(Duration::from_secs(80));
        server.run_jobs(None).await;
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 2);
        server.clock.advance(Duration::from_secs(11));
        server.run_jobs(None).await;
        for table in ["SELECT COUNT(*) FROM turns", "SELECT COUNT(*) FROM search_entries", "SELECT COUNT(*) FROM sessions"] {
            assert_eq!(server.count(table).await, 1, "{table}");
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
    }

    async fn a_session_deleted_while_it_is_forked_leaves_a_whole_fork_or_none(server: Server) {
        let session = server.session(json!({})).await;
        let turns: Vec<_> = (0..100).map(|i| json!({"message": format!("m{i}"), "response": "r"})).collect();
        for _ in 0..6 {
            server.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
        }
        let forks: Vec<_> = (0..3).map(|_| {
            let (client, path) = (server.client.clone(), format!("/sessions/{session}/fork"));
            tokio::spawn(async move { client.post(&path, json!({})).await })
        }).collect();
        while server.count("SELECT COUNT(*) FROM turns").await == 600 {
            tokio::task::yield_now().await;
        }
        assert_eq!(server.delete(&format!("/sessions/{session}")).await.status, 200);
        let mut made = 0;
        for fork in forks {
            let fork = fork.await.unwrap();
            if fork.status == 201 {
                made += 1;
                assert_eq!(turns_of(&server, &id_of(&fork)).await.len(), 600);
            } else {
                fork.refused(404, "SESSION_NOT_FOUND");
            }
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, made);
        for table in ["SELECT COUNT(*) FROM turns", "SELECT COUNT(*) FROM search_entries"] {
            assert_eq!(server.count(table).await, 600 * made, "{table}");
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
    }
}
