//! Older turns that bear on a message, brought back though they are long out of the window.

use crate::{
    domain::{caller::TenantId, ids::SessionId, search::Question},
    store::{PastTurn, Result, Store},
};

/// The most turns that are brought back.
const TURNS: usize = 5;

/// The turns before `before` that bear on a message, best first; of a session with `all_turns` completed ones.
pub async fn recall(
    store: &Store,
    session: (TenantId, SessionId),
    message: &str,
    before: i64,
    all_turns: i64,
) -> Result<Vec<PastTurn>> {
    let question = Question::words(message);
    let mut best = store.bearing_turns(session, &question, before, all_turns).await?;
    // Some next to those that match may not have been completed, or are shown anyway.
    best.truncate(2 * TURNS);
    if best.is_empty() {
        return Ok(Vec::new());
    }
    let mut turns = store.turns_by_number(session, &best).await?;
    turns.sort_by_key(|turn| best.iter().position(|number| *number == turn.turn));
    turns.truncate(TURNS);
    Ok(turns)
}
