//! Headers that keep browsers from doing more with an answer than was meant.

use std::sync::Arc;

use poem::{
    Endpoint, Request, Response, Result,
    http::{HeaderName, HeaderValue, header},
};

use crate::{api::Arrival, auth::rate::Taken};

/// The usual security headers; an answer that has set one itself keeps its own. Not `Strict-Transport-Security`, which
/// means nothing over plain HTTP (RFC 6797, 7.2): whoever speaks TLS before this server adds it.
const HEADERS: [(HeaderName, &str); 8] = [
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::X_FRAME_OPTIONS, "DENY"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    (
        HeaderName::from_static("permissions-policy"),
        "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
    ),
    (header::CACHE_CONTROL, "no-store"),
];

pub async fn headers<E: Endpoint<Output = Response>>(next: Arc<E>, request: Request) -> Result<Response> {
    let arrival = request.data::<Arrival>().cloned();
    let mut response = next.call(request).await?;
    let rate = arrival.iter().filter_map(|arrival| arrival.notes.rate()).flat_map(Taken::headers);
    for (name, value) in rate {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    for (name, value) in HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
    Ok(response)
}
