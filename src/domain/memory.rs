//! What is known besides the turns themselves.

use serde_json::{Map, Value};

use super::{
    clock::Timestamp,
    ids::SessionId,
    json::{JsonObject, merge_value},
    session::etag,
    text,
};

/// The state of a session's present task: a JSON object of at most 64 KiB.
pub type WorkingMemory = JsonObject<{ 64 * 1024 }>;

/// How the assistant should talk with this user.
#[derive(Clone, Debug, PartialEq, Eq, sqlx::FromRow)]
pub struct BehaviorProfile {
    /// `low`, `medium` or `high`.
    pub verbosity: String,
    /// `casual`, `neutral` or `technical`.
    pub tone: String,
    /// `shallow`, `normal` or `advanced`.
    pub depth: String,
}

/// The turn whose message set each part of the profile; none where it is the default or was set by the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq, sqlx::FromRow, serde::Serialize, serde::Deserialize)]
pub struct ProfileTurns {
    #[sqlx(rename = "verbosity_turn")]
    pub verbosity: Option<i64>,
    #[sqlx(rename = "tone_turn")]
    pub tone: Option<i64>,
    #[sqlx(rename = "depth_turn")]
    pub depth: Option<i64>,
}

/// What to change about a profile; what is absent stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProfileChange {
    pub verbosity: Option<&'static str>,
    pub tone: Option<&'static str>,
    pub depth: Option<&'static str>,
}

/// What a session remembers beside its turns.
#[derive(Clone, Debug, sqlx::FromRow)]
pub struct SessionMemory {
    #[sqlx(flatten)]
    pub profile: BehaviorProfile,
    #[sqlx(flatten)]
    pub profile_turns: ProfileTurns,
    #[sqlx(try_from = "String")]
    pub working_memory: WorkingMemory,
    /// What no longer fits into the context, in short.
    pub summary: Option<String>,
    /// The last turn that the summary covers.
    pub summary_through: Option<i64>,
    #[sqlx(rename = "completed_turns")]
    pub conversation_turns: i64,
}

impl SessionMemory {
    /// Names this state: another state has another tag.
    pub fn etag(&self) -> String {
        etag(self)
    }
}

/// What to change about a session's memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryPatch {
    /// A merge patch (RFC 7396).
    pub working_memory: Option<Map<String, Value>>,
    pub profile: ProfileChange,
}

/// Something a user has said of themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    pub key: String,
    pub value: Value,
}

/// What one message says about its user.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Learnt {
    pub facts: Vec<Fact>,
    pub profile: ProfileChange,
}

impl Learnt {
    pub fn is_empty(&self) -> bool {
        self.facts.is_empty() && self.profile == ProfileChange::default()
    }
}

/// A fact as it is kept.
#[derive(Clone, Debug, PartialEq)]
pub struct KnownFact {
    pub fact: Fact,
    /// The turn that it was learnt from; none if it was stated through the API.
    pub source: Option<(SessionId, i64)>,
    pub updated_at: Timestamp,
}

/// The longest key of a fact, in characters.
pub const MAX_FACT_KEY: usize = 128;
/// The longest value of a fact, in bytes of JSON.
pub const MAX_FACT_VALUE: usize = 4096;
/// The most facts that are kept about one user.
pub const MAX_FACTS: usize = 500;

impl Fact {
    /// The fact as a line of text: "location: Berlin". Of several things under like keys, as in
    /// `preference:pizza`, the value says all by itself: "likes pizza".
    pub fn line(&self) -> String {
        let name = self.key.replace('_', " ");
        match &self.value {
            Value::String(text) if self.key.contains(':') => text.clone(),
            Value::String(text) => format!("{name}: {text}"),
            value => format!("{name}: {value}"),
        }
    }

    /// A fact that fits; fails with what to mend.
    pub fn new(key: String, value: Value) -> Result<Self, String> {
        text::check(&key, 1, MAX_FACT_KEY).map_err(|problem| format!("a key {problem}"))?;
        text::refuse_nul_in(&value)?;
        if value.to_string().len() > MAX_FACT_VALUE {
            return Err(format!("must be at most {MAX_FACT_VALUE} bytes of JSON"));
        }
        Ok(Self { key, value })
    }

    /// The same after a merge patch of its value (RFC 7396).
    pub fn patched(self, patch: &Value) -> Result<Self, String> {
        Self::new(self.key, merge_value(self.value, patch))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_fact_is_one_line() {
        for (key, value, line) in [
            ("name", json!("John"), "name: John"),
            ("favorite_color", json!("blue"), "favorite color: blue"),
            ("preference:green tea", json!("likes Green Tea"), "likes Green Tea"),
            ("preference:count", json!(2), "preference:count: 2"),
            ("age", json!(41), "age: 41"),
            ("address", json!({"city": "Berlin"}), "address: {\"city\":\"Berlin\"}"),
        ] {
            assert_eq!(Fact { key: key.into(), value }.line(), line);
        }
    }
}
