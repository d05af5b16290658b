//! Answers heard while they come: events, broken connections, other servers, cancelling.

use std::{sync::Arc, time::Duration};

use atlus::{
    domain::{caller::Caller, ids::SessionId},
    store::{Kind, db::Reach},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use crate::{
    harness::{Database, Heard, Server, on_both, scripted, text_of},
    models::{Script, Upstream},
};

fn echo(message: &str) -> Script {
    Script::Say(format!("You said: {message}"))
}

/// An answer of many small pieces, some of several bytes to a character.
fn slowly(pieces: usize, pause: u64) -> impl Fn(&str) -> Script + Send + Sync {
    move |_| Script::Stream {
        pieces: (0..pieces).map(|i| format!("pièce {i} \u{1F600} ")).collect(),
        pause: Duration::from_millis(pause),
        whole: true,
    }
}

fn names(events: &[Heard]) -> Vec<&str> {
    let mut names: Vec<_> = events.iter().map(|event| event.name.as_str()).collect();
    names.dedup();
    names
}

/// On SQLite no read waits for a write.
#[tokio::test]
async fn a_message_is_admitted_while_its_context_cannot_be_read() {
    let server = Server::on(Kind::Postgres).await;
    let session = server.session(json!({})).await;
    let (store, id) = (server.app.store.clone(), SessionId::parse(&session).unwrap());
    let mut held = store.database().begin(Reach::Everybody).await.unwrap();
    held.sql("LOCK TABLE session_memory").run().await.unwrap();
    // Gives up before any read that begins later.
    let read = tokio::spawn(async move { store.next_context(&Caller::ANYONE, id, 100).await });
    tokio::select! {
        start = async { server.stream(&session, "hi").await.next().await } => assert_eq!(start.unwrap().name, "start"),
        read = read => panic!("the read came first: {read:?}"),
    }
    held.rollback().await.unwrap();
}

on_both! {
    async fn a_stream_says_what_a_chat_answers(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "My name is John").await;
        let events = server.stream(&session, "What's my name?").await.all().await;
        assert_eq!(names(&events), ["start", "delta", "done"]);
        let (start, done) = (&events[0], events.last().unwrap());
        assert_eq!(start.data["session_id"], session.as_str());
        assert_eq!((&start.data["turn"], &start.data["model"]), (&json!(2), &json!("builtin")));
        assert_eq!(text_of(&events), "Your name is John.");
        assert_eq!(done.data["response"], "Your name is John.");
        assert_eq!(done.id, "18");
        // What is done is stored, and equal.
        let turn = server.get(&format!("/sessions/{session}/turns/2")).await;
        for field in ["response", "turn", "request_id", "execution_time", "usage", "model"] {
            assert_eq!(turn.data()[field], done.data[field], "{field}");
        }
    }

    async fn ids_are_offsets_in_bytes(database: Database) {
        let upstream = Upstream::start(slowly(5, 5)).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let events = server.stream(&server.session(json!({})).await, "go").await.all().await;
        let mut offset = 0;
        for event in &events {
            offset += event.data["text"].as_str().map_or(0, str::len);
            assert_eq!(event.id, offset.to_string());
        }
        let done = events.last().unwrap();
        assert_eq!(text_of(&events), done.data["response"].as_str().unwrap());
        assert_eq!(done.data["usage"], json!({"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}));
        assert_eq!(upstream.asked()[0].1["stream"], true);
    }

    async fn what_fails_before_the_turn_is_an_ordinary_failure(server: Server) {
        let post = |body: Value| server.send(server.request(Method::POST, "/chat/stream").json(&body));
        post(json!({"message": ""})).await.refused(400, "INVALID_REQUEST");
        post(json!({"message": 5})).await.refused(400, "VALIDATION_ERROR");
        post(json!({"message": "hi", "session_id": "x"})).await.refused(404, "INVALID_SESSION");
    }

    async fn what_fails_later_is_an_event_and_a_failed_turn(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "cut" => Script::Stream { pieces: vec!["half a ".into()], pause: Duration::ZERO, whole: false },
            "html" => Script::Raw(200, vec![("content-type", "text/html".into())], "<html>".into()),
            "garbage" => Script::Raw(200, vec![("content-type", "text/event-stream".into())], "data: {nope\n\n".into()),
            "nothing" => Script::Stream { pieces: vec![], pause: Duration::ZERO, whole: true },
            "too long" => {
                Script::Stream { pieces: vec!["x".repeat(100_000); 100], pause: Duration::ZERO, whole: true }
            }
            "drip" => Script::Stream {
                pieces: vec!["x".into(); 1000], pause: Duration::from_millis(100), whole: true,
            },
            "refused" => Script::Raw(400, vec![], json!({"error": {"message": "no such thing"}}).to_string()),
            other => echo(other),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |config| {
            config.chat.model_timeout = Duration::from_secs(8);
        })
        .await;
        let session = server.session(json!({})).await;
        let cases = [
            ("cut", "UPSTREAM_ERROR"), ("html", "UPSTREAM_ERROR"), ("garbage", "UPSTREAM_ERROR"),
            ("nothing", "UPSTREAM_ERROR"), ("too long", "UPSTREAM_ERROR"), ("drip", "UPSTREAM_TIMEOUT"),
            ("refused", "UPSTREAM_ERROR"),
        ];
        for (turn, (message, code)) in (1..).zip(cases) {
            let events = server.stream(&session, message).await.all().await;
            assert_eq!(events[0].name, "start");
            let failure = events.last().unwrap();
            assert_eq!((failure.name.as_str(), &failure.data["error"]["code"]), ("error", &json!(code)), "{message}");
            let record = server.get(&format!("/sessions/{session}/turns/{turn}")).await;
            assert_eq!(record.data()["status"], "failed", "{message}");
            assert_eq!(record.data()["response"], Value::Null);
            assert_eq!(record.data()["error"]["code"], code);
        }
        assert_eq!(server.say(&session, "fine").await, "You said: fine");
        let prompts = upstream.prompts();
        assert_eq!(prompts.last().unwrap().len(), 2);
        assert_eq!(server.count("SELECT COUNT(*) FROM turn_pieces").await, 0);
    }

    async fn a_stream_that_breaks_after_any_event_is_resumed_without_loss(database: Database) {
        let upstream = Upstream::start(slowly(6, 10)).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        for k in 1..=8 {
            let session = server.session(json!({})).await;
            let mut events = server.stream(&session, "go").await;
            let mut heard = Vec::new();
            for _ in 0..k {
                heard.extend(events.next().await);
            }
            drop(events);
            let last = heard.last().unwrap().id.clone();
            let rest = server.resume(&session, 1, Some(&last)).await.all().await;
            assert_eq!(rest.last().unwrap().name, "done", "{k}");
            let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
            assert_eq!(turn.data()["status"], "completed");
            let text = text_of(&heard) + &text_of(&rest);
            assert_eq!(text, turn.data()["response"].as_str().unwrap(), "{k}");
        }
    }

    async fn a_turn_that_has_ended_is_streamed_from_its_record(server: Server) {
        let session = server.session(json!({})).await;
        let answer = server.chat(&session, "Hello").await;
        let whole = answer.data()["response"].as_str().unwrap();
        let events = server.resume(&session, 1, None).await.all().await;
        assert_eq!(names(&events), ["start", "delta", "done"]);
        assert_eq!(text_of(&events), whole);
        assert_eq!(events.last().unwrap().data, *answer.data());
        let rest = server.resume(&session, 1, Some("5")).await.all().await;
        assert_eq!(text_of(&rest), &whole[5..]);
        let nothing = server.resume(&session, 1, Some(&whole.len().to_string())).await.all().await;
        assert_eq!(names(&nothing), ["done"]);
    }

    async fn a_stream_that_cannot_be_resumed_is_refused(server: Server) {
        let session = server.session(json!({})).await;
        server.say(&session, "Hello").await;
        let at = |path: String, last: &'static str| {
            server.send(server.request(Method::GET, &path).header("Last-Event-ID", last))
        };
        for wrong in ["9999", "-1", "x", ""] {
            at(format!("/sessions/{session}/turns/1/stream"), wrong).await.refused(400, "VALIDATION_ERROR");
        }
        at(format!("/sessions/{session}/turns/2/stream"), "0").await.refused(404, "TURN_NOT_FOUND");
        at(format!("/sessions/{session}/turns/x/stream"), "0").await.refused(404, "TURN_NOT_FOUND");
        at("/sessions/session_0000000000000000/turns/1/stream".into(), "0").await.refused(404, "SESSION_NOT_FOUND");
    }

    async fn a_stream_is_resumed_at_another_server_while_it_comes(database: Database) {
        let upstream = Upstream::start(slowly(40, 60)).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let other = Server::beside(server.database.clone(), |config| config.model = scripted(&upstream.url)).await;
        let session = server.session(json!({})).await;
        let mut events = server.stream(&session, "go").await;
        events.next().await.unwrap();
        let first = events.next().await.unwrap();
        drop(events);
        let mut elsewhere = other.resume(&session, 1, Some(&first.id)).await;
        let mut rest = vec![elsewhere.next().await.unwrap()];
        // It was heard before the turn had ended.
        let turn = other.get(&format!("/sessions/{session}/turns/1")).await;
        assert_eq!((&turn.data()["status"], rest[0].name.as_str()), (&json!("running"), "delta"));
        rest.extend(elsewhere.all().await);
        assert_eq!(rest.last().unwrap().name, "done");
        let turn = server.get(&format!("/sessions/{session}/turns/1")).await;
        let text = first.data["text"].as_str().unwrap().to_owned() + &text_of(&rest);
        assert_eq!(text, turn.data()["response"].as_str().unwrap());
        assert_eq!(server.count("SELECT COUNT(*) FROM turn_pieces").await, 0);
    }

    async fn cancelling_a_turn_ends_its_call_and_tells_its_caller(database: Database) {
        let upstream = Upstream::start(slowly(10_000, 10)).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let mut events = server.stream(&session, "go").await;
        events.next().await.unwrap();
        events.next().await.unwrap();
        let cancelled = server.send(server.request(Method::POST, &format!("/sessions/{session}/turns/1/cancel"))).await;
        assert_eq!(cancelled.data()["status"], "cancelled");
        assert_eq!(cancelled.data()["error"]["code"], "TURN_CANCELLED");
        let took = upstream.left_times(1).await;
        assert!(took < Duration::from_millis(100), "{took:?}");
        let end = events.all().await.pop().unwrap();
        assert_eq!((end.name.as_str(), &end.data["error"]["code"]), ("error", &json!("TURN_CANCELLED")));

        let again = server.send(server.request(Method::POST, &format!("/sessions/{session}/turns/1/cancel"))).await;
        again.refused(409, "TURN_NOT_RUNNING");
        let missing = server.send(server.request(Method::POST, &format!("/sessions/{session}/turns/9/cancel"))).await;
        missing.refused(404, "TURN_NOT_FOUND");
        let resumed = server.resume(&session, 1, None).await.all().await;
        assert_eq!(resumed.last().unwrap().data["error"]["code"], "TURN_CANCELLED");
        let read = server.get(&format!("/sessions/{session}")).await;
        assert_eq!(read.data()["memory"]["conversation_turns"], 0);
    }

    async fn deleting_a_session_ends_the_call_of_its_turn(database: Database) {
        let upstream = Upstream::start(slowly(10_000, 10)).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let mut events = server.stream(&session, "go").await;
        events.next().await.unwrap();
        events.next().await.unwrap();
        assert_eq!(server.delete(&format!("/sessions/{session}")).await.status, 200);
        upstream.left_times(1).await;
        let end = events.all().await.pop().unwrap();
        assert_eq!(end.data["error"]["code"], "INVALID_SESSION");
        assert_eq!(end.data["error"]["message"], format!("Invalid or inactive session: {session}"));
        assert_eq!(server.count("SELECT COUNT(*) FROM turn_pieces").await, 0);
    }

    async fn an_interrupting_message_cancels_the_running_turn_and_runs(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "slow" => Script::Stream { pieces: vec!["x ".into(); 10_000], pause: Duration::from_millis(10), whole: true },
            other => echo(other),
        })
        .await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let mut events = server.stream(&session, "slow").await;
        events.next().await.unwrap();
        events.next().await.unwrap();
        let body = json!({"session_id": session, "message": "stop", "on_busy": "interrupt"});
        let answer = server.post("/chat", body).await;
        assert_eq!((&answer.data()["turn"], &answer.data()["response"]), (&json!(2), &json!("You said: stop")));
        upstream.left_times(1).await;
        assert_eq!(events.all().await.pop().unwrap().data["error"]["code"], "TURN_CANCELLED");
        // The cancelled turn was not shown.
        assert_eq!(upstream.prompts()[1].len(), 2);
    }

    async fn a_message_that_does_not_want_to_wait_is_refused_at_once(database: Database) {
        let gate = Arc::new(Semaphore::new(0));
        let upstream = Upstream::gated(echo, gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let session = server.session(json!({})).await;
        let first = tokio::spawn({
            let (client, session) = (server.client.clone(), session.clone());
            async move { client.say(&session, "first").await }
        });
        upstream.asked_times(1).await;
        let other = Server::beside(server.database.clone(), |_| {}).await;
        for server in [&server, &other] {
            let body = json!({"session_id": session, "message": "second", "on_busy": "reject"});
            let refusal = server.post("/chat", body).await;
            refusal.refused(409, "SESSION_BUSY");
            assert_eq!(refusal.body["error"]["details"], json!([{"field": "turn", "message": "1"}]));
            assert!(refusal.headers.contains_key("retry-after"));
            // Whose session it is not hears nothing of its being busy.
            let stranger = json!({"session_id": session, "message": "x", "user_id": "nobody"});
            server.post("/chat", stranger).await.refused(404, "INVALID_SESSION");
        }
        gate.add_permits(1);
        first.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_turn_is_cancelled_from_another_server() {
    let database = Database::on(Kind::Postgres).await;
    let upstream = Upstream::start(slowly(10_000, 10)).await;
    let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
    let other = Server::beside(server.database.clone(), |_| {}).await;
    // Listening begins with the server, and is known to have begun once the database says so.
    let listening =
        "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'";
    while server.count(listening).await < 2 {
        tokio::task::yield_now().await;
    }
    let session = server.session(json!({})).await;
    let mut events = server.stream(&session, "go").await;
    events.next().await.unwrap();
    events.next().await.unwrap();
    let cancelled =
        other.send(other.request(Method::POST, &format!("/sessions/{session}/turns/1/cancel"))).await;
    assert_eq!(cancelled.data()["status"], "cancelled");
    let took = upstream.left_times(1).await;
    assert!(took < Duration::from_millis(100), "{took:?}");
    assert_eq!(events.all().await.pop().unwrap().data["error"]["code"], "TURN_CANCELLED");

    let mut events = server.stream(&session, "go").await;
    events.next().await.unwrap();
    events.next().await.unwrap();
    let body = json!({"session_id": session, "message": "hello", "on_busy": "interrupt"});
    assert_eq!(other.post("/chat", body).await.data()["turn"], 3);
    upstream.left_times(2).await;
    assert_eq!(events.all().await.pop().unwrap().data["error"]["code"], "TURN_CANCELLED");
}
