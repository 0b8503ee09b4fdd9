//! Changes of the members: how they get into the log, how they take effect, and when a leader refuses to begin one.
//!
//! A change is a command like any other, carried by an entry of Raft's own kind: the state machine judges it at its index, the
//! same everywhere, and only what it accepts is told to the library. A change of voters goes by way of a joint configuration,
//! in which the voters of before and those of after both have to agree; it is left again without being asked.
use std::collections::{BTreeMap, BTreeSet};

use cresset_core::{
    PeerId,
    level::{Level, LevelTooLow},
    members::{MemberChange, Members},
};
use protobuf::Message as _;
use raft::{
    ProgressState, RawNode, StateRole,
    eraftpb::{ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState, Entry},
};

use super::{Node, NodeError, NotTaken, Sink};
use crate::consensus::{
    log::{LogStore, Shelf},
    machine::StateMachine,
    settings::COMMAND_BYTES_MAX,
};

/// A learner that lacks more entries can't be promoted: as a voter it would hold up every decision.
const BEHIND_MAX: u64 = 1_000;

/// Why a leader doesn't begin a change of the members, or doesn't hand over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It would be a voter that nobody can wait for.
    #[error(
        "c{peer} lacks {behind} of the leader's entries, at most {BEHIND_MAX} may be missing; try again when it has caught up, `cresset member list` shows how far it is"
    )]
    Behind {
        /// Who.
        peer: u64,
        /// How many entries it lacks.
        behind: u64,
    },
    /// Nobody answers there.
    #[error(
        "c{peer} doesn't answer the leader c{leader}; check that it runs, and that its address in `cresset member list` is right"
    )]
    Silent {
        /// Who.
        peer: u64,
        /// Who asked.
        leader: u64,
    },
    /// Nothing could be agreed on any more, this change included.
    #[error(
        "of the voters {} only {} answer, {needed} must: nothing could be agreed on any more; bring one back that doesn't answer, or change the members so that it isn't needed: remove it, or promote a learner in its place",
        names(voters),
        names(live)
    )]
    NoQuorum {
        /// Who would vote.
        voters: BTreeSet<PeerId>,
        /// Those of them that answer.
        live: BTreeSet<PeerId>,
        /// How many have to.
        needed: usize,
    },
    /// There is nobody to hand over to.
    #[error("no other voter answers the leader c{leader}, so there is nobody to hand over to")]
    Alone {
        /// Who leads.
        leader: u64,
    },
    /// The log can't grow.
    #[error(
        "the disk of c{peer} has {free_mib} MiB left, of which the log takes none: nothing can be agreed on until there is room in the file system of its data folder; predictions and reads go on"
    )]
    DiskFull {
        /// Whose disk.
        peer: u64,
        /// What is free.
        free_mib: u64,
    },
    /// Not every coordinator is known to understand it.
    #[error(transparent)]
    Level(#[from] LevelTooLow),
    /// As a voter it would hold up every decision, since it can't read them.
    #[error(
        "c{peer} knows feature levels up to {known}, and {level} is in force: it can't read what is agreed on; install the version of Cresset on it that the other coordinators run"
    )]
    Outdated {
        /// Who.
        peer: u64,
        /// What it knows.
        known: Level,
        /// What is in force.
        level: Level,
    },
    /// Only voters lead.
    #[error("c{peer} isn't a voter, so it can't lead; `cresset member list` shows who is")]
    NotAVoter {
        /// Who.
        peer: u64,
    },
}

fn names(peers: &BTreeSet<PeerId>) -> String {
    if peers.is_empty() { "none".to_owned() } else { peers.iter().map(PeerId::to_string).collect::<Vec<_>>().join(", ") }
}

/// What a leader knows of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemberSeen {
    /// Who.
    pub id: u64,
    /// Entries of the leader's that it isn't known to have.
    pub behind: u64,
    /// Whether it has answered lately.
    pub answers: bool,
}

/// When each peer was heard last, in ticks.
#[derive(Debug, Default)]
pub(super) struct Contact {
    now: u64,
    heard: BTreeMap<u64, u64>,
}

impl Contact {
    pub(super) fn tick(&mut self) {
        self.now += 1;
    }

    pub(super) fn heard(&mut self, peer: u64) {
        self.heard.insert(peer, self.now);
    }

    fn within(&self, peer: u64, ticks: u64) -> bool {
        self.heard.get(&peer).is_some_and(|heard| self.now - heard <= ticks)
    }

    fn forget_all_but(&mut self, members: &Members) {
        self.heard.retain(|peer, _| members.contains(PeerId(*peer)));
    }
}

impl<L: LogStore, M: StateMachine> Node<L, M> {
    /// Appends the command of a change, if this peer leads and nothing speaks against it. As with [`propose`](Self::propose),
    /// what becomes of it is told by [`Sink::applied`]. The leader can't remove itself: it hands over, and its successor can.
    ///
    /// # Errors
    /// [`NotTaken`]: it is not in the log.
    pub fn propose_change(&mut self, command: Vec<u8>, change: &MemberChange) -> Result<(), NotTaken> {
        if command.len() > COMMAND_BYTES_MAX {
            return Err(NotTaken::TooLarge { bytes: command.len() });
        }
        self.leading()?;
        if self.raw.raft.lead_transferee.is_some() {
            return Err(NotTaken::Changing);
        }
        if self.raw.raft.has_pending_conf() || !self.conf.voters_outgoing.is_empty() {
            // The library would put an empty entry in its place, without a word.
            return Err(NotTaken::MembersChanging);
        }
        if let Some(refusal) = &self.brake {
            return Err(refusal.clone().into());
        }
        self.check_change(change)?;
        let leaves = match change {
            MemberChange::Add { .. } => None,
            MemberChange::Promote { replaces, .. } => *replaces,
            MemberChange::Remove { peer } => Some(*peer),
        };
        if leaves == Some(PeerId(self.raw.raft.id)) {
            self.transfer_leader(None)?;
            return Err(NotTaken::Changing);
        }
        let proposed = self.guarded(|raw| raw.propose_conf_change(command, conf_change(change)));
        proposed.map_err(|_| NotTaken::Overloaded)
    }

    /// Hands leadership to this voter, or to the one that is furthest. Whether it takes it shows in the
    /// [`status`](Self::status).
    ///
    /// # Errors
    /// [`NotTaken`]: nothing was begun.
    pub fn transfer_leader(&mut self, to: Option<u64>) -> Result<(), NotTaken> {
        self.leading()?;
        let id = self.raw.raft.id;
        if to == Some(id) {
            return Ok(());
        }
        if let Some(peer) = to.filter(|peer| !self.conf.voters.contains(peer)) {
            return Err(Refusal::NotAVoter { peer }.into());
        }
        let progress = self.raw.raft.prs();
        let candidates = self.conf.voters.iter().filter(|peer| **peer != id && to.is_none_or(|to| to == **peer));
        let best =
            candidates.filter(|peer| self.answers(**peer)).max_by_key(|peer| progress.get(**peer).map(|seen| seen.matched));
        let Some(&best) = best else {
            return Err(match to {
                Some(peer) => Refusal::Silent { peer, leader: id }.into(),
                None => Refusal::Alone { leader: id }.into(),
            });
        };
        self.guarded(|raw| raw.transfer_leader(best));
        Ok(())
    }

    /// What this peer knows of each member, if it leads.
    pub fn members_seen(&self) -> Vec<MemberSeen> {
        if self.leading().is_err() {
            return Vec::new();
        }
        let seen = members_of(&self.conf).all().into_iter();
        seen.map(|PeerId(id)| MemberSeen { id, behind: self.behind(id), answers: self.answers(id) }).collect()
    }

    /// Whether this peer was a member and isn't any more.
    pub fn is_removed(&self) -> bool {
        let members = members_of(&self.conf);
        !members.voters.is_empty() && !members.contains(PeerId(self.raw.raft.id))
    }

    /// Whether a peer was heard within the time in which a new leader would be elected.
    fn answers(&self, peer: u64) -> bool {
        let lately = self.limits.election_ticks.end as u64;
        peer == self.raw.raft.id || self.contact.within(peer, lately)
    }

    fn behind(&self, peer: u64) -> u64 {
        let raft = &self.raw.raft;
        let last = raft.raft_log.last_index();
        if peer == raft.id { 0 } else { last - raft.prs().get(peer).map_or(0, |seen| seen.matched.min(last)) }
    }

    /// Whether the change can be agreed on, and others after it.
    fn check_change(&self, change: &MemberChange) -> Result<(), Refusal> {
        if let MemberChange::Promote { peer: PeerId(peer), .. } = *change
            && self.conf.learners.contains(&peer)
        {
            if !self.answers(peer) {
                return Err(Refusal::Silent { peer, leader: self.raw.raft.id });
            }
            let (behind, seen) = (self.behind(peer), self.raw.raft.prs().get(peer));
            // One that lacks nothing is no further on when it is streamed to, and it may not be for as long as there is nothing to
            // send: the library begins that with the first entry after a snapshot.
            let is_streamed_to = seen.is_some_and(|seen| seen.state == ProgressState::Replicate);
            if behind > BEHIND_MAX || (behind > 0 && !is_streamed_to) {
                return Err(Refusal::Behind { peer, behind });
            }
        }
        let members = members_of(&self.conf);
        for voters in [&members.voters, &members.voters_after(change)] {
            // That the last voter can't go is the state's to say.
            let refusal = self.no_quorum(voters);
            if !voters.is_empty() && matches!(&refusal, Refusal::NoQuorum { live, needed, .. } if live.len() < *needed) {
                return Err(refusal);
            }
        }
        Ok(())
    }

    fn no_quorum(&self, voters: &BTreeSet<PeerId>) -> Refusal {
        let live = voters.iter().copied().filter(|peer| self.answers(peer.0)).collect();
        Refusal::NoQuorum { voters: voters.clone(), live, needed: voters.len() / 2 + 1 }
    }

    /// Applies an entry that changes the members: one of ours, or the library's own that leaves a joint configuration.
    pub(super) fn apply_change(&mut self, entry: &Entry, sink: &mut impl Sink<M::Outcome>) -> Result<(), NodeError> {
        let index = entry.index;
        if entry.context.is_empty() {
            // Two leaders may both have left the same one.
            return if self.conf.voters_outgoing.is_empty() { Ok(()) } else { self.reconfigure(index, &ConfChangeV2::default()) };
        }
        let outcome = self.machine.apply(index, &entry.context).map_err(|source| NodeError::Apply { index, source })?;
        // What the state machine rejects, or has seen before, the library isn't told.
        if let Some(change) = M::change_made(&outcome) {
            self.reconfigure(index, &conf_change(change))?;
        }
        sink.applied(index, outcome);
        Ok(())
    }

    fn reconfigure(&mut self, index: u64, change: &ConfChangeV2) -> Result<(), NodeError> {
        let changed = self.guarded(|raw: &mut RawNode<Shelf<L>>| raw.apply_conf_change(change));
        self.conf = changed.map_err(|error| NodeError::Raft(format!("entry {index} can't change the members: {error}")))?;
        let members = members_of(&self.conf);
        self.contact.forget_all_but(&members);
        self.machine.follow(&members);
        Ok(())
    }

    /// Leaves a joint configuration, if that is still to be done: the leader that entered it was to do it by itself, and may
    /// have lost its leadership before.
    pub(super) fn leave_joint(&mut self) {
        let is_due = self.raw.raft.state == StateRole::Leader && !self.conf.voters_outgoing.is_empty();
        if is_due && !self.raw.raft.has_pending_conf() {
            // Not taken: it is due at the next tick too.
            let _ = self.guarded(|raw| raw.propose_conf_change(Vec::new(), ConfChangeV2::default()));
        }
    }

    /// A leader that isn't a voter any more would panic at the next answer of a peer. It may come to that if it was elected
    /// while its removal was on its way.
    pub(super) fn step_down_if_removed(&mut self) {
        if self.raw.raft.state == StateRole::Leader && !self.raw.raft.promotable() {
            self.guarded(|raw| raw.raft.become_follower(raw.raft.term, 0));
        }
    }
}

/// A change in the library's words.
fn conf_change(change: &MemberChange) -> ConfChangeV2 {
    let mut all = ConfChangeV2::default();
    let mut one = |kind, PeerId(peer): PeerId| {
        let mut single = ConfChangeSingle { node_id: peer, ..ConfChangeSingle::default() };
        single.set_change_type(kind);
        all.mut_changes().push(single);
    };
    match change {
        MemberChange::Add { peer, .. } => one(ConfChangeType::AddLearnerNode, *peer),
        MemberChange::Promote { peer, replaces } => {
            one(ConfChangeType::AddNode, *peer);
            replaces.iter().for_each(|replaced| one(ConfChangeType::RemoveNode, *replaced));
        }
        MemberChange::Remove { peer } => one(ConfChangeType::RemoveNode, *peer),
    }
    if !matches!(change, MemberChange::Add { .. }) {
        all.set_transition(ConfChangeTransition::Implicit);
    }
    all
}

/// Whether an entry of a peer can be a change of the members.
pub(in crate::consensus) fn is_change(entry: &Entry) -> bool {
    ConfChangeV2::parse_from_bytes(&entry.data).is_ok_and(|change| change.leave_joint() == entry.context.is_empty())
}

/// The library's members of founders.
pub(super) fn conf_of(voters: impl Iterator<Item = u64>) -> ConfState {
    ConfState { voters: voters.collect(), ..ConfState::default() }
}

/// The library's members in the state's words.
pub(super) fn members_of(conf: &ConfState) -> Members {
    let set = |peers: &[u64]| peers.iter().copied().map(PeerId).collect();
    Members { voters: set(&conf.voters), outgoing: set(&conf.voters_outgoing), learners: set(&conf.learners) }
}
