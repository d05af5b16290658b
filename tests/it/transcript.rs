//! One long conversation with both databases, word for word.

use std::{collections::HashMap, fmt::Write, time::Duration};

use atlus::store::Kind;
use reqwest::{Method, RequestBuilder};
use serde_json::{Value, json};

use crate::harness::{Answer, Server};

/// What was asked and answered, with names for what is random and nothing of what takes its time.
struct Transcript {
    server: Server,
    text: String,
    names: HashMap<String, String>,
}

impl Transcript {
    async fn of(kind: Kind) -> String {
        let server = Server::on(kind).await;
        let mut transcript = Self { server, text: String::new(), names: HashMap::new() };
        transcript.converse().await;
        transcript.text
    }

    /// Sends a request and writes down what came of it.
    async fn send(&mut self, request: RequestBuilder, heading: &str) -> Answer {
        self.server.clock.advance(Duration::from_millis(1500));
        let answer = self.server.client.send(request).await;
        let mut body = answer.body.clone();
        self.normalise("", &mut body);
        let heading = self.named(heading);
        writeln!(self.text, "{heading}\n{} {body}", answer.status).unwrap();
        for header in ["etag", "idempotency-replayed", "retry-after", "content-type", "allow"] {
            if let Some(value) = answer.headers.get(header) {
                let value = if header == "etag" {
                    self.name("etag", value.to_str().unwrap())
                } else {
                    value.to_str().unwrap().to_owned()
                };
                writeln!(self.text, "{header}: {value}").unwrap();
            }
        }
        answer
    }

    async fn ask(&mut self, method: Method, path: &str, body: Option<Value>) -> Answer {
        let heading = format!("{method} {path} {}", body.as_ref().map(Value::to_string).unwrap_or_default());
        let request = self.server.request(method, path);
        let request = body.iter().fold(request, RequestBuilder::json);
        self.send(request, &heading).await
    }

    async fn get(&mut self, path: &str) -> Answer {
        self.ask(Method::GET, path, None).await
    }

    async fn post(&mut self, path: &str, body: Value) -> Answer {
        self.ask(Method::POST, path, Some(body)).await
    }

    async fn patch(&mut self, path: &str, body: Value) -> Answer {
        self.ask(Method::PATCH, path, Some(body)).await
    }

    async fn delete(&mut self, path: &str) -> Answer {
        self.ask(Method::DELETE, path, None).await
    }

    async fn with(&mut self, header: &str, value: &str, method: Method, path: &str, body: Value) -> Answer {
        let request = self.server.request(method.clone(), path).header(header, value).json(&body);
        self.send(request, &format!("{method} {path} {header} {body}")).await
    }

    async fn stream(&mut self, request: RequestBuilder, heading: &str) {
        let events = self.server.client.listen(request).await.all().await;
        let heading = self.named(heading);
        writeln!(self.text, "{heading}").unwrap();
        for mut event in events {
            self.normalise("", &mut event.data);
            writeln!(self.text, "{} {} {}", event.id, event.name, event.data).unwrap();
        }
    }

    /// The same name for the same value, by the order in which values come up.
    fn name(&mut self, kind: &str, value: &str) -> String {
        let next = self.names.len();
        self.names.entry(value.to_owned()).or_insert_with(|| format!("<{kind} {next}>")).clone()
    }

    /// A text with every session's id named.
    fn named(&mut self, text: &str) -> String {
        let mut named = String::new();
        let mut rest = text;
        while let Some(at) = rest.find("session_") {
            named.push_str(&rest[..at]);
            let id = rest[at..].get(..24).unwrap_or_default();
            if id.len() == 24 && id[8..].bytes().all(|byte| byte.is_ascii_hexdigit()) {
                named.push_str(&self.name("session", id));
                rest = &rest[at + 24..];
            } else {
                named.push_str("session_");
                rest = &rest[at + 8..];
            }
        }
        named + rest
    }

    fn normalise(&mut self, key: &str, value: &mut Value) {
        match value {
            Value::Object(map) => map.iter_mut().for_each(|(key, value)| self.normalise(key, value)),
            Value::Array(items) => items.iter_mut().for_each(|item| self.normalise("", item)),
            Value::Number(_) if key == "execution_time" => *value = json!("<seconds>"),
            // By the machine's clock where a request was refused.
            Value::String(_) if key == "timestamp" => *value = json!("<time>"),
            Value::String(text) if key == "request_id" => *value = json!(self.name("request", text)),
            Value::String(_) if key == "next_cursor" => *value = json!("<cursor>"),
            Value::String(text) if key == "kind" && ["sqlite", "postgres"].contains(&text.as_str()) => {
                *value = json!("<database>");
            }
            Value::String(text) => *value = json!(self.named(text)),
            _ => {}
        }
    }

    #[expect(clippy::too_many_lines, reason = "it is one conversation")]
    async fn converse(&mut self) {
        let id = |answer: &Answer| answer.data()["session_id"].as_str().unwrap().to_owned();
        self.get("/health").await;
        let metadata = json!({"z": 1.0, "a": [null, "ü\u{1F600}", 1e300, -0.0], "n": {"deep": {"er": true}}});
        let s = id(&self
            .post("/sessions", json!({"user_id": "ann", "title": "Trip", "metadata": metadata}))
            .await);
        let other = id(&self
            .with(
                "Idempotency-Key",
                "one",
                Method::POST,
                "/sessions",
                json!({"user_id": "bob", "ttl_seconds": 60}),
            )
            .await);
        self.with(
            "Idempotency-Key",
            "one",
            Method::POST,
            "/sessions",
            json!({"user_id": "bob", "ttl_seconds": 60}),
        )
        .await;
        self.with("Idempotency-Key", "one", Method::POST, "/sessions", json!({})).await;
        for body in [
            json!({"title": "x".repeat(201)}),
            json!({"ttl_seconds": 5}),
            json!([]),
            json!({"metadata": {"a": "\u{0}"}}),
        ] {
            self.post("/sessions", body).await;
        }
        self.get("/sessions/continue?user_id=ann").await;
        self.get("/sessions/continue?user_id=nobody").await;

        // A conversation.
        for message in [
            "Hello, ATLUS!",
            "Hi, my name is John",
            "What's my name?",
            "I live in Berlin. Please be brief.",
            "I'm allergic to peanuts",
            "Where do I live?",
            "What did I just say?",
            "  padded  ",
            "Ünïcödé \u{1F468}\u{200D}\u{1F469} 東京タワー",
            "What do you know about me?",
        ] {
            self.post(
                "/chat",
                json!({"session_id": s, "message": message, "metadata": {"m": message.len()}}),
            )
            .await;
        }
        for body in [
            json!({"session_id": s, "message": ""}),
            json!({"session_id": s}),
            json!({"session_id": s, "message": 5}),
            json!({"session_id": s, "message": "x".repeat(32_001)}),
            json!({"session_id": s, "message": "hi", "user_id": "bob"}),
            json!({"session_id": "session_0000000000000000", "message": "hi"}),
            json!({"session_id": s, "message": "hi", "on_busy": "odd"}),
        ] {
            self.post("/chat", body).await;
        }
        let temporary = id(&self
            .with("Idempotency-Key", "two", Method::POST, "/chat", json!({"message": "Call me Zoe"}))
            .await);
        self.with("Idempotency-Key", "two", Method::POST, "/chat", json!({"message": "Call me Zoe"})).await;
        self.post("/chat", json!({"session_id": temporary, "message": "What's my name?"})).await;
        let body = json!({"session_id": s, "message": "Tell me my name again"});
        let request = self.server.request(Method::POST, "/chat/stream").json(&body);
        self.stream(request, "POST /chat/stream").await;
        for last in [None, Some("3")] {
            let request = self.server.request(Method::GET, &format!("/sessions/{s}/turns/3/stream"));
            let request =
                last.into_iter().fold(request, |request, last| request.header("Last-Event-ID", last));
            self.stream(request, "GET stream").await;
        }
        self.post(&format!("/sessions/{s}/turns/3/cancel"), json!({})).await;

        // Turns.
        let turns = json!({"turns": [
            {"message": "The red car", "response": "It is fast", "created_at": "2023-05-06T07:08:09.123987+02:00", "model": "m", "metadata": {"b": 1, "a": 2}},
            {"message": "My name is Jack", "response": ""},
        ]});
        let path = format!("/sessions/{s}/turns");
        self.with("Idempotency-Key", "three", Method::POST, &path, turns.clone()).await;
        self.with("Idempotency-Key", "three", Method::POST, &path, turns).await;
        self.post(&path, json!({"turns": []})).await;
        self.post(&path, json!({"turns": [{"message": "a"}]})).await;
        self.post(&path, json!({"turns": [{"message": " ", "response": "b"}]})).await;
        let page = self.get(&format!("{path}?limit=5")).await;
        let cursor = page.data()["next_cursor"].as_str().unwrap().to_owned();
        let request = self.server.request(Method::GET, &format!("{path}?limit=5&cursor={cursor}"));
        self.send(request, "GET the next page").await;
        self.get(&format!("{path}?direction=desc&limit=2&status=completed")).await;
        for turn in ["1", "99", "x"] {
            self.get(&format!("{path}/{turn}")).await;
        }
        self.get(&format!("{path}?cursor=x&status=odd&direction=up&limit=0")).await;

        // Memory.
        let path = format!("/sessions/{s}/memory");
        self.get(&path).await;
        self.patch(&path, json!({"working_memory": {"step": 1, "list": [1, 2.50, "x"]}, "behavior_profile": {"tone": "casual"}})).await;
        self.patch(&path, json!({"working_memory": {"step": null, "n": {"m": null}}})).await;
        self.patch(&path, json!({"behavior_profile": {"tone": "rude"}})).await;
        self.with("If-Match", "\"stale\"", Method::PATCH, &path, json!({"working_memory": {}})).await;
        for query in [
            "",
            "?message=What%20is%20my%20name",
            "?max_tokens=200&message=hi",
            "?max_tokens=3&message=a%20long%20message",
            "?max_tokens=0",
        ] {
            self.get(&format!("/sessions/{s}/context{query}")).await;
        }
        self.get("/users/ann/memory").await;
        self.patch(
            "/users/ann/memory",
            json!({"facts": {"motto": {"en": "on", "de": "weiter"}, "age": 41.0, "name": "Johnny"}}),
        )
        .await;
        self.patch("/users/ann/memory", json!({"facts": {"motto": {"en": null}, "age": null, "gone": null}}))
            .await;
        self.patch("/users/ann/memory", json!({"facts": {"": 1}})).await;
        self.get("/users/ann").await;

        // Search, within one session, since sessions have no order among equals.
        for q in ["name", "\"red car\"", "cars", "東京", "peanut allergy", "nothing%20at%20all", "the", "%22"]
        {
            self.get(&format!("/search?session_id={s}&q={q}")).await;
        }
        self.get(&format!("/search?session_id={s}&q=name&limit=1")).await;
        self.get("/search?q=name&user_id=bob").await;
        self.get("/search?q=red&to=2023-12-31T00:00:00Z").await;
        self.get("/search?q=").await;

        // Forks, changes, endings. Of facts that a fork copies either may be named as the source, so it holds none.
        let fork = id(&self
            .with(
                "Idempotency-Key",
                "four",
                Method::POST,
                &format!("/sessions/{s}/fork"),
                json!({"turn": 3, "title": "Fork"}),
            )
            .await);
        self.get(&format!("/sessions/{fork}")).await;
        self.get(&format!("/sessions/{fork}/memory")).await;
        self.post("/chat", json!({"session_id": fork, "message": "What's my name?"})).await;
        self.post(&format!("/sessions/{s}/fork"), json!({"turn": 99})).await;
        self.delete(&format!("/sessions/{s}/turns/2")).await;
        self.delete(&format!("/sessions/{s}/turns/99")).await;
        self.get("/users/ann/memory").await;
        self.get(&format!("/search?session_id={s}&q=john")).await;
        self.post("/chat", json!({"session_id": s, "message": "What's my name?"})).await;
        let read = self.get(&format!("/sessions/{s}")).await;
        let etag = read.headers["etag"].to_str().unwrap().to_owned();
        self.with(
            "If-Match",
            &etag,
            Method::PATCH,
            &format!("/sessions/{s}"),
            json!({"title": null, "metadata": {"z": null, "y": [1]}, "ttl_seconds": 3600}),
        )
        .await;
        self.with("If-Match", &etag, Method::PATCH, &format!("/sessions/{s}"), json!({"title": "stale"}))
            .await;
        for query in [
            "", "?order=created_at&direction=asc", "?user_id=ann", "?is_active=false", "?temporary=true",
            "?metadata=%7B%22y%22%3A%5B1.0%5D%7D", "?limit=1", "?metadata=x",
        ] {
            self.get(&format!("/sessions{query}")).await;
        }
        self.patch(&format!("/sessions/{s}"), json!({"is_active": false})).await;
        self.post("/chat", json!({"session_id": s, "message": "hi"})).await;
        self.post(&format!("/sessions/{s}/turns"), json!({"turns": [{"message": "a", "response": "b"}]}))
            .await;
        self.server.clock.advance(Duration::from_secs(61));
        self.get(&format!("/sessions/{other}")).await;
        self.patch(&format!("/sessions/{other}"), json!({"is_active": true})).await;
        self.delete(&format!("/sessions/{s}/memory")).await;
        self.delete(&format!("/sessions/{s}")).await;
        self.delete(&format!("/sessions/{s}")).await;
        self.get(&format!("/sessions/{s}/turns")).await;
        self.get("/users/ann/memory").await;
        self.delete("/users/ann/memory").await;
        self.delete("/users/ann").await;
        self.delete("/users/ann").await;
        self.get("/users/ann").await;
        self.get("/search?q=name&user_id=ann").await;
        self.get("/nowhere").await;
        self.ask(Method::PUT, "/sessions", None).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_databases_answer_the_same_word_for_word() {
    let (sqlite, postgres) = tokio::join!(Transcript::of(Kind::Sqlite), Transcript::of(Kind::Postgres));
    for (sqlite, postgres) in sqlite.lines().zip(postgres.lines()) {
        assert_eq!(sqlite, postgres);
    }
    assert_eq!(sqlite.lines().count(), postgres.lines().count());
    assert!(sqlite.lines().count() > 200 && !sqlite.contains("\n500 "), "{sqlite}");
}
