//! Postgres: a few lanes that write, sessions hashed over them, and a few connections that read. What is sent together
//! is answered together: a batch is one round trip.

use anyhow::{Result, ensure};
use futures_util::{FutureExt, future::ready};
use tokio::{sync::mpsc, try_join};
use tokio_postgres::{Client, NoTls, Statement, types::Type};

use crate::{
    database::{Admission, Ending, MAX_BATCH, Write},
    sql::{self, postgres as statements},
};

const LANES: usize = 2;
const READERS: usize = 4;

pub struct Postgres {
    lanes: Vec<mpsc::Sender<Write>>,
    readers: Vec<(Client, Statement)>,
}

impl Postgres {
    pub async fn open(url: &str) -> Result<Self> {
        let (mut lanes, mut readers) = (Vec::new(), Vec::new());
        for _ in 0..LANES {
            let (lane, queue) = mpsc::channel(4096);
            let client = connect(url).await?;
            tokio::spawn(async move {
                if let Err(error) = write(client, queue).await {
                    eprintln!("a lane has stopped: {error:#}");
                }
            });
            lanes.push(lane);
        }
        for _ in 0..READERS {
            let client = connect(url).await?;
            let context = client.prepare_typed(statements::CONTEXT, &[Type::INT8; 5]).await?;
            readers.push((client, context));
        }
        Ok(Self { lanes, readers })
    }

    pub fn lane(&self, session: i64) -> &mpsc::Sender<Write> {
        &self.lanes[place(session, LANES)]
    }

    /// The past turns that a model would be shown, as JSON.
    pub async fn context(&self, session: i64, turn: i64, token: i64) -> Result<String> {
        // By other bits than the lanes, so that a lane's batch is spread over the readers.
        let (client, statement) = &self.readers[place(session >> 8, READERS)];
        let (tenant, tokens) = (sql::TENANT, sql::CONTEXT_TOKENS);
        let row = client.query_one(statement, &[&session, &tenant, &turn, &tokens, &token]).await?;
        Ok(row.try_get("turns")?)
    }
}

fn place(number: i64, places: usize) -> usize {
    usize::try_from(number.cast_unsigned() % places as u64).unwrap_or(0)
}

async fn connect(url: &str) -> Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn write(client: Client, mut queue: mpsc::Receiver<Write>) -> Result<()> {
    let (admit, end) = (client.prepare(statements::ADMIT).await?, client.prepare(statements::END).await?);
    let mut batch = Vec::with_capacity(MAX_BATCH);
    while queue.recv_many(&mut batch, MAX_BATCH).await > 0 {
        let (mut admitted, mut ended) = (Vec::new(), Vec::new());
        for write in batch.drain(..) {
            match write {
                Write::Admit(admission, done) => admitted.push((admission, done)),
                Write::End(ending, done) => ended.push((ending, done)),
            }
        }
        // A statement is sent when its future is first looked at: in this order, and without waiting.
        let both = !admitted.is_empty() && !ended.is_empty();
        let transaction =
            |text| if both { client.batch_execute(text).left_future() } else { ready(Ok(())).right_future() };
        let ((), entered, numbered, ()) = try_join!(
            transaction("BEGIN"),
            finish(&client, &end, &ended),
            number(&client, &admit, &admitted),
            transaction("COMMIT"),
        )?;
        ensure!(entered == ended.len() as u64, "{entered} turns ended of {}", ended.len());
        for (admission, done) in admitted {
            let turn = numbered.iter().find(|(session, _)| *session == admission.session);
            // Who asked may have left.
            let _ = done.send(turn.map(|(_, turn)| *turn));
        }
        for (_, done) in ended {
            let _ = done.send(());
        }
    }
    Ok(())
}

type Answered<T> = std::result::Result<T, tokio_postgres::Error>;

/// Numbers the turns: those of sessions that were free.
async fn number<T>(
    client: &Client,
    statement: &Statement,
    rows: &[(Admission, T)],
) -> Answered<Vec<(i64, i64)>> {
    if rows.is_empty() {
        return Ok(Vec::new());
    }
    let column = |value: fn(&Admission) -> i64| rows.iter().map(|(row, _)| value(row)).collect::<Vec<_>>();
    let requests: Vec<_> = rows.iter().map(|(row, _)| format!("req_{:016x}", row.token)).collect();
    let messages: Vec<_> = rows.iter().map(|(row, _)| row.message.as_str()).collect();
    let (sessions, tenants, now) =
        (column(|row| row.session), column(|_| sql::TENANT), column(|row| row.now));
    let (token, lease) = (column(|row| row.token), column(|row| row.now + sql::LEASE_MS));
    let tokens = column(|_| 12);
    let answer = client
        .query(statement, &[&sessions, &tenants, &now, &token, &lease, &tokens, &requests, &messages])
        .await?;
    answer.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?))).collect()
}

/// Ends turns; tells how many.
async fn finish<T>(client: &Client, statement: &Statement, rows: &[(Ending, T)]) -> Answered<u64> {
    if rows.is_empty() {
        return Ok(0);
    }
    let column = |value: fn(&Ending) -> i64| rows.iter().map(|(row, _)| value(row)).collect::<Vec<_>>();
    let terms: Vec<_> = rows.iter().map(|(row, _)| row.terms()).collect();
    let (sessions, tenants, turns) =
        (column(|row| row.session), column(|_| sql::TENANT), column(|row| row.turn));
    let (token, now) = (column(|row| row.token), column(|row| row.now));
    let (execution, tokens, responses) = (column(|_| 1), column(|_| 29), vec![sql::RESPONSE; rows.len()]);
    client
        .execute(
            statement,
            &[&sessions, &tenants, &turns, &token, &now, &execution, &tokens, &responses, &terms],
        )
        .await
}
