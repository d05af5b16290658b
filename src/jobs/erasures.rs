//! Deletions that broke off are finished, and that users were erased is forgotten in time.

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

/// How long it is known that a user was erased: longer than anything that was begun before may last.
const USERS: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// Forgets which users were erased long ago.
pub async fn forget_erased_users(app: &App) -> Result<()> {
    app.store.forget_user_erasures(USERS).await
}
