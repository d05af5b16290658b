//! Model servers: a scripted one that speaks OpenAI's chat completions, and what becomes of what it says.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use atlus::store::Kind;
use poem::{
    EndpointExt, IntoResponse, Request, Response, Route,
    endpoint::make,
    http::StatusCode,
    listener::{Acceptor, Listener, TcpListener},
    post,
};
use serde_json::{Value, json};
use tokio::{sync::Semaphore, time::Instant};

use crate::harness::{Database, Server, on_both};

/// How the scripted server answers one question.
pub enum Script {
    /// With this text.
    Say(String),
    /// With this status, headers and body.
    Raw(u16, Vec<(&'static str, String)>, String),
    /// Never.
    Hang,
    /// By closing the connection in the middle of its answer.
    Break,
}

/// A server of an OpenAI-compatible model that does what a test tells it to.
pub struct Upstream {
    pub url: String,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Every request's headers and body.
    asked: Mutex<Vec<(Value, Value)>>,
    running: Mutex<usize>,
    overlapped: Mutex<bool>,
}

impl Upstream {
    /// Answers as `script` says, given the last message.
    pub async fn start(script: impl Fn(&str) -> Script + Send + Sync + 'static) -> Self {
        Self::gated(script, Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))).await
    }

    /// The same, but each answer waits for a permit and takes it.
    pub async fn gated(
        script: impl Fn(&str) -> Script + Send + Sync + 'static,
        gate: Arc<Semaphore>,
    ) -> Self {
        let shared = Arc::new(Shared::default());
        let (state, script) = (shared.clone(), Arc::new(script));
        let endpoint = make(move |mut request: Request| {
            let (state, script, gate) = (state.clone(), script.clone(), gate.clone());
            async move {
                let authorization = request.header("authorization").unwrap_or_default().to_owned();
                let body: Value = request.take_body().into_json().await?;
                let last = body["messages"].as_array().unwrap().last().unwrap()["content"]
                    .as_str()
                    .unwrap()
                    .to_owned();
                state.asked.lock().unwrap().push((authorization.into(), body));
                {
                    let mut running = state.running.lock().unwrap();
                    *running += 1;
                    *state.overlapped.lock().unwrap() |= *running > 1;
                }
                let leaves = Leaves(state.clone());
                gate.acquire().await.unwrap().forget();
                drop(leaves);
                Ok::<_, poem::Error>(answer(script(&last)).await)
            }
        });
        let acceptor = TcpListener::bind("127.0.0.1:0").into_acceptor().await.unwrap();
        let address = acceptor.local_addr()[0].as_socket_addr().unwrap().to_string();
        let routes = Route::new().at("/v1/chat/completions", post(endpoint.boxed()));
        tokio::spawn(poem::Server::new_with_acceptor(acceptor).run(routes.map_to_response()));
        Self { url: format!("http://{address}/v1"), shared }
    }

    /// The messages of every question so far.
    pub fn prompts(&self) -> Vec<Vec<Value>> {
        let asked = self.shared.asked.lock().unwrap();
        asked.iter().map(|(_, body)| body["messages"].as_array().unwrap().clone()).collect()
    }

    pub fn asked(&self) -> Vec<(Value, Value)> {
        self.shared.asked.lock().unwrap().clone()
    }

    /// Whether two questions were ever under way at once.
    pub fn overlapped(&self) -> bool {
        *self.shared.overlapped.lock().unwrap()
    }

    /// Waits until so many questions have come in.
    pub async fn asked_times(&self, times: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.asked().len() < times {
            assert!(Instant::now() < deadline, "the model was asked {} times", self.asked().len());
            tokio::task::yield_now().await;
        }
    }
}

struct Leaves(Arc<Shared>);
impl Drop for Leaves {
    fn drop(&mut self) {
        *self.0.running.lock().unwrap() -= 1;
    }
}

async fn answer(script: Script) -> Response {
    match script {
        Script::Say(text) => Response::builder().content_type("application/json").body(
            json!({
                "id": "chatcmpl-1", "object": "chat.completion", "model": "scripted-2", "unknown": {"field": 1},
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}],
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10, "details": null}
            })
            .to_string(),
        ),
        Script::Raw(status, headers, body) => {
            let mut response = Response::builder().status(StatusCode::from_u16(status).unwrap());
            for (name, value) in headers {
                response = response.header(name, value);
            }
            response.body(body)
        }
        Script::Hang => std::future::pending().await,
        Script::Break => {
            let pieces = [Ok("{\"choices\": ["), Err(std::io::Error::other("cut"))];
            poem::Body::from_bytes_stream(futures_util::stream::iter(pieces)).into_response()
        }
    }
}

fn echo(message: &str) -> Script {
    Script::Say(format!("You said: {message}"))
}

/// What becomes of one chat with a server that answers so: the answer, and the recorded turn.
async fn chat_with(kind: Kind, script: impl Fn(&str) -> Script + Send + Sync + 'static) -> (Server, String) {
    let upstream = Upstream::start(script).await;
    let server = Server::with_model(kind, &upstream.url, |config| {
        config.chat.model_timeout = Duration::from_millis(300);
    })
    .await;
    let session = server.session(json!({})).await;
    (server, session)
}

on_both! {
    async fn an_answer_is_kept_with_its_model_and_usage(database: Database) {
        let upstream = Upstream::start(echo).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({"system_prompt": "Be brief."})).await;
        let body = json!({"session_id": session, "message": "Hi", "model": "other", "temperature": 0.5, "max_tokens": 9});
        let answer = server.post("/chat", body).await;
        let data = answer.data();
        assert_eq!(data["response"], "You said: Hi");
        assert_eq!(data["model"], "scripted-2");
        assert_eq!(data["usage"], json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}));
        server.say(&session, "again").await;

        let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
        for field in ["response", "model", "usage", "execution_time", "request_id", "turn", "session_id"] {
            assert_eq!(turn.data()[field], data[field], "{field}");
        }
        let asked = upstream.asked();
        assert_eq!(asked[0].0, "Bearer sk-test-key-of-ours");
        assert_eq!(asked[0].1, json!({
            "model": "other", "temperature": 0.5, "max_tokens": 9,
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
        }));
        assert_eq!(asked[1].1["model"], "scripted");
        assert_eq!(asked[1].1.get("temperature"), None);
    }

    async fn a_failure_of_the_model_is_told_recorded_and_does_no_harm(database: Database) {
        let html = || Script::Raw(200, vec![("content-type", "text/html".into())], "<html>hi</html>".into());
        let error = |status| {
            let body = json!({"error": {"message": "out of luck with sk-test-key-of-ours", "code": 7}});
            Script::Raw(status, vec![("retry-after", "17".into())], body.to_string())
        };
        let json = |body: Value| Script::Raw(200, vec![], body.to_string());
        let large = || Script::Raw(200, vec![], "x".repeat(5 << 20));
        let elsewhere = || Script::Raw(302, vec![("location", "http://127.0.0.1:1/".into())], String::new());
        let (server, session) = chat_with(database.kind, move |message| match message {
            "html" => html(),
            "no choice" => json(json!({"choices": []})),
            "no text" => json(json!({"choices": [{"message": {"role": "assistant", "content": null}}]})),
            "empty text" => Script::Say(String::new()),
            "large" => large(),
            "elsewhere" => elsewhere(),
            "break" => Script::Break,
            "hang" => Script::Hang,
            "fine" => Script::Say("fine".into()),
            status => error(status.parse().unwrap()),
        })
        .await;
        let cases = [
            ("html", 502, "UPSTREAM_ERROR"), ("no choice", 502, "UPSTREAM_ERROR"), ("no text", 502, "UPSTREAM_ERROR"),
            ("empty text", 502, "UPSTREAM_ERROR"), ("large", 502, "UPSTREAM_ERROR"), ("elsewhere", 502, "UPSTREAM_ERROR"),
            ("break", 502, "UPSTREAM_ERROR"), ("500", 502, "UPSTREAM_ERROR"), ("401", 502, "UPSTREAM_ERROR"),
            ("503", 502, "UPSTREAM_ERROR"), ("504", 504, "UPSTREAM_TIMEOUT"), ("hang", 504, "UPSTREAM_TIMEOUT"),
            ("429", 503, "UPSTREAM_UNAVAILABLE"),
        ];
        for (turn, (message, status, code)) in (1..).zip(cases) {
            let refusal = server.chat(&session, message).await;
            let told = refusal.refused(status, code).to_owned();
            assert!(!told.contains("sk-test"), "{told}");
            if message == "429" {
                assert_eq!(refusal.headers["retry-after"], "17");
                assert!(told.contains("out of luck"), "{told}");
            }
            let record = server.get(&format!("/sessions/{session}/turns/{turn}")).await;
            assert_eq!(record.data()["status"], "failed");
            assert_eq!(record.data()["message"], message);
            assert_eq!(record.data()["response"], Value::Null);
            assert_eq!(record.data()["error"], json!({"code": code, "message": told}));
            assert!(record.data()["execution_time"].as_f64().unwrap() > 0.0);
        }
        assert_eq!(server.say(&session, "fine").await, "fine");
        let session = server.get(&format!("/sessions/{session}")).await;
        assert_eq!(session.data()["memory"]["conversation_turns"], 1);
    }

    async fn a_failed_turn_is_never_shown_to_the_model(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "fail" => Script::Raw(500, vec![], String::new()),
            other => echo(other),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        for message in ["one", "fail", "two", "fail", "three"] {
            server.chat(&session, message).await;
        }
        let shown: Vec<_> = upstream.prompts().pop().unwrap()[1..].iter().map(|m| m["content"].clone()).collect();
        assert_eq!(shown, ["one", "You said: one", "two", "You said: two", "three"]);
    }

    async fn a_server_that_is_not_there_is_told_apart(database: Database) {
        // A port that was free a moment ago.
        let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let server = Server::with_model(database.kind, &format!("http://{gone}/v1"), |_| {}).await;
        let session = server.session(json!({})).await;
        let refusal = server.chat(&session, "hello?").await;
        assert_eq!(refusal.refused(502, "UPSTREAM_ERROR"), "The model server cannot be reached");
    }

    async fn what_a_database_cannot_keep_is_cut_out_of_an_answer(database: Database) {
        let (server, session) = chat_with(database.kind, |_| Script::Say("a\u{0}b \u{1F600}".into())).await;
        assert_eq!(server.say(&session, "hi").await, "ab \u{1F600}");
    }
}
