//! Row-level security: Postgres itself holds tenants apart, whatever a statement says.

use std::collections::BTreeSet;

use atlus::{
    domain::caller::TenantId,
    store::{ConnectError, Store, db::Reach},
};
use reqwest::Method;
use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::harness::{Answer, Client, Database, Process, Server};

/// A server that asks for keys, on a database that holds tenants apart.
async fn secured() -> Server {
    let database = Database::with_row_security(None).await;
    Server::with(database, |config| config.access.required = true).await
}

/// The numbers of two tenants, with a client of each.
async fn tenants(server: &Server) -> [(TenantId, Client); 2] {
    let mut tenants = Vec::new();
    for name in ["acme", "globex"] {
        let client = server.client_of(name, "read,write,admin", None).await;
        let every = server.app.store.tenants().await.unwrap();
        let (number, _) = every.into_iter().find(|(_, known)| known == name).unwrap();
        tenants.push((number, client));
    }
    tenants.try_into().ok().unwrap()
}

/// How many rows a statement without any condition sees.
async fn seen(store: &Store, reach: impl Into<Reach>, statement: &'static str) -> i64 {
    let (seen,) = store.database().read(reach, statement).one().await.unwrap();
    seen
}

async fn import(client: &Client, archive: &Answer) -> Answer {
    let request = client.request(Method::POST, "/import").header("Content-Type", "application/x-ndjson");
    client.send(request.body(archive.body.as_str().unwrap().to_owned())).await
}

/// Does everything that a tenant can, and takes it back.
async fn walk(client: Client) {
    let session = client.session(json!({"user_id": "ann", "metadata": {"a": 1}})).await;
    let path = format!("/sessions/{session}");
    let first =
        client.post_once("/chat", "k", &json!({"session_id": session, "message": "My name is Ann"})).await;
    let again =
        client.post_once("/chat", "k", &json!({"session_id": session, "message": "My name is Ann"})).await;
    assert_eq!(first.data().to_string(), again.data().to_string());
    assert_eq!(client.say(&session, "What's my name?").await, "Your name is Ann.");
    let events = client.stream(&session, "I play the violin").await.all().await;
    assert_eq!(events.last().unwrap().name, "done");
    let turns = json!({"turns": [{"message": "m", "response": "r"}]});
    assert_eq!(client.post(&format!("{path}/turns"), turns).await.data()["items"][0]["turn"], 4);
    assert_eq!(client.get(&format!("{path}/turns")).await.items().len(), 4);
    assert_eq!(client.get("/sessions?metadata=%7B%22a%22%3A1%7D").await.items().len(), 1);
    assert_eq!(client.get("/search?q=violin").await.items().len(), 1);
    assert_eq!(client.read("/users/ann/memory").await["facts"]["name"]["value"], "Ann");
    let memory = json!({"working_memory": {"step": 1}, "behavior_profile": {"tone": "casual"}});
    client.patch(&format!("{path}/memory"), memory).await.data();
    client.patch(&path, json!({"title": "Music"})).await.data();
    assert!(
        client.get(&format!("{path}/context?message=hi")).await.data()["token_count"].as_i64().unwrap() > 0
    );
    let fork = client.post(&format!("{path}/fork"), json!({})).await;
    let fork = fork.data()["session_id"].as_str().unwrap().to_owned();
    assert_eq!(client.get(&format!("/sessions/{fork}/turns")).await.items().len(), 4);
    client.delete(&format!("{path}/turns/3")).await.data();
    let archive = client.get(&format!("{path}/export")).await;
    assert_eq!(client.delete(&path).await.status, 200);
    assert_eq!(import(&client, &archive).await.data()["turns"], 4);
    assert_eq!(client.get(&format!("{path}/turns")).await.items()[0]["message"], "My name is Ann");
    assert_eq!(client.delete("/users/ann").await.data()["removed"]["sessions"], 2);
    client.get(&path).await.refused(404, "SESSION_NOT_FOUND");
    assert_eq!(client.get("/keys").await.items().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_for_two_tenants_at_once() {
    let server = secured().await;
    let [(_, acme), (_, globex)] = tenants(&server).await;
    tokio::join!(walk(acme), walk(globex));
    server.run_jobs(None).await;
    assert_eq!(server.count("SELECT COUNT(*) FROM turns").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_role_may_own_the_tables() {
    let mut database = Database::with_row_security(None).await;
    // What it makes belongs to it.
    database.direct.clone_from(&database.url);
    let server = Server::with(database, |config| config.access.required = true).await;
    let [(acme, client), (globex, _)] = tenants(&server).await;
    client.session(json!({})).await;
    let sessions = "SELECT COUNT(*) FROM sessions";
    assert_eq!(seen(&server.app.store, acme, sessions).await, 1);
    assert_eq!(seen(&server.app.store, globex, sessions).await, 0);
    walk(client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_batch_may_hold_writes_of_many_tenants() {
    let server = secured().await;
    let [(_, acme), (_, globex)] = tenants(&server).await;
    let mut chats = tokio::task::JoinSet::new();
    for client in [acme, globex].iter().cycle().take(40) {
        let client = client.clone();
        chats.spawn(async move {
            let session = client.session(json!({})).await;
            client.say(&session, "hello").await;
            client.say(&session, "hello again").await;
        });
    }
    chats.join_all().await;
    let turns = "SELECT COUNT(*) FROM turns WHERE status = 'completed'";
    assert_eq!(server.count(turns).await, 80);
    for (tenant, client) in tenants(&server).await {
        assert_eq!(seen(&server.app.store, tenant, turns).await, 40);
        assert_eq!(client.get("/sessions?limit=100").await.items().len(), 20);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_follows_a_commit_is_told_whom_it_is_about_again() {
    let server = secured().await;
    let [(_, client), _] = tenants(&server).await;
    let session = client.session(json!({})).await;
    server.run_sql("UPDATE sessions SET running_turn = 1, last_turn = 1").await;
    server.run_sql(
        "INSERT INTO turns (session_id, tenant_id, turn, status, message, message_tokens, metadata, request_id, created_at, \
             lease_expires_at) SELECT session_id, tenant_id, 1, 'running', 'm', 1, '{}', 'r', 0, 9000000000000000 FROM sessions",
    )
    .await;
    // Alone, the admission is a transaction; why it was not made is looked up in another.
    let refusal =
        client.post("/chat", json!({"session_id": session, "message": "hi", "on_busy": "reject"})).await;
    refusal.refused(409, "SESSION_BUSY");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_forgets_its_tenant_sees_and_changes_nothing_of_another() {
    let server = secured().await;
    let [(acme, one), (globex, other)] = tenants(&server).await;
    for client in [&one, &other] {
        let session = client.session(json!({"user_id": "ann"})).await;
        client.say(&session, "My name is Ann").await;
        client.post_once("/sessions", "k", &json!({})).await.data();
    }
    let store = &server.app.store;
    for (statement, rows) in [
        ("SELECT COUNT(*) FROM sessions", 2),
        ("SELECT COUNT(*) FROM turns", 1),
        ("SELECT COUNT(*) FROM session_memory", 2),
        ("SELECT COUNT(*) FROM facts", 1),
        ("SELECT COUNT(*) FROM idempotency_records", 1),
        ("SELECT COUNT(*) FROM api_keys", 1),
    ] {
        assert_eq!(seen(store, acme, statement).await, rows, "{statement}");
        let both = Reach::Tenants(BTreeSet::from([acme, globex]));
        assert_eq!(seen(store, both, statement).await, 2 * rows, "{statement}");
        assert_eq!(seen(store, Reach::Everybody, statement).await, 2 * rows, "{statement}");
        assert_eq!(seen(store, Reach::Tenants(BTreeSet::new()), statement).await, 0, "{statement}");
    }
    let mut tx = store.database().begin(acme).await.unwrap();
    assert_eq!(tx.sql("UPDATE sessions SET title = 'taken'").run().await.unwrap(), 2);
    assert_eq!(tx.sql("DELETE FROM facts").run().await.unwrap(), 1);
    tx.commit().await.unwrap();
    assert_eq!(server.count("SELECT COUNT(*) FROM sessions WHERE title IS NULL").await, 2);
    assert_eq!(server.count("SELECT COUNT(*) FROM facts").await, 1);
    // Nor is anything written for another.
    let mut tx = store.database().begin(acme).await.unwrap();
    let fact =
        "INSERT INTO facts (tenant_id, user_id, key, updated_at, value) VALUES ($1, 'ann', 'x', 1, '1')";
    assert!(tx.sql(fact).bind(globex).run().await.unwrap_err().to_string().contains("row-level security"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_table_that_holds_what_was_said_is_held_apart() {
    let database = Database::with_row_security(None).await;
    Store::migrate(&database.settings()).await.unwrap();
    let mut connection = PgConnection::connect(&database.direct).await.unwrap();
    let open = "SELECT c.relname::text FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid \
         WHERE a.attname = 'tenant_id' AND c.relkind = 'r' AND NOT (c.relrowsecurity AND c.relforcerowsecurity) \
         ORDER BY c.relname";
    let open: Vec<String> = sqlx::query_scalar(open).fetch_all(&mut connection).await.unwrap();
    // Names and digests only.
    assert_eq!(open, ["erasures", "search_entries", "tenants", "user_erasures"]);
}

#[tokio::test]
async fn whoever_is_exempt_is_refused_with_what_to_do() {
    let mut database = Database::with_row_security(None).await;
    database.url.clone_from(&database.direct);
    Store::migrate(&database.settings()).await.unwrap();
    let refused = Store::connect(&database.settings()).await.err().unwrap();
    assert!(matches!(refused, ConnectError::NoRowSecurity { .. }));
    assert!(
        refused.to_string().contains("connect as a role that is no superuser and has no BYPASSRLS"),
        "{refused}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_the_policies_are_on_a_server_without_the_setting_works_too() {
    let mut database = Database::with_row_security(None).await;
    Store::migrate(&database.settings()).await.unwrap();
    database.row_security = false;
    let server = Server::with(database, |config| config.access.required = true).await;
    let [(_, acme), (_, globex)] = tenants(&server).await;
    tokio::join!(walk(acme), walk(globex));
    // So does one that is exempt.
    let mut config = server.database.config();
    config.database.url = server.database.direct.parse().unwrap();
    let store = Store::connect(&config.database).await.unwrap();
    assert_eq!(store.tenants().await.unwrap().len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_binary_serves_with_it_and_so_do_its_commands() {
    let database = Database::with_row_security(None).await;
    let process = Process::start(&database, &[]).await;
    let session = process.session(json!({"user_id": "ann"})).await;
    process.say(&session, "My name is Ann").await;
    let run = async |args: &[&str]| {
        let output = crate::harness::atlus(args, &database.variables()).output().await.unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{args:?}: {told}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(run(&["export", "--all"]).await.contains("My name is Ann"));
    assert!(run(&["keys", "create", "--name", "k", "--tenant", "acme"]).await.contains("atlus_"));
    assert!(run(&["keys", "list"]).await.contains("acme"));
    run(&["migrate"]).await;
}
