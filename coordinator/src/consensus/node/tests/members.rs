//! Members come and go.
use std::collections::BTreeSet;

use cresset_core::{Outcome, Reject};

use super::*;

fn states() -> Cluster<Shared> {
    Cluster::new(|| Shared::new(ClusterState::new("test")))
}

fn ids(ids: &[u64]) -> BTreeSet<PeerId> {
    ids.iter().copied().map(PeerId).collect()
}

fn add(id: u64) -> MemberChange {
    MemberChange::Add { peer: PeerId(id), peer_address: format!("127.0.0.1:{id}") }
}

fn promote(id: u64) -> MemberChange {
    MemberChange::Promote { peer: PeerId(id), replaces: None }
}

fn replace(old: u64, new: u64) -> MemberChange {
    MemberChange::Promote { peer: PeerId(new), replaces: Some(PeerId(old)) }
}

fn remove(id: u64) -> MemberChange {
    MemberChange::Remove { peer: PeerId(id) }
}

impl Cluster<Shared> {
    /// A peer with an empty disk that waits to be added.
    fn join(&mut self, id: u64) {
        self.disks.insert(id, MemoryLog::default());
        self.start(id);
    }

    fn try_change(&mut self, number: u8, change: &MemberChange) -> Result<(), NotTaken> {
        let leader = self.leader().expect("there is a leader");
        let command = Command { id: CommandId([number; 16]), body: CommandBody::ChangeMembers(change.clone()) };
        let taken = self.nodes.get_mut(&leader).unwrap().propose_change(command.encode(), change);
        self.ready(leader);
        self.deliver();
        taken
    }

    /// Makes a change and waits until it is complete for those that stay.
    fn change(&mut self, number: u8, change: &MemberChange) -> Outcome {
        self.elected();
        self.try_change(number, change).unwrap();
        let leader = self.elected();
        self.until("the change is complete", |c| {
            let state = c.nodes[&leader].machine().state().read();
            state.remembered.get(&CommandId([number; 16])).is_some() && !state.members.is_changing()
        });
        let outcome = self.nodes[&leader].machine().state().read().remembered.get(&CommandId([number; 16])).cloned();
        outcome.expect("it was waited for")
    }

    fn members(&self, id: u64) -> Members {
        self.nodes[&id].machine().state().read().members.clone()
    }

    /// All members that run know the same members, and nothing is half done.
    fn settled(&mut self, voters: &[u64], learners: &[u64]) {
        let wanted = Members { voters: ids(voters), outgoing: ids(&[]), learners: ids(learners) };
        self.until("all know the members", |c| {
            let inside = c.nodes.keys().filter(|id| wanted.contains(PeerId(**id)) && !c.cut.contains(id));
            inside.clone().count() > 0 && inside.clone().all(|id| c.members(*id) == wanted)
        });
    }
}

#[test]
fn a_new_peer_learns_then_votes_then_leads() {
    let mut cluster = states();
    cluster.elected();
    (1..=60).for_each(|n| cluster.propose(announce(n, &format!("host{n}"))));
    cluster.join(4);
    assert!(matches!(cluster.change(100, &add(4)), Outcome::Done { .. }));
    cluster.settled(&[1, 2, 3], &[4]);
    assert_eq!(cluster.nodes[&4].status().role, Role::Learner);
    assert!(cluster.snapshots_seen > 0, "it could only begin from a snapshot");
    // Nobody counts on a learner.
    cluster.cut.insert(4);
    cluster.propose(announce(61, "host61"));
    cluster.cut.remove(&4);
    cluster.until("it has caught up", |c| c.nodes[&4].machine().state().read().peers[&PeerId(1)].grpc_address == "host61:1");
    cluster.change(101, &promote(4));
    cluster.settled(&[1, 2, 3, 4], &[]);
    let leader = cluster.elected();
    cluster.nodes.get_mut(&leader).unwrap().transfer_leader(Some(4)).unwrap();
    cluster.ready(leader);
    cluster.until("c4 leads", |c| c.leader() == Some(4));
    // It comes back as what it was.
    cluster.crash(4);
    cluster.start(4);
    cluster.settled(&[1, 2, 3, 4], &[]);
}

#[test]
fn a_joiner_that_restarts_before_it_heard_enough_goes_on_waiting() {
    let mut cluster = states();
    cluster.elected();
    cluster.join(4);
    (0..50).for_each(|_| cluster.tick());
    assert_eq!(
        (cluster.nodes[&4].status().term, cluster.nodes[&4].status().role),
        (0, Role::Follower),
        "it can't stand for election"
    );
    // The first snapshot is lost on the way, after it heard of a term.
    cluster.lose_snapshots = 1;
    cluster.try_change(100, &add(4)).unwrap();
    cluster.until("it has heard of the term", |c| c.nodes[&4].status().term > 0);
    cluster.crash(4);
    cluster.start(4);
    cluster.settled(&[1, 2, 3], &[4]);
}

#[test]
fn a_dead_peer_is_replaced_in_one_step() {
    let mut cluster = states();
    let leader = cluster.elected();
    let dead = leader % 3 + 1;
    cluster.crash(dead);
    cluster.join(4);
    cluster.change(100, &add(4));
    cluster.until("it has caught up", |c| c.members(4).learners.contains(&PeerId(4)));
    cluster.change(101, &replace(dead, 4));
    let left: Vec<u64> = (1..=4).filter(|id| *id != dead).collect();
    cluster.settled(&left, &[]);
    // Two of the three are as good as before.
    let leader = cluster.elected();
    cluster.crash(leader);
    cluster.elected();
    // The dead one comes back to a cluster that has gone on. It is refused, and disturbs nobody.
    let term = cluster.nodes[&cluster.leader().unwrap()].status().term;
    cluster.start(dead);
    (0..100).for_each(|_| cluster.tick());
    let leader = cluster.leader().expect("still");
    assert_eq!(cluster.nodes[&leader].status().term, term);
    assert!(!cluster.nodes[&dead].is_removed(), "nobody has told it");
    assert!(cluster.nodes[&leader].machine().state().read().was_removed(PeerId(dead)));
    let back = cluster.change(102, &add(dead));
    assert!(matches!(back, Outcome::Rejected(Reject::PeerIdUsed { .. })), "{back:?}");
}

#[test]
fn a_peer_that_is_removed_knows_and_so_does_its_next_life() {
    let mut cluster = states();
    let leader = cluster.elected();
    let gone = leader % 3 + 1;
    cluster.change(100, &remove(gone));
    let left: Vec<u64> = (1..=3).filter(|id| *id != gone).collect();
    cluster.settled(&left, &[]);
    assert!(!cluster.nodes[&leader].is_removed());
    if cluster.nodes[&gone].is_removed() {
        cluster.crash(gone);
        cluster.start(gone);
        cluster.ready(gone);
        assert!(cluster.nodes[&gone].is_removed());
    }
    cluster.propose(announce(1, "host"));
    assert_eq!(cluster.try_change(101, &remove(left[1 - usize::from(left[1] == leader)])), Ok(()), "one is enough for one");
}

#[test]
fn the_leader_hands_over_before_it_is_removed() {
    let mut cluster = states();
    let old = cluster.elected();
    assert_eq!(cluster.try_change(100, &remove(old)), Err(NotTaken::Changing));
    cluster.until("another leads", |c| c.leader().is_some_and(|leader| leader != old));
    cluster.change(100, &remove(old));
    let left: Vec<u64> = (1..=3).filter(|id| *id != old).collect();
    cluster.settled(&left, &[]);
    cluster.propose(announce(1, "host"));
}

/// It panicked at the next answer of a peer, without the step down.
#[test]
fn one_that_was_elected_while_its_removal_was_on_its_way_steps_down() {
    let mut cluster = states();
    let old = cluster.elected();
    let next = old % 3 + 1;
    let third = next % 3 + 1;
    // Its removal is in its log and not committed when the leader dies.
    let command = Command { id: CommandId([100; 16]), body: CommandBody::ChangeMembers(remove(next)) };
    cluster.nodes.get_mut(&old).unwrap().propose_change(command.encode(), &remove(next)).unwrap();
    cluster.cut.insert(third);
    cluster.ready(old);
    let appends: Vec<_> = cluster.wire.drain(..).filter(|(_, envelope)| envelope.to == next).collect();
    for (from, envelope) in appends {
        cluster.nodes.get_mut(&next).unwrap().step(from, &envelope.message, None).unwrap();
    }
    let mut lost = Collected::default();
    cluster.nodes.get_mut(&next).unwrap().on_ready(&mut lost).unwrap();
    cluster.crash(old);
    cluster.cut.clear();
    cluster.until("the one to be removed leads", |c| c.leader() == Some(next));
    cluster.start(old);
    let left = [old.min(third), old.max(third)];
    cluster.settled(&left, &[]);
    let leader = cluster.elected();
    assert_ne!(leader, next);
    cluster.propose(announce(1, "host"));
}

#[test]
fn a_joint_configuration_is_left_by_the_next_leader_too() {
    let mut cluster = states();
    let old = cluster.elected();
    cluster.join(4);
    cluster.change(100, &add(4));
    cluster.until("it has caught up", |c| c.members(4).learners.contains(&PeerId(4)));
    let command = Command { id: CommandId([101; 16]), body: CommandBody::ChangeMembers(promote(4)) };
    cluster.nodes.get_mut(&old).unwrap().propose_change(command.encode(), &promote(4)).unwrap();
    cluster.ready(old);
    // Until the others hold the entry, and the leader dies before it could leave.
    let ticks = cluster.until("it is in every log", |c| {
        let last = c.nodes[&old].raw.raft.raft_log.last_index();
        c.nodes.values().all(|node| node.raw.raft.raft_log.last_index() == last)
    });
    assert!(ticks < 500);
    cluster.crash(old);
    cluster.elected();
    let left: Vec<u64> = (1..=4).collect();
    cluster.settled(&left, &[]);
}

#[test]
fn a_retried_change_is_made_once_whoever_leads() {
    let mut cluster = states();
    let old = cluster.elected();
    cluster.join(4);
    cluster.change(100, &add(4));
    cluster.until("it has caught up", |c| c.members(4).learners.contains(&PeerId(4)));
    cluster.change(101, &replace(old % 3 + 1, 4));
    let before = cluster.members(old);
    cluster.crash(old);
    let leader = cluster.elected();
    // The caller never heard of it. The leader's own checks come after the question whether it was done: that is the driver's.
    cluster.try_change(101, &replace(old % 3 + 1, 4)).unwrap();
    cluster.start(old);
    cluster.until("all have applied", |c| c.nodes[&old].status().applied == c.nodes[&leader].status().applied);
    assert_eq!(cluster.members(leader), before);
    assert_eq!(cluster.members(old), before);
}

#[test]
fn one_change_at_a_time() {
    let mut cluster = states();
    let leader = cluster.elected();
    let node = cluster.nodes.get_mut(&leader).unwrap();
    let command = |n: u8, change: &MemberChange| {
        Command { id: CommandId([n; 16]), body: CommandBody::ChangeMembers(change.clone()) }.encode()
    };
    node.propose_change(command(1, &add(4)), &add(4)).unwrap();
    assert_eq!(node.propose_change(command(2, &add(5)), &add(5)), Err(NotTaken::MembersChanging));
    cluster.ready(leader);
    cluster.deliver();
    cluster.try_change(2, &add(5)).unwrap();
    cluster.settled(&[1, 2, 3], &[4, 5]);
}

#[test]
fn a_learner_that_is_silent_or_behind_is_not_promoted() {
    let mut cluster = states();
    let leader = cluster.elected();
    cluster.change(100, &add(4));
    (0..30).for_each(|_| cluster.tick());
    let refused = cluster.try_change(101, &promote(4)).unwrap_err();
    assert_eq!(refused, NotTaken::Refused(Refusal::Silent { peer: 4, leader }));
    cluster.join(4);
    // It answers, and its snapshot is lost again and again.
    cluster.lose_snapshots = usize::MAX;
    (0..12).for_each(|_| cluster.tick());
    let refused = cluster.try_change(102, &promote(4)).unwrap_err();
    assert!(matches!(refused, NotTaken::Refused(Refusal::Behind { peer: 4, .. })), "{refused:?}");
    let seen = cluster.nodes[&leader].members_seen();
    assert!(seen.iter().any(|seen| seen.id == 4 && seen.answers && seen.behind > 0), "{seen:?}");
    cluster.lose_snapshots = 0;
    cluster.until("it has caught up", |c| c.members(4).learners.contains(&PeerId(4)));
    cluster.tick();
    cluster.change(103, &promote(4));
    cluster.settled(&[1, 2, 3, 4], &[]);
}

#[test]
fn a_learner_that_lacks_nothing_is_promoted_though_nothing_was_sent_to_it_since_its_snapshot() {
    let mut cluster = states();
    let leader = cluster.elected();
    cluster.reports_late = true;
    cluster.change(100, &add(4));
    cluster.join(4);
    cluster.until("it has caught up", |c| {
        let seen = c.nodes[&leader].members_seen();
        seen.iter().any(|seen| seen.id == 4 && seen.answers && seen.behind == 0)
    });
    cluster.change(101, &promote(4));
    cluster.settled(&[1, 2, 3, 4], &[]);
}

#[test]
fn a_change_that_would_leave_no_majority_is_refused_with_the_way_out() {
    let mut cluster = states();
    let leader = cluster.elected();
    let (dead, other) = (leader % 3 + 1, (leader + 1) % 3 + 1);
    cluster.crash(dead);
    (0..30).for_each(|_| cluster.tick());
    let refused = cluster.try_change(100, &remove(other)).unwrap_err();
    let NotTaken::Refused(refusal) = refused else { panic!("{refused:?}") };
    let text = refusal.to_string();
    let both = [leader.min(dead), leader.max(dead)];
    let expected = format!("of the voters c{}, c{} only c{leader} answer, 2 must", both[0], both[1]);
    assert!(text.starts_with(&expected) && text.contains("promote a learner in its place"), "{text}");
    // The dead one can go.
    cluster.change(101, &remove(dead));
    let left = [leader.min(other), leader.max(other)];
    cluster.settled(&left, &[]);
}

#[test]
fn one_that_was_away_learns_from_a_leader_that_it_never_knew() {
    let mut cluster = states();
    let leader = cluster.elected();
    let away = leader % 3 + 1;
    cluster.cut.insert(away);
    for new in [4, 5] {
        cluster.join(new);
        cluster.change(new as u8 * 10, &add(new));
        cluster.until("it has caught up", |c| c.members(new).learners.contains(&PeerId(new)));
        cluster.change(new as u8 * 10 + 1, &promote(new));
    }
    cluster.nodes.get_mut(&leader).unwrap().transfer_leader(Some(4)).unwrap();
    cluster.ready(leader);
    cluster.until("c4 leads", |c| c.leader() == Some(4));
    cluster.change(60, &remove(leader));
    let members = cluster.members(4);
    cluster.cut.clear();
    cluster.until("it has learnt", |c| c.members(away) == members);
}

#[test]
fn only_a_voter_that_answers_is_handed_leadership() {
    let mut cluster = states();
    let leader = cluster.elected();
    cluster.join(4);
    cluster.change(100, &add(4));
    cluster.settled(&[1, 2, 3], &[4]);
    let dead = leader % 3 + 1;
    cluster.crash(dead);
    (0..30).for_each(|_| cluster.tick());
    let node = cluster.nodes.get_mut(&leader).unwrap();
    assert_eq!(node.transfer_leader(Some(4)), Err(Refusal::NotAVoter { peer: 4 }.into()));
    assert_eq!(node.transfer_leader(Some(dead)), Err(Refusal::Silent { peer: dead, leader }.into()));
    assert_eq!(node.transfer_leader(Some(leader)), Ok(()));
    assert_eq!(node.transfer_leader(None), Ok(()));
    cluster.ready(leader);
    cluster.until("the third leads", |c| c.leader().is_some_and(|next| next != leader));
}
