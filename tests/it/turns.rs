//! Reading turns.

use serde_json::json;

use crate::{
    harness::{Database, Server, on_both},
    models::{Script, Upstream},
};

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
}
