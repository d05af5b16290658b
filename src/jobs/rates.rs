//! Windows of the rate limit that are over are removed.

use crate::{app::App, store::Result};

/// Windows removed in one go.
const BATCH: i64 = 500;

/// Removes every window that is over.
pub async fn remove_ended_windows(app: &App) -> Result<()> {
    while app.store.remove_ended_windows(BATCH).await? == BATCH.unsigned_abs() {}
    Ok(())
}
