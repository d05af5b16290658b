//! What is learnt from conversations: by rules, by a model, and in summaries.

use std::sync::Arc;

use atlus::{
    chat::Extract,
    domain::{caller::Caller, ids::SessionId, memory::Fact, session::UserId},
    store::{Summary, TurnKey},
};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::{
    harness::{Database, Server, on_both},
    models::{Script, Upstream},
};

/// A model that also finds facts and summarises.
fn script(message: &str) -> Script {
    if message.starts_with("The user's message:") {
        return Script::Say(match message.contains("Ann") {
            true => "Here you are: {\"name\": \"Ann\", \"pets\": [1], \"age\": 41}".to_owned(),
            false => "{}".to_owned(),
        });
    }
    if message.starts_with("Summary so far:") {
        return Script::Say(format!("They spoke of {} things.", message.matches("User: ").count()));
    }
    Script::Say(format!("You said: {message}"))
}

/// Asks until the answer is as it should be.
async fn until(server: &Server, path: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let asked = async {
        loop {
            let answer = server.get(path).await;
            if wanted(answer.data()) {
                return answer.data().clone();
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(30), asked).await.unwrap()
}

async fn many_turns(server: &Server, session: &str, count: usize) {
    let turn = |i| json!({"message": format!("We plan stage {i} of the journey to Lisbon"), "response": "Well. ".repeat(10)});
    let turns: Vec<_> = (0..count).map(turn).collect();
    server.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
}

on_both! {
    async fn rules_learn_with_the_turn_from_what_is_plainly_said(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        for message in ["Hi, my name is Ann", "I don't like java", "he said my name is Bob", "I like green tea",
                        "short circuit in my quick sort", "Please be brief"] {
            server.say(&session, message).await;
        }
        let known = server.get("/users/ann/memory").await;
        let facts = known.data()["facts"].as_object().unwrap();
        let brief: Vec<_> = facts.iter().map(|(key, fact)| (key.as_str(), &fact["value"], &fact["turn"])).collect();
        assert_eq!(brief, [
            ("name", &json!("Ann"), &json!(1)),
            ("preference:green tea", &json!("likes green tea"), &json!(4)),
            ("preference:java", &json!("does not like java"), &json!(2)),
        ]);
        assert_eq!(facts["name"]["session_id"], session.as_str());
        let memory = server.get(&format!("/sessions/{session}/memory")).await;
        assert_eq!(memory.data()["behavior_profile"], json!({"verbosity": "low", "tone": "neutral", "depth": "normal"}));
        assert_eq!(memory.data()["profile_turns"], json!({"verbosity": 6, "tone": null, "depth": null}));
        // Another session of the same user knows it, too.
        let other = server.session(json!({"user_id": "ann"})).await;
        assert!(server.say(&other, "What's my name?").await.contains("Your name is Ann"));
    }

    async fn a_model_learns_after_the_turn(database: Database) {
        let upstream = Upstream::start(script).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| config.chat.extract = Extract::Model).await;
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "They call me Ann, and I am 41").await;
        let known = until(&server, "/users/ann/memory", |data| data["facts"]["name"].is_object()).await;
        assert_eq!(known["facts"]["age"]["value"], 41);
        assert_eq!((&known["facts"]["name"]["session_id"], &known["facts"]["name"]["turn"]), (&json!(session), &json!(1)));
        assert!(known["facts"].get("pets").is_none());
    }

    async fn what_a_model_finds_late_is_refused(database: Database) {
        let server = Server::with(database, |_| {}).await;
        let store = &server.app.store;
        let (ann, fact) = (UserId::try_from("ann".to_owned()).unwrap(), Fact::new("name".into(), "Ann".into()).unwrap());
        let key = |session: &str, turn| TurnKey {
            tenant: Caller::ANYONE.tenant, session: SessionId::parse(session).unwrap(), turn, lease_token: 0,
        };
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "one").await;
        server.say(&session, "two").await;
        server.delete(&format!("/sessions/{session}/turns/1")).await.data();
        assert!(!store.keep_facts(key(&session, 1), &ann, vec![fact.clone()]).await.unwrap());
        assert!(store.keep_facts(key(&session, 2), &ann, vec![fact.clone()]).await.unwrap());
        server.delete("/users/ann").await.data();
        assert!(!store.keep_facts(key(&session, 2), &ann, vec![fact]).await.unwrap());
        assert_eq!(server.get("/users/ann/memory").await.data()["facts"], json!({}));
    }

    async fn nothing_but_answers_is_asked_of_a_model_where_learning_is_off(database: Database) {
        let upstream = Upstream::start(script).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            (config.chat.extract, config.chat.context_tokens) = (Extract::Off, 256);
        }).await;
        let session = server.session(json!({"user_id": "ann"})).await;
        many_turns(&server, &session, 60).await;
        server.say(&session, "My name is Ann. Please be brief.").await;
        until(&server, &format!("/sessions/{session}/memory"), |data| data["session_memory"]["summary"].is_string()).await;
        assert_eq!(upstream.asked().len(), 1);
        assert_eq!(server.get("/users/ann/memory").await.data()["facts"], json!({}));
        let memory = server.get(&format!("/sessions/{session}/memory")).await;
        assert_eq!(memory.data()["behavior_profile"]["verbosity"], "medium");
    }

    async fn what_no_longer_fits_is_summarised_by_the_model(database: Database) {
        let upstream = Upstream::start(script).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            (config.chat.extract, config.chat.context_tokens) = (Extract::Model, 256);
        }).await;
        let session = server.session(json!({})).await;
        many_turns(&server, &session, 40).await;
        server.say(&session, "And now?").await;
        let path = format!("/sessions/{session}/memory");
        let memory = until(&server, &path, |data| data["session_memory"]["summary"].is_string()).await;
        assert!(memory["session_memory"]["summary"].as_str().unwrap().starts_with("They spoke of"), "{memory}");
        let through = memory["session_memory"]["summary_through"].as_i64().unwrap();
        assert!(through < 40, "{through}");
        assert_eq!(memory["session_memory"]["conversation_turns"], 41);
        server.say(&session, "And then?").await;
        assert!(upstream.prompts().iter().any(|prompt| {
            prompt[0]["content"].as_str().unwrap().contains("Earlier in this conversation:\nThey spoke of")
        }));
        // The turns are all there.
        assert_eq!(server.get(&format!("/sessions/{session}/turns?limit=100")).await.items().len(), 42);
    }

    async fn a_chat_does_not_wait_for_its_summary(database: Database) {
        let gate = Arc::new(Semaphore::new(1));
        let upstream = Upstream::gated(script, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            (config.chat.extract, config.chat.context_tokens) = (Extract::Model, 256);
        }).await;
        let session = server.session(json!({})).await;
        many_turns(&server, &session, 40).await;
        // The gate lets one answer through: the chat's. The summary waits.
        assert_eq!(server.say(&session, "And now?").await, "You said: And now?");
        assert!(server.get(&format!("/sessions/{session}/memory")).await.data()["session_memory"]["summary"].is_null());
        gate.add_permits(100);
        until(&server, &format!("/sessions/{session}/memory"), |data| data["session_memory"]["summary"].is_string()).await;
    }

    async fn a_summary_is_extracted_where_there_is_no_model_and_follows_its_turns(database: Database) {
        let server = Server::with(database, |config| config.chat.context_tokens = 256).await;
        let session = server.session(json!({})).await;
        let first = json!({"message": "Our safe in the cellar opens by the words quetzalcoatl nineteen maple", "response": "Noted."});
        server.post(&format!("/sessions/{session}/turns"), json!({"turns": [first]})).await.data();
        many_turns(&server, &session, 40).await;
        server.say(&session, "And now?").await;
        let path = format!("/sessions/{session}/memory");
        let memory = until(&server, &path, |data| data["session_memory"]["summary"].is_string()).await;
        assert!(memory["session_memory"]["summary"].as_str().unwrap().contains("quetzalcoatl"), "{memory}");
        server.delete(&format!("/sessions/{session}/turns/1")).await.data();
        assert!(server.get(&path).await.data()["session_memory"]["summary"].is_null());
        server.say(&session, "And then?").await;
        let memory = until(&server, &path, |data| data["session_memory"]["summary"].is_string()).await;
        assert!(!memory.to_string().contains("quetzalcoatl"), "{memory}");
    }

    async fn a_summary_made_of_what_was_taken_away_meanwhile_is_not_kept(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "one").await;
        server.say(&session, "two").await;
        let id = SessionId::parse(&session).unwrap();
        let summary = Summary { text: "one, two".into(), tokens: 3, through: 2, takings: 0, was_through: None };
        server.delete(&format!("/sessions/{session}/turns/1")).await.data();
        assert!(!server.app.store.keep_summary(Caller::ANYONE.tenant, id, summary.clone()).await.unwrap());
        assert!(server.app.store.keep_summary(Caller::ANYONE.tenant, id, Summary { takings: 1, ..summary.clone() }).await.unwrap());
        // Nor one that another has overtaken.
        assert!(!server.app.store.keep_summary(Caller::ANYONE.tenant, id, Summary { takings: 1, ..summary }).await.unwrap());
    }
}
