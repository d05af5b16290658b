//! Idempotency keys whose time is over are forgotten, and when API keys were used is noted.

use crate::{app::App, store::Result};

/// Keys forgotten in one go.
const BATCH: i64 = 500;

/// Forgets every key that is older than it is remembered.
pub async fn forget_old_keys(app: &App) -> Result<()> {
    while app.store.forget_keys(BATCH).await? == BATCH.unsigned_abs() {}
    Ok(())
}

/// Notes which API keys were used since the last time.
pub async fn note_uses(app: &App) -> Result<()> {
    match &app.auth {
        Some(auth) => auth.note_uses().await,
        None => Ok(()),
    }
}
