//! What lines of the log have in common: which request, tenant, session and turn they concern.

use serde_json::{Value, json};

use crate::{
    harness::{Answer, Database, Process, atlus, on_both},
    models::{Script, Upstream},
};

/// A server that logs JSON and asks `upstream`.
async fn logging(database: &Database, upstream: &Upstream, level: &str) -> Process {
    let variables = [
        ("ATLUS_LOG", level),
        ("ATLUS_LOG_FORMAT", "json"),
        ("ATLUS_MODEL_URL", &upstream.url),
        ("ATLUS_MODEL", "scripted"),
    ];
    Process::start(database, &variables).await
}

/// The next line that holds this, as an object.
async fn line(process: &mut Process, containing: &str) -> Value {
    serde_json::from_str(&process.line(containing).await).unwrap()
}

/// A line's ids.
fn ids(line: &Value) -> [&Value; 4] {
    ["request_id", "tenant", "session_id", "turn"].map(|name| &line[name])
}

fn request_id(answer: &Answer) -> Value {
    json!(answer.headers["x-request-id"].to_str().unwrap())
}

on_both! {
    async fn the_line_of_an_answer_names_its_request_operation_tenant_session_and_turn(database: Database) {
        let upstream = Upstream::start(|_| Script::Say("Hello".into())).await;
        let mut process = logging(&database, &upstream, "info").await;
        let session = process.session(json!({})).await;
        let made = line(&mut process, "\"operation\":\"createSession\"").await;
        assert_eq!((&made["message"], &made["status"], &made["level"]), (&json!("answered"), &json!(201), &json!("INFO")));
        assert!(made.get("session_id").is_none() && made.get("turn").is_none(), "{made}");
        let chat = process.chat(&session, "Hi").await;
        let chatted = line(&mut process, "\"operation\":\"chat\"").await;
        assert_eq!(ids(&chatted), [&request_id(&chat), &json!(1), &json!(session), &json!(1)]);
        let read = process.get(&format!("/sessions/{session}/turns")).await;
        let listed = line(&mut process, "\"operation\":\"listTurns\"").await;
        assert_eq!(ids(&listed), [&request_id(&read), &json!(1), &json!(session), &Value::Null]);
        let temporary = process.post("/chat", json!({"message": "Hi"})).await;
        let chatted = line(&mut process, "\"operation\":\"chat\"").await;
        assert_eq!(chatted["session_id"], temporary.data()["session_id"]);
        process.get("/no/such/path").await.refused(404, "NOT_FOUND");
        let lost = line(&mut process, "/no/such/path").await;
        assert!(lost.get("operation").is_none() && lost["request_id"].is_string(), "{lost}");
    }

    async fn a_failing_model_is_logged_with_the_request_whatever_the_level(database: Database) {
        let upstream = Upstream::start(|_| Script::Raw(400, vec![], r#"{"error": "no"}"#.into())).await;
        let mut process = logging(&database, &upstream, "warn,atlus::cli=info").await;
        let session = process.session(json!({})).await;
        let failed = process.chat(&session, "Hi").await;
        failed.refused(502, "UPSTREAM_ERROR");
        let logged = line(&mut process, "model failed").await;
        assert_eq!((&logged["level"], &logged["target"]), (&json!("WARN"), &json!("atlus::chat::engine")));
        assert_eq!(ids(&logged), [&request_id(&failed), &json!(1), &json!(session), &json!(1)]);
    }

    async fn what_is_done_after_the_answer_is_logged_with_its_request(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "Hi" => Script::Say("Hello".into()),
            _ => Script::Raw(400, vec![], r#"{"error": "no"}"#.into()),
        }).await;
        let mut process = logging(&database, &upstream, "warn,atlus::cli=info").await;
        let session = process.session(json!({"user_id": "jo"})).await;
        let chat = process.chat(&session, "Hi").await;
        let logged = line(&mut process, "facts not extracted").await;
        assert_eq!(ids(&logged), [&request_id(&chat), &json!(1), &json!(session), &json!(1)]);
    }

    async fn the_tenant_is_the_one_of_the_key(database: Database) {
        let args = ["keys", "create", "--name", "k", "--tenant", "acme", "--scope", "read,write", "--format", "json"];
        let made = atlus(&args, &database.variables()).output().await.unwrap();
        let made: Value = serde_json::from_slice(&made.stdout).unwrap();
        let variables = [("ATLUS_AUTH", "required"), ("ATLUS_LOG_FORMAT", "json")];
        let mut process = Process::start(&database, &variables).await;
        process.with_key(made["secret"].as_str().unwrap()).get("/sessions").await.data();
        let listed = line(&mut process, "\"operation\":\"listSessions\"").await;
        assert_eq!((&listed["key"], listed["tenant"].as_i64().unwrap() > 1), (&made["key_id"], true));
        process.get("/sessions").await.refused(401, "UNAUTHORIZED");
        let refused = line(&mut process, "\"event\":\"refused\"").await;
        assert!(refused["request_id"].is_string() && refused.get("tenant").is_none(), "{refused}");
    }

    async fn lines_of_text_name_the_request_too(database: Database) {
        let mut process = Process::start(&database, &[]).await;
        let session = process.session(json!({})).await;
        let chat = process.chat(&session, "Hi").await;
        let line = process.line("operation=\"chat\"").await;
        let request = request_id(&chat);
        let named = format!("request{{request_id={} tenant=1 session_id={session} turn=1}}", request.as_str().unwrap());
        assert!(line.contains(&named), "{line}");
    }
}
