//! Routes with the middleware around them, the listener, and the way to stop.

use std::{convert::Infallible, io, sync::Arc, time::Duration};

use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use poem::{
    Addr, Endpoint, EndpointExt, Response,
    http::uri::Scheme,
    web::{LocalAddr, RemoteAddr},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    api::{self, BodyLimit},
    app::App,
    jobs,
    middleware::{access_log::access_log, headers::headers, refuse::refuse, request_id::request_id},
};

/// Connections at once; more wait to be accepted.
const MAX_CONNECTIONS: usize = 10_000;
/// How long a client may take to send its headers, and a connection may be idle between requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// The most bytes of headers.
const MAX_HEADER_BYTES: usize = 64 * 1024;
/// How long to wait before accepting again when that has failed (too many open files).
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How a server listens.
#[derive(Clone, Copy, Debug)]
pub struct ServerSettings {
    /// The largest request body, in bytes.
    pub max_body_bytes: usize,
    /// How long a stopping server waits for what is under way.
    pub grace: Duration,
}

/// Every route with what happens to every request.
pub fn endpoint(app: &Arc<App>, settings: ServerSettings) -> impl Endpoint<Output = Response> + use<> {
    api::routes(app)
        .data(BodyLimit(settings.max_body_bytes))
        .around(refuse)
        .around(headers)
        .around(access_log)
        .around(request_id)
}

/// Serves until `app.stopping` is cancelled, then finishes what is under way. Jobs run meanwhile.
pub async fn serve(listener: TcpListener, app: Arc<App>, settings: ServerSettings, jobs: jobs::Schedule) {
    let endpoint = Arc::new(endpoint(&app, settings));
    let (connections, places) = (GracefulShutdown::new(), Arc::new(Semaphore::new(MAX_CONNECTIONS)));
    let jobs = tokio::spawn(jobs::run(app.clone(), jobs));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(MAX_HEADER_BYTES);

    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &places) => accepted,
            () = app.stopping.cancelled() => break,
        };
        let (stream, remote, place) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "connection not accepted");
                sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        // A small answer must not wait for the client's acknowledgement of the one before.
        let _ = stream.set_nodelay(true);
        let local = stream.local_addr().map_or_else(|_| LocalAddr::default(), |addr| LocalAddr(addr.into()));
        let service = hyper::service::service_fn({
            let endpoint = endpoint.clone();
            move |request| {
                let remote = RemoteAddr(Addr::from(remote));
                let request = poem::Request::from((request, local.clone(), remote, Scheme::HTTP));
                let endpoint = endpoint.clone();
                async move { Ok::<_, Infallible>(hyper::Response::from(endpoint.get_response(request).await)) }
            }
        });
        let connection = connections.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            // A client that breaks off is its own affair.
            let _ = connection.await;
            drop(place);
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

type Place = tokio::sync::OwnedSemaphorePermit;

/// Waits for a free place, then for a client.
async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
) -> io::Result<(TcpStream, std::net::SocketAddr, Place)> {
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, remote) = listener.accept().await?;
    Ok((stream, remote, place))
}
