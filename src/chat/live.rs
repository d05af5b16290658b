//! Replies while they come: every turn that runs in this server, for those who listen to it or want it cancelled.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Answered, Error};
use crate::{
    domain::{caller::TenantId, ids::SessionId},
    model::Listener,
};

/// The tenant, too: an archive that two of them imported is two sessions of one id.
type Key = (TenantId, SessionId, i64);

/// The turns that run in this server.
#[derive(Clone, Default)]
pub struct Live(Arc<Mutex<HashMap<Key, Arc<Running>>>>);

/// A turn that runs, and its reply so far.
pub struct Running {
    pub cancelled: CancellationToken,
    text: Mutex<String>,
    /// How many bytes of text there are, or how the turn ended.
    progress: watch::Sender<Progress>,
}

#[derive(Clone)]
enum Progress {
    Coming(usize),
    Ended(Result<Answered, Error>),
}

/// What a listener learns next.
pub enum Heard {
    Text(String),
    Ended(Result<Answered, Error>),
}

/// Listens to a running turn from some byte of its reply on.
pub struct Reader {
    running: Arc<Running>,
    progress: watch::Receiver<Progress>,
    offset: usize,
}

impl Live {
    /// Enters a turn that begins; it leaves when the guard is dropped.
    pub fn enter(&self, key: Key) -> Entered {
        let running = Arc::new(Running {
            cancelled: CancellationToken::new(),
            text: Mutex::default(),
            progress: watch::Sender::new(Progress::Coming(0)),
        });
        self.turns().insert(key, running.clone());
        Entered { live: self.clone(), key, running }
    }

    /// How many turns run.
    pub fn count(&self) -> usize {
        self.turns().len()
    }

    pub fn get(&self, key: Key) -> Option<Arc<Running>> {
        self.turns().get(&key).cloned()
    }

    /// Ends the work on a turn that was cancelled, if it runs here.
    pub fn cancel(&self, key: Key) {
        if let Some(running) = self.get(key) {
            running.cancelled.cancel();
        }
    }

    /// Ends the work on every turn of a session that runs here.
    pub fn cancel_all(&self, tenant: TenantId, session: SessionId) {
        let turns = self.turns();
        let of_session = turns.iter().filter(|((of, id, _), _)| (*of, *id) == (tenant, session));
        of_session.for_each(|(_, running)| running.cancelled.cancel());
    }

    fn turns(&self) -> MutexGuard<'_, HashMap<Key, Arc<Running>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A turn among those that run.
pub struct Entered {
    live: Live,
    key: Key,
    pub running: Arc<Running>,
}

impl Entered {
    /// Tells all listeners how the turn ended.
    pub fn ended(self, outcome: Result<Answered, Error>) {
        self.running.progress.send_replace(Progress::Ended(outcome));
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.live.turns().remove(&self.key);
        // Whoever still listens must not wait for ever if the turn's task broke down.
        self.running.progress.send_if_modified(|progress| {
            let open = matches!(progress, Progress::Coming(_));
            if open {
                *progress = Progress::Ended(Err(Error::Panicked));
            }
            open
        });
    }
}

impl Running {
    /// Listens from byte `offset` on; `None` if no character of the reply begins there so far.
    pub fn listen(self: &Arc<Self>, offset: usize) -> Option<Reader> {
        let progress = self.progress.subscribe();
        let begins = self.text().is_char_boundary(offset);
        begins.then(|| Reader { running: self.clone(), progress, offset })
    }

    /// The reply from byte `offset` on, as far as it has come.
    pub fn text_from(&self, offset: usize) -> String {
        self.text().get(offset..).unwrap_or_default().to_owned()
    }

    fn text(&self) -> MutexGuard<'_, String> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Listener for Running {
    fn hear(&self, piece: &str) {
        let mut text = self.text();
        text.push_str(piece);
        let length = text.len();
        drop(text);
        self.progress.send_replace(Progress::Coming(length));
    }
}

impl Reader {
    /// Waits for more of the reply, or for its end.
    pub async fn next(&mut self) -> Heard {
        loop {
            let progress = self.progress.borrow_and_update().clone();
            if let Progress::Coming(length) = progress {
                if length > self.offset {
                    return self.take();
                }
            } else if let Progress::Ended(outcome) = progress {
                // What a model that does not stream has said is heard at its end.
                let whole = outcome.as_ref().ok().filter(|answered| answered.response.len() > self.offset);
                return match whole {
                    Some(answered) => {
                        let rest = answered.response[self.offset..].to_owned();
                        self.offset = answered.response.len();
                        Heard::Text(rest)
                    }
                    None => Heard::Ended(outcome),
                };
            }
            if self.progress.changed().await.is_err() {
                return Heard::Ended(Err(Error::Panicked));
            }
        }
    }

    fn take(&mut self) -> Heard {
        let text = self.running.text_from(self.offset);
        self.offset += text.len();
        Heard::Text(text)
    }
}
