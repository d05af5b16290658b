//! `/chat`: a message in, an answer out.

use std::sync::Arc;

use poem::Result;
use poem_openapi::{Object, OpenApi};
use serde::Deserialize;

use super::{
    Tag,
    arrival::Arrival,
    envelope::{Found, found},
    error::ApiError,
    json::Json,
    turns::{UsageView, seconds},
    wire::{MaxTokens, MessageText, ModelName, Temperature},
};
use crate::{
    app::App,
    chat::Chat,
    domain::{
        caller::Caller,
        ids::{RequestId, SessionId},
        json::Metadata,
        session::UserId,
    },
    model::Options,
};

/// A message to a session.
#[derive(Object, Deserialize)]
struct ChatRequest {
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
    /// The model to ask instead of the server's. The built-in responder answers whatever the name.
    #[serde(default)]
    #[oai(nullable)]
    model: Option<ModelName>,
    /// How freely the model chooses its words; the built-in responder has no choice.
    #[serde(default)]
    #[oai(nullable)]
    temperature: Option<Temperature>,
    /// The longest response, in the model's tokens.
    #[serde(default)]
    #[oai(nullable)]
    max_tokens: Option<MaxTokens>,
}

/// The answer to a message.
#[derive(Object)]
struct ChatAnswer {
    response: String,
    session_id: SessionId,
    /// Seconds from the request's arrival to the model's answer.
    execution_time: f64,
    request_id: RequestId,
    /// The number of this turn in its session.
    #[oai(validator(minimum(value = "1")))]
    turn: i64,
    /// The model that answered.
    model: String,
    /// Null where the model does not say.
    #[oai(nullable)]
    usage: Option<UsageView>,
    /// Whether the session is a temporary one.
    temporary: bool,
}

pub struct ChatApi(pub Arc<App>);

#[OpenApi(prefix_path = "/api/v1/chat", tag = "Tag::Chat")]
impl ChatApi {
    /// Send a message
    ///
    /// The message is kept before the model is asked, and the answer before it is sent. Messages to one session
    /// are answered one after the other, in the order they came; each waits at most 60 seconds for its turn. If
    /// you go away, the turn completes all the same.
    #[oai(path = "/", method = "post", operation_id = "chat")]
    async fn chat(
        &self,
        caller: Caller,
        arrival: Arrival,
        body: Json<ChatRequest>,
    ) -> Result<Found<ChatAnswer>, ApiError> {
        let ChatRequest { message, session_id, user_id, metadata, model, temperature, max_tokens } = body.0;
        let session = match &session_id {
            // Any other text is simply not found.
            Some(text) => Some(SessionId::parse(text).ok_or_else(|| ApiError::invalid_session(text))?),
            None => None,
        };
        let chat = Chat {
            session,
            user: user_id,
            message: message.0,
            metadata: metadata.unwrap_or_default(),
            options: Options {
                model: model.map(|name| name.0),
                temperature: temperature.map(|temperature| temperature.0),
                max_tokens: max_tokens.map(|tokens| tokens.0),
            },
            request_id: arrival.request_id.clone(),
            received: arrival.received,
        };
        let answered = self.0.engine.chat(caller, chat).await;
        let answered = answered.map_err(|error| ApiError::chat(error, session))?;
        let answer = ChatAnswer {
            response: answered.response,
            session_id: answered.session,
            execution_time: seconds(i64::try_from(answered.execution.as_micros()).unwrap_or(i64::MAX)),
            request_id: arrival.request_id,
            turn: answered.turn,
            model: answered.model,
            usage: answered.usage.map(Into::into),
            temporary: answered.temporary,
        };
        Ok(found(answer, self.0.clock.now()))
    }
}
