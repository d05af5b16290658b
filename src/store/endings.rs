//! How turns end: completed, failed, cancelled, or abandoned by a server that is gone.

use std::{collections::HashSet, sync::Arc, time::Duration};

use super::{
    Account, Kind, Result, Store, TurnKey,
    db::{Column, Reach, Tx},
    idempotency::Claim,
    memory,
    search::{self, Entry, Placed},
    writer::{Write, WriteAlone},
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::SessionId,
    memory::Learnt,
    session::UserId,
    turn::{TurnStatus, Usage},
};

/// Where instances tell each other which turns were cancelled: tenant, session and turn, as numbers.
pub(super) const CANCELLED: &str = "atlus_cancelled";

/// How a running turn ends.
#[derive(Clone, Debug)]
pub enum Ending {
    Completed(Arc<Completion>),
    Failed { code: String, message: String },
}

/// An answered message.
#[derive(Clone, Debug)]
pub struct Completion {
    /// Whose session it is.
    pub user: UserId,
    pub message: String,
    /// When it was admitted.
    pub created_at: Timestamp,
    pub response: String,
    pub response_tokens: i64,
    pub model: String,
    pub usage: Option<Usage>,
    /// What the message says about its user.
    pub learnt: Learnt,
    /// The tokens that are taken off the user's budget, where there is one.
    pub charge: Option<i64>,
}

/// What became of an attempt to end a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Stored,
    Cancelled,
    /// Its lease ran out and somebody else has failed it.
    LeaseLost,
    /// The session was deleted meanwhile.
    Gone,
}

/// What became of a wish to cancel a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cancelled {
    Done,
    NotRunning,
    UnknownTurn,
    UnknownSession,
}

/// A running turn whose lease has run out.
#[derive(Clone, Copy, Debug, sqlx::FromRow)]
pub struct Expired {
    pub session_id: SessionId,
    pub tenant_id: TenantId,
    pub turn: i64,
}

impl Store {
    /// Ends a running turn, and remembers the answer; `has_pieces` tells whether pieces of its reply may have been
    /// kept. Safe to repeat: a turn that was ended with the same token is found ended.
    pub async fn end_turn(
        &self,
        key: TurnKey,
        ending: Ending,
        execution: Duration,
        has_pieces: bool,
        now: Timestamp,
        remember: Option<(Claim, String)>,
    ) -> Result<Ended> {
        // Made here, not in the one task that writes.
        let entry = match &ending {
            Ending::Completed(done) => {
                Some(Entry::new(key.turn, done.created_at, [&done.message, &done.response]))
            }
            Ending::Failed { .. } => None,
        };
        self.writer.write(End { key, ending, entry, execution, now, has_pieces, remember }).await
    }

    /// Cancels a running turn. The key that its message came with remembers that, as status 409.
    pub async fn cancel_turn(
        &self,
        caller: &Caller,
        session: SessionId,
        turn: i64,
        now: Timestamp,
    ) -> Result<Cancelled> {
        self.writer.write(Cancel { caller: caller.clone(), session, turn, now }).await
    }

    /// Up to `limit` running turns whose lease has run out, of one session or of all.
    pub async fn expired_turns(
        &self,
        session: Option<(TenantId, SessionId)>,
        limit: i64,
    ) -> Result<Vec<Expired>> {
        let now = self.db.clock().await?;
        let text =
            "SELECT session_id, tenant_id, turn FROM turns WHERE status = 'running' AND lease_expires_at < ";
        let reach = session.map_or(Reach::Everybody, |(tenant, _)| tenant.into());
        let expired = self.db.read(reach, text).push_bind(now);
        let expired = expired.push_some(" AND tenant_id = ", session.map(|(tenant, _)| tenant));
        let expired = expired.push_some(" AND session_id = ", session.map(|(_, session)| session));
        Ok(expired.push(" LIMIT ").push_bind(limit).all().await?)
    }

    /// Fails a turn with `INTERRUPTED`; `false` if it was renewed or ended meanwhile.
    pub async fn fail_expired_turn(&self, expired: Expired, now: Timestamp) -> Result<bool> {
        let Expired { session_id, tenant_id, turn } = expired;
        let mut tx = self.db.begin(tenant_id).await?;
        free_session(&mut tx, session_id, tenant_id, turn).await?;
        let deadline = tx.clock().await?;
        let failed = tx
            .sql(
                "UPDATE turns SET status = 'failed', error_code = 'INTERRUPTED', \
                     error_message = 'The server that ran this turn stopped before it was complete', \
                     completed_at = $5 \
                 WHERE session_id = $1 AND tenant_id = $2 AND turn = $3 AND status = 'running' \
                     AND lease_expires_at < $4",
            )
            .bind(session_id)
            .bind(tenant_id)
            .bind(turn)
            .bind(deadline)
            .bind(now)
            .run()
            .await?;
        match failed {
            0 => tx.rollback().await?,
            _ => {
                drop_pieces(&mut tx, session_id, tenant_id, turn).await?;
                tx.commit().await?;
            }
        }
        Ok(failed > 0)
    }
}

struct End {
    key: TurnKey,
    ending: Ending,
    entry: Option<Entry>,
    execution: Duration,
    now: Timestamp,
    has_pieces: bool,
    remember: Option<(Claim, String)>,
}

impl Write for End {
    type Answer = Ended;

    fn place(&self) -> (TenantId, i64) {
        (self.key.tenant, self.key.session.number())
    }

    async fn apply(ends: &[&Self], tx: &mut Tx) -> Result<Vec<Ended>> {
        let settled = ends.iter().any(|end| end.is_settled());
        let stored = Self::store(ends, settled, tx).await?;
        let is_stored = |end: &&&Self| stored.contains(&(end.key.session, end.key.tenant));
        if tx.kind() == Kind::Sqlite {
            let entries: Vec<_> = ends.iter().filter(is_stored).filter_map(|end| end.entry()).collect();
            if let Some(index) = search::index(tx, &entries) {
                if settled { index } else { index.last() }.run().await?;
            }
        }
        let mut answers = Vec::with_capacity(ends.len());
        for end in ends {
            answers.push(match is_stored(&end) {
                true => {
                    end.settle(tx).await?;
                    Ended::Stored
                }
                false => end.why_not(tx).await?,
            });
        }
        Ok(answers)
    }
}

impl End {
    fn completion(&self) -> Option<&Completion> {
        match &self.ending {
            Ending::Completed(done) => Some(done),
            Ending::Failed { .. } => None,
        }
    }

    fn failure(&self) -> Option<(&str, &str)> {
        match &self.ending {
            Ending::Completed(_) => None,
            Ending::Failed { code, message } => Some((code, message)),
        }
    }

    /// Frees sessions from their running turns and writes how these ended; of which sessions. On Postgres also what they
    /// are found by: there, parts of a statement see what others have changed. Where more is `settled`, it does not commit.
    async fn store(ends: &[&Self], settled: bool, tx: &mut Tx) -> Result<HashSet<(SessionId, TenantId)>> {
        let status = |end: &&Self| match end.ending {
            Ending::Completed(_) => TurnStatus::Completed,
            Ending::Failed { .. } => TurnStatus::Failed,
        };
        let usage = |end: &&Self| end.completion().and_then(|done| done.usage);
        let entries: Vec<_> = ends.iter().filter_map(|end| end.entry()).collect();
        let kind = tx.kind();
        let ended = tx
            .sql_each("", "WITH freed AS (")
            .push("UPDATE sessions SET running_turn = NULL, completed_turns = completed_turns + completed FROM ")
            .push_rows([
                ("id", Column::integers(ends, |end| end.key.session)),
                ("tenant", Column::integers(ends, |end| end.key.tenant)),
                ("number", Column::integers(ends, |end| end.key.turn)),
                ("completed", Column::integers(ends, |end| end.completion().is_some())),
            ])
            .push(" WHERE session_id = id AND tenant_id = tenant AND running_turn = number")
            .push_each("; ", " RETURNING id AS free, tenant AS free_tenant), ended AS (")
            .push(
                "UPDATE turns SET status = new_status, completed_at = now, execution_us = execution, response = reply, \
                     response_tokens = reply_tokens, model = answerer, prompt_tokens = tokens_in, \
                     completion_tokens = tokens_out, total_tokens = tokens, error_code = code, error_message = reason \
                 FROM ",
            )
            .push_rows([
                ("id", Column::integers(ends, |end| end.key.session)),
                ("tenant", Column::integers(ends, |end| end.key.tenant)),
                ("number", Column::integers(ends, |end| end.key.turn)),
                ("token", Column::integers(ends, |end| end.key.lease_token)),
                ("new_status", Column::texts(ends, |end| status(end).as_str())),
                ("now", Column::integers(ends, |end| end.now)),
                ("execution", Column::integers(ends, |end| i64::try_from(end.execution.as_micros()).ok())),
                ("reply", Column::texts(ends, |end| end.completion().map(|done| done.response.as_str()))),
                ("reply_tokens", Column::integers(ends, |end| end.completion().map_or(0, |done| done.response_tokens))),
                ("answerer", Column::texts(ends, |end| end.completion().map(|done| done.model.as_str()))),
                ("tokens_in", Column::integers(ends, |end| usage(end).map(|usage| usage.prompt_tokens))),
                ("tokens_out", Column::integers(ends, |end| usage(end).map(|usage| usage.completion_tokens))),
                ("tokens", Column::integers(ends, |end| usage(end).map(|usage| usage.total_tokens))),
                ("code", Column::texts(ends, |end| end.failure().map(|(code, _)| code))),
                ("reason", Column::texts(ends, |end| end.failure().map(|(_, message)| message))),
            ])
            // A deleted session's turns may still be there, and do not get their end.
            .push_each(
                " WHERE EXISTS (SELECT 1 FROM sessions s WHERE s.session_id = id AND s.tenant_id = tenant) AND ",
                " JOIN freed ON free = id AND free_tenant = tenant WHERE ",
            )
            .push(
                "session_id = id AND tenant_id = tenant AND turn = number AND lease_token = token \
                     AND status = 'running' RETURNING session_id, tenant_id",
            )
            .push_each("", ")");
        let (ended, more) = match kind {
            _ if entries.is_empty() => (ended, settled),
            Kind::Sqlite => (ended, true),
            Kind::Postgres => {
                let entered = search::push_entries(ended.push(", entered AS ("), &entries);
                (entered.push(" JOIN ended ON session_id = session AND tenant_id = tenant)"), settled)
            }
        };
        let ended = ended.push_each("", " SELECT session_id, tenant_id FROM ended");
        let ended = if more { ended } else { ended.last() };
        Ok(ended.all().await?.into_iter().collect())
    }

    /// What the turn is found by, where it was completed.
    fn entry(&self) -> Option<Placed<'_>> {
        let (entry, done) = self.entry.as_ref().zip(self.completion())?;
        Some(Placed { tenant: self.key.tenant, user: &done.user, session: self.key.session, entry })
    }

    /// Whether its end has more to it than the turn.
    fn is_settled(&self) -> bool {
        let more = |done: &Completion| !done.learnt.is_empty() || done.charge.is_some();
        self.completion().is_some_and(more) || self.has_pieces || self.remember.is_some()
    }

    /// Keeps what the turn teaches, costs and answers to, where it does.
    async fn settle(&self, tx: &mut Tx) -> Result<()> {
        let TurnKey { tenant, session, turn, lease_token } = self.key;
        if let Some(done) = self.completion() {
            memory::learn(tx, (tenant, &done.user), (session, turn), done.created_at, &done.learnt).await?;
            if let Some(tokens) = done.charge {
                let (user, at) = (done.user.clone(), done.created_at);
                Account { tenant, user, at, work: lease_token }.charge(tx, tokens).await?;
            }
        }
        if self.has_pieces {
            drop_pieces(tx, session, tenant, turn).await?;
        }
        if let Some((claim, answer)) = &self.remember {
            claim.remember(tx, Some((session, Some((turn, turn)))), 200, answer).await?;
        }
        Ok(())
    }

    /// Tells why a turn was not running: ended before by this very attempt, failed by another, or deleted.
    async fn why_not(&self, tx: &mut Tx) -> Result<Ended> {
        let TurnKey { tenant, session, turn, lease_token } = self.key;
        let found: Option<(TurnStatus, Option<String>)> = tx
            .sql(
                "SELECT t.status, t.error_code FROM sessions s \
                 JOIN turns t ON t.session_id = s.session_id AND t.tenant_id = s.tenant_id \
                 WHERE s.session_id = $1 AND s.tenant_id = $2 AND t.turn = $3 AND t.lease_token = $4",
            )
            .bind(session)
            .bind(tenant)
            .bind(turn)
            .bind(lease_token)
            .optional()
            .await?;
        Ok(match (found, &self.ending) {
            (None, _) => Ended::Gone,
            (Some((TurnStatus::Cancelled, _)), _) => Ended::Cancelled,
            (Some((TurnStatus::Completed, _)), Ending::Completed(_)) => Ended::Stored,
            (Some((TurnStatus::Failed, Some(was))), Ending::Failed { code, .. }) if was == *code => {
                Ended::Stored
            }
            (Some(_), _) => Ended::LeaseLost,
        })
    }
}

/// Locks a session's row and frees it from its running turn; `false` if that turn does not run there.
async fn free_session(tx: &mut Tx, session: SessionId, tenant: TenantId, turn: i64) -> Result<bool> {
    let freed = tx
        .sql(
            "UPDATE sessions SET running_turn = NULL \
             WHERE session_id = $1 AND tenant_id = $2 AND running_turn = $3",
        )
        .bind(session)
        .bind(tenant)
        .bind(turn)
        .run()
        .await?;
    Ok(freed == 1)
}

/// Cancels a running turn and tells every instance.
pub(super) struct Cancel {
    pub caller: Caller,
    pub session: SessionId,
    pub turn: i64,
    pub now: Timestamp,
}

impl WriteAlone for Cancel {
    type Answer = Cancelled;

    fn place(&self) -> (TenantId, i64) {
        (self.caller.tenant, self.session.number())
    }

    async fn apply(&self, tx: &mut Tx) -> Result<Cancelled> {
        let Self { session, turn, .. } = *self;
        let tenant = self.caller.tenant;
        if !tx.may_be_of(&self.caller, session).await? {
            return Ok(Cancelled::UnknownSession);
        }
        if !free_session(tx, session, tenant, turn).await? {
            let known = "SELECT EXISTS (SELECT 1 FROM turns t WHERE t.session_id = $1 AND t.tenant_id = $2 AND t.turn = $3) \
                 FROM sessions WHERE session_id = $1 AND tenant_id = $2";
            let known = tx.sql(known).bind(session).bind(tenant).bind(turn).optional::<(bool,)>().await?;
            return Ok(match known {
                Some((true,)) => Cancelled::NotRunning,
                Some((false,)) => Cancelled::UnknownTurn,
                None => Cancelled::UnknownSession,
            });
        }
        tx.sql(
            "UPDATE turns SET status = 'cancelled', completed_at = $4, error_code = 'TURN_CANCELLED', \
                 error_message = 'The turn was cancelled' \
             WHERE session_id = $1 AND tenant_id = $2 AND turn = $3 AND status = 'running'",
        )
        .bind(session)
        .bind(tenant)
        .bind(turn)
        .bind(self.now)
        .run()
        .await?;
        drop_pieces(tx, session, tenant, turn).await?;
        tx.sql(
            "UPDATE idempotency_records SET status = 409 WHERE session_id = $1 AND tenant_id = $2 \
                 AND turn = $3 AND status IS NULL",
        )
        .bind(session)
        .bind(tenant)
        .bind(turn)
        .run()
        .await?;
        tell_cancelled(tx, (tenant, session, turn)).await?;
        Ok(Cancelled::Done)
    }
}

/// Tells every instance that the work on a turn is for nothing.
pub(super) async fn tell_cancelled(tx: &mut Tx, turn: (TenantId, SessionId, i64)) -> Result<()> {
    let (tenant, session, turn) = turn;
    Ok(tx.notify(CANCELLED, format!("{} {} {turn}", tenant.number(), session.number())).await?)
}

/// Removes the kept pieces of a turn that has ended.
async fn drop_pieces(tx: &mut Tx, session: SessionId, tenant: TenantId, turn: i64) -> Result<()> {
    tx.sql("DELETE FROM turn_pieces WHERE session_id = $1 AND tenant_id = $2 AND turn = $3")
        .bind(session)
        .bind(tenant)
        .bind(turn)
        .run()
        .await?;
    Ok(())
}
