//! The tests: real servers on real databases, each test written once and run on both.

#![expect(clippy::unwrap_used, reason = "a test that fails says where")]

mod archive;
mod audit;
mod breaking;
mod budgets;
mod chat;
mod connections;
mod context;
mod erasure;
mod failures;
mod finding;
mod forks;
mod harness;
mod hostile;
mod house;
mod idempotency;
mod isolation;
mod jwt;
mod keys;
mod learning;
mod limits;
mod logs;
mod memory;
mod metrics;
mod models;
mod openapi;
mod operations;
mod origins;
mod pages;
mod plans;
mod processes;
mod rates;
mod row_security;
mod schema;
mod search;
mod sessions;
mod store;
mod streams;
mod supervision;
mod terminal;
mod tokens;
mod transcript;
mod turns;
