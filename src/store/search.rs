//! What turns are found by, and finding them.
//!
//! An entry is written in the transaction that completes its turn, and removed in the one that erases it. The
//! database tells which entries hold which terms (FTS5 and `tsvector`); what a term is, and which turn answers best,
//! is decided in [`crate::domain::search`], alike for both.
//!
//! In SQLite's index, turn `t` of the session with block `b` is row `b << 28 | t`. So the turns of a session that hold a
//! term stand together, in order, and are found without passing those of others.

use std::{collections::HashSet, time::Duration};

use moka::future::Cache;

use super::{
    Kind, Result, Store, context,
    db::{Column, Reach, Statement, Tx},
    decoded,
};
use crate::domain::{
    caller::TenantId,
    clock::Timestamp,
    ids::SessionId,
    search::{self, Candidate, Question, Scope},
    session::UserId,
};

/// Where counting the entries of a term ends: those that have more are equally common, and not looked for by themselves.
const COUNTED: i64 = 4096;
/// The most turns that are ranked by their rarest terms.
const RANKED: i64 = 1000;
/// The same two where turns of one session are recalled: a term in more turns tells nothing about what is meant.
const RECALLED: usize = 32;
/// The turns of a session from which on its common terms are remembered, on Postgres.
const LONG: i64 = 1_000;
/// How many common terms are remembered, and how long: some of their turns may be deleted meanwhile.
const COMMON: u64 = 20_000;
const COMMON_FOR: Duration = Duration::from_secs(60 * 60);
/// Turns of before the index that get their entries in one transaction.
const OLD_TURNS: i64 = 100;
/// Turns whose texts are read at once.
const READ_TURNS: usize = 64;

/// What to look for, and where.
#[derive(Clone, Debug)]
pub struct Search {
    pub question: Question,
    pub scope: Scope,
    /// Only this user's, whatever the scope.
    pub user: Option<UserId>,
    /// Only turns made at this time or later.
    pub from: Option<Timestamp>,
    /// Only turns made before this time.
    pub to: Option<Timestamp>,
}

impl Search {
    pub fn new(question: Question, scope: Scope) -> Self {
        Self { question, scope, user: None, from: None, to: None }
    }
}

/// A turn that was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Hit {
    pub session: SessionId,
    pub turn: i64,
    /// Whether its response answers better than its message.
    pub in_response: bool,
    pub score: f64,
}

/// A found turn as it is shown.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct Excerpt {
    pub session_id: SessionId,
    pub turn: i64,
    pub user_id: UserId,
    pub created_at: Timestamp,
    pub message: String,
    pub response: String,
    pub message_tokens: i64,
    pub response_tokens: i64,
}

/// A turn that may be older than the index: session, tenant and number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OldTurn(i64, i64, i64);

impl OldTurn {
    /// Before every turn.
    pub const FIRST: Self = Self(i64::MIN, 0, 0);
}

/// What an entry is written from.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub turn: i64,
    pub created_at: Timestamp,
    /// With spaces between.
    pub terms: String,
}

impl Entry {
    pub fn new(turn: i64, created_at: Timestamp, texts: [&str; 2]) -> Self {
        let terms: Vec<String> = search::terms(texts).iter().map(|term| search::digest(term)).collect();
        Self { turn, created_at, terms: terms.join(" ") }
    }
}

/// Whose an entry is.
pub(super) struct Placed<'a> {
    pub tenant: TenantId,
    pub user: &'a UserId,
    pub session: SessionId,
    pub entry: &'a Entry,
}

impl Placed<'_> {
    /// Its terms and the scopes it can be found in, with spaces between.
    fn terms(&self) -> String {
        let scopes = [Scope::Tenant, Scope::User(self.user.clone()), Scope::Session(self.session)];
        let scopes = scopes.map(|scope| scope.term(self.tenant)).join(" ");
        format!("{scopes} {}", self.entry.terms).trim_end().to_owned()
    }
}

/// A statement that writes entries, each of another turn; none if there are no entries.
pub(super) fn index<'c>(tx: &'c mut Tx, entries: &[Placed<'_>]) -> Option<Statement<'c>> {
    if entries.is_empty() {
        return None;
    }
    let kind = tx.kind();
    let index = push_entries(tx.sql(""), entries);
    if kind == Kind::Postgres {
        return Some(index);
    }
    let [session, tenant, _] = turns_of(entries);
    let index = index
        .push("; INSERT INTO search_blocks (session_id, tenant_id) SELECT session, tenant FROM ")
        .push_rows([session, tenant])
        .push(" WHERE true ON CONFLICT DO NOTHING");
    let index = index
        .push("; INSERT INTO search_terms (rowid, terms) SELECT place, terms FROM ")
        .push_rows(turns_of(entries))
        .push(" CROSS JOIN search_places ON session_id = session AND tenant_id = tenant AND turn = number")
        .push(IN_ITS_ORDER);
    Some(index)
}

/// Appends what inserts entries; Postgres keeps its index of their terms itself.
pub(super) fn push_entries<'c>(statement: Statement<'c>, entries: &[Placed<'_>]) -> Statement<'c> {
    let terms: Vec<_> = entries.iter().map(Placed::terms).collect();
    let [session, tenant, number] = turns_of(entries);
    statement
        .push(
            "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) \
             SELECT session, tenant, number, made_at, ",
        )
        .push_each("terms", "array_to_tsvector(string_to_array(terms, ' '))")
        .push(" FROM ")
        .push_rows([
            session,
            tenant,
            number,
            ("made_at", Column::integers(entries, |placed| placed.entry.created_at)),
            ("terms", Column::texts(&terms, String::as_str)),
        ])
}

fn turns_of<'a>(entries: &[Placed<'_>]) -> [(&'static str, Column<'a>); 3] {
    [
        ("session", Column::integers(entries, |placed| placed.session)),
        ("tenant", Column::integers(entries, |placed| placed.tenant)),
        ("number", Column::integers(entries, |placed| placed.entry.turn)),
    ]
}

/// SQLite's index writes out what it holds in memory whenever a lower row follows.
const IN_ITS_ORDER: &str = " ORDER BY place";

/// Puts the entries of a range of turns into SQLite's index; Postgres keeps its own.
pub(super) async fn index_terms(
    tx: &mut Tx,
    (tenant, session): (TenantId, SessionId),
    (first, last): (i64, i64),
) -> Result<()> {
    if tx.kind() == Kind::Sqlite {
        let block =
            "INSERT INTO search_blocks (session_id, tenant_id) VALUES ($1, $2) ON CONFLICT DO NOTHING";
        tx.sql(block).bind(session).bind(tenant).run().await?;
        tx.sql(
            "INSERT INTO search_terms (rowid, terms) SELECT place, terms FROM search_places \
             WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $3 AND $4",
        )
        .push(IN_ITS_ORDER)
        .bind(session)
        .bind(tenant)
        .bind(first)
        .bind(last)
        .run()
        .await?;
    }
    Ok(())
}

/// Removes the entries of a range of turns.
pub(super) async fn unindex(
    tx: &mut Tx,
    (tenant, session): (TenantId, SessionId),
    (first, last): (i64, i64),
) -> Result<u64> {
    if tx.kind() == Kind::Sqlite {
        // The index does not hold its terms by entry: it has to be told what to remove.
        tx.sql(
            "INSERT INTO search_terms (search_terms, rowid, terms) SELECT 'delete', place, terms FROM search_places \
             WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $3 AND $4 ORDER BY turn",
        )
        .bind(session)
        .bind(tenant)
        .bind(first)
        .bind(last)
        .run()
        .await?;
    }
    let delete =
        "DELETE FROM search_entries WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $3 AND $4";
    Ok(tx.sql(delete).bind(session).bind(tenant).bind(first).bind(last).run().await?)
}

/// Gives a session's place in SQLite's index back, once nothing of it is left there.
pub(super) async fn forget_block(tx: &mut Tx, (tenant, session): (TenantId, SessionId)) -> Result<()> {
    if tx.kind() == Kind::Sqlite {
        let forget = "DELETE FROM search_blocks WHERE session_id = $1 AND tenant_id = $2";
        tx.sql(forget).bind(session).bind(tenant).run().await?;
    }
    Ok(())
}

/// Terms that more turns of a long session hold than are looked at, each with its session.
pub(super) type Common = Cache<String, ()>;

pub(super) fn common() -> Common {
    Cache::builder().max_capacity(COMMON).time_to_live(COMMON_FOR).build()
}

impl Store {
    /// The turns that are found, best first; none if nothing can be looked for.
    pub async fn search(&self, tenant: TenantId, search: &Search) -> Result<Vec<Hit>> {
        if search.question.terms().is_empty() {
            return Ok(Vec::new());
        }
        let (texts, found) = self.count_entries(tenant, search).await?;
        let places = self.candidates(tenant, search, &found).await?;
        let rarity = search::rarity(texts, &found);
        let mut candidates = Vec::with_capacity(2 * places.len());
        for places in places.chunks(READ_TURNS) {
            for excerpt in self.excerpts(tenant, places).await? {
                if search.user.as_ref().is_none_or(|user| *user == excerpt.user_id) {
                    let place = (excerpt.session_id.number(), excerpt.turn);
                    let message = (excerpt.message.as_str(), excerpt.message_tokens);
                    let response = (excerpt.response.as_str(), excerpt.response_tokens);
                    candidates.extend(candidates_of(&search.question, place, [message, response]));
                }
            }
        }
        candidates.sort_by_key(|candidate| candidate.place);
        Ok(best_first(&candidates, &search::score(&candidates, &rarity)))
    }

    /// The turns of a session before turn `before` that bear on a question, and those next to them, best first; some of
    /// the latter may not be there. `all_turns` are the completed turns of the session. What is read does not grow with
    /// them.
    pub async fn bearing_turns(
        &self,
        (tenant, session): (TenantId, SessionId),
        question: &Question,
        before: i64,
        all_turns: i64,
    ) -> Result<Vec<i64>> {
        if question.terms().is_empty() {
            return Ok(Vec::new());
        }
        let holding = self.holding_turns((tenant, session), question, all_turns).await?;
        let mut rarest: Vec<_> =
            holding.iter().filter(|turns| (1..=RECALLED).contains(&turns.len())).collect();
        rarest.sort_by_key(|turns| turns.len());
        let mut ranked = 0;
        let rarest = rarest.into_iter().take_while(|turns| {
            ranked += turns.len();
            ranked <= RECALLED
        });
        let turns: HashSet<i64> = rarest.flatten().copied().filter(|turn| *turn < before).collect();
        let turns: Vec<i64> = turns.into_iter().collect();
        if turns.is_empty() {
            return Ok(Vec::new());
        }
        let mut candidates = Vec::with_capacity(4 * turns.len());
        for (turn, message, response, message_tokens, response_tokens) in
            self.beginnings(tenant, session, &turns).await?
        {
            let texts = [(message.as_str(), message_tokens), (response.as_str(), response_tokens)];
            candidates.extend(candidates_of(question, (session.number(), turn), texts));
        }
        candidates.sort_by_key(|candidate| candidate.place);
        add_neighbours(&mut candidates);
        let found: Vec<_> = holding.iter().map(|turns| count(turns.len())).collect();
        let rarity = search::rarity(all_turns.min(count(RECALLED + 1)), &found);
        let hits = best_first(&candidates, &search::score(&candidates, &rarity));
        Ok(hits.into_iter().map(|hit| hit.turn).filter(|turn| *turn < before).collect())
    }

    /// The turns of a session that hold each term of a question; of a term in more than [`RECALLED`], one more than these.
    async fn holding_turns(
        &self,
        (tenant, session): (TenantId, SessionId),
        question: &Question,
        all_turns: i64,
    ) -> Result<Vec<Vec<i64>>> {
        let scope = Scope::Session(session);
        let each = question.terms().iter().map(|term| self.matching(tenant, &scope, &[term], self.or()));
        let each: Vec<_> = each.map(|term| (self.common.contains_key(&term), term)).collect();
        let asked: Vec<_> =
            each.iter().filter(|(common, _)| !common).map(|(_, term)| term.as_str()).collect();
        let holding = self.db.read_each(
            tenant,
            "SELECT json_group_array(json((SELECT json_group_array(row & 0xfffffff) FROM (SELECT t.rowid AS row \
                 FROM search_terms t WHERE t.search_terms MATCH q.value \
                 AND t.rowid BETWEEN b.block << 28 AND (b.block << 28 | 0xfffffff) LIMIT $2)))) \
             FROM search_blocks b CROSS JOIN json_each($1) q WHERE b.session_id = $3 AND b.tenant_id = $4",
            "SELECT COALESCE(json_agg(turns ORDER BY place), '[]')::text FROM (SELECT q.place, \
                 (SELECT COALESCE(json_agg(turn), '[]') FROM (SELECT e.turn FROM search_entries e \
                 WHERE e.terms @@ q.value::tsquery LIMIT $2) found) AS turns \
             FROM jsonb_array_elements_text($1::jsonb) WITH ORDINALITY q (value, place)) holding",
        );
        let holding = holding.bind(serde_json::Value::from(asked).to_string()).bind(count(RECALLED + 1));
        let holding = match self.kind {
            Kind::Sqlite => holding.bind(session).bind(tenant),
            // Whose they are is among the terms.
            Kind::Postgres => holding,
        };
        let holding: Vec<Vec<i64>> = decoded(holding.one().await?)?;
        let (mut holding, mut all) = (holding.into_iter(), Vec::with_capacity(each.len()));
        for (common, term) in each {
            let turns = match common {
                true => vec![0; RECALLED + 1],
                // SQLite's index answers with none at all where the session is in none.
                false => holding.next().unwrap_or_default(),
            };
            // Postgres reads all turns that hold a term to tell some of them.
            if !common && turns.len() > RECALLED && all_turns > LONG && self.kind == Kind::Postgres {
                self.common.insert(term, ()).await;
            }
            all.push(turns);
        }
        Ok(all)
    }

    /// What stands in these turns of a session: number, message, response and the tokens of either, cut as
    /// [`Store::excerpts`] cuts it.
    async fn beginnings(
        &self,
        tenant: TenantId,
        session: SessionId,
        turns: &[i64],
    ) -> Result<Vec<(i64, String, String, i64, i64)>> {
        let texts = self.db.read_each(
            tenant,
            "SELECT json_group_array(json_array(turn, substr(message, 1, 20000), \
                 COALESCE(substr(response, 1, 20000), ''), message_tokens, response_tokens)) FROM turns ",
            "SELECT COALESCE(json_agg(json_build_array(turn, substr(message, 1, 20000), \
                 COALESCE(substr(response, 1, 20000), ''), message_tokens, response_tokens)), '[]')::text FROM turns ",
        );
        decoded(context::completed(texts, (tenant, session), turns).one().await?)
    }

    /// What stands in these turns, in no order; of long texts only the first 20,000 characters, which are all that
    /// counts for ranking, phrases and snippets.
    pub async fn excerpts(&self, tenant: TenantId, places: &[(SessionId, i64)]) -> Result<Vec<Excerpt>> {
        let places: Vec<_> = places.iter().map(|(session, turn)| (session.number(), *turn)).collect();
        let places = serde_json::to_string(&places).map_err(|error| sqlx::Error::Encode(error.into()))?;
        let text = self.db.read(
            tenant,
            "SELECT t.session_id, t.turn, s.user_id, t.created_at, substr(t.message, 1, 20000) AS message, \
                 COALESCE(substr(t.response, 1, 20000), '') AS response, t.message_tokens, t.response_tokens ",
        );
        let text = text.push_each(
            "FROM json_each($2) p CROSS JOIN turns t ON t.session_id = p.value ->> 0 AND t.turn = p.value ->> 1 ",
            "FROM jsonb_array_elements($2::jsonb) p JOIN turns t \
             ON t.session_id = (p.value ->> 0)::bigint AND t.turn = (p.value ->> 1)::bigint ",
        );
        let text = text.push(
            "JOIN sessions s ON s.session_id = t.session_id AND s.tenant_id = t.tenant_id \
             WHERE t.tenant_id = $1 AND t.status = 'completed'",
        );
        Ok(text.bind(tenant).bind(places).all().await?)
    }

    /// Writes entries for completed turns that have none, since they are older than the index, from `after` on; where to
    /// go on, or `None` once all have theirs, which is noted.
    pub async fn index_old_turns(&self, after: OldTurn) -> Result<Option<OldTurn>> {
        type Old = (SessionId, TenantId, i64, Timestamp, UserId, String, String);
        let mut tx = self.db.begin(Reach::Everybody).await?;
        let (version,): (i64,) = tx.sql("SELECT search_version FROM schema_info").one().await?;
        if version >= search::VERSION {
            tx.rollback().await?;
            return Ok(None);
        }
        let OldTurn(session, tenant, turn) = after;
        let old: Vec<Old> = tx
            .sql(
                "SELECT t.session_id, t.tenant_id, t.turn, t.created_at, s.user_id, t.message, \
                     COALESCE(t.response, '') FROM turns t \
                 JOIN sessions s ON s.session_id = t.session_id AND s.tenant_id = t.tenant_id \
                 WHERE (t.session_id, t.tenant_id, t.turn) > ($1, $2, $3) AND t.status = 'completed' \
                     AND NOT EXISTS (SELECT 1 FROM search_entries e WHERE e.session_id = t.session_id \
                         AND e.tenant_id = t.tenant_id AND e.turn = t.turn) \
                 ORDER BY t.session_id, t.tenant_id, t.turn LIMIT $4",
            )
            .push_each("", " FOR SHARE OF s")
            .bind(session)
            .bind(tenant)
            .bind(turn)
            .bind(OLD_TURNS)
            .all()
            .await?;
        let last =
            old.last().map(|(session, tenant, turn, ..)| OldTurn(session.number(), tenant.number(), *turn));
        for (session, tenant, turn, created_at, user, message, response) in old {
            let entry = Entry::new(turn, created_at, [&message, &response]);
            if let Some(index) = index(&mut tx, &[Placed { tenant, user: &user, session, entry: &entry }]) {
                index.run().await?;
            }
        }
        if last.is_none() {
            tx.sql("UPDATE schema_info SET search_version = $1").bind(search::VERSION).run().await?;
        }
        tx.commit().await?;
        Ok(last)
    }

    /// How many turns there are in the scope, and how many hold each term. Those that more than a limit hold are equally
    /// common.
    async fn count_entries(&self, tenant: TenantId, search: &Search) -> Result<(i64, Vec<i64>)> {
        let Search { scope, question, .. } = search;
        let each = question.terms().iter().map(|term| self.matching(tenant, scope, &[term], self.or()));
        let questions: serde_json::Value =
            [self.quoted(&scope.term(tenant))].into_iter().chain(each).collect();
        let counts = match (self.kind, scope) {
            (Kind::Sqlite, Scope::Session(session)) => self
                .db
                .read(
                    tenant,
                    "SELECT json_group_array((SELECT COUNT(*) FROM (SELECT 1 FROM search_terms t \
                         WHERE t.search_terms MATCH q.value \
                         AND t.rowid BETWEEN b.block << 28 AND (b.block << 28 | 0xfffffff) LIMIT $2))) \
                     FROM search_blocks b CROSS JOIN json_each($1) q WHERE b.session_id = $3 AND b.tenant_id = $4",
                )
                .bind(questions.to_string())
                .bind(COUNTED)
                .bind(*session)
                .bind(tenant),
            _ => self
                .db
                .read_each(
                    tenant,
                    "SELECT json_group_array((SELECT COUNT(*) FROM (SELECT 1 FROM search_terms \
                         WHERE search_terms MATCH q.value LIMIT $2))) FROM json_each($1) q",
                    "SELECT json_agg(entries ORDER BY place)::text FROM (SELECT q.place, (SELECT COUNT(*) FROM \
                         (SELECT 1 FROM search_entries WHERE terms @@ q.value::tsquery LIMIT $2) found) AS entries \
                     FROM jsonb_array_elements_text($1::jsonb) WITH ORDINALITY q (value, place)) counts",
                )
                .bind(questions.to_string())
                .bind(COUNTED),
        };
        let mut counts: Vec<i64> = decoded(counts.one().await?)?;
        // A session that nothing was said in has no place in the index.
        counts.resize(1 + question.terms().len(), 0);
        let texts = counts.remove(0);
        Ok((texts, counts))
    }

    /// The turns to rank. Where there are phrases, those with all their terms; else those with any of the rarest terms,
    /// as many as are ranked; if that leaves terms out, also those with all terms.
    async fn candidates(
        &self,
        tenant: TenantId,
        search: &Search,
        found: &[i64],
    ) -> Result<Vec<(SessionId, i64)>> {
        let required = search.question.required_terms();
        if !required.is_empty() {
            return self.places(tenant, search, &required, self.and()).await;
        }
        let terms = search.question.terms().iter().zip(found);
        let mut terms: Vec<_> = terms.filter(|(_, n)| (1..=COUNTED).contains(*n)).collect();
        terms.sort_by_key(|(_, n)| **n);
        let all: Vec<&String> = terms.iter().map(|(term, _)| *term).collect();
        // What is counted does not know of times: of a narrow range, more terms may be looked for.
        let narrowed = search.from.is_some() || search.to.is_some();
        let mut ranked = 0;
        let rare = terms.iter().enumerate().take_while(|(i, (_, n))| {
            ranked += **n;
            *i == 0 || ranked <= RANKED || narrowed
        });
        let rare: Vec<&String> = rare.map(|(_, (term, _))| *term).collect();
        let mut places = Vec::new();
        if !rare.is_empty() {
            places = self.places(tenant, search, &rare, self.or()).await?;
        }
        if rare.len() < all.len() {
            let known: HashSet<_> = places.iter().copied().collect();
            let with_all = self.places(tenant, search, &all, self.and()).await?;
            places.extend(with_all.into_iter().filter(|place| !known.contains(place)));
        }
        Ok(places)
    }

    /// The newest turns that hold these terms: any of them, or all.
    async fn places(
        &self,
        tenant: TenantId,
        search: &Search,
        terms: &[&String],
        how: &str,
    ) -> Result<Vec<(SessionId, i64)>> {
        const SQLITE: &str = "SELECT e.session_id, e.turn FROM search_terms t \
             CROSS JOIN search_blocks b ON b.block = t.rowid >> 28 \
             CROSS JOIN search_entries e ON e.session_id = b.session_id AND e.tenant_id = b.tenant_id \
                 AND e.turn = t.rowid & 0xfffffff \
             WHERE t.search_terms MATCH $1 AND e.tenant_id = $2";
        let found = self.db.read_each(
            tenant,
            SQLITE,
            "SELECT e.session_id, e.turn FROM search_entries e WHERE e.terms @@ $1::tsquery AND e.tenant_id = $2",
        );
        let found = found.bind(self.matching(tenant, &search.scope, terms, how)).bind(tenant);
        let found = match (self.kind, &search.scope) {
            (Kind::Sqlite, Scope::Session(session)) => found
                .push(" AND t.rowid BETWEEN (SELECT block << 28 FROM search_blocks WHERE tenant_id = $2 AND session_id = ")
                .push_bind(*session)
                .push(") AND (SELECT block << 28 | 0xfffffff FROM search_blocks WHERE tenant_id = $2 AND session_id = ")
                .push_bind(*session)
                .push(")"),
            _ => found,
        };
        let found = found.push_some(" AND e.created_at >= ", search.from);
        let found: Statement<'_> = found.push_some(" AND e.created_at < ", search.to);
        let found = found.push(" ORDER BY e.created_at DESC, e.session_id, e.turn DESC LIMIT ");
        Ok(found.push_bind(RANKED).all().await?)
    }

    /// Entries of a scope that hold these terms: any of them, or all. On SQLite, those of a session are told by where
    /// they stand.
    fn matching(&self, tenant: TenantId, scope: &Scope, terms: &[&String], how: &str) -> String {
        let terms: Vec<_> = terms.iter().map(|term| self.quoted(&search::digest(term))).collect();
        let terms = format!("({})", terms.join(how));
        match (self.kind, scope) {
            (Kind::Sqlite, Scope::Session(_)) => terms,
            _ => format!("{}{}{terms}", self.quoted(&scope.term(tenant)), self.and()),
        }
    }

    /// A term as both languages quote it. It holds letters and digits, so nothing in it needs more.
    fn quoted(&self, term: &str) -> String {
        match self.kind {
            Kind::Sqlite => format!("\"{term}\""),
            Kind::Postgres => format!("'{term}'"),
        }
    }

    fn and(&self) -> &'static str {
        match self.kind {
            Kind::Sqlite => " AND ",
            Kind::Postgres => " & ",
        }
    }

    fn or(&self) -> &'static str {
        match self.kind {
            Kind::Sqlite => " OR ",
            Kind::Postgres => " | ",
        }
    }
}

fn count(items: usize) -> i64 {
    i64::try_from(items).unwrap_or(i64::MAX)
}

/// What of a turn may answer a question: its message, and its response, each with its tokens. A phrase has to stand in one
/// of them.
fn candidates_of(
    question: &Question,
    (session, turn): (i64, i64),
    texts: [(&str, i64); 2],
) -> Vec<Candidate> {
    let counted = texts.map(|(text, tokens)| (question.count(text), tokens, text.is_empty()));
    let phrases = counted[0].0.phrases.iter().zip(&counted[1].0.phrases);
    if !phrases.into_iter().all(|(message, response)| *message || *response) {
        return Vec::new();
    }
    let place = |in_response| (session, turn, in_response);
    let candidates = counted.into_iter().zip([false, true]).filter(|((.., is_empty), _)| !is_empty);
    candidates
        .map(|((counts, tokens, _), in_response)| Candidate {
            place: place(in_response),
            counts: counts.terms,
            tokens,
        })
        .collect()
}

/// Adds the turns next to those that match, with nothing of their own; some may not be there.
fn add_neighbours(candidates: &mut Vec<Candidate>) {
    let known: HashSet<(i64, i64)> = candidates.iter().map(|c| (c.place.0, c.place.1)).collect();
    let beside = known.iter().flat_map(|(session, turn)| [(*session, turn - 1), (*session, turn + 1)]);
    let beside: HashSet<(i64, i64)> =
        beside.filter(|(session, turn)| *turn > 0 && !known.contains(&(*session, *turn))).collect();
    let nothing =
        |(session, turn)| Candidate { place: (session, turn, false), counts: Vec::new(), tokens: 0 };
    candidates.extend(beside.into_iter().map(nothing));
    candidates.sort_by_key(|candidate| candidate.place);
}

/// Turns by the better of their two scores; of equal ones the newer first.
fn best_first(candidates: &[Candidate], scores: &[f64]) -> Vec<Hit> {
    let mut hits: Vec<Hit> = Vec::with_capacity(candidates.len());
    for (candidate, score) in candidates.iter().zip(scores) {
        let (session, turn, in_response) = candidate.place;
        let session = SessionId::from_number(session);
        // The part that holds a word is shown, however well the other's neighbours answer.
        let score = if candidate.matches() || candidate.counts.is_empty() { *score } else { 0.0 };
        match hits.last_mut().filter(|hit| (hit.session, hit.turn) == (session, turn)) {
            Some(hit) if hit.score >= score => {}
            Some(hit) => (hit.in_response, hit.score) = (in_response, score),
            None => hits.push(Hit { session, turn, in_response, score }),
        }
    }
    hits.sort_by(|a, b| {
        b.score.total_cmp(&a.score).then_with(|| (b.turn, a.session).cmp(&(a.turn, b.session)))
    });
    hits
}
