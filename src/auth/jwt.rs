//! Tokens that another issuer signs (JWT, RFC 7519): whether they are good, and whom they name.
//!
//! Signatures, times, issuer and audience are jsonwebtoken's to check; which key may be used how is [`super::jwks`]'.
//! Not here: what a tenant, a user or a scope may do, secrets shared with an issuer, and encrypted tokens.

use std::{fs, sync::Arc, time::Duration};

use jsonwebtoken::{
    Algorithm, AlgorithmFamily, Header, Validation, decode, decode_header,
    errors::{Error, ErrorKind},
    get_current_timestamp,
};
use moka::future::Cache;
use reqwest::Url;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};
use tokio::time::Instant;

use super::jwks::{self, Jwks, Key};

/// The longest token that is read, in bytes.
const MAX_TOKEN: usize = 8 << 10;
/// How far clocks may be apart, in seconds.
const LEEWAY: u64 = 30;
/// How long a good token is believed without another look, and so the longest that a withdrawn key outlives its
/// withdrawal from the keys that are held.
const REMEMBERED: Duration = Duration::from_secs(60);
/// The most tokens that are remembered.
const MAX_REMEMBERED: u64 = 10_000;

/// Which tokens are believed, and what they say where.
#[derive(Clone, Debug)]
pub struct JwtSettings {
    pub keys: KeySource,
    /// What `iss` must be.
    pub issuer: String,
    /// What `aud` must be or contain.
    pub audience: String,
    /// The claim that names the tenant; without it tokens name none.
    pub tenant_claim: Option<String>,
    /// The claim that names the user.
    pub user_claim: String,
    /// The claim that lists the scopes; without it tokens list none.
    pub scope_claim: Option<String>,
}

/// Where the keys come from.
#[derive(Clone, Debug)]
pub enum KeySource {
    /// A key set that the issuer publishes.
    Jwks(Url),
    /// One public key.
    Pem(String),
}

/// The settings as they are given, each as text. What is empty is not given.
#[derive(Clone, Copy, Default)]
pub struct JwtVariables<'a> {
    /// `ATLUS_JWT_JWKS_URL`: `https://`, or `http://` on a loopback address.
    pub jwks_url: Option<&'a str>,
    /// `ATLUS_JWT_KEY`: the PEM of a public key, or the path of a file that holds one.
    pub key: Option<&'a str>,
    /// `ATLUS_JWT_ISSUER`
    pub issuer: Option<&'a str>,
    /// `ATLUS_JWT_AUDIENCE`
    pub audience: Option<&'a str>,
    /// `ATLUS_JWT_TENANT_CLAIM`
    pub tenant_claim: Option<&'a str>,
    /// `ATLUS_JWT_USER_CLAIM`, else `sub`.
    pub user_claim: Option<&'a str>,
    /// `ATLUS_JWT_SCOPE_CLAIM`
    pub scope_claim: Option<&'a str>,
}

impl JwtSettings {
    /// Reads the settings; `None` if no keys are named. Fails with all that is wrong, a sentence each, that repeats
    /// no value.
    pub fn check(given: &JwtVariables<'_>) -> Result<Option<Self>, Vec<String>> {
        let set = |text: Option<&str>| text.filter(|text| !text.is_empty()).map(str::to_owned);
        let (issuer, audience) = (set(given.issuer), set(given.audience));
        let (tenant_claim, scope_claim) = (set(given.tenant_claim), set(given.scope_claim));
        let user_claim = set(given.user_claim);
        let mut problems = Vec::new();
        let keys = match (set(given.jwks_url), set(given.key)) {
            (None, None) => {
                let others = [
                    ("ATLUS_JWT_ISSUER", issuer),
                    ("ATLUS_JWT_AUDIENCE", audience),
                    ("ATLUS_JWT_TENANT_CLAIM", tenant_claim),
                    ("ATLUS_JWT_USER_CLAIM", user_claim),
                    ("ATLUS_JWT_SCOPE_CLAIM", scope_claim),
                ];
                let useless = others.iter().filter(|(_, value)| value.is_some()).map(|(name, _)| {
                    format!("{name} is set, but neither ATLUS_JWT_JWKS_URL nor ATLUS_JWT_KEY is: name the keys too")
                });
                problems.extend(useless);
                return if problems.is_empty() { Ok(None) } else { Err(problems) };
            }
            (Some(_), Some(_)) => {
                Err("ATLUS_JWT_JWKS_URL and ATLUS_JWT_KEY are both set: keep the one that names the keys"
                    .to_owned())
            }
            (Some(url), None) => jwks::address(&url)
                .map(KeySource::Jwks)
                .map_err(|wrong| format!("ATLUS_JWT_JWKS_URL {wrong}")),
            (None, Some(key)) => {
                read_pem(key).map(KeySource::Pem).map_err(|wrong| format!("ATLUS_JWT_KEY {wrong}"))
            }
        };
        let keys = keys.map_err(|problem| problems.push(problem)).ok();
        for (name, value) in [("ATLUS_JWT_ISSUER", &issuer), ("ATLUS_JWT_AUDIENCE", &audience)] {
            if value.is_none() {
                problems.push(format!("{name} is not set, but keys are: say what tokens must name there"));
            }
        }
        match (keys, issuer, audience) {
            (Some(keys), Some(issuer), Some(audience)) => {
                let user_claim = user_claim.unwrap_or_else(|| "sub".to_owned());
                Ok(Some(Self { keys, issuer, audience, tenant_claim, user_claim, scope_claim }))
            }
            _ => Err(problems),
        }
    }
}

/// The PEM of a public key, from the text itself or from the file that it names.
fn read_pem(text: String) -> Result<String, String> {
    let pem = if text.contains("-----BEGIN") {
        text
    } else {
        // The text is not repeated: it may be a key without its frame.
        fs::read_to_string(&text)
            .map_err(|error| format!("is neither a PEM nor a file that can be read ({})", error.kind()))?
    };
    Key::from_pem(&pem)?;
    Ok(pem)
}

/// What a good token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Absent only if the settings name no claim for it.
    pub tenant: Option<String>,
    /// Not empty.
    pub user: String,
    /// Without the prefix `atlus:`. Absent only if the settings name no claim for it; empty if the token has none.
    pub scopes: Option<Vec<String>>,
    /// In seconds since 1970.
    pub expires_at: u64,
}

/// Why a token is not accepted. The words are ours alone: nothing of a token can be in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not good, and will not be; a sentence for the caller.
    #[error("{0}")]
    Invalid(&'static str),
    /// It cannot be told yet.
    #[error("The keys of the token's issuer cannot be fetched at the moment")]
    Unavailable,
}

/// Tells good tokens from others.
pub struct Verifier {
    settings: JwtSettings,
    keys: Keys,
    /// The registered claims' part.
    validation: Validation,
    /// Good tokens by their SHA-256, and until when they are believed.
    verified: Cache<[u8; 32], (Token, Instant)>,
}

enum Keys {
    Published(Arc<Jwks>),
    One(Arc<Key>),
}

impl Verifier {
    /// Fails, with what to mend, if the key cannot be used or no HTTPS client can be made. Published keys are fetched
    /// when the first token comes, so an issuer that is away does not keep the server from starting.
    pub fn new(settings: JwtSettings) -> Result<Self, String> {
        let keys = match &settings.keys {
            KeySource::Jwks(url) => Keys::Published(Jwks::new(url.clone())?),
            KeySource::Pem(pem) => {
                Keys::One(Arc::new(Key::from_pem(pem).map_err(|wrong| format!("ATLUS_JWT_KEY {wrong}"))?))
            }
        };
        let mut validation = Validation::new(Algorithm::EdDSA);
        validation.leeway = LEEWAY;
        validation.validate_nbf = true;
        validation.set_required_spec_claims(&["exp", "iss", "aud"]);
        validation.set_issuer(&[&settings.issuer]);
        validation.set_audience(&[&settings.audience]);
        let verified = Cache::builder().max_capacity(MAX_REMEMBERED).time_to_live(REMEMBERED).build();
        Ok(Self { settings, keys, validation, verified })
    }

    /// What a token says, if it is good.
    ///
    /// Its signature must be of a key of the issuer and of an algorithm which that key is for; `exp` must be to come
    /// and `nbf`, if there, past, give or take 30 seconds; `iss` must be the issuer, `aud` the audience or a list with
    /// it; the claims that the settings name must be there.
    pub async fn verify(&self, token: &str) -> Result<Token, Refusal> {
        if token.len() > MAX_TOKEN {
            return Err(Refusal::Invalid("The token is longer than 8 KiB"));
        }
        let digest: [u8; 32] = Sha256::digest(token).into();
        if let Some((known, until)) = self.verified.get(&digest).await
            && until > Instant::now()
        {
            return Ok(known);
        }
        let header = decode_header(token).map_err(|error| refusal(&error))?;
        // What can never be good causes no fetch of keys.
        check(&header)?;
        let key = match &self.keys {
            Keys::Published(jwks) => jwks.key(header.kid.as_deref(), header.alg).await?,
            Keys::One(key) if key.fits(header.alg) => key.clone(),
            Keys::One(_) => {
                return Err(Refusal::Invalid("The token's algorithm is not one of its issuer's key"));
            }
        };
        let mut validation = self.validation.clone();
        validation.algorithms = vec![header.alg];
        let decoded = decode::<Map<String, Value>>(token, &key.decoding, &validation);
        let read = self.read(&decoded.map_err(|error| refusal(&error))?.claims)?;
        let left = Duration::from_secs(read.expires_at.saturating_sub(get_current_timestamp()));
        self.verified.insert(digest, (read.clone(), Instant::now() + left.min(REMEMBERED))).await;
        Ok(read)
    }

    fn read(&self, claims: &Map<String, Value>) -> Result<Token, Refusal> {
        let text = |name: &str| claims.get(name).and_then(Value::as_str).filter(|text| !text.is_empty());
        // jsonwebtoken would take a list of issuers, too.
        if text("iss") != Some(&self.settings.issuer) {
            return Err(Refusal::Invalid("The token is of another issuer"));
        }
        let tenant = self.settings.tenant_claim.as_ref().map(|name| text(name).ok_or(NO_TENANT));
        let user = text(&self.settings.user_claim).ok_or(Refusal::Invalid("The token names no user"))?;
        let scopes = self.settings.scope_claim.as_ref().map(|name| scopes(claims.get(name)).ok_or(NO_SCOPES));
        let expires_at = claims.get("exp").and_then(seconds).ok_or(UNREADABLE)?;
        Ok(Token {
            tenant: tenant.transpose()?.map(str::to_owned),
            user: user.to_owned(),
            scopes: scopes.transpose()?,
            expires_at,
        })
    }
}

const NO_TENANT: Refusal = Refusal::Invalid("The token names no tenant");
const NO_SCOPES: Refusal = Refusal::Invalid("The token's scopes are neither a text nor a list of texts");
const UNREADABLE: Refusal = Refusal::Invalid("The token cannot be read");

/// Refuses what no key can make good.
fn check(header: &Header) -> Result<(), Refusal> {
    if header.alg.family() == AlgorithmFamily::Hmac {
        // A public key must never be taken for a shared secret.
        return Err(Refusal::Invalid("The token's algorithm is not one of a public key"));
    }
    if header.crit.is_some() {
        return Err(Refusal::Invalid("The token has critical headers, of which none is known"));
    }
    // With the same keys an issuer may sign what is not for us to accept, such as logout tokens (RFC 8725, 3.11).
    let of_access = |name: &str| {
        let name = name.to_ascii_lowercase();
        matches!(name.strip_prefix("application/").unwrap_or(&name), "jwt" | "at+jwt")
    };
    if !header.typ.as_deref().is_none_or(of_access) {
        return Err(Refusal::Invalid("The token is of a type that gives no access"));
    }
    Ok(())
}

/// Scopes from a text with spaces between (RFC 8693) or a list of texts; `None` if it is neither.
fn scopes(claim: Option<&Value>) -> Option<Vec<String>> {
    let names: Vec<&str> = match claim {
        None => Vec::new(),
        Some(Value::String(names)) => names.split_whitespace().collect(),
        Some(Value::Array(names)) => names.iter().map(Value::as_str).collect::<Option<_>>()?,
        Some(_) => return None,
    };
    Some(names.into_iter().map(|name| name.strip_prefix("atlus:").unwrap_or(name).to_owned()).collect())
}

/// A time in seconds, which may have a fraction.
fn seconds(time: &Value) -> Option<u64> {
    time.as_u64().or_else(|| Duration::try_from_secs_f64(time.as_f64()?).ok().map(|time| time.as_secs()))
}

fn refusal(error: &Error) -> Refusal {
    Refusal::Invalid(match error.kind() {
        ErrorKind::InvalidSignature => "The token's signature is wrong",
        ErrorKind::ExpiredSignature => "The token has expired",
        ErrorKind::ImmatureSignature => "The token is not valid yet",
        ErrorKind::InvalidIssuer => "The token is of another issuer",
        ErrorKind::InvalidAudience => "The token is for another audience",
        ErrorKind::MissingRequiredClaim(_) => "The token must have exp, iss and aud",
        _ => return UNREADABLE,
    })
}
