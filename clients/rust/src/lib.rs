#![doc = include_str!("../README.md")]

use std::{env, error, time::Duration};

use eventsource_stream::Eventsource;
use futures_util::{Stream, StreamExt, TryStreamExt, stream};
use reqwest::header::{AUTHORIZATION, HeaderMap, InvalidHeaderValue, RETRY_AFTER};
use serde::de::DeserializeOwned;

#[allow(warnings, clippy::all, clippy::pedantic)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/client.rs"));
}

pub use generated::{ByteStream, Client, types};
use types::{ChatAnswer, DeltaEvent, ErrorCode, Failure, StartEvent};

/// Why a call did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server told why.
    #[error("{} ({})", failure.error.message, failure.error.code)]
    Told {
        /// What it told.
        failure: Box<Failure>,
        /// Seconds after which trying again may help.
        retry_after: Option<u64>,
    },
    /// It did not come so far, or the answer is not the server's.
    #[error(transparent)]
    Other(Box<dyn error::Error + Send + Sync>),
}

impl Error {
    /// What to branch on.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Self::Told { failure, .. } => Some(failure.error.code),
            Self::Other(_) => None,
        }
    }

    fn other(error: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        Self::Other(error.into())
    }
}

impl From<progenitor_client::Error<Failure>> for Error {
    fn from(error: progenitor_client::Error<Failure>) -> Self {
        match error {
            progenitor_client::Error::ErrorResponse(response) => {
                let wait =
                    response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
                Self::Told { failure: Box::new(response.into_inner()), retry_after: wait }
            }
            other => Self::other(other.to_string()),
        }
    }
}

/// A text that the document does not allow.
impl From<types::error::ConversionError> for Error {
    fn from(error: types::error::ConversionError) -> Self {
        Self::other(error)
    }
}

/// Speaks to a server, and shows it a key.
///
/// What is not given is taken from `ATLUS_SERVER` and `ATLUS_API_KEY`, as `atlus chat` does; the server is
/// <http://127.0.0.1:5000> if nothing names another.
///
/// # Errors
///
/// If the key cannot stand in a header.
pub fn connect(server: Option<&str>, key: Option<&str>) -> Result<Client, Error> {
    let setting = |given: Option<&str>, name| {
        given.map(str::to_owned).or_else(|| env::var(name).ok()).filter(|text| !text.is_empty())
    };
    let mut headers = HeaderMap::new();
    if let Some(key) = setting(key, "ATLUS_API_KEY") {
        let value =
            format!("Bearer {key}").parse().map_err(|error: InvalidHeaderValue| Error::other(error))?;
        headers.insert(AUTHORIZATION, value);
    }
    let http = reqwest::Client::builder()
        .default_headers(headers)
        .connect_timeout(Duration::from_secs(10))
        // A stream shows a sign of life every 15 seconds; an answer may wait 60 for its session and 120 for its model.
        .read_timeout(Duration::from_secs(200))
        .build()
        .map_err(Error::other)?;
    let server = setting(server, "ATLUS_SERVER").unwrap_or_else(|| "http://127.0.0.1:5000".to_owned());
    Ok(Client::new_with_client(server.trim_end_matches('/'), http))
}

/// Every item of a listing, page by page: `listing` answers the items of the page that begins at a cursor, and the cursor
/// of the next.
pub fn pages<Item>(
    listing: impl AsyncFn(Option<String>) -> Result<(Vec<Item>, Option<String>), Error>,
) -> impl Stream<Item = Result<Item, Error>> {
    let first = Some(None);
    stream::try_unfold((listing, first), |(listing, page)| async move {
        let Some(cursor) = page else { return Ok::<_, Error>(None) };
        let (items, next) = listing(cursor).await?;
        Ok(Some((stream::iter(items.into_iter().map(Ok)), (listing, next.map(Some)))))
    })
    .try_flatten()
}

/// A piece of news of a turn.
#[derive(Debug)]
pub enum Event {
    /// The turn has been admitted.
    Start(StartEvent),
    /// More of the reply.
    Delta(DeltaEvent),
    /// The turn is kept.
    Done(ChatAnswer),
}

/// The events of `chat_stream` or `stream_turn`, each with its id: the offset in the reply that follows it, in bytes.
/// If the connection breaks, `stream_turn` with the last id as `last_event_id` goes on.
pub fn events(stream: ByteStream) -> impl Stream<Item = Result<(i64, Event), Error>> {
    stream.into_inner().eventsource().map(|event| {
        let event = event.map_err(|error| Error::other(error.to_string()))?;
        let id = event.id.parse().map_err(Error::other)?;
        match event.event.as_str() {
            "start" => Ok((id, Event::Start(read(&event.data)?))),
            "delta" => Ok((id, Event::Delta(read(&event.data)?))),
            "done" => Ok((id, Event::Done(read(&event.data)?))),
            "error" => Err(Error::Told { failure: Box::new(read(&event.data)?), retry_after: None }),
            other => Err(Error::other(format!("the event {other} is newer than this client"))),
        }
    })
}

fn read<T: DeserializeOwned>(data: &str) -> Result<T, Error> {
    serde_json::from_str(data).map_err(Error::other)
}
