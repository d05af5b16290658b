//! Gives every failure the contract's shape, whoever raised it: a handler, poem, poem-openapi or a panic.

use std::{panic::AssertUnwindSafe, sync::Arc};

use futures_util::FutureExt;
use poem::{
    Endpoint, Error, IntoResponse, Request, Response, Result,
    error::{NotFoundError, ParsePathError},
    http::StatusCode,
};
use poem_openapi::error::{ParseParamError, ParsePathError as ParseOpenApiPathError};

use crate::{
    api::{Arrival, error::ApiError, error::Code},
    domain::{
        clock::{Clock, SystemClock},
        ids::RequestId,
    },
};

pub async fn refuse<E: Endpoint>(next: Arc<E>, request: Request) -> Result<Response> {
    let request_id = request.data::<Arrival>().map(|arrival| arrival.request_id.clone());
    let outcome = AssertUnwindSafe(next.call(request)).catch_unwind().await;
    let refusal = match outcome {
        Ok(Ok(response)) => return Ok(response.into_response()),
        Ok(Err(error)) => translate(&error),
        Err(_) => {
            tracing::error!("a handler panicked");
            ApiError::internal()
        }
    };
    Ok(refusal.render(request_id.unwrap_or_else(RequestId::random), SystemClock.now()))
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
    use poem::{EndpointExt, endpoint::make_sync, http::header};
    use serde_json::Value;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_answered_and_tells_nothing() {
        let endpoint = make_sync(|_| -> Response { panic!("with a secret") }).around(refuse);
        let arrival = Arrival::now(RequestId::random());
        let request = Request::builder().extension(arrival.clone()).finish();
        let response = endpoint.call(request).await.unwrap();
        assert_eq!(response.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
        let body: Value = response.into_body().into_json().await.unwrap();
        assert_eq!(body["error"]["code"], "INTERNAL_ERROR");
        assert_eq!(body["request_id"], arrival.request_id.as_str());
        assert!(!body.to_string().contains("secret"));
    }
}
