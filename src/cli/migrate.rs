//! `atlus migrate`: bring the schema up to date, or tell what is pending.

use clap::Args;

use super::block_on;
use crate::{config::Settings, store::Store};

#[derive(Args)]
pub(super) struct Migrate {
    /// Change nothing; tell what is pending, and exit with 1 if anything is
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    settings: Settings,
}

impl Migrate {
    pub fn run(self) -> anyhow::Result<()> {
        let database = self.settings.read_database()?;
        block_on(async {
            let pending = Store::schema_status(&database).await?.pending;
            for name in &pending {
                println!("pending: {name}");
            }
            if pending.is_empty() {
                println!("{} is up to date", database.url);
            } else if self.check {
                std::process::exit(1);
            } else {
                Store::migrate(&database).await?;
                println!("{} is up to date now", database.url);
            }
            Ok(())
        })
    }
}
