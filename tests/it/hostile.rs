//! What nobody sends who means well: it gets the answer that the contract has for it, and leaves nothing behind.

use reqwest::{Method, header};
use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::{
    failures::raw,
    harness::{Answer, Client, Server, on_both},
};

/// Sends bytes as a JSON body.
async fn send(client: &Client, method: Method, path: &str, body: impl Into<reqwest::Body>) -> Answer {
    let request = client.request(method, path).header(header::CONTENT_TYPE, "application/json");
    client.send(request.body(body)).await
}

/// Every operation that reads JSON: method and path.
fn readers(session: &str) -> Vec<(Method, String)> {
    let (post, patch) = (Method::POST, Method::PATCH);
    vec![
        (post.clone(), "/sessions".to_owned()),
        (patch.clone(), format!("/sessions/{session}")),
        (post.clone(), format!("/sessions/{session}/fork")),
        (post.clone(), format!("/sessions/{session}/turns")),
        (patch.clone(), format!("/sessions/{session}/memory")),
        (post.clone(), "/chat".to_owned()),
        (post, "/chat/stream".to_owned()),
        (patch, "/users/ann/memory".to_owned()),
    ]
}

/// How many rows callers have brought about.
async fn rows(server: &Server) -> i64 {
    let sql = "SELECT (SELECT COUNT(*) FROM sessions) + (SELECT COUNT(*) FROM turns) + (SELECT COUNT(*) FROM facts) \
               + (SELECT COUNT(*) FROM idempotency_records)";
    server.count(sql).await
}

/// Status and body of a raw answer; null where it is bare.
fn read(answer: &str) -> (u16, Value) {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((answer, ""));
    let status = head.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0);
    (status, serde_json::from_str(body).unwrap_or(Value::Null))
}

/// Asserts that a raw answer is this refusal; without a code it is HTTP's own, which is bare.
#[track_caller]
fn refused(answer: &str, status: u16, code: &str) {
    let (found, body) = read(answer);
    let bare = code.is_empty() && body.is_null();
    assert!(found == status && (bare || body["error"]["code"] == code), "{answer}");
}

const GET: &str = "HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
const POST: &str = "POST /api/v1/sessions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n";

/// Texts that mean something to someone.
const TEXTS: [&str; 20] = [
    "'; DROP TABLE sessions; --",
    "\" OR 1=1 --",
    "$1 ?1 :a @b %s %n {0} ${jndi:ldap://x}",
    "NEAR(a b) AND \"x\" OR *",
    "<script>alert(1)</script>",
    "</title><img src=x onerror=alert(1)>",
    "a\r\nSet-Cookie: a=b\r\n\r\n<html>",
    "data: {}\n\nevent: done\ndata: x\n\n",
    "\u{1b}[31mred\u{7}",
    "\u{1}\u{8}\u{b}\u{1f}\u{7f}\u{80}\u{9f}",
    "\u{202e}txt.exe\u{202c}\u{2066}x\u{2069}",
    "a\u{200b}b\u{200d}c\u{feff}d\u{ad}e",
    "\u{fffe}\u{ffff}\u{10ffff}\u{e000}",
    "e\u{301} é",
    "\u{fb01}ﬀ ſ İ ı K",
    "a\u{2028}b\u{2029}c",
    "👩‍👩‍👧‍👦🏳️‍🌈",
    "\\u0000 \\\\ \\\" \\/",
    "null",
    "../../etc/passwd",
];

on_both! {
    async fn nesting_without_end_is_refused_wherever_it_stands(server: Server) {
        let session = server.session(json!({})).await;
        let before = rows(&server).await;
        let deep = 100_000;
        let nests = [
            "[".repeat(deep), "{\"a\":".repeat(deep), "[{\"a\":".repeat(deep / 2),
            format!("{}{}", "[".repeat(deep), "]".repeat(deep)), format!("{}1{}", "{\"a\":".repeat(deep), "}".repeat(deep)),
            format!("{}{}", "[".repeat(32), "]".repeat(32)),
        ];
        for (method, path) in readers(&session) {
            for nest in &nests {
                let field = if path == "/sessions" { "metadata" } else { "unknown" };
                let refusal = send(&server, method.clone(), &path, format!("{{\"{field}\":{nest}}}")).await;
                assert!(refusal.refused(400, "VALIDATION_ERROR").contains("deeper than 32"));
            }
        }
        // What does not nest may be as long as it likes.
        let flat = format!("{{\"unknown\":[{}], \"b\":\"{}\"}}", "[],".repeat(100_000) + "1", "[{".repeat(100_000));
        assert_eq!(send(&server, Method::POST, "/sessions", flat).await.status, 201);
        assert_eq!(rows(&server).await, before + 1);
    }

    async fn a_key_that_is_given_twice_is_refused_and_named(server: Server) {
        let session = server.session(json!({})).await;
        let before = rows(&server).await;
        for (path, body, field) in [
            ("/sessions", r#"{"user_id": "ann", "user_id": "bob"}"#, "user_id"),
            ("/sessions", r#"{"user_id": "ann", "user\u005fid": "bob"}"#, "user_id"),
            ("/sessions", r#"{"metadata": {"a": 1, "b": 2, "a": 1}}"#, "metadata.a"),
            ("/sessions", r#"{"metadata": {"a": [{"b": {"c": 1, "c": 2}}]}}"#, "metadata.a[0].b.c"),
            ("/sessions", r#"{"unknown": 1, "unknown": 2}"#, "unknown"),
            ("/chat", r#"{"message": "hi", "message": "ho"}"#, "message"),
            ("/chat/stream", r#"{"message": "hi", "session_id": "x", "session_id": null}"#, "session_id"),
            ("/turns", r#"{"turns": [{"message": "a", "response": "b", "message": "c"}]}"#, "turns[0].message"),
            ("/fork", r#"{"turn": 1, "turn": 1}"#, "turn"),
            ("/memory", r#"{"working_memory": {"": 1, "": 2}}"#, "working_memory."),
            ("facts", r#"{"facts": {"name": "Ann", "name": null}}"#, "facts.name"),
        ] {
            let (method, path) = match path {
                "/turns" | "/fork" => (Method::POST, format!("/sessions/{session}{path}")),
                "/memory" => (Method::PATCH, format!("/sessions/{session}{path}")),
                "facts" => (Method::PATCH, "/users/ann/memory".to_owned()),
                path => (Method::POST, path.to_owned()),
            };
            send(&server, method, &path, body).await.refuses_field(field);
        }
        server.get_with("/sessions", "metadata", r#"{"a": 1, "a": 2}"#).await.refuses_field("metadata");
        let archive = r#"{"type": "archive", "type": "end"}"#;
        let import = server.request(Method::POST, "/import").header("Content-Type", "application/x-ndjson");
        let refusal = server.send(import.body(format!("{archive}\n"))).await;
        assert_eq!(refusal.refused(400, "VALIDATION_ERROR"), "line 1: type: must be given once");
        assert_eq!(rows(&server).await, before);
    }

    async fn numbers_come_back_equal_or_are_refused(server: Server) {
        let integers = ["0", "18446744073709551615", "-9223372036854775808", "9007199254740993"];
        let doubles = [
            "-0.0", "-0", "0.1", "1e2", "1E-7", "5e-324", "-1.7976931348623157e308", "2.2250738585072014E-308", "1e-400", "1.0",
            "123456789012345678901234567890", "18446744073709551616", "0.1000000000000000055511151231257827", "3.141592653589793",
        ];
        for number in integers.iter().chain(&doubles) {
            let body = format!("{{\"metadata\": {{\"n\": [{number}]}}}}");
            let made = send(&server, Method::POST, "/sessions", body).await;
            let read = server.get(&format!("/sessions/{}", made.data()["session_id"].as_str().unwrap())).await;
            for found in [&made.data()["metadata"]["n"][0], &read.data()["metadata"]["n"][0]] {
                let (found, sent): (f64, f64) = (found.to_string().parse().unwrap(), number.parse().unwrap());
                assert_eq!(found.to_bits(), sent.to_bits(), "{number}");
            }
            if integers.contains(number) {
                assert_eq!(read.data()["metadata"]["n"][0].to_string(), **number);
            }
        }
        let before = rows(&server).await;
        let huge = format!("1{}", "0".repeat(400));
        for number in [
            "1e400", "-1e400", &huge, "1e99999999999999999999", "NaN", "Infinity", "-Infinity", "01", "+1", ".5", "1.", "0x10", "1e",
            "-", "1_000", "١",
        ] {
            for body in [format!("{{\"metadata\": {{\"n\": {number}}}}}"), format!("{{\"ttl_seconds\": {number}}}")] {
                send(&server, Method::POST, "/sessions", body).await.refused(400, "INVALID_JSON");
            }
        }
        for number in ["18446744073709551616", "9223372036854775808", "-1", "1e2", "-0.0", "100.5", "true"] {
            let body = format!("{{\"ttl_seconds\": {number}}}");
            send(&server, Method::POST, "/sessions", body).await.refuses_field("ttl_seconds");
        }
        for (field, number) in [("temperature", "1e308"), ("temperature", "-1e-300"), ("max_tokens", "18446744073709551615")] {
            let body = format!("{{\"message\": \"hi\", \"{field}\": {number}}}");
            send(&server, Method::POST, "/chat", body).await.refuses_field(field);
        }
        assert_eq!(rows(&server).await, before);
    }

    async fn u_0000_is_refused_wherever_it_stands(server: Server) {
        let session = server.session(json!({})).await;
        let before = rows(&server).await;
        let turns = |field: &str| {
            let mut turn = json!({"message": "a", "response": "b"});
            turn[field] = if field == "metadata" { json!({"a": {"\u{0}": 1}}) } else { json!("a\u{0}b") };
            json!({"turns": [{"message": "a", "response": "b"}, turn]})
        };
        for (method, path, body, field) in [
            (Method::POST, "/sessions", json!({"title": "\u{0}"}), "title"),
            (Method::POST, "/sessions", json!({"system_prompt": "a\u{0}"}), "system_prompt"),
            (Method::POST, "/sessions", json!({"metadata": {"a\u{0}": 1}}), "metadata"),
            (Method::PATCH, "", json!({"title": "\u{0}"}), "title"),
            (Method::PATCH, "", json!({"metadata": {"a": [["\u{0}"]]}}), "metadata"),
            (Method::PATCH, "", json!({"metadata": {"\u{0}": null}}), "metadata"),
            (Method::POST, "/fork", json!({"title": "\u{0}"}), "title"),
            (Method::POST, "/fork", json!({"metadata": {"\u{0}": 1}}), "metadata"),
            (Method::POST, "/turns", turns("message"), "turns[1].message"),
            (Method::POST, "/turns", turns("response"), "turns[1].response"),
            (Method::POST, "/turns", turns("model"), "turns[1].model"),
            (Method::POST, "/turns", turns("metadata"), "turns[1].metadata"),
            (Method::PATCH, "/memory", json!({"working_memory": {"a": {"\u{0}": 1}}}), "working_memory"),
            (Method::PATCH, "/memory", json!({"working_memory": {"\u{0}": null}}), "working_memory"),
            (Method::POST, "/chat", json!({"message": "a\u{0}"}), "message"),
            (Method::POST, "/chat/stream", json!({"message": "a\u{0}"}), "message"),
            (Method::POST, "/chat", json!({"message": "a", "user_id": "\u{0}"}), "user_id"),
            (Method::POST, "/chat", json!({"message": "a", "model": "\u{0}"}), "model"),
            (Method::POST, "/chat", json!({"message": "a", "metadata": {"\u{0}": 1}}), "metadata"),
            (Method::PATCH, "/users/ann/memory", json!({"facts": {"a\u{0}": 1}}), "facts"),
            (Method::PATCH, "/users/ann/memory", json!({"facts": {"a": ["\u{0}"]}}), "facts"),
        ] {
            let path = match path {
                "" | "/fork" | "/turns" | "/memory" => format!("/sessions/{session}{path}"),
                path => path.to_owned(),
            };
            server.send(server.request(method, &path).json(&body)).await.refuses_field(field);
        }
        for (path, name, value) in [
            ("/sessions", "user_id", "a\u{0}"), ("/sessions", "metadata", "{\"a\":\"\\u0000\"}"),
            ("/sessions", "metadata", "{\"a\u{0}\":1}"), ("/search", "q", "a\u{0}"), ("/search?q=a", "user_id", "\u{0}"),
        ] {
            server.get_with(path, name, value).await.refuses_field(name);
        }
        let context = format!("/sessions/{session}/context");
        server.get_with(&context, "message", "\u{0}").await.refuses_field("message");
        let chat = json!({"message": "a", "session_id": format!("{session}\u{0}")});
        server.post("/chat", chat).await.refused(404, "INVALID_SESSION");
        // As it is, it is no JSON.
        send(&server, Method::POST, "/sessions", "{\"title\": \"\u{0}\"}").await.refused(400, "INVALID_JSON");
        send(&server, Method::POST, "/sessions", "{}\u{0}").await.refused(400, "INVALID_JSON");
        assert_eq!(rows(&server).await, before);
    }

    async fn text_that_is_no_unicode_is_no_json(server: Server) {
        let session = server.session(json!({})).await;
        let before = rows(&server).await;
        let quoted = |text: &[u8]| [b"{\"a\": \"", text, b"\"}"].concat();
        let utf16: Vec<u8> = "{}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let bodies = [
            quoted(b"\\ud800"), quoted(b"\\udc00"), quoted(b"\\ud83d\\ud83d"), quoted(b"\\udc00\\ud800"), quoted(b"\\ud800x"),
            quoted(b"\\ud800\\n"), quoted(b"\\u00"), quoted(b"\\uzzzz"), quoted(b"\\x41"), quoted(b"a\nb"), quoted(b"\x1f"),
            // Not UTF-8, overlong, a surrogate by itself, beyond U+10FFFF, cut off.
            quoted(b"\xff"), quoted(b"\xc0\xaf"), quoted(b"\xe0\x80\xaf"), quoted(b"\xf0\x80\x80\xaf"), quoted(b"\xc0\x80"),
            quoted(b"\xed\xa0\x80"), quoted(b"\xf4\x90\x80\x80"), quoted(b"\xe2\x82"), b"{\"\xff\": 1}".to_vec(),
            b"{\"\\ud800\": 1}".to_vec(), b"\xef\xbb\xbf{}".to_vec(), utf16, b"{}\xff".to_vec(), b"{'a': 1}".to_vec(),
            b"{\"a\": 1,}".to_vec(), b"{/* */}".to_vec(), b"{\"a\": undefined}".to_vec(), b"\x00".to_vec(), b"{}{}".to_vec(),
        ];
        for (method, path) in readers(&session) {
            for body in &bodies {
                send(&server, method.clone(), &path, body.clone()).await.refused(400, "INVALID_JSON");
            }
        }
        assert_eq!(rows(&server).await, before);
    }

    async fn any_unicode_is_kept_as_it_was_sent(server: Server) {
        for (i, text) in TEXTS.into_iter().enumerate() {
            let user = format!("{text} {i}");
            let body = json!({"user_id": user, "title": text, "system_prompt": text, "metadata": {text: [text, {text: text}]}});
            let made = server.post("/sessions", body.clone()).await;
            let session = made.data()["session_id"].as_str().unwrap().to_owned();
            let read = server.get(&format!("/sessions/{session}")).await;
            for field in ["user_id", "title", "system_prompt", "metadata"] {
                assert_eq!((&made.data()[field], &read.data()[field]), (&body[field], &body[field]), "{text:?}");
            }
            // Found by exactly these characters, not by others that look or sort alike.
            let listed = server.get_with("/sessions", "user_id", &user).await;
            assert_eq!((listed.items().len(), &listed.items()[0]["session_id"]), (1, &json!(session)), "{text:?}");
            let filter = json!({text: [text, {text: text}]}).to_string();
            assert_eq!(server.get_with("/sessions", "metadata", &filter).await.items().len(), 1, "{text:?}");

            let turns = json!({"turns": [{"message": text, "response": text, "model": text, "metadata": {text: text}}]});
            let added = server.post(&format!("/sessions/{session}/turns"), turns.clone()).await;
            let read = server.get(&format!("/sessions/{session}/turns/1")).await;
            for field in ["message", "response", "model", "metadata"] {
                assert_eq!(read.data()[field], turns["turns"][0][field], "{text:?}");
            }
            assert_eq!(added.items()[0], *read.data());
            let memory = json!({"working_memory": {text: {text: [text]}}});
            let changed = server.patch(&format!("/sessions/{session}/memory"), memory.clone()).await;
            assert_eq!(changed.data()["working_memory"], memory["working_memory"]);
            let heard = server.stream(&session, text).await.all().await;
            assert_eq!(heard.last().unwrap().name, "done", "{text:?}");
            let said = server.get(&format!("/sessions/{session}/turns/2")).await;
            assert_eq!(said.data()["message"], text.trim(), "{text:?}");
            assert_eq!(server.get_with("/search", "q", text).await.status, 200);
            server.get_with(&format!("/sessions/{session}/context"), "message", text).await.data();
        }
        let facts: Value = TEXTS.iter().map(|text| ((*text).to_owned(), json!({"said": text}))).collect();
        server.patch("/users/ann/memory", json!({"facts": facts})).await.data();
        let known = server.read("/users/ann/memory").await["facts"].clone();
        let known: Value = known.as_object().unwrap().iter().map(|(key, fact)| (key.clone(), fact["value"].clone())).collect();
        assert_eq!(known, facts);
    }

    async fn what_a_name_says_stays_inside_the_answer(server: Server) {
        for text in TEXTS {
            let refusal = server.get_with("/sessions/continue", "user_id", text).await;
            let message = refusal.refused(404, "NO_SESSION_FOUND");
            assert_eq!(message, format!("No active session found for user: {text}"));
            assert_eq!(refusal.headers["content-type"], "application/json");
            assert_eq!(refusal.headers["x-content-type-options"], "nosniff");
            assert!(!refusal.headers.contains_key("set-cookie"));
            let refusal = server.post("/chat", json!({"message": "hi", "session_id": text})).await;
            assert_eq!(refusal.refused(404, "INVALID_SESSION"), format!("Invalid or inactive session: {text}"));
        }
    }

    async fn a_header_cannot_bring_another_into_the_answer(server: Server) {
        for (id, status) in [("a\r\n X-Evil: 1", 400), ("a\rX-Evil: 1", 400), ("a\u{0}", 400), ("a\nX-Evil: 1", 200), ("a%0d%0aX-Evil: 1", 200)] {
            let request = format!("GET /livez HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n");
            let answer = raw(&server, request.as_bytes()).await;
            assert_eq!(read(&answer).0, status, "{answer}");
            assert!(!answer.to_lowercase().contains("evil"), "{answer}");
        }
        let path = "/api/v1/sessions/session_1%0d%0aX-Evil:%201%0d%0a%0d%0a";
        let answer = raw(&server, format!("GET {path} {GET}").as_bytes()).await;
        refused(&answer, 404, "SESSION_NOT_FOUND");
        assert!(!answer.contains("\nX-Evil"), "{answer}");
        for header in ["If-Match", "Idempotency-Key"] {
            let request = format!("{POST}{header}: \u{1}\u{e9}\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}");
            assert_eq!(read(&raw(&server, request.as_bytes()).await).0, 400, "{header}");
        }
        assert_eq!(rows(&server).await, 0);
    }

    async fn names_beyond_any_length_are_refused(server: Server) {
        let session = server.session(json!({})).await;
        let long = "x".repeat(300);
        let before = rows(&server).await;
        for path in ["", "/turns", "/turns/1", "/memory", "/context", "/export", "/turns/1/stream"] {
            let refusal = server.get(&format!("/sessions/session_{long}{path}")).await;
            assert_eq!(refusal.refused(404, "SESSION_NOT_FOUND"), format!("Session session_{long} not found"));
        }
        for path in ["", "/memory", "/export"] {
            server.get(&format!("/users/{long}{path}")).await.refused(404, "NOT_FOUND");
        }
        server.delete(&format!("/users/{long}")).await.refused(404, "NOT_FOUND");
        server.post("/chat", json!({"message": "hi", "session_id": long})).await.refused(404, "INVALID_SESSION");
        server.post("/chat", json!({"message": "hi", "user_id": long})).await.refuses_field("user_id");
        for path in ["/sessions", "/sessions/continue", "/search?q=a"] {
            server.get_with(path, "user_id", &long).await.refuses_field("user_id");
        }
        server.get_with("/search?q=a", "session_id", &long).await.refuses_field("session_id");
        let keyed = server.request(Method::POST, "/sessions").header("Idempotency-Key", &long);
        server.send(keyed).await.refuses_field("Idempotency-Key");
        // Numbers that are none, or no turn's.
        for turn in ["0", "-1", "+1", "1.0", "1e0", "0x1", "%201", "1%20", "١", "99999999999999999999", "9223372036854775807", "one"] {
            let name = turn.replace("%20", " ");
            for refusal in [
                server.get(&format!("/sessions/{session}/turns/{turn}")).await,
                server.delete(&format!("/sessions/{session}/turns/{turn}")).await,
                server.get(&format!("/sessions/{session}/turns/{turn}/stream")).await,
                server.send(server.request(Method::POST, &format!("/sessions/{session}/turns/{turn}/cancel"))).await,
            ] {
                assert_eq!(refusal.refused(404, "TURN_NOT_FOUND"), format!("Turn {name} not found"));
            }
        }
        assert_eq!(rows(&server).await, before);
    }

    async fn a_path_means_one_thing_or_nothing(server: Server) {
        let session = server.session(json!({})).await;
        let read_session = format!("/api/v1/sessions/{session}");
        assert!(raw(&server, format!("GET {read_session} {GET}").as_bytes()).await.starts_with("HTTP/1.1 200"));
        for path in [
            "/api/v1/../v1/health", "/./livez", "/api/v1/%2e%2e/livez", "//livez", "/livez/", "/livez//", "/LIVEZ", "/%6civez",
            "/livez;a=b", "/livez%00", "/livez%20", "/livez%0a", "/api/v1%2fhealth", "/api%5cv1%5chealth", "/api/v1/sessions%2fcontinue",
            "/api/v1/Sessions", "/api/v1/sessions/", "/api/v1//sessions", "/api/v2/sessions", "/api/v1/sessions/%ff",
            "/api/v1/sessions/%c0%af", "/api/v1/sessions/session_%C0", "/api/v1/users/%ff/memory", "/api/v1/users/%00", "/api/v1/users/", "/api/v1/users//memory",
            "/docs/..%2f..%2fetc%2fpasswd", "/openapi.json/..", "*",
        ] {
            refused(&raw(&server, format!("GET {path} {GET}").as_bytes()).await, 404, "NOT_FOUND");
        }
        for name in ["..", "%2e%2e", "..%2f..", "%2f", "%00", "%0a", "%", "%zz", "%252e", "continue%2f"] {
            let answer = raw(&server, format!("GET /api/v1/sessions/{name} {GET}").as_bytes()).await;
            refused(&answer, 404, "SESSION_NOT_FOUND");
        }
        for tail in ["%00", "%20", "%0a", "/", "?", "%2f", "."] {
            let answer = raw(&server, format!("GET {read_session}{tail} {GET}").as_bytes()).await;
            assert_eq!(read(&answer).0, if tail == "?" { 200 } else { 404 }, "{tail}");
        }
        let upper = format!("/api/v1/sessions/{}", session.replace("session_", "SESSION_"));
        refused(&raw(&server, format!("GET {upper} {GET}").as_bytes()).await, 404, "SESSION_NOT_FOUND");
        let long = |length: usize| format!("GET /api/v1/sessions/{} {GET}", "x".repeat(length));
        refused(&raw(&server, long(60_000).as_bytes()).await, 404, "SESSION_NOT_FOUND");
        let answer = raw(&server, long(66_000).as_bytes()).await;
        assert!([414, 431].contains(&read(&answer).0), "{answer}");
        for broken in ["api/v1/health", "/livez\u{1}", "/livez\u{7f}", ""] {
            refused(&raw(&server, format!("GET {broken} {GET}").as_bytes()).await, 400, "");
        }
    }

    async fn a_parameter_has_one_value_in_plain_digits_and_utf_8(server: Server) {
        for _ in 0..3 {
            server.session(json!({"user_id": "ann"})).await;
        }
        for query in ["limit=1&limit=2", "limit=1&limit=1", "user_id=ann&user_id=bob", "cursor=x&cursor=x", "order=created_at&order=created_at",
            "is_active=true&is_active=false", "temporary=true&temporary=false", "direction=asc&direction=asc", "metadata=%7B%7D&metadata=%7B%7D"] {
            server.get(&format!("/sessions?{query}")).await.refuses_field(query.split_once('=').unwrap().0);
        }
        server.get("/search?q=a&q=b").await.refuses_field("q");
        for limit in ["1e9", "٣", "%2B5", "-5", "5.0", "0x5", "%205", "5%20", "5,6", "null", "18446744073709551617", "1;user_id=bob", "%00"] {
            server.get(&format!("/sessions?limit={limit}")).await.refuses_field("limit");
        }
        for flag in ["1", "TRUE", "yes", "", "true%00"] {
            server.get(&format!("/sessions?is_active={flag}")).await.refuses_field("is_active");
        }
        for time in ["0", "now", "2024-01-01", "2024-13-01T00:00:00Z", "10000-01-01T00:00:00Z", "-0001-01-01T00:00:00Z", "2024-01-01T00:00:00", "%00"] {
            server.get(&format!("/search?q=a&from={time}")).await.refuses_field("from");
        }
        for query in ["user_id=%ff", "user_id=ann%c0%80", "%ff=1", "a=%ed%a0%80"] {
            let answer = raw(&server, format!("GET /api/v1/sessions?{query} {GET}").as_bytes()).await;
            refused(&answer, 400, "VALIDATION_ERROR");
        }
        // What is no parameter means nothing.
        for query in ["limit[]=1", "Limit=1", "&&=&=x&a", "%00", "a=1&a=2", "user_id%00=x", "cursor%5B%5D=x", "%"] {
            let listed = raw(&server, format!("GET /api/v1/sessions?{query} {GET}").as_bytes()).await;
            assert_eq!(read(&listed).1["data"]["items"].as_array().unwrap().len(), 3, "{query}: {listed}");
        }
    }

    async fn a_changed_cursor_is_refused(server: Server) {
        for _ in 0..3 {
            server.session(json!({"user_id": "ann"})).await;
        }
        let page = server.get("/sessions?user_id=ann&limit=1").await;
        let cursor = page.data()["next_cursor"].as_str().unwrap();
        assert_eq!(server.get(&format!("/sessions?user_id=ann&cursor={cursor}")).await.items().len(), 2);
        for at in 0..cursor.len() {
            let mut changed = cursor.as_bytes().to_vec();
            changed[at] = if changed[at] == b'0' { b'1' } else { b'0' };
            let changed = String::from_utf8(changed).unwrap();
            server.get(&format!("/sessions?user_id=ann&cursor={changed}")).await.refused(400, "INVALID_CURSOR");
        }
        let upper = cursor.to_uppercase();
        for changed in [&cursor[1..], &format!("{cursor}0"), &format!("{cursor}%00"), &upper, &"0".repeat(50_000), "%F0%9F%A6%80"] {
            if changed != cursor {
                server.get(&format!("/sessions?user_id=ann&cursor={changed}")).await.refused(400, "INVALID_CURSOR");
            }
        }
    }

    async fn an_encoded_body_is_refused_unread(server: Server) {
        let session = server.session(json!({})).await;
        let before = rows(&server).await;
        let import = (Method::POST, "/import".to_owned());
        for (method, path) in readers(&session).into_iter().chain([import]) {
            for encoding in ["gzip", "deflate", "br", "x-gzip", "identity, gzip", "GZIP", ""] {
                // A body that never comes: it would be waited for if it were read.
                let media = if path == "/import" { "application/x-ndjson" } else { "application/json" };
                let request = format!(
                    "{method} /api/v1{path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: {media}\r\ncontent-encoding: {encoding}\r\n\
                     content-length: 1000000\r\n\r\n\u{1f}"
                );
                refused(&raw(&server, request.as_bytes()).await, 400, "INVALID_CONTENT_TYPE");
            }
        }
        for headers in [
            "content-encoding: identity\r\ncontent-encoding: gzip\r\ncontent-length: 2", "content-type: text/plain\r\ncontent-length: 2",
            "content-type: application/json\r\ncontent-length: 2", "transfer-encoding: gzip, chunked",
            "transfer-encoding: gzip\r\ntransfer-encoding: chunked",
        ] {
            let answer = raw(&server, format!("{POST}{headers}\r\nconnection: close\r\n\r\n{{}}").as_bytes()).await;
            refused(&answer, 400, "INVALID_CONTENT_TYPE");
        }
        assert_eq!(rows(&server).await, before);
    }

    async fn a_length_that_is_no_length_ends_its_connection_only(server: Server) {
        let (hidden, chunked) = ("GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n", "transfer-encoding: chunked");
        // Two lengths: the chunks count, and nothing is read after them, whatever the other length says.
        for headers in [format!("content-length: 4\r\n{chunked}"), format!("{chunked}\r\ncontent-length: 4")] {
            let answer = raw(&server, format!("{POST}{headers}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n{hidden}").as_bytes()).await;
            assert_eq!((read(&answer).0, answer.matches("HTTP/1.1").count()), (201, 1), "{answer}");
        }
        let made = rows(&server).await;
        for headers in [
            "content-length: -1", "content-length: +2", "content-length: 2, 2", "content-length: 2\r\ncontent-length: 3", "content-length: 0x2",
            "content-length: 2 2", "content-length:", "content-length: 18446744073709551616", "transfer-encoding: identity",
            "transfer-encoding: chunked, identity", "transfer-encoding: xchunked", "transfer-encoding : chunked", "transfer-encoding:",
        ] {
            let answer = raw(&server, format!("{POST}{headers}\r\n\r\n{{}}{hidden}").as_bytes()).await;
            refused(&answer, 400, "");
            assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
        }
        // HTTP/1.0 has no chunks.
        let old = POST.replace("1.1", "1.0");
        refused(&raw(&server, format!("{old}{chunked}\r\n\r\n2\r\n{{}}\r\n0\r\n\r\n").as_bytes()).await, 400, "");
        let filler = "x".repeat(100_000);
        for body in [
            "fffffffffffffffff\r\n{}", "-2\r\n{}\r\n0\r\n\r\n", "2\n{}\n0\n\n", "2\r\n{}0\r\n\r\n", "{}", &format!("2;a={filler}\r\n{{}}\r\n0\r\n\r\n"),
            &format!("2\r\n{{}}\r\n0\r\nx: {filler}\r\n\r\n"),
        ] {
            let answer = raw(&server, format!("{POST}{chunked}\r\n\r\n{body}").as_bytes()).await;
            refused(&answer, 400, "INVALID_REQUEST");
            assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer}");
        }
        assert_eq!(rows(&server).await, made);
        assert_eq!(server.get("/health").await.status, 200);
    }

    async fn a_body_that_breaks_off_is_refused(server: Server) {
        for request in [
            "content-length: 30\r\n\r\n{}", "content-length: 1844674407370955161\r\n\r\n{}",
            "transfer-encoding: chunked\r\n\r\nfffffffffffffff0\r\n{}", "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
        ] {
            let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
            stream.write_all(format!("{POST}{request}").as_bytes()).await.unwrap();
            stream.shutdown().await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            refused(&answer, 400, "INVALID_REQUEST");
        }
        assert_eq!(rows(&server).await, 0);
    }

    async fn a_client_that_asks_first_is_told_to_go_on_or_not_to(server: Server) {
        let mut stream = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
        let asking = format!("{POST}expect: 100-continue\r\ncontent-length: 2\r\nconnection: close\r\n\r\n");
        stream.write_all(asking.as_bytes()).await.unwrap();
        let mut heard = [0; 25];
        stream.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"HTTP/1.1 100 Continue\r\n\r\n");
        stream.write_all(b"{}").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert_eq!(read(&answer).0, 201, "{answer}");
        refused(&raw(&server, asking.replace("json", "xml").as_bytes()).await, 400, "INVALID_CONTENT_TYPE");
    }

    async fn other_methods_and_versions_get_an_answer_too(server: Server) {
        let get = |method: &str, target: &str, version: &str| {
            format!("{method} {target} HTTP/{version}\r\nhost: localhost\r\nx-secret: do-not-tell\r\nconnection: close\r\n\r\n")
        };
        for method in ["TRACE", "PROPFIND", "get", "GETT", "PUT", &"A".repeat(1000)] {
            let answer = raw(&server, get(method, "/api/v1/health", "1.1").as_bytes()).await;
            refused(&answer, 405, "METHOD_NOT_ALLOWED");
            assert!(answer.contains("allow: GET, HEAD") && !answer.contains("do-not-tell"), "{answer}");
        }
        for (method, target) in [("CONNECT", "localhost:80"), ("OPTIONS", "*"), ("TRACE", "*")] {
            refused(&raw(&server, get(method, target, "1.1").as_bytes()).await, 404, "NOT_FOUND");
        }
        let elsewhere = raw(&server, get("CONNECT", "evil.example:443", "1.1").as_bytes()).await;
        refused(&elsewhere, 403, "FORBIDDEN");
        let old = raw(&server, get("GET", "/livez", "1.0").as_bytes()).await;
        assert!(old.starts_with("HTTP/1.0 200"), "{old}");
        for version in ["0.9", "1.2", "3.0", "x"] {
            let answer = raw(&server, get("GET", "/livez", version).as_bytes()).await;
            assert!([0, 400].contains(&read(&answer).0), "{answer}");
        }
        raw(&server, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        raw(&server, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03").await;
        assert_eq!(server.get("/health").await.status, 200);
    }
}
