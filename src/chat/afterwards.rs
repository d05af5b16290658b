//! What is done with a turn once it has been answered: facts that a model finds, and the summary. Nobody waits for
//! it, and a failure is logged and forgotten.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::sync::Semaphore;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    ChatSettings,
    facts::{self, Extract},
    meter::Metered,
    summary::Due,
};
use crate::{
    domain::{
        caller::TenantId,
        clock::Clock,
        ids::{self, SessionId},
        session::UserId,
    },
    model::Model,
    store::{Account, Completion, Store, TurnKey},
    telemetry::{carried, traces::Span},
};

/// Works at once: few, since they ask the same model as chats do.
const AT_ONCE: usize = 2;
/// Works that wait; more are not done.
const WAITING: usize = 1000;

/// Does what is due after turns.
pub struct Afterwards(Arc<Parts>);

struct Parts {
    store: Store,
    model: Arc<dyn Model>,
    extract: Extract,
    /// Whether users have a budget of tokens, off which what is done here is taken.
    budgets: bool,
    clock: Arc<dyn Clock>,
    /// Tokens that a summary may have.
    summary_tokens: i64,
    time: Duration,
    tasks: TaskTracker,
    stopping: CancellationToken,
    waiting: Semaphore,
    at_once: Semaphore,
    /// Sessions whose summary is being made.
    summarised: Mutex<HashSet<(TenantId, SessionId)>>,
}

impl Afterwards {
    pub fn new(
        store: Store,
        model: Arc<dyn Model>,
        clock: Arc<dyn Clock>,
        settings: &ChatSettings,
        tasks: TaskTracker,
    ) -> Self {
        Self(Arc::new(Parts {
            store,
            model,
            extract: settings.extract,
            budgets: settings.tokens_per_user_day.is_some(),
            clock,
            summary_tokens: (settings.context_tokens / 10).clamp(32, 1000),
            time: settings.model_timeout,
            tasks,
            stopping: CancellationToken::new(),
            waiting: Semaphore::new(WAITING),
            at_once: Semaphore::new(AT_ONCE),
            summarised: Mutex::default(),
        }))
    }

    /// Does what is due after a turn, in the background.
    pub fn work(&self, key: TurnKey, completion: &Arc<Completion>, due: Option<Due>) {
        let parts = &self.0;
        let stated = parts.extract == Extract::Model && completion.user != UserId::default();
        let due = due.filter(|due| parts.lock().insert((due.tenant, due.session)));
        if !stated && due.is_none() {
            return;
        }
        let (parts, completion) = (parts.clone(), completion.clone());
        let mark = due.as_ref().map(|due| Mark { parts: parts.clone(), session: (due.tenant, due.session) });
        let span = Span::begin("afterwards");
        let done = async move {
            let _mark = mark;
            let work = async {
                let Ok(_place) = parts.waiting.try_acquire() else {
                    tracing::warn!("too much is due: nothing learnt");
                    return;
                };
                let Ok(_turn) = parts.at_once.acquire().await else { return };
                let metered = Metered::new(&*parts.model);
                if stated {
                    parts.learn(key, &completion, &metered).await;
                }
                if let Some(due) = due {
                    parts.summarise(due, &metered).await;
                }
                parts.charge(key.tenant, &completion.user, metered.spent()).await;
            };
            // A server that stops does not wait for this.
            tokio::select! {
                () = work => {}
                () = parts.stopping.cancelled() => {}
            }
        };
        self.0.tasks.spawn(carried(span.run(done)));
    }

    /// Gives up what is under way.
    pub fn stop(&self) {
        self.0.stopping.cancel();
    }
}

/// That a session's summary is being made, for as long as this lives.
struct Mark {
    parts: Arc<Parts>,
    session: (TenantId, SessionId),
}

impl Drop for Mark {
    fn drop(&mut self) {
        self.parts.lock().remove(&self.session);
    }
}

impl Parts {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashSet<(TenantId, SessionId)>> {
        self.summarised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn charge(&self, tenant: TenantId, user: &UserId, tokens: i64) {
        if !self.budgets || tokens == 0 {
            return;
        }
        let (user, at) = (user.clone(), self.clock.now());
        let account = Account { tenant, user, at, work: ids::random_bits() };
        if let Err(error) = self.store.charge(&account, tokens).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "tokens not charged");
        }
    }

    async fn learn(&self, key: TurnKey, completion: &Completion, model: &dyn Model) {
        let facts = facts::by_model(model, &completion.message, self.time).await;
        if facts.is_empty() {
            return;
        }
        if let Err(error) = self.store.keep_facts(key, &completion.user, facts).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "facts not kept");
        }
    }

    async fn summarise(&self, due: Due, model: &dyn Model) {
        let model = (self.extract != Extract::Off && model.follows_instructions()).then_some(model);
        if let Err(error) = due.work(&self.store, model, self.summary_tokens, self.time).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "summary not kept");
        }
    }
}
