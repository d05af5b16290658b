//! Tokens of another issuer: which are accepted, what is read in them, and how its keys are fetched and kept.

use std::{
    io,
    sync::{Arc, LazyLock, Mutex},
    time::{Duration, Instant},
};

use atlus::auth::jwt::{JwtSettings, JwtVariables, KeySource, Refusal, Token, Verifier};
use futures_util::future::join_all;
use jsonwebtoken::{
    Algorithm, DecodingKey, EncodingKey, Header, crypto, encode, get_current_timestamp, jwk::Jwk,
};
use p256::pkcs8::{EncodePrivateKey, EncodePublicKey, LineEnding};
use poem::{
    EndpointExt, Request, Response, Route,
    endpoint::make,
    http::StatusCode,
    listener::{Acceptor, Listener, TcpListener},
};
use proptest::prelude::*;
use rsa::{RsaPrivateKey, rand_core::OsRng};
use serde_json::{Value, json};
use tokio::sync::Semaphore;

pub const ISSUER: &str = "https://issuer.example/";
pub const AUDIENCE: &str = "atlus";

/// A key that an issuer signs with.
#[derive(Clone)]
pub struct Signer {
    algorithm: Algorithm,
    key: EncodingKey,
    /// The public half.
    pub pem: String,
}

/// Finding primes takes a while.
static RSA: LazyLock<Signer> = LazyLock::new(|| rsa_of(2048));

fn rsa_of(bits: usize) -> Signer {
    let key = RsaPrivateKey::new(&mut OsRng, bits).unwrap();
    let pem = key.to_public_key().to_public_key_pem(LineEnding::LF).unwrap();
    let key = EncodingKey::from_rsa_pem(key.to_pkcs8_pem(LineEnding::LF).unwrap().as_bytes()).unwrap();
    Signer { algorithm: Algorithm::RS256, key, pem }
}

impl Signer {
    /// A new key, but for RSA, of which there is one.
    pub fn new(algorithm: Algorithm) -> Self {
        let (key, pem) = match algorithm {
            Algorithm::ES256 => {
                let key = p256::SecretKey::random(&mut OsRng);
                (key.to_pkcs8_der().unwrap(), key.public_key().to_public_key_pem(LineEnding::LF).unwrap())
            }
            Algorithm::ES384 => {
                let key = p384::SecretKey::random(&mut OsRng);
                (key.to_pkcs8_der().unwrap(), key.public_key().to_public_key_pem(LineEnding::LF).unwrap())
            }
            Algorithm::EdDSA => {
                let key = ed25519_dalek::SigningKey::generate(&mut OsRng);
                let pem = key.verifying_key().to_public_key_pem(LineEnding::LF).unwrap();
                (key.to_pkcs8_der().unwrap(), pem)
            }
            algorithm => return Self { algorithm, ..RSA.clone() },
        };
        let key = match algorithm {
            Algorithm::EdDSA => EncodingKey::from_ed_der(key.as_bytes()),
            _ => EncodingKey::from_ec_der(key.as_bytes()),
        };
        Self { algorithm, key, pem }
    }

    /// The public half as it is published.
    fn jwk(&self, kid: &str) -> Value {
        let key = match self.algorithm {
            Algorithm::ES256 | Algorithm::ES384 => DecodingKey::from_ec_pem(self.pem.as_bytes()),
            Algorithm::EdDSA => DecodingKey::from_ed_pem(self.pem.as_bytes()),
            _ => DecodingKey::from_rsa_pem(self.pem.as_bytes()),
        };
        let jwk = Jwk::from_decoding_key(&key.unwrap(), None).unwrap();
        with(&serde_json::to_value(jwk).unwrap(), &json!({"kid": kid}))
    }

    /// A token with its signature, whatever its header says.
    fn sign(&self, header: &Value, claims: &Value) -> String {
        let message = format!("{}.{}", part(header), part(claims));
        let signature = crypto::sign(message.as_bytes(), &self.key, self.algorithm).unwrap();
        format!("{message}.{signature}")
    }

    /// A good token, changed so.
    pub fn token(&self, header: &Value, claims: &Value) -> String {
        let good = json!({"typ": "JWT", "alg": format!("{:?}", self.algorithm)});
        self.sign(&with(&good, header), &with(&good_claims(), claims))
    }
}

fn good_claims() -> Value {
    let exp = get_current_timestamp() + 300;
    json!({"iss": ISSUER, "aud": AUDIENCE, "sub": "ada", "org": "acme", "scp": "atlus:read other", "exp": exp})
}

/// An object with these fields instead, or without those that are null.
fn with(object: &Value, changes: &Value) -> Value {
    let mut object = object.clone();
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
            value => object[name] = value.clone(),
        }
    }
    object
}

/// JSON as a part of a token.
fn part(value: &Value) -> String {
    let token = encode(&Header::default(), value, &EncodingKey::from_secret(b"-")).unwrap();
    token.split('.').nth(1).unwrap().to_owned()
}

/// A server that publishes keys, or does not.
struct Issuer {
    url: String,
    shared: Arc<Shared>,
}

struct Shared {
    answer: Mutex<(u16, String)>,
    /// The path of every request.
    asked: Mutex<Vec<String>>,
    /// Each answer waits for a permit and takes it.
    gate: Semaphore,
}

impl Issuer {
    async fn publishing(keys: &[Value]) -> Self {
        let shared = Arc::new(Shared {
            answer: Mutex::new((200, json!({"keys": keys}).to_string())),
            asked: Mutex::default(),
            gate: Semaphore::new(1_000_000),
        });
        let state = shared.clone();
        let endpoint = make(move |request: Request| {
            let state = state.clone();
            async move {
                state.asked.lock().unwrap().push(request.uri().to_string());
                state.gate.acquire().await.unwrap().forget();
                let (status, body) = state.answer.lock().unwrap().clone();
                let status = StatusCode::from_u16(status).unwrap();
                Ok::<_, poem::Error>(
                    Response::builder().status(status).header("location", "/moved").body(body),
                )
            }
        });
        let acceptor = TcpListener::bind("127.0.0.1:0").into_acceptor().await.unwrap();
        let address = acceptor.local_addr()[0].as_socket_addr().unwrap().to_string();
        let routes = Route::new().nest("/", endpoint).map_to_response();
        tokio::spawn(poem::Server::new_with_acceptor(acceptor).run(routes));
        Self { url: format!("http://{address}/keys.json"), shared }
    }

    fn publish(&self, keys: &[Value]) {
        self.answer(200, &json!({"keys": keys}).to_string());
    }

    fn answer(&self, status: u16, body: &str) {
        *self.shared.answer.lock().unwrap() = (status, body.to_owned());
    }

    fn asked(&self) -> usize {
        self.shared.asked.lock().unwrap().len()
    }

    async fn asked_times(&self, times: usize) {
        // By a clock that `later` does not move.
        let started = Instant::now();
        while self.asked() < times {
            assert!(started.elapsed() < Duration::from_secs(20), "it was asked {} times", self.asked());
            tokio::task::yield_now().await;
        }
    }

    fn verifier(&self) -> Verifier {
        verifier(KeySource::Jwks(self.url.parse().unwrap()))
    }
}

fn verifier(keys: KeySource) -> Verifier {
    Verifier::new(JwtSettings {
        keys,
        issuer: ISSUER.into(),
        audience: AUDIENCE.into(),
        tenant_claim: Some("org".into()),
        user_claim: "sub".into(),
        scope_claim: Some("scp".into()),
    })
    .unwrap()
}

/// Lets time pass, without waiting, for all but the tokens' own times.
async fn later(duration: Duration) {
    tokio::time::pause();
    tokio::time::advance(duration).await;
    tokio::time::resume();
}

const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);

/// An issuer with keys of all kinds.
struct Published {
    issuer: Issuer,
    verifier: Verifier,
    p256: Signer,
    p384: Signer,
    ed: Signer,
}

impl Published {
    async fn new() -> Self {
        let (p256, p384) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES384));
        let (rsa, ed) = (RSA.clone(), Signer::new(Algorithm::EdDSA));
        let rsa_with = |changes: Value| with(&rsa.jwk(""), &changes);
        let full = json!({"kid": "full", "use": "sig", "key_ops": ["verify"], "alg": "RS512", "x5t": "AA", "ext": true});
        let issuer = Issuer::publishing(&[
            rsa.jwk("rsa"),
            p256.jwk("p256"),
            p384.jwk("p384"),
            ed.jwk("ed"),
            rsa_with(full),
            rsa_with(json!({"kid": "ps256", "alg": "PS256"})),
            rsa_with(json!({"kid": "encrypts", "use": "enc"})),
            rsa_with(json!({"kid": "wraps", "key_ops": ["wrapKey"]})),
            rsa_with(json!({"kid": "oaep", "alg": "RSA-OAEP"})),
            json!({"kid": "secret", "kty": "oct", "k": "LS0tLS0tLS0", "alg": "HS256"}),
            json!({"kid": "short", "kty": "OKP", "crv": "Ed25519", "x": "AAAA"}),
            json!({"kid": "off", "kty": "EC", "crv": "P-256", "x": "A".repeat(43), "y": "A".repeat(43)}),
            json!({"kid": "new", "kty": "AKP", "alg": "ML-DSA-44", "pub": "AAAA"}),
            json!("nonsense"),
        ])
        .await;
        let verifier = issuer.verifier();
        Self { issuer, verifier, p256, p384, ed }
    }

    /// A good token with these claims changed.
    fn claiming(&self, claims: &Value) -> String {
        self.p256.token(&json!({"kid": "p256"}), claims)
    }

    /// A good token with these headers changed.
    fn headed(&self, header: &Value) -> String {
        let good = json!({"typ": "JWT", "alg": "ES256", "kid": "p256"});
        self.p256.sign(&with(&good, header), &good_claims())
    }

    async fn refuses(&self, cases: &[(&str, String, &'static str)]) {
        for (case, token, reason) in cases {
            assert_eq!(self.verifier.verify(token).await, Err(Refusal::Invalid(reason)), "{case}");
        }
    }
}

/// A token that names this key.
fn of(signer: &Signer, kid: &str) -> String {
    signer.token(&json!({"kid": kid}), &json!({}))
}

fn of_rsa(algorithm: Algorithm, kid: &str) -> String {
    of(&Signer::new(algorithm), kid)
}

const UNREADABLE: &str = "The token cannot be read";
const WRONG_SIGNATURE: &str = "The token's signature is wrong";
const UNKNOWN_KEY: &str = "The token is not signed with a key of its issuer";
const NOT_PUBLIC: &str = "The token's algorithm is not one of a public key";
const INCOMPLETE: &str = "The token must have exp, iss and aud";
const OTHER_ISSUER: &str = "The token is of another issuer";
const OTHER_AUDIENCE: &str = "The token is for another audience";
const EXPIRED: &str = "The token has expired";
const NO_USER: &str = "The token names no user";
const NO_TENANT: &str = "The token names no tenant";
const NO_SCOPES: &str = "The token's scopes are neither a text nor a list of texts";
const CRITICAL: &str = "The token has critical headers, of which none is known";

#[tokio::test]
async fn good_tokens_of_all_kinds_are_accepted() {
    use Algorithm::{PS256, PS384, PS512, RS256, RS384, RS512};
    let published = Published::new().await;
    let Published { p256, p384, ed, .. } = &published;
    let now = get_current_timestamp();
    let fraction = f64::from(u32::try_from(now).unwrap()) + 300.5;
    let mut cases = vec![
        ("ES256", of(p256, "p256")),
        ("ES384", of(p384, "p384")),
        ("EdDSA", of(ed, "ed")),
        ("a key for one algorithm", of_rsa(PS256, "ps256")),
        ("a key with all that can be said of it", of_rsa(RS512, "full")),
        ("no kid, one key fits", ed.token(&json!({}), &json!({}))),
        ("no type", published.headed(&json!({"typ": null}))),
        ("an access token", published.headed(&json!({"typ": "application/at+JWT"}))),
        ("one audience of several", published.claiming(&json!({"aud": ["other", AUDIENCE]}))),
        ("just expired", published.claiming(&json!({"exp": now - 20}))),
        ("almost valid", published.claiming(&json!({"nbf": now + 20, "iat": now + 20}))),
        ("an expiry with a fraction", published.claiming(&json!({"exp": fraction}))),
    ];
    cases.extend(
        [RS256, RS384, RS512, PS256, PS384, PS512].map(|algorithm| ("RSA", of_rsa(algorithm, "rsa"))),
    );
    for (case, token) in cases {
        let read = published.verifier.verify(&token).await;
        assert_eq!(read.map(|token| token.user), Ok("ada".to_owned()), "{case}");
    }
}

#[tokio::test]
async fn what_is_not_a_signed_token_is_refused() {
    let published = Published::new().await;
    let hmac = |secret: &str, kid: &str| {
        let key = EncodingKey::from_secret(secret.as_bytes());
        of(&Signer { algorithm: Algorithm::HS256, key, pem: String::new() }, kid)
    };
    let good = published.claiming(&json!({}));
    let (message, signature) = good.rsplit_once('.').unwrap();
    let (header, _) = message.split_once('.').unwrap();
    let other = part(&with(&good_claims(), &json!({"sub": "eve"})));
    let letter = if signature.starts_with('A') { "B" } else { "A" };
    let unsigned = |algorithm: &str| format!("{}.{other}.", part(&json!({"alg": algorithm, "kid": "p256"})));
    published
        .refuses(&[
            ("nothing", String::new(), UNREADABLE),
            ("one part", "atlus".into(), UNREADABLE),
            ("two parts", message.into(), UNREADABLE),
            ("four parts", format!("{good}.x"), UNREADABLE),
            ("padding", format!("{good}=="), UNREADABLE),
            ("too long", good.clone() + &"A".repeat(8192), "The token is longer than 8 KiB"),
            ("no signature", format!("{message}."), WRONG_SIGNATURE),
            ("zeros for a signature", format!("{message}.{}", "A".repeat(86)), WRONG_SIGNATURE),
            ("a letter changed", format!("{message}.{letter}{}", &signature[1..]), WRONG_SIGNATURE),
            ("other claims", format!("{header}.{other}.{signature}"), WRONG_SIGNATURE),
            ("none", unsigned("none"), UNREADABLE),
            ("NONE", unsigned("NONE"), UNREADABLE),
            ("none with a signature", published.headed(&json!({"alg": "none"})), UNREADABLE),
            ("no algorithm", published.headed(&json!({"alg": null})), UNREADABLE),
            ("the public EC key as a secret", hmac(&published.p256.pem, "p256"), NOT_PUBLIC),
            ("the public RSA key as a secret", hmac(&RSA.pem, "rsa"), NOT_PUBLIC),
            ("a published secret", hmac("--------", "secret"), NOT_PUBLIC),
            ("critical headers", published.headed(&json!({"crit": ["b64"], "b64": false})), CRITICAL),
            ("empty critical headers", published.headed(&json!({"crit": []})), CRITICAL),
            (
                "a logout token",
                published.headed(&json!({"typ": "logout+jwt"})),
                "The token is of a type that gives no access",
            ),
        ])
        .await;
}

#[tokio::test]
async fn a_key_is_used_only_if_it_is_named_and_meant_for_it() {
    use Algorithm::{ES256, RS256, RS512};
    let published = Published::new().await;
    let Published { p256, ed, .. } = &published;
    let (rsa, stranger) = (Signer::new(RS256), Signer::new(ES256));
    let headed = |signer: &Signer, header: Value| signer.token(&header, &json!({}));
    let embedded = json!({"kid": "p256", "jwk": stranger.jwk("p256")});
    published
        .refuses(&[
            ("ES256 said, RSA key", headed(&rsa, json!({"kid": "rsa", "alg": "ES256"})), UNKNOWN_KEY),
            ("RS256 said, EC key", published.headed(&json!({"alg": "RS256"})), UNKNOWN_KEY),
            ("another curve", published.headed(&json!({"alg": "ES384"})), UNKNOWN_KEY),
            ("PSS said, PKCS 1 done", headed(&rsa, json!({"kid": "rsa", "alg": "PS256"})), WRONG_SIGNATURE),
            ("not the key's algorithm", of_rsa(RS256, "ps256"), UNKNOWN_KEY),
            ("a key for encryption", of_rsa(RS256, "encrypts"), UNKNOWN_KEY),
            ("a key for wrapping", of_rsa(RS256, "wraps"), UNKNOWN_KEY),
            ("a key for OAEP", of_rsa(RS256, "oaep"), UNKNOWN_KEY),
            ("a key that is too short", of(ed, "short"), UNKNOWN_KEY),
            ("a key off its curve", of(p256, "off"), UNKNOWN_KEY),
            ("a stranger's key", of(&stranger, "p256"), WRONG_SIGNATURE),
            ("the key in the header", headed(&stranger, embedded), WRONG_SIGNATURE),
            (
                "the key elsewhere",
                headed(&stranger, json!({"kid": "p256", "jku": "http://127.0.0.1:1/"})),
                WRONG_SIGNATURE,
            ),
            (
                "no kid, several fit",
                headed(&Signer::new(RS512), json!({})),
                "The token must name its key (kid), since several fit",
            ),
            ("an empty kid", of(p256, ""), UNKNOWN_KEY),
            ("a number for a kid", published.headed(&json!({"kid": 1})), UNREADABLE),
            ("a path for a kid", of(p256, "../../dev/null"), UNKNOWN_KEY),
            ("a URL for a kid", of(p256, "http://127.0.0.1:1/keys.json"), UNKNOWN_KEY),
            ("SQL for a kid", of(p256, "p256' OR '1'='1"), UNKNOWN_KEY),
        ])
        .await;
    // However keys were named, the issuer was asked for its key set alone, and once.
    assert_eq!(*published.issuer.shared.asked.lock().unwrap(), ["/keys.json"]);
}

#[tokio::test]
async fn a_token_with_wrong_or_missing_claims_is_refused() {
    let published = Published::new().await;
    let claiming = |claims: Value| published.claiming(&claims);
    let payload = |payload: Value| published.p256.sign(&json!({"alg": "ES256", "kid": "p256"}), &payload);
    let now = get_current_timestamp();
    published
        .refuses(&[
            ("another issuer", claiming(json!({"iss": "https://issuer.example"})), OTHER_ISSUER),
            ("one issuer of several", claiming(json!({"iss": [ISSUER, "other"]})), OTHER_ISSUER),
            ("no issuer", claiming(json!({"iss": null})), INCOMPLETE),
            ("another audience", claiming(json!({"aud": "atlus2"})), OTHER_AUDIENCE),
            ("other audiences", claiming(json!({"aud": ["ATLUS", ""]})), OTHER_AUDIENCE),
            ("no audience", claiming(json!({"aud": null})), INCOMPLETE),
            ("a number among audiences", claiming(json!({"aud": [AUDIENCE, 1]})), INCOMPLETE),
            ("expired", claiming(json!({"exp": now - 40})), EXPIRED),
            ("expired in 1970", claiming(json!({"exp": 0})), EXPIRED),
            ("no expiry", claiming(json!({"exp": null})), INCOMPLETE),
            ("a text for an expiry", claiming(json!({"exp": "2999-01-01"})), INCOMPLETE),
            ("a negative expiry", claiming(json!({"exp": -1})), INCOMPLETE),
            ("not yet valid", claiming(json!({"nbf": now + 100})), "The token is not valid yet"),
            ("a text for a beginning", claiming(json!({"nbf": "soon"})), UNREADABLE),
            ("no user", claiming(json!({"sub": null})), NO_USER),
            ("an empty user", claiming(json!({"sub": ""})), NO_USER),
            ("a number for a user", claiming(json!({"sub": 1})), NO_USER),
            ("a list of users", claiming(json!({"sub": ["ada"]})), UNREADABLE),
            ("no tenant", claiming(json!({"org": null})), NO_TENANT),
            ("an empty tenant", claiming(json!({"org": ""})), NO_TENANT),
            ("a list of tenants", claiming(json!({"org": ["acme"]})), NO_TENANT),
            ("a number for scopes", claiming(json!({"scp": 1})), NO_SCOPES),
            ("a number among scopes", claiming(json!({"scp": ["read", 1]})), NO_SCOPES),
            ("a list for claims", payload(json!([good_claims()])), UNREADABLE),
            ("a text for claims", payload(json!("ada")), UNREADABLE),
        ])
        .await;
}

#[tokio::test]
async fn what_a_token_says_is_read_as_the_settings_name_it() {
    let signer = Signer::new(Algorithm::ES256);
    let settings = |tenant: Option<&str>, user: &str, scope: Option<&str>| JwtSettings {
        keys: KeySource::Pem(signer.pem.clone()),
        issuer: ISSUER.into(),
        audience: AUDIENCE.into(),
        tenant_claim: tenant.map(Into::into),
        user_claim: user.into(),
        scope_claim: scope.map(Into::into),
    };
    let claims = json!({
        "exp": 32_503_680_000_u64, "email": "ada@example.org", "https://example.org/tenant": "acme",
        "scope": " read  atlus:write\tatlus:admin openid", "scp": ["atlus:read", "a b"]
    });
    let token = signer.token(&json!({"kid": "a key of its own has no name"}), &claims);
    let token_of = |tenant: Option<&str>, user: &str, scopes: Option<&[&str]>| Token {
        tenant: tenant.map(Into::into),
        user: user.into(),
        scopes: scopes.map(|scopes| scopes.iter().map(|scope| (*scope).to_owned()).collect()),
        expires_at: 32_503_680_000,
    };
    let cases = [
        (settings(None, "sub", None), token_of(None, "ada", None)),
        (
            settings(Some("https://example.org/tenant"), "email", Some("scope")),
            token_of(Some("acme"), "ada@example.org", Some(&["read", "write", "admin", "openid"])),
        ),
        (settings(None, "sub", Some("scp")), token_of(None, "ada", Some(&["read", "a b"][..]))),
        (settings(None, "sub", Some("missing")), token_of(None, "ada", Some(&[]))),
    ];
    for (settings, expected) in cases {
        let verifier = Verifier::new(settings).unwrap();
        assert_eq!(verifier.verify(&token).await.unwrap(), expected);
        assert_eq!(verifier.verify(&token).await.unwrap(), expected, "remembered");
    }
}

#[tokio::test]
async fn a_key_given_as_pem_accepts_its_own_tokens_alone() {
    use Algorithm::{ES256, ES384, EdDSA, RS256};
    for (algorithm, other) in [(RS256, ES256), (ES256, ES384), (ES384, EdDSA), (EdDSA, RS256)] {
        let signer = Signer::new(algorithm);
        let verifier = verifier(KeySource::Pem(signer.pem.clone()));
        assert!(verifier.verify(&signer.token(&json!({}), &json!({}))).await.is_ok(), "{algorithm:?}");
        let others = Signer::new(other).token(&json!({}), &json!({}));
        let refusal = Refusal::Invalid("The token's algorithm is not one of its issuer's key");
        assert_eq!(verifier.verify(&others).await, Err(refusal), "{algorithm:?}");
    }
}

#[tokio::test]
async fn keys_are_fetched_once_for_many_tokens() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    let tokens: Vec<_> =
        (0..20).map(|n| signer.token(&json!({"kid": "a"}), &json!({"sub": format!("user {n}")}))).collect();
    for read in join_all(tokens.iter().chain(&tokens).map(|token| verifier.verify(token))).await {
        read.unwrap();
    }
    assert_eq!(issuer.asked(), 1);
}

#[tokio::test]
async fn a_rotated_key_is_found_and_made_up_keys_hammer_nobody() {
    let (old, new) = (Signer::new(Algorithm::ES256), Signer::new(Algorithm::ES256));
    let issuer = Issuer::publishing(&[old.jwk("old")]).await;
    let verifier = issuer.verifier();
    verifier.verify(&old.token(&json!({"kid": "old"}), &json!({}))).await.unwrap();
    issuer.publish(&[new.jwk("new")]);
    let rotated = new.token(&json!({"kid": "new"}), &json!({}));
    assert_eq!(verifier.verify(&rotated).await, Err(Refusal::Invalid(UNKNOWN_KEY)));
    assert_eq!(issuer.asked(), 1, "the keys are not half a minute old");

    later(31 * SECOND).await;
    let made_up: Vec<_> =
        (0..50).map(|n| old.token(&json!({"kid": format!("made up {n}")}), &json!({}))).collect();
    for refused in join_all(made_up.iter().map(|token| verifier.verify(token))).await {
        assert_eq!(refused, Err(Refusal::Invalid(UNKNOWN_KEY)));
    }
    assert_eq!(issuer.asked(), 2);
    verifier.verify(&rotated).await.unwrap();
    assert_eq!(issuer.asked(), 2);
}

#[tokio::test]
async fn a_token_is_remembered_for_a_minute_and_no_longer() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    let token = signer.token(&json!({"kid": "a"}), &json!({}));
    verifier.verify(&token).await.unwrap();
    later(31 * SECOND).await;
    issuer.publish(&[]);
    let other = signer.token(&json!({"kid": "b"}), &json!({}));
    assert_eq!(verifier.verify(&other).await, Err(Refusal::Invalid(UNKNOWN_KEY)));
    assert_eq!(issuer.asked(), 2, "the key is known to be withdrawn");
    verifier.verify(&token).await.unwrap();
    later(30 * SECOND).await;
    assert_eq!(verifier.verify(&token).await, Err(Refusal::Invalid(UNKNOWN_KEY)));
}

#[tokio::test]
async fn a_token_is_not_remembered_beyond_its_expiry() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    let exp = get_current_timestamp() - 5;
    let token = signer.token(&json!({"kid": "a"}), &json!({"exp": exp}));
    verifier.verify(&token).await.unwrap();
    later(31 * SECOND).await;
    issuer.publish(&[]);
    let other = signer.token(&json!({"kid": "b"}), &json!({}));
    assert_eq!(verifier.verify(&other).await, Err(Refusal::Invalid(UNKNOWN_KEY)));
    assert_eq!(verifier.verify(&token).await, Err(Refusal::Invalid(UNKNOWN_KEY)));
}

#[tokio::test]
async fn keys_that_grow_old_are_fetched_anew_while_they_are_used() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    verifier.verify(&signer.token(&json!({"kid": "a"}), &json!({}))).await.unwrap();
    issuer.shared.gate.forget_permits(usize::MAX);
    later(11 * MINUTE).await;
    let token = signer.token(&json!({"kid": "a"}), &json!({"sub": "bob"}));
    verifier.verify(&token).await.unwrap();
    issuer.asked_times(2).await;
}

#[tokio::test]
async fn without_its_issuer_the_last_keys_are_used_for_an_hour() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    let token = signer.token(&json!({"kid": "a"}), &json!({}));
    verifier.verify(&token).await.unwrap();
    issuer.answer(503, "");
    later(59 * MINUTE).await;
    verifier.verify(&token).await.unwrap();
    issuer.asked_times(2).await;
    later(2 * MINUTE).await;
    assert_eq!(verifier.verify(&token).await, Err(Refusal::Unavailable));
    issuer.publish(&[signer.jwk("a")]);
    later(31 * SECOND).await;
    verifier.verify(&token).await.unwrap();
}

#[tokio::test]
async fn what_is_not_a_key_set_gives_no_keys_and_is_logged_without_secrets() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[]).await;
    let token = signer.token(&json!({"kid": "a"}), &json!({}));
    let keys = json!({"keys": [signer.jwk("a")]}).to_string();
    let many = json!({"keys": (0..257).map(|_| json!({})).collect::<Vec<_>>()}).to_string();
    let cases = [
        (404, keys.clone(), "its server answered 404"),
        (302, keys.clone(), "its server answered 302"),
        (200, "<html>".to_owned(), "its server did not answer with a key set"),
        (200, format!("{}{keys}", " ".repeat(64 << 10)), "its server answered more than 65536 bytes"),
        (200, many, "its server answered more than 256 keys"),
    ];
    for (status, body, reason) in cases {
        let log = Log::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt().with_writer(move || writer.clone()).finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        issuer.answer(status, &body);
        let verifier = verifier(KeySource::Jwks(format!("{}?secret=hidden", issuer.url).parse().unwrap()));
        assert_eq!(verifier.verify(&token).await, Err(Refusal::Unavailable), "{reason}");
        let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        assert!(log.contains(reason), "{log}");
        assert!(!log.contains("hidden") && !log.contains(&token), "{log}");
    }
    assert!(issuer.shared.asked.lock().unwrap().iter().all(|path| path == "/keys.json?secret=hidden"));
}

#[tokio::test]
async fn an_issuer_that_is_away_or_silent_is_found_when_it_is_back() {
    let signer = Signer::new(Algorithm::ES256);
    let token = signer.token(&json!({"kid": "a"}), &json!({}));
    let away = verifier(KeySource::Jwks("http://127.0.0.1:1/keys.json".parse().unwrap()));
    assert_eq!(away.verify(&token).await, Err(Refusal::Unavailable));

    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    issuer.shared.gate.forget_permits(usize::MAX);
    let silent = async {
        issuer.asked_times(1).await;
        later(6 * SECOND).await;
        tokio::time::sleep(20 * SECOND).await;
    };
    tokio::select! {
        refused = verifier.verify(&token) => assert_eq!(refused, Err(Refusal::Unavailable)),
        () = silent => unreachable!("the silence was too long"),
    }
    issuer.shared.gate.add_permits(10);
    later(4 * SECOND).await;
    verifier.verify(&token).await.unwrap();
}

#[tokio::test]
async fn a_caller_who_leaves_does_not_keep_the_keys_from_others() {
    let signer = Signer::new(Algorithm::ES256);
    let issuer = Issuer::publishing(&[signer.jwk("a")]).await;
    let verifier = issuer.verifier();
    let token = signer.token(&json!({"kid": "a"}), &json!({}));
    issuer.shared.gate.forget_permits(usize::MAX);
    tokio::select! {
        _ = verifier.verify(&token) => unreachable!("the issuer has not answered"),
        () = issuer.asked_times(1) => {}
    }
    issuer.shared.gate.add_permits(1);
    verifier.verify(&token).await.unwrap();
    assert_eq!(issuer.asked(), 1);
}

/// What was logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A change to good settings, and how the problems that it makes begin.
type Case = (fn(&mut JwtVariables<'_>), &'static [&'static str]);

#[test]
fn settings_are_all_there_or_every_problem_is_named_without_its_value() {
    let given = |change: fn(&mut JwtVariables<'_>)| {
        let mut given = JwtVariables { issuer: Some(ISSUER), audience: Some(AUDIENCE), ..Default::default() };
        change(&mut given);
        JwtSettings::check(&given)
    };
    assert!(JwtSettings::check(&JwtVariables::default()).unwrap().is_none());
    for url in
        ["https://issuer.example/keys", "http://127.0.0.1:8080/keys", "http://[::1]/", "http://localhost/"]
    {
        let mut variables =
            JwtVariables { issuer: Some(ISSUER), audience: Some(AUDIENCE), ..Default::default() };
        variables.jwks_url = Some(url);
        let settings = JwtSettings::check(&variables).unwrap().unwrap();
        assert_eq!((settings.issuer.as_str(), settings.user_claim.as_str()), (ISSUER, "sub"), "{url}");
        assert_eq!((settings.tenant_claim, settings.scope_claim), (None, None));
    }
    let cases: &[Case] = &[
        (|_| {}, &["ATLUS_JWT_ISSUER is set, but neither", "ATLUS_JWT_AUDIENCE is set, but neither"]),
        (
            |v| {
                *v = JwtVariables {
                    tenant_claim: Some("t"),
                    user_claim: Some("u"),
                    scope_claim: Some("s"),
                    ..Default::default()
                }
            },
            &["ATLUS_JWT_TENANT_CLAIM is set", "ATLUS_JWT_USER_CLAIM is set", "ATLUS_JWT_SCOPE_CLAIM is set"],
        ),
        (
            |v| *v = JwtVariables { jwks_url: Some("ftp://secret"), issuer: Some(""), ..Default::default() },
            &[
                "ATLUS_JWT_JWKS_URL must begin with https://",
                "ATLUS_JWT_ISSUER is not set",
                "ATLUS_JWT_AUDIENCE is not set",
            ],
        ),
        (|v| v.jwks_url = Some("secret"), &["ATLUS_JWT_JWKS_URL must be a URL"]),
        (|v| v.jwks_url = Some("http://secret.example/"), &["ATLUS_JWT_JWKS_URL must begin with https://"]),
        (|v| v.jwks_url = Some("http://localhost.secret/"), &["ATLUS_JWT_JWKS_URL must begin with https://"]),
        (|v| v.jwks_url = Some("https://me:secret@x/"), &["ATLUS_JWT_JWKS_URL must hold no user"]),
        (
            |v| (v.jwks_url, v.key) = (Some("https://secret/"), Some("secret")),
            &["ATLUS_JWT_JWKS_URL and ATLUS_JWT_KEY are both set"],
        ),
        (
            |v| v.key = Some("/no/secret"),
            &["ATLUS_JWT_KEY is neither a PEM nor a file that can be read (entity not found)"],
        ),
        (|v| v.key = Some("-----BEGIN PRIVATE KEY-----\nsecret"), &["ATLUS_JWT_KEY holds a private key"]),
        (|v| v.key = Some("-----BEGIN EC PRIVATE KEY-----\nsecret"), &["ATLUS_JWT_KEY holds a private key"]),
        (
            |v| v.key = Some("-----BEGIN CERTIFICATE-----\nsecret"),
            &["ATLUS_JWT_KEY must be the PEM of a public key"],
        ),
        (|v| v.key = Some("-----BEGIN PUBLIC KEY-----\nsecret"), &["ATLUS_JWT_KEY must be a key of RSA"]),
    ];
    for (change, expected) in cases {
        let problems = given(*change).unwrap_err();
        assert_eq!(problems.len(), expected.len(), "{problems:?}");
        for (problem, expected) in problems.iter().zip(*expected) {
            assert!(problem.starts_with(expected) && !problem.contains("secret"), "{problem}");
        }
    }
}

#[test]
fn a_public_key_is_read_from_a_text_or_a_file_and_a_weak_one_is_refused() {
    let check = |key: &str| {
        let variables = JwtVariables {
            key: Some(key),
            issuer: Some(ISSUER),
            audience: Some(AUDIENCE),
            ..Default::default()
        };
        JwtSettings::check(&variables).map(|settings| settings.unwrap().keys)
    };
    let pem = Signer::new(Algorithm::EdDSA).pem;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &pem).unwrap();
    for key in [pem.as_str(), file.path().to_str().unwrap()] {
        assert!(matches!(check(key).unwrap(), KeySource::Pem(read) if read == pem));
    }
    let problems = check(&rsa_of(1024).pem).unwrap_err();
    assert!(problems[0].contains("RSA with 2048 to 4096 bits"), "{problems:?}");
}

/// Any JSON that is not deep.
fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,20}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 8, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map(".{0,5}", inner, 0..4).prop_map(|map| json!(map)),
        ]
    })
}

/// Some of these fields, with any values.
fn fields(names: &'static [&'static str]) -> impl Strategy<Value = Value> {
    prop::collection::hash_map(prop::sample::select(names), json_value(), 0..6).prop_map(|map| json!(map))
}

static SIGNER: LazyLock<Signer> = LazyLock::new(|| Signer::new(Algorithm::ES256));
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| verifier(KeySource::Pem(SIGNER.pem.clone())));

/// Verifies on a runtime of its own.
fn verify(token: &str) -> Result<Token, Refusal> {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(VERIFIER.verify(token))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_text_is_a_token_nor_harms(text in any::<String>(), parts in "[A-Za-z0-9_-]{0,9}(\\.[A-Za-z0-9_-]{0,9}){1,3}") {
        prop_assert!(verify(&text).is_err());
        prop_assert!(verify(&parts).is_err());
    }

    #[test]
    fn no_header_harms(header in fields(&["alg", "kid", "typ", "crit", "jwk", "jku", "x5c", "enc", "zip", "b64"])) {
        let _ = verify(&SIGNER.token(&header, &json!({})));
    }

    #[test]
    fn no_claims_harm(claims in fields(&["exp", "nbf", "iat", "iss", "aud", "sub", "org", "scp"])) {
        if let Ok(token) = verify(&SIGNER.token(&json!({}), &claims)) {
            prop_assert!(!token.user.is_empty());
        }
    }
}
