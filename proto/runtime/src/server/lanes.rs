//! Lanes: threads that each serve connections of their own, from reading a request to writing its answer.
//!
//! A runtime that shares its tasks between threads hands a request on several times on its way, and each time may wake a
//! thread. On a lane nothing is handed on. A new connection goes to the lane that has the fewest.
use std::{
    io,
    net::TcpStream as StdStream,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    runtime,
    sync::{mpsc, oneshot},
};
use tokio_stream::{StreamExt, wrappers::ReceiverStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    service::Routes,
    transport::server::{Connected, TcpConnectInfo},
};

use super::{Error, Limits, serve_connections};

/// Connections that wait for their lane to take them.
const WAITING_CONNECTIONS_MAX: usize = 64;
/// How long no connection is taken after the system refused one, for want of files most likely.
const PAUSE_AFTER_REFUSAL: Duration = Duration::from_millis(50);

/// Serves gRPC on a thread for each of `lanes`, which has its services, until `stop` is cancelled; then lets open calls finish
/// within `limits.drain`.
///
/// # Errors
/// [`Error::Grpc`], [`Error::Lane`].
pub async fn serve_grpc(listener: TcpListener, lanes: Vec<Routes>, limits: Limits, stop: CancellationToken) -> Result<(), Error> {
    let lanes = lanes.into_iter().enumerate().map(|(number, routes)| Lane::start(number, routes, limits, stop.clone()));
    let lanes = lanes.collect::<Result<Vec<_>, _>>().map_err(Error::Lane)?;
    if let Some(Err(error)) = stop.run_until_cancelled(accept(&listener, &lanes)).await {
        stop.cancel();
        return Err(Error::Lane(error));
    }
    drop(listener);
    for lane in lanes {
        drop(lane.connections);
        lane.ended.await.unwrap_or_else(|_| Err(Error::Lane(io::Error::other("a lane ended early"))))?;
    }
    Ok(())
}

async fn accept(listener: &TcpListener, lanes: &[Lane]) -> io::Result<()> {
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "a connection couldn't be taken");
                tokio::time::sleep(PAUSE_AFTER_REFUSAL).await;
                continue;
            }
        };
        let least = lanes.iter().min_by_key(|lane| lane.open.load(Ordering::Relaxed));
        let lane = least.ok_or_else(|| io::Error::other("there is no lane"))?;
        // A peer that has gone already is none of the others' business.
        if stream.set_nodelay(true).is_ok()
            && let Ok(stream) = stream.into_std()
        {
            let counted = Open::count(&lane.open);
            lane.connections.send((stream, counted)).await.map_err(|_| io::Error::other("a lane has ended"))?;
        }
    }
}

/// One of the threads.
struct Lane {
    connections: mpsc::Sender<(StdStream, Open)>,
    open: Arc<AtomicUsize>,
    ended: oneshot::Receiver<Result<(), Error>>,
}

impl Lane {
    fn start(number: usize, routes: Routes, limits: Limits, stop: CancellationToken) -> io::Result<Self> {
        let (connections, incoming) = mpsc::channel(WAITING_CONNECTIONS_MAX);
        let (end, ended) = oneshot::channel();
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        thread::Builder::new().name(format!("lane-{number}")).spawn(move || {
            let incoming = ReceiverStream::new(incoming)
                .map(|(stream, open)| Ok::<_, io::Error>(Counted { stream: TcpStream::from_std(stream)?, _open: open }));
            let result = runtime.block_on(serve_connections(incoming, routes, limits, stop));
            // Whoever waited for it may have gone.
            let _ = end.send(result);
        })?;
        Ok(Self { connections, open: Arc::default(), ended })
    }
}

/// Counts a connection as open.
struct Open(Arc<AtomicUsize>);

impl Open {
    fn count(open: &Arc<AtomicUsize>) -> Self {
        open.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(open))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection that is counted.
struct Counted {
    stream: TcpStream,
    _open: Open,
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
