//! Refuses requests beyond those that may be under way, before anything of them is read.

use std::sync::Arc;

use poem::{Endpoint, Request, Result};
use tokio::sync::Semaphore;

use crate::api::{Place, error::ApiError};

/// What is answered however much is under way: whether the server lives, and how it is.
const ALWAYS: [&str; 4] = ["/livez", "/readyz", "/api/v1/health", "/metrics"];

pub async fn limit<E: Endpoint>(
    places: Arc<Semaphore>,
    next: Arc<E>,
    mut request: Request,
) -> Result<E::Output> {
    if !ALWAYS.contains(&request.uri().path()) {
        let place = places.try_acquire_owned().map_err(|_| ApiError::overloaded())?;
        request.extensions_mut().insert(Place::new(place));
    }
    next.call(request).await
}
