//! Clients that send nothing, half of something or read nothing, too many at once, and what is refused then.

use std::{sync::Arc, time::Duration};

use atlus::{server::ServerSettings, store::Kind};
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpSocket, TcpStream},
    process::Command,
    sync::Semaphore,
};

use crate::{
    harness::{Client, Database, Process, Server},
    models::{Script, Upstream},
};

const SHORT: Duration = Duration::from_millis(200);

async fn server(change: impl FnOnce(&mut ServerSettings)) -> Server {
    Server::with(Database::on(Kind::Sqlite).await, |config| change(&mut config.server)).await
}

/// A connection on which nothing was said so far.
async fn silent(server: &Client) -> TcpStream {
    TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap()
}

/// Everything that comes until the server closes the connection.
async fn rest(mut stream: TcpStream) -> String {
    let mut answer = Vec::new();
    // Closing on what was not read is a reset.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8(answer).unwrap()
}

const GET: &[u8] = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n";

/// A request whose body the server waits for.
async fn half_sent(server: &Client, body: &str) -> TcpStream {
    expected(server, "/sessions", "application/json", body.len()).await
}

async fn expected(server: &Client, path: &str, content_type: &str, length: usize) -> TcpStream {
    let mut stream = silent(server).await;
    let head = format!(
        "POST /api/v1{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {content_type}\r\n\
         connection: close\r\nexpect: 100-continue\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    let mut answer = [0; 25];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream
}

async fn finish(mut stream: TcpStream, body: &str) {
    stream.write_all(body.as_bytes()).await.unwrap();
    let answer = rest(stream).await;
    assert!(answer.starts_with("HTTP/1.1 201"), "{answer}");
}

#[tokio::test]
async fn a_client_that_begins_no_request_or_does_not_end_its_head_is_dropped() {
    let server = server(|settings| settings.head_timeout = SHORT).await;
    assert_eq!(rest(silent(&server).await).await, "");
    let mut half = silent(&server).await;
    half.write_all(b"GET /livez HTTP/1.1\r\nhost: loc").await.unwrap();
    assert_eq!(rest(half).await, "");
    let mut second = silent(&server).await;
    second.write_all(GET).await.unwrap();
    second.read_u8().await.unwrap();
    second.write_all(b"GET /livez HTTP/1.1").await.unwrap();
    assert_eq!(rest(second).await.matches("200 OK").count(), 1);
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let server = server(|settings| settings.idle_timeout = SHORT).await;
    let mut stream = silent(&server).await;
    stream.write_all(GET).await.unwrap();
    assert!(rest(stream).await.starts_with("HTTP/1.1 200"));
}

#[tokio::test]
async fn a_client_that_reads_nothing_loses_its_place() {
    let server = server(|settings| {
        (settings.write_timeout, settings.max_connections) = (SHORT, 1);
    })
    .await;
    let session = server.session(json!({})).await;
    let turn = json!({"message": "hi", "response": "x".repeat(900_000)});
    assert_eq!(
        server.post(&format!("/sessions/{session}/turns"), json!({"turns": [turn]})).await.status,
        201
    );

    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4096).unwrap();
    let address = server.base.strip_prefix("http://").unwrap().parse().unwrap();
    let mut deaf = socket.connect(address).await.unwrap();
    let export = format!("GET /api/v1/sessions/{session}/export HTTP/1.1\r\nhost: localhost\r\n\r\n");
    deaf.write_all(export.repeat(20).as_bytes()).await.unwrap();
    deaf.read_u8().await.unwrap();
    // The one place is taken by a request under way until its client has been given up.
    while !matches!(server.http.get(format!("{}/livez", server.base)).send().await, Ok(a) if a.status() == 200)
    {
    }
    drop(deaf);
}

#[tokio::test]
async fn a_silent_stream_outlives_every_time_limit_of_a_connection() {
    let gate = Arc::new(Semaphore::new(0));
    let upstream = Upstream::gated(|_| Script::Say("worth waiting for".into()), gate.clone()).await;
    let server = Server::with_model(Kind::Sqlite, &upstream.url, |config| {
        let server = &mut config.server;
        (server.head_timeout, server.idle_timeout, server.write_timeout) = (SHORT, SHORT, SHORT);
    })
    .await;
    let session = server.session(json!({})).await;
    let mut events = server.stream(&session, "hi").await;
    assert_eq!(events.next().await.unwrap().name, "start");
    // Others are dropped meanwhile, one after the other.
    for _ in 0..3 {
        assert_eq!(rest(silent(&server).await).await, "");
    }
    gate.add_permits(1);
    assert_eq!(events.all().await.last().unwrap().name, "done");
}

#[tokio::test]
async fn silent_clients_keep_nobody_out() {
    let server = server(|settings| settings.max_connections = 3).await;
    let mut silent_ones = Vec::new();
    for _ in 0..20 {
        silent_ones.push(silent(&server).await);
        let health = server.http.get(format!("{}/livez", server.base)).header(header::CONNECTION, "close");
        assert_eq!(health.send().await.unwrap().status(), StatusCode::OK);
    }
    // Whoever waited longest made room.
    assert_eq!(rest(silent_ones.remove(0)).await, "");
}

#[tokio::test]
async fn where_every_connection_is_at_work_a_newcomer_is_told_so() {
    let server = server(|settings| settings.max_connections = 1).await;
    let working = half_sent(&server, "{}").await;
    let answer = rest(silent(&server).await).await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 503") && head.contains("retry-after: 1"), "{answer}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!((&body["success"], &body["error"]["code"]), (&json!(false), &json!("OVERLOADED")));
    finish(working, "{}").await;
    while server.http.get(format!("{}/livez", server.base)).send().await.is_err() {}
}

#[tokio::test]
async fn one_client_has_no_more_connections_than_one_may() {
    let server = server(|settings| {
        (settings.uncounted_peers, settings.max_connections_per_client) = (Vec::new(), 2);
    })
    .await;
    let (first, _second) = (silent(&server).await, silent(&server).await);
    assert!(rest(silent(&server).await).await.starts_with("HTTP/1.1 503"));
    drop(first);
    while server.http.get(format!("{}/livez", server.base)).send().await.is_err() {}
}

#[tokio::test]
async fn more_requests_than_may_be_under_way_are_refused_and_health_is_told_all_the_same() {
    let server = server(|settings| settings.max_requests = 1).await;
    let under_way = half_sent(&server, "{}").await;
    let refused = server.post("/sessions", json!({})).await;
    refused.refused(503, "OVERLOADED");
    assert_eq!(refused.headers["retry-after"], "1");
    server.get("/nope").await.refused(503, "OVERLOADED");
    assert_eq!(server.get("/health").await.status, 200);
    for path in ["/livez", "/readyz"] {
        assert_eq!(server.http.get(format!("{}{path}", server.base)).send().await.unwrap().status(), 200);
    }
    finish(under_way, "{}").await;
    server.session(json!({})).await;
}

#[tokio::test]
async fn a_refusal_comes_before_the_body() {
    let server = server(|settings| settings.max_requests = 1).await;
    let _under_way = half_sent(&server, "{}").await;
    let mut stream = silent(&server).await;
    let head = "POST /api/v1/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                content-length: 1000000\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    assert!(rest(stream).await.starts_with("HTTP/1.1 503"));
    // Whoever sends the body all the same gets to read that, too.
    let mut stream = silent(&server).await;
    stream.write_all(format!("{head}{}", "x".repeat(1_000_000)).as_bytes()).await.unwrap();
    assert!(rest(stream).await.starts_with("HTTP/1.1 503"));
}

#[tokio::test]
async fn chats_that_wait_for_their_model_and_streams_are_not_counted() {
    let gate = Arc::new(Semaphore::new(0));
    let upstream = Upstream::gated(|_| Script::Say("at last".into()), gate.clone()).await;
    let server =
        Server::with_model(Kind::Sqlite, &upstream.url, |config| config.server.max_requests = 1).await;
    let session = server.session(json!({})).await;
    let chat = tokio::spawn({
        let (client, session) = (server.client.clone(), session.clone());
        async move { client.say(&session, "hi").await }
    });
    upstream.asked_times(1).await;
    assert_eq!(server.get("/sessions").await.status, 200);
    gate.add_permits(1);
    assert_eq!(chat.await.unwrap(), "at last");

    let events = server.stream(&session, "hi").await;
    assert_eq!(server.get("/sessions").await.status, 200);
    gate.add_permits(1);
    assert_eq!(events.all().await.last().unwrap().name, "done");
}

#[tokio::test]
async fn all_bodies_together_have_a_limit() {
    let server = server(|settings| settings.max_bodies_bytes = 1000).await;
    let body = json!({"title": "x".repeat(190), "system_prompt": "y".repeat(590)}).to_string();
    let small = json!({"title": "x".repeat(180)});
    let (most, last) = body.split_at(body.len() - 1);
    let mut half = half_sent(&server, &body).await;
    half.write_all(most.as_bytes()).await.unwrap();
    // It is refused once the server has read what was sent.
    loop {
        let answer = server.post("/sessions", small.clone()).await;
        if answer.status == 503 {
            answer.refused(503, "OVERLOADED");
            break;
        }
    }
    assert_eq!(server.get("/sessions").await.status, 200);
    finish(half, last).await;
    server.session(small).await;
}

#[tokio::test]
async fn a_message_counts_among_the_bodies_until_it_is_answered() {
    let gate = Arc::new(Semaphore::new(0));
    let upstream = Upstream::gated(|_| Script::Say("at last".into()), gate.clone()).await;
    let server =
        Server::with_model(Kind::Sqlite, &upstream.url, |config| config.server.max_bodies_bytes = 1000).await;
    let session = server.session(json!({})).await;
    // Its client leaves, and it is worked on all the same.
    let impatient = server.request(Method::POST, "/chat").timeout(SHORT);
    let message = json!({"session_id": session, "message": "x".repeat(800)});
    assert!(impatient.json(&message).send().await.is_err());
    upstream.asked_times(1).await;
    let title = json!({"title": "x".repeat(190)});
    server.post("/sessions", title.clone()).await.refused(503, "OVERLOADED");
    gate.add_permits(1);
    while server.post("/sessions", title.clone()).await.status == 503 {}
}

#[tokio::test]
async fn more_imports_than_may_run_at_once_are_refused() {
    let server = server(|_| {}).await;
    let archive =
        || server.request(Method::POST, "/import").header(header::CONTENT_TYPE, "application/x-ndjson");
    let mut running = Vec::new();
    for _ in 0..8 {
        running.push(expected(&server, "/import", "application/x-ndjson", 1000).await);
    }
    server.send(archive().body("{}\n")).await.refused(503, "OVERLOADED");
    drop(running.pop());
    while server.send(archive().body("{}\n")).await.status == 503 {}
}

#[tokio::test]
async fn a_limit_of_open_files_that_is_too_low_is_raised_or_told() {
    let database = Database::on(Kind::Sqlite).await;
    let limited = |limits: &str| {
        let mut shell = Command::new("sh");
        let script = format!("ulimit {limits} && exec {}", env!("CARGO_BIN_EXE_atlus"));
        shell.args(["-c", &script]).env("ATLUS_MAX_CONNECTIONS", "50").kill_on_drop(true);
        Process::of(shell, &database)
    };
    let mut server = limited("-Sn 120");
    server.line("the limit of open files is now 166; it was 120").await;
    server.listening().await;
    let mut server = limited("-n 150");
    server.line("only 150 files may be open, which is room for 34 connections and not for 50").await;
    server.listening().await;
}
