//! What the model is shown.

use std::time::Duration;

use atlus::store::Kind;
use serde_json::{Value, json};

use crate::{
    harness::{Database, Server, on_both},
    models::{Script, Upstream},
};

fn echo(message: &str) -> Script {
    Script::Say(format!("You said: {message}"))
}

/// Runs a statement that no caller can.
async fn run(server: &Server, sql: &'static str) {
    let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
    tx.sql(sql).run().await.unwrap();
    tx.commit().await.unwrap();
}

on_both! {
    async fn the_system_message_holds_prompt_style_facts_and_task(database: Database) {
        let upstream = Upstream::start(echo).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({"user_id": "ann", "system_prompt": "You are a pirate."})).await;
        run(&server, "UPDATE session_memory SET verbosity = 'low', tone = 'casual', working_memory = '{\"step\":2}', \
                      summary = 'They met.', summary_through = 0").await;
        // Of several statements of one fact the newest counts; another user's and another tenant's do not.
        run(&server, "INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) VALUES \
                      (1, 'ann', 'name', 1, 1, 10, '\"Anna\"'), (1, 'ann', 'name', 2, 1, 20, '\"Ann\"'), \
                      (1, 'ann', 'age', 1, 2, 15, '41'), (1, 'bob', 'name', 1, 1, 30, '\"Bob\"'), \
                      (2, 'ann', 'name', 1, 1, 40, '\"Other\"')").await;
        server.say(&session, "Ahoy").await;
        assert_eq!(upstream.prompts(), [[
            json!({"role": "system", "content": "You are a pirate.\n\nAnswer briefly. Keep a casual tone.\n\n\
                   What is known about the user:\n- age: 41\n- name: Ann\n\n\
                   State of the present task:\n{\"step\":2}\n\nEarlier in this conversation:\nThey met."}),
            json!({"role": "user", "content": "Ahoy"}),
        ]]);
    }

    async fn the_built_in_responder_reads_the_same_context(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        run(&server, "INSERT INTO facts (tenant_id, user_id, key, updated_at, value) VALUES (1, 'ann', 'name', 1, '\"Ann\"')").await;
        assert!(server.say(&session, "What's my name?").await.contains("Your name is Ann"));
    }

    async fn only_as_much_is_shown_as_the_budget_holds(database: Database) {
        let upstream = Upstream::start(echo).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            config.chat.context_tokens = 300;
            config.chat.system_prompt = "Be helpful.".into();
        })
        .await;
        let session = server.session(json!({})).await;
        for i in 0..12 {
            server.say(&session, &format!("{i} {}", "word ".repeat(16))).await;
        }
        let prompts = upstream.prompts();
        let cost = |prompt: &[Value]| -> usize {
            prompt.iter().map(|message| message["content"].as_str().unwrap().len().div_ceil(4) + 4).sum()
        };
        assert!(prompts.iter().all(|prompt| cost(prompt) <= 300));
        let last = prompts.last().unwrap();
        // Another turn would not have fitted.
        assert!(cost(last) > 300 - 60, "{}", cost(last));
        // Those shown are the newest, up to this one.
        let oldest = 12 - last.len() / 2;
        assert!(last[1]["content"].as_str().unwrap().starts_with(&format!("{oldest} ")), "{last:?}");
        assert_eq!(last.last().unwrap()["content"].as_str().unwrap().split(' ').next(), Some("11"));
    }

    async fn text_comes_back_as_it_went_in(database: Database) {
        let upstream = Upstream::start(|message| Script::Say(message.to_owned())).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let texts = ["\u{1}\u{7f}\u{85}\u{a0}x", "'\"\\;--\n\r\n\t$1 {}", "a\u{301}\u{1F468}\u{200D}\u{1F469}", "\u{10FFFF}\u{FFFE}\u{2028}"];
        for text in texts {
            let text = format!("<{text}>");
            assert_eq!(server.say(&session, &text).await, text);
        }
        let page = server.get(&format!("/sessions/{session}/turns")).await;
        for (turn, text) in page.items().iter().zip(texts) {
            assert_eq!(turn["message"], format!("<{text}>"));
            assert_eq!(turn["response"], turn["message"]);
        }
        server.clock.advance(Duration::from_millis(1));
        server.say(&session, "end").await;
        let shown = upstream.prompts().pop().unwrap();
        assert_eq!(shown[1]["content"], format!("<{}>", texts[0]));
        assert_eq!(shown[8]["content"], format!("<{}>", texts[3]));
    }

    async fn a_context_is_shown_as_the_model_would_get_it(database: Database) {
        let upstream = Upstream::start(echo).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({"user_id": "ann", "system_prompt": "You are a pirate."})).await;
        server.patch("/users/ann/memory", json!({"facts": {"name": "Ann"}})).await.data();
        let memory = json!({"working_memory": {"step": 2}, "behavior_profile": {"verbosity": "low"}});
        server.patch(&format!("/sessions/{session}/memory"), memory).await.data();
        server.say(&session, "Ahoy").await;
        let shown = server.get_with(&format!("/sessions/{session}/context"), "message", "  What now? ").await;
        server.say(&session, "What now?").await;
        assert_eq!(shown.data()["messages"], json!(upstream.prompts().pop().unwrap()));
        let one = json!({"system_prompt": 1, "style": 1, "facts": 1, "working_memory": 1, "summary": 0,
                         "recalled_turns": 0, "recent_turns": 1, "message": 1});
        assert_eq!(shown.data()["included"], one);
        assert!(shown.data()["dropped"].as_object().unwrap().values().all(|count| count == 0));
        assert_eq!(shown.data()["max_tokens"], 8000);
    }

    async fn a_context_never_exceeds_its_budget_and_says_what_it_drops(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        let turn = |i: usize| json!({"message": format!("Message {i} ähnlich 日本 {}", "words ".repeat(i % 7)), "response": "Yes, quite so."});
        server.post(&format!("/sessions/{session}/turns"), json!({"turns": (0..60).map(turn).collect::<Vec<_>>()})).await.data();
        server.patch("/users/ann/memory", json!({"facts": {"name": "Ann", "city": "a".repeat(400)}})).await.data();
        for budget in (7..1200).step_by(23) {
            let path = format!("/sessions/{session}/context?max_tokens={budget}&message=Message%2012");
            let shown = server.get(&path).await;
            let data = shown.data();
            let cost = |message: &Value| -> usize {
                let text = message["content"].as_str().unwrap();
                text.bytes().filter(u8::is_ascii).count().div_ceil(4) + text.chars().filter(|c| !c.is_ascii()).count() + 4
            };
            let counted: usize = data["messages"].as_array().unwrap().iter().map(cost).sum();
            assert_eq!(data["token_count"], counted);
            assert!(counted <= budget, "{counted} of {budget}");
            let turns = |parts: &Value| parts["recent_turns"].as_i64().unwrap() + parts["recalled_turns"].as_i64().unwrap();
            let shown_turns = turns(&data["included"]);
            assert_eq!(shown_turns + data["dropped"]["recent_turns"].as_i64().unwrap(), 60, "{data:#}");
            assert_eq!(data["included"]["facts"].as_i64().unwrap() + data["dropped"]["facts"].as_i64().unwrap(), 2);
        }
        let small = server.get(&format!("/sessions/{session}/context?max_tokens=6&message=Message%2012")).await;
        assert_eq!(small.refused(400, "VALIDATION_ERROR"), "max_tokens: must be at least 7 for this message alone");
        for bad in ["max_tokens=0", "max_tokens=x", "max_tokens=99999999999"] {
            server.get(&format!("/sessions/{session}/context?{bad}")).await.refused(400, "VALIDATION_ERROR");
        }
        server.get("/sessions/session_0000000000000000/context").await.refused(404, "SESSION_NOT_FOUND");
        server.patch(&format!("/sessions/{session}"), json!({"is_active": false})).await.data();
        let ended = server.get(&format!("/sessions/{session}/context")).await;
        assert_eq!(ended.data()["included"]["message"], 0);
    }

    async fn what_bears_on_the_message_is_brought_back_from_long_ago(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "My name is Zebulon").await;
        let turn = |i| json!({"message": format!("Let us talk about topic number {i} at some length"), "response": "Yes. ".repeat(20)});
        for from in [0, 100, 200, 300] {
            let turns: Vec<_> = (from..from + 100).map(turn).collect();
            server.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
        }
        let shown = server.get_with(&format!("/sessions/{session}/context"), "message", "What's my name?").await;
        assert_eq!(shown.data()["messages"][1]["content"], "My name is Zebulon");
        assert_eq!(shown.data()["included"]["recalled_turns"], 2);
        assert!(shown.data()["dropped"]["recent_turns"].as_i64().unwrap() > 100);
        // Nothing long-term is known about the shared user: the answer comes from the turn.
        assert!(server.say(&session, "What's my name?").await.contains("Your name is Zebulon"));
        server.delete(&format!("/sessions/{session}/turns/1")).await.data();
        let shown = server.get_with(&format!("/sessions/{session}/context"), "message", "What's my name?").await;
        assert!(!shown.body.to_string().contains("My name is Zebulon"));
    }

    async fn what_was_said_once_is_found_among_thousands_of_turns(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "The gardener is called Zebulon").await;
        server.say(&session, "Another word about the garden, as long as many words are if they go on and on").await;
        let many = [
            "INSERT INTO turns (session_id, tenant_id, turn, status, message_tokens, response_tokens, created_at, request_id, metadata, \
                 message, response) WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 26000) \
             SELECT session_id, tenant_id, turn + i, status, message_tokens, response_tokens, created_at, request_id, metadata, \
                 message, response FROM turns, n WHERE turn = 2",
            "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) \
             WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 26000) \
             SELECT session_id, tenant_id, turn + i, created_at, terms FROM search_entries, n WHERE turn = 2",
            "UPDATE sessions SET last_turn = 26002, completed_turns = 26002",
        ];
        let index = "INSERT INTO search_terms (rowid, terms) SELECT place, terms FROM search_places WHERE turn > 2";
        for statement in many.into_iter().chain((server.database.kind == Kind::Sqlite).then_some(index)) {
            server.run_sql(statement).await;
        }
        // Most of these words stand in every turn but the first, and tell nothing.
        let question = "One more word about the garden: what is the gardener called?";
        for _ in 0..2 {
            let shown = server.get_with(&format!("/sessions/{session}/context"), "message", question).await;
            assert_eq!(shown.data()["messages"][1]["content"], "The gardener is called Zebulon");
            assert_eq!(shown.data()["included"]["recalled_turns"], 2);
        }
        let shown = server.get_with(&format!("/sessions/{session}/context"), "message", "Another word about the garden").await;
        assert_eq!(shown.data()["included"]["recalled_turns"], 0);
    }
}
