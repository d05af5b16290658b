//! Examples of requests and answers.

use serde_json::{Map, Value, json};

use super::{MOMENT, each_operation};

/// Puts the examples of `examples.yaml` where they belong.
pub fn show(document: &mut Value) {
    let examples = read();
    each_operation(document, |_, _, operation| {
        let own = &examples[operation["operationId"].as_str().unwrap_or_default()];
        if let Some(requests) = named(&own["requests"]) {
            operation["requestBody"]["content"]["application/json"]["examples"] = requests;
        }
        for (status, response) in operation["responses"].as_object_mut().into_iter().flatten() {
            let example = match &own["answers"][status] {
                Value::Null if status.starts_with('2') && own["data"].is_object() => {
                    json!({"success": true, "data": own["data"], "timestamp": MOMENT.to_string()})
                }
                Value::Null => continue,
                whole => whole.clone(),
            };
            for content in response["content"].as_object_mut().into_iter().flat_map(Map::values_mut) {
                content["example"] = example.clone();
            }
        }
        if let Some(events) = named(&own["events"]) {
            operation["responses"]["200"]["content"]["text/event-stream"]["examples"] = events;
        }
    });
}

/// The file; the tests find out if it cannot be read.
fn read() -> Value {
    let mut examples: serde_yaml::Value =
        serde_yaml::from_str(include_str!("examples.yaml")).unwrap_or_default();
    let _ = examples.apply_merge();
    serde_json::to_value(examples).unwrap_or_default()
}

fn named(examples: &Value) -> Option<Value> {
    let shown = |(name, value): (&String, &Value)| (name.clone(), json!({"value": value}));
    Some(examples.as_object()?.iter().map(shown).collect::<Map<_, _>>().into())
}
