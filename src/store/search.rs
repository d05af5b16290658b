//! What turns are found by, and finding them.
//!
//! An entry is written in the transaction that completes its turn, and removed in the one that erases it. The
//! database tells which entries hold which terms (FTS5 and `tsvector`); what a term is, and which turn answers best,
//! is decided in [`crate::domain::search`], alike for both.

use std::collections::HashSet;

use super::{
    Kind, Result, Store,
    db::{Column, Reach, Statement, Tx},
};
use crate::domain::{
    caller::TenantId,
    clock::Timestamp,
    ids::SessionId,
    search::{self, Candidate, Question, Scope},
    session::UserId,
};

/// Where counting the entries of a term ends: those that have more are equally common.
const COUNTED: i64 = 4096;
/// The most turns that are ranked by their rarest terms.
const RANKED: i64 = 1000;
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
    /// Only turns with a lower number.
    pub before_turn: Option<i64>,
    /// Terms in more turns than these are not looked for by themselves.
    pub common: i64,
    /// The most turns that are ranked by their rarest terms.
    pub ranked: i64,
    /// Whether turns next to those that match are found, too.
    pub neighbours: bool,
}

impl Search {
    pub fn new(question: Question, scope: Scope) -> Self {
        let (user, from, to, before_turn) = (None, None, None, None);
        Self {
            question,
            scope,
            user,
            from,
            to,
            before_turn,
            common: COUNTED,
            ranked: RANKED,
            neighbours: false,
        }
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

/// Writes entries, each of another turn.
pub(super) async fn index(tx: &mut Tx, entries: &[Placed<'_>]) -> Result<()> {
    if entries.is_empty() {
        return Ok(());
    }
    let terms: Vec<_> = entries.iter().map(Placed::terms).collect();
    let turn = || {
        [
            ("session", Column::integers(entries, |placed| placed.session)),
            ("tenant", Column::integers(entries, |placed| placed.tenant)),
            ("number", Column::integers(entries, |placed| placed.entry.turn)),
        ]
    };
    let [session, tenant, number] = turn();
    let created_at = ("created_at", Column::integers(entries, |placed| placed.entry.created_at));
    let terms = ("terms", Column::texts(&terms, |terms| terms.as_str()));
    tx.sql(
        "INSERT INTO search_entries (session_id, tenant_id, turn, created_at, terms) \
         SELECT session, tenant, number, created_at, ",
    )
    .push_each("terms", "array_to_tsvector(string_to_array(terms, ' '))")
    .push(" FROM ")
    .push_rows([session, tenant, number, created_at, terms])
    .run()
    .await?;
    // Postgres keeps its own index.
    if tx.kind() == Kind::Sqlite {
        tx.sql("INSERT INTO search_terms (rowid, terms) SELECT entry_id, terms FROM ")
            .push_rows(turn())
            .push(
                " CROSS JOIN search_entries ON session_id = session AND tenant_id = tenant AND turn = number",
            )
            .run()
            .await?;
    }
    Ok(())
}

/// Puts the entries of a range of turns into SQLite's index; Postgres keeps its own.
pub(super) async fn index_terms(
    tx: &mut Tx,
    (tenant, session): (TenantId, SessionId),
    (first, last): (i64, i64),
) -> Result<()> {
    if tx.kind() == Kind::Sqlite {
        tx.sql(
            "INSERT INTO search_terms (rowid, terms) SELECT entry_id, terms FROM search_entries \
             WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $3 AND $4",
        )
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
            "INSERT INTO search_terms (search_terms, rowid, terms) SELECT 'delete', entry_id, terms \
             FROM search_entries WHERE session_id = $1 AND tenant_id = $2 AND turn BETWEEN $3 AND $4",
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
                    candidates.extend(candidates_of(&search.question, &excerpt));
                }
            }
        }
        candidates.sort_by_key(|candidate| candidate.place);
        if search.neighbours {
            add_neighbours(&mut candidates);
        }
        Ok(best_first(&candidates, &search::score(&candidates, &rarity)))
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
            index(&mut tx, &[Placed { tenant, user: &user, session, entry: &entry }]).await?;
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
        let scope = search.scope.term(tenant);
        let each = search.question.terms().iter().map(|term| self.matching(&scope, &[term], self.or()));
        let questions: serde_json::Value = [self.quoted(&scope)].into_iter().chain(each).collect();
        let (counts,): (String,) = self
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
            .bind(COUNTED.min(search.common + 1))
            .one()
            .await?;
        let mut counts: Vec<i64> =
            serde_json::from_str(&counts).map_err(|error| sqlx::Error::Decode(error.into()))?;
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
        let scope = search.scope.term(tenant);
        let required = search.question.required_terms();
        if !required.is_empty() {
            return self.places(tenant, search, self.matching(&scope, &required, self.and())).await;
        }
        let terms = search.question.terms().iter().zip(found);
        let mut terms: Vec<_> = terms.filter(|(_, n)| (1..=search.common).contains(*n)).collect();
        terms.sort_by_key(|(_, n)| **n);
        let all: Vec<&String> = terms.iter().map(|(term, _)| *term).collect();
        // What is counted does not know of times: of a narrow range, more terms may be looked for.
        let narrowed = search.from.is_some() || search.to.is_some();
        let mut ranked = 0;
        let rare = terms.iter().enumerate().take_while(|(i, (_, n))| {
            ranked += **n;
            *i == 0 || ranked <= search.ranked || narrowed
        });
        let rare: Vec<&String> = rare.map(|(_, (term, _))| *term).collect();
        let mut places = Vec::new();
        if !rare.is_empty() {
            places = self.places(tenant, search, self.matching(&scope, &rare, self.or())).await?;
        }
        if rare.len() < all.len() {
            let known: HashSet<_> = places.iter().copied().collect();
            let with_all = self.places(tenant, search, self.matching(&scope, &all, self.and())).await?;
            places.extend(with_all.into_iter().filter(|place| !known.contains(place)));
        }
        Ok(places)
    }

    /// The newest turns that match, in the database's language for that.
    async fn places(
        &self,
        tenant: TenantId,
        search: &Search,
        matching: String,
    ) -> Result<Vec<(SessionId, i64)>> {
        let found = self.db.read_each(
            tenant,
            "SELECT e.session_id, e.turn FROM search_terms JOIN search_entries e ON e.entry_id = search_terms.rowid \
             WHERE search_terms MATCH $1 AND e.tenant_id = $2",
            "SELECT e.session_id, e.turn FROM search_entries e WHERE e.terms @@ $1::tsquery AND e.tenant_id = $2",
        );
        let found = found.bind(matching).bind(tenant);
        let found = found.push_some(" AND e.created_at >= ", search.from);
        let found = found.push_some(" AND e.created_at < ", search.to);
        let found: Statement<'_> = found.push_some(" AND e.turn < ", search.before_turn);
        let found = found.push(" ORDER BY e.created_at DESC, e.session_id, e.turn DESC LIMIT ");
        Ok(found.push_bind(search.ranked).all().await?)
    }

    /// Entries of a scope that hold these terms: any of them, or all.
    fn matching(&self, scope: &str, terms: &[&String], how: &str) -> String {
        let terms: Vec<_> = terms.iter().map(|term| self.quoted(&search::digest(term))).collect();
        format!("{}{}({})", self.quoted(scope), self.and(), terms.join(how))
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

/// What of a turn may answer a question: its message, and its response. A phrase has to stand in one of them.
fn candidates_of(question: &Question, excerpt: &Excerpt) -> Vec<Candidate> {
    let texts = [(&excerpt.message, excerpt.message_tokens), (&excerpt.response, excerpt.response_tokens)];
    let counted = texts.map(|(text, tokens)| (question.count(text), tokens, text.is_empty()));
    let phrases = counted[0].0.phrases.iter().zip(&counted[1].0.phrases);
    if !phrases.into_iter().all(|(message, response)| *message || *response) {
        return Vec::new();
    }
    let place = |in_response| (excerpt.session_id.number(), excerpt.turn, in_response);
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
