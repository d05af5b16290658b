//! Counts and times every request.

use poem::Response;

use crate::{api::Arrival, telemetry::metrics::METRICS};

pub fn count(Arrival { received, notes, .. }: &Arrival, response: &Response) {
    let status = response.status();
    // Paths that are no operation's may be any text.
    let labels = [notes.operation().unwrap_or("none"), status.as_str()];
    METRICS.requests.with_label_values(&labels).observe(received.elapsed().as_secs_f64());
}
