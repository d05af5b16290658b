//! Who calls. Authentication is off so far: everybody is the tenant `default`.

use poem::{FromRequest, Request, RequestBody, Result};

use crate::domain::caller::Caller;

/// The first argument of every handler, so that a stranger's body is never read.
impl<'a> FromRequest<'a> for Caller {
    async fn from_request(_: &'a Request, _: &mut RequestBody) -> Result<Self> {
        Ok(Self::ANYONE)
    }
}
