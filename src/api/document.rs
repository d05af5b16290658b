//! The OpenAPI document: generated from the code, polished where poem-openapi's output stumbles tools, and shown
//! in Swagger UI.

use std::sync::LazyLock;

use poem::{
    EndpointExt, Request, Response,
    endpoint::{BoxEndpoint, make_sync},
    http::{StatusCode, header},
};
use poem_openapi::OpenApi;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    Apis,
    auth::{Needed, needed},
    envelope::REPLAYED,
    service,
};

/// The two forms of the document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Json,
    Yaml,
}

/// The document as text.
pub fn text(format: Format) -> String {
    match format {
        Format::Json => JSON.clone(),
        Format::Yaml => YAML.clone(),
    }
}

static JSON: LazyLock<String> = LazyLock::new(|| {
    // Writing a value as text cannot fail.
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
});

static YAML: LazyLock<String> = LazyLock::new(|| {
    let text = serde_yaml::to_string(&document()).unwrap_or_default();
    let mut quoted: String = text.lines().map(quote_time).collect::<Vec<_>>().join("\n");
    quoted.push('\n');
    quoted
});

/// `/openapi.json`, `/openapi.yaml` and `/docs`.
pub(super) fn pages() -> [BoxEndpoint<'static>; 3] {
    [
        page(&JSON, "application/json", None),
        page(&YAML, "application/yaml", None),
        page(&DOCS, "text/html; charset=utf-8", Some(DOCS_POLICY)),
    ]
}

/// The one page with scripts: all inline, and nothing from elsewhere.
const DOCS_POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; \
     img-src data:; font-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Swagger UI with the polished document and comfortable settings in place of the bundled ones.
static DOCS: LazyLock<String> = LazyLock::new(|| {
    let service = service(Described);
    service
        .swagger_ui_html()
        .replace(&service.spec(), &JSON)
        .replace("<title>Swagger UI</title>", "<title>ATLUS API</title><link rel=\"icon\" href=\"data:,\">")
        .replace(
            "deepLinking: true,",
            "deepLinking: true, persistAuthorization: true, tryItOutEnabled: true,",
        )
});

/// A text that never changes while the server runs, with an `ETag` so that it is fetched once.
fn page(
    text: &'static LazyLock<String>,
    content_type: &'static str,
    policy: Option<&'static str>,
) -> BoxEndpoint<'static> {
    let tag = LazyLock::new(|| {
        let digest = Sha256::digest(text.as_bytes());
        digest.iter().take(8).fold("\"".to_owned(), |tag, byte| format!("{tag}{byte:02x}")) + "\""
    });
    make_sync(move |request: Request| {
        let known = request.header(header::IF_NONE_MATCH).is_some_and(|tags| tags.contains(tag.as_str()));
        let mut response = Response::builder().header(header::ETAG, tag.as_str());
        response = response.header(header::CACHE_CONTROL, "no-cache");
        if let Some(policy) = policy {
            response = response.header(header::CONTENT_SECURITY_POLICY, policy);
        }
        match known {
            true => response.status(StatusCode::NOT_MODIFIED).finish(),
            false => response.content_type(content_type).body(text.as_str()),
        }
    })
    .boxed()
}

/// The API without its parts: enough to be described.
struct Described;

impl OpenApi for Described {
    fn meta() -> Vec<poem_openapi::registry::MetaApi> {
        Apis::meta()
    }

    fn register(registry: &mut poem_openapi::registry::Registry) {
        Apis::register(registry);
    }

    fn add_routes(self, _: &mut super::Operations) {}
}

/// The document. What is mended here was found by running linters and client generators on the raw one.
fn document() -> Value {
    let raw = serde_json::from_str(&service(Described).spec()).unwrap_or_default();
    let mut document = renamed(raw);
    document["openapi"] = json!("3.0.3");
    document["info"]["license"] =
        json!({"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"});
    if let Some(tags) = document["tags"].as_array_mut() {
        let place = |tag: &Value| READING_ORDER.iter().position(|name| tag["name"] == *name);
        tags.sort_by_key(place);
    }
    let types = document["components"]["schemas"].clone();
    polish(&mut document, &types);
    require_what_is_always_there(&mut document);
    let headers = headers();
    let refer = |name: &String| (name.clone(), json!({"$ref": format!("#/components/headers/{name}")}));
    let references: Map<_, _> = headers.keys().map(refer).collect();
    tell_scopes(&mut document);
    for operation in operations(&mut document) {
        if let Some(responses) = operation["responses"].as_object_mut() {
            responses.values_mut().for_each(|response| add_headers(response, &references));
        }
    }
    document["components"]["headers"] = headers.into();
    document
}

/// Says of each operation which scope a key needs for it. OpenAPI 3.0 has a place for scopes in OAuth only.
fn tell_scopes(document: &mut Value) {
    let Some(paths) = document["paths"].as_object_mut() else { return };
    for (path, item) in paths {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            let method = method.to_ascii_uppercase().parse().unwrap_or_default();
            let Some(Needed { scope, .. }) = needed(&method, path) else { continue };
            let text =
                operation["description"].as_str().map(|text| format!("{text}\n\n")).unwrap_or_default();
            operation["description"] = format!("{text}Needs a key with the scope `{}`.", scope.name()).into();
            operation["x-required-scope"] = scope.name().into();
        }
    }
}

/// The groups of operations as they should be read.
const READING_ORDER: [&str; 9] =
    ["Sessions", "Chat", "Turns", "Memory", "Users", "Search", "Archive", "Keys", "Operations"];

fn operations(document: &mut Value) -> impl Iterator<Item = &mut Value> {
    let paths = document["paths"].as_object_mut();
    let items = paths.into_iter().flat_map(Map::values_mut).filter_map(Value::as_object_mut);
    items.flat_map(Map::values_mut)
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

/// What every response carries.
fn headers() -> Map<String, Value> {
    let header = |text: &str| json!({"description": text, "schema": {"type": "string"}});
    Map::from_iter([
        ("X-Request-ID".to_owned(), header("The request's own `X-Request-ID`, or a new one.")),
        ("X-Process-Time".to_owned(), header("Seconds it took to answer.")),
    ])
}

/// Adds what every response carries to the headers of its own, whose names poem-openapi writes in capitals.
fn add_headers(response: &mut Value, always: &Map<String, Value>) {
    let own = response["headers"].as_object().cloned().unwrap_or_default();
    let named = own.into_iter().map(|(name, header)| match name.to_ascii_lowercase().as_str() {
        "etag" => ("ETag".to_owned(), header),
        "content-disposition" => ("Content-Disposition".to_owned(), header),
        "idempotency-replayed" => (REPLAYED.to_owned(), header),
        _ => (name, header),
    });
    response["headers"] = named.chain(always.clone()).collect::<Map<_, _>>().into();
}

/// Gives components of generic types a readable name: `Envelope_Page_Turn` becomes `TurnPageEnvelope`.
fn renamed(value: Value) -> Value {
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
            // A described reference: the second part only repeats what stands beside it.
            if let Some(Value::Array(parts)) = schema.get_mut("allOf") {
                parts.truncate(1);
                let target =
                    parts.first().and_then(|part| part["$ref"].as_str()).and_then(|r| r.rsplit('/').next());
                let ty = target.map(|name| types[name]["type"].clone());
                if let (Some(ty), true) = (ty, schema.contains_key("nullable")) {
                    schema.insert("type".to_owned(), ty);
                }
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

/// Readers of YAML 1.1 take a bare time for a value of its own type.
fn quote_time(line: &str) -> String {
    match line.split_once(": ") {
        Some((key, time)) if time.len() == 24 && time.starts_with("20") && time.ends_with('Z') => {
            format!("{key}: '{time}'")
        }
        _ => line.to_owned(),
    }
}
