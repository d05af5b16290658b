//! Idempotency keys whose time is over are forgotten.

use crate::{app::App, store::Result};

/// Keys forgotten in one go.
const BATCH: i64 = 500;

/// Forgets every key that is older than it is remembered.
pub async fn forget_old_keys(app: &App) -> Result<()> {
    while app.store.forget_keys(BATCH).await? == BATCH.unsigned_abs() {}
    Ok(())
}
