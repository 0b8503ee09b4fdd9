//! The shells of a process: its gRPC port and its HTTP port.
//!
//! What is served is the caller's; the limits, the health service, reflection and the way to stop are the same everywhere.
mod lanes;

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, http::StatusCode, routing::get};
pub use lanes::serve_grpc;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::{Server, server::Connected},
};
pub use tonic_health::ServingStatus;
pub use tonic_health::server::HealthReporter;

/// Threads that serve the connections of a port if nothing else is set: one for every `cores_per_thread` cores.
pub fn lanes(set: usize, cores_per_thread: usize) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if set > 0 { set } else { (cores / cores_per_thread.max(1)).clamp(1, LANES_MAX) }
}

/// Threads that a port gets unless more are asked for.
const LANES_MAX: usize = 16;
/// Largest message that is taken or sent unless set otherwise, in bytes: what Triton's clients lift their own limits to.
pub const MESSAGE_BYTES_MAX: usize = i32::MAX as usize;

/// Bounds of a gRPC port.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Streams that one connection may have open.
    pub streams_per_connection_max: u32,
    /// Flow-control window of one stream, in bytes.
    pub stream_window_bytes: u32,
    /// Flow-control window of one connection, in bytes.
    pub connection_window_bytes: u32,
    /// Headers of one call, in bytes.
    pub header_bytes_max: u32,
    /// How long open calls may go on once the port closes.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            streams_per_connection_max: 4096,
            stream_window_bytes: 4 << 20,
            connection_window_bytes: 16 << 20,
            header_bytes_max: 64 << 10,
            drain: Duration::from_secs(5),
        }
    }
}

/// Why a port can't be served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is taken, or isn't this machine's.
    #[error("can't listen on {address}: {source}; choose another address or stop what uses it")]
    Bind {
        /// The address that was asked for.
        address: String,
        /// The system's words.
        source: io::Error,
    },
    /// The gRPC library gave up.
    #[error("the gRPC server stopped: {0}")]
    Grpc(#[from] tonic::transport::Error),
    /// A thread that serves connections couldn't be started, or ended.
    #[error("a thread of the gRPC server: {0}")]
    Lane(io::Error),
    /// The HTTP library gave up.
    #[error("the HTTP server stopped: {0}")]
    Http(io::Error),
    /// The descriptors of the services can't be read.
    #[error("the reflection service can't be built: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
}

/// Listens on `address` (`HOST:PORT`; port 0 lets the system choose).
///
/// # Errors
/// [`Error::Bind`].
pub async fn listen(address: &str) -> Result<TcpListener, Error> {
    TcpListener::bind(address).await.map_err(|source| Error::Bind { address: address.to_owned(), source })
}

/// The address that a listener got.
///
/// # Errors
/// [`Error::Bind`] if the system doesn't know.
pub fn address(listener: &TcpListener) -> Result<SocketAddr, Error> {
    listener.local_addr().map_err(|source| Error::Bind { address: "the listener".into(), source })
}

/// Adds health (with `Watch`) and reflection (v1 and v1alpha) to the services of a port, for each of its threads. The reporter's
/// overall state (`""`) starts as not serving.
///
/// # Errors
/// [`Error::Reflection`] if `descriptors` isn't an encoded `FileDescriptorSet`.
pub async fn with_health_and_reflection(
    lanes: impl IntoIterator<Item = Routes>,
    descriptors: &'static [u8],
) -> Result<(Vec<Routes>, HealthReporter), Error> {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::NotServing).await;
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(descriptors)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (v1, v1alpha) = (reflection().build_v1()?, reflection().build_v1alpha()?);
    let complete = |routes: Routes| routes.add_service(health.clone()).add_service(v1.clone()).add_service(v1alpha.clone());
    Ok((lanes.into_iter().map(complete).collect(), reporter))
}

/// Reports the health of a whole port, and of the one service that its clients may ask for by name.
pub async fn set_health(reporter: &HealthReporter, service: &str, status: ServingStatus) {
    for name in ["", service] {
        reporter.set_service_status(name, status).await;
    }
}

/// Serves gRPC on the connections of `incoming`, all in the caller's task and those it spawns, until `stop` is cancelled; then
/// lets open calls finish within `limits.drain`.
///
/// # Errors
/// [`Error::Grpc`].
pub async fn serve_connections<C>(
    incoming: impl Stream<Item = io::Result<C>>,
    routes: Routes,
    limits: Limits,
    stop: CancellationToken,
) -> Result<(), Error>
where
    C: AsyncRead + AsyncWrite + Connected<ConnectInfo: Send + Sync> + Unpin + Send + 'static,
{
    let server = Server::builder()
        .max_concurrent_streams(limits.streams_per_connection_max)
        .initial_stream_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.connection_window_bytes)
        .http2_max_header_list_size(limits.header_bytes_max)
        .http2_max_pending_accept_reset_streams(Some(64))
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop.clone().cancelled_owned());
    tokio::pin!(server);
    tokio::select! {
        ended = &mut server => return Ok(ended?),
        () = stop.cancelled() => {}
    }
    match tokio::time::timeout(limits.drain, server).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            tracing::info!(drain_ms = limits.drain.as_millis(), "calls were still open when the drain time ended");
            Ok(())
        }
    }
}

/// Serves `/metrics`, `/healthz` (the process lives) and `/readyz` (it takes work) until `stop` is cancelled.
///
/// # Errors
/// [`Error::Http`].
pub async fn serve_http(
    listener: TcpListener,
    ready: Arc<dyn Fn() -> bool + Send + Sync>,
    stop: CancellationToken,
) -> Result<(), Error> {
    let readiness = move || {
        let ready = ready();
        async move { if ready { (StatusCode::OK, "ready\n") } else { (StatusCode::SERVICE_UNAVAILABLE, "not ready\n") } }
    };
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(readiness))
        .route("/metrics", get(|| async { crate::metrics::render() }));
    axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned()).await.map_err(Error::Http)
}
