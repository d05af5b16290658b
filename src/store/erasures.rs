//! Deleting a session: unfindable in one transaction, then gone in batches, resumed after a crash.

use super::{Result, Store, db::Tx, writer::Write};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::SessionId,
};

/// Turns removed in one transaction; others write in between.
const BATCH: i64 = 500;

impl Store {
    /// Deletes a session and everything that came from it; `false` if there is none. Once its first
    /// transaction has committed the session cannot be found, and the rest is certain to follow.
    pub async fn delete_session(&self, caller: Caller, id: SessionId, now: Timestamp) -> Result<bool> {
        let tenant = caller.tenant;
        let deleted = self.writer.write(Delete { tenant, session: id, now }).await?;
        if deleted {
            self.erase(id, tenant).await?;
        }
        Ok(deleted)
    }

    /// Finishes up to `limit` deletions that were begun before `before` and broke off.
    pub async fn finish_erasures(&self, before: Timestamp, limit: i64) -> Result<()> {
        let text = "SELECT session_id, tenant_id FROM erasures WHERE created_at < $1 LIMIT $2";
        let begun: Vec<(SessionId, TenantId)> = self.db.read(text).bind(before).bind(limit).all().await?;
        for (session, tenant) in begun {
            self.erase(session, tenant).await?;
        }
        Ok(())
    }

    /// Removes what is left of a deleted session.
    async fn erase(&self, session: SessionId, tenant: TenantId) -> Result<()> {
        loop {
            let mut tx = self.db.begin().await?;
            let removed = tx
                .sql(
                    "DELETE FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn IN \
                         (SELECT turn FROM turns WHERE session_id = $1 AND tenant_id = $2 ORDER BY turn LIMIT $3)",
                )
                .bind(session)
                .bind(tenant)
                .bind(BATCH)
                .run()
                .await?;
            if removed < BATCH.unsigned_abs() {
                for rest in [
                    "DELETE FROM facts WHERE session_id = $1 AND tenant_id = $2",
                    "DELETE FROM idempotency_records WHERE session_id = $1 AND tenant_id = $2",
                    "DELETE FROM erasures WHERE session_id = $1 AND tenant_id = $2",
                ] {
                    tx.sql(rest).bind(session).bind(tenant).run().await?;
                }
                return Ok(tx.commit().await?);
            }
            tx.commit().await?;
        }
    }
}

/// Makes a session unfindable. Its memory goes with its row.
struct Delete {
    tenant: TenantId,
    session: SessionId,
    now: Timestamp,
}

impl Write for Delete {
    type Answer = bool;

    fn session(&self) -> SessionId {
        self.session
    }

    async fn apply(&self, tx: &mut Tx) -> Result<bool> {
        let delete = tx.sql("DELETE FROM sessions WHERE session_id = $1 AND tenant_id = $2");
        if delete.bind(self.session).bind(self.tenant).run().await? == 0 {
            return Ok(false);
        }
        tx.sql("INSERT INTO erasures (session_id, tenant_id, created_at) VALUES ($1, $2, $3)")
            .bind(self.session)
            .bind(self.tenant)
            .bind(self.now)
            .run()
            .await?;
        Ok(true)
    }
}
