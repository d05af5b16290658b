//! The OpenAPI document: generated from the code, with failures and examples added, polished where poem-openapi's
//! output stumbles tools, and shown in Swagger UI.

mod examples;
mod failures;
mod polish;

use std::sync::LazyLock;

use poem::{
    EndpointExt, Request, Response,
    endpoint::{BoxEndpoint, make_sync},
    http::{Method, StatusCode, header},
};
use poem_openapi::OpenApi;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use super::{
    Apis,
    auth::{Needed, needed},
    service,
};
use crate::domain::clock::Timestamp;

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
    let mut quoted: String = text.lines().map(polish::quote_time).collect::<Vec<_>>().join("\n");
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
        .replace(&service.spec(), &for_swagger_ui(document()).to_string())
        .replace("<title>Swagger UI</title>", "<title>ATLUS API</title><link rel=\"icon\" href=\"data:,\">")
        .replace(
            "deepLinking: true,",
            "deepLinking: true, persistAuthorization: true, tryItOutEnabled: true, displayRequestDuration: true, \
             defaultModelsExpandDepth: 0,",
        )
});

/// Makes the document one to try things with: Swagger UI fills in the example of every parameter, and sends it.
fn for_swagger_ui(mut document: Value) -> Value {
    // A choice of one server, the page's own.
    if let Some(document) = document.as_object_mut() {
        document.shift_remove("servers");
    }
    // Nobody has a cursor before the first page, and an `Idempotency-Key` sent twice is no second request.
    each_operation(&mut document, |_, _, operation| {
        let parameters = operation.get_mut("parameters").and_then(Value::as_array_mut);
        for parameter in parameters.into_iter().flatten().filter(|parameter| parameter["required"] != true) {
            let schema = parameter.get_mut("schema").and_then(Value::as_object_mut);
            let example = schema.and_then(|schema| schema.shift_remove("example"));
            // Numbers and choices explain themselves.
            if let (Some(Value::String(example)), None) = (example, parameter["schema"].get("enum")) {
                let description = parameter["description"].as_str().unwrap_or_default();
                parameter["description"] = format!("{description} Example: `{example}`").into();
            }
        }
    });
    document
}

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

/// When every example happens: 2024-01-01T12:00:00.000Z.
const MOMENT: Timestamp = Timestamp::from_millis(1_704_110_400_000);

/// The groups of operations as they should be read.
const READING_ORDER: [&str; 9] =
    ["Sessions", "Chat", "Turns", "Memory", "Users", "Search", "Archive", "Keys", "Operations"];

/// The document, from what poem-openapi makes of the code.
fn document() -> Value {
    let raw = serde_json::from_str(&service(Described).spec()).unwrap_or_default();
    let mut document = polish::renamed(raw);
    document["openapi"] = json!("3.0.3");
    document["info"]["contact"] = json!({"name": "ATLUS"});
    document["info"]["license"] =
        json!({"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"});
    document["servers"][0]["description"] = "The server that this document comes from.".into();
    if let Some(tags) = document["tags"].as_array_mut() {
        let place = |tag: &Value| READING_ORDER.iter().position(|name| tag["name"] == *name);
        tags.sort_by_key(place);
    }
    polish::mend(&mut document);
    tell_scopes(&mut document);
    describe_bodies(&mut document);
    failures::describe(&mut document);
    examples::show(&mut document);
    tell_headers(&mut document);
    document
}

/// Says of each operation which scope a key needs for it. OpenAPI 3.0 has a place for scopes in OAuth only.
fn tell_scopes(document: &mut Value) {
    each_operation(document, |method, path, operation| {
        let Some(Needed { scope, .. }) = needed(method, path) else {
            operation["security"] = json!([]);
            return;
        };
        let text = operation["description"].as_str().map(|text| format!("{text}\n\n")).unwrap_or_default();
        operation["description"] = format!("{text}Needs a key with the scope `{}`.", scope.name()).into();
        operation["x-required-scope"] = scope.name().into();
    });
}

/// Says of each body what its schema says of itself.
fn describe_bodies(document: &mut Value) {
    let types = document["components"]["schemas"].clone();
    each_operation(document, |_, _, operation| {
        let schema = &operation["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        if let Some(name) = schema.as_str().and_then(|target| target.rsplit('/').next()) {
            operation["requestBody"]["description"] = types[name]["description"].clone();
        }
    });
}

/// The headers of answers, whose names poem-openapi writes in capitals.
fn headers() -> Map<String, Value> {
    let header = |name: &str, text: &str, schema: Value, required: bool| {
        (name.to_owned(), json!({"description": text, "required": required, "schema": schema}))
    };
    let (text, count) = (json!({"type": "string"}), json!({"type": "integer", "minimum": 0}));
    Map::from_iter([
        header("X-Request-ID", "The request's own `X-Request-ID`, or a new one.", text.clone(), true),
        header("X-Process-Time", "Seconds it took to answer.", json!({"type": "number", "minimum": 0}), true),
        header("ETag", "Names this state, for `If-Match`.", text.clone(), true),
        header("Content-Disposition", "The name of a file for it.", text.clone(), true),
        header("Idempotency-Replayed", "`true` where this is the first answer again.", text.clone(), false),
        header("Retry-After", "Seconds to wait before it is worth trying again.", count.clone(), false),
        header("WWW-Authenticate", "How to show a key (RFC 6750).", text.clone(), false),
        header("RateLimit-Limit", "Calls that a window of time allows.", count.clone(), false),
        header("RateLimit-Remaining", "Calls left in this window.", count.clone(), false),
        header("RateLimit-Reset", "Seconds until the next window.", count, false),
        header("RateLimit-Policy", "Calls allowed and the window's seconds: `100;w=60`.", text, false),
    ])
}

/// Describes the headers of every answer in one place, and adds to each what every answer carries.
fn tell_headers(document: &mut Value) {
    let headers = headers();
    let tell = |response: &mut Value| {
        let own = response["headers"].take();
        let own = own.as_object().into_iter().flat_map(Map::keys).map(String::as_str);
        let known = |name: &str| headers.keys().find(|known| known.eq_ignore_ascii_case(name));
        let all = own.chain(["X-Request-ID", "X-Process-Time"]).filter_map(known);
        response["headers"] = all.map(|name| (name.clone(), refer("headers", name))).collect();
    };
    each_operation(document, |_, _, operation| {
        let responses = operation["responses"].as_object_mut().into_iter().flat_map(Map::values_mut);
        responses.filter(|response| response.get("$ref").is_none()).for_each(tell);
    });
    let shared = document["components"]["responses"].as_object_mut();
    shared.into_iter().flat_map(Map::values_mut).for_each(tell);
    document["components"]["headers"] = headers.into();
}

/// Visits each operation with its method and path.
fn each_operation(document: &mut Value, mut visit: impl FnMut(&Method, &str, &mut Value)) {
    for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
        for (method, operation) in item.as_object_mut().into_iter().flatten() {
            visit(&method.to_ascii_uppercase().parse().unwrap_or_default(), path, operation);
        }
    }
}

/// A reference to a component.
fn refer(folder: &str, name: &str) -> Value {
    json!({"$ref": format!("#/components/{folder}/{name}")})
}
