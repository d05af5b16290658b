//! Model servers: a scripted one that speaks OpenAI's chat completions, and what becomes of what it says.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use atlus::{
    config::{ModelConfig, Provider},
    store::Kind,
};
use futures_util::{StreamExt, stream};
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
    /// Piece by piece, with a pause before each; then in order, or by closing the connection.
    Stream { pieces: Vec<String>, pause: Duration, whole: bool },
    /// With this much of a stream, and then never with the rest.
    Begin(String),
    /// After a pause.
    Late(Duration, String),
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
    running: Mutex<Vec<String>>,
    overlapped: Mutex<bool>,
    /// How many streams were given up by their listener.
    left: Arc<AtomicUsize>,
}

impl Upstream {
    /// Answers as `script` says, given the last message.
    pub async fn start(script: impl Fn(&str) -> Script + Send + Sync + 'static) -> Self {
        Self::gated(script, Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))).await
    }

    /// Answers as `script` says, given the model that is asked and the last message.
    pub async fn start_by_model(script: impl Fn(&str, &str) -> Script + Send + Sync + 'static) -> Self {
        Self::serve(script, Arc::new(Semaphore::new(Semaphore::MAX_PERMITS))).await
    }

    /// The same, but each answer waits for a permit and takes it.
    pub async fn gated(
        script: impl Fn(&str) -> Script + Send + Sync + 'static,
        gate: Arc<Semaphore>,
    ) -> Self {
        Self::serve(move |_, message| script(message), gate).await
    }

    async fn serve(
        script: impl Fn(&str, &str) -> Script + Send + Sync + 'static,
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
                // Tests in which it matters name the session first.
                let topic = last.split(' ').next().unwrap_or_default().to_owned();
                let runs = Runs::enter(state.clone(), topic);
                gate.acquire().await.unwrap().forget();
                let stream =
                    state.asked.lock().unwrap().last().is_some_and(|(_, body)| body["stream"] == true);
                let model =
                    state.asked.lock().unwrap().last().unwrap().1["model"].as_str().unwrap().to_owned();
                let answer = answer(script(&model, &last), stream, state.left.clone()).await;
                drop(runs);
                Ok::<_, poem::Error>(answer)
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

    /// How many streams were given up by their listener.
    pub fn left(&self) -> usize {
        self.shared.left.load(Ordering::SeqCst)
    }

    /// Waits until so many streams were given up; how long that took.
    pub async fn left_times(&self, times: usize) -> Duration {
        let started = Instant::now();
        while self.left() < times {
            assert!(started.elapsed() < Duration::from_secs(20), "{} streams were given up", self.left());
            tokio::task::yield_now().await;
        }
        started.elapsed()
    }

    /// Whether two questions whose message begins with the same word were ever under way at once.
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

/// A question under way.
struct Runs(Arc<Shared>, String);

impl Runs {
    fn enter(shared: Arc<Shared>, topic: String) -> Self {
        let mut running = shared.running.lock().unwrap();
        if running.contains(&topic) {
            *shared.overlapped.lock().unwrap() = true;
        }
        running.push(topic.clone());
        drop(running);
        Self(shared, topic)
    }
}

impl Drop for Runs {
    fn drop(&mut self) {
        let mut running = self.0.running.lock().unwrap();
        let place = running.iter().position(|topic| *topic == self.1).unwrap();
        running.remove(place);
    }
}

/// Counts a stream that is dropped before its end.
struct Listened {
    left: Arc<AtomicUsize>,
    whole: bool,
}

impl Drop for Listened {
    fn drop(&mut self) {
        if !self.whole {
            self.left.fetch_add(1, Ordering::SeqCst);
        }
    }
}

async fn answer(script: Script, stream: bool, left: Arc<AtomicUsize>) -> Response {
    match script {
        Script::Say(text) if stream => {
            let pieces = text.split_inclusive(' ').map(str::to_owned).collect();
            streamed(pieces, Duration::ZERO, true, left)
        }
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
        Script::Stream { pieces, pause, whole } => streamed(pieces, pause, whole, left),
        Script::Begin(text) => {
            let chunk = json!({"model": "scripted-2", "choices": [{"index": 0, "delta": {"content": text}}]});
            let (begun, listened) = (Ok(format!("data: {chunk}\n\n")), Listened { left, whole: false });
            // Who has left is noticed when something is sent.
            let rest = stream::unfold(listened, async |listened| {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Some((Ok::<_, std::io::Error>(": still there\n\n".to_owned()), listened))
            });
            let body = stream::iter([begun]).chain(Box::pin(rest));
            Response::builder().content_type("text/event-stream").body(poem::Body::from_bytes_stream(body))
        }
        Script::Late(pause, text) => {
            tokio::time::sleep(pause).await;
            Box::pin(answer(Script::Say(text), stream, left)).await
        }
    }
}

/// A completion as server-sent events.
fn streamed(pieces: Vec<String>, pause: Duration, whole: bool, left: Arc<AtomicUsize>) -> Response {
    let chunk = |delta: Value, usage: Value| {
        let choices = json!([{"index": 0, "delta": delta, "finish_reason": null}]);
        format!("data: {}\n\n", json!({"model": "scripted-2", "choices": choices, "usage": usage}))
    };
    let mut events = vec![format!(": a comment\n\n{}", chunk(json!({"role": "assistant"}), Value::Null))];
    events.extend(pieces.into_iter().map(|piece| chunk(json!({"content": piece}), Value::Null)));
    if whole {
        let usage = json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10});
        events.push(chunk(json!({}), usage));
        events.push("data: [DONE]\n\n".to_owned());
    }
    let listened = Listened { left, whole: false };
    let body = futures_util::stream::unfold(
        (events.into_iter(), listened),
        move |(mut events, mut listened)| async move {
            tokio::time::sleep(pause).await;
            match events.next() {
                Some(event) => Some((Ok(event), (events, listened))),
                // Once it has been cut, or all is said, nobody can leave it.
                None if std::mem::replace(&mut listened.whole, true) || whole => None,
                None => Some((Err(std::io::Error::other("cut")), (events, listened))),
            }
        },
    );
    Response::builder().content_type("text/event-stream").body(poem::Body::from_bytes_stream(Box::pin(body)))
}

fn echo(message: &str) -> Script {
    Script::Say(format!("You said: {message}"))
}

/// What becomes of one chat with a server that answers so: the answer, and the recorded turn.
async fn chat_with(kind: Kind, script: impl Fn(&str) -> Script + Send + Sync + 'static) -> (Server, String) {
    let upstream = Upstream::start(script).await;
    let server = Server::with_model(kind, &upstream.url, |config| {
        config.chat.model_timeout = Duration::from_secs(2);
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

    async fn a_call_is_repeated_while_it_may_help_and_nothing_was_heard(database: Database) {
        let times = Arc::new(AtomicUsize::new(0));
        let upstream = Upstream::start({
            let times = times.clone();
            move |message| {
                let first = times.fetch_add(1, Ordering::SeqCst) == 0;
                match message {
                    _ if !first => Script::Say("at last".into()),
                    "cut" => Script::Stream { pieces: vec!["half".into()], pause: Duration::ZERO, whole: false },
                    "endless" => Script::Raw(429, vec![("retry-after", u64::MAX.to_string())], String::new()),
                    "patience" => Script::Raw(429, vec![("retry-after", "0".into())], String::new()),
                    status => Script::Raw(status.parse().unwrap(), vec![], String::new()),
                }
            }
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        for message in ["500", "503", "patience"] {
            times.store(0, Ordering::SeqCst);
            assert_eq!(server.say(&server.session(json!({})).await, message).await, "at last", "{message}");
            assert_eq!(times.load(Ordering::SeqCst), 2, "{message}");
        }
        times.store(0, Ordering::SeqCst);
        let heard = server.stream(&server.session(json!({})).await, "cut").await.all().await;
        assert_eq!(heard.last().unwrap().name, "error");
        // A wait beyond all reason is none.
        times.store(0, Ordering::SeqCst);
        server.chat(&server.session(json!({})).await, "endless").await.refused(503, "UPSTREAM_UNAVAILABLE");
        for message in ["400", "401"] {
            times.store(0, Ordering::SeqCst);
            server.chat(&server.session(json!({})).await, message).await.refused(502, "UPSTREAM_ERROR");
            assert_eq!(times.load(Ordering::SeqCst), 1, "{message}");
        }
    }

    async fn further_models_are_asked_where_the_first_cannot_answer(database: Database) {
        let upstream = Upstream::start_by_model(|model, _| match model {
            "scripted" => Script::Raw(500, vec![], String::new()),
            "hanging" => Script::Hang,
            other => Script::Say(format!("this is {other}")),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            config.chat.model_timeout = Duration::from_secs(6);
            let ModelConfig::Server { fallback, .. } = &mut config.model else { unreachable!() };
            *fallback = vec!["hanging".into(), "third".into()];
        })
        .await;
        let session = server.session(json!({})).await;
        assert_eq!(server.say(&session, "hi").await, "this is third");
        // Whoever names a model wants that one.
        let body = json!({"session_id": session, "message": "hi", "model": "fourth"});
        assert_eq!(server.post("/chat", body).await.data()["response"], "this is fourth");
    }

    async fn a_server_that_keeps_failing_is_left_alone(database: Database) {
        let upstream = Upstream::start(|_| Script::Raw(500, vec![], String::new())).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        // How a model fares that a chat has named says nothing of the server's own.
        for _ in 0..2 {
            let body = json!({"session_id": session, "message": "hi", "model": "another"});
            server.post("/chat", body).await.refused(502, "UPSTREAM_ERROR");
        }
        let others = upstream.asked().len();
        for _ in 0..2 {
            server.chat(&session, "hi").await;
        }
        let asked = upstream.asked().len();
        assert_eq!(asked - others, 5);
        let refusal = server.chat(&session, "hi").await;
        refusal.refused(503, "UPSTREAM_UNAVAILABLE");
        let wait: u64 = refusal.headers["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1..=10).contains(&wait), "{wait}");
        assert_eq!(upstream.asked().len(), asked);
    }

    async fn calls_at_once_are_limited_and_so_are_those_that_wait(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            let ModelConfig::Server { concurrency, .. } = &mut config.model else { unreachable!() };
            *concurrency = 2;
        })
        .await;
        let chats: Vec<_> = (0..12).map(|_| {
            let client = server.client.clone();
            tokio::spawn(async move { client.post("/chat", json!({"message": "hi"})).await })
        }).collect();
        // Two run and eight wait; the others are refused.
        while server.count("SELECT COUNT(*) FROM turns WHERE status = 'failed'").await < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(upstream.asked().len(), 2);
        gate.add_permits(10);
        let mut statuses = Vec::new();
        for chat in chats {
            let answer = chat.await.unwrap();
            if answer.status != 200 {
                answer.refused(503, "OVERLOADED");
                assert!(answer.headers.contains_key("retry-after"));
            }
            statuses.push(answer.status);
        }
        statuses.sort_unstable();
        assert_eq!(statuses, [[200; 10].as_slice(), &[503; 2]].concat());
    }

    async fn what_a_database_cannot_keep_is_cut_out_of_an_answer(database: Database) {
        let (server, session) = chat_with(database.kind, |_| Script::Say("a\u{0}b \u{1F600}".into())).await;
        assert_eq!(server.say(&session, "hi").await, "ab \u{1F600}");
    }
}

/// Anthropic's messages API, as far as we speak it.
async fn anthropic(kind: Kind) -> (Server, Arc<Mutex<Vec<(Value, Value)>>>) {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let endpoint = make({
        let asked = asked.clone();
        move |mut request: Request| {
            let asked = asked.clone();
            async move {
                let headers = json!([request.header("x-api-key"), request.header("anthropic-version")]);
                let body: Value = request.take_body().into_json().await?;
                let stream = body["stream"] == true;
                let last = body["messages"].as_array().unwrap().last().unwrap()["content"].clone();
                asked.lock().unwrap().push((headers, body));
                let event = |name: &str, data: Value| format!("event: {name}\ndata: {data}\n\n");
                Ok::<_, poem::Error>(match (last.as_str().unwrap(), stream) {
                    ("overloaded", _) => Response::builder()
                        .status(StatusCode::from_u16(429).unwrap())
                        .header("retry-after", "600")
                        .body(json!({"type": "error", "error": {"type": "overloaded_error", "message": "Slow down"}}).to_string()),
                    (_, false) => Response::builder().content_type("application/json").body(json!({
                        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x",
                        "content": [{"type": "text", "text": "Hello "}, {"type": "text", "text": "there"}],
                        "stop_reason": "end_turn", "usage": {"input_tokens": 11, "output_tokens": 4}
                    }).to_string()),
                    (_, true) => Response::builder().content_type("text/event-stream").body([
                        event("message_start", json!({"type": "message_start", "message": {
                            "model": "claude-x", "content": [], "usage": {"input_tokens": 11, "output_tokens": 1}}})),
                        event("content_block_start", json!({"type": "content_block_start", "index": 0})),
                        event("ping", json!({"type": "ping"})),
                        event("content_block_delta", json!({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "Hello "}})),
                        event("content_block_delta", json!({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "there"}})),
                        event("message_delta", json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 4}})),
                        event("message_stop", json!({"type": "message_stop"})),
                    ].concat()),
                })
            }
        }
    });
    let acceptor = TcpListener::bind("127.0.0.1:0").into_acceptor().await.unwrap();
    let address = acceptor.local_addr()[0].as_socket_addr().unwrap().to_string();
    let routes = Route::new().at("/v1/messages", post(endpoint.boxed()));
    tokio::spawn(poem::Server::new_with_acceptor(acceptor).run(routes.map_to_response()));
    let server = Server::with_model(kind, &format!("http://{address}/v1"), |config| {
        let ModelConfig::Server { provider, model, .. } = &mut config.model else { unreachable!() };
        (*provider, *model) = (Provider::Anthropic, "claude".into());
    })
    .await;
    (server, asked)
}

on_both! {
    async fn anthropics_api_is_spoken_in_both_ways(database: Database) {
        let (server, asked) = anthropic(database.kind).await;
        let session = server.session(json!({"system_prompt": "Be brief."})).await;
        let answer = server.chat(&session, "one").await;
        let data = answer.data();
        assert_eq!((&data["response"], &data["model"]), (&json!("Hello there"), &json!("claude-x")));
        assert_eq!(data["usage"], json!({"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15}));
        let events = server.stream(&session, "two").await.all().await;
        let done = &events.last().unwrap().data;
        assert_eq!((&done["response"], &done["usage"]), (&data["response"], &data["usage"]));
        let (headers, body) = asked.lock().unwrap()[1].clone();
        assert_eq!(headers, json!(["sk-test-key-of-ours", "2023-06-01"]));
        assert_eq!(body, json!({
            "model": "claude", "system": "Be brief.", "max_tokens": 4096, "stream": true,
            "messages": [
                {"role": "user", "content": "one"}, {"role": "assistant", "content": "Hello there"},
                {"role": "user", "content": "two"}
            ]
        }));
        // Ten minutes of patience are more than there is time for.
        let refusal = server.chat(&session, "overloaded").await;
        assert!(refusal.refused(503, "UPSTREAM_UNAVAILABLE").contains("Slow down"));
        assert_eq!(refusal.headers["retry-after"], "600");
    }
}
