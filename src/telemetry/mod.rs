//! What a running server tells of itself: its log, its metrics and its traces.

pub mod log;
pub mod metrics;
pub mod traces;

pub use log::{LogConfig, start};

/// The same work for a task of its own, where it keeps its request's names in the log and its place in the trace.
pub fn carried<F: Future>(work: F) -> impl Future<Output = F::Output> {
    tracing::Instrument::in_current_span(traces::Span::current().run(work))
}
