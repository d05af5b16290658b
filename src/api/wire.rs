//! How our words look in JSON, in parameters and in the OpenAPI document.
//!
//! Requests are read by serde, which knows the path of what does not fit; poem-openapi describes the same types
//! in the document and writes answers. The schemas are inline: a described field that refers to a component
//! becomes an `allOf` that several client generators drop.

use std::{borrow::Cow, str::FromStr};

use poem_openapi::{
    registry::{MetaSchema, MetaSchemaRef},
    types::{ParseError, ParseFromJSON, ParseFromParameter, ParseResult, ToJSON, Type},
};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Map, Value, json};

use super::{error::ApiError, users::Facts};
use crate::domain::{
    clock::Timestamp,
    ids::{RequestId, SessionId},
    json::{self, JsonObject, Metadata, TWICE, Unread, is_too_deep},
    key::{KeyId, KeyName, Scope},
    memory::WorkingMemory,
    page::{Direction, Listing, Position},
    prompt::Role,
    session::{SystemPrompt, Title, TtlSeconds, UserId},
    text::refuse_nul,
    turn::TurnStatus,
};

/// A type with a schema of its own.
trait Wire {
    fn schema() -> MetaSchema;
}

/// Ties a [`Wire`] type to poem-openapi: read by serde, written by `$write`.
macro_rules! wire {
    ($type:ty, $name:literal, $schema:expr, $write:expr) => {
        impl Wire for $type {
            fn schema() -> MetaSchema {
                $schema
            }
        }
        impl Type for $type {
            const IS_REQUIRED: bool = true;
            type RawValueType = Self;
            type RawElementValueType = Self;
            fn name() -> Cow<'static, str> {
                Cow::Borrowed($name)
            }
            fn schema_ref() -> MetaSchemaRef {
                MetaSchemaRef::Inline(Box::new(Self::schema()))
            }
            fn as_raw_value(&self) -> Option<&Self> {
                Some(self)
            }
            fn raw_element_iter<'a>(&'a self) -> Box<dyn Iterator<Item = &'a Self> + 'a> {
                Box::new(self.as_raw_value().into_iter())
            }
        }
        impl ToJSON for $type {
            fn to_json(&self) -> Option<Value> {
                let write: fn(&Self) -> Value = $write;
                Some(write(self))
            }
        }
    };
}

/// Reads a type from JSON as serde does.
macro_rules! read_json {
    ($($type:ty),*) => {$(
        impl ParseFromJSON for $type {
            fn parse_from_json(value: Option<Value>) -> ParseResult<Self> {
                from_json(value.unwrap_or_default())
            }
        }
    )*};
}

/// For answers only: poem-openapi asks for a reader of whatever stands in an object.
macro_rules! only_written {
    ($($type:ty),*) => {$(
        impl ParseFromJSON for $type {
            fn parse_from_json(_: Option<Value>) -> ParseResult<Self> {
                Err(ParseError::custom("is read-only"))
            }
        }
    )*};
}

/// Reads a type from the text of a parameter.
macro_rules! read_parameter {
    ($($type:ty: $read:expr),* $(,)?) => {$(
        impl ParseFromParameter for $type {
            fn parse_from_parameter(text: &str) -> ParseResult<Self> {
                let read: fn(&str) -> Result<Self, String> = $read;
                read(text).map_err(ParseError::custom)
            }

            // Of several, another reader may take another.
            fn parse_from_parameters<I: IntoIterator<Item = A>, A: AsRef<str>>(texts: I) -> ParseResult<Self> {
                let mut texts = texts.into_iter();
                match (texts.next(), texts.next()) {
                    (Some(text), None) => Self::parse_from_parameter(text.as_ref()),
                    (None, _) => Err(ParseError::expected_input()),
                    (_, Some(_)) => Err(ParseError::custom(TWICE)),
                }
            }
        }
    )*};
}

fn from_json<T: Type + DeserializeOwned>(value: Value) -> ParseResult<T> {
    serde_json::from_value(value).map_err(ParseError::custom)
}

/// Reads a number that is written in nothing but digits.
pub(super) fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.parse().ok().filter(|_| text.bytes().all(|byte| byte.is_ascii_digit()))
}

fn text(min: usize, max: usize, example: &str) -> MetaSchema {
    MetaSchema {
        min_length: (min > 0).then_some(min),
        max_length: Some(max),
        example: Some(example.into()),
        ..MetaSchema::new("string")
    }
}

fn integer(min: i32, max: Option<i32>) -> MetaSchema {
    MetaSchema {
        minimum: Some(min.into()),
        maximum: max.map(Into::into),
        ..MetaSchema::new_with_format("integer", "int64")
    }
}

fn matching(pattern: &str, example: &str) -> MetaSchema {
    MetaSchema {
        pattern: Some(pattern.to_owned()),
        example: Some(example.into()),
        ..MetaSchema::new("string")
    }
}

fn object(example: Value) -> MetaSchema {
    let any = MetaSchemaRef::Inline(Box::new(MetaSchema::ANY));
    MetaSchema {
        additional_properties: Some(Box::new(any)),
        example: Some(example),
        ..MetaSchema::new("object")
    }
}

wire!(UserId, "UserId", text(Self::MIN, Self::MAX, "user_123"), |user| { user.as_str().into() });
wire!(Title, "Title", text(Self::MIN, Self::MAX, "Trip to Lisbon"), |title| title.as_str().into());
wire!(
    SystemPrompt,
    "SystemPrompt",
    text(Self::MIN, Self::MAX, "You are a patient travel agent."),
    |prompt| prompt.as_str().into()
);
wire!(
    TtlSeconds,
    "TtlSeconds",
    MetaSchema { example: Some(json!(86_400)), ..integer(60, Some(31_536_000)) },
    |ttl| ttl.seconds().into()
);
wire!(Metadata, "Metadata", object(json!({"source": "web"})), |metadata| metadata.as_map().clone().into());
wire!(WorkingMemory, "WorkingMemory", object(json!({"step": 2})), |memory| memory.as_map().clone().into());
wire!(Facts, "Facts", object(json!({"name": "John", "age": null})), |facts| facts.as_map().clone().into());
read_json!(UserId, Title, SystemPrompt, TtlSeconds, Metadata, WorkingMemory, Facts);
read_parameter!(UserId: |text| text.to_owned().try_into(), SessionId: |text| text.to_owned().try_into());

wire!(
    Timestamp,
    "Timestamp",
    MetaSchema {
        example: Some("2024-01-01T12:00:00.000Z".into()),
        ..MetaSchema::new_with_format("string", "date-time")
    },
    |time| time.to_string().into()
);
wire!(SessionId, "SessionId", matching("^session_[0-9a-f]{16}$", "session_a1b2c3d4e5f67890"), |id| id
    .to_string()
    .into());
wire!(RequestId, "RequestId", text(1, 128, "req_0f1e2d3c4b5a6978"), |id| id.as_str().into());
wire!(KeyId, "KeyId", matching("^key_[0-9a-f]{16}$", "key_a1b2c3d4e5f67890"), |id| id.to_string().into());
wire!(
    KeyName,
    "KeyName",
    MetaSchema { pattern: Some(r"\S".to_owned()), ..text(1, 100, "web shop") },
    |name| name.as_str().into()
);
wire!(
    Scope,
    "Scope",
    MetaSchema {
        enum_items: Scope::ALL.iter().map(|scope| scope.name().into()).collect(),
        ..MetaSchema::new("string")
    },
    |scope| scope.name().into()
);
read_json!(KeyName, Scope);
only_written!(RequestId, SessionId, KeyId);
read_json!(Timestamp);
read_parameter!(Timestamp: |text| text.to_owned().try_into());

wire!(
    TurnStatus,
    "TurnStatus",
    MetaSchema {
        enum_items: Self::ALL.iter().map(|status| status.as_str().into()).collect(),
        example: Some("completed".into()),
        ..MetaSchema::new("string")
    },
    |status| status.as_str().into()
);
only_written!(TurnStatus);
read_parameter!(TurnStatus: |text| {
    let known = Self::ALL.into_iter().find(|status| status.as_str() == text);
    known.ok_or_else(|| format!("must be one of {}", Self::ALL.map(Self::as_str).join(", ")))
});

const ROLES: [Role; 3] = [Role::System, Role::User, Role::Assistant];

wire!(
    Role,
    "Role",
    MetaSchema {
        enum_items: ROLES.iter().map(|role| role.as_str().into()).collect(),
        ..MetaSchema::new("string")
    },
    |role| role.as_str().into()
);
only_written!(Role);

/// A message as it is sent: any text without U+0000. How long it may be is a setting, and that it must not be blank is
/// found out later.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct MessageText(pub String);

impl TryFrom<String> for MessageText {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        refuse_nul(&text).map(|()| Self(text))
    }
}

wire!(
    MessageText,
    "MessageText",
    MetaSchema { min_length: Some(1), ..matching("\\S", "What's my name?") },
    |message| message.0.as_str().into()
);

/// A message that might be sent: any text without U+0000, also none.
#[derive(Clone, Debug)]
pub struct DraftText(pub String);

wire!(
    DraftText,
    "DraftText",
    MetaSchema { example: Some("What's my name?".into()), ..MetaSchema::new("string") },
    |draft| draft.0.as_str().into()
);
read_parameter!(DraftText: |text| refuse_nul(text).map(|()| Self(text.to_owned())));

/// What was answered elsewhere: any text without U+0000, also none.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct ResponseText(pub String);

impl TryFrom<String> for ResponseText {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        refuse_nul(&text).map(|()| Self(text))
    }
}

wire!(
    ResponseText,
    "ResponseText",
    MetaSchema { example: Some("Your name is John.".into()), ..MetaSchema::new("string") },
    |response| response.0.as_str().into()
);

/// What is searched for: any text of 1 to 1,000 characters.
#[derive(Clone, Debug)]
pub struct SearchText(pub String);

wire!(SearchText, "SearchText", text(1, 1000, "\"budget meeting\" friday"), |text| text.0.as_str().into());
read_parameter!(SearchText: |text| match text.chars().take(1001).count() {
    1..=1000 => refuse_nul(text).map(|()| Self(text.to_owned())),
    _ => Err("must be 1 to 1000 characters long".to_owned()),
});

/// A budget of tokens.
#[derive(Clone, Copy, Debug)]
pub struct TokenBudget(pub i64);

impl TokenBudget {
    const MAX: i32 = 1_000_000;
}

wire!(
    TokenBudget,
    "TokenBudget",
    MetaSchema { example: Some(json!(4000)), ..integer(1, Some(Self::MAX)) },
    |budget| budget.0.into()
);
read_parameter!(TokenBudget: |text| {
    let budget = digits(text).filter(|budget| (1..=i64::from(Self::MAX)).contains(budget));
    budget.map(Self).ok_or_else(|| format!("must be a number from 1 to {}", Self::MAX))
});

/// The name of a model.
#[derive(Clone, Debug, Deserialize)]
#[serde(try_from = "String")]
pub struct ModelName(pub String);

impl TryFrom<String> for ModelName {
    type Error = String;
    fn try_from(name: String) -> Result<Self, String> {
        refuse_nul(&name)?;
        match name.chars().nth(200) {
            None if !name.is_empty() => Ok(Self(name)),
            _ => Err("must be 1 to 200 characters long".to_owned()),
        }
    }
}

wire!(ModelName, "ModelName", text(1, 200, "gpt-4o-mini"), |name| name.0.as_str().into());

/// How freely the model chooses its words.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "f64")]
pub struct Temperature(pub f64);

impl TryFrom<f64> for Temperature {
    type Error = String;
    fn try_from(temperature: f64) -> Result<Self, String> {
        let fits = (0.0..=2.0).contains(&temperature);
        if fits { Ok(Self(temperature)) } else { Err("must be 0 to 2".to_owned()) }
    }
}

wire!(
    Temperature,
    "Temperature",
    MetaSchema {
        minimum: Some(0.0),
        maximum: Some(2.0),
        example: Some(json!(0.7)),
        ..MetaSchema::new_with_format("number", "double")
    },
    |temperature| temperature.0.into()
);

/// The longest reply, in tokens.
#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(try_from = "i64")]
pub struct MaxTokens(pub u32);

impl MaxTokens {
    const MAX: i32 = 1_000_000;
}

impl TryFrom<i64> for MaxTokens {
    type Error = String;
    fn try_from(tokens: i64) -> Result<Self, String> {
        let fits = (1..=i64::from(Self::MAX)).contains(&tokens);
        let tokens = u32::try_from(tokens).ok().filter(|_| fits);
        tokens.map(Self).ok_or_else(|| format!("must be 1 to {}", Self::MAX))
    }
}

wire!(
    MaxTokens,
    "MaxTokens",
    MetaSchema { example: Some(json!(500)), ..integer(1, Some(Self::MAX)) },
    |tokens| tokens.0.into()
);
read_json!(MessageText, ResponseText, ModelName, Temperature, MaxTokens);

/// A session named in a path. Text that is no id names no session, so reading it never fails.
#[derive(Clone, Debug)]
pub struct SessionRef {
    pub text: String,
    pub id: Option<SessionId>,
}

wire!(SessionRef, "SessionRef", SessionId::schema(), |session| session.text.as_str().into());
read_parameter!(SessionRef: |text| Ok(Self { text: text.to_owned(), id: SessionId::parse(text) }));

/// A key named in a path; see [`SessionRef`].
#[derive(Clone, Debug)]
pub struct KeyRef {
    pub text: String,
    pub id: Option<KeyId>,
}

wire!(KeyRef, "KeyRef", KeyId::schema(), |key| key.text.as_str().into());
read_parameter!(KeyRef: |text| Ok(Self { text: text.to_owned(), id: KeyId::parse(text) }));

/// A turn named in a path; see [`SessionRef`].
#[derive(Clone, Debug)]
pub struct TurnRef {
    pub text: String,
    pub turn: Option<i64>,
}

wire!(TurnRef, "TurnRef", MetaSchema { example: Some(json!(2)), ..integer(1, None) }, |turn| turn
    .text
    .as_str()
    .into());
read_parameter!(TurnRef: |text| Ok(Self { text: text.to_owned(), turn: digits(text) }));

/// How many items a page has at most.
#[derive(Clone, Copy, Debug)]
pub struct Limit(pub usize);

impl Default for Limit {
    fn default() -> Self {
        Self(20)
    }
}

wire!(Limit, "Limit", MetaSchema { example: Some(json!(50)), ..integer(1, Some(100)) }, |limit| limit
    .0
    .into());
read_parameter!(Limit: |text| {
    let limit = digits(text).filter(|limit| (1..=100).contains(limit));
    limit.map(Self).ok_or_else(|| "must be a number from 1 to 100".to_owned())
});

/// Where the last page ended: `next_cursor` of its answer.
#[derive(Clone, Debug)]
pub struct Cursor(String);

impl Cursor {
    /// Where to go on; refuses a cursor that was not issued for this listing.
    pub fn read(cursor: Option<&Self>, listing: Listing) -> Result<Option<Position>, ApiError> {
        let read = |cursor: &Self| Position::parse(&cursor.0, listing).ok_or_else(ApiError::invalid_cursor);
        cursor.map(read).transpose()
    }
}

wire!(Cursor, "Cursor", text(1, 512, "0000000000000001000000000000000018abbf17f0fb0248"), |cursor| cursor
    .0
    .as_str()
    .into());
read_parameter!(Cursor: |text| Ok(Self(text.to_owned())));

wire!(
    Direction,
    "Direction",
    MetaSchema {
        enum_items: vec!["asc".into(), "desc".into()],
        example: Some("asc".into()),
        ..MetaSchema::new("string")
    },
    |direction| match direction {
        Direction::Asc => "asc".into(),
        Direction::Desc => "desc".into(),
    }
);
read_parameter!(Direction: |text| match text {
    "asc" => Ok(Self::Asc),
    "desc" => Ok(Self::Desc),
    _ => Err("must be asc or desc".to_owned()),
});

/// True or false.
#[derive(Clone, Copy, Debug, Default)]
pub struct Flag(pub bool);

wire!(Flag, "Flag", MetaSchema { example: Some(true.into()), ..MetaSchema::new("boolean") }, |flag| flag
    .0
    .into());
read_parameter!(Flag: |text| match text {
    "true" => Ok(Self(true)),
    "false" => Ok(Self(false)),
    _ => Err("must be true or false".to_owned()),
});

/// What sessions are ordered by.
#[derive(Clone, Copy, Debug, Default)]
pub enum Order {
    #[default]
    LastActivity,
    CreatedAt,
}

wire!(
    Order,
    "Order",
    MetaSchema {
        enum_items: vec!["last_activity".into(), "created_at".into()],
        example: Some("created_at".into()),
        ..MetaSchema::new("string")
    },
    |order| match order {
        Order::LastActivity => "last_activity".into(),
        Order::CreatedAt => "created_at".into(),
    }
);
read_parameter!(Order: |text| match text {
    "last_activity" => Ok(Self::LastActivity),
    "created_at" => Ok(Self::CreatedAt),
    _ => Err("must be last_activity or created_at".to_owned()),
});

/// Top-level keys of metadata that must all be equal, as a JSON object.
#[derive(Clone, Debug, Default)]
pub struct MetadataFilter(pub Map<String, Value>);

wire!(
    MetadataFilter,
    "MetadataFilter",
    MetaSchema {
        max_length: Some(1024),
        example: Some(r#"{"source": "web"}"#.into()),
        ..MetaSchema::new("string")
    },
    |filter| Value::Object(filter.0.clone()).to_string().into()
);
read_parameter!(MetadataFilter: |text| {
    if is_too_deep(text.as_bytes()) {
        return Err("must not nest deeper than 32".to_owned());
    }
    // Every row of the listing is compared with it.
    let object: Result<JsonObject<1024>, String> = match json::parse(text.as_bytes()) {
        Ok(Value::Object(map)) => map.try_into(),
        Err(Unread::Twice(key)) => return Err(format!("{key} {TWICE}")),
        _ => Err(String::new()),
    };
    let object = object.map_err(|_| "must be a JSON object of at most 1024 bytes".to_owned())?;
    match object.as_map().len() {
        0..=16 => Ok(Self(object.as_map().clone())),
        _ => Err("must have at most 16 keys".to_owned()),
    }
});

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_limits_are_those_that_hold() {
        let ttl = TtlSeconds::schema();
        assert_eq!((ttl.minimum, ttl.maximum), (Some(60.0), Some(31_536_000.0)));
        assert_eq!((TtlSeconds::MIN, TtlSeconds::MAX), (60, 31_536_000));
        assert!(Limit::parse_from_parameter("100").is_ok());
        for text in ["0", "101", "-1", "", "ten", "1.5"] {
            assert!(Limit::parse_from_parameter(text).is_err(), "{text}");
        }
    }
}
