//! `/sessions/{session_id}/memory` and `/context`: what a session remembers, and what its model is shown.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{
    Enum, Object, OpenApi,
    param::{Path, Query},
    types::ParseFromJSON,
};
use serde::Deserialize;

use super::{
    Tag,
    envelope::{Found, Tagged, found, tagged},
    error::ApiError,
    headers::IfMatchHeader,
    json::Body,
    wire::{DraftText, SessionRef, TokenBudget},
};
use crate::{
    app::App,
    chat::{Context, Parts, Preview},
    domain::{
        caller::Caller,
        memory::{MemoryPatch, ProfileChange, SessionMemory, WorkingMemory},
        prompt::{Message, Role},
    },
    store::NotUpdated,
};

/// Declares a choice of the profile, and how it is named in the store.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$which:meta])* $choice:ident = $text:literal),* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Enum, Deserialize)]
        #[oai(rename_all = "lowercase")]
        #[serde(rename_all = "lowercase")]
        enum $name { $($(#[$which])* $choice),* }

        impl $name {
            fn as_str(self) -> &'static str {
                match self { $(Self::$choice => $text),* }
            }
        }
    };
}

choice!(
    /// How much is said.
    Verbosity { Low = "low", Medium = "medium", High = "high" }
);
choice!(
    /// How it is said.
    Tone { Casual = "casual", Neutral = "neutral", Technical = "technical" }
);
choice!(
    /// How deep it goes.
    Depth { Shallow = "shallow", Normal = "normal", Advanced = "advanced" }
);

/// How the assistant talks with this user.
#[derive(Object)]
struct BehaviorProfile {
    /// How much is said; `medium` unless it was wished otherwise.
    verbosity: Verbosity,
    /// How it is said; `neutral` unless it was wished otherwise.
    tone: Tone,
    /// How deep it goes; `normal` unless it was wished otherwise.
    depth: Depth,
}

/// The turn whose message set a part of the profile; null where it is the default or was set by a request.
#[derive(Object)]
struct ProfileTurns {
    /// The turn that set `verbosity`.
    #[oai(nullable, validator(minimum(value = "1")))]
    verbosity: Option<i64>,
    /// The turn that set `tone`.
    #[oai(nullable, validator(minimum(value = "1")))]
    tone: Option<i64>,
    /// The turn that set `depth`.
    #[oai(nullable, validator(minimum(value = "1")))]
    depth: Option<i64>,
}

/// What the conversation itself leaves.
#[derive(Object)]
struct ConversationMemory {
    /// Completed turns since creation.
    #[oai(validator(minimum(value = "0")))]
    conversation_turns: i64,
    /// What no longer fits into the context, in short; made in the background. Null until it is needed.
    #[oai(nullable)]
    summary: Option<String>,
    /// The number of the last turn that the summary covers; null without one.
    #[oai(nullable, validator(minimum(value = "1")))]
    summary_through: Option<i64>,
}

/// What a session remembers beside its turns.
#[derive(Object)]
struct Memory {
    /// What the conversation itself leaves.
    session_memory: ConversationMemory,
    /// The state of the task at hand, as it was set; an empty object if it was not.
    working_memory: WorkingMemory,
    /// How the assistant talks with this user. It follows wishes such as "please be brief".
    behavior_profile: BehaviorProfile,
    /// The turns whose messages set the profile.
    profile_turns: ProfileTurns,
}

impl Memory {
    fn of(memory: SessionMemory) -> Result<Self, ApiError> {
        let profile = memory.profile;
        Ok(Self {
            session_memory: ConversationMemory {
                conversation_turns: memory.conversation_turns,
                summary: memory.summary,
                summary_through: memory.summary_through,
            },
            working_memory: memory.working_memory,
            behavior_profile: BehaviorProfile {
                verbosity: read(profile.verbosity)?,
                tone: read(profile.tone)?,
                depth: read(profile.depth)?,
            },
            profile_turns: ProfileTurns {
                verbosity: memory.profile_turns.verbosity,
                tone: memory.profile_turns.tone,
                depth: memory.profile_turns.depth,
            },
        })
    }
}

/// A choice as the database names it, which checks that it is one.
fn read<T: ParseFromJSON>(text: String) -> Result<T, ApiError> {
    T::parse_from_json(Some(text.into())).map_err(|_| ApiError::internal())
}

/// What to change about a session's memory; absent fields stay as they are.
#[derive(Object, Deserialize, Default)]
#[serde(default)]
pub(super) struct MemoryChange {
    /// A merge patch (RFC 7396): keys given are set, keys given as null are removed. At most 64 KiB in all.
    #[oai(nullable)]
    working_memory: Option<WorkingMemory>,
    /// Parts of the profile to set.
    #[oai(nullable)]
    behavior_profile: Option<ProfileFields>,
}

/// Parts of a profile; absent ones stay as they are.
#[derive(Object, Deserialize, Default)]
#[serde(default)]
#[oai(rename = "BehaviorProfileChange")]
struct ProfileFields {
    /// How much is said.
    #[oai(nullable)]
    verbosity: Option<Verbosity>,
    /// How it is said.
    #[oai(nullable)]
    tone: Option<Tone>,
    /// How deep it goes.
    #[oai(nullable)]
    depth: Option<Depth>,
}

impl From<MemoryChange> for MemoryPatch {
    fn from(change: MemoryChange) -> Self {
        let profile = change.behavior_profile.unwrap_or_default();
        Self {
            working_memory: change.working_memory.map(|patch| patch.as_map().clone()),
            profile: ProfileChange {
                verbosity: profile.verbosity.map(Verbosity::as_str),
                tone: profile.tone.map(Tone::as_str),
                depth: profile.depth.map(Depth::as_str),
            },
        }
    }
}

/// A message as the model is shown it.
#[derive(Object)]
struct ContextMessage {
    /// Who speaks: `system`, `user` or `assistant`.
    role: Role,
    /// What the model reads.
    content: String,
}

/// How many items of each part.
#[derive(Object)]
struct ContextParts {
    /// System prompts: 0 or 1.
    #[oai(validator(minimum(value = "0")))]
    system_prompt: i64,
    /// The interaction style: 0 or 1.
    #[oai(validator(minimum(value = "0")))]
    style: i64,
    /// Facts about the user.
    #[oai(validator(minimum(value = "0")))]
    facts: i64,
    /// The working memory: 0 or 1.
    #[oai(validator(minimum(value = "0")))]
    working_memory: i64,
    /// Summaries: 0 or 1.
    #[oai(validator(minimum(value = "0")))]
    summary: i64,
    /// Older turns that bear on the message.
    #[oai(validator(minimum(value = "0")))]
    recalled_turns: i64,
    /// The last turns.
    #[oai(validator(minimum(value = "0")))]
    recent_turns: i64,
    /// The message itself: 0 or 1.
    #[oai(validator(minimum(value = "0")))]
    message: i64,
}

/// What the model would be shown.
#[derive(Object)]
#[oai(rename = "Context")]
struct ContextView {
    /// What the model is shown, in this order; the roles alternate.
    messages: Vec<ContextMessage>,
    /// Tokens of all messages, by estimate: four ASCII characters or one other to a token, and four for each message.
    #[oai(validator(minimum(value = "0")))]
    token_count: i64,
    /// The budget in tokens, which `token_count` never exceeds.
    #[oai(validator(minimum(value = "0")))]
    max_tokens: i64,
    /// What is in it.
    included: ContextParts,
    /// What did not fit.
    dropped: ContextParts,
}

impl From<Parts> for ContextParts {
    fn from(parts: Parts) -> Self {
        Self {
            system_prompt: parts.system_prompt,
            style: parts.style,
            facts: parts.facts,
            working_memory: parts.working_memory,
            summary: parts.summary,
            recalled_turns: parts.recalled_turns,
            recent_turns: parts.recent_turns,
            message: parts.message,
        }
    }
}

impl ContextView {
    fn of(context: Context) -> Self {
        let message = |Message { role, content }| ContextMessage { role, content };
        Self {
            messages: context.messages.into_iter().map(message).collect(),
            token_count: context.tokens,
            max_tokens: context.budget,
            included: context.included.into(),
            dropped: context.dropped.into(),
        }
    }
}

pub struct MemoryApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/sessions", tag = "Tag::Memory")]
impl MemoryApi {
    /// Get a session's memory
    ///
    /// Summary, working memory and behaviour profile. The `ETag` names their present state.
    #[oai(path = "/:session_id/memory", method = "get", operation_id = "getSessionMemory")]
    async fn get(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
    ) -> Result<Tagged<Memory>, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let id = session_id.id.ok_or_else(not_found)?;
        self.answer(self.0.store.memory(&caller, id).await?.ok_or_else(not_found)?)
    }

    /// Change a session's memory
    ///
    /// Sets what the body names and leaves the rest.
    #[oai(path = "/:session_id/memory", method = "patch", operation_id = "updateSessionMemory")]
    async fn update(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The `ETag` of the state that is to be changed; in any other nothing is.
        #[oai(name = "If-Match")]
        if_match: IfMatchHeader,
        body: Body<MemoryChange>,
    ) -> Result<Tagged<Memory>, ApiError> {
        let id = session_id.id.ok_or_else(|| ApiError::session_not_found(&session_id.text))?;
        let (store, now) = (&self.0.store, self.0.clock.now());
        let memory = store.update_memory(&caller, id, body.value.into(), if_match.0.as_ref(), now).await?;
        self.answer(memory.map_err(|refusal| refuse(refusal, &session_id))?)
    }

    /// Reset a session's memory
    ///
    /// Empties working memory, resets the profile and drops the summary. The turns stay, and a summary is made again
    /// once it is due.
    #[oai(path = "/:session_id/memory", method = "delete", operation_id = "resetSessionMemory")]
    async fn reset(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The `ETag` of the state that is to be reset; in any other nothing is.
        #[oai(name = "If-Match")]
        if_match: IfMatchHeader,
    ) -> Result<Tagged<Memory>, ApiError> {
        let id = session_id.id.ok_or_else(|| ApiError::session_not_found(&session_id.text))?;
        let (store, now) = (&self.0.store, self.0.clock.now());
        let memory = store.reset_memory(&caller, id, if_match.0.as_ref(), now).await?;
        self.answer(memory.map_err(|refusal| refuse(refusal, &session_id))?)
    }

    /// See what the model would be shown
    ///
    /// In this order: the system prompt with the interaction style, what is known about the user, the state of the
    /// task, the summary of what no longer fits, older turns that bear on the message, the last turns, the message.
    #[oai(path = "/:session_id/context", method = "get", operation_id = "getContext")]
    async fn context(
        &self,
        caller: Caller,
        /// The session's id.
        session_id: Path<SessionRef>,
        /// The budget: 1 to 1,000,000 tokens; the server's own if absent. One that is too small for the message alone is
        /// refused.
        max_tokens: Query<Option<TokenBudget>>,
        /// The message that would be sent; if absent, what the model would be shown before it.
        message: Query<Option<DraftText>>,
    ) -> Result<Found<ContextView>, ApiError> {
        let not_found = || ApiError::session_not_found(&session_id.text);
        let id = session_id.id.ok_or_else(not_found)?;
        let message =
            message.0.as_ref().map(|message| message.0.trim()).filter(|message| !message.is_empty());
        let tokens = max_tokens.0.map(|budget| budget.0);
        let preview = self.0.engine.preview(&caller, id, message, tokens).await;
        match preview.map_err(|error| ApiError::chat(error, Some(id)))? {
            Preview::UnknownSession => Err(not_found()),
            Preview::TooSmall(needed) => Err(ApiError::field(
                "max_tokens",
                format!("must be at least {needed} for this message alone"),
            )),
            Preview::Shown(context) => Ok(found(ContextView::of(*context), self.0.clock.now())),
        }
    }
}

impl MemoryApi {
    fn answer(&self, memory: SessionMemory) -> Result<Tagged<Memory>, ApiError> {
        let etag = memory.etag();
        Ok(tagged(Memory::of(memory)?, etag, self.0.clock.now()))
    }
}

fn refuse(refusal: NotUpdated, session: &SessionRef) -> ApiError {
    match refusal {
        NotUpdated::Unknown => ApiError::session_not_found(&session.text),
        NotUpdated::Changed => ApiError::precondition_failed(),
        NotUpdated::Refused(problem) => ApiError::field("working_memory", problem),
    }
}
