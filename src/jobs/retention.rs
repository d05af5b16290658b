//! Sessions that have been inactive for longer than they are kept are removed.

use std::time::Duration;

use crate::{app::App, domain::caller::Caller, store::Result};

/// How long inactive temporary sessions are kept, whatever the setting.
const TEMPORARY: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// Sessions looked for in one go.
const BATCH: i64 = 100;

/// Removes inactive sessions past `retention`, and temporary ones past a week.
pub async fn remove_old_sessions(app: &App, retention: Option<Duration>) -> Result<()> {
    let now = app.clock.now();
    loop {
        let ended_before = retention.map(|kept| now - kept);
        let old = app.store.sessions_to_remove(ended_before, now - TEMPORARY, BATCH).await?;
        for (session, tenant) in &old {
            app.store.delete_session(Caller { tenant: *tenant }, *session, now).await?;
        }
        if !old.is_empty() {
            tracing::info!(sessions = old.len(), "removed inactive sessions");
        }
        if app.stopping.is_cancelled() || i64::try_from(old.len()).is_ok_and(|found| found < BATCH) {
            return Ok(());
        }
    }
}
