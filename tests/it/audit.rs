//! What the log keeps of who did what, and what it never holds.

use serde_json::{Value, json};

use crate::harness::{Database, Process, Server, on_both};

/// The binary with keys and a log of every detail, and the log so far.
struct Logged {
    process: Process,
    database: Database,
}

impl Logged {
    async fn on(kind: atlus::store::Kind) -> Self {
        let database = Database::on(kind).await;
        let variables = [("ATLUS_AUTH", "required"), ("ATLUS_LOG", "trace"), ("ATLUS_LOG_FORMAT", "json")];
        let mut process = Process::spawn(&database, &variables);
        process.listening().await;
        Self { process, database }
    }

    /// A key as `atlus keys` makes it.
    async fn key(&self, scopes: &str) -> Value {
        let args = ["keys", "create", "--name", "audit", "--scope", scopes, "--format", "json"];
        let made = crate::harness::atlus(&args, &self.database.variables()).output().await.unwrap();
        serde_json::from_slice(&made.stdout).unwrap()
    }

    /// The next event of this name.
    async fn event(&mut self, name: &str) -> Value {
        let line = self.process.line(&format!("\"event\":\"{name}\"")).await;
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["target"], "atlus::audit");
        event
    }
}

on_both! {
    async fn who_erased_exported_and_made_keys_is_in_the_log(logged: Logged) {
        let mut logged = logged;
        let key = logged.key("read,write,admin").await;
        let admin = logged.process.with_key(key["secret"].as_str().unwrap());
        let session = admin.session(json!({"user_id": "jo"})).await;
        admin.chat(&session, "Hello").await.data();
        let made = admin.post("/keys", json!({"name": "k"})).await;
        let made = made.data()["key_id"].as_str().unwrap().to_owned();
        let event = logged.event("key_created").await;
        assert_eq!((&event["about"], &event["key"], &event["tenant"]), (&json!(made), &key["key_id"], &json!(1)));
        admin.delete(&format!("/keys/{made}")).await.data();
        assert_eq!(logged.event("key_revoked").await["about"], made);
        for (method, path, name) in [
            (reqwest::Method::GET, format!("/sessions/{session}/export"), "exported"),
            (reqwest::Method::DELETE, format!("/sessions/{session}/turns/1"), "turn_erased"),
            (reqwest::Method::DELETE, format!("/sessions/{session}/memory"), "memory_erased"),
            (reqwest::Method::DELETE, format!("/sessions/{session}"), "session_deleted"),
            (reqwest::Method::DELETE, "/users/jo".to_owned(), "user_erased"),
        ] {
            let answer = admin.request(method, &path).bearer_auth(key["secret"].as_str().unwrap());
            let status = answer.send().await.unwrap().status().as_u16();
            let event = logged.event(name).await;
            assert_eq!((&event["path"], &event["status"]), (&json!(format!("/api/v1{path}")), &json!(status)));
            assert_eq!(event["key"], key["key_id"]);
        }
    }

    async fn who_was_refused_is_in_the_log(logged: Logged) {
        let mut logged = logged;
        logged.process.get("/sessions").await.refused(401, "UNAUTHORIZED");
        let event = logged.event("refused").await;
        assert_eq!((&event["code"], &event["client"]), (&json!("Unauthorized"), &json!("127.0.0.1")));
        let key = logged.key("read").await;
        let reader = logged.process.with_key(key["secret"].as_str().unwrap());
        reader.post("/sessions", json!({})).await.refused(403, "FORBIDDEN");
        let event = logged.event("refused").await;
        assert_eq!((&event["code"], &event["key"]), (&json!("Forbidden"), &key["key_id"]));
    }

    async fn neither_messages_nor_secrets_are_ever_in_the_log(logged: Logged) {
        let key = logged.key("read,write,admin").await;
        let secret = key["secret"].as_str().unwrap();
        let client = logged.process.with_key(secret);
        let body = json!({"user_id": "jo", "title": "canary-title", "system_prompt": "canary-prompt",
            "metadata": {"note": "canary-metadata"}});
        let session = client.session(body).await;
        client.chat(&session, "My name is Canarymessage").await.data();
        client.post("/chat", json!({"session_id": session, "message": 7, "canary-field": 1})).await;
        client.get("/search?q=canary-query").await.data();
        client.delete(&format!("/sessions/{session}")).await;
        let made = client.post("/keys", json!({"name": "k"})).await;
        let made = made.data()["secret"].as_str().unwrap().to_owned();
        logged.process.with_key("atlus_canary-wrong").get("/sessions").await.refused(401, "UNAUTHORIZED");
        let log = logged.process.stop().await.join("\n").to_lowercase();
        assert!(log.contains("answered"), "there is no log");
        for canary in ["canary", &secret[6..], &made[6..], "bearer atlus"] {
            let line = log.lines().find(|line| line.contains(canary));
            assert!(line.is_none(), "{canary} in {line:?}");
        }
    }

    async fn the_use_of_a_key_is_noted_and_logged_when_the_server_stops(logged: Logged) {
        let mut logged = logged;
        let key = logged.key("read").await;
        logged.process.with_key(key["secret"].as_str().unwrap()).get("/sessions").await.data();
        logged.process.signal("-TERM");
        assert_eq!(logged.event("key_used").await["key"], key["key_id"]);
        let server = Server::with(logged.database, |_| {}).await;
        assert_eq!(server.count("SELECT COUNT(*) FROM api_keys WHERE last_used_at > 0").await, 1);
    }
}
