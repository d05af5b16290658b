//! Turns that were cancelled at another server end here, too.
//!
//! Without this they would end when their lease is next renewed. Postgres carries the news; servers on one SQLite
//! file do not hear of each other.

use crate::{app::App, store::Result};

/// Listens for as long as the connection holds.
pub async fn listen(app: &App) -> Result<()> {
    app.store.listen(|tenant, session, turn| app.engine.cancelled_elsewhere(tenant, session, turn)).await
}
