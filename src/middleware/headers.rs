//! Headers that keep browsers from doing more with an answer than was meant.

use poem::{
    Response,
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

/// Adds these, and what is left of the client's window of the rate limit.
pub fn add(response: &mut Response, arrival: &Arrival) {
    for (name, value) in arrival.notes.rate().into_iter().flat_map(Taken::headers) {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    for (name, value) in HEADERS {
        response.headers_mut().entry(name).or_insert(HeaderValue::from_static(value));
    }
}
