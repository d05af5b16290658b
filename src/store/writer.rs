//! Group commit: the writes of the hot path, many to a transaction.
//!
//! A commit costs one wait for the disk, whatever it holds. Each lane takes what has come in while the last
//! batch was committing, applies it in one transaction and answers after the commit: no timer, so a write alone
//! waits for nobody. Writes to one session keep their order, since a session always uses the same lane; those to
//! different sessions are applied by few statements, all of a kind together.

use std::{
    any::{Any, TypeId},
    pin::Pin,
    sync::Arc,
};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::{
    Error, Result,
    db::{Db, Reach, Tx},
    sessions,
};
use crate::{domain::caller::TenantId, telemetry::metrics::METRICS};

/// Writes that may wait in a lane before those who bring more have to wait themselves.
const QUEUE: usize = 1024;

type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>;

/// A write that can share its transaction with others.
pub(super) trait Write: Send + Sync + 'static {
    type Answer: Send + 'static;

    /// Whose it is, and the number of the row it locks first: of its session, where it has one.
    fn place(&self) -> (TenantId, i64);

    /// Sends the statements of several writes, each with a place of its own; an answer to each, in their order. May be
    /// called again after its transaction was undone.
    fn apply<'a>(
        writes: &'a [&'a Self],
        tx: &'a mut Tx,
    ) -> impl Future<Output = Result<Vec<Self::Answer>>> + Send + 'a;
}

/// A write of a kind that seldom comes in numbers: its statements are its own.
pub(super) trait WriteAlone: Send + Sync + 'static {
    type Answer: Send + 'static;

    /// See [`Write::place`].
    fn place(&self) -> (TenantId, i64);

    /// Sends its statements. May be called again after its transaction was undone.
    fn apply<'a>(&'a self, tx: &'a mut Tx) -> impl Future<Output = Result<Self::Answer>> + Send + 'a;
}

impl<W: WriteAlone> Write for W {
    type Answer = W::Answer;

    fn place(&self) -> (TenantId, i64) {
        WriteAlone::place(self)
    }

    async fn apply(writes: &[&Self], tx: &mut Tx) -> Result<Vec<Self::Answer>> {
        let mut answers = Vec::with_capacity(writes.len());
        for write in writes {
            answers.push(WriteAlone::apply(*write, tx).await?);
        }
        Ok(answers)
    }
}

/// Takes writes and answers each once it is durable.
#[derive(Clone)]
pub(super) struct Writer(Arc<[mpsc::Sender<Box<dyn Item>>]>);

impl Writer {
    /// Starts `lanes` tasks that write to `db`, at most `most` writes in a transaction; they end when the last writer is
    /// dropped.
    pub fn start(db: &Db, lanes: usize, most: usize) -> Self {
        let lane = |_| {
            let (sender, receiver) = mpsc::channel(QUEUE);
            tokio::spawn(work(db.clone(), receiver, most));
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
trait Item: Any + Send {
    fn place(&self) -> (TenantId, i64);
    fn kind(&self) -> TypeId;
    /// What applies items of this one's kind.
    fn together(&self) -> Together;
    fn answer(&mut self, outcome: Result<()>);
}

type Together = for<'a> fn(&'a mut [&mut dyn Item], &'a mut Tx) -> BoxFuture<'a, ()>;

struct Pending<W: Write> {
    write: W,
    answer: Option<W::Answer>,
    done: Option<oneshot::Sender<Result<W::Answer>>>,
}

impl<W: Write> Item for Pending<W> {
    fn place(&self) -> (TenantId, i64) {
        self.write.place()
    }

    fn kind(&self) -> TypeId {
        TypeId::of::<W>()
    }

    fn together(&self) -> Together {
        |items, tx| Box::pin(apply_together::<W>(items, tx))
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

async fn apply_together<W: Write>(items: &mut [&mut dyn Item], tx: &mut Tx) -> Result<()> {
    let mut items: Vec<&mut Pending<W>> =
        items.iter_mut().filter_map(|item| (&mut **item as &mut dyn Any).downcast_mut()).collect();
    let writes: Vec<&W> = items.iter().map(|item| &item.write).collect();
    let answers = W::apply(&writes, tx).await?;
    for (item, answer) in items.iter_mut().zip(answers) {
        item.answer = Some(answer);
    }
    Ok(())
}

async fn work(db: Db, mut queue: mpsc::Receiver<Box<dyn Item>>, most: usize) {
    let mut batch = Vec::with_capacity(most);
    while queue.recv_many(&mut batch, most).await > 0 {
        // Writes to one session stand together, and stay in their order.
        batch.sort_by_key(|item| item.place());
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

/// Applies a batch, sorted by place, in one transaction: all of it or nothing.
async fn commit(db: &Db, batch: &mut [Box<dyn Item>]) -> Result<()> {
    let (began, writes) = (Instant::now(), batch.len());
    let places: Vec<_> = batch.iter().map(|item| item.place()).collect();
    let mut tx = db.begin(Reach::Tenants(places.iter().map(|(tenant, _)| *tenant).collect())).await?;
    if let Err(error) = apply(&mut tx, &places, batch).await {
        // Else the connection is gone, and dropping the transaction is all that is left.
        if error.is_answer() {
            let _ = tx.rollback().await;
        }
        return Err(error);
    }
    tx.commit().await?;
    METRICS.commits.observe(began.elapsed().as_secs_f64());
    #[expect(clippy::cast_precision_loss, reason = "a batch is small")]
    METRICS.batches.observe(writes as f64);
    Ok(())
}

/// Applies the first write to each place, those of a kind together, then the second, and so on.
async fn apply(tx: &mut Tx, places: &[(TenantId, i64)], batch: &mut [Box<dyn Item>]) -> Result<()> {
    // Rows are locked in one order everywhere, or two instances would wait for each other.
    if places.len() > 1 {
        sessions::lock(tx, places).await?;
    }
    let mut rounds: Vec<Vec<&mut dyn Item>> = Vec::new();
    for writes in batch.chunk_by_mut(|a, b| a.place() == b.place()) {
        for (round, write) in writes.iter_mut().enumerate() {
            if rounds.len() == round {
                rounds.push(Vec::new());
            }
            rounds[round].push(&mut **write);
        }
    }
    let mut groups = Vec::new();
    for round in &mut rounds {
        round.sort_by_key(|write| write.kind());
        groups.extend(round.chunk_by_mut(|a, b| a.kind() == b.kind()));
    }
    if groups.len() == 1 {
        tx.nothing_follows();
    }
    for group in groups {
        group[0].together()(group, tx).await?;
    }
    Ok(())
}
