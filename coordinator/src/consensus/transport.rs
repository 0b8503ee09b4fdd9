//! To the other peers: one task, one bounded queue and one stream for each.
//!
//! Sending never waits: a queue that is full loses the message, and the driver is told so. Raft repairs what is lost, but
//! not what is late, so messages that waited for a broken connection for too long are dropped too. A snapshot goes over a
//! connection of its own, and its fate is always reported.
use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use cresset_core::{ClusterState, PeerId, level::Level};
use cresset_proto::raft::v1::{DeliverRequest, InstallSnapshotRequest, raft_service_client::RaftServiceClient};
use parking_lot::RwLock;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Status,
    transport::{Channel, Endpoint},
};
use tracing::{debug, info, warn};

use super::{
    inbox::{Inbox, Input, WeakInbox},
    node::Envelope,
    settings::Settings,
    surroundings::{Chance, Network},
};

/// Messages that may wait for one peer.
const QUEUE_MESSAGES_MAX: usize = 512;
/// Messages in one request, and their bytes unless one alone has more.
const BATCH_MESSAGES_MAX: usize = 128;
const BATCH_BYTES_MAX: usize = 2 << 20;
/// Largest request of the peer service: a batch with one largest message on top.
pub(super) const REQUEST_BYTES_MAX: usize = 8 << 20;
/// Data in one request of a snapshot's transfer.
const CHUNK_BYTES: usize = 1 << 20;
/// Messages that waited for longer are of the past.
const STALE_AFTER: Duration = Duration::from_millis(500);
/// How a peer that was removed is answered.
pub(super) const REMOVED: Code = Code::FailedPrecondition;
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);

/// Channels for single calls to the other peers, by their ids. Cheap to clone; [`Links`] keeps it up to date.
#[derive(Debug, Clone, Default)]
pub(super) struct Contacts(Arc<RwLock<BTreeMap<u64, Channel>>>);

impl Contacts {
    /// A channel to this peer, if it is known.
    pub(super) fn channel(&self, peer: u64) -> Option<Channel> {
        self.0.read().get(&peer).cloned()
    }
}

/// The queues to all other peers, which follow the members and their addresses.
pub(super) struct Links {
    wiring: Wiring,
    links: BTreeMap<u64, Link>,
    contacts: Contacts,
    /// What each peer said of itself, as far as it was looked at.
    announced: BTreeMap<u64, String>,
}

/// What every link needs.
struct Wiring {
    cluster_id: String,
    id: u64,
    inbox: WeakInbox,
    snapshot_timeout: Duration,
    shutdown: CancellationToken,
    runtime: tokio::runtime::Handle,
    level_known: Level,
    standing: Arc<RwLock<Standing>>,
    network: Arc<dyn Network>,
    chance: Chance,
}

/// What every request tells of the cluster, as far as this peer has come: how it began, and the feature level in force.
#[derive(Debug, Clone, Default, PartialEq)]
struct Standing {
    founders: Vec<u64>,
    origin: String,
    level: Level,
}

struct Link {
    address: String,
    messages: mpsc::Sender<Waiting>,
    snapshots: mpsc::Sender<Envelope>,
    end: CancellationToken,
}

impl Drop for Link {
    fn drop(&mut self) {
        self.end.cancel();
    }
}

struct Waiting {
    since: Instant,
    message: Vec<u8>,
}

impl Links {
    /// Starts the tasks to the peers of the settings; they end with `shutdown`. Must be called inside a runtime.
    pub(super) fn spawn(
        settings: &Settings,
        inbox: &Inbox,
        network: Arc<dyn Network>,
        chance: Chance,
        shutdown: &CancellationToken,
    ) -> Self {
        let wiring = Wiring {
            cluster_id: settings.cluster_id.clone(),
            id: settings.id,
            inbox: inbox.downgrade(),
            snapshot_timeout: settings.snapshot_timeout,
            shutdown: shutdown.clone(),
            runtime: tokio::runtime::Handle::current(),
            level_known: settings.level_known,
            standing: Arc::default(),
            network,
            chance,
        };
        let (links, contacts, announced) = (BTreeMap::new(), Contacts::default(), BTreeMap::new());
        let mut all = Self { wiring, links, contacts, announced };
        settings.peers.iter().for_each(|(&peer, address)| all.connect(peer, address));
        all
    }

    /// The channels for single calls.
    pub(super) fn contacts(&self) -> Contacts {
        self.contacts.clone()
    }

    /// Connects to new members, to those that moved, and no longer to those that are gone.
    pub(super) fn follow(&mut self, state: &ClusterState) {
        let known = self.wiring.standing.read().clone();
        // Founders become known once, and never change after that.
        if known.founders.len() != state.founders.len() || known.level != state.level {
            let founders = state.founders.iter().map(|peer| peer.0).collect();
            *self.wiring.standing.write() = Standing { founders, origin: state.origin.clone(), level: state.level };
        }
        for (&PeerId(peer), info) in &state.peers {
            let moved = match self.announced.entry(peer) {
                // Until it announces another address, the one of the settings is as good.
                Entry::Vacant(entry) => {
                    entry.insert(info.peer_address.clone());
                    !self.links.contains_key(&peer)
                }
                Entry::Occupied(mut entry) if *entry.get() != info.peer_address => {
                    entry.insert(info.peer_address.clone());
                    true
                }
                Entry::Occupied(_) => false,
            };
            if moved {
                self.connect(peer, &info.peer_address);
            }
        }
        if state.members.voters.is_empty() {
            return; // nobody has told yet who they are
        }
        let gone = |peer: &u64| !state.members.contains(PeerId(*peer));
        for (peer, _) in self.links.extract_if(.., |peer, _| gone(peer)) {
            info!(peer, "no longer a member");
            self.contacts.0.write().remove(&peer);
            self.announced.remove(&peer);
        }
    }

    fn connect(&mut self, peer: u64, address: &str) {
        let is_old = self.links.get(&peer).is_some_and(|link| link.address == address);
        if peer == self.wiring.id || is_old {
            return;
        }
        let Some(inbox) = self.wiring.inbox.upgrade() else { return }; // the process is ending
        let _inside = self.wiring.runtime.enter();
        match endpoint(address) {
            Ok(endpoint) => {
                self.contacts.0.write().insert(peer, self.wiring.network.connect_lazily(endpoint));
                self.links.insert(peer, self.wiring.link(inbox, peer, address));
            }
            Err(error) => warn!(peer, address, %error, "the address of a peer can't be one; it isn't connected to"),
        }
    }

    /// Queues a message; `false` if it is lost.
    pub(super) fn send(&self, envelope: Envelope) -> bool {
        let Some(link) = self.links.get(&envelope.to) else { return false };
        if envelope.snapshot.is_some() {
            return link.snapshots.try_send(envelope).is_ok();
        }
        link.messages.try_send(Waiting { since: Instant::now(), message: envelope.message }).is_ok()
    }
}

impl Wiring {
    /// Two queues to a peer, and the tasks that empty them.
    fn link(&self, inbox: Inbox, peer: u64, address: &str) -> Link {
        let (messages, waiting) = mpsc::channel(QUEUE_MESSAGES_MAX);
        let (snapshots, transfers) = mpsc::channel(1);
        let wire = Wire {
            cluster_id: self.cluster_id.clone(),
            id: self.id,
            peer,
            address: address.to_owned(),
            inbox,
            level_known: self.level_known,
            standing: Arc::clone(&self.standing),
            network: Arc::clone(&self.network),
            chance: Chance::clone(&self.chance),
        };
        let (to_deliver, to_install, timeout) = (wire.clone(), wire, self.snapshot_timeout);
        let end = self.shutdown.child_token();
        let (deliver_end, install_end) = (end.clone(), end.clone());
        self.runtime.spawn(async move { deliver_end.run_until_cancelled(to_deliver.deliver(waiting)).await });
        self.runtime.spawn(async move { install_end.run_until_cancelled(to_install.install(transfers, timeout)).await });
        Link { address: address.to_owned(), messages, snapshots, end }
    }
}

/// How a peer is connected to.
///
/// # Errors
/// If the address can't be one.
pub(super) fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    Ok(Endpoint::from_shared(format!("http://{address}"))?
        .connect_timeout(Duration::from_secs(1))
        .http2_keep_alive_interval(Duration::from_secs(1))
        .keep_alive_timeout(Duration::from_secs(1))
        .keep_alive_while_idle(true)
        .tcp_nodelay(true))
}

/// One direction of a pair of peers.
#[derive(Clone)]
struct Wire {
    cluster_id: String,
    id: u64,
    peer: u64,
    address: String,
    inbox: Inbox,
    level_known: Level,
    standing: Arc<RwLock<Standing>>,
    network: Arc<dyn Network>,
    chance: Chance,
}

impl Wire {
    async fn deliver(self, mut waiting: mpsc::Receiver<Waiting>) {
        let mut backoff = BACKOFF_MIN;
        let mut told = false;
        loop {
            let began = Instant::now();
            let Err(status) = self.deliver_once(&mut waiting).await else { return };
            if began.elapsed() > BACKOFF_MAX {
                (backoff, told) = (BACKOFF_MIN, false);
            }
            if !told {
                info!(peer = self.peer, address = self.address, problem = status.message(), "connection to peer lost");
                told = true;
            }
            if status.code() == REMOVED && !self.inbox.put_surely(Input::Removed { by: self.peer }).await {
                return;
            }
            if !self.inbox.put_surely(Input::Unreachable { peer: self.peer }).await {
                return;
            }
            tokio::time::sleep(jittered(backoff, &self.chance)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Delivers over one connection until it breaks; `Ok` once there is nobody left to deliver for.
    async fn deliver_once(&self, waiting: &mut mpsc::Receiver<Waiting>) -> Result<(), Status> {
        let mut client = self.connect().await?;
        debug!(peer = self.peer, address = self.address, "connected to peer");
        let (requests, stream) = mpsc::channel(1);
        let call = client.deliver(ReceiverStream::new(stream));
        tokio::pin!(call);
        let broken = |result: Result<_, Status>| match result {
            Ok(_) => Status::unavailable("the peer ended the stream"),
            Err(status) => status,
        };
        loop {
            let first = tokio::select! {
                biased;
                result = &mut call => return Err(broken(result)),
                first = waiting.recv() => first,
            };
            let Some(first) = first else { return Ok(()) };
            let request = self.batch(first, waiting);
            if request.messages.is_empty() {
                continue;
            }
            tokio::select! {
                biased;
                result = &mut call => return Err(broken(result)),
                sent = requests.send(request) => sent.map_err(|_| Status::unavailable("the stream has ended"))?,
            }
        }
    }

    /// A message, with those that wait behind it.
    fn batch(&self, first: Waiting, waiting: &mut mpsc::Receiver<Waiting>) -> DeliverRequest {
        let mut messages = Vec::new();
        let mut bytes = 0;
        let mut next = Some(first);
        while let Some(Waiting { since, message }) = next {
            if since.elapsed() < STALE_AFTER {
                bytes += message.len();
                messages.push(Bytes::from(message));
            }
            if bytes >= BATCH_BYTES_MAX || messages.len() >= BATCH_MESSAGES_MAX {
                break;
            }
            next = waiting.try_recv().ok();
        }
        let Standing { founders, origin, level } = self.standing.read().clone();
        let (cluster_id, from_peer, to_peer) = (self.cluster_id.clone(), self.id, self.peer);
        let (level_known, level) = (self.level_known.into(), level.into());
        DeliverRequest { cluster_id, from_peer, to_peer, messages, founders, origin, level_known, level }
    }

    async fn install(self, mut transfers: mpsc::Receiver<Envelope>, timeout: Duration) {
        while let Some(envelope) = transfers.recv().await {
            let Some(data) = envelope.snapshot else { continue };
            let bytes = data.len();
            let transfer = tokio::time::timeout(timeout, self.install_once(envelope.message.into(), data)).await;
            let result = transfer.unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("not done in {timeout:?}"))));
            match &result {
                Ok(()) => info!(peer = self.peer, bytes, "snapshot sent"),
                Err(status) => warn!(peer = self.peer, bytes, problem = status.message(), "snapshot not sent"),
            }
            if !self.inbox.put_surely(Input::SnapshotSent { peer: self.peer, arrived: result.is_ok() }).await {
                return;
            }
        }
    }

    async fn install_once(&self, message: Bytes, data: Bytes) -> Result<(), Status> {
        let mut client = self.connect().await?;
        let (requests, stream) = mpsc::channel(1);
        let call = client.install_snapshot(ReceiverStream::new(stream));
        let feed = async {
            for request in self.chunks(message, data) {
                if requests.send(request).await.is_err() {
                    break; // The call has ended, and says why.
                }
            }
            drop(requests);
        };
        let (result, ()) = tokio::join!(call, feed);
        result.map(|_| ())
    }

    fn chunks(&self, message: Bytes, data: Bytes) -> impl Iterator<Item = InstallSnapshotRequest> {
        let crc32 = crc32fast::hash(&data);
        let count = data.len().div_ceil(CHUNK_BYTES).max(1);
        let Standing { founders, origin, .. } = self.standing.read().clone();
        (0..count).map(move |n| {
            let (start, end) = (n * CHUNK_BYTES, data.len().min((n + 1) * CHUNK_BYTES));
            InstallSnapshotRequest {
                cluster_id: self.cluster_id.clone(),
                from_peer: self.id,
                to_peer: self.peer,
                message: if n == 0 { message.clone() } else { Bytes::new() },
                data: data.slice(start..end),
                crc32: (n + 1 == count).then_some(crc32),
                founders: founders.clone(),
                origin: origin.clone(),
            }
        })
    }

    async fn connect(&self) -> Result<RaftServiceClient<Channel>, Status> {
        let failed = |error: tonic::transport::Error| Status::unavailable(format!("can't connect: {}", root(&error)));
        let channel = self.network.connect(endpoint(&self.address).map_err(failed)?).await.map_err(failed)?;
        Ok(RaftServiceClient::new(channel))
    }
}

/// The innermost cause, which is the one that says something.
fn root(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// Between half of it and all of it: peers that lost each other together don't come back together.
pub(super) fn jittered(wait: Duration, chance: &Chance) -> Duration {
    wait.mul_f64(0.5 + chance() / 2.0)
}
