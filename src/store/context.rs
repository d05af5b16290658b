//! What a model may be shown of a session, read in one round trip as one row.

use super::{
    Result, Store, TurnKey,
    db::{Column, Db, Reach, Statement},
    decoded,
    reader::{Read, placed},
};
use crate::domain::{
    caller::{Caller, TenantId},
    ids::SessionId,
    memory::{BehaviorProfile, Fact, MAX_FACTS},
    session::UserId,
};

/// A past turn, with its tokens as counted when it was stored.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct PastTurn {
    pub turn: i64,
    pub message: String,
    pub response: String,
    pub tokens: i64,
}

/// Everything a context is assembled from, beside the message.
#[derive(Clone, Debug)]
pub struct Material {
    pub system_prompt: Option<String>,
    pub profile: BehaviorProfile,
    /// JSON text of an object.
    pub working_memory: String,
    /// What came before `turns`, in short.
    pub summary: Option<String>,
    /// The last turn that the summary covers.
    pub summary_through: Option<i64>,
    /// How often something was taken away from the session.
    pub takings: i64,
    /// One per key, the newest statement of each, in order of time.
    pub facts: Vec<Fact>,
    /// Completed turns, oldest first: as many of the newest as fit the tokens asked for.
    pub turns: Vec<PastTurn>,
    /// How many completed turns there are in all.
    pub all_turns: i64,
    /// The number of the session's next turn, if none ran.
    pub next_turn: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct Row {
    system_prompt: Option<String>,
    #[sqlx(flatten)]
    profile: BehaviorProfile,
    working_memory: String,
    summary: Option<String>,
    summary_through: Option<i64>,
    takings: i64,
    all_turns: i64,
    next_turn: Option<i64>,
    facts: String,
    turns: String,
}

/// The window sums tokens from the newest turn back, with 8 for the frames of a turn's two messages, of 1000 turns at most,
/// and ends at the first turn that is too much: no more are looked at, however long the session is. Only turns after it have their text read.
macro_rules! context_sql {
    ($array:literal, $list:literal) => {
        concat!(
            "SELECT rows.place, s.system_prompt, m.verbosity, m.tone, m.depth, m.working_memory, m.summary, ",
            "m.summary_through, m.takings, s.completed_turns - s.erased_turns AS all_turns, ",
            "CASE WHEN s.running_turn IS NULL THEN s.last_turn + 1 END AS next_turn, ",
            "CAST(COALESCE((SELECT ", $list, "(", $array,
            "(t.turn, t.message, t.response, t.message_tokens + t.response_tokens) ORDER BY t.turn) ",
            "FROM turns t WHERE t.session_id = rows.session AND t.tenant_id = rows.tenant AND t.status = 'completed' ",
            "AND t.turn < rows.before AND t.turn > COALESCE((SELECT turn FROM (SELECT turn, ",
            "SUM(message_tokens + response_tokens + 8) OVER back AS total, ROW_NUMBER() OVER back AS place FROM turns ",
            "WHERE session_id = rows.session AND tenant_id = rows.tenant AND status = 'completed' ",
            "AND turn < rows.before WINDOW back AS (ORDER BY turn DESC ROWS UNBOUNDED PRECEDING)) sums ",
            "WHERE total > rows.tokens OR place > 1000 LIMIT 1), 0)), '[]') AS TEXT) AS turns, ",
            "CAST(COALESCE((SELECT ", $list, "(", $array, "(f.key, f.value) ORDER BY f.updated_at, f.turn, f.key) FROM ",
            "(SELECT key, value, updated_at, turn FROM (SELECT key, value, updated_at, turn, ROW_NUMBER() OVER ",
            "(PARTITION BY key ORDER BY updated_at DESC, turn DESC, session_id DESC) AS place FROM facts ",
            "WHERE tenant_id = rows.tenant AND user_id = s.user_id) stated WHERE place = 1 ",
            "ORDER BY updated_at DESC, turn DESC, key LIMIT "
        )
    };
}

/// Where the turn that is asked for runs by its lease, if that is given, and the session is the caller's.
const OF_SESSIONS: &str = " JOIN sessions s ON s.session_id = rows.session AND s.tenant_id = rows.tenant \
     JOIN session_memory m ON m.session_id = s.session_id AND m.tenant_id = s.tenant_id \
     WHERE (rows.caller IS NULL OR s.user_id = rows.caller) AND (rows.lease IS NULL OR EXISTS (SELECT 1 FROM turns r \
         WHERE r.session_id = rows.session AND r.tenant_id = rows.tenant AND r.turn = rows.before \
         AND r.status = 'running' AND r.lease_token = rows.lease))";

/// Reads what is known in a session before a turn.
pub(super) struct ReadContext {
    tenant: TenantId,
    session: SessionId,
    before: i64,
    /// By which `before` has to run.
    lease_token: Option<i64>,
    /// Whose session it has to be.
    user: Option<UserId>,
    tokens: i64,
}

impl Read for ReadContext {
    type Answer = Option<Material>;

    async fn read_all(reads: &[&Self], db: &Db) -> sqlx::Result<Vec<Option<Material>>> {
        let reach = Reach::Tenants(reads.iter().map(|read| read.tenant).collect());
        let places: Vec<i64> = (0..).zip(reads).map(|(place, _)| place).collect();
        let found = db
            .read_each(
                reach,
                context_sql!("json_array", "json_group_array"),
                context_sql!("json_build_array", "json_agg"),
            )
            .push_bind(i64::try_from(MAX_FACTS).unwrap_or(i64::MAX))
            .push(") f), '[]') AS TEXT) AS facts FROM ")
            .push_rows([
                ("place", Column::integers(&places, |place| *place)),
                ("session", Column::integers(reads, |read| read.session)),
                ("tenant", Column::integers(reads, |read| read.tenant)),
                ("before", Column::integers(reads, |read| read.before)),
                ("lease", Column::integers(reads, |read| read.lease_token)),
                ("caller", Column::texts(reads, |read| read.user.as_ref().map(UserId::as_str))),
                ("tokens", Column::integers(reads, |read| read.tokens)),
            ])
            .push(OF_SESSIONS);
        let rows: Vec<Option<Row>> = placed(found, reads.len()).await?;
        rows.into_iter().map(|row| row.map(Row::into_material).transpose()).collect()
    }
}

impl Store {
    /// What is known in a session before a running turn, with as many of its newest completed turns as are at most
    /// `tokens` together; `None` if the turn does not run any more.
    pub async fn context(
        &self,
        TurnKey { tenant, session, turn, lease_token }: TurnKey,
        tokens: i64,
    ) -> Result<Option<Material>> {
        let lease_token = Some(lease_token);
        self.contexts
            .read(ReadContext { tenant, session, before: turn, lease_token, user: None, tokens })
            .await
    }

    /// The same for a turn that would come next; `None` if there is no such session.
    pub async fn next_context(
        &self,
        caller: &Caller,
        session: SessionId,
        tokens: i64,
    ) -> Result<Option<Material>> {
        let (tenant, user, before) = (caller.tenant, caller.user.clone(), i64::MAX);
        self.contexts.read(ReadContext { tenant, session, before, lease_token: None, user, tokens }).await
    }

    /// Of these turns, those that were completed, in no order.
    pub async fn turns_by_number(
        &self,
        (tenant, session): (TenantId, SessionId),
        numbers: &[i64],
    ) -> Result<Vec<PastTurn>> {
        let turns = self.db.read_each(
            tenant,
            "SELECT json_group_array(json_array(turn, message, COALESCE(response, ''), \
                 message_tokens + response_tokens)) FROM turns ",
            "SELECT COALESCE(json_agg(json_build_array(turn, message, COALESCE(response, ''), \
                 message_tokens + response_tokens)), '[]')::text FROM turns ",
        );
        decoded(completed(turns, (tenant, session), numbers).one().await?)
    }

    /// The completed turns from `first` through `last`, at most `limit` of the first of them.
    pub async fn past_turns(
        &self,
        tenant: TenantId,
        session: SessionId,
        (first, last): (i64, i64),
        limit: i64,
    ) -> Result<Vec<PastTurn>> {
        let rows =
            self.db.read(tenant, PAST_TURNS).push(" AND turn BETWEEN $3 AND $4 ORDER BY turn LIMIT $5");
        Ok(past_turns(rows.bind(session).bind(tenant).bind(first).bind(last).bind(limit).all().await?))
    }
}

const PAST_TURNS: &str = "SELECT turn, message, COALESCE(response, ''), message_tokens + response_tokens FROM turns \
     WHERE session_id = $1 AND tenant_id = $2 AND status = 'completed'";

/// Ends a statement that reads from `turns`: of these turns of a session, those that were completed.
pub(super) fn completed<'c>(
    statement: Statement<'c>,
    (tenant, session): (TenantId, SessionId),
    turns: &[i64],
) -> Statement<'c> {
    let turns: serde_json::Value = turns.into();
    let statement =
        statement.push("WHERE session_id = $1 AND tenant_id = $2 AND status = 'completed' AND turn ");
    let statement = statement.push_each(
        "IN (SELECT value FROM json_each($3))",
        // As an array, since a join may read the whole session instead.
        "= ANY (ARRAY(SELECT jsonb_array_elements($3::jsonb)::bigint))",
    );
    statement.bind(session).bind(tenant).bind(turns.to_string())
}

fn past_turns(rows: Vec<(i64, String, String, i64)>) -> Vec<PastTurn> {
    let past = |(turn, message, response, tokens)| PastTurn { turn, message, response, tokens };
    rows.into_iter().map(past).collect()
}

impl Row {
    fn into_material(self) -> Result<Material, sqlx::Error> {
        let decode = |error: serde_json::Error| sqlx::Error::Decode(Box::new(error));
        let facts: Vec<(String, String)> = serde_json::from_str(&self.facts).map_err(decode)?;
        let fact = |(key, value): (String, String)| Ok(Fact { key, value: serde_json::from_str(&value)? });
        let facts = facts.into_iter().map(fact).collect::<serde_json::Result<_>>().map_err(decode)?;
        Ok(Material {
            system_prompt: self.system_prompt,
            profile: self.profile,
            working_memory: self.working_memory,
            summary: self.summary,
            summary_through: self.summary_through,
            takings: self.takings,
            facts,
            turns: serde_json::from_str(&self.turns).map_err(decode)?,
            all_turns: self.all_turns,
            next_turn: self.next_turn,
        })
    }
}
