//! HTTP: one file per resource, and what they share.

mod archive;
mod arrival;
mod audit;
mod auth;
mod chat;
pub mod document;
mod envelope;
pub mod error;
mod headers;
mod idempotency;
mod json;
pub mod keys;
mod memory;
mod operations;
mod place;
mod search;
mod sessions;
mod sse;
mod turns;
mod users;
mod wire;

use std::{collections::HashMap, sync::Arc};

use percent_encoding::percent_decode_str;
use poem::{
    Endpoint, EndpointExt, Error, Request, Response, Route, RouteMethod,
    endpoint::{BoxEndpoint, make_sync},
    error::MethodNotAllowedError,
    http::{HeaderValue, Method, StatusCode, header},
};
use poem_openapi::{__private::UrlQuery, OpenApi, OpenApiService, Tags, registry::MetaPath};

pub use arrival::Arrival;
pub use json::BodyLimit;
pub use place::Place;

use crate::app::App;
use error::{ApiError, Code};

/// The groups of operations, in reading order.
#[derive(Clone, Copy, Tags)]
enum Tag {
    /// Conversations and their owners.
    Sessions,
    /// Messages and answers.
    Chat,
    /// What was said.
    Turns,
    /// What a session remembers, and what its model is shown.
    Memory,
    /// People, and what is known about them.
    Users,
    /// Finding what was said.
    Search,
    /// Taking data out and bringing it back.
    Archive,
    /// Who may call.
    Keys,
    /// What operators and machines ask.
    Operations,
}

type Apis = (
    sessions::SessionsApi,
    chat::ChatApi,
    turns::TurnsApi,
    memory::MemoryApi,
    users::UsersApi,
    search::SearchApi,
    archive::ArchiveApi,
    keys::KeysApi,
    operations::OperationsApi,
);

fn apis(app: &Arc<App>) -> Apis {
    (
        sessions::SessionsApi(app.clone()),
        chat::ChatApi(app.clone()),
        turns::TurnsApi(app.clone()),
        memory::MemoryApi(app.clone()),
        users::UsersApi(app.clone()),
        search::SearchApi(app.clone()),
        archive::ArchiveApi::new(app.clone()),
        keys::KeysApi(app.clone()),
        operations::OperationsApi(app.clone()),
    )
}

const DESCRIPTION: &str = "\
Conversation sessions for assistants: sessions, turns and memory in SQL, in front of any OpenAI-compatible model.

- **Answers** are `{\"success\": true, \"data\": …, \"timestamp\": …}`. Failures are `{\"success\": false, \"error\": …}`: \
branch on `error.code`, never on `error.message`. `X-Request-ID` names every answer, and finds it in the server's log.
- **Keys** go into `Authorization: Bearer …` or `X-API-Key`, where the server asks for them. What belongs to others \
answers like what does not exist.
- **Times** are RFC 3339 in UTC with milliseconds, such as `2024-01-01T12:00:00.000Z`. Lengths are counted in \
characters, sizes (KiB, MiB) in bytes.
- **Pages**: send `next_cursor` as `cursor` until it is null. Nothing is skipped or repeated while rows are added.
- **Sending again**: with an `Idempotency-Key`, a request that was done within 24 hours is not done again, but gets the \
first answer again. After 409, 429 and 503, wait as long as `Retry-After` says.
- **Limits**: `RateLimit-…` headers tell how many calls are left, where calls are limited.";

/// The raw document, before [`document`] polishes it. Describing the API needs no running parts.
fn service<T: OpenApi>(apis: T) -> OpenApiService<T, ()> {
    OpenApiService::new(apis, "ATLUS", env!("CARGO_PKG_VERSION")).server("/").description(DESCRIPTION)
}

/// Endpoints by path and method, as poem-openapi hands them out.
type Operations = HashMap<String, HashMap<Method, BoxEndpoint<'static>>>;

/// Every route of the API and its documentation. Failures leave it as errors; `middleware::refuse` renders them.
pub fn routes(app: &Arc<App>) -> impl Endpoint + use<> {
    let mut operations = Operations::new();
    apis(app).add_routes(&mut operations);
    let names = operation_names();
    let mut route = Route::new();
    for (path, methods) in operations {
        let guard = |(method, operation)| {
            let operation = auth::guarded(app, (&method, &path), operation);
            let (id, path) = names[&(method.clone(), unnamed(&path))].clone();
            (method, named(id, path, operation))
        };
        let methods = methods.into_iter().map(guard).collect();
        route = route.at(path, only(methods));
    }
    let get = |endpoint: BoxEndpoint<'static>| only(HashMap::from([(Method::GET, endpoint)]));
    let [json, yaml, docs] = document::pages();
    route = route.at("/openapi.json", get(json)).at("/openapi.yaml", get(yaml)).at("/docs", get(docs));
    let redirect = make_sync(|_| {
        Response::builder().status(StatusCode::PERMANENT_REDIRECT).header(header::LOCATION, "/docs").finish()
    });
    route = route.at("/api/v1/docs", get(redirect.boxed()));
    route.before(with_query)
}

/// The ids and paths of all operations in the document, by method and path without the names of its parameters.
fn operation_names() -> HashMap<(Method, String), (&'static str, Arc<str>)> {
    let paths = Apis::meta().into_iter().flat_map(|api| api.paths);
    let of_path = |MetaPath { path, operations }: MetaPath| {
        let (unnamed, path) = (unnamed(&path), Arc::<str>::from(path));
        operations.into_iter().filter_map(move |operation| {
            Some(((operation.method, unnamed.clone()), (operation.operation_id?, path.clone())))
        })
    };
    paths.flat_map(of_path).collect()
}

/// A path without the names of its parameters, which the router and the document write each in their own way.
fn unnamed(path: &str) -> String {
    let segment =
        |segment: &'_ str| if segment.starts_with([':', '{']) { "*".to_owned() } else { segment.to_owned() };
    path.split('/').map(segment).collect::<Vec<_>>().join("/")
}

/// Notes which operation was called, before anybody is refused.
fn named(id: &'static str, path: Arc<str>, operation: BoxEndpoint<'static>) -> BoxEndpoint<'static> {
    let note = move |request: Request| {
        let path = path.clone();
        async move {
            if let Some(arrival) = request.data::<Arrival>() {
                arrival.notes.called(id, path);
            }
            Ok(request)
        }
    };
    operation.before(note).boxed()
}

/// One path: its methods, and a refusal that lists them for any other. Not poem-openapi's own routing, which
/// turns refusals into text before anybody can tell what they were.
fn only(methods: HashMap<Method, BoxEndpoint<'static>>) -> impl Endpoint {
    let mut names: Vec<_> = methods.keys().map(Method::as_str).collect();
    if methods.contains_key(&Method::GET) {
        names.push("HEAD");
    }
    names.sort_unstable();
    let allow = HeaderValue::from_str(&names.join(", ")).unwrap_or(HeaderValue::from_static("GET"));
    let endpoint = methods
        .into_iter()
        .fold(RouteMethod::new(), |route, (method, endpoint)| route.method(method, endpoint));
    endpoint.around(move |next, request| {
        let allow = allow.clone();
        async move {
            let refuse = |error: Error| match error.is::<MethodNotAllowedError>() {
                true => ApiError::method_not_allowed(&allow).into(),
                false => error,
            };
            next.call(request).await.map_err(refuse)
        }
    })
}

/// Parses the query for poem-openapi's parameters, as its own routing would.
async fn with_query(mut request: Request) -> poem::Result<Request> {
    // The reader below would put a mark in place of what it cannot read, and names of users would be the same.
    let query = percent_decode_str(request.uri().query().unwrap_or_default());
    query.decode_utf8().map_err(|_| ApiError::new(Code::ValidationError, "The query must be in UTF-8"))?;
    let query: Vec<(String, String)> = request.params().unwrap_or_default();
    request.extensions_mut().insert(UrlQuery(query));
    Ok(request)
}
