//! A session: a conversation and its owner.

use super::{
    clock::Timestamp,
    ids::{SessionId, digest},
    json::Metadata,
    text::text,
};

text!(
    /// Whose session it is: the caller's own name for a person.
    UserId, 1..=128
);
text!(
    /// What a session is called in lists.
    Title, 0..=200
);
text!(
    /// What the model is told before anything else.
    SystemPrompt, 0..=8000
);

impl Default for UserId {
    /// The bucket that anonymous callers share.
    fn default() -> Self {
        Self("default_user".to_owned())
    }
}

/// Seconds of inactivity after which a session expires: 60 … 31,536,000 (a year).
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type, serde::Serialize, serde::Deserialize)]
#[sqlx(transparent)]
#[serde(try_from = "i64")]
pub struct TtlSeconds(i64);

impl TtlSeconds {
    pub const MIN: i64 = 60;
    pub const MAX: i64 = 31_536_000;
    /// How long a session lives that a chat without one has made.
    pub const TEMPORARY: Self = Self(24 * 60 * 60);

    pub fn seconds(self) -> i64 {
        self.0
    }

    /// When a session expires that was last active at `last_activity`.
    pub fn expiry(self, last_activity: Timestamp) -> Timestamp {
        Timestamp::from_millis(last_activity.as_millis() + self.0 * 1000)
    }
}

impl TryFrom<i64> for TtlSeconds {
    type Error = String;

    fn try_from(seconds: i64) -> Result<Self, String> {
        if (Self::MIN..=Self::MAX).contains(&seconds) {
            return Ok(Self(seconds));
        }
        Err(format!("must be {} to {} seconds", Self::MIN, Self::MAX))
    }
}

/// A session as it is kept.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Session {
    #[sqlx(rename = "session_id")]
    pub id: SessionId,
    pub user_id: UserId,
    pub title: Option<Title>,
    #[sqlx(try_from = "String")]
    pub metadata: Metadata,
    pub system_prompt: Option<SystemPrompt>,
    pub temporary: bool,
    pub ttl_seconds: Option<TtlSeconds>,
    pub created_at: Timestamp,
    pub last_activity: Timestamp,
    pub expires_at: Option<Timestamp>,
    pub ended_at: Option<Timestamp>,
    /// Completed turns since creation.
    pub completed_turns: i64,
    pub forked_from_session: Option<SessionId>,
    pub forked_from_turn: Option<i64>,
}

impl Session {
    /// A session that begins at `now`, with nothing said yet.
    pub fn new(user_id: UserId, now: Timestamp) -> Self {
        Self {
            id: SessionId::random(),
            user_id,
            title: None,
            metadata: Metadata::default(),
            system_prompt: None,
            temporary: false,
            ttl_seconds: None,
            created_at: now,
            last_activity: now,
            expires_at: None,
            ended_at: None,
            completed_turns: 0,
            forked_from_session: None,
            forked_from_turn: None,
        }
    }

    /// The same, expiring after `ttl` without activity.
    #[must_use]
    pub fn with_ttl(mut self, ttl: Option<TtlSeconds>) -> Self {
        self.ttl_seconds = ttl;
        self.expires_at = ttl.map(|ttl| ttl.expiry(self.last_activity));
        self
    }

    /// Names this state of the session: another state has another tag. Whether it has expired meanwhile is no
    /// change of state.
    pub fn etag(&self) -> String {
        // Every field but those that never change; `Debug` tells absent from empty.
        etag(&(
            (&self.title, &self.metadata, &self.system_prompt, self.ttl_seconds),
            (self.last_activity, self.expires_at, self.ended_at, self.completed_turns),
        ))
    }

    /// Whether it can be chatted with at `now`: neither ended nor expired.
    pub fn is_active(&self, now: Timestamp) -> bool {
        self.ended_at.is_none() && self.expires_at.is_none_or(|expiry| expiry > now)
    }
}

/// Names a state by what it is made of.
pub fn etag(state: &impl std::fmt::Debug) -> String {
    format!("\"{:016x}\"", digest(&[&format!("{state:?}")]))
}

/// The states in which a caller wants something done (`If-Match`, RFC 9110 13.1.1).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IfMatch(String);

impl IfMatch {
    /// Reads the header's value: `*`, or a list of tags.
    pub fn new(value: &str) -> Self {
        Self(value.to_owned())
    }

    /// Whether the state that `etag` names is one of them.
    pub fn match_tag(&self, etag: &str) -> bool {
        self.0.split(',').map(str::trim).any(|tag| tag == "*" || tag == etag)
    }
}
