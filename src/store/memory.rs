//! What sessions and users are remembered by, at rest.

use serde_json::{Map, Value};

use super::{Kind, NotUpdated, Result, Store, TurnKey, db::Tx};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{SessionId, digest},
    memory::{Fact, KnownFact, Learnt, MAX_FACTS, MemoryPatch, ProfileChange, SessionMemory},
    session::{IfMatch, UserId},
};

const MEMORY: &str = "SELECT m.verbosity, m.tone, m.depth, m.verbosity_turn, m.tone_turn, m.depth_turn, \
     m.working_memory, m.summary, m.summary_through, s.completed_turns FROM session_memory m \
     JOIN sessions s ON s.session_id = m.session_id AND s.tenant_id = m.tenant_id \
     WHERE m.session_id = $1 AND m.tenant_id = $2";

/// The turns that one fact is known from at most; of more the newest are kept.
const SOURCES: i64 = 16;

/// A summary that took the place of another.
#[derive(Clone, Debug)]
pub struct Summary {
    pub text: String,
    pub tokens: i64,
    /// The last turn that it covers.
    pub through: i64,
    /// What it was made from: how often something had been taken away from the session, and what the summary
    /// before it covered.
    pub takings: i64,
    pub was_through: Option<i64>,
}

impl Store {
    /// What a session remembers beside its turns.
    pub async fn memory(&self, caller: &Caller, session: SessionId) -> Result<Option<SessionMemory>> {
        let memory = self.db.read(caller, MEMORY).bind(session).bind(caller.tenant).of(caller);
        Ok(memory.optional().await?)
    }

    /// Changes a session's memory if it is as `if_match` says.
    pub async fn update_memory(
        &self,
        caller: &Caller,
        session: SessionId,
        patch: MemoryPatch,
        if_match: Option<&IfMatch>,
        now: Timestamp,
    ) -> Result<Result<SessionMemory, NotUpdated>> {
        let (mut tx, memory) = match self.begin_memory(caller, session, if_match).await? {
            Ok(begun) => begun,
            Err(refusal) => return Ok(Err(refusal)),
        };
        if let Some(patch) = &patch.working_memory {
            let working_memory = match memory.working_memory.merged(patch) {
                Ok(working_memory) => working_memory,
                Err(problem) => {
                    tx.rollback().await?;
                    return Ok(Err(NotUpdated::Refused(problem)));
                }
            };
            let update = "UPDATE session_memory SET working_memory = $3, updated_at = $4 \
                 WHERE session_id = $1 AND tenant_id = $2";
            let update = tx.sql(update).bind(session).bind(caller.tenant);
            update.bind(working_memory.to_text()).bind(now).run().await?;
        }
        change_profile(&mut tx, caller.tenant, (session, None), now, patch.profile).await?;
        self.commit_memory(tx, caller, session).await
    }

    /// Empties working memory, resets the profile and drops the summary, if they are as `if_match` says.
    pub async fn reset_memory(
        &self,
        caller: &Caller,
        session: SessionId,
        if_match: Option<&IfMatch>,
        now: Timestamp,
    ) -> Result<Result<SessionMemory, NotUpdated>> {
        let (mut tx, _) = match self.begin_memory(caller, session, if_match).await? {
            Ok(begun) => begun,
            Err(refusal) => return Ok(Err(refusal)),
        };
        tx.sql(
            "UPDATE session_memory SET working_memory = '{}', summary = NULL, summary_through = NULL, \
                 summary_tokens = 0, verbosity = 'medium', tone = 'neutral', depth = 'normal', \
                 verbosity_turn = NULL, tone_turn = NULL, depth_turn = NULL, takings = takings + 1, updated_at = $3 \
             WHERE session_id = $1 AND tenant_id = $2",
        )
        .bind(session)
        .bind(caller.tenant)
        .bind(now)
        .run()
        .await?;
        self.commit_memory(tx, caller, session).await
    }

    /// Locks a session's memory, as it is if that is what `if_match` says.
    async fn begin_memory(
        &self,
        caller: &Caller,
        session: SessionId,
        if_match: Option<&IfMatch>,
    ) -> Result<Result<(Tx, SessionMemory), NotUpdated>> {
        let mut tx = self.db.begin(caller).await?;
        let row = tx.sql(MEMORY).bind(session).bind(caller.tenant).of(caller);
        let row = row.push_each("", " FOR UPDATE OF s, m");
        let Some(memory) = row.optional::<SessionMemory>().await? else {
            tx.rollback().await?;
            return Ok(Err(NotUpdated::Unknown));
        };
        if if_match.is_some_and(|etags| !etags.match_tag(&memory.etag())) {
            tx.rollback().await?;
            return Ok(Err(NotUpdated::Changed));
        }
        Ok(Ok((tx, memory)))
    }

    async fn commit_memory(
        &self,
        mut tx: Tx,
        caller: &Caller,
        session: SessionId,
    ) -> Result<Result<SessionMemory, NotUpdated>> {
        let memory = tx.sql(MEMORY).bind(session).bind(caller.tenant).one().await?;
        tx.commit().await?;
        Ok(Ok(memory))
    }

    /// Keeps a summary if nothing it was made from has been taken away meanwhile; whether it was kept.
    pub async fn keep_summary(&self, tenant: TenantId, session: SessionId, summary: Summary) -> Result<bool> {
        let mut tx = self.db.begin(tenant).await?;
        let kept = tx
            .sql(
                "UPDATE session_memory SET summary = $3, summary_tokens = $4, summary_through = $5 \
                 WHERE session_id = $1 AND tenant_id = $2 AND takings = $6 AND COALESCE(summary_through, 0) = $7",
            )
            .bind(session)
            .bind(tenant)
            .bind(summary.text)
            .bind(summary.tokens)
            .bind(summary.through)
            .bind(summary.takings)
            .bind(summary.was_through.unwrap_or(0))
            .run()
            .await?;
        tx.commit().await?;
        Ok(kept == 1)
    }

    /// What is known about a user, by key.
    pub async fn facts(&self, caller: &Caller, user: &UserId) -> Result<Vec<KnownFact>> {
        if !caller.may_see(user) {
            return Ok(Vec::new());
        }
        let rows = self.db.read(caller, FACTS).bind(caller.tenant).bind(user).all().await?;
        Ok(newest(rows)?)
    }

    /// Applies a merge patch to what is known about a user: null forgets. All of it, or, with what to mend, nothing.
    pub async fn update_facts(
        &self,
        caller: &Caller,
        user: &UserId,
        patch: &Map<String, Value>,
        now: Timestamp,
    ) -> Result<Result<Vec<KnownFact>, String>> {
        let mut tx = self.db.begin(caller).await?;
        lock_user(&mut tx, (caller.tenant, user)).await?;
        let known = newest(tx.sql(FACTS).bind(caller.tenant).bind(user).all().await?)?;
        let mut left = known.len();
        for (key, value) in patch {
            let fact = known.iter().find(|known| known.fact.key == *key).map(|known| known.fact.clone());
            if value.is_null() && fact.is_none() {
                continue;
            }
            // Also where it takes another value: what is stated here holds from now on, though a turn that said
            // otherwise be dated later.
            let forget = "DELETE FROM facts WHERE tenant_id = $1 AND user_id = $2 AND key = $3";
            tx.sql(forget).bind(caller.tenant).bind(user).bind(key.as_str()).run().await?;
            if value.is_null() {
                left -= usize::from(fact.is_some());
                continue;
            }
            left += usize::from(fact.is_none());
            let fact = fact.unwrap_or(Fact { key: key.clone(), value: Value::Null }).patched(value);
            let refusal = match fact {
                Ok(fact) if left <= MAX_FACTS => {
                    put_fact(&mut tx, (caller.tenant, user), None, now, &fact).await?;
                    continue;
                }
                Ok(_) => format!("at most {MAX_FACTS} facts are kept about a user; forget some first"),
                Err(problem) => format!("{}: {problem}", key.chars().take(64).collect::<String>()),
            };
            tx.rollback().await?;
            return Ok(Err(refusal));
        }
        let known = newest(tx.sql(FACTS).bind(caller.tenant).bind(user).all().await?)?;
        tx.commit().await?;
        Ok(Ok(known))
    }

    /// Forgets everything that is known about a user; how much that was.
    pub async fn forget_facts(&self, caller: &Caller, user: &UserId) -> Result<u64> {
        if !caller.may_see(user) {
            return Ok(0);
        }
        let mut tx = self.db.begin(caller).await?;
        lock_user(&mut tx, (caller.tenant, user)).await?;
        let forget = "DELETE FROM facts WHERE tenant_id = $1 AND user_id = $2";
        let forgotten = tx.sql(forget).bind(caller.tenant).bind(user).run().await?;
        tx.commit().await?;
        Ok(forgotten)
    }

    /// Keeps what a model has found in a turn, unless the turn has been erased or its session deleted meanwhile;
    /// whether it was kept.
    pub async fn keep_facts(
        &self,
        TurnKey { tenant, session, turn, .. }: TurnKey,
        user: &UserId,
        facts: Vec<Fact>,
    ) -> Result<bool> {
        let mut tx = self.db.begin(tenant).await?;
        // The session's row is locked first: whoever erases waits, and removes these too.
        let lock = "SELECT last_turn FROM sessions WHERE session_id = $1 AND tenant_id = $2";
        let locked = tx.sql(lock).push_each("", " FOR SHARE").bind(session).bind(tenant);
        let there = locked.optional::<(i64,)>().await?.is_some();
        let said = "SELECT created_at FROM turns WHERE session_id = $1 AND tenant_id = $2 AND turn = $3 \
             AND status = 'completed'";
        let said = tx.sql(said).bind(session).bind(tenant).bind(turn).optional::<(Timestamp,)>().await?;
        let Some((at,)) = said.filter(|_| there) else {
            tx.rollback().await?;
            return Ok(false);
        };
        let learnt = Learnt { facts, profile: ProfileChange::default() };
        learn(&mut tx, (tenant, user), (session, turn), at, &learnt).await?;
        tx.commit().await?;
        Ok(true)
    }
}

/// Lets one change at a time be made to what is known about a user as a whole; on SQLite every transaction has the only
/// write lock anyway.
pub(super) async fn lock_user(tx: &mut Tx, (tenant, user): (TenantId, &UserId)) -> Result<()> {
    if tx.kind() == Kind::Postgres {
        let lock = digest(&["user", &tenant.number().to_string(), user.as_str()]);
        tx.sql("SELECT pg_advisory_xact_lock($1)").bind(lock).run().await?;
    }
    Ok(())
}

type FactRow = (String, String, SessionId, i64, Timestamp);
const FACTS: &str = "SELECT key, value, session_id, turn, updated_at FROM facts \
     WHERE tenant_id = $1 AND user_id = $2 ORDER BY key, updated_at, turn, session_id";

/// The newest statement of each key.
fn newest(rows: Vec<FactRow>) -> Result<Vec<KnownFact>, sqlx::Error> {
    let mut known: Vec<KnownFact> = Vec::new();
    for (key, value, session, turn, updated_at) in rows {
        if known.last().is_some_and(|last| last.fact.key == key) {
            known.pop();
        }
        let value = serde_json::from_str(&value).map_err(|error| sqlx::Error::Decode(error.into()))?;
        let source = (turn > 0).then_some((session, turn));
        known.push(KnownFact { fact: Fact { key, value }, source, updated_at });
    }
    Ok(known)
}

/// Keeps what a turn's message says about its user, in the transaction that keeps the turn.
pub(super) async fn learn(
    tx: &mut Tx,
    owner: (TenantId, &UserId),
    source: (SessionId, i64),
    at: Timestamp,
    learnt: &Learnt,
) -> Result<()> {
    change_profile(tx, owner.0, (source.0, Some(source.1)), at, learnt.profile).await?;
    // Rows are locked in one order; of two statements of one thing in a message the later counts.
    let mut facts: Vec<&Fact> = learnt.facts.iter().collect();
    facts.sort_by(|a, b| a.key.cmp(&b.key));
    for fact in facts {
        put_fact(tx, owner, Some(source), at, fact).await?;
        tx.sql(
            "DELETE FROM facts WHERE tenant_id = $1 AND user_id = $2 AND key = $3 AND (session_id, turn) NOT IN \
                 (SELECT session_id, turn FROM facts WHERE tenant_id = $1 AND user_id = $2 AND key = $3 \
                  ORDER BY updated_at DESC, turn DESC LIMIT $4)",
        )
        .bind(owner.0)
        .bind(owner.1)
        .bind(fact.key.as_str())
        .bind(SOURCES)
        .run()
        .await?;
    }
    Ok(())
}

/// Writes a fact by its source, unless as many as are kept are known about the user already.
async fn put_fact(
    tx: &mut Tx,
    (tenant, user): (TenantId, &UserId),
    source: Option<(SessionId, i64)>,
    at: Timestamp,
    fact: &Fact,
) -> Result<()> {
    let (session, turn) = source.map_or((0, 0), |(session, turn)| (session.number(), turn));
    tx.sql(
        "INSERT INTO facts (tenant_id, user_id, key, session_id, turn, updated_at, value) \
         SELECT t.tenant_id, $2, $3, $4, $5, $6, $7 FROM tenants t WHERE t.tenant_id = $1 AND ( \
             EXISTS (SELECT 1 FROM facts WHERE tenant_id = $1 AND user_id = $2 AND key = $3) \
             OR (SELECT COUNT(DISTINCT key) FROM facts WHERE tenant_id = $1 AND user_id = $2) < $8) \
         ON CONFLICT (tenant_id, user_id, key, session_id, turn) \
             DO UPDATE SET value = excluded.value, updated_at = excluded.updated_at",
    )
    .bind(tenant)
    .bind(user)
    .bind(fact.key.as_str())
    .bind(session)
    .bind(turn)
    .bind(at)
    .bind(fact.value.to_string())
    .bind(i64::try_from(MAX_FACTS).unwrap_or(i64::MAX))
    .run()
    .await?;
    Ok(())
}

/// Changes parts of a profile, and notes the turn that did, if one did.
async fn change_profile(
    tx: &mut Tx,
    tenant: TenantId,
    (session, turn): (SessionId, Option<i64>),
    at: Timestamp,
    change: ProfileChange,
) -> Result<()> {
    if change == ProfileChange::default() {
        return Ok(());
    }
    tx.sql(
        "UPDATE session_memory SET updated_at = $3, \
             verbosity = COALESCE($5, verbosity), tone = COALESCE($6, tone), depth = COALESCE($7, depth), \
             verbosity_turn = CASE WHEN $5 IS NULL THEN verbosity_turn ELSE $4 END, \
             tone_turn = CASE WHEN $6 IS NULL THEN tone_turn ELSE $4 END, \
             depth_turn = CASE WHEN $7 IS NULL THEN depth_turn ELSE $4 END \
         WHERE session_id = $1 AND tenant_id = $2",
    )
    .bind(session)
    .bind(tenant)
    .bind(at)
    .bind(turn)
    .bind(change.verbosity)
    .bind(change.tone)
    .bind(change.depth)
    .run()
    .await?;
    Ok(())
}
