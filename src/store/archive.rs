//! Taking sessions out as an archive, a page at a time, and taking an archive in, a batch at a time.
//!
//! What comes in is written out of sight: turns without a session are found by nobody. A mark in `erasures` says who
//! is writing them and until when, so that two imports of a session do not mix and what broke off is removed. Once the
//! session is whole, one transaction takes the mark away and writes the session's row.

use std::{
    collections::{BTreeSet, HashSet, VecDeque},
    io, mem,
    time::{Duration, Instant},
};

use super::{
    Error, Kind, Result, SessionFilter, SessionOrder, Store,
    db::Tx,
    erasures::{is_staged, stage, stage_first, unstage},
    search::{self, Entry, Placed},
    sessions::InsertSession,
    turns::insert_ended,
};
use crate::domain::{
    archive::{ArchivedFact, ArchivedSession, Bad, Counts, Item, Memory, Of, Reader, Writer},
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{SessionId, digest},
    page::{Direction, Position},
    session::{Session, UserId},
    tokens,
    turn::{Turn, TurnStatus},
};

/// The most rows that are read, or written in one transaction, at once.
const ROWS: usize = 500;
/// About the most bytes of text in these rows; one row at least.
const BYTES: usize = 1 << 20;
/// Sessions and facts looked up at once.
const PAGE: usize = 20;
/// What is handed out at once is at least this long, unless it is the last.
const PORTION: usize = 64 << 10;
/// How long what is staged is left alone after its writer was last heard of.
const STAGED: Duration = Duration::from_secs(120);
/// How often a writer that waits for more makes itself heard.
const HEARD: Duration = Duration::from_secs(20);
/// The most keys of facts that are kept about a user.
const MAX_FACTS: i64 = 500;

/// What is taken out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    Session(SessionId),
    User(UserId),
    /// Every session and every fact of the tenant.
    Tenant,
    /// The facts that come from no session.
    Stated,
}

/// Why an export broke off.
#[derive(Debug, thiserror::Error)]
pub enum NotExported {
    #[error("{0} was deleted meanwhile")]
    Gone(SessionId),
    #[error(transparent)]
    Store(#[from] Error),
    #[error("a line cannot be written")]
    Unwritable(#[from] io::Error),
}

impl From<sqlx::Error> for NotExported {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// An archive that is being read from the database. Holds a page of it at most, and no connection between pages.
pub struct Export {
    store: Store,
    caller: Caller,
    what: What,
    writer: Writer,
    next: Next,
    /// The last turn of the last session: what was learnt from later ones is not of a session's archive.
    through: i64,
}

/// What comes next.
enum Next {
    Beginning { now: Timestamp },
    Sessions(Listing),
    Turns { session: SessionId, after: i64, through: i64, then: Listing },
    Facts(Option<FactKey>),
    Nothing,
}

/// Which sessions are still to come.
struct Listing {
    page: VecDeque<SessionId>,
    /// Where the next page begins, in the list of temporary sessions or of others.
    next: Option<(bool, Option<Position>)>,
}

type FactKey = (String, String, i64, i64);

#[derive(sqlx::FromRow)]
struct SessionRow {
    #[sqlx(flatten)]
    session: Session,
    #[sqlx(flatten)]
    memory: Memory,
    /// The last turn that has ended: the one that runs is always the last.
    through: i64,
}

#[derive(sqlx::FromRow)]
struct FactRow {
    user_id: UserId,
    key: String,
    value: String,
    session_id: i64,
    turn: i64,
    updated_at: Timestamp,
}

impl Store {
    /// Begins to take something out; `None` if there is no such session or user.
    pub async fn export(&self, caller: &Caller, what: What, now: Timestamp) -> Result<Option<Export>> {
        let there = match &what {
            What::Session(id) => self.session(caller, *id).await?.is_some(),
            What::User(user) if !caller.may_see(user) => false,
            What::User(user) => {
                let known = "SELECT EXISTS (SELECT 1 FROM sessions WHERE tenant_id = $1 AND user_id = $2) \
                     OR EXISTS (SELECT 1 FROM facts WHERE tenant_id = $1 AND user_id = $2)";
                self.db.read(caller, known).bind(caller.tenant).bind(user).one::<(bool,)>().await?.0
            }
            What::Tenant | What::Stated => true,
        };
        let (store, writer, next) = (self.clone(), Writer::default(), Next::Beginning { now });
        Ok(there.then_some(Export { store, caller: caller.clone(), what, writer, next, through: 0 }))
    }

    pub async fn count_sessions(&self, caller: &Caller) -> Result<i64> {
        let count = "SELECT COUNT(*) FROM sessions WHERE tenant_id = $1";
        let (count,) = self.db.read(caller, count).bind(caller.tenant).one().await?;
        Ok(count)
    }
}

impl Export {
    /// The next bytes of the archive; `None` after its end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, NotExported> {
        let mut out = Vec::new();
        while out.len() < PORTION && !matches!(self.next, Next::Nothing) {
            self.next = match mem::replace(&mut self.next, Next::Nothing) {
                Next::Beginning { now } => self.begin(&mut out, now)?,
                Next::Sessions(listing) => self.session(&mut out, listing).await?,
                Next::Turns { session, after, through, then } if after < through => {
                    let after = self.turns(&mut out, session, (after, through)).await?;
                    Next::Turns { session, after, through, then }
                }
                Next::Turns { then, .. } => {
                    self.writer.end_session(&mut out)?;
                    Next::Sessions(then)
                }
                Next::Facts(after) => self.facts(&mut out, after).await?,
                Next::Nothing => Next::Nothing,
            };
        }
        Ok((!out.is_empty()).then_some(out))
    }

    /// The digest of every line so far but the first.
    pub fn digest(&self) -> String {
        self.writer.digest()
    }

    fn begin(&mut self, out: &mut Vec<u8>, now: Timestamp) -> Result<Next, NotExported> {
        let (of, page, next) = match &self.what {
            What::Session(id) => (Of::Session, VecDeque::from([*id]), None),
            What::User(_) => (Of::User, VecDeque::new(), Some((false, None))),
            What::Tenant => (Of::Tenant, VecDeque::new(), Some((false, None))),
            What::Stated => (Of::Tenant, VecDeque::new(), None),
        };
        self.writer.begin(out, of, now)?;
        Ok(Next::Sessions(Listing { page, next }))
    }

    /// Writes the line of the next session.
    async fn session(&mut self, out: &mut Vec<u8>, mut listing: Listing) -> Result<Next, NotExported> {
        while listing.page.is_empty() {
            let Some((temporary, after)) = listing.next else { return Ok(Next::Facts(None)) };
            let user = if let What::User(user) = &self.what { Some(user.clone()) } else { None };
            let filter = SessionFilter { user, temporary, ..SessionFilter::default() };
            let order = (SessionOrder::CreatedAt, Direction::Asc);
            let now = Timestamp::from_millis(0);
            let page = self.store.sessions(&self.caller, &filter, order, after, PAGE, now).await?;
            listing.page = page.items.iter().map(|session| session.id).collect();
            listing.next = match page.next {
                Some(next) => Some((temporary, Some(next))),
                None => (!temporary).then_some((true, None)),
            };
        }
        let Some(id) = listing.page.pop_front() else { return Ok(Next::Sessions(listing)) };
        let row = self
            .store
            .db
            .read(
                &self.caller,
                "SELECT s.session_id, s.user_id, s.title, s.metadata, s.system_prompt, s.temporary, s.ttl_seconds, \
                     s.created_at, s.last_activity, s.expires_at, s.ended_at, s.completed_turns, \
                     s.forked_from_session, s.forked_from_turn, m.verbosity, m.tone, m.depth, m.verbosity_turn, \
                     m.tone_turn, m.depth_turn, m.working_memory, m.summary, m.summary_through, m.updated_at, \
                     COALESCE(s.running_turn - 1, s.last_turn) AS through \
                 FROM sessions s JOIN session_memory m ON m.session_id = s.session_id AND m.tenant_id = s.tenant_id \
                 WHERE s.session_id = $1 AND s.tenant_id = $2",
            )
            .bind(id)
            .bind(self.caller.tenant);
        match (row.optional::<SessionRow>().await?, &self.what) {
            (Some(SessionRow { session, memory, through }), _) => {
                self.writer.session(out, &ArchivedSession { session, memory }, through)?;
                self.through = through;
                Ok(Next::Turns { session: id, after: 0, through, then: listing })
            }
            (None, What::Session(_)) => Err(NotExported::Gone(id)),
            // Deleted since it was listed, as if that had been before.
            (None, _) => Ok(Next::Sessions(listing)),
        }
    }

    /// Writes a page of turns; the last one's number. As many as are `BYTES` long together, but one at least.
    async fn turns(
        &mut self,
        out: &mut Vec<u8>,
        session: SessionId,
        (after, through): (i64, i64),
    ) -> Result<i64, NotExported> {
        let page = self
            .store
            .db
            .read(
                &self.caller,
                "SELECT session_id, turn, status, message, response, error_code, error_message, model, \
                     prompt_tokens, completion_tokens, total_tokens, execution_us, request_id, metadata, created_at, \
                     completed_at \
                 FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn > $3 AND turn <= ( \
                     SELECT MAX(turn) FROM (SELECT turn, SUM(bytes) OVER (ORDER BY turn) - bytes AS before FROM ( \
                         SELECT turn, octet_length(message) + COALESCE(octet_length(response), 0) AS bytes FROM turns \
                         WHERE session_id = $1 AND tenant_id = $2 AND turn > $3 AND turn <= $4 \
                         ORDER BY turn LIMIT $5) next) sums WHERE before < $6) \
                     AND EXISTS (SELECT 1 FROM sessions s WHERE s.session_id = $1 AND s.tenant_id = $2) \
                 ORDER BY turn",
            )
            .bind(session)
            .bind(self.caller.tenant)
            .bind(after)
            .bind(through)
            .bind(rows(ROWS))
            .bind(rows(BYTES));
        let mut last = after;
        for turn in page.all::<Turn>().await? {
            last += 1;
            // Turns have no gaps, unless they are being removed.
            if turn.turn != last {
                return Err(NotExported::Gone(session));
            }
            self.writer.turn(out, turn)?;
        }
        if last == after { Err(NotExported::Gone(session)) } else { Ok(last) }
    }

    /// Writes a page of facts, or the end after the last.
    async fn facts(&mut self, out: &mut Vec<u8>, after: Option<FactKey>) -> Result<Next, NotExported> {
        let page = self
            .store
            .db
            .read(&self.caller, "SELECT user_id, key, value, session_id, turn, updated_at FROM facts");
        let page = page.push(" WHERE tenant_id = ").push_bind(self.caller.tenant);
        let page = match &self.what {
            What::Session(id) => {
                let page = page.push(" AND session_id = ").push_bind(*id);
                page.push(" AND turn <= ").push_bind(self.through)
            }
            What::User(user) => page.push(" AND user_id = ").push_bind(user),
            What::Tenant => page,
            What::Stated => page.push(" AND session_id = ").push_bind(0_i64),
        };
        let page = match after {
            Some((user, key, session, turn)) => {
                let page = page.push(" AND (user_id, key, session_id, turn) > (").push_bind(user);
                let page = page.push(", ").push_bind(key).push(", ").push_bind(session);
                page.push(", ").push_bind(turn).push(")")
            }
            None => page,
        };
        let page = page.push(" ORDER BY user_id, key, session_id, turn LIMIT ").push_bind(rows(PAGE));
        let page: Vec<FactRow> = page.all().await?;
        let Some(last) = page.last() else {
            self.writer.end(out)?;
            return Ok(Next::Nothing);
        };
        let last = (last.user_id.as_str().to_owned(), last.key.clone(), last.session_id, last.turn);
        for row in page {
            self.writer.fact(out, row.into_fact()?)?;
        }
        Ok(Next::Facts(Some(last)))
    }
}

impl FactRow {
    fn into_fact(self) -> Result<ArchivedFact, sqlx::Error> {
        let source = (self.turn > 0).then_some((SessionId::from_number(self.session_id), self.turn));
        Ok(ArchivedFact {
            user_id: self.user_id,
            key: self.key,
            value: serde_json::from_str(&self.value).map_err(|error| sqlx::Error::Decode(error.into()))?,
            session_id: source.map(|(session, _)| session),
            turn: source.map(|(_, turn)| turn),
            updated_at: self.updated_at,
        })
    }
}

/// A number of rows or bytes, as the database counts them.
fn rows(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// What an import has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Imported {
    pub sessions: i64,
    pub turns: i64,
    pub facts: i64,
    /// Sessions that were there already, and stay as they are.
    pub skipped_sessions: i64,
}

/// Why an import stopped.
#[derive(Debug, thiserror::Error)]
pub enum NotImported {
    #[error(transparent)]
    Bad(#[from] Bad),
    #[error(
        "{session} is being imported already; if that import is gone, try again in {} seconds", .wait.as_secs()
    )]
    Busy { session: SessionId, wait: Duration },
    #[error("the import was held up for so long that what was written of {0} was removed; run it again")]
    Late(SessionId),
    #[error("the user {} was erased while the import ran; run it again if they are to come back", .0.as_str())]
    Erased(UserId),
    #[error("the archive holds what is {}'s, for whom this key does not speak", .0.as_str())]
    Foreign(UserId),
    #[error(transparent)]
    Store(#[from] Error),
}

impl From<sqlx::Error> for NotImported {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(error.into())
    }
}

/// An archive that is being written to the database. Holds a batch of it at most.
pub struct Import {
    store: Store,
    caller: Caller,
    /// By the database's clock.
    began: Timestamp,
    reader: Reader,
    open: Option<Open>,
    facts: Vec<ArchivedFact>,
    imported: Imported,
}

/// The session that is being read.
struct Open {
    session: ArchivedSession,
    /// It was there already: nothing of it is written.
    skipped: bool,
    /// Until when what is written of it is left alone, if anything is.
    until: Option<Timestamp>,
    heard: Instant,
    /// The next batch.
    turns: Vec<Turn>,
    entries: Vec<Entry>,
    bytes: usize,
    /// Of what came so far.
    last_turn: i64,
    completed: i64,
    deleted: i64,
}

impl Store {
    /// Begins to take an archive in, for the caller's tenant; of a caller who is bound to a user, only that user's.
    pub async fn import(&self, caller: &Caller) -> Result<Import> {
        Ok(Import {
            store: self.clone(),
            caller: caller.clone(),
            began: self.clock().await?,
            reader: Reader::default(),
            open: None,
            facts: Vec::new(),
            imported: Imported::default(),
        })
    }
}

impl Import {
    /// Takes the next bytes, in any portions. After a failure only [`Import::undo`] is left.
    pub async fn feed(&mut self, bytes: &[u8]) -> Result<(), NotImported> {
        self.reader.push(bytes);
        while let Some(item) = self.reader.item()? {
            match item {
                Item::Session(session) => self.begin(*session).await?,
                Item::Turn(turn) => self.turn(*turn).await?,
                Item::SessionEnd => self.publish().await?,
                Item::Fact(fact) => {
                    self.refuse_foreign(&fact.user_id)?;
                    self.facts.push(fact);
                    if self.facts.len() >= PAGE {
                        self.write_facts().await?;
                    }
                }
            }
        }
        // Bytes may come so slowly that no batch is full in time.
        match &self.open {
            Some(open) if open.until.is_some() && open.heard.elapsed() > HEARD => self.write_turns().await,
            _ => Ok(()),
        }
    }

    /// Ends the import, if the archive was whole.
    pub async fn finish(&mut self) -> Result<Imported, NotImported> {
        self.reader.finish()?;
        self.write_facts().await?;
        Ok(self.imported)
    }

    /// Removes what was written of a session that is not whole. Sessions that are stay.
    pub async fn undo(&mut self) -> Result<()> {
        let Some(Open { session, until: Some(until), .. }) = self.open.take() else { return Ok(()) };
        let mut tx = self.store.db.begin(&self.caller).await?;
        let own = is_staged(&mut tx, (self.caller.tenant, session.session.id), until).await?;
        tx.rollback().await?;
        if own {
            self.store.erase(session.session.id, self.caller.tenant).await?;
        }
        Ok(())
    }

    fn refuse_foreign(&self, user: &UserId) -> Result<(), NotImported> {
        match self.caller.may_see(user) {
            true => Ok(()),
            false => Err(NotImported::Foreign(user.clone())),
        }
    }

    /// How much of the archive has been read.
    pub fn counts(&self) -> Counts {
        self.reader.counts()
    }

    async fn begin(&mut self, session: ArchivedSession) -> Result<(), NotImported> {
        self.refuse_foreign(&session.session.user_id)?;
        let skipped =
            self.store.session(&Caller::of(self.caller.tenant), session.session.id).await?.is_some();
        self.open = Some(Open {
            session,
            skipped,
            until: None,
            heard: Instant::now(),
            turns: Vec::new(),
            entries: Vec::new(),
            bytes: 0,
            last_turn: 0,
            completed: 0,
            deleted: 0,
        });
        Ok(())
    }

    async fn turn(&mut self, turn: Turn) -> Result<(), NotImported> {
        let Some(open) = self.open.as_mut().filter(|open| !open.skipped) else { return Ok(()) };
        open.last_turn = turn.turn;
        open.completed += i64::from(turn.status == TurnStatus::Completed);
        open.deleted += i64::from(turn.status == TurnStatus::Deleted);
        let response = turn.response.as_deref().unwrap_or_default();
        if turn.status == TurnStatus::Completed {
            open.entries.push(Entry::new(turn.turn, turn.created_at, [&turn.message, response]));
        }
        open.bytes += turn.message.len() + response.len();
        open.turns.push(turn);
        if open.turns.len() >= ROWS || open.bytes >= BYTES {
            self.write_turns().await?;
        }
        Ok(())
    }

    /// Writes a batch out of sight, and says that more will come.
    async fn write_turns(&mut self) -> Result<(), NotImported> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if let Some(mut tx) = open.begin_batch(&self.store, self.caller.tenant).await? {
            let until = tx.clock().await? + STAGED;
            stage(&mut tx, (self.caller.tenant, open.session.session.id), until).await?;
            open.write(&mut tx, self.caller.tenant).await?;
            tx.commit().await?;
            open.until = Some(until);
        }
        Ok(())
    }

    /// Writes the last batch and makes the session findable.
    async fn publish(&mut self) -> Result<(), NotImported> {
        let Some(open) = &mut self.open else { return Ok(()) };
        if let Some(mut tx) = open.begin_batch(&self.store, self.caller.tenant).await? {
            let session = &open.session.session;
            refuse_erased(&mut tx, (self.caller.tenant, &session.user_id), self.began).await?;
            if !unstage(&mut tx, (self.caller.tenant, session.id)).await? {
                return Err(NotImported::Late(session.id));
            }
            open.write(&mut tx, self.caller.tenant).await?;
            open.insert_session(&mut tx, self.caller.tenant).await?;
            tx.commit().await?;
            self.imported.sessions += 1;
            self.imported.turns += open.last_turn;
        }
        self.imported.skipped_sessions += i64::from(open.skipped);
        self.open = None;
        Ok(())
    }

    /// Writes facts whose source is there, and which are not known yet.
    async fn write_facts(&mut self) -> Result<(), NotImported> {
        let facts = mem::take(&mut self.facts);
        if facts.is_empty() {
            return Ok(());
        }
        let mut tx = self.store.db.begin(&self.caller).await?;
        // Before any row is locked, as whoever erases a user does it.
        let users: HashSet<&UserId> = facts.iter().map(|fact| &fact.user_id).collect();
        for user in users {
            refuse_erased(&mut tx, (self.caller.tenant, user), self.began).await?;
        }
        // Rows are locked in one order everywhere. Whoever deletes a session waits, and removes these too.
        let sources: BTreeSet<SessionId> = facts.iter().filter_map(|fact| fact.session_id).collect();
        for source in sources {
            let lock = "SELECT last_turn FROM sessions WHERE session_id = $1 AND tenant_id = $2";
            let lock = tx.sql(lock).push_each("", " FOR SHARE").bind(source).bind(self.caller.tenant);
            lock.optional::<(i64,)>().await?;
        }
        let mut written = 0;
        for fact in facts {
            written += tx
                .sql(
                    "INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) \
                     SELECT o.tenant_id, $2, $3, $4, $5, $6, $7 FROM tenants o WHERE o.tenant_id = $1 \
                         AND ($5 = 0 OR EXISTS (SELECT 1 FROM sessions s \
                             JOIN turns t ON t.session_id = s.session_id AND t.tenant_id = s.tenant_id \
                             WHERE s.session_id = $4 AND s.tenant_id = $1 AND s.user_id = $2 AND t.turn = $5 \
                                 AND t.status = 'completed')) \
                         AND (EXISTS (SELECT 1 FROM facts WHERE tenant_id = $1 AND user_id = $2 AND key = $3) \
                             OR (SELECT COUNT(DISTINCT key) FROM facts WHERE tenant_id = $1 AND user_id = $2) < $8) \
                     ON CONFLICT (tenant_id, user_id, key, session_id, turn) DO NOTHING",
                )
                .bind(self.caller.tenant)
                .bind(&fact.user_id)
                .bind(fact.key)
                .bind(fact.session_id.map_or(0, SessionId::number))
                .bind(fact.turn.unwrap_or(0))
                .bind(fact.updated_at)
                .bind(fact.value.to_string())
                .bind(MAX_FACTS)
                .run()
                .await?;
        }
        tx.commit().await?;
        self.imported.facts += i64::try_from(written).unwrap_or(i64::MAX);
        Ok(())
    }
}

impl Open {
    /// Begins a transaction in which the session is ours to write. `None` if it is not to be written, since it is there
    /// already.
    async fn begin_batch(&mut self, store: &Store, tenant: TenantId) -> Result<Option<Tx>, NotImported> {
        let session = self.session.session.id;
        while !self.skipped {
            let mut tx = store.db.begin(tenant).await?;
            let now = tx.clock().await?;
            if let Some(until) = self.until {
                if is_staged(&mut tx, (tenant, session), until).await? {
                    return Ok(Some(tx));
                }
                tx.rollback().await?;
                // What is left of it is no longer ours.
                self.until = None;
                return Err(NotImported::Late(session));
            }
            if stage_first(&mut tx, (tenant, session), now + STAGED).await? {
                // After the mark is set: who makes the session findable takes theirs away first.
                let there = "SELECT EXISTS (SELECT 1 FROM sessions WHERE session_id = $1 AND tenant_id = $2)";
                let (there,): (bool,) = tx.sql(there).bind(session).bind(tenant).one().await?;
                if !there {
                    return Ok(Some(tx));
                }
                tx.rollback().await?;
                self.skipped = true;
                break;
            }
            let mark = "SELECT created_at FROM erasures WHERE session_id = $1 AND tenant_id = $2";
            let mark = tx.sql(mark).bind(session).bind(tenant).optional::<(Timestamp,)>().await?;
            tx.rollback().await?;
            match mark {
                Some((until,)) if until > now => {
                    let wait = until.as_millis() - now.as_millis();
                    let wait = Duration::from_millis(u64::try_from(wait).unwrap_or(0));
                    return Err(NotImported::Busy { session, wait });
                }
                // Deleted, or left by an import that broke off.
                Some(_) => drop(store.erase(session, tenant).await?),
                None => {}
            }
        }
        Ok(None)
    }

    /// Writes the present batch.
    async fn write(&mut self, tx: &mut Tx, tenant: TenantId) -> Result<()> {
        insert_ended(tx, tenant, &self.turns).await?;
        self.turns.clear();
        let Session { id, user_id, .. } = &self.session.session;
        let placed = |entry| Placed { tenant, user: user_id, session: *id, entry };
        if let Some(index) = search::index(tx, &self.entries.iter().map(placed).collect::<Vec<_>>()) {
            index.run().await?;
        }
        self.entries.clear();
        (self.bytes, self.heard) = (0, Instant::now());
        Ok(())
    }

    async fn insert_session(&self, tx: &mut Tx, tenant: TenantId) -> Result<()> {
        let ArchivedSession { session, memory } = &self.session;
        // Turns that were deleted may have been completed.
        let completed_turns = session.completed_turns.clamp(self.completed, self.completed + self.deleted);
        let erased_turns = completed_turns - self.completed;
        let session = Session { completed_turns, ..session.clone() };
        let id = session.id;
        let insert = InsertSession { tenant, session, last_turn: self.last_turn, remember: None };
        InsertSession::insert(&[&insert], tx).run().await?;
        let erased = "UPDATE sessions SET erased_turns = $3 WHERE session_id = $1 AND tenant_id = $2";
        tx.sql(erased).bind(id).bind(tenant).bind(erased_turns).run().await?;
        tx.sql(
            "UPDATE session_memory SET verbosity = $3, tone = $4, depth = $5, verbosity_turn = $6, tone_turn = $7, \
                 depth_turn = $8, working_memory = $9, summary = $10, summary_through = $11, summary_tokens = $12, \
                 updated_at = $13 WHERE session_id = $1 AND tenant_id = $2",
        )
        .bind(id)
        .bind(tenant)
        .bind(memory.behavior_profile.verbosity)
        .bind(memory.behavior_profile.tone)
        .bind(memory.behavior_profile.depth)
        .bind(memory.profile_turns.verbosity)
        .bind(memory.profile_turns.tone)
        .bind(memory.profile_turns.depth)
        .bind(memory.working_memory.to_text())
        .bind(memory.summary.clone())
        .bind(memory.summary_through)
        .bind(memory.summary.as_deref().map_or(0, tokens::count))
        .bind(memory.updated_at)
        .run()
        .await?;
        Ok(())
    }
}

/// Refuses to write for a user who has been erased since `began`. Nobody is erased before the transaction ends.
async fn refuse_erased(
    tx: &mut Tx,
    (tenant, user): (TenantId, &UserId),
    began: Timestamp,
) -> Result<(), NotImported> {
    if tx.kind() == Kind::Postgres {
        // Whoever erases writes to this table first. They wait and then see what was written here, or are waited for.
        tx.sql("LOCK TABLE user_erasures IN SHARE MODE").run().await?;
    }
    let erased = "SELECT EXISTS (SELECT 1 FROM user_erasures WHERE tenant_id = $1 AND user_digest = $2 \
         AND erased_at >= $3)";
    let erased = tx.sql(erased).bind(tenant).bind(digest(&[user.as_str()])).bind(began);
    match erased.one().await? {
        (true,) => Err(NotImported::Erased(user.clone())),
        (false,) => Ok(()),
    }
}
