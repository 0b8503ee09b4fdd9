//! An operator who adds, promotes, replaces and removes coordinators: one change after the other, whoever leads.
//!
//! A change keeps its command id in every attempt, as the command line does, and once a leader took it the operator goes on until
//! somebody knows how it was answered: it may be in any log. Now and then a machine is lost for good, disk and all, and is
//! replaced by one with a new id.
use cresset_coordinator::consensus::NotTaken;
use cresset_core::{
    Command, CommandBody, Outcome, PeerId,
    members::{MemberChange, Members},
};
use rand::{Rng, seq::IteratorRandom};

use super::{
    MS, SECOND, Us,
    peer::Peer,
    world::{Event, World},
};

/// The highest id that a coordinator gets: the cost of a run is bounded.
const ID_MAX: u64 = 16;
/// No more voters than this.
const VOTERS_MAX: usize = 5;
/// How long one that was removed runs on before it hears of it.
const TOLD_AFTER: Us = 2 * SECOND;

/// What the operator is at.
#[derive(Default)]
pub(super) struct Operator {
    id_last: u64,
    under_way: Option<Wish>,
    /// A voter whose machine is gone.
    lost: Option<u64>,
    /// Who the members are at the highest index that anybody has applied.
    truth: (u64, Members),
    pub(super) changes: u64,
}

struct Wish {
    command: Command,
    change: MemberChange,
    /// It may be in a log.
    taken: bool,
}

impl Operator {
    pub(super) fn new(founders: u64) -> Self {
        Self { id_last: founders, ..Self::default() }
    }

    /// A coordinator has come to this index, and these are the members there.
    pub(super) fn saw(&mut self, applied: u64, members: &Members) {
        if applied > self.truth.0 {
            self.truth = (applied, members.clone());
        }
    }
}

impl World {
    /// The operator looks at what they are at.
    pub(super) fn on_operator(&mut self) {
        let Some((least, below)) = self.scenario.profile.operator_pause_us() else { return };
        // They hurry once all is well, for what is lost has to be replaced.
        let pause = if self.healed { 200 * MS } else { self.between(least, below) };
        self.after(pause, Event::Operator);
        match self.operator.under_way.take() {
            Some(wish) => self.pursue(wish),
            None => {
                if let Some(change) = self.wish() {
                    let command = Command { id: self.fresh_id(), body: CommandBody::ChangeMembers(change.clone()) };
                    self.pursue(Wish { command, change, taken: false });
                }
            }
        }
    }

    /// Has a change made, or goes on with it later.
    fn pursue(&mut self, mut wish: Wish) {
        let mut answers =
            self.peers.values().filter_map(|peer| peer.node.as_ref()?.machine().state.remembered.get(&wish.command.id));
        if let Some(outcome) = answers.next().cloned() {
            return self.answered(&wish.change, &outcome);
        }
        let leaders = self.peers.iter().filter(|(_, peer)| peer.leads()).map(|(id, _)| *id);
        if let Some(leader) = leaders.choose(&mut self.random) {
            let (bytes, change) = (wish.command.encode(), wish.change.clone());
            match self.with_node(leader, |node| node.propose_change(bytes, &change)) {
                Some(Ok(())) => wish.taken = true,
                // Refused, and nowhere else either: there may be something better to do.
                Some(Err(NotTaken::Refused(_))) if !wish.taken => return self.abandoned(&wish.change),
                Some(Err(_)) | None => {}
            }
        }
        self.operator.under_way = Some(wish);
    }

    fn answered(&mut self, change: &MemberChange, outcome: &Outcome) {
        if matches!(outcome, Outcome::Rejected(_)) {
            return self.abandoned(change);
        }
        self.operator.changes += 1;
        if let MemberChange::Promote { replaces: Some(PeerId(replaced)), .. } = change
            && self.operator.lost == Some(*replaced)
        {
            self.operator.lost = None;
        }
    }

    fn abandoned(&mut self, change: &MemberChange) {
        if let MemberChange::Add { peer: PeerId(peer), .. } = change {
            self.retire(*peer);
        }
    }

    /// What is to be done next, if anything.
    fn wish(&mut self) -> Option<MemberChange> {
        let members = self.operator.truth.1.clone();
        if members.is_changing() {
            return None;
        }
        let learner = members.learners.iter().copied().choose(&mut self.random);
        if let Some(lost) = self.operator.lost {
            return match learner {
                Some(peer) => Some(MemberChange::Promote { peer, replaces: Some(PeerId(lost)) }),
                None => self.add(),
            };
        }
        if self.healed {
            return None;
        }
        let voter = members.voters.iter().copied().choose(&mut self.random)?;
        let votes = members.voters.len();
        match (learner, self.random.random_range(0..6)) {
            (Some(peer), 0 | 1) if votes < VOTERS_MAX => Some(MemberChange::Promote { peer, replaces: None }),
            (Some(peer), 2 | 3) => Some(MemberChange::Promote { peer, replaces: Some(voter) }),
            (Some(peer), 4) => Some(MemberChange::Remove { peer }),
            (_, 5) if votes >= 3 => Some(MemberChange::Remove { peer: voter }),
            (None, 0) if votes >= 3 => {
                // Its machine burns down. Nothing of it is left, not even what it promised.
                self.operator.lost = Some(voter.0);
                self.retire(voter.0);
                None
            }
            (None, 1..=3) => self.add(),
            _ => None,
        }
    }

    /// A new machine, which is started before or after it is added.
    fn add(&mut self) -> Option<MemberChange> {
        if self.operator.id_last >= ID_MAX && self.operator.lost.is_none() {
            return None;
        }
        self.operator.id_last += 1;
        let id = self.operator.id_last;
        self.peers.insert(id, Peer::new(self.scenario.mutant));
        let delay = self.between(0, 3 * SECOND);
        self.after(delay, Event::Restart { peer: id });
        Some(MemberChange::Add { peer: PeerId(id), peer_address: format!("c{id}:1") })
    }

    /// A coordinator's machine is gone for good.
    pub(super) fn retire(&mut self, id: u64) {
        self.crash(id, SECOND);
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.is_gone = true;
        }
    }

    /// Coordinators whose machines aren't gone for good.
    pub(super) fn existing(&self) -> Vec<u64> {
        self.peers.iter().filter(|(_, peer)| !peer.is_gone).map(|(id, _)| *id).collect()
    }

    /// What the peer service does: one that was removed isn't listened to, and is told, here after a while.
    pub(super) fn is_shut_out(&mut self, from: u64, by: u64) -> bool {
        let shut_out = self.peers.get(&by).and_then(|peer| Some(peer.node.as_ref()?.machine().state.was_removed(PeerId(from))));
        if shut_out == Some(true) {
            self.after(TOLD_AFTER, Event::Told { peer: from });
        }
        shut_out == Some(true)
    }

    /// At the end: what was begun is complete, and all members know the same members and are about equally far.
    pub(super) fn members_are_settled(&mut self) {
        let Some((leader, applied, members)) = self.peers.iter().find(|(_, peer)| peer.leads()).and_then(|(id, peer)| {
            let node = peer.node.as_ref()?;
            Some((*id, node.status().applied, node.machine().state.members.clone()))
        }) else {
            return;
        };
        let mut problem = None;
        if members.is_changing() || self.operator.under_way.is_some() || self.operator.lost.is_some() {
            problem = Some(format!("a change of the members isn't complete: c{leader} knows {members:?}"));
        }
        for PeerId(id) in members.all() {
            let node = self.peers.get(&id).and_then(|peer| peer.node.as_ref());
            let Some(node) = node else {
                problem = Some(format!("c{id} is a member and doesn't run"));
                continue;
            };
            let (theirs, behind) = (&node.machine().state.members, applied.saturating_sub(node.status().applied));
            if *theirs != members || behind > 100 {
                problem = Some(format!("c{id} is {behind} entries behind and knows {theirs:?}, c{leader} knows {members:?}"));
            }
        }
        if let Some(problem) = problem {
            self.checks.fail(format!("{problem}, long after all was healed"));
        }
    }
}
