//! Searching: what is found, where, and that no text breaks it. How well it is ranked is measured elsewhere.

use std::{collections::BTreeSet, time::Duration};

use atlus::{jobs, store::Kind};
use serde_json::{Value, json};

use crate::{
    chat::abandoned_turn,
    harness::{Answer, Client, Database, Server, on_both},
    models::{Script, Upstream},
};

async fn search(client: &Client, q: &str) -> Answer {
    client.get_with("/search?limit=100", "q", q).await
}

/// The turns of a page of hits.
fn turns(found: &Answer) -> BTreeSet<i64> {
    found.items().iter().map(|hit| hit["turn"].as_i64().unwrap()).collect()
}

/// A session with these turns.
async fn session_of(client: &Client, user: &str, turns: &[(&str, &str)]) -> String {
    let session = client.session(json!({"user_id": user})).await;
    let turns: Vec<_> =
        turns.iter().map(|(message, response)| json!({"message": message, "response": response})).collect();
    client.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
    session
}

on_both! {
    async fn turns_from_before_the_index_get_their_entries(server: Server) {
        let session = server.session(json!({})).await;
        for i in 0..3 {
            server.say(&session, &format!("the zeppelin number {i}")).await;
        }
        // As an earlier release has left them.
        for left in match server.database.kind {
            Kind::Sqlite => &["INSERT INTO search_terms (search_terms) VALUES ('delete-all')", "DELETE FROM search_entries"][..],
            Kind::Postgres => &["DELETE FROM search_entries"],
        } {
            server.run_sql(left).await;
        }
        server.run_sql("UPDATE schema_info SET search_version = 0").await;
        assert!(server.get("/search?q=zeppelins").await.items().is_empty());
        jobs::search::index_old_turns(&server.app).await.unwrap();
        assert_eq!(server.get("/search?q=zeppelins").await.items().len(), 3);
        // Once is enough.
        jobs::search::index_old_turns(&server.app).await.unwrap();
        assert_eq!(server.count("SELECT COUNT(*) FROM search_entries").await, 3);
        assert_eq!(server.count("SELECT search_version FROM schema_info").await, 1);
    }

    async fn a_turn_is_found_by_any_form_of_its_words(server: Server) {
        let session = session_of(&server, "ann", &[("She was running home", "Why?"), ("The weather", "Sunny")]).await;
        for q in ["running", "run", "RUNS", "ran? runs!", "home run", "homes"] {
            let found = search(&server, q).await;
            assert_eq!(turns(&found), BTreeSet::from([1]), "{q}");
        }
        let found = search(&server, "run").await;
        let hit = &found.items()[0];
        assert_eq!(hit, &json!({
            "session_id": session, "turn": 1, "user_id": "ann", "field": "message", "snippet": "She was running home",
            "score": hit["score"], "created_at": "2024-01-01T12:00:00.000Z",
        }));
        assert!(hit["score"].as_f64().unwrap() > 0.0);
        assert_eq!(found.data()["next_cursor"], Value::Null);
        for q in ["runner", "house", "nothing"] {
            assert_eq!(turns(&search(&server, q).await), BTreeSet::new(), "{q}");
        }
    }

    async fn the_part_that_was_found_is_named(server: Server) {
        session_of(&server, "ann", &[("a violin", "is wood"), ("and a cello", "is a big violin")]).await;
        let field = async |q: &str, turn: i64| {
            let found = search(&server, q).await;
            let hit = found.items().iter().find(|hit| hit["turn"] == turn).unwrap().clone();
            (hit["field"].as_str().unwrap().to_owned(), hit["snippet"].as_str().unwrap().to_owned())
        };
        assert_eq!(field("violin", 1).await, ("message".into(), "a violin".into()));
        assert_eq!(field("violin", 2).await, ("response".into(), "is a big violin".into()));
        assert_eq!(field("wood", 1).await, ("response".into(), "is wood".into()));
        assert_eq!(field("cello", 2).await, ("message".into(), "and a cello".into()));
    }

    async fn a_snippet_shows_the_word_in_a_long_text(server: Server) {
        let long = format!("{} the violin {}", "some words ".repeat(500), "more words ".repeat(500));
        session_of(&server, "ann", &[(&long, "ok")]).await;
        let found = search(&server, "violins").await;
        let snippet = found.items()[0]["snippet"].as_str().unwrap();
        assert!(snippet.contains("violin") && snippet.chars().count() < 210, "{snippet}");
    }

    async fn words_stand_in_any_order_and_phrases_as_they_are(server: Server) {
        let said = [("the red car", "."), ("a car, red", "."), ("red", "car"), ("a red old car", "."), ("blue", ".")];
        session_of(&server, "ann", &said).await;
        assert_eq!(turns(&search(&server, "car red").await), BTreeSet::from([1, 2, 3, 4]));
        assert_eq!(turns(&search(&server, "\"red car\"").await), BTreeSet::from([1]));
        assert_eq!(turns(&search(&server, "“Red cars”").await), BTreeSet::from([1]));
        assert_eq!(turns(&search(&server, "\"the red car\"").await), BTreeSet::from([1]));
        assert_eq!(turns(&search(&server, "\"car red\" blue").await), BTreeSet::from([2]));
        assert_eq!(turns(&search(&server, "\"green car\"").await), BTreeSet::new());
        // A mark that is not closed means nothing.
        assert_eq!(turns(&search(&server, "\"red car").await), BTreeSet::from([1, 2, 3, 4]));
    }

    async fn filters_narrow_what_is_found(server: Server) {
        let first = session_of(&server, "ann", &[("violin one", ".")]).await;
        server.clock.advance(Duration::from_secs(10));
        let second = session_of(&server, "ann", &[("violin two", ".")]).await;
        server.clock.advance(Duration::from_secs(10));
        let third = session_of(&server, "bob", &[("violin three", ".")]).await;
        let found = async |filter: &str| -> BTreeSet<String> {
            let found = server.get(&format!("/search?q=violin{filter}")).await;
            found.items().iter().map(|hit| hit["session_id"].as_str().unwrap().to_owned()).collect()
        };
        let these = |sessions: &[&String]| sessions.iter().map(|session| (*session).clone()).collect::<BTreeSet<_>>();
        assert_eq!(found("").await, these(&[&first, &second, &third]));
        assert_eq!(found("&user_id=ann").await, these(&[&first, &second]));
        assert_eq!(found("&user_id=nobody").await, these(&[]));
        assert_eq!(found(&format!("&session_id={second}")).await, these(&[&second]));
        assert_eq!(found(&format!("&session_id={second}&user_id=ann")).await, these(&[&second]));
        assert_eq!(found(&format!("&session_id={second}&user_id=bob")).await, these(&[]));
        assert_eq!(found("&session_id=session_0000000000000000").await, these(&[]));
        // From a moment on, and before another.
        assert_eq!(found("&from=2024-01-01T12:00:10.000Z").await, these(&[&second, &third]));
        assert_eq!(found("&from=2024-01-01T13:00:10.001%2B01:00").await, these(&[&third]));
        assert_eq!(found("&to=2024-01-01T12:00:10.000Z").await, these(&[&first]));
        assert_eq!(found("&from=2024-01-01T12:00:10Z&to=2024-01-01T12:00:20Z&user_id=ann").await, these(&[&second]));
        assert_eq!(found("&from=2024-01-01T12:00:20Z&to=2024-01-01T12:00:10Z").await, these(&[]));
        server.get("/search?q=violin&from=yesterday").await.refuses_field("from");
        server.get("/search?q=violin&to=1704110400").await.refuses_field("to");
        server.get("/search?q=violin&limit=101").await.refuses_field("limit");
        server.get("/search?q=violin&user_id=").await.refuses_field("user_id");
        server.get("/search?q=violin&session_id=x").await.refuses_field("session_id");
    }

    async fn pages_lead_to_the_end_without_repeats(server: Server) {
        let said: Vec<_> = (0..45).map(|i| (format!("violin number {i}"), "and a violin".to_owned())).collect();
        let said: Vec<_> = said.iter().map(|(message, response)| (message.as_str(), response.as_str())).collect();
        session_of(&server, "ann", &said).await;
        let (mut seen, mut scores, mut cursor) = (Vec::new(), Vec::new(), String::new());
        loop {
            let page = server.get(&format!("/search?q=violin&limit=10{cursor}")).await;
            seen.extend(page.items().iter().map(|hit| hit["turn"].as_i64().unwrap()));
            scores.extend(page.items().iter().map(|hit| hit["score"].as_f64().unwrap()));
            match page.data()["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        assert!(scores.windows(2).all(|pair| pair[0] >= pair[1]), "{scores:?}");
        assert_eq!(seen.len(), 45);
        assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), (1..=45).collect());
    }

    async fn a_cursor_of_another_search_is_refused(server: Server) {
        let session = session_of(&server, "ann", &[("violin", "."), ("violin", "."), ("cello", ".")]).await;
        let first = server.get("/search?q=violin&limit=1").await;
        let cursor = first.data()["next_cursor"].as_str().unwrap();
        assert_eq!(server.get(&format!("/search?q=violin&limit=5&cursor={cursor}")).await.items().len(), 1);
        for other in [
            format!("q=cello&cursor={cursor}"),
            format!("q=violin&user_id=ann&cursor={cursor}"),
            format!("q=violin&session_id={session}&cursor={cursor}"),
            format!("q=violin&from=2024-01-01T00:00:00Z&cursor={cursor}"),
            "q=violin&cursor=x".to_owned(),
        ] {
            server.get(&format!("/search?{other}")).await.refused(400, "INVALID_CURSOR");
        }
        let sessions = server.get("/sessions?limit=1").await;
        assert_eq!(sessions.data()["next_cursor"], Value::Null);
        server.get(&format!("/sessions?cursor={cursor}")).await.refused(400, "INVALID_CURSOR");
    }

    async fn only_completed_turns_that_are_there_are_found(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "violin fail" => Script::Raw(400, vec![], String::new()),
            other => Script::Say(format!("You said {other}")),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({"user_id": "ann"})).await;
        server.chat(&session, "violin fail").await.refused(502, "UPSTREAM_ERROR");
        server.say(&session, "violin two").await;
        server.say(&session, "violin three").await;
        let key = abandoned_turn(&server.app.store, &session, Duration::from_secs(60)).await;
        assert_eq!(turns(&search(&server, "violin lost").await), BTreeSet::from([2, 3]));
        server.post(&format!("/sessions/{session}/turns/{}/cancel", key.turn), json!({})).await.data();
        server.delete(&format!("/sessions/{session}/turns/2")).await.data();
        assert_eq!(turns(&search(&server, "violin lost").await), BTreeSet::from([3]));
        // A session that is over is searched all the same; one that is deleted is not.
        server.patch(&format!("/sessions/{session}"), json!({"is_active": false})).await.data();
        assert_eq!(turns(&search(&server, "violin").await), BTreeSet::from([3]));
        server.delete(&format!("/sessions/{session}")).await;
        assert_eq!(turns(&search(&server, "violin").await), BTreeSet::new());
        assert_eq!(server.count("SELECT COUNT(*) FROM search_entries").await, 0);
    }

    async fn no_text_is_a_syntax_error(server: Server) {
        session_of(&server, "ann", &[("The violin's café", "東京タワーへ行きました 🎻"), ("Straße", "O'Brien said: 100%")]).await;
        for q in [
            "violin", "\"violin\"", "\"violin", "violin\"", "\"\"violin\"\"", "'violin'", "violin''", "violin AND", "OR violin",
            "NOT violin", "violin NEAR(x, 2)", "terms:violin", "terms : violin", "^violin", "violin*", "-violin", "+violin",
            "violin + x", "{violin}", "(violin", "violin)", "violin & ! x", "violin | x", "violin <-> x", "violin <2> x",
            "violin:*", "violin:AB", "\\violin", "violin\\", "violin;DROP TABLE turns;--", "%violin%", "_violin_", "$1 violin",
            "violin ?1 :a @b", "violin\n\t\r", "violin\u{1F3BB}", "<b>violin</b>", "violin\u{202E}", "violin \u{FFFF}\u{10FFFF}",
            "violín", "VIOLI\u{301}N", "ｖｉｏｌｉｎ", "what is the violin", "violin's", "violin’s",
        ] {
            let found = search(&server, q).await;
            assert_eq!(found.status, 200, "{q}");
            assert!(turns(&found).contains(&1), "{q}: {found:?}");
        }
        for (q, turn) in [("cafe", 1), ("CAFÉ", 1), ("京タ", 1), ("東京", 1), ("タワー", 1), ("行きました", 1), ("straße", 2), ("obrien", 2), ("100", 2)] {
            assert_eq!(turns(&search(&server, q).await), BTreeSet::from([turn]), "{q}");
        }
        for q in ["the", "what is it", "\"", "\"\"", "'", "🎻", " ", "*", "&|!()", "…", "AND", "京大"] {
            let found = search(&server, q).await;
            assert_eq!((found.items().len(), &found.data()["next_cursor"]), (0, &Value::Null), "{q}");
        }
        search(&server, &format!("violin {}", "x".repeat(993))).await.data();
        assert!(turns(&search(&server, &"violin ".repeat(143)[..1000]).await).contains(&1));
        assert_eq!(search(&server, &"ü".repeat(1000)).await.items().len(), 0);
        for q in ["", "\u{0}", "violin\u{0}", &"ü".repeat(1001)] {
            search(&server, q).await.refuses_field("q");
        }
        server.get("/search").await.refuses_field("q");
    }

    async fn any_unicode_can_be_looked_for(server: Server) {
        session_of(&server, "ann", &[("The violin", "is wood")]).await;
        // The same every time: numbers by Knuth's generator.
        let mut state: u64 = 42;
        let mut random = |below: u32| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            u32::try_from(state >> 33).unwrap() % below
        };
        for _ in 0..300 {
            let length = 1 + random(40);
            let q: String = (0..length).filter_map(|_| {
                let range = [128, 0x250, 0x3100, 0x1_0000, 0x11_0000][usize::try_from(random(5)).unwrap()];
                char::from_u32(random(range)).filter(|c| *c != '\0')
            }).collect();
            let found = search(&server, &q).await;
            assert!(found.status == 200 || q.is_empty(), "{q:?}: {found:?}");
        }
    }

    async fn a_megabyte_of_text_is_found(database: Database) {
        let upstream = Upstream::start(|_| {
            let filler = "several words of no import ".repeat(38_000);
            Script::Say(format!("Aardvark {filler} and a zebra"))
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let said = server.say(&session, "Tell me everything").await;
        assert!(said.len() > 1_000_000, "{}", said.len());
        for q in ["aardvark", "zebras", "everything"] {
            let found = search(&server, q).await;
            assert_eq!(turns(&found), BTreeSet::from([1]), "{q}");
            assert!(found.items()[0]["snippet"].as_str().unwrap().chars().count() < 210);
        }
        server.delete(&format!("/sessions/{session}/turns/1")).await.data();
        assert_eq!(turns(&search(&server, "zebra").await), BTreeSet::new());
    }
}
