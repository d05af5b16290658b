//! `/sessions`: making, finding, changing and deleting them.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{
    ApiResponse, Object, OpenApi,
    param::{Path, Query},
    types::{MaybeUndefined, ToJSON},
};
use serde::Deserialize;

use super::{
    Tag,
    auth::owner,
    envelope::{Found, Kept, PageView, Tagged, found, tagged},
    error::ApiError,
    headers::{IfMatchHeader, KeyHeader},
    idempotency::{self, Begun},
    json::{Body, Json, OptionalBody},
    wire::{Cursor, Flag, Limit, MetadataFilter, Order, SessionRef},
};
use crate::{
    app::App,
    chat,
    domain::{
        caller::Caller,
        clock::Timestamp,
        ids::SessionId,
        json::Metadata,
        page::{Direction, Listing},
        session::{Session, SystemPrompt, Title, TtlSeconds, UserId},
    },
    store::{self, Claim, NotForked, NotUpdated, OnlyIf, SessionFilter, SessionOrder, SessionPatch},
    telemetry::carried,
};

/// A new session; every field may be left out.
#[derive(Object, Deserialize, Default)]
#[serde(default)]
pub(super) struct NewSession {
    /// Whose session it is. If absent: the user to whom your key is bound, else `default_user`, a bucket that anonymous
    /// callers share. A bound key creates for nobody else (403).
    #[oai(nullable)]
    user_id: Option<UserId>,
    /// Anything you want to find again: a JSON object of at most 16 KiB. Numbers are kept as 64-bit integers or
    /// doubles.
    #[oai(nullable)]
    metadata: Option<Metadata>,
    /// What the session is called in lists, at most 200 characters.
    #[oai(nullable)]
    title: Option<Title>,
    /// What the model is told before anything else, at most 8,000 characters; the server's own prompt if absent.
    #[oai(nullable)]
    system_prompt: Option<SystemPrompt>,
    /// Seconds without activity after which the session expires, 60 to 31,536,000 (a year); never if absent.
    #[oai(nullable)]
    ttl_seconds: Option<TtlSeconds>,
}

/// What to change about a session; absent fields stay as they are.
#[derive(Object, Deserialize, Default)]
#[serde(default)]
pub(super) struct SessionChange {
    /// What the session is called in lists, at most 200 characters. Null clears it.
    #[oai(nullable)]
    title: MaybeUndefined<Title>,
    /// What the model is told before anything else, at most 8,000 characters. Null clears it; the server's own prompt
    /// is used then.
    #[oai(nullable)]
    system_prompt: MaybeUndefined<SystemPrompt>,
    /// Seconds without activity after which the session expires, 60 to 31,536,000 (a year), counted from the last
    /// activity. Null: it never expires.
    #[oai(nullable)]
    ttl_seconds: MaybeUndefined<TtlSeconds>,
    /// A merge patch (RFC 7396): keys given are set, keys given as null are removed. At most 16 KiB in all.
    #[oai(nullable)]
    metadata: Option<Metadata>,
    /// False ends the session; true reopens it, also after it has expired.
    #[oai(nullable)]
    is_active: Option<bool>,
}

/// A copy of a session; every field may be left out.
#[derive(Object, Deserialize, Default)]
#[serde(default)]
pub(super) struct NewFork {
    /// The number of the last turn that the fork holds, 1 or more; the last completed one if absent.
    #[oai(nullable, validator(minimum(value = "1")))]
    turn: Option<i64>,
    /// Instead of the session's own: a JSON object of at most 16 KiB.
    #[oai(nullable)]
    metadata: Option<Metadata>,
    /// Instead of the session's own, at most 200 characters.
    #[oai(nullable)]
    title: Option<Title>,
}

/// Where a fork came from.
#[derive(Object)]
struct ForkedFrom {
    /// The session that was copied. It may be gone by now.
    session_id: SessionId,
    /// The number of the last turn that was copied; 0 if there was none.
    #[oai(validator(minimum(value = "0")))]
    turn: i64,
}

/// A conversation and its owner.
#[derive(Object)]
#[oai(rename = "Session")]
pub(super) struct SessionView {
    /// Names the session in every other call.
    session_id: SessionId,
    /// Whose session it is.
    user_id: UserId,
    /// What it is called in lists; null if it has no title.
    #[oai(nullable)]
    title: Option<Title>,
    /// What was given to find it again; an empty object if nothing was.
    metadata: Metadata,
    /// What the model is told before anything else; null for the server's own prompt.
    #[oai(nullable)]
    system_prompt: Option<SystemPrompt>,
    /// When the session was made.
    created_at: Timestamp,
    /// When a chat was last admitted, turns were appended, or the session was reopened.
    last_activity: Timestamp,
    /// Whether it can be chatted with: neither ended nor expired.
    is_active: bool,
    /// Made by a chat without a session; such sessions stay out of lists unless asked for.
    temporary: bool,
    /// Seconds without activity after which it expires; null if it never does.
    #[oai(nullable)]
    ttl_seconds: Option<TtlSeconds>,
    /// The last activity plus `ttl_seconds`; null if it never expires.
    #[oai(nullable)]
    expires_at: Option<Timestamp>,
    /// When it was ended by a change of `is_active`; null if it was not.
    #[oai(nullable)]
    ended_at: Option<Timestamp>,
    /// Where a fork came from; null for any other session.
    #[oai(nullable)]
    forked_from: Option<ForkedFrom>,
}

/// Which parts of a session's memory exist.
#[derive(Object)]
struct MemoryOverview {
    /// The session's id, again.
    session_id: SessionId,
    /// Whether there is what the conversation itself leaves.
    has_session_memory: bool,
    /// Whether there is a working memory, be it empty.
    has_working_memory: bool,
    /// Whether there is a behaviour profile, be it the default one.
    has_behavior_profile: bool,
    /// Completed turns since creation.
    #[oai(validator(minimum(value = "0")))]
    conversation_turns: i64,
}

/// A session with an overview of its memory.
#[derive(Object)]
struct SessionWithMemory {
    #[oai(flatten)]
    session: SessionView,
    /// Which parts of its memory exist.
    memory: MemoryOverview,
}

/// A deleted session.
#[derive(Object)]
struct Deletion {
    /// Always true.
    success: bool,
    /// `Session deleted successfully`.
    message: String,
    /// The session that is gone.
    session_id: SessionId,
    /// When this was answered.
    timestamp: Timestamp,
}

#[derive(ApiResponse)]
enum Deleted {
    /// The session and all that came from it are gone.
    #[oai(status = 200)]
    Deleted(Json<Deletion>),
}

impl SessionView {
    fn at(session: Session, now: Timestamp) -> Self {
        let is_active = session.is_active(now);
        let forked_from = session.forked_from_session.zip(session.forked_from_turn);
        Self {
            session_id: session.id,
            user_id: session.user_id,
            title: session.title,
            metadata: session.metadata,
            system_prompt: session.system_prompt,
            created_at: session.created_at,
            last_activity: session.last_activity,
            is_active,
            temporary: session.temporary,
            ttl_seconds: session.ttl_seconds,
            expires_at: session.expires_at,
            ended_at: session.ended_at,
            forked_from: forked_from.map(|(session_id, turn)| ForkedFrom { session_id, turn }),
        }
    }
}

impl From<SessionChange> for SessionPatch {
    fn from(change: SessionChange) -> Self {
        fn states<T>(field: MaybeUndefined<T>) -> Option<Option<T>> {
            match field {
                MaybeUndefined::Undefined => None,
                MaybeUndefined::Null => Some(None),
                MaybeUndefined::Value(value) => Some(Some(value)),
            }
        }
        Self {
            title: states(change.title),
            system_prompt: states(change.system_prompt),
            ttl_seconds: states(change.ttl_seconds),
            metadata: change.metadata.map(|patch| patch.as_map().clone()),
            is_active: change.is_active,
        }
    }
}

pub struct SessionsApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/sessions", tag = "Tag::Sessions")]
impl SessionsApi {
    /// Create a session
    ///
    /// The body may be empty. All parts of the session's memory exist from here on.
    #[oai(path = "/", method = "post", operation_id = "createSession")]
    async fn create(
        &self,
        caller: Caller,
        /// Send the same key again to get the first answer again instead of a second session.
        #[oai(name = "Idempotency-Key")]
        key: KeyHeader,
        body: OptionalBody<NewSession>,
    ) -> Result<Kept<201, SessionView>, ApiError> {
        let Body { value, digest } = body.0;
        let NewSession { user_id, metadata, title, system_prompt, ttl_seconds } = value;
        let (user_id, now) = (owner(&caller, user_id)?, self.now());
        let claim = match idempotency::begin(&self.0, &caller, key.0, digest).await? {
            Begun::Do(claim) => claim,
            Begun::Done(data) => return Ok(Kept::new(data, true, now)),
        };
        let session = Session {
            metadata: metadata.unwrap_or_default(),
            title,
            system_prompt,
            ..Session::new(user_id, now).with_ttl(ttl_seconds)
        };
        let data = SessionView::at(session.clone(), now).to_json_string();
        let remember = claim.clone().map(|claim| (claim, data.clone()));
        let made = self.0.store.insert_session(&caller, session, remember).await;
        idempotency::settle(&self.0, claim, made.map_err(Into::into)).await?;
        Ok(Kept::new(data, false, now))
    }

    /// List sessions
    ///
    /// In pages, newest first unless `direction` says otherwise. Temporary sessions are listed only by themselves.
    #[expect(clippy::too_many_arguments, reason = "each is a parameter of the operation")]
    #[oai(path = "/", method = "get", operation_id = "listSessions")]
    async fn list(
        &self,
        caller: Caller,
        /// Only this user's sessions.
        user_id: Query<Option<UserId>>,
        /// True for only those that are active, false for only those that have ended or expired; all if absent.
        is_active: Query<Option<Flag>>,
        /// Only those whose metadata has all these top-level keys with equal values: a JSON object of at most 16 keys
        /// and 1,024 bytes.
        metadata: Query<Option<MetadataFilter>>,
        /// True for only the temporary sessions, false for only the others.
        #[oai(default)]
        temporary: Query<Flag>,
        /// What to order by: when a session was last active, or when it was made.
        #[oai(default)]
        order: Query<Order>,
        /// Newest first (`desc`, the default) or oldest first (`asc`).
        direction: Query<Option<Direction>>,
        /// Sessions on a page at most: 1 to 100.
        #[oai(default)]
        limit: Query<Limit>,
        /// `next_cursor` of the page before.
        cursor: Query<Option<Cursor>>,
    ) -> Result<Found<PageView<SessionView>>, ApiError> {
        let now = self.now();
        let (order, order_name) = match order.0 {
            Order::LastActivity => (SessionOrder::LastActivity, "last_activity"),
            Order::CreatedAt => (SessionOrder::CreatedAt, "created_at"),
        };
        let direction = direction.0.unwrap_or(Direction::Desc);
        let filter = SessionFilter {
            user: user_id.0,
            is_active: is_active.0.map(|flag| flag.0),
            temporary: temporary.0.0,
            metadata: metadata.0.unwrap_or_default().0,
        };
        let listing = Listing::of(&["sessions", order_name, direction.sql().1, &format!("{filter:?}")]);
        let after = Cursor::read(cursor.0.as_ref(), listing)?;
        let page = self.0.store.sessions(&caller, &filter, (order, direction), after, limit.0.0, now).await?;
        let page = page.map(|session| SessionView::at(session, now));
        Ok(found(PageView::of(page, listing), now))
    }

    /// Continue where a user left off
    ///
    /// The user's active session with the newest activity. Temporary sessions are never continued.
    #[oai(path = "/continue", method = "get", operation_id = "continueSession")]
    async fn newest(
        &self,
        caller: Caller,
        /// Whose session.
        user_id: Query<UserId>,
    ) -> Result<Found<SessionView>, ApiError> {
        let now = self.now();
        let session = self.0.store.newest_session(&caller, &user_id, now).await?;
        let session = session.ok_or_else(|| ApiError::no_session_found(&user_id))?;
        Ok(found(SessionView::at(session, now), now))
    }

    /// Get a session
    ///
    /// The session with an overview of its memory, also one that has ended or expired. The `ETag` names its present
    /// state.
    #[oai(path = "/:session_id", method = "get", operation_id = "getSession")]
    async fn get(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
    ) -> Result<Tagged<SessionWithMemory>, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let (id, now) = (session_id.id.ok_or_else(not_found)?, self.now());
        let found = self.0.store.session_and_memory(&caller, id).await?;
        let (session, has_memory) = found.ok_or_else(not_found)?;
        let memory = MemoryOverview {
            session_id: id,
            has_session_memory: has_memory,
            has_working_memory: has_memory,
            has_behavior_profile: has_memory,
            conversation_turns: session.completed_turns,
        };
        let etag = session.etag();
        Ok(tagged(SessionWithMemory { session: SessionView::at(session, now), memory }, etag, now))
    }

    /// Change a session
    ///
    /// Sets what the body names and leaves the rest. `is_active` ends a session or reopens it; an ended one can be read,
    /// exported, forked and deleted, not chatted with.
    #[oai(path = "/:session_id", method = "patch", operation_id = "updateSession")]
    async fn update(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The `ETag` of the state that is to be changed; in any other nothing is.
        #[oai(name = "If-Match")]
        if_match: IfMatchHeader,
        body: Body<SessionChange>,
    ) -> Result<Tagged<SessionView>, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let (id, now) = (session_id.id.ok_or_else(not_found)?, self.now());
        let (store, patch) = (&self.0.store, body.value.into());
        let session = store.update_session(&caller, id, patch, if_match.0.as_ref(), now).await?;
        let session = session.map_err(|refusal| match refusal {
            NotUpdated::Unknown => not_found(),
            NotUpdated::Changed => ApiError::precondition_failed(),
            NotUpdated::Refused(problem) => ApiError::field("metadata", problem),
        })?;
        let etag = session.etag();
        Ok(tagged(SessionView::at(session, now), etag, now))
    }

    /// Fork a session
    ///
    /// A new session of the same user with a copy of the turns and the memory, which goes its own way from there. A
    /// session that has ended or expired can be forked, too.
    #[oai(path = "/:session_id/fork", method = "post", operation_id = "forkSession")]
    async fn fork(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// Send the same key again to get the first answer again instead of a second fork.
        #[oai(name = "Idempotency-Key")]
        key: KeyHeader,
        body: OptionalBody<NewFork>,
    ) -> Result<Kept<201, SessionView>, ApiError> {
        let Body { value, digest } = body.0;
        if value.turn.is_some_and(|turn| turn < 1) {
            return Err(ApiError::field("turn", "must be 1 or more"));
        }
        let claim = match idempotency::begin(&self.0, &caller, key.0, digest).await? {
            Begun::Do(claim) => claim,
            Begun::Done(data) => return Ok(Kept::new(data, true, self.now())),
        };
        // In a task of its own: a client that leaves does not leave half a fork.
        let (app, parent) = (self.0.clone(), session_id.0);
        let made = self.0.tasks.spawn(carried(async move {
            let made = Self::make_fork(&app, &caller, &parent, value, claim.clone()).await;
            idempotency::settle(&app, claim, made).await
        }));
        let data = made.await.map_err(|_| ApiError::internal())??;
        Ok(Kept::new(data, false, self.now()))
    }

    /// Delete a session
    ///
    /// Removes the session with its turns, its memory and what was learnt only from it, and answers when all of
    /// it is gone. Forks are copies and stay.
    #[oai(path = "/:session_id", method = "delete", operation_id = "deleteSession")]
    async fn delete(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The `ETag` of the state that is to be deleted; in any other nothing is.
        #[oai(name = "If-Match")]
        if_match: IfMatchHeader,
    ) -> Result<Deleted, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let (id, now) = (session_id.id.ok_or_else(not_found)?, self.now());
        // In a task of its own: a client that leaves does not leave a session half removed.
        let (store, only_if) = (self.0.store.clone(), if_match.0.map(OnlyIf::Matches));
        let tenant = caller.tenant;
        let deleted =
            self.0.tasks.spawn(carried(async move { store.delete_session(&caller, id, only_if, now).await }));
        match deleted.await.map_err(|_| ApiError::internal())?? {
            store::Deleted::Gone => self.0.engine.session_deleted(tenant, id),
            store::Deleted::Unknown => return Err(not_found()),
            store::Deleted::Changed => return Err(ApiError::precondition_failed()),
        }
        Ok(Deleted::Deleted(Json(Deletion {
            success: true,
            message: "Session deleted successfully".to_owned(),
            session_id: id,
            timestamp: self.now(),
        })))
    }
}

impl SessionsApi {
    /// Makes a fork with its turns; the fork's `data`.
    async fn make_fork(
        app: &App,
        caller: &Caller,
        parent: &SessionRef,
        wanted: NewFork,
        claim: Option<Claim>,
    ) -> Result<String, ApiError> {
        let not_found = || ApiError::session_not_found(&parent.text);
        let refuse = |refusal| match refusal {
            NotForked::UnknownSession => not_found(),
            NotForked::UnknownTurn => ApiError::turn_not_found(&wanted.turn.unwrap_or(0).to_string()),
            NotForked::Running => ApiError::chat(chat::Error::Busy { turn: wanted.turn.unwrap_or(0) }, None),
        };
        let (id, now) = (parent.id.ok_or_else(not_found)?, app.clock.now());
        let session = app.store.session(caller, id).await?.ok_or_else(not_found)?;
        let through = app.store.fork_point(caller, id, wanted.turn).await?.map_err(refuse)?;
        // A temporary session's short life is not wanted for what is made of it on purpose.
        let ttl = session.ttl_seconds.filter(|_| !session.temporary);
        let fork = Session {
            title: wanted.title.or(session.title),
            metadata: wanted.metadata.unwrap_or(session.metadata),
            system_prompt: session.system_prompt,
            forked_from_session: Some(id),
            forked_from_turn: Some(through),
            ..Session::new(session.user_id, now).with_ttl(ttl)
        };
        let data = SessionView::at(fork.clone(), now).to_json_string();
        let remember = claim.map(|claim| (claim, data.clone()));
        app.store.fork_session(caller, fork, remember).await?.map_err(refuse)?;
        Ok(data)
    }

    fn now(&self) -> Timestamp {
        self.0.clock.now()
    }
}
