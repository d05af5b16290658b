//! What is kept for those who ask later who did what: one event in the log for each, by names and numbers, never with
//! what was said. Their target is `atlus::audit`.

use std::fmt::Display;

use poem::http::{Method, StatusCode};

use super::{Arrival, error::Code};

/// What an operation that erases something, or takes it out or in, is called; `None` for any other.
pub fn event(method: &Method, path: &str) -> Option<&'static str> {
    let segments: Vec<_> = path.split('/').skip(3).collect();
    Some(match (method, segments.as_slice()) {
        (&Method::DELETE, ["sessions", _]) => "session_deleted",
        (&Method::DELETE, ["sessions", _, "turns", _]) => "turn_erased",
        (&Method::DELETE, ["sessions" | "users", _, "memory"]) => "memory_erased",
        (&Method::DELETE, ["users", _]) => "user_erased",
        (&Method::GET, ["sessions" | "users", _, "export"]) => "exported",
        (&Method::POST, ["import"]) => "imported",
        _ => return None,
    })
}

/// An entry that is written whatever becomes of the call: a client that leaves ends its handler, but not the work.
pub struct Entry {
    pub event: &'static str,
    pub arrival: Arrival,
    pub path: String,
    /// How it was answered, once it was.
    pub status: Option<StatusCode>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let Self { event, arrival, path, status } = self;
        let status = status.map(|status| status.as_u16());
        let key = arrival.notes.key();
        tracing::info!(target: "atlus::audit", event, path, status, key, "done");
    }
}

/// A key was made or revoked.
pub fn key(event: &'static str, arrival: &Arrival, about: &dyn Display) {
    let key = arrival.notes.key();
    tracing::info!(target: "atlus::audit", event, %about, key, "done");
}

/// A call was refused for who made it, or how often.
pub fn refused(code: Code, arrival: &Arrival, client: &dyn Display, path: &str) {
    let key = arrival.notes.key();
    tracing::warn!(target: "atlus::audit", event = "refused", ?code, %client, path, key, "refused");
}
