//! What servers with a chat API have in common: one bounded exchange over HTTP, and what may go wrong with it.
//!
//! A small client of our own, not a library: it must accept what "compatible" servers really send, bound what it
//! reads, end the call when its future is dropped, and never repeat a secret.

use std::{io, net::IpAddr, time::Duration};

use eventsource_stream::{Event, EventStreamError, Eventsource};
use futures_util::{Stream, StreamExt, TryStreamExt};
use reqwest::{Client, ClientBuilder, RequestBuilder, Response, StatusCode, Url, header, redirect};
use secrecy::{ExposeSecret, SecretString};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::Error;
use crate::telemetry::traces;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// The most bytes of an answer that are read, its frame included.
const MAX_ANSWER: usize = 8 << 20;
/// The longest wait that an upstream is believed to mean.
const LONGEST_WAIT: Duration = Duration::from_secs(24 * 60 * 60);
/// How much of an upstream's own words is passed on, in characters.
const MAX_QUOTE: usize = 300;

/// A client for the server at `base`, without its limits of time.
pub fn client(base: &Url) -> ClientBuilder {
    // The process may have chosen one already; then that is it.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder()
        // A redirect would take the key elsewhere.
        .redirect(redirect::Policy::none())
        .user_agent(concat!("atlus/", env!("CARGO_PKG_VERSION")));
    // A proxy from the environment is for the world outside.
    if is_local(base) { client.no_proxy() } else { client }
}

/// Whether a URL names this machine: `localhost` or a loopback address.
pub fn is_local(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default().trim_matches(['[', ']']);
    host == "localhost" || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

/// A server, and the key to it.
pub(super) struct Server {
    client: Client,
    endpoint: Url,
    pub key: Option<SecretString>,
}

impl Server {
    /// `base` is the API's root with its `/v1`, `path` what follows. Fails, with what to mend, if no HTTPS client
    /// can be made.
    pub fn new(base: &Url, path: &[&str], key: Option<SecretString>) -> Result<Self, String> {
        let client = client(base).connect_timeout(CONNECT_TIMEOUT).build();
        let client = client.map_err(|error| format!("no HTTP client for the model server: {error}"))?;
        let mut endpoint = base.clone();
        endpoint
            .path_segments_mut()
            .map_err(|()| "ATLUS_MODEL_URL cannot have a path".to_owned())?
            .pop_if_empty()
            .extend(path);
        Ok(Self { client, endpoint, key })
    }

    pub fn post(&self) -> RequestBuilder {
        self.client.post(self.endpoint.clone())
    }

    /// Sends a request; anything but success is an error that says what the server said.
    pub async fn send(&self, request: RequestBuilder) -> Result<Response, Error> {
        let request = request.headers(traces::headers());
        let response = request.send().await.map_err(|error| broken(&error))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let retry_after = retry_after(&response);
        let said = self.quote(&read(response).await?).map(|words| format!(": {words}")).unwrap_or_default();
        let message = format!("The model server answered {}{said}", status.as_u16());
        Err(match status {
            StatusCode::TOO_MANY_REQUESTS => Error::Unavailable { message, retry_after },
            StatusCode::REQUEST_TIMEOUT | StatusCode::GATEWAY_TIMEOUT => Error::TimedOut(message),
            status if status.is_server_error() => Error::Broken(message),
            _ => Error::Failed(message),
        })
    }

    /// The upstream's own words from an error body, cut short and without our key.
    pub fn quote(&self, body: &[u8]) -> Option<String> {
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

/// Reads a whole answer as JSON.
pub(super) async fn json<T: DeserializeOwned>(response: Response) -> Result<T, Error> {
    serde_json::from_slice(&read(response).await?)
        .map_err(|_| Error::Failed("The model server answered something that is not a completion".into()))
}

/// Reads an answer as server-sent events.
pub(super) fn events(response: Response) -> Result<impl Stream<Item = Result<Event, Error>>, Error> {
    let media = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    if !media.is_some_and(|media| media.starts_with("text/event-stream")) {
        return Err(Error::Failed("The model server did not answer with a stream".into()));
    }
    let mut read = 0;
    let bounded = response.bytes_stream().map_err(io::Error::other).and_then(move |chunk| {
        read += chunk.len();
        let within = read <= MAX_ANSWER;
        async move { within.then_some(chunk).ok_or_else(|| io::ErrorKind::FileTooLarge.into()) }
    });
    Ok(bounded.eventsource().map(|event| {
        event.map_err(|error| match error {
            EventStreamError::Transport(error) if error.kind() == io::ErrorKind::FileTooLarge => too_large(),
            EventStreamError::Transport(_) => {
                Error::Broken("The connection to the model server broke".into())
            }
            _ => Error::Failed("The model server's stream cannot be read".into()),
        })
    }))
}

/// Reads one event's data as JSON.
pub(super) fn event_json<T: DeserializeOwned>(event: &Event) -> Result<T, Error> {
    serde_json::from_str(&event.data)
        .map_err(|_| Error::Failed("The model server streamed something that is not a completion".into()))
}

/// Reads a body up to [`MAX_ANSWER`].
async fn read(mut response: Response) -> Result<Vec<u8>, Error> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| broken(&error))? {
        if body.len() + chunk.len() > MAX_ANSWER {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn too_large() -> Error {
    Error::Failed("The model server's answer is too large".into())
}

/// `Retry-After` in seconds; its other form, a date, is rare enough to do without.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(header::RETRY_AFTER)?.to_str().ok()?;
    seconds.trim().parse().ok().map(|seconds: u64| Duration::from_secs(seconds).min(LONGEST_WAIT))
}

/// Says how a connection failed, without the URL, which may hold credentials.
fn broken(error: &reqwest::Error) -> Error {
    if error.is_connect() {
        Error::Broken("The model server cannot be reached".into())
    } else if error.is_timeout() {
        Error::TimedOut("The model server did not answer in time".into())
    } else {
        Error::Broken("The connection to the model server broke".into())
    }
}
