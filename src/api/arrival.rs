//! What is known of a request before it is read, and what is found out about it on the way.

use std::{
    sync::{Arc, OnceLock},
    time::Instant,
};

use poem::{FromRequest, Request, RequestBody, Result};
use tracing::Span;

use super::error::ApiError;
use crate::auth::rate::Taken;
use crate::domain::{
    caller::{Caller, TenantId},
    ids::RequestId,
    key::KeyId,
};

/// When a request came in, and its name.
#[derive(Clone, Debug)]
pub struct Arrival {
    pub request_id: RequestId,
    pub received: Instant,
    pub notes: Arc<Notes>,
}

/// What is told of a request in headers and logs once it is answered.
#[derive(Debug, Default)]
pub struct Notes {
    caller: OnceLock<(TenantId, Option<KeyId>)>,
    taken: OnceLock<Taken>,
    operation: OnceLock<&'static str>,
    route: OnceLock<Arc<str>>,
}

impl Notes {
    pub(super) fn caller(&self, caller: &Caller) {
        // A request has one caller.
        let _ = self.caller.set((caller.tenant, caller.key));
        Span::current().record("tenant", caller.tenant.number());
    }

    pub(super) fn taken(&self, taken: Taken) {
        let _ = self.taken.set(taken);
    }

    pub(super) fn called(&self, id: &'static str, route: Arc<str>) {
        let _ = self.operation.set(id);
        let _ = self.route.set(route);
    }

    /// The operation that was called, by its id in the document, if there is one.
    pub fn operation(&self) -> Option<&'static str> {
        self.operation.get().copied()
    }

    /// The operation's path in the document.
    pub fn route(&self) -> Option<Arc<str>> {
        self.route.get().cloned()
    }

    /// What became of the client's window of the rate limit, if the call was counted.
    pub fn rate(&self) -> Option<&Taken> {
        self.taken.get()
    }

    /// The tenant for whom the call was made, once that is known.
    pub fn tenant(&self) -> Option<i64> {
        self.caller.get().map(|(tenant, _)| tenant.number())
    }

    /// The id of the key that was shown, once that is known.
    pub fn key(&self) -> Option<String> {
        self.caller.get().and_then(|(_, key)| key.as_ref().map(KeyId::to_string))
    }
}

impl Arrival {
    pub fn now(request_id: RequestId) -> Self {
        Self { request_id, received: Instant::now(), notes: Arc::default() }
    }
}

impl<'a> FromRequest<'a> for Arrival {
    async fn from_request(request: &'a Request, _: &mut RequestBody) -> Result<Self> {
        // Put there by `middleware::request_id`, before every route.
        Ok(request.data::<Self>().cloned().ok_or_else(ApiError::internal)?)
    }
}
