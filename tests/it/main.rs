//! The tests: real servers on real databases, each test written once and run on both.

#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod archive;
mod chat;
mod context;
mod erasure;
mod failures;
mod finding;
mod forks;
mod harness;
mod house;
mod idempotency;
mod isolation;
mod keys;
mod learning;
mod memory;
mod models;
mod openapi;
mod operations;
mod pages;
mod plans;
mod processes;
mod schema;
mod search;
mod sessions;
mod store;
mod streams;
mod terminal;
mod transcript;
mod turns;
