//! How a message becomes a session's next turn.
//!
//! Every write to a turn updates its session's row first, which is the lock. `sessions.running_turn` lets that
//! one statement tell whether the session is free; the unique index `turns_running` makes it certain.

use std::{collections::HashMap, time::Duration};

use super::{
    Account, Result, Store,
    db::{Column, Tx},
    endings::{Cancel, Cancelled},
    idempotency::Claim,
    sessions::InsertSession,
    writer::{Write, WriteAlone},
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{RequestId, SessionId},
    json::Metadata,
    session::{Session, UserId},
};

/// A message that asks to become a session's next turn.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Where to; a session that does not exist yet is made first, in the same transaction.
    pub session: Destination,
    pub message: String,
    pub message_tokens: i64,
    pub metadata: Metadata,
    pub request_id: RequestId,
    pub now: Timestamp,
    /// Random; whoever ends the turn has to present it.
    pub lease_token: i64,
    /// How long the turn may run until it has to be renewed.
    pub lease: Duration,
    /// Whether a running turn is cancelled to make room.
    pub interrupt: bool,
    /// Whether the session is kept for this message if it is busy: the next turn is then its, unless it does not
    /// ask again for [`WAITS`].
    pub wait: bool,
    /// The claim of the key that the message came with.
    pub claim: Option<Claim>,
    /// The tokens that a user may use in a day.
    pub budget: Option<i64>,
}

/// How long a session is kept for a waiting message that does not ask again.
pub const WAITS: Duration = Duration::from_secs(1);

/// Where a message goes.
#[derive(Clone, Debug)]
pub enum Destination {
    /// An existing session; if a user is named, only one that is theirs.
    Existing {
        id: SessionId,
        user: Option<UserId>,
    },
    New(Box<Session>),
}

/// A turn that has been given its number and is durable.
#[derive(Clone, Debug)]
pub struct Admitted {
    pub turn: i64,
    pub temporary: bool,
    /// Whose session it is.
    pub user: UserId,
    pub created_at: Timestamp,
    /// The turn that was cancelled to make room.
    pub interrupted: Option<i64>,
}

/// Why a message did not become a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotAdmitted {
    /// The session does not exist, is not the caller's, or is not active.
    Invalid,
    /// A turn is running, or another message waits for the session and comes first.
    Busy { turn: i64 },
    /// The user has used the day's tokens up.
    OverBudget,
}

impl Store {
    /// Gives a message its number and keeps it, before any model is asked. Safe to repeat with the same lease
    /// token: a turn that was admitted with it is found again.
    pub async fn admit_turn(
        &self,
        caller: &Caller,
        admission: Admission,
    ) -> Result<Result<Admitted, NotAdmitted>> {
        self.writer.write(Admit { caller: caller.clone(), admission }).await
    }
}

struct Admit {
    caller: Caller,
    admission: Admission,
}

impl Write for Admit {
    type Answer = Result<Admitted, NotAdmitted>;

    fn place(&self) -> (TenantId, i64) {
        (self.caller.tenant, self.session_id().number())
    }

    async fn apply(admits: &[&Self], tx: &mut Tx) -> Result<Vec<Self::Answer>> {
        let inserts: Vec<InsertSession> = admits.iter().filter_map(|admit| admit.new_session()).collect();
        if !inserts.is_empty() {
            InsertSession::insert(&inserts.iter().collect::<Vec<_>>(), tx).run().await?;
        }
        let mut open = Vec::with_capacity(admits.len());
        let mut answers = HashMap::with_capacity(admits.len());
        for admit in admits {
            if admit.is_over_budget(tx).await? {
                answers.insert(admit.place(), admit.over_budget(tx).await?);
            } else {
                open.push(*admit);
            }
        }
        let begun = Self::begin(&open, tx).await?;
        for (admit, begun) in open.into_iter().zip(begun) {
            let answer = match begun {
                Some(admitted) => Ok(admitted),
                None => admit.not_begun(tx).await?,
            };
            answers.insert(admit.place(), answer);
        }
        Ok(admits.iter().filter_map(|admit| answers.remove(&admit.place())).collect())
    }
}

/// A number that a session has given.
#[derive(sqlx::FromRow)]
struct Numbered {
    session_id: SessionId,
    tenant_id: TenantId,
    last_turn: i64,
    temporary: bool,
    user_id: UserId,
}

impl Admit {
    fn session_id(&self) -> SessionId {
        match &self.admission.session {
            Destination::Existing { id, .. } => *id,
            Destination::New(session) => session.id,
        }
    }

    fn new_session(&self) -> Option<InsertSession> {
        match &self.admission.session {
            Destination::Existing { .. } => None,
            Destination::New(session) => {
                let (tenant, session) = (self.caller.tenant, (**session).clone());
                Some(InsertSession { tenant, session, last_turn: 0, remember: None })
            }
        }
    }

    fn user(&self) -> Option<&UserId> {
        match &self.admission.session {
            Destination::Existing { user, .. } => user.as_ref(),
            Destination::New(_) => None,
        }
    }

    /// Whether the session's user has no tokens left today. A session that is not the caller's has no user here.
    async fn is_over_budget(&self, tx: &mut Tx) -> Result<bool> {
        let Some(budget) = self.admission.budget else { return Ok(false) };
        let owner = match &self.admission.session {
            Destination::New(session) => Some((session.user_id.clone(),)),
            Destination::Existing { id, .. } => {
                let owner = "SELECT user_id FROM sessions WHERE session_id = $1 AND tenant_id = $2";
                tx.sql(owner).bind(*id).bind(self.caller.tenant).of(&self.caller).optional().await?
            }
        };
        let Some((user,)) = owner else { return Ok(false) };
        Ok(self.account(user).used(tx).await? >= budget)
    }

    /// What is wrong with the session comes first; and a turn that was admitted before is one.
    async fn over_budget(&self, tx: &mut Tx) -> Result<Result<Admitted, NotAdmitted>> {
        Ok(match self.why_not(tx).await? {
            Err(NotAdmitted::Busy { .. }) => Err(NotAdmitted::OverBudget),
            outcome => outcome,
        })
    }

    fn account(&self, user: UserId) -> Account {
        let Admission { now, lease_token, .. } = self.admission;
        Account { tenant: self.caller.tenant, user, at: now, work: lease_token }
    }

    /// Keeps messages to different sessions as running turns, where the session is active, free, and kept for nobody
    /// else; an interrupting message waits for nobody.
    async fn begin(admits: &[&Self], tx: &mut Tx) -> Result<Vec<Option<Admitted>>> {
        let metadata: Vec<_> = admits.iter().map(|admit| admit.admission.metadata.to_text()).collect();
        let lease = |admit: &&Self| i64::try_from(admit.admission.lease.as_millis()).ok();
        // Activity never moves backwards, though servers' clocks may differ.
        let begin = tx
            .sql_each("", "WITH numbered AS (")
            .push(
                "UPDATE sessions SET last_turn = last_turn + 1, running_turn = last_turn + 1, \
                     last_activity = CASE WHEN last_activity > now THEN last_activity ELSE now END, \
                     expires_at = CASE WHEN last_activity > now THEN last_activity ELSE now END + ttl_seconds * 1000, \
                     waiting_token = CASE WHEN waiting_token = token THEN NULL ELSE waiting_token END FROM ",
            )
            .push_rows([
                ("id", Column::integers(admits, |admit| admit.session_id())),
                ("tenant", Column::integers(admits, |admit| admit.caller.tenant)),
                ("now", Column::integers(admits, |admit| admit.admission.now)),
                ("token", Column::integers(admits, |admit| admit.admission.lease_token)),
                ("interrupt", Column::integers(admits, |admit| admit.admission.interrupt)),
                ("owner", Column::texts(admits, |admit| admit.user().map(UserId::as_str))),
                ("caller", Column::texts(admits, |admit| admit.caller.user.as_ref().map(UserId::as_str))),
            ])
            .push(
                " WHERE session_id = id AND tenant_id = tenant AND running_turn IS NULL AND ended_at IS NULL \
                     AND (expires_at IS NULL OR expires_at > now) \
                     AND (waiting_token IS NULL OR waiting_token = token OR interrupt <> 0 OR waiting_until < ",
            )
            .push_clock()
            .push(
                ") AND (owner IS NULL OR user_id = owner) AND (caller IS NULL OR user_id = caller) \
                 RETURNING session_id, tenant_id, last_turn, temporary, user_id",
            );
        // A running turn that is not there is one that was given its number just now.
        let keep = begin
            .push_each("; ", "), kept AS (")
            .push(
                "INSERT INTO turns (session_id, tenant_id, turn, status, message, message_tokens, metadata, \
                     request_id, created_at, lease_token, lease_expires_at) \
                 SELECT id, tenant, last_turn, 'running', message, tokens, about, request, now, token, lease + ",
            )
            .push_clock()
            .push(" FROM ")
            .push_rows([
                ("id", Column::integers(admits, |admit| admit.session_id())),
                ("tenant", Column::integers(admits, |admit| admit.caller.tenant)),
                ("message", Column::texts(admits, |admit| admit.admission.message.as_str())),
                ("tokens", Column::integers(admits, |admit| admit.admission.message_tokens)),
                ("about", Column::texts(&metadata, String::as_str)),
                ("request", Column::texts(admits, |admit| admit.admission.request_id.as_str())),
                ("now", Column::integers(admits, |admit| admit.admission.now)),
                ("token", Column::integers(admits, |admit| admit.admission.lease_token)),
                ("lease", Column::integers(admits, lease)),
            ])
            .push_each(
                " CROSS JOIN sessions ON session_id = id AND tenant_id = tenant WHERE running_turn = last_turn \
                     AND NOT EXISTS (SELECT 1 FROM turns t WHERE t.session_id = id AND t.tenant_id = tenant \
                     AND t.turn = last_turn)",
                " JOIN numbered ON session_id = id AND tenant_id = tenant) SELECT * FROM numbered",
            );
        let accounted = |admit: &&Self| admit.admission.budget.is_some() || admit.admission.claim.is_some();
        let numbered: Vec<Numbered> = match admits.iter().any(accounted) {
            true => keep.all().await?,
            false => keep.last().all().await?,
        };
        let place = |numbered: Numbered| ((numbered.tenant_id, numbered.session_id.number()), numbered);
        let mut numbered: HashMap<_, _> = numbered.into_iter().map(place).collect();
        let begun = admits.iter().map(|admit| {
            let Numbered { last_turn, temporary, user_id, .. } = numbered.remove(&admit.place())?;
            let created_at = admit.admission.now;
            Some(Admitted { turn: last_turn, temporary, user: user_id, created_at, interrupted: None })
        });
        let begun: Vec<_> = begun.collect();
        for (admit, admitted) in admits.iter().zip(&begun) {
            if let Some(admitted) = admitted {
                admit.account_for(tx, admitted).await?;
            }
        }
        Ok(begun)
    }

    /// Takes a message's tokens off the budget, where there is one, and tells its key of the turn.
    async fn account_for(&self, tx: &mut Tx, admitted: &Admitted) -> Result<()> {
        let admission = &self.admission;
        if admission.budget.is_some() {
            // At least; the rest is known once the model has answered.
            self.account(admitted.user.clone()).charge(tx, admission.message_tokens).await?;
        }
        if let Some(claim) = &admission.claim {
            let until = tx.clock().await? + admission.lease;
            claim.link(tx, (self.session_id(), admitted.turn), until).await?;
        }
        Ok(())
    }

    /// What becomes of a message that its session has no number for.
    async fn not_begun(&self, tx: &mut Tx) -> Result<Result<Admitted, NotAdmitted>> {
        let admission = &self.admission;
        match self.why_not(tx).await? {
            Err(busy @ NotAdmitted::Busy { turn }) if admission.interrupt => {
                let (session, caller) = (self.session_id(), self.caller.clone());
                let cancel = Cancel { caller, session, turn, now: admission.now };
                let cancelled = cancel.apply(tx).await?;
                let interrupted = (cancelled == Cancelled::Done).then_some(turn);
                let begun = Self::begin(&[self], tx).await?.pop().flatten();
                Ok(begun.map(|admitted| Admitted { interrupted, ..admitted }).ok_or(busy))
            }
            Err(busy @ NotAdmitted::Busy { .. }) if admission.wait => {
                self.keep_place(tx).await?;
                Ok(Err(busy))
            }
            outcome => Ok(outcome),
        }
    }

    /// Tells why a session took no turn, or finds the turn that this very admission has made before.
    async fn why_not(&self, tx: &mut Tx) -> Result<Result<Admitted, NotAdmitted>> {
        type Found = (i64, bool, UserId, Option<i64>, Option<Timestamp>);
        let found: Option<Found> = tx
            .sql(
                "SELECT COALESCE(s.running_turn, s.last_turn), s.temporary, s.user_id, t.lease_token, t.created_at \
                 FROM sessions s \
                 LEFT JOIN turns t ON t.session_id = s.session_id AND t.tenant_id = s.tenant_id \
                     AND t.turn = s.running_turn \
                 WHERE s.session_id = $1 AND s.tenant_id = $2 AND s.ended_at IS NULL \
                     AND (s.expires_at IS NULL OR s.expires_at > $3)",
            )
            .bind(self.session_id())
            .bind(self.caller.tenant)
            .bind(self.admission.now)
            .push_some(" AND s.user_id = ", self.user())
            .of(&self.caller)
            .optional()
            .await?;
        Ok(match found {
            Some((turn, temporary, user, Some(token), Some(created_at)))
                if token == self.admission.lease_token =>
            {
                Ok(Admitted { turn, temporary, user, created_at, interrupted: None })
            }
            Some((turn, ..)) => Err(NotAdmitted::Busy { turn }),
            None => Err(NotAdmitted::Invalid),
        })
    }

    /// Keeps the session for this message, unless it is kept for another.
    async fn keep_place(&self, tx: &mut Tx) -> Result<()> {
        let clock = tx.clock().await?;
        tx.sql(
            "UPDATE sessions SET waiting_token = $3, waiting_until = $4 WHERE session_id = $1 AND tenant_id = $2 \
                 AND (waiting_token IS NULL OR waiting_token = $3 OR waiting_until < $5)",
        )
        .bind(self.session_id())
        .bind(self.caller.tenant)
        .bind(self.admission.lease_token)
        .bind(clock + WAITS)
        .bind(clock)
        .run()
        .await?;
        Ok(())
    }
}

/// Tells why a session takes no turn now.
pub(super) async fn why_busy(
    tx: &mut Tx,
    tenant: TenantId,
    session: SessionId,
    now: Timestamp,
) -> Result<NotAdmitted> {
    let busy = "SELECT COALESCE(running_turn, last_turn) FROM sessions WHERE session_id = $1 AND tenant_id = $2 \
         AND ended_at IS NULL AND (expires_at IS NULL OR expires_at > $3)";
    let busy: Option<(i64,)> = tx.sql(busy).bind(session).bind(tenant).bind(now).optional().await?;
    Ok(busy.map_or(NotAdmitted::Invalid, |(turn,)| NotAdmitted::Busy { turn }))
}
