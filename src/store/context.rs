//! What a model may be shown of a session, read in one round trip as one row.

use super::{Result, Store, TurnKey};
use crate::domain::memory::{BehaviorProfile, Fact};

/// The turns read at most; their tokens bound them sooner.
const MAX_TURNS: i64 = 1000;
/// The facts read at most, newest first.
const MAX_FACTS: i64 = 200;

/// A past turn, with its tokens as counted when it was stored.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
pub struct PastTurn {
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
    /// One per key, the newest statement of each, in order of time.
    pub facts: Vec<Fact>,
    /// Completed turns, oldest first: as many of the newest as fit the tokens asked for.
    pub turns: Vec<PastTurn>,
}

#[derive(sqlx::FromRow)]
struct Row {
    system_prompt: Option<String>,
    verbosity: String,
    tone: String,
    depth: String,
    working_memory: String,
    summary: Option<String>,
    facts: String,
    turns: String,
}

/// `$1` session, `$2` tenant, `$3` the running turn, `$4` tokens, `$5` turns, `$6` facts at most, `$7` lease token.
/// The window sums tokens from the newest turn back; only turns within the sum have their text read.
macro_rules! context_sql {
    ($array:literal, $list:literal) => {
        concat!(
            "SELECT s.system_prompt, m.verbosity, m.tone, m.depth, m.working_memory, m.summary, ",
            "COALESCE((SELECT ", $list, "(", $array, "(f.key, f.value) ORDER BY f.updated_at, f.turn) FROM ",
            "(SELECT key, value, updated_at, turn FROM facts WHERE tenant_id = $2 AND user_id = s.user_id ",
            "ORDER BY updated_at DESC, turn DESC LIMIT $6) f), '[]') AS facts, ",
            "COALESCE((SELECT ", $list, "(", $array,
            "(t.message, t.response, t.message_tokens + t.response_tokens) ORDER BY t.turn) ",
            "FROM turns t WHERE t.session_id = $1 AND t.tenant_id = $2 AND t.status = 'completed' AND t.turn < $3 ",
            "AND t.turn >= (SELECT MIN(turn) FROM (SELECT turn, SUM(tokens) OVER (ORDER BY turn DESC) AS total ",
            "FROM (SELECT turn, message_tokens + response_tokens AS tokens FROM turns WHERE session_id = $1 ",
            "AND tenant_id = $2 AND status = 'completed' AND turn < $3 ORDER BY turn DESC LIMIT $5) newest) sums ",
            "WHERE total <= $4)), '[]') AS turns ",
            "FROM sessions s JOIN session_memory m ON m.session_id = s.session_id AND m.tenant_id = s.tenant_id ",
            "WHERE s.session_id = $1 AND s.tenant_id = $2 AND EXISTS (SELECT 1 FROM turns r ",
            "WHERE r.session_id = $1 AND r.tenant_id = $2 AND r.turn = $3 AND r.status = 'running' ",
            "AND r.lease_token = $7)"
        )
    };
}

impl Store {
    /// What is known in a session before a running turn, with as many of its newest completed turns as are at most
    /// `tokens` together; `None` if the turn does not run any more.
    pub async fn context(
        &self,
        TurnKey { tenant, session, turn, lease_token }: TurnKey,
        tokens: i64,
    ) -> Result<Option<Material>> {
        let row: Option<Row> = self
            .db
            .read_each(
                context_sql!("json_array", "json_group_array"),
                concat!(
                    "SELECT system_prompt, verbosity, tone, depth, working_memory, summary, facts::text, \
                     turns::text FROM (",
                    context_sql!("json_build_array", "json_agg"),
                    ") AS context"
                ),
            )
            .bind(session)
            .bind(tenant)
            .bind(turn)
            .bind(tokens)
            .bind(MAX_TURNS)
            .bind(MAX_FACTS)
            .bind(lease_token)
            .optional()
            .await?;
        Ok(row.map(Row::into_material).transpose()?)
    }
}

impl Row {
    fn into_material(self) -> Result<Material, sqlx::Error> {
        let decode = |error: serde_json::Error| sqlx::Error::Decode(Box::new(error));
        let mut facts: Vec<Fact> = Vec::new();
        for (key, value) in serde_json::from_str::<Vec<(String, String)>>(&self.facts).map_err(decode)? {
            facts.retain(|fact| fact.key != key);
            facts.push(Fact { key, value: serde_json::from_str(&value).map_err(decode)? });
        }
        Ok(Material {
            system_prompt: self.system_prompt,
            profile: BehaviorProfile { verbosity: self.verbosity, tone: self.tone, depth: self.depth },
            working_memory: self.working_memory,
            summary: self.summary,
            facts,
            turns: serde_json::from_str(&self.turns).map_err(decode)?,
        })
    }
}
