//! What belongs to another tenant, or to another user for a key that is bound to one, answers exactly like what does not
//! exist, on every operation of the document; and asking changes nothing.

use std::collections::BTreeSet;

use atlus::{chat::Extract, domain::clock::Clock, store::Kind};
use reqwest::{Method, header::HeaderMap};
use serde_json::{Map, Value, json};

use crate::{
    archive,
    harness::{Answer, Client, Database, Events, Server, on_both, scripted},
    models::{Script, Upstream},
    schema::{DOCUMENT, operations},
};

/// What an operation is asked for. What stands in braces is named by whoever asks.
struct Request {
    query: &'static str,
    body: Body,
}

enum Body {
    None,
    Json(Value),
    /// A session with a turn.
    Archive,
}

fn get(query: &'static str) -> Request {
    Request { query, body: Body::None }
}

fn with(body: Value) -> Request {
    Request { query: "", body: Body::Json(body) }
}

/// What to ask an operation for, so that its owner gets it. Between them these requests name, in paths, parameters and
/// bodies, whatever can be named.
fn requests(operation: &str) -> Vec<Request> {
    match operation {
        "getHealth" | "getLiveness" | "getReadiness" | "getServiceCard" | "getMetrics" | "getSession"
        | "deleteSession" | "getTurn" | "deleteTurn" | "streamTurn" | "cancelTurn" | "getSessionMemory"
        | "resetSessionMemory" | "getUser" | "eraseUser" | "getUserMemory" | "forgetUserMemory"
        | "exportSession" | "exportUser" | "listKeys" | "revokeKey" => vec![get("")],
        "listSessions" => vec![
            get(""),
            get("?user_id={user_id}"),
            get("?temporary=true"),
            get("?order=created_at&direction=asc"),
            get("?metadata=%7B%22fruit%22%3A%22kiwi%22%7D"),
        ],
        "continueSession" => vec![get("?user_id={user_id}")],
        "listTurns" => vec![get(""), get("?status=completed&direction=desc&limit=1")],
        "getContext" => vec![get(""), get("?message=kiwi&max_tokens=500")],
        "search" => vec![
            get("?q=kiwi"),
            get("?q=kiwi&user_id={user_id}"),
            get("?q=kiwi&session_id={session_id}"),
            get("?q=%22ripe%20kiwi%22&user_id={user_id}&session_id={session_id}"),
        ],
        "createSession" => vec![with(json!({})), with(json!({"user_id": "{user_id}"}))],
        "updateSession" => {
            vec![with(json!({"title": "taken", "metadata": {"fruit": null}, "ttl_seconds": 60}))]
        }
        "forkSession" => vec![with(json!({})), with(json!({"turn": 1}))],
        "appendTurns" => vec![with(json!({"turns": [{"message": "My dog is Rex", "response": "Good dog"}]}))],
        "updateSessionMemory" => {
            vec![with(json!({"working_memory": {"step": 2}, "behavior_profile": {"tone": "casual"}}))]
        }
        "updateUserMemory" => vec![with(json!({"facts": {"dog": "Rex"}}))],
        "importArchive" => vec![Request { query: "", body: Body::Archive }],
        "createKey" => vec![
            with(json!({"name": "k", "scopes": ["read"]})),
            with(json!({"name": "k", "scopes": ["read"], "user_id": "{user_id}"})),
        ],
        "chat" | "chatStream" => vec![
            with(json!({"message": "My cat is Tom"})),
            with(json!({"message": "My cat is Tom", "user_id": "{user_id}"})),
            with(json!({"message": "My cat is Tom", "session_id": "{session_id}", "on_busy": "interrupt"})),
            with(json!({"message": "My cat is Tom", "session_id": "{session_id}", "user_id": "{user_id}"})),
            with(json!({"message": "  ", "session_id": "{session_id}", "on_busy": "reject"})),
        ],
        new => panic!("add to this table what {new} is to be asked for"),
    }
}

/// By what names somebody's things are asked for.
#[derive(Clone)]
struct Names {
    session_id: String,
    turn: i64,
    user_id: String,
    key_id: String,
}

impl Names {
    /// The names of nothing.
    fn unknown(turn: i64) -> Self {
        let session_id = "session_0000000000000000".to_owned();
        Self { session_id, turn, user_id: "nobody".to_owned(), key_id: "key_0000000000000000".to_owned() }
    }

    fn fill(&self, text: &str) -> String {
        let turn = self.turn.to_string();
        let names = self.names().into_iter().chain([("{turn}", turn.as_str())]);
        names.fold(text.to_owned(), |text, (place, name)| text.replace(place, name))
    }

    fn names(&self) -> [(&'static str, &str); 3] {
        [("{session_id}", &self.session_id), ("{user_id}", &self.user_id), ("{key_id}", &self.key_id)]
    }

    /// Asks by these names, with these headers.
    async fn ask(
        &self,
        client: &Client,
        (method, path): (&Method, &str),
        request: &Request,
        headers: HeaderMap,
    ) -> Answer {
        let url = format!("{}{}{}", client.base, self.fill(path), self.fill(request.query));
        let asked = client.http.request(method.clone(), url).headers(headers);
        client
            .send(match &request.body {
                Body::None => asked,
                Body::Json(body) => {
                    asked.header("Content-Type", "application/json").body(self.fill(&body.to_string()))
                }
                Body::Archive => {
                    let archive = archive::of_one_turn(&self.session_id, &self.user_id);
                    asked.header("Content-Type", "application/x-ndjson").body(archive)
                }
            })
            .await
    }

    /// An answer without what two answers differ in anyway, and with places in place of these names.
    fn without(&self, answer: &Answer) -> Value {
        let differ = ["x-request-id", "x-process-time", "date"];
        let counted =
            |name: &str| name.starts_with("ratelimit-") || (name == "content-length" && answer.status < 400);
        let headers = answer
            .headers
            .iter()
            .filter(|(name, _)| !differ.contains(&name.as_str()) && !counted(name.as_str()));
        let headers: Map<_, _> =
            headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().into())).collect();
        let body = match &answer.body {
            Value::String(text) => heard(text),
            body => body.clone(),
        };
        self.plain(json!({"status": answer.status, "headers": headers, "body": body}))
    }

    fn plain(&self, value: Value) -> Value {
        match value {
            Value::String(text) => {
                let text =
                    self.names().into_iter().fold(text, |text, (place, name)| text.replace(name, place));
                // Those that were made just now.
                let made = ["session_", "key_"].iter().any(|prefix| is_id(&text, prefix));
                if made { "made".into() } else { text.into() }
            }
            Value::Array(items) => items.into_iter().map(|item| self.plain(item)).collect(),
            Value::Object(fields) => {
                let random = ["request_id", "timestamp", "execution_time", "secret"];
                let fields = fields.into_iter().filter(|(name, _)| !random.contains(&name.as_str()));
                fields.map(|(name, value)| (name, self.plain(value))).collect()
            }
            other => other,
        }
    }
}

fn is_id(text: &str, prefix: &str) -> bool {
    text.strip_prefix(prefix)
        .is_some_and(|digits| digits.len() == 16 && digits.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// The events of a stream, their text in one piece however it was cut.
fn heard(stream: &str) -> Value {
    let events =
        stream.lines().filter_map(|line| serde_json::from_str::<Value>(line.strip_prefix("data: ")?).ok());
    let (deltas, others): (Vec<_>, Vec<_>) = events.partition(|event| event["text"].is_string());
    let text: String = deltas.iter().map(|delta| delta["text"].as_str().unwrap()).collect();
    json!({"text": text, "events": others})
}

/// The headers that an operation takes.
fn takes(operation: &Value, header: &str) -> bool {
    operation["parameters"].as_array().is_some_and(|all| all.iter().any(|one| one["name"] == header))
}

fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
    pairs.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
}

/// The idempotency key that the victim has sent a request with.
fn key_of(operation: &str, request: usize) -> String {
    format!("{operation}-{request}")
}

/// Somebody with one of everything, and every word of theirs about kiwis. Their last turn is running.
struct Victim {
    server: Server,
    upstream: Upstream,
    /// May do everything in the victim's tenant.
    admin: Client,
    names: Names,
    running: i64,
    _listening: Events,
}

const TENANT: &str = "acme";

impl Victim {
    async fn on(kind: Kind) -> Self {
        let upstream = Upstream::start(|message| match message {
            "Hold on" => Script::Begin("A ripe kiwi ".to_owned()),
            other => Script::Say(format!("You said: {other}")),
        })
        .await;
        let server = Server::with(Database::on(kind).await, |config| {
            config.access.required = true;
            config.model = scripted(&upstream.url);
            config.chat.extract = Extract::Rules;
            // What the running turn writes by itself would look like a change.
            config.chat.lease = std::time::Duration::from_secs(3600);
            config.chat.lease_renewal = std::time::Duration::from_secs(3600);
        })
        .await;
        let admin = server.client_of(TENANT, "read,write,admin", None).await;
        let bound = server.client_of(TENANT, "read,write", Some("victim")).await;
        let session_id = admin
            .session(json!({"user_id": "victim", "title": "Kiwis", "metadata": {"fruit": "kiwi"}, "system_prompt": "kiwi"}))
            .await;
        let key = admin.post("/keys", json!({"name": "kiwi"})).await;
        let key_id = key.data()["key_id"].as_str().unwrap().to_owned();
        let mut names = Names { session_id, turn: 1, user_id: "victim".to_owned(), key_id };
        admin.say(&names.session_id, "My name is Kiwi and a ripe kiwi is green").await;
        for (method, path, operation) in operations() {
            let id = operation["operationId"].as_str().unwrap();
            for (i, request) in
                requests(id).iter().enumerate().filter(|_| takes(&operation, "Idempotency-Key"))
            {
                for client in [&admin, &bound] {
                    let headers = headers(&[("Idempotency-Key", &key_of(id, i))]);
                    let first = names.ask(client, (&method, &path), request, headers).await;
                    assert!(first.status < 300 || request_is_empty(request), "{id} {first:?}");
                }
            }
        }
        let memory = json!({"working_memory": {"fruit": "kiwi"}});
        admin.patch(&format!("/sessions/{}/memory", names.session_id), memory).await.data();
        admin.patch("/users/victim/memory", json!({"facts": {"fruit": "kiwi"}})).await.data();
        server.run_sql("UPDATE session_memory SET summary = 'kiwi', summary_through = 1").await;
        let mut listening = admin.stream(&names.session_id, "Hold on").await;
        let running = listening.next().await.unwrap().data["turn"].as_i64().unwrap();
        while server.count("SELECT COUNT(*) FROM turn_pieces").await == 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        names.turn = 1;
        Self { server, upstream, admin, names, running, _listening: listening }
    }

    /// Everything that is kept of the victim's tenant.
    async fn rows(&self) -> BTreeSet<String> {
        let tenant = self.server.app.store.tenant_named(TENANT, self.server.clock.now()).await.unwrap();
        self.server.database.rows(tenant.number()).await
    }

    /// Asserts that strangers, each of whom asks one thing, learn nothing and change nothing.
    async fn is_unknown_to(&self, stranger: impl AsyncFn(usize) -> Client) {
        let before = self.rows().await;
        for (number, (method, path, operation)) in operations().into_iter().enumerate() {
            let id = operation["operationId"].as_str().unwrap();
            let stranger = stranger(number).await;
            for (i, request) in requests(id).iter().enumerate() {
                // An answer that is remembered for another, and a condition that another's state does not meet.
                let mut variants = vec![[headers(&[]), headers(&[])]];
                if takes(&operation, "Idempotency-Key") {
                    variants.push(
                        [key_of(id, i), format!("new-{i}")].map(|key| headers(&[("Idempotency-Key", &key)])),
                    );
                }
                if takes(&operation, "If-Match") {
                    variants.push(["\"0\"", "\"0\""].map(|tag| headers(&[("If-Match", tag)])));
                }
                let turns =
                    if path.contains("{turn}") { vec![self.names.turn, self.running] } else { vec![1] };
                for (turn, [own, other]) in
                    turns.iter().flat_map(|turn| variants.iter().map(move |both| (*turn, both.clone())))
                {
                    let (theirs, unknown) = (Names { turn, ..self.names.clone() }, Names::unknown(turn));
                    let asked = theirs.ask(&stranger, (&method, &path), request, own).await;
                    let nothing = unknown.ask(&stranger, (&method, &path), request, other).await;
                    assert_eq!(theirs.without(&asked), unknown.without(&nothing), "{id}, request {i}");
                    let text = format!("{}", asked.body).to_lowercase();
                    assert!(!text.contains("kiwi"), "{id}, request {i}: {text}");
                }
            }
        }
        let after = self.rows().await;
        assert!(before.is_subset(&after), "changed: {:#?}", before.difference(&after).collect::<Vec<_>>());
        let number = u64::from_str_radix(&self.names.session_id["session_".len()..], 16)
            .unwrap()
            .cast_signed()
            .to_string();
        let added: Vec<_> =
            after.difference(&before).filter(|row| row.contains(&number) || row.contains("victim")).collect();
        assert!(added.is_empty(), "{added:#?}");
        // The work on the running turn goes on.
        assert_eq!(self.upstream.left(), 0);
    }
}

/// Whether a request is one that nobody is answered.
fn request_is_empty(request: &Request) -> bool {
    matches!(&request.body, Body::Json(body) if body["message"] == "  ")
}

on_both! {
    async fn what_is_another_tenants_answers_like_what_does_not_exist(victim: Victim) {
        victim.is_unknown_to(async |i| {
            victim.server.client_of(&format!("stranger-{i}"), "read,write,admin", None).await
        }).await;
    }

    async fn what_is_another_users_answers_a_bound_key_like_what_does_not_exist(victim: Victim) {
        victim.is_unknown_to(async |i| {
            // With a scope that bound keys never get, so that it is not for this that they are refused.
            victim.server.client_of(TENANT, "read,write,admin", Some(&format!("stranger-{i}"))).await
        }).await;
    }

    async fn the_same_requests_are_answered_to_whom_they_are_about(victim: Victim) {
        let mut operations = operations();
        // What takes something away comes last, and the smaller things first.
        operations.sort_by_key(|(method, path, _)| {
            (method == Method::DELETE, !path.ends_with("/cancel"), std::cmp::Reverse(path.matches('/').count()))
        });
        for (method, path, operation) in operations {
            let id = operation["operationId"].as_str().unwrap();
            for request in requests(id).iter().filter(|request| !request_is_empty(request)) {
                let turn = if id == "cancelTurn" { victim.running } else { 1 };
                let names = Names { turn, ..victim.names.clone() };
                let answer = names.ask(&victim.admin, (&method, &path), request, HeaderMap::new()).await;
                assert!(answer.status < 300, "{id}: {answer:?}");
            }
        }
    }
}

/// A turn of this number that is being answered, and goes on until somebody ends it.
async fn begun(client: &Client, session: &str, turn: i64) -> Events {
    let mut events = client.stream(session, "Hold on").await;
    assert_eq!(events.next().await.unwrap().data["turn"], turn);
    // From now on the model knows when it is left.
    assert_eq!(events.next().await.unwrap().data["text"], "A ripe kiwi ");
    events
}

/// Two tenants, and in the first one two users to whom keys are bound. Each has a session, a key and a fact.
struct Neighbours {
    server: Server,
    /// May see everything of the first tenant.
    acme: Client,
    ann: Client,
    bob: Client,
    /// Of the second tenant.
    ann_elsewhere: Client,
}

impl Neighbours {
    async fn on(kind: Kind) -> Self {
        let server = Server::guarded(kind).await;
        let everything = "read,write,admin";
        let acme = server.client_of("acme", everything, None).await;
        let ann = server.client_of("acme", everything, Some("ann")).await;
        let bob = server.client_of("acme", everything, Some("bob")).await;
        let ann_elsewhere = server.client_of("globex", everything, None).await;
        for (client, user, thing) in
            [(&ann, "ann", "plum"), (&bob, "bob", "pear"), (&ann_elsewhere, "ann", "fig")]
        {
            for n in 0..3 {
                let session =
                    client.session(json!({"user_id": user, "title": thing, "metadata": {"n": n}})).await;
                client.say(&session, &format!("I like fruit such as a {thing}")).await;
            }
            client.patch(&format!("/users/{user}/memory"), json!({"facts": {"fruit": thing}})).await.data();
        }
        Self { server, acme, ann, bob, ann_elsewhere }
    }

    /// Each of them with the fruit that they may know of.
    fn all(&self) -> [(&Client, Vec<&str>); 4] {
        [
            (&self.acme, vec!["pear", "plum"]),
            (&self.ann, vec!["plum"]),
            (&self.bob, vec!["pear"]),
            (&self.ann_elsewhere, vec!["fig"]),
        ]
    }
}

/// Which kinds of fruit a text tells of.
fn fruit(text: &str) -> Vec<&'static str> {
    ["fig", "pear", "plum"].into_iter().filter(|thing| text.contains(thing)).collect()
}

on_both! {
    async fn lists_and_search_show_ones_own_alone(neighbours: Neighbours) {
        for (client, own) in neighbours.all() {
            for (path, seen) in [
                ("/sessions", own.len() * 3), ("/sessions?order=created_at", own.len() * 3), ("/search?q=fruit", own.len() * 3),
                ("/search?q=%22fruit+such+as%22", own.len() * 3), ("/search?q=fig+pear+plum", own.len() * 3),
                ("/sessions?metadata=%7B%22n%22%3A1%7D", own.len()),
            ] {
                let list = client.get(path).await;
                assert_eq!((list.items().len(), fruit(&list.body.to_string())), (seen, own.clone()), "{path}");
            }
            for path in ["/sessions/continue?user_id=ann", "/users/ann/memory", "/users/ann/export", "/search?q=fruit&user_id=ann"] {
                let ann = client.get(path).await.body.to_string();
                let allowed = fruit(&ann).iter().all(|thing| own.contains(thing) && *thing != "pear");
                assert!(allowed && fruit(&ann).is_empty() != (own.contains(&"fig") || own.contains(&"plum")), "{path}: {ann}");
            }
        }
        let keys = async |client: &Client| client.get("/keys").await.items().len();
        assert_eq!((keys(&neighbours.acme).await, keys(&neighbours.ann).await), (3, 1));
        assert_eq!(keys(&neighbours.ann_elsewhere).await, 1);
    }

    async fn a_cursor_of_anothers_leads_through_ones_own_alone(neighbours: Neighbours) {
        for path in ["/sessions?limit=1", "/sessions?limit=1&direction=asc", "/search?limit=1&q=fruit"] {
            for (owner, _) in neighbours.all() {
                let cursor = owner.get(path).await.data()["next_cursor"].as_str().unwrap().to_owned();
                for (client, own) in neighbours.all() {
                    let page = client.get(&format!("{path}&cursor={cursor}")).await;
                    assert!(fruit(&page.data().to_string()).iter().all(|thing| own.contains(thing)), "{page:?}");
                }
            }
        }
        let keys = neighbours.acme.get("/keys?limit=1").await;
        let path = format!("/keys?cursor={}", keys.data()["next_cursor"].as_str().unwrap());
        assert!(neighbours.ann_elsewhere.get(&path).await.items().iter().all(|key| key["tenant"] == "globex"));
        // Of turns, a cursor names the session it is about.
        let list = neighbours.ann.get("/sessions").await;
        let session = list.items()[0]["session_id"].as_str().unwrap();
        neighbours.ann.say(session, "And cake").await;
        let path = format!("/sessions/{session}/turns?limit=1");
        let cursor = neighbours.ann.get(&path).await.data()["next_cursor"].as_str().unwrap().to_owned();
        for stranger in [&neighbours.bob, &neighbours.ann_elsewhere] {
            stranger.get(&format!("{path}&cursor={cursor}")).await.refused(404, "SESSION_NOT_FOUND");
        }
    }

    async fn an_idempotency_key_is_ones_own(neighbours: Neighbours) {
        let mut made = BTreeSet::new();
        for (client, _) in neighbours.all() {
            for (path, body) in [("/sessions", json!({})), ("/chat", json!({"message": "hi"}))] {
                let first = client.post_once(path, &format!("order-17 {path}"), &body).await;
                assert!(!first.headers.contains_key("idempotency-replayed"));
                let again = client.post_once(path, &format!("order-17 {path}"), &body).await;
                assert_eq!(first.data().to_string(), again.data().to_string());
                assert!(again.headers.contains_key("idempotency-replayed"));
                made.insert(first.data()["session_id"].to_string());
            }
            let other = client.post_once("/sessions", "order-17 /sessions", &json!({"title": "x"})).await;
            other.refused(422, "IDEMPOTENCY_KEY_REUSED");
        }
        assert_eq!(made.len(), 8);
    }

    async fn a_bound_key_creates_for_its_own_user(neighbours: Neighbours) {
        let Neighbours { ann, acme, .. } = neighbours;
        let session = ann.session(json!({})).await;
        assert_eq!(ann.read(&format!("/sessions/{session}")).await["user_id"], "ann");
        let chat = ann.post("/chat", json!({"message": "hi"})).await;
        let session = chat.data()["session_id"].as_str().unwrap();
        assert_eq!(acme.read(&format!("/sessions/{session}")).await["user_id"], "ann");
        let fork = ann.post(&format!("/sessions/{session}/fork"), json!({})).await;
        assert_eq!(fork.data()["user_id"], "ann");
        let key = ann.post("/keys", json!({"name": "mine"})).await;
        assert_eq!(key.data()["user_id"], "ann");
    }

    async fn a_bound_key_creates_for_nobody_else(neighbours: Neighbours) {
        let Neighbours { server, ann, .. } = neighbours;
        let before = server.database.rows(1).await;
        for (path, body) in [
            ("/sessions", json!({"user_id": "bob"})), ("/chat", json!({"message": "hi", "user_id": "bob"})),
            ("/chat/stream", json!({"message": "hi", "user_id": "bob"})), ("/keys", json!({"name": "k", "user_id": "bob"})),
        ] {
            let refused = ann.post(path, body).await;
            assert!(refused.refused(403, "FORBIDDEN").contains("speaks for the user ann alone"), "{path}");
        }
        ann.patch("/users/bob/memory", json!({"facts": {"fruit": "none"}})).await.refused(403, "FORBIDDEN");
        assert_eq!(server.database.rows(1).await, before);
    }

    async fn an_archive_of_anothers_is_not_taken_from_a_bound_key(neighbours: Neighbours) {
        let Neighbours { ann, bob, ann_elsewhere, .. } = neighbours;
        let import = async |client: &Client, archive: String| {
            let request = client.request(Method::POST, "/import").header("Content-Type", "application/x-ndjson");
            client.send(request.body(archive)).await
        };
        let list = ann.get("/sessions").await;
        let session = list.items()[0]["session_id"].as_str().unwrap().to_owned();
        let path = format!("/sessions/{session}");
        let (own, users) = (ann.get(&format!("{path}/export")).await, ann.get("/users/ann/export").await);
        for archive in [own.body.as_str().unwrap(), users.body.as_str().unwrap()] {
            let refused = import(&bob, archive.to_owned()).await;
            assert!(refused.refused(403, "FORBIDDEN").contains("ann's, for whom this key does not speak"));
            assert_eq!(import(&ann, archive.to_owned()).await.data()["sessions"], 0);
        }
        // What is there under an id stays as it is, whoever brings something else.
        let before = ann.get(&path).await.data().clone();
        let brought = import(&bob, archive::of_one_turn(&session, "bob")).await;
        assert_eq!((&brought.data()["sessions"], &brought.data()["skipped_sessions"]), (&json!(0), &json!(1)));
        assert_eq!(*ann.get(&path).await.data(), before);
        bob.get(&path).await.refused(404, "SESSION_NOT_FOUND");
        // Another tenant may have a session of the same id.
        assert_eq!(import(&ann_elsewhere, archive::of_one_turn(&session, "bob")).await.data()["sessions"], 1);
        assert_eq!(*ann.get(&path).await.data(), before);
        assert_eq!(ann_elsewhere.get(&path).await.data()["user_id"], "bob");
    }

    async fn two_tenants_may_each_have_a_session_of_one_id(victim: Victim) {
        let Victim { server, upstream, admin, names, running, _listening: mut listening } = victim;
        let path = format!("/sessions/{}", names.session_id);
        let other = server.client_of("globex", "read,write", None).await;
        let archive = admin.get(&format!("{path}/export")).await.body.as_str().unwrap().to_owned();
        let import = other.request(Method::POST, "/import").header("Content-Type", "application/x-ndjson");
        assert_eq!(other.send(import.body(archive)).await.data()["sessions"], 1);

        // The turn that runs is not theirs.
        let turn = format!("{path}/turns/{running}");
        other.get(&format!("{turn}/stream")).await.refused(404, "TURN_NOT_FOUND");
        other.post(&format!("{turn}/cancel"), json!({})).await.refused(404, "TURN_NOT_FOUND");
        // Of one number, one ends and the other does not.
        let mut own = begun(&other, &names.session_id, running).await;
        other.post(&format!("{turn}/cancel"), json!({})).await.data();
        assert_eq!(own.next().await.unwrap().data["error"]["code"], "TURN_CANCELLED");
        let own = begun(&other, &names.session_id, running + 1).await;
        assert_eq!(other.delete(&path).await.status, 200);
        assert_eq!(own.all().await.last().unwrap().name, "error");
        upstream.left_times(2).await;
        assert_eq!(admin.get(&turn).await.data()["status"], "running");
        assert_eq!(listening.next().await.unwrap().data["text"], "A ripe kiwi ");
        admin.post(&format!("{turn}/cancel"), json!({})).await.data();
        assert_eq!(listening.next().await.unwrap().data["error"]["code"], "TURN_CANCELLED");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_tenant_cancels_at_one_server_goes_on_for_another_at_another() {
    let Victim { server, upstream, admin, names, running, .. } = Victim::on(Kind::Postgres).await;
    let there = Server::beside(server.database.clone(), |config| {
        config.access.required = true;
        config.model = scripted(&upstream.url);
    });
    let there = there.await;
    let key = server.key("globex", "read,write", None).await;
    let (here, there) = (server.with_key(key.reveal()), there.with_key(key.reveal()));
    let archive =
        admin.get(&format!("/sessions/{}/export", names.session_id)).await.body.as_str().unwrap().to_owned();
    let import = there.request(Method::POST, "/import").header("Content-Type", "application/x-ndjson");
    there.send(import.body(archive)).await.data();
    let cancel = async |session: &str, turn: i64| {
        there.post(&format!("/sessions/{session}/turns/{turn}/cancel"), json!({})).await.data();
    };
    let _same = begun(&there, &names.session_id, running).await;
    cancel(&names.session_id, running).await;
    // Once the server hears of this one, it has heard of the one before.
    let session = here.session(json!({})).await;
    let last = begun(&here, &session, 1).await;
    cancel(&session, 1).await;
    assert_eq!(last.all().await.last().unwrap().name, "error");
    upstream.left_times(2).await;
    let turn = format!("/sessions/{}/turns/{running}", names.session_id);
    assert_eq!(admin.get(&turn).await.data()["status"], "running");
    assert_eq!(upstream.left(), 2);
}

#[test]
fn whatever_can_be_named_is_named_in_the_requests() {
    for (_, _, operation) in operations() {
        let id = operation["operationId"].as_str().unwrap();
        let requests = requests(id);
        let parameters = operation["parameters"].as_array().into_iter().flatten();
        let names = parameters
            .filter(|parameter| parameter["in"] == "query")
            .map(|parameter| parameter["name"].as_str().unwrap());
        for name in names.filter(|name| name.ends_with("_id")) {
            let named = requests.iter().any(|request| request.query.contains(&format!("{name}={{{name}}}")));
            assert!(named, "no request of {id} names the parameter {name}");
        }
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let Some(schema) = schema.as_str().and_then(|target| DOCUMENT.pointer(&target[1..])) else {
            continue;
        };
        for name in schema["properties"].as_object().unwrap().keys().filter(|name| name.ends_with("_id")) {
            let place = json!(format!("{{{name}}}"));
            let named = requests
                .iter()
                .any(|request| matches!(&request.body, Body::Json(body) if body[name] == place));
            assert!(named, "no request of {id} names the field {name}");
        }
    }
}
