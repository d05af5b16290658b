//! A reply as it comes, over more than one connection if need be.

use std::{pin::Pin, time::Duration};

use eventsource_stream::{Event, EventStreamError};
use futures_util::{Stream, StreamExt};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::sleep;

use super::client::{Client, Failure, Refusal};

pub type Events = Pin<Box<dyn Stream<Item = Result<Event, EventStreamError<reqwest::Error>>> + Send>>;

/// How long to wait before a stream that broke is resumed, each time that no more of it comes.
const PAUSES: [Duration; 3] = [Duration::from_millis(250), Duration::from_secs(1), Duration::from_secs(2)];

/// What comes of a reply.
pub enum Heard {
    /// The turn is running and has its number.
    Begun,
    Text(String),
    /// All of it has come, and is kept.
    Done,
}

/// A reply as it comes.
pub struct Reply {
    client: Client,
    session: String,
    turn: Option<i64>,
    /// Absent once the connection broke.
    events: Option<Events>,
    /// The last event that arrived whole: where to go on.
    last: String,
    /// How often it was resumed since more of it came.
    resumed: usize,
    /// Why it could not be resumed, if it was tried.
    trouble: String,
}

#[derive(Deserialize)]
struct Start {
    turn: i64,
}

#[derive(Deserialize)]
struct Delta {
    text: String,
}

impl Reply {
    pub fn new(client: Client, session: String, events: Events) -> Self {
        let (last, trouble) = (String::new(), String::new());
        Self { client, session, turn: None, events: Some(events), last, resumed: 0, trouble }
    }

    /// The number of its turn, once it has begun.
    pub fn turn(&self) -> Option<i64> {
        self.turn
    }

    /// Waits for more of the reply, or for its end. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Result<Heard, Failure> {
        loop {
            let Some(events) = &mut self.events else {
                self.resume().await?;
                continue;
            };
            let Some(Ok(event)) = events.next().await else {
                // It always ends with an event that says so.
                self.events = None;
                continue;
            };
            self.last.clone_from(&event.id);
            match event.event.as_str() {
                "start" => {
                    self.turn = Some(data::<Start>(&event)?.turn);
                    return Ok(Heard::Begun);
                }
                "delta" => {
                    self.resumed = 0;
                    return Ok(Heard::Text(data::<Delta>(&event)?.text));
                }
                "done" => return Ok(Heard::Done),
                "error" => return Err(data::<Refusal>(&event)?.into()),
                _ => {}
            }
        }
    }

    async fn resume(&mut self) -> Result<(), Failure> {
        let Some(turn) = self.turn else {
            return Err(Failure::other(
                "The connection broke before the answer began. The message may still be answered: see /history",
            ));
        };
        let Some(pause) = PAUSES.get(self.resumed) else {
            return Err(Failure::Other(format!(
                "The connection broke, and the answer could not be resumed{}. The turn may still complete on the \
                 server: see /history",
                self.trouble
            )));
        };
        sleep(*pause).await;
        self.resumed += 1;
        match self.client.resume(&self.session, turn, &self.last).await {
            Ok(events) => self.events = Some(events),
            Err(failure) => self.trouble = format!(": {failure}"),
        }
        Ok(())
    }
}

fn data<T: DeserializeOwned>(event: &Event) -> Result<T, Failure> {
    serde_json::from_str(&event.data).map_err(|_| Failure::other("The server does not stream as ATLUS does"))
}
