//! Every failure, whoever raises it, has the contract's shape.

use reqwest::{Method, header};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{Database, Server, on_both};

/// Sends bytes as they are; what comes until the server closes the connection, as text.
pub async fn raw(server: &Server, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
    let mut answer = Vec::new();
    // A server that does not read all of it closes the connection meanwhile.
    let _ = stream.write_all(bytes).await;
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

on_both! {
    async fn an_unknown_route_is_not_found(server: Server) {
        for path in ["", "/nope", "/sessions/", "/sessions/a/b", "/chat/x", "/sessions/session_0000000000000000/turns/1/x"] {
            server.get(path).await.refused(404, "NOT_FOUND");
            server.post(path, json!({})).await.refused(404, "NOT_FOUND");
        }
        let elsewhere = server.http.get(format!("{}/nothing/here", server.base));
        server.send(elsewhere).await.refused(404, "NOT_FOUND");
    }

    async fn a_wrong_method_is_refused_with_those_that_are_allowed(server: Server) {
        let cases = [
            (Method::PUT, "/sessions", "GET, HEAD, POST"),
            (Method::DELETE, "/sessions", "GET, HEAD, POST"),
            (Method::POST, "/sessions/session_0000000000000000", "DELETE, GET, HEAD, PATCH"),
            (Method::GET, "/chat", "POST"),
            (Method::HEAD, "/chat", "POST"),
            (Method::OPTIONS, "/chat", "POST"),
            (Method::POST, "/health", "GET, HEAD"),
            (Method::DELETE, "/docs", "GET, HEAD"),
        ];
        for (method, path, allowed) in cases {
            let refusal = server.send(server.request(method.clone(), path)).await;
            assert_eq!(refusal.status, 405, "{method} {path}");
            assert_eq!(refusal.headers["allow"], allowed, "{method} {path}");
            if method != Method::HEAD {
                refusal.refused(405, "METHOD_NOT_ALLOWED");
            }
        }
    }

    async fn a_head_request_answers_as_get_does_without_a_body(server: Server) {
        let session = server.session(json!({})).await;
        let there = server.send(server.request(Method::HEAD, &format!("/sessions/{session}"))).await;
        assert_eq!((there.status, there.body), (200, json!("")));
        let missing = server.send(server.request(Method::HEAD, "/sessions/x")).await;
        assert_eq!((missing.status, missing.body), (404, json!("")));
    }

    async fn a_body_that_is_no_json_is_told_apart_from_one_that_does_not_fit(server: Server) {
        let session = server.session(json!({})).await;
        let post = |path: &str, body: &'static [u8]| {
            let method = if path == "/chat" || path == "/sessions" { Method::POST } else { Method::PATCH };
            let request = server.request(method, path).header(header::CONTENT_TYPE, "application/json");
            server.send(request.body(body))
        };
        let change = format!("/sessions/{session}");
        for path in ["/sessions", "/chat", change.as_str()] {
            for body in [&b"{"[..], b"nope", b"{\"message\": \"\xff\"}", b"{} {}", b"{\"a\": 1e999}", b"{\"a\": \"\\ud800\"}"] {
                post(path, body).await.refused(400, "INVALID_JSON");
            }
            for body in [&b"[]"[..], b"null", b"5", b"\"text\""] {
                post(path, body).await.refused(400, "VALIDATION_ERROR");
            }
        }
        for path in ["/chat", change.as_str()] {
            post(path, b"").await.refused(400, "INVALID_JSON");
        }
    }

    async fn nesting_deeper_than_32_is_refused(server: Server) {
        let nested = |depth: usize| format!("{{\"metadata\":{}{}}}", "{\"a\":".repeat(depth - 1) + "{}", "}".repeat(depth - 1));
        let post = |body: String| {
            let request = server.request(Method::POST, "/sessions").header(header::CONTENT_TYPE, "application/json");
            server.send(request.body(body))
        };
        assert_eq!(post(nested(31)).await.status, 201);
        post(nested(32)).await.refused(400, "VALIDATION_ERROR");
        post("[".repeat(500_000)).await.refused(400, "VALIDATION_ERROR");
        let deep = format!("{}1{}", "[".repeat(40), "]".repeat(40));
        server.get_with("/sessions", "metadata", &deep).await.refused(400, "VALIDATION_ERROR");
    }

    async fn a_wrong_media_type_is_refused(server: Server) {
        let post = |content_type: Option<&str>, body: &'static str| {
            let request = server.request(Method::POST, "/chat").body(body);
            server.send(match content_type {
                Some(value) => request.header(header::CONTENT_TYPE, value),
                None => request,
            })
        };
        for wrong in ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", "application/json; charset=latin1", ""] {
            post(Some(wrong), "{}").await.refused(400, "INVALID_CONTENT_TYPE");
        }
        post(None, "{}").await.refused(400, "INVALID_CONTENT_TYPE");
        for right in ["application/json", "Application/JSON ; charset=UTF-8", "application/json;charset=\"utf-8\""] {
            post(Some(right), "{\"message\": \"hi\"}").await.data();
        }
        let encoded = server.request(Method::POST, "/sessions").header(header::CONTENT_ENCODING, "gzip").json(&json!({}));
        server.send(encoded).await.refused(400, "INVALID_CONTENT_TYPE");
        let untyped = server.request(Method::POST, "/sessions").body("{}");
        server.send(untyped).await.refused(400, "INVALID_CONTENT_TYPE");
    }

    async fn a_parameter_that_does_not_parse_is_named(server: Server) {
        for (path, name) in [
            ("/sessions?limit=0", "limit"), ("/sessions?limit=101", "limit"), ("/sessions?limit=", "limit"),
            ("/sessions?is_active=maybe", "is_active"), ("/sessions?temporary=2", "temporary"),
            ("/sessions?order=size", "order"), ("/sessions?direction=up", "direction"),
            ("/sessions?user_id=", "user_id"), ("/sessions/continue", "user_id"),
            ("/sessions/continue?user_id=%00", "user_id"), ("/search?q=x&session_id=9", "session_id"),
        ] {
            let refusal = server.get(path).await;
            // What is wrong is told without the names of our types.
            assert!(!refusal.refused(400, "VALIDATION_ERROR").contains("parsing"), "{refusal:?}");
            assert_eq!(refusal.body["error"]["details"][0]["field"], name, "{refusal:?}");
        }
    }

    async fn the_media_type_is_checked_before_the_session_and_the_session_before_the_message(server: Server) {
        let chat = |body: &'static str, content_type: &'static str| {
            let request = server.request(Method::POST, "/chat").header(header::CONTENT_TYPE, content_type);
            server.send(request.body(body))
        };
        chat("{", "text/plain").await.refused(400, "INVALID_CONTENT_TYPE");
        chat("{", "application/json").await.refused(400, "INVALID_JSON");
        chat("{\"session_id\": \"x\", \"temperature\": 5, \"message\": \"\"}", "application/json").await
            .refused(400, "VALIDATION_ERROR");
        chat("{\"session_id\": \"x\", \"message\": \"\"}", "application/json").await.refused(404, "INVALID_SESSION");
        chat("{\"message\": \"\"}", "application/json").await.refused(400, "INVALID_REQUEST");
        // A path that names nothing is found out after a body that does not fit.
        server.patch("/sessions/x", json!({"title": 5})).await.refused(400, "VALIDATION_ERROR");
    }

    async fn a_body_over_the_limit_is_refused_and_the_connection_goes_on(database: Database) {
        let server = Server::with(database, |config| config.server.max_body_bytes = 2048).await;
        let body = |size: usize| json!({"message": "x".repeat(size)});
        let sent = json!({"message": ""}).to_string().len();
        server.post("/chat", body(2048 - sent)).await.data();
        server.post("/chat", body(2049 - sent)).await.refused(413, "PAYLOAD_TOO_LARGE");
        server.post("/chat", body(20_000)).await.refused(413, "PAYLOAD_TOO_LARGE");
        // Without a length, too.
        let chunks = futures_util::stream::iter((0..10).map(|_| Ok::<_, std::io::Error>("x".repeat(1000))));
        let request = server.request(Method::POST, "/chat").header(header::CONTENT_TYPE, "application/json");
        server.send(request.body(reqwest::Body::wrap_stream(chunks))).await.refused(413, "PAYLOAD_TOO_LARGE");
        assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 1);

        // The excess is read to its end, and the connection serves the next request.
        let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
        let head = "POST /api/v1/chat HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
                    content-length: 30000\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        stream.write_all(&vec![b'x'; 30_000]).await.unwrap();
        stream.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).await.unwrap();
        assert!(answers.starts_with("HTTP/1.1 413") && answers.contains("HTTP/1.1 200 OK"), "{answers}");
    }

    async fn a_request_id_is_taken_if_it_is_fit_and_made_if_not(server: Server) {
        let with = |id: &str| server.send(server.request(Method::GET, "/health").header("X-Request-ID", id));
        for fit in ["a", "A.b_c:d-9", &"x".repeat(128)] {
            assert_eq!(with(fit).await.headers["x-request-id"], fit);
        }
        for unfit in ["", "a b", "a/b", "ü", &"x".repeat(129)] {
            let answer = with(unfit).await;
            let made = answer.headers["x-request-id"].to_str().unwrap();
            assert!(made.starts_with("req_") && made.len() == 20, "{made}");
        }
    }

    async fn every_answer_carries_its_time_and_security_headers(server: Server) {
        for path in ["/health", "/nope", "/sessions?limit=0"] {
            let answer = server.get(path).await;
            let seconds: f64 = answer.headers["x-process-time"].to_str().unwrap().parse().unwrap();
            assert!((0.0..60.0).contains(&seconds));
            for (name, value) in [
                ("x-content-type-options", "nosniff"), ("x-frame-options", "DENY"), ("referrer-policy", "no-referrer"),
                ("content-security-policy", "default-src 'none'; frame-ancestors 'none'"), ("cache-control", "no-store"),
                ("content-type", "application/json"),
            ] {
                assert_eq!(answer.headers[name], value, "{path}");
            }
        }
    }

    async fn a_database_that_is_gone_is_told_without_its_secrets(server: Server) {
        let session = server.session(json!({})).await;
        server.app.store.database().close().await;
        for refusal in [
            server.get(&format!("/sessions/{session}")).await,
            server.post("/sessions", json!({})).await,
            server.chat(&session, "hi").await,
        ] {
            refusal.refused(503, "DATABASE_UNAVAILABLE");
            assert!(refusal.headers.contains_key("retry-after"));
        }
        let ready = server.http.get(format!("{}/readyz", server.base));
        server.send(ready).await.refused(503, "DATABASE_UNAVAILABLE");
        let health = server.get("/health").await;
        assert_eq!((health.status, &health.body["status"]), (503, &json!("unhealthy")));
        assert_eq!(health.body["database"]["status"], "unavailable");
    }

    async fn what_is_no_http_ends_its_connection_only(server: Server) {
        let answer = raw(&server, b"NOT HTTP AT ALL\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 400"), "{answer}");
        let huge = format!("GET / HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(200_000));
        let answer = raw(&server, huge.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.1 431"), "{answer}");
        assert_eq!(server.get("/health").await.status, 200);
    }
}
