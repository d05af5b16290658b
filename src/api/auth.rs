//! Who calls, and whether they may: asked before anything else of a request is looked at.

use std::sync::Arc;

use poem::{
    Endpoint, EndpointExt, Request, RequestBody, Result,
    endpoint::BoxEndpoint,
    http::{HeaderValue, Method, header},
};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions,
    registry::{MetaSecurityScheme, Registry},
};

use super::{
    Arrival, audit,
    error::{ApiError, Code},
};
use crate::{
    app::App,
    auth::Refusal,
    domain::{caller::Caller, key::Scope, session::UserId},
};

/// What an operation asks of whoever calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: it tells nobody's data.
    Anyone,
    /// A key with this scope.
    Scoped(Scope),
}

/// What the operation of this method and path asks for: a key, unless it is named here.
pub fn access(method: &Method, path: &str) -> Access {
    let segments: Vec<_> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let scope = match (method, segments.as_slice()) {
        (_, ["livez" | "readyz"] | ["api", "v1", "health"]) => return Access::Anyone,
        (_, ["api", "v1", "keys", ..]) | (&Method::DELETE, ["api", "v1", "users", _]) => Scope::Admin,
        (&Method::GET, _) => Scope::Read,
        _ => Scope::Write,
    };
    Access::Scoped(scope)
}

/// Lets nobody through to the operation of this method and path who may not call it. Its handler gets the [`Caller`].
pub fn guarded(
    app: &Arc<App>,
    (method, path): (&Method, &str),
    operation: BoxEndpoint<'static>,
) -> BoxEndpoint<'static> {
    let Access::Scoped(scope) = access(method, path) else { return operation };
    let (app, event) = (app.clone(), audit::event(method, path));
    operation
        .around(move |next, mut request| {
            let app = app.clone();
            async move {
                let caller = authorize(&app, &request, scope).await?;
                let arrival = request.data::<Arrival>().cloned();
                let entry = event.zip(arrival).map(|(event, arrival)| {
                    let path = request.uri().path().to_owned();
                    audit::Entry { event, arrival, path, status: None }
                });
                request.extensions_mut().insert(caller);
                let outcome = next.call(request).await;
                if let Some(mut entry) = entry {
                    entry.status = Some(match &outcome {
                        Ok(response) => response.status(),
                        Err(error) => error.status(),
                    });
                }
                outcome
            }
        })
        .boxed()
}

/// Who calls, if they may.
async fn authorize(app: &App, request: &Request, scope: Scope) -> Result<Caller, ApiError> {
    let caller = authenticate(app, request).await?;
    if let Some(arrival) = request.data::<Arrival>() {
        arrival.notes.caller(&caller);
    }
    if !caller.scopes.allow(scope) {
        let message = format!("This call needs a key with the scope {}", scope.name());
        return Err(ApiError::new(Code::Forbidden, message));
    }
    Ok(caller)
}

async fn authenticate(app: &App, request: &Request) -> Result<Caller, ApiError> {
    let Some(auth) = &app.auth else { return Ok(Caller::ANYONE) };
    let outcome = match shown(request) {
        Ok(Some(shown)) => auth.caller(shown).await,
        Ok(None) => Err(Refusal::Nothing),
        Err(refusal) => Err(refusal),
    };
    outcome.map_err(|refusal| match refusal {
        Refusal::Store(error) => error.into(),
        Refusal::Nothing | Refusal::Invalid => ApiError::unauthorized(&refusal.to_string()),
    })
}

/// What the request shows of itself, in either header; `None` if there is nothing.
fn shown(request: &Request) -> Result<Option<&str>, Refusal> {
    let one = |name| {
        let mut values = request.headers().get_all(name).iter();
        match (values.next(), values.next()) {
            (value, None) => Ok(value),
            _ => Err(Refusal::Invalid),
        }
    };
    let bearer = match one(header::AUTHORIZATION)? {
        Some(value) => {
            let (scheme, shown) = text(value)?.split_once(' ').ok_or(Refusal::Invalid)?;
            Some(scheme.eq_ignore_ascii_case("bearer").then_some(shown.trim()).ok_or(Refusal::Invalid)?)
        }
        None => None,
    };
    let key = one(API_KEY)?.map(text).transpose()?;
    match (bearer, key) {
        // Whose call would it be?
        (Some(bearer), Some(key)) if bearer != key => Err(Refusal::Invalid),
        (shown, other) => Ok(shown.or(other)),
    }
}

fn text(value: &HeaderValue) -> Result<&str, Refusal> {
    value.to_str().map(str::trim).map_err(|_| Refusal::Invalid)
}

/// The second header that a key may come in.
const API_KEY: header::HeaderName = header::HeaderName::from_static("x-api-key");

/// Whose a new session is to be: the user asked for, by default the one that the caller is bound to. Nobody creates
/// for another.
pub fn owner(caller: &Caller, asked: Option<UserId>) -> Result<UserId, ApiError> {
    let owner = asked.or_else(|| caller.user.clone()).unwrap_or_default();
    refuse_foreign(caller, &owner)?;
    Ok(owner)
}

/// Refuses to write something for a user for whom the caller does not speak.
pub fn refuse_foreign(caller: &Caller, user: &UserId) -> Result<(), ApiError> {
    match &caller.user {
        Some(own) if own != user => {
            let message = format!("This key speaks for the user {} alone", own.as_str());
            Err(ApiError::new(Code::Forbidden, message))
        }
        _ => Ok(()),
    }
}

/// The names of the two ways to show a key, in the document.
const SCHEMES: [&str; 2] = ["BearerKey", "ApiKeyHeader"];

/// An argument of every handler that asks the store.
impl<'a> ApiExtractor<'a> for Caller {
    const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::SecurityScheme];
    type ParamType = ();
    type ParamRawType = ();

    fn register(registry: &mut Registry) {
        let scheme = |ty, description| MetaSecurityScheme {
            ty,
            description: Some(description),
            name: None,
            key_in: None,
            scheme: None,
            bearer_format: None,
            flows: None,
            openid_connect_url: None,
        };
        let [bearer, key] = SCHEMES;
        let described =
            "A key (`atlus_…`), or a token of your identity provider where the server takes those.";
        let http = MetaSecurityScheme { scheme: Some("bearer"), ..scheme("http", described) };
        registry.create_security_scheme(bearer, http);
        let described = "The same in a header of its own.";
        let header = MetaSecurityScheme {
            name: Some("X-API-Key"),
            key_in: Some("header"),
            ..scheme("apiKey", described)
        };
        registry.create_security_scheme(key, header);
    }

    fn security_schemes() -> Vec<&'static str> {
        SCHEMES.to_vec()
    }

    async fn from_request(
        request: &'a Request,
        _: &mut RequestBody,
        _: ExtractParamOptions<()>,
    ) -> Result<Self> {
        // Put there by `guarded`: an operation that it does not guard has no caller.
        Ok(request.data::<Self>().cloned().ok_or_else(ApiError::internal)?)
    }
}
