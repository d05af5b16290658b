//! What happens to a message: one small door, [`Engine`], and the whole life of a turn behind it.

mod afterwards;
mod context;
mod engine;
mod facts;
mod follow;
pub(crate) mod live;
mod meter;
mod queue;
mod recall;
mod summary;

pub use context::{Context, Parts};
pub use engine::{Answered, Chat, ChatSettings, Engine, Followed, OnBusy, Preview, Remember, Started};
pub use facts::Extract;
pub use follow::Listening;
pub use live::Heard;

use std::time::Duration;

use crate::{model, store};

/// Why the conversation refuses.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    #[error("the session is unknown or not active")]
    InvalidSession,
    #[error("the message is empty")]
    EmptyMessage,
    #[error("the message is longer than {limit} characters")]
    MessageTooLong { limit: usize },
    /// Another turn of the session ran all the time that this one could wait.
    #[error("turn {turn} of the session is running")]
    Busy { turn: i64 },
    /// Somebody cancelled the turn.
    #[error("the turn was cancelled")]
    Cancelled,
    /// The turn was given up before its answer came, because it seemed abandoned.
    #[error("the turn was given up")]
    Interrupted,
    /// Too many messages are being worked on.
    #[error("too many messages are being worked on")]
    Overloaded,
    /// The user has used all the tokens of the day.
    #[error("the user has used the day's {budget} tokens")]
    OverBudget { budget: i64, resets_in: Duration },
    /// What the record of a turn says that ended before it was listened to.
    #[error("{message}")]
    Recorded { code: String, message: String },
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Model(#[from] model::Error),
    /// A defect of ours.
    #[error("the turn's task ended without an answer")]
    Panicked,
}
