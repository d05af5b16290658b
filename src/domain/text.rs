//! Text with limits: read once, then known to fit.

use serde_json::Value;

/// Declares a text of `$min` to `$max` Unicode scalar values without U+0000, which Postgres cannot keep.
macro_rules! text {
    ($(#[$doc:meta])* $name:ident, $min:literal..=$max:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, Hash, sqlx::Type, serde::Serialize, serde::Deserialize)]
        #[sqlx(transparent)]
        #[serde(try_from = "String")]
        pub struct $name(String);

        impl $name {
            /// The fewest characters.
            pub const MIN: usize = $min;
            /// The most characters (Unicode scalar values).
            pub const MAX: usize = $max;

            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = String;

            /// Fails with a sentence on what to mend.
            fn try_from(text: String) -> Result<Self, String> {
                $crate::domain::text::check(&text, Self::MIN, Self::MAX).map(|()| Self(text))
            }
        }
    };
}
pub(super) use text;

/// Says what is wrong with a text of `min` to `max` characters, if anything.
pub(super) fn check(text: &str, min: usize, max: usize) -> Result<(), String> {
    refuse_nul(text)?;
    // Counting up to one past the limit keeps a long text from being walked whole.
    let length = text.chars().take(max + 1).count();
    if (min..=max).contains(&length) {
        return Ok(());
    }
    Err(match min {
        0 => format!("must be at most {max} characters long"),
        _ => format!("must be {min} to {max} characters long"),
    })
}

/// Says that a text holds U+0000, if it does.
pub fn refuse_nul(text: &str) -> Result<(), String> {
    if text.contains('\0') { Err("must not contain the character U+0000".to_owned()) } else { Ok(()) }
}

/// Says that a text somewhere in a JSON value holds U+0000, if one does.
pub fn refuse_nul_in(value: &Value) -> Result<(), String> {
    match value {
        Value::String(text) => refuse_nul(text),
        Value::Array(items) => items.iter().try_for_each(refuse_nul_in),
        Value::Object(map) => {
            map.iter().try_for_each(|(key, value)| refuse_nul(key).and_then(|()| refuse_nul_in(value)))
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(()),
    }
}
