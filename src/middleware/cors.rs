//! Lets pages of the named origins use the server: <https://fetch.spec.whatwg.org/#http-cors-protocol>. Keys come in
//! headers, so that there is no need of a browser's cookies ("credentials").

use poem::{
    Body, Request, Response,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
};

use super::origin::Origins;

/// The request's headers that we read.
const READ: &str =
    "Authorization, X-API-Key, Content-Type, Idempotency-Key, If-Match, Last-Event-ID, X-Request-ID";
/// The answer's headers that a page may read.
const SHOWN: &str = "X-Request-ID, X-Process-Time, ETag, Retry-After, RateLimit-Policy, RateLimit-Limit, \
     RateLimit-Remaining, RateLimit-Reset, Idempotency-Replayed, Content-Disposition";
/// How many seconds a browser may remember what is allowed; none remembers it for longer than a day.
const REMEMBERED: &str = "7200";

/// What a request asks for, where origins are named.
pub struct Asked {
    /// The page's, if it is a named one.
    origin: Option<HeaderValue>,
    preflight: bool,
}

impl Asked {
    pub fn by(request: &Request, origins: &Origins) -> Option<Self> {
        let named = || Origins::of(request.headers()).filter(|origin| origins.include(origin)).cloned();
        let preflight = || {
            *request.method() == Method::OPTIONS
                && request.headers().contains_key(header::ACCESS_CONTROL_REQUEST_METHOD)
        };
        (!origins.is_empty()).then(|| Self { origin: named(), preflight: preflight() })
    }

    /// Allows the page to read the answer, if it may.
    pub fn allow(self, response: &mut Response) {
        let headers = response.headers_mut();
        headers.append(header::VARY, HeaderValue::from_static("Origin"));
        let Some(origin) = self.origin else { return };
        let mut set = |name, value| headers.insert(name, HeaderValue::from_static(value));
        set(header::ACCESS_CONTROL_EXPOSE_HEADERS, SHOWN);
        set(HeaderName::from_static("cross-origin-resource-policy"), "cross-origin");
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        // Nothing is served by OPTIONS: what is there refuses it and says which methods it has.
        if self.preflight
            && let Some(methods) = headers.remove(header::ALLOW)
        {
            headers.remove(header::CONTENT_TYPE);
            headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, methods);
            headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static(READ));
            headers.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static(REMEMBERED));
            response.set_status(StatusCode::NO_CONTENT);
            response.set_body(Body::empty());
        }
    }
}
