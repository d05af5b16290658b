//! `/sessions/{session_id}/turns`: reading what was said.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{
    Object, OpenApi,
    param::{Path, Query},
};

use super::{
    Tag,
    envelope::{Found, PageView, found},
    error::ApiError,
    wire::{Cursor, Limit, SessionRef, TurnRef},
};
use crate::{
    app::App,
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::{RequestId, SessionId},
        json::Metadata,
        page::{Direction, Listing},
        turn::{Turn, TurnStatus, Usage},
    },
};

/// What an answer cost, in the model's own tokens.
#[derive(Object)]
#[oai(rename = "Usage")]
pub(super) struct UsageView {
    #[oai(validator(minimum(value = "0")))]
    prompt_tokens: i64,
    #[oai(validator(minimum(value = "0")))]
    completion_tokens: i64,
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
    /// For people.
    message: String,
}

/// One message of the user and what came of it.
#[derive(Object)]
#[oai(rename = "Turn")]
struct TurnView {
    session_id: SessionId,
    /// 1, 2, 3 … without gaps.
    #[oai(validator(minimum(value = "1")))]
    turn: i64,
    status: TurnStatus,
    message: String,
    /// Null unless the turn is completed.
    #[oai(nullable)]
    response: Option<String>,
    #[oai(nullable)]
    error: Option<TurnError>,
    /// The model that answered.
    #[oai(nullable)]
    model: Option<String>,
    /// Null where the model does not say.
    #[oai(nullable)]
    usage: Option<UsageView>,
    /// Seconds from the request's arrival to the model's answer.
    #[oai(nullable)]
    execution_time: Option<f64>,
    request_id: RequestId,
    metadata: Metadata,
    created_at: Timestamp,
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
        /// Turns on a page.
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
        let after = match &cursor.0 {
            Some(cursor) => Some(cursor.position(listing).ok_or_else(ApiError::invalid_cursor)?),
            None => None,
        };
        let store = &self.0.store;
        let page = store.turns(caller, id, status.0, direction, after, limit.0.0).await?;
        if page.items.is_empty() {
            store.session(caller, id).await?.ok_or_else(not_found)?;
        }
        Ok(found(PageView::of(page, listing), self.0.clock.now()))
    }

    /// Get a turn
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
            Some(number) => self.0.store.turn(caller, id, number).await?,
            None => None,
        };
        let Some(found_turn) = found_turn else {
            self.0.store.session(caller, id).await?.ok_or_else(no_session)?;
            return Err(ApiError::turn_not_found(&turn.text));
        };
        Ok(found(found_turn.into(), self.0.clock.now()))
    }
}
