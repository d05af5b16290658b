//! Asking a model: counts the tokens, where users have a budget of them, and tells the trace how it went.

use std::sync::atomic::{AtomicI64, Ordering};

use futures_util::future::BoxFuture;

use super::Error as Refusal;
use crate::{
    domain::tokens,
    model::{Ask, Error, Listener, Model, Reply},
    telemetry::traces::Span,
};

/// A model, with what its calls have cost so far: by its own word where it gives one, else estimated. A call that
/// failed or was given up counts with what the model was shown.
pub struct Metered<'m> {
    model: &'m dyn Model,
    spent: AtomicI64,
}

impl<'m> Metered<'m> {
    pub fn new(model: &'m dyn Model) -> Self {
        Self { model, spent: AtomicI64::new(0) }
    }

    /// Tokens so far.
    pub fn spent(&self) -> i64 {
        self.spent.load(Ordering::Relaxed)
    }
}

impl Model for Metered<'_> {
    fn provider(&self) -> &'static str {
        self.model.provider()
    }

    fn name(&self) -> &str {
        self.model.name()
    }

    fn follows_instructions(&self) -> bool {
        self.model.follows_instructions()
    }

    fn reply<'a>(&'a self, ask: &'a Ask, listener: &'a dyn Listener) -> BoxFuture<'a, Result<Reply, Error>> {
        Box::pin(async move {
            let shown: i64 = ask.messages.iter().map(|message| tokens::count(&message.content)).sum();
            self.spent.fetch_add(shown, Ordering::Relaxed);
            let span = Span::begin_call("model");
            // Names and numbers by <https://opentelemetry.io/docs/specs/semconv/gen-ai/>.
            span.describe(|| {
                let asked = ask.options.model.as_deref().unwrap_or(self.name());
                [
                    ("gen_ai.operation.name", Some("chat".into())),
                    ("gen_ai.provider.name", Some(self.provider().into())),
                    ("gen_ai.request.model", Some(asked.to_owned().into())),
                ]
            });
            let replied = span.run(self.model.reply(ask, listener)).await;
            span.describe(|| {
                let (reply, usage) =
                    (replied.as_ref().ok(), replied.as_ref().ok().and_then(|reply| reply.usage));
                [
                    ("gen_ai.response.model", reply.map(|reply| reply.model.clone().into())),
                    ("gen_ai.usage.input_tokens", usage.map(|usage| usage.prompt_tokens.into())),
                    ("gen_ai.usage.output_tokens", usage.map(|usage| usage.completion_tokens.into())),
                ]
            });
            let failure = replied.as_ref().err().cloned().map(Refusal::from);
            span.end(failure.as_ref().map(Refusal::code));
            let reply = replied?;
            let whole = reply.usage.map(|usage| usage.total_tokens);
            let more = whole.map_or_else(|| tokens::count(&reply.text), |whole| whole - shown);
            self.spent.fetch_add(more, Ordering::Relaxed);
            Ok(reply)
        })
    }
}
