//! Checks answers against the OpenAPI document, strictly: a field that is not described is an error too, and so is a
//! failure that the operation does not list.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock, Mutex},
};

use atlus::api::document;
use jsonschema::Validator;
use reqwest::Method;
use serde_json::{Map, Value, json};

pub static DOCUMENT: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(&document::text(document::Format::Json)).unwrap());

/// Every operation of the document: method, path with its parameters named, and the operation.
pub fn operations() -> Vec<(Method, String, Value)> {
    let paths = DOCUMENT["paths"].as_object().unwrap();
    let each = paths.iter().flat_map(|(path, item)| {
        let methods = item.as_object().unwrap().iter();
        methods.map(|(method, operation)| {
            (method.to_uppercase().parse().unwrap(), path.clone(), operation.clone())
        })
    });
    each.collect()
}

/// The document with its schemas as JSON Schema, which has no `nullable`.
pub static STRICT: LazyLock<Value> = LazyLock::new(|| json_schema(DOCUMENT.clone()));

type Validators = Mutex<HashMap<(Method, String, String), Arc<Validator>>>;
static VALIDATORS: LazyLock<Validators> = LazyLock::new(Default::default);

/// Panics unless the document allows this answer. Paths it does not know must be failures.
pub fn check(method: &Method, path: &str, status: u16, body: &Value) {
    let Some(template) = template(path) else {
        assert!(
            status >= 300 || !path.starts_with("/api/"),
            "{path} is not in the document but answered {status}"
        );
        return check_failure(status, body);
    };
    let Some(operation) = STRICT["paths"][&template].get(method.as_str().to_lowercase()) else {
        assert!(*method == Method::HEAD || status == 405, "{method} {template} answered {status}");
        return check_failure(status, body);
    };
    // Not by its range: what is answered is to be listed.
    let key = status.to_string();
    let response = resolved(&operation["responses"][&key]);
    assert!(!response.is_null(), "{method} {template} does not say that it answers {status}: {body}");
    let content = &response["content"]["application/json"];
    validate(&(method.clone(), template.clone(), key), &content["schema"], body);
    if let Some(listed) = content["examples"].as_object().filter(|_| status >= 400) {
        let code = body["error"]["code"].as_str().unwrap();
        assert!(
            listed.contains_key(code),
            "{method} {template} does not say that it answers {status} {code}"
        );
    }
}

/// What a reference leads to; anything else itself.
pub fn resolved(part: &Value) -> &Value {
    match part["$ref"].as_str() {
        Some(target) => STRICT.pointer(target.trim_start_matches('#')).unwrap(),
        None => part,
    }
}

/// Panics unless the document allows this event.
pub fn check_event(name: &str, data: &Value) {
    let component = match name {
        "start" => "StartEvent",
        "delta" => "DeltaEvent",
        "done" => "ChatAnswer",
        "error" => "Failure",
        other => panic!("there is no event {other}"),
    };
    let schema = json!({"$ref": format!("#/components/schemas/{component}")});
    validate(&(Method::GET, component.to_owned(), "event".to_owned()), &schema, data);
}

fn check_failure(status: u16, body: &Value) {
    if status >= 400 && *body != Value::String(String::new()) {
        let schema = json!({"$ref": "#/components/schemas/Failure"});
        validate(&(Method::GET, "Failure".to_owned(), String::new()), &schema, body);
    }
}

fn validate(key: &(Method, String, String), schema: &Value, body: &Value) {
    let mut known = VALIDATORS.lock().unwrap();
    let validator = known.entry(key.clone()).or_insert_with(|| Arc::new(validator(schema))).clone();
    drop(known);
    let errors = problems(&validator, body);
    assert!(errors.is_empty(), "{key:?} answered what the document does not allow: {errors:#?} in {body:#}");
}

/// Checks what a schema of [`STRICT`] allows.
pub fn validator(schema: &Value) -> Validator {
    let mut root = schema.clone();
    root["components"] = json!({"schemas": STRICT["components"]["schemas"]});
    jsonschema::options().should_validate_formats(true).build(&root).unwrap()
}

/// What is wrong with a value.
pub fn problems(validator: &Validator, value: &Value) -> Vec<String> {
    validator.iter_errors(value).map(|error| format!("{}: {error}", error.instance_path())).collect()
}

/// The path of the document that a real path belongs to; literal parts win over parameters.
fn template(path: &str) -> Option<String> {
    let fits = |template: &str| {
        let (mut given, mut wanted) = (path.split('/'), template.split('/'));
        loop {
            match (given.next(), wanted.next()) {
                (None, None) => return true,
                (Some(given), Some(wanted))
                    if wanted == given || (wanted.starts_with('{') && !given.is_empty()) => {}
                _ => return false,
            }
        }
    };
    let templates = DOCUMENT["paths"].as_object().unwrap().keys();
    templates.filter(|template| fits(template)).min_by_key(|template| template.matches('{').count()).cloned()
}

fn json_schema(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(json_schema).collect(),
        Value::Object(map) => {
            let mut map: Map<_, _> = map.into_iter().map(|(key, value)| (key, json_schema(value))).collect();
            if map.contains_key("properties") && map.get("type") == Some(&json!("object")) {
                map.entry("additionalProperties").or_insert(json!(false));
            }
            if map.remove("nullable") == Some(json!(true)) {
                return json!({"anyOf": [map, {"type": "null"}]});
            }
            Value::Object(map)
        }
        other => other,
    }
}
