//! Remembered answers: a request with a key that was seen before is not done again.
//!
//! A key is claimed before the work begins and holds a lease like a turn's; the answer is written in the
//! transaction of the work's effect, so that both stand or fall together.

use std::time::Duration;

use super::{
    Error, Result, Store,
    db::{Reach, Tx},
    writer::WriteAlone,
};
use crate::domain::{
    caller::{Caller, TenantId},
    clock::Timestamp,
    ids::{self, SessionId},
};

/// How often a key is looked at that others claim and free meanwhile.
const LOOKS: usize = 3;
/// How long a key is remembered.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);

/// A key as it was sent, with a digest of the request it came with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdempotencyKey {
    pub key: String,
    pub request_hash: [u8; 32],
}

/// The right to do the work of a key, and to remember its answer.
#[derive(Clone, Debug)]
pub struct Claim {
    holder: Holder,
    key: String,
    lease_token: i64,
}

/// Whose keys do not mix with others': a tenant's, or those of a user to whom callers are bound.
#[derive(Clone, Debug)]
struct Holder {
    tenant: TenantId,
    /// Empty for callers who are bound to no user.
    user: String,
}

impl Holder {
    fn of(caller: &Caller) -> Self {
        let user = caller.user.as_ref().map(|user| user.as_str().to_owned()).unwrap_or_default();
        Self { tenant: caller.tenant, user }
    }
}

/// What is known about a key.
#[derive(Clone, Debug)]
pub enum Claimed {
    /// Nothing; the work is the caller's to do.
    New(Claim),
    /// Another request with this key is being done; its lease runs out after this time.
    Running(Duration),
    /// The work was done: its status and the answer.
    Done { status: i64, answer: String },
    /// The key came with another request.
    OtherRequest,
}

impl Store {
    /// Claims a key, or tells what became of it.
    pub async fn claim(&self, caller: &Caller, key: IdempotencyKey, lease: Duration) -> Result<Claimed> {
        let lease_token = ids::random_bits();
        self.writer.write(ClaimKey { holder: Holder::of(caller), key, lease, lease_token }).await
    }

    /// Says that a claim's work, not yet a turn, is still waited for.
    pub async fn renew_claim(&self, claim: Claim, lease: Duration) -> Result<()> {
        self.writer.write(RenewClaim { claim, lease }).await
    }

    /// Gives a claim up, so that the request may be sent again.
    pub async fn release_claim(&self, claim: Claim) -> Result<()> {
        self.writer.write(Release(claim)).await
    }

    /// Forgets up to `limit` keys whose time is over; how many.
    pub async fn forget_keys(&self, limit: i64) -> Result<u64> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
        let now = tx.clock().await?;
        let forgotten = tx
            .sql(
                "DELETE FROM idempotency_records WHERE (tenant_id, user_id, idempotency_key) IN \
                     (SELECT tenant_id, user_id, idempotency_key FROM idempotency_records \
                      WHERE expires_at < $1 LIMIT $2)",
            )
            .bind(now)
            .bind(limit)
            .run()
            .await?;
        tx.commit().await?;
        Ok(forgotten)
    }
}

/// The condition that finds a claim's record while it is still the claim's.
const MINE: &str = " WHERE tenant_id = $1 AND user_id = $2 AND idempotency_key = $3 AND lease_token = $4 \
     AND status IS NULL";

impl Claim {
    /// A number to order and spread writes by.
    fn row(key: &str) -> i64 {
        key.bytes().fold(0, |row: i64, byte| row.wrapping_mul(31).wrapping_add(byte.into()))
    }

    /// Notes which turn is being made for the key, so that whoever cancels the turn can remember that; from here
    /// on the claim is renewed with the turn.
    pub(super) async fn link(
        &self,
        tx: &mut Tx,
        (session, turn): (SessionId, i64),
        until: Timestamp,
    ) -> Result<()> {
        let link = tx
            .sql("UPDATE idempotency_records SET session_id = $5, turn = $6, lease_expires_at = $7")
            .push(MINE);
        let linked = link
            .bind(self.holder.tenant)
            .bind(self.holder.user.as_str())
            .bind(self.key.as_str())
            .bind(self.lease_token)
            .bind(session)
            .bind(turn)
            .bind(until);
        still_mine(linked.run().await?)
    }

    /// Puts off the moment at which the claim counts as abandoned.
    pub(super) async fn renew(&self, tx: &mut Tx, until: Timestamp) -> Result<()> {
        let renew = tx.sql("UPDATE idempotency_records SET lease_expires_at = $5").push(MINE);
        let renew = renew.bind(self.holder.tenant).bind(self.holder.user.as_str()).bind(self.key.as_str());
        renew.bind(self.lease_token).bind(until).run().await?;
        Ok(())
    }

    /// Remembers the answer, in the transaction of what it answers for: a session, or some of its turns.
    pub(super) async fn remember(
        &self,
        tx: &mut Tx,
        about: Option<(SessionId, Option<(i64, i64)>)>,
        status: i64,
        answer: &str,
    ) -> Result<()> {
        let remember = tx
            .sql(
                "UPDATE idempotency_records SET status = $5, answer = $6, session_id = $7, turn = $8, \
                     last_turn = $9",
            )
            .push(MINE)
            .bind(self.holder.tenant)
            .bind(self.holder.user.as_str())
            .bind(self.key.as_str())
            .bind(self.lease_token)
            .bind(status)
            .bind(answer)
            .bind(about.map(|(session, _)| session))
            .bind(about.and_then(|(_, turns)| turns).map(|(first, _)| first))
            .bind(about.and_then(|(_, turns)| turns).map(|(_, last)| last));
        still_mine(remember.run().await?)
    }
}

/// Somebody who took the claim over may do the work again; then this one must not have been.
fn still_mine(changed: u64) -> Result<()> {
    if changed == 1 { Ok(()) } else { Err(Error::from(sqlx::Error::RowNotFound)) }
}

struct ClaimKey {
    holder: Holder,
    key: IdempotencyKey,
    lease: Duration,
    lease_token: i64,
}

type Record = (Vec<u8>, Option<i64>, Option<String>, i64, Timestamp, Timestamp);

impl WriteAlone for ClaimKey {
    type Answer = Claimed;

    fn place(&self) -> (TenantId, i64) {
        (self.holder.tenant, Claim::row(&self.key.key))
    }

    async fn apply(&self, tx: &mut Tx) -> Result<Claimed> {
        // A record may be freed between the two looks at it; then the key is there to be claimed.
        for _ in 0..LOOKS {
            if let Some(claimed) = self.look(tx).await? {
                return Ok(claimed);
            }
        }
        Ok(Claimed::Running(self.lease))
    }
}

impl ClaimKey {
    /// Claims the key if nobody has it; `None` if it has become free just now.
    async fn look(&self, tx: &mut Tx) -> Result<Option<Claimed>> {
        let now = tx.clock().await?;
        let claim =
            Claim { holder: self.holder.clone(), key: self.key.key.clone(), lease_token: self.lease_token };
        let inserted = tx
            .sql(
                "INSERT INTO idempotency_records (tenant_id, user_id, idempotency_key, request_hash, lease_token, \
                     lease_expires_at, created_at, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8) \
                 ON CONFLICT (tenant_id, user_id, idempotency_key) DO NOTHING",
            )
            .bind(self.holder.tenant)
            .bind(self.holder.user.as_str())
            .bind(self.key.key.as_str())
            .bind(self.key.request_hash.to_vec())
            .bind(self.lease_token)
            .bind(now + self.lease)
            .bind(now)
            .bind(now + KEPT)
            .run()
            .await?;
        if inserted == 1 {
            return Ok(Some(Claimed::New(claim)));
        }
        let record: Option<Record> = tx
            .sql(
                "SELECT request_hash, status, answer, lease_token, lease_expires_at, expires_at \
                 FROM idempotency_records WHERE tenant_id = $1 AND user_id = $2 AND idempotency_key = $3",
            )
            .push_each("", " FOR UPDATE")
            .bind(self.holder.tenant)
            .bind(self.holder.user.as_str())
            .bind(self.key.key.as_str())
            .optional()
            .await?;
        let Some((request_hash, status, answer, token, lease_expires_at, expires_at)) = record else {
            return Ok(None);
        };
        // This very claim, whose first try may have been committed.
        if token == self.lease_token {
            return Ok(Some(Claimed::New(claim)));
        }
        let over = expires_at <= now;
        if !over && request_hash != self.key.request_hash {
            return Ok(Some(Claimed::OtherRequest));
        }
        if let (false, Some(status)) = (over, status) {
            return Ok(Some(Claimed::Done { status, answer: answer.unwrap_or_default() }));
        }
        if !over && lease_expires_at > now {
            let left = (lease_expires_at.as_millis() - now.as_millis()).unsigned_abs();
            return Ok(Some(Claimed::Running(Duration::from_millis(left))));
        }
        // Its server is gone, or its time is over: the key is there to be claimed.
        tx.sql(
            "DELETE FROM idempotency_records WHERE tenant_id = $1 AND user_id = $2 AND idempotency_key = $3",
        )
        .bind(self.holder.tenant)
        .bind(self.holder.user.as_str())
        .bind(self.key.key.as_str())
        .run()
        .await?;
        Ok(None)
    }
}

struct RenewClaim {
    claim: Claim,
    lease: Duration,
}

impl WriteAlone for RenewClaim {
    type Answer = ();

    fn place(&self) -> (TenantId, i64) {
        (self.claim.holder.tenant, Claim::row(&self.claim.key))
    }

    async fn apply(&self, tx: &mut Tx) -> Result<()> {
        let until = tx.clock().await? + self.lease;
        self.claim.renew(tx, until).await
    }
}

struct Release(Claim);

impl WriteAlone for Release {
    type Answer = ();

    fn place(&self) -> (TenantId, i64) {
        (self.0.holder.tenant, Claim::row(&self.0.key))
    }

    async fn apply(&self, tx: &mut Tx) -> Result<()> {
        let Claim { holder, key, lease_token } = &self.0;
        tx.sql("DELETE FROM idempotency_records")
            .push(MINE)
            .bind(holder.tenant)
            .bind(holder.user.as_str())
            .bind(key.as_str())
            .bind(*lease_token)
            .run()
            .await?;
        Ok(())
    }
}
