//! The log.

use std::io::{self, IsTerminal};

use tracing_subscriber::{EnvFilter, fmt};

use crate::config::{ConfigError, LogSettings};

/// Starts logging to standard error. Fails if the settings cannot be read.
pub fn start(settings: &LogSettings) -> Result<(), ConfigError> {
    let given = |value: &Option<String>| value.clone().filter(|value| !value.is_empty());
    let directives = given(&settings.log).or_else(|| std::env::var("RUST_LOG").ok());
    let directives = directives.filter(|value| !value.is_empty()).unwrap_or_else(|| "info".to_owned());
    let filter = EnvFilter::try_new(&directives).map_err(|error| {
        ConfigError(vec![format!(
            "ATLUS_LOG must be a level or levels by module, not {directives:?}: {error}"
        )])
    })?;
    let terminal = io::stderr().is_terminal();
    let json = match given(&settings.log_format).as_deref() {
        Some("json") => true,
        Some("text") => false,
        None => !terminal,
        Some(other) => {
            return Err(ConfigError(vec![format!("ATLUS_LOG_FORMAT must be text or json, not {other:?}")]));
        }
    };
    let log = fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(terminal);
    if json {
        log.json().flatten_event(true).init();
    } else {
        log.with_target(false).init();
    }
    Ok(())
}
