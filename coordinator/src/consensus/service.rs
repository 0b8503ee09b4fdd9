//! From the other peers: checks who speaks to whom, and hands on what they say.
use std::{collections::BTreeSet, time::Duration};

use bytes::{Bytes, BytesMut};
use cresset_core::{
    Command, PeerId,
    level::{LEVEL_FIRST, Level},
};
use cresset_proto::{
    metadata::timeout,
    raft::v1::{
        DeliverRequest, DeliverResponse, InstallSnapshotRequest, InstallSnapshotResponse, ProposeRequest, ProposeResponse,
        ReadIndexRequest, ReadIndexResponse, TransferLeadershipRequest, TransferLeadershipResponse,
        raft_service_server::{RaftService, RaftServiceServer},
    },
};
use tokio::{
    sync::{Semaphore, oneshot},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};
use tracing::warn;

use super::{
    announced::Heard,
    handle::Consensus,
    inbox::{Inbox, Input, NotQueued},
    settings::SNAPSHOT_BYTES_MAX,
    transport::{REMOVED, REQUEST_BYTES_MAX},
};

/// Most messages in one request.
const MESSAGES_MAX: usize = 1_024;
/// Longest wait for a new leader on behalf of another peer.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(30);
/// Snapshots that may arrive at a time.
const TRANSFERS_MAX: usize = 2;

/// The peer service, to be added to the server of the peer port.
pub type RaftServer = RaftServiceServer<PeerService>;

/// What other coordinators call.
pub struct PeerService {
    consensus: Consensus,
    inbox: Inbox,
    transfers: Semaphore,
    shutdown: CancellationToken,
}

pub(super) fn server(consensus: Consensus, inbox: Inbox, shutdown: CancellationToken) -> RaftServer {
    let service = PeerService { consensus, inbox, transfers: Semaphore::new(TRANSFERS_MAX), shutdown };
    RaftServiceServer::new(service).max_decoding_message_size(REQUEST_BYTES_MAX).max_encoding_message_size(REQUEST_BYTES_MAX)
}

impl PeerService {
    fn check_cluster(&self, cluster_id: &str) -> Result<(), Status> {
        if cluster_id == self.consensus.cluster_id() {
            return Ok(());
        }
        let found: String = cluster_id.chars().filter(|c| !c.is_control()).take(128).collect();
        let ours = self.consensus.cluster_id();
        warn!(found, ours, "refused a call from another cluster");
        Err(Status::permission_denied(format!("this is cluster '{ours}', the caller is of '{found}'; check its peers")))
    }

    /// A coordinator that was started with an empty folder and without `join` has founded a cluster of its own.
    /// So has one that was given another backup to begin from.
    fn check_beginning(&self, from: u64, theirs: &[u64], origin: &str) -> Result<(), Status> {
        let state = self.consensus.state();
        let theirs: BTreeSet<PeerId> = theirs.iter().copied().map(PeerId).collect();
        if theirs.is_empty() || state.founders.is_empty() {
            return Ok(());
        }
        if theirs == state.founders && origin != state.origin {
            let (ours, id) = (&state.origin, self.consensus.id());
            warn!(from, theirs = origin, ours, "refused a call of a peer that began from another backup");
            return Err(Status::permission_denied(format!(
                "c{id} began from {}, c{from} from {}: these are two clusters. Begin again with empty folders and the same backup for each",
                backup(ours),
                backup(origin)
            )));
        }
        if theirs == state.founders {
            return Ok(());
        }
        let names = |peers: &BTreeSet<PeerId>| peers.iter().take(9).map(PeerId::to_string).collect::<Vec<_>>().join(", ");
        let (theirs, ours, id) = (names(&theirs), names(&state.founders), self.consensus.id());
        warn!(from, theirs, ours, "refused a call of a peer that was founded by others");
        Err(Status::permission_denied(format!(
            "c{id} was founded by {ours}, c{from} by {theirs}: these are two clusters. To add a coordinator, start it with an empty folder and --join true"
        )))
    }

    /// Checks one request of a stream. A stream belongs to one pair of peers for its whole life.
    fn check_pair(&self, cluster_id: &str, from: u64, to: u64, known: &mut Option<u64>) -> Result<(), Status> {
        self.check_cluster(cluster_id)?;
        let id = self.consensus.id();
        if to != id {
            return Err(Status::permission_denied(format!("this is c{id}, not c{to}; check the addresses of the peers")));
        }
        if from != 0 && self.consensus.was_removed(from) {
            return Err(Status::new(REMOVED, format!("c{from} was removed from the cluster, or never was in it")));
        }
        // Who isn't known to be a member may be one nevertheless: this peer may have been away while it was added.
        if from == 0 || from == id || known.is_some_and(|known| known != from) {
            return Err(Status::permission_denied(format!("c{from} is not the peer that may speak here")));
        }
        *known = Some(from);
        Ok(())
    }

    /// One that can't read what is agreed on can't take part: neither the caller, nor this coordinator itself.
    async fn check_level(&self, from: u64, known: Level, in_force_there: u32) -> Result<(), Status> {
        let id = self.consensus.id();
        if in_force_there > self.consensus.level_known().into() {
            self.inbox.put_surely(Input::Outdated { by: from, level: in_force_there }).await;
            return Err(ended());
        }
        let level = self.consensus.state().level;
        if known >= level {
            return Ok(());
        }
        warn!(from, known, level, "refused a call of a coordinator that is too old");
        Err(Status::permission_denied(format!(
            "c{from} knows feature levels up to {known}, c{id} is at {level}: install the version of Cresset on c{from} that the other coordinators run"
        )))
    }

    async fn deliver_all(&self, mut stream: Streaming<DeliverRequest>) -> Result<(), Status> {
        let mut peer = None;
        let mut heard: Option<Heard> = None;
        while let Some(request) = stream.message().await? {
            let from = request.from_peer;
            self.check_pair(&request.cluster_id, from, request.to_peer, &mut peer)?;
            self.check_beginning(from, &request.founders, &request.origin)?;
            let known = level_known(&request);
            if heard.as_ref().is_none_or(|heard| heard.level() != known) {
                heard = Some(self.consensus.hear(from, known));
            }
            self.check_level(from, known, request.level).await?;
            if request.messages.len() > MESSAGES_MAX {
                return Err(Status::invalid_argument(format!("messages has more than {MESSAGES_MAX} items")));
            }
            for message in request.messages {
                match self.inbox.put(Input::Message { from, message }) {
                    Ok(()) => {}
                    Err(NotQueued::Closed) => return Err(ended()),
                    // The peer that waits here is the one that sends too much, so its stream is held back.
                    Err(NotQueued::Full(input)) => {
                        if !self.inbox.put_surely(input).await {
                            return Err(ended());
                        }
                    }
                }
            }
        }
        Ok(())
    }

    async fn receive(&self, mut stream: Streaming<InstallSnapshotRequest>) -> Result<(), Status> {
        let Ok(_permit) = self.transfers.try_acquire() else {
            return Err(Status::resource_exhausted(format!("{TRANSFERS_MAX} snapshots are arriving already")));
        };
        let mut peer = None;
        let mut message = Bytes::new();
        let mut data = BytesMut::new();
        let mut crc32 = None;
        while let Some(request) = stream.message().await? {
            let first = peer.is_none();
            self.check_pair(&request.cluster_id, request.from_peer, request.to_peer, &mut peer)?;
            self.check_beginning(request.from_peer, &request.founders, &request.origin)?;
            if crc32.is_some() {
                return Err(Status::invalid_argument("data goes on after the chunk with crc32"));
            }
            if first {
                message = request.message;
            }
            if data.len() + request.data.len() > SNAPSHOT_BYTES_MAX {
                return Err(Status::invalid_argument(format!("data has more than {SNAPSHOT_BYTES_MAX} bytes")));
            }
            data.extend_from_slice(&request.data);
            crc32 = request.crc32;
        }
        let Some(from) = peer else { return Err(Status::invalid_argument("the stream is empty")) };
        let data = data.freeze();
        if crc32 != Some(crc32fast::hash(&data)) {
            return Err(Status::data_loss("crc32 is missing or doesn't fit the data"));
        }
        let (taken, answer) = oneshot::channel();
        if !self.inbox.put_surely(Input::Snapshot { from, message, data, taken }).await {
            return Err(ended());
        }
        match answer.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(refused)) => {
                warn!(%refused, "dropped a snapshot of a peer");
                Err(Status::invalid_argument(refused.to_string()))
            }
            Err(_) => Err(ended()),
        }
    }
}

#[tonic::async_trait]
impl RaftService for PeerService {
    async fn deliver(&self, request: Request<Streaming<DeliverRequest>>) -> Result<Response<DeliverResponse>, Status> {
        // These streams live as long as their peers: without this, a server that drains would wait for ever.
        let result = self.shutdown.run_until_cancelled(self.deliver_all(request.into_inner())).await;
        result.unwrap_or_else(|| Err(ended())).map(|()| Response::new(DeliverResponse {}))
    }

    async fn install_snapshot(
        &self,
        request: Request<Streaming<InstallSnapshotRequest>>,
    ) -> Result<Response<InstallSnapshotResponse>, Status> {
        let result = self.shutdown.run_until_cancelled(self.receive(request.into_inner())).await;
        result.unwrap_or_else(|| Err(ended())).map(|()| Response::new(InstallSnapshotResponse {}))
    }

    async fn propose(&self, request: Request<ProposeRequest>) -> Result<Response<ProposeResponse>, Status> {
        let ProposeRequest { cluster_id, command } = request.into_inner();
        self.check_cluster(&cluster_id)?;
        let command = Command::decode(&command).map_err(|error| Status::invalid_argument(error.to_string()))?;
        match self.consensus.propose_here(&command).await {
            Ok(outcome) => Ok(Response::new(ProposeResponse { outcome: outcome.encode().into() })),
            Err(error) => Err(error.to_status()),
        }
    }

    async fn transfer_leadership(
        &self,
        request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        let limit = timeout(request.metadata()).unwrap_or(TRANSFER_TIMEOUT).min(TRANSFER_TIMEOUT);
        let TransferLeadershipRequest { cluster_id, to_peer } = request.into_inner();
        self.check_cluster(&cluster_id)?;
        let to = (to_peer != 0).then_some(to_peer);
        let done = self.consensus.transfer_here(to, Instant::now() + limit).await;
        done.map(|leader| Response::new(TransferLeadershipResponse { leader })).map_err(|error| error.to_status())
    }

    async fn read_index(&self, request: Request<ReadIndexRequest>) -> Result<Response<ReadIndexResponse>, Status> {
        self.check_cluster(&request.into_inner().cluster_id)?;
        let index = self.consensus.read_index_here().await.map_err(|refused| refused.to_status())?;
        Ok(Response::new(ReadIndexResponse { index }))
    }
}

/// The highest feature level that the sender knows. One before there were levels says nothing.
fn level_known(request: &DeliverRequest) -> Level {
    // One that is beyond our numbers knows more than we can ask for.
    Level::try_from(request.level_known).unwrap_or(Level::MAX).max(LEVEL_FIRST)
}

fn ended() -> Status {
    Status::unavailable("this coordinator is shutting down")
}

/// What a peer began from, for people.
fn backup(origin: &str) -> String {
    if origin.is_empty() { "no backup".to_owned() } else { format!("backup {}", origin.chars().take(16).collect::<String>()) }
}
