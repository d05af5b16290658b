//! Any server that speaks OpenAI's chat completions.

use std::pin::pin;

use futures_util::{TryStreamExt, future::BoxFuture};
use reqwest::Url;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::{
    Ask, Error, Growing, Listener, Model, Reply,
    http::{Server, event_json, events, json},
};
use crate::domain::{prompt::Message, turn::Usage};

/// A chat-completions server.
pub struct OpenAi {
    server: Server,
    model: String,
}

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    messages: Vec<RequestMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stream_options: Option<StreamOptions>,
}

#[derive(Serialize)]
struct StreamOptions {
    include_usage: bool,
}

#[derive(Serialize)]
pub(super) struct RequestMessage<'a> {
    role: &'static str,
    content: &'a str,
}

impl<'a> From<&'a Message> for RequestMessage<'a> {
    fn from(message: &'a Message) -> Self {
        Self { role: message.role.as_str(), content: &message.content }
    }
}

/// A whole answer, or one event of a stream. The fields we use; servers add many more and leave out most of these.
#[derive(Deserialize)]
struct Completion {
    model: Option<String>,
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<CompletionUsage>,
    error: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Choice {
    message: Option<ChoiceMessage>,
    delta: Option<ChoiceMessage>,
    finish_reason: Option<String>,
}

#[derive(Deserialize)]
struct ChoiceMessage {
    content: Option<String>,
}

#[derive(Deserialize)]
struct CompletionUsage {
    prompt_tokens: Option<i64>,
    completion_tokens: Option<i64>,
    total_tokens: Option<i64>,
}

impl Completion {
    fn text(&self) -> Option<&str> {
        let choice = self.choices.first()?;
        choice.delta.as_ref().or(choice.message.as_ref())?.content.as_deref()
    }

    fn usage(&self) -> Option<Usage> {
        let usage = self.usage.as_ref()?;
        let (prompt_tokens, completion_tokens) = (usage.prompt_tokens?, usage.completion_tokens?);
        let total_tokens = usage.total_tokens.unwrap_or(prompt_tokens.saturating_add(completion_tokens));
        Some(Usage { prompt_tokens, completion_tokens, total_tokens })
    }
}

impl OpenAi {
    /// `base` is the API's root with its `/v1`. Fails, with what to mend, if no HTTPS client can be made.
    pub fn new(base: &Url, model: String, key: Option<SecretString>) -> Result<Self, String> {
        Ok(Self { server: Server::new(base, &["chat", "completions"], key)?, model })
    }

    async fn complete(&self, ask: &Ask, listener: &dyn Listener) -> Result<Reply, Error> {
        let asked = ask.options.model.as_deref().unwrap_or(&self.model);
        let mut request = self.server.post().json(&Request {
            model: asked,
            messages: ask.messages.iter().map(RequestMessage::from).collect(),
            temperature: ask.options.temperature,
            max_tokens: ask.options.max_tokens,
            stream: ask.stream.then_some(true),
            stream_options: ask.stream.then_some(StreamOptions { include_usage: true }),
        });
        if let Some(key) = &self.server.key {
            request = request.bearer_auth(key.expose_secret());
        }
        let response = self.server.send(request).await?;
        let mut reply = Growing::new(listener);
        let (mut model, mut usage) = (None, None);
        if ask.stream {
            let mut events = pin!(events(response)?);
            let mut done = false;
            while let Some(event) = events.try_next().await? {
                if event.data == "[DONE]" {
                    done = true;
                    break;
                }
                let piece: Completion = event_json(&event)?;
                if piece.error.is_some() {
                    let said = self.server.quote(event.data.as_bytes()).unwrap_or_default();
                    return Err(Error::Broken(format!("The model server broke off: {said}")));
                }
                reply.push(piece.text().unwrap_or_default())?;
                // Not every server says [DONE].
                done |= piece.choices.first().is_some_and(|choice| choice.finish_reason.is_some());
                usage = piece.usage().or(usage);
                model = piece.model.or(model);
            }
            if !done {
                return Err(Error::Broken("The model server broke off in the middle of its reply".into()));
            }
        } else {
            let whole: Completion = json(response).await?;
            reply.push(whole.text().unwrap_or_default())?;
            (usage, model) = (whole.usage(), whole.model);
        }
        reply.finish(model.as_deref().unwrap_or(asked), usage)
    }
}

impl Model for OpenAi {
    fn provider(&self) -> &'static str {
        "openai"
    }

    fn name(&self) -> &str {
        &self.model
    }

    fn reply<'a>(&'a self, ask: &'a Ask, listener: &'a dyn Listener) -> BoxFuture<'a, Result<Reply, Error>> {
        Box::pin(self.complete(ask, listener))
    }
}
