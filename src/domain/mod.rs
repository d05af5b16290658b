//! The words of the product: plain values and rules, without I/O. Uses nothing else of ours.

pub mod archive;
pub mod caller;
pub mod clock;
pub mod ids;
pub mod json;
pub mod key;
pub mod memory;
pub mod page;
pub mod prompt;
pub mod search;
pub mod sentences;
pub mod session;
pub mod statements;
pub mod text;
pub mod tokens;
pub mod turn;
pub mod wishes;
