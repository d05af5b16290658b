//! What a request takes up while it is under way.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use poem::{FromRequest, Request, RequestBody, Result};
use tokio::sync::OwnedSemaphorePermit;

use super::error::ApiError;

/// A request's place among those under way, and its body's share of what all bodies may take. Both are free again
/// when the request is gone.
#[derive(Clone)]
pub struct Place(Arc<Mutex<Held>>);

struct Held {
    place: Option<OwnedSemaphorePermit>,
    body: Option<OwnedSemaphorePermit>,
}

impl Place {
    pub fn new(place: OwnedSemaphorePermit) -> Self {
        Self(Arc::new(Mutex::new(Held { place: Some(place), body: None })))
    }

    /// Keeps the share of its body.
    pub(super) fn keep(&self, body: Option<OwnedSemaphorePermit>) {
        self.held().body = body;
    }

    /// Gives up the place before a long wait; what is left is the share of the body, for whoever keeps the body.
    pub(super) fn leave(&self) -> Option<OwnedSemaphorePermit> {
        let mut held = self.held();
        held.place = None;
        held.body.take()
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> FromRequest<'a> for Place {
    async fn from_request(request: &'a Request, _: &mut RequestBody) -> Result<Self> {
        // Put there by `middleware::limit`.
        Ok(request.data::<Self>().cloned().ok_or_else(ApiError::internal)?)
    }
}
