//! Makes the client of `openapi.yaml`.

use std::{env, error::Error, fs, path::Path};

use progenitor::{GenerationSettings, Generator, InterfaceStyle};
use serde_yaml::{Mapping, Value};

const DOCUMENT: &str = "../../openapi.yaml";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed={DOCUMENT}");
    let mut document: Value = serde_yaml::from_str(&fs::read_to_string(DOCUMENT)?)?;
    // progenitor sends JSON, forms, text and bytes, but no media type of another name.
    if let Some(paths) = document["paths"].as_mapping_mut() {
        paths.remove("/api/v1/import");
    }
    for schema in document["components"]["schemas"].as_mapping_mut().into_iter().flat_map(Mapping::values_mut)
    {
        let properties = schema["properties"].as_mapping_mut();
        properties.into_iter().flat_map(Mapping::values_mut).for_each(say_nullable);
    }
    let mut settings = GenerationSettings::default();
    settings.with_interface(InterfaceStyle::Builder);
    let tokens = Generator::new(&settings).generate_tokens(&serde_yaml::from_value(document)?)?;
    let code = prettyplease::unparse(&syn::parse2(tokens)?);
    fs::write(Path::new(&env::var("OUT_DIR")?).join("client.rs"), code)?;
    Ok(())
}

/// "One of this and null" becomes "this, nullable": progenitor would make an enum of it, named after the property, and
/// `error` of `Turn` would be called like the schema `TurnError`.
fn say_nullable(property: &mut Value) {
    let Some([this, null]) = property.get("oneOf").and_then(Value::as_sequence).map(Vec::as_slice) else {
        return;
    };
    if null["enum"] == Value::Sequence(vec![Value::Null]) {
        property["allOf"] = Value::Sequence(vec![this.clone()]);
        property["nullable"] = true.into();
        property["type"] = property["oneOf"][1]["type"].clone();
        property.as_mapping_mut().map(|property| property.remove("oneOf"));
    }
}
