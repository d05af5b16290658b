//! What happens by itself. Every instance runs every job; they work in small batches and do not mind each other.

pub mod erasures;
pub mod leases;
pub mod retention;

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::{app::App, store};

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

/// Runs the jobs, at once and then by their schedule, until the server stops.
pub async fn run(app: Arc<App>, schedule: Schedule) {
    let every = |period| {
        let mut ticks = interval(period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    };
    let (mut often, mut seldom) = (every(schedule.often), every(schedule.seldom));
    loop {
        tokio::select! {
            () = app.stopping.cancelled() => return,
            _ = often.tick() => {
                report("leases", leases::fail_abandoned_turns(&app).await);
                report("erasures", erasures::finish_deletions(&app).await);
            }
            _ = seldom.tick() => {
                report("retention", retention::remove_old_sessions(&app, schedule.retention).await);
            }
        }
    }
}

/// A job that failed is tried again in time.
fn report(job: &str, outcome: store::Result<()>) {
    if let Err(error) = outcome {
        tracing::warn!(job, error = &error as &dyn std::error::Error, "job failed");
    }
}
