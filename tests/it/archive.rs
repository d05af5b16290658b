//! Taking sessions out and in: what comes back, what is refused, and what breaks off half-way.

use std::{fmt::Write, io::Write as _, process::Stdio, sync::Arc, time::Duration};

use atlus::{
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::{SessionId, digest},
    },
    store::{Kind, NotExported, What},
};
use futures_util::StreamExt;
use reqwest::Method;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::{
    io::AsyncWriteExt,
    net::TcpStream,
    sync::{Semaphore, mpsc},
};

use crate::{
    harness::{Answer, Client, Database, Server, atlus, on_both},
    models::{Script, Upstream},
};

const ID: &str = "session_00000000000000aa";
const NDJSON: &str = "application/x-ndjson";

fn sha256(text: &str) -> String {
    Sha256::digest(text).iter().fold("sha256:".to_owned(), |hex, byte| format!("{hex}{byte:02x}"))
}

/// A session's line.
fn session(id: &str) -> Value {
    json!({
        "type": "session", "session_id": id, "user_id": "user_1", "title": null, "metadata": {}, "system_prompt": null,
        "created_at": "2024-01-01T00:00:00.000Z", "last_activity": "2024-01-02T00:00:00.123Z", "ttl_seconds": null,
        "ended_at": null, "temporary": false, "forked_from": null, "conversation_turns": 0,
        "memory": {
            "working_memory": {}, "behavior_profile": {"verbosity": "medium", "tone": "neutral", "depth": "normal"},
            "profile_turns": {"verbosity": null, "tone": null, "depth": null}, "summary": null,
            "summary_through": null, "updated_at": "2024-01-01T00:00:00.000Z",
        },
    })
}

/// A completed turn's line.
fn turn(turn: usize, message: &str, response: &str) -> Value {
    json!({
        "type": "turn", "turn": turn, "status": "completed", "message": message, "response": response, "error": null,
        "model": "m", "usage": null, "execution_us": 1234, "request_id": "req_1", "metadata": {},
        "created_at": "2024-01-01T00:00:01.000Z", "completed_at": "2024-01-01T00:00:02.000Z",
    })
}

fn fact(key: &str, source: Option<(&str, i64)>) -> Value {
    json!({
        "type": "fact", "user_id": "user_1", "key": key, "value": {"b": 1.0, "a": [-0.0, 12_345_678_901_234_567_890_u64]},
        "session_id": source.map(|(session, _)| session), "turn": source.map(|(_, turn)| turn),
        "updated_at": "2024-01-03T00:00:00.000Z",
    })
}

/// The lines of an archive of these sessions, each a line and those of its turns, and facts.
fn archive(sessions: &[Vec<Value>], facts: &[Value]) -> String {
    let header = json!({
        "type": "archive", "format": "atlus", "version": 1, "of": "user", "exported_at": "2024-01-01T12:00:00.000Z",
        "atlus": "0.1.0",
    });
    let (mut body, mut turns) = (String::new(), 0);
    for lines in sessions {
        let text = lines.iter().fold(String::new(), |text, line| format!("{text}{line}\n"));
        let count = lines.iter().filter(|line| line["type"] == "turn").count();
        let end = json!({
            "type": "session_end", "session_id": lines[0]["session_id"], "turns": count, "digest": sha256(&text),
        });
        writeln!(body, "{text}{end}").unwrap();
        turns += count;
    }
    for fact in facts {
        writeln!(body, "{fact}").unwrap();
    }
    let end = json!({
        "type": "end", "sessions": sessions.len(), "turns": turns, "facts": facts.len(), "digest": sha256(&body),
    });
    format!("{header}\n{body}{end}\n")
}

/// One session of so many turns.
fn long_session(id: &str, turns: usize) -> Vec<Value> {
    let mut first = session(id);
    first["conversation_turns"] = json!(turns);
    let turns = (1..=turns).map(|number| turn(number, &format!("message {number}"), "noted"));
    std::iter::once(first).chain(turns).collect()
}

/// The archive of a user's session with one turn.
pub fn of_one_turn(id: &str, user: &str) -> String {
    let mut lines = long_session(id, 1);
    lines[0]["user_id"] = json!(user);
    archive(&[lines], &[])
}

/// Everything that can be kept.
fn everything() -> String {
    let mut first = session(ID);
    first["title"] = json!("Trip to \u{1f980}\u{202e}\u{7f}");
    first["metadata"] =
        json!({"z": 1, "a": {"y": 1.0, "x": -0.0}, "big": 12_345_678_901_234_567_890_u64, "e": 1e300});
    first["system_prompt"] = json!("Be\r\n\tbrief\u{1}.");
    first["ttl_seconds"] = json!(3600);
    first["ended_at"] = json!("2024-01-02T00:00:00.124Z");
    first["forked_from"] = json!({"session_id": "session_ffffffffffffffff", "turn": 7});
    first["conversation_turns"] = json!(2);
    first["memory"] = json!({
        "working_memory": {"b": null, "a": ["\u{feff}"]},
        "behavior_profile": {"verbosity": "low", "tone": "technical", "depth": "advanced"},
        "profile_turns": {"verbosity": 1, "tone": 4, "depth": null}, "summary": "So far: \"nothing\".",
        "summary_through": 1, "updated_at": "2024-01-01T00:00:00.777Z",
    });
    let mut answered =
        turn(1, "Hi\u{0}".trim_end_matches('\0'), "e\u{301} é 日本 \u{1b}[0m \u{2028} \\u0000 \\");
    answered["usage"] = json!({"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3});
    answered["metadata"] = json!({"k": "v"});
    let ended = |number: usize, status: &str, code: Value| {
        let mut ended = turn(number, "m", "");
        (ended["status"], ended["response"], ended["model"]) = (json!(status), json!(null), json!(null));
        ended["error"] = code;
        ended
    };
    let failed = ended(2, "failed", json!({"code": "UPSTREAM_ERROR", "message": "no"}));
    let mut deleted = ended(3, "deleted", json!(null));
    (deleted["message"], deleted["execution_us"], deleted["completed_at"]) =
        (json!(""), json!(null), json!(null));
    let cancelled =
        ended(4, "cancelled", json!({"code": "TURN_CANCELLED", "message": "The turn was cancelled"}));
    let mut temporary = session("session_0000000000000001");
    (temporary["temporary"], temporary["ttl_seconds"]) = (json!(true), json!(86_400));
    archive(
        &[
            vec![first, answered, failed, deleted, cancelled],
            vec![session("session_00000000000000bb")],
            vec![temporary],
        ],
        &[fact("a", None), fact("a", Some((ID, 1))), fact("é", None)],
    )
}

/// The lines after the first, which says when the archive was written.
fn lines(archive: &str) -> &str {
    archive.split_once('\n').unwrap().1
}

fn end(archive: &str) -> Value {
    serde_json::from_str(archive.lines().last().unwrap()).unwrap()
}

async fn export(server: &Client, path: &str) -> String {
    let answer = server.request(Method::GET, path).send().await.unwrap();
    assert_eq!(
        (answer.status().as_u16(), &answer.headers()["content-type"]),
        (200, &NDJSON.parse().unwrap())
    );
    answer.text().await.unwrap()
}

async fn import(server: &Client, archive: impl Into<reqwest::Body>) -> Answer {
    let request = server.request(Method::POST, "/import").header("Content-Type", NDJSON);
    server.send(request.body(archive)).await
}

/// Imports what must be taken; what was written: sessions, turns, facts, and sessions skipped.
async fn take(server: &Client, archive: &str) -> [i64; 4] {
    let answer = import(server, archive.to_owned()).await;
    assert_eq!(answer.status, 200, "{answer:?}");
    ["sessions", "turns", "facts", "skipped_sessions"].map(|name| answer.data()[name].as_i64().unwrap())
}

/// An import whose archive is sent piece by piece.
fn begin(server: &Client) -> (mpsc::Sender<Result<String, std::io::Error>>, tokio::task::JoinHandle<Answer>) {
    let (sender, receiver) = mpsc::channel(1);
    let pieces = futures_util::stream::unfold(receiver, async |mut receiver: mpsc::Receiver<_>| {
        Some((receiver.recv().await?, receiver))
    });
    let (server, body) = (server.clone(), reqwest::Body::wrap_stream(pieces));
    (sender, tokio::spawn(async move { import(&server, body).await }))
}

async fn execute(server: &Server, sql: &'static str) {
    let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
    tx.sql(sql).run().await.unwrap();
    tx.commit().await.unwrap();
}

const STAGED: &str = "SELECT COUNT(*) FROM erasures";
const TURNS: &str = "SELECT COUNT(*) FROM turns";
const ENTRIES: &str = "SELECT COUNT(*) FROM search_entries";

/// Waits until so many rows are there.
async fn until(server: &Server, sql: &'static str, wanted: impl Fn(i64) -> bool) {
    let wait = async {
        while !wanted(server.count(sql).await) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), wait).await.unwrap();
}

on_both! {
    async fn what_was_exported_comes_back_after_it_was_deleted(database: Database) {
        let upstream = Upstream::start(|message| match message {
            "fail" => Script::Raw(500, vec![], String::new()),
            other => Script::Say(format!("You said {other}")),
        }).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let body = json!({
            "user_id": "user_123", "metadata": {"z": 1, "a": 1.0}, "title": "Trip", "system_prompt": "Be brief.",
            "ttl_seconds": 3600,
        });
        let id = server.session(body).await;
        for message in ["one", "fail", "日本 \u{1}"] {
            server.chat(&id, message).await;
        }
        let (path, turns) = (format!("/sessions/{id}"), format!("/sessions/{id}/turns"));
        let before = [server.get(&path).await.data().clone(), server.get(&turns).await.data().clone()];
        let etag = server.get(&path).await.headers["etag"].clone();
        let archive = export(&server, &format!("{path}/export")).await;
        let entries = server.count(ENTRIES).await;
        server.delete(&path).await;
        assert_eq!(take(&server, &archive).await, [1, 3, 0, 0]);
        let after = [server.get(&path).await.data().clone(), server.get(&turns).await.data().clone()];
        assert_eq!(before, after);
        assert_eq!(server.get(&path).await.headers["etag"], etag);
        assert_eq!((entries, server.count(ENTRIES).await, server.count(STAGED).await), (2, 2, 0));
        assert_eq!(lines(&export(&server, &format!("{path}/export")).await), lines(&archive));
        // It goes on where it was.
        let next = server.chat(&id, "four").await;
        assert_eq!(next.data()["turn"], 4);
        assert_eq!(upstream.prompts().last().unwrap().len(), 6);
    }

    async fn everything_that_is_kept_comes_back_byte_for_byte(server: Server) {
        let archive = everything();
        assert_eq!(take(&server, &archive).await, [3, 4, 3, 0]);
        let back = export(&server, "/users/user_1/export").await;
        assert_eq!(lines(&back), lines(&archive));
        assert_eq!(server.count("SELECT summary_tokens FROM session_memory WHERE summary IS NOT NULL").await, 5);
        assert_eq!(server.count("SELECT message_tokens + response_tokens FROM turns WHERE turn = 1").await, 11);
        let read = server.get(&format!("/sessions/{ID}")).await;
        assert_eq!(read.data()["expires_at"], "2024-01-02T01:00:00.123Z");
        assert_eq!(read.data()["memory"]["conversation_turns"], 2);
        // A session's archive holds what was learnt from it only.
        let own = export(&server, &format!("/sessions/{ID}/export")).await;
        assert_eq!(end(&own)["facts"], 1);
    }

    async fn importing_twice_changes_nothing(server: Server) {
        let archive = everything();
        take(&server, &archive).await;
        assert_eq!(take(&server, &archive).await, [0, 0, 0, 3]);
        assert_eq!(lines(&export(&server, "/users/user_1/export").await), lines(&archive));
    }

    async fn a_session_that_is_there_stays_as_it_is(server: Server) {
        let id = server.session(json!({"user_id": "user_1", "title": "mine"})).await;
        server.say(&id, "hello").await;
        let mut other = long_session(&id, 1200);
        other[0]["title"] = json!("theirs");
        let archive = archive(&[other], &[fact("x", Some((&id, 1))), fact("x", Some((&id, 2)))]);
        // The fact of the turn that is there is new.
        assert_eq!(take(&server, &archive).await, [0, 0, 1, 1]);
        let read = server.get(&format!("/sessions/{id}")).await;
        assert_eq!((&read.data()["title"], server.count(TURNS).await), (&json!("mine"), 1));
    }

    async fn facts_without_their_source_are_left_out(server: Server) {
        take(&server, &archive(&[long_session(ID, 2)], &[])).await;
        execute(&server, "UPDATE turns SET status = 'deleted' WHERE turn = 2").await;
        let stranger = "session_00000000000000cc";
        let mut theirs = long_session(stranger, 1);
        theirs[0]["user_id"] = json!("user_2");
        let facts = [
            fact("kept", Some((ID, 1))), fact("deleted", Some((ID, 2))), fact("absent", Some((ID, 3))),
            fact("gone", Some(("session_00000000000000dd", 1))), fact("stranger", Some((stranger, 1))),
        ];
        assert_eq!(take(&server, &archive(&[theirs], &facts)).await, [1, 1, 1, 0]);
        assert_eq!(server.count("SELECT COUNT(*) FROM facts WHERE key = 'kept'").await, 1);
    }

    async fn an_archive_that_is_cut_short_leaves_nothing_half_there(server: Server) {
        let other = "session_00000000000000bb";
        let archive = archive(&[long_session(other, 3), long_session(ID, 1700)], &[]);
        for part in [9, 5, 2] {
            let cut = import(&server, archive[..archive.len() / 10 * part].to_owned()).await;
            assert!(cut.refused(400, "VALIDATION_ERROR").contains("cut short"));
            server.get(&format!("/sessions/{ID}")).await.refused(404, "SESSION_NOT_FOUND");
            let left = [server.count(TURNS).await, server.count(ENTRIES).await, server.count(STAGED).await];
            assert_eq!(left, [3, 3, 0]);
        }
        assert_eq!(take(&server, &archive).await, [1, 1700, 0, 1]);
        let last = server.get(&format!("/sessions/{ID}/turns?direction=desc&limit=1")).await;
        assert_eq!(last.items()[0]["turn"], 1700);
    }

    async fn an_import_whose_client_leaves_is_undone(server: Server) {
        let archive = archive(&[long_session(ID, 1700)], &[]);
        let mut client = TcpStream::connect(server.base.strip_prefix("http://").unwrap()).await.unwrap();
        let head = format!(
            "POST /api/v1/import HTTP/1.1\r\nHost: localhost\r\nContent-Type: {NDJSON}\r\nContent-Length: {}\r\n\r\n",
            archive.len()
        );
        client.write_all(head.as_bytes()).await.unwrap();
        client.write_all(&archive.as_bytes()[..archive.len() / 10 * 9]).await.unwrap();
        until(&server, STAGED, |staged| staged == 1).await;
        drop(client);
        until(&server, STAGED, |staged| staged == 0).await;
        assert_eq!((server.count(TURNS).await, server.count(ENTRIES).await), (0, 0));
        assert_eq!(take(&server, &archive).await, [1, 1700, 0, 0]);
    }

    async fn two_imports_of_a_session_do_not_mix(server: Server) {
        let archive = archive(&[long_session(ID, 1700)], &[]);
        let (first, second) = archive.split_at(archive.len() / 2);
        let (sender, answer) = begin(&server);
        sender.send(Ok(first.to_owned())).await.unwrap();
        until(&server, STAGED, |staged| staged == 1).await;
        let busy = import(&server, archive.clone()).await;
        assert!(busy.refused(409, "SESSION_BUSY").contains("is being imported"));
        assert!(busy.headers.contains_key("retry-after"));
        sender.send(Ok(second.to_owned())).await.unwrap();
        drop(sender);
        assert_eq!(answer.await.unwrap().data()["turns"], 1700);
    }

    async fn what_a_dead_server_left_of_an_import_makes_room(server: Server) {
        let archive = archive(&[long_session(ID, 1700)], &[]);
        let (first, second) = archive.split_at(archive.len() / 2);
        let (sender, answer) = begin(&server);
        sender.send(Ok(first.to_owned())).await.unwrap();
        until(&server, TURNS, |turns| turns >= 500).await;
        // As if its time were over.
        execute(&server, "UPDATE erasures SET created_at = 1").await;
        assert_eq!(take(&server, &archive).await, [1, 1700, 0, 0]);
        // Whoever was thought dead finds out.
        sender.send(Ok(second.to_owned())).await.unwrap();
        drop(sender);
        assert!(answer.await.unwrap().refused(503, "OVERLOADED").contains("run it again"));
        assert_eq!((server.count(TURNS).await, server.count(ENTRIES).await), (1700, 1700));
        assert_eq!(lines(&export(&server, &format!("/sessions/{ID}/export")).await).len(), lines(&archive).len());
    }

    async fn what_was_begun_to_be_removed_is_not_published(server: Server) {
        let archive = archive(&[long_session(ID, 1200)], &[]);
        let (sender, answer) = begin(&server);
        let (first, second) = archive.split_at(archive.rfind("{\"type\":\"session_end").unwrap());
        sender.send(Ok(first.to_owned())).await.unwrap();
        until(&server, TURNS, |turns| turns == 1000).await;
        // As an eraser does with each batch.
        execute(&server, "UPDATE erasures SET created_at = created_at - 1").await;
        sender.send(Ok(second.to_owned())).await.unwrap();
        drop(sender);
        answer.await.unwrap().refused(503, "OVERLOADED");
        server.get(&format!("/sessions/{ID}")).await.refused(404, "SESSION_NOT_FOUND");
    }

    async fn nothing_is_written_for_a_user_who_is_erased_meanwhile(server: Server) {
        let archive = archive(&[long_session(ID, 700)], &[]);
        let (sender, answer) = begin(&server);
        let (first, second) = archive.split_at(archive.len() - 1000);
        sender.send(Ok(first.to_owned())).await.unwrap();
        until(&server, STAGED, |staged| staged == 1).await;
        let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        let now = tx.clock().await.unwrap();
        let erase = "INSERT INTO user_erasures (tenant_id, user_digest, erased_at) VALUES (1, $1, $2)";
        tx.sql(erase).bind(digest(&["user_1"])).bind(now).run().await.unwrap();
        tx.commit().await.unwrap();
        sender.send(Ok(second.to_owned())).await.unwrap();
        drop(sender);
        assert!(answer.await.unwrap().refused(404, "USER_NOT_FOUND").contains("was erased"));
        assert_eq!([server.count(TURNS).await, server.count(ENTRIES).await, server.count(STAGED).await], [0; 3]);
        // Who was erased before may come back.
        execute(&server, "UPDATE user_erasures SET erased_at = erased_at - 1000").await;
        assert_eq!(take(&server, &archive).await, [1, 700, 0, 0]);
    }

    async fn a_changed_archive_is_refused(server: Server) {
        let archive = archive(&[long_session(ID, 3)], &[fact("a", None)]);
        for (from, to, problem) in [
            ("message 2", "message 7", "line 6: digest: does not fit: the session's lines were changed"),
            ("2024-01-03", "2024-01-04", "line 8: digest: does not fit: the archive was changed"),
            ("\"turns\":3,\"facts\"", "\"turns\":2,\"facts\"", "line 8: sessions: does not fit: 1 sessions, 3 turns"),
        ] {
            let changed = import(&server, archive.replace(from, to)).await;
            let message = changed.refused(400, "VALIDATION_ERROR");
            assert!(message.starts_with(problem), "{message}");
        }
        let end = archive.rfind("{\"type\":\"end").unwrap();
        let missing = import(&server, archive[..end].to_owned()).await;
        assert!(missing.refused(400, "VALIDATION_ERROR").contains("cut short"));
        // Its end may lack that of its line.
        take(&server, archive.trim_end()).await;
    }

    async fn a_line_may_be_a_mebibyte_long_and_no_more(server: Server) {
        let padded = |length: usize| {
            let mut line = session(ID);
            line["ignored"] = json!("");
            line["ignored"] = json!("x".repeat(length - line.to_string().len() - 1));
            archive(&[vec![line]], &[])
        };
        let refused = import(&server, padded((1 << 20) + 1)).await;
        assert_eq!(refused.refused(413, "PAYLOAD_TOO_LARGE"), "line 2: must be at most 1048576 bytes long");
        let endless = import(&server, "x".repeat(10 << 20)).await;
        assert!(endless.refused(413, "PAYLOAD_TOO_LARGE").starts_with("line 1:"));
        assert_eq!(take(&server, &padded(1 << 20)).await, [1, 0, 0, 0]);
    }

    async fn long_texts_go_in_pieces(server: Server) {
        let id = server.session(json!({})).await;
        server.say(&id, "hello").await;
        let (path, response) = (format!("/sessions/{id}"), "\u{1}\"é\n🦀".repeat(120_000));
        let mut tx = server.app.store.database().begin(atlus::store::db::Reach::Everybody).await.unwrap();
        tx.sql("UPDATE turns SET response = $1").bind(response.clone()).run().await.unwrap();
        tx.commit().await.unwrap();
        let archive = export(&server, &format!("{path}/export")).await;
        assert!(archive.lines().count() > 8 && archive.lines().all(|line| line.len() < 1 << 20));
        server.delete(&path).await;
        assert_eq!(take(&server, &archive).await, [1, 1, 0, 0]);
        let back = server.get(&format!("{path}/turns/1")).await;
        assert!(back.data()["response"] == response.as_str());
        assert_eq!(end(&export(&server, &format!("{path}/export")).await), end(&archive));
    }

    async fn a_wrong_line_is_refused_with_its_number_and_what_to_mend(server: Server) {
        let good = |line: usize| archive(&[long_session(ID, 2)], &[fact("a", Some((ID, 1)))])
            .lines().nth(line - 1).unwrap().to_owned();
        let deep = format!("{{\"type\":\"turn\",\"metadata\":{}1{}}}", "[".repeat(40), "]".repeat(40));
        let cases: Vec<(usize, &str, String, &str, &str)> = vec![
            (1, "", "what?".into(), "INVALID_JSON", "is not JSON: expected value"),
            (1, "", "\n".into(), "INVALID_JSON", "is not JSON"),
            (1, "", "[1]".into(), "VALIDATION_ERROR", "must be a JSON object"),
            (1, "", "{}".into(), "VALIDATION_ERROR", "type: is required"),
            (1, "", good(2), "VALIDATION_ERROR", "type: must be archive"),
            (1, "\"atlus\",\"v", "\"zip\",\"v".into(), "VALIDATION_ERROR", "format: must be atlus"),
            (1, "\"version\":1", "\"version\":2".into(), "VALIDATION_ERROR", "version: must be 1"),
            (2, "\"type\":\"session\"", "\"type\":\"sessions\"".into(), "VALIDATION_ERROR", "type: must be archive, session"),
            (2, ID, "session_1".into(), "VALIDATION_ERROR", "session_id: must be session_ and 16 hex digits"),
            (2, "\"user_1\"", "\"\"".into(), "VALIDATION_ERROR", "user_id: must be 1 to 128 characters"),
            (2, "\"user_1\"", "7".into(), "VALIDATION_ERROR", "user_id: invalid type"),
            (2, "\"user_id\":\"user_1\",", String::new(), "VALIDATION_ERROR", "user_id: is required"),
            (2, "\"title\":null", "\"title\":\"a\\u0000\"".into(), "VALIDATION_ERROR", "title: must not contain the character U+0000"),
            (2, "\"ttl_seconds\":null", "\"ttl_seconds\":1".into(), "VALIDATION_ERROR", "ttl_seconds: must be 60 to"),
            (2, "2024-01-02T00", "yesterday".into(), "VALIDATION_ERROR", "last_activity: must be a time"),
            (2, "\"metadata\":{}", "\"metadata\":[]".into(), "VALIDATION_ERROR", "metadata: "),
            (2, "\"metadata\":{}", "\"metadata\":{\"a\":1e400}".into(), "INVALID_JSON", "number out of range"),
            (2, "\"metadata\":{}", format!("\"metadata\":{{\"a\":{:?}}}", "x".repeat(16_400)), "VALIDATION_ERROR", "metadata: must be at most 16384 bytes"),
            (2, "\"medium\"", "\"huge\"".into(), "VALIDATION_ERROR", "memory.behavior_profile.verbosity: unknown variant `huge`, expected one of `low`"),
            (2, "\"tone\":null", "\"tone\":0".into(), "VALIDATION_ERROR", "memory: must refer to turns"),
            (2, "\"conversation_turns\":2", "\"conversation_turns\":-1".into(), "VALIDATION_ERROR", "conversation_turns: must not be negative"),
            (2, "", good(3), "VALIDATION_ERROR", "type: must be session, fact or end"),
            (3, "", deep, "VALIDATION_ERROR", "must not nest deeper"),
            (3, "\"turn\":1", "\"turn\":2".into(), "VALIDATION_ERROR", "turn: must be 1"),
            (3, "\"completed\"", "\"running\"".into(), "VALIDATION_ERROR", "status: must not be running"),
            (3, "\"completed\"", "\"odd\"".into(), "VALIDATION_ERROR", "status: unknown variant"),
            (3, "\"message 1\"", "null".into(), "VALIDATION_ERROR", "message: is required"),
            (3, "\"message 1\"", "\"\\u0000\"".into(), "VALIDATION_ERROR", "message: must not contain"),
            (3, "\"message 1\"", "\"\\ud800\"".into(), "INVALID_JSON", "is not JSON"),
            (3, "\"noted\"", "null".into(), "VALIDATION_ERROR", "response: is required where"),
            (3, "req_1", "req 1".into(), "VALIDATION_ERROR", "request_id: must be"),
            (3, "1234", "-1".into(), "VALIDATION_ERROR", "execution_us: must not be negative"),
            (3, "\"usage\":null", "\"usage\":{\"prompt_tokens\":-1,\"completion_tokens\":0,\"total_tokens\":0}".into(), "VALIDATION_ERROR", "usage: must not"),
            (3, "", good(2), "VALIDATION_ERROR", "type: must be turn, piece or session_end"),
            (3, "", "{\"type\":\"piece\",\"field\":\"metadata\",\"text\":\"\"}".into(), "VALIDATION_ERROR", "field: unknown variant"),
            (4, "", good(4) + "\n{\"type\":\"piece\",\"field\":\"message\",\"text\":\"a\"}", "VALIDATION_ERROR", "type: must be turn after a piece"),
            (4, "", format!("{{\"type\":\"piece\",\"field\":\"message\",\"text\":\"a\"}}\n{}", good(4)), "VALIDATION_ERROR", "message: is here and in the pieces"),
            (5, ID, "session_00000000000000ff".into(), "VALIDATION_ERROR", "session_id: must be session_00000000000000aa"),
            (5, "\"turns\":2", "\"turns\":3".into(), "VALIDATION_ERROR", "turns: must be 2"),
            (6, "\"key\":\"a\"", "\"key\":\"\"".into(), "VALIDATION_ERROR", "key: must be 1 to 128"),
            (6, "\"value\":{", "\"value\":null,\"v\":{".into(), "VALIDATION_ERROR", "value: must be"),
            (6, "\"b\":1.0", "\"b\":\"\\u0000\"".into(), "VALIDATION_ERROR", "value: must not contain"),
            (6, "\"turn\":1", "\"turn\":null".into(), "VALIDATION_ERROR", "turn: must be a turn of the session"),
            (7, "", good(6) + "\n" + &good(2), "VALIDATION_ERROR", "type: must be fact or end"),
            (7, "", good(7) + "\n" + &good(7), "VALIDATION_ERROR", "type: must not follow"),
        ];
        for (number, from, to, code, problem) in cases {
            let mut lines: Vec<String> = (1..=7).map(good).collect();
            let line = lines[number - 1].clone();
            assert!(line.contains(from), "{from} in {line}");
            lines[number - 1] = if from.is_empty() { to.clone() } else { line.replacen(from, &to, 1) };
            let answer = import(&server, lines.join("\n") + "\n").await;
            let message = answer.refused(400, code);
            assert!(message.starts_with("line ") && message.contains(problem), "{to}: {message}");
            let named: usize = message[5..].split(':').next().unwrap().parse().unwrap();
            let last = if to.contains('\n') { number + 2 } else { number };
            assert!((number..=last).contains(&named), "{to}: {message}");
        }
        assert_eq!(server.count(STAGED).await, 0);
    }

    async fn only_an_archive_is_imported(server: Server) {
        let json = server.post("/import", json!({})).await;
        assert!(json.refused(400, "INVALID_CONTENT_TYPE").contains(NDJSON));
        let empty = import(&server, "").await;
        assert!(empty.refused(400, "VALIDATION_ERROR").contains("cut short"));
        assert_eq!(take(&server, &archive(&[], &[])).await, [0; 4]);
    }

    async fn what_is_unknown_is_not_exported(server: Server) {
        for id in ["session_00000000000000aa", "nonsense"] {
            let export = server.get(&format!("/sessions/{id}/export")).await;
            assert!(export.refused(404, "SESSION_NOT_FOUND").contains(id));
        }
        let export = server.get("/users/nobody/export").await;
        assert_eq!(export.refused(404, "USER_NOT_FOUND"), "User nobody not found");
    }

    async fn an_export_names_its_file(server: Server) {
        let id = server.session(json!({"user_id": "a/b ü"})).await;
        for (path, name) in [
            (format!("/sessions/{id}/export"), format!("{id}.ndjson")), ("/users/a%2Fb%20%C3%BC/export".into(), "user.ndjson".into()),
        ] {
            let answer = server.request(Method::GET, &path).send().await.unwrap();
            assert_eq!(answer.headers()["content-disposition"], format!("attachment; filename=\"{name}\""));
            let archive = answer.text().await.unwrap();
            assert!(archive.starts_with("{\"type\":\"archive\",\"format\":\"atlus\",\"version\":1,\"of\":"), "{archive}");
            assert_eq!(end(&archive)["sessions"], 1);
        }
    }

    async fn a_turn_that_runs_is_left_out(database: Database) {
        let gate = Arc::new(Semaphore::new(1));
        let upstream = Upstream::gated(|_| Script::Say("done".into()), gate.clone()).await;
        let server = Server::with_model(database.kind, &upstream.url, |_| {}).await;
        let id = server.session(json!({})).await;
        server.say(&id, "first").await;
        let chat = tokio::spawn({
            let (client, id) = (server.client.clone(), id.clone());
            async move { client.say(&id, "second").await }
        });
        upstream.asked_times(2).await;
        let archive = export(&server, &format!("/sessions/{id}/export")).await;
        assert_eq!((end(&archive)["turns"].as_i64(), archive.contains("\"second\"")), (Some(1), false));
        gate.add_permits(1);
        chat.await.unwrap();
        server.delete(&format!("/sessions/{id}")).await;
        take(&server, &archive).await;
        gate.add_permits(1);
        assert_eq!(server.chat(&id, "again").await.data()["turn"], 2);
    }

    async fn an_export_of_what_is_deleted_meanwhile_does_not_look_whole(server: Server) {
        let text = "x".repeat(200_000);
        let turns = (1..=100).map(|number| turn(number, &text, "noted"));
        let lines = std::iter::once(session(ID)).chain(turns).collect();
        take(&server, &archive(&[lines], &[])).await;
        let store = &server.app.store;
        let what = What::Session(SessionId::parse(ID).unwrap());
        let mut broken = store.export(&Caller::ANYONE, what, Timestamp::from_millis(0)).await.unwrap().unwrap();
        broken.next().await.unwrap().unwrap();
        // More than fits between server and client.
        let answer = server.request(Method::GET, &format!("/sessions/{ID}/export")).send().await.unwrap();
        let mut portions = answer.bytes_stream();
        portions.next().await.unwrap().unwrap();
        server.delete(&format!("/sessions/{ID}")).await;
        assert!(matches!(broken.next().await, Err(NotExported::Gone(_))));
        let mut portion = portions.next().await;
        while let Some(Ok(_)) = portion {
            portion = portions.next().await;
        }
        assert!(portion.unwrap().is_err());
    }

    async fn the_commands_do_as_the_server_does(server: Server) {
        let (archive, folder) = (everything(), tempfile::tempdir().unwrap());
        let url = server.database.variables();
        let file = folder.path().join("all.ndjson");
        std::fs::write(&file, &archive).unwrap();
        let path = file.to_str().unwrap();
        let (code, told, _) = run(&["import", path], &url, None).await;
        assert_eq!((code, told.as_str()), (0, "imported 3 sessions with 4 turns, and 3 facts; skipped 0 sessions that were there already\n"));
        let (_, told, _) = run(&["import"], &url, Some(&archive)).await;
        assert!(told.contains("imported 0 sessions") && told.contains("skipped 3"), "{told}");
        let (code, whole, _) = run(&["export", "--all"], &url, None).await;
        assert_eq!((code, lines(&whole)), (0, lines(&archive)));
        let (_, of_user, _) = run(&["export", "--user", "user_1"], &url, None).await;
        assert_eq!(lines(&of_user), lines(&archive));
        let (code, nothing, _) = run(&["export", "--session", ID, "--output", path], &url, None).await;
        assert_eq!((code, nothing.as_str()), (0, ""));
        let of_session = std::fs::read_to_string(&file).unwrap();
        assert_eq!(lines(&of_session), lines(&export(&server, &format!("/sessions/{ID}/export")).await));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);

        std::fs::write(&file, &archive[..archive.len() / 2]).unwrap();
        for (args, advice) in [
            (vec!["export", "--session", "x"], "\"x\" is no session id"),
            (vec!["export", "--session", "session_0000000000000fff"], "there is no session_0000000000000fff"),
            (vec!["export", "--user", "nobody"], "there is no user nobody"),
            (vec!["export", "--all", "--output", "/nowhere/a"], "/nowhere/a cannot be written"),
            (vec!["import", "/nowhere"], "/nowhere cannot be read"),
            (vec!["import", path], "line "),
            (vec!["copy", "--from", "x", "--to", "y"], "--from must begin with sqlite://"),
            (vec!["copy", "--from", url[0].1, "--to", url[0].1], "are the same database"),
            (vec!["copy", "--from", "sqlite:///nowhere.db", "--to", url[0].1], "is not up to date"),
        ] {
            let (code, _, told) = run(&args, &url, None).await;
            assert!(code == 1 && told.starts_with("atlus: ") && told.contains(advice), "{args:?}: {code} {told}");
            assert_eq!(told.lines().count(), 1, "{told}");
        }
    }
}

/// Runs a command to its end: exit code, standard output, standard error.
async fn run(args: &[&str], variables: &[(&str, &str)], input: Option<&str>) -> (i32, String, String) {
    let mut command = atlus(args, variables);
    let mut file = tempfile::tempfile().unwrap();
    if let Some(input) = input {
        file.write_all(input.as_bytes()).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        command.stdin(Stdio::from(file));
    }
    let output = tokio::time::timeout(Duration::from_secs(60), command.output()).await.unwrap().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_sqlite_to_postgres_and_back_nothing_changes() {
    let first = Server::on(Kind::Sqlite).await;
    let archive = everything();
    take(&first, &archive).await;
    take(&first, &self::archive(&[long_session("session_00000000000000ee", 700)], &[])).await;
    // Of another tenant, under the same id.
    for sql in [
        "INSERT INTO tenants (tenant_id, name, created_at) VALUES (7, 'other', 0)",
        "INSERT INTO sessions (session_id, tenant_id, created_at, last_activity, temporary, user_id, metadata) \
         VALUES (170, 7, 0, 0, 0, 'user_1', '{}')",
        "INSERT INTO session_memory (session_id, tenant_id, updated_at) VALUES (170, 7, 0)",
    ] {
        execute(&first, sql).await;
    }
    let key = first.key("other", "read", None).await;
    let whole = export(&first, "/users/user_1/export").await;
    let (postgres, sqlite) = (Database::empty(Kind::Postgres).await, Database::empty(Kind::Sqlite).await);
    let mut digests = Vec::new();
    for (from, to) in [(&*first.database, &postgres), (&postgres, &sqlite), (&postgres, &sqlite)] {
        let (code, told, errors) =
            run(&["copy", "--from", &from.direct, "--to", &to.direct], &[], None).await;
        assert_eq!(code, 0, "{told}{errors}");
        assert!(errors.contains("5 of 5 sessions, 704 turns"), "{errors}");
        digests.push(told.lines().last().unwrap().to_owned());
        let (_, copy, _) = run(&["export", "--all"], &to.variables(), None).await;
        assert_eq!(lines(&copy), lines(&whole));
    }
    assert!(digests[0].starts_with("digest sha256:") && digests[0].ends_with(" (both)"), "{digests:?}");
    assert!(digests.iter().all(|digest| *digest == digests[0]), "{digests:?}");

    // By HTTP, too, and a server can serve what was copied.
    let other = Server::on(Kind::Postgres).await;
    take(&other, &whole).await;
    assert_eq!(end(&export(&other, "/users/user_1/export").await), end(&whole));
    let server = Server::with(sqlite, |_| {}).await;
    assert_eq!(end(&export(&server, "/users/user_1/export").await), end(&whole));

    let others = "SELECT COUNT(*) FROM sessions s JOIN tenants t ON t.tenant_id = s.tenant_id \
         WHERE t.name = 'other' AND s.session_id = 170";
    assert_eq!(server.count(others).await, 1);
    // A key opens the copy of what it opened before.
    let guarded = Server::beside(server.database.clone(), |config| config.access.required = true).await;
    let sessions = guarded.with_key(key.reveal()).get("/sessions").await;
    assert_eq!(sessions.items()[0]["session_id"], "session_00000000000000aa");

    // What the target has, it keeps; the copy says that it is not the same.
    server.patch("/sessions/session_00000000000000ee", json!({"title": "changed"})).await;
    let (code, told, errors) =
        run(&["copy", "--from", &postgres.direct, "--to", &server.database.direct], &[], None).await;
    assert_eq!(code, 1);
    assert!(told.contains("skipped 5") && errors.contains("1 differ in the target"), "{told}{errors}");
    assert!(errors.contains("session_00000000000000ee"), "{errors}");
}
