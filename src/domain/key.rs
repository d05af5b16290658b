//! Keys: what they are made of, what they allow, and the names of those they belong to.

use std::fmt;

use secrecy::{ExposeSecret, SecretString};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    caller::TenantId,
    clock::Timestamp,
    ids::{parse_hex, random_bits},
    session::UserId,
};

/// Names a key: `key_a1b2c3d4e5f67890`. Not a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type)]
#[sqlx(transparent)]
pub struct KeyId(i64);

impl KeyId {
    pub const PREFIX: &str = "key_";

    pub fn random() -> Self {
        Self(random_bits())
    }

    /// Reads an identifier; `None` if the text is not one, which callers treat as "not found".
    pub fn parse(text: &str) -> Option<Self> {
        parse_hex(text.strip_prefix(Self::PREFIX)?).map(Self)
    }

    pub fn number(self) -> i64 {
        self.0
    }
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:016x}", Self::PREFIX, self.0)
    }
}

/// One thing that a key may allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Every GET but those on keys.
    Read,
    /// Every other call on sessions, chat, turns, memory and archives.
    Write,
    /// Keys, and erasing users.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Admin => "admin",
        }
    }

    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// What a key allows. None implies another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    pub const ALL: Self = Self(0b111);
    /// What a key allows of which nothing else was said.
    pub const USUAL: Self = Self(0b011);

    /// Reads names with commas or spaces between; fails with the first that names no scope.
    pub fn parse(text: &str) -> Result<Self, String> {
        let names = text.split([',', ' ']).filter(|name| !name.is_empty());
        names.map(|name| Self::named(name).ok_or_else(|| name.to_owned())).collect()
    }

    /// The scope of this name.
    pub fn named(name: &str) -> Option<Self> {
        Scope::ALL.into_iter().find(|scope| scope.name() == name).map(Self::from)
    }

    pub fn allow(self, scope: Scope) -> bool {
        self.0 & scope.bit() != 0
    }

    pub fn is_within(self, wider: Self) -> bool {
        self.0 & !wider.0 == 0
    }

    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    #[must_use]
    pub fn without(self, scope: Scope) -> Self {
        Self(self.0 & !scope.bit())
    }

    pub fn list(self) -> Vec<Scope> {
        Scope::ALL.into_iter().filter(|scope| self.allow(*scope)).collect()
    }
}

impl From<Scope> for Scopes {
    fn from(scope: Scope) -> Self {
        Self(scope.bit())
    }
}

impl FromIterator<Self> for Scopes {
    fn from_iter<I: IntoIterator<Item = Self>>(scopes: I) -> Self {
        scopes.into_iter().fold(Self::default(), |all, scopes| Self(all.0 | scopes.0))
    }
}

impl fmt::Display for Scopes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.list().into_iter().map(Scope::name).collect();
        f.write_str(&names.join(","))
    }
}

/// For the database.
impl TryFrom<String> for Scopes {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).map_err(|name| format!("no scope is called {name:?}"))
    }
}

/// What a caller shows: `atlus_`, 192 random bits and a checksum, in 56 hex digits. Whoever scans texts for lost secrets
/// finds it by its prefix and knows it by its checksum.
#[derive(Clone, Debug)]
pub struct Secret(SecretString);

/// What is kept of a secret: it is random enough that no slow hash is needed.
pub type SecretHash = [u8; 32];

impl Secret {
    pub const PREFIX: &str = "atlus_";
    const RANDOM_DIGITS: usize = 48;

    /// From a generator that the system seeds and that is fit for secrets.
    pub fn random() -> Self {
        // 96 bits of each, and none of those that a version 4 UUID fixes.
        let part = || {
            let (high, low) = Uuid::new_v4().as_u64_pair();
            format!("{:012x}{:012x}", high >> 16, low & 0xffff_ffff_ffff)
        };
        let digits = part() + &part();
        let checksum = checksum(&digits);
        Self(format!("{}{digits}{checksum}", Self::PREFIX).into())
    }

    /// Reads a secret; `None` if the text cannot be one, which can be told without a database.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix(Self::PREFIX)?;
        let (random, rest) = digits.split_at_checked(Self::RANDOM_DIGITS)?;
        let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
        (random.bytes().all(hex) && rest == checksum(random)).then(|| Self(text.into()))
    }

    pub fn hash(&self) -> SecretHash {
        Sha256::digest(self.0.expose_secret()).into()
    }

    /// The text itself, to be shown once.
    pub fn reveal(&self) -> &str {
        self.0.expose_secret()
    }
}

/// The first 32 bits of the digits' SHA-256, in hex.
fn checksum(digits: &str) -> String {
    let [a, b, c, d, ..] = <[u8; 32]>::from(Sha256::digest(digits));
    format!("{:08x}", u32::from_be_bytes([a, b, c, d]))
}

/// A key as it is kept, without its secret.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct ApiKey {
    #[sqlx(rename = "key_id")]
    pub id: KeyId,
    #[sqlx(rename = "tenant_id")]
    pub tenant: TenantId,
    pub tenant_name: String,
    pub name: String,
    #[sqlx(try_from = "String")]
    pub scopes: Scopes,
    /// The only user it speaks for, if it is bound to one.
    pub user_id: Option<UserId>,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    /// To the minute, about.
    pub last_used_at: Option<Timestamp>,
}

impl ApiKey {
    /// A key of the tenant `default` until it is said whose else, bound to nobody and without an end.
    pub fn new(tenant: TenantId, name: KeyName, scopes: Scopes, now: Timestamp) -> Self {
        Self {
            id: KeyId::random(),
            tenant,
            tenant_name: TenantName::default().0,
            name: name.0,
            scopes,
            user_id: None,
            created_at: now,
            expires_at: None,
            last_used_at: None,
        }
    }
}

/// What to call a key: 1 to 100 characters.
#[derive(Clone, Debug, PartialEq, Eq, serde::Deserialize)]
#[serde(try_from = "String")]
pub struct KeyName(String);

impl KeyName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for KeyName {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let text = text.trim();
        let fits = (1..=100).contains(&text.chars().count()) && !text.contains('\0');
        fits.then(|| Self(text.to_owned()))
            .ok_or_else(|| "must be 1 to 100 characters without U+0000".to_owned())
    }
}

/// What a tenant is called: 1 to 64 of `A–Z a–z 0–9 . _ -`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TenantName(String);

impl TenantName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for TenantName {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl std::str::FromStr for TenantName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let fits = (1..=64).contains(&text.len()) && text.bytes().all(allowed);
        fits.then(|| Self(text.to_owned()))
            .ok_or_else(|| "must be 1 to 64 characters of A-Z a-z 0-9 . _ -".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_reads_back_and_one_wrong_digit_is_noticed() {
        let secret = Secret::random();
        assert_eq!(Secret::parse(secret.reveal()).unwrap().hash(), secret.hash());
        for place in Secret::PREFIX.len()..secret.reveal().len() {
            let mut text: Vec<char> = secret.reveal().chars().collect();
            text[place] = if text[place] == '0' { '1' } else { '0' };
            assert!(Secret::parse(&text.into_iter().collect::<String>()).is_none(), "digit {place}");
        }
    }

    #[test]
    fn other_text_is_no_secret() {
        let long = format!("{}0", Secret::random().reveal());
        let upper = Secret::random().reveal().to_uppercase();
        for text in ["", "atlus_", "atlus_é", long.as_str(), upper.as_str(), &"ü".repeat(56)] {
            assert!(Secret::parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn a_secret_does_not_show_itself() {
        let secret = Secret::random();
        assert!(!format!("{secret:?}").contains(&secret.reveal()[6..]));
    }

    #[test]
    fn scopes_read_back_and_know_which_is_wider() {
        for text in ["read", "read,write", "read,write,admin", "admin"] {
            assert_eq!(Scopes::parse(text).unwrap().to_string(), text);
        }
        assert_eq!(Scopes::parse("read write").unwrap(), Scopes::USUAL);
        assert_eq!(Scopes::parse("read,root"), Err("root".to_owned()));
        assert!(Scopes::USUAL.is_within(Scopes::ALL) && !Scopes::ALL.is_within(Scopes::USUAL));
    }
}
