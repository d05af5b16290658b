//! ATLUS keeps conversation sessions in SQL and talks to any OpenAI-compatible model.
//!
//! The map; `ARCHITECTURE.md` has the roads. Modules use those below them, never those above.

/// HTTP, one file per resource.
/// What happens to a message.
pub mod chat;
/// Who answers.
pub mod model;
/// All SQL.
pub mod store;
/// Plain words, without I/O.
pub mod domain;
