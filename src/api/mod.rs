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
    Endpoint, EndpointExt, Request, Response, Route,
    endpoint::{BoxEndpoint, make_sync},
    http::{HeaderValue, Method, StatusCode, header},
};
use poem_openapi::{__private::UrlQuery, OpenApi, OpenApiService, Tags, registry::MetaPath};

pub use arrival::Arrival;
pub use json::BodyLimit;
pub use place::Place;

use crate::app::App;
use auth::Guard;
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
        let operation = |(method, handler)| {
            let guard = Guard::of(app, (&method, &path));
            let (id, path) = names[&(method.clone(), unnamed(&path))].clone();
            (method, Operation { id, path, guard, handler })
        };
        route = route.at(&path, Methods::new(methods.into_iter().map(operation).collect()));
    }
    let get = |page: BoxEndpoint<'static>| Methods::new(HashMap::from([(Method::GET, page)]));
    let [json, yaml, docs] = document::pages();
    route = route.at("/openapi.json", get(json)).at("/openapi.yaml", get(yaml)).at("/docs", get(docs));
    let redirect = make_sync(|_| {
        Response::builder().status(StatusCode::PERMANENT_REDIRECT).header(header::LOCATION, "/docs").finish()
    });
    route.at("/api/v1/docs", get(redirect.boxed()))
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

/// An operation of the document: its handler, and what comes before.
struct Operation {
    id: &'static str,
    path: Arc<str>,
    guard: Option<Guard>,
    handler: BoxEndpoint<'static>,
}

impl Endpoint for Operation {
    type Output = Response;

    async fn call(&self, mut request: Request) -> poem::Result<Response> {
        // Before anybody is refused.
        if let Some(arrival) = request.data::<Arrival>() {
            arrival.notes.called(self.id, self.path.clone());
        }
        let entry = match &self.guard {
            Some(guard) => guard.admit(&mut request).await?,
            None => None,
        };
        let outcome = match read_query(&mut request) {
            Ok(()) => self.handler.call(request).await,
            Err(refusal) => Err(refusal.into()),
        };
        if let Some(mut entry) = entry {
            entry.status = Some(match &outcome {
                Ok(response) => response.status(),
                Err(error) => error.status(),
            });
        }
        outcome
    }
}

/// One path: its methods, and a refusal that lists them for any other. Not poem-openapi's own routing, which
/// turns refusals into text before anybody can tell what they were.
struct Methods<E> {
    endpoints: HashMap<Method, E>,
    allow: HeaderValue,
}

impl<E> Methods<E> {
    fn new(endpoints: HashMap<Method, E>) -> Self {
        let mut names: Vec<_> = endpoints.keys().map(Method::as_str).collect();
        if endpoints.contains_key(&Method::GET) {
            names.push("HEAD");
        }
        names.sort_unstable();
        let allow = HeaderValue::from_str(&names.join(", ")).unwrap_or(HeaderValue::from_static("GET"));
        Self { endpoints, allow }
    }
}

impl<E: Endpoint<Output = Response>> Endpoint for Methods<E> {
    type Output = Response;

    async fn call(&self, mut request: Request) -> poem::Result<Response> {
        // The same as GET, without the body.
        let head = *request.method() == Method::HEAD;
        if head {
            request.set_method(Method::GET);
        }
        let endpoint = self.endpoints.get(request.method());
        let endpoint = endpoint.ok_or_else(|| ApiError::method_not_allowed(&self.allow))?;
        let mut response = endpoint.call(request).await?;
        if head {
            response.set_body(());
        }
        Ok(response)
    }
}

/// Parses the query for poem-openapi's parameters, as its own routing would.
fn read_query(request: &mut Request) -> Result<(), ApiError> {
    // The reader below would put a mark in place of what it cannot read, and names of users would be the same.
    let query = percent_decode_str(request.uri().query().unwrap_or_default());
    query.decode_utf8().map_err(|_| ApiError::new(Code::ValidationError, "The query must be in UTF-8"))?;
    let query: Vec<(String, String)> = request.params().unwrap_or_default();
    request.extensions_mut().insert(UrlQuery(query));
    Ok(())
}
