//! What was used of a budget on days that are over is forgotten.

use crate::{app::App, store::Result};

/// Forgets the days before yesterday.
pub async fn forget_old_days(app: &App) -> Result<()> {
    app.store.forget_uses(app.clock.now()).await
}
