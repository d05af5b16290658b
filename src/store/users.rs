//! What is known of users as a whole.

use super::{Result, Store};
use crate::domain::{caller::Caller, clock::Timestamp, session::UserId};

/// A user's sessions, counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct UserOverview {
    pub sessions: i64,
    /// Completed turns.
    pub turns: i64,
    pub facts: i64,
    /// When the first session was made.
    pub first_activity: Option<Timestamp>,
    pub last_activity: Option<Timestamp>,
}

impl Store {
    /// A user's sessions, counted; `None` if there is nothing of this user.
    pub async fn user(&self, caller: &Caller, user: &UserId) -> Result<Option<UserOverview>> {
        if !caller.may_see(user) {
            return Ok(None);
        }
        let overview: UserOverview = self
            .db
            .read(
                caller,
                "SELECT COUNT(*) AS sessions, CAST(COALESCE(SUM(completed_turns), 0) AS BIGINT) AS turns, \
                     MIN(created_at) AS first_activity, MAX(last_activity) AS last_activity, \
                     (SELECT COUNT(DISTINCT key) FROM facts WHERE tenant_id = $1 AND user_id = $2) AS facts \
                 FROM sessions WHERE tenant_id = $1 AND user_id = $2",
            )
            .bind(caller.tenant)
            .bind(user)
            .one()
            .await?;
        Ok(Some(overview).filter(|overview| overview.sessions + overview.facts > 0))
    }
}
