//! `atlus openapi`: print the document.

use clap::{Args, ValueEnum};

use crate::api::document;

#[derive(Args)]
pub(super) struct Openapi {
    /// The form of the document
    #[arg(long, value_enum, default_value = "yaml")]
    format: Format,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    Yaml,
    Json,
}

impl Openapi {
    #[expect(clippy::unnecessary_wraps, reason = "commands are alike")]
    pub fn run(self) -> anyhow::Result<()> {
        let format = match self.format {
            Format::Yaml => document::Format::Yaml,
            Format::Json => document::Format::Json,
        };
        print!("{}", document::text(format));
        Ok(())
    }
}
