//! Gives every failure the contract's shape, whoever raised it: a handler, poem, poem-openapi or a panic.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt;
use poem::{
    Error, Response, Result,
    error::{NotFoundError, ParsePathError},
    http::StatusCode,
};
use poem_openapi::error::{ParseParamError, ParsePathError as ParseOpenApiPathError};

use crate::{
    api::{Arrival, error::ApiError, error::Code},
    domain::clock::{Clock, SystemClock},
};

/// The answer that work comes to, or else a refusal.
pub async fn answered(work: impl Future<Output = Result<Response>>, arrival: &Arrival) -> Response {
    let refusal = match AssertUnwindSafe(work).catch_unwind().await {
        Ok(Ok(response)) => return response,
        Ok(Err(error)) => translate(&error),
        Err(_) => {
            tracing::error!("a handler panicked");
            ApiError::internal()
        }
    };
    refusal.render(arrival.request_id.clone(), SystemClock.now())
}

/// Finds the contract's code for an error.
fn translate(error: &Error) -> ApiError {
    if let Some(refusal) = error.downcast_ref::<ApiError>() {
        return refusal.clone();
    }
    if let Some(ParseParamError { name, reason }) = error.downcast_ref() {
        // poem-openapi puts the type's name in front of what we said, and behind it if the parameter may be absent.
        let problem = reason.split_once("\": ").map_or(reason.as_str(), |(_, problem)| problem);
        let problem = problem.split(" (occurred while parsing").next().unwrap_or_default();
        let problem = if problem.ends_with("expects an input value.") { "is required" } else { problem };
        return ApiError::field(*name, problem);
    }
    // A path that cannot be decoded names nothing.
    if error.is::<NotFoundError>() || error.is::<ParseOpenApiPathError>() || error.is::<ParsePathError>() {
        return ApiError::not_found();
    }
    match error.status() {
        StatusCode::NOT_FOUND => ApiError::not_found(),
        status if status.is_client_error() => {
            ApiError::new(Code::InvalidRequest, "The request cannot be read")
        }
        _ => {
            tracing::error!(%error, "a handler failed");
            ApiError::internal()
        }
    }
}

#[cfg(test)]
mod tests {
    use poem::http::header;
    use serde_json::Value;

    use super::*;
    use crate::domain::ids::RequestId;

    #[tokio::test]
    async fn a_panic_is_answered_and_tells_nothing() {
        let arrival = Arrival::now(RequestId::random());
        let response = answered(async { panic!("with a secret") }, &arrival).await;
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        let body: Value = response.into_body().into_json().await.unwrap();
        assert_eq!(body["error"]["code"], "INTERNAL_ERROR");
        assert_eq!(body["request_id"], arrival.request_id.as_str());
        assert!(!body.to_string().contains("secret"));
    }
}
