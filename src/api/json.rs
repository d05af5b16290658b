//! JSON bodies: bounded while they are read, and refused with the name of the field that does not fit.

use std::{sync::Arc, time::Duration};

use futures_util::StreamExt;
use poem::{IntoResponse, Request, RequestBody, Response, Result, http::header};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions,
    payload::Payload,
    registry::{MetaMediaType, MetaRequest, MetaSchemaRef, Registry},
    types::{ToJSON, Type},
};
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use super::{
    error::{ApiError, Code},
    place::Place,
};
use crate::domain::json::{self, MAX_DEPTH, TWICE, Unread, is_too_deep, read_value};

/// How long a client may take to send its body.
pub(super) const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// How much of a body that is too large is read and thrown away, in multiples of the limit, so that the
/// client, still sending, gets to read the answer.
const DRAIN: usize = 16;

/// What bodies may take. Every request carries it.
#[derive(Clone, Debug)]
pub struct BodyLimit {
    /// The largest one, in bytes.
    pub bytes: usize,
    /// A permit for each byte of all of them together.
    pub all: Arc<Semaphore>,
}

/// The JSON body of an answer.
pub struct Json<T>(pub T);

/// The JSON body of a request.
pub struct Body<T> {
    pub value: T,
    /// Tells this request from others that come with the same idempotency key.
    pub digest: [u8; 32],
}

/// The JSON body of a request that may be empty or missing; then it is the default.
pub struct OptionalBody<T>(pub Body<T>);

impl<T: Type> Payload for Json<T> {
    const CONTENT_TYPE: &'static str = "application/json";

    fn schema_ref() -> MetaSchemaRef {
        T::schema_ref()
    }

    fn register(registry: &mut Registry) {
        T::register(registry);
    }
}

impl<T: ToJSON> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        Response::builder().content_type(Self::CONTENT_TYPE).body(self.0.to_json_string())
    }
}

macro_rules! request_body {
    ($payload:ident, $required:literal, $($bound:tt)+) => {
        impl<'a, T: Type + DeserializeOwned + $($bound)+> ApiExtractor<'a> for $payload<T> {
            const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::RequestObject];
            type ParamType = ();
            type ParamRawType = ();

            fn register(registry: &mut Registry) {
                T::register(registry);
            }

            fn request_meta() -> Option<MetaRequest> {
                let content = MetaMediaType {
                    content_type: <Json<T> as Payload>::CONTENT_TYPE,
                    schema: T::schema_ref(),
                };
                Some(MetaRequest { description: None, content: vec![content], required: $required })
            }

            async fn from_request(
                request: &'a Request,
                body: &mut RequestBody,
                _: ExtractParamOptions<()>,
            ) -> Result<Self> {
                Ok(Self::read(request, body).await?)
            }
        }
    };
}
request_body!(Body, true, Send);
request_body!(OptionalBody, false, Default);

impl<T: DeserializeOwned> Body<T> {
    async fn read(request: &Request, body: &mut RequestBody) -> Result<Self, ApiError> {
        check_content_type(request, JSON)?;
        let bytes = bytes(request, body).await?;
        Ok(Self { value: parse(&bytes)?, digest: digest(request, &bytes) })
    }
}

impl<T: DeserializeOwned + Default> OptionalBody<T> {
    async fn read(request: &Request, body: &mut RequestBody) -> Result<Self, ApiError> {
        // Whether there is a body is known only from reading it; without one its type does not matter. With
        // another type it is none of ours, and not read.
        let typed = check_content_type(request, JSON);
        let empty = request.header(header::CONTENT_LENGTH) == Some("0");
        if request.header(header::CONTENT_TYPE).is_some() && !empty {
            typed.clone()?;
        }
        let bytes = bytes(request, body).await?;
        let digest = digest(request, &bytes);
        if bytes.is_empty() {
            return Ok(Self(Body { value: T::default(), digest }));
        }
        typed?;
        Ok(Self(Body { value: parse(&bytes)?, digest }))
    }
}

/// A digest of what is asked: method, path and body.
fn digest(request: &Request, bytes: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for part in [request.method().as_str().as_bytes(), request.uri().path().as_bytes(), bytes] {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

pub(super) const JSON: &str = "application/json";

/// Refuses a body that is not of this media type, in UTF-8 and as it is.
pub(super) fn check_content_type(request: &Request, wanted: &str) -> Result<(), ApiError> {
    let refuse = |message: String| Err(ApiError::new(Code::InvalidContentType, message));
    let any_but = |name, plain: &str| request.headers().get_all(name).iter().any(|value| value != plain);
    if any_but(header::CONTENT_ENCODING, "identity") || any_but(header::TRANSFER_ENCODING, "chunked") {
        return refuse("An encoding of the body is not supported; send it as it is".to_owned());
    }
    if request.headers().get_all(header::CONTENT_TYPE).iter().nth(1).is_some() {
        return refuse("Content-Type must be given once".to_owned());
    }
    let Some(value) = request.header(header::CONTENT_TYPE) else {
        return refuse(format!("Content-Type is missing; send {wanted}"));
    };
    let mut parts = value.split(';').map(str::trim);
    let fits = parts.next().is_some_and(|media| media.eq_ignore_ascii_case(wanted));
    let utf8 = |parameter: &str| match parameter.split_once('=') {
        Some((name, value)) if name.eq_ignore_ascii_case("charset") => {
            value.trim_matches('"').eq_ignore_ascii_case("utf-8")
        }
        _ => true,
    };
    if fits && parts.all(utf8) {
        return Ok(());
    }
    refuse(format!("Content-Type must be {wanted}, in UTF-8"))
}

/// Reads a body within its limit and its time. The request's place keeps its share of what all bodies may take.
async fn bytes(request: &Request, body: &mut RequestBody) -> Result<Vec<u8>, ApiError> {
    let BodyLimit { bytes: limit, all } = request.data().ok_or_else(ApiError::internal)?;
    let limit = *limit;
    let deadline = Instant::now() + BODY_TIMEOUT;
    let (mut bytes, mut received, mut share) = (Vec::new(), 0, None);
    let Ok(body) = body.take() else { return Ok(bytes) };
    let mut chunks = body.into_bytes_stream();
    while let Some(chunk) = timeout_at(deadline, chunks.next()).await.map_err(|_| too_slow())? {
        let chunk = chunk.map_err(|_| ApiError::new(Code::InvalidRequest, "The body broke off"))?;
        received += chunk.len();
        if received <= limit {
            grow(&mut share, all, chunk.len())?;
            bytes.extend_from_slice(&chunk);
        } else {
            (bytes, share) = (Vec::new(), None);
            if received > limit.saturating_mul(DRAIN) {
                break;
            }
        }
    }
    if received > limit {
        return Err(ApiError::body_too_large(limit));
    }
    if let Some(place) = request.data::<Place>() {
        place.keep(share);
    }
    Ok(bytes)
}

/// Takes so many bytes more of what all bodies may take.
fn grow(
    share: &mut Option<OwnedSemaphorePermit>,
    all: &Arc<Semaphore>,
    bytes: usize,
) -> Result<(), ApiError> {
    let more = u32::try_from(bytes).ok().and_then(|bytes| all.clone().try_acquire_many_owned(bytes).ok());
    let more = more.ok_or_else(ApiError::overloaded)?;
    match share {
        Some(share) => share.merge(more),
        None => *share = Some(more),
    }
    Ok(())
}

pub(super) fn too_slow() -> ApiError {
    let message = format!("The body did not arrive within {} seconds", BODY_TIMEOUT.as_secs());
    ApiError::new(Code::RequestTimeout, message)
}

/// Reads JSON into `T`; what is no JSON is told apart from what does not fit.
pub(super) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    if is_too_deep(bytes) {
        let message = format!("The body must not nest deeper than {MAX_DEPTH}");
        return Err(ApiError::new(Code::ValidationError, message));
    }
    let value = json::parse(bytes).map_err(|unread| match unread {
        Unread::NotJson(error) => ApiError::new(Code::InvalidJson, format!("The body is not JSON: {error}")),
        Unread::Twice(field) => ApiError::field(field, TWICE),
    })?;
    if !value.is_object() {
        return Err(ApiError::new(Code::ValidationError, "The body must be a JSON object"));
    }
    read_value(value).map_err(|(field, problem)| ApiError::field(field, problem))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures_util::stream;
    use proptest::{collection::vec, prelude::*, sample::select};
    use serde_json::{Map, Value, json};

    use super::{
        super::{
            chat::ChatRequest,
            memory::MemoryChange,
            sessions::{NewFork, NewSession, SessionChange},
            turns::NewTurns,
            users::UserMemoryChange,
        },
        *,
    };

    /// Reads a body that comes from `chunks`.
    async fn receive(
        chunks: impl futures_util::Stream<Item = &'static str> + Send + 'static,
    ) -> Result<Value, Code> {
        let chunks = chunks.map(|chunk| Ok::<_, std::io::Error>(chunk.as_bytes()));
        let limit = BodyLimit { bytes: 1000, all: Arc::new(Semaphore::new(1000)) };
        let request = Request::builder().content_type(JSON).extension(limit);
        let (request, mut body) = request.body(poem::Body::from_bytes_stream(Box::pin(chunks))).split();
        Body::read(&request, &mut body).await.map(|body| body.value).map_err(|refusal| refusal.code)
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_does_not_come_in_time_is_given_up() {
        let half = stream::iter(["{"]).chain(stream::pending());
        assert_eq!(receive(half).await, Err(Code::RequestTimeout));
        let slow = |pause| {
            let chunks = stream::iter(["{", "\"a\"", ":", "1", "}"]);
            chunks.then(move |chunk| async move {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                chunk
            })
        };
        assert_eq!(receive(slow(5)).await.unwrap()["a"], 1);
        assert_eq!(receive(slow(7)).await, Err(Code::RequestTimeout));
    }

    /// Reads bytes as a request: they are refused as the contract says, or what was read is what was sent.
    fn read<T: Type + DeserializeOwned + ToJSON>(bytes: &[u8]) {
        let request: T = match parse(bytes) {
            Ok(request) => request,
            Err(refusal) => {
                return assert!(
                    matches!(refusal.code, Code::InvalidJson | Code::ValidationError),
                    "{refusal:?}"
                );
            }
        };
        let text = request.to_json_string();
        assert_eq!(parse::<T>(text.as_bytes()).unwrap().to_json_string(), text);
        let [sent, read] = [bytes, text.as_bytes()].map(|text| json::parse(text).unwrap());
        for field in
            ["user_id", "title", "message", "session_id", "model", "metadata", "working_memory", "facts"]
        {
            assert!(read[field].is_null() || read[field] == sent[field], "{field}: {sent} became {read}");
        }
    }

    fn read_as_each(bytes: &[u8]) {
        read::<NewSession>(bytes);
        read::<SessionChange>(bytes);
        read::<NewFork>(bytes);
        read::<ChatRequest>(bytes);
        read::<NewTurns>(bytes);
        read::<MemoryChange>(bytes);
        read::<UserMemoryChange>(bytes);
    }

    const WORDS: [&str; 24] = [
        "user_id", "metadata", "title", "system_prompt", "ttl_seconds", "is_active", "turn", "turns",
        "message", "response", "session_id", "model", "temperature", "max_tokens", "on_busy", "queue",
        "created_at", "2024-01-01T12:00:00.000Z", "working_memory", "behavior_profile", "tone", "casual",
        "facts", "\0",
    ];

    fn any_word() -> impl Strategy<Value = String> {
        prop_oneof![3 => select(&WORDS[..]).prop_map(str::to_owned), 1 => "(?s:.{0,9})"]
    }

    /// JSON with much of what requests are made of.
    fn any_json() -> impl Strategy<Value = Value> {
        let number = prop_oneof![
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            (0..99).prop_map(Value::from)
        ];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            number,
            any_word().prop_map(Value::from)
        ];
        leaf.prop_recursive(6, 60, 9, |inner| {
            let object = vec((any_word(), inner.clone()), 0..9).prop_map(Value::from_iter);
            prop_oneof![3 => object, 1 => vec(inner, 0..4).prop_map(Value::from)]
        })
    }

    /// The same with what requests cannot do without.
    fn any_request() -> impl Strategy<Value = Value> {
        let text = || prop_oneof![9 => any_word().prop_map(Value::from), 1 => any_json()];
        (vec((any_word(), any_json()), 0..4), text(), text(), any_word(), any_json()).prop_map(
            |(entries, message, response, key, value)| {
                let mut request = Map::from_iter(entries);
                let metadata = if value.is_object() { value.clone() } else { Value::Null };
                let turn = json!({"message": message, "response": response, "metadata": metadata});
                let needed = [("message", message), ("turns", json!([turn])), ("facts", json!({key: value}))];
                request.extend(needed.map(|(field, value)| (field.to_owned(), value)));
                request.into()
            },
        )
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: Vec<u8>) {
            read_as_each(&bytes);
        }

        #[test]
        fn any_json_is_read_as_it_is_or_refused(json in any_json(), request in any_request()) {
            read_as_each(json.to_string().as_bytes());
            read_as_each(request.to_string().as_bytes());
        }

        #[test]
        fn broken_json_is_read_or_refused(json in any_request(), changes in vec((any::<usize>(), any::<u8>()), 1..5)) {
            let mut bytes = json.to_string().into_bytes();
            for (at, byte) in changes {
                let at = at % bytes.len();
                bytes[at] = byte;
            }
            read_as_each(&bytes);
        }
    }
}
