//! Turns that are older than the search index get their entries.

use crate::{
    app::App,
    store::{OldTurn, Result},
};

/// Gives every turn its entry, once after an upgrade.
pub async fn index_old_turns(app: &App) -> Result<()> {
    let mut done = OldTurn::FIRST;
    while let Some(last) = app.store.index_old_turns(done).await? {
        done = last;
    }
    Ok(())
}
