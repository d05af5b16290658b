//! What a web page can do with a server that needs no key, and what pages of named origins may.

use atlus::{config::Config, store::Kind};
use reqwest::{Method, Response, StatusCode, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::harness::{Client, Database, Process, Server};

async fn server(change: impl FnOnce(&mut Config)) -> Server {
    Server::with(Database::on(Kind::Sqlite).await, change).await
}

/// Sends a head as it is; the status, and the code of the failure if it is one.
async fn head(server: &Client, head: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
    stream.write_all(format!("{head}\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    (answer[9..12].parse().unwrap(), body["error"]["code"].as_str().unwrap_or_default().to_owned())
}

const SESSIONS: &str = "/api/v1/sessions";

#[tokio::test]
async fn without_keys_the_server_answers_by_local_names_only() {
    let server = server(|_| {}).await;
    let get = async |host: &str| head(&server, &format!("GET {SESSIONS} HTTP/1.1\r\nhost: {host}")).await.0;
    for local in [
        "localhost", "localhost:5000", "LocalHost:1", "localhost.", "localhost:", "127.0.0.1",
        "127.0.0.1:5000", "127.255.0.9", "[::1]", "[::1]:5000", "[0:0:0:0:0:0:0:1]", "[::ffff:127.0.0.1]",
    ] {
        assert_eq!(get(local).await, 200, "{local}");
    }
    for foreign in [
        "evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1.nip.io",
        "evil.localhost", "notlocalhost", "localhost@evil.example", "evil.example@localhost",
        "user:pass@127.0.0.1", "localhost:x", "localhost:99999", "localhost:5000:5000", "localhost/",
        "localhost, evil.example", "localhost evil.example", "localhost..", ".localhost", "0.0.0.0",
        "0.0.0.0:5000", "127.1", "0x7f.0.0.1", "0177.0.0.1", "2130706433", "127.0.0.01", "10.0.0.1",
        "169.254.169.254", "[::]", "::1", "[::1", "[::1]evil.example", "[::1%25lo]", "[::2]",
        "[::ffff:10.0.0.1]", "l\u{f6}calhost", "", ":5000", "*",
    ] {
        let refused = head(&server, &format!("GET {SESSIONS} HTTP/1.1\r\nhost: {foreign}")).await;
        assert_eq!(refused, (403, "FORBIDDEN".to_owned()), "{foreign}");
    }
}

#[tokio::test]
async fn a_host_that_is_missing_or_given_twice_is_no_request() {
    let server = server(|config| config.server.gate.open = false).await;
    for (request, status) in [
        ("GET /api/v1/sessions HTTP/1.1", 400),
        ("GET /api/v1/sessions HTTP/1.1\r\nhost: localhost\r\nhost: evil.example", 400),
        ("GET /api/v1/sessions HTTP/1.1\r\nhost: localhost\r\nhost: localhost", 400),
        ("GET /livez HTTP/1.1", 400),
        ("GET /livez HTTP/1.0", 200),
        ("GET /api/v1/sessions HTTP/1.0", 200),
    ] {
        assert_eq!(head(&server, request).await.0, status, "{request}");
    }
}

#[tokio::test]
async fn a_target_with_a_host_of_its_own_is_judged_by_both() {
    let server = server(|_| {}).await;
    for (request, status) in [
        ("GET http://localhost/api/v1/sessions HTTP/1.1\r\nhost: 127.0.0.1", 200),
        ("GET http://evil.example/api/v1/sessions HTTP/1.1\r\nhost: localhost", 403),
        ("GET http://localhost/api/v1/sessions HTTP/1.1\r\nhost: evil.example", 403),
        ("GET http://localhost@evil.example/api/v1/sessions HTTP/1.1\r\nhost: localhost", 403),
        ("GET //evil.example/api/v1/sessions HTTP/1.1\r\nhost: localhost", 404),
        ("GET /api/v1/sessions HTTP/1.0", 403),
        ("GET /api/v1/sessions HTTP/1.0\r\nhost: localhost", 200),
    ] {
        assert_eq!(head(&server, request).await.0, status, "{request}");
    }
}

#[tokio::test]
async fn probes_and_documents_answer_by_any_name() {
    let server = server(|_| {}).await;
    for path in ["/livez", "/readyz", "/api/v1/health", "/docs", "/openapi.json", "/openapi.yaml"] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: 10.1.2.3:5000");
        assert_eq!(head(&server, &request).await.0, 200, "{path}");
    }
    for path in ["/", "/api/v1/users/a", "/livez/../api/v1/sessions", "/livez/%2e%2e/api/v1/sessions"] {
        let request = format!("GET {path} HTTP/1.1\r\nhost: 10.1.2.3:5000");
        assert_eq!(head(&server, &request).await.0, 403, "{path}");
    }
}

#[tokio::test]
async fn hosts_that_a_setting_names_are_answered() {
    let named = server(|config| {
        config.server.gate.hosts =
            "Atlus.Example, 10.1.2.3, [2001:db8::1], ported.example:8080".parse().unwrap();
    })
    .await;
    for (host, status) in [
        ("atlus.example", 200),
        ("ATLUS.example.:99", 200),
        ("10.1.2.3:5000", 200),
        ("[2001:DB8:0::1]", 200),
        ("ported.example:8080", 200),
        ("ported.example", 403),
        ("ported.example:80", 403),
        ("localhost", 200),
        ("www.atlus.example", 403),
        ("atlus.example.evil.example", 403),
        ("10.1.2.4", 403),
    ] {
        assert_eq!(
            head(&named, &format!("GET {SESSIONS} HTTP/1.1\r\nhost: {host}")).await.0,
            status,
            "{host}"
        );
    }
    let any = server(|config| config.server.gate.hosts = "*".parse().unwrap()).await;
    assert_eq!(head(&any, &format!("GET {SESSIONS} HTTP/1.1\r\nhost: anything.example")).await.0, 200);
}

#[tokio::test]
async fn without_keys_pages_of_other_origins_change_nothing() {
    let server = server(|config| config.server.gate.origins = "https://app.example".parse().unwrap()).await;
    let origin = |origin: &str| {
        server
            .request(Method::POST, "/sessions")
            .header(header::HOST, "localhost:5000")
            .header(header::ORIGIN, origin)
    };
    for own in
        ["http://localhost:5000", "https://LOCALHOST:5000", "https://app.example", "https://app.example:443"]
    {
        assert_eq!(server.send(origin(own)).await.status, 201, "{own}");
    }
    for foreign in [
        "null", "https://evil.example", "http://localhost", "http://localhost:3000", "http://127.0.0.1:5000",
        "http://localhost:5000.evil.example", "http://localhost:5000@evil.example", "http://app.example",
        "https://app.example:8443", "https://www.app.example", "https://app.example.evil.example",
        "localhost:5000", "file://", "capacitor://localhost:5000", "",
    ] {
        let refused = server.send(origin(foreign)).await;
        assert!(refused.refused(403, "FORBIDDEN").contains("ATLUS_CORS_ORIGINS"), "{foreign}");
    }
    server
        .send(origin("https://app.example").header(header::ORIGIN, "https://evil.example"))
        .await
        .refused(403, "FORBIDDEN");
    let session = server.session(json!({})).await;
    for (method, path) in [
        (Method::PATCH, format!("/sessions/{session}")),
        (Method::DELETE, format!("/sessions/{session}")),
        (Method::POST, "/chat".to_owned()),
        (Method::POST, "/import".to_owned()),
        (Method::PUT, "/nope".to_owned()),
    ] {
        let write = server.request(method, &path).header(header::ORIGIN, "https://evil.example");
        server.send(write).await.refused(403, "FORBIDDEN");
    }
    // It cannot read the answer.
    let read = server.request(Method::GET, "/sessions").header(header::ORIGIN, "https://evil.example");
    assert_eq!(server.send(read).await.status, 200);
}

#[tokio::test]
async fn on_the_default_port_a_page_and_its_server_leave_the_port_out() {
    let server = server(|config| config.server.gate.hosts = "atlus.example".parse().unwrap()).await;
    for (host, origin, status) in [
        ("atlus.example", "http://atlus.example", 201),
        ("atlus.example", "https://atlus.example", 201),
        ("atlus.example:443", "https://atlus.example", 201),
        ("atlus.example:80", "https://atlus.example", 403),
        ("atlus.example", "https://atlus.example:8443", 403),
    ] {
        let request = server.request(Method::POST, "/sessions").header(header::HOST, host);
        assert_eq!(
            server.send(request.header(header::ORIGIN, origin)).await.status,
            status,
            "{host} {origin}"
        );
    }
}

#[tokio::test]
async fn where_keys_are_needed_neither_host_nor_origin_matters() {
    let server = server(|config| config.server.gate.open = false).await;
    let request = server.request(Method::POST, "/sessions").header(header::HOST, "atlus.example");
    let answer = server.send(request.header(header::ORIGIN, "https://evil.example")).await;
    assert_eq!(answer.status, 201);
    assert!(!answer.headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
}

#[tokio::test]
async fn the_refusal_says_which_setting_would_mend_it() {
    let server = server(|_| {}).await;
    let request = server.request(Method::GET, "/sessions").header(header::HOST, "atlus.example");
    let refused = server.send(request).await;
    assert!(refused.refused(403, "FORBIDDEN").contains("ATLUS_ALLOWED_HOSTS"));
}

/// What a browser asks before a page of this origin may send such a request.
async fn preflight(server: &Server, origin: &str, path: &str, method: &str) -> Response {
    let request = server.http.request(Method::OPTIONS, format!("{}{path}", server.base));
    let request =
        request.header(header::ORIGIN, origin).header(header::ACCESS_CONTROL_REQUEST_METHOD, method);
    request.header(header::ACCESS_CONTROL_REQUEST_HEADERS, "authorization,content-type").send().await.unwrap()
}

#[tokio::test]
async fn a_page_of_a_named_origin_may_use_what_there_is() {
    let server = server(|config| config.server.gate.origins = "https://app.example".parse().unwrap()).await;
    for (path, methods) in [
        ("/api/v1/sessions", "GET, HEAD, POST"),
        ("/api/v1/chat", "POST"),
        ("/livez", "GET, HEAD"),
        ("/api/v1/sessions/session_0000000000000000", "DELETE, GET, HEAD, PATCH"),
        ("/openapi.json", "GET, HEAD"),
    ] {
        let allowed = preflight(&server, "https://app.example", path, "POST").await;
        assert_eq!(allowed.status(), StatusCode::NO_CONTENT, "{path}");
        let headers = allowed.headers();
        assert_eq!(headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://app.example");
        assert_eq!(headers[header::ACCESS_CONTROL_ALLOW_METHODS], methods, "{path}");
        let read = headers[header::ACCESS_CONTROL_ALLOW_HEADERS].to_str().unwrap();
        for name in [
            "Authorization", "X-API-Key", "Content-Type", "Idempotency-Key", "If-Match", "Last-Event-ID",
            "X-Request-ID",
        ] {
            assert!(read.split(", ").any(|header| header == name), "{name}");
        }
        assert_eq!(headers[header::ACCESS_CONTROL_MAX_AGE], "7200");
        assert!(!headers.contains_key(header::ACCESS_CONTROL_ALLOW_CREDENTIALS));
        assert!(!headers.contains_key(header::ALLOW) && headers.contains_key("x-request-id"));
        assert_eq!(allowed.bytes().await.unwrap(), "");
    }
    assert_eq!(
        preflight(&server, "https://app.example", "/nope", "GET").await.status(),
        StatusCode::NOT_FOUND
    );
}

#[tokio::test]
async fn a_page_of_a_named_origin_may_read_answers_and_failures() {
    let server = server(|config| config.server.gate.origins = "https://app.example".parse().unwrap()).await;
    for path in ["/sessions", "/nope", "/sessions?limit=0", "/health"] {
        let answer = server
            .send(server.request(Method::GET, path).header(header::ORIGIN, "https://app.example"))
            .await;
        assert_eq!(answer.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://app.example", "{path}");
        assert_eq!(answer.headers[header::VARY], "Origin");
        assert_eq!(answer.headers["cross-origin-resource-policy"], "cross-origin");
        let shown = answer.headers[header::ACCESS_CONTROL_EXPOSE_HEADERS].to_str().unwrap();
        for name in [
            "X-Request-ID", "X-Process-Time", "ETag", "Retry-After", "RateLimit-Limit",
            "RateLimit-Remaining", "RateLimit-Reset", "RateLimit-Policy", "Idempotency-Replayed",
            "Content-Disposition",
        ] {
            assert!(shown.split(", ").any(|header| header == name), "{name}");
        }
    }
    // Whoever keeps this answer must not give it to a page.
    let plain = server.get("/sessions").await;
    assert_eq!(plain.headers[header::VARY], "Origin");
    assert!(!plain.headers.contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
}

#[tokio::test]
async fn a_page_of_any_other_origin_is_told_nothing() {
    let none_named = server(|_| {}).await;
    let named = server(|config| config.server.gate.origins = "https://app.example".parse().unwrap()).await;
    for server in [&none_named, &named] {
        for origin in ["https://evil.example", "http://app.example", "https://app.example:8443", "null"] {
            let refused = preflight(server, origin, SESSIONS, "POST").await;
            assert_eq!(refused.status(), StatusCode::METHOD_NOT_ALLOWED, "{origin}");
            let read =
                server.send(server.request(Method::GET, "/sessions").header(header::ORIGIN, origin)).await;
            for headers in [refused.headers(), &read.headers] {
                let told = headers.keys().filter(|name| name.as_str().starts_with("access-control-"));
                assert_eq!(told.count(), 0, "{origin}");
                assert_eq!(headers["cross-origin-resource-policy"], "same-origin");
            }
        }
    }
}

#[tokio::test]
async fn where_keys_are_needed_pages_of_any_origin_can_be_let_in() {
    let server = server(|config| {
        config.server.gate.open = false;
        config.server.gate.origins = "*".parse().unwrap();
    })
    .await;
    for origin in ["https://app.example", "http://localhost:3000"] {
        let allowed = preflight(&server, origin, SESSIONS, "POST").await;
        assert_eq!(allowed.status(), StatusCode::NO_CONTENT);
        assert_eq!(allowed.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], origin);
    }
}

#[tokio::test]
async fn a_key_in_the_query_is_neither_read_nor_logged() {
    let database = Database::on(Kind::Sqlite).await;
    let server = Process::start(&database, &[("ATLUS_LOG", "debug")]).await;
    let secret = "atlus_0123456789abcdef";
    let plain = server.get("/sessions").await;
    for name in ["Authorization", "authorization", "X-API-Key", "x-api-key", "api_key", "key", "access_token"]
    {
        let answer = server.get(&format!("/sessions?{name}={secret}")).await;
        assert_eq!((answer.status, &answer.body["data"]), (plain.status, &plain.body["data"]), "{name}");
    }
    let log = server.stop().await;
    assert_eq!(log.iter().filter(|line| line.contains("answered")).count(), 8);
    assert!(!log.iter().any(|line| line.contains(secret)), "{log:#?}");
}
