//! One line for every answer: what was asked and how it went, never what was said.

use poem::{Response, http::Method};

use crate::api::Arrival;

/// The path is without its query, which may hold names of users.
pub fn write(
    (method, path): (&Method, &str),
    Arrival { received, notes, .. }: &Arrival,
    response: &Response,
) {
    let (status, duration_ms) =
        (response.status().as_u16(), (received.elapsed().as_secs_f64() * 1e6).round() / 1e3);
    let (operation, key) = (notes.operation(), notes.key());
    tracing::info!(%method, path, operation, status, duration_ms, key, "answered");
}
