//! Routes with the middleware around them, the listener, and the way to stop.

mod files;
mod patience;
mod places;

use std::{
    convert::Infallible,
    io::{self, Write},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use hyper::body::{Body, Frame, SizeHint};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use ipnet::IpNet;
use poem::{
    Addr, Endpoint, Response,
    http::uri::Scheme,
    web::{LocalAddr, RemoteAddr},
};
use poem_openapi::types::ToJSON;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

pub use files::allow_open_files;

use crate::{
    api::{self, BodyLimit, error::ApiError},
    app::App,
    domain::{
        clock::{Clock, SystemClock},
        ids::RequestId,
    },
    jobs,
    middleware::{Every, origin::Gate},
};
use patience::{Patience, Patient};
use places::{Places, Work};

/// The most bytes of headers, and of what is read or written ahead on a connection.
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// How long to wait before accepting again when that has failed (too many open files).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How a server listens.
#[derive(Clone, Debug)]
pub struct ServerSettings {
    /// The largest request body, in bytes.
    pub max_body_bytes: usize,
    /// What all bodies of requests under way may take, in bytes; of chats, until they are answered.
    pub max_bodies_bytes: usize,
    /// Requests under way at once, besides streams and chats.
    pub max_requests: usize,
    /// Connections at once.
    pub max_connections: usize,
    /// Connections at once of one client: an IPv4 address, or an IPv6 network of 64 bits.
    pub max_connections_per_client: usize,
    /// Peers that stand for many clients, and may have any number of connections.
    pub uncounted_peers: Vec<IpNet>,
    /// How long a client may take to send the head of a request that it has begun, and to begin its first.
    pub head_timeout: Duration,
    /// How long a connection may be idle between requests.
    pub idle_timeout: Duration,
    /// How long a client may take nothing of what it is sent.
    pub write_timeout: Duration,
    /// How long a stopping server waits for what is under way.
    pub grace: Duration,
    /// Whom a browser may bring here.
    pub gate: Gate,
}

/// Every route with what happens to every request.
pub fn endpoint(app: &Arc<App>, settings: &ServerSettings) -> impl Endpoint<Output = Response> + use<> {
    let bodies = Arc::new(Semaphore::new(settings.max_bodies_bytes));
    let requests = Arc::new(Semaphore::new(settings.max_requests));
    let bodies = BodyLimit { bytes: settings.max_body_bytes, all: bodies };
    Every { app: app.clone(), routes: api::routes(app), gate: settings.gate.clone(), requests, bodies }
}

/// Serves until `app.stopping` is cancelled, then finishes what is under way. Jobs run meanwhile.
pub async fn serve(listener: TcpListener, app: Arc<App>, settings: ServerSettings, jobs: jobs::Schedule) {
    let endpoint = Arc::new(endpoint(&app, &settings));
    let ServerSettings { max_connections, max_connections_per_client, .. } = settings;
    let places = Places::new(max_connections, max_connections_per_client, settings.uncounted_peers);
    let patience = Patience { head: settings.head_timeout, write: settings.write_timeout };
    let connections = GracefulShutdown::new();
    let jobs = tokio::spawn(jobs::run(app.clone(), jobs));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(settings.idle_timeout).max_buf_size(MAX_HEADER_BYTES);

    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = app.stopping.cancelled() => break,
        };
        let (stream, remote) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let Some(place) = places.take(remote.ip()) else {
            turn_away(stream);
            continue;
        };
        // A small answer must not wait for the client's acknowledgement of the one before.
        let _ = stream.set_nodelay(true);
        let local = stream.local_addr().map_or_else(|_| LocalAddr::default(), |addr| LocalAddr(addr.into()));
        let service = hyper::service::service_fn({
            let (endpoint, place) = (endpoint.clone(), place.clone());
            move |request| {
                let remote = RemoteAddr(Addr::from(remote));
                let request = poem::Request::from((request, local.clone(), remote, Scheme::HTTP));
                let (endpoint, work) = (endpoint.clone(), place.work());
                async move {
                    // Boxed, since a connection has room for it all the time, and needs it while it works only.
                    let answer = hyper::Response::from(Box::pin(endpoint.get_response(request)).await);
                    Ok::<_, Infallible>(answer.map(|body| Answer { body, _work: work }))
                }
            }
        });
        let stream = TokioIo::new(Patient::new(stream, place.clone(), patience));
        let connection = connections.watch(http.serve_connection(stream, service));
        tokio::spawn(async move {
            // A client that breaks off is its own affair.
            tokio::select! {
                _ = connection => {}
                () = place.lost() => {}
            }
        });
    }

    drop(listener);
    tracing::info!("stopping: finishing what is under way");
    let under_way = async {
        connections.shutdown().await;
        jobs.await.ok();
        app.finish().await;
    };
    if timeout(settings.grace, under_way).await.is_err() {
        tracing::warn!("stopped before everything under way was finished");
    }
}

/// The body of an answer. While it lasts, so does the work.
struct Answer<B> {
    body: B,
    _work: Work,
}

impl<B: Body + Unpin> Body for Answer<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Tells a client that there is no place for it. Nothing is waited for: whoever turns many away must not hold them.
fn turn_away(stream: TcpStream) {
    let body = ApiError::overloaded().failure(RequestId::random(), SystemClock.now()).to_json_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close";
    let told = stream.into_std().and_then(|mut stream| {
        stream.write_all(format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()).as_bytes())
    });
    // It may have left.
    drop::<io::Result<()>>(told);
}
