//! Reads of the hot path, many to a statement.
//!
//! A statement costs a change of threads on SQLite and a round trip on Postgres, whatever it reads. Each lane takes the
//! reads of its kind that have come in while the last were under way: no timer, so a read alone waits for nobody.

use std::sync::{Arc, Mutex};

use tokio::{
    sync::{mpsc, oneshot},
    task::yield_now,
};

use super::{
    Error, Result,
    db::{Db, Record, SENT, Statement},
};

/// The most reads in one statement; more make the first wait for the last.
const MOST: usize = 32;
/// Reads that may wait in a lane before those who bring more have to wait themselves.
const QUEUE: usize = 1024;
/// Lanes of a kind: while one reads, another fills up.
const LANES: usize = 2;

/// A read that can share its statement with others of its kind.
pub(super) trait Read: Send + Sync + 'static {
    type Answer: Send + 'static;

    /// The answers to several reads, in their order.
    fn read_all<'a>(
        reads: &'a [&'a Self],
        db: &'a Db,
    ) -> impl Future<Output = sqlx::Result<Vec<Self::Answer>>> + Send + 'a;
}

struct Asked<R: Read> {
    read: R,
    done: oneshot::Sender<Result<R::Answer>>,
    /// Where the asker writes down what is sent.
    sent: Option<Arc<Mutex<Vec<String>>>>,
}

/// Takes reads of one kind.
pub(super) struct Reader<R: Read>(Arc<[mpsc::Sender<Asked<R>>]>);

impl<R: Read> Clone for Reader<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Read> Reader<R> {
    /// Starts tasks that read from `db`; they end when the last reader is dropped.
    pub fn start(db: &Db) -> Self {
        let lane = |_| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            tokio::spawn(work(db.clone(), receiver));
            sender
        };
        Self((0..LANES).map(lane).collect())
    }

    pub async fn read(&self, read: R) -> Result<R::Answer> {
        let (done, answer) = oneshot::channel();
        let stopped = || Error::from(sqlx::Error::PoolClosed);
        // The one that has least to do.
        let lane = self.0.iter().max_by_key(|lane| lane.capacity()).ok_or_else(stopped)?;
        let asked = Asked { read, done, sent: SENT.try_with(Arc::clone).ok() };
        lane.send(asked).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}

async fn work<R: Read>(db: Db, mut queue: mpsc::Receiver<Asked<R>>) {
    let mut batch = Vec::with_capacity(MOST);
    while let Some(first) = queue.recv().await {
        batch.push(first);
        // Whatever else is ready to run may bring a read: an asker's own thread would have this go next.
        yield_now().await;
        while batch.len() < MOST
            && let Ok(next) = queue.try_recv()
        {
            batch.push(next);
        }
        // Nobody waits any more for those whose callers have left.
        batch.retain(|asked| !asked.done.is_closed());
        let reads: Vec<&R> = batch.iter().map(|asked| &asked.read).collect();
        let read = R::read_all(&reads, &db);
        let answers = match batch.iter().find_map(|asked| asked.sent.clone()) {
            Some(sent) => SENT.scope(sent, read).await,
            None => read.await,
        };
        match answers.map_err(Error::from) {
            Ok(answers) => {
                for (asked, answer) in batch.drain(..).zip(answers) {
                    drop(asked.done.send(Ok(answer)));
                }
            }
            Err(error) => batch.drain(..).for_each(|asked| drop(asked.done.send(Err(error.clone())))),
        }
    }
}

/// A row, and which of the reads it answers.
#[derive(sqlx::FromRow)]
pub(super) struct Placed<T> {
    place: i64,
    #[sqlx(flatten)]
    row: T,
}

/// Sends a statement whose rows say in `place` which read they answer; an answer to each of so many reads.
pub(super) async fn placed<T>(statement: Statement<'_>, reads: usize) -> sqlx::Result<Vec<Option<T>>>
where
    Placed<T>: Record,
{
    let mut answers: Vec<Option<T>> = (0..reads).map(|_| None).collect();
    for Placed { place, row } in statement.all::<Placed<T>>().await? {
        if let Some(answer) = usize::try_from(place).ok().and_then(|place| answers.get_mut(place)) {
            *answer = Some(row);
        }
    }
    Ok(answers)
}
