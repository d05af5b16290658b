//! What every successful answer is wrapped in.

use poem_openapi::{
    ApiResponse, Object,
    types::{ParseFromJSON, ToJSON},
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
    pub data: T,
    /// When this was answered.
    pub timestamp: Timestamp,
}

#[derive(ApiResponse)]
pub enum Created<T: ParseFromJSON + ToJSON> {
    /// Made.
    #[oai(status = 201)]
    Created(Json<Envelope<T>>),
}

#[derive(ApiResponse)]
pub enum Found<T: ParseFromJSON + ToJSON> {
    /// Done.
    #[oai(status = 200)]
    Found(Json<Envelope<T>>),
}

pub fn created<T: ParseFromJSON + ToJSON>(data: T, timestamp: Timestamp) -> Created<T> {
    Created::Created(Json(Envelope { success: true, data, timestamp }))
}

pub fn found<T: ParseFromJSON + ToJSON>(data: T, timestamp: Timestamp) -> Found<T> {
    Found::Found(Json(Envelope { success: true, data, timestamp }))
}

/// One page of a listing.
#[derive(Object)]
#[oai(rename = "Page")]
pub struct PageView<T: ParseFromJSON + ToJSON> {
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
