//! Turns at rest, and those that run.

use std::time::Duration;

use super::{
    Result, Store,
    db::{Column, Statement, Tx},
    idempotency::Claim,
    writer::WriteAlone,
};
use crate::domain::{
    caller::{Caller, TenantId},
    ids::SessionId,
    page::{Direction, Page, Position},
    tokens,
    turn::{Turn, TurnStatus},
};

/// About how many bytes of text a page holds at most, however many turns are asked for; one turn at least.
const PAGE_BYTES: usize = 1 << 20;

/// Turns of a session that is there, since those of a deleted one may wait for their removal, and that is the caller's:
/// see [`Store::turns_of`].
const TURNS: &str = "SELECT session_id, turn, status, message, response, error_code, error_message, model, \
     prompt_tokens, completion_tokens, total_tokens, execution_us, request_id, metadata, created_at, completed_at \
     FROM turns WHERE session_id = $1 \
     AND tenant_id = (SELECT s.tenant_id FROM sessions s WHERE s.session_id = $1 AND s.tenant_id = $2";

/// A turn as its runner knows it.
#[derive(Clone, Copy, Debug)]
pub struct TurnKey {
    pub tenant: TenantId,
    pub session: SessionId,
    pub turn: i64,
    pub lease_token: i64,
}

impl Store {
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

/// Says that a running turn still runs.
struct Renew {
    key: TurnKey,
    claim: Option<Claim>,
    lease: Duration,
}

impl WriteAlone for Renew {
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

impl WriteAlone for KeepPiece {
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
