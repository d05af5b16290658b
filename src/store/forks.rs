//! Forking a session: its turns are copied by the database, a page at a time, before the fork can be found.

use super::{
    Result, Store,
    db::Tx,
    erasures::{is_staged, stage, unstage},
    idempotency::Claim,
    search,
    sessions::InsertSession,
    writer::Write,
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::SessionId,
    search::Scope,
    session::Session,
    turn::TurnStatus,
};

/// Turns copied in one transaction; others write in between.
const PAGE: i64 = 500;
/// How long a fork whose copying stopped is left alone.
const STAGED: std::time::Duration = std::time::Duration::from_secs(60);

/// Why a session was not forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotForked {
    UnknownSession,
    UnknownTurn,
    /// The turn is running.
    Running,
}

impl Store {
    /// The last turn that a fork of a session would hold: `turn`, or the last completed one; 0 if there is none.
    pub async fn fork_point(
        &self,
        caller: &Caller,
        session: SessionId,
        turn: Option<i64>,
    ) -> Result<Result<i64, NotForked>> {
        let point =
            self.db.read(caller, "SELECT turn, status FROM turns WHERE session_id = $1 AND tenant_id = $2");
        let point = point.bind(session).bind(caller.tenant).of(caller).push_some(" AND turn = ", turn);
        let point = match turn {
            Some(_) => point,
            None => point.push(" AND status = 'completed' ORDER BY turn DESC LIMIT 1"),
        };
        Ok(match point.optional().await? {
            Some((_, TurnStatus::Running)) => Err(NotForked::Running),
            Some((turn, _)) => Ok(turn),
            None if turn.is_some() => Err(NotForked::UnknownTurn),
            None => Ok(0),
        })
    }

    /// Makes `fork`, which names the session and the turn that it comes from, with the turns up to there, what was
    /// learnt from them, and a copy of the memory.
    pub async fn fork_session(
        &self,
        caller: &Caller,
        fork: Session,
        remember: Option<(Claim, String)>,
    ) -> Result<Result<(), NotForked>> {
        let (Some(parent), Some(through)) = (fork.forked_from_session, fork.forked_from_turn) else {
            return Ok(Err(NotForked::UnknownSession));
        };
        let (tenant, id) = (caller.tenant, fork.id);
        loop {
            let made = self.copy(tenant, (parent, through), fork.clone(), remember.clone()).await;
            if !matches!(made, Ok(Ok(true))) {
                // What is left over even so is removed when its time is over.
                self.erase(id, tenant).await?;
            }
            match made? {
                Ok(true) => return Ok(Ok(())),
                // A turn was erased meanwhile, perhaps after it had been copied: once more.
                Ok(false) => {}
                Err(refusal) => return Ok(Err(refusal)),
            }
        }
    }

    /// Copies and publishes a fork; `false` if something was taken away from the parent meanwhile.
    async fn copy(
        &self,
        tenant: TenantId,
        (parent, through): (SessionId, i64),
        mut fork: Session,
        remember: Option<(Claim, String)>,
    ) -> Result<Result<bool, NotForked>> {
        let takings = self.takings(tenant, parent).await?;
        let mut staged = None;
        for first in (1..=through).step_by(usize::try_from(PAGE).unwrap_or(usize::MAX)) {
            let page = (first, through.min(first + PAGE - 1));
            let mut tx = self.db.begin(tenant).await?;
            // First, since whoever deletes the parent removes what is staged, too.
            if !is_there(&mut tx, tenant, parent).await? {
                tx.rollback().await?;
                return Ok(Err(NotForked::UnknownSession));
            }
            still_staged(&mut tx, (tenant, fork.id), staged).await?;
            let now = tx.clock().await?;
            stage(&mut tx, (tenant, fork.id), now + STAGED).await?;
            let from = "UPDATE erasures SET copied_from = $3 WHERE session_id = $1 AND tenant_id = $2";
            tx.sql(from).bind(fork.id).bind(tenant).bind(parent).run().await?;
            staged = Some(now + STAGED);
            fork.completed_turns += copy_turns(&mut tx, tenant, (parent, fork.id), page).await?;
            if let Some((claim, _)) = &remember {
                claim.renew(&mut tx, now + STAGED).await?;
            }
            tx.commit().await?;
        }
        let mut tx = self.db.begin(tenant).await?;
        if !is_there(&mut tx, tenant, parent).await? {
            tx.rollback().await?;
            return Ok(Err(NotForked::UnknownSession));
        }
        let (taken,): (i64,) = tx.sql(TAKINGS).bind(parent).bind(tenant).one().await?;
        if Some(taken) != takings {
            tx.rollback().await?;
            return Ok(Ok(false));
        }
        still_staged(&mut tx, (tenant, fork.id), staged).await?;
        unstage(&mut tx, (tenant, fork.id)).await?;
        let id = fork.id;
        let insert = InsertSession { tenant, session: fork, last_turn: through, remember };
        InsertSession::apply(&[&insert], &mut tx).await?;
        copy_memory(&mut tx, tenant, (parent, id), through).await?;
        tx.commit().await?;
        Ok(Ok(true))
    }

    /// How often something was taken away from a session.
    async fn takings(&self, tenant: TenantId, session: SessionId) -> Result<Option<i64>> {
        let row: Option<(i64,)> = self.db.read(tenant, TAKINGS).bind(session).bind(tenant).optional().await?;
        Ok(row.map(|(takings,)| takings))
    }
}

const TAKINGS: &str = "SELECT takings FROM session_memory WHERE session_id = $1 AND tenant_id = $2";

/// Fails if what has been staged until a time has begun to be removed, since its copying took too long.
async fn still_staged(tx: &mut Tx, session: (TenantId, SessionId), staged: Option<Timestamp>) -> Result<()> {
    match staged {
        Some(until) if !is_staged(tx, session, until).await? => Err(sqlx::Error::RowNotFound.into()),
        _ => Ok(()),
    }
}

/// Whether a session is there and not about to go, and locks it as it is. Whoever deletes it, or erases its user,
/// either waits for this transaction and then sees what it made, or is waited for and then seen here.
async fn is_there(tx: &mut Tx, tenant: TenantId, session: SessionId) -> Result<bool> {
    let lock = "SELECT last_turn FROM sessions WHERE session_id = $1 AND tenant_id = $2";
    let locked = tx.sql(lock).push_each("", " FOR SHARE").bind(session).bind(tenant);
    if locked.optional::<(i64,)>().await?.is_none() {
        return Ok(false);
    }
    // A statement of its own, so that it sees what was written while the lock was waited for.
    let going = "SELECT EXISTS (SELECT 1 FROM erasures WHERE session_id = $1 AND tenant_id = $2)";
    let (going,): (bool,) = tx.sql(going).bind(session).bind(tenant).one().await?;
    Ok(!going)
}

/// Copies a page of turns with their search entries; how many of them are completed.
async fn copy_turns(
    tx: &mut Tx,
    tenant: TenantId,
    (parent, fork): (SessionId, SessionId),
    (first, last): (i64, i64),
) -> Result<i64> {
    tx.sql(
        "INSERT INTO turns (session_id, tenant_id, turn, status, message_tokens, response_tokens, created_at, \
             completed_at, execution_us, prompt_tokens, completion_tokens, total_tokens, request_id, model, \
             error_code, error_message, metadata, message, response) \
         SELECT $3, tenant_id, turn, status, message_tokens, response_tokens, created_at, \
             completed_at, execution_us, prompt_tokens, completion_tokens, total_tokens, request_id, model, \
             error_code, error_message, metadata, message, response FROM turns \
         WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $4 AND $5 AND status <> 'running'",
    )
    .bind(parent)
    .bind(tenant)
    .bind(fork)
    .bind(first)
    .bind(last)
    .run()
    .await?;
    tx.sql_each(
            "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) \
             SELECT $3, tenant_id, turn, created_at, replace(terms, $6, $7) FROM search_entries \
             WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $4 AND $5",
            "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) \
             SELECT $3, tenant_id, turn, created_at, ts_delete(terms, $6) || array_to_tsvector(ARRAY[$7::text]) \
             FROM search_entries WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $4 AND $5",
        )
        .bind(parent)
        .bind(tenant)
        .bind(fork)
        .bind(first)
        .bind(last)
        .bind(Scope::Session(parent).term(tenant))
        .bind(Scope::Session(fork).term(tenant))
        .run()
        .await?;
    search::index_terms(tx, (tenant, fork), (first, last)).await?;
    let completed = "SELECT COUNT(*) FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $3 AND $4 \
         AND status = 'completed'";
    let (completed,) = tx.sql(completed).bind(fork).bind(tenant).bind(first).bind(last).one().await?;
    Ok(completed)
}

/// Copies the memory, and what was learnt from the turns that were copied.
async fn copy_memory(
    tx: &mut Tx,
    tenant: TenantId,
    (parent, fork): (SessionId, SessionId),
    through: i64,
) -> Result<()> {
    for copy in [
        // A summary that covers more than was copied is made anew.
        "UPDATE session_memory SET (verbosity, tone, depth, verbosity_turn, tone_turn, depth_turn, working_memory, \
             summary, summary_through, summary_tokens) = \
         (SELECT verbosity, tone, depth, CASE WHEN verbosity_turn <= $4 THEN verbosity_turn END, \
             CASE WHEN tone_turn <= $4 THEN tone_turn END, CASE WHEN depth_turn <= $4 THEN depth_turn END, \
             working_memory, CASE WHEN summary_through <= $4 THEN summary END, \
             CASE WHEN summary_through <= $4 THEN summary_through END, \
             CASE WHEN summary_through <= $4 THEN summary_tokens ELSE 0 END \
          FROM session_memory WHERE session_id = $1 AND tenant_id = $2) \
         WHERE session_id = $3 AND tenant_id = $2",
        "INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) \
         SELECT tenant_id, user_id, key, $3, turn, updated_at, value FROM facts \
         WHERE session_id = $1 AND tenant_id = $2 AND turn <= $4",
    ] {
        tx.sql(copy).bind(parent).bind(tenant).bind(fork).bind(through).run().await?;
    }
    Ok(())
}
