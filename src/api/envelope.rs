//! What every successful answer is wrapped in.

use std::marker::PhantomData;

use poem::{IntoResponse, Response, http::StatusCode};
use poem_openapi::{
    ApiResponse, Object,
    payload::Payload,
    registry::{MetaHeader, MetaMediaType, MetaResponse, MetaResponses, MetaSchema, MetaSchemaRef, Registry},
    types::{ParseFromJSON, ToJSON, Type},
};

use super::json::Json;
use crate::domain::{
    clock::Timestamp,
    page::{Listing, Page},
};

/// A successful answer.
#[derive(Object)]
pub struct Envelope<T: ParseFromJSON + ToJSON> {
    /// Always true.
    pub success: bool,
    /// What was asked for.
    pub data: T,
    /// When this was answered.
    pub timestamp: Timestamp,
}

#[derive(ApiResponse)]
pub enum Found<T: ParseFromJSON + ToJSON> {
    /// Done.
    #[oai(status = 200)]
    Found(Json<Envelope<T>>),
}

pub fn found<T: ParseFromJSON + ToJSON>(data: T, timestamp: Timestamp) -> Found<T> {
    Found::Found(Json(Envelope { success: true, data, timestamp }))
}

#[derive(ApiResponse)]
pub enum Created<T: ParseFromJSON + ToJSON> {
    /// Made.
    #[oai(status = 201)]
    Created(Json<Envelope<T>>),
}

pub fn created<T: ParseFromJSON + ToJSON>(data: T, timestamp: Timestamp) -> Created<T> {
    Created::Created(Json(Envelope { success: true, data, timestamp }))
}

/// An answer with the tag of the state that it shows.
#[derive(ApiResponse)]
pub enum Tagged<T: ParseFromJSON + ToJSON> {
    /// Done.
    #[oai(status = 200)]
    Found(
        Json<Envelope<T>>,
        /// Names this state, for `If-Match`.
        #[oai(header = "ETag")]
        String,
    ),
}

pub fn tagged<T: ParseFromJSON + ToJSON>(data: T, etag: String, timestamp: Timestamp) -> Tagged<T> {
    Tagged::Found(Json(Envelope { success: true, data, timestamp }), etag)
}

/// An answer that an idempotency key remembers: its `data` is the same text each time.
pub struct Kept<const STATUS: u16, T> {
    data: String,
    replayed: bool,
    timestamp: Timestamp,
    of: PhantomData<T>,
}

impl<const STATUS: u16, T> Kept<STATUS, T> {
    /// `data` is JSON.
    pub fn new(data: String, replayed: bool, timestamp: Timestamp) -> Self {
        Self { data, replayed, timestamp, of: PhantomData }
    }
}

impl<const STATUS: u16, T: Send> IntoResponse for Kept<STATUS, T> {
    fn into_response(self) -> Response {
        let Self { data, replayed, timestamp, .. } = self;
        let mut response = Response::builder()
            .status(StatusCode::from_u16(STATUS).unwrap_or_default())
            // Of whatever type, the media type is the same.
            .content_type(<Json<bool> as Payload>::CONTENT_TYPE);
        if replayed {
            response = response.header(REPLAYED, "true");
        }
        response.body(format!(r#"{{"success":true,"data":{data},"timestamp":"{timestamp}"}}"#))
    }
}

/// Says that an answer was remembered.
pub const REPLAYED: &str = "Idempotency-Replayed";

/// The same, for the document.
pub fn replayed() -> MetaHeader {
    MetaHeader {
        name: REPLAYED.to_owned(),
        description: Some("`true` where this is the first answer again.".to_owned()),
        required: false,
        deprecated: false,
        schema: MetaSchemaRef::Inline(Box::new(MetaSchema::new("string"))),
    }
}

impl<const STATUS: u16, T: ParseFromJSON + ToJSON> ApiResponse for Kept<STATUS, T> {
    fn meta() -> MetaResponses {
        let content = MetaMediaType {
            content_type: <Json<T> as Payload>::CONTENT_TYPE,
            schema: Envelope::<T>::schema_ref(),
        };
        MetaResponses {
            responses: vec![MetaResponse {
                description: "Done; with an `Idempotency-Key` that was used before, the first answer again.",
                status: Some(STATUS),
                status_range: None,
                content: vec![content],
                headers: vec![replayed()],
            }],
        }
    }

    fn register(registry: &mut Registry) {
        Envelope::<T>::register(registry);
    }
}

/// One page of a listing.
#[derive(Object)]
#[oai(rename = "Page")]
pub struct PageView<T: ParseFromJSON + ToJSON> {
    /// As many as `limit` at most, in order.
    pub items: Vec<T>,
    /// Send this as `cursor` to get the next page; null on the last one.
    #[oai(nullable)]
    pub next_cursor: Option<String>,
}

impl<T: ParseFromJSON + ToJSON> PageView<T> {
    pub fn of<R: Into<T>>(page: Page<R>, listing: Listing) -> Self {
        let next_cursor = page.next.map(|position| position.cursor(listing));
        Self { items: page.items.into_iter().map(Into::into).collect(), next_cursor }
    }
}
