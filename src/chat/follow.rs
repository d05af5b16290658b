//! Listening to a turn that runs at another server, or has run: from what the database keeps.

use std::time::Duration;

use tokio::time::sleep;

use super::{
    Answered, Error,
    live::{Heard, Reader},
};
use crate::{
    domain::{
        caller::Caller,
        ids::SessionId,
        turn::{Turn, TurnStatus},
    },
    store::Store,
};

/// How often the database is asked for more.
const ASK: Duration = Duration::from_millis(250);

/// Listens to a turn, wherever it runs or ran.
pub enum Listening {
    Here(Reader),
    There(Follower),
}

impl From<Reader> for Listening {
    fn from(reader: Reader) -> Self {
        Self::Here(reader)
    }
}

impl From<Follower> for Listening {
    fn from(follower: Follower) -> Self {
        Self::There(follower)
    }
}

impl Listening {
    /// Waits for more of the reply, or for its end. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> Heard {
        match self {
            Self::Here(reader) => reader.next().await,
            Self::There(follower) => follower.next().await,
        }
    }
}

/// Follows a turn by its record.
pub struct Follower {
    store: Store,
    caller: Caller,
    session: SessionId,
    turn: i64,
    temporary: bool,
    offset: usize,
}

impl Follower {
    pub fn new(store: Store, caller: Caller, record: &Turn, temporary: bool, offset: usize) -> Self {
        Self { store, caller, session: record.session_id, turn: record.turn, temporary, offset }
    }

    async fn next(&mut self) -> Heard {
        loop {
            match self.look().await {
                Ok(Some(heard)) => return heard,
                Ok(None) => sleep(ASK).await,
                Err(error) => return Heard::Ended(Err(error)),
            }
        }
    }

    /// What the database has beyond the offset; `None` if nothing yet.
    async fn look(&mut self) -> Result<Option<Heard>, Error> {
        let record = self.store.turn(&self.caller, self.session, self.turn).await?;
        let record = record.ok_or(Error::InvalidSession)?;
        let text = match (record.status, &record.response) {
            (TurnStatus::Running, _) => self.kept().await?,
            (TurnStatus::Completed, Some(response)) => {
                response.get(self.offset..).unwrap_or_default().to_owned()
            }
            _ => String::new(),
        };
        if !text.is_empty() {
            self.offset += text.len();
            return Ok(Some(Heard::Text(text)));
        }
        match record.status {
            TurnStatus::Running => Ok(None),
            TurnStatus::Completed => Ok(Some(Heard::Ended(Ok(answered(record, self.temporary))))),
            TurnStatus::Cancelled => Err(Error::Cancelled),
            TurnStatus::Failed | TurnStatus::Deleted => Err(Error::Recorded {
                code: record.error_code.unwrap_or_else(|| "TURN_NOT_FOUND".to_owned()),
                message: record.error_message.unwrap_or_else(|| "The turn was deleted".to_owned()),
            }),
        }
    }

    /// The kept pieces beyond the offset, which may lie within the first of them.
    async fn kept(&self) -> Result<String, Error> {
        let pieces = self.store.pieces(&self.caller, self.session, self.turn).await?;
        let mut text = String::new();
        for (start, piece) in pieces {
            let start = usize::try_from(start).unwrap_or(usize::MAX);
            let wanted = self.offset + text.len();
            if let Some(more) = wanted.checked_sub(start).and_then(|from| piece.get(from..)) {
                text.push_str(more);
            }
        }
        Ok(text)
    }
}

/// A completed turn as its record has it.
fn answered(record: Turn, temporary: bool) -> Answered {
    Answered {
        usage: record.usage(),
        response: record.response.unwrap_or_default(),
        session: record.session_id,
        turn: record.turn,
        request_id: record.request_id,
        model: record.model.unwrap_or_default(),
        temporary,
        execution: Duration::from_micros(record.execution_us.unwrap_or(0).unsigned_abs()),
    }
}
