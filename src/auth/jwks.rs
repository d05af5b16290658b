//! The public keys of an issuer of tokens: which algorithms each is for, and how a key set (JWKS, RFC 7517) is
//! fetched and kept.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use jsonwebtoken::{
    Algorithm, DecodingKey, DecodingKeyKind,
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyAlgorithm, KeyOperations, PublicKeyUse},
};
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;
use serde_json::Value;
use tokio::{task::JoinHandle, time::Instant};

use super::jwt::Refusal;
use crate::model::http;

/// The most bytes of a key set that are read.
const MAX_BYTES: usize = 64 << 10;
const MAX_KEYS: usize = 256;
/// How long fetching may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// After this age keys are fetched anew, while they go on being used.
const FRESH: Duration = Duration::from_secs(10 * 60);
/// After this age they are used no more: a key that was withdrawn must not work for ever.
const KEPT: Duration = Duration::from_secs(60 * 60);
/// From one fetch to the next, so that tokens with made-up keys do not make us a hammer.
const PAUSE: Duration = Duration::from_secs(30);
/// The same while there are no keys at all.
const PAUSE_WITHOUT_KEYS: Duration = Duration::from_secs(3);
/// In bits; what is shorter is no longer safe, what is longer the cryptography does not take.
const RSA_SIZE: std::ops::RangeInclusive<usize> = 2048..=4096;

const RSA: &[Algorithm] = &[
    Algorithm::RS256,
    Algorithm::RS384,
    Algorithm::RS512,
    Algorithm::PS256,
    Algorithm::PS384,
    Algorithm::PS512,
];

/// A public key that signatures may be checked with.
pub(super) struct Key {
    id: Option<String>,
    /// Pinned to the key, so that a token cannot choose what its signature is taken for.
    algorithms: Vec<Algorithm>,
    pub decoding: DecodingKey,
}

impl Key {
    /// `None` if the key is not for signatures, or not one of RSA with 2048 to 4096 bits, P-256, P-384 and Ed25519.
    fn new(jwk: &Jwk) -> Option<Self> {
        let common = &jwk.common;
        let signs = common.public_key_use.as_ref().is_none_or(|r#use| *r#use == PublicKeyUse::Signature);
        let verifies = common.key_operations.as_ref().is_none_or(|all| all.contains(&KeyOperations::Verify));
        if !(signs && verifies) {
            return None;
        }
        let decoding = DecodingKey::from_jwk(jwk).ok()?;
        let of_its_kind = match (&jwk.algorithm, decoding.kind()) {
            (AlgorithmParameters::RSA(_), DecodingKeyKind::RsaModulusExponent { n, .. })
                if RSA_SIZE.contains(&bits(n)) =>
            {
                RSA
            }
            (AlgorithmParameters::EllipticCurve(key), _) => match key.curve {
                EllipticCurve::P256 => &[Algorithm::ES256][..],
                EllipticCurve::P384 => &[Algorithm::ES384],
                _ => return None,
            },
            // The cryptography panics where it is shorter.
            (AlgorithmParameters::OctetKeyPair(key), DecodingKeyKind::SecretOrDer(bytes))
                if key.curve == EllipticCurve::Ed25519 && bytes.len() == 32 =>
            {
                &[Algorithm::EdDSA]
            }
            _ => return None,
        };
        let named = |of_its_kind: &&Algorithm| {
            common.key_algorithm.is_none_or(|named| named == KeyAlgorithm::from(**of_its_kind))
        };
        let algorithms: Vec<_> = of_its_kind.iter().filter(named).copied().collect();
        // Fails if the key is, say, no point on its curve.
        jsonwebtoken::crypto::verify("", &[], &decoding, *algorithms.first()?).ok()?;
        Some(Self { id: common.key_id.clone(), algorithms, decoding })
    }

    /// Reads the PEM of a public key; fails with what is wrong, without the text.
    pub fn from_pem(pem: &str) -> Result<Self, &'static str> {
        if pem.contains("PRIVATE KEY") {
            return Err(
                "holds a private key: give the public one alone (openssl pkey -in FILE -pubout), and keep the \
                        private one away from this server",
            );
        }
        let public = ["-----BEGIN PUBLIC KEY-----", "-----BEGIN RSA PUBLIC KEY-----"];
        if !public.iter().any(|begin| pem.trim_start().starts_with(begin)) {
            return Err(
                "must be the PEM of a public key, -----BEGIN PUBLIC KEY-----, or a file that holds one",
            );
        }
        let bytes = pem.as_bytes();
        let key = DecodingKey::from_rsa_pem(bytes)
            .or_else(|_| DecodingKey::from_ec_pem(bytes))
            .or_else(|_| DecodingKey::from_ed_pem(bytes));
        key.and_then(|key| Jwk::from_decoding_key(&key, None))
            .ok()
            .and_then(|jwk| Self::new(&jwk))
            .ok_or("must be a key of RSA with 2048 to 4096 bits, of P-256, of P-384 or of Ed25519")
    }

    pub fn fits(&self, algorithm: Algorithm) -> bool {
        self.algorithms.contains(&algorithm)
    }
}

/// The length of a number, in bits.
fn bits(number: &[u8]) -> usize {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    let first = number.get(zeros).map_or(0, |byte| byte.leading_zeros() as usize);
    (number.len() - zeros) * 8 - first
}

/// Reads the address of a key set; fails with what is wrong, without the text, which may hold a password.
pub(super) fn address(text: &str) -> Result<Url, &'static str> {
    let url: Url = text.parse().map_err(|_| "must be a URL such as https://issuer.example/keys.json")?;
    match url.scheme() {
        "https" => {}
        "http" if http::is_local(&url) => {}
        _ => return Err("must begin with https:// (http:// only on a loopback address)"),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("must hold no user and no password: the keys are public");
    }
    Ok(url)
}

/// The keys that an issuer publishes.
pub(super) struct Jwks {
    client: Client,
    url: Url,
    held: Mutex<Option<Held>>,
    /// When they were last asked for; locked meanwhile, so that one request at most is under way.
    asked: tokio::sync::Mutex<Option<Instant>>,
}

/// What was last fetched.
#[derive(Clone)]
struct Held {
    keys: Arc<[Arc<Key>]>,
    at: Instant,
}

impl Jwks {
    /// Fails, with what to mend, if no HTTPS client can be made.
    pub fn new(url: Url) -> Result<Arc<Self>, String> {
        let client = http::client(&url).timeout(TIMEOUT).build();
        let client = client.map_err(|error| format!("no HTTP client for ATLUS_JWT_JWKS_URL: {error}"))?;
        Ok(Arc::new(Self { client, url, held: Mutex::default(), asked: tokio::sync::Mutex::default() }))
    }

    /// The one key that has this id, or any id if the token names none, and is for this algorithm.
    pub async fn key(self: &Arc<Self>, id: Option<&str>, algorithm: Algorithm) -> Result<Arc<Key>, Refusal> {
        let named = |key: &&Arc<Key>| id.is_none_or(|id| key.id.as_deref() == Some(id));
        let mut held = self.held();
        match &held {
            Some(held) if held.keys.iter().any(|key| named(&key)) => {
                if held.at.elapsed() > FRESH {
                    drop(self.refresh());
                }
            }
            _ => {
                // It cannot fail but at shutdown, and then the keys are what they were.
                let _ = self.refresh().await;
                held = self.held();
            }
        }
        let held = held.ok_or(Refusal::Unavailable)?;
        let mut fitting = held.keys.iter().filter(named).filter(|key| key.fits(algorithm));
        match (fitting.next(), fitting.next()) {
            (Some(key), None) => Ok(key.clone()),
            (Some(_), Some(_)) => {
                Err(Refusal::Invalid("The token must name its key (kid), since several fit"))
            }
            (None, _) => Err(Refusal::Invalid("The token is not signed with a key of its issuer")),
        }
    }

    fn held(&self) -> Option<Held> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.clone().filter(|held| held.at.elapsed() < KEPT)
    }

    /// Fetches the keys unless that was just tried, in a task of its own: callers who leave must not keep it from
    /// those who wait.
    fn refresh(self: &Arc<Self>) -> JoinHandle<()> {
        let jwks = self.clone();
        tokio::spawn(async move {
            let mut asked = jwks.asked.lock().await;
            let pause = if jwks.held().is_some() { PAUSE } else { PAUSE_WITHOUT_KEYS };
            if asked.is_some_and(|asked| asked.elapsed() < pause) {
                return;
            }
            match jwks.fetch().await {
                Ok(keys) => {
                    let held = Held { keys: keys.into(), at: Instant::now() };
                    *jwks.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
                }
                Err(error) => tracing::warn!(error, "the keys of the token issuer were not fetched"),
            }
            *asked = Some(Instant::now());
        })
    }

    async fn fetch(&self) -> Result<Vec<Arc<Key>>, String> {
        let mut answer = self.client.get(self.url.clone()).send().await.map_err(|error| broken(&error))?;
        if answer.status() != StatusCode::OK {
            return Err(format!("its server answered {}", answer.status().as_u16()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await.map_err(|error| broken(&error))? {
            if body.len() + chunk.len() > MAX_BYTES {
                return Err(format!("its server answered more than {MAX_BYTES} bytes"));
            }
            body.extend_from_slice(&chunk);
        }
        keys(&body)
    }
}

/// Reads a key set. Keys that are not for us, or of a kind that is not known, are passed over.
fn keys(set: &[u8]) -> Result<Vec<Arc<Key>>, String> {
    #[derive(Deserialize)]
    struct Set {
        keys: Vec<Value>,
    }
    let set: Set = serde_json::from_slice(set).map_err(|_| "its server did not answer with a key set")?;
    if set.keys.len() > MAX_KEYS {
        return Err(format!("its server answered more than {MAX_KEYS} keys"));
    }
    let jwks = set.keys.into_iter().filter_map(|key| serde_json::from_value(key).ok());
    Ok(jwks.filter_map(|jwk| Key::new(&jwk)).map(Arc::new).collect())
}

/// Says how a connection failed, without the URL.
fn broken(error: &reqwest::Error) -> String {
    let reason = if error.is_timeout() {
        "its server did not answer in time"
    } else if error.is_connect() {
        "its server cannot be reached"
    } else {
        "the connection to its server broke"
    };
    reason.to_owned()
}

#[cfg(test)]
mod tests {
    use jsonwebtoken::crypto;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn part() -> impl Strategy<Value = String> {
        prop_oneof![
            "[A-Za-z0-9_-]{0,100}", "[A-Za-z0-9_-]{300,700}", "[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]", ".{0,9}"
        ]
    }

    proptest! {
        #[test]
        fn no_key_harms_nor_any_signature_with_it(
            kind in prop::sample::select(&["RSA", "EC", "OKP", "oct", ""]),
            curve in prop::sample::select(&["P-256", "P-384", "P-521", "Ed25519", "Ed448"]),
            exponent in prop_oneof![Just("AQAB".to_owned()), part()],
            (n, x, y) in (part(), part(), part()),
        ) {
            let key = json!({"kty": kind, "crv": curve, "e": exponent, "n": n, "x": x, "y": y, "k": x});
            for key in keys(json!({"keys": [key]}).to_string().as_bytes()).unwrap() {
                for algorithm in &key.algorithms {
                    for signature in ["A".repeat(n.len()), "A".repeat(86), "A".repeat(128), y.clone()] {
                        let signed = crypto::verify(&signature, b"", &key.decoding, *algorithm);
                        prop_assert!(!signed.unwrap_or(false));
                    }
                }
            }
        }

        #[test]
        fn no_answer_harms(answer in prop_oneof![".{0,99}", "\\{\"keys\":.{0,99}\\}"]) {
            let _ = keys(answer.as_bytes());
        }
    }

    #[test]
    fn the_length_of_a_number_is_that_of_its_bits() {
        for (number, length) in
            [(&[][..], 0), (&[0, 0], 0), (&[0, 1], 1), (&[0x80, 0], 16), (&[0, 0x7f, 0], 15)]
        {
            assert_eq!(bits(number), length, "{number:?}");
        }
    }
}
