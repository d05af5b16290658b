//! Counts and times every request.

use std::sync::Arc;

use poem::{Endpoint, Request, Response, Result};

use crate::{
    api::Arrival,
    telemetry::metrics::{Counted, METRICS},
};

pub async fn measure<E: Endpoint<Output = Response>>(next: Arc<E>, request: Request) -> Result<Response> {
    let arrival = request.data::<Arrival>().cloned();
    let _in_flight = Counted::new(&METRICS.requests_in_flight);
    let response = next.call(request).await?;
    if let Some(Arrival { received, notes, .. }) = arrival {
        let status = response.status();
        // Paths that are no operation's may be any text.
        let labels = [notes.operation().unwrap_or("none"), status.as_str()];
        METRICS.requests.with_label_values(&labels).observe(received.elapsed().as_secs_f64());
    }
    Ok(response)
}
