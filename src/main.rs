//! Reads the command line, runs one command, turns its outcome into an exit code.

use std::process::ExitCode;

use clap::Parser;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match atlus::cli::Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Causes in line, for people; `Debug` would print a list.
            eprintln!("atlus: {error:#}");
            ExitCode::FAILURE
        }
    }
}
