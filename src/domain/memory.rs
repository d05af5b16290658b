//! What is known besides the turns themselves.

use serde_json::Value;

/// How the assistant should talk with this user.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BehaviorProfile {
    /// `low`, `medium` or `high`.
    pub verbosity: String,
    /// `casual`, `neutral` or `technical`.
    pub tone: String,
    /// `shallow`, `normal` or `advanced`.
    pub depth: String,
}

/// Something a user has said of themselves.
#[derive(Clone, Debug, PartialEq)]
pub struct Fact {
    pub key: String,
    pub value: Value,
}

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
