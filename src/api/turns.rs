//! `/sessions/{session_id}/turns`: what was said, also elsewhere, and taking it back.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{
    Object, OpenApi,
    param::{Path, Query},
    types::ToJSON,
};
use serde::Deserialize;

use super::{
    Tag,
    arrival::Arrival,
    envelope::{Found, Kept, PageView, found},
    error::{ApiError, Code},
    headers::{KeyHeader, LastEventId},
    idempotency::{self, Begun},
    json::Body,
    sse::{EventStream, StartEvent},
    wire::{Cursor, Limit, MessageText, ModelName, ResponseText, SessionRef, TurnRef},
};
use crate::{
    app::App,
    chat::{self, Followed},
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::{RequestId, SessionId},
        json::Metadata,
        page::{Direction, Listing},
        turn::{NewTurn, Turn, TurnStatus, Usage},
    },
    store::{Cancelled, Redacted, RememberTurns},
    telemetry::carried,
};

/// Turns that may be added at once.
const MAX_ADDED: usize = 100;

/// What an answer cost, in the model's own tokens.
#[derive(Object)]
#[oai(rename = "Usage")]
pub(super) struct UsageView {
    /// Tokens that the model was shown.
    #[oai(validator(minimum(value = "0")))]
    prompt_tokens: i64,
    /// Tokens that the model said.
    #[oai(validator(minimum(value = "0")))]
    completion_tokens: i64,
    /// Both, as the model counts them.
    #[oai(validator(minimum(value = "0")))]
    total_tokens: i64,
}

impl From<Usage> for UsageView {
    fn from(usage: Usage) -> Self {
        let Usage { prompt_tokens, completion_tokens, total_tokens } = usage;
        Self { prompt_tokens, completion_tokens, total_tokens }
    }
}

/// Why a turn did not complete.
#[derive(Object)]
struct TurnError {
    /// The stable name of the reason: an error code, or `INTERRUPTED` if its server stopped.
    code: String,
    /// The reason, for people.
    message: String,
}

/// One message of the user and what came of it.
#[derive(Object)]
#[oai(rename = "Turn")]
struct TurnView {
    /// The session of the turn.
    session_id: SessionId,
    /// Its number in the session: 1, 2, 3 … without gaps.
    #[oai(validator(minimum(value = "1")))]
    turn: i64,
    /// Where it stands. It begins `running` and ends `completed`, `failed` or `cancelled`; one that was erased is
    /// `deleted`.
    status: TurnStatus,
    /// What the user said; empty once it is erased.
    message: String,
    /// What was answered; null unless the turn is completed.
    #[oai(nullable)]
    response: Option<String>,
    /// Why it did not complete; null unless it failed or was cancelled.
    #[oai(nullable)]
    error: Option<TurnError>,
    /// The model that answered; null where none did or none was named.
    #[oai(nullable)]
    model: Option<String>,
    /// What it cost; null where the model does not say.
    #[oai(nullable)]
    usage: Option<UsageView>,
    /// Seconds from the request's arrival to the model's answer; null while it runs, and for turns made elsewhere.
    #[oai(nullable)]
    execution_time: Option<f64>,
    /// The `X-Request-ID` of the request that made it.
    request_id: RequestId,
    /// What was given with the message; an empty object if nothing was.
    metadata: Metadata,
    /// When the message was admitted, or what was said of a turn made elsewhere.
    created_at: Timestamp,
    /// When it ended; null while it runs.
    #[oai(nullable)]
    completed_at: Option<Timestamp>,
}

impl From<Turn> for TurnView {
    fn from(turn: Turn) -> Self {
        Self {
            usage: turn.usage().map(Into::into),
            session_id: turn.session_id,
            turn: turn.turn,
            status: turn.status,
            message: turn.message,
            response: turn.response,
            error: turn
                .error_code
                .map(|code| TurnError { code, message: turn.error_message.unwrap_or_default() }),
            model: turn.model,
            execution_time: turn.execution_us.map(seconds),
            request_id: turn.request_id,
            metadata: turn.metadata,
            created_at: turn.created_at,
            completed_at: turn.completed_at,
        }
    }
}

/// Microseconds as seconds.
#[expect(clippy::cast_precision_loss, reason = "exact for 285 years")]
pub(super) fn seconds(micros: i64) -> f64 {
    micros as f64 / 1e6
}

/// Turns made elsewhere.
#[derive(Object, Deserialize)]
pub(super) struct NewTurns {
    /// 1 to 100 turns in the order in which they were made; all are added, or none.
    #[oai(validator(min_items = "1", max_items = "100"))]
    turns: Vec<NewTurnView>,
}

/// A finished turn that was made elsewhere.
#[derive(Object, Deserialize)]
#[oai(rename = "NewTurn")]
struct NewTurnView {
    /// What the user said, as it is; 32,000 characters at most unless the server is set otherwise.
    message: MessageText,
    /// What was answered.
    response: ResponseText,
    /// Kept with the turn: a JSON object of at most 16 KiB.
    #[serde(default)]
    #[oai(nullable)]
    metadata: Option<Metadata>,
    /// The model that answered, 1 to 200 characters.
    #[serde(default)]
    #[oai(nullable)]
    model: Option<ModelName>,
    /// When the turn was made; now if absent.
    #[serde(default)]
    #[oai(nullable)]
    created_at: Option<Timestamp>,
}

/// The turns that were added.
#[derive(Object)]
struct AddedTurns {
    /// In the order in which they were sent, each with its number.
    items: Vec<TurnView>,
}

impl From<NewTurnView> for NewTurn {
    fn from(turn: NewTurnView) -> Self {
        Self {
            message: turn.message.0,
            response: turn.response.0,
            metadata: turn.metadata.unwrap_or_default(),
            model: turn.model.map(|model| model.0),
            created_at: turn.created_at,
        }
    }
}

/// Added turns as JSON, the same each time.
fn render(turns: &[Turn]) -> String {
    AddedTurns { items: turns.iter().cloned().map(Into::into).collect() }.to_json_string()
}

pub struct TurnsApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/sessions", tag = "Tag::Turns")]
impl TurnsApi {
    /// List the turns of a session
    ///
    /// In pages, in the order of their numbers unless `direction` says otherwise.
    #[oai(path = "/:session_id/turns", method = "get", operation_id = "listTurns")]
    async fn list(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// Only turns of this status.
        status: Query<Option<TurnStatus>>,
        /// From the first turn (`asc`, the default) or from the last (`desc`).
        direction: Query<Option<Direction>>,
        /// Turns on a page at most: 1 to 100.
        #[oai(default)]
        limit: Query<Limit>,
        /// `next_cursor` of the page before.
        cursor: Query<Option<Cursor>>,
    ) -> Result<Found<PageView<TurnView>>, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let id = session_id.id.ok_or_else(not_found)?;
        let direction = direction.0.unwrap_or(Direction::Asc);
        let status_name = status.0.map_or("", TurnStatus::as_str);
        let listing = Listing::of(&["turns", &id.to_string(), direction.sql().1, status_name]);
        let after = Cursor::read(cursor.0.as_ref(), listing)?;
        let store = &self.0.store;
        let page = store.turns(&caller, id, status.0, direction, after, limit.0.0).await?;
        if page.items.is_empty() {
            store.session(&caller, id).await?.ok_or_else(not_found)?;
        }
        Ok(found(PageView::of(page, listing), self.0.clock.now()))
    }

    /// Add turns made elsewhere
    ///
    /// Bring your own model, or a conversation from elsewhere: 1 to 100 finished turns are added in order, all or
    /// none. They count, are searched and shown to the model like any other.
    #[oai(path = "/:session_id/turns", method = "post", operation_id = "appendTurns")]
    async fn append(
        &self,
        caller: Caller,
        arrival: Arrival,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// Send the same key again to get the first answer again; nothing is added twice.
        #[oai(name = "Idempotency-Key")]
        key: KeyHeader,
        body: Body<NewTurns>,
    ) -> Result<Kept<201, AddedTurns>, ApiError> {
        let now = || self.0.clock.now();
        let turns: Vec<NewTurn> = body.value.turns.into_iter().map(Into::into).collect();
        if turns.is_empty() || turns.len() > MAX_ADDED {
            return Err(ApiError::field("turns", format!("must be 1 to {MAX_ADDED} turns")));
        }
        let id = session_id.id.ok_or_else(|| ApiError::invalid_session(&session_id.text))?;
        let claim = match idempotency::begin(&self.0, &caller, key.0, body.digest).await? {
            Begun::Do(claim) => claim,
            Begun::Done(data) => return Ok(Kept::new(data, true, now())),
        };
        // In a task of its own: a claim whose client has left is freed all the same.
        let app = self.0.clone();
        let added = self.0.tasks.spawn(carried(async move {
            let remember = claim.clone().map(|claim| (claim, render as fn(&[Turn]) -> String));
            let added = Self::add(&app, &caller, id, turns, arrival.request_id, remember).await;
            idempotency::settle(&app, claim, added).await
        }));
        let added = added.await.map_err(|_| ApiError::internal())??;
        Ok(Kept::new(render(&added), false, now()))
    }

    /// Get a turn
    ///
    /// One turn by its number, whatever its status.
    #[oai(path = "/:session_id/turns/:turn", method = "get", operation_id = "getTurn")]
    async fn get(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The turn's number.
        turn: Path<TurnRef>,
    ) -> Result<Found<TurnView>, ApiError> {
        let no_session = || ApiError::session_not_found(&session_id.text);
        let id = session_id.id.ok_or_else(no_session)?;
        let found_turn = match turn.turn {
            Some(number) => self.0.store.turn(&caller, id, number).await?,
            None => None,
        };
        let Some(found_turn) = found_turn else {
            self.0.store.session(&caller, id).await?.ok_or_else(no_session)?;
            return Err(ApiError::turn_not_found(&turn.text));
        };
        Ok(found(found_turn.into(), self.0.clock.now()))
    }

    /// Erase a turn
    ///
    /// Takes its content away everywhere: message, response, metadata, search, facts that came only from it, summaries
    /// that cover it, remembered answers. The number stays, with the status `deleted`. The request that made it, sent
    /// again with its `Idempotency-Key`, is refused with `TURN_CANCELLED`.
    #[oai(path = "/:session_id/turns/:turn", method = "delete", operation_id = "deleteTurn")]
    async fn delete(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The turn's number.
        turn: Path<TurnRef>,
    ) -> Result<Found<TurnView>, ApiError> {
        let no_session = || ApiError::session_not_found(&session_id.text);
        let (id, number) = (session_id.id.ok_or_else(no_session)?, turn.turn.unwrap_or(0));
        match self.0.store.redact_turn(&caller, id, number, self.0.clock.now()).await? {
            Redacted::Done => {}
            Redacted::UnknownSession => return Err(no_session()),
            Redacted::UnknownTurn => return Err(ApiError::turn_not_found(&turn.text)),
            Redacted::Running => return Err(ApiError::chat(chat::Error::Busy { turn: number }, None)),
        }
        let record = self.0.store.turn(&caller, id, number).await?.ok_or_else(no_session)?;
        Ok(found(record.into(), self.0.clock.now()))
    }

    /// Hear a turn's answer while it comes
    ///
    /// Goes on where a broken stream ended: the missing text follows, then the rest as it comes, also at another
    /// server and for a turn that has ended. At another server than the turn's the text comes a second's worth at a
    /// time.
    #[oai(path = "/:session_id/turns/:turn/stream", method = "get", operation_id = "streamTurn")]
    async fn stream(
        &self,
        caller: Caller,
        arrival: Arrival,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The turn's number.
        turn: Path<TurnRef>,
        /// The id of the last event that arrived, which is the offset in the reply in bytes; everything from the beginning
        /// if absent.
        #[oai(name = "Last-Event-ID")]
        last_event_id: LastEventId,
    ) -> Result<EventStream, ApiError> {
        let no_session = || ApiError::session_not_found(&session_id.text);
        let id = session_id.id.ok_or_else(no_session)?;
        let offset = last_event_id.0.unwrap_or(0);
        // No turn has the number 0, so what is no number is looked for in vain.
        match self.0.engine.follow(&caller, id, turn.turn.unwrap_or(0), offset).await? {
            Followed::UnknownSession => Err(no_session()),
            Followed::UnknownTurn => Err(ApiError::turn_not_found(&turn.text)),
            Followed::NoSuchOffset => {
                Err(ApiError::field("Last-Event-ID", "must be the id of an event of this stream"))
            }
            Followed::Listening(listening) => {
                let start = match last_event_id.0 {
                    Some(_) => None,
                    None => Some(
                        self.start_of(&caller, id, turn.turn.unwrap_or(0)).await?.ok_or_else(no_session)?,
                    ),
                };
                Ok(EventStream::new(id, start.as_ref(), listening, offset, arrival.request_id))
            }
        }
    }

    /// Cancel a running turn
    ///
    /// The model is no longer listened to, and whoever sent the message gets `TURN_CANCELLED`. The turn keeps its
    /// number and is never shown to the model.
    #[oai(path = "/:session_id/turns/:turn/cancel", method = "post", operation_id = "cancelTurn")]
    async fn cancel(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The turn's number.
        turn: Path<TurnRef>,
    ) -> Result<Found<TurnView>, ApiError> {
        let no_session = || ApiError::session_not_found(&session_id.text);
        let no_turn = || ApiError::turn_not_found(&turn.text);
        let id = session_id.id.ok_or_else(no_session)?;
        let number = turn.turn.unwrap_or(0);
        // In a task of its own: what is cancelled in the database must be cancelled at the model, too.
        let engine = self.0.engine.clone();
        let canceller = caller.clone();
        let cancelled =
            self.0.tasks.spawn(carried(async move { engine.cancel(&canceller, id, number).await }));
        match cancelled.await.map_err(|_| ApiError::internal())?? {
            Cancelled::Done => {}
            Cancelled::UnknownSession => return Err(no_session()),
            Cancelled::UnknownTurn => return Err(no_turn()),
            Cancelled::NotRunning => return Err(ApiError::turn_not_running(number)),
        }
        let record = self.0.store.turn(&caller, id, number).await?.ok_or_else(no_session)?;
        Ok(found(record.into(), self.0.clock.now()))
    }
}

impl TurnsApi {
    /// Adds turns. A bad session is refused for itself, whatever the messages are.
    async fn add(
        app: &App,
        caller: &Caller,
        id: SessionId,
        turns: Vec<NewTurn>,
        request_id: RequestId,
        remember: Option<RememberTurns>,
    ) -> Result<Vec<Turn>, ApiError> {
        let session =
            app.store.session(caller, id).await?.filter(|session| session.is_active(app.clock.now()));
        session.ok_or_else(|| ApiError::invalid_session(&id.to_string()))?;
        let field = |i: usize| format!("turns[{i}].message");
        if let Some(i) = turns.iter().position(|turn| turn.message.trim().is_empty()) {
            return Err(ApiError::field(field(i), "must not be empty"));
        }
        let lengths: Vec<usize> = turns.iter().map(|turn| turn.message.chars().count()).collect();
        app.engine.append(caller, id, turns, request_id, remember).await.map_err(|error| match error {
            chat::Error::MessageTooLong { limit } => {
                let long = lengths.iter().position(|length| *length > limit).unwrap_or(0);
                let problem = format!("must be at most {limit} characters long");
                ApiError { code: Code::MessageTooLong, ..ApiError::field(field(long), problem) }
            }
            error => ApiError::chat(error, Some(id)),
        })
    }

    /// The first event of a turn's stream.
    async fn start_of(
        &self,
        caller: &Caller,
        session: SessionId,
        turn: i64,
    ) -> Result<Option<StartEvent>, ApiError> {
        let record = self.0.store.turn(caller, session, turn).await?;
        Ok(record.map(|record| StartEvent {
            session_id: session,
            turn,
            request_id: record.request_id,
            model: record.model.unwrap_or_else(|| self.0.engine.model().name().to_owned()),
        }))
    }
}
