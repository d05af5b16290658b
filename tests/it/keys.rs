//! Keys: who gets in, as whom, and for what.

use atlus::{domain::key::Secret, jobs};
use reqwest::Method;
use serde_json::{Value, json};

use crate::{
    harness::{Answer, Client, Database, Process, Server, atlus, on_both},
    schema::operations,
};

/// A server that asks for keys.
struct Guarded(Server);

impl Guarded {
    async fn on(kind: atlus::store::Kind) -> Self {
        Self(Server::guarded(kind).await)
    }
}

/// Makes a key over HTTP; the answer's `data`.
async fn made(admin: &Client, body: Value) -> Value {
    let made = admin.post("/keys", body).await;
    assert_eq!(made.status, 201, "{made:?}");
    made.data().clone()
}

fn secret(key: &Value) -> &str {
    key["secret"].as_str().unwrap()
}

/// Calls an operation with nothing but what its path needs.
async fn call(client: &Client, method: &Method, path: &str) -> Answer {
    let path = path.replace("{session_id}", "session_0000000000000000").replace("{turn}", "1");
    let path = path.replace("{user_id}", "nobody").replace("{key_id}", "key_0000000000000000");
    client.send(client.http.request(method.clone(), format!("{}{path}", client.base))).await
}

on_both! {
    async fn every_operation_that_has_a_scope_refuses_a_call_without_a_key(guarded: Guarded) {
        let mut open = Vec::new();
        for (method, path, operation) in operations() {
            let is_open = operation["security"] == json!([]);
            assert_eq!(is_open, operation.get("x-required-scope").is_none(), "{path}");
            if is_open {
                open.push(path);
                continue;
            }
            let refused = call(&guarded.0, &method, &path).await;
            refused.refused(401, "UNAUTHORIZED");
            assert_eq!(refused.headers["www-authenticate"], "Bearer realm=\"atlus\"", "{path}");
        }
        assert_eq!(open, ["/api/v1/health", "/livez", "/readyz"]);
    }

    async fn every_operation_refuses_a_key_without_its_scope(guarded: Guarded) {
        for (method, path, operation) in operations() {
            let Some(scope) = operation["x-required-scope"].as_str() else { continue };
            let others = ["read", "write", "admin"].into_iter().filter(|other| *other != scope);
            let others = others.collect::<Vec<_>>().join(",");
            let client = guarded.0.client_of("default", &others, None).await;
            let refused = call(&client, &method, &path).await;
            assert!(refused.refused(403, "FORBIDDEN").contains(scope), "{method} {path}");
        }
    }

    async fn every_operation_lets_a_key_with_its_scope_in(guarded: Guarded) {
        for (method, path, operation) in operations() {
            let Some(scope) = operation["x-required-scope"].as_str() else { continue };
            let client = guarded.0.client_of("default", scope, None).await;
            let answer = call(&client, &method, &path).await;
            assert!(![401, 403].contains(&answer.status), "{method} {path}: {answer:?}");
        }
    }

    async fn what_needs_no_key_needs_none(guarded: Guarded) {
        for path in ["/api/v1/health", "/livez", "/readyz", "/docs", "/openapi.json", "/openapi.yaml"] {
            let answer = guarded.0.http.get(format!("{}{path}", guarded.0.base)).send().await.unwrap();
            assert_eq!(answer.status(), 200, "{path}");
        }
    }

    async fn a_key_comes_in_either_header(guarded: Guarded) {
        let key = guarded.0.key("default", "read", None).await;
        let (bearer, secret) = (format!("Bearer {}", key.reveal()), key.reveal().to_owned());
        let get = || guarded.0.request(Method::GET, "/sessions");
        for (name, value) in [("Authorization", &bearer), ("X-API-Key", &secret)] {
            assert_eq!(guarded.0.send(get().header(name, value)).await.status, 200, "{name}");
        }
        let lower = get().header("authorization", bearer.replace("Bearer", "bearer"));
        assert_eq!(guarded.0.send(lower).await.status, 200);
        let both = get().header("Authorization", &bearer).header("X-API-Key", &secret);
        assert_eq!(guarded.0.send(both).await.status, 200);
    }

    async fn what_is_no_valid_key_is_refused_alike(guarded: Guarded) {
        let valid = guarded.0.key("default", "read", None).await;
        let unknown = Secret::random();
        let mut mistyped = valid.reveal().to_owned();
        mistyped.replace_range(10..11, if &mistyped[10..11] == "0" { "1" } else { "0" });
        let expired = guarded.0.key("default", "read", None).await;
        guarded.0.run_sql("UPDATE api_keys SET expires_at = 1 WHERE name = 'expired'").await;
        let bearers = [
            format!("Bearer {}", unknown.reveal()), format!("Bearer {mistyped}"), "Bearer ".to_owned(),
            "Bearer".to_owned(), format!("Basic {}", valid.reveal()), valid.reveal().to_owned(),
            format!("Bearer {} {}", valid.reveal(), expired.reveal()), "Bearer ' OR 1=1 --".to_owned(),
        ];
        let mut messages = Vec::new();
        for bearer in bearers {
            let request = guarded.0.request(Method::GET, "/sessions").header("Authorization", &bearer);
            messages.push(guarded.0.send(request).await.refused(401, "UNAUTHORIZED").to_owned());
        }
        let request = guarded.0.request(Method::GET, "/sessions");
        let two = request.header("Authorization", format!("Bearer {}", valid.reveal()));
        let two = two.header("X-API-Key", expired.reveal());
        messages.push(guarded.0.send(two).await.refused(401, "UNAUTHORIZED").to_owned());
        let request = guarded.0.request(Method::GET, "/sessions");
        let twice = request.header("X-API-Key", valid.reveal()).header("X-API-Key", valid.reveal());
        messages.push(guarded.0.send(twice).await.refused(401, "UNAUTHORIZED").to_owned());
        messages.dedup();
        assert_eq!(messages.len(), 1, "{messages:?}");
    }

    async fn a_key_in_the_query_is_not_looked_at(guarded: Guarded) {
        let key = guarded.0.key("default", "read", None).await;
        for name in ["api_key", "key", "access_token", "X-API-Key"] {
            guarded.0.get(&format!("/sessions?{name}={}", key.reveal())).await.refused(401, "UNAUTHORIZED");
        }
    }

    async fn a_strangers_body_is_not_read(guarded: Guarded) {
        let broken = guarded.0.request(Method::POST, "/sessions").header("Content-Type", "application/json");
        guarded.0.send(broken.body("{")).await.refused(401, "UNAUTHORIZED");
        let read_only = guarded.0.client_of("default", "read", None).await;
        let broken = read_only.request(Method::POST, "/sessions").header("Content-Type", "text/plain");
        read_only.send(broken.body("{")).await.refused(403, "FORBIDDEN");
    }

    async fn a_key_is_made_listed_used_and_revoked(guarded: Guarded) {
        let admin = guarded.0.client_of("acme", "read,write,admin", None).await;
        let key = made(&admin, json!({"name": "shop", "scopes": ["read"], "user_id": "jo",
            "expires_at": "2024-02-01T00:00:00.000Z"})).await;
        assert_eq!(key["tenant"], "acme");
        assert_eq!((&key["name"], &key["scopes"], &key["user_id"]), (&json!("shop"), &json!(["read"]), &json!("jo")));
        assert_eq!(key["expires_at"], "2024-02-01T00:00:00.000Z");
        let jo = guarded.0.with_key(secret(&key));
        assert_eq!(jo.get("/sessions").await.status, 200);

        let listed = admin.get("/keys").await;
        let found = listed.items().iter().find(|item| item["key_id"] == key["key_id"]).unwrap();
        assert!(found.get("secret").is_none() && found["last_used_at"].is_null());
        jobs::keys::note_uses(&guarded.0.app).await.unwrap();
        let listed = admin.get("/keys").await;
        let found = listed.items().iter().find(|item| item["key_id"] == key["key_id"]).unwrap();
        assert_eq!(found["last_used_at"], "2024-01-01T12:00:00.000Z");

        let path = format!("/keys/{}", key["key_id"].as_str().unwrap());
        assert_eq!(admin.delete(&path).await.data()["name"], "shop");
        jo.get("/sessions").await.refused(401, "UNAUTHORIZED");
        admin.delete(&path).await.refused(404, "KEY_NOT_FOUND");
    }

    async fn a_key_stops_working_when_its_time_is_over(guarded: Guarded) {
        let admin = guarded.0.client_of("default", "read,admin", None).await;
        let key = made(&admin, json!({"name": "short", "scopes": ["read"], "expires_at": "2024-01-01T12:01:00.000Z"}));
        let short = guarded.0.with_key(secret(&key.await));
        assert_eq!(short.get("/sessions").await.status, 200);
        guarded.0.clock.advance(std::time::Duration::from_secs(60));
        short.get("/sessions").await.refused(401, "UNAUTHORIZED");
    }

    async fn a_revoked_key_stops_working_at_other_instances_within_seconds(guarded: Guarded) {
        let other = Server::beside(guarded.0.database.clone(), |config| config.access.required = true).await;
        let admin = guarded.0.client_of("default", "admin", None).await;
        let key = guarded.0.key("default", "read", None).await;
        let elsewhere = other.with_key(key.reveal());
        assert_eq!(elsewhere.get("/sessions").await.status, 200);
        let listed = admin.get("/keys").await;
        let id = listed.items().iter().find(|item| item["scopes"] == json!(["read"])).unwrap()["key_id"].clone();
        assert_eq!(admin.delete(&format!("/keys/{}", id.as_str().unwrap())).await.status, 200);
        let started = std::time::Instant::now();
        while elsewhere.get("/sessions").await.status == 200 {
            // Were the key never looked up again, this would be for ever.
            assert!(started.elapsed() < std::time::Duration::from_secs(60));
        }
    }

    async fn nobody_makes_a_key_that_allows_more_than_their_own(guarded: Guarded) {
        let admin = guarded.0.client_of("default", "read,admin", None).await;
        admin.post("/keys", json!({"name": "wide", "scopes": ["write"]})).await.refused(403, "FORBIDDEN");
        admin.post("/keys", json!({"name": "usual"})).await.refused(403, "FORBIDDEN");
        let key = made(&admin, json!({"name": "narrow", "scopes": ["read", "read"]})).await;
        assert_eq!(key["scopes"], json!(["read"]));
    }

    async fn what_does_not_fit_a_key_is_refused_with_its_field(guarded: Guarded) {
        let admin = guarded.0.client_of("default", "read,write,admin", None).await;
        for (field, body) in [
            ("name", json!({})),
            ("name", json!({"name": "  "})),
            ("name", json!({"name": "x".repeat(101)})),
            ("scopes", json!({"name": "k", "scopes": []})),
            ("scopes[0]", json!({"name": "k", "scopes": ["root"]})),
            ("scopes", json!({"name": "k", "scopes": ["admin"], "user_id": "jo"})),
            ("user_id", json!({"name": "k", "user_id": ""})),
            ("expires_at", json!({"name": "k", "expires_at": "2024-01-01T12:00:00.000Z"})),
            ("expires_at", json!({"name": "k", "expires_at": "soon"})),
        ] {
            admin.post("/keys", body).await.refuses_field(field);
        }
        admin.post_once("/keys", "k", &json!({"name": "k"})).await.refuses_field("Idempotency-Key");
        assert_eq!(admin.get("/keys").await.items().len(), 1);
    }

    async fn keys_are_listed_in_pages_of_ones_own_tenant(guarded: Guarded) {
        let admin = guarded.0.client_of("acme", "admin", None).await;
        guarded.0.key("other", "admin", None).await;
        for _ in 0..4 {
            guarded.0.key("acme", "read", None).await;
        }
        let (mut seen, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = admin.get(&format!("/keys?limit=2{cursor}")).await;
            seen.extend(page.items().iter().map(|item| item["key_id"].clone()));
            assert!(page.items().iter().all(|item| item["tenant"] == "acme"));
            match page.data()["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
        let all: std::collections::HashSet<_> = seen.iter().map(Value::to_string).collect();
        assert_eq!((seen.len(), all.len()), (5, 5));
    }

    async fn of_a_secret_only_the_hash_is_kept(guarded: Guarded) {
        let admin = guarded.0.client_of("default", "read,admin", None).await;
        let key = made(&admin, json!({"name": "k", "scopes": ["read"]})).await;
        guarded.0.with_key(secret(&key)).get("/sessions").await.data();
        let digits = secret(&key).strip_prefix("atlus_").unwrap();
        assert!(!guarded.0.database.contents().await.contains(digits));
    }

    async fn erasing_a_user_revokes_the_keys_that_are_bound_to_them(guarded: Guarded) {
        let admin = guarded.0.client_of("default", "admin", None).await;
        let jo = guarded.0.client_of("default", "read,write", Some("jo")).await;
        jo.session(json!({})).await;
        let erased = admin.delete("/users/jo").await;
        assert_eq!(erased.data()["removed"]["keys"], 1);
        assert!(!guarded.0.database.contents().await.contains("api_keys: jo"));
        jo.get("/sessions").await.refused(401, "UNAUTHORIZED");
    }
}

/// Runs `atlus keys …` on a database; what it printed, if it succeeded.
async fn keys(database: &Database, args: &[&str]) -> Result<String, String> {
    let args = [&["keys"], args].concat();
    let output = atlus(&args, &database.variables()).output().await.unwrap();
    match output.status.success() {
        true => Ok(String::from_utf8(output.stdout).unwrap()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

struct Fresh(Database);

impl Fresh {
    async fn on(kind: atlus::store::Kind) -> Self {
        Self(Database::empty(kind).await)
    }
}

on_both! {
    async fn the_first_key_needs_no_server(fresh: Fresh) {
        let made = keys(&fresh.0, &["create", "--name", "first", "--tenant", "acme", "--scope", "read,write,admin",
            "--expires", "90d", "--format", "json"]).await.unwrap();
        let key: Value = serde_json::from_str(&made).unwrap();
        let fields: Vec<_> = key.as_object().unwrap().keys().collect();
        assert_eq!(fields,
            ["key_id", "secret", "name", "tenant", "scopes", "user_id", "created_at", "expires_at"]);
        assert_eq!((&key["tenant"], &key["scopes"]), (&json!("acme"), &json!(["read", "write", "admin"])));

        let process = Process::start(&fresh.0, &[("ATLUS_AUTH", "required")]).await;
        process.get("/sessions").await.refused(401, "UNAUTHORIZED");
        let client = process.with_key(secret(&key));
        client.session(json!({"user_id": "jo"})).await;
        assert_eq!(client.get("/sessions").await.items().len(), 1);

        let listed = keys(&fresh.0, &["list"]).await.unwrap();
        let id = key["key_id"].as_str().unwrap();
        assert!(listed.contains(id) && !listed.contains(secret(&key)), "{listed}");
        keys(&fresh.0, &["revoke", id]).await.unwrap();
        assert_eq!(keys(&fresh.0, &["list"]).await.unwrap(), "");
    }

    async fn wrong_words_make_no_key(fresh: Fresh) {
        for (args, problem) in [
            (&["--name", ""][..], "--name must be 1 to 100"),
            (&["--name", "k", "--tenant", "a b"], "--tenant must be"),
            (&["--name", "k", "--scope", "read,root"], "\"root\""),
            (&["--name", "k", "--scope", "admin", "--user", "jo"], "must not hold admin"),
            (&["--name", "k", "--expires", "soon"], "--expires must be a duration"),
            (&["--name", "k", "--expires", "0s"], "--expires must be a duration"),
            (&["--name", "k", "--user", ""], "--user "),
        ] {
            let refused = keys(&fresh.0, &[&["create"], args].concat()).await.unwrap_err();
            assert!(refused.contains(problem), "{args:?}: {refused}");
        }
        assert!(keys(&fresh.0, &["revoke", "key_1"]).await.unwrap_err().contains("16 hex digits"));
        let unknown = keys(&fresh.0, &["revoke", "key_0000000000000000"]).await.unwrap_err();
        assert!(unknown.contains("there is no key"), "{unknown}");
    }
}

#[tokio::test]
async fn a_first_start_says_how_to_make_a_key() {
    for (auth, words) in [("auto", "callers need no key"), ("required", "there is none yet")] {
        let database = Database::empty(atlus::store::Kind::Sqlite).await;
        let mut process = Process::spawn(&database, &[("ATLUS_AUTH", auth)]);
        assert!(process.line(words).await.contains("atlus keys create --name first"));
    }
}

#[tokio::test]
async fn on_other_addresses_than_loopback_the_server_explains_and_stops() {
    let database = Database::empty(atlus::store::Kind::Sqlite).await;
    let mut refused = atlus(&["serve", "--listen", "0.0.0.0:0"], &database.variables());
    let refused = String::from_utf8(refused.output().await.unwrap().stderr).unwrap();
    for words in ["ATLUS_AUTH=required", "atlus keys create", "ATLUS_AUTH=off"] {
        assert!(refused.contains(words), "{refused}");
    }
}
