//! What a running server tells of itself: its log and its metrics.

pub mod metrics;

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, fmt};

use crate::config::LogConfig;

/// Starts logging to standard error.
pub fn start(config: &LogConfig) {
    let terminal = io::stderr().is_terminal();
    // The settings have been checked; were they not, nothing would be lost but detail.
    let filter = EnvFilter::try_new(&config.directives).unwrap_or_else(|_| EnvFilter::new("info"));
    let log = fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(terminal);
    if config.json.unwrap_or(!terminal) {
        log.json().flatten_event(true).init();
    } else {
        log.with_target(false).init();
    }
}
