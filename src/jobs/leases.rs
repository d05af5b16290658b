//! Turns whose server is gone are failed, so that their sessions go on.

use crate::{app::App, store::Result, telemetry::metrics::METRICS};

/// Turns looked at in one go.
const BATCH: i64 = 100;

/// Fails every running turn whose lease has run out.
pub async fn fail_abandoned_turns(app: &App) -> Result<()> {
    loop {
        let expired = app.store.expired_turns(None, BATCH).await?;
        for turn in &expired {
            if app.store.fail_expired_turn(*turn, app.clock.now()).await? {
                METRICS.turns_abandoned.inc();
                let (tenant, session_id) = (turn.tenant_id.number(), turn.session_id);
                tracing::warn!(tenant, %session_id, turn = turn.turn, "turn failed: its server is gone");
            }
        }
        if i64::try_from(expired.len()).is_ok_and(|found| found < BATCH) {
            return Ok(());
        }
    }
}
