//! Turns at rest: their numbers, their lives and their leases.
//!
//! Every write to a turn updates its session's row first, which is the lock. `sessions.running_turn` lets that
//! one statement tell whether the session is free; the unique index `turns_running` makes it certain.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use super::{
    Account, Kind, Result, Store,
    db::{Column, Reach, Statement, Tx},
    idempotency::Claim,
    memory,
    search::{self, Entry, Placed},
    sessions::InsertSession,
    writer::{Write, apply_one},
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{RequestId, SessionId},
    json::Metadata,
    memory::Learnt,
    page::{Direction, Page, Position},
    session::{Session, UserId},
    tokens,
    turn::{Turn, TurnStatus, Usage},
};

/// About how many bytes of text a page holds at most, however many turns are asked for; one turn at least.
const PAGE_BYTES: usize = 1 << 20;

/// Turns of a session that is there, since those of a deleted one may wait for their removal, and that is the caller's:
/// see [`Store::turns_of`].
const TURNS: &str = "SELECT session_id, turn, status, message, response, error_code, error_message, model, \
     prompt_tokens, completion_tokens, total_tokens, execution_us, request_id, metadata, created_at, completed_at \
     FROM turns WHERE session_id = $1 \
     AND tenant_id = (SELECT s.tenant_id FROM sessions s WHERE s.session_id = $1 AND s.tenant_id = $2";

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

/// Where instances tell each other which turns were cancelled: tenant, session and turn, as numbers.
pub(super) const CANCELLED: &str = "atlus_cancelled";

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

/// A turn as its runner knows it.
#[derive(Clone, Copy, Debug)]
pub struct TurnKey {
    pub tenant: TenantId,
    pub session: SessionId,
    pub turn: i64,
    pub lease_token: i64,
}

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
    /// Gives a message its number and keeps it, before any model is asked. Safe to repeat with the same lease
    /// token: a turn that was admitted with it is found again.
    pub async fn admit_turn(
        &self,
        caller: &Caller,
        admission: Admission,
    ) -> Result<Result<Admitted, NotAdmitted>> {
        self.writer.write(Admit { caller: caller.clone(), admission }).await
    }

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

    /// Puts off the moment at which a running turn, and the claim it was admitted with, count as abandoned;
    /// `false` if the turn is no longer running.
    pub async fn renew_lease(&self, key: TurnKey, claim: Option<Claim>, lease: Duration) -> Result<bool> {
        self.writer.write(Renew { key, claim, lease }).await
    }

    /// Keeps a piece of a running turn's reply, which begins at byte `start` of it, for readers at other instances.
    pub async fn keep_piece(&self, key: TurnKey, start: i64, text: String) -> Result<()> {
        self.writer.write(KeepPiece { key, start, text }).await
    }

    /// The kept pieces of a running turn's reply, in order.
    pub async fn pieces(&self, caller: &Caller, session: SessionId, turn: i64) -> Result<Vec<(i64, String)>> {
        let text =
            "SELECT start, text FROM turn_pieces WHERE session_id = $1 AND tenant_id = $2 AND turn = $3";
        let pieces = self.db.read(caller, text).bind(session).bind(caller.tenant).bind(turn).of(caller);
        Ok(pieces.push(" ORDER BY start").all().await?)
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
        free_session(&mut tx, session_id, tenant_id, turn, 0).await?;
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

    /// The turn that runs in a session, or else the last; `None` if there is no such session.
    pub async fn latest_turn(&self, caller: &Caller, session: SessionId) -> Result<Option<i64>> {
        let text =
            "SELECT COALESCE(running_turn, last_turn) FROM sessions WHERE session_id = $1 AND tenant_id = $2";
        let row = self.db.read(caller, text).bind(session).bind(caller.tenant).of(caller);
        let row: Option<(i64,)> = row.optional().await?;
        Ok(row.map(|(turn,)| turn))
    }

    /// A page of a session's turns, after the turn numbered `after`; empty too if there is no such session.
    pub async fn turns(
        &self,
        caller: &Caller,
        session: SessionId,
        status: Option<TurnStatus>,
        direction: Direction,
        after: Option<Position>,
        limit: usize,
    ) -> Result<Page<Turn>> {
        let (beyond, sorted) = direction.sql();
        let mut page = self.turns_of(caller, session).push_some(" AND status = ", status);
        if let Some(after) = after {
            page = page.push(" AND turn").push(beyond).push_bind(after.key);
        }
        page = page.push(" ORDER BY turn").push(sorted);
        let rows = page.push(" LIMIT ").push_bind(i64::try_from(limit + 1).unwrap_or(i64::MAX)).all().await?;
        let rows: Vec<Turn> = rows;
        let mut bytes = 0;
        let fits = |turn: &&Turn| {
            bytes += turn.message.len() + turn.response.as_ref().map_or(0, String::len);
            bytes <= PAGE_BYTES
        };
        let limit = limit.min(rows.iter().take_while(fits).count().max(1));
        Ok(Page::cut(rows, limit, |turn: &Turn| Position { key: turn.turn, id: 0 }))
    }

    pub async fn turn(&self, caller: &Caller, session: SessionId, turn: i64) -> Result<Option<Turn>> {
        Ok(self.turns_of(caller, session).push(" AND turn = ").push_bind(turn).optional().await?)
    }

    /// Begins to read turns of a session. Whose it is, is looked at once, before any turn: SQLite would look at every
    /// turn of another's session, and the time that takes would tell how many there are.
    fn turns_of(&self, caller: &Caller, session: SessionId) -> Statement<'_> {
        let turns = self.db.read(caller, TURNS).bind(session).bind(caller.tenant);
        turns.push_some(" AND s.user_id = ", caller.user.as_ref()).push(")")
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

    async fn apply(&self, tx: &mut Tx) -> Result<Self::Answer> {
        apply_one(self, tx).await
    }

    async fn apply_all(admits: &[&Self], tx: &mut Tx) -> Result<Vec<Self::Answer>> {
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

    async fn apply(&self, tx: &mut Tx) -> Result<Ended> {
        apply_one(self, tx).await
    }

    async fn apply_all(ends: &[&Self], tx: &mut Tx) -> Result<Vec<Ended>> {
        let stored = Self::store(ends, tx).await?;
        let is_stored = |end: &&&Self| stored.contains(&(end.key.session, end.key.tenant));
        if tx.kind() == Kind::Sqlite {
            let entries: Vec<_> = ends.iter().filter(is_stored).filter_map(|end| end.entry()).collect();
            let settled = ends.iter().any(|end| end.is_settled());
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
    /// are found by: there, parts of a statement see what others have changed.
    async fn store(ends: &[&Self], tx: &mut Tx) -> Result<HashSet<(SessionId, TenantId)>> {
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
        let settled = ends.iter().any(|end| end.is_settled());
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

/// Writes turns that have ended, made elsewhere.
pub(super) async fn insert_ended(tx: &mut Tx, tenant: TenantId, turns: &[Turn]) -> Result<()> {
    if turns.is_empty() {
        return Ok(());
    }
    let metadata: Vec<_> = turns.iter().map(|turn| turn.metadata.to_text()).collect();
    tx.sql(
        "INSERT INTO turns (session_id, tenant_id, turn, status, message, message_tokens, response, response_tokens, \
             error_code, error_message, model, prompt_tokens, completion_tokens, total_tokens, execution_us, \
             request_id, metadata, created_at, completed_at) \
         SELECT session_id, tenant_id, turn, status, message, message_tokens, response, response_tokens, \
             error_code, error_message, model, prompt_tokens, completion_tokens, total_tokens, execution_us, \
             request_id, metadata, created_at, completed_at FROM ",
    )
    .push_rows([
        ("session_id", Column::integers(turns, |turn| turn.session_id)),
        ("tenant_id", Column::integers(turns, |_| tenant)),
        ("turn", Column::integers(turns, |turn| turn.turn)),
        ("status", Column::texts(turns, |turn| turn.status.as_str())),
        ("message", Column::texts(turns, |turn| turn.message.as_str())),
        ("message_tokens", Column::integers(turns, |turn| tokens::count(&turn.message))),
        ("response", Column::texts(turns, |turn| turn.response.as_deref())),
        ("response_tokens", Column::integers(turns, |turn| turn.response.as_deref().map_or(0, tokens::count))),
        ("error_code", Column::texts(turns, |turn| turn.error_code.as_deref())),
        ("error_message", Column::texts(turns, |turn| turn.error_message.as_deref())),
        ("model", Column::texts(turns, |turn| turn.model.as_deref())),
        ("prompt_tokens", Column::integers(turns, |turn| turn.prompt_tokens)),
        ("completion_tokens", Column::integers(turns, |turn| turn.completion_tokens)),
        ("total_tokens", Column::integers(turns, |turn| turn.total_tokens)),
        ("execution_us", Column::integers(turns, |turn| turn.execution_us)),
        ("request_id", Column::texts(turns, |turn| turn.request_id.as_str())),
        ("metadata", Column::texts(&metadata, String::as_str)),
        ("created_at", Column::integers(turns, |turn| turn.created_at)),
        ("completed_at", Column::integers(turns, |turn| turn.completed_at)),
    ])
    .run()
    .await?;
    Ok(())
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

/// Locks a session's row and frees it from its running turn, counting `completed` more; `false` if that turn
/// does not run there.
async fn free_session(
    tx: &mut Tx,
    session: SessionId,
    tenant: TenantId,
    turn: i64,
    completed: i64,
) -> Result<bool> {
    let freed = tx
        .sql(
            "UPDATE sessions SET running_turn = NULL, completed_turns = completed_turns + $4 \
             WHERE session_id = $1 AND tenant_id = $2 AND running_turn = $3",
        )
        .bind(session)
        .bind(tenant)
        .bind(turn)
        .bind(completed)
        .run()
        .await?;
    Ok(freed == 1)
}

/// Cancels a running turn and tells every instance.
struct Cancel {
    caller: Caller,
    session: SessionId,
    turn: i64,
    now: Timestamp,
}

impl Write for Cancel {
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
        if !free_session(tx, session, tenant, turn, 0).await? {
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

/// Says that a running turn still runs.
struct Renew {
    key: TurnKey,
    claim: Option<Claim>,
    lease: Duration,
}

impl Write for Renew {
    type Answer = bool;

    fn place(&self) -> (TenantId, i64) {
        (self.key.tenant, self.key.session.number())
    }

    async fn apply(&self, tx: &mut Tx) -> Result<bool> {
        let until = tx.clock().await? + self.lease;
        // Changes neither number nor status, so the session's row need not be locked.
        let renewed = tx
            .sql(
                "UPDATE turns SET lease_expires_at = $5 WHERE session_id = $1 AND tenant_id = $2 AND turn = $3 \
                     AND lease_token = $4 AND status = 'running'",
            )
            .bind(self.key.session)
            .bind(self.key.tenant)
            .bind(self.key.turn)
            .bind(self.key.lease_token)
            .bind(until)
            .run()
            .await?;
        if let Some(claim) = &self.claim {
            claim.renew(tx, until).await?;
        }
        Ok(renewed > 0)
    }
}

/// Keeps a piece of a reply for as long as its turn runs.
struct KeepPiece {
    key: TurnKey,
    start: i64,
    text: String,
}

impl Write for KeepPiece {
    type Answer = ();

    fn place(&self) -> (TenantId, i64) {
        (self.key.tenant, self.key.session.number())
    }

    async fn apply(&self, tx: &mut Tx) -> Result<()> {
        // Whoever ends the turn, or deletes the session, waits for the piece and removes it.
        let running = tx
            .sql("SELECT running_turn FROM sessions WHERE session_id = $1 AND tenant_id = $2 AND running_turn = $3")
            .push_each("", " FOR SHARE")
            .bind(self.key.session)
            .bind(self.key.tenant)
            .bind(self.key.turn);
        if running.optional::<(i64,)>().await?.is_none() {
            return Ok(());
        }
        tx.sql(
            "INSERT INTO turn_pieces (session_id, tenant_id, turn, start, text) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (session_id, tenant_id, turn, start) DO NOTHING",
        )
        .bind(self.key.session)
        .bind(self.key.tenant)
        .bind(self.key.turn)
        .bind(self.start)
        .bind(self.text.as_str())
        .run()
        .await?;
        Ok(())
    }
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
