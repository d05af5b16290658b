//! The calls that a conversation needs, and what may go wrong with them.

use std::{error::Error as _, time::Duration};

use anyhow::{Context, bail};
use eventsource_stream::Eventsource;
use reqwest::{
    Method, RequestBuilder, Response, Url,
    header::{AUTHORIZATION, HeaderMap, HeaderValue},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use super::{
    reply::{Events, Reply},
    terminal::one_line,
};
use crate::model::http;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long any answer but a stream may take.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long the server may say nothing. A stream shows a sign of life every 15 seconds, but a message may wait for its
/// session for 60 before its stream begins.
const SILENCE: Duration = Duration::from_secs(90);
/// Shorter than a server keeps an idle connection, so that none is used that it is about to close.
const IDLE: Duration = Duration::from_secs(30);

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The server's own words, and its name for the reason.
    #[error("{message} ({code})")]
    Refused { code: String, message: String },
    #[error("{0}")]
    Other(String),
    /// It was given up by Ctrl-C.
    #[error("{0}")]
    GivenUp(String),
}

impl Failure {
    pub fn other(message: impl Into<String>) -> Self {
        Self::Other(message.into())
    }

    pub fn is(&self, name: &str) -> bool {
        matches!(self, Self::Refused { code, .. } if code == name)
    }

    fn broken(error: &reqwest::Error) -> Self {
        let message = if error.is_connect() {
            "The server cannot be reached"
        } else if error.is_timeout() {
            return Self::other("The server did not answer in time");
        } else {
            "The connection to the server broke"
        };
        // The deepest cause says it plainest, and without the URL, which may hold a password.
        let mut cause = error.source();
        while let Some(deeper) = cause.and_then(std::error::Error::source) {
            cause = Some(deeper);
        }
        let cause = cause.map(|cause| format!(": {}", one_line(&cause.to_string()))).unwrap_or_default();
        Self::Other(format!("{message}{cause}"))
    }
}

/// A refusal, as an answer or as the event `error`.
#[derive(Deserialize)]
pub struct Refusal {
    error: Reason,
}

#[derive(Deserialize)]
pub struct Reason {
    pub code: String,
    pub message: String,
}

impl From<Refusal> for Failure {
    fn from(Refusal { error: Reason { code, message } }: Refusal) -> Self {
        Self::Refused { code: one_line(&code), message: one_line(&message) }
    }
}

#[derive(Deserialize)]
struct Envelope<T> {
    data: T,
}

#[derive(Deserialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    pub next_cursor: Option<String>,
}

#[derive(Deserialize)]
pub struct Session {
    #[serde(rename = "session_id")]
    pub id: String,
    #[serde(rename = "user_id")]
    pub user: String,
    pub title: Option<String>,
    pub last_activity: String,
    pub is_active: bool,
    /// Only of a session that was asked for by its id.
    pub memory: Option<Memory>,
}

#[derive(Deserialize)]
pub struct Memory {
    #[serde(rename = "conversation_turns")]
    pub turns: i64,
}

#[derive(Deserialize)]
pub struct Turn {
    pub status: String,
    pub message: String,
    pub response: Option<String>,
    pub error: Option<Reason>,
}

#[derive(Deserialize)]
pub struct Health {
    pub version: String,
    pub model: Model,
}

#[derive(Deserialize)]
pub struct Model {
    pub provider: String,
    pub name: String,
}

/// Speaks to a server. Cheap to clone.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
}

impl Client {
    pub fn new(base: &str, key: Option<&str>) -> anyhow::Result<Self> {
        // A URL may hold credentials, so it is not repeated.
        let base = base.parse().ok().filter(|url: &Url| matches!(url.scheme(), "http" | "https"));
        let Some(base) = base else { bail!("--server must be a URL such as http://127.0.0.1:5000") };
        let mut headers = HeaderMap::new();
        if let Some(key) = key {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}"))
                .context("--key holds characters that no key has")?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        let http = http::client(&base).connect_timeout(CONNECT_TIMEOUT).read_timeout(SILENCE);
        let http = http.pool_idle_timeout(IDLE).default_headers(headers).build()?;
        Ok(Self { http, base })
    }

    /// Where the server is, without what the URL may hold besides.
    pub fn address(&self) -> String {
        self.base.origin().ascii_serialization()
    }

    pub async fn health(&self) -> Result<Health, Failure> {
        let response = self.request(Method::GET, &["health"], &[]).timeout(PATIENCE).send().await;
        // Whatever its status: a server that is not well may be soon.
        read(response.map_err(|error| Failure::broken(&error))?).await
    }

    pub async fn session(&self, id: &str) -> Result<Session, Failure> {
        self.ask(self.request(Method::GET, &["sessions", id], &[])).await
    }

    /// The user's active session with the newest activity.
    pub async fn newest(&self, user: &str) -> Result<Session, Failure> {
        self.ask(self.request(Method::GET, &["sessions", "continue"], &[("user_id", user)])).await
    }

    /// A page of the user's sessions, newest first.
    pub async fn sessions(
        &self,
        user: &str,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<Page<Session>, Failure> {
        let limit = limit.to_string();
        let mut query = vec![("user_id", user), ("limit", &limit)];
        query.extend(cursor.map(|cursor| ("cursor", cursor)));
        self.ask(self.request(Method::GET, &["sessions"], &query)).await
    }

    pub async fn create(&self, user: &str, title: Option<&str>) -> Result<Session, Failure> {
        let body = json!({"user_id": user, "title": title});
        self.ask(self.request(Method::POST, &["sessions"], &[]).json(&body)).await
    }

    pub async fn rename(&self, id: &str, title: &str) -> Result<Session, Failure> {
        self.ask(self.request(Method::PATCH, &["sessions", id], &[]).json(&json!({"title": title}))).await
    }

    /// A page of a session's turns, from the first (`asc`) or from the last (`desc`).
    pub async fn turns(
        &self,
        id: &str,
        direction: &str,
        limit: usize,
        cursor: Option<&str>,
    ) -> Result<Page<Turn>, Failure> {
        let limit = limit.to_string();
        let mut query = vec![("direction", direction), ("limit", &limit)];
        query.extend(cursor.map(|cursor| ("cursor", cursor)));
        self.ask(self.request(Method::GET, &["sessions", id, "turns"], &query)).await
    }

    /// Sends a message; returns once it is its turn.
    pub async fn say(&self, id: &str, message: &str) -> Result<Reply, Failure> {
        let body = json!({"session_id": id, "message": message});
        let events = self.listen(self.request(Method::POST, &["chat", "stream"], &[]).json(&body)).await?;
        Ok(Reply::new(self.clone(), id.to_owned(), events))
    }

    /// Hears the reply of a turn after the event `last`.
    pub async fn resume(&self, id: &str, turn: i64, last: &str) -> Result<Events, Failure> {
        let path = ["sessions", id, "turns", &turn.to_string(), "stream"];
        self.listen(self.request(Method::GET, &path, &[]).header("Last-Event-ID", last)).await
    }

    pub async fn cancel(&self, id: &str, turn: i64) -> Result<(), Failure> {
        let path = ["sessions", id, "turns", &turn.to_string(), "cancel"];
        let _: Value = self.ask(self.request(Method::POST, &path, &[])).await?;
        Ok(())
    }

    fn request(&self, method: Method, path: &[&str], query: &[(&str, &str)]) -> RequestBuilder {
        let mut url = self.base.clone();
        // What speaks HTTP always has a path.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(["api", "v1"]).extend(path);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        self.http.request(method, url)
    }

    async fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, Failure> {
        let Envelope { data } = read(accepted(request.timeout(PATIENCE)).await?).await?;
        Ok(data)
    }

    async fn listen(&self, request: RequestBuilder) -> Result<Events, Failure> {
        Ok(Box::pin(accepted(request).await?.bytes_stream().eventsource()))
    }
}

/// Sends a request; anything but success is a failure that says what the server said.
async fn accepted(request: RequestBuilder) -> Result<Response, Failure> {
    let response = request.send().await.map_err(|error| Failure::broken(&error))?;
    let status = response.status();
    if status.is_success() {
        return Ok(response);
    }
    Err(match read::<Refusal>(response).await {
        Ok(refusal) => refusal.into(),
        Err(_) => Failure::Other(format!("The server answered {status}")),
    })
}

async fn read<T: DeserializeOwned>(response: Response) -> Result<T, Failure> {
    let body = response.bytes().await.map_err(|error| Failure::broken(&error))?;
    serde_json::from_slice(&body).map_err(|_| Failure::other("The server does not answer as ATLUS does"))
}
