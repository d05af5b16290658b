//! The life of a turn: admitted, shown to the model with its context, completed or failed.
//!
//! Two short writes stand around the model's call, and no connection is held during it. The work runs in a task
//! of its own: a client that leaves does not stop it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use tokio_util::task::TaskTracker;

use super::{
    Error,
    context::{Budget, assemble},
    queue::{Place, Queue},
};
use crate::{
    domain::{
        caller::Caller,
        clock::Clock,
        ids::{self, RequestId, SessionId},
        json::Metadata,
        session::{Session, TtlSeconds, UserId},
        tokens,
        turn::Usage,
    },
    model::{self, Ask, Model, Options, Reply},
    store::{self, Admission, Admitted, Destination, Ended, Ending, NotAdmitted, Store, TurnKey},
};

/// How often a busy session of another server is asked again.
const BUSY_RETRY: Duration = Duration::from_millis(100);
/// How long to wait before a turn's end is written again after the database was away.
const END_RETRY: Duration = Duration::from_millis(250);

/// How conversations are held.
#[derive(Clone, Debug)]
pub struct ChatSettings {
    /// What the model is told where a session has no prompt of its own.
    pub system_prompt: String,
    /// Tokens that the model is shown at most.
    pub context_tokens: i64,
    /// The newest turns that come before other parts of the context.
    pub context_turns: usize,
    /// The longest message, in Unicode scalar values.
    pub max_message_chars: usize,
    /// The model's time for a whole answer.
    pub model_timeout: Duration,
    /// How long a running turn is believed to run without a sign of life.
    pub lease: Duration,
    /// How often a running turn gives a sign of life.
    pub lease_renewal: Duration,
    /// How long a message waits for its session.
    pub max_wait: Duration,
}

/// A message to be answered.
#[derive(Debug)]
pub struct Chat {
    /// Where it belongs; without one a temporary session is made.
    pub session: Option<SessionId>,
    pub user: Option<UserId>,
    /// As it was sent; it is trimmed here.
    pub message: String,
    pub metadata: Metadata,
    pub options: Options,
    pub request_id: RequestId,
    /// When the request came in.
    pub received: Instant,
}

/// A completed turn.
#[derive(Clone, Debug)]
pub struct Answered {
    pub response: String,
    pub session: SessionId,
    pub turn: i64,
    pub model: String,
    pub usage: Option<Usage>,
    pub temporary: bool,
    /// From the request's arrival to the model's answer, as it is kept with the turn.
    pub execution: Duration,
}

/// Holds conversations. Cheap to clone.
#[derive(Clone)]
pub struct Engine(Arc<Parts>);

struct Parts {
    store: Store,
    model: Arc<dyn Model>,
    clock: Arc<dyn Clock>,
    settings: ChatSettings,
    queue: Queue,
    tasks: TaskTracker,
}

impl Engine {
    pub fn new(store: Store, model: Arc<dyn Model>, clock: Arc<dyn Clock>, settings: ChatSettings) -> Self {
        let (queue, tasks) = (Queue::default(), TaskTracker::new());
        Self(Arc::new(Parts { store, model, clock, settings, queue, tasks }))
    }

    pub fn model(&self) -> &dyn Model {
        &*self.0.model
    }

    /// Answers a message. It is answered and kept even if the caller stops waiting.
    pub async fn chat(&self, caller: Caller, chat: Chat) -> Result<Answered, Error> {
        let parts = Arc::clone(&self.0);
        let turn = self.0.tasks.spawn(async move { parts.chat(caller, chat).await });
        turn.await.unwrap_or(Err(Error::Panicked))
    }

    /// Waits until every turn under way has ended.
    pub async fn finish(&self) {
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }
}

impl Parts {
    async fn chat(&self, caller: Caller, mut chat: Chat) -> Result<Answered, Error> {
        let message = match self.accept(&chat.message) {
            Ok(message) => message,
            Err(refusal) => return Err(self.session_first(caller, &chat, refusal).await?),
        };
        chat.message = message;

        let (key, admitted, _place) = self.admit(caller, &chat).await?;
        let work = timeout(self.settings.model_timeout, self.ask(caller, key, &mut chat));
        let outcome = tokio::select! {
            outcome = work => outcome.unwrap_or_else(|_| Err(self.timed_out())),
            () = self.keep_lease(key) => Err(Error::Interrupted),
        };
        let execution = chat.received.elapsed();
        match outcome {
            Ok(reply) => self.complete(key, admitted, reply, execution).await,
            Err(error) => {
                self.fail(key, &error, execution).await;
                Err(error)
            }
        }
    }

    /// Trims a message; refuses one that is empty or too long.
    fn accept(&self, message: &str) -> Result<String, Error> {
        let (message, limit) = (message.trim(), self.settings.max_message_chars);
        if message.is_empty() {
            return Err(Error::EmptyMessage);
        }
        if message.chars().nth(limit).is_some() {
            return Err(Error::MessageTooLong { limit });
        }
        Ok(message.to_owned())
    }

    /// A bad message to a bad session is refused for the session, which is checked first.
    async fn session_first(&self, caller: Caller, chat: &Chat, refusal: Error) -> Result<Error, Error> {
        let Some(id) = chat.session else {
            return Ok(refusal);
        };
        let session = self.store.session(caller, id).await?;
        let mine = |session: &Session| chat.user.as_ref().is_none_or(|user| *user == session.user_id);
        let now = self.clock.now();
        let fits = session.is_some_and(|session| session.is_active(now) && mine(&session));
        Ok(if fits { refusal } else { Error::InvalidSession })
    }

    /// Waits for the session and gives the message its number. The place is held until the turn has ended.
    async fn admit(&self, caller: Caller, chat: &Chat) -> Result<(TurnKey, Admitted, Option<Place>), Error> {
        let deadline = Instant::now() + self.settings.max_wait;
        let now = self.clock.now();
        let destination = match chat.session {
            Some(id) => Destination::Existing { id, user: chat.user.clone() },
            None => {
                let session = Session::new(chat.user.clone().unwrap_or_default(), now);
                let session = Session { temporary: true, ..session }.with_ttl(Some(TtlSeconds::TEMPORARY));
                Destination::New(Box::new(session))
            }
        };
        let (session, place) = match &destination {
            Destination::New(session) => (session.id, None),
            Destination::Existing { id, .. } => (*id, self.place(caller, *id, deadline).await?),
        };
        let lease_token = ids::random_bits();
        let mut admission = Admission {
            session: destination,
            message: chat.message.clone(),
            message_tokens: tokens::count(&chat.message),
            metadata: chat.metadata.clone(),
            request_id: chat.request_id.clone(),
            now,
            lease_token,
            lease: self.settings.lease,
        };
        loop {
            admission.now = self.clock.now();
            match self.store.admit_turn(caller, admission.clone()).await? {
                Ok(admitted) => {
                    let key = TurnKey { tenant: caller.tenant, session, turn: admitted.turn, lease_token };
                    return Ok((key, admitted, place));
                }
                Err(NotAdmitted::Invalid) => return Err(Error::InvalidSession),
                Err(NotAdmitted::Busy { turn }) => {
                    if self.clear_expired(session).await? {
                        continue;
                    }
                    if Instant::now() + BUSY_RETRY > deadline {
                        return Err(Error::Busy { turn });
                    }
                    sleep(BUSY_RETRY).await;
                }
            }
        }
    }

    /// A place at the head of the session's line in this server.
    async fn place(&self, caller: Caller, id: SessionId, deadline: Instant) -> Result<Option<Place>, Error> {
        let head = self.queue.head_of_line(caller.tenant, id);
        if let Ok(place) = tokio::time::timeout_at(deadline.into(), head).await {
            return Ok(Some(place));
        }
        let turn = self.store.latest_turn(caller, id).await?.ok_or(Error::InvalidSession)?;
        Err(Error::Busy { turn })
    }

    /// Fails the session's running turn if its server is gone; tells whether it was.
    async fn clear_expired(&self, session: SessionId) -> Result<bool, Error> {
        let mut cleared = false;
        for expired in self.store.expired_turns(Some(session), 1).await? {
            cleared |= self.store.fail_expired_turn(expired, self.clock.now()).await?;
        }
        Ok(cleared)
    }

    /// Assembles the context and asks the model.
    async fn ask(&self, caller: Caller, key: TurnKey, chat: &mut Chat) -> Result<Reply, Error> {
        let budget = Budget { tokens: self.settings.context_tokens, last_turns: self.settings.context_turns };
        let material = self.store.context(caller, key.session, key.turn, budget.tokens).await?;
        let material = material.ok_or(Error::InvalidSession)?;
        let messages = assemble(&material, &self.settings.system_prompt, &chat.message, budget);
        let options = std::mem::take(&mut chat.options);
        let mut reply = self.model.reply(Ask { messages, options }).await?;
        if reply.text.contains('\0') {
            // Postgres cannot keep it, and nobody misses it.
            reply.text = reply.text.replace('\0', "");
        }
        Ok(reply)
    }

    /// Renews a turn's lease for as long as it is waited for; returns once it is lost.
    async fn keep_lease(&self, key: TurnKey) {
        loop {
            sleep(self.settings.lease_renewal).await;
            match self.store.renew_lease(key, self.settings.lease).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    let TurnKey { session, turn, .. } = key;
                    tracing::warn!(%session, turn, error = &error as &dyn std::error::Error, "lease not renewed");
                }
            }
        }
    }

    async fn complete(
        &self,
        key: TurnKey,
        admitted: Admitted,
        reply: Reply,
        execution: Duration,
    ) -> Result<Answered, Error> {
        let Reply { text: response, model, usage } = reply;
        let response_tokens = tokens::count(&response);
        let ending =
            Ending::Completed { response: response.clone(), response_tokens, model: model.clone(), usage };
        match self.end(key, ending, execution).await? {
            Ended::Stored => {
                let TurnKey { session, turn, .. } = key;
                let temporary = admitted.temporary;
                Ok(Answered { response, session, turn, model, usage, temporary, execution })
            }
            Ended::LeaseLost => Err(Error::Interrupted),
            Ended::Gone => Err(Error::InvalidSession),
        }
    }

    /// Records why a turn failed. If this fails too, the turn's lease runs out and ends it.
    async fn fail(&self, key: TurnKey, error: &Error, execution: Duration) {
        let ending = Ending::Failed { code: error.code(), message: error.to_string() };
        if let Err(error) = self.end(key, ending, execution).await {
            let TurnKey { session, turn, .. } = key;
            tracing::error!(%session, turn, error = &error as &dyn std::error::Error, "failed turn not recorded");
        }
    }

    /// Writes a turn's end, again and again while the database is away and the lease may still hold.
    async fn end(&self, key: TurnKey, ending: Ending, execution: Duration) -> Result<Ended, store::Error> {
        let give_up = Instant::now() + self.settings.lease;
        loop {
            match self.store.end_turn(key, ending.clone(), execution, self.clock.now()).await {
                Err(store::Error::Unavailable(_)) if Instant::now() < give_up => sleep(END_RETRY).await,
                ended => return ended,
            }
        }
    }

    fn timed_out(&self) -> Error {
        let seconds = self.settings.model_timeout.as_secs_f64();
        Error::Model(model::Error::TimedOut(format!("The model did not answer within {seconds} seconds")))
    }
}

impl Error {
    /// The name under which a failed turn records this.
    fn code(&self) -> &'static str {
        match self {
            Self::InvalidSession => "INVALID_SESSION",
            Self::EmptyMessage => "INVALID_REQUEST",
            Self::MessageTooLong { .. } => "MESSAGE_TOO_LONG",
            Self::Busy { .. } => "SESSION_BUSY",
            Self::Interrupted => "INTERRUPTED",
            Self::Store(store::Error::Unavailable(_)) => "DATABASE_UNAVAILABLE",
            Self::Store(_) | Self::Panicked => "INTERNAL_ERROR",
            Self::Model(model::Error::Failed(_)) => "UPSTREAM_ERROR",
            Self::Model(model::Error::TimedOut(_)) => "UPSTREAM_TIMEOUT",
            Self::Model(model::Error::Unavailable { .. }) => "UPSTREAM_UNAVAILABLE",
        }
    }
}
