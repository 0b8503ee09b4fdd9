//! A Cresset worker: runs libtorch on its devices, holds replicas, and answers predictions and streams.
//!
//! | room | its job |
//! | --- | --- |
//! | [`engine`] | the only place that knows libtorch: loads models, runs them, one thread for each device |
//! | [`contract`] | what a model's configuration promises its callers; pure |
//! | [`admission`] | does a request fit its model? pure |
//! | [`batching`] | which requests wait, and when a batch is cut from them; pure |
//! | [`batch`] | from requests to one call, from its results to answers; with [`ragged`] shapes and [`classify`] |
//! | [`queue`] | requests that wait, and the tasks that feed the devices |
//! | [`sequence`] | requests that share state |
//! | [`decoupled`] | requests with any number of answers |
//! | [`assignment`] | what to load and unload so that the worker runs what it should; pure |
//! | [`health`] | whether a device can be trusted, and when to try it; pure |
//! | [`devices`] | the devices, watched: canaries, calls that run too long |
//! | [`models`] | fetch, verify, load, [warm up](warm_up), serve, unload |
//! | [`membership`] | the tie to the leader |
//! | [`shared_memory`] | tensors that clients on this host share with the worker |
//! | [`statistics`] | what each model has done |
//! | [`predict`] | from a request to an answer |
//! | [`service`] | gRPC: decode, ask, encode |
#![deny(unsafe_code)]

pub mod admission;
pub mod assignment;
pub mod batch;
pub mod batching;
pub mod classify;
pub mod config;
pub mod contract;
pub mod decoupled;
pub mod devices;
pub mod engine;
pub mod error;
pub mod files;
pub mod health;
pub mod membership;
pub mod metrics;
pub mod models;
pub mod predict;
pub mod queue;
pub mod ragged;
pub mod sequence;
pub mod service;
pub mod shared_memory;
pub mod statistics;
pub mod warm_up;

use std::{
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cresset_client::repository::Repository;
use cresset_proto::fleet::v1;
use cresset_runtime::server;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    config::{Config, DeviceChoice},
    engine::{AnyEngine, Device, EngineError, cuda, device::DeviceThread, set_threads},
    files::Files,
    membership::{Introduction, Membership, Tie},
    models::{Models, Runner},
    predict::Worker,
};

/// Why a worker can't run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port.
    #[error(transparent)]
    Server(#[from] server::Error),
    /// A device, or libtorch itself.
    #[error("no device to run models on: {0}")]
    Engine(#[from] EngineError),
    /// The folder for files of models.
    #[error("cache-dir: can't make the folder for files of models: {0}; choose another with --cache-dir")]
    Cache(std::io::Error),
    /// The system has no thread left.
    #[error("can't start a device's thread: {0}")]
    Thread(std::io::Error),
}

/// The sockets of a worker; whoever starts it brings them.
#[derive(Debug)]
pub struct Listeners {
    /// For predictions.
    pub grpc: TcpListener,
    /// For metrics and health.
    pub http: TcpListener,
}

/// Why a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to, or was removed from the cluster.
    Stopped,
    /// A device can only be used again by a new process: this one should be [started
    /// again](cresset_runtime::process::start_again).
    GivenUp,
}

/// Runs a worker until `stop` is cancelled or a device of it is lost, then drains it: the cluster is told, routes move, open
/// work is finished.
///
/// # Errors
/// [`Error`], before anything is served.
pub async fn run(config: Config, listeners: Listeners, stop: CancellationToken) -> Result<Ended, Error> {
    let devices = devices(&config)?;
    let mut threads = Vec::new();
    for (device, _) in &devices {
        threads.push(DeviceThread::spawn(*device).map_err(Error::Thread)?);
    }
    let engine = Arc::new(AnyEngine { null_enabled: config.null_engine });
    let files = Files::new(config.coordinators.clone(), config.cache_dir.clone()).map_err(Error::Cache)?;
    let models = Models::with_files(Repository::new(&config.model_repository), files, engine, threads, config.bounds);
    models.set_load_max_ms(config.load_max_ms);
    models.devices().set_execution_max_ms(config.execution_max_ms);
    models.devices().set_intra_op_threads(intra_op_threads(&config));
    let worker = Worker::new(config.id.clone(), incarnation(), models);
    worker.detached.set_bounds(config.detached);
    let introduction = Introduction {
        grpc_address: server::address(&listeners.grpc)?.to_string(),
        http_address: server::address(&listeners.http)?.to_string(),
        zone: config.zone.clone(),
        tags: config.tags.clone(),
        devices: devices
            .iter()
            .map(|(device, memory_bytes)| v1::Device { name: device.to_string(), memory_bytes: *memory_bytes })
            .collect(),
    };
    tracing::info!(worker = %config.id, grpc = introduction.grpc_address, devices = ?devices, "starting");

    let tasks = TaskTracker::new();
    let closed = CancellationToken::new();
    let leaving = stop.child_token();
    let (membership, tie) = Membership::new(Arc::clone(&worker), introduction, config.coordinators.clone(), leaving.clone());
    tasks.spawn(membership.run(closed.clone()));
    let (routes, health) =
        service::routes(Arc::clone(&worker), server::lanes(config.grpc_threads, 2), config.message_bytes_max).await?;
    let detached = Arc::clone(&worker.detached);
    tasks.spawn(closed.clone().run_until_cancelled_owned(async move { detached.sweep().await }));
    tasks.spawn(watch(worker.models.clone(), health.clone(), leaving.clone(), closed.clone()));
    let ready = {
        let (worker, tie) = (Arc::clone(&worker), tie.clone());
        Arc::new(move || !worker.is_draining() && *tie.borrow() == Tie::Registered)
    };
    let limits = server::Limits {
        streams_per_connection_max: config.streams_per_connection_max,
        drain: config.drain,
        ..server::Limits::default()
    };
    let http = tasks.spawn(server::serve_http(listeners.http, ready, closed.clone()));
    let grpc = tokio::spawn(server::serve_grpc(listeners.grpc, routes, limits, closed.clone()));

    let mut watched = tie.clone();
    let ended = tokio::select! {
        () = stop.cancelled() => Ended::Stopped,
        Ok(_) = watched.wait_for(|tie| *tie == Tie::Removed) => Ended::Stopped,
        () = worker.models.devices().given_up().cancelled() => Ended::GivenUp,
    };
    leaving.cancel();
    drain(&worker, tie, config.drain).await;
    closed.cancel();
    tasks.close();
    tasks.wait().await;
    for port in [grpc.await, http.await] {
        if let Ok(Err(error)) = port {
            tracing::warn!(%error, "a port didn't close in order");
        }
    }
    tracing::info!(worker = %config.id, ?ended, "stopped");
    Ok(if stop.is_cancelled() { Ended::Stopped } else { ended })
}

/// Watches the devices, and has the health service say what they are: every service answers as long as one device does, and
/// each device has a name of its own there, as in `device/cuda:0`.
async fn watch(models: Models, health: server::HealthReporter, leaving: CancellationToken, closed: CancellationToken) {
    let watching = tokio::spawn(models.clone().watch_devices());
    let mut changes = models.changes();
    changes.mark_changed();
    loop {
        tokio::select! {
            () = closed.cancelled() => break,
            () = leaving.cancelled() => {}
            changed = changes.changed() => if changed.is_err() { break },
        }
        let status = |serves| if serves { server::ServingStatus::Serving } else { server::ServingStatus::NotServing };
        let mut any = false;
        for device in models.devices().all() {
            let serves = models.devices().fenced(&[device]).is_none() && !leaving.is_cancelled();
            any |= serves;
            health.set_service_status(format!("device/{device}"), status(serves)).await;
        }
        for service in service::NAMES {
            health.set_service_status(service, status(any)).await;
        }
        if leaving.is_cancelled() {
            closed.cancelled().await;
            break;
        }
    }
    watching.abort();
}

/// Waits until routes have moved away, then takes nothing new, then waits for what is open; all within `limit`.
async fn drain(worker: &Arc<Worker>, mut tie: tokio::sync::watch::Receiver<Tie>, limit: Duration) {
    let deadline = tokio::time::Instant::now() + limit;
    // If nobody can be told, half of the time is left for the work that is open.
    let _ = tokio::time::timeout(limit / 2, tie.wait_for(|tie| matches!(tie, Tie::Left | Tie::Removed))).await;
    worker.drain();
    let mut check = tokio::time::interval(Duration::from_millis(10));
    while !idle(worker) && tokio::time::Instant::now() < deadline {
        check.tick().await;
    }
}

fn idle(worker: &Worker) -> bool {
    worker.in_flight() == 0
        && worker.models.served().iter().all(|served| match &served.runner {
            Runner::Queue(queue) => queue.is_empty(),
            Runner::Decoupled(decoupled) => decoupled.is_empty(),
            Runner::Sequences(_) => true,
        })
}

/// A number that no earlier life of this worker had, as long as the machine's clock goes forward; if it doesn't, the
/// leader says which number to take.
fn incarnation() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn intra_op_threads(config: &Config) -> u16 {
    let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
    if config.intra_op_threads == 0 { cores } else { config.intra_op_threads }
}

/// The devices to use, with their memory in bytes.
fn devices(config: &Config) -> Result<Vec<(Device, u64)>, Error> {
    let gpus = match config.device {
        DeviceChoice::Cpu => Ok(0),
        DeviceChoice::Auto | DeviceChoice::Cuda => cuda::load(&libraries_dir()),
    };
    let gpus = match (gpus, config.device) {
        (Ok(gpus), _) => gpus,
        (Err(error), DeviceChoice::Cuda) => return Err(error.into()),
        (Err(error), _) => {
            tracing::info!(%error, "no GPU, using the cpu");
            0
        }
    };
    set_threads(intra_op_threads(config), 1)?;
    if gpus == 0 {
        return Ok(vec![(Device::Cpu, config.memory_bytes.unwrap_or_else(machine_memory_bytes))]);
    }
    (0..gpus).map(|ordinal| Ok((Device::Cuda(ordinal), cuda::memory_bytes(ordinal)?.1))).collect()
}

/// The folder that libtorch was loaded from: its CUDA half has to be of the same release, and lies beside it.
pub fn libraries_dir() -> PathBuf {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let library = maps.lines().filter_map(|line| line.split_whitespace().last()).find(|path| path.ends_with("/libtorch_cpu.so"));
    library.and_then(|path| PathBuf::from(path).parent().map(PathBuf::from)).unwrap_or_default()
}

/// The machine's memory, in bytes; 0 where it can't be told.
fn machine_memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) * 1024
}
