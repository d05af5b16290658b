//! Request headers that change what a request does. They are read as bytes: what a stock reader cannot decode would
//! silently count as absent.

use poem::{Request, RequestBody, Result};
use poem_openapi::{
    ApiExtractor, ApiExtractorType, ExtractParamOptions,
    registry::{MetaParamIn, MetaSchema, MetaSchemaRef},
};

use super::{error::ApiError, idempotency, wire::digits};
use crate::domain::session::IfMatch;

/// The `Idempotency-Key` of a request.
pub struct KeyHeader(pub Option<String>);

/// The `If-Match` of a request.
pub struct IfMatchHeader(pub Option<IfMatch>);

/// The `Last-Event-ID` of a request: how many bytes of a reply the client has.
pub struct LastEventId(pub Option<usize>);

macro_rules! header_parameter {
    ($type:ident, $name:literal, $schema:expr, $read:expr) => {
        impl<'a> ApiExtractor<'a> for $type {
            const TYPES: &'static [ApiExtractorType] = &[ApiExtractorType::Parameter];
            // Described as text whatever they are; a default would be given as such.
            type ParamType = String;
            type ParamRawType = String;

            fn param_in() -> Option<MetaParamIn> {
                Some(MetaParamIn::Header)
            }

            fn param_schema_ref() -> Option<MetaSchemaRef> {
                Some(MetaSchemaRef::Inline(Box::new($schema)))
            }

            async fn from_request(
                request: &'a Request,
                _: &mut RequestBody,
                _: ExtractParamOptions<String>,
            ) -> Result<Self> {
                let mut values = request.headers().get_all($name).iter();
                let Some(value) = values.next() else { return Ok(Self(None)) };
                if values.next().is_some() {
                    return Err(ApiError::field($name, "must be given once").into());
                }
                let read: fn(&[u8]) -> Result<_, ApiError> = $read;
                Ok(Self(Some(read(value.as_bytes())?)))
            }
        }
    };
}

header_parameter!(
    KeyHeader,
    "Idempotency-Key",
    MetaSchema {
        min_length: Some(1),
        max_length: Some(255),
        pattern: Some("^[ -~]+$".to_owned()),
        example: Some("8c1f7d0e-order-17".into()),
        ..MetaSchema::new("string")
    },
    idempotency::parse
);

header_parameter!(
    IfMatchHeader,
    "If-Match",
    MetaSchema {
        min_length: Some(1),
        pattern: Some("^[ -~]*[!-~][ -~]*$".to_owned()),
        example: Some("\"5b1e0d2c4a6f8e70\"".into()),
        ..MetaSchema::new("string")
    },
    |value| {
        let printable = value.iter().all(|byte| (b' '..=b'~').contains(byte));
        match std::str::from_utf8(value) {
            Ok(tags) if printable && !tags.trim().is_empty() => Ok(IfMatch::new(tags)),
            _ => Err(ApiError::field("If-Match", "must be * or a list of ETags")),
        }
    }
);

header_parameter!(
    LastEventId,
    "Last-Event-ID",
    MetaSchema {
        minimum: Some(0.0),
        example: Some(42.into()),
        ..MetaSchema::new_with_format("integer", "int64")
    },
    |value| {
        let offset = std::str::from_utf8(value).ok().and_then(|text| digits(text.trim()));
        offset.ok_or_else(|| ApiError::field("Last-Event-ID", "must be the id of an event of this stream"))
    }
);
