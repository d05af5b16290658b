//! Turns made elsewhere, added to a session in one transaction.

use super::{
    NotAdmitted, Result, Store,
    admissions::why_busy,
    db::Tx,
    idempotency::Claim,
    memory,
    search::{self, Entry, Placed},
    turns::insert_ended,
    writer::WriteAlone,
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{RequestId, SessionId},
    memory::Learnt,
    session::UserId,
    turn::{NewTurn, Turn, TurnStatus},
};

/// Turns to add, all or none.
#[derive(Clone)]
pub struct Appendix {
    pub session: SessionId,
    /// At least one.
    pub turns: Vec<NewTurn>,
    /// What each turn's message says about its user.
    pub learnt: Vec<Learnt>,
    pub request_id: RequestId,
    pub now: Timestamp,
    pub remember: Option<RememberTurns>,
}

/// The key that remembers the answer, and how that is written.
pub type RememberTurns = (Claim, fn(&[Turn]) -> String);

impl Store {
    /// Adds finished turns to an active session in which none runs.
    pub async fn append_turns(
        &self,
        caller: &Caller,
        appendix: Appendix,
    ) -> Result<Result<Vec<Turn>, NotAdmitted>> {
        // Made here, not in the one task that writes.
        let at = |turn: &NewTurn| turn.created_at.unwrap_or(appendix.now);
        let entry = |turn: &NewTurn| Entry::new(0, at(turn), [&turn.message, &turn.response]);
        let entries = appendix.turns.iter().map(entry).collect();
        self.writer.write(Append { caller: caller.clone(), appendix, entries }).await
    }
}

struct Append {
    caller: Caller,
    appendix: Appendix,
    /// Of the turns, in their order, before they have numbers.
    entries: Vec<Entry>,
}

impl WriteAlone for Append {
    type Answer = Result<Vec<Turn>, NotAdmitted>;

    fn place(&self) -> (TenantId, i64) {
        (self.caller.tenant, self.appendix.session.number())
    }

    async fn apply(&self, tx: &mut Tx) -> Result<Self::Answer> {
        let (tenant, Appendix { session, now, .. }) = (self.caller.tenant, &self.appendix);
        if !tx.may_be_of(&self.caller, *session).await? {
            return Ok(Err(NotAdmitted::Invalid));
        }
        let count = i64::try_from(self.appendix.turns.len()).unwrap_or(i64::MAX);
        let numbered: Option<(i64, UserId)> = tx
            .sql(
                "UPDATE sessions SET last_turn = last_turn + $4, completed_turns = completed_turns + $4, \
                     last_activity = CASE WHEN last_activity > $3 THEN last_activity ELSE $3 END, \
                     expires_at = CASE WHEN last_activity > $3 THEN last_activity ELSE $3 END + ttl_seconds * 1000 \
                 WHERE session_id = $1 AND tenant_id = $2 AND running_turn IS NULL AND ended_at IS NULL \
                     AND (expires_at IS NULL OR expires_at > $3) RETURNING last_turn, user_id",
            )
            .bind(*session)
            .bind(tenant)
            .bind(*now)
            .bind(count)
            .optional()
            .await?;
        let Some((last, user)) = numbered else {
            return Ok(Err(why_busy(tx, tenant, *session, *now).await?));
        };
        let first = last - count + 1;
        let turns: Vec<Turn> =
            (first..).zip(&self.appendix.turns).map(|(n, turn)| self.record(n, turn)).collect();
        insert_ended(tx, tenant, &turns).await?;
        let entries: Vec<Entry> =
            (first..).zip(&self.entries).map(|(turn, entry)| Entry { turn, ..entry.clone() }).collect();
        let placed = |entry| Placed { tenant, user: &user, session: *session, entry };
        if let Some(index) = search::index(tx, &entries.iter().map(placed).collect::<Vec<_>>()) {
            index.run().await?;
        }
        for (turn, learnt) in turns.iter().zip(&self.appendix.learnt) {
            // What is said to be of the future must not outlive what is stated later.
            let at = turn.created_at.min(*now);
            memory::learn(tx, (tenant, &user), (*session, turn.turn), at, learnt).await?;
        }
        if let Some((claim, render)) = &self.appendix.remember {
            claim.remember(tx, Some((*session, Some((first, last)))), 201, &render(&turns)).await?;
        }
        Ok(Ok(turns))
    }
}

impl Append {
    fn record(&self, number: i64, turn: &NewTurn) -> Turn {
        let at = turn.created_at.unwrap_or(self.appendix.now);
        Turn {
            session_id: self.appendix.session,
            turn: number,
            status: TurnStatus::Completed,
            message: turn.message.clone(),
            response: Some(turn.response.clone()),
            error_code: None,
            error_message: None,
            model: turn.model.clone(),
            prompt_tokens: None,
            completion_tokens: None,
            total_tokens: None,
            execution_us: None,
            request_id: self.appendix.request_id.clone(),
            metadata: turn.metadata.clone(),
            created_at: at,
            completed_at: Some(at),
        }
    }
}
