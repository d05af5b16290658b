//! A turn: one message of the user and what came of it.

use super::{
    clock::Timestamp,
    ids::{RequestId, SessionId},
    json::Metadata,
};

/// Where a turn stands. It begins `running` and changes once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::Type, serde::Serialize, serde::Deserialize)]
#[sqlx(type_name = "TEXT", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
pub enum TurnStatus {
    Running,
    Completed,
    Failed,
    Cancelled,
    Deleted,
}

impl TurnStatus {
    /// Every status, in the order of a turn's life.
    pub const ALL: [Self; 5] = [Self::Running, Self::Completed, Self::Failed, Self::Cancelled, Self::Deleted];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Deleted => "deleted",
        }
    }
}

/// What an answer cost, in the model's own tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Usage {
    pub prompt_tokens: i64,
    pub completion_tokens: i64,
    pub total_tokens: i64,
}

/// A turn as it is kept.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Turn {
    pub session_id: SessionId,
    pub turn: i64,
    pub status: TurnStatus,
    pub message: String,
    pub response: Option<String>,
    pub error_code: Option<String>,
    pub error_message: Option<String>,
    pub model: Option<String>,
    pub prompt_tokens: Option<i64>,
    pub completion_tokens: Option<i64>,
    pub total_tokens: Option<i64>,
    /// Microseconds of service, from the request's arrival to the answer's.
    pub execution_us: Option<i64>,
    pub request_id: RequestId,
    #[sqlx(try_from = "String")]
    pub metadata: Metadata,
    pub created_at: Timestamp,
    pub completed_at: Option<Timestamp>,
}

impl Turn {
    pub fn usage(&self) -> Option<Usage> {
        Some(Usage {
            prompt_tokens: self.prompt_tokens?,
            completion_tokens: self.completion_tokens?,
            total_tokens: self.total_tokens?,
        })
    }
}

/// A finished turn made elsewhere.
#[derive(Clone, Debug)]
pub struct NewTurn {
    pub message: String,
    pub response: String,
    pub metadata: Metadata,
    pub model: Option<String>,
    /// When it was made, if that is known.
    pub created_at: Option<Timestamp>,
}
