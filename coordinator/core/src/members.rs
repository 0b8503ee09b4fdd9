//! Who the coordinators are that agree, and what may become of them.
//!
//! Raft itself keeps who votes, in its log and with each snapshot; the state has a copy of it, so that a change can be judged
//! by the members as they are when it is applied. Where each of them is reached is the state's own.
//!
//! A coordinator is added as a learner: it gets everything that is agreed on and has no say. One that has caught up is promoted
//! to a voter, in the place of another if that one is lost. The id of a coordinator that was removed is never used again: what
//! was promised under it must not be promised a second time by a machine that knows nothing of it.
use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::{
    Effect, PeerId, Reject,
    apply::{advance, check, check_text, too_many},
    command::{PEERS_MAX, VOTERS_MAX},
    state::{ClusterState, PeerInfo},
};

/// The coordinators that agree, as of the last applied entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// Those whose majority decides.
    pub voters: BTreeSet<PeerId>,
    /// The voters of before, whose majority has to agree too while a change is under way; empty otherwise.
    pub outgoing: BTreeSet<PeerId>,
    /// Those that only learn what was decided.
    pub learners: BTreeSet<PeerId>,
}

impl Members {
    /// All of them, in whatever part.
    pub fn all(&self) -> BTreeSet<PeerId> {
        self.voters.iter().chain(&self.outgoing).chain(&self.learners).copied().collect()
    }

    /// Whether this coordinator is one of them.
    pub fn contains(&self, peer: PeerId) -> bool {
        self.voters.contains(&peer) || self.outgoing.contains(&peer) || self.learners.contains(&peer)
    }

    /// Whether the voters of before still have a say.
    pub fn is_changing(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Whether they are as a change was to make them, and nothing is under way.
    pub fn reflect(&self, change: &MemberChange) -> bool {
        let done = match change {
            MemberChange::Add { peer, .. } => self.contains(*peer),
            MemberChange::Promote { peer, replaces } => {
                self.voters.contains(peer) && replaces.is_none_or(|replaced| !self.contains(replaced))
            }
            MemberChange::Remove { peer } => !self.contains(*peer),
        };
        done && !self.is_changing()
    }

    /// Who will vote once a change is made.
    pub fn voters_after(&self, change: &MemberChange) -> BTreeSet<PeerId> {
        let mut voters = self.voters.clone();
        match change {
            MemberChange::Add { .. } => {}
            MemberChange::Promote { peer, replaces } => {
                voters.insert(*peer);
                voters.retain(|voter| Some(*voter) != *replaces);
            }
            MemberChange::Remove { peer } => voters.retain(|voter| voter != peer),
        }
        voters
    }
}

/// A change of the members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemberChange {
    /// A new coordinator learns.
    Add {
        /// Its id, which nobody ever had.
        peer: PeerId,
        /// `host:port` of its consensus.
        peer_address: String,
    },
    /// A learner votes from now on.
    Promote {
        /// Who.
        peer: PeerId,
        /// The voter that leaves in the same step.
        #[serde(default)]
        replaces: Option<PeerId>,
    },
    /// A coordinator is a member no more.
    Remove {
        /// Who.
        peer: PeerId,
    },
}

impl ClusterState {
    /// Whether this coordinator was removed; what it says counts no more.
    pub fn was_removed(&self, peer: PeerId) -> bool {
        Some(peer) <= self.peer_removed_last && !self.members.contains(peer)
    }
}

/// Makes a change, as far as the state is concerned; whoever keeps the members follows the effect.
pub(crate) fn change(state: &mut ClusterState, change: &MemberChange, effects: &mut Vec<Effect>) -> Result<(), Reject> {
    if state.members.is_changing() {
        return Err(Reject::MembersChanging);
    }
    match change {
        MemberChange::Add { peer, peer_address } => add(state, *peer, peer_address)?,
        MemberChange::Promote { peer, replaces } => promote(state, *peer, *replaces)?,
        MemberChange::Remove { peer } => {
            check_leaves(state, *peer)?;
            let left = state.members.voters_after(change).len();
            check(left > 0, "peer", format!("{peer} is the only voter; promote another one first"))?;
            leave(state, *peer);
        }
    }
    effects.push(Effect::MembersChanged { change: change.clone() });
    Ok(())
}

fn add(state: &mut ClusterState, peer: PeerId, peer_address: &str) -> Result<(), Reject> {
    check(peer.0 > 0, "peer", "must not be c0; ids start at c1")?;
    check_text("peer_address", peer_address)?;
    check(is_host_port(peer_address), "peer_address", format!("is '{peer_address}', it must be HOST:PORT"))?;
    if state.members.contains(peer) {
        return Err(Reject::AlreadyMember { peer });
    }
    if let Some(last) = state.peer_removed_last.filter(|last| peer <= *last) {
        return Err(Reject::PeerIdUsed { peer, next: PeerId(last.0.saturating_add(1)) });
    }
    if state.members.all().len() >= PEERS_MAX {
        return Err(too_many("coordinators", PEERS_MAX));
    }
    let info = PeerInfo { peer_address: peer_address.to_owned(), grpc_address: String::new(), http_address: String::new() };
    state.peers.insert(peer, info);
    advance(state);
    Ok(())
}

fn promote(state: &mut ClusterState, peer: PeerId, replaces: Option<PeerId>) -> Result<(), Reject> {
    if state.members.voters.contains(&peer) {
        return Err(Reject::AlreadyMember { peer });
    }
    if !state.members.learners.contains(&peer) {
        return Err(Reject::NotAMember { peer });
    }
    if let Some(replaced) = replaces {
        check_leaves(state, replaced)?;
        let votes = state.members.voters.contains(&replaced);
        check(votes, "replaces", format!("names {replaced}, which doesn't vote; remove it by itself"))?;
        leave(state, replaced);
    } else if state.members.voters.len() >= VOTERS_MAX {
        return Err(too_many("voters", VOTERS_MAX));
    }
    Ok(())
}

fn check_leaves(state: &ClusterState, peer: PeerId) -> Result<(), Reject> {
    if state.members.contains(peer) { Ok(()) } else { Err(Reject::NotAMember { peer }) }
}

fn leave(state: &mut ClusterState, peer: PeerId) {
    state.peers.remove(&peer);
    state.peer_removed_last = state.peer_removed_last.max(Some(peer));
    advance(state);
}

fn is_host_port(address: &str) -> bool {
    let port_is_one = |port: &str| port.parse::<u16>().is_ok_and(|port| port != 0);
    let plain = !address.chars().any(|c| c.is_whitespace() || c.is_control() || "/,@?#".contains(c));
    plain && address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port_is_one(port))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Command, CommandBody, CommandId, Outcome, apply};

    fn c(id: u64) -> PeerId {
        PeerId(id)
    }

    fn set(ids: &[u64]) -> BTreeSet<PeerId> {
        ids.iter().copied().map(PeerId).collect()
    }

    /// A cluster of these voters and learners, whose peers have all announced themselves.
    fn state(voters: &[u64], learners: &[u64]) -> ClusterState {
        let mut state = ClusterState::new("test");
        state.members = Members { voters: set(voters), outgoing: set(&[]), learners: set(learners) };
        for peer in state.members.all() {
            state.peers.insert(peer, info(peer.0));
        }
        state
    }

    fn info(id: u64) -> PeerInfo {
        let address = |port: u16| format!("host-{id}:{port}");
        PeerInfo { grpc_address: address(1), http_address: address(2), peer_address: address(3) }
    }

    fn run(state: &mut ClusterState, number: u8, change: MemberChange) -> (Outcome, Vec<Effect>) {
        apply(state, &Command { id: CommandId([number; 16]), body: CommandBody::ChangeMembers(change) })
    }

    fn rejected(state: &mut ClusterState, number: u8, change: MemberChange) -> String {
        let before = state.clone();
        let (outcome, effects) = run(state, number, change);
        let Outcome::Rejected(reject) = outcome else { panic!("{outcome:?}") };
        assert_eq!((&effects, &state.peers, state.epoch), (&vec![], &before.peers, before.epoch));
        reject.to_string()
    }

    fn add(id: u64) -> MemberChange {
        MemberChange::Add { peer: c(id), peer_address: format!("host-{id}:3") }
    }

    #[test]
    fn a_new_coordinator_is_known_by_its_address_and_announces_the_rest() {
        let mut state = state(&[1, 2, 3], &[]);
        let (outcome, effects) = run(&mut state, 1, add(4));
        assert_eq!(outcome, Outcome::Done { epoch: 1 });
        assert_eq!(effects[0], Effect::MembersChanged { change: add(4) });
        assert_eq!(state.peers[&c(4)].peer_address, "host-4:3");
        assert!(crate::routes::routes(&state).coordinators.iter().all(|(peer, _)| *peer != c(4)), "it can't be called yet");
        state.members.learners.insert(c(4));
        let announce = CommandBody::AnnouncePeer { peer: c(4), info: info(4) };
        apply(&mut state, &Command { id: CommandId([2; 16]), body: announce });
        assert_eq!(state.peers[&c(4)], info(4));
    }

    #[test]
    fn a_retried_change_is_made_once() {
        let mut state = state(&[1, 2, 3], &[]);
        let (first, _) = run(&mut state, 1, add(4));
        state.members.learners.insert(c(4));
        let (again, effects) = run(&mut state, 1, add(4));
        assert_eq!((again, effects), (first, vec![]));
    }

    #[test]
    fn a_removed_id_is_gone_for_good() {
        let mut state = state(&[1, 2, 3], &[4]);
        run(&mut state, 1, MemberChange::Promote { peer: c(4), replaces: Some(c(2)) });
        state.members = Members { voters: set(&[1, 3, 4]), ..Members::default() };
        assert!(!state.peers.contains_key(&c(2)) && state.was_removed(c(2)) && !state.was_removed(c(1)));
        let text = rejected(&mut state, 2, add(2));
        assert!(text.contains("c2 can't be used") && text.contains("take c3 or above"), "{text}");
        assert_eq!(
            rejected(&mut state, 3, add(3)),
            "c3 is a member already, or votes already; `cresset member list` shows who is"
        );
        let announce = CommandBody::AnnouncePeer { peer: c(2), info: info(2) };
        let (outcome, _) = apply(&mut state, &Command { id: CommandId([4; 16]), body: announce });
        assert_eq!(outcome, Outcome::Rejected(Reject::NotAMember { peer: c(2) }));
        // One that was away when the last was removed is a member nevertheless.
        assert!(!state.was_removed(c(1)));
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_the_reason() {
        let mut three = state(&[1, 2, 3], &[4]);
        let text = rejected(&mut three, 1, MemberChange::Promote { peer: c(5), replaces: None });
        assert_eq!(text, "c5 isn't a member, or not of that kind; `cresset member list` shows who is");
        let text = rejected(&mut three, 2, MemberChange::Promote { peer: c(4), replaces: Some(c(4)) });
        assert!(text.contains("names c4, which doesn't vote"), "{text}");
        let nowhere = MemberChange::Add { peer: c(5), peer_address: "nowhere".into() };
        assert_eq!(rejected(&mut three, 3, nowhere), "peer_address is 'nowhere', it must be HOST:PORT");
        three.members.outgoing = set(&[1, 2]);
        assert!(rejected(&mut three, 4, MemberChange::Remove { peer: c(3) }).contains("under way"));
        let mut one = state(&[1], &[2]);
        let text = rejected(&mut one, 1, MemberChange::Remove { peer: c(1) });
        assert_eq!(text, "peer c1 is the only voter; promote another one first");
    }

    #[test]
    fn bounds_hold() {
        let nine: Vec<u64> = (1..=9).collect();
        let learners: Vec<u64> = (10..=PEERS_MAX as u64).collect();
        let mut state = state(&nine, &learners);
        assert!(rejected(&mut state, 1, add(99)).contains("32 coordinators already"));
        let promote = MemberChange::Promote { peer: c(10), replaces: None };
        assert!(rejected(&mut state, 2, promote).contains("9 voters already"));
    }

    /// As Raft does, but for the step in between.
    fn follow(members: &mut Members, change: &MemberChange) {
        members.voters = members.voters_after(change);
        match change {
            MemberChange::Add { peer, .. } => drop(members.learners.replace(*peer)),
            MemberChange::Promote { peer, .. } | MemberChange::Remove { peer } => members.learners.retain(|id| id != peer),
        }
    }

    fn any_change() -> impl Strategy<Value = MemberChange> {
        prop_oneof![
            (0..16_u64).prop_map(add),
            (0..16_u64, proptest::option::of(0..16_u64))
                .prop_map(|(peer, replaces)| MemberChange::Promote { peer: c(peer), replaces: replaces.map(PeerId) }),
            (0..16_u64).prop_map(|peer| MemberChange::Remove { peer: c(peer) }),
        ]
    }

    proptest! {
        #[test]
        fn any_history_keeps_a_voter_and_reuses_no_id(changes in proptest::collection::vec(any_change(), 1..60)) {
            let mut state = state(&[1, 2, 3], &[]);
            let mut removed = BTreeSet::new();
            for (number, change) in (0_u8..).zip(changes) {
                let before = state.members.clone();
                let (_, effects) = run(&mut state, number, change);
                let made = effects.iter().find_map(|effect| match effect {
                    Effect::MembersChanged { change } => Some(change),
                    _ => None,
                });
                made.iter().for_each(|change| follow(&mut state.members, change));
                prop_assert!(made.is_none_or(|change| state.members.reflect(change)));
                prop_assert!(made.is_none_or(|change| !before.reflect(change)));
                let members = state.members.all();
                removed.extend(before.all().difference(&members).copied());
                prop_assert!(members.is_disjoint(&removed), "an id is used again");
                prop_assert!(removed.iter().all(|peer| state.was_removed(*peer)), "one comes back");
                prop_assert!(!members.iter().any(|peer| state.was_removed(*peer)), "a member is shut out");
                prop_assert!(!state.members.voters.is_empty(), "nobody votes");
                prop_assert!(state.members.voters.is_disjoint(&state.members.learners));
                prop_assert!(state.peers.keys().all(|peer| members.contains(peer)));
            }
        }
    }
}
