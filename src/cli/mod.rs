//! The command line: one file per command; and what a supervisor asks (`probe`) and hears (`systemd`).

mod archive;
mod chat;
mod copy;
mod doctor;
mod keys;
mod migrate;
mod openapi;
mod probe;
mod serve;
mod systemd;

use clap::{Args, Parser, Subcommand};

use crate::config::Settings;

/// Conversation sessions for assistants
#[derive(Parser)]
#[command(name = "atlus", version, about, long_about = None)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Migrate the database, then serve; also what plain `atlus` does
    Serve(Serve),
    /// Hold a conversation in the terminal, with a running server or with a database
    Chat(chat::Chat),
    /// Make, list and revoke keys, on the database itself
    Keys(keys::Keys),
    /// Apply pending migrations and stop
    Migrate(migrate::Migrate),
    /// Write sessions, turns and facts as an archive (NDJSON)
    Export(archive::Export),
    /// Take an archive in; what is there already stays as it is
    Import(archive::Take),
    /// Copy everything from one database into another, SQLite or Postgres
    Copy(copy::Copy),
    /// Print the OpenAPI document
    Openapi(openapi::Openapi),
    /// Check settings, database, schema and model, and say what to mend; or ask a running server
    Doctor(doctor::Doctor),
}

#[derive(Args)]
#[command(after_help = "\
    Traces are sent where OTEL_EXPORTER_OTLP_ENDPOINT says (http/protobuf); the other OTEL_… variables have their standard meaning.")]
struct Serve {
    #[command(flatten)]
    settings: Settings,
}

impl Cli {
    /// Runs one command to its end.
    pub fn run(self) -> anyhow::Result<()> {
        match self.command {
            None => serve::run(&Settings::from_environment()),
            Some(Command::Serve(serve)) => serve::run(&serve.settings),
            Some(Command::Chat(chat)) => chat.run(),
            Some(Command::Keys(keys)) => keys.run(),
            Some(Command::Migrate(migrate)) => migrate.run(),
            Some(Command::Export(export)) => export.run(),
            Some(Command::Import(import)) => import.run(),
            Some(Command::Copy(copy)) => copy.run(),
            Some(Command::Openapi(openapi)) => openapi.run(),
            Some(Command::Doctor(doctor)) => doctor.run(),
        }
    }
}

/// A runtime for commands that need no more than one thread.
fn block_on<T>(command: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command)
}
