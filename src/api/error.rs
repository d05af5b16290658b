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
        session::UserId,
    },
    model, store,
};

macro_rules! codes {
    ($($(#[$doc:meta])* $code:ident = $status:ident),* $(,)?) => {
        /// The stable name of a refusal; clients branch on it, never on the message.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Enum)]
        #[oai(rename_all = "SCREAMING_SNAKE_CASE", rename = "ErrorCode")]
        pub enum Code { $($(#[$doc])* $code),* }

        impl Code {
            pub fn status(self) -> StatusCode {
                match self { $(Self::$code => StatusCode::$status),* }
            }
        }
    };
}

codes! {
    InvalidContentType = BAD_REQUEST,
    InvalidJson = BAD_REQUEST,
    ValidationError = BAD_REQUEST,
    InvalidRequest = BAD_REQUEST,
    MessageTooLong = BAD_REQUEST,
    InvalidCursor = BAD_REQUEST,
    Unauthorized = UNAUTHORIZED,
    Forbidden = FORBIDDEN,
    SessionNotFound = NOT_FOUND,
    InvalidSession = NOT_FOUND,
    NoSessionFound = NOT_FOUND,
    TurnNotFound = NOT_FOUND,
    UserNotFound = NOT_FOUND,
    KeyNotFound = NOT_FOUND,
    NotFound = NOT_FOUND,
    MethodNotAllowed = METHOD_NOT_ALLOWED,
    RequestTimeout = REQUEST_TIMEOUT,
    SessionBusy = CONFLICT,
    TurnCancelled = CONFLICT,
    TurnNotRunning = CONFLICT,
    IdempotencyInProgress = CONFLICT,
    PreconditionFailed = PRECONDITION_FAILED,
    PayloadTooLarge = PAYLOAD_TOO_LARGE,
    IdempotencyKeyReused = UNPROCESSABLE_ENTITY,
    RateLimitExceeded = TOO_MANY_REQUESTS,
    TokenBudgetExceeded = TOO_MANY_REQUESTS,
    InternalError = INTERNAL_SERVER_ERROR,
    UpstreamError = BAD_GATEWAY,
    UpstreamUnavailable = SERVICE_UNAVAILABLE,
    Overloaded = SERVICE_UNAVAILABLE,
    DatabaseUnavailable = SERVICE_UNAVAILABLE,
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
            store::Error::Unavailable(_) => {
                Self::new(Code::DatabaseUnavailable, "The database is not available; try again")
                    .retry_after(Duration::from_secs(1))
            }
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
    error: ErrorBody,
    /// When this was answered.
    timestamp: Timestamp,
    /// The value of `X-Request-ID`.
    request_id: RequestId,
}
