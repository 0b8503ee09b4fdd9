//! A Cresset coordinator: one of three or five that agree by Raft on who runs what, and a public door to the cluster.
//!
//! | room | its job |
//! | --- | --- |
//! | [`consensus`] | the only place that knows Raft: an ordered, durable log of commands, and the state after it |
//! | [`leader`] | duties while leading: judge workers, place replicas, tell workers what to run |
//! | [`gateway`] | predictions for clients of any language: the router of `cresset-client`, fed from the state here |
//! | [`tables`] | what routers are told: changes of the routes, or a whole table |
//! | [`freshness`] | how old the copy of the state here may be |
//! | [`store`] | files of models that no repository holds, by SHA-256 |
//! | [`services`] | gRPC: decode, ask a handle, encode |
//!
//! What is agreed on, and how it changes, is `cresset-core`. Predictions never wait for consensus.
#![forbid(unsafe_code)]

pub mod config;
pub mod consensus;
pub mod freshness;
pub mod gateway;
pub mod leader;
pub mod metrics;
pub mod recovery;
pub mod services;
pub mod store;
pub mod tables;

use std::{sync::Arc, time::Duration};

use cresset_client::repository::Repository;
use cresset_core::{Command, CommandBody, CommandId, Outcome, PeerId, state::PeerInfo};
use cresset_proto::{
    DESCRIPTORS,
    fleet::v1::{files_service_server::FilesServiceServer, membership_service_server::MembershipServiceServer},
    inference::grpc_inference_service_server::SERVICE_NAME,
};
use cresset_runtime::server;
use tokio::{net::TcpListener, time::Instant};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::service::Routes;

use crate::{
    config::Config,
    consensus::{Consensus, TransferError},
    freshness::Freshness,
    services::Context,
    store::Store,
    tables::Tables,
};

/// How long a coordinator that stops tries to hand over leadership.
const HAND_OVER: Duration = Duration::from_secs(1);
/// How long one attempt to announce this coordinator's addresses may take.
const ANNOUNCE: Duration = Duration::from_secs(5);

/// Why a coordinator can't run, or stopped.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A port.
    #[error(transparent)]
    Server(#[from] server::Error),
    /// The log, or the settings of consensus.
    #[error(transparent)]
    Start(#[from] consensus::StartError),
    /// The folder for files of models.
    #[error("data-dir: can't make the folder for files of models: {0}")]
    Store(std::io::Error),
    /// There is a backup to begin from, or a group to give up, and that can't be done.
    #[error(transparent)]
    Recovery(#[from] recovery::RecoveryError),
    /// The log can't be written any more.
    #[error("consensus ended: {0}")]
    Consensus(#[from] consensus::NodeError),
}

/// The sockets of a coordinator; whoever starts it brings them.
#[derive(Debug)]
pub struct Listeners {
    /// Public: predictions, administration, routes.
    pub grpc: TcpListener,
    /// Metrics and health.
    pub http: TcpListener,
    /// Other coordinators, and workers.
    pub peer: TcpListener,
}

/// Runs a coordinator until `stop` is cancelled; then it hands over leadership, and closes its ports.
///
/// # Errors
/// [`Error`]. After [`Error::Consensus`] the process has to end: its log can't be trusted to take more.
pub async fn run(config: Config, listeners: Listeners, stop: CancellationToken) -> Result<(), Error> {
    let (consensus, raft, mut driver) = consensus::start(&config.consensus(), recovery::initial(&config)?)?;
    recovery::begun(&config)?;
    let closing = CancellationToken::new();
    let tasks = TaskTracker::new();
    let settings = leader::Settings::default();
    let probe = leader::probe::over_grpc(settings.probe_timeout_ms);
    let (leader, membership, fleet) = leader::new(consensus.clone(), settings, probe, closing.clone());
    tasks.spawn(leader.run(closing.clone()));

    let info = PeerInfo {
        grpc_address: config.advertised(&server::address(&listeners.grpc)?),
        http_address: config.advertised(&server::address(&listeners.http)?),
        peer_address: config.peers.get(&config.id).cloned().unwrap_or_default(),
    };
    tasks.spawn(closing.clone().run_until_cancelled_owned(announce(consensus.clone(), config.id, info)));

    let freshness = Freshness::default();
    tasks.spawn(closing.clone().run_until_cancelled_owned(freshness.clone().keep(consensus.clone())));
    let tables = Tables::new(consensus.clone());
    let (router, routed) = gateway::router(tables.clone(), config.router(), &tasks, &closing);
    let others = others(&consensus, &config);
    let store = Store::open(&config.data_dir.join("files"), &config.cluster_id, others).map_err(Error::Store)?;
    tasks.spawn(store.clone().follow(consensus.clone(), closing.clone()));
    let repository = Repository::new(&config.model_repository).remembering_digests();
    let known = services::Known { fleet, tables, freshness, routed };
    let context = Arc::new(Context::new(config.id, consensus.clone(), known, repository, store.clone(), closing.clone()));
    let public = services::routes(&context, &router, server::lanes(config.grpc_threads, 1), config.message_bytes_max);
    tasks.spawn(closing.clone().run_until_cancelled_owned(Arc::clone(&context).report(router.clone())));
    let (public, public_health) = server::with_health_and_reflection(public, DESCRIPTORS).await?;
    let membership = MembershipServiceServer::new(membership);
    let peer = Routes::new(raft).add_service(membership).add_service(FilesServiceServer::new(store));
    let (peer, peer_health) = server::with_health_and_reflection([peer], DESCRIPTORS).await?;
    server::set_health(&public_health, SERVICE_NAME, server::ServingStatus::Serving).await;
    peer_health.set_service_status("", server::ServingStatus::Serving).await;
    let limits = server::Limits {
        streams_per_connection_max: config.streams_per_connection_max,
        drain: config.drain,
        ..server::Limits::default()
    };
    let ready = {
        let raft = consensus.raft();
        Arc::new(move || raft.borrow().leader.is_some())
    };
    tasks.spawn(logged("grpc", server::serve_grpc(listeners.grpc, public, limits, closing.clone())));
    tasks.spawn(logged("peer", server::serve_grpc(listeners.peer, peer, limits, closing.clone())));
    tasks.spawn(logged("http", server::serve_http(listeners.http, ready, closing.clone())));
    tracing::info!(coordinator = %config.id, cluster = config.cluster_id, "started");

    let ended = tokio::select! {
        () = stop.cancelled() => None,
        ended = driver.ended() => Some(ended),
    };
    if ended.is_none() {
        server::set_health(&public_health, SERVICE_NAME, server::ServingStatus::NotServing).await;
        match consensus.transfer_here(None, Instant::now() + HAND_OVER).await {
            Ok(leader) => tracing::info!(leader = %PeerId(leader), "handed over leadership"),
            Err(TransferError::NotLeader { .. }) => {}
            // The others elect a leader by themselves, a moment later.
            Err(error) => tracing::warn!(%error, "couldn't hand over leadership"),
        }
    }
    closing.cancel();
    consensus.stop().await;
    tasks.close();
    tasks.wait().await;
    match ended {
        Some(ended) => ended?,
        None => driver.ended().await?,
    }
    tracing::info!(coordinator = %config.id, "stopped");
    Ok(())
}

/// Where the other coordinators are: as they announced it, until then as the settings say.
fn others(consensus: &Consensus, config: &Config) -> store::Others {
    let (consensus, id, settings) = (consensus.clone(), config.id, config.peers.clone());
    Box::new(move || {
        let state = consensus.state();
        let members = state.members.all();
        let address =
            |peer: &PeerId| state.peers.get(peer).map(|info| &info.peer_address).or_else(|| settings.get(peer)).cloned();
        members.iter().filter(|peer| **peer != id).filter_map(address).collect()
    })
}

async fn logged(port: &'static str, server: impl Future<Output = Result<(), server::Error>>) {
    if let Err(error) = server.await {
        tracing::error!(port, %error, "a port is closed");
    }
}

/// Tells the cluster where this coordinator is, until it knows.
async fn announce(consensus: Consensus, id: PeerId, info: PeerInfo) {
    let command = Command { id: CommandId(rand::random()), body: CommandBody::AnnouncePeer { peer: id, info: info.clone() } };
    let mut applied = consensus.applied();
    while consensus.state().peers.get(&id) != Some(&info) {
        match consensus.propose_retrying(&command, Instant::now() + ANNOUNCE).await {
            Ok(Outcome::Rejected(reject)) => {
                tracing::error!(%reject, "the cluster doesn't take this coordinator's addresses; clients won't find it");
                return;
            }
            // It is agreed on, and will be applied here too.
            Ok(_) => drop(applied.wait_for(|_| consensus.state().peers.get(&id) == Some(&info)).await),
            Err(error) if !error.retryable() => return,
            Err(error) => tracing::debug!(%error, "this coordinator's addresses aren't known to the cluster yet"),
        }
    }
}
