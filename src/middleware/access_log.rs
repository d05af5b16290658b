//! One line for every answer: what was asked and how it went, never what was said.

use std::sync::Arc;

use poem::{Endpoint, Request, Response, Result};

use crate::api::Arrival;

pub async fn access_log<E: Endpoint<Output = Response>>(next: Arc<E>, request: Request) -> Result<Response> {
    let arrival = request.data::<Arrival>().cloned();
    // Without its query, which may hold names of users.
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let response = next.call(request).await?;
    if let Some(Arrival { received, notes, .. }) = arrival {
        let (status, duration_ms) =
            (response.status().as_u16(), (received.elapsed().as_secs_f64() * 1e6).round() / 1e3);
        let (operation, key) = (notes.operation(), notes.key());
        tracing::info!(%method, path, operation, status, duration_ms, key, "answered");
    }
    Ok(response)
}
