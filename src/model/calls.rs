//! Calling a model that misbehaves: how many calls at once, how long, how often, and whom else to ask.
//!
//! A call is repeated only while nothing of its reply was heard, and only if the failure may pass: not reached, an
//! error of the server's own, or a request for patience. Whatever happens ends by the ask's deadline.

use std::{
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::BoxFuture;
use tokio::{
    sync::{Semaphore, SemaphorePermit},
    time::{Instant, sleep, timeout_at},
};

use super::{Ask, Error, Listener, Model, Reply, circuit::Circuit};
use crate::{
    domain::ids::random_bits,
    telemetry::{
        metrics::{Counted, METRICS},
        traces::Span,
    },
};

/// The time that an attempt must have had for its being late to count against the server.
const FAIR: Duration = Duration::from_secs(1);
/// How often one model is asked for one reply.
const ATTEMPTS: u32 = 3;
/// The wait before the second attempt; doubled for each further one, and cut by chance to spread callers.
const BACK_OFF: Duration = Duration::from_millis(250);

/// A model behind which others stand, asked with care.
pub struct Calls {
    model: Box<dyn Model>,
    /// The model itself, then those asked in its place: on the same server, each with a circuit of its own.
    candidates: Vec<Candidate>,
    running: Semaphore,
    waiting: AtomicUsize,
    max_waiting: usize,
}

struct Candidate {
    /// Absent: the model's own.
    name: Option<String>,
    circuit: Circuit,
    /// Whether the settings name it; else a chat does.
    ours: bool,
}

impl Candidate {
    /// A model that only a chat names.
    fn stranger(name: &str) -> Self {
        Self { name: Some(name.to_owned()), circuit: Circuit::default(), ours: false }
    }

    /// Under which name it is counted. Callers may name any number of models, which are counted as one.
    fn label<'a>(&'a self, default: &'a str) -> &'a str {
        match self.ours {
            true => self.name.as_deref().unwrap_or(default),
            false => "other",
        }
    }

    /// Whether it is the model of this name; `default` is the name of the model that has none here.
    fn is(&self, name: &str, default: &str) -> bool {
        self.name.as_deref().unwrap_or(default) == name
    }
}

impl Calls {
    /// At most `concurrency` calls run at once and four times as many wait; `fallback` names models on the same
    /// server that are asked in turn where `model` cannot answer.
    pub fn new(model: Box<dyn Model>, fallback: Vec<String>, concurrency: usize) -> Self {
        let names = [None].into_iter().chain(fallback.into_iter().map(Some));
        let candidates =
            names.map(|name| Candidate { name, circuit: Circuit::default(), ours: true }).collect();
        let (running, max_waiting) = (Semaphore::new(concurrency), concurrency.saturating_mul(4));
        Self { model, candidates, running, waiting: AtomicUsize::new(0), max_waiting }
    }

    /// Waits for a place among those that run.
    async fn place(&self, deadline: Instant) -> Result<SemaphorePermit<'_>, Error> {
        if let Ok(place) = self.running.try_acquire() {
            return Ok(place);
        }
        let waits = Waits::new(&self.waiting);
        if waits.before >= self.max_waiting {
            return Err(Error::Overloaded);
        }
        match timeout_at(deadline, self.running.acquire()).await {
            Ok(Ok(place)) => Ok(place),
            _ => Err(Error::Overloaded),
        }
    }

    async fn call(&self, ask: &Ask, listener: &dyn Listener) -> Result<Reply, Error> {
        let _place = self.place(ask.deadline).await.inspect_err(|_| {
            METRICS.model_failures.with_label_values(&[self.name(), "overloaded"]).inc();
        })?;
        let _running = Counted::new(&METRICS.model_calls_running);
        let heard = Heard { listener, first: OnceLock::new() };
        // A chat that names a model wants that one. How a model fares that is none of ours says nothing of ours.
        let stranger;
        let candidates = match &ask.options.model {
            None => &self.candidates[..],
            Some(wanted) => {
                match self.candidates.iter().position(|candidate| candidate.is(wanted, self.name())) {
                    Some(at) => &self.candidates[at..=at],
                    None => {
                        stranger = Candidate::stranger(wanted);
                        std::slice::from_ref(&stranger)
                    }
                }
            }
        };
        let mut last = None;
        for (left, candidate) in (1..=candidates.len()).rev().zip(candidates) {
            // Each of those left gets an equal share of the time left.
            let share = (ask.deadline - Instant::now()) / u32::try_from(left).unwrap_or(u32::MAX);
            let error = match self.candidate(candidate, ask, &heard, Instant::now() + share).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
            if heard.first.get().is_some() || matches!(error, Error::Overloaded) {
                return Err(error);
            }
            if left > 1 {
                tracing::warn!(error = &error as &dyn std::error::Error, "model failed, asking the next");
            }
            last = Some(error);
        }
        Err(last.unwrap_or(Error::Overloaded))
    }

    /// Asks one candidate, several times if it helps.
    async fn candidate(
        &self,
        candidate: &Candidate,
        ask: &Ask,
        heard: &Heard<'_>,
        until: Instant,
    ) -> Result<Reply, Error> {
        let label = candidate.label(self.name());
        let mut ask = ask.clone();
        ask.options.model = candidate.name.clone().or(ask.options.model);
        let mut attempt = 1;
        loop {
            if let Err(wait) = candidate.circuit.admit() {
                METRICS.model_failures.with_label_values(&[label, "circuit_open"]).inc();
                let message = "The model server keeps failing and is left alone for a moment".to_owned();
                return Err(Error::Unavailable { message, retry_after: Some(wait) });
            }
            let began = Instant::now();
            let outcome =
                timeout_at(until, self.model.reply(&ask, heard)).await.unwrap_or_else(|_| Err(too_late()));
            count(label, began, &outcome);
            let error = match outcome {
                Ok(reply) => {
                    if let (true, Some(first)) = (ask.stream, heard.first.get()) {
                        let wait = first.saturating_duration_since(began).as_secs_f64();
                        METRICS.model_first_text.with_label_values(&[label]).observe(wait);
                    }
                    candidate.circuit.report(true);
                    return Ok(reply);
                }
                Err(error) => error,
            };
            // One that had hardly any time, having waited for its place, says nothing of the server.
            if !matches!(error, Error::TimedOut(_)) || began.elapsed() >= FAIR {
                candidate.circuit.report(!matches!(error, Error::Broken(_) | Error::TimedOut(_)));
            }
            let wait = match &error {
                Error::Broken(_) => back_off(attempt),
                Error::Unavailable { retry_after, .. } => retry_after.unwrap_or_else(|| back_off(attempt)),
                Error::Failed(_) | Error::TimedOut(_) | Error::Overloaded => return Err(error),
            };
            let too_long = wait >= until - Instant::now();
            if attempt == ATTEMPTS || too_long || heard.first.get().is_some() {
                return Err(error);
            }
            sleep(wait).await;
            attempt += 1;
        }
    }
}

impl Model for Calls {
    fn provider(&self) -> &'static str {
        self.model.provider()
    }

    fn name(&self) -> &str {
        self.model.name()
    }

    fn reply<'a>(&'a self, ask: &'a Ask, listener: &'a dyn Listener) -> BoxFuture<'a, Result<Reply, Error>> {
        Box::pin(self.call(ask, listener))
    }
}

/// Counts a call, how long it took, and what came of it.
fn count(model: &str, began: Instant, outcome: &Result<Reply, Error>) {
    METRICS.model_calls.with_label_values(&[model]).observe(began.elapsed().as_secs_f64());
    let reason = match outcome {
        Ok(reply) => {
            if let Some(usage) = reply.usage {
                let kinds = [("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)];
                for (kind, tokens) in kinds {
                    let counter = METRICS.model_tokens.with_label_values(&[model, kind]);
                    counter.inc_by(u64::try_from(tokens).unwrap_or(0));
                }
            }
            return;
        }
        Err(Error::Failed(_)) => "refused",
        Err(Error::Broken(_)) => "broken",
        Err(Error::TimedOut(_)) => "timeout",
        Err(Error::Unavailable { .. }) => "unavailable",
        Err(Error::Overloaded) => "overloaded",
    };
    METRICS.model_failures.with_label_values(&[model, reason]).inc();
    Span::current().note_failure("attempt failed", reason);
}

fn too_late() -> Error {
    Error::TimedOut("The model did not answer in time".into())
}

/// Half to all of the doubled wait, by chance.
fn back_off(attempt: u32) -> Duration {
    let whole = BACK_OFF * 2_u32.pow(attempt - 1);
    let chance = u32::try_from(random_bits() & 0xffff).unwrap_or(0);
    whole / 2 + whole / 2 * chance / 0xffff
}

/// Notes when something was first heard.
struct Heard<'a> {
    listener: &'a dyn Listener,
    first: OnceLock<Instant>,
}

impl Listener for Heard<'_> {
    fn hear(&self, piece: &str) {
        self.first.get_or_init(Instant::now);
        self.listener.hear(piece);
    }
}

/// Counts a waiting call for as long as it waits.
struct Waits<'a> {
    waiting: &'a AtomicUsize,
    /// How many waited before it.
    before: usize,
    _counted: Counted,
}

impl<'a> Waits<'a> {
    fn new(waiting: &'a AtomicUsize) -> Self {
        let before = waiting.fetch_add(1, Ordering::Relaxed);
        Self { waiting, before, _counted: Counted::new(&METRICS.model_calls_waiting) }
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}
