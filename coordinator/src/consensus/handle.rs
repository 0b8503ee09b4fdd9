//! What the rest of a coordinator holds of consensus: a cheap handle that proposes, reads and watches.
use std::{collections::BTreeMap, future::Future, pin::pin, sync::Arc, thread, time::Duration};

use cresset_core::{ClusterState, Command, CommandBody, Effect, Outcome, PeerId, level::Level, state::Epoch};
use cresset_proto::raft::v1::{
    ProposeRequest, ReadIndexRequest, TransferLeadershipRequest, raft_service_client::RaftServiceClient,
};
use parking_lot::RwLockReadGuard;
use tokio::{
    sync::{broadcast, oneshot, watch},
    time::{Instant, timeout, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, transport::Channel};

use super::{
    announced::{Announced, Heard},
    error::{ProposeError, ReadError, ReadRefused, TransferError},
    inbox::{Inbox, Input, NotQueued},
    machine::Shared,
    node::{MemberSeen, NodeError, NotTaken, RaftStatus},
    published::{Applied, Leadership, Watched},
    surroundings::Chance,
    transport::{Contacts, REQUEST_BYTES_MAX, jittered},
};

/// Between two attempts at the same thing.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_millis(250);
/// One attempt at a read. A leader that can't reach a majority doesn't answer at all.
const READ_ATTEMPT: Duration = Duration::from_millis(750);

/// A coordinator's part in the Raft group.
#[derive(Clone)]
pub struct Consensus {
    inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) id: u64,
    pub(super) cluster_id: String,
    pub(super) propose_timeout: Duration,
    pub(super) inbox: Inbox,
    pub(super) level_known: Level,
    pub(super) announced: Announced,
    pub(super) shared: Shared,
    pub(super) contacts: Contacts,
    pub(super) watched: Watched,
    pub(super) chance: Chance,
    pub(super) shutdown: CancellationToken,
}

impl Consensus {
    pub(super) fn new(inner: Inner) -> Self {
        Self { inner: Arc::new(inner) }
    }

    /// This coordinator's id.
    pub fn id(&self) -> u64 {
        self.inner.id
    }

    /// The cluster's name.
    pub fn cluster_id(&self) -> &str {
        &self.inner.cluster_id
    }

    /// The highest feature level that this coordinator knows.
    pub fn level_known(&self) -> Level {
        self.inner.level_known
    }

    /// The highest feature level that each coordinator knows, of those that are connected with this one; and of itself.
    pub fn levels_known(&self) -> BTreeMap<PeerId, Level> {
        let mut known = self.inner.announced.live();
        known.insert(PeerId(self.inner.id), self.inner.level_known);
        known
    }

    /// A peer says what it knows, and may do so as long as what is returned lives.
    pub(super) fn hear(&self, peer: u64, level: Level) -> Heard {
        self.inner.announced.hear(peer, level)
    }

    pub(super) fn was_removed(&self, id: u64) -> bool {
        self.state().was_removed(PeerId(id))
    }

    /// Has a command applied, by whichever peer leads: one attempt. May be called again with the same command after any
    /// error, since a command is applied once.
    ///
    /// # Errors
    /// [`ProposeError`]. After [`Indeterminate`](ProposeError::Indeterminate) and
    /// [`Unreachable`](ProposeError::Unreachable) the command may have been applied, or may be later.
    pub async fn propose(&self, command: &Command) -> Result<Outcome, ProposeError> {
        match self.propose_here(command).await {
            Err(ProposeError::NotLeader { leader: Some(leader) }) if leader != self.inner.id => {
                self.propose_at(leader, command).await
            }
            answer => answer,
        }
    }

    /// Has a command applied, trying again with the same id until `deadline`.
    ///
    /// # Errors
    /// The last attempt's [`ProposeError`], at the deadline, or at once if trying again can't help.
    pub async fn propose_retrying(&self, command: &Command, deadline: Instant) -> Result<Outcome, ProposeError> {
        let mut raft = self.raft();
        let mut wait = RETRY_MIN;
        let mut unsure = None;
        loop {
            raft.mark_unchanged();
            let attempt = timeout_at(deadline, self.propose(command)).await;
            let error = match attempt {
                Ok(Ok(outcome)) => return Ok(outcome),
                Ok(Err(error)) => error,
                // The attempt was cut off in the middle.
                Err(_) => ProposeError::Indeterminate { leader: self.raft().borrow().leader },
            };
            if matches!(error, ProposeError::Indeterminate { .. } | ProposeError::Unreachable { .. }) {
                unsure = Some(error.clone());
            }
            if !error.retryable() || Instant::now() + wait >= deadline {
                // What an earlier attempt left open stays open, even if the last one wasn't taken at all.
                return Err(unsure.unwrap_or(error));
            }
            self.pause(&mut raft, wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    /// Waits before another attempt: for a while, or for news about who leads.
    async fn pause(&self, raft: &mut watch::Receiver<RaftStatus>, wait: Duration) {
        let leader = self.raft().borrow().leader;
        let news = raft.wait_for(|status| status.leader.is_some() && status.leader != leader);
        let _ = timeout(jittered(wait, &self.inner.chance), async { drop(news.await) }).await;
    }

    /// One attempt, on this peer only.
    pub(super) async fn propose_here(&self, command: &Command) -> Result<Outcome, ProposeError> {
        let (reply, answer) = oneshot::channel();
        let change = match &command.body {
            CommandBody::ChangeMembers(change) => Some(change.clone()),
            _ => None,
        };
        let needs = command.body.needs();
        self.put(Input::Propose { id: command.id, command: command.encode(), needs, change, reply }).map_err(
            |full| match full {
                NotQueued::Full(_) => ProposeError::Overloaded,
                NotQueued::Closed => ProposeError::Shutdown,
            },
        )?;
        let unknown = || ProposeError::Indeterminate { leader: self.raft().borrow().leader };
        match timeout(self.inner.propose_timeout, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) | Err(_) => Err(unknown()),
        }
    }

    async fn propose_at(&self, leader: u64, command: &Command) -> Result<Outcome, ProposeError> {
        let encoded = command.encode();
        let bytes = encoded.len();
        let unreachable = |problem: String| ProposeError::Unreachable { leader, problem };
        let Some(mut client) = self.client(leader) else { return Err(unreachable("it isn't a peer".to_owned())) };
        let mut request = Request::new(ProposeRequest { cluster_id: self.inner.cluster_id.clone(), command: encoded.into() });
        request.set_timeout(self.inner.propose_timeout);
        let call = timeout(self.inner.propose_timeout, client.propose(request));
        let answer = self.unless_ending(call).await.ok_or(ProposeError::Shutdown)?;
        let answer = answer.map_err(|_| unreachable("no answer in time".to_owned()))?;
        let outcome = answer.map_err(|status| ProposeError::from_status(leader, bytes, &status))?.into_inner().outcome;
        Outcome::decode(&outcome).map_err(|error| unreachable(error.to_string()))
    }

    /// Waits until [`state`](Self::state) holds everything that was acknowledged anywhere before this call, and returns
    /// the index that it needed.
    ///
    /// # Errors
    /// [`ReadError`], at `deadline` at the latest.
    pub async fn read_barrier(&self, deadline: Instant) -> Result<u64, ReadError> {
        let wanted = self.read_index(deadline).await?;
        let mut applied = self.applied();
        let caught_up = timeout_at(deadline, applied.wait_for(|applied| applied.index >= wanted)).await.map(|r| r.is_ok());
        match caught_up {
            Ok(true) => Ok(wanted),
            Ok(false) => Err(ReadError::Shutdown),
            Err(_) => Err(ReadError::Behind { applied: self.applied().borrow().index, wanted }),
        }
    }

    async fn read_index(&self, deadline: Instant) -> Result<u64, ReadError> {
        let mut raft = self.raft();
        let mut wait = RETRY_MIN;
        loop {
            raft.mark_unchanged();
            let refused = match timeout_at(deadline.min(Instant::now() + READ_ATTEMPT), self.read_index_once()).await {
                Ok(Ok(index)) => return Ok(index),
                Ok(Err(refused)) => Some(refused),
                Err(_) => None,
            };
            if refused == Some(ReadRefused::Shutdown) {
                return Err(ReadError::Shutdown);
            }
            if Instant::now() + wait >= deadline {
                return Err(match refused {
                    Some(ReadRefused::Overloaded) => ReadError::Overloaded,
                    Some(refused) => ReadError::NoLeader { problem: refused.to_string() },
                    None => ReadError::NoLeader { problem: "it has no majority".to_owned() },
                });
            }
            self.pause(&mut raft, wait).await;
            wait = (wait * 2).min(RETRY_MAX);
        }
    }

    async fn read_index_once(&self) -> Result<u64, ReadRefused> {
        let leader = match self.read_index_here().await {
            Err(ReadRefused::NotLeader { leader: Some(leader) }) if leader != self.inner.id => leader,
            answer => return answer,
        };
        let gone = || ReadRefused::Unreachable { leader, problem: "it isn't a peer".to_owned() };
        let mut client = self.client(leader).ok_or_else(gone)?;
        let mut request = Request::new(ReadIndexRequest { cluster_id: self.inner.cluster_id.clone() });
        request.set_timeout(READ_ATTEMPT);
        let answer = self.unless_ending(client.read_index(request)).await.ok_or(ReadRefused::Shutdown)?;
        answer.map(|answer| answer.into_inner().index).map_err(|status| ReadRefused::from_status(leader, &status))
    }

    /// One attempt, on this peer only.
    pub(super) async fn read_index_here(&self) -> Result<u64, ReadRefused> {
        let (reply, answer) = oneshot::channel();
        self.put(Input::Read { reply }).map_err(|full| match full {
            NotQueued::Full(_) => ReadRefused::Overloaded,
            NotQueued::Closed => ReadRefused::Shutdown,
        })?;
        answer.await.unwrap_or(Err(ReadRefused::Shutdown))
    }

    /// The state, as far as it is applied here. Hold the guard for a moment only, and never across an `await`: while it is
    /// held, nothing is applied, and this coordinator's part in the agreement stands still.
    pub fn state(&self) -> RwLockReadGuard<'_, ClusterState> {
        self.inner.shared.state().read()
    }

    /// A copy of the state, as far as it is applied here, without the answers to past commands: to be looked at for as long as it
    /// takes, while commands are applied.
    pub fn view(&self) -> ClusterState {
        self.state().without_answers()
    }

    /// How far the state has come.
    pub fn applied(&self) -> watch::Receiver<Applied> {
        self.inner.watched.applied.clone()
    }

    /// The state's epoch: what workers and routers are told. Most entries change none.
    pub fn epoch(&self) -> watch::Receiver<Epoch> {
        self.inner.watched.epoch.clone()
    }

    /// Where this peer stands.
    pub fn raft(&self) -> watch::Receiver<RaftStatus> {
        self.inner.watched.raft.clone()
    }

    /// Who leads, as this peer knows it.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        self.inner.watched.leadership.clone()
    }

    /// What commands change, with their index, from now on. A receiver that is too slow misses some and is told so; it
    /// must look at [`state`](Self::state) then.
    pub fn effects(&self) -> broadcast::Receiver<(u64, Effect)> {
        self.inner.watched.effects.subscribe()
    }

    /// What the leader knows of each member; nothing if this peer doesn't lead.
    pub async fn members_seen(&self) -> Vec<MemberSeen> {
        let (reply, answer) = oneshot::channel();
        if self.put(Input::Members { reply }).is_err() {
            return Vec::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Has leadership handed to this voter, or to any other than the present leader, by whoever leads. Returns who leads then.
    ///
    /// # Errors
    /// [`TransferError`], at `deadline` at the latest. Leadership may have changed nevertheless.
    pub async fn transfer_leadership(&self, to: Option<u64>, deadline: Instant) -> Result<u64, TransferError> {
        match self.transfer_here(to, deadline).await {
            Err(TransferError::NotLeader { leader: Some(leader) }) if leader != self.inner.id => {
                if to == Some(leader) {
                    return Ok(leader);
                }
                let cluster_id = self.inner.cluster_id.clone();
                let problem = "it isn't a peer".to_owned();
                let mut client = self.client(leader).ok_or(TransferError::Unreachable { leader, problem })?;
                let mut request = Request::new(TransferLeadershipRequest { cluster_id, to_peer: to.unwrap_or_default() });
                request.set_timeout(deadline.saturating_duration_since(Instant::now()));
                let call = timeout_at(deadline, client.transfer_leadership(request));
                let answer = self.unless_ending(call).await.ok_or(TransferError::Shutdown)?;
                let answer = answer.map_err(|_| TransferError::TimedOut)?;
                answer.map(|answer| answer.into_inner().leader).map_err(|status| TransferError::from_status(leader, &status))
            }
            answer => answer,
        }
    }

    /// The same, if this peer leads.
    ///
    /// # Errors
    /// [`TransferError`].
    pub async fn transfer_here(&self, to: Option<u64>, deadline: Instant) -> Result<u64, TransferError> {
        let (reply, answer) = oneshot::channel();
        let mut raft = self.raft();
        let term = raft.borrow().term;
        self.put(Input::TransferLeadership { to, reply }).map_err(|_| TransferError::Shutdown)?;
        match answer.await.map_err(|_| TransferError::Shutdown)? {
            Ok(()) => {}
            Err(NotTaken::NotLeader { leader }) => return Err(TransferError::NotLeader { leader }),
            Err(NotTaken::Refused(refusal)) => return Err(TransferError::Refused { problem: refusal.to_string() }),
            Err(why) => return Err(TransferError::Refused { problem: why.to_string() }),
        }
        if to == Some(self.inner.id) {
            return Ok(self.inner.id);
        }
        let done = raft.wait_for(|status| status.term > term && status.leader.is_some());
        match timeout_at(deadline, done).await {
            Ok(Ok(status)) => status.leader.ok_or(TransferError::TimedOut),
            Ok(Err(_)) => Err(TransferError::Shutdown),
            Err(_) => Err(TransferError::TimedOut),
        }
    }

    /// Ends this peer: its streams, its tasks and its thread. Hand over leadership first. The [`DriverHandle`] tells when
    /// it is done.
    pub async fn stop(&self) {
        self.inner.inbox.put_surely(Input::Stop).await;
        self.inner.shutdown.cancel();
    }

    fn put(&self, input: Input) -> Result<(), NotQueued> {
        self.inner.inbox.put(input)
    }

    async fn unless_ending<T>(&self, call: impl Future<Output = T>) -> Option<T> {
        self.inner.shutdown.run_until_cancelled(pin!(call)).await
    }

    fn client(&self, peer: u64) -> Option<RaftServiceClient<Channel>> {
        let channel = self.inner.contacts.channel(peer)?;
        Some(
            RaftServiceClient::new(channel)
                .max_decoding_message_size(REQUEST_BYTES_MAX)
                .max_encoding_message_size(REQUEST_BYTES_MAX),
        )
    }
}

/// The driver's thread, seen from outside.
#[derive(Debug)]
pub struct DriverHandle {
    pub(super) thread: Option<thread::JoinHandle<()>>,
    pub(super) ended: oneshot::Receiver<Result<(), NodeError>>,
}

impl DriverHandle {
    /// Waits for the driver to end; its folder is free then.
    ///
    /// # Errors
    /// [`NodeError`] if it could not go on; it has been logged. The process should end with exit code 1.
    pub async fn ended(&mut self) -> Result<(), NodeError> {
        let result = (&mut self.ended).await;
        if let Some(thread) = self.thread.take() {
            // It sends its result last, so this doesn't wait.
            let _ = thread.join();
        }
        result.unwrap_or(Ok(()))
    }
}
