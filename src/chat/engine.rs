//! The life of a turn: admitted, shown to the model with its context, completed, failed or cancelled.
//!
//! Two short writes stand around the model's call, and no connection is held during it. The work runs in a task
//! of its own: a client that leaves does not stop it.

use std::{
    convert::Infallible,
    future::pending,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::task::TaskTracker;

use super::{
    Error,
    afterwards::Afterwards,
    context::{Budget, Context, assemble, cost_of_message},
    facts::{self, Extract},
    follow::{Follower, Listening},
    live::{Entered, Live, Reader, Running},
    meter::Metered,
    queue::{Place, Queue},
    recall::recall,
    summary::Due,
};
use crate::{
    domain::{
        caller::{Caller, TenantId},
        clock::Clock,
        ids::{self, RequestId, SessionId},
        json::Metadata,
        session::{Session, TtlSeconds, UserId},
        tokens,
        turn::{NewTurn, Turn, Usage},
    },
    model::{Ask, Model, Options, Reply},
    store::{
        self, Account, Admission, Admitted, Appendix, Cancelled, Claim, Completion, Destination, Ended,
        Ending, Material, NotAdmitted, RememberTurns, Store, TurnKey,
    },
    telemetry::{carried, metrics::METRICS, traces::Span},
};

/// How often a session that is busy at another server is asked again.
const BUSY_RETRY: Duration = Duration::from_millis(25);
/// How long to wait before a write is tried again after the database was away.
const WRITE_RETRY: Duration = Duration::from_millis(250);
/// How often an admission is tried while the database is away.
const ADMISSIONS: u32 = 3;
/// How often the reply that comes is kept for readers at other servers.
const KEEP: Duration = Duration::from_secs(1);
/// Messages that may be worked on at once, those that wait included.
const MAX_CHATS: usize = 10_000;
/// How many messages may be admitted at once for each to read its context meanwhile.
const FEW: usize = 2;

/// How conversations are held.
#[derive(Clone, Debug)]
pub struct ChatSettings {
    /// What the model is told where a session has no prompt of its own.
    pub system_prompt: String,
    /// Tokens that the model is shown at most.
    pub context_tokens: i64,
    /// The newest turns that come before other parts of the context.
    pub context_turns: usize,
    /// How facts are learnt.
    pub extract: Extract,
    /// The tokens that a user may use in a day, UTC; as many as they like if absent.
    pub tokens_per_user_day: Option<i64>,
    /// The longest message, in Unicode scalar values.
    pub max_message_chars: usize,
    /// The model's time for a whole answer, retries included.
    pub model_timeout: Duration,
    /// How long a running turn is believed to run without a sign of life.
    pub lease: Duration,
    /// How often a running turn gives a sign of life.
    pub lease_renewal: Duration,
    /// How long a message waits for its session.
    pub max_wait: Duration,
    /// Messages whose admission and context are worked on at once.
    pub max_entering: usize,
    /// Messages that may wait to be among them; beyond these, chats are refused before they are read.
    pub max_entry_waiting: usize,
    /// How long a message waits to be among them.
    pub max_entry_wait: Duration,
}

/// What to do with a message whose session is busy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBusy {
    /// It waits its turn.
    #[default]
    Queue,
    /// It is refused.
    Reject,
    /// The running turn is cancelled.
    Interrupt,
}

/// A key that came with a message, and how the answer is written that it remembers.
pub struct Remember {
    pub claim: Claim,
    pub render: fn(&Answered) -> String,
}

/// A message to be answered.
pub struct Chat {
    /// Where it belongs; without one a temporary session is made.
    pub session: Option<SessionId>,
    pub user: Option<UserId>,
    /// As it was sent; it is trimmed here.
    pub message: String,
    pub metadata: Metadata,
    pub options: Options,
    pub on_busy: OnBusy,
    /// Whether the reply is to be heard while it comes.
    pub stream: bool,
    pub request_id: RequestId,
    /// When the request came in.
    pub received: Instant,
    /// Its part of what is left for messages; given back once it is answered.
    pub share: Option<OwnedSemaphorePermit>,
    pub remember: Option<Remember>,
}

/// A completed turn.
#[derive(Clone, Debug)]
pub struct Answered {
    pub response: String,
    pub session: SessionId,
    pub turn: i64,
    pub request_id: RequestId,
    pub model: String,
    pub usage: Option<Usage>,
    pub temporary: bool,
    /// From the request's arrival to the model's answer, as it is kept with the turn.
    pub execution: Duration,
}

/// A turn that has begun, and its reply as it comes.
pub struct Started {
    pub session: SessionId,
    pub turn: i64,
    pub reader: Reader,
}

/// What comes of a wish to see what the model would be shown.
pub enum Preview {
    UnknownSession,
    /// The message alone is more than the tokens asked for; it takes so many.
    TooSmall(i64),
    Shown(Box<Context>),
}

/// What comes of a wish to listen to a turn.
pub enum Followed {
    UnknownSession,
    UnknownTurn,
    /// No character of the reply begins there.
    NoSuchOffset,
    Listening(Listening),
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
    live: Live,
    tasks: TaskTracker,
    places: Arc<Semaphore>,
    /// Where messages wait before the database: a line of the writer's own could not be left any more.
    entrance: Arc<Semaphore>,
    /// A permit for each that may wait there.
    waiting: Semaphore,
    afterwards: Afterwards,
}

/// A message that has been admitted.
struct Begun {
    key: TurnKey,
    admitted: Admitted,
    /// Its place at the head of its session's line, until the turn has ended.
    place: Option<Place>,
    /// Held until its context is read.
    entry: OwnedSemaphorePermit,
    /// What was known in the session while it was admitted, if nothing was said there in between.
    known: Option<Material>,
}

impl Engine {
    pub fn new(store: Store, model: Arc<dyn Model>, clock: Arc<dyn Clock>, settings: ChatSettings) -> Self {
        let (queue, live, tasks) = (Queue::default(), Live::default(), TaskTracker::new());
        let places = Arc::new(Semaphore::new(MAX_CHATS));
        let entrance = Arc::new(Semaphore::new(settings.max_entering));
        let waiting = Semaphore::new(settings.max_entry_waiting);
        let afterwards =
            Afterwards::new(store.clone(), model.clone(), clock.clone(), &settings, tasks.clone());
        Self(Arc::new(Parts {
            store,
            model,
            clock,
            settings,
            queue,
            live,
            tasks,
            places,
            entrance,
            waiting,
            afterwards,
        }))
    }

    pub fn model(&self) -> &dyn Model {
        &*self.0.model
    }

    /// Turns that run here, and messages that wait here for their session.
    pub fn load(&self) -> (usize, usize) {
        (self.0.live.count(), self.0.queue.waiting())
    }

    /// Whether so many messages wait to be admitted that another would only make them wait longer.
    pub fn is_full(&self) -> bool {
        self.0.waiting.available_permits() == 0
    }

    /// How long a claimed key and a running turn are believed to be worked on without a sign of life.
    pub fn lease(&self) -> Duration {
        self.0.settings.lease
    }

    /// Answers a message. It is answered and kept even if the caller stops waiting.
    pub async fn chat(&self, caller: Caller, chat: Chat) -> Result<Answered, Error> {
        let (started, _) = oneshot::channel();
        self.spawn(caller, chat, started)?.await.unwrap_or(Err(Error::Panicked))
    }

    /// Begins to answer a message; returns once it is admitted. It is answered and kept even if nobody listens.
    pub async fn start(&self, caller: Caller, chat: Chat) -> Result<Started, Error> {
        let (sender, started) = oneshot::channel();
        let turn = self.spawn(caller, chat, sender)?;
        match started.await {
            Ok(started) => Ok(started),
            // It ended before it began.
            Err(_) => match turn.await {
                Ok(Err(error)) => Err(error),
                _ => Err(Error::Panicked),
            },
        }
    }

    /// Listens to a turn's reply from byte `offset` on, wherever it runs or ran.
    pub async fn follow(
        &self,
        caller: &Caller,
        session: SessionId,
        turn: i64,
        offset: usize,
    ) -> Result<Followed, store::Error> {
        let store = &self.0.store;
        let Some(kept) = store.session(caller, session).await? else { return Ok(Followed::UnknownSession) };
        // Whoever runs here is asked first: it may end between the two looks, but not begin.
        if let Some(running) = self.0.live.get((caller.tenant, session, turn)) {
            return Ok(running
                .listen(offset)
                .map_or(Followed::NoSuchOffset, |r| Followed::Listening(r.into())));
        }
        let Some(record) = store.turn(caller, session, turn).await? else { return Ok(Followed::UnknownTurn) };
        if record.response.as_ref().is_some_and(|response| !response.is_char_boundary(offset)) {
            return Ok(Followed::NoSuchOffset);
        }
        Ok(Followed::Listening(
            Follower::new(store.clone(), caller.clone(), &record, kept.temporary, offset).into(),
        ))
    }

    /// Cancels a running turn, wherever it runs.
    pub async fn cancel(
        &self,
        caller: &Caller,
        session: SessionId,
        turn: i64,
    ) -> Result<Cancelled, store::Error> {
        let cancelled = self.0.store.cancel_turn(caller, session, turn, self.0.clock.now()).await?;
        if cancelled == Cancelled::Done {
            self.0.live.cancel((caller.tenant, session, turn));
        }
        Ok(cancelled)
    }

    /// Ends the work on a session's turns, if any runs here: the session is gone.
    pub fn session_deleted(&self, tenant: TenantId, session: SessionId) {
        self.0.live.cancel_all(tenant, session);
    }

    /// Ends the work on a turn that was cancelled at another server.
    pub fn cancelled_elsewhere(&self, tenant: TenantId, session: SessionId, turn: i64) {
        self.0.live.cancel((tenant, session, turn));
    }

    /// Adds turns made elsewhere to a session in which none runs. Rules learn from their messages.
    pub async fn append(
        &self,
        caller: &Caller,
        session: SessionId,
        turns: Vec<NewTurn>,
        request_id: RequestId,
        remember: Option<RememberTurns>,
    ) -> Result<Vec<Turn>, Error> {
        let parts = &self.0;
        let limit = parts.settings.max_message_chars;
        let owner = parts.store.session(caller, session).await?.ok_or(Error::InvalidSession)?.user_id;
        if turns.iter().any(|turn| turn.message.chars().nth(limit).is_some()) {
            return Err(Error::MessageTooLong { limit });
        }
        let extract = match parts.settings.extract {
            Extract::Off => Extract::Off,
            Extract::Rules | Extract::Model => Extract::Rules,
        };
        let learnt = turns.iter().map(|turn| facts::by_rules(extract, &owner, &turn.message)).collect();
        let now = parts.clock.now();
        let appendix = Appendix { session, turns, learnt, request_id, now, remember };
        loop {
            match parts.store.append_turns(caller, appendix.clone()).await? {
                Ok(turns) => return Ok(turns),
                Err(NotAdmitted::Invalid | NotAdmitted::OverBudget) => return Err(Error::InvalidSession),
                Err(NotAdmitted::Busy { turn }) => {
                    if !parts.clear_expired(caller.tenant, session).await? {
                        return Err(Error::Busy { turn });
                    }
                }
            }
        }
    }

    /// What the model would be shown for `message` in at most `tokens`, or as many as it is set to.
    pub async fn preview(
        &self,
        caller: &Caller,
        session: SessionId,
        message: Option<&str>,
        tokens: Option<i64>,
    ) -> Result<Preview, Error> {
        let parts = &self.0;
        let budget = Budget { tokens: tokens.unwrap_or(parts.settings.context_tokens), ..parts.budget() };
        let Some(material) = parts.store.next_context(caller, session, budget.tokens).await? else {
            return Ok(Preview::UnknownSession);
        };
        let needed = message.map_or(0, cost_of_message);
        if needed > budget.tokens {
            return Ok(Preview::TooSmall(needed));
        }
        let context = parts.assemble((caller.tenant, session), &material, message, budget).await;
        Ok(Preview::Shown(Box::new(context)))
    }

    /// Waits until every turn under way has ended.
    pub async fn finish(&self) {
        self.0.afterwards.stop();
        self.0.tasks.close();
        self.0.tasks.wait().await;
    }

    fn spawn(
        &self,
        caller: Caller,
        mut chat: Chat,
        started: oneshot::Sender<Started>,
    ) -> Result<tokio::task::JoinHandle<Result<Answered, Error>>, Error> {
        let parts = Arc::clone(&self.0);
        let Ok(place) = self.0.places.clone().try_acquire_owned() else {
            if let Some(Remember { claim, .. }) = chat.remember {
                self.0.tasks.spawn(carried(async move { parts.store.release_claim(claim).await }));
            }
            return Err(Error::Overloaded);
        };
        let share = chat.share.take();
        Ok(self.0.tasks.spawn(carried(async move {
            let span = Span::begin("turn");
            let answered = span.run(parts.chat(&caller, chat, started)).await;
            span.end(answered.as_ref().err().map(Error::code));
            drop((place, share));
            answered
        })))
    }
}

impl Parts {
    async fn chat(
        &self,
        caller: &Caller,
        mut chat: Chat,
        started: oneshot::Sender<Started>,
    ) -> Result<Answered, Error> {
        Span::current().describe(|| [("tenant", Some(caller.tenant.number().into()))]);
        if let Some(session) = chat.session {
            name_session(session);
        }
        let remember = chat.remember.take();
        let claim = remember.as_ref().map(|remember| remember.claim.clone());
        let begun = match self.accept(&chat.message) {
            Ok(message) => {
                chat.message = message;
                let span = Span::begin("admit");
                let begun = tokio::select! {
                    begun = span.run(self.admit(caller, &chat, claim.as_ref())) => begun,
                    never = self.keep_claim(claim.clone()) => match never {},
                };
                span.end(begun.as_ref().err().map(Error::code));
                begun
            }
            Err(refusal) => Err(self.session_first(caller, &chat, refusal).await),
        };
        let outcome = match begun {
            Ok(Begun { key, admitted, place, entry, known }) => {
                if chat.session.is_none() {
                    name_session(key.session);
                }
                tracing::Span::current().record("turn", key.turn);
                Span::current().describe(|| [("turn", Some(key.turn.into()))]);
                let entered = self.live.enter((key.tenant, key.session, key.turn));
                if let Some(reader) = entered.running.listen(0) {
                    let _ = started.send(Started { session: key.session, turn: key.turn, reader });
                }
                let received = chat.received;
                // Boxed, since those that wait to be admitted need no room for it.
                let outcome =
                    Box::pin(self.run(chat, key, admitted, (entry, known), remember, &entered)).await;
                drop(place);
                count_turn(&outcome, received);
                entered.ended(outcome.clone());
                outcome
            }
            Err(error) => Err(error),
        };
        // A cancelled turn is remembered, by whoever cancelled it; any other failure frees the key.
        if let (Some(claim), Err(error)) = (claim, &outcome)
            && !matches!(error, Error::Cancelled)
            && let Err(error) = self.store.release_claim(claim).await
        {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "idempotency key not freed before its lease"
            );
        }
        outcome
    }

    /// Works on an admitted turn to its end.
    async fn run(
        &self,
        chat: Chat,
        key: TurnKey,
        admitted: Admitted,
        entry: (OwnedSemaphorePermit, Option<Material>),
        remember: Option<Remember>,
        entered: &Entered,
    ) -> Result<Answered, Error> {
        let (request_id, received, stream) = (chat.request_id.clone(), chat.received, chat.stream);
        let claim = remember.as_ref().map(|remember| remember.claim.clone());
        let message = chat.message.clone();
        let metered = Metered::new(&*self.model);
        let outcome = tokio::select! {
            outcome = self.ask(key, chat, entry, &metered, &entered.running) => outcome,
            () = self.keep_lease(key, claim) => Err(Error::Interrupted),
            () = entered.running.cancelled.cancelled() => Err(Error::Cancelled),
            () = self.keep_pieces(key, &entered.running), if stream => Err(Error::Interrupted),
        };
        let execution = received.elapsed();
        let (reply, due) = match outcome {
            Ok(replied) => replied,
            Err(error) => {
                let spent = metered.spent() + tokens::count(&entered.running.text_from(0));
                self.charge(key, &admitted, spent).await;
                return Err(self.fail(key, error, execution).await);
            }
        };
        let answered = Answered {
            response: reply.text,
            session: key.session,
            turn: key.turn,
            request_id,
            model: reply.model,
            usage: reply.usage,
            temporary: admitted.temporary,
            execution,
        };
        let remember = remember.map(|remember| (remember.claim, (remember.render)(&answered)));
        let completion = Completion {
            learnt: facts::by_rules(self.settings.extract, &admitted.user, &message),
            user: admitted.user,
            message,
            created_at: admitted.created_at,
            response: answered.response.clone(),
            response_tokens: tokens::count(&answered.response),
            model: answered.model.clone(),
            usage: answered.usage,
            charge: self.settings.tokens_per_user_day.map(|_| metered.spent()),
        };
        let completion = Arc::new(completion);
        let ending = Ending::Completed(completion.clone());
        match self.end(key, ending, execution, stream, remember).await {
            Ok(Ended::Stored) => {
                self.afterwards.work(key, &completion, due);
                Ok(answered)
            }
            Ok(ended) => Err(Error::by(ended)),
            Err(error @ store::Error::Unavailable(_)) => Err(error.into()),
            // The answer cannot be kept; the session must not wait for the lease.
            Err(error) => Err(self.fail(key, error.into(), execution).await),
        }
    }

    /// Takes what an unanswered message has cost off its user's budget.
    async fn charge(&self, key: TurnKey, admitted: &Admitted, tokens: i64) {
        if self.settings.tokens_per_user_day.is_none() || tokens == 0 {
            return;
        }
        let (user, at) = (admitted.user.clone(), admitted.created_at);
        let account = Account { tenant: key.tenant, user, at, work: key.lease_token };
        if let Err(error) = self.store.charge(&account, tokens).await {
            tracing::warn!(error = &error as &dyn std::error::Error, "tokens not charged");
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

    /// A message to a bad session is refused for the session, which is checked first, whatever `refusal` says.
    async fn session_first(&self, caller: &Caller, chat: &Chat, refusal: Error) -> Error {
        let Some(id) = chat.session else { return refusal };
        let mine = |session: &Session| chat.user.as_ref().is_none_or(|user| *user == session.user_id);
        let now = self.clock.now();
        match self.store.session(caller, id).await {
            Ok(session) if session.as_ref().is_some_and(|s| s.is_active(now) && mine(s)) => refusal,
            Ok(_) => Error::InvalidSession,
            Err(error) => error.into(),
        }
    }

    /// Waits for the session and the database, and gives the message its number.
    async fn admit(&self, caller: &Caller, chat: &Chat, claim: Option<&Claim>) -> Result<Begun, Error> {
        let deadline = Instant::now() + self.settings.max_wait;
        let (destination, session, place) = match chat.session {
            Some(id) => {
                // Before it can be told whether somebody's session is busy.
                if caller.user.is_some() && self.store.session(caller, id).await?.is_none() {
                    return Err(Error::InvalidSession);
                }
                let place = self.place(caller, chat, id, deadline).await?;
                (Destination::Existing { id, user: chat.user.clone() }, id, place)
            }
            None => {
                let session = Session::new(chat.user.clone().unwrap_or_default(), self.clock.now());
                let session = Session { temporary: true, ..session }.with_ttl(Some(TtlSeconds::TEMPORARY));
                let id = session.id;
                (Destination::New(Box::new(session)), id, None)
            }
        };
        let lease_token = ids::random_bits();
        let mut admission = Admission {
            session: destination,
            message: chat.message.clone(),
            message_tokens: tokens::count(&chat.message),
            metadata: chat.metadata.clone(),
            request_id: chat.request_id.clone(),
            now: self.clock.now(),
            lease_token,
            lease: self.settings.lease,
            interrupt: chat.on_busy == OnBusy::Interrupt,
            wait: chat.on_busy == OnBusy::Queue,
            claim: claim.cloned(),
            budget: self.settings.tokens_per_user_day,
        };
        let mut entry = self.entry().await?;
        let mut failures = 0;
        loop {
            admission.now = self.clock.now();
            let mut known = None;
            let admitted = tokio::select! {
                admitted = self.store.admit_turn(caller, admission.clone()) => admitted,
                never = async { known = self.known(caller, chat).await; pending().await } => match never {},
            };
            match admitted {
                Ok(Ok(admitted)) => {
                    if let Some(interrupted) = admitted.interrupted {
                        self.live.cancel((caller.tenant, session, interrupted));
                    }
                    let key = TurnKey { tenant: caller.tenant, session, turn: admitted.turn, lease_token };
                    let known = known.filter(|known| known.next_turn == Some(admitted.turn));
                    return Ok(Begun { key, admitted, place, entry, known });
                }
                Ok(Err(NotAdmitted::Invalid)) => return Err(Error::InvalidSession),
                Ok(Err(NotAdmitted::OverBudget)) => {
                    let budget = self.settings.tokens_per_user_day.unwrap_or_default();
                    return Err(Error::OverBudget { budget, resets_in: admission.now.left_of_day() });
                }
                Ok(Err(NotAdmitted::Busy { turn })) => {
                    if self.clear_expired(caller.tenant, session).await? {
                        continue;
                    }
                    if chat.on_busy == OnBusy::Reject || Instant::now() + BUSY_RETRY > deadline {
                        return Err(Error::Busy { turn });
                    }
                    drop(entry);
                    sleep(BUSY_RETRY).await;
                    entry = self.entry().await?;
                }
                // Whether it was admitted is unknown; with its token it would be found again.
                Err(store::Error::Unavailable(_)) if failures < ADMISSIONS => {
                    failures += 1;
                    sleep(WRITE_RETRY).await;
                    if self.store.latest_turn(caller, session).await?.is_some() {
                        let user = chat.user.clone();
                        admission.session = Destination::Existing { id: session, user };
                    }
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// What is known in a session before its next turn, read while that is admitted: nearly always the session is free, and
    /// this is there before the commit. Nothing where many are admitted, since those who read afterwards share statements,
    /// or where it cannot be read, which is tried again.
    async fn known(&self, caller: &Caller, chat: &Chat) -> Option<Material> {
        let entering = self.settings.max_entering.saturating_sub(self.entrance.available_permits());
        let session = chat.session.filter(|_| entering <= FEW)?;
        self.store.next_context(caller, session, self.settings.context_tokens).await.ok().flatten()
    }

    /// Lets a message in to the database. Beyond what can be admitted in a bearable time, messages are refused while
    /// nothing is written of them; each waits for those that came before it only.
    async fn entry(&self) -> Result<OwnedSemaphorePermit, Error> {
        let _waiting = self.waiting.try_acquire().map_err(|_| Error::Overloaded)?;
        match timeout(self.settings.max_entry_wait, self.entrance.clone().acquire_owned()).await {
            Ok(Ok(entry)) => Ok(entry),
            _ => Err(Error::Overloaded),
        }
    }

    /// A place at the head of the session's line in this server, as far as the message wants to wait.
    async fn place(
        &self,
        caller: &Caller,
        chat: &Chat,
        id: SessionId,
        deadline: Instant,
    ) -> Result<Option<Place>, Error> {
        if chat.on_busy == OnBusy::Interrupt {
            return Ok(None);
        }
        if let Some(place) = self.queue.if_free(caller.tenant, id) {
            return Ok(Some(place));
        }
        if chat.on_busy == OnBusy::Reject {
            // Whether a turn runs, and whose session it is, is decided by the admission.
            return Ok(None);
        }
        let busy = async || {
            let turn = self.store.latest_turn(caller, id).await?;
            let busy = Error::Busy { turn: turn.ok_or(Error::InvalidSession)? };
            Ok::<_, Error>(self.session_first(caller, chat, busy).await)
        };
        // A stranger does not wait, and learns nothing.
        let refusal = busy().await?;
        if !matches!(refusal, Error::Busy { .. }) {
            return Err(refusal);
        }
        let head = self.queue.head_of_line(caller.tenant, id);
        match tokio::time::timeout_at(deadline.into(), head).await {
            Ok(place) => Ok(Some(place)),
            Err(_) => Err(busy().await?),
        }
    }

    /// Fails the session's running turn if its server is gone; tells whether it was.
    async fn clear_expired(&self, tenant: TenantId, session: SessionId) -> Result<bool, Error> {
        let mut cleared = false;
        for expired in self.store.expired_turns(Some((tenant, session)), 1).await? {
            cleared |= self.store.fail_expired_turn(expired, self.clock.now()).await?;
        }
        Ok(cleared)
    }

    /// Assembles the context and asks the model; also what is then due to be summarised.
    async fn ask(
        &self,
        key: TurnKey,
        chat: Chat,
        (entry, known): (OwnedSemaphorePermit, Option<Material>),
        model: &dyn Model,
        listener: &Arc<Running>,
    ) -> Result<(Reply, Option<Due>), Error> {
        let deadline = tokio::time::Instant::now() + self.settings.model_timeout;
        let span = Span::begin("context");
        let context = span.run(self.context(key, &chat.message, known)).await;
        span.end(context.as_ref().err().map(Error::code));
        drop(entry);
        let (context, due) = context?;
        let ask = Ask { messages: context.messages, options: chat.options, stream: chat.stream, deadline };
        Ok((model.reply(&ask, &**listener).await?, due))
    }

    /// What the model is to be shown, and what is then due to be summarised.
    async fn context(
        &self,
        key: TurnKey,
        message: &str,
        known: Option<Material>,
    ) -> Result<(Context, Option<Due>), Error> {
        let budget = self.budget();
        let material = match known {
            Some(material) => material,
            // It may have been cancelled before this server knew it to run.
            None => self.store.context(key, budget.tokens).await?.ok_or(Error::Interrupted)?,
        };
        let session = (key.tenant, key.session);
        let context = self.assemble(session, &material, Some(message), budget).await;
        let due = Due::after(session, &material, context.first_turn);
        Ok((context, due))
    }

    fn budget(&self) -> Budget {
        Budget { tokens: self.settings.context_tokens, last_turns: self.settings.context_turns }
    }

    /// Assembles a context; where not every turn fits, with older ones that bear on the message.
    async fn assemble(
        &self,
        (tenant, session): (TenantId, SessionId),
        material: &Material,
        message: Option<&str>,
        budget: Budget,
    ) -> Context {
        let prompt = &self.settings.system_prompt;
        let context = assemble(material, prompt, message, &[], budget);
        let (Some(message), 1..) = (message, context.dropped.recent_turns) else { return context };
        let before = context.first_turn.unwrap_or(i64::MAX);
        match recall(&self.store, (tenant, session), message, before, material.all_turns).await {
            Ok(recalled) if !recalled.is_empty() => {
                assemble(material, prompt, Some(message), &recalled, budget)
            }
            Ok(_) => context,
            // The message can be answered without.
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "nothing recalled");
                context
            }
        }
    }

    /// Renews a turn's lease for as long as it is waited for; returns once it is lost.
    async fn keep_lease(&self, key: TurnKey, claim: Option<Claim>) {
        loop {
            sleep(self.settings.lease_renewal).await;
            match self.store.renew_lease(key, claim.clone(), self.settings.lease).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "lease not renewed");
                }
            }
        }
    }

    /// Renews the claim of a message that waits for its session.
    async fn keep_claim(&self, claim: Option<Claim>) -> Infallible {
        let Some(claim) = claim else { return pending().await };
        loop {
            sleep(self.settings.lease_renewal).await;
            if let Err(error) = self.store.renew_claim(claim.clone(), self.settings.lease).await {
                tracing::warn!(error = &error as &dyn std::error::Error, "claim not renewed");
            }
        }
    }

    /// Keeps the reply as it comes, a second's worth at a time, for readers at other servers. Never returns.
    async fn keep_pieces(&self, key: TurnKey, running: &Arc<Running>) {
        let mut ticks = interval(KEEP);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks.tick().await;
        let mut kept = 0;
        loop {
            ticks.tick().await;
            let text = running.text_from(kept);
            if text.is_empty() {
                continue;
            }
            let (start, length) = (i64::try_from(kept).unwrap_or(i64::MAX), text.len());
            match self.store.keep_piece(key, start, text).await {
                Ok(()) => kept += length,
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "piece of a reply not kept");
                }
            }
        }
    }

    /// Records why a turn failed; the error that its caller gets. If this fails too, the turn's lease runs out and
    /// ends it.
    async fn fail(&self, key: TurnKey, error: Error, execution: Duration) -> Error {
        if let Error::Model(error) = &error {
            tracing::warn!(error = error as &dyn std::error::Error, "model failed");
        }
        let ending = Ending::Failed { code: error.code().to_owned(), message: error.to_string() };
        match self.end(key, ending, execution, true, None).await {
            Ok(Ended::Stored) => error,
            Ok(ended) => Error::by(ended),
            Err(failure) => {
                tracing::error!(error = &failure as &dyn std::error::Error, "failed turn not recorded");
                error
            }
        }
    }

    /// Writes a turn's end, again and again while the database is away and the lease may still hold.
    async fn end(
        &self,
        key: TurnKey,
        ending: Ending,
        execution: Duration,
        streamed: bool,
        remember: Option<(Claim, String)>,
    ) -> Result<Ended, store::Error> {
        let give_up = Instant::now() + self.settings.lease;
        let span = Span::begin("complete");
        let ended = span.run(async {
            loop {
                let (ending, remember, now) = (ending.clone(), remember.clone(), self.clock.now());
                match self.store.end_turn(key, ending, execution, streamed, now, remember).await {
                    Err(store::Error::Unavailable(_)) if Instant::now() < give_up => sleep(WRITE_RETRY).await,
                    ended => return ended,
                }
            }
        });
        let ended = ended.await;
        let failure = ended.clone().err().map(Error::from);
        span.end(failure.as_ref().map(Error::code));
        ended
    }
}

/// Names the session that a message belongs to, in the log and in its trace.
fn name_session(id: SessionId) {
    tracing::Span::current().record("session_id", tracing::field::display(id));
    Span::current().describe(|| [("session_id", Some(id.to_string().into()))]);
}

/// Tells how a turn ended, and how long its caller waited.
fn count_turn(outcome: &Result<Answered, Error>, received: Instant) {
    let status = match outcome {
        Ok(_) => "completed",
        Err(Error::Cancelled) => "cancelled",
        Err(_) => "failed",
    };
    METRICS.turns.with_label_values(&[status]).observe(received.elapsed().as_secs_f64());
}

impl Error {
    /// Why a turn could not be ended as it should have been.
    fn by(ended: Ended) -> Self {
        match ended {
            Ended::Cancelled => Self::Cancelled,
            Ended::Gone => Self::InvalidSession,
            Ended::LeaseLost | Ended::Stored => Self::Interrupted,
        }
    }

    /// The name under which a failed turn records this.
    pub(super) fn code(&self) -> &str {
        use crate::model::Error as Model;
        match self {
            Self::InvalidSession => "INVALID_SESSION",
            Self::EmptyMessage => "INVALID_REQUEST",
            Self::MessageTooLong { .. } => "MESSAGE_TOO_LONG",
            Self::Recorded { code, .. } => code,
            Self::Busy { .. } => "SESSION_BUSY",
            Self::OverBudget { .. } => "TOKEN_BUDGET_EXCEEDED",
            Self::Cancelled => "TURN_CANCELLED",
            Self::Interrupted => "INTERRUPTED",
            Self::Overloaded | Self::Model(Model::Overloaded) => "OVERLOADED",
            Self::Store(store::Error::Unavailable(_)) => "DATABASE_UNAVAILABLE",
            Self::Store(_) | Self::Panicked => "INTERNAL_ERROR",
            Self::Model(Model::Failed(_) | Model::Broken(_)) => "UPSTREAM_ERROR",
            Self::Model(Model::TimedOut(_)) => "UPSTREAM_TIMEOUT",
            Self::Model(Model::Unavailable { .. }) => "UPSTREAM_UNAVAILABLE",
        }
    }
}
