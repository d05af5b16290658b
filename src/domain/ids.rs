//! Identifiers, read once at the edge; deeper code cannot hold a bad one.

use std::fmt;

use sha2::{Digest, Sha256};
use uuid::Uuid;

/// 64 bits that nobody can guess, from a generator that the system seeds.
pub fn random_bits() -> i64 {
    let (high, low) = Uuid::new_v4().as_u64_pair();
    // A version 4 UUID fixes six bits; folding the halves hides them.
    (high ^ low.rotate_left(32)).cast_signed()
}

/// 64 bits that stand for `parts`, which are told apart from each other: `["a", "b"]` has others than `["ab"]`.
pub fn digest(parts: &[&str]) -> i64 {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_be_bytes());
        hash.update(part);
    }
    let digest: [u8; 32] = hash.finalize().into();
    let (first, _) = digest.split_at(8);
    first.iter().fold(0, |bits, byte| bits << 8 | i64::from(*byte))
}

/// Names a session: `session_a1b2c3d4e5f67890`. A number inside and in the database, text only at the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, sqlx::Type, serde::Deserialize)]
#[sqlx(transparent)]
#[serde(try_from = "String")]
pub struct SessionId(i64);

impl SessionId {
    pub const PREFIX: &str = "session_";

    pub fn random() -> Self {
        Self(random_bits())
    }

    /// Reads an identifier; `None` if the text is not one, which callers treat as "not found".
    pub fn parse(text: &str) -> Option<Self> {
        parse_hex(text.strip_prefix(Self::PREFIX)?).map(Self)
    }

    /// The id with this number.
    pub fn from_number(number: i64) -> Self {
        Self(number)
    }

    /// The number, for keys of pages and for spreading sessions over lanes.
    pub fn number(self) -> i64 {
        self.0
    }
}

impl serde::Serialize for SessionId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl TryFrom<String> for SessionId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let problem = "must be session_ and 16 hex digits: session_a1b2c3d4e5f67890";
        Self::parse(&text).ok_or_else(|| problem.to_owned())
    }
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:016x}", Self::PREFIX, self.0)
    }
}

/// Reads exactly 16 lowercase hex digits as 64 bits.
pub(super) fn parse_hex(digits: &str) -> Option<i64> {
    let hex = |b: u8| matches!(b, b'0'..=b'9' | b'a'..=b'f');
    if digits.len() != 16 || !digits.bytes().all(hex) {
        return None;
    }
    u64::from_str_radix(digits, 16).ok().map(u64::cast_signed)
}

/// Names a request in answers and logs. Never a key to anything.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::Type, serde::Serialize, serde::Deserialize)]
#[sqlx(transparent)]
#[serde(try_from = "String")]
pub struct RequestId(String);

impl RequestId {
    pub fn random() -> Self {
        Self(format!("req_{:016x}", random_bits()))
    }

    /// Takes a client's own name for its request: 1–128 characters of `A–Z a–z 0–9 . _ : -`.
    pub fn parse(text: &str) -> Option<Self> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._:-".contains(&b);
        ((1..=128).contains(&text.len()) && text.bytes().all(allowed)).then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for RequestId {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let problem = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : -";
        Self::parse(&text).ok_or_else(|| problem.to_owned())
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_random_id_reads_back() {
        let id = SessionId::random();
        assert_eq!(SessionId::parse(&id.to_string()), Some(id));
    }

    #[test]
    fn every_pattern_of_bits_is_sixteen_digits() {
        for bits in [0, 1, -1, i64::MIN, i64::MAX] {
            assert_eq!(SessionId::parse(&SessionId(bits).to_string()), Some(SessionId(bits)));
        }
    }

    #[test]
    fn other_text_is_not_an_id() {
        let wrong = [
            "", "session_", "session_A1b2c3d4e5f67890", "session_a1b2c3d4e5f6789",
            "session_a1b2c3d4e5f678900", "session_+1b2c3d4e5f67890", "key_a1b2c3d4e5f67890",
        ];
        for text in wrong {
            assert_eq!(SessionId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn a_request_id_is_taken_only_in_its_own_alphabet() {
        assert!(RequestId::parse("a.B_9:-").is_some());
        let long = "x".repeat(129);
        for text in ["", "a b", "ä", "a\r\nb", long.as_str()] {
            assert_eq!(RequestId::parse(text), None, "{text}");
        }
    }
}
