//! Who answers: one seam, behind it the built-in responder and servers that speak a chat API.

pub mod anthropic;
pub mod builtin;
pub mod calls;
mod circuit;
pub mod http;
pub mod openai;

use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::time::Instant;

use crate::domain::{prompt::Message, turn::Usage};

/// Something that continues a conversation.
pub trait Model: Send + Sync {
    /// Which kind of model this is, for health checks.
    fn provider(&self) -> &'static str;

    /// The model's name where a chat does not name another.
    fn name(&self) -> &str;

    /// Whether it does what it is told, such as to summarise.
    fn follows_instructions(&self) -> bool {
        true
    }

    /// Asks for a reply. Where [`Ask::stream`] is set, its text is also given to `listener`, piece by piece as it
    /// comes. Dropping the future ends the call.
    fn reply<'a>(&'a self, ask: &'a Ask, listener: &'a dyn Listener) -> BoxFuture<'a, Result<Reply, Error>>;
}

/// Hears a reply while it comes.
pub trait Listener: Sync {
    fn hear(&self, piece: &str);
}

/// Hears nothing: for replies that are wanted whole.
pub struct Silence;

impl Listener for Silence {
    fn hear(&self, _: &str) {}
}

/// A question to a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Ask {
    /// What it is shown; the last message is the user's.
    pub messages: Vec<Message>,
    pub options: Options,
    /// Whether somebody wants to hear the reply while it comes.
    pub stream: bool,
    /// When the answer has to be whole, retries included.
    pub deadline: Instant,
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
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Error {
    /// It answered in a way that is of no use, and would again.
    #[error("{0}")]
    Failed(String),
    /// It could not answer just now: not reached, or an error of its own.
    #[error("{0}")]
    Broken(String),
    #[error("{0}")]
    TimedOut(String),
    /// It asks for patience.
    #[error("{message}")]
    Unavailable { message: String, retry_after: Option<Duration> },
    /// More is asked of it here than may be at once.
    #[error("Too many turns wait for the model; try again later")]
    Overloaded,
}

/// The longest reply that is kept, in bytes; a longer one is refused.
const MAX_REPLY: usize = 1 << 20;

/// The longest name of a model that is kept, in characters.
const MAX_NAME: usize = 200;

/// A reply as it comes, bounded.
struct Growing<'a> {
    text: String,
    listener: &'a dyn Listener,
}

impl<'a> Growing<'a> {
    fn new(listener: &'a dyn Listener) -> Self {
        Self { text: String::new(), listener }
    }

    /// Adds a piece and lets it be heard. U+0000, which Postgres cannot keep and nobody misses, is left out.
    fn push(&mut self, piece: &str) -> Result<(), Error> {
        if self.text.len() + piece.len() > MAX_REPLY {
            return Err(Error::Failed("The model's reply is too long".into()));
        }
        let start = self.text.len();
        self.text.extend(piece.chars().filter(|c| *c != '\0'));
        if self.text.len() > start {
            self.listener.hear(&self.text[start..]);
        }
        Ok(())
    }

    /// The whole reply; an empty one is of no use.
    fn finish(self, model: &str, usage: Option<Usage>) -> Result<Reply, Error> {
        if self.text.is_empty() {
            return Err(Error::Failed("The model server answered without any text".into()));
        }
        // What a server says of itself is as little to be trusted as what it says.
        let model = model.chars().filter(|c| !c.is_control()).take(MAX_NAME).collect();
        let counts = |usage: &Usage| usage.prompt_tokens.min(usage.completion_tokens).min(usage.total_tokens);
        Ok(Reply { text: self.text, model, usage: usage.filter(|usage| counts(usage) >= 0) })
    }
}
