//! Group commit: the writes of the hot path, many to a transaction.
//!
//! A commit costs one wait for the disk, whatever it holds. Each lane takes what has come in while the last
//! batch was committing, applies it in one transaction and answers after the commit: no timer, so a write alone
//! waits for nobody. Writes to one session keep their order, since a session always uses the same lane.

use std::{pin::Pin, sync::Arc};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Error, Result,
    db::{Db, Reach, Tx},
};
use crate::{domain::caller::TenantId, telemetry::metrics::METRICS};

/// The most writes in one transaction; more gains little and makes the first wait for the last.
const MAX_BATCH: usize = 256;
/// Writes that may wait in a lane before those who bring more have to wait themselves.
const QUEUE: usize = 1024;

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// A write that can share its transaction with others.
pub(super) trait Write: Send + Sync + 'static {
    type Answer: Send + 'static;

    /// Whose it is, and the number of the row it locks first: of its session, where it has one.
    fn place(&self) -> (TenantId, i64);

    /// Sends its statements. May be called again after its transaction was undone.
    fn apply<'a>(&'a self, tx: &'a mut Tx) -> impl Future<Output = Result<Self::Answer>> + Send + 'a;
}

/// Takes writes and answers each once it is durable.
#[derive(Clone)]
pub(super) struct Writer(Arc<[mpsc::Sender<Box<dyn Item>>]>);

impl Writer {
    /// Starts `lanes` tasks that write to `db`; they end when the last writer is dropped.
    pub fn start(db: &Db, lanes: usize) -> Self {
        let lane = |_| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            tokio::spawn(work(db.clone(), receiver));
            sender
        };
        Self((0..lanes.max(1)).map(lane).collect())
    }

    /// How many writes wait in all lanes.
    pub fn waiting(&self) -> usize {
        self.0.iter().map(|lane| lane.max_capacity() - lane.capacity()).sum()
    }

    /// Writes, and returns when it is durable. If the caller goes away, it is written all the same.
    pub async fn write<W: Write>(&self, write: W) -> Result<W::Answer> {
        let (done, answer) = oneshot::channel();
        let bits = write.place().1.cast_unsigned();
        // Rows are named at random, so their remainder spreads evenly.
        let lane = usize::try_from(bits % self.0.len() as u64).unwrap_or(0);
        let item = Box::new(Pending { write, answer: None, done: Some(done) });
        let stopped = || Error::from(sqlx::Error::PoolClosed);
        self.0[lane].send(item).await.map_err(|_| stopped())?;
        answer.await.map_err(|_| stopped())?
    }
}

/// A write of any kind, with whoever waits for it.
trait Item: Send {
    fn place(&self) -> (TenantId, i64);
    fn apply<'a>(&'a mut self, tx: &'a mut Tx) -> BoxFuture<'a, ()>;
    fn answer(&mut self, outcome: Result<()>);
}

struct Pending<W: Write> {
    write: W,
    answer: Option<W::Answer>,
    done: Option<oneshot::Sender<Result<W::Answer>>>,
}

impl<W: Write> Item for Pending<W> {
    fn place(&self) -> (TenantId, i64) {
        self.write.place()
    }

    fn apply<'a>(&'a mut self, tx: &'a mut Tx) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            self.answer = Some(self.write.apply(tx).await?);
            Ok(())
        })
    }

    fn answer(&mut self, outcome: Result<()>) {
        let Some(done) = self.done.take() else { return };
        match (outcome, self.answer.take()) {
            // Whoever asked may have left; the write stands all the same.
            (Ok(()), Some(answer)) => drop(done.send(Ok(answer))),
            (Err(error), _) => drop(done.send(Err(error))),
            (Ok(()), None) => {}
        }
    }
}

async fn work(db: Db, mut queue: mpsc::Receiver<Box<dyn Item>>) {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    while queue.recv_many(&mut batch, MAX_BATCH).await > 0 {
        // Rows are locked in one order everywhere, or two instances would wait for each other. Stable, so
        // that writes to one session keep theirs.
        batch.sort_by_key(|item| item.place().1);
        match commit(&db, &mut batch).await {
            // One write was refused by the database and the rest undone with it: each again, by itself.
            Err(error) if error.is_answer() && batch.len() > 1 => {
                let mut gone = None;
                for item in &mut batch {
                    let outcome = match &gone {
                        None => commit(&db, std::slice::from_mut(item)).await,
                        Some(error) => Err(Error::clone(error)),
                    };
                    // Once the database is away, the rest need not find that out one by one.
                    gone = gone.or(outcome.as_ref().err().filter(|error| !error.is_answer()).cloned());
                    item.answer(outcome);
                }
            }
            outcome => batch.iter_mut().for_each(|item| item.answer(outcome.clone())),
        }
        batch.clear();
    }
}

/// Applies a batch in one transaction: all of it or nothing.
async fn commit(db: &Db, batch: &mut [Box<dyn Item>]) -> Result<()> {
    let (began, writes) = (Instant::now(), batch.len());
    let tenants = batch.iter().map(|item| item.place().0).collect();
    let mut tx = db.begin(Reach::Tenants(tenants)).await?;
    for item in batch {
        if let Err(error) = item.apply(&mut tx).await {
            // Else the connection is gone, and dropping the transaction is all that is left.
            if error.is_answer() {
                let _ = tx.rollback().await;
            }
            return Err(error);
        }
    }
    tx.commit().await?;
    METRICS.commits.observe(began.elapsed().as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
    METRICS.batches.observe(writes as f64);
    Ok(())
}
