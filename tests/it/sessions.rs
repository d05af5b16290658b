//! Sessions: made, found, listed, changed, deleted.

use std::{collections::HashSet, time::Duration};

use serde_json::{Value, json};

use crate::harness::{Answer, Server, on_both};

const DAY: Duration = Duration::from_secs(24 * 60 * 60);

fn ids(answer: &Answer) -> Vec<&str> {
    answer.items().iter().map(|session| session["session_id"].as_str().unwrap()).collect()
}

/// Every item of a listing, page by page.
async fn walk(server: &Server, path: &str, limit: usize) -> Vec<Value> {
    let (mut items, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = server.get(&format!("{path}&limit={limit}{cursor}")).await;
        assert!(page.items().len() <= limit);
        items.extend_from_slice(page.items());
        match page.data()["next_cursor"].as_str() {
            Some(next) => cursor = format!("&cursor={next}"),
            None => return items,
        }
    }
}

on_both! {
    async fn a_created_session_can_be_read_again(server: Server) {
        let body = json!({
            "user_id": "ann", "title": "Café ☕ \u{1F600}", "system_prompt": " Be brief.\n", "ttl_seconds": 3600,
            "metadata": {"z": 1, "a": {"deep": [1.0, 1e100, -0.5, "ü", null, true]}, "big": 9_007_199_254_740_993_i64}
        });
        let made = server.post("/sessions", body.clone()).await;
        assert_eq!(made.status, 201);
        let data = made.data();
        for field in ["user_id", "title", "system_prompt", "ttl_seconds", "metadata"] {
            assert_eq!(data[field], body[field]);
        }
        assert_eq!(data["created_at"], "2024-01-01T12:00:00.000Z");
        assert_eq!(data["last_activity"], data["created_at"]);
        assert_eq!(data["expires_at"], "2024-01-01T13:00:00.000Z");
        assert_eq!((&data["is_active"], &data["temporary"]), (&json!(true), &json!(false)));
        assert_eq!((&data["ended_at"], &data["forked_from"]), (&Value::Null, &Value::Null));

        let id = data["session_id"].as_str().unwrap();
        let read = server.get(&format!("/sessions/{id}")).await;
        let mut expected = data.clone();
        expected["memory"] = json!({
            "session_id": id, "has_session_memory": true, "has_working_memory": true,
            "has_behavior_profile": true, "conversation_turns": 0
        });
        assert_eq!(*read.data(), expected);
        // The order of keys is kept, too.
        assert_eq!(read.data()["metadata"].to_string(), body["metadata"].to_string());
    }

    async fn a_session_can_be_created_from_nothing(server: Server) {
        let bodyless = server.send(server.request(reqwest::Method::POST, "/sessions")).await;
        let empty = server.send(server.request(reqwest::Method::POST, "/sessions").body("")).await;
        let nulls = json!({"user_id": null, "metadata": null, "title": null, "ttl_seconds": null, "unknown": 1});
        for made in [bodyless, empty, server.post("/sessions", json!({})).await, server.post("/sessions", nulls).await] {
            assert_eq!(made.status, 201);
            assert_eq!(made.data()["user_id"], "default_user");
            assert_eq!(made.data()["metadata"], json!({}));
            assert_eq!(made.data()["expires_at"], Value::Null);
        }
    }

    async fn a_new_session_outside_its_limits_is_refused_with_the_field_named(server: Server) {
        let at_limit = json!({
            "user_id": "ü".repeat(128), "title": "t".repeat(200), "system_prompt": "p".repeat(8000),
            "ttl_seconds": 31_536_000, "metadata": {"x": "m".repeat(16 * 1024 - 8)}
        });
        assert_eq!(server.post("/sessions", at_limit).await.status, 201);
        let wrong = [
            ("user_id", json!("")),
            ("user_id", json!("u".repeat(129))),
            ("user_id", json!(5)),
            ("user_id", json!("a\u{0}b")),
            ("title", json!("t".repeat(201))),
            ("system_prompt", json!("p".repeat(8001))),
            ("ttl_seconds", json!(59)),
            ("ttl_seconds", json!(31_536_001)),
            ("ttl_seconds", json!("60")),
            ("ttl_seconds", json!(60.5)),
            ("metadata", json!([])),
            ("metadata", json!("{}")),
            ("metadata", json!({"x": "m".repeat(16 * 1024)})),
            ("metadata", json!({"x": ["\u{0}"]})),
        ];
        for (field, value) in wrong {
            let refusal = server.post("/sessions", json!({field: value})).await;
            refusal.refused(400, "VALIDATION_ERROR");
            assert_eq!(refusal.body["error"]["details"][0]["field"], field, "{refusal:?}");
        }
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, 1);
    }

    async fn an_unknown_session_is_refused_by_name(server: Server) {
        for id in ["session_0000000000000000", "session_ABCDEF0123456789", "nonsense", "session_%C3%A4", "%00"] {
            let name = id.replace("%C3%A4", "ä").replace("%00", "\u{0}");
            for refusal in [
                server.get(&format!("/sessions/{id}")).await,
                server.patch(&format!("/sessions/{id}"), json!({})).await,
                server.delete(&format!("/sessions/{id}")).await,
                server.get(&format!("/sessions/{id}/turns")).await,
                server.get(&format!("/sessions/{id}/turns/1")).await,
            ] {
                assert_eq!(refusal.refused(404, "SESSION_NOT_FOUND"), format!("Session {name} not found"));
            }
        }
    }

    async fn pages_hold_every_session_once_though_all_are_equally_old(server: Server) {
        let mut made = HashSet::new();
        for _ in 0..23 {
            made.insert(server.session(json!({"user_id": "ann"})).await);
        }
        server.session(json!({"user_id": "bob"})).await;
        for order in ["last_activity", "created_at"] {
            let mut directions = Vec::new();
            for direction in ["asc", "desc"] {
                let path = format!("/sessions?user_id=ann&order={order}&direction={direction}");
                let items = walk(&server, &path, 5).await;
                let seen: Vec<_> = items.iter().map(|item| item["session_id"].as_str().unwrap().to_owned()).collect();
                assert_eq!(seen.len(), 23);
                assert_eq!(seen.iter().cloned().collect::<HashSet<_>>(), made);
                directions.push(seen);
            }
            directions[1].reverse();
            assert_eq!(directions[0], directions[1]);
        }
    }

    async fn rows_added_between_pages_neither_repeat_nor_hide_others(server: Server) {
        let mut before = HashSet::new();
        for _ in 0..10 {
            before.insert(server.session(json!({})).await);
            server.clock.advance(Duration::from_millis(1));
        }
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = server.get(&format!("/sessions?order=created_at&limit=3{cursor}")).await;
            seen.extend(ids(&page).into_iter().map(str::to_owned));
            server.session(json!({})).await;
            match page.data()["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert_eq!(seen.len(), 10);
        assert_eq!(seen.into_iter().collect::<HashSet<_>>(), before);
    }

    async fn sessions_are_listed_by_their_newest_activity(server: Server) {
        let first = server.session(json!({})).await;
        server.clock.advance(DAY);
        let second = server.session(json!({})).await;
        assert_eq!(ids(&server.get("/sessions").await), [&second, &first].map(String::as_str));
        server.clock.advance(DAY);
        server.say(&first, "Hello").await;
        assert_eq!(ids(&server.get("/sessions").await), [&first, &second].map(String::as_str));
        assert_eq!(ids(&server.get("/sessions?order=created_at").await), [&second, &first].map(String::as_str));
        assert_eq!(ids(&server.get("/sessions?direction=asc").await), [&second, &first].map(String::as_str));
    }

    async fn a_cursor_of_another_listing_is_refused(server: Server) {
        for _ in 0..3 {
            server.session(json!({"user_id": "ann"})).await;
        }
        let page = server.get("/sessions?user_id=ann&limit=1").await;
        let cursor = page.data()["next_cursor"].as_str().unwrap();
        let others = ["order=created_at", "user_id=ann&direction=asc", "user_id=bob", "is_active=true&user_id=ann"];
        for other in others {
            server.get(&format!("/sessions?{other}&cursor={cursor}")).await.refused(400, "INVALID_CURSOR");
        }
        for nonsense in ["", "x", "%00", &"0".repeat(48), &format!("{cursor}0"), &"ü".repeat(24)] {
            let refusal = server.get(&format!("/sessions?user_id=ann&cursor={nonsense}")).await;
            refusal.refused(400, "INVALID_CURSOR");
        }
        assert_eq!(server.get(&format!("/sessions?user_id=ann&limit=9&cursor={cursor}")).await.items().len(), 2);
    }

    async fn sessions_are_found_by_equal_metadata(server: Server) {
        let stored = json!({
            "s": "x", "n": 1, "f": 1.5, "t": true, "z": null, "o": {"a": 1, "b": [1, {"c": 2}]}, "e": {},
            "a.b": "dotted", "qu\"ote": "quoted", "ü": "ünicode", "text": "1"
        });
        let id = server.session(json!({"metadata": stored})).await;
        server.session(json!({"metadata": {"other": 1}})).await;
        let hits = [
            json!({"s": "x"}), json!({"n": 1}), json!({"n": 1.0}), json!({"f": 1.5}), json!({"t": true}),
            json!({"z": null}), json!({"e": {}}), json!({"o": {"b": [1, {"c": 2.0}], "a": 1}}),
            json!({"a.b": "dotted"}), json!({"qu\"ote": "quoted"}), json!({"ü": "ünicode"}),
            json!({"s": "x", "n": 1, "t": true}),
        ];
        for wanted in hits {
            let found = server.get_with("/sessions", "metadata", &wanted.to_string()).await;
            assert_eq!(ids(&found), [&id], "{wanted}");
        }
        let misses = [
            json!({"s": "y"}), json!({"s": "x", "n": 2}), json!({"n": "1"}), json!({"text": 1}), json!({"t": 1}),
            json!({"z": false}), json!({"missing": null}), json!({"o": {"a": 1}}), json!({"e": []}),
            json!({"o": {"a": 1, "b": [{"c": 2}, 1]}}), json!({"o": {"a": 1, "b": [1, {"c": 2}], "d": 1}}),
            json!({"a": {"b": "dotted"}}), json!({"S": "x"}),
        ];
        for wanted in misses {
            let found = server.get_with("/sessions", "metadata", &wanted.to_string()).await;
            assert!(ids(&found).is_empty(), "{wanted}");
        }
        for wrong in ["[]", "x", "{", "5", ""] {
            let refusal = server.get_with("/sessions", "metadata", wrong).await;
            refusal.refused(400, "VALIDATION_ERROR");
            assert_eq!(refusal.body["error"]["details"][0]["field"], "metadata");
        }
    }

    async fn filters_narrow_together(server: Server) {
        let ended = server.session(json!({"user_id": "ann", "metadata": {"k": 1}})).await;
        let active = server.session(json!({"user_id": "ann", "metadata": {"k": 1}})).await;
        server.session(json!({"user_id": "bob", "metadata": {"k": 1}})).await;
        server.patch(&format!("/sessions/{ended}"), json!({"is_active": false})).await;
        let query = "/sessions?user_id=ann&metadata=%7B%22k%22:1%7D";
        assert_eq!(ids(&server.get(&format!("{query}&is_active=true")).await), [&active]);
        assert_eq!(ids(&server.get(&format!("{query}&is_active=false")).await), [&ended]);
        assert_eq!(server.get(query).await.items().len(), 2);
    }

    async fn ended_and_expired_sessions_are_listed_together_in_pages(server: Server) {
        let mut inactive = Vec::new();
        for round in 0..3 {
            let ended = server.session(json!({"ttl_seconds": if round == 1 { json!(60) } else { json!(null) }})).await;
            server.patch(&format!("/sessions/{ended}"), json!({"is_active": false})).await;
            server.clock.advance(Duration::from_millis(1));
            let expired = server.session(json!({"ttl_seconds": 60})).await;
            server.clock.advance(Duration::from_millis(1));
            inactive.extend([ended, expired]);
        }
        server.clock.advance(DAY);
        server.session(json!({"ttl_seconds": 60})).await;
        server.session(json!({})).await;
        for (listing, descends) in [("", true), ("&direction=asc", false), ("&order=created_at&user_id=default_user", true)] {
            let (mut seen, mut cursor) = (Vec::new(), String::new());
            loop {
                let page = server.get(&format!("/sessions?is_active=false&limit=2{listing}{cursor}")).await;
                seen.extend(ids(&page).into_iter().map(str::to_owned));
                match page.data()["next_cursor"].as_str() {
                    Some(next) => cursor = format!("&cursor={next}"),
                    None => break,
                }
            }
            if descends {
                seen.reverse();
            }
            assert_eq!(seen, inactive, "{listing}");
        }
    }

    async fn the_newest_active_session_of_a_user_is_continued(server: Server) {
        let refusal = server.get("/sessions/continue?user_id=ann").await;
        assert_eq!(refusal.refused(404, "NO_SESSION_FOUND"), "No active session found for user: ann");
        let older = server.session(json!({"user_id": "ann"})).await;
        server.clock.advance(DAY);
        let newer = server.session(json!({"user_id": "ann"})).await;
        server.clock.advance(DAY);
        server.post("/chat", json!({"user_id": "ann", "message": "a temporary one"})).await;
        server.session(json!({"user_id": "bob"})).await;

        let found = server.get("/sessions/continue?user_id=ann").await;
        assert_eq!(found.data()["session_id"], newer.as_str());
        assert_eq!(found.data().get("memory"), None);
        server.patch(&format!("/sessions/{newer}"), json!({"is_active": false})).await;
        assert_eq!(server.get("/sessions/continue?user_id=ann").await.data()["session_id"], older.as_str());
        let answer = server.get("/sessions/continue").await;
        assert_eq!(answer.refused(400, "VALIDATION_ERROR"), "user_id: is required");
    }

    async fn a_session_expires_by_itself_and_activity_puts_it_off(server: Server) {
        let id = server.session(json!({"ttl_seconds": 3600})).await;
        server.clock.advance(Duration::from_secs(3000));
        server.say(&id, "still here").await;
        server.clock.advance(Duration::from_secs(3599));
        assert_eq!(server.get(&format!("/sessions/{id}")).await.data()["is_active"], true);
        server.clock.advance(Duration::from_secs(1));
        let read = server.get(&format!("/sessions/{id}")).await;
        assert_eq!(read.data()["is_active"], false);
        assert_eq!(read.data()["ended_at"], Value::Null);
        assert_eq!(
            server.chat(&id, "too late").await.refused(404, "INVALID_SESSION"),
            format!("Invalid or inactive session: {id}")
        );
        assert_eq!(ids(&server.get("/sessions?is_active=false").await), [&id]);
        assert_eq!(server.get(&format!("/sessions/{id}/turns")).await.items().len(), 1);
    }

    async fn an_ended_or_expired_session_is_reopened(server: Server) {
        let id = server.session(json!({"ttl_seconds": 60})).await;
        let path = format!("/sessions/{id}");
        let ended = server.patch(&path, json!({"is_active": false})).await;
        assert_eq!(ended.data()["ended_at"], "2024-01-01T12:00:00.000Z");
        assert_eq!(ended.data()["is_active"], false);
        server.chat(&id, "anybody?").await.refused(404, "INVALID_SESSION");
        server.clock.advance(DAY);
        let reopened = server.patch(&path, json!({"is_active": true})).await;
        assert_eq!(reopened.data()["ended_at"], Value::Null);
        assert_eq!(reopened.data()["last_activity"], "2024-01-02T12:00:00.000Z");
        assert_eq!(reopened.data()["expires_at"], "2024-01-02T12:01:00.000Z");
        server.say(&id, "hello again").await;
    }

    async fn a_patch_sets_clears_and_leaves(server: Server) {
        let made = json!({"title": "a", "system_prompt": "b", "ttl_seconds": 60, "metadata": {"x": 1, "y": {"z": 2, "w": 3}}});
        let id = server.session(made).await;
        let path = format!("/sessions/{id}");
        let same = server.patch(&path, json!({})).await;
        assert_eq!(same.data()["title"], "a");
        assert_eq!(same.data()["last_activity"], "2024-01-01T12:00:00.000Z");

        let change = json!({"title": null, "ttl_seconds": null, "metadata": {"x": null, "y": {"z": null}, "v": [1]}});
        let changed = server.patch(&path, change).await;
        assert_eq!(changed.data()["title"], Value::Null);
        assert_eq!(changed.data()["expires_at"], Value::Null);
        assert_eq!(changed.data()["system_prompt"], "b");
        assert_eq!(changed.data()["metadata"], json!({"y": {"w": 3}, "v": [1]}));
        let mut read = server.get(&path).await.data().clone();
        read.as_object_mut().unwrap().remove("memory");
        assert_eq!(read, *changed.data());
    }

    async fn a_patch_that_does_not_fit_changes_nothing(server: Server) {
        let id = server.session(json!({"title": "a", "metadata": {"x": "m".repeat(10_000)}})).await;
        let path = format!("/sessions/{id}");
        let too_large = json!({"title": "b", "metadata": {"y": "m".repeat(10_000)}});
        for (field, wrong) in [
            ("metadata", too_large),
            ("title", json!({"title": 5})),
            ("ttl_seconds", json!({"title": "b", "ttl_seconds": 1})),
            ("is_active", json!({"title": "b", "is_active": "no"})),
        ] {
            let refusal = server.patch(&path, wrong).await;
            refusal.refused(400, "VALIDATION_ERROR");
            assert_eq!(refusal.body["error"]["details"][0]["field"], field);
        }
        assert_eq!(server.get(&path).await.data()["title"], "a");
    }

    async fn a_deleted_session_leaves_nothing_in_any_table(server: Server) {
        let id = server.session(json!({"user_id": "ann"})).await;
        let kept = server.session(json!({"user_id": "ann"})).await;
        for i in 0..3 {
            server.say(&id, &format!("message {i}")).await;
        }
        server.say(&kept, "stays").await;
        let deleted = server.delete(&format!("/sessions/{id}")).await;
        assert_eq!(deleted.status, 200);
        assert_eq!(deleted.body, json!({
            "success": true, "message": "Session deleted successfully", "session_id": id,
            "timestamp": "2024-01-01T12:00:00.000Z"
        }));
        server.get(&format!("/sessions/{id}")).await.refused(404, "SESSION_NOT_FOUND");
        server.delete(&format!("/sessions/{id}")).await.refused(404, "SESSION_NOT_FOUND");
        server.get(&format!("/sessions/{id}/turns")).await.refused(404, "SESSION_NOT_FOUND");
        server.chat(&id, "anybody?").await.refused(404, "INVALID_SESSION");
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions").await, 1);
        assert_eq!(server.count("SELECT COUNT(*) FROM session_memory").await, 1);
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 1);
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
    }

    async fn inactive_sessions_are_removed_when_their_retention_is_over(server: Server) {
        let ended = server.session(json!({})).await;
        let expired = server.session(json!({"ttl_seconds": 60})).await;
        let active = server.session(json!({})).await;
        let temporary = server.post("/chat", json!({"message": "hi"})).await;
        let temporary = temporary.data()["session_id"].as_str().unwrap();
        server.patch(&format!("/sessions/{ended}"), json!({"is_active": false})).await;

        // The temporary session expires after a day and is kept for seven more.
        server.clock.advance(DAY * 8);
        server.run_jobs(None).await;
        server.get(&format!("/sessions/{temporary}")).await.data();
        server.clock.advance(Duration::from_millis(1));
        server.run_jobs(None).await;
        server.get(&format!("/sessions/{temporary}")).await.refused(404, "SESSION_NOT_FOUND");

        server.run_jobs(Some(DAY * 9)).await;
        server.get(&format!("/sessions/{ended}")).await.data();
        server.run_jobs(Some(DAY * 7)).await;
        for gone in [&ended, &expired] {
            server.get(&format!("/sessions/{gone}")).await.refused(404, "SESSION_NOT_FOUND");
        }
        server.get(&format!("/sessions/{active}")).await.data();
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 0);
    }
}
