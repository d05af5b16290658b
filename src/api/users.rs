//! `/users`: what is there of a person, what is known about them, and erasing it.

use std::{collections::BTreeMap, sync::Arc};

use poem::Result;
use poem_openapi::{Object, OpenApi, param::Path};
use serde::Deserialize;
use serde_json::Value;

use super::{
    Tag,
    auth::refuse_foreign,
    envelope::{Found, found},
    error::ApiError,
    json::Body,
};
use crate::{
    app::App,
    domain::{
        caller::Caller, clock::Timestamp, ids::SessionId, json::JsonObject, memory::KnownFact,
        session::UserId,
    },
    telemetry::carried,
};

/// What is there of a user.
#[derive(Object)]
struct User {
    /// The user's id.
    user_id: UserId,
    /// Sessions, temporary and inactive ones too.
    #[oai(validator(minimum(value = "0")))]
    sessions: i64,
    /// Completed turns.
    #[oai(validator(minimum(value = "0")))]
    turns: i64,
    /// Long-term facts.
    #[oai(validator(minimum(value = "0")))]
    facts: i64,
    /// When the first session was made; null if there is none.
    #[oai(nullable)]
    first_activity: Option<Timestamp>,
    /// When any of the sessions was last active; null if there is none.
    #[oai(nullable)]
    last_activity: Option<Timestamp>,
}

/// What was removed, by kind.
#[derive(Object)]
struct Erasure {
    /// The user who was erased.
    user_id: UserId,
    /// How much was removed, by kind.
    removed: Removed,
}

/// How much was removed.
#[derive(Object)]
struct Removed {
    /// Sessions, each with its working memory, behaviour profile and summary.
    sessions: u64,
    /// Turns, whatever their status.
    turns: u64,
    /// Long-term facts.
    facts: u64,
    /// Entries by which search finds turns.
    search_entries: u64,
    /// Answers that idempotency keys remembered.
    remembered_answers: u64,
    /// Keys that were bound to the user.
    keys: u64,
}

/// Something that is known about a user.
#[derive(Object)]
#[oai(rename = "Fact")]
struct FactView {
    /// What is known: any JSON of at most 4 KiB.
    value: Value,
    /// Where it was said; null if it was stated by a request.
    #[oai(nullable)]
    session_id: Option<SessionId>,
    /// The number of the turn in which it was said; null if it was stated by a request.
    #[oai(nullable, validator(minimum(value = "1")))]
    turn: Option<i64>,
    /// When it was last stated.
    updated_at: Timestamp,
}

/// What is known about a user across sessions.
#[derive(Object)]
struct UserMemory {
    /// The user's id.
    user_id: UserId,
    /// By name, the newest statement of each.
    facts: BTreeMap<String, FactView>,
}

impl UserMemory {
    fn of(user_id: UserId, facts: Vec<KnownFact>) -> Self {
        let view = |known: KnownFact| {
            let (session_id, turn) = known.source.unzip();
            (
                known.fact.key,
                FactView { value: known.fact.value, session_id, turn, updated_at: known.updated_at },
            )
        };
        Self { user_id, facts: facts.into_iter().map(view).collect() }
    }
}

/// What to change about a user's facts.
#[derive(Object, Deserialize)]
pub(super) struct UserMemoryChange {
    /// A merge patch (RFC 7396) of the values: null forgets a fact. Names have 1 to 128 characters, values at most 4 KiB
    /// of JSON; at most 500 facts are kept about a user.
    facts: Facts,
}

/// Facts by their names, as a JSON object of any size that a body may have.
pub(super) type Facts = JsonObject<{ 1 << 30 }>;

pub struct UsersApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/users", tag = "Tag::Users")]
impl UsersApi {
    /// Get an overview of a user
    ///
    /// How many sessions, turns and facts there are, and when the user was active.
    #[oai(path = "/:user_id", method = "get", operation_id = "getUser")]
    async fn get(
        &self,
        caller: Caller,
        /// The user's id.
        user_id: Path<UserId>,
    ) -> Result<Found<User>, ApiError> {
        let overview = self.0.store.user(&caller, &user_id).await?;
        let overview = overview.ok_or_else(|| ApiError::user_not_found(&user_id))?;
        let user = User {
            user_id: user_id.0,
            sessions: overview.sessions,
            turns: overview.turns,
            facts: overview.facts,
            first_activity: overview.first_activity,
            last_activity: overview.last_activity,
        };
        Ok(found(user, self.0.clock.now()))
    }

    /// Erase a user
    ///
    /// Removes every session of the user with all that came from it, every fact and every key that is bound to them, and
    /// answers when all of it is gone. Work that was begun before is refused; the user may start anew.
    #[oai(path = "/:user_id", method = "delete", operation_id = "eraseUser")]
    async fn erase(
        &self,
        caller: Caller,
        /// The user's id.
        user_id: Path<UserId>,
    ) -> Result<Found<Erasure>, ApiError> {
        // In a task of its own: a client that leaves does not leave a user half erased.
        let (app, user) = (self.0.clone(), user_id.0.clone());
        let erased = self.0.tasks.spawn(carried(async move {
            let gone = |session| app.engine.session_deleted(caller.tenant, session);
            app.store.erase_user(&caller, &user, app.clock.now(), gone).await
        }));
        let erased = erased.await.map_err(|_| ApiError::internal())??;
        if let Some(auth) = &self.0.auth {
            auth.forget_all();
        }
        let erased = erased.ok_or_else(|| ApiError::user_not_found(&user_id))?;
        let removed = Removed {
            sessions: erased.sessions,
            turns: erased.turns,
            facts: erased.facts,
            search_entries: erased.search_entries,
            remembered_answers: erased.remembered_answers,
            keys: erased.keys,
        };
        Ok(found(Erasure { user_id: user_id.0, removed }, self.0.clock.now()))
    }

    /// Get what is known about a user
    ///
    /// Facts across sessions, each with the turn in which it was said. Empty where nothing is known.
    #[oai(path = "/:user_id/memory", method = "get", operation_id = "getUserMemory")]
    async fn memory(
        &self,
        caller: Caller,
        /// The user's id.
        user_id: Path<UserId>,
    ) -> Result<Found<UserMemory>, ApiError> {
        let facts = self.0.store.facts(&caller, &user_id).await?;
        Ok(found(UserMemory::of(user_id.0, facts), self.0.clock.now()))
    }

    /// Change what is known about a user
    ///
    /// Sets facts, replaces them, or forgets those that are given as null. The answer is all that is known then.
    #[oai(path = "/:user_id/memory", method = "patch", operation_id = "updateUserMemory")]
    async fn update_memory(
        &self,
        caller: Caller,
        /// The user's id.
        user_id: Path<UserId>,
        body: Body<UserMemoryChange>,
    ) -> Result<Found<UserMemory>, ApiError> {
        refuse_foreign(&caller, &user_id)?;
        let (patch, now) = (body.value.facts.as_map(), self.0.clock.now());
        let facts = self.0.store.update_facts(&caller, &user_id, patch, now).await?;
        let facts = facts.map_err(|problem| ApiError::field("facts", problem))?;
        Ok(found(UserMemory::of(user_id.0, facts), now))
    }

    /// Forget what is known about a user
    ///
    /// All facts; sessions and turns stay.
    #[oai(path = "/:user_id/memory", method = "delete", operation_id = "forgetUserMemory")]
    async fn forget_memory(
        &self,
        caller: Caller,
        /// The user's id.
        user_id: Path<UserId>,
    ) -> Result<Found<UserMemory>, ApiError> {
        self.0.store.forget_facts(&caller, &user_id).await?;
        Ok(found(UserMemory::of(user_id.0, Vec::new()), self.0.clock.now()))
    }
}
