//! `Idempotency-Key`: a request that was sent before is answered as it was then.

use super::error::ApiError;
use crate::{
    app::App,
    domain::caller::Caller,
    store::{Claim, Claimed, IdempotencyKey},
};

/// What a key says is to be done.
pub enum Begun {
    /// The work, by this claim if there is a key.
    Do(Option<Claim>),
    /// Nothing: this is the answer's `data`.
    Done(String),
}

/// Claims the key of a request, if it came with one; `request_hash` tells the request from others.
pub async fn begin(
    app: &App,
    caller: &Caller,
    key: Option<String>,
    request_hash: [u8; 32],
) -> Result<Begun, ApiError> {
    let Some(key) = key else { return Ok(Begun::Do(None)) };
    let claimed = app.store.claim(caller, IdempotencyKey { key, request_hash }, app.engine.lease()).await?;
    match claimed {
        Claimed::New(claim) => Ok(Begun::Do(Some(claim))),
        Claimed::Done { status: 200..=299, answer } => Ok(Begun::Done(answer)),
        Claimed::Done { .. } => Err(ApiError::turn_cancelled().replayed()),
        Claimed::Running(left) => Err(ApiError::idempotency_in_progress(left.min(RETRY))),
        Claimed::OtherRequest => Err(ApiError::idempotency_key_reused()),
    }
}

/// Frees the key of work that failed, so that the request may be sent again.
pub async fn settle<T>(app: &App, claim: Option<Claim>, outcome: Result<T, ApiError>) -> Result<T, ApiError> {
    if let (Err(_), Some(claim)) = (&outcome, claim) {
        app.store.release_claim(claim).await?;
    }
    outcome
}

/// How long a client waits that asks for an answer still in the making.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);

/// Reads a key: 1 to 255 printable ASCII characters.
pub fn parse(value: &[u8]) -> Result<String, ApiError> {
    let fits = (1..=255).contains(&value.len()) && value.iter().all(|byte| (b' '..=b'~').contains(byte));
    let key = fits.then(|| String::from_utf8_lossy(value).into_owned());
    key.ok_or_else(|| ApiError::field("Idempotency-Key", "must be 1 to 255 printable ASCII characters"))
}
