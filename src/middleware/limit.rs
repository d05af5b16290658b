//! Refuses requests beyond those that may be under way, before anything of them is read.

use std::sync::Arc;

use poem::Request;
use tokio::sync::Semaphore;

use crate::api::{Place, error::ApiError};

/// What is answered however much is under way: whether the server lives, and how it is.
const ALWAYS: [&str; 4] = ["/livez", "/readyz", "/api/v1/health", "/metrics"];

/// What waits to be admitted.
const CHATS: [&str; 2] = ["/api/v1/chat", "/api/v1/chat/stream"];

/// Gives the request a place among those under way, if one is free; a message only if there is room for it, too.
pub fn take_place(
    places: &Arc<Semaphore>,
    is_full: impl Fn() -> bool,
    request: &mut Request,
) -> Result<(), ApiError> {
    let path = request.uri().path();
    if CHATS.contains(&path) && is_full() {
        return Err(ApiError::overloaded());
    }
    if !ALWAYS.contains(&path) {
        let place = places.clone().try_acquire_owned().map_err(|_| ApiError::overloaded())?;
        request.extensions_mut().insert(Place::new(place));
    }
    Ok(())
}
