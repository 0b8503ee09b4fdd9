//! The public gRPC services: decode, ask a handle, encode. Nothing is decided here.
mod admin;
mod backup;
mod deploy;
mod inference;
mod members;
mod routes;
mod settings;
mod statistics;
mod status;

use std::{sync::Arc, time::Duration};

use cresset_client::{
    Router,
    repository::{Repository, RepositoryError, StoredModel},
};
use cresset_core::{Command, Outcome, PeerId, Reject, state::Epoch};
use cresset_proto::{
    admin::v1::admin_service_server::AdminServiceServer, fleet::v1::routes_service_server::RoutesServiceServer,
    inference::grpc_inference_service_server::GrpcInferenceServiceServer, metadata::timeout, reason::Reason,
};
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Status, codec::CompressionEncoding, metadata::MetadataMap, service::Routes};

use crate::{
    consensus::{Consensus, ProposeError},
    freshness::Freshness,
    leader::Fleet,
    store::Store,
    tables::Tables,
};

/// How long an administrative call without a deadline of its own may take.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest administrative message, in bytes.
const ADMIN_BYTES_MAX: usize = 64 << 20;

/// What is known here beside what is agreed on.
pub struct Known {
    /// What the leader hears of the workers.
    pub fleet: Fleet,
    /// What routers are told.
    pub tables: Tables,
    /// How old the copy of the state may be.
    pub freshness: Freshness,
    /// The epoch that this coordinator's own router was told of last.
    pub routed: watch::Receiver<Epoch>,
}

/// What the services ask.
pub struct Context {
    id: PeerId,
    consensus: Consensus,
    fleet: Fleet,
    tables: Tables,
    freshness: Freshness,
    routed: watch::Receiver<Epoch>,
    repository: Repository,
    store: Store,
    peers: status::Peers,
    closing: CancellationToken,
}

impl Context {
    /// Handles to everything.
    pub fn new(
        id: PeerId,
        consensus: Consensus,
        known: Known,
        repository: Repository,
        store: Store,
        closing: CancellationToken,
    ) -> Self {
        let Known { fleet, tables, freshness, routed } = known;
        Self { id, consensus, fleet, tables, freshness, routed, repository, store, peers: status::Peers::default(), closing }
    }

    /// Reads a model where it may take its time: one version, or those that its version policy chooses.
    async fn stored(&self, wanted: &deploy::Wanted) -> Result<Vec<StoredModel>, Status> {
        let (repository, wanted) = (self.repository.clone(), wanted.clone());
        let read = move || match wanted.version {
            Some(version) => repository.read(&wanted.name, Some(version)).map(|stored| vec![stored]),
            None => repository.read_chosen(&wanted.name, wanted.config),
        };
        let read = tokio::task::spawn_blocking(read).await;
        read.map_err(|error| Reason::Internal.status(error.to_string()))?.map_err(|error| repository_status(&error))
    }

    /// Has a command agreed on, and waits until this coordinator knows of it too: who asks it next may count on that.
    async fn propose(&self, command: &Command, deadline: Instant) -> Result<Outcome, Status> {
        let outcome = self.consensus.propose_retrying(command, deadline).await.map_err(|error| propose_status(&error))?;
        let (epoch, mut applied) = (deploy::epoch_of(&outcome), self.consensus.applied());
        // It is agreed in any case; one that can't catch up in time only says so later than it could.
        let _ = timeout_at(deadline, applied.wait_for(|applied| applied.epoch >= epoch)).await;
        Ok(outcome)
    }

    /// Waits until this coordinator's own router knows of an epoch: who deployed a model may ask it next. One that is told so late that
    /// the call would end before is no reason to say that the call failed.
    async fn until_routed(&self, epoch: Epoch, deadline: Instant) {
        let mut routed = self.routed.clone();
        let _ = timeout_at(deadline, routed.wait_for(|routed| *routed >= epoch)).await;
    }

    /// [`propose`](Self::propose), where a rejection is an error.
    async fn agree(&self, command: &Command, deadline: Instant) -> Result<Outcome, Status> {
        self.propose(command, deadline).await?.accepted().map_err(|reject| reject_status(&reject))
    }
}

/// All public services, for each of the threads that serve connections.
pub fn routes(context: &Arc<Context>, router: &Router, threads: usize, message_bytes_max: usize) -> Vec<Routes> {
    let (context, statistics) = (Arc::clone(context), statistics::Statistics::default());
    let lane = |_| {
        let (context, router, statistics) = (Arc::clone(&context), router.with_own_connections(), statistics.clone());
        services(inference::Inference { context, router, statistics }, message_bytes_max)
    };
    (0..threads).map(lane).collect()
}

fn services(inference: inference::Inference, message_bytes_max: usize) -> Routes {
    let context = &Arc::clone(&inference.context);
    let inference = GrpcInferenceServiceServer::new(inference)
        .max_decoding_message_size(message_bytes_max)
        .max_encoding_message_size(message_bytes_max)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let admin = AdminServiceServer::new(admin::Admin { context: Arc::clone(context) })
        .max_decoding_message_size(ADMIN_BYTES_MAX)
        .max_encoding_message_size(ADMIN_BYTES_MAX);
    let watched =
        RoutesServiceServer::new(routes::RouteWatch { context: Arc::clone(context) }).max_encoding_message_size(ADMIN_BYTES_MAX);
    Routes::new(inference).add_service(admin).add_service(watched)
}

/// When the caller of an administrative call stops waiting, a little early so that it hears why.
fn deadline(metadata: &MetadataMap) -> Instant {
    let limit = timeout(metadata).map_or(CALL_TIMEOUT, |limit| limit.saturating_sub(limit / 20).min(Duration::from_secs(3600)));
    Instant::now() + limit
}

fn propose_status(error: &ProposeError) -> Status {
    let reason = match error {
        ProposeError::NotLeader { .. } | ProposeError::Overloaded | ProposeError::Shutdown => Reason::NoLeader,
        ProposeError::Indeterminate { .. } | ProposeError::Unreachable { .. } => Reason::Indeterminate,
        ProposeError::MembersChanging | ProposeError::Refused { .. } => Reason::Conflict,
        ProposeError::TooLarge { .. } => Reason::InvalidArgument,
    };
    reason.status(error.to_string())
}

fn reject_status(reject: &Reject) -> Status {
    let reason = match reject {
        Reject::Invalid { .. } => Reason::InvalidArgument,
        Reject::UnknownWorker { .. } | Reject::UnknownModel { .. } | Reject::UnknownVersion { .. } => Reason::UnknownModel,
        Reject::AlreadyMember { .. } => Reason::AlreadyExists,
        Reject::StaleIncarnation { .. }
        | Reject::WorkerAtWork { .. }
        | Reject::StalePlan { .. }
        | Reject::TooMany { .. }
        | Reject::Labelled { .. }
        | Reject::NotAMember { .. }
        | Reject::PeerIdUsed { .. }
        | Reject::MembersChanging => Reason::Conflict,
    };
    reason.status(reject.to_string())
}

fn repository_status(error: &RepositoryError) -> Status {
    let reason = match error {
        RepositoryError::NoModel(_) | RepositoryError::NoVersion { .. } | RepositoryError::NoVersions(_) => Reason::UnknownModel,
        RepositoryError::Name(_)
        | RepositoryError::Pbtxt { .. }
        | RepositoryError::Config { .. }
        | RepositoryError::Given { .. }
        | RepositoryError::NoneChosen { .. }
        | RepositoryError::TooManyChosen { .. } => Reason::InvalidArgument,
        RepositoryError::Io { .. } | RepositoryError::Root(_) => Reason::LoadFailed,
    };
    reason.status(error.to_string())
}
