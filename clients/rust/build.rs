//! Makes the client of `openapi.yaml`.

use std::{env, error::Error, fs, path::Path};

use progenitor::{GenerationSettings, Generator, InterfaceStyle};
use serde_yaml::Value;

const DOCUMENT: &str = "../../openapi.yaml";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={DOCUMENT}");
    let mut document: Value = serde_yaml::from_str(&fs::read_to_string(DOCUMENT)?)?;
    // progenitor sends JSON, forms, text and bytes, but no media type of another name.
    if let Some(paths) = document["paths"].as_mapping_mut() {
        paths.remove("/api/v1/import");
    }
    let mut settings = GenerationSettings::default();
    settings.with_interface(InterfaceStyle::Builder);
    let tokens = Generator::new(&settings).generate_tokens(&serde_yaml::from_value(document)?)?;
    let code = prettyplease::unparse(&syn::parse2(tokens)?);
    fs::write(Path::new(&env::var("OUT_DIR")?).join("client.rs"), code)?;
    Ok(())
}
