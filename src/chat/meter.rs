//! Counts the tokens that a model is asked for, where users have a budget of them.

use std::sync::atomic::{AtomicI64, Ordering};

use futures_util::future::BoxFuture;

use crate::{
    domain::tokens,
    model::{Ask, Error, Listener, Model, Reply},
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
            let reply = self.model.reply(ask, listener).await?;
            let whole = reply.usage.map(|usage| usage.total_tokens);
            let more = whole.map_or_else(|| tokens::count(&reply.text), |whole| whole - shown);
            self.spent.fetch_add(more, Ordering::Relaxed);
            Ok(reply)
        })
    }
}
