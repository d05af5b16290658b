//! `/chat`: a message in, an answer out.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{Enum, Object, OpenApi, types::ToJSON};
use serde::Deserialize;

use super::{
    Tag,
    arrival::Arrival,
    auth::owner,
    envelope::Kept,
    error::ApiError,
    headers::KeyHeader,
    idempotency::{self, Begun},
    json::Body,
    place::Place,
    sse::{EventStream, StartEvent},
    turns::{UsageView, seconds},
    wire::{MaxTokens, MessageText, ModelName, Temperature},
};
use crate::{
    app::App,
    chat::{Answered, Chat, OnBusy, Remember},
    domain::{
        caller::Caller,
        ids::{RequestId, SessionId},
        json::Metadata,
        session::UserId,
    },
    model::Options,
    store::Claim,
};

/// A message to a session.
#[derive(Object, Deserialize)]
pub(super) struct ChatRequest {
    /// What the user says. White space around it is cut off; 32,000 characters at most unless the server is set
    /// otherwise.
    message: MessageText,
    /// The conversation it belongs to. Without one, a temporary session is made; its id is in the answer.
    #[serde(default)]
    #[oai(nullable)]
    session_id: Option<String>,
    /// Whose new session it is if `session_id` is absent (`default_user` if this is, too). Beside a `session_id`,
    /// only a session of this user is accepted.
    #[serde(default)]
    #[oai(nullable)]
    user_id: Option<UserId>,
    /// Kept with the turn: a JSON object of at most 16 KiB.
    #[serde(default)]
    #[oai(nullable)]
    metadata: Option<Metadata>,
    /// The model to ask instead of the server's, 1 to 200 characters. The built-in responder answers whatever the name.
    #[serde(default)]
    #[oai(nullable)]
    model: Option<ModelName>,
    /// How freely the model chooses its words, 0 to 2; the built-in responder has no choice.
    #[serde(default)]
    #[oai(nullable)]
    temperature: Option<Temperature>,
    /// The longest response, 1 to 1,000,000 of the model's tokens; as the model has it if absent.
    #[serde(default)]
    #[oai(nullable)]
    max_tokens: Option<MaxTokens>,
    /// What to do if another message of the session is being answered; `queue` if absent.
    #[serde(default)]
    #[oai(nullable)]
    on_busy: Option<OnBusyField>,
}

/// What to do if another message of the session is being answered.
#[derive(Clone, Copy, Debug, Default, Enum, Deserialize)]
#[oai(rename = "OnBusy", rename_all = "lowercase")]
#[serde(rename_all = "lowercase")]
enum OnBusyField {
    /// Wait, first come first served, for at most 60 seconds.
    #[default]
    Queue,
    /// Refuse this one at once.
    Reject,
    /// Cancel the running turn.
    Interrupt,
}

impl From<OnBusyField> for OnBusy {
    fn from(field: OnBusyField) -> Self {
        match field {
            OnBusyField::Queue => Self::Queue,
            OnBusyField::Reject => Self::Reject,
            OnBusyField::Interrupt => Self::Interrupt,
        }
    }
}

/// The answer to a message.
#[derive(Object)]
pub(super) struct ChatAnswer {
    /// What the model says.
    response: String,
    /// The session of the turn; of a chat without one, the temporary session that was made.
    session_id: SessionId,
    /// Seconds from the request's arrival to the model's answer.
    execution_time: f64,
    /// The `X-Request-ID` of the request that was answered first.
    request_id: RequestId,
    /// The number of this turn in its session.
    #[oai(validator(minimum(value = "1")))]
    turn: i64,
    /// The model that answered.
    model: String,
    /// What it cost; null where the model does not say.
    #[oai(nullable)]
    usage: Option<UsageView>,
    /// Whether the session is a temporary one.
    temporary: bool,
}

impl ChatAnswer {
    /// A completed turn as JSON, the same each time.
    pub fn render(answered: &Answered) -> String {
        let answer = Self {
            response: answered.response.clone(),
            session_id: answered.session,
            execution_time: seconds(i64::try_from(answered.execution.as_micros()).unwrap_or(i64::MAX)),
            request_id: answered.request_id.clone(),
            turn: answered.turn,
            model: answered.model.clone(),
            usage: answered.usage.map(Into::into),
            temporary: answered.temporary,
        };
        answer.to_json_string()
    }
}

/// What is needed of a remembered answer to stream it again.
#[derive(Deserialize)]
struct Remembered {
    response: String,
    session_id: String,
    turn: i64,
    request_id: String,
    model: String,
}

pub struct ChatApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/chat", tag = "Tag::Chat")]
impl ChatApi {
    /// Send a message
    ///
    /// The message is kept before the model is asked, and the answer before it is sent. Messages to one session
    /// are answered one after the other; `on_busy` says what happens to one that finds another running. If you go
    /// away, the turn completes all the same.
    #[oai(path = "/", method = "post", operation_id = "chat")]
    async fn chat(
        &self,
        caller: Caller,
        arrival: Arrival,
        place: Place,
        /// Send the same key again to get the first answer again; the model is not asked twice.
        #[oai(name = "Idempotency-Key")]
        key: KeyHeader,
        body: Body<ChatRequest>,
    ) -> Result<Kept<200, ChatAnswer>, ApiError> {
        let body = owned(&caller, body)?;
        let claim = match idempotency::begin(&self.0, &caller, key.0, body.digest).await? {
            Begun::Do(claim) => claim,
            Begun::Done(data) => return Ok(Kept::new(data, true, self.0.clock.now())),
        };
        let (chat, session) = self.message(body.value, &arrival, &place, claim, false).await?;
        let answered = self.0.engine.chat(caller, chat).await;
        let answered = answered.map_err(|error| ApiError::chat(error, session))?;
        Ok(Kept::new(ChatAnswer::render(&answered), false, self.0.clock.now()))
    }

    /// Send a message and hear the answer while it comes
    ///
    /// What fails before the turn is admitted is an ordinary failure, what fails later an `error` event. If the
    /// connection breaks, `GET /api/v1/sessions/{session_id}/turns/{turn}/stream` goes on where it broke.
    #[oai(path = "/stream", method = "post", operation_id = "chatStream")]
    async fn stream(
        &self,
        caller: Caller,
        arrival: Arrival,
        place: Place,
        /// Send the same key again to get the first answer again, as a stream; the model is not asked twice.
        #[oai(name = "Idempotency-Key")]
        key: KeyHeader,
        body: Body<ChatRequest>,
    ) -> Result<EventStream, ApiError> {
        let body = owned(&caller, body)?;
        let claim = match idempotency::begin(&self.0, &caller, key.0, body.digest).await? {
            Begun::Do(claim) => claim,
            Begun::Done(data) => return replay(data, arrival.request_id),
        };
        let asked = body.value.model.as_ref().map(|name| name.0.clone());
        let (chat, session) = self.message(body.value, &arrival, &place, claim, true).await?;
        let started = self.0.engine.start(caller, chat).await;
        let started = started.map_err(|error| ApiError::chat(error, session))?;
        let start = StartEvent {
            session_id: started.session,
            turn: started.turn,
            request_id: arrival.request_id.clone(),
            model: asked.unwrap_or_else(|| self.0.engine.model().name().to_owned()),
        };
        Ok(EventStream::new(started.session, Some(&start), started.reader.into(), 0, arrival.request_id))
    }
}

impl ChatApi {
    /// The message that a request holds, and the session it names.
    async fn message(
        &self,
        request: ChatRequest,
        arrival: &Arrival,
        place: &Place,
        claim: Option<Claim>,
        stream: bool,
    ) -> Result<(Chat, Option<SessionId>), ApiError> {
        let session = match &request.session_id {
            // Any other text is simply not found.
            Some(text) => match SessionId::parse(text) {
                Some(id) => Some(id),
                None => {
                    if let Some(claim) = claim {
                        self.0.store.release_claim(claim).await?;
                    }
                    return Err(ApiError::invalid_session(text));
                }
            },
            None => None,
        };
        let chat = Chat {
            session,
            user: request.user_id,
            message: request.message.0,
            metadata: request.metadata.unwrap_or_default(),
            options: Options {
                model: request.model.map(|name| name.0),
                temperature: request.temperature.map(|temperature| temperature.0),
                max_tokens: request.max_tokens.map(|tokens| tokens.0),
            },
            on_busy: request.on_busy.unwrap_or_default().into(),
            stream,
            request_id: arrival.request_id.clone(),
            received: arrival.received,
            // From here on it waits for its session and its model, and has its place among the chats.
            share: place.leave(),
            remember: claim.map(|claim| Remember { claim, render: ChatAnswer::render }),
        };
        Ok((chat, session))
    }
}

/// The same with the user for whom a session is made, where the request names none.
fn owned(caller: &Caller, mut body: Body<ChatRequest>) -> Result<Body<ChatRequest>, ApiError> {
    if body.value.session_id.is_none() {
        body.value.user_id = Some(owner(caller, body.value.user_id)?);
    }
    Ok(body)
}

/// Streams a remembered answer.
fn replay(data: String, request_id: RequestId) -> Result<EventStream, ApiError> {
    let remembered: Remembered = serde_json::from_str(&data).map_err(|_| ApiError::internal())?;
    let start = StartEvent {
        session_id: SessionId::parse(&remembered.session_id).ok_or_else(ApiError::internal)?,
        turn: remembered.turn,
        request_id: RequestId::parse(&remembered.request_id).unwrap_or_else(RequestId::random),
        model: remembered.model,
    };
    Ok(EventStream::replay(&start, remembered.response, data, request_id))
}
