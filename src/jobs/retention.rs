//! Sessions that have been inactive for longer than they are kept are removed.

use std::time::Duration;

use crate::{
    app::App,
    domain::{caller::Caller, clock::Timestamp},
    store::{Cutoffs, Deleted, OnlyIf, Result},
    telemetry::metrics::METRICS,
};

/// How long inactive temporary sessions are kept, whatever the setting.
const TEMPORARY: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Sessions looked for in one go.
const BATCH: i64 = 100;

/// Removes inactive sessions past `retention`, and temporary ones past a week.
pub async fn remove_old_sessions(app: &App, retention: Option<Duration>) -> Result<()> {
    let now = app.clock.now();
    let for_ever = Timestamp::from_millis(i64::MIN);
    let cutoffs = Cutoffs { any: retention.map_or(for_ever, |kept| now - kept), temporary: now - TEMPORARY };
    loop {
        let old = app.store.sessions_to_remove(cutoffs, BATCH).await?;
        let mut removed = 0;
        for (session, tenant) in &old {
            // One that has been reopened meanwhile stays.
            let only_if = Some(OnlyIf::Old(cutoffs));
            let deleted = app.store.delete_session(&Caller::of(*tenant), *session, only_if, now).await?;
            removed += u64::from(deleted == Deleted::Gone);
        }
        if removed > 0 {
            METRICS.sessions_removed.inc_by(removed);
            tracing::info!(sessions = removed, "removed inactive sessions");
        }
        if i64::try_from(old.len()).is_ok_and(|found| found < BATCH) {
            return Ok(());
        }
    }
}
