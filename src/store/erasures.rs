//! Deleting: a session is unfindable after one transaction, then gone in batches, resumed after a crash; a user's
//! sessions are marked in one transaction and go the same way; a turn loses its content and keeps its number.

use std::time::Duration;

use super::{
    Kind, Result, Store,
    db::{Reach, Tx},
    endings::tell_cancelled,
    memory, search,
    sessions::{Cutoffs, SESSIONS},
    writer::WriteAlone,
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{SessionId, digest},
    session::{IfMatch, Session, UserId},
};

/// Turns removed in one transaction; others write in between.
const BATCH: i64 = 500;

impl Store {
    /// Deletes a session and everything that came from it, if a condition holds. Once its first transaction has
    /// committed the session cannot be found, and the rest is certain to follow.
    pub async fn delete_session(
        &self,
        caller: &Caller,
        session: SessionId,
        only_if: Option<OnlyIf>,
        now: Timestamp,
    ) -> Result<Deleted> {
        let caller = caller.clone();
        let tenant = caller.tenant;
        let deleted = self.writer.write(Delete { caller, session, only_if, now }).await?;
        if deleted == Deleted::Gone {
            self.erase(session, tenant).await?;
        }
        Ok(deleted)
    }

    /// Finishes up to `limit` deletions that were begun before `before` and broke off.
    pub async fn finish_erasures(&self, before: Timestamp, limit: i64) -> Result<()> {
        let text = "SELECT session_id, tenant_id FROM erasures WHERE created_at < $1 LIMIT $2";
        let begun: Vec<(SessionId, TenantId)> =
            self.db.read(Reach::Everybody, text).bind(before).bind(limit).all().await?;
        let mut outcome = Ok(());
        for (session, tenant) in begun {
            // One that fails does not keep the others.
            outcome = outcome.and(self.erase(session, tenant).await.map(drop));
        }
        outcome
    }

    /// Erases everything of a user; what was removed, or `None` if there was nothing. `gone` hears of each session.
    /// What was marked is certain to follow, even if this breaks off.
    pub async fn erase_user(
        &self,
        caller: &Caller,
        user: &UserId,
        now: Timestamp,
        gone: impl Fn(SessionId),
    ) -> Result<Option<Erased>> {
        if !caller.may_see(user) {
            return Ok(None);
        }
        let tenant = caller.tenant;
        let mut tx = self.db.begin(tenant).await?;
        memory::lock_user(&mut tx, (tenant, user)).await?;
        // Before anything is looked at: whoever imports waits, or is waited for and then seen.
        let clock = tx.clock().await?;
        tx.sql(
            "INSERT INTO user_erasures (tenant_id, user_digest, erased_at) VALUES ($1, $2, $3) \
             ON CONFLICT (tenant_id, user_digest) DO UPDATE SET erased_at = excluded.erased_at",
        )
        .bind(tenant)
        .bind(digest(&[user.as_str()]))
        .bind(clock)
        .run()
        .await?;
        if tx.kind() == Kind::Postgres {
            // In the order in which every batch of writes locks them. Whoever copies one of these sessions is waited
            // for, and then the next statement sees the copy.
            let lock = "SELECT session_id FROM sessions WHERE tenant_id = $1 AND user_id = $2 ORDER BY session_id \
                 FOR UPDATE";
            tx.sql(lock).bind(tenant).bind(user).run().await?;
        }
        let mark = "INSERT INTO erasures (session_id, tenant_id, created_at) SELECT session_id, tenant_id, $3 \
             FROM sessions WHERE tenant_id = $1 AND user_id = $2 \
             ON CONFLICT (session_id, tenant_id) DO UPDATE SET created_at = excluded.created_at";
        tx.sql(mark).bind(tenant).bind(user).bind(now).run().await?;
        let remove =
            "DELETE FROM sessions WHERE tenant_id = $1 AND user_id = $2 RETURNING session_id, running_turn";
        let sessions: Vec<(SessionId, Option<i64>)> = tx.sql(remove).bind(tenant).bind(user).all().await?;
        for (session, running) in &sessions {
            if let Some(turn) = running {
                tell_cancelled(&mut tx, (tenant, *session, *turn)).await?;
            }
        }
        let forget = "DELETE FROM facts WHERE tenant_id = $1 AND user_id = $2";
        let facts = tx.sql(forget).bind(tenant).bind(user).run().await?;
        let uses = "DELETE FROM token_uses WHERE tenant_id = $1 AND user_id = $2";
        tx.sql(uses).bind(tenant).bind(user).run().await?;
        let revoke = "DELETE FROM api_keys WHERE tenant_id = $1 AND user_id = $2";
        let keys = tx.sql(revoke).bind(tenant).bind(user).run().await?;
        tx.commit().await?;

        for (session, _) in &sessions {
            gone(*session);
        }
        let mut erased = Erased { sessions: sessions.len() as u64, facts, keys, ..Erased::default() };
        for (session, _) in sessions {
            erased.add(&self.erase(session, tenant).await?);
        }
        Ok((erased != Erased::default()).then_some(erased))
    }

    /// Forgets that users were erased longer ago than `kept`: nothing begun before is still under way.
    pub async fn forget_user_erasures(&self, kept: Duration) -> Result<()> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
        let before = tx.clock().await? - kept;
        tx.sql("DELETE FROM user_erasures WHERE erased_at < $1").bind(before).run().await?;
        Ok(tx.commit().await?)
    }

    /// Takes the content of a turn away, and everything that came only from it.
    pub async fn redact_turn(
        &self,
        caller: &Caller,
        session: SessionId,
        turn: i64,
        now: Timestamp,
    ) -> Result<Redacted> {
        self.writer.write(Redact { caller: caller.clone(), session, turn, now }).await
    }

    /// Removes what is left of a session that cannot be found any more; what that was.
    pub(super) async fn erase(&self, session: SessionId, tenant: TenantId) -> Result<Erased> {
        let mut erased = Erased::default();
        loop {
            let mut tx = self.db.begin(tenant).await?;
            // One eraser at a time: another would find nothing left of a batch that may yet be undone. The mark moves,
            // so that whoever staged the session sees that it is no longer whole.
            let lock =
                "UPDATE erasures SET created_at = created_at - 1 WHERE session_id = $1 AND tenant_id = $2";
            if tx.sql(lock).bind(session).bind(tenant).run().await? == 0 {
                tx.rollback().await?;
                return Ok(erased);
            }
            let batch = "SELECT MAX(turn) FROM (SELECT turn FROM turns WHERE session_id = $1 AND tenant_id = $2 \
                 ORDER BY turn LIMIT $3) batch";
            let (last,): (Option<i64>,) = tx.sql(batch).bind(session).bind(tenant).bind(BATCH).one().await?;
            let last = last.unwrap_or(0);
            erased.search_entries += search::unindex(&mut tx, (tenant, session), (0, last)).await?;
            let remove = "DELETE FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn <= $3";
            let removed = tx.sql(remove).bind(session).bind(tenant).bind(last).run().await?;
            erased.turns += removed;
            if removed < BATCH.unsigned_abs() {
                let mut rest = async |text| tx.sql(text).bind(session).bind(tenant).run().await;
                rest("DELETE FROM turn_pieces WHERE session_id = $1 AND tenant_id = $2").await?;
                erased.facts += rest("DELETE FROM facts WHERE session_id = $1 AND tenant_id = $2").await?;
                erased.remembered_answers +=
                    rest("DELETE FROM idempotency_records WHERE session_id = $1 AND tenant_id = $2").await?;
                rest("DELETE FROM erasures WHERE session_id = $1 AND tenant_id = $2").await?;
                search::forget_block(&mut tx, (tenant, session)).await?;
                let copies = "SELECT session_id FROM erasures WHERE copied_from = $1 AND tenant_id = $2";
                let copies: Vec<(SessionId,)> = tx.sql(copies).bind(session).bind(tenant).all().await?;
                tx.commit().await?;
                // No page more is copied once the session cannot be found; what was copied before goes with it.
                for (copy,) in copies {
                    Box::pin(self.erase(copy, tenant)).await?;
                }
                return Ok(erased);
            }
            tx.commit().await?;
        }
    }
}

/// What was removed, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Erased {
    pub sessions: u64,
    pub turns: u64,
    pub facts: u64,
    pub search_entries: u64,
    pub remembered_answers: u64,
    pub keys: u64,
}

impl Erased {
    fn add(&mut self, more: &Self) {
        self.sessions += more.sessions;
        self.turns += more.turns;
        self.facts += more.facts;
        self.search_entries += more.search_entries;
        self.remembered_answers += more.remembered_answers;
        self.keys += more.keys;
    }
}

/// Removes a session's row, and its memory with it; `false` if it is gone already. A turn that runs is told.
async fn remove_session(tx: &mut Tx, session: SessionId, tenant: TenantId) -> Result<bool> {
    let remove = "DELETE FROM sessions WHERE session_id = $1 AND tenant_id = $2 RETURNING running_turn";
    let removed: Option<(Option<i64>,)> = tx.sql(remove).bind(session).bind(tenant).optional().await?;
    let Some((running,)) = removed else { return Ok(false) };
    if let Some(turn) = running {
        tell_cancelled(tx, (tenant, session, turn)).await?;
    }
    Ok(true)
}

/// What became of a wish to erase a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redacted {
    Done,
    UnknownSession,
    UnknownTurn,
    /// It is running.
    Running,
}

struct Redact {
    caller: Caller,
    session: SessionId,
    turn: i64,
    now: Timestamp,
}

impl WriteAlone for Redact {
    type Answer = Redacted;

    fn place(&self) -> (TenantId, i64) {
        (self.caller.tenant, self.session.number())
    }

    async fn apply(&self, tx: &mut Tx) -> Result<Redacted> {
        let Self { session, turn, now, .. } = *self;
        let tenant = self.caller.tenant;
        let lock = "SELECT running_turn FROM sessions WHERE session_id = $1 AND tenant_id = $2";
        let lock = tx.sql(lock).bind(session).bind(tenant).of(&self.caller).push_each("", " FOR UPDATE");
        match lock.optional::<(Option<i64>,)>().await? {
            None => return Ok(Redacted::UnknownSession),
            Some((Some(running),)) if running == turn => return Ok(Redacted::Running),
            Some(_) => {}
        }
        let count = "UPDATE sessions SET erased_turns = erased_turns + 1 WHERE session_id = $1 AND tenant_id = $2 \
             AND EXISTS (SELECT 1 FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn = $3 \
             AND status = 'completed')";
        tx.sql(count).bind(session).bind(tenant).bind(turn).run().await?;
        let redact = "UPDATE turns SET status = 'deleted', message = '', message_tokens = 0, response = NULL, \
             response_tokens = 0, metadata = '{}', error_code = NULL, error_message = NULL \
             WHERE session_id = $1 AND tenant_id = $2 AND turn = $3";
        if tx.sql(redact).bind(session).bind(tenant).bind(turn).run().await? == 0 {
            return Ok(Redacted::UnknownTurn);
        }
        search::unindex(tx, (tenant, session), (turn, turn)).await?;
        for derived in [
            "DELETE FROM facts WHERE session_id = $1 AND tenant_id = $2 AND turn = $3",
            // The key stays, so that the same request sent again does not bring the turn back.
            "UPDATE idempotency_records SET status = 409, answer = NULL WHERE session_id = $1 AND tenant_id = $2 \
                 AND turn <= $3 AND COALESCE(last_turn, turn) >= $3",
        ] {
            tx.sql(derived).bind(session).bind(tenant).bind(turn).run().await?;
        }
        // A summary that covers the turn goes, and so does what it changed about the profile.
        tx.sql(
            "UPDATE session_memory SET takings = takings + 1, updated_at = $4, \
                 summary = CASE WHEN summary_through >= $3 THEN NULL ELSE summary END, \
                 summary_tokens = CASE WHEN summary_through >= $3 THEN 0 ELSE summary_tokens END, \
                 summary_through = CASE WHEN summary_through >= $3 THEN NULL ELSE summary_through END, \
                 verbosity = CASE WHEN verbosity_turn = $3 THEN 'medium' ELSE verbosity END, \
                 tone = CASE WHEN tone_turn = $3 THEN 'neutral' ELSE tone END, \
                 depth = CASE WHEN depth_turn = $3 THEN 'normal' ELSE depth END, \
                 verbosity_turn = CASE WHEN verbosity_turn = $3 THEN NULL ELSE verbosity_turn END, \
                 tone_turn = CASE WHEN tone_turn = $3 THEN NULL ELSE tone_turn END, \
                 depth_turn = CASE WHEN depth_turn = $3 THEN NULL ELSE depth_turn END \
             WHERE session_id = $1 AND tenant_id = $2",
        )
        .bind(session)
        .bind(tenant)
        .bind(turn)
        .bind(now)
        .run()
        .await?;
        Ok(Redacted::Done)
    }
}

/// Marks a session to be erased some time after `until`, unless whoever marked it does so before: one that is deleted,
/// or one whose turns are written before it can be found, in case that stops half-way. Marking it again puts that off.
pub(super) async fn stage(
    tx: &mut Tx,
    (tenant, session): (TenantId, SessionId),
    until: Timestamp,
) -> Result<()> {
    tx.sql(
        "INSERT INTO erasures (session_id, tenant_id, created_at) VALUES ($1, $2, $3) \
         ON CONFLICT (session_id, tenant_id) DO UPDATE SET created_at = excluded.created_at",
    )
    .bind(session)
    .bind(tenant)
    .bind(until)
    .run()
    .await?;
    Ok(())
}

/// Takes the mark away, in the transaction that makes the session findable; `false` if what was written is no longer
/// all there.
pub(super) async fn unstage(tx: &mut Tx, (tenant, session): (TenantId, SessionId)) -> Result<bool> {
    let unmark = "DELETE FROM erasures WHERE session_id = $1 AND tenant_id = $2";
    Ok(tx.sql(unmark).bind(session).bind(tenant).run().await? == 1)
}

/// Marks a session that nobody has marked; `false` if somebody has.
pub(super) async fn stage_first(
    tx: &mut Tx,
    (tenant, session): (TenantId, SessionId),
    until: Timestamp,
) -> Result<bool> {
    let mark = "INSERT INTO erasures (session_id, tenant_id, created_at) VALUES ($1, $2, $3) \
         ON CONFLICT (session_id, tenant_id) DO NOTHING";
    Ok(tx.sql(mark).bind(session).bind(tenant).bind(until).run().await? == 1)
}

/// Whether the mark is still the one that was set last, which it then is until the transaction ends.
pub(super) async fn is_staged(
    tx: &mut Tx,
    (tenant, session): (TenantId, SessionId),
    until: Timestamp,
) -> Result<bool> {
    let lock = "UPDATE erasures SET created_at = created_at \
         WHERE session_id = $1 AND tenant_id = $2 AND created_at = $3";
    Ok(tx.sql(lock).bind(session).bind(tenant).bind(until).run().await? == 1)
}

/// Makes a session unfindable. Its memory goes with its row.
struct Delete {
    caller: Caller,
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
            Self::Matches(etags) => etags.match_tag(&session.etag()),
            Self::Old(cutoffs) => cutoffs.are_past(session),
        }
    }
}

impl WriteAlone for Delete {
    type Answer = Deleted;

    fn place(&self) -> (TenantId, i64) {
        (self.caller.tenant, self.session.number())
    }

    async fn apply(&self, tx: &mut Tx) -> Result<Deleted> {
        let tenant = self.caller.tenant;
        if !tx.may_be_of(&self.caller, self.session).await? {
            return Ok(Deleted::Unknown);
        }
        if let Some(condition) = &self.only_if {
            let row = tx
                .sql(SESSIONS)
                .push(" WHERE session_id = $1 AND tenant_id = $2")
                .push_each("", " FOR UPDATE");
            let session: Option<Session> = row.bind(self.session).bind(tenant).optional().await?;
            if session.is_some_and(|session| !condition.holds(&session)) {
                return Ok(Deleted::Changed);
            }
        }
        if !remove_session(tx, self.session, tenant).await? {
            return Ok(Deleted::Unknown);
        }
        stage(tx, (tenant, self.session), self.now).await?;
        Ok(Deleted::Gone)
    }
}
