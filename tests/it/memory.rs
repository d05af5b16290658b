//! What a session and a user are remembered by.

use std::time::Duration;

use atlus::chat::Extract;
use reqwest::Method;
use serde_json::{Value, json};

use crate::harness::{Answer, Server, on_both};

fn etag(answer: &Answer) -> String {
    answer.headers["etag"].to_str().unwrap().to_owned()
}

async fn facts(server: &Server, user: &str) -> Value {
    server.read(&format!("/users/{user}/memory")).await["facts"].clone()
}

/// Facts without their sources.
async fn values(server: &Server, user: &str) -> Value {
    let facts = facts(server, user).await;
    facts.as_object().unwrap().iter().map(|(key, fact)| (key.clone(), fact["value"].clone())).collect()
}

async fn state(server: &Server, user: &str, facts: Value) -> Answer {
    server.patch(&format!("/users/{user}/memory"), json!({"facts": facts})).await
}

on_both! {
    async fn a_new_session_remembers_nothing_and_talks_as_usual(server: Server) {
        let session = server.session(json!({})).await;
        assert_eq!(server.read(&format!("/sessions/{session}/memory")).await, json!({
            "session_memory": {"conversation_turns": 0, "summary": null, "summary_through": null},
            "working_memory": {},
            "behavior_profile": {"verbosity": "medium", "tone": "neutral", "depth": "normal"},
            "profile_turns": {"verbosity": null, "tone": null, "depth": null},
        }));
    }

    async fn memory_is_changed_as_a_merge_patch_says(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/memory");
        let first = json!({"working_memory": {"z": 0, "a": 1.0, "b": {"c": [1], "d": null}}, "behavior_profile": {"tone": "technical"}});
        let changed = server.patch(&path, first).await.data().clone();
        assert_eq!(changed["working_memory"].to_string(), r#"{"z":0,"a":1.0,"b":{"c":[1]}}"#);
        assert_eq!(changed["behavior_profile"], json!({"verbosity": "medium", "tone": "technical", "depth": "normal"}));
        let second = json!({"working_memory": {"z": null, "b": {"e": true}, "f": "ü"}, "behavior_profile": {"depth": "shallow", "tone": null}});
        let changed = server.patch(&path, second).await.data().clone();
        assert_eq!(changed["working_memory"].to_string(), r#"{"a":1.0,"b":{"c":[1],"e":true},"f":"ü"}"#);
        assert_eq!(changed["behavior_profile"], json!({"verbosity": "medium", "tone": "technical", "depth": "shallow"}));
        for nothing in [json!({}), json!({"working_memory": null, "behavior_profile": null}), json!({"unknown": 1})] {
            assert_eq!(server.patch(&path, nothing).await.data(), &changed);
        }
        assert_eq!(server.read(&path).await, changed);
    }

    async fn memory_that_has_changed_is_not_changed_again_unawares(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/memory");
        let send = |method: Method, etag: &str, body: Value| {
            server.send(server.request(method, &path).header("If-Match", etag).json(&body))
        };
        let first = etag(&server.get(&path).await);
        assert_eq!(etag(&server.get(&path).await), first);
        let second = etag(&send(Method::PATCH, &first, json!({"working_memory": {"a": 1}})).await);
        assert_ne!(second, first);
        assert_eq!(etag(&server.get(&path).await), second);
        send(Method::PATCH, &first, json!({"working_memory": {"a": 2}})).await.refused(412, "PRECONDITION_FAILED");
        send(Method::DELETE, &first, json!({})).await.refused(412, "PRECONDITION_FAILED");
        assert_eq!(server.read(&path).await["working_memory"], json!({"a": 1}));
        server.say(&session, "Please be brief.").await;
        send(Method::PATCH, &second, json!({"working_memory": {"a": 3}})).await.refused(412, "PRECONDITION_FAILED");
        let third = etag(&server.get(&path).await);
        send(Method::PATCH, &format!("\"x\", {third}"), json!({"working_memory": {"a": 4}})).await.data();
        send(Method::DELETE, "*", json!({})).await.data();
        assert_eq!(server.read(&path).await["working_memory"], json!({}));
    }

    async fn working_memory_has_a_limit_also_as_it_grows(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/memory");
        let patch = |key: &str, length: usize| server.patch(&path, json!({"working_memory": {key: "x".repeat(length)}}));
        patch("a", 64 * 1024 - 8).await.data();
        patch("a", 64 * 1024 - 7).await.refuses_field("working_memory");
        patch("b", 1).await.refuses_field("working_memory");
        // Nothing of a patch that is refused stays.
        let both = json!({"working_memory": {"b": 1}, "behavior_profile": {"tone": "casual"}});
        server.patch(&path, both).await.refuses_field("working_memory");
        let memory = server.read(&path).await;
        assert_eq!(memory["behavior_profile"]["tone"], "neutral");
        assert_eq!(memory["working_memory"].as_object().unwrap().len(), 1);
        server.patch(&path, json!({"working_memory": {"a": null, "b": 1}})).await.data();
        assert_eq!(server.read(&path).await["working_memory"], json!({"b": 1}));
    }

    async fn what_does_not_fit_a_session_memory_is_named(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/memory");
        for (field, body) in [
            ("working_memory", json!({"working_memory": []})),
            ("working_memory", json!({"working_memory": "x"})),
            ("working_memory", json!({"working_memory": {"a": "\u{0}"}})),
            ("behavior_profile", json!({"behavior_profile": "brief"})),
            ("behavior_profile.verbosity", json!({"behavior_profile": {"verbosity": "brief"}})),
            ("behavior_profile.tone", json!({"behavior_profile": {"tone": "Casual"}})),
            ("behavior_profile.depth", json!({"behavior_profile": {"depth": 3}})),
        ] {
            server.patch(&path, body).await.refuses_field(field);
        }
        assert_eq!(server.get(&path).await.data()["working_memory"], json!({}));
        for session in ["session_0000000000000000", "x"] {
            let path = format!("/sessions/{session}/memory");
            let not_found = format!("Session {session} not found");
            assert_eq!(server.get(&path).await.refused(404, "SESSION_NOT_FOUND"), not_found);
            assert_eq!(server.patch(&path, json!({})).await.refused(404, "SESSION_NOT_FOUND"), not_found);
            assert_eq!(server.delete(&path).await.refused(404, "SESSION_NOT_FOUND"), not_found);
        }
    }

    async fn a_reset_memory_is_as_at_the_beginning_and_turns_stay(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/memory");
        let before = server.read(&path).await;
        server.say(&session, "Please be brief.").await;
        let change = json!({"working_memory": {"a": 1}, "behavior_profile": {"depth": "advanced"}});
        server.patch(&path, change).await.data();
        server.run_sql("UPDATE session_memory SET summary = 'They met.', summary_through = 1").await;
        let reset = server.delete(&path).await.data().clone();
        assert_eq!(reset["session_memory"], json!({"conversation_turns": 1, "summary": null, "summary_through": null}));
        for part in ["working_memory", "behavior_profile", "profile_turns"] {
            assert_eq!(reset[part], before[part]);
        }
        assert_eq!(server.read(&path).await, reset);
        assert_eq!(server.get(&format!("/sessions/{session}/turns")).await.items().len(), 1);
    }

    async fn a_wish_changes_the_profile_and_is_noted_with_its_turn(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        let path = format!("/sessions/{session}/memory");
        server.say(&session, "Hello").await;
        server.say(&session, "Please be brief.").await;
        let memory = server.read(&path).await;
        assert_eq!(memory["behavior_profile"], json!({"verbosity": "low", "tone": "neutral", "depth": "normal"}));
        assert_eq!(memory["profile_turns"], json!({"verbosity": 2, "tone": null, "depth": null}));
        let context = server.read(&format!("/sessions/{session}/context")).await;
        assert!(context["messages"][0]["content"].as_str().unwrap().contains("Answer briefly."));
        // What a request says was said in no turn.
        server.patch(&path, json!({"behavior_profile": {"verbosity": "high"}})).await.data();
        let memory = server.read(&path).await;
        assert_eq!((&memory["behavior_profile"]["verbosity"], &memory["profile_turns"]["verbosity"]), (&json!("high"), &Value::Null));
        let turns = json!({"turns": [{"message": "Please be brief.", "response": "Ok"}]});
        server.post(&format!("/sessions/{session}/turns"), turns).await.data();
        assert_eq!(server.read(&path).await["profile_turns"]["verbosity"], 3);
        let other = server.session(json!({"user_id": "ann"})).await;
        assert_eq!(server.read(&format!("/sessions/{other}/memory")).await["behavior_profile"]["verbosity"], "medium");
    }

    async fn a_fact_is_learnt_with_the_turn_that_states_it(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "Hello").await;
        server.clock.advance(Duration::from_millis(1500));
        server.say(&session, "My name is Ann").await;
        let learnt = json!({"value": "Ann", "session_id": session, "turn": 2, "updated_at": "2024-01-01T12:00:01.500Z"});
        assert_eq!(server.read("/users/ann/memory").await, json!({"user_id": "ann", "facts": {"name": learnt}}));
        // In another session, and from an appended turn, too.
        let other = server.session(json!({"user_id": "ann"})).await;
        assert!(server.say(&other, "What's my name?").await.contains("Ann"));
        let turns = json!({"turns": [{"message": "I live in Berlin", "response": "Nice"}]});
        server.post(&format!("/sessions/{other}/turns"), turns).await.data();
        let location = facts(&server, "ann").await["location"].clone();
        assert_eq!((&location["value"], &location["session_id"], &location["turn"]), (&json!("Berlin"), &json!(other), &json!(2)));
    }

    async fn the_newest_statement_counts_and_without_it_the_one_before(server: Server) {
        let (first, second) = (server.session(json!({"user_id": "ann"})).await, server.session(json!({"user_id": "ann"})).await);
        let name = async || values(&server, "ann").await["name"].clone();
        for (session, said) in [(&first, "Ann"), (&second, "Bea"), (&first, "Cleo")] {
            server.clock.advance(Duration::from_secs(1));
            server.say(session, &format!("My name is {said}")).await;
            assert_eq!(name().await, said);
        }
        // What was said long ago is not news.
        let old = json!({"turns": [{"message": "My name is Zoe", "response": "Hi", "created_at": "2020-01-01T00:00:00Z"}]});
        server.post(&format!("/sessions/{second}/turns"), old).await.data();
        assert_eq!(name().await, "Cleo");
        server.delete(&format!("/sessions/{first}/turns/2")).await.data();
        assert_eq!(name().await, "Bea");
        server.delete(&format!("/sessions/{second}")).await;
        assert_eq!(name().await, "Ann");
        server.delete(&format!("/sessions/{first}")).await;
        assert_eq!(name().await, Value::Null);
    }

    async fn what_a_request_states_holds_from_then_on(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        let later = json!({"turns": [{"message": "My name is Zoe", "response": "Hi", "created_at": "2099-01-01T00:00:00Z"}]});
        // In the same millisecond, and though a turn is dated later.
        server.say(&session, "I live in Berlin").await;
        server.post(&format!("/sessions/{session}/turns"), later).await.data();
        let stated = state(&server, "ann", json!({"name": "Ann", "location": "Rome"})).await;
        let fact = |value: &str| json!({"value": value, "session_id": null, "turn": null, "updated_at": "2024-01-01T12:00:00.000Z"});
        assert_eq!(stated.data()["facts"], json!({"location": fact("Rome"), "name": fact("Ann")}));
        assert_eq!(facts(&server, "ann").await, stated.data()["facts"]);
        let other = server.session(json!({"user_id": "ann"})).await;
        assert!(server.say(&other, "What's my name?").await.contains("Ann"));
        server.say(&session, "My name is Cleo").await;
        assert_eq!(values(&server, "ann").await["name"], "Cleo");
        // Nor does deleting what was said before change it.
        server.delete(&format!("/sessions/{session}")).await;
        assert_eq!(values(&server, "ann").await, json!({"location": "Rome", "name": "Ann"}));
    }

    async fn facts_are_changed_as_a_merge_patch_says(server: Server) {
        let first = json!({"address": {"city": "Berlin", "zip": "10115"}, "age": 41, "gone": true, "tags": ["a"]});
        state(&server, "ann", first).await.data();
        let second = json!({"address": {"zip": null, "street": "Main"}, "age": 42.5, "gone": null, "never": null, "tags": ["b"]});
        state(&server, "ann", second).await.data();
        let expected = json!({"address": {"city": "Berlin", "street": "Main"}, "age": 42.5, "tags": ["b"]});
        assert_eq!(values(&server, "ann").await, expected);
        assert_eq!(state(&server, "ann", json!({})).await.data()["facts"], facts(&server, "ann").await);
        // Null forgets, wherever it was said.
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann").await;
        server.say(&session, "My name is Anna").await;
        state(&server, "ann", json!({"name": null})).await.data();
        assert_eq!(values(&server, "ann").await, expected);
        assert_eq!(server.count("SELECT COUNT(*) FROM facts WHERE key = 'name'").await, 0);
    }

    async fn what_is_known_is_forgotten_and_sessions_stay(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann").await;
        state(&server, "ann", json!({"age": 41})).await.data();
        state(&server, "bob", json!({"age": 14})).await.data();
        let forgotten = server.delete("/users/ann/memory").await;
        assert_eq!(forgotten.data(), &json!({"user_id": "ann", "facts": {}}));
        assert_eq!(values(&server, "ann").await, json!({}));
        assert_eq!(values(&server, "bob").await, json!({"age": 14}));
        assert_eq!(server.get(&format!("/sessions/{session}/turns")).await.items().len(), 1);
        assert_eq!(server.delete("/users/nobody/memory").await.data()["facts"], json!({}));
    }

    async fn facts_outside_their_limits_are_refused_with_all_that_came_with_them(server: Server) {
        let at_limit = json!({"ü".repeat(128): "x".repeat(4094), "": null});
        state(&server, "ann", at_limit).await.data();
        for bad in [
            json!({"": 1}),
            json!({"k".repeat(129): 1}),
            json!({"k\u{0}": 1}),
            json!({"k": "\u{0}"}),
            json!({"k": {"a": ["\u{0}"]}}),
            json!({"k": "x".repeat(4095)}),
            json!("k"),
            json!(["k"]),
            Value::Null,
        ] {
            let mut facts = bad;
            if let Some(facts) = facts.as_object_mut() {
                facts.insert("good".into(), json!(1));
            }
            state(&server, "ann", facts).await.refuses_field("facts");
        }
        server.patch("/users/ann/memory", json!({})).await.refuses_field("facts");
        // A value may not grow past its limit either.
        state(&server, "ann", json!({"grown": {"a": "x".repeat(3000)}})).await.data();
        state(&server, "ann", json!({"grown": {"b": "x".repeat(3000)}})).await.refuses_field("facts");
        assert_eq!(values(&server, "ann").await.as_object().unwrap().len(), 2);
    }

    async fn at_most_five_hundred_facts_are_kept_about_a_user(server: Server) {
        let many = |range: std::ops::Range<usize>| range.map(|i| (format!("k{i}"), json!(i))).collect::<Value>();
        state(&server, "ann", many(0..499)).await.data();
        state(&server, "ann", many(499..501)).await.refuses_field("facts");
        state(&server, "ann", many(499..500)).await.data();
        state(&server, "ann", many(500..501)).await.refuses_field("facts");
        state(&server, "bob", many(0..500)).await.data();
        // What is known already may change, and one may take another's place.
        state(&server, "ann", json!({"k7": "seven"})).await.data();
        state(&server, "ann", json!({"k1": null, "new": 1})).await.data();
        // A chat goes on, and learns nothing more.
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann").await;
        let known = values(&server, "ann").await;
        assert_eq!((known.as_object().unwrap().len(), &known["name"], &known["k7"]), (500, &Value::Null, &json!("seven")));
        assert_eq!(server.read("/users/ann").await["facts"], 500);
        let erased = server.delete("/users/ann").await;
        assert_eq!(erased.data()["removed"]["facts"], 500);
        assert_eq!(server.count("SELECT COUNT(*) FROM facts WHERE user_id = 'ann'").await, 0);
    }

    async fn nothing_is_learnt_for_those_who_have_no_name(server: Server) {
        let session = server.session(json!({})).await;
        assert!(server.say(&session, "My name is Ann").await.contains("Ann"));
        server.post("/chat", json!({"message": "My name is Bob"})).await.data();
        let turns = json!({"turns": [{"message": "My name is Cleo", "response": "Hi"}]});
        server.post(&format!("/sessions/{session}/turns"), turns).await.data();
        assert_eq!(values(&server, "default_user").await, json!({}));
        // Within the session it is known all the same.
        assert!(server.say(&session, "What's my name?").await.contains("Your name is Cleo"));
        let other = server.session(json!({})).await;
        assert!(!server.say(&other, "What's my name?").await.contains("Cleo"));
    }

    async fn nothing_is_learnt_where_learning_is_off(server: Server) {
        let server = Server::beside(server.database.clone(), |config| config.chat.extract = Extract::Off).await;
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann. Please be brief.").await;
        let turns = json!({"turns": [{"message": "My name is Ann. Please be brief.", "response": "Hi"}]});
        server.post(&format!("/sessions/{session}/turns"), turns).await.data();
        assert_eq!(values(&server, "ann").await, json!({}));
        assert_eq!(server.read(&format!("/sessions/{session}/memory")).await["behavior_profile"]["verbosity"], "medium");
        // What a request states is kept.
        state(&server, "ann", json!({"name": "Ann"})).await.data();
        assert_eq!(values(&server, "ann").await, json!({"name": "Ann"}));
    }

    async fn users_do_not_mix(server: Server) {
        for (user, name) in [("ann", "Ann"), ("Ann", "Other"), ("ann ", "Third"), ("a/n%20n?#ü", "Fourth")] {
            let session = server.session(json!({"user_id": user})).await;
            server.say(&session, &format!("My name is {name}")).await;
        }
        for (path, name) in [("ann", "Ann"), ("Ann", "Other"), ("ann%20", "Third"), ("a%2Fn%2520n%3F%23%C3%BC", "Fourth")] {
            assert_eq!(values(&server, path).await, json!({"name": name}), "{path}");
            assert_eq!(server.read(&format!("/users/{path}")).await["sessions"], 1);
        }
        server.delete("/users/ann").await.data();
        assert_eq!(values(&server, "Ann").await, json!({"name": "Other"}));
        server.get(&format!("/users/{}", "u".repeat(129))).await.refused(404, "NOT_FOUND");
    }

    async fn a_user_is_counted(server: Server) {
        server.get("/users/ann").await.refused(404, "USER_NOT_FOUND");
        let first = server.session(json!({"user_id": "ann"})).await;
        server.session(json!({"user_id": "bob"})).await;
        server.clock.advance(Duration::from_secs(60));
        server.say(&first, "My name is Ann").await;
        server.say(&first, "My name is Anna").await;
        server.post("/chat", json!({"user_id": "ann", "message": "hi"})).await.data();
        state(&server, "ann", json!({"age": 41})).await.data();
        server.patch(&format!("/sessions/{first}"), json!({"is_active": false})).await.data();
        assert_eq!(server.read("/users/ann").await, json!({
            "user_id": "ann", "sessions": 2, "turns": 3, "facts": 2,
            "first_activity": "2024-01-01T12:00:00.000Z", "last_activity": "2024-01-01T12:01:00.000Z",
        }));
        state(&server, "zoe", json!({"age": 1})).await.data();
        assert_eq!(server.read("/users/zoe").await, json!({
            "user_id": "zoe", "sessions": 0, "turns": 0, "facts": 1, "first_activity": null, "last_activity": null,
        }));
    }
}
