//! Gives every request a name and every answer that name and its time.

use poem::{Request, Response, http::HeaderValue};

use crate::{api::Arrival, domain::ids::RequestId};

/// Takes the client's `X-Request-ID` if it is fit for one, else makes one up.
pub fn arrive(request: &mut Request) -> Arrival {
    let given = request.header("X-Request-ID").and_then(RequestId::parse);
    let arrival = Arrival::now(given.unwrap_or_else(RequestId::random));
    request.extensions_mut().insert(arrival.clone());
    arrival
}

pub fn name(response: &mut Response, Arrival { request_id, received, .. }: &Arrival) {
    let seconds = format!("{:.3}", received.elapsed().as_secs_f64());
    for (name, value) in [("X-Request-ID", request_id.as_str()), ("X-Process-Time", &seconds)] {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(name, value);
        }
    }
}
