//! What is known besides the turns themselves.

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
    pub value: serde_json::Value,
}
