//! Deleting a session: unfindable in one transaction, then gone in batches, resumed after a crash.

use super::{
    Result, Store,
    db::Tx,
    search,
    sessions::{Cutoffs, SESSIONS},
    turns::CANCELLED,
    writer::Write,
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::SessionId,
    session::{IfMatch, Session},
};

/// Turns removed in one transaction; others write in between.
const BATCH: i64 = 500;

impl Store {
    /// Deletes a session and everything that came from it, if a condition holds. Once its first transaction has
    /// committed the session cannot be found, and the rest is certain to follow.
    pub async fn delete_session(
        &self,
        caller: Caller,
        session: SessionId,
        only_if: Option<OnlyIf>,
        now: Timestamp,
    ) -> Result<Deleted> {
        let tenant = caller.tenant;
        let deleted = self.writer.write(Delete { tenant, session, only_if, now }).await?;
        if deleted == Deleted::Gone {
            self.erase(session, tenant).await?;
        }
        Ok(deleted)
    }

    /// Finishes up to `limit` deletions that were begun before `before` and broke off.
    pub async fn finish_erasures(&self, before: Timestamp, limit: i64) -> Result<()> {
        let text = "SELECT session_id, tenant_id FROM erasures WHERE created_at < $1 LIMIT $2";
        let begun: Vec<(SessionId, TenantId)> = self.db.read(text).bind(before).bind(limit).all().await?;
        let mut outcome = Ok(());
        for (session, tenant) in begun {
            // One that fails does not keep the others.
            outcome = outcome.and(self.erase(session, tenant).await);
        }
        outcome
    }

    /// Removes what is left of a deleted session.
    async fn erase(&self, session: SessionId, tenant: TenantId) -> Result<()> {
        loop {
            let mut tx = self.db.begin().await?;
            // One eraser at a time: another would find nothing left of a batch that may yet be undone.
            let lock = "UPDATE erasures SET created_at = created_at WHERE session_id = $1 AND tenant_id = $2";
            if tx.sql(lock).bind(session).bind(tenant).run().await? == 0 {
                return Ok(tx.rollback().await?);
            }
            let batch = "SELECT MAX(turn) FROM (SELECT turn FROM turns WHERE session_id = $1 AND tenant_id = $2 \
                 ORDER BY turn LIMIT $3) batch";
            let (last,): (Option<i64>,) = tx.sql(batch).bind(session).bind(tenant).bind(BATCH).one().await?;
            let last = last.unwrap_or(0);
            search::unindex(&mut tx, (tenant, session), (0, last)).await?;
            let remove = "DELETE FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn <= $3";
            let removed = tx.sql(remove).bind(session).bind(tenant).bind(last).run().await?;
            if removed < BATCH.unsigned_abs() {
                for rest in [
                    "DELETE FROM turn_pieces WHERE session_id = $1 AND tenant_id = $2",
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
    only_if: Option<OnlyIf>,
    now: Timestamp,
}

/// What must still be true of a session for it to be deleted.
#[derive(Clone, Debug)]
pub enum OnlyIf {
    /// It is in one of these states.
    Matches(IfMatch),
    /// It is still among those that [`Store::sessions_to_remove`] finds.
    Old(Cutoffs),
}

/// What became of a wish to delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    Gone,
    Unknown,
    /// It is not as the caller thought.
    Changed,
}

impl OnlyIf {
    fn holds(&self, session: &Session) -> bool {
        match self {
            Self::Matches(etags) => etags.matches(session),
            Self::Old(cutoffs) => cutoffs.are_past(session),
        }
    }
}

impl Write for Delete {
    type Answer = Deleted;

    fn row(&self) -> i64 {
        self.session.number()
    }

    async fn apply(&self, tx: &mut Tx) -> Result<Deleted> {
        if let Some(condition) = &self.only_if {
            let row = tx
                .sql(SESSIONS)
                .push(" WHERE session_id = $1 AND tenant_id = $2")
                .push_each("", " FOR UPDATE");
            let session: Option<Session> = row.bind(self.session).bind(self.tenant).optional().await?;
            if session.is_some_and(|session| !condition.holds(&session)) {
                return Ok(Deleted::Changed);
            }
        }
        let delete = "DELETE FROM sessions WHERE session_id = $1 AND tenant_id = $2 RETURNING running_turn";
        let deleted = tx.sql(delete).bind(self.session).bind(self.tenant);
        let Some((running,)) = deleted.optional::<(Option<i64>,)>().await? else {
            return Ok(Deleted::Unknown);
        };
        if let Some(turn) = running {
            tx.notify(CANCELLED, format!("{} {turn}", self.session.number())).await?;
        }
        tx.sql("INSERT INTO erasures (session_id, tenant_id, created_at) VALUES ($1, $2, $3)")
            .bind(self.session)
            .bind(self.tenant)
            .bind(self.now)
            .run()
            .await?;
        Ok(Deleted::Gone)
    }
}
