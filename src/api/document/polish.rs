//! Mends what linters and client generators stumbled over in poem-openapi's output.

use serde_json::{Map, Value, json};

/// Mends every schema, and says which fields are always there.
pub fn mend(document: &mut Value) {
    // A title that differs from the component's name gives a type two names.
    for schema in document["components"]["schemas"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        schema.as_object_mut().and_then(|schema| schema.shift_remove("title"));
    }
    let types = document["components"]["schemas"].clone();
    polish(document, &types);
    require_what_is_always_there(document);
}

/// Gives components of generic types a readable name: `Envelope_Page_Turn` becomes `TurnPageEnvelope`.
pub fn renamed(value: Value) -> Value {
    let name = |name: &str| name.rsplit('_').collect::<String>();
    match value {
        Value::Object(map) => Value::Object(
            map.into_iter()
                .map(|(key, value)| match (key.as_str(), value) {
                    ("$ref", Value::String(target)) => {
                        let (folder, target) = target.rsplit_once('/').unwrap_or(("", &target));
                        (key, format!("{folder}/{}", name(target)).into())
                    }
                    ("schemas", Value::Object(schemas)) => {
                        let schemas = schemas.into_iter().map(|(key, value)| (name(&key), renamed(value)));
                        (key, schemas.collect())
                    }
                    (_, value) => (key, renamed(value)),
                })
                .collect(),
        ),
        Value::Array(items) => items.into_iter().map(renamed).collect(),
        other => other,
    }
}

/// Mends every schema in place; `types` are the named ones, to look up what a reference is.
fn polish(value: &mut Value, types: &Value) {
    match value {
        Value::Object(schema) => {
            // What goes without saying.
            if schema.get("deprecated") == Some(&json!(false)) {
                schema.shift_remove("deprecated");
                schema.shift_remove("explode");
            }
            // A described reference: the second part only repeats what stands beside it. Where it may be null, that is
            // said as an alternative: beside `allOf`, `nullable` makes nothing null that the reference does not.
            if let Some(Value::Array(parts)) = schema.get_mut("allOf") {
                parts.truncate(1);
                let target =
                    parts.first().and_then(|part| part["$ref"].as_str()).and_then(|r| r.rsplit('/').next());
                let ty = target.map(|name| types[name]["type"].clone());
                if schema.shift_remove("nullable").is_some() {
                    let mut parts = schema.shift_remove("allOf").unwrap_or_default();
                    let null = json!({"type": ty, "nullable": true, "enum": [null]});
                    parts.as_array_mut().into_iter().for_each(|parts| parts.push(null.clone()));
                    schema.insert("oneOf".to_owned(), parts);
                }
            }
            // No other reader knows formats without a sign.
            if schema.get("format") == Some(&json!("uint64")) {
                schema.insert("format".to_owned(), json!("int64"));
                schema.insert("minimum".to_owned(), json!(0));
            }
            // Bounds of integers are integers.
            for bound in ["minimum", "maximum"] {
                let whole = schema.get(bound).and_then(Value::as_f64).filter(|bound| bound.fract() == 0.0);
                if let Some(whole) = whole {
                    #[expect(clippy::cast_possible_truncation, reason = "our bounds are small")]
                    schema.insert(bound.to_owned(), json!(whole as i64));
                }
            }
            schema.values_mut().for_each(|value| polish(value, types));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| polish(value, types)),
        _ => {}
    }
}

/// Types of requests, whose fields may be left out.
const REQUESTS: [&str; 10] = [
    "NewSession", "SessionChange", "NewFork", "ChatRequest", "NewTurns", "NewTurn", "MemoryChange",
    "BehaviorProfileChange", "UserMemoryChange", "NewKey",
];

/// A field of an answer is there even if it is null, unless it is left out where there is nothing to tell.
fn require_what_is_always_there(document: &mut Value) {
    let Some(types) = document["components"]["schemas"].as_object_mut() else { return };
    for (name, schema) in types.iter_mut().filter(|(name, _)| !REQUESTS.contains(&name.as_str())) {
        let Some(properties) = schema["properties"].as_object() else { continue };
        let always = |field: &&String| (name.as_str(), field.as_str()) != ("Error", "details");
        schema["required"] = properties.keys().filter(always).cloned().collect::<Vec<_>>().into();
    }
}

/// Readers of YAML 1.1 take a bare time for a value of its own type.
pub fn quote_time(line: &str) -> String {
    match line.split_once(": ") {
        Some((key, time)) if time.len() == 24 && time.starts_with("20") && time.ends_with('Z') => {
            format!("{key}: '{time}'")
        }
        _ => line.to_owned(),
    }
}
