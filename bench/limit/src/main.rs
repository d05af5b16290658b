//! What the server is measured against: a chat's work at the database, and as little as possible around it.

mod database;
mod empty;
mod http;
mod load;
mod model;
mod postgres;
mod sql;
mod sqlite;

use std::{
    hash::{BuildHasher, RandomState},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Parser;

use crate::database::Database;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Every server listens on a port of the system's choosing and prints its address.
#[derive(Parser)]
#[command(version, about)]
enum Command {
    /// Answer chats over HTTP with the work of a chat at the database.
    Serve { database: String },
    /// Do that work without HTTP, for clients that each do one chat after the other.
    Run {
        database: String,
        #[arg(long, default_value_t = 64)]
        clients: usize,
        #[command(flatten)]
        walk: Walk,
    },
    /// Print the same work for pgbench.
    Pgbench,
    /// Answer every request with nothing, by poem-openapi.
    Empty,
    /// Be a model server.
    Model(model::Model),
    /// Send chats at a rate, whether answers come or not.
    Load(load::Load),
}

/// Which sessions are talked to, one after the other, and for how long.
#[derive(clap::Args)]
pub struct Walk {
    /// A file with a session's id in each line.
    #[arg(long)]
    sessions: PathBuf,
    /// How many lines to skip.
    #[arg(long, default_value_t = 0)]
    first: usize,
    #[arg(long, default_value_t = 2000)]
    count: usize,
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

impl Walk {
    pub fn duration(&self) -> Duration {
        Duration::from_secs_f64(self.seconds)
    }

    pub fn ids(&self) -> Result<Vec<String>> {
        let text = std::fs::read_to_string(&self.sessions)?;
        let ids: Vec<_> = text.lines().skip(self.first).take(self.count).map(str::to_owned).collect();
        anyhow::ensure!(!ids.is_empty(), "no sessions");
        Ok(ids)
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    match Command::parse() {
        Command::Serve { database } => {
            http::serve(http::Chats(Arc::new(Database::open(&database).await?))).await
        }
        Command::Run { database, clients, walk } => {
            run(Database::open(&database).await?, clients, &walk).await
        }
        Command::Pgbench => {
            print!("{}", sql::postgres::pgbench());
            Ok(())
        }
        Command::Empty => empty::serve().await,
        Command::Model(model) => http::serve(model).await,
        Command::Load(load) => load.run().await,
    }
}

/// A random positive number.
pub fn token() -> i64 {
    (RandomState::new().hash_one(0) >> 1).cast_signed()
}

async fn run(database: Database, clients: usize, walk: &Walk) -> Result<()> {
    let number = |id: &String| Ok(u64::from_str_radix(id.trim_start_matches("session_"), 16)?.cast_signed());
    let sessions: Vec<i64> = walk.ids()?.iter().map(number).collect::<Result<_>>()?;
    let shared = Arc::new((database, sessions, AtomicUsize::new(0)));
    // What comes before that warms caches up.
    let began = Instant::now() + Duration::from_millis(500);
    let ends = began + walk.duration();
    let client = |_| {
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let (database, sessions, next) = &*shared;
            let mut took = Vec::new();
            while Instant::now() < ends {
                let n = next.fetch_add(1, Ordering::Relaxed);
                let (start, message) =
                    (Instant::now(), format!("What would you say about number {n} of the list?"));
                anyhow::ensure!(database.chat(sessions[n % sessions.len()], token(), message).await?, "busy");
                if start >= began {
                    took.push(start.elapsed());
                }
            }
            Ok(took)
        })
    };
    let clients: Vec<_> = (0..clients).map(client).collect();
    let mut took = Vec::new();
    for client in clients {
        took.extend(client.await??);
    }
    let seconds = began.elapsed().as_secs_f64();
    println!(
        "{}",
        serde_json::json!({"rate": load::rate(took.len(), seconds), "p50": load::percentile(&mut took, 50),
        "p99": load::percentile(&mut took, 99), "errors": 0})
    );
    Ok(())
}
