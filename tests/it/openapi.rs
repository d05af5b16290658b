//! The document is what the code prints, and is whole.

use std::collections::BTreeSet;

use atlus::api::document;
use serde_json::Value;

use crate::schema::DOCUMENT;

#[test]
fn the_checked_in_document_is_what_the_code_prints() {
    let checked_in = std::fs::read_to_string("openapi.yaml").unwrap();
    assert!(
        checked_in == document::text(document::Format::Yaml),
        "openapi.yaml is out of date: run `cargo run -- openapi > openapi.yaml`"
    );
}

#[test]
fn every_operation_is_named_and_described() {
    let mut names = BTreeSet::new();
    for (path, item) in DOCUMENT["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let name =
                operation["operationId"].as_str().unwrap_or_else(|| panic!("{method} {path} has no id"));
            assert!(names.insert(name), "{name} twice");
            assert!(operation["summary"].is_string(), "{name} has no summary");
            assert_eq!(operation["tags"].as_array().unwrap().len(), 1, "{name}");
            for parameter in operation["parameters"].as_array().into_iter().flatten() {
                assert!(parameter["description"].is_string(), "{name}: {}", parameter["name"]);
                assert!(!parameter["name"].as_str().unwrap().starts_with("param"), "{name}");
            }
        }
    }
}

#[test]
fn every_reference_leads_somewhere() {
    fn walk(value: &Value) {
        match value {
            Value::Object(map) => {
                if let Some(target) = map.get("$ref") {
                    let pointer = target.as_str().unwrap().strip_prefix('#').unwrap();
                    assert!(DOCUMENT.pointer(pointer).is_some(), "{target}");
                }
                map.values().for_each(walk);
            }
            Value::Array(items) => items.iter().for_each(walk),
            _ => {}
        }
    }
    walk(&DOCUMENT);
}
