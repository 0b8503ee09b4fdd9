//! The reference for a call's overhead: what tonic alone needs on this machine, without anything of Cresset.
//!
//! A unary call of the health service and its answer, over loopback, between two threads of this process that have a runtime
//! each. No server of gRPC can cost less here, and how much that is differs by a factor of two from one machine to the next.

use std::{
    fs,
    net::SocketAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use hdrhistogram::Histogram;
use tokio::{net::TcpListener, runtime, sync::oneshot};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::{Endpoint, Server};
use tonic_health::{
    pb::{HealthCheckRequest, health_client::HealthClient},
    server::health_reporter,
};

/// What a call cost.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub struct Bare {
    /// The middle of a call's time for its caller, in µs.
    pub p50_us: f64,
    /// The server's CPU time for each call, in µs.
    pub server_cpu_us: f64,
}

/// Calls for so long, one after the other, after a tenth of that time to warm up.
///
/// # Errors
/// The system's, or tonic's.
pub fn measure(time: Duration) -> anyhow::Result<Bare> {
    let (address, served) = oneshot::channel();
    let (stop, stopped) = oneshot::channel();
    let server = thread::spawn(move || serve(address, stopped));
    let calls = runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let address = served.await.context("the bare server didn't start")?;
        let warm_up = call(address, time / 10).await?;
        anyhow::Ok((warm_up.len(), call(address, time).await?))
    });
    // If it is gone it has ended.
    let _ = stop.send(());
    let cpu = server.join().map_err(|_| anyhow::anyhow!("the bare server panicked"))??;
    let (warm_up, took) = calls?;
    let calls = warm_up + took.len();
    Ok(Bare { p50_us: took.value_at_quantile(0.5) as f64 / 1e3, server_cpu_us: cpu.as_secs_f64() * 1e6 / calls as f64 })
}

/// Serves until it is told to stop, and returns the CPU time that took.
fn serve(address: oneshot::Sender<SocketAddr>, stopped: oneshot::Receiver<()>) -> anyhow::Result<Duration> {
    runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let (_reporter, health) = health_reporter();
        // Whoever asked may have given up.
        let _ = address.send(listener.local_addr()?);
        let server = Server::builder().tcp_nodelay(true).add_service(health);
        let until = async { drop(stopped.await) };
        anyhow::Ok(server.serve_with_incoming_shutdown(TcpListenerStream::new(listener), until).await?)
    })?;
    // Of this thread: nanoseconds on a core, nanoseconds of waiting for one, turns.
    let stat = fs::read_to_string("/proc/thread-self/schedstat")?;
    let on_core = stat.split(' ').next().context("an empty schedstat")?;
    Ok(Duration::from_nanos(on_core.parse()?))
}

/// How long each call takes, in ns.
async fn call(address: SocketAddr, time: Duration) -> anyhow::Result<Histogram<u64>> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true).connect().await?;
    let mut client = HealthClient::new(channel);
    let mut took = Histogram::new(3)?;
    let end = Instant::now() + time;
    while Instant::now() < end {
        let began = Instant::now();
        client.check(HealthCheckRequest::default()).await?;
        took.record(u64::try_from(began.elapsed().as_nanos())?)?;
    }
    Ok(took)
}
