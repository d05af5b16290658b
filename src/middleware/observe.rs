//! Begins what the log and the traces tell of a request. What happens in it finds itself there.

use poem::{Request, Response};
use tracing::Instrument;

use crate::{
    api::Arrival,
    domain::ids::SessionId,
    telemetry::{log, traces::Span},
};

/// What is told of a request.
pub struct Observed {
    span: Span,
    log: tracing::Span,
}

impl Observed {
    pub fn begin(request: &Request, Arrival { request_id, .. }: &Arrival) -> Self {
        let path = request.uri().path();
        let session_id = named_session(path);
        let span = Span::begin_request("HTTP", request.headers());
        span.describe(|| {
            [
                ("http.request.method", Some(method(request).into())),
                ("url.path", Some(path.to_owned().into())),
                ("request_id", Some(request_id.to_string().into())),
                ("session_id", session_id.map(|id| id.to_string().into())),
            ]
        });
        let log = log::request(request_id, session_id, span.trace_id().as_deref());
        Self { span, log }
    }

    /// Works for the request.
    pub fn run<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        self.span.run(work.instrument(self.log.clone()))
    }

    /// Tells how it went.
    pub fn end(self, Arrival { notes, .. }: &Arrival, response: &Response) {
        let status = response.status();
        self.span.describe(|| {
            [
                ("http.route", notes.route().map(Into::into)),
                ("http.response.status_code", Some(i64::from(status.as_u16()).into())),
                ("tenant", notes.tenant().map(Into::into)),
            ]
        });
        if let Some(operation) = notes.operation() {
            self.span.rename(operation);
        }
        if status.is_server_error() {
            self.span.fail(status.as_str());
        }
    }
}

/// The session that a path names, if it is one.
fn named_session(path: &str) -> Option<SessionId> {
    path.strip_prefix("/api/v1/sessions/")?.split('/').next().and_then(SessionId::parse)
}

/// The method if it is a known one; of others there may be any number.
fn method(request: &Request) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];
    KNOWN.into_iter().find(|known| *known == request.method().as_str()).unwrap_or("_OTHER")
}
