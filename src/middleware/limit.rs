//! Refuses requests beyond those that may be under way, before anything of them is read.

use std::sync::Arc;

use poem::Request;
use tokio::sync::Semaphore;

use crate::api::{Place, error::ApiError};

/// What is answered however much is under way: whether the server lives, and how it is.
const ALWAYS: [&str; 4] = ["/livez", "/readyz", "/api/v1/health", "/metrics"];

/// Gives the request a place among those under way, if one is free.
pub fn take_place(places: &Arc<Semaphore>, request: &mut Request) -> Result<(), ApiError> {
    if !ALWAYS.contains(&request.uri().path()) {
        let place = places.clone().try_acquire_owned().map_err(|_| ApiError::overloaded())?;
        request.extensions_mut().insert(Place::new(place));
    }
    Ok(())
}
