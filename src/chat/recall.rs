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
/// A term in more turns of the session than these tells nothing about what is meant.
const COMMON: i64 = 200;

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
        neighbours: true,
        ..Search::new(Question::words(message), Scope::Session(session))
    };
    let hits = store.search(tenant, &search).await?;
    let mut turns = Vec::with_capacity(TURNS);
    // Some next to those that match may not have been completed, or are shown anyway.
    for hit in hits.iter().filter(|hit| hit.turn < before).take(2 * TURNS) {
        turns.extend(store.past_turns(tenant, session, (hit.turn, hit.turn), 1).await?);
        if turns.len() == TURNS {
            break;
        }
    }
    Ok(turns)
}
