use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    hash::{DefaultHasher, Hash, Hasher},
};

use cresset_core::{
    ClusterState, Command, CommandBody, CommandId, DecodeError, PeerId,
    members::{MemberChange, Members},
    state::PeerInfo,
};
use proptest::prelude::*;
use protobuf::ProtobufEnum as _;
use raft::eraftpb::ConfState;

use super::*;
use crate::consensus::{
    log::{Batch, MemoryLog},
    machine::{Answer, Shared},
};

/// A state machine that remembers everything, in order.
#[derive(Debug, Clone, Default, PartialEq)]
struct Journal(Vec<String>);

impl StateMachine for Journal {
    type Outcome = String;
    fn apply(&mut self, _index: u64, command: &[u8]) -> Result<String, DecodeError> {
        let text = String::from_utf8_lossy(command).into_owned();
        self.0.push(text.clone());
        Ok(text)
    }
    fn change_made(_outcome: &String) -> Option<&MemberChange> {
        None
    }
    fn follow(&mut self, _members: &Members) {}
    fn snapshot(&self) -> Vec<u8> {
        self.0.join("\n").into_bytes()
    }
    fn check(&self, _snapshot: &[u8]) -> Result<(), DecodeError> {
        Ok(())
    }
    fn restore(&mut self, snapshot: &[u8], _members: &Members) -> Result<(), DecodeError> {
        let text = String::from_utf8_lossy(snapshot);
        self.0 = text.split('\n').filter(|line| !line.is_empty()).map(ToOwned::to_owned).collect();
        Ok(())
    }
}

struct Collected<O> {
    sent: Vec<Envelope>,
    applied: Vec<(u64, O)>,
    readable: Vec<(u64, u64)>,
}

impl<O> Default for Collected<O> {
    fn default() -> Self {
        Self { sent: Vec::new(), applied: Vec::new(), readable: Vec::new() }
    }
}

impl<O> Sink<O> for Collected<O> {
    fn send(&mut self, envelope: Envelope) {
        self.sent.push(envelope);
    }
    fn applied(&mut self, index: u64, outcome: O) {
        self.applied.push((index, outcome));
    }
    fn readable(&mut self, context: u64, index: u64) {
        self.readable.push((context, index));
    }
}

fn settings(id: u64) -> Settings {
    let peers = (1..=3).map(|id| (id, format!("127.0.0.1:{id}"))).collect();
    let mut settings = Settings::new("test", id, peers, "unused");
    settings.snapshot_entries = 40;
    settings.keep_entries = 10;
    settings
}

fn draw() -> ElectionDraw {
    Box::new(|round| (6 + (round.id * 5 + round.number * 3 + round.term) % 6) as usize)
}

fn logger() -> slog::Logger {
    slog::Logger::root(slog::Discard, slog::o!())
}

/// Three nodes, a wire that delivers in order, and a clock that is a counter.
struct Cluster<M: StateMachine> {
    nodes: BTreeMap<u64, Node<MemoryLog, M>>,
    disks: BTreeMap<u64, MemoryLog>,
    machine: fn() -> M,
    wire: VecDeque<(u64, Envelope)>,
    cut: BTreeSet<u64>,
    lose_snapshots: usize,
    snapshots_seen: usize,
    /// The report that a snapshot has arrived comes after the receiver's own word.
    reports_late: bool,
    applied: BTreeMap<u64, Vec<(u64, M::Outcome)>>,
    readable: Vec<(u64, u64)>,
    trace: DefaultHasher,
}

impl<M: StateMachine> Cluster<M> {
    fn new(machine: fn() -> M) -> Self {
        let disks = (1..=3).map(|id| (id, MemoryLog::default())).collect();
        let mut cluster = Self {
            nodes: BTreeMap::new(),
            disks,
            machine,
            wire: VecDeque::new(),
            cut: BTreeSet::new(),
            lose_snapshots: 0,
            snapshots_seen: 0,
            reports_late: false,
            applied: BTreeMap::new(),
            readable: Vec::new(),
            trace: DefaultHasher::new(),
        };
        (1..=3).for_each(|id| cluster.start(id));
        cluster
    }

    fn start(&mut self, id: u64) {
        let disk = self.disks.remove(&id).expect("it isn't running");
        let mut settings = settings(id);
        settings.join = id > 3;
        let node = Node::new(&settings, disk, (self.machine)(), draw(), &logger()).unwrap();
        self.applied.insert(id, Vec::new());
        self.nodes.insert(id, node);
    }

    fn crash(&mut self, id: u64) {
        let node = self.nodes.remove(&id).expect("it is running");
        self.disks.insert(id, node.into_store());
        self.wire.retain(|(from, envelope)| *from != id && envelope.to != id);
    }

    fn ready(&mut self, id: u64) {
        let Some(node) = self.nodes.get_mut(&id) else { return };
        let mut out = Collected::default();
        node.on_ready(&mut out).unwrap();
        self.wire.extend(out.sent.into_iter().map(|envelope| (id, envelope)));
        self.applied.entry(id).or_default().extend(out.applied);
        self.readable.extend(out.readable);
    }

    fn deliver(&mut self) {
        let mut late = Vec::new();
        while let Some((from, envelope)) = self.wire.pop_front() {
            let Envelope { to, message, snapshot } = envelope;
            (from, to, &message).hash(&mut self.trace);
            let is_snapshot = snapshot.is_some();
            self.snapshots_seen += usize::from(is_snapshot);
            let lost = is_snapshot && self.lose_snapshots > 0;
            self.lose_snapshots -= usize::from(lost);
            let through = !lost && !self.cut.contains(&from) && !self.cut.contains(&to) && self.nodes.contains_key(&to);
            if through {
                self.nodes.get_mut(&to).unwrap().step(from, &message, snapshot).unwrap();
                self.ready(to);
            }
            let Some(sender) = self.nodes.get_mut(&from) else { continue };
            match (is_snapshot, through) {
                (true, true) if self.reports_late => late.push((from, to)),
                (true, arrived) => sender.report_snapshot(to, arrived),
                (false, false) => sender.report_unreachable(to),
                (false, true) => {}
            }
            self.ready(from);
        }
        for (from, to) in late {
            if let Some(sender) = self.nodes.get_mut(&from) {
                sender.report_snapshot(to, true);
            }
            self.ready(from);
        }
    }

    fn tick(&mut self) {
        for id in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.nodes.get_mut(&id).unwrap().tick();
            self.ready(id);
        }
        self.deliver();
    }

    /// Ticks until something is so, and says how many ticks it took.
    fn until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) -> usize {
        for ticks in 0..500 {
            if is_so(self) {
                return ticks;
            }
            self.tick();
        }
        panic!("not after 500 ticks: {what}");
    }

    fn leader(&self) -> Option<u64> {
        let leads = |id: &&u64| self.nodes[id].status().role == Role::Leader && !self.cut.contains(id);
        self.nodes.keys().find(leads).copied()
    }

    fn elected(&mut self) -> u64 {
        self.until("a leader that has committed in its term", |cluster| {
            cluster.leader().is_some_and(|id| cluster.nodes[&id].raw.raft.commit_to_current_term())
        });
        self.leader().unwrap()
    }

    fn propose(&mut self, command: impl Into<Vec<u8>>) {
        let leader = self.leader().expect("there is a leader");
        self.nodes.get_mut(&leader).unwrap().propose(command.into()).unwrap();
        self.ready(leader);
        self.deliver();
    }
}

mod members;

fn journals() -> Cluster<Journal> {
    Cluster::new(Journal::default)
}

fn numbered(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| format!("command {n}")).collect()
}

#[test]
fn a_leader_is_elected_and_its_commands_reach_everybody() {
    let mut cluster = journals();
    cluster.elected();
    numbered(0..20).into_iter().for_each(|command| cluster.propose(command));
    cluster.until("all have applied", |c| c.nodes.values().all(|node| node.machine().0 == numbered(0..20)));
    let first = &cluster.applied[&1];
    assert!(cluster.applied.values().all(|applied| applied == first));
    assert!(first.is_sorted_by_key(|(index, _)| *index));
}

#[test]
fn a_new_leader_takes_over_with_everything_that_was_committed() {
    let mut cluster = journals();
    let old = cluster.elected();
    numbered(0..5).into_iter().for_each(|command| cluster.propose(command));
    cluster.crash(old);
    let ticks = cluster.until("a new leader", |c| c.leader().is_some());
    assert!(ticks <= 30, "{ticks} ticks");
    cluster.elected();
    cluster.propose("command 5");
    cluster.start(old);
    cluster.until("all have applied", |c| c.nodes.values().all(|node| node.machine().0 == numbered(0..6)));
}

#[test]
fn everybody_restarts_from_the_log() {
    let mut cluster = journals();
    cluster.elected();
    // Enough for a snapshot on the way: what comes back is a snapshot and entries.
    numbered(0..95).into_iter().for_each(|command| cluster.propose(command));
    let term = cluster.nodes[&1].status().term;
    (1..=3).for_each(|id| cluster.crash(id));
    (1..=3).for_each(|id| cluster.start(id));
    cluster.elected();
    assert!(cluster.nodes[&1].status().term > term);
    cluster.propose("command 95");
    cluster.until("all have applied", |c| c.nodes.values().all(|node| node.machine().0 == numbered(0..96)));
}

#[test]
fn a_peer_that_was_away_for_long_catches_up_by_a_snapshot() {
    let mut cluster = journals();
    let leader = cluster.elected();
    let away = if leader == 3 { 2 } else { 3 };
    cluster.cut.insert(away);
    numbered(0..100).into_iter().for_each(|command| cluster.propose(command));
    assert!(cluster.nodes[&leader].raw.raft.raft_log.first_index() > 50, "the log was cut");
    // The first transfer gets lost on the way; it has to be made again.
    cluster.lose_snapshots = 1;
    cluster.cut.remove(&away);
    cluster.until("it has caught up", |c| c.nodes[&away].machine().0 == numbered(0..100));
    assert!(cluster.snapshots_seen >= 2);
    assert_eq!(cluster.leader(), Some(leader), "its return disturbed nobody");
    // What it holds now is as good as what it missed.
    cluster.crash(away);
    cluster.start(away);
    cluster.until("it has it after a restart", |c| c.nodes[&away].machine().0 == numbered(0..100));
}

#[test]
fn a_leader_without_a_majority_commits_nothing_and_gives_up() {
    let mut cluster = journals();
    let old = cluster.elected();
    cluster.propose("command 0");
    cluster.cut.insert(old);
    cluster.nodes.get_mut(&old).unwrap().propose(b"never".to_vec()).unwrap();
    cluster.nodes.get_mut(&old).unwrap().read_index(1).unwrap();
    cluster.ready(old);
    cluster.until("it steps down", |c| c.nodes[&old].status().role != Role::Leader);
    assert_eq!(cluster.readable, []);
    assert!(matches!(cluster.nodes.get_mut(&old).unwrap().read_index(2), Err(NotTaken::NotLeader { .. })));
    cluster.elected();
    cluster.propose("command 1");
    cluster.cut.clear();
    cluster.until("all agree", |c| c.nodes.values().all(|node| node.machine().0 == numbered(0..2)));
}

#[test]
fn a_read_is_confirmed_at_the_commit_of_its_time() {
    let mut cluster = journals();
    let leader = cluster.elected();
    cluster.propose("command 0");
    let commit = cluster.nodes[&leader].status().commit;
    cluster.nodes.get_mut(&leader).unwrap().read_index(77).unwrap();
    cluster.ready(leader);
    cluster.deliver();
    assert_eq!(cluster.readable, [(77, commit)]);
}

#[test]
fn only_the_leader_takes_proposals_and_says_who_it_is() {
    let mut cluster = journals();
    let leader = cluster.elected();
    cluster.tick();
    let follower = cluster.nodes.get_mut(&(leader % 3 + 1)).unwrap();
    assert_eq!(follower.propose(b"x".to_vec()), Err(NotTaken::NotLeader { leader: Some(leader) }));
    let leading = cluster.nodes.get_mut(&leader).unwrap();
    let bytes = COMMAND_BYTES_MAX + 1;
    assert_eq!(leading.propose(vec![0; bytes]), Err(NotTaken::TooLarge { bytes }));
}

#[test]
fn too_many_bytes_without_a_commit_are_refused() {
    let mut cluster = journals();
    let leader = cluster.elected();
    let node = cluster.nodes.get_mut(&leader).unwrap();
    let refused = (0..100).find_map(|_| node.propose(vec![1; COMMAND_BYTES_MAX]).err());
    assert_eq!(refused, Some(NotTaken::Overloaded));
}

#[test]
fn leadership_is_handed_over() {
    let mut cluster = journals();
    let old = cluster.elected();
    cluster.nodes.get_mut(&old).unwrap().transfer_leader(None).unwrap();
    cluster.ready(old);
    cluster.deliver();
    cluster.until("another leads", |c| c.leader().is_some_and(|leader| leader != old));
    cluster.elected();
    cluster.propose("command 0");
}

#[test]
fn the_same_draws_make_the_same_run() {
    let run = || {
        let mut cluster = journals();
        for _ in 0..3 {
            let leader = cluster.elected();
            numbered(0..30).into_iter().for_each(|command| cluster.propose(command));
            cluster.crash(leader);
            cluster.elected();
            cluster.start(leader);
        }
        cluster.trace.finish()
    };
    assert_eq!(run(), run());
}

fn announce(id: u8, host: &str) -> Vec<u8> {
    let address = |port: u16| format!("{host}:{port}");
    let info = PeerInfo { grpc_address: address(1), http_address: address(2), peer_address: address(3) };
    Command { id: CommandId([id; 16]), body: CommandBody::AnnouncePeer { peer: PeerId(1), info } }.encode()
}

#[test]
fn a_retry_over_a_change_of_leaders_is_applied_once() {
    let mut cluster: Cluster<Shared> = Cluster::new(|| Shared::new(ClusterState::new("test")));
    let old = cluster.elected();
    cluster.propose(announce(1, "a"));
    cluster.propose(announce(2, "b"));
    // The caller of 1 never heard of its commit; it asks the next leader.
    cluster.crash(old);
    cluster.elected();
    cluster.propose(announce(1, "a"));
    cluster.start(old);
    cluster.until("all have applied it", |c| c.nodes.values().all(|node| node.machine().state().read().epoch == 2));
    let leader = cluster.elected();
    let answers: &Vec<(u64, Answer)> = &cluster.applied[&leader];
    let again: Vec<_> = answers.iter().filter(|(_, answer)| answer.id == CommandId([1; 16])).collect();
    assert_eq!(again.len(), 2, "it is in the log twice");
    assert_eq!(again[0].1.outcome, again[1].1.outcome);
    assert!(again[1].1.effects.is_empty());
    let states: Vec<_> = cluster.nodes.values().map(|node| node.machine().state().read().clone()).collect();
    assert!(states.iter().all(|state| *state == states[0] && state.peers[&PeerId(1)].grpc_address == "b:1"));
}

#[test]
fn the_log_knows_the_members_whatever_the_settings_say() {
    let mut cluster = journals();
    cluster.crash(1);
    let mut settings = settings(1);
    settings.peers = BTreeMap::from([(1, "127.0.0.1:1".to_owned()), (4, "127.0.0.1:4".to_owned())]);
    let disk = cluster.disks.remove(&1).unwrap();
    let node = Node::new(&settings, disk, Journal::default(), draw(), &logger()).unwrap();
    assert_eq!(members_of(&node.conf).voters, (1..=3).map(PeerId).collect());
}

#[test]
fn a_damaged_snapshot_is_refused_from_a_peer_and_at_start() {
    let mut damaged = sealed((9, 1), conf_of(1..=3), b"state");
    let mut data = damaged.get_data().to_vec();
    data[6] ^= 1;
    damaged.set_data(data.into());
    let mut message = Message { from: 1, to: 2, term: 1, ..Message::default() };
    message.set_msg_type(MessageType::MsgSnapshot);
    message.set_snapshot(damaged.clone());
    let mut node = Node::new(&settings(2), MemoryLog::default(), Journal::default(), draw(), &logger()).unwrap();
    let refused = node.step(1, &message.write_to_bytes().unwrap(), None).unwrap_err();
    assert_eq!(refused.problem, "its data is damaged");
    let mut disk = MemoryLog::default();
    let hard_state = HardState { term: 1, commit: 9, ..HardState::default() };
    disk.append(&Batch { snapshot: Some(&damaged), clear: true, compact: Some((9, 1)), hard_state, ..Batch::default() }).unwrap();
    let error = Node::new(&settings(2), disk, Journal::default(), draw(), &logger()).map(|_| ()).unwrap_err();
    assert!(matches!(error, NodeError::Snapshot { index: 9, .. }), "{error}");
}

/// Found by the property below: the library matches term 0 with any entry beyond its log.
#[test]
fn an_append_beyond_the_log_commits_nothing() {
    let mut node = Node::new(&settings(2), MemoryLog::default(), Journal::default(), draw(), &logger()).unwrap();
    let mut message = Message { from: 1, to: 2, term: 2, index: 1 << 40, commit: 11, ..Message::default() };
    message.set_msg_type(MessageType::MsgAppend);
    let refused = node.step(1, &message.write_to_bytes().unwrap(), None).unwrap_err();
    assert_eq!((refused.kind, refused.problem), ("append", "the term before its entries is out of range"));
    assert_eq!(node.status().commit, 1);
}

/// Numbers around those that matter to a node with a short log.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![8 => 0..24_u64, 1 => Just(1 << 48), 1 => Just(u64::MAX), 1 => any::<u64>()]
}

fn hostile_entries() -> impl Strategy<Value = Vec<Entry>> {
    let entry =
        (number(), number(), 0..4_i32, proptest::collection::vec(any::<u8>(), 0..8)).prop_map(|(index, term, kind, data)| {
            let mut entry = Entry { index, term, data: data.into(), ..Entry::default() };
            entry.set_entry_type(EntryType::from_i32(kind).unwrap_or(EntryType::EntryNormal));
            entry
        });
    let chained = (0..20_u64, 0..6_u64, 0..5_u64).prop_map(|(index, term, count)| {
        let entries = (0..count).map(|n| Entry { index: index + n, term, data: "x".into(), ..Entry::default() });
        entries.collect()
    });
    prop_oneof![proptest::collection::vec(entry, 0..4), chained]
}

fn hostile() -> impl Strategy<Value = (u64, Message)> {
    let numbers = proptest::array::uniform9(number());
    let envelope = (0..20_i32, 0..5_u64, 0..5_u64, any::<bool>(), 0..4_u8);
    (envelope, numbers, hostile_entries(), 0..5_u8).prop_map(|((kind, from, to, reject, context), n, entries, members)| {
        let mut message = Message { from, to, reject, ..Message::default() };
        message.set_msg_type(MessageType::from_i32(kind).unwrap_or_default());
        (message.term, message.log_term, message.index, message.commit) = (n[0], n[1], n[2], n[3]);
        (message.commit_term, message.request_snapshot, message.reject_hint) = (n[4], n[5] / 2, n[6]);
        if context == 0 {
            message.context = "CampaignTransfer".into();
        }
        if entries.first().is_some_and(|entry| entry.index > 0 && context > 1) {
            message.index = entries[0].index - 1;
        }
        message.set_entries(entries.into());
        let mut snapshot = sealed((n[7], n[8]), conf_of(1..=3), b"state");
        let conf = match members {
            0 => ConfState::default(),
            1 => ConfState { voters: vec![1, 1, 9], ..ConfState::default() },
            2 => ConfState { voters: vec![4, 2], voters_outgoing: vec![1, 2], auto_leave: true, ..ConfState::default() },
            3 => ConfState { voters: vec![4], learners: vec![1, 2, 3], ..ConfState::default() },
            _ => ConfState { voters: vec![3, 2, 1], ..ConfState::default() },
        };
        snapshot.mut_metadata().set_conf_state(conf);
        message.set_snapshot(snapshot);
        (from, message)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    /// Whatever a peer sends, in whatever state it meets us: a refusal or an answer, never a panic.
    #[test]
    fn hostile_messages_never_panic(
        messages in proptest::collection::vec((hostile(), 0..14_usize), 1..40),
        lead in 0..3_u8,
    ) {
        let mut cluster = journals();
        let leader = cluster.elected();
        numbered(0..8).into_iter().for_each(|command| cluster.propose(command));
        let victim = if lead == 0 { leader } else { leader % 3 + 1 };
        let node = cluster.nodes.get_mut(&victim).unwrap();
        for ((from, mut message), ticks) in messages {
            // Most of them well addressed, so that they get past the first check.
            if message.to != 0 {
                message.to = victim;
            }
            let _ = node.step(from, &message.write_to_bytes().unwrap(), None);
            let mut out = Collected::default();
            // Several steps may share one pass, and time passes in between.
            if ticks != 1 {
                (0..ticks).for_each(|_| node.tick());
                prop_assert!(node.on_ready(&mut out).is_ok());
            }
        }
    }

    #[test]
    fn noise_is_refused(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut node = Node::new(&settings(2), MemoryLog::default(), Journal::default(), draw(), &logger()).unwrap();
        let _ = node.step(1, &noise, None);
        let mut out = Collected::default();
        prop_assert!(node.on_ready(&mut out).is_ok());
    }
}
