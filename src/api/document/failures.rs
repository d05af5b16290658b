//! Which refusals each operation may answer, with an example of each.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use poem::{
    Request,
    http::{HeaderValue, Method},
};
use poem_openapi::types::ToJSON;
use serde_json::{Map, Value, json};

use super::{MOMENT, each_operation, refer};
use crate::{
    api::{
        auth::needed,
        error::{ApiError, Code},
        json::{JSON, check_content_type, parse, too_slow},
    },
    auth::{
        Refusal,
        rate::{RateLimit, Taken},
    },
    chat,
    domain::{ids::RequestId, key::Scope, session::UserId},
    model,
};

/// What the operation of this method and path may answer: what its guard, its body and its parameters bring along,
/// and its own.
fn codes(method: &Method, path: &str, operation: &Value) -> BTreeSet<Code> {
    let own = own(method, path);
    let mut codes = BTreeSet::from([Code::InvalidRequest, Code::ValidationError, Code::InternalError]);
    codes.extend(own);
    if needed(method, path).is_some() {
        codes.extend([
            Code::Unauthorized,
            Code::Forbidden,
            Code::RateLimitExceeded,
            Code::UpstreamUnavailable,
            Code::Overloaded,
            Code::DatabaseUnavailable,
        ]);
    }
    if operation["requestBody"].is_object() {
        codes.extend([
            Code::InvalidContentType,
            Code::InvalidJson,
            Code::RequestTimeout,
            Code::PayloadTooLarge,
        ]);
    }
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let place = [&parameter["in"], &parameter["name"]].map(|text| text.as_str().unwrap_or_default());
        let brought: &[Code] = match place {
            // Where the session must also be active, one code stands for both.
            ["path", "session_id"] if !own.contains(&Code::InvalidSession) => {
                &[Code::NotFound, Code::SessionNotFound]
            }
            ["path", "turn"] => &[Code::NotFound, Code::TurnNotFound],
            ["path", "key_id"] => &[Code::NotFound, Code::KeyNotFound],
            // What is no UTF-8 names nothing.
            ["path", _] => &[Code::NotFound],
            ["query", "cursor"] => &[Code::InvalidCursor],
            ["header", "Idempotency-Key"] => &[Code::IdempotencyInProgress, Code::IdempotencyKeyReused],
            ["header", "If-Match"] => &[Code::PreconditionFailed],
            _ => &[],
        };
        codes.extend(brought);
    }
    codes
}

/// What an operation may answer that cannot be told from how it is called.
fn own(method: &Method, path: &str) -> &'static [Code] {
    let segments: Vec<_> = path.trim_start_matches("/api/v1").split('/').skip(1).collect();
    match (method.as_str(), segments.as_slice()) {
        ("GET", ["readyz"]) => &[Code::Overloaded, Code::DatabaseUnavailable],
        ("GET", ["sessions", "continue"]) => &[Code::NoSessionFound],
        ("POST", ["sessions", _, "fork"]) => &[Code::TurnNotFound, Code::SessionBusy],
        ("POST", ["chat"]) => &[
            Code::MessageTooLong,
            Code::InvalidSession,
            Code::SessionBusy,
            Code::TurnCancelled,
            Code::TokenBudgetExceeded,
            Code::UpstreamError,
            Code::UpstreamTimeout,
        ],
        // What fails once the turn has begun is an event.
        ("POST", ["chat", "stream"]) => &[
            Code::MessageTooLong,
            Code::InvalidSession,
            Code::SessionBusy,
            Code::TurnCancelled,
            Code::TokenBudgetExceeded,
        ],
        ("POST", ["sessions", _, "turns"]) => {
            &[Code::MessageTooLong, Code::InvalidSession, Code::SessionBusy, Code::TurnCancelled]
        }
        ("DELETE", ["sessions", _, "turns", _]) => &[Code::SessionBusy],
        ("POST", ["sessions", _, "turns", _, "cancel"]) => &[Code::TurnNotRunning],
        ("GET", ["users", _] | ["users", _, "export"]) | ("DELETE", ["users", _]) => &[Code::UserNotFound],
        ("POST", ["import"]) => &[Code::UserNotFound, Code::SessionBusy],
        _ => &[],
    }
}

/// An example of each refusal: made as the server makes it, so that its words are the server's own.
fn example(code: Code) -> ApiError {
    let user = || UserId::try_from("user_123".to_owned()).unwrap_or_default();
    let session = "session_a1b2c3d4e5f67890";
    match code {
        Code::InvalidContentType => match check_content_type(&Request::default(), JSON) {
            Err(refusal) => refusal,
            Ok(()) => ApiError::internal(),
        },
        Code::InvalidJson => match parse::<Map<String, Value>>(br#"{"title": }"#) {
            Err(refusal) => refusal,
            Ok(_) => ApiError::internal(),
        },
        Code::ValidationError => {
            ApiError::field("user_id", UserId::try_from(String::new()).err().unwrap_or_default())
        }
        Code::InvalidRequest => ApiError::not_one_host(),
        Code::MessageTooLong => ApiError::chat(chat::Error::MessageTooLong { limit: 32_000 }, None),
        Code::InvalidCursor => ApiError::invalid_cursor(),
        Code::Unauthorized => ApiError::unauthorized(&Refusal::Nothing.to_string()),
        Code::Forbidden => ApiError::missing_scope(Scope::Write),
        Code::SessionNotFound => ApiError::session_not_found(session),
        Code::InvalidSession => ApiError::invalid_session(session),
        Code::NoSessionFound => ApiError::no_session_found(&user()),
        Code::TurnNotFound => ApiError::turn_not_found("3"),
        Code::UserNotFound => ApiError::user_not_found(&user()),
        Code::KeyNotFound => ApiError::key_not_found("key_a1b2c3d4e5f67890"),
        Code::NotFound => ApiError::not_found(),
        Code::MethodNotAllowed => ApiError::method_not_allowed(&HeaderValue::from_static("GET, HEAD, POST")),
        Code::RequestTimeout => too_slow(),
        Code::SessionBusy => ApiError::chat(chat::Error::Busy { turn: 3 }, None),
        Code::TurnCancelled => ApiError::turn_cancelled().replayed(),
        Code::TurnNotRunning => ApiError::turn_not_running(3),
        Code::IdempotencyInProgress => ApiError::idempotency_in_progress(Duration::from_secs(1)),
        Code::PreconditionFailed => ApiError::precondition_failed(),
        Code::PayloadTooLarge => ApiError::body_too_large(1 << 20),
        Code::IdempotencyKeyReused => ApiError::idempotency_key_reused(),
        Code::RateLimitExceeded => ApiError::rate_limited(&taken()),
        Code::TokenBudgetExceeded => ApiError::chat(
            chat::Error::OverBudget { budget: 100_000, resets_in: Duration::from_secs(3600) },
            None,
        ),
        Code::InternalError => ApiError::internal(),
        Code::UpstreamError => model::Error::Broken("The model server cannot be reached".to_owned()).into(),
        Code::UpstreamUnavailable => model::Error::Unavailable {
            message: "The model server keeps failing and is left alone for a moment".to_owned(),
            retry_after: Some(Duration::from_secs(10)),
        }
        .into(),
        Code::Overloaded => ApiError::overloaded(),
        Code::DatabaseUnavailable => ApiError::database_unavailable(),
        Code::UpstreamTimeout => model::Error::TimedOut("The model did not answer in time".to_owned()).into(),
    }
}

/// A call too many.
fn taken() -> Taken {
    Taken {
        allowed: false,
        limit: RateLimit { requests: 100, window: Duration::from_secs(60) },
        remaining: 0,
        resets_in: Duration::from_secs(30),
        is_first_refused: false,
    }
}

/// The name that clients see.
fn name(code: Code) -> String {
    code.to_json().as_ref().and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// Says of each operation what it may refuse, by status, with what it shares with others among the components.
pub fn describe(document: &mut Value) {
    let mut answers = Map::from_iter([
        rest("ClientError", "The request cannot be fulfilled as it is; `error.code` says why."),
        rest("ServerError", "Something failed on this side; `error.code` says what."),
    ]);
    let mut examples = Map::new();
    each_operation(document, |method, path, operation| {
        // Client generators take one type of failure for an operation, and health has its own.
        if operation["responses"].as_object().is_some_and(|own| own.contains_key("503")) {
            return;
        }
        let mut by_status = BTreeMap::<_, Vec<_>>::new();
        for code in codes(method, path, operation) {
            by_status.entry(code.status().as_u16()).or_default().push(code);
        }
        let responses = &mut operation["responses"];
        if let Some(responses) = responses.as_object_mut() {
            responses.retain(|status, _| !status.ends_with("XX"));
        }
        for (status, codes) in by_status {
            let names: Vec<_> = codes.iter().map(|code| format!("{code:?}")).collect();
            let shared = names.join("Or");
            responses[status.to_string()] = refer("responses", &shared);
            examples.extend(codes.iter().map(|code| (name(*code), shown(*code))));
            answers.entry(shared).or_insert_with(|| answer(&codes));
        }
        responses["4XX"] = refer("responses", "ClientError");
        responses["5XX"] = refer("responses", "ServerError");
    });
    let components = &mut document["components"];
    let line = |code: &Code| format!("- `{}` ({}): {}", name(*code), code.status().as_u16(), code.meaning());
    let list: Vec<_> = Code::ALL.iter().map(line).collect();
    let codes = &mut components["schemas"]["ErrorCode"]["description"];
    *codes = format!("{}\n\n{}", codes.as_str().unwrap_or_default(), list.join("\n")).into();
    components["responses"] = answers.into();
    components["examples"] = examples.into();
}

/// What is answered with any of these codes, which have one status.
fn answer(codes: &[Code]) -> Value {
    let meaning = |code: &Code| format!("`{}`: {}", name(*code), code.meaning());
    let description = match codes {
        [code] => meaning(code),
        codes => codes.iter().map(|code| format!("- {}", meaning(code))).collect::<Vec<_>>().join("\n"),
    };
    let examples: Map<_, _> =
        codes.iter().map(|code| (name(*code), refer("examples", &name(*code)))).collect();
    let mut answer = json!({
        "description": description,
        "content": {JSON: {"schema": refer("schemas", "Failure"), "examples": examples}},
    });
    for (header, _) in codes.iter().flat_map(|code| example(*code).headers) {
        answer["headers"][header.as_str()] = Value::Null;
    }
    if codes.contains(&Code::RateLimitExceeded) {
        for (header, _) in taken().headers() {
            answer["headers"][header] = Value::Null;
        }
    }
    answer
}

/// What is answered with a status that an operation does not list.
fn rest(name: &str, description: &str) -> (String, Value) {
    let content = json!({JSON: {"schema": refer("schemas", "Failure")}});
    (name.to_owned(), json!({"description": description, "content": content}))
}

fn shown(code: Code) -> Value {
    let request_id = RequestId::parse("req_0f1e2d3c4b5a6978").unwrap_or_else(RequestId::random);
    let failure = example(code).failure(request_id, MOMENT).to_json();
    json!({"summary": code.meaning(), "value": failure})
}
