//! What is known of a request before it is read.

use std::time::Instant;

use poem::{FromRequest, Request, RequestBody, Result};

use super::error::ApiError;
use crate::domain::ids::RequestId;

/// When a request came in, and its name.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub request_id: RequestId,
    pub received: Instant,
}

impl<'a> FromRequest<'a> for Arrival {
    async fn from_request(request: &'a Request, _: &mut RequestBody) -> Result<Self> {
        // Put there by `middleware::request_id`, outside of every route.
        Ok(request.data::<Self>().cloned().ok_or_else(ApiError::internal)?)
    }
}
