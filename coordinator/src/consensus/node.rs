//! One member of the Raft group as a plain value: inputs go in, promises come out, in one written order.
//!
//! Absent here: threads, clocks, sockets and tokio. Time is a count of [`tick`](Node::tick)s, chance is a function that
//! the caller gives, and a disk is a [`LogStore`]. The same code runs in production and under a simulation.
//!
//! The raft library panics when its state can't be right. Such a panic must end the process: nobody may catch it and go
//! on, since a promise could be broken by then.
use std::fmt;

use cresset_core::level::Level;
use protobuf::Message as _;
use raft::{
    Config, RawNode, ReadOnlyOption, SnapshotStatus, StateRole,
    eraftpb::{ConfState, Entry, EntryType, HardState, Message, MessageType, Snapshot},
};

pub(super) use self::members::is_change;
pub use self::members::{MemberSeen, Refusal};
use self::members::{conf_of, members_of};
use super::{
    guard::{self, Refused},
    log::{LogError, LogStore, Shelf, Stored},
    machine::StateMachine,
    settings::{COMMAND_BYTES_MAX, Settings},
};

/// Where every founder's log begins: an identical snapshot at this index, of this term.
const FOUNDING: (u64, u64) = (1, 1);

/// One member of the Raft group.
pub struct Node<L: LogStore, M> {
    raw: RawNode<Shelf<L>>,
    machine: M,
    limits: Limits,
    draw: ElectionDraw,
    round: Round,
    applied: u64,
    applied_bytes: u64,
    /// The members, as of `applied`.
    conf: ConfState,
    contact: members::Contact,
    /// Why nothing is added to the log.
    brake: Option<Refusal>,
}

struct Limits {
    snapshot_entries: u64,
    snapshot_bytes: u64,
    keep_entries: u64,
    election_ticks: std::ops::Range<usize>,
}

/// Chooses how many ticks of silence a peer waits before it stands for election. What it returns is moved into the range
/// of the settings.
pub type ElectionDraw = Box<dyn FnMut(Round) -> usize + Send>;

/// What an election timeout is drawn for. A function of this alone makes a run replayable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Round {
    /// The peer that draws.
    pub id: u64,
    /// The term it is in.
    pub term: u64,
    /// How often it has drawn before, in this life.
    pub number: u64,
}

/// What a peer is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Decides.
    Leader,
    /// Follows a leader, or waits for one.
    Follower,
    /// Stands for election.
    Candidate,
    /// Follows, and has no vote.
    Learner,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Leader => "leader",
            Self::Follower => "follower",
            Self::Candidate => "candidate",
            Self::Learner => "learner",
        })
    }
}

/// Where a peer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftStatus {
    /// The peer.
    pub id: u64,
    /// What it is doing.
    pub role: Role,
    /// The term it is in.
    pub term: u64,
    /// Who leads that term, as far as it knows.
    pub leader: Option<u64>,
    /// The last entry that it knows to be committed.
    pub commit: u64,
    /// The last entry that it has applied.
    pub applied: u64,
}

/// A message on its way to a peer.
#[derive(Debug, Clone, PartialEq)]
pub struct Envelope {
    /// Who it is for.
    pub to: u64,
    /// The encoded message, without a snapshot's data.
    pub message: Vec<u8>,
    /// A snapshot's data, which travels on a connection of its own. Its fate must be
    /// [reported](Node::report_snapshot), or the peer is never sent anything again.
    pub snapshot: Option<bytes::Bytes>,
}

/// Where a node's outputs go, as soon as each is due.
pub trait Sink<O> {
    /// A message may leave now.
    fn send(&mut self, envelope: Envelope);
    /// The command at `index` was applied. Indexes only grow, but not each one holds a command.
    fn applied(&mut self, index: u64, outcome: O);
    /// The read that was asked for with `context` is current once `index` is applied.
    fn readable(&mut self, context: u64, index: u64);
}

/// Why a proposal or a read wasn't taken. Nothing has happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// Only a leader takes them.
    #[error("this peer doesn't lead")]
    NotLeader {
        /// Who does, as far as it knows.
        leader: Option<u64>,
    },
    /// It leads, but can't yet, or can't any more: it hasn't committed in its term, or it is handing over.
    #[error("this peer is just taking over or handing over leadership")]
    Changing,
    /// Too many bytes wait for their commit.
    #[error("too many proposals wait for their commit")]
    Overloaded,
    /// One change of the members at a time.
    #[error("another change of the members is under way")]
    MembersChanging,
    /// As things are, it would do harm.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The command is too long.
    #[error("the command has {bytes} bytes, at most {COMMAND_BYTES_MAX} are taken")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
}

/// Why a node can't start or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The log can't be read or written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A committed command can't be read.
    #[error("committed entry {index} can't be applied: {source}")]
    Apply {
        /// Where it is.
        index: u64,
        /// Why it can't be read.
        source: cresset_core::DecodeError,
    },
    /// The snapshot can't be read.
    #[error("the snapshot at {index} can't be restored: {problem}")]
    Snapshot {
        /// Its index.
        index: u64,
        /// Why it can't be read.
        problem: String,
    },
    /// Its part in the cluster is over.
    #[error(
        "this coordinator, c{id}, was removed from the cluster; stop it for good. To have one on this machine again, empty its folder and add it under a new id: `cresset member add`"
    )]
    Removed {
        /// Who was removed.
        id: u64,
    },
    /// The cluster has gone beyond this version of Cresset.
    #[error(
        "the cluster is at feature level {level}, this coordinator, c{id}, knows levels up to {known}; install the version of Cresset that the other coordinators run and start it again, its folder stays as it is"
    )]
    Outdated {
        /// Who is too old.
        id: u64,
        /// What is in force.
        level: u32,
        /// What it knows.
        known: Level,
    },
    /// The raft library refused its configuration or its own output.
    #[error("raft: {0}")]
    Raft(String),
}

impl<L: LogStore, M: StateMachine> Node<L, M> {
    /// Starts from what `store` holds. An empty one is founded with the state of `machine`, which must be the same on
    /// every founder; or, if the settings say so, waits for a leader that has it as a member.
    ///
    /// # Errors
    /// [`NodeError`] if the store can't be read, or doesn't fit the settings.
    pub fn new(
        settings: &Settings,
        mut store: L,
        mut machine: M,
        mut draw: ElectionDraw,
        logger: &slog::Logger,
    ) -> Result<Self, NodeError> {
        let stored = match store.load()? {
            Some(stored) => stored,
            None if settings.join => Stored::default(),
            None => found(&mut store, settings.peers.keys().copied(), &machine.snapshot())?,
        };
        let metadata = stored.snapshot.get_metadata();
        let (applied, conf) = (metadata.index, metadata.get_conf_state().clone());
        if applied > 0 {
            restore(&mut machine, &stored.snapshot)?;
        }
        let shelf = Shelf::new(store, stored);
        let raw = RawNode::new(&config(settings, applied), shelf, logger).map_err(|error| NodeError::Raft(error.to_string()))?;
        let limits = Limits {
            snapshot_entries: settings.snapshot_entries,
            snapshot_bytes: settings.snapshot_bytes,
            keep_entries: settings.keep_entries,
            election_ticks: settings.election_ticks_min..settings.election_ticks_max,
        };
        let round = Round { id: settings.id, term: raw.raft.term, number: 0 };
        let first = limits.clamp(draw(round));
        let contact = members::Contact::default();
        let mut node = Self { raw, machine, limits, draw, round, applied, applied_bytes: 0, conf, contact, brake: None };
        node.raw.raft.set_randomized_election_timeout(first);
        Ok(node)
    }

    /// A tick of time has passed.
    pub fn tick(&mut self) {
        self.contact.tick();
        self.guarded(|raw| raw.tick());
        self.leave_joint();
    }

    /// A message from a peer has arrived; `from` is who the transport knows it to be from.
    ///
    /// # Errors
    /// [`Refused`] if no honest member can have sent it. The node is as it was.
    pub fn step(&mut self, from: u64, message: &[u8], snapshot: Option<bytes::Bytes>) -> Result<(), Refused> {
        let refused = |problem| Refused { from, kind: "unknown", problem };
        let mut message = Message::parse_from_bytes(message).map_err(|_| refused("it doesn't parse"))?;
        if let Some(data) = snapshot {
            message.mut_snapshot().set_data(data);
        }
        guard::check(&self.raw.raft, from, &message)?;
        if message.get_msg_type() == MessageType::MsgSnapshot {
            // Once the library has it, there is no way back.
            let data = open(message.get_snapshot());
            if data.is_none_or(|data| self.machine.check(data).is_err()) {
                return Err(Refused { from, kind: "snapshot", problem: "its data is damaged" });
            }
        }
        if self.raw.raft.prs().get(from).is_some() {
            self.contact.heard(from);
        }
        if self.brake.is_some() {
            match message.get_msg_type() {
                MessageType::MsgSnapshot => return Err(Refused { from, kind: "snapshot", problem: "there is no room for it" }),
                // As if it had been lost on the way; it is sent again.
                MessageType::MsgAppend if !message.entries.is_empty() => return Ok(()),
                _ => {}
            }
        }
        // What is left of errors here (a vote from a past term, say) is the library's way of ignoring a message.
        self.guarded(|raw| raw.step(message).ok());
        Ok(())
    }

    /// Appends a command, if this peer leads. Whether it commits is told by [`Sink::applied`], or never.
    ///
    /// # Errors
    /// [`NotTaken`]: it is not in the log.
    pub fn propose(&mut self, command: Vec<u8>) -> Result<(), NotTaken> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(NotTaken::TooLarge { bytes: command.len() });
        }
        self.leading()?;
        if self.raw.raft.lead_transferee.is_some() {
            return Err(NotTaken::Changing);
        }
        if let Some(refusal) = &self.brake {
            return Err(refusal.clone().into());
        }
        self.guarded(|raw| raw.propose(Vec::new(), command)).map_err(|_| NotTaken::Overloaded)
    }

    /// From now on nothing is added to the log, for this reason; `None`: it is again. What needs no room goes on.
    pub fn brake(&mut self, why: Option<Refusal>) {
        self.brake = why;
    }

    /// Asks for an index that a current read has to wait for, if this peer leads. It is told by [`Sink::readable`], or
    /// never if leadership is lost. `context` must be unique in this life.
    ///
    /// # Errors
    /// [`NotTaken`]: ask again, here or elsewhere.
    pub fn read_index(&mut self, context: u64) -> Result<(), NotTaken> {
        self.leading()?;
        if !self.raw.raft.commit_to_current_term() {
            // The library would drop it without a word.
            return Err(NotTaken::Changing);
        }
        self.guarded(|raw| raw.read_index(context.to_be_bytes().to_vec()));
        Ok(())
    }

    /// Whether this peer leads, has committed in its term, and has applied everything that it knows to be committed.
    pub fn is_current(&self) -> bool {
        let raft = &self.raw.raft;
        self.leading().is_ok() && raft.commit_to_current_term() && self.applied == raft.raft_log.committed
    }

    fn leading(&self) -> Result<(), NotTaken> {
        match self.status() {
            RaftStatus { role: Role::Leader, .. } => Ok(()),
            RaftStatus { leader, .. } => Err(NotTaken::NotLeader { leader }),
        }
    }

    /// A message to `peer` was lost.
    pub fn report_unreachable(&mut self, peer: u64) {
        self.guarded(|raw| raw.report_unreachable(peer));
    }

    /// A snapshot has reached `peer`, or hasn't. Every one that was sent needs this call.
    pub fn report_snapshot(&mut self, peer: u64, arrived: bool) {
        let status = if arrived { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.guarded(|raw| raw.report_snapshot(peer, status));
    }

    /// Where this peer stands.
    pub fn status(&self) -> RaftStatus {
        let raft = &self.raw.raft;
        RaftStatus {
            id: raft.id,
            role: match raft.state {
                StateRole::Leader => Role::Leader,
                StateRole::Follower if self.conf.learners.contains(&raft.id) => Role::Learner,
                StateRole::Follower => Role::Follower,
                StateRole::Candidate | StateRole::PreCandidate => Role::Candidate,
            },
            term: raft.term,
            leader: (raft.leader_id != 0).then_some(raft.leader_id),
            commit: raft.raft_log.committed,
            applied: self.applied,
        }
    }

    /// The state machine.
    pub fn machine(&self) -> &M {
        &self.machine
    }

    /// The store, for its [`checkpoint`](LogStore::checkpoint).
    pub fn store_mut(&mut self) -> &mut L {
        self.raw.mut_store().store_mut()
    }

    /// Ends this life; the store is all that survives.
    pub fn into_store(self) -> L {
        self.raw.raft.r.raft_log.store.into_store()
    }

    /// Does everything that the inputs since the last call ask for. Call it after every input, or every few.
    ///
    /// # Errors
    /// [`NodeError`]; the node must not be used any more, and nothing that it did since may be taken back.
    pub fn on_ready(&mut self, sink: &mut impl Sink<M::Outcome>) -> Result<(), NodeError> {
        while self.raw.has_ready() {
            self.one_ready(sink)?;
        }
        self.take_snapshot()
    }

    /// The one written order. Right for a state that is held in memory and rebuilt from snapshot and log.
    fn one_ready(&mut self, sink: &mut impl Sink<M::Outcome>) -> Result<(), NodeError> {
        let mut ready = self.raw.ready();
        // A leader's messages promise nothing about its own disk: peers may write while it does.
        send(ready.take_messages(), sink)?;
        for read in ready.take_read_states() {
            if let Ok(context) = read.request_ctx.try_into() {
                sink.readable(u64::from_be_bytes(context), read.index);
            }
        }
        // What is committed here was persisted before. Its callers needn't wait for the next write.
        self.apply(ready.take_committed_entries(), sink)?;
        let snapshot = Some(ready.snapshot()).filter(|snapshot| !snapshot.is_empty());
        let hard_state = ready.hs();
        if snapshot.is_some() || hard_state.is_some() || !ready.entries().is_empty() {
            self.raw.mut_store().persist(hard_state, snapshot, ready.entries(), ready.must_sync())?;
        }
        if let Some(snapshot) = snapshot {
            restore(&mut self.machine, snapshot)?;
            self.conf = snapshot.get_metadata().get_conf_state().clone();
            (self.applied, self.applied_bytes) = (snapshot.get_metadata().index, 0);
        }
        // Votes and acknowledgements: they leave only now that the disk holds what they promise.
        send(ready.take_persisted_messages(), sink)?;
        let mut light = self.guarded(|raw| raw.advance(ready));
        if let Some(commit) = light.commit_index() {
            self.raw.mut_store().save_commit(commit)?;
        }
        send(light.take_messages(), sink)?;
        self.apply(light.take_committed_entries(), sink)?;
        self.guarded(|raw| raw.advance_apply());
        self.step_down_if_removed();
        Ok(())
    }

    fn apply(&mut self, entries: Vec<Entry>, sink: &mut impl Sink<M::Outcome>) -> Result<(), NodeError> {
        for entry in entries {
            let index = entry.index;
            if entry.get_entry_type() != EntryType::EntryNormal {
                self.apply_change(&entry, sink)?;
            } else if !entry.data.is_empty() {
                // A new leader begins its term with an entry that says nothing.
                let outcome = self.machine.apply(index, &entry.data).map_err(|source| NodeError::Apply { index, source })?;
                sink.applied(index, outcome);
            }
            self.applied = index;
            self.applied_bytes += entry.data.len() as u64;
        }
        Ok(())
    }

    /// Takes a snapshot if enough was applied since the last, or if a peer needs a newer one.
    fn take_snapshot(&mut self) -> Result<(), NodeError> {
        let held = self.raw.store().snapshot_held().get_metadata().clone();
        let due = self.applied - held.index >= self.limits.snapshot_entries
            || self.applied_bytes >= self.limits.snapshot_bytes
            || self.raw.store().take_fresh_wanted();
        if !due || self.applied == held.index {
            return Ok(());
        }
        let Some(term) = self.raw.store().term_of(self.applied) else {
            return Err(NodeError::Raft(format!("applied entry {} isn't in the log", self.applied)));
        };
        let snapshot = sealed((self.applied, term), self.conf.clone(), &self.machine.snapshot());
        let keep_bytes = self.limits.snapshot_bytes / 2;
        self.raw.mut_store().save_snapshot(snapshot, self.limits.keep_entries, keep_bytes)?;
        self.applied_bytes = 0;
        Ok(())
    }

    /// Every call that changes the library's state goes through here: it draws election timeouts from a generator of its
    /// own, and ours has to replace each of those.
    fn guarded<T>(&mut self, call: impl FnOnce(&mut RawNode<Shelf<L>>) -> T) -> T {
        let before = self.stand();
        let ticks = self.raw.raft.randomized_election_timeout();
        let result = call(&mut self.raw);
        let ticks = if self.stand() == before {
            ticks
        } else {
            self.round = Round { term: self.raw.raft.term, number: self.round.number + 1, ..self.round };
            self.limits.clamp((self.draw)(self.round))
        };
        self.raw.raft.set_randomized_election_timeout(ticks);
        result
    }

    /// The library draws anew only where one of these changes.
    fn stand(&self) -> (u64, StateRole, u64) {
        (self.raw.raft.term, self.raw.raft.state, self.raw.raft.leader_id)
    }
}

impl Limits {
    fn clamp(&self, ticks: usize) -> usize {
        ticks.clamp(self.election_ticks.start, self.election_ticks.end - 1)
    }
}

fn config(settings: &Settings, applied: u64) -> Config {
    Config {
        id: settings.id,
        applied,
        election_tick: settings.election_ticks_min,
        min_election_tick: settings.election_ticks_min,
        max_election_tick: settings.election_ticks_max,
        heartbeat_tick: settings.heartbeat_ticks,
        max_size_per_msg: settings.message_bytes_max,
        max_inflight_msgs: settings.inflight_messages_max,
        max_uncommitted_size: settings.uncommitted_bytes_max,
        max_committed_size_per_ready: settings.uncommitted_bytes_max,
        check_quorum: true,
        pre_vote: true,
        // Leases would trust clocks, which a paused process has none of.
        read_only_option: ReadOnlyOption::Safe,
        skip_bcast_commit: false,
        // It would join messages beyond max_size_per_msg, up to all that are in flight.
        batch_append: false,
        priority: 0,
    }
}

/// Founders start from an identical snapshot, so that the log's first entry already has members.
fn found(store: &mut impl LogStore, voters: impl Iterator<Item = u64>, state: &[u8]) -> Result<Stored, NodeError> {
    let (index, term) = FOUNDING;
    let snapshot = sealed(FOUNDING, conf_of(voters), state);
    let hard_state = HardState { term, commit: index, ..HardState::default() };
    let stored = Stored { hard_state, snapshot, base: FOUNDING, entries: Vec::new() };
    let mut shelf = Shelf::new(store, Stored::default());
    shelf.persist(Some(&stored.hard_state), Some(&stored.snapshot), &[], true)?;
    Ok(stored)
}

/// A snapshot whose data begins with the CRC-32 of the rest.
fn sealed((index, term): (u64, u64), conf: ConfState, state: &[u8]) -> Snapshot {
    let mut data = Vec::with_capacity(state.len() + 4);
    data.extend(crc32fast::hash(state).to_le_bytes());
    data.extend(state);
    let mut snapshot = Snapshot::default();
    snapshot.set_data(data.into());
    let metadata = snapshot.mut_metadata();
    (metadata.index, metadata.term) = (index, term);
    metadata.set_conf_state(conf);
    snapshot
}

/// The state inside a snapshot, if it is whole.
fn open(snapshot: &Snapshot) -> Option<&[u8]> {
    let (crc, state) = snapshot.get_data().split_first_chunk()?;
    (u32::from_le_bytes(*crc) == crc32fast::hash(state)).then_some(state)
}

pub(super) fn restore<M: StateMachine>(machine: &mut M, snapshot: &Snapshot) -> Result<(), NodeError> {
    let index = snapshot.get_metadata().index;
    let failed = |problem| NodeError::Snapshot { index, problem };
    let state = open(snapshot).ok_or_else(|| failed("its checksum is wrong".to_owned()))?;
    let members = members_of(snapshot.get_metadata().get_conf_state());
    machine.restore(state, &members).map_err(|error| failed(error.to_string()))
}

fn send<O>(messages: Vec<Message>, sink: &mut impl Sink<O>) -> Result<(), NodeError> {
    for mut message in messages {
        let snapshot =
            (message.get_msg_type() == MessageType::MsgSnapshot).then(|| std::mem::take(&mut message.mut_snapshot().data));
        let to = message.to;
        let message = message.write_to_bytes().map_err(|error| NodeError::Raft(error.to_string()))?;
        sink.send(Envelope { to, message, snapshot });
    }
    Ok(())
}

mod members;
#[cfg(test)]
mod tests;
