//! Sessions at rest.

use serde_json::{Map, Value};

use super::{
    Kind, Result, Store,
    db::{Column, Db, POSTGRES_NOW, Reach, Statement, Tx},
    idempotency::Claim,
    reader::{Read, placed},
    writer::Write,
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::SessionId,
    page::{Direction, Page, Position},
    session::{IfMatch, Session, SystemPrompt, Title, TtlSeconds, UserId},
};

/// Columns are named: a cached `SELECT *` breaks when a migration adds one under a running server.
macro_rules! columns {
    () => {
        "session_id, user_id, title, metadata, system_prompt, temporary, ttl_seconds, created_at, last_activity, \
         expires_at, ended_at, completed_turns, forked_from_session, forked_from_turn FROM "
    };
}
pub(super) const SESSIONS: &str = concat!("SELECT ", columns!(), "sessions");

/// Narrows to sessions whose metadata has every key of `$3`, a JSON object, with an equal value.
///
/// Equality is of JSON values on both databases: the order of keys, and `1` against `1.0`, do not matter. SQLite
/// compares key by key, and what is nested as flattened trees, both ways; Postgres compares `jsonb`, once its index
/// has found what contains `$3`.
const WITH_METADATA: [&str; 2] = [
    " AND NOT EXISTS (SELECT 1 FROM json_each($3) w WHERE NOT EXISTS ( \
         SELECT 1 FROM json_each(metadata) s WHERE s.key = w.key AND CASE \
         WHEN w.type IN ('integer', 'real') THEN s.type IN ('integer', 'real') AND s.atom = w.atom \
         WHEN w.type NOT IN ('object', 'array') OR s.type <> w.type THEN s.type = w.type AND s.atom IS w.atom \
         ELSE NOT EXISTS ( \
             SELECT fullkey, replace(type, 'real', 'integer'), atom FROM json_tree(w.value) \
             EXCEPT SELECT fullkey, replace(type, 'real', 'integer'), atom FROM json_tree(s.value)) \
         AND NOT EXISTS ( \
             SELECT fullkey, replace(type, 'real', 'integer'), atom FROM json_tree(s.value) \
             EXCEPT SELECT fullkey, replace(type, 'real', 'integer'), atom FROM json_tree(w.value)) \
         END))",
    " AND metadata::jsonb @> $3::jsonb AND NOT EXISTS ( \
         SELECT 1 FROM jsonb_each($3::jsonb) w WHERE metadata::jsonb -> w.key IS DISTINCT FROM w.value)",
];

/// A condition for sessions, to which the time and a parenthesis are added where it is one at a time.
struct State {
    condition: &'static str,
    at_a_time: bool,
}

const ANY: State = State { condition: "", at_a_time: false };
const ACTIVE: State =
    State { condition: " AND ended_at IS NULL AND (expires_at IS NULL OR expires_at > ", at_a_time: true };
const ENDED: State = State { condition: " AND ended_at IS NOT NULL", at_a_time: false };
const EXPIRED: State = State { condition: " AND ended_at IS NULL AND (expires_at <= ", at_a_time: true };

/// What a listing is ordered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionOrder {
    LastActivity,
    CreatedAt,
}

/// Which sessions to list; what is absent does not narrow.
#[derive(Clone, Debug, Default)]
pub struct SessionFilter {
    pub user: Option<UserId>,
    pub is_active: Option<bool>,
    pub temporary: bool,
    /// Every key given must be there with an equal value.
    pub metadata: Map<String, Value>,
}

/// What to change about a session; `None` leaves as is, `Some(None)` clears.
#[derive(Clone, Debug, Default)]
pub struct SessionPatch {
    pub title: Option<Option<Title>>,
    pub system_prompt: Option<Option<SystemPrompt>>,
    pub ttl_seconds: Option<Option<TtlSeconds>>,
    /// A merge patch (RFC 7396).
    pub metadata: Option<Map<String, Value>>,
    pub is_active: Option<bool>,
}

/// Why a session was not changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NotUpdated {
    Unknown,
    /// It is not as the caller thought.
    Changed,
    /// The patch does not fit: what to mend about the metadata.
    Refused(String),
}

impl SessionPatch {
    /// The session after the change at `now`; fails, with what to mend, if its metadata has grown too large.
    fn apply(self, mut session: Session, now: Timestamp) -> Result<Session, String> {
        if let Some(title) = self.title {
            session.title = title;
        }
        if let Some(system_prompt) = self.system_prompt {
            session.system_prompt = system_prompt;
        }
        if let Some(patch) = self.metadata {
            session.metadata = session.metadata.merged(&patch)?;
        }
        let was_active = session.is_active(now);
        let ttl = self.ttl_seconds.unwrap_or(session.ttl_seconds);
        session = session.with_ttl(ttl);
        match self.is_active {
            Some(false) => session.ended_at = session.ended_at.or(Some(now)),
            // Also if it is the new time to live that has just run out.
            Some(true) if !was_active || !session.is_active(now) => {
                session.ended_at = None;
                session.last_activity = session.last_activity.max(now);
                session = session.with_ttl(ttl);
            }
            _ => {}
        }
        Ok(session)
    }
}

impl Store {
    /// Keeps a new session with its memory, and the answer that is to be remembered.
    pub async fn insert_session(
        &self,
        caller: &Caller,
        session: Session,
        remember: Option<(Claim, String)>,
    ) -> Result<()> {
        self.writer.write(InsertSession { tenant: caller.tenant, session, last_turn: 0, remember }).await
    }

    pub async fn session(&self, caller: &Caller, id: SessionId) -> Result<Option<Session>> {
        Ok(self.session_and_memory(caller, id).await?.map(|(session, _)| session))
    }

    /// A session, and whether its working memory, profile and summary have their place.
    pub async fn session_and_memory(
        &self,
        caller: &Caller,
        id: SessionId,
    ) -> Result<Option<(Session, bool)>> {
        let found = self.sessions.read(ReadSession { caller: caller.clone(), id }).await?;
        Ok(found.map(|Found { session, has_memory }| (session, has_memory)))
    }

    /// A page of sessions that starts after `after`, at most `limit` of them.
    pub async fn sessions<'c>(
        &'c self,
        caller: &Caller,
        filter: &SessionFilter,
        (order, direction): (SessionOrder, Direction),
        after: Option<Position>,
        limit: usize,
        now: Timestamp,
    ) -> Result<Page<Session>> {
        let (beyond, sorted) = direction.sql();
        let (column, keys): (_, fn(&Session) -> Timestamp) = match order {
            SessionOrder::LastActivity => ("last_activity", |session| session.last_activity),
            SessionOrder::CreatedAt => ("created_at", |session| session.created_at),
        };
        // One more than asked for tells whether another page follows.
        let limited = i64::try_from(limit + 1).unwrap_or(i64::MAX);
        let part = |page: Statement<'c>, state: State| {
            let mut page =
                page.push(SESSIONS).push(" WHERE tenant_id = $1 AND temporary = $2").push(state.condition);
            if state.at_a_time {
                page = page.push_bind(now).push(")");
            }
            if !filter.metadata.is_empty() {
                let [sqlite, postgres] = WITH_METADATA;
                page = page.push_each(sqlite, postgres);
            }
            for user in [&filter.user, &caller.user] {
                page = page.push_some(" AND user_id = ", user.as_ref());
            }
            if let Some(after) = after {
                page = page.push(" AND (").push(column).push(", session_id)").push(beyond).push("(");
                page = page.push_bind(after.key).push(", ").push_bind(after.id).push(")");
            }
            page = page.push(" ORDER BY ").push(column).push(sorted).push(", session_id").push(sorted);
            page.push(" LIMIT ").push_bind(limited)
        };
        let mut page = self.db.read(caller, "").bind(caller.tenant).bind(filter.temporary);
        if !filter.metadata.is_empty() {
            page = page.bind(Value::Object(filter.metadata.clone()).to_string());
        }
        page = match filter.is_active {
            None => part(page, ANY),
            Some(true) => part(page, ACTIVE),
            // Each has an index of its own; there may be few among very many that are active.
            Some(false) => {
                page = part(page.push("SELECT * FROM ("), ENDED).push(") e UNION ALL SELECT * FROM (");
                page = part(page, EXPIRED).push(") x ORDER BY ").push(column).push(sorted);
                page.push(", session_id").push(sorted).push(" LIMIT ").push_bind(limited)
            }
        };
        let rows = page.all().await?;
        let position =
            |session: &Session| Position { key: keys(session).as_millis(), id: session.id.number() };
        Ok(Page::cut(rows, limit, position))
    }

    /// The user's newest session that is active at `now` and not temporary.
    pub async fn newest_session(
        &self,
        caller: &Caller,
        user: &UserId,
        now: Timestamp,
    ) -> Result<Option<Session>> {
        if !caller.may_see(user) {
            return Ok(None);
        }
        let newest = self.db.read(caller, SESSIONS).push(" WHERE tenant_id = ").push_bind(caller.tenant);
        let newest =
            newest.push(" AND user_id = ").push_bind(user).push(" AND temporary = ").push_bind(false);
        let newest = newest.push(ACTIVE.condition).push_bind(now).push(")");
        Ok(newest.push(" ORDER BY last_activity DESC, session_id DESC LIMIT 1").optional().await?)
    }

    /// Changes a session if it is as `if_match` says.
    pub async fn update_session(
        &self,
        caller: &Caller,
        id: SessionId,
        patch: SessionPatch,
        if_match: Option<&IfMatch>,
        now: Timestamp,
    ) -> Result<Result<Session, NotUpdated>> {
        let mut tx = self.db.begin(caller).await?;
        let row = tx.sql(SESSIONS).push(" WHERE session_id = $1 AND tenant_id = $2");
        let row = row.bind(id).bind(caller.tenant).push_some(" AND user_id = ", caller.user.as_ref());
        let row = row.push_each("", " FOR UPDATE");
        let Some(session) = row.optional::<Session>().await? else {
            tx.rollback().await?;
            return Ok(Err(NotUpdated::Unknown));
        };
        if if_match.is_some_and(|etags| !etags.match_tag(&session.etag())) {
            tx.rollback().await?;
            return Ok(Err(NotUpdated::Changed));
        }
        let session = match patch.apply(session, now) {
            Ok(session) => session,
            Err(refusal) => {
                tx.rollback().await?;
                return Ok(Err(NotUpdated::Refused(refusal)));
            }
        };
        tx.sql(
            "UPDATE sessions SET title = $3, system_prompt = $4, metadata = $5, ttl_seconds = $6, \
                 last_activity = $7, expires_at = $8, ended_at = $9 \
             WHERE session_id = $1 AND tenant_id = $2",
        )
        .bind(id)
        .bind(caller.tenant)
        .bind(session.title.clone())
        .bind(session.system_prompt.clone())
        .bind(session.metadata.to_text())
        .bind(session.ttl_seconds)
        .bind(session.last_activity)
        .bind(session.expires_at)
        .bind(session.ended_at)
        .run()
        .await?;
        tx.commit().await?;
        Ok(Ok(session))
    }

    /// Up to `limit` sessions of any tenant that are past their retention.
    pub async fn sessions_to_remove(
        &self,
        cutoffs: Cutoffs,
        limit: i64,
    ) -> Result<Vec<(SessionId, TenantId)>> {
        // Ended or expired, each found by an index of its own.
        let old = "SELECT session_id, tenant_id FROM sessions WHERE ended_at < $1 OR expires_at < $1 \
             OR (temporary = $3 AND (ended_at < $2 OR expires_at < $2)) LIMIT $4";
        let old = self
            .db
            .read(Reach::Everybody, old)
            .bind(cutoffs.any)
            .bind(cutoffs.temporary)
            .bind(true)
            .bind(limit);
        Ok(old.all().await?)
    }
}

/// Reads a session, if it is its caller's.
pub(super) struct ReadSession {
    caller: Caller,
    id: SessionId,
}

#[derive(sqlx::FromRow)]
pub(super) struct Found {
    #[sqlx(flatten)]
    session: Session,
    has_memory: bool,
}

impl Read for ReadSession {
    type Answer = Option<Found>;

    async fn read_all(reads: &[&Self], db: &Db) -> sqlx::Result<Vec<Option<Found>>> {
        let reach = Reach::Tenants(reads.iter().map(|read| read.caller.tenant).collect());
        let places: Vec<i64> = (0..).zip(reads).map(|(place, _)| place).collect();
        let text = concat!(
            "SELECT place, EXISTS (SELECT 1 FROM session_memory m WHERE m.session_id = id AND m.tenant_id = tenant) ",
            "AS has_memory, ",
            columns!()
        );
        let found = db.read(reach, text).push_rows([
            ("place", Column::integers(&places, |place| *place)),
            ("id", Column::integers(reads, |read| read.id)),
            ("tenant", Column::integers(reads, |read| read.caller.tenant)),
            ("caller", Column::texts(reads, |read| read.caller.user.as_ref().map(UserId::as_str))),
        ]);
        let found = found.push(
            " JOIN sessions ON session_id = id AND tenant_id = tenant AND (caller IS NULL OR user_id = caller)",
        );
        placed(found, reads.len()).await
    }
}

/// Since before when sessions must have been inactive to be removed.
#[derive(Clone, Copy, Debug)]
pub struct Cutoffs {
    pub any: Timestamp,
    /// For temporary ones.
    pub temporary: Timestamp,
}

impl Cutoffs {
    /// Whether a session is past its retention.
    pub fn are_past(&self, session: &Session) -> bool {
        let since = [session.ended_at, session.expires_at].into_iter().flatten().min();
        since.is_some_and(|since| since < self.any || (session.temporary && since < self.temporary))
    }
}

/// Writes a session and its memory.
pub(super) struct InsertSession {
    pub tenant: TenantId,
    pub session: Session,
    /// The number of its last turn, where it has some from the beginning.
    pub last_turn: i64,
    pub remember: Option<(Claim, String)>,
}

impl Write for InsertSession {
    type Answer = ();

    fn place(&self) -> (TenantId, i64) {
        (self.tenant, self.session.id.number())
    }

    async fn apply(inserts: &[&Self], tx: &mut Tx) -> Result<Vec<()>> {
        let claimed = inserts.iter().any(|insert| insert.remember.is_some());
        let insert = Self::insert(inserts, tx);
        if claimed { insert } else { insert.last() }.run().await?;
        for insert in inserts {
            if let Some((claim, answer)) = &insert.remember {
                claim.remember(tx, Some((insert.session.id, None)), 201, answer).await?;
            }
        }
        Ok(vec![(); inserts.len()])
    }
}

impl InsertSession {
    /// A statement that writes sessions and their memories.
    pub fn insert<'c>(inserts: &[&Self], tx: &'c mut Tx) -> Statement<'c> {
        let metadata: Vec<_> = inserts.iter().map(|insert| insert.session.metadata.to_text()).collect();
        tx.sql_each("", "WITH made AS (")
        .push(
            "INSERT INTO sessions (session_id, tenant_id, user_id, title, metadata, system_prompt, temporary, \
                 ttl_seconds, created_at, last_activity, expires_at, ended_at, forked_from_session, forked_from_turn, \
                 completed_turns, last_turn) \
             SELECT session_id, tenant_id, user_id, title, metadata, system_prompt, temporary <> 0, ttl_seconds, \
                 created_at, last_activity, expires_at, ended_at, forked_from_session, forked_from_turn, \
                 completed_turns, last_turn FROM ",
        )
        .push_rows([
            ("session_id", Column::integers(inserts, |insert| insert.session.id)),
            ("tenant_id", Column::integers(inserts, |insert| insert.tenant)),
            ("user_id", Column::texts(inserts, |insert| insert.session.user_id.as_str())),
            ("title", Column::texts(inserts, |insert| insert.session.title.as_ref().map(Title::as_str))),
            ("metadata", Column::texts(&metadata, String::as_str)),
            (
                "system_prompt",
                Column::texts(inserts, |insert| insert.session.system_prompt.as_ref().map(SystemPrompt::as_str)),
            ),
            ("temporary", Column::integers(inserts, |insert| insert.session.temporary)),
            ("ttl_seconds", Column::integers(inserts, |insert| insert.session.ttl_seconds)),
            ("created_at", Column::integers(inserts, |insert| insert.session.created_at)),
            ("last_activity", Column::integers(inserts, |insert| insert.session.last_activity)),
            ("expires_at", Column::integers(inserts, |insert| insert.session.expires_at)),
            ("ended_at", Column::integers(inserts, |insert| insert.session.ended_at)),
            ("forked_from_session", Column::integers(inserts, |insert| insert.session.forked_from_session)),
            ("forked_from_turn", Column::integers(inserts, |insert| insert.session.forked_from_turn)),
            ("completed_turns", Column::integers(inserts, |insert| insert.session.completed_turns)),
            ("last_turn", Column::integers(inserts, |insert| insert.last_turn)),
        ])
        .push_each("; ", ") ")
        .push("INSERT INTO session_memory (session_id, tenant_id, updated_at) SELECT session_id, tenant_id, at FROM ")
        .push_rows([
            ("session_id", Column::integers(inserts, |insert| insert.session.id)),
            ("tenant_id", Column::integers(inserts, |insert| insert.tenant)),
            ("at", Column::integers(inserts, |insert| insert.session.created_at)),
        ])
    }
}

/// Locks the rows of sessions in one order, as long as the transaction lasts. On SQLite it holds the only lock anyway.
pub(super) async fn lock(tx: &mut Tx, places: &[(TenantId, i64)]) -> Result<()> {
    if tx.kind() == Kind::Sqlite {
        return Ok(());
    }
    let locked = tx
        .sql("SELECT COUNT(*), ")
        .push(POSTGRES_NOW)
        .push(" FROM (SELECT s.session_id FROM ")
        .push_rows([
            ("tenant", Column::integers(places, |(tenant, _)| *tenant)),
            ("id", Column::integers(places, |(_, session)| *session)),
        ])
        .push(
            " JOIN sessions s ON s.session_id = rows.id AND s.tenant_id = rows.tenant \
             ORDER BY s.tenant_id, s.session_id FOR NO KEY UPDATE OF s) locked",
        );
    let (_, now): (i64, Timestamp) = locked.one().await?;
    // Which whoever writes is likely to want, too.
    tx.set_clock(now);
    Ok(())
}
