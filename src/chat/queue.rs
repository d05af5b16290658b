//! Whose turn it is within this server: one line per session, first come first served.
//!
//! For fairness and to spare the database useless attempts; what is true is the database's lock.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::{Mutex as Line, OwnedMutexGuard};

use crate::domain::{caller::TenantId, ids::SessionId};

type Key = (TenantId, SessionId);

/// The lines before all sessions that somebody waits for.
#[derive(Clone, Default)]
pub struct Queue(Arc<Mutex<HashMap<Key, Arc<Line<()>>>>>);

/// A place in a line, at its head once [`Queue::head_of_line`] has returned it. Dropping it lets the next go.
pub struct Place {
    queue: Queue,
    key: Key,
    head: Option<OwnedMutexGuard<()>>,
}

impl Queue {
    /// Waits until it is this caller's turn. Dropping the future leaves the line.
    pub async fn head_of_line(&self, tenant: TenantId, session: SessionId) -> Place {
        let key = (tenant, session);
        let line = Arc::clone(self.lines().entry(key).or_default());
        // Made before waiting, so that one who leaves early tidies up too.
        let mut place = Place { queue: self.clone(), key, head: None };
        place.head = Some(line.lock_owned().await);
        place
    }

    /// A place if nobody waits or works there.
    pub fn if_free(&self, tenant: TenantId, session: SessionId) -> Option<Place> {
        let key = (tenant, session);
        let line = Arc::clone(self.lines().entry(key).or_default());
        let mut place = Place { queue: self.clone(), key, head: None };
        place.head = Some(line.try_lock_owned().ok()?);
        Some(place)
    }

    /// How many wait behind the heads of all lines.
    pub fn waiting(&self) -> usize {
        // A line is held by the map, by whoever is at its head, and by everybody who waits.
        self.lines().values().map(|line| Arc::strong_count(line).saturating_sub(2)).sum()
    }

    fn lines(&self) -> MutexGuard<'_, HashMap<Key, Arc<Line<()>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut lines = self.queue.lines();
        self.head = None;
        // Lines are joined under the map's lock, so nobody can be about to hold this one.
        if lines.get(&self.key).is_some_and(|line| Arc::strong_count(line) == 1) {
            lines.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, poll};

    use super::*;

    #[tokio::test]
    async fn those_who_wait_go_in_the_order_they_came_and_leave_nothing_behind() {
        let (queue, tenant, session) = (Queue::default(), TenantId::DEFAULT, SessionId::random());
        let first = queue.head_of_line(tenant, session).await;
        let mut second = queue.head_of_line(tenant, session).boxed();
        let mut impatient = queue.head_of_line(tenant, session).boxed();
        let mut third = queue.head_of_line(tenant, session).boxed();
        assert!(poll!(&mut second).is_pending());
        assert!(poll!(&mut impatient).is_pending());
        assert!(poll!(&mut third).is_pending());
        assert_eq!(queue.waiting(), 3);

        drop(impatient);
        drop(first);
        assert!(poll!(&mut third).is_pending());
        drop(second.await);
        drop(third.await);
        assert!(queue.lines().is_empty());
    }

    #[tokio::test]
    async fn other_sessions_do_not_wait() {
        let queue = Queue::default();
        let _held = queue.head_of_line(TenantId::DEFAULT, SessionId::random()).await;
        queue.head_of_line(TenantId::DEFAULT, SessionId::random()).await;
    }
}
