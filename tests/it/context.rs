//! What the model is shown.

use std::time::Duration;

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
    let mut tx = server.app.store.database().begin().await.unwrap();
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
}
