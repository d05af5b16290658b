//! What happens by itself. Every instance runs every job; they work in small batches and do not mind each other.

pub mod budgets;
pub mod cancellations;
pub mod erasures;
pub mod keys;
pub mod leases;
pub mod rates;
pub mod retention;
pub mod search;

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{
    app::App,
    domain::clock::{Clock, SystemClock},
    store,
    telemetry::metrics::METRICS,
};

/// How often the jobs run, and what they go by.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// How often abandoned turns and unfinished deletions are looked for.
    pub often: Duration,
    /// How often sessions past their retention are looked for.
    pub seldom: Duration,
    /// How long inactive sessions are kept; for ever if absent.
    pub retention: Option<Duration>,
}

/// Runs the jobs, at once and then by their schedule, until the server stops. None waits for another.
pub async fn run(app: Arc<App>, schedule: Schedule) {
    tokio::join!(
        every(&app, schedule.often, "leases", || leases::fail_abandoned_turns(&app)),
        every(&app, schedule.often, "erasures", || erasures::finish_deletions(&app)),
        every(&app, schedule.seldom, "retention", || {
            retention::remove_old_sessions(&app, schedule.retention)
        }),
        every(&app, schedule.seldom, "erased_users", || erasures::forget_erased_users(&app)),
        every(&app, schedule.seldom, "search", || search::index_old_turns(&app)),
        every(&app, schedule.seldom, "keys", || keys::forget_old_keys(&app)),
        every(&app, schedule.seldom, "budgets", || budgets::forget_old_days(&app)),
        every(&app, schedule.seldom, "key_uses", || keys::note_uses(&app)),
        every(&app, schedule.seldom, "rates", || rates::remove_ended_windows(&app)),
        every(&app, schedule.often, "cancellations", || cancellations::listen(&app)),
    );
}

/// Runs a job again and again until the server stops; one that failed is tried again in time.
async fn every<F: Future<Output = store::Result<()>>>(
    app: &App,
    period: Duration,
    name: &str,
    job: impl Fn() -> F,
) {
    for outcome in ["success", "failure"] {
        METRICS.job_runs.with_label_values(&[name, outcome]);
    }
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let work = async {
        loop {
            ticks.tick().await;
            let outcome = match job().await {
                Ok(()) => {
                    METRICS.job_successes.with_label_values(&[name]).set(SystemClock.now().as_seconds());
                    "success"
                }
                Err(error) => {
                    tracing::warn!(job = name, error = &error as &dyn std::error::Error, "job failed");
                    "failure"
                }
            };
            METRICS.job_runs.with_label_values(&[name, outcome]).inc();
        }
    };
    tokio::select! {
        () = app.stopping.cancelled() => {}
        () = work => {}
    }
}
