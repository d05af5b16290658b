//! A reply as server-sent events: <https://html.spec.whatwg.org/multipage/server-sent-events.html>.
//!
//! `start`, then `delta` as text comes, then `done` or `error`. The id of an event is the offset in the reply that
//! follows it, in bytes, so that a client that lost its connection can go on from there.

use std::{borrow::Cow, io, time::Duration};

use futures_util::stream;
use poem::{Body, IntoResponse, Response, http::header};
use poem_openapi::{
    ApiResponse, Object,
    registry::{MetaMediaType, MetaResponse, MetaResponses, MetaSchema, MetaSchemaRef, Registry},
    types::{ToJSON, Type},
};
use tokio::time::timeout;

use super::{
    chat::ChatAnswer,
    envelope::{REPLAYED, replayed},
    error::{ApiError, Failure},
};
use crate::{
    chat::{Heard, Listening},
    domain::{
        clock::{Clock, SystemClock},
        ids::{RequestId, SessionId},
    },
};

/// How long a connection may be silent.
const HEARTBEAT: Duration = Duration::from_secs(15);

/// The event `start`: the turn has been admitted.
#[derive(Object)]
pub struct StartEvent {
    /// The session of the turn; of a chat without one, the temporary session that was made.
    pub session_id: SessionId,
    /// The number of this turn in its session.
    #[oai(validator(minimum(value = "1")))]
    pub turn: i64,
    /// The `X-Request-ID` of the request that made the turn.
    pub request_id: RequestId,
    /// The model that is asked; of a remembered answer, the one that answered.
    pub model: String,
}

/// The event `delta`: more of the reply.
#[derive(Object)]
pub struct DeltaEvent {
    /// What follows what came before.
    pub text: String,
}

/// A reply as it comes.
pub struct EventStream {
    start: Option<String>,
    source: Source,
    /// Where in the reply the next text begins, in bytes.
    offset: usize,
    request_id: RequestId,
    session: SessionId,
    replayed: bool,
}

enum Source {
    Turn(Listening),
    /// A whole reply, and the answer that tells of it.
    Kept {
        text: String,
        data: String,
    },
    Over,
}

impl EventStream {
    /// The reply of a turn from byte `offset` on.
    pub fn new(
        session: SessionId,
        start: Option<&StartEvent>,
        turn: Listening,
        offset: usize,
        request_id: RequestId,
    ) -> Self {
        let start = start.map(ToJSON::to_json_string);
        Self { start, source: Source::Turn(turn), offset, request_id, session, replayed: false }
    }

    /// A reply that an idempotency key remembers.
    pub fn replay(start: &StartEvent, text: String, data: String, request_id: RequestId) -> Self {
        let (session, source) = (start.session_id, Source::Kept { text, data });
        Self { start: Some(start.to_json_string()), source, offset: 0, request_id, session, replayed: true }
    }

    /// The next piece of the body.
    async fn next(&mut self) -> Option<String> {
        if let Some(start) = self.start.take() {
            return Some(event("start", self.offset, &start));
        }
        let heard = match &mut self.source {
            Source::Turn(turn) => timeout(HEARTBEAT, turn.next()).await,
            Source::Kept { text, .. } if !text.is_empty() => Ok(Heard::Text(std::mem::take(text))),
            Source::Kept { data, .. } => {
                let data = std::mem::take(data);
                self.source = Source::Over;
                return Some(event("done", self.offset, &data));
            }
            Source::Over => return None,
        };
        Some(match heard {
            Err(_) => ": still here\n\n".to_owned(),
            Ok(Heard::Text(text)) => {
                self.offset += text.len();
                event("delta", self.offset, &DeltaEvent { text }.to_json_string())
            }
            Ok(Heard::Ended(Ok(answered))) => {
                self.source = Source::Over;
                event("done", self.offset, &ChatAnswer::render(&answered))
            }
            Ok(Heard::Ended(Err(error))) => {
                self.source = Source::Over;
                let failure = ApiError::chat(error, Some(self.session))
                    .failure(self.request_id.clone(), SystemClock.now());
                event("error", self.offset, &failure.to_json_string())
            }
        })
    }
}

/// One event; JSON has no line ends, so its data is one line.
fn event(name: &str, id: usize, data: &str) -> String {
    format!("event: {name}\nid: {id}\ndata: {data}\n\n")
}

impl IntoResponse for EventStream {
    fn into_response(self) -> Response {
        let mut response = Response::builder()
            .content_type(CONTENT_TYPE)
            // Proxies must neither keep nor hold back what is meant to arrive piece by piece.
            .header(header::CACHE_CONTROL, "no-store")
            .header("X-Accel-Buffering", "no");
        if self.replayed {
            response = response.header(REPLAYED, "true");
        }
        let pieces = stream::unfold(self, async |mut events| {
            let piece = events.next().await?;
            Some((Ok::<_, io::Error>(piece), events))
        });
        response.body(Body::from_bytes_stream(Box::pin(pieces)))
    }
}

const CONTENT_TYPE: &str = "text/event-stream";

impl ApiResponse for EventStream {
    fn meta() -> MetaResponses {
        MetaResponses {
            responses: vec![MetaResponse {
                description: "Events: `start`, `delta` as text comes, then `done` (after the turn is stored) or \
                     `error`. An event's id is the offset in the reply that follows it, in bytes. A comment every \
                     15 seconds keeps the connection open.\n\n```text\nevent: delta\nid: 18\n\
                     data: {\"text\":\"Your name is John.\"}\n```\n\nThe schema is that of an event's `data`.",
                status: Some(200),
                status_range: None,
                content: vec![MetaMediaType {
                    content_type: CONTENT_TYPE,
                    schema: StreamEvent::schema_ref(),
                }],
                headers: vec![replayed()],
            }],
        }
    }

    fn register(registry: &mut Registry) {
        StreamEvent::register(registry);
    }
}

/// What the `data` of an event may be; its name says which.
struct StreamEvent;

impl Type for StreamEvent {
    const IS_REQUIRED: bool = true;
    type RawValueType = Self;
    type RawElementValueType = Self;

    fn name() -> Cow<'static, str> {
        "StreamEvent".into()
    }

    fn schema_ref() -> MetaSchemaRef {
        MetaSchemaRef::Reference("StreamEvent".to_owned())
    }

    fn register(registry: &mut Registry) {
        registry.create_schema::<Self, _>("StreamEvent".to_owned(), |registry| {
            StartEvent::register(registry);
            DeltaEvent::register(registry);
            ChatAnswer::register(registry);
            Failure::register(registry);
            MetaSchema {
                description: Some(
                    "The data of an event: `start`, `delta`, `done` and `error`, in this order.",
                ),
                any_of: vec![
                    StartEvent::schema_ref(),
                    DeltaEvent::schema_ref(),
                    ChatAnswer::schema_ref(),
                    Failure::schema_ref(),
                ],
                ..MetaSchema::ANY
            }
        });
    }

    fn as_raw_value(&self) -> Option<&Self> {
        Some(self)
    }

    fn raw_element_iter<'a>(&'a self) -> Box<dyn Iterator<Item = &'a Self> + 'a> {
        Box::new(self.as_raw_value().into_iter())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{chat::live::Live, domain::caller::TenantId, model::Listener};

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_shows_a_sign_of_life_every_fifteen_seconds() {
        let live = Live::default();
        let entered = live.enter((TenantId::DEFAULT, SessionId::random(), 1));
        let reader = entered.running.listen(0).unwrap();
        let mut events = EventStream::new(SessionId::random(), None, reader.into(), 0, RequestId::random());
        let started = tokio::time::Instant::now();
        for times in 1..=3 {
            assert_eq!(events.next().await.unwrap(), ": still here\n\n");
            assert_eq!(started.elapsed(), HEARTBEAT * times);
        }
        entered.running.hear("late");
        assert_eq!(events.next().await.unwrap(), "event: delta\nid: 4\ndata: {\"text\":\"late\"}\n\n");
    }
}
