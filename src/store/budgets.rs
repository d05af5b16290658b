//! What users have used of a day's tokens. Each piece of work has a row of its own, so that nobody waits for a sum.

use super::{
    Result, Store,
    db::{Reach, Tx},
};
use crate::domain::{caller::TenantId, clock::Timestamp, session::UserId};

/// Whose tokens a piece of work uses, and when it began, which decides the day.
#[derive(Clone, Debug)]
pub struct Account {
    pub tenant: TenantId,
    pub user: UserId,
    pub at: Timestamp,
    /// Random; names the piece of work.
    pub work: i64,
}

impl Store {
    /// Says how many tokens a piece of work has used in all, instead of what was said of it before.
    pub async fn charge(&self, account: &Account, tokens: i64) -> Result<()> {
        let mut tx = self.db.begin(account.tenant).await?;
        account.charge(&mut tx, tokens).await?;
        Ok(tx.commit().await?)
    }

    /// Forgets what was used on the days before that of `now`; nothing is decided by it any more.
    pub async fn forget_uses(&self, now: Timestamp) -> Result<()> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
        // The day before may still be somebody else's, by their clock.
        tx.sql("DELETE FROM token_uses WHERE day < $1").bind(now.day() - 1).run().await?;
        Ok(tx.commit().await?)
    }
}

impl Account {
    pub(super) async fn charge(&self, tx: &mut Tx, tokens: i64) -> Result<()> {
        tx.sql(
            "INSERT INTO token_uses (tenant_id, user_id, day, work, tokens) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (tenant_id, user_id, day, work) DO UPDATE SET tokens = excluded.tokens",
        )
        .bind(self.tenant)
        .bind(&self.user)
        .bind(self.at.day())
        .bind(self.work)
        .bind(tokens)
        .run()
        .await?;
        Ok(())
    }

    /// The tokens that this user has used that day.
    pub(super) async fn used(&self, tx: &mut Tx) -> Result<i64> {
        let used = "SELECT CAST(COALESCE(SUM(tokens), 0) AS BIGINT) FROM token_uses \
             WHERE tenant_id = $1 AND user_id = $2 AND day = $3";
        let (used,) = tx.sql(used).bind(self.tenant).bind(&self.user).bind(self.at.day()).one().await?;
        Ok(used)
    }
}
