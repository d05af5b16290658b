//! Who calls, and whether they may: asked before anything else of a request is looked at.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use poem::{
    Request, RequestBody, Result,
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
    auth::{
        Refusal, address, jwt,
        rate::{Class, Client},
    },
    domain::{caller::Caller, key::Scope, session::UserId},
};

/// What an operation asks of whoever calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needed {
    /// What a key must allow.
    pub scope: Scope,
    /// What the call counts as; absent: it is free.
    pub class: Option<Class>,
}

/// What the operation of this method and path asks for: a key, unless it is named here, since it tells nobody's data.
pub fn needed(method: &Method, path: &str) -> Option<Needed> {
    let segments: Vec<_> = path.split('/').filter(|segment| !segment.is_empty()).collect();
    let scope = match (method, segments.as_slice()) {
        (_, ["livez" | "readyz"] | ["api", "v1", "health"]) => return None,
        (_, ["api", "v1", "keys", ..]) | (&Method::DELETE, ["api", "v1", "users", _]) => Scope::Admin,
        (&Method::GET, _) => Scope::Read,
        _ => Scope::Write,
    };
    let class = match (method, segments.as_slice()) {
        (&Method::POST, ["api", "v1", "sessions"] | ["api", "v1", "sessions", _, "fork"])
        | (&Method::DELETE, ["api", "v1", "sessions", _]) => Some(Class::Sessions),
        (_, ["metrics"]) => None,
        _ => Some(Class::Default),
    };
    Some(Needed { scope, class })
}

/// Lets nobody through to an operation who may not call it.
pub struct Guard {
    app: Arc<App>,
    needed: Needed,
    /// What the audit calls it.
    event: Option<&'static str>,
}

impl Guard {
    /// The guard of the operation of this method and path, if it has one.
    pub fn of(app: &Arc<App>, (method, path): (&Method, &str)) -> Option<Self> {
        Some(Self { app: app.clone(), needed: needed(method, path)?, event: audit::event(method, path) })
    }

    /// Lets a request through, whose handler gets the [`Caller`]; an entry for the audit, if the call belongs there.
    pub async fn admit(&self, request: &mut Request) -> Result<Option<audit::Entry>, ApiError> {
        let caller = authorize(&self.app, request, self.needed).await?;
        let entry = self.event.zip(request.data::<Arrival>()).map(|(event, arrival)| audit::Entry {
            event,
            arrival: arrival.clone(),
            path: request.uri().path().to_owned(),
            status: None,
        });
        request.extensions_mut().insert(caller);
        Ok(entry)
    }
}

/// Who calls, if they may, and as often as they do.
async fn authorize(app: &App, request: &Request, needed: Needed) -> Result<Caller, ApiError> {
    let client = client_address(app, request);
    let outcome = authenticate(app, request).await;
    if let (Ok(caller), Some(arrival)) = (&outcome, request.data::<Arrival>()) {
        arrival.notes.caller(caller);
    }
    // By the address until a caller is known, and then by what it has shown: whoever guesses keys does not keep
    // those from calling who have one.
    let counted = match &outcome {
        Ok(Caller { key: Some(key), .. }) => Client::Key(key.number()),
        Ok(Caller { tenant, user: Some(user), .. }) => Client::User(*tenant, user.as_str()),
        _ => Client::Address(client),
    };
    // Guesses are never free.
    let class = needed.class.or(outcome.is_err().then_some(Class::Default));
    let allowed = count(app, request, class, counted).await.and(outcome).and_then(|caller| {
        match caller.scopes.allow(needed.scope) {
            true => Ok(caller),
            false => Err(ApiError::missing_scope(needed.scope)),
        }
    });
    if let (Err(refusal), Some(arrival)) = (&allowed, request.data::<Arrival>()) {
        note_refusal(refusal, arrival, client, request);
    }
    allowed
}

/// Counts a call; refuses it if its client has made too many.
async fn count(
    app: &App,
    request: &Request,
    class: Option<Class>,
    client: Client<'_>,
) -> Result<(), ApiError> {
    let (Some(limiter), Some(class)) = (&app.limiter, class) else { return Ok(()) };
    let taken = limiter.take(class, client).await;
    if let Some(arrival) = request.data::<Arrival>() {
        arrival.notes.taken(taken);
    }
    match taken.allowed {
        true => Ok(()),
        false => Err(ApiError::rate_limited(&taken)),
    }
}

/// Writes a refusal down, unless the client is over its limit: then only now and then, so that nobody fills the log.
fn note_refusal(refusal: &ApiError, arrival: &Arrival, client: IpAddr, request: &Request) {
    let over = refusal.code == Code::RateLimitExceeded;
    if !over || arrival.notes.rate().is_some_and(|taken| taken.is_first_refused) {
        audit::refused(refusal.code, arrival, &client, request.uri().path());
    }
}

/// Where the call comes from, as far as proxies that are trusted tell.
fn client_address(app: &App, request: &Request) -> IpAddr {
    let peer = request.remote_addr().as_socket_addr().map_or(IpAddr::from([0, 0, 0, 0]), SocketAddr::ip);
    let forwarded = request.headers().get_all("X-Forwarded-For").iter().map(HeaderValue::as_bytes);
    address::client_address(peer, forwarded, &app.trusted_proxies)
}

async fn authenticate(app: &App, request: &Request) -> Result<Caller, ApiError> {
    let Some(auth) = &app.auth else { return Ok(Caller::ANYONE) };
    let outcome = match shown(request) {
        // Boxed, since no request has to carry its room where no keys are asked for.
        Ok(Some(shown)) => Box::pin(auth.caller(shown)).await,
        Ok(None) => Err(Refusal::Nothing),
        Err(refusal) => Err(refusal),
    };
    outcome.map_err(|refusal| match refusal {
        Refusal::Store(error) => error.into(),
        Refusal::Token(jwt::Refusal::Unavailable) => {
            let unavailable = ApiError::new(Code::UpstreamUnavailable, refusal.to_string());
            unavailable.retry_after(Duration::from_secs(1))
        }
        Refusal::Nothing | Refusal::Invalid | Refusal::Token(_) => {
            ApiError::unauthorized(&refusal.to_string())
        }
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
        // Put there by its guard: an operation that has none has no caller.
        Ok(request.data::<Self>().cloned().ok_or_else(ApiError::internal)?)
    }
}
