//! What happens to every request, whoever sent it: [`Every`].

mod access_log;
mod cors;
mod headers;
mod limit;
mod measure;
mod observe;
pub mod origin;
mod refuse;
mod request_id;

use std::sync::Arc;

use poem::{Endpoint, IntoResponse, Request, Response, Result};
use tokio::sync::Semaphore;

use crate::{
    api::{Arrival, BodyLimit},
    app::App,
    telemetry::metrics::{Counted, METRICS},
};
use {cors::Asked, observe::Observed, origin::Gate};

/// Routes, with what happens to every request around them.
pub struct Every<E> {
    pub app: Arc<App>,
    pub routes: E,
    pub gate: Gate,
    /// A permit for each request that may be under way.
    pub requests: Arc<Semaphore>,
    pub bodies: BodyLimit,
}

impl<E: Endpoint> Endpoint for Every<E> {
    type Output = Response;

    async fn call(&self, mut request: Request) -> Result<Response> {
        let arrival = request_id::arrive(&mut request);
        let observed = Observed::begin(&request, &arrival);
        // Boxed here and below: what is handed on would else be copied each time, with all that it awaits.
        let mut response = observed.run(Box::pin(self.answer(request, arrival.clone()))).await;
        observed.end(&arrival, &response);
        request_id::name(&mut response, &arrival);
        Ok(response)
    }
}

impl<E: Endpoint> Every<E> {
    /// Answers, be it with a refusal, and tells how it went.
    async fn answer(&self, request: Request, arrival: Arrival) -> Response {
        let _in_flight = Counted::new(&METRICS.requests_in_flight);
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let asked = Asked::by(&request, &self.gate.origins);
        let mut response = refuse::answered(Box::pin(self.route(request)), &arrival).await;
        if let Some(asked) = asked {
            asked.allow(&mut response);
        }
        headers::add(&mut response, &arrival);
        access_log::write((&method, &path), &arrival, &response);
        measure::count(&arrival, &response);
        response
    }

    /// Lets it in, as far as that is for every request alike to decide.
    async fn route(&self, mut request: Request) -> Result<Response> {
        self.gate.check(&request)?;
        limit::take_place(&self.requests, || self.app.engine.is_full(), &mut request)?;
        request.extensions_mut().insert(self.bodies.clone());
        self.routes.call(request).await.map(IntoResponse::into_response)
    }
}
