//! JSON values of callers: what may be kept, and how they are changed.

use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{DeserializeOwned, DeserializeSeed, Error, MapAccess, SeqAccess, Visitor},
};
use serde_json::{Map, Value};

use super::text::{refuse_nul, refuse_nul_in};

/// The deepest nesting of a JSON document that is accepted.
pub const MAX_DEPTH: usize = 32;

/// A JSON object of at most `MAX` bytes of JSON text, without U+0000.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>")]
pub struct JsonObject<const MAX: usize>(Map<String, Value>);

/// What a caller attaches to a session or a turn: at most 16 KiB.
pub type Metadata = JsonObject<{ 16 * 1024 }>;

impl<const MAX: usize> JsonObject<MAX> {
    pub fn as_map(&self) -> &Map<String, Value> {
        &self.0
    }

    /// The object after a merge patch (RFC 7396); fails if it has grown too large.
    pub fn merged(mut self, patch: &Map<String, Value>) -> Result<Self, String> {
        merge(&mut self.0, patch);
        self.0.try_into()
    }

    /// The JSON text that is stored.
    pub fn to_text(&self) -> String {
        Value::Object(self.0.clone()).to_string()
    }
}

impl<const MAX: usize> TryFrom<Map<String, Value>> for JsonObject<MAX> {
    type Error = String;

    fn try_from(map: Map<String, Value>) -> Result<Self, String> {
        map.iter().try_for_each(|(key, value)| refuse_nul(key).and_then(|()| refuse_nul_in(value)))?;
        let object = Self(map);
        if object.to_text().len() > MAX {
            return Err(format!("must be at most {MAX} bytes of JSON"));
        }
        Ok(object)
    }
}

/// Reads what the store holds.
impl<const MAX: usize> TryFrom<String> for JsonObject<MAX> {
    type Error = serde_json::Error;

    fn try_from(text: String) -> Result<Self, serde_json::Error> {
        serde_json::from_str(&text).map(Self)
    }
}

/// A value after a merge patch (RFC 7396).
pub fn merge_value(value: Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else { return patch.clone() };
    let mut merged = if let Value::Object(map) = value { map } else { Map::new() };
    merge(&mut merged, patch);
    Value::Object(merged)
}

/// Applies a merge patch (RFC 7396). Keys keep their order, which libraries for this lose.
fn merge(target: &mut Map<String, Value>, patch: &Map<String, Value>) {
    for (key, value) in patch {
        match value {
            Value::Null => drop(target.shift_remove(key)),
            Value::Object(_) => {
                let nested = target.entry(key.as_str()).or_insert(Value::Null);
                *nested = merge_value(nested.take(), value);
            }
            value => drop(target.insert(key.clone(), value.clone())),
        }
    }
}

/// Why a text was not read.
#[derive(Debug)]
pub enum Unread {
    /// It is no JSON.
    NotJson(serde_json::Error),
    /// It gives a key twice: the path of that.
    Twice(String),
}

/// What is wrong with a key that is given twice.
pub const TWICE: &str = "must be given once";

/// Reads a JSON text in which no object gives a key twice: of two, one reader takes the first and another the last,
/// and what the first has checked is not what the second does.
pub fn parse(json: &[u8]) -> Result<Value, Unread> {
    let mut reader = serde_json::Deserializer::from_slice(json);
    let mut value = || {
        let value = Reader { again: false }.deserialize(&mut reader)?;
        reader.end().map(|()| value)
    };
    value().map_err(|error| if error.is_data() { Unread::Twice(twice(json)) } else { Unread::NotJson(error) })
}

/// The path of the first key that is given twice. Keeping track of it takes as long as reading does.
fn twice(json: &[u8]) -> String {
    let mut track = serde_path_to_error::Track::new();
    let reader = &mut serde_json::Deserializer::from_slice(json);
    let _ = Reader { again: false }.deserialize(serde_path_to_error::Deserializer::new(reader, &mut track));
    track.path().to_string()
}

/// Reads a value, unless its key has been there already.
struct Reader {
    again: bool,
}

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Value, D::Error> {
        if self.again { Err(D::Error::custom(TWICE)) } else { from.deserialize_any(self) }
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(Self { again: false })? {
            list.push(item);
        }
        Ok(list.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(Self { again: map.contains_key(&key) })?;
            map.insert(key, value);
        }
        Ok(map.into())
    }
}

/// Reads a JSON value into `T`; where it does not fit, the field and what to mend.
pub fn read_value<T: DeserializeOwned>(value: Value) -> Result<T, (String, String)> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (path, problem) = (error.path().to_string(), error.inner().to_string());
        // serde names a missing field in its message, not in the path.
        match problem.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`')) {
            Some(field) if path == "." => (field.to_owned(), "is required".to_owned()),
            Some(field) => (format!("{path}.{field}"), "is required".to_owned()),
            None => (path, problem),
        }
    })
}

/// Whether a JSON text nests deeper than [`MAX_DEPTH`], told without building it.
pub fn is_too_deep(json: &[u8]) -> bool {
    is_deeper(json, MAX_DEPTH)
}

/// Whether a JSON text nests deeper than `most`.
pub fn is_deeper(json: &[u8], most: usize) -> bool {
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                if depth > most {
                    return true;
                }
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn metadata(value: Value) -> Result<Metadata, String> {
        serde_json::from_value(value).map_err(|error| error.to_string())
    }

    #[test]
    fn a_merge_patch_sets_replaces_and_removes() {
        let before = metadata(json!({"z": 0, "a": 1, "b": {"c": 2, "d": 3}})).unwrap();
        let patch = json!({"a": null, "b": {"c": null, "e": [4]}, "f": 5, "g": {"h": null, "i": {}}});
        let after = before.merged(patch.as_object().unwrap()).unwrap();
        assert_eq!(after.to_text(), r#"{"z":0,"b":{"d":3,"e":[4]},"f":5,"g":{"i":{}}}"#);
    }

    #[test]
    fn a_patch_may_not_grow_an_object_past_its_limit() {
        let before = metadata(json!({"a": "x".repeat(10_000)})).unwrap();
        let patch = json!({"b": "x".repeat(10_000)});
        assert!(before.merged(patch.as_object().unwrap()).unwrap_err().contains("16384 bytes"));
    }

    #[test]
    fn u_0000_is_refused_wherever_it_stands() {
        for value in
            [json!({"a": "\0"}), json!({"\0": 1}), json!({"a": [{"b": "x\0"}]}), json!({"a": {"\0": 1}})]
        {
            assert!(metadata(value.clone()).unwrap_err().contains("U+0000"), "{value}");
        }
    }

    #[test]
    fn a_key_that_is_given_twice_is_named() {
        for (text, path) in [
            (r#"{"a": 1, "a": 1}"#, "a"),
            (r#"{"a": {"b": [0, {"c": 1, "c": 2}]}}"#, "a.b[1].c"),
            (r#"{"a": 1, "\u0061": 2}"#, "a"),
            (r#"[{"": 1, "b": {}, "": 1, "broken"#, "[0]."),
        ] {
            assert!(matches!(parse(text.as_bytes()), Err(Unread::Twice(found)) if found == path), "{text}");
        }
        for text in [r#"{"a": {"a": 1}, "A": 1}"#, r#"[{"a": 1}, {"a": 1}]"#] {
            assert_eq!(parse(text.as_bytes()).unwrap().to_string(), text.replace(' ', ""));
        }
        for text in ["", "{} {}", "{\"a\": 1", "1e400", "\"\\ud800\"", "\u{feff}{}", "{\"a\": 1,}"] {
            assert!(matches!(parse(text.as_bytes()), Err(Unread::NotJson(_))), "{text}");
        }
    }

    #[test]
    fn depth_counts_brackets_outside_of_strings() {
        let nested = |n: usize| format!("{}{}", "[".repeat(n), "]".repeat(n));
        assert!(!is_too_deep(nested(32).as_bytes()));
        assert!(is_too_deep(nested(33).as_bytes()));
        assert!(!is_too_deep(format!("{:?}", "[".repeat(100)).as_bytes()));
        assert!(is_too_deep(format!("[\"\\\"\", {}]", nested(32)).as_bytes()));
    }
}
