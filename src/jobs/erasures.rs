//! Deletions that broke off are finished.

use std::time::Duration;

use crate::{app::App, store::Result};

/// Deletions looked at in one go.
const BATCH: i64 = 100;
/// How long whoever began a deletion is given to finish it.
const OWN_TIME: Duration = Duration::from_secs(30);

/// Finishes deletions whose server stopped in the middle.
pub async fn finish_deletions(app: &App) -> Result<()> {
    app.store.finish_erasures(app.clock.now() - OWN_TIME, BATCH).await
}
