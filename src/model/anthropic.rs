//! Anthropic's messages API.

use std::pin::pin;

use futures_util::{TryStreamExt, future::BoxFuture};
use reqwest::Url;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};

use super::{
    Ask, Error, Growing, Listener, Model, Reply,
    http::{Server, event_json, events, json},
    openai::RequestMessage,
};
use crate::domain::{prompt::Role, turn::Usage};

/// The version of the API that this speaks, see <https://docs.anthropic.com/en/api/versioning>.
const VERSION: &str = "2023-06-01";
/// The longest reply where a chat does not say; this API wants to be told.
const MAX_TOKENS: u32 = 4096;

/// A server of the messages API.
pub struct Anthropic {
    server: Server,
    model: String,
}

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    system: Option<&'a str>,
    messages: Vec<RequestMessage<'a>>,
    max_tokens: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    stream: bool,
}

/// A whole answer, and what a stream's first event holds.
#[derive(Deserialize)]
struct Answer {
    model: Option<String>,
    #[serde(default)]
    content: Vec<Block>,
    usage: Option<AnswerUsage>,
}

/// A part of an answer; only text has text.
#[derive(Deserialize)]
struct Block {
    text: Option<String>,
}

#[derive(Deserialize)]
struct AnswerUsage {
    input_tokens: Option<i64>,
    output_tokens: Option<i64>,
}

/// One event of a stream.
#[derive(Deserialize)]
struct Event {
    #[serde(rename = "type")]
    kind: String,
    message: Option<Answer>,
    delta: Option<Block>,
    usage: Option<AnswerUsage>,
}

impl Anthropic {
    /// `base` is the API's root with its `/v1`. Fails, with what to mend, if no HTTPS client can be made.
    pub fn new(base: &Url, model: String, key: Option<SecretString>) -> Result<Self, String> {
        Ok(Self { server: Server::new(base, &["messages"], key)?, model })
    }

    async fn complete(&self, ask: &Ask, listener: &dyn Listener) -> Result<Reply, Error> {
        let asked = ask.options.model.as_deref().unwrap_or(&self.model);
        let system = ask.messages.iter().find(|message| message.role == Role::System);
        let talk = ask.messages.iter().filter(|message| message.role != Role::System);
        let mut request = self.server.post().header("anthropic-version", VERSION).json(&Request {
            model: asked,
            system: system.map(|message| message.content.as_str()),
            messages: talk.map(RequestMessage::from).collect(),
            max_tokens: ask.options.max_tokens.unwrap_or(MAX_TOKENS),
            temperature: ask.options.temperature,
            stream: ask.stream,
        });
        if let Some(key) = &self.server.key {
            request = request.header("x-api-key", key.expose_secret());
        }
        let response = self.server.send(request).await?;
        let mut reply = Growing::new(listener);
        let (mut model, mut input, mut output) = (None, None, None);
        let mut count = |usage: Option<AnswerUsage>| {
            if let Some(usage) = usage {
                (input, output) = (usage.input_tokens.or(input), usage.output_tokens.or(output));
            }
        };
        if ask.stream {
            let mut events = pin!(events(response)?);
            let mut done = false;
            while let Some(event) = events.try_next().await? {
                let read: Event = event_json(&event)?;
                match read.kind.as_str() {
                    "message_start" => {
                        let message = read.message;
                        model = message.as_ref().and_then(|message| message.model.clone());
                        count(message.and_then(|message| message.usage));
                    }
                    "content_block_delta" => {
                        let text = read.delta.and_then(|delta| delta.text);
                        reply.push(text.as_deref().unwrap_or_default())?;
                    }
                    "message_delta" => count(read.usage),
                    "message_stop" => {
                        done = true;
                        break;
                    }
                    "error" => {
                        let said = self.server.quote(event.data.as_bytes()).unwrap_or_default();
                        return Err(Error::Broken(format!("The model server broke off: {said}")));
                    }
                    _ => {}
                }
            }
            if !done {
                return Err(Error::Broken("The model server broke off in the middle of its reply".into()));
            }
        } else {
            let whole: Answer = json(response).await?;
            for block in &whole.content {
                reply.push(block.text.as_deref().unwrap_or_default())?;
            }
            count(whole.usage);
            model = whole.model;
        }
        let usage = input.zip(output).map(|(prompt_tokens, completion_tokens): (i64, i64)| Usage {
            prompt_tokens,
            completion_tokens,
            total_tokens: prompt_tokens.saturating_add(completion_tokens),
        });
        reply.finish(model.as_deref().unwrap_or(asked), usage)
    }
}

impl Model for Anthropic {
    fn provider(&self) -> &'static str {
        "anthropic"
    }

    fn name(&self) -> &str {
        &self.model
    }

    fn reply<'a>(&'a self, ask: &'a Ask, listener: &'a dyn Listener) -> BoxFuture<'a, Result<Reply, Error>> {
        Box::pin(self.complete(ask, listener))
    }
}
