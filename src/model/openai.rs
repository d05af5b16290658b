//! Any server that speaks OpenAI's chat completions.
//!
//! A small client of our own, not a library: it must accept what "compatible" servers really send, bound what
//! it reads, end the call when its future is dropped, and never repeat a secret. Without streaming, retries or
//! fallbacks so far.

use std::time::Duration;

use futures_util::future::BoxFuture;
use reqwest::{Client, Response, StatusCode, Url, header, redirect};
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Ask, Error, Model, Reply};
use crate::domain::{prompt::Message, turn::Usage};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest answer that is read, in bytes.
const MAX_ANSWER: usize = 4 << 20;
/// How much of an upstream's own words is passed on, in characters.
const MAX_QUOTE: usize = 300;

/// A chat-completions server.
pub struct OpenAi {
    client: Client,
    endpoint: Url,
    model: String,
    key: Option<SecretString>,
}

#[derive(Serialize)]
struct Request<'a> {
    model: &'a str,
    messages: Vec<RequestMessage<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    temperature: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_tokens: Option<u32>,
}

#[derive(Serialize)]
struct RequestMessage<'a> {
    role: &'static str,
    content: &'a str,
}

impl<'a> From<&'a Message> for RequestMessage<'a> {
    fn from(message: &'a Message) -> Self {
        Self { role: message.role.as_str(), content: &message.content }
    }
}

/// The fields we use; servers add many more and leave out most of these.
#[derive(Deserialize)]
struct Completion {
    model: Option<String>,
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<CompletionUsage>,
}

#[derive(Deserialize)]
struct Choice {
    message: ChoiceMessage,
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

impl OpenAi {
    /// `base` is the API's root with its `/v1`. Fails, with what to mend, if no HTTPS client can be made.
    pub fn new(base: &Url, model: String, key: Option<SecretString>) -> Result<Self, String> {
        // The process may have chosen one already; then that is it.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            // A redirect would take the key elsewhere.
            .redirect(redirect::Policy::none())
            .user_agent(concat!("atlus/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(|error| format!("no HTTP client for the model server: {error}"))?;
        let mut endpoint = base.clone();
        endpoint
            .path_segments_mut()
            .map_err(|()| "ATLUS_MODEL_URL cannot have a path".to_owned())?
            .pop_if_empty()
            .extend(["chat", "completions"]);
        Ok(Self { client, endpoint, model, key })
    }

    async fn complete(&self, ask: &Ask) -> Result<Reply, Error> {
        let model = ask.options.model.as_deref().unwrap_or(&self.model);
        let mut request = self.client.post(self.endpoint.clone()).json(&Request {
            model,
            messages: ask.messages.iter().map(RequestMessage::from).collect(),
            temperature: ask.options.temperature,
            max_tokens: ask.options.max_tokens,
        });
        if let Some(key) = &self.key {
            request = request.bearer_auth(key.expose_secret());
        }
        let response = request.send().await.map_err(|error| broken(&error))?;
        let (status, retry_after) = (response.status(), retry_after(&response));
        let body = read(response).await?;
        if !status.is_success() {
            return Err(self.refused(status, retry_after, &body));
        }
        let completion: Completion = serde_json::from_slice(&body).map_err(|_| {
            Error::Failed("The model server answered something that is not a completion".into())
        })?;
        let usage = completion.usage.and_then(|usage| {
            let (prompt_tokens, completion_tokens) = (usage.prompt_tokens?, usage.completion_tokens?);
            let total_tokens = usage.total_tokens.unwrap_or(prompt_tokens + completion_tokens);
            Some(Usage { prompt_tokens, completion_tokens, total_tokens })
        });
        let text = completion.choices.into_iter().next().and_then(|choice| choice.message.content);
        match text.filter(|text| !text.is_empty()) {
            Some(text) => {
                Ok(Reply { text, model: completion.model.unwrap_or_else(|| model.to_owned()), usage })
            }
            None => Err(Error::Failed("The model server answered without any text".into())),
        }
    }

    /// Says what an answer that is not a success means.
    fn refused(&self, status: StatusCode, retry_after: Option<Duration>, body: &[u8]) -> Error {
        let said = self.quote(body).map(|words| format!(": {words}")).unwrap_or_default();
        let message = format!("The model server answered {}{said}", status.as_u16());
        match status {
            StatusCode::TOO_MANY_REQUESTS => Error::Unavailable { message, retry_after },
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Error::TimedOut(message),
            _ => Error::Failed(message),
        }
    }

    /// The upstream's own words from an error body, cut short and without our key.
    fn quote(&self, body: &[u8]) -> Option<String> {
        let body: Value = serde_json::from_slice(body).ok()?;
        let places = ["/error/message", "/error", "/message", "/detail"];
        let words = places.iter().find_map(|place| body.pointer(place)?.as_str())?;
        let safe = match &self.key {
            Some(key) if !key.expose_secret().is_empty() => words.replace(key.expose_secret(), "…"),
            _ => words.to_owned(),
        };
        Some(safe.chars().filter(|c| !c.is_control()).take(MAX_QUOTE).collect())
    }
}

impl Model for OpenAi {
    fn provider(&self) -> &'static str {
        "openai"
    }

    fn name(&self) -> &str {
        &self.model
    }

    fn reply(&self, ask: Ask) -> BoxFuture<'_, Result<Reply, Error>> {
        Box::pin(async move { self.complete(&ask).await })
    }
}

/// Reads a body up to [`MAX_ANSWER`].
async fn read(mut response: Response) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| broken(&error))? {
        if body.len() + chunk.len() > MAX_ANSWER {
            return Err(Error::Failed("The model server's answer is too large".into()));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

/// `Retry-After` in seconds; its other form, a date, is rare enough to do without.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

/// Says how a connection failed, without the URL, which may hold credentials.
fn broken(error: &reqwest::Error) -> Error {
    if error.is_timeout() {
        Error::TimedOut("The model server did not answer in time".into())
    } else if error.is_connect() {
        Error::Failed("The model server cannot be reached".into())
    } else {
        Error::Failed("The connection to the model server broke".into())
    }
}
