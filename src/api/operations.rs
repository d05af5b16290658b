//! What operators and machines ask of a server.

use std::sync::Arc;

use poem::{IntoResponse, Response};
use poem_openapi::{ApiResponse, Object, OpenApi, payload::Payload, registry::MetaSchemaRef, types::Type};

use super::{
    Tag,
    envelope::{Found, found},
    error::{ApiError, Code},
    json::Json,
};
use crate::{
    app::App,
    domain::{caller::Caller, clock::Timestamp},
    telemetry::metrics::{self, METRICS},
};

/// What this server is and where to go from here.
#[derive(Object)]
struct ServiceCard {
    service: String,
    version: String,
    /// Swagger UI.
    docs: String,
    openapi: String,
    health: String,
}

/// Whether the database answers.
#[derive(Object)]
struct DatabaseHealth {
    /// `sqlite` or `postgres`.
    kind: String,
    /// `ok` or `unavailable`.
    status: String,
}

/// The model that is asked where a chat names no other.
#[derive(Object)]
struct ModelInfo {
    provider: String,
    name: String,
}

/// How the server is.
#[derive(Object)]
struct Health {
    /// `healthy` or `unhealthy`.
    status: String,
    service: String,
    version: String,
    timestamp: Timestamp,
    database: DatabaseHealth,
    model: ModelInfo,
}

#[derive(ApiResponse)]
enum HealthAnswer {
    /// Everything needed works.
    #[oai(status = 200)]
    Healthy(Json<Health>),
    /// The database does not answer.
    #[oai(status = 503)]
    Unhealthy(Json<Health>),
}

/// A sign of life.
#[derive(Object)]
struct Sign {
    status: String,
}

#[derive(ApiResponse)]
enum SignAnswer {
    /// Yes.
    #[oai(status = 200)]
    Yes(Json<Sign>),
}

/// Metrics in Prometheus's text format.
struct PrometheusText(String);

impl Payload for PrometheusText {
    const CONTENT_TYPE: &'static str = metrics::MEDIA_TYPE;

    fn schema_ref() -> MetaSchemaRef {
        String::schema_ref()
    }
}

impl IntoResponse for PrometheusText {
    fn into_response(self) -> Response {
        Response::builder().content_type(metrics::MEDIA_TYPE).body(self.0)
    }
}

#[derive(ApiResponse)]
enum MetricsAnswer {
    /// One line for each number, after what it means.
    #[oai(status = 200)]
    Text(PrometheusText),
}

const SERVICE: &str = "atlus-api";
const VERSION: &str = env!("CARGO_PKG_VERSION");

pub struct OperationsApi(pub Arc<App>);

#[OpenApi(tag = "Tag::Operations")]
impl OperationsApi {
    /// Service card
    #[oai(path = "/", method = "get", operation_id = "getServiceCard")]
    async fn card(&self, _caller: Caller) -> Result<Found<ServiceCard>, ApiError> {
        let card = ServiceCard {
            service: SERVICE.to_owned(),
            version: VERSION.to_owned(),
            docs: "/docs".to_owned(),
            openapi: "/openapi.json".to_owned(),
            health: "/api/v1/health".to_owned(),
        };
        Ok(found(card, self.0.clock.now()))
    }

    /// Metrics
    ///
    /// What is counted and timed, in Prometheus's text format. Free of the rate limit. They are of all tenants together,
    /// so a key that is bound to a user may not read them.
    #[oai(path = "/metrics", method = "get", operation_id = "getMetrics")]
    async fn metrics(&self, caller: Caller) -> Result<MetricsAnswer, ApiError> {
        if caller.user.is_some() {
            let message = "Metrics are of all users: a key that is bound to one may not read them";
            return Err(ApiError::new(Code::Forbidden, message));
        }
        self.observe();
        let text = METRICS.text().map_err(|error| {
            tracing::error!(error = &error as &dyn std::error::Error, "metrics not written");
            ApiError::internal()
        })?;
        Ok(MetricsAnswer::Text(PrometheusText(text)))
    }

    /// Health
    ///
    /// Not enveloped. 503 while the database does not answer.
    #[oai(path = "/api/v1/health", method = "get", operation_id = "getHealth")]
    async fn health(&self) -> HealthAnswer {
        let App { store, engine, clock, .. } = &*self.0;
        let works = store.ping().await.is_ok();
        let health = Health {
            status: if works { "healthy" } else { "unhealthy" }.to_owned(),
            service: SERVICE.to_owned(),
            version: VERSION.to_owned(),
            timestamp: clock.now(),
            database: DatabaseHealth {
                kind: store.kind().as_str().to_owned(),
                status: if works { "ok" } else { "unavailable" }.to_owned(),
            },
            model: ModelInfo {
                provider: engine.model().provider().to_owned(),
                name: engine.model().name().to_owned(),
            },
        };
        if works { HealthAnswer::Healthy(Json(health)) } else { HealthAnswer::Unhealthy(Json(health)) }
    }

    /// Is the process alive?
    #[oai(path = "/livez", method = "get", operation_id = "getLiveness")]
    async fn live(&self) -> SignAnswer {
        SignAnswer::Yes(Json(Sign { status: "alive".to_owned() }))
    }

    /// Can it take requests?
    ///
    /// 503 while the database does not answer or the server is stopping.
    #[oai(path = "/readyz", method = "get", operation_id = "getReadiness")]
    async fn ready(&self) -> Result<SignAnswer, ApiError> {
        if self.0.stopping.is_cancelled() {
            return Err(ApiError::new(Code::Overloaded, "The server is stopping and takes no more"));
        }
        self.0.store.ping().await?;
        Ok(SignAnswer::Yes(Json(Sign { status: "ready".to_owned() })))
    }
}

impl OperationsApi {
    /// Takes the measure of what is not counted as it happens.
    fn observe(&self) {
        let App { engine, store, .. } = &*self.0;
        let level = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        let (running, waiting) = engine.load();
        METRICS.turns_running.set(level(running));
        METRICS.turns_waiting.set(level(waiting));
        METRICS.writes_waiting.set(level(store.writes_waiting()));
        for pool in store.pools() {
            let used = pool.open.saturating_sub(pool.idle);
            for (state, connections) in [("idle", pool.idle), ("used", used)] {
                METRICS.database_connections.with_label_values(&[pool.name, state]).set(connections.into());
            }
            METRICS.database_connections_max.with_label_values(&[pool.name]).set(pool.max.into());
        }
    }
}
