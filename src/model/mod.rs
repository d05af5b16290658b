//! Who answers: one seam, behind it the built-in responder and servers that speak a chat API.

pub mod builtin;
pub mod openai;

use std::time::Duration;

use futures_util::future::BoxFuture;

use crate::domain::{prompt::Message, turn::Usage};

/// Something that continues a conversation.
pub trait Model: Send + Sync {
    /// Which kind of model this is, for health checks.
    fn provider(&self) -> &'static str;

    /// The model's name where a chat does not name another.
    fn name(&self) -> &str;

    /// Asks for a reply. Takes as long as it takes: the caller sets the time limit by dropping the future,
    /// which ends the call.
    fn reply(&self, ask: Ask) -> BoxFuture<'_, Result<Reply, Error>>;
}

/// A question to a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// What it is shown; the last message is the user's.
    pub messages: Vec<Message>,
    pub options: Options,
}

/// What a chat may choose about its model; absent: the model's own default.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    pub model: Option<String>,
    pub temperature: Option<f64>,
    /// The longest reply, in the model's tokens.
    pub max_tokens: Option<u32>,
}

/// What a model said.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    pub text: String,
    /// The model that answered, by its own word where it gives one.
    pub model: String,
    pub usage: Option<Usage>,
}

/// Why a model did not answer. The texts are safe to show: they hold no key and no address.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// It answered, or failed to, in a way that is of no use.
    #[error("{0}")]
    Failed(String),
    #[error("{0}")]
    TimedOut(String),
    /// It asks for patience.
    #[error("{message}")]
    Unavailable { message: String, retry_after: Option<Duration> },
}
