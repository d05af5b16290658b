//! Windows of the rate limit, of which instances take shares. They belong to no tenant: a bucket may be an address.

use std::time::Duration;

use super::{Result, Store, db::Reach};
use crate::domain::clock::Timestamp;

/// What an instance got of a bucket's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Calls that it may let pass.
    pub got: u32,
    /// Calls that are left for whoever asks next.
    pub rest: u32,
    /// How long the window lasts yet, by the database's clock.
    pub ends_in: Duration,
}

impl Store {
    /// Takes `share` of the `limit` calls of a bucket's window, or what is left of them. A window that is over is
    /// followed by a new one, which begins now.
    pub async fn take_share(&self, bucket: i64, share: u32, limit: u32, window: Duration) -> Result<Share> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
        let now = tx.clock().await?;
        // What is taken beyond the limit tells nobody anything, so the count may run past it.
        let (taken, ends_at): (i64, Timestamp) = tx
            .sql(
                "INSERT INTO rate_windows AS w (bucket, ends_at, taken) VALUES ($1, $2, $3) \
                 ON CONFLICT (bucket) DO UPDATE SET \
                     ends_at = CASE WHEN w.ends_at <= $4 THEN excluded.ends_at ELSE w.ends_at END, \
                     taken = CASE WHEN w.ends_at <= $4 THEN 0 ELSE w.taken END + excluded.taken \
                 RETURNING taken, ends_at",
            )
            .bind(bucket)
            .bind(now + window)
            .bind(i64::from(share))
            .bind(now)
            .one()
            .await?;
        tx.commit().await?;
        let left = limit.saturating_sub(u32::try_from(taken - i64::from(share)).unwrap_or(u32::MAX));
        let got = left.min(share);
        let ends_in = u64::try_from(ends_at.as_millis() - now.as_millis()).unwrap_or_default();
        Ok(Share { got, rest: left - got, ends_in: Duration::from_millis(ends_in) })
    }

    /// Removes up to `limit` windows that are over; how many.
    pub async fn remove_ended_windows(&self, limit: i64) -> Result<u64> {
        let mut tx = self.db.begin(Reach::Everybody).await?;
        let now = tx.clock().await?;
        // Asked twice, since a window may begin anew between the two.
        let removed = tx
            .sql(
                "DELETE FROM rate_windows WHERE ends_at <= $1 AND bucket IN \
                     (SELECT bucket FROM rate_windows WHERE ends_at <= $1 LIMIT $2)",
            )
            .bind(now)
            .bind(limit)
            .run()
            .await?;
        tx.commit().await?;
        Ok(removed)
    }
}
