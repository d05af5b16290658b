//! Erasing: what was said, and what came of it, is gone from wherever it stood.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use atlus::{
    chat::Extract,
    domain::{caller::Caller, ids::SessionId},
    store::Summary,
};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinHandle};

use crate::{
    harness::{Answer, Client, Database, Server, on_both},
    models::{Script, Upstream},
};

/// Words that stand nowhere else, by where they were put.
#[derive(Default)]
struct Canaries(BTreeMap<String, String>);

impl Canaries {
    /// A new word: a plain one, which is its own stem.
    fn put(&mut self, place: &str) -> String {
        let letters = uuid::Uuid::new_v4().simple().to_string();
        let letter = |c: char| char::from_digit(c.to_digit(16).unwrap() + 10, 26).unwrap();
        let letters: String = letters.chars().map(letter).collect();
        let word = format!("Q{letters}q");
        assert!(self.0.insert(place.to_owned(), word.clone()).is_none());
        word
    }

    /// The places whose word stands in `text`. An index that shares the beginnings of words may keep only their ends.
    fn found(&self, text: &[u8]) -> Vec<&str> {
        let text = text.to_ascii_lowercase();
        let stands = |word: &str| {
            let end = word[5..].to_ascii_lowercase();
            text.windows(end.len()).any(|window| window == end.as_bytes())
        };
        self.0.iter().filter(|(_, word)| stands(word)).map(|(place, _)| place.as_str()).collect()
    }

    /// Fails unless each stands somewhere.
    async fn are_all_in(&self, database: &Database) {
        let found = self.found(database.contents().await.as_bytes()).len();
        assert_eq!(found, self.0.len(), "{:?}", self.found(database.contents().await.as_bytes()));
        if let Some(bytes) = database.files().await {
            assert_eq!(self.found(&bytes).len(), self.0.len());
        }
    }

    /// Fails if one of them stands in a table, or in a file.
    async fn are_gone_from(&self, database: &Database) {
        let contents = database.contents().await;
        let found = self.found(contents.as_bytes());
        let lines = contents.lines().filter(|line| !self.found(line.as_bytes()).is_empty()).take(5);
        assert!(found.is_empty(), "{found:?} in {:#?}", lines.collect::<Vec<_>>());
        if let Some(bytes) = database.files().await {
            assert_eq!(self.found(&bytes), [""; 0], "in the database's files");
        }
    }
}

/// A server whose model repeats the message, and whose rules learn from it.
async fn server_with(database: Database) -> (Server, Upstream) {
    let upstream = Upstream::start(|message| Script::Say(format!("You said: {message}"))).await;
    let server = Server::with_model(database.kind, &upstream.url, |config| {
        config.chat.extract = Extract::Rules;
    })
    .await;
    (server, upstream)
}

fn id_of(answer: &Answer) -> String {
    answer.data()["session_id"].as_str().unwrap().to_owned()
}

/// Gives a user something of every kind, each with a canary; the sessions.
async fn settle(server: &Server, user: &str, canaries: &mut Canaries) -> Vec<String> {
    let mut put = |place: &str| canaries.put(place);
    let body = json!({
        "user_id": user, "title": put("title"), "metadata": {"k": put("metadata")}, "system_prompt": put("prompt"),
    });
    let made = id_of(&server.post_once("/sessions", &format!("{user} session"), &body).await);
    let body = json!({
        "session_id": made, "message": format!("{} went for a walk", put("message")), "metadata": {"k": put("turn metadata")},
    });
    server.post_once("/chat", &format!("{user} chat"), &body).await.data();
    server.say(&made, &format!("My name is {}", put("learnt fact"))).await;
    let body = json!({"turns": [
        {"message": put("appended message"), "response": put("appended response"), "model": put("model")},
        {"message": "and", "response": "so", "metadata": {put("appended metadata"): 1}},
    ]});
    server.post_once(&format!("/sessions/{made}/turns"), &format!("{user} append"), &body).await.data();
    let body = json!({"user_id": user, "message": put("temporary message")});
    let temporary = id_of(&server.post_once("/chat", &format!("{user} temporary"), &body).await);
    let body = json!({"working_memory": {"task": put("working memory")}});
    server.patch(&format!("/sessions/{made}/memory"), body).await.data();
    let body = json!({"facts": {put("fact's name"): 1, "motto": put("fact")}});
    server.patch(&format!("/users/{user}/memory"), body).await.data();
    keep_summary(server, &made, &put("summary"), 2).await;
    let body = json!({"title": put("fork's title"), "metadata": {"k": put("fork's metadata")}});
    let fork = server.post_once(&format!("/sessions/{made}/fork"), &format!("{user} fork"), &body).await;
    vec![id_of(&fork), made, temporary]
}

async fn keep_summary(server: &Server, session: &str, text: &str, through: i64) {
    let session = SessionId::parse(session).unwrap();
    let summary = Summary { text: text.to_owned(), tokens: 4, through, takings: 0, was_through: None };
    assert!(server.app.store.keep_summary(Caller::ANYONE.tenant, session, summary).await.unwrap());
}

/// Everything that can be seen of a session.
async fn all_of(server: &Client, session: &str) -> Vec<Value> {
    let mut all = Vec::new();
    for path in ["", "/turns?limit=100", "/memory", "/context"] {
        all.push(server.read(&format!("/sessions/{session}{path}")).await);
    }
    all
}

/// Does something again and again until it is told to stop.
struct Traffic {
    rounds: Vec<Arc<AtomicUsize>>,
    tasks: Vec<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Traffic {
    fn new() -> Self {
        Self { rounds: Vec::new(), tasks: Vec::new(), stop: Arc::default() }
    }

    fn start<F: Future<Output = Answer> + Send>(&mut self, act: impl Fn(usize) -> F + Send + 'static) {
        let (rounds, stop) = (Arc::new(AtomicUsize::new(0)), self.stop.clone());
        self.rounds.push(rounds.clone());
        self.tasks.push(tokio::spawn(async move {
            while !stop.load(Ordering::SeqCst) {
                let answer = act(rounds.load(Ordering::SeqCst)).await;
                assert!([200, 201, 404, 409].contains(&answer.status), "{answer:?}");
                rounds.fetch_add(1, Ordering::SeqCst);
            }
        }));
    }

    /// Waits until each has been done so many times more.
    async fn goes_on(&self, times: usize) {
        let goal: Vec<_> = self.rounds.iter().map(|rounds| rounds.load(Ordering::SeqCst) + times).collect();
        for ((rounds, goal), task) in self.rounds.iter().zip(goal).zip(&self.tasks) {
            while rounds.load(Ordering::SeqCst) < goal && !task.is_finished() {
                tokio::task::yield_now().await;
            }
        }
    }

    async fn stop(self) {
        self.stop.store(true, Ordering::SeqCst);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

on_both! {
    async fn nothing_of_an_erased_user_is_left_anywhere_though_traffic_goes_on(database: Database) {
        let (server, _upstream) = server_with(database).await;
        let (mut canaries, mut kept) = (Canaries::default(), Canaries::default());
        let ann = canaries.put("user").to_lowercase();
        let sessions = settle(&server, &ann, &mut canaries).await;
        let bobs = settle(&server, "bob", &mut kept).await;
        canaries.are_all_in(&server.database).await;
        let mut before = vec![server.read("/users/bob").await, server.read("/users/bob/memory").await];
        for session in &bobs {
            before.extend(all_of(&server, session).await);
        }

        let mut traffic = Traffic::new();
        for session in sessions.clone() {
            let client = server.client.clone();
            let (chats, appends, forks) = (session.clone(), session.clone(), session);
            traffic.start({
                let client = client.clone();
                move |_| { let (client, session) = (client.clone(), chats.clone());
                    async move { client.chat(&session, "How is the weather?").await } }
            });
            traffic.start({
                let client = client.clone();
                move |_| { let (client, path) = (client.clone(), format!("/sessions/{appends}/turns"));
                    async move { client.post(&path, json!({"turns": [{"message": "sun", "response": "rain"}]})).await } }
            });
            traffic.start(move |i| { let (client, path) = (client.clone(), format!("/sessions/{forks}/fork"));
                let key = format!("{forks} {i}");
                async move { client.post_once(&path, &key, &json!({"title": "fork"})).await } });
        }
        let client = server.client.clone();
        traffic.start(move |_| { let client = client.clone();
            async move { client.post("/sessions", json!({"user_id": "carol"})).await } });
        traffic.goes_on(2).await;
        let erased = server.delete(&format!("/users/{ann}")).await;
        assert_eq!(erased.status, 200, "{erased:?}");
        traffic.goes_on(2).await;
        traffic.stop().await;

        canaries.are_gone_from(&server.database).await;
        assert_eq!(server.count("SELECT COUNT(*) FROM sessions WHERE user_id NOT IN ('bob', 'carol')").await, 0);
        let orphans = "SELECT COUNT(*) FROM turns t WHERE NOT EXISTS (SELECT 1 FROM sessions s WHERE s.session_id = t.session_id)";
        assert_eq!(server.count(orphans).await, 0);
        assert_eq!(server.count("SELECT COUNT(*) FROM erasures").await, 0);
        for session in sessions {
            server.get(&format!("/sessions/{session}")).await.refused(404, "SESSION_NOT_FOUND");
        }
        let mut after = vec![server.read("/users/bob").await, server.read("/users/bob/memory").await];
        for session in &bobs {
            after.extend(all_of(&server, session).await);
        }
        assert_eq!(after, before);
        kept.are_all_in(&server.database).await;
    }

    async fn the_receipt_says_what_was_removed(server: Server) {
        let first = id_of(&server.post_once("/sessions", "a", &json!({"user_id": "ann"})).await);
        server.post_once("/chat", "b", &json!({"session_id": first, "message": "My name is Ann"})).await.data();
        server.say(&first, "My name is Anna").await;
        server.post(&format!("/sessions/{first}/fork"), json!({"turn": 1})).await.data();
        server.patch("/users/ann/memory", json!({"facts": {"motto": "on"}})).await.data();
        server.session(json!({"user_id": "bob"})).await;
        let erased = server.delete("/users/ann").await;
        assert_eq!(erased.data(), &json!({"user_id": "ann", "removed": {
            "sessions": 2, "turns": 3, "facts": 4, "search_entries": 3, "remembered_answers": 2, "keys": 0,
        }}));
    }

    async fn a_user_of_whom_there_is_nothing_is_unknown(server: Server) {
        server.session(json!({"user_id": "bob"})).await;
        let unknown = server.delete("/users/ann").await;
        assert_eq!(unknown.refused(404, "USER_NOT_FOUND"), "User ann not found");
        server.session(json!({"user_id": "ann"})).await;
        server.delete("/users/ann").await.data();
        server.delete("/users/ann").await.refused(404, "USER_NOT_FOUND");
        server.get("/users/ann").await.refused(404, "USER_NOT_FOUND");
        // Facts alone are something, too.
        server.patch("/users/ann/memory", json!({"facts": {"a": 1}})).await.data();
        assert_eq!(server.delete("/users/ann").await.data()["removed"]["facts"], 1);
    }

    async fn an_erased_user_may_start_anew(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann").await;
        server.delete("/users/ann").await.data();
        server.get("/sessions/continue?user_id=ann").await.refused(404, "NO_SESSION_FOUND");
        let session = server.session(json!({"user_id": "ann"})).await;
        assert!(!server.say(&session, "What's my name?").await.contains("Ann"));
        server.say(&session, "My name is Zoe").await;
        assert_eq!(server.read("/users/ann/memory").await["facts"]["name"]["value"], "Zoe");
        assert_eq!(server.read("/users/ann").await["sessions"], 1);
    }

    async fn a_chat_that_runs_while_its_user_is_erased_is_refused_and_leaves_nothing(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|message| Script::Say(message.to_owned()), gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            config.chat.extract = Extract::Rules;
        })
        .await;
        let mut canaries = Canaries::default();
        let session = server.session(json!({"user_id": "ann"})).await;
        let chat = |body: Value| {
            let client = server.client.clone();
            tokio::spawn(async move { client.post_once("/chat", &body["message"].to_string(), &body).await })
        };
        let first = format!("My name is {}", canaries.put("message"));
        let running = chat(json!({"session_id": session, "message": first}));
        upstream.asked_times(1).await;
        let waiting = chat(json!({"session_id": session, "message": "I wait"}));
        let temporary = chat(json!({"user_id": "ann", "message": canaries.put("temporary message")}));
        upstream.asked_times(2).await;
        let removed = server.delete("/users/ann").await.data()["removed"].clone();
        assert_eq!((&removed["sessions"], &removed["turns"]), (&json!(2), &json!(2)));
        for chat in [running, waiting, temporary] {
            chat.await.unwrap().refused(404, "INVALID_SESSION");
        }
        gate.add_permits(10);
        canaries.are_gone_from(&server.database).await;
        for table in [
            "SELECT COUNT(*) FROM sessions", "SELECT COUNT(*) FROM turns", "SELECT COUNT(*) FROM facts",
            "SELECT COUNT(*) FROM search_entries", "SELECT COUNT(*) FROM idempotency_records",
        ] {
            assert_eq!(server.count(table).await, 0, "{table}");
        }
    }

    async fn a_fork_that_is_made_meanwhile_brings_nothing_back(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        let turns: Vec<_> = (0..100).map(|i| json!({"message": format!("m{i}"), "response": "r"})).collect();
        for _ in 0..6 {
            server.post(&format!("/sessions/{session}/turns"), json!({"turns": turns})).await.data();
        }
        let forks: Vec<_> = (0..3).map(|_| {
            let (client, path) = (server.client.clone(), format!("/sessions/{session}/fork"));
            tokio::spawn(async move { client.post(&path, json!({})).await })
        }).collect();
        // As soon as a page of one has been copied.
        while server.count("SELECT COUNT(*) FROM turns").await == 600 {
            tokio::task::yield_now().await;
        }
        server.delete("/users/ann").await.data();
        // What had been copied by then went with what it was copied from.
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 0);
        for fork in forks {
            let fork = fork.await.unwrap();
            match fork.status {
                201 => server.get(&format!("/sessions/{}", id_of(&fork))).await.refused(404, "SESSION_NOT_FOUND").to_owned(),
                _ => fork.refused(404, "SESSION_NOT_FOUND").to_owned(),
            };
        }
        for table in [
            "SELECT COUNT(*) FROM sessions", "SELECT COUNT(*) FROM turns", "SELECT COUNT(*) FROM search_entries",
            "SELECT COUNT(*) FROM session_memory", "SELECT COUNT(*) FROM erasures",
        ] {
            assert_eq!(server.count(table).await, 0, "{table}");
        }
    }

    async fn the_same_user_of_another_tenant_is_somebody_else(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "My name is Ann").await;
        server.run_sql("INSERT INTO tenants (tenant_id, name, created_at) VALUES (2, 'other', 0)").await;
        // The very same session, as the other tenant's.
        for copy in [
            "INSERT INTO sessions (session_id, tenant_id, created_at, last_activity, temporary, user_id, metadata) \
             SELECT session_id, 2, created_at, last_activity, temporary, user_id, metadata FROM sessions",
            "INSERT INTO turns (session_id, tenant_id, turn, status, message_tokens, created_at, request_id, metadata, message) \
             SELECT session_id, 2, turn, status, message_tokens, created_at, request_id, metadata, message FROM turns",
            "INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) \
             SELECT 2, user_id, key, session_id, turn, updated_at, value FROM facts",
            "INSERT INTO session_memory (session_id, tenant_id, updated_at) SELECT session_id, 2, 0 FROM session_memory",
        ] {
            server.run_sql(copy).await;
        }
        server.delete("/users/ann").await.data();
        let session = server.session(json!({"user_id": "ann"})).await;
        server.delete(&format!("/sessions/{session}")).await;
        for table in [
            "SELECT COUNT(*) FROM sessions WHERE tenant_id = 2", "SELECT COUNT(*) FROM turns WHERE tenant_id = 2",
            "SELECT COUNT(*) FROM facts WHERE tenant_id = 2", "SELECT COUNT(*) FROM session_memory WHERE tenant_id = 2",
        ] {
            assert_eq!(server.count(table).await, 1, "{table}");
        }
    }

    async fn an_erasure_whose_server_stopped_half_way_is_finished_by_another(database: Database) {
        let (server, _upstream) = server_with(database).await;
        let mut canaries = Canaries::default();
        settle(&server, "ann", &mut canaries).await;
        // As left by the first transaction, 31 seconds ago.
        for left in [
            "INSERT INTO erasures (session_id, tenant_id, created_at) \
             SELECT session_id, tenant_id, 1704110400000 - 31000 FROM sessions",
            "DELETE FROM sessions WHERE user_id = 'ann'",
            "DELETE FROM facts WHERE user_id = 'ann'",
        ] {
            server.run_sql(left).await;
        }
        let other = Server::beside(server.database.clone(), |_| {}).await;
        other.run_jobs(None).await;
        canaries.are_gone_from(&server.database).await;
        other.get("/users/ann").await.refused(404, "USER_NOT_FOUND");
    }

    async fn a_deleted_session_is_gone_and_its_fork_stays_whole(database: Database) {
        let (server, _upstream) = server_with(database).await;
        let session = server.session(json!({"user_id": "ann", "title": "Trip"})).await;
        server.say(&session, "My name is Ann").await;
        server.patch(&format!("/sessions/{session}/memory"), json!({"working_memory": {"step": 1}})).await.data();
        let fork = id_of(&server.post(&format!("/sessions/{session}/fork"), json!({})).await);
        let before = all_of(&server, &fork).await;
        assert_eq!(before[1]["items"][0]["message"], "My name is Ann");
        assert_eq!(before[2]["working_memory"], json!({"step": 1}));

        let mut canaries = Canaries::default();
        let mut put = |place: &str| canaries.put(place);
        let change = json!({"title": put("title"), "metadata": {"k": put("metadata")}, "system_prompt": put("prompt")});
        server.patch(&format!("/sessions/{session}"), change).await.data();
        let chat = json!({"session_id": session, "message": format!("My name is {}", put("learnt fact")), "metadata": {"k": put("turn metadata")}});
        server.post_once("/chat", "chat", &chat).await.data();
        let turns = json!({"turns": [{"message": put("appended message"), "response": put("appended response")}]});
        server.post_once(&format!("/sessions/{session}/turns"), "append", &turns).await.data();
        server.patch(&format!("/sessions/{session}/memory"), json!({"working_memory": {"task": put("task")}})).await.data();
        keep_summary(&server, &session, &put("summary"), 2).await;
        canaries.are_all_in(&server.database).await;

        assert_eq!(server.delete(&format!("/sessions/{session}")).await.status, 200);
        canaries.are_gone_from(&server.database).await;
        assert_eq!(all_of(&server, &fork).await, before);
        // What was said in the fork's copy of the turn is still known from there.
        let known = server.read("/users/ann/memory").await;
        assert_eq!((&known["facts"]["name"]["value"], &known["facts"]["name"]["session_id"]), (&json!("Ann"), &json!(fork)));
        assert_eq!(server.get("/search?q=name").await.items().len(), 1);
    }

    async fn a_deleted_turn_is_gone_from_everywhere_and_keeps_its_number(database: Database) {
        let (server, upstream) = server_with(database).await;
        let session = server.session(json!({"user_id": "ann"})).await;
        server.say(&session, "first").await;
        let mut canaries = Canaries::default();
        let mut put = |place: &str| canaries.put(place);
        let chat = json!({
            "session_id": session, "message": format!("My name is {}. Please be brief.", put("message")), "metadata": {"k": put("turn metadata")},
        });
        server.post_once("/chat", "chat", &chat).await.data();
        let appended = json!({"turns": [
            {"message": "third", "response": "3"}, {"message": put("appended message"), "response": put("appended response")},
            {"message": "fifth", "response": "5"},
        ]});
        server.post_once(&format!("/sessions/{session}/turns"), "append", &appended).await.data();
        keep_summary(&server, &session, &put("summary"), 3).await;
        let memory = server.read(&format!("/sessions/{session}/memory")).await;
        assert_eq!((&memory["behavior_profile"]["verbosity"], &memory["profile_turns"]["verbosity"]), (&json!("low"), &json!(2)));
        canaries.are_all_in(&server.database).await;

        for turn in [2, 4] {
            let path = format!("/sessions/{session}/turns/{turn}");
            let deleted = server.delete(&path).await.data().clone();
            assert_eq!((&deleted["status"], &deleted["turn"]), (&json!("deleted"), &json!(turn)));
            assert_eq!((&deleted["message"], &deleted["response"], &deleted["metadata"]), (&json!(""), &Value::Null, &json!({})));
            // Once more does no harm.
            assert_eq!(server.delete(&path).await.data(), &deleted);
        }
        canaries.are_gone_from(&server.database).await;
        assert_eq!(server.count("SELECT COUNT(*) FROM facts").await, 0);
        assert_eq!(server.count("SELECT COUNT(answer) FROM idempotency_records").await, 0);
        let memory = server.read(&format!("/sessions/{session}/memory")).await;
        assert_eq!(memory["session_memory"], json!({"conversation_turns": 5, "summary": null, "summary_through": null}));
        assert_eq!(memory["behavior_profile"]["verbosity"], "medium");
        assert_eq!(memory["profile_turns"]["verbosity"], Value::Null);
        let turns = server.get(&format!("/sessions/{session}/turns")).await;
        let statuses: Vec<_> = turns.items().iter().map(|turn| (turn["turn"].as_i64().unwrap(), turn["status"].as_str().unwrap())).collect();
        assert_eq!(statuses, [(1, "completed"), (2, "deleted"), (3, "completed"), (4, "deleted"), (5, "completed")]);

        assert_eq!(server.chat(&session, "next").await.data()["turn"], 6);
        let shown: Vec<_> = upstream.prompts().pop().unwrap()[1..].iter().map(|message| message["content"].clone()).collect();
        assert_eq!(shown, ["first", "You said: first", "third", "3", "fifth", "5", "next"]);
        let context = server.read(&format!("/sessions/{session}/context")).await;
        assert_eq!((&context["included"]["recent_turns"], &context["dropped"]["recent_turns"]), (&json!(4), &json!(0)));
    }

    async fn a_deleted_turn_is_not_copied_by_a_fork(server: Server) {
        let session = server.session(json!({"user_id": "ann"})).await;
        for message in ["one", "My name is Ann", "three"] {
            server.say(&session, message).await;
        }
        server.delete(&format!("/sessions/{session}/turns/2")).await.data();
        let fork = server.post(&format!("/sessions/{session}/fork"), json!({})).await;
        let turns = server.get(&format!("/sessions/{}/turns", id_of(&fork))).await;
        let messages: Vec<_> = turns.items().iter().map(|turn| turn["message"].as_str().unwrap()).collect();
        assert_eq!(messages, ["one", "", "three"]);
        assert_eq!(server.count("SELECT COUNT(*) FROM facts").await, 0);
    }

    async fn what_is_deleted_is_gone_though_much_else_is_written_around_it(server: Server) {
        let (secret, other) = (server.session(json!({"user_id": "ann"})).await, server.session(json!({})).await);
        let (mut canaries, mut rest) = (Canaries::default(), Canaries::default());
        // Of all sizes, so that pages are split and joined and some text goes beyond a page.
        let mut noise = async |round: usize| {
            let turns: Vec<_> = (0..20).map(|i| {
                let words: Vec<_> = (0..10 + 7 * i).map(|word| rest.put(&format!("{round} {i} {word}"))).collect();
                json!({"message": words.join(" "), "response": "and so on"})
            }).collect();
            server.post(&format!("/sessions/{other}/turns"), json!({"turns": turns})).await.data();
        };
        for round in 0..10 {
            noise(round).await;
            let long = format!("My name is {} {}", canaries.put(&format!("{round} name")), "so ".repeat(600 * round));
            let turns = json!({"turns": [
                {"message": format!("{} is said", canaries.put(&format!("{round} message"))), "response": "yes"},
                {"message": long, "response": format!("{} is answered", canaries.put(&format!("{round} response")))},
            ]});
            server.post_once(&format!("/sessions/{secret}/turns"), &format!("key {round}"), &turns).await.data();
        }
        canaries.are_all_in(&server.database).await;
        for turn in [1, 2, 5, 6, 13, 14, 20] {
            server.delete(&format!("/sessions/{secret}/turns/{turn}")).await.data();
        }
        noise(10).await;
        server.delete(&format!("/sessions/{secret}")).await;
        canaries.are_gone_from(&server.database).await;
    }

    async fn a_turn_that_runs_is_not_deleted(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(|message| Script::Say(message.to_owned()), gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        server.post(&format!("/sessions/{session}/turns"), json!({"turns": [{"message": "a", "response": "b"}]})).await.data();
        let chat = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.say(&session, "hi").await }
        });
        upstream.asked_times(1).await;
        let busy = server.delete(&format!("/sessions/{session}/turns/2")).await;
        busy.refused(409, "SESSION_BUSY");
        assert_eq!(busy.body["error"]["details"], json!([{"field": "turn", "message": "2"}]));
        // Another one is.
        assert_eq!(server.delete(&format!("/sessions/{session}/turns/1")).await.data()["status"], "deleted");
        gate.add_permits(1);
        assert_eq!(chat.await.unwrap(), "hi");
        assert_eq!(server.delete(&format!("/sessions/{session}/turns/2")).await.data()["status"], "deleted");
    }

    async fn a_failed_turn_is_deleted_like_any_other(database: Database) {
        let upstream = Upstream::start(|_| Script::Raw(400, vec![], String::new())).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        server.chat(&session, "secret").await.refused(502, "UPSTREAM_ERROR");
        let deleted = server.delete(&format!("/sessions/{session}/turns/1")).await.data().clone();
        assert_eq!((&deleted["status"], &deleted["message"], &deleted["error"]), (&json!("deleted"), &json!(""), &Value::Null));
        let memory = server.read(&format!("/sessions/{session}/memory")).await;
        assert_eq!(memory["session_memory"]["conversation_turns"], 0);
        let context = server.read(&format!("/sessions/{session}/context")).await;
        assert_eq!(context["dropped"]["recent_turns"], 0);
    }

    async fn what_is_not_there_cannot_be_deleted(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "hi").await;
        for turn in ["2", "0", "-1", "x"] {
            let unknown = server.delete(&format!("/sessions/{session}/turns/{turn}")).await;
            assert_eq!(unknown.refused(404, "TURN_NOT_FOUND"), format!("Turn {turn} not found"));
        }
        for session in ["session_0000000000000000", "x"] {
            server.delete(&format!("/sessions/{session}/turns/1")).await.refused(404, "SESSION_NOT_FOUND");
        }
    }

    async fn a_summary_begun_before_something_was_taken_away_is_not_kept(server: Server) {
        let session = server.session(json!({})).await;
        for message in ["one", "two", "three"] {
            server.say(&session, message).await;
        }
        let (store, tenant, id) = (&server.app.store, Caller::ANYONE.tenant, SessionId::parse(&session).unwrap());
        let begun = async || {
            let material = store.next_context(&Caller::ANYONE, id, 1000).await.unwrap().unwrap();
            Summary {
                text: "About secrets.".into(), tokens: 3, through: 2, takings: material.takings, was_through: material.summary_through,
            }
        };
        let summary = begun().await;
        server.delete(&format!("/sessions/{session}/turns/2")).await.data();
        assert!(!store.keep_summary(tenant, id, summary).await.unwrap());
        let summary = begun().await;
        server.delete(&format!("/sessions/{session}/memory")).await.data();
        assert!(!store.keep_summary(tenant, id, summary).await.unwrap());
        // Two that were begun at once: one of them is kept.
        let (first, second) = (begun().await, begun().await);
        assert!(store.keep_summary(tenant, id, first).await.unwrap());
        assert!(!store.keep_summary(tenant, id, second).await.unwrap());
        // A turn that the summary does not cover leaves it.
        server.delete(&format!("/sessions/{session}/turns/3")).await.data();
        assert_eq!(server.read(&format!("/sessions/{session}/memory")).await["session_memory"]["summary"], "About secrets.");
    }
}
