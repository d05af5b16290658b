//! The log: lines on standard error, as text for people or as JSON for machines.
//!
//! A line of JSON is one flat object: `timestamp`, `level`, `target`, `message` and what the line is about. Every line
//! that concerns a request has its `request_id` and, once they are known, `tenant`, `session_id` and `turn`, also
//! where the work goes on in a task of its own ([`super::carried`]). As text they stand before the message:
//! `request{request_id=… tenant=1}`. Neither holds what was said.

use std::{
    fmt::{self, Display},
    io::{self, IsTerminal},
};

use serde_json::{Map, Value, json};
use tracing::{Event, Span, Subscriber, field};
use tracing_subscriber::{
    EnvFilter,
    fmt::{
        FmtContext, FormatEvent, FormatFields, FormattedFields,
        format::{JsonFields, Writer},
        time::{FormatTime, SystemTime},
    },
    registry::LookupSpan,
};

/// The target of spans that say which request a line concerns.
const REQUEST: &str = "atlus::request";

/// How the server logs.
#[derive(Clone, Debug)]
pub struct LogConfig {
    /// A level, or levels by module.
    pub directives: String,
    /// Else text; absent: text on a terminal only.
    pub json: Option<bool>,
}

/// Starts logging to standard error.
pub fn start(config: &LogConfig) {
    let terminal = io::stderr().is_terminal();
    // Whatever is logged, its lines say which request they concern.
    let filter = |directives: &str| format!("{directives},{REQUEST}=error");
    // The settings have been checked; were they not, nothing would be lost but detail.
    let filter =
        EnvFilter::try_new(filter(&config.directives)).unwrap_or_else(|_| EnvFilter::new(filter("info")));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_ansi(terminal);
    if config.json.unwrap_or(!terminal) {
        log.fmt_fields(JsonFields::new()).event_format(JsonLines).init();
    } else {
        log.with_target(false).init();
    }
}

/// What all lines that concern a request have in common. `tenant` and `turn`, and the session if its id is not known
/// yet, are recorded when they are.
pub fn request(request_id: &impl Display, session_id: Option<impl Display>, trace_id: Option<&str>) -> Span {
    tracing::error_span!(
        target: REQUEST,
        "request",
        %request_id,
        session_id = session_id.map(field::display),
        tenant = field::Empty,
        turn = field::Empty,
        trace_id = trace_id.map(field::display),
    )
}

/// Writes each event as one flat object.
struct JsonLines;

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, JsonFields> for JsonLines {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let (mut timestamp, mut fields) = (String::new(), String::new());
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        context.format_fields(Writer::new(&mut fields), event)?;
        let metadata = event.metadata();
        let mut line = Map::new();
        line.insert("timestamp".to_owned(), json!(timestamp));
        line.insert("level".to_owned(), json!(metadata.level().as_str()));
        line.insert("target".to_owned(), json!(metadata.target()));
        // Of two fields of one name, the event's own counts.
        let mut add = |fields: &str| {
            if let Ok(Value::Object(fields)) = serde_json::from_str(fields) {
                fields.into_iter().for_each(|(name, value)| _ = line.entry(name).or_insert(value));
            }
        };
        add(&fields);
        for span in
            context.event_scope().into_iter().flatten().filter(|span| span.metadata().target() == REQUEST)
        {
            if let Some(fields) = span.extensions().get::<FormattedFields<JsonFields>>() {
                add(&fields.fields);
            }
        }
        writeln!(writer, "{}", Value::Object(line))
    }
}
