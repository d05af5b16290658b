//! Everything that is counted and timed, under the names that Prometheus reads.
//!
//! A process has one of each, as it has one log. Names and units follow
//! <https://prometheus.io/docs/practices/naming/>. Labels take few values, none of which a caller chooses.

use std::sync::LazyLock;

use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts,
    Registry, TextEncoder, core::Collector,
};

/// The media type of [`Metrics::text`].
pub const MEDIA_TYPE: &str = "text/plain; version=0.0.4";

/// How long a request may take: from a read of one row to the patience of a model's caller. In seconds.
const REQUEST_SECONDS: [f64; 15] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 120.0];
/// How long a model may take, in seconds.
const MODEL_SECONDS: [f64; 12] = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0];
/// How long a commit may take, in seconds.
const COMMIT_SECONDS: [f64; 11] = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0, 5.0];
/// How many writes a commit may hold.
const BATCH_SIZES: [f64; 9] = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0];

/// The metrics of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// See the help texts in [`Metrics::new`].
pub struct Metrics {
    registry: Registry,
    /// By operation and status.
    pub requests: HistogramVec,
    pub requests_in_flight: IntGauge,
    /// By how they ended.
    pub turns: HistogramVec,
    pub turns_running: IntGauge,
    pub turns_waiting: IntGauge,
    /// By model.
    pub model_calls: HistogramVec,
    /// By model.
    pub model_first_text: HistogramVec,
    /// By model and reason.
    pub model_failures: IntCounterVec,
    pub model_calls_running: IntGauge,
    pub model_calls_waiting: IntGauge,
    /// By model and kind.
    pub model_tokens: IntCounterVec,
    pub commits: Histogram,
    pub batches: Histogram,
    pub writes_waiting: IntGauge,
    /// By pool and state.
    pub database_connections: IntGaugeVec,
    /// By pool.
    pub database_connections_max: IntGaugeVec,
    /// By kind.
    pub database_errors: IntCounterVec,
    /// By name and outcome.
    pub job_runs: IntCounterVec,
    /// By name.
    pub job_successes: GaugeVec,
    pub sessions_removed: IntCounter,
    pub turns_abandoned: IntCounter,
    build: IntGaugeVec,
}

impl Metrics {
    #[expect(clippy::too_many_lines, reason = "a list, a line or some for each")]
    fn new() -> Self {
        let registry = Registry::new();
        #[cfg(target_os = "linux")]
        registry
            .register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
            .expect(VALID);
        let timed = |name, help, labels: &[&str], buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            add(&registry, HistogramVec::new(opts, labels).expect(VALID))
        };
        let spread = |name, help, buckets: &[f64]| {
            let opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            add(&registry, Histogram::with_opts(opts).expect(VALID))
        };
        let counted = |name, help, labels: &[&str]| {
            add(&registry, IntCounterVec::new(Opts::new(name, help), labels).expect(VALID))
        };
        let level = |name, help| add(&registry, IntGauge::new(name, help).expect(VALID));
        let levels = |name, help, labels: &[&str]| {
            add(&registry, IntGaugeVec::new(Opts::new(name, help), labels).expect(VALID))
        };
        let count = |name, help| add(&registry, IntCounter::new(name, help).expect(VALID));
        Self {
            requests: timed(
                "http_request_duration_seconds",
                "Time until an answer began, by operation of the OpenAPI document and status.",
                &["operation", "status"],
                &REQUEST_SECONDS,
            ),
            requests_in_flight: level("http_requests_in_flight", "Requests whose answer has not begun."),
            turns: timed(
                "atlus_turn_duration_seconds",
                "Time from the arrival of a message to the stored end of its turn, by how it ended.",
                &["status"],
                &MODEL_SECONDS,
            ),
            turns_running: level("atlus_turns_running", "Turns that run in this server."),
            turns_waiting: level("atlus_turns_waiting", "Messages that wait here for their session."),
            model_calls: timed(
                "atlus_model_call_duration_seconds",
                "Time of one call to a model server, by model; whatever came of it.",
                &["model"],
                &MODEL_SECONDS,
            ),
            model_first_text: timed(
                "atlus_model_first_text_seconds",
                "Time from a call to the first text of its reply, by model; of streamed replies.",
                &["model"],
                &MODEL_SECONDS,
            ),
            model_failures: counted(
                "atlus_model_failures_total",
                "Calls to a model that gave no reply, by model and reason.",
                &["model", "reason"],
            ),
            model_calls_running: level("atlus_model_calls_running", "Calls to the model server under way."),
            model_calls_waiting: level(
                "atlus_model_calls_waiting",
                "Calls that wait because ATLUS_MODEL_CONCURRENCY are under way.",
            ),
            model_tokens: counted(
                "atlus_model_tokens_total",
                "Tokens by model and kind (prompt, completion), as the model server counts them.",
                &["model", "kind"],
            ),
            commits: spread(
                "atlus_database_commit_duration_seconds",
                "Time of a write transaction from its beginning until it is durable.",
                &COMMIT_SECONDS,
            ),
            batches: spread(
                "atlus_database_commit_writes", "Writes that shared a transaction.", &BATCH_SIZES,
            ),
            writes_waiting: level(
                "atlus_database_writes_waiting",
                "Writes that wait for the next transaction.",
            ),
            database_connections: levels(
                "atlus_database_connections",
                "Open database connections, by pool (read, write) and state (idle, used).",
                &["pool", "state"],
            ),
            database_connections_max: levels(
                "atlus_database_connections_max",
                "The most database connections, by pool.",
                &["pool"],
            ),
            database_errors: counted(
                "atlus_database_errors_total",
                "Statements that failed, by kind: unavailable (trying again may help) or failed.",
                &["kind"],
            ),
            job_runs: counted(
                "atlus_job_runs_total",
                "Runs of a background job, by name and outcome (success, failure).",
                &["name", "outcome"],
            ),
            job_successes: add(
                &registry,
                GaugeVec::new(
                    Opts::new(
                        "atlus_job_last_success_timestamp_seconds",
                        "When a background job last succeeded, by name.",
                    ),
                    &["name"],
                )
                .expect(VALID),
            ),
            sessions_removed: count(
                "atlus_retention_sessions_removed_total",
                "Inactive sessions removed because their time was over.",
            ),
            turns_abandoned: count(
                "atlus_turns_abandoned_total",
                "Turns failed here because their server was gone.",
            ),
            build: levels("atlus_build_info", "1, by version and database.", &["version", "database"]),
            registry,
        }
    }

    /// Tells what runs: this version, on this kind of database. Counters whose labels are known begin at 0, so that
    /// their first step is seen.
    pub fn started(&self, database: &str) {
        self.build.with_label_values(&[env!("CARGO_PKG_VERSION"), database]).set(1);
        for kind in ["unavailable", "failed"] {
            self.database_errors.with_label_values(&[kind]);
        }
        for status in ["completed", "failed", "cancelled"] {
            self.turns.with_label_values(&[status]);
        }
    }

    /// Everything in Prometheus's text format, of [`MEDIA_TYPE`]. Fails only if a metric is broken.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}

/// Why making a metric cannot fail.
const VALID: &str = "names and labels of metrics are valid and unique";

fn add<C: Collector + Clone + 'static>(registry: &Registry, collector: C) -> C {
    registry.register(Box::new(collector.clone())).expect(VALID);
    collector
}

/// Counts something for as long as this lives.
pub struct Counted(&'static IntGauge);

impl Counted {
    pub fn new(gauge: &'static IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
