//! Gives every request a name and every answer that name and its time.

use std::sync::Arc;

use poem::{Endpoint, Request, Response, Result, http::HeaderValue};

use crate::{api::Arrival, domain::ids::RequestId};

/// Takes the client's `X-Request-ID` if it is fit for one, else makes one up.
pub async fn request_id<E: Endpoint<Output = Response>>(
    next: Arc<E>,
    mut request: Request,
) -> Result<Response> {
    let given = request.header("X-Request-ID").and_then(RequestId::parse);
    let arrival = Arrival::now(given.unwrap_or_else(RequestId::random));
    let Arrival { request_id, received, .. } = arrival.clone();
    request.extensions_mut().insert(arrival);
    let mut response = next.call(request).await?;
    let seconds = format!("{:.3}", received.elapsed().as_secs_f64());
    for (name, value) in [("X-Request-ID", request_id.as_str()), ("X-Process-Time", &seconds)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}
