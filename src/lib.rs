//! ATLUS keeps conversation sessions in SQL and talks to any OpenAI-compatible model.
//!
//! The map; `ARCHITECTURE.md` has the roads. Modules use those below them, never those above.

/// HTTP, one file per resource.
pub mod api;
/// The wired parts.
pub mod app;
/// Who calls, from where, and how often they may.
pub mod auth;
/// What happens to a message.
pub mod chat;
/// The command line: one file per command.
pub mod cli;
/// Every setting once.
pub mod config;
/// Plain words, without I/O.
pub mod domain;
/// What happens by itself.
pub mod jobs;
/// What happens to every request.
pub mod middleware;
/// Who answers.
pub mod model;
/// Routes, middleware, listener and graceful stop.
pub mod server;
/// All SQL.
pub mod store;
/// The log and the traces.
pub mod telemetry;
