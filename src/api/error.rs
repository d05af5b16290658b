//! Every refusal a client can see, in one table.

use std::time::Duration;

use poem::{
    Response,
    error::ResponseError,
    http::{HeaderName, HeaderValue, StatusCode, header},
};
use poem_openapi::{
    ApiResponse, Enum, Object,
    payload::Payload,
    registry::{MetaMediaType, MetaResponse, MetaResponses, Registry},
    types::{ParseFromJSON, ToJSON},
};

use super::json::Json;
use crate::{
    auth::rate::Taken,
    chat,
    domain::{
        clock::Timestamp,
        ids::{RequestId, SessionId},
        key::Scope,
        session::UserId,
    },
    model, store,
};

macro_rules! codes {
    ($($(#[doc = $meaning:literal])+ $code:ident = $status:ident),* $(,)?) => {
        /// The stable name of a refusal; clients branch on it, never on the message.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Enum)]
        #[oai(rename_all = "SCREAMING_SNAKE_CASE", rename = "ErrorCode")]
        pub enum Code { $($(#[doc = $meaning])+ $code),* }

        impl Code {
            pub const ALL: &[Self] = &[$(Self::$code),*];

            pub fn status(self) -> StatusCode {
                match self { $(Self::$code => StatusCode::$status),* }
            }

            /// When it is answered, for the document.
            pub fn meaning(self) -> &'static str {
                match self { $(Self::$code => concat!($($meaning),+).trim_ascii_start()),* }
            }
        }
    };
}

codes! {
    /// The body's media type is missing or another than the operation takes, or the body is encoded.
    InvalidContentType = BAD_REQUEST,
    /// The body is not JSON.
    InvalidJson = BAD_REQUEST,
    /// A field or parameter does not fit; `details` name it.
    ValidationError = BAD_REQUEST,
    /// The request cannot be worked with: an empty message, a body that broke off, or not one `Host`.
    InvalidRequest = BAD_REQUEST,
    /// The message has more characters than the server takes.
    MessageTooLong = BAD_REQUEST,
    /// The cursor was not issued for this listing and order.
    InvalidCursor = BAD_REQUEST,
    /// There is no key, or it is not valid.
    Unauthorized = UNAUTHORIZED,
    /// The key does not allow this, or, where none is needed, another site asks.
    Forbidden = FORBIDDEN,
    /// There is no such session, or it is not yours.
    SessionNotFound = NOT_FOUND,
    /// There is no such session, it is not yours, or it has ended or expired.
    InvalidSession = NOT_FOUND,
    /// The user has no active session.
    NoSessionFound = NOT_FOUND,
    /// The session has no turn of this number.
    TurnNotFound = NOT_FOUND,
    /// Nothing is there of this user, or they were erased meanwhile.
    UserNotFound = NOT_FOUND,
    /// Your tenant has no such key.
    KeyNotFound = NOT_FOUND,
    /// The path names nothing.
    NotFound = NOT_FOUND,
    /// The path has no such method; the `Allow` header lists those that it has.
    MethodNotAllowed = METHOD_NOT_ALLOWED,
    /// The body did not come in time.
    RequestTimeout = REQUEST_TIMEOUT,
    /// Another turn of the session is running, or the session is being imported; try again later.
    SessionBusy = CONFLICT,
    /// The turn was cancelled, or has been erased since.
    TurnCancelled = CONFLICT,
    /// There is nothing to cancel: the turn has ended.
    TurnNotRunning = CONFLICT,
    /// The first request with this `Idempotency-Key` is still being worked on; try again later.
    IdempotencyInProgress = CONFLICT,
    /// The state is not the one that `If-Match` names.
    PreconditionFailed = PRECONDITION_FAILED,
    /// The body, or a line of an archive, is larger than the server takes.
    PayloadTooLarge = PAYLOAD_TOO_LARGE,
    /// This `Idempotency-Key` came with another request.
    IdempotencyKeyReused = UNPROCESSABLE_ENTITY,
    /// Too many calls in a window of time; the next one begins after `Retry-After`.
    RateLimitExceeded = TOO_MANY_REQUESTS,
    /// The user has used all the tokens of the day; the next day (UTC) begins after `Retry-After`.
    TokenBudgetExceeded = TOO_MANY_REQUESTS,
    /// A defect of the server; its log has more under the request id.
    InternalError = INTERNAL_SERVER_ERROR,
    /// The model failed, or cannot be reached.
    UpstreamError = BAD_GATEWAY,
    /// The model asks for patience, or the keys of the token's issuer cannot be fetched; try again later.
    UpstreamUnavailable = SERVICE_UNAVAILABLE,
    /// Too much is being worked on, or the server is stopping; try again later.
    Overloaded = SERVICE_UNAVAILABLE,
    /// The database does not answer; try again later.
    DatabaseUnavailable = SERVICE_UNAVAILABLE,
    /// The model did not answer in time.
    UpstreamTimeout = GATEWAY_TIMEOUT,
}

/// What is wrong with one field or parameter.
#[derive(Clone, Debug, PartialEq, Eq, Object)]
#[oai(rename = "ErrorDetail")]
pub struct Detail {
    /// The field's path in the body, or the parameter's name.
    pub field: String,
    /// What to mend.
    pub message: String,
}

/// A refusal on its way out. Its message tells the caller what to mend and no more.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    pub code: Code,
    pub message: String,
    pub details: Vec<Detail>,
    pub headers: Vec<(HeaderName, HeaderValue)>,
}

impl ApiError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), details: Vec::new(), headers: Vec::new() }
    }

    /// A field or parameter that does not fit.
    pub fn field(field: impl Into<String>, problem: impl Into<String>) -> Self {
        let detail = Detail { field: field.into(), message: problem.into() };
        let message = format!("{}: {}", detail.field, detail.message);
        Self { details: vec![detail], ..Self::new(Code::ValidationError, message) }
    }

    pub fn session_not_found(id: &str) -> Self {
        Self::new(Code::SessionNotFound, format!("Session {id} not found"))
    }

    pub fn invalid_session(id: &str) -> Self {
        Self::new(Code::InvalidSession, format!("Invalid or inactive session: {id}"))
    }

    pub fn no_session_found(user: &UserId) -> Self {
        Self::new(Code::NoSessionFound, format!("No active session found for user: {}", user.as_str()))
    }

    pub fn turn_not_found(turn: &str) -> Self {
        Self::new(Code::TurnNotFound, format!("Turn {turn} not found"))
    }

    pub fn user_not_found(user: &UserId) -> Self {
        Self::new(Code::UserNotFound, format!("User {} not found", user.as_str()))
    }

    pub fn invalid_cursor() -> Self {
        let message = "The cursor was not issued for this listing and order; start again without one";
        Self::new(Code::InvalidCursor, message)
    }

    pub fn key_not_found(key: &str) -> Self {
        Self::new(Code::KeyNotFound, format!("Key {key} not found"))
    }

    pub fn not_found() -> Self {
        Self::new(Code::NotFound, "There is nothing here; see /docs for what there is")
    }

    pub fn method_not_allowed(allow: &HeaderValue) -> Self {
        let message = "This method is not allowed here; the Allow header lists those that are";
        Self::new(Code::MethodNotAllowed, message).with_header(header::ALLOW, allow.clone())
    }

    /// Says how to show a key (RFC 6750 3).
    pub fn unauthorized(message: &str) -> Self {
        let challenge = HeaderValue::from_static("Bearer realm=\"atlus\"");
        Self::new(Code::Unauthorized, message).with_header(header::WWW_AUTHENTICATE, challenge)
    }

    /// A key that does not allow the call.
    pub fn missing_scope(scope: Scope) -> Self {
        Self::new(Code::Forbidden, format!("This call needs a key with the scope {}", scope.name()))
    }

    /// Says when a client may call again.
    pub fn rate_limited(taken: &Taken) -> Self {
        let limit = taken.limit;
        let message = format!(
            "More than {} calls in {} seconds; the next may come in {} seconds",
            limit.requests,
            limit.window.as_secs(),
            taken.resets_in_seconds()
        );
        Self::new(Code::RateLimitExceeded, message)
            .with_header(header::RETRY_AFTER, taken.resets_in_seconds().max(1))
    }

    pub fn turn_cancelled() -> Self {
        Self::new(Code::TurnCancelled, "The turn was cancelled")
    }

    pub fn turn_not_running(turn: i64) -> Self {
        Self::new(Code::TurnNotRunning, format!("Turn {turn} is not running"))
    }

    /// The first request may be done after `wait`.
    pub fn idempotency_in_progress(wait: Duration) -> Self {
        let message = "The first request with this Idempotency-Key is still being worked on";
        Self::new(Code::IdempotencyInProgress, message).retry_after(wait)
    }

    pub fn idempotency_key_reused() -> Self {
        let message = "This Idempotency-Key was used for another request; use a new one";
        Self::new(Code::IdempotencyKeyReused, message)
    }

    pub fn body_too_large(limit: usize) -> Self {
        Self::new(Code::PayloadTooLarge, format!("The body must be at most {limit} bytes long"))
    }

    pub fn not_one_host() -> Self {
        Self::new(Code::InvalidRequest, "The Host header must be given once")
    }

    pub fn precondition_failed() -> Self {
        Self::new(Code::PreconditionFailed, "The session has changed; read it again and decide anew")
    }

    /// The same, as a key remembers it.
    #[must_use]
    pub fn replayed(self) -> Self {
        self.with_header(HeaderName::from_static("idempotency-replayed"), HeaderValue::from_static("true"))
    }

    pub fn overloaded() -> Self {
        let message = "Too many requests are being worked on; try again later";
        Self::new(Code::Overloaded, message).retry_after(Duration::from_secs(1))
    }

    pub fn database_unavailable() -> Self {
        let message = "The database is not available; try again";
        Self::new(Code::DatabaseUnavailable, message).retry_after(Duration::from_secs(1))
    }

    pub fn internal() -> Self {
        Self::new(Code::InternalError, "Something went wrong on our side; the request id finds it in the log")
    }

    /// A refusal by the conversation; `session` is the id that was asked for.
    pub fn chat(error: chat::Error, session: Option<SessionId>) -> Self {
        match error {
            chat::Error::InvalidSession => {
                Self::invalid_session(&session.map(|id| id.to_string()).unwrap_or_default())
            }
            chat::Error::EmptyMessage => Self::new(Code::InvalidRequest, "The message must not be empty"),
            chat::Error::MessageTooLong { limit } => Self::new(
                Code::MessageTooLong,
                format!("The message must be at most {limit} characters long"),
            ),
            chat::Error::Busy { turn } => {
                let detail = Detail { field: "turn".into(), message: turn.to_string() };
                let message = format!("Turn {turn} of this session is still running; try again later");
                let busy = Self::new(Code::SessionBusy, message).retry_after(Duration::from_secs(1));
                Self { details: vec![detail], ..busy }
            }
            chat::Error::OverBudget { budget, resets_in } => {
                let message = format!(
                    "This user has used the {budget} tokens of the day; the next day begins in {} seconds",
                    resets_in.as_secs()
                );
                Self::new(Code::TokenBudgetExceeded, message).retry_after(resets_in)
            }
            chat::Error::Cancelled => Self::turn_cancelled(),
            chat::Error::Interrupted => {
                let message = "The server was held up for so long that the turn was given up; send it again";
                Self::new(Code::Overloaded, message).retry_after(Duration::from_secs(1))
            }
            chat::Error::Overloaded => {
                let message = "Too many messages are being worked on; try again later";
                Self::new(Code::Overloaded, message).retry_after(Duration::from_secs(1))
            }
            chat::Error::Recorded { code, message } => {
                let code = Code::parse_from_json(Some(code.into())).unwrap_or(Code::Overloaded);
                Self::new(code, message)
            }
            chat::Error::Store(error) => error.into(),
            chat::Error::Model(error) => error.into(),
            chat::Error::Panicked => Self::internal(),
        }
    }

    fn with_header(mut self, name: HeaderName, value: impl Into<HeaderValue>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    #[must_use]
    pub fn retry_after(self, wait: Duration) -> Self {
        self.with_header(header::RETRY_AFTER, wait.as_secs().max(1))
    }

    /// The object that tells the client.
    pub fn failure(&self, request_id: RequestId, timestamp: Timestamp) -> Failure {
        let error = ErrorBody {
            code: self.code,
            message: self.message.clone(),
            status: self.code.status().as_u16().into(),
            details: (!self.details.is_empty()).then(|| self.details.clone()),
        };
        Failure { success: false, error, timestamp, request_id }
    }

    /// The answer that the client gets.
    pub fn render(self, request_id: RequestId, timestamp: Timestamp) -> Response {
        let mut response = Response::builder()
            .status(self.code.status())
            .content_type(<Json<Failure> as Payload>::CONTENT_TYPE)
            .body(self.failure(request_id, timestamp).to_json_string());
        response.headers_mut().extend(self.headers);
        response
    }
}

impl From<store::Error> for ApiError {
    /// Logged here, once, with its whole chain; the client learns only what it can act on.
    fn from(error: store::Error) -> Self {
        tracing::error!(error = &error as &dyn std::error::Error, "store failed");
        match error {
            store::Error::Unavailable(_) => Self::database_unavailable(),
            store::Error::Taken { .. } | store::Error::Failed(_) => Self::internal(),
        }
    }
}

impl From<model::Error> for ApiError {
    fn from(error: model::Error) -> Self {
        let message = error.to_string();
        match error {
            model::Error::Failed(_) | model::Error::Broken(_) => Self::new(Code::UpstreamError, message),
            model::Error::Overloaded => {
                Self::new(Code::Overloaded, message).retry_after(Duration::from_secs(1))
            }
            model::Error::TimedOut(_) => Self::new(Code::UpstreamTimeout, message),
            model::Error::Unavailable { retry_after, .. } => Self::new(Code::UpstreamUnavailable, message)
                .retry_after(retry_after.unwrap_or(Duration::from_secs(1))),
        }
    }
}

/// Lets a handler return a refusal; `middleware::refuse` takes it out again and renders it.
impl ResponseError for ApiError {
    fn status(&self) -> StatusCode {
        self.code.status()
    }
}

impl ApiResponse for ApiError {
    fn meta() -> MetaResponses {
        let range = |status_range: &str, description| MetaResponse {
            description,
            status: None,
            status_range: Some(status_range.to_owned()),
            content: vec![MetaMediaType {
                content_type: <Json<Failure> as Payload>::CONTENT_TYPE,
                schema: <Json<Failure> as Payload>::schema_ref(),
            }],
            headers: vec![],
        };
        MetaResponses {
            responses: vec![
                range("4XX", "The request cannot be fulfilled as it is; `error.code` says why."),
                range("5XX", "Something failed on this side; `error.code` says what."),
            ],
        }
    }

    fn register(registry: &mut Registry) {
        <Json<Failure> as Payload>::register(registry);
    }
}

/// What went wrong.
#[derive(Object)]
#[oai(rename = "Error")]
struct ErrorBody {
    /// The stable name of the refusal; branch on this.
    code: Code,
    /// What to mend, for people.
    message: String,
    /// The HTTP status, again.
    #[oai(validator(minimum(value = "400"), maximum(value = "599")))]
    status: i32,
    /// The fields concerned, where there are any.
    #[oai(skip_serializing_if_is_none)]
    details: Option<Vec<Detail>>,
}

/// What every failure looks like.
#[derive(Object)]
pub struct Failure {
    /// Always false.
    success: bool,
    /// What went wrong.
    error: ErrorBody,
    /// When this was answered.
    timestamp: Timestamp,
    /// The value of `X-Request-ID`.
    request_id: RequestId,
}
