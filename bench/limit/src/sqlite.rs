//! SQLite, called from the threads that need it: one that writes, and whoever reads.

use std::{cell::RefCell, thread};

use anyhow::{Result, ensure};
use rusqlite::{Connection, TransactionBehavior, named_params};
use tokio::sync::mpsc;

use crate::{
    database::{Admission, Ending, MAX_BATCH, Write},
    sql::{self, sqlite as statements},
};

pub struct Sqlite {
    file: String,
    pub writer: mpsc::Sender<Write>,
}

thread_local! {
    /// The connection that this thread reads from.
    static READER: RefCell<Option<Connection>> = const { RefCell::new(None) };
}

impl Sqlite {
    pub fn open(file: &str) -> Result<Self> {
        let connection = connect(file)?;
        let (writer, queue) = mpsc::channel(4096);
        thread::spawn(move || {
            if let Err(error) = write(connection, queue) {
                eprintln!("the writer has stopped: {error:#}");
            }
        });
        Ok(Self { file: file.to_owned(), writer })
    }

    /// The past turns that a model would be shown, as JSON.
    pub fn context(&self, session: i64, turn: i64, token: i64) -> Result<String> {
        READER.with_borrow_mut(|reader| {
            let connection = match reader {
                Some(connection) => connection,
                None => {
                    let connection = connect(&self.file)?;
                    connection.pragma_update(None, "query_only", "ON")?;
                    reader.insert(connection)
                }
            };
            let mut statement = connection.prepare_cached(statements::CONTEXT)?;
            // To SQLite `$1` is a name, not a place.
            let key = named_params! {
                "$1": session, "$2": sql::TENANT, "$3": turn, "$4": sql::CONTEXT_TOKENS, "$5": token,
            };
            Ok(statement.query_row(key, |row| row.get("turns"))?)
        })
    }
}

/// As `src/store/connect.rs` does.
fn connect(file: &str) -> Result<Connection> {
    let connection = Connection::open(file)?;
    connection.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA busy_timeout = 5000; PRAGMA foreign_keys = ON; \
         PRAGMA secure_delete = ON; PRAGMA journal_size_limit = 67108864; PRAGMA trusted_schema = OFF; \
         PRAGMA cell_size_check = ON; PRAGMA temp_store = MEMORY; PRAGMA cache_size = -16384;",
    )?;
    connection.set_prepared_statement_cache_capacity(256);
    Ok(connection)
}

/// Commits what waits, at most a batch at a time, until nobody is left who writes.
fn write(mut connection: Connection, mut queue: mpsc::Receiver<Write>) -> Result<()> {
    let mut batch = Vec::with_capacity(MAX_BATCH);
    while queue.blocking_recv_many(&mut batch, MAX_BATCH) > 0 {
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (mut admitted, mut ended) = (Vec::new(), Vec::new());
        for write in batch.drain(..) {
            match write {
                Write::Admit(admission, done) => admitted.push((admission, done, None)),
                Write::End(ending, done) => ended.push((ending, done)),
            }
        }
        if !ended.is_empty() {
            let row = |(e, _): &(Ending, _)| {
                (e.session, sql::TENANT, e.turn, e.token, e.now, 1, 29, sql::RESPONSE, e.terms())
            };
            let rows = serde_json::to_string(&ended.iter().map(row).collect::<Vec<_>>())?;
            for text in [statements::FREE, statements::COMPLETE, statements::ENTER] {
                let changed = tx.prepare_cached(text)?.execute([&rows])?;
                ensure!(changed == ended.len(), "{changed} rows of {}: {text}", ended.len());
            }
            for text in [statements::PLACE, statements::INDEX] {
                tx.prepare_cached(text)?.execute([&rows])?;
            }
        }
        if !admitted.is_empty() {
            let row = |(a, _, turn): &(Admission, _, Option<i64>)| {
                let (lease, request) = (a.now + sql::LEASE_MS, format!("req_{:016x}", a.token));
                (a.session, sql::TENANT, a.now, a.token, lease, 12, request, a.message.clone(), *turn)
            };
            let rows = serde_json::to_string(&admitted.iter().map(row).collect::<Vec<_>>())?;
            let mut statement = tx.prepare_cached(statements::NUMBER)?;
            let mut numbered = statement.query([&rows])?;
            while let Some(found) = numbered.next()? {
                let (session, turn): (i64, i64) = (found.get(0)?, found.get(1)?);
                if let Some((_, _, number)) = admitted.iter_mut().find(|(a, ..)| a.session == session) {
                    *number = Some(turn);
                }
            }
            let kept: Vec<_> = admitted.iter().filter(|(_, _, turn)| turn.is_some()).map(row).collect();
            tx.prepare_cached(statements::KEEP)?.execute([&serde_json::to_string(&kept)?])?;
        }
        tx.commit()?;
        // Who asked may have left.
        for (_, done, turn) in admitted {
            let _ = done.send(turn);
        }
        for (_, done) in ended {
            let _ = done.send(());
        }
    }
    Ok(())
}
