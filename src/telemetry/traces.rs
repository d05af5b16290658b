//! Traces: what a request was made of and how long each part took, for an OpenTelemetry collector.
//!
//! A request is a span that continues its caller's trace. In it a chat is a `turn`, made of `admit`, `context`, `model`
//! and `complete`. A thread of its own sends them by OTLP; no request waits for it. While the standard variables ask for
//! no traces ([`TraceSettings::read`]), a [`Span`] is nothing.
//!
//! Spans hold names, numbers and ids, never what was said; of a failure only its code, since messages may quote.

use std::{
    sync::{Mutex, OnceLock, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures_util::future::Either;
use opentelemetry::{
    Context, InstrumentationScope, KeyValue, Value,
    context::FutureExt,
    propagation::TextMapPropagator,
    trace::{SpanKind, Status, TraceContextExt, Tracer, TracerProvider},
};
use opentelemetry_http::{Bytes, HeaderExtractor, HeaderInjector, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::WithHttpConfig;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    resource::{EnvResourceDetector, TelemetryResourceDetector},
    trace::{SdkTracer, SdkTracerProvider, SpanData, SpanExporter},
};
use reqwest::{
    ClientBuilder, Url,
    header::{HeaderMap, HeaderValue},
};
use tokio::{runtime::Handle, task::spawn_blocking};

/// How often it is told that traces are lost.
const TELL_LOSS: Duration = Duration::from_secs(5 * 60);
/// The most bytes of a collector's answer that are read.
const MAX_ANSWER: usize = 64 * 1024;

/// How traces are sent, as far as the SDK does not read it by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceSettings {
    pub endpoint: Url,
    /// How long sending may take.
    pub timeout: Duration,
    /// Whether the model server is told of the trace.
    pub propagate: bool,
}

/// Variables that take one of some values.
const CHOICES: [(&str, &[&str]); 2] = [
    ("OTEL_TRACES_EXPORTER", &["otlp", "none"]),
    (
        "OTEL_TRACES_SAMPLER",
        &[
            "always_on", "always_off", "traceidratio", "parentbased_always_on", "parentbased_always_off",
            "parentbased_traceidratio",
        ],
    ),
];
/// The same, of those that are given for traces alone (`OTEL_EXPORTER_OTLP_TRACES_…`) or for everything.
const OTLP_CHOICES: [(&str, &[&str]); 2] =
    [("PROTOCOL", &["http/protobuf"]), ("COMPRESSION", &["gzip", "none"])];
/// Variables that take a number.
const NUMBERS: [&str; 7] = [
    "OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_EXPORT_TIMEOUT", "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT", "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
];

impl TraceSettings {
    /// What the standard variables say
    /// (<https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/>); nothing if they ask for no
    /// traces. Adds what is wrong with them to `problems`: the SDK would quietly do something else.
    pub fn read(variable: impl Fn(&str) -> Option<String>, problems: &mut Vec<String>) -> Option<Self> {
        let given = |name: &str| variable(name).filter(|value| !value.is_empty());
        let otlp = |name: &str| {
            let names = [format!("OTEL_EXPORTER_OTLP_TRACES_{name}"), format!("OTEL_EXPORTER_OTLP_{name}")];
            names.into_iter().find_map(|name| given(&name).map(|value| (name, value)))
        };
        let (endpoint_name, endpoint) = otlp("ENDPOINT")?;
        let disabled = given("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"));
        if disabled || given("OTEL_TRACES_EXPORTER").as_deref() == Some("none") {
            return None;
        }
        let choices =
            CHOICES.iter().map(|(name, all)| (given(name).map(|value| ((*name).to_owned(), value)), all));
        let otlp_choices = OTLP_CHOICES.iter().map(|(name, all)| (otlp(name), all));
        for (value, all) in choices.chain(otlp_choices) {
            if let Some((name, value)) = value.filter(|(_, value)| !all.contains(&value.as_str())) {
                problems.push(format!("{name} must be {}, not {value:?}", all.join(" or ")));
            }
        }
        let whole = |value: &str| value.parse().is_ok_and(|number: u32| number > 0);
        for name in NUMBERS {
            if given(name).is_some_and(|value| !whole(&value)) {
                problems.push(format!("{name} must be a whole number from 1"));
            }
        }
        let share = |value: &String| value.parse().is_ok_and(|share: f64| (0.0..=1.0).contains(&share));
        if given("OTEL_TRACES_SAMPLER").is_some_and(|sampler| sampler.ends_with("traceidratio"))
            && !given("OTEL_TRACES_SAMPLER_ARG").as_ref().is_some_and(share)
        {
            problems.push("OTEL_TRACES_SAMPLER_ARG must be the share of traces to keep, 0 to 1".to_owned());
        }
        // They hold keys and are not repeated.
        if let Some((name, _)) =
            otlp("HEADERS").filter(|(_, headers)| !headers.split(',').all(|h| h.contains('=')))
        {
            problems.push(format!("{name} must be name=value with commas between"));
        }
        for name in ["CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY"] {
            if let Some((name, _)) = otlp(name) {
                problems.push(format!("{name} is not supported; SSL_CERT_FILE names certificates to trust"));
            }
        }
        let timeout = otlp("TIMEOUT");
        if let Some((name, _)) = timeout.as_ref().filter(|(_, value)| !whole(value)) {
            problems.push(format!("{name} must be a number of milliseconds from 1"));
        }
        let timeout = timeout.and_then(|(_, value)| value.parse().ok()).unwrap_or(10_000);
        let propagators = given("OTEL_PROPAGATORS").unwrap_or_else(|| "tracecontext".to_owned());
        let propagators: Vec<_> = propagators.split(',').map(str::trim).collect();
        if propagators.iter().any(|name| !["tracecontext", "baggage", "none"].contains(name)) {
            problems.push("OTEL_PROPAGATORS must be tracecontext, tracecontext,baggage or none".to_owned());
        }
        let url = endpoint.parse().ok().filter(|url: &Url| matches!(url.scheme(), "http" | "https"));
        if url.is_none() {
            problems.push(format!("{endpoint_name} must be a URL such as http://127.0.0.1:4318"));
        }
        let propagate = propagators.contains(&"tracecontext");
        Some(Self { endpoint: url?, timeout: Duration::from_millis(timeout), propagate })
    }
}

/// What makes spans, once traces are sent.
static TRACES: OnceLock<(SdkTracer, TraceSettings)> = OnceLock::new();

/// That traces are sent.
pub struct Sending(SdkTracerProvider);

/// Sends traces from now on, by clients that `client` makes and on the runtime in which this is called.
pub fn start(settings: &TraceSettings, client: ClientBuilder) -> Result<Sending, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("traces cannot be sent: {error}");
    let client = client.timeout(settings.timeout).build().map_err(|error| wrong(&error))?;
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_http()
        .with_http_client(Client { client, runtime: Handle::current() })
        .build()
        .map_err(|error| wrong(&error))?;
    let version = env!("CARGO_PKG_VERSION");
    let resource = Resource::builder_empty()
        .with_attributes([KeyValue::new("service.name", "atlus"), KeyValue::new("service.version", version)])
        .with_detectors(&[Box::new(EnvResourceDetector::new()), Box::new(TelemetryResourceDetector)]);
    let resource = match std::env::var("OTEL_SERVICE_NAME") {
        Ok(name) if !name.is_empty() => resource.with_service_name(name),
        _ => resource,
    };
    let exporter = Exporter { exporter, lost: Mutex::default() };
    let provider =
        SdkTracerProvider::builder().with_resource(resource.build()).with_batch_exporter(exporter).build();
    let scope = InstrumentationScope::builder("atlus").with_version(version).build();
    let _ = TRACES.set((provider.tracer_with_scope(scope), settings.clone()));
    Ok(Sending(provider))
}

impl Sending {
    /// Sends what is left, within some time.
    pub async fn finish(self, within: Duration) {
        let sent = spawn_blocking(move || self.0.shutdown_with_timeout(within)).await;
        if !matches!(sent, Ok(Ok(()))) {
            tracing::warn!("the last traces may be lost");
        }
    }
}

/// A part of what is done for a request. It ends when it is ended, or when it and all work that runs as it is dropped.
#[derive(Clone, Debug)]
pub struct Span(Option<Context>);

impl Span {
    /// The one that runs.
    pub fn current() -> Self {
        Self(TRACES.get().map(|_| Context::current()))
    }

    /// Begins one within the one that runs.
    pub fn begin(name: &'static str) -> Self {
        Self::of_kind(SpanKind::Internal, name, Context::current)
    }

    /// Begins one in which another server is called.
    pub fn begin_call(name: &'static str) -> Self {
        Self::of_kind(SpanKind::Client, name, Context::current)
    }

    /// Begins one for a request, in the trace that its headers name (<https://www.w3.org/TR/trace-context/>).
    pub fn begin_request(name: &'static str, headers: &HeaderMap) -> Self {
        let parent =
            || TraceContextPropagator::new().extract_with_context(&Context::new(), &HeaderExtractor(headers));
        Self::of_kind(SpanKind::Server, name, parent)
    }

    fn of_kind(kind: SpanKind, name: &'static str, parent: impl FnOnce() -> Context) -> Self {
        Self(TRACES.get().map(|(tracer, _)| {
            let parent = parent();
            let span = tracer.span_builder(name).with_kind(kind);
            parent.with_span(tracer.build_with_context(span, &parent))
        }))
    }

    /// Runs work as this span.
    pub fn run<F: Future>(&self, work: F) -> impl Future<Output = F::Output> + use<F> {
        match &self.0 {
            Some(context) => Either::Left(work.with_context(context.clone())),
            None => Either::Right(work),
        }
    }

    /// The id of its trace.
    pub fn trace_id(&self) -> Option<String> {
        self.0.as_ref().map(|context| context.span().span_context().trace_id().to_string())
    }

    /// Adds what is known of it.
    pub fn describe<const N: usize>(&self, attributes: impl FnOnce() -> [(&'static str, Option<Value>); N]) {
        if let Some(context) = self.0.as_ref().filter(|context| context.span().is_recording()) {
            let known = |(name, value): (_, Option<_>)| Some(KeyValue::new(name, value?));
            context.span().set_attributes(attributes().into_iter().filter_map(known));
        }
    }

    pub fn rename(&self, name: &'static str) {
        if let Some(context) = &self.0 {
            context.span().update_name(name);
        }
    }

    /// Notes a failure that is not its end.
    pub fn note_failure(&self, name: &'static str, code: &'static str) {
        if let Some(context) = &self.0 {
            context.span().add_event(name, vec![KeyValue::new("error.type", code)]);
        }
    }

    /// Notes that it failed.
    pub fn fail(&self, code: &str) {
        if let Some(context) = &self.0 {
            context.span().set_attribute(KeyValue::new("error.type", code.to_owned()));
            context.span().set_status(Status::error(code.to_owned()));
        }
    }

    /// Ends it; `failure` is why it failed, if it did.
    pub fn end(self, failure: Option<&str>) {
        if let Some(code) = failure {
            self.fail(code);
        }
        if let Some(context) = &self.0 {
            context.span().end();
        }
    }
}

/// What tells another server of the span that runs.
pub fn headers() -> HeaderMap {
    let mut headers = HeaderMap::new();
    if TRACES.get().is_some_and(|(_, settings)| settings.propagate) {
        let mut injector = HeaderInjector(&mut headers);
        TraceContextPropagator::new().inject_context(&Context::current(), &mut injector);
        if headers.get("tracestate").is_some_and(HeaderValue::is_empty) {
            headers.remove("tracestate");
        }
    }
    headers
}

/// Sends over HTTP for the SDK, whose thread is none of the runtime's.
#[derive(Debug)]
struct Client {
    client: reqwest::Client,
    runtime: Handle,
}

#[async_trait]
impl HttpClient for Client {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (client, request) = (self.client.clone(), request.try_into()?);
        let exchange = self.runtime.spawn(async move {
            let mut response = client.execute(request).await.map_err(reqwest::Error::without_url)?;
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(reqwest::Error::without_url)? {
                if body.len() + chunk.len() > MAX_ANSWER {
                    return Err("the answer is too large".into());
                }
                body.extend_from_slice(&chunk);
            }
            let mut answer = Response::new(Bytes::from(body));
            (*answer.status_mut(), *answer.headers_mut()) = (response.status(), response.headers().clone());
            Ok(answer)
        });
        exchange.await?
    }
}

/// Sends spans, and now and then tells that some are lost.
#[derive(Debug)]
struct Exporter {
    exporter: opentelemetry_otlp::SpanExporter,
    lost: Mutex<Lost>,
}

#[derive(Debug, Default)]
struct Lost {
    spans: usize,
    told: Option<Instant>,
}

impl SpanExporter for Exporter {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        let sent = self.exporter.export(batch).await;
        if let Err(error) = &sent {
            let mut lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
            lost.spans += spans;
            if lost.told.is_none_or(|told| told.elapsed() >= TELL_LOSS) {
                let error = error as &dyn std::error::Error;
                tracing::warn!(
                    error,
                    spans = lost.spans,
                    "traces not sent; does a collector listen at the endpoint?"
                );
                *lost = Lost { spans: 0, told: Some(Instant::now()) };
            }
        }
        sent
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.exporter.shutdown_with_timeout(timeout)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.exporter.force_flush()
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.exporter.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What these variables ask for, and what is wrong with them.
    fn read(variables: &[(&str, &str)]) -> (Option<TraceSettings>, Vec<String>) {
        let mut problems = Vec::new();
        let value = |name: &str| {
            variables.iter().find(|(given, _)| *given == name).map(|(_, value)| value.to_string())
        };
        (TraceSettings::read(value, &mut problems), problems)
    }

    const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");

    #[test]
    fn an_endpoint_turns_traces_on() {
        let (settings, problems) = read(&[ENDPOINT]);
        let (endpoint, timeout) = (ENDPOINT.1.parse().unwrap(), Duration::from_secs(10));
        assert_eq!(settings, Some(TraceSettings { endpoint, timeout, propagate: true }));
        assert!(problems.is_empty());
        let own = [ENDPOINT, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://c.example/x")];
        assert_eq!(read(&own).0.unwrap().endpoint.as_str(), "https://c.example/x");
    }

    #[test]
    fn they_are_off_without_one_or_where_that_is_asked_for() {
        let grpc = ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc");
        for off in [
            &[grpc][..],
            &[("OTEL_EXPORTER_OTLP_ENDPOINT", ""), grpc],
            &[ENDPOINT, grpc, ("OTEL_SDK_DISABLED", "True")],
            &[ENDPOINT, grpc, ("OTEL_TRACES_EXPORTER", "none")],
        ] {
            assert_eq!(read(off), (None, vec![]), "{off:?}");
        }
    }

    #[test]
    fn what_would_be_ignored_is_refused_by_name() {
        for (name, value) in [
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "collector:4317"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "zstd"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "10s"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "secret"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "ca.pem"),
            ("OTEL_TRACES_EXPORTER", "console"),
            ("OTEL_TRACES_SAMPLER", "sometimes"),
            ("OTEL_BSP_SCHEDULE_DELAY", "0"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
            ("OTEL_PROPAGATORS", "b3"),
        ] {
            let (_, problems) = read(&[(name, value), ENDPOINT]);
            assert!(problems.len() == 1 && problems[0].starts_with(name), "{name}: {problems:?}");
            assert!(!problems[0].contains("secret"));
        }
    }

    #[test]
    fn a_share_of_traces_needs_to_be_one() {
        let sampler = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
        assert_eq!(read(&[ENDPOINT, sampler, ("OTEL_TRACES_SAMPLER_ARG", "0.25")]).1, Vec::<String>::new());
        for share in ["", "2", "-0.1", "half"] {
            let (_, problems) = read(&[ENDPOINT, sampler, ("OTEL_TRACES_SAMPLER_ARG", share)]);
            assert!(
                problems.len() == 1 && problems[0].starts_with("OTEL_TRACES_SAMPLER_ARG"),
                "{problems:?}"
            );
        }
    }

    #[test]
    fn propagators_say_whether_the_model_server_is_told() {
        for (propagators, told) in [("tracecontext,baggage", true), ("baggage", false), ("none", false)] {
            let (settings, problems) = read(&[ENDPOINT, ("OTEL_PROPAGATORS", propagators)]);
            assert_eq!((settings.unwrap().propagate, problems.len()), (told, 0), "{propagators}");
        }
    }

    #[tokio::test]
    async fn a_span_is_nothing_while_no_traces_are_sent() {
        let span = Span::begin("turn");
        span.describe(|| -> [_; 0] { panic!("nobody wants to know") });
        assert_eq!(span.run(async { 7 }).await, 7);
        assert_eq!((span.trace_id(), headers().len()), (None, 0));
    }
}
