//! Older turns that bear on a message, brought back though they are long out of the window.

use crate::{
    domain::{
        caller::TenantId,
        ids::SessionId,
        search::{Question, Scope},
    },
    store::{PastTurn, Result, Search, Store},
};

/// The most turns that are brought back.
const TURNS: usize = 5;
/// The most turns that are ranked for one message.
const RANKED: i64 = 100;
/// A term in more turns of the session than these tells nothing about what is meant.
const COMMON: i64 = 100;

/// The turns before `before` that bear on a message, best first.
pub async fn recall(
    store: &Store,
    (tenant, session): (TenantId, SessionId),
    message: &str,
    before: i64,
) -> Result<Vec<PastTurn>> {
    let search = Search {
        before_turn: Some(before),
        common: COMMON,
        ranked: RANKED,
        neighbours: true,
        ..Search::new(Question::words(message), Scope::Session(session))
    };
    let hits = store.search(tenant, &search).await?;
    // Some next to those that match may not have been completed, or are shown anyway.
    let best: Vec<i64> =
        hits.iter().map(|hit| hit.turn).filter(|turn| *turn < before).take(2 * TURNS).collect();
    if best.is_empty() {
        return Ok(Vec::new());
    }
    let mut turns = store.turns_by_number(tenant, session, &best).await?;
    turns.sort_by_key(|turn| best.iter().position(|number| *number == turn.turn));
    turns.truncate(TURNS);
    Ok(turns)
}
