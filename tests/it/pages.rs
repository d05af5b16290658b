//! Pages: whoever walks them sees everything that was there once, whatever is added meanwhile.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use serde_json::json;
use tokio::task::JoinHandle;

use crate::harness::{Client, Server, on_both};

/// Adds something again and again until the walk is over.
struct Adding(Arc<AtomicBool>, JoinHandle<usize>);

impl Adding {
    fn start<F: Future<Output = ()> + Send>(add: impl Fn() -> F + Send + 'static) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut added = 0;
            while !stopped.load(Ordering::SeqCst) || added == 0 {
                add().await;
                added += 1;
            }
            added
        });
        Self(stop, task)
    }

    /// How often it was added.
    async fn stop(self) -> usize {
        self.0.store(true, Ordering::SeqCst);
        self.1.await.unwrap()
    }
}

/// The field `name` of everything on all pages, in order.
async fn walk(client: &Client, path: &str, name: &str) -> Vec<String> {
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = client.get(&format!("{path}&limit=7{cursor}")).await;
        seen.extend(page.items().iter().map(|item| item[name].to_string()));
        // Additions at the end of the walk could keep it from ever ending.
        match page.data()["next_cursor"].as_str() {
            Some(next) if seen.len() < 1000 => cursor = format!("&cursor={next}"),
            _ => return seen,
        }
    }
}

/// Fails unless all of `before` was seen, and nothing twice.
fn assert_whole(seen: &[String], before: &BTreeSet<String>, path: &str) {
    let set: BTreeSet<String> = seen.iter().cloned().collect();
    assert_eq!(set.len(), seen.len(), "{path} repeated something");
    let missing: Vec<_> = before.difference(&set).collect();
    assert!(missing.is_empty(), "{path} left out {missing:?}");
}

on_both! {
    async fn pages_of_sessions_are_whole_while_equally_old_ones_are_added(server: Server) {
        let mut before = BTreeSet::new();
        for i in 0..60 {
            let session = server.session(json!({"user_id": format!("user{}", i % 2), "metadata": {"a": i % 3}})).await;
            before.insert(format!("\"{session}\""));
        }
        for order in ["last_activity", "created_at"] {
            for direction in ["desc", "asc"] {
                let client = server.client.clone();
                let adding = Adding::start(move || {
                    let client = client.clone();
                    async move { drop(client.session(json!({"user_id": "user0", "metadata": {"a": 1}})).await) }
                });
                let path = format!("/sessions?order={order}&direction={direction}");
                let seen = walk(&server, &path, "session_id").await;
                assert!(adding.stop().await > 0);
                assert_whole(&seen, &before, &path);
            }
        }
        for filter in ["user_id=user1", "is_active=true", "metadata=%7B%22a%22%3A1%7D", "user_id=user0&is_active=true&order=created_at"] {
            let (down, mut up) = (
                walk(&server, &format!("/sessions?{filter}&direction=desc"), "session_id").await,
                walk(&server, &format!("/sessions?{filter}&direction=asc"), "session_id").await,
            );
            up.reverse();
            assert_eq!(down, up, "{filter}");
            assert_eq!(down.iter().collect::<BTreeSet<_>>().len(), down.len(), "{filter}");
        }
    }

    async fn pages_of_sessions_are_whole_while_others_become_active(server: Server) {
        let mut sessions = Vec::new();
        for _ in 0..30 {
            sessions.push(server.session(json!({})).await);
        }
        let busy: Vec<_> = (0..3).map(|i| sessions[i * 10].clone()).collect();
        let quiet = sessions.iter().filter(|session| !busy.contains(session)).map(|session| format!("\"{session}\"")).collect();
        let client = server.client.clone();
        let clock = server.clock.clone();
        let adding = Adding::start(move || {
            clock.advance(std::time::Duration::from_millis(5));
            let (client, busy) = (client.clone(), busy.clone());
            async move {
                for session in busy {
                    client.say(&session, "hi").await;
                }
            }
        });
        // What is active while it is walked may be seen again where it has moved to, but nothing else.
        for direction in ["desc", "asc"] {
            let path = format!("/sessions?order=last_activity&direction={direction}");
            let mut seen = walk(&server, &path, "session_id").await;
            let quiet: &BTreeSet<String> = &quiet;
            seen.retain(|session| quiet.contains(session));
            assert_whole(&seen, quiet, &path);
        }
        for direction in ["desc", "asc"] {
            let path = format!("/sessions?order=created_at&direction={direction}");
            let all = sessions.iter().map(|session| format!("\"{session}\"")).collect();
            assert_whole(&walk(&server, &path, "session_id").await, &all, &path);
        }
        adding.stop().await;
    }

    async fn pages_of_turns_are_whole_while_more_are_added(server: Server) {
        let session = server.session(json!({})).await;
        let path = format!("/sessions/{session}/turns");
        let turns: Vec<_> = (0..60).map(|i| json!({"message": format!("m{i}"), "response": "r"})).collect();
        server.post(&path, json!({"turns": turns})).await.data();
        let before = (1..=60).map(|turn| turn.to_string()).collect();
        for query in ["direction=desc", "direction=asc", "direction=desc&status=completed"] {
            let (client, target) = (server.client.clone(), path.clone());
            let adding = Adding::start(move || {
                let (client, target) = (client.clone(), target.clone());
                async move { drop(client.post(&target, json!({"turns": [{"message": "new", "response": "r"}]})).await) }
            });
            let seen = walk(&server, &format!("{path}?{query}"), "turn").await;
            adding.stop().await;
            assert_whole(&seen, &before, query);
            let numbers: Vec<i64> = seen.iter().map(|turn| turn.parse().unwrap()).collect();
            assert!(numbers.is_sorted() || numbers.iter().rev().is_sorted(), "{query}");
            if query.starts_with("direction=asc") {
                assert_eq!(numbers, (1..=i64::try_from(numbers.len()).unwrap()).collect::<Vec<_>>());
            }
        }
    }
}
