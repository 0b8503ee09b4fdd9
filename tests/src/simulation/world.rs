//! Virtual time: what happens next, to whom.
use std::{
    cmp::Ordering,
    collections::{BTreeMap, BinaryHeap},
    hash::{DefaultHasher, Hash, Hasher},
};

use bytes::Bytes;
use cresset_core::{Command, WorkerId, command::ReplicaReport, state::Incarnation};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IndexedRandom};

use super::{
    CHAOS_SECONDS, END, MS, Report, SECOND, Scenario, Us,
    checks::Checks,
    clients::{Answer, Client, Histories},
    disk::Fail,
    faults::Fault,
    fleet::{Order, Worker},
    members::Operator,
    network::{Address, Network},
    peer::Peer,
};
use crate::linearizability::{self, Verdict};

/// Between two ticks of a coordinator's clock.
const TICK: Us = 50 * MS;
const CLIENTS: u64 = 5;
const WORKERS: u64 = 5;
const FIRST_CLIENT: Address = 100;
const FIRST_WORKER: Address = 200;

/// Everything that can happen.
pub(super) enum Event {
    Tick {
        peer: u64,
        life: u32,
    },
    Duty {
        peer: u64,
        life: u32,
    },
    Message {
        from: u64,
        to: u64,
        message: Vec<u8>,
        snapshot: Option<Bytes>,
    },
    SnapshotSent {
        peer: u64,
        to: u64,
        arrived: bool,
    },
    Unreachable {
        peer: u64,
        to: u64,
    },
    Request {
        from: Address,
        to: u64,
        request: Request,
    },
    Answer {
        client: Address,
        operation: u64,
        answer: Answer,
    },
    Client {
        address: Address,
        attempt: u64,
    },
    Beat {
        worker: Address,
    },
    Order {
        worker: Address,
        incarnation: Incarnation,
        order: Order,
    },
    WorkerRestart {
        worker: Address,
    },
    Verdict {
        worker: WorkerId,
        incarnation: Incarnation,
    },
    Restart {
        peer: u64,
    },
    /// A coordinator hears that it was removed.
    Told {
        peer: u64,
    },
    /// The operator looks at the members.
    Operator,
    Fault,
    /// The end of a fault that lasts.
    Mend(Mend),
    /// The end of all faults.
    Heal,
}

/// What ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum Mend {
    Cuts,
    Weather,
    Disk(u64),
}

/// What clients and workers want of a coordinator.
pub(super) enum Request {
    Propose { operation: u64, command: Command },
    Read { operation: u64, key: String },
    Beat { worker: WorkerId, incarnation: Incarnation, reports: Vec<ReplicaReport> },
}

impl Event {
    /// The coordinator that has to be awake for it.
    fn peer(&self) -> Option<u64> {
        match self {
            Self::Tick { peer, .. }
            | Self::Duty { peer, .. }
            | Self::SnapshotSent { peer, .. }
            | Self::Unreachable { peer, .. } => Some(*peer),
            Self::Message { to, .. } | Self::Request { to, .. } => Some(*to),
            _ => None,
        }
    }

    /// For the trace: what it is and whom it is about.
    fn mark(&self) -> (u8, u64, u64) {
        match self {
            Self::Tick { peer, life } => (0, *peer, (*life).into()),
            Self::Duty { peer, life } => (1, *peer, (*life).into()),
            Self::Message { from, to, message, .. } => (2, from * 100 + to, message.len() as u64),
            Self::SnapshotSent { peer, to, arrived } => (3, peer * 100 + to, (*arrived).into()),
            Self::Unreachable { peer, to } => (4, *peer, *to),
            Self::Request { from, to, .. } => (5, *from, *to),
            Self::Answer { client, operation, .. } => (6, *client, *operation),
            Self::Client { address, attempt } => (7, *address, *attempt),
            Self::Beat { worker } => (8, *worker, 0),
            Self::Order { worker, incarnation, .. } => (9, *worker, *incarnation),
            Self::WorkerRestart { worker } => (10, *worker, 0),
            Self::Verdict { incarnation, .. } => (11, 0, *incarnation),
            Self::Restart { peer } => (12, *peer, 0),
            Self::Fault => (13, 0, 0),
            Self::Mend(_) => (14, 0, 0),
            Self::Heal => (15, 0, 0),
            Self::Told { peer } => (16, *peer, 0),
            Self::Operator => (17, 0, 0),
        }
    }
}

/// An event at its time; of two at the same time, the one that was planned first.
struct Planned {
    at: Us,
    number: u64,
    event: Event,
}

impl Ord for Planned {
    fn cmp(&self, other: &Self) -> Ordering {
        // The heap gives the greatest first.
        (other.at, other.number).cmp(&(self.at, self.number))
    }
}

impl PartialOrd for Planned {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Planned {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Planned {}

/// A cluster and its misfortunes.
pub(super) struct World {
    pub(super) scenario: Scenario,
    pub(super) now: Us,
    pub(super) random: StdRng,
    pub(super) network: Network,
    pub(super) founders: u64,
    pub(super) peers: BTreeMap<u64, Peer>,
    pub(super) operator: Operator,
    pub(super) clients: BTreeMap<Address, Client>,
    pub(super) workers: BTreeMap<Address, Worker>,
    pub(super) checks: Checks,
    pub(super) histories: Histories,
    pub(super) values_used: u64,
    pub(super) answered: u64,
    pub(super) crashes: u64,
    planned: BinaryHeap<Planned>,
    number: u64,
    trace: DefaultHasher,
    pub(super) healed: bool,
}

impl World {
    pub(super) fn new(scenario: Scenario) -> Self {
        let mut random = StdRng::seed_from_u64(scenario.seed);
        let peers: u64 = if random.random_ratio(1, 3) { 5 } else { 3 };
        let worker = |number| (FIRST_WORKER + number, format!("w{number}").parse().map(Worker::new));
        Self {
            scenario,
            now: 0,
            random,
            network: Network::default(),
            founders: peers,
            operator: Operator::new(peers),
            peers: (1..=peers).map(|id| (id, Peer::new(scenario.mutant))).collect(),
            clients: (0..CLIENTS).map(|number| (FIRST_CLIENT + number, Client::default())).collect(),
            workers: (0..WORKERS).map(worker).filter_map(|(address, worker)| Some((address, worker.ok()?))).collect(),
            checks: Checks::default(),
            histories: Histories::new(),
            values_used: 0,
            answered: 0,
            crashes: 0,
            planned: BinaryHeap::new(),
            number: 0,
            trace: DefaultHasher::new(),
            healed: false,
        }
    }

    /// Plans an event.
    pub(super) fn at(&mut self, at: Us, event: Event) {
        self.number += 1;
        self.planned.push(Planned { at, number: self.number, event });
    }

    /// Plans an event for a while from now.
    pub(super) fn after(&mut self, pause: Us, event: Event) {
        self.at(self.now + pause, event);
    }

    pub(super) fn between(&mut self, least: Us, below: Us) -> Us {
        self.random.random_range(least..below)
    }

    /// Sends a coordinator a request.
    pub(super) fn request(&mut self, from: Address, to: u64, request: Request) {
        // Requests aren't repeated by the network: they travel on connections.
        if let Some(at) = self.network.route(from, to, self.now, &mut self.random).into_iter().next() {
            self.at(at, Event::Request { from, to, request });
        }
    }

    /// Sends a client an answer.
    pub(super) fn reply(&mut self, from: u64, client: Address, operation: u64, answer: Answer) {
        let sent = self.peers.get(&from).map_or(self.now, |peer| peer.busy_until.max(self.now));
        if let Some(at) = self.network.route(from, client, sent, &mut self.random).into_iter().next() {
            self.at(at, Event::Answer { client, operation, answer });
        }
    }

    /// Lives to the end of the scenario.
    pub(super) fn run(mut self) -> Report {
        let ids: Vec<u64> = self.peers.keys().copied().collect();
        for id in ids {
            let sync_us = self.between(200, 5 * MS);
            if let Some(peer) = self.peers.get(&id) {
                peer.knobs.sync_us.set(sync_us);
            }
            self.start(id);
        }
        for number in 0..CLIENTS {
            self.after(number * 40 * MS, Event::Client { address: FIRST_CLIENT + number, attempt: 0 });
        }
        for number in 0..WORKERS {
            self.after(number * 50 * MS, Event::Beat { worker: FIRST_WORKER + number });
        }
        self.after(2 * SECOND, Event::Fault);
        self.after(3 * SECOND, Event::Operator);
        self.at(CHAOS_SECONDS * SECOND, Event::Heal);
        while self.checks.violation().is_none() {
            let Some(Planned { at, event, .. }) = self.planned.pop().filter(|planned| planned.at < END) else { break };
            self.now = at;
            self.happen(event);
        }
        if self.checks.violation().is_none() {
            self.finish();
        }
        Report {
            violation: self.checks.violation().map(ToOwned::to_owned),
            hash: self.trace.finish(),
            answered: self.answered,
            crashes: self.crashes,
            leaders: self.checks.leaders(),
            member_changes: self.operator.changes,
            seconds: self.now / SECOND,
        }
    }

    fn happen(&mut self, event: Event) {
        if let Some(peer) = event.peer().and_then(|peer| self.peers.get(&peer)) {
            let awake_at = peer.busy_until.max(peer.paused_until);
            if awake_at > self.now {
                return self.at(awake_at, event);
            }
        }
        (self.now, event.mark()).hash(&mut self.trace);
        match event {
            Event::Tick { peer, life } => self.on_tick(peer, life),
            Event::Duty { peer, life } => {
                if self.peers.get(&peer).is_some_and(|known| known.life == life && known.node.is_some()) {
                    self.on_duty(peer, life);
                }
            }
            Event::Message { from, to, message, snapshot } => self.on_message(from, to, &message, snapshot),
            Event::SnapshotSent { peer, to, arrived } => drop(self.with_node(peer, |node| node.report_snapshot(to, arrived))),
            Event::Unreachable { peer, to } => drop(self.with_node(peer, |node| node.report_unreachable(to))),
            Event::Request { from, to, request } => self.on_request(from, to, request),
            Event::Answer { client, operation, answer } => self.on_answer(client, operation, answer),
            Event::Client { address, attempt } => self.on_client(address, attempt),
            Event::Beat { worker } => self.on_beat(worker),
            Event::Order { worker, incarnation, order } => self.on_order(worker, incarnation, order),
            Event::WorkerRestart { worker } => self.worker_restart(worker),
            Event::Verdict { worker, incarnation } => self.on_verdict(worker, incarnation),
            Event::Restart { peer } => self.start(peer),
            Event::Told { peer } => self.retire(peer),
            Event::Operator => self.on_operator(),
            Event::Fault => self.on_fault(),
            Event::Mend(what) => self.mend(what),
            Event::Heal => self.heal(),
        }
    }

    fn on_tick(&mut self, peer: u64, life: u32) {
        let Some(known) = self.peers.get(&peer).filter(|known| known.life == life && known.node.is_some()) else { return };
        let pause = TICK * 1_000 / known.rate_permille;
        self.after(pause, Event::Tick { peer, life });
        self.with_node(peer, |node| node.tick());
    }

    fn on_request(&mut self, from: Address, to: u64, request: Request) {
        if self.peers.get(&to).is_none_or(|peer| peer.node.is_none()) {
            return;
        }
        match request {
            Request::Propose { operation, command } => self.on_propose(to, from, operation, &command),
            Request::Read { operation, key } => self.on_read(to, from, operation, key),
            Request::Beat { worker, incarnation, reports } => self.on_heartbeat(to, from, &worker, incarnation, reports),
        }
    }

    fn on_fault(&mut self) {
        if self.healed {
            return;
        }
        let mean = self.scenario.profile.pause_us();
        let pause = self.between(mean / 5, mean * 2);
        self.after(pause, Event::Fault);
        let ids = self.existing();
        let workers: Vec<Address> = self.workers.keys().copied().collect();
        let one = *ids.choose(&mut self.random).unwrap_or(&1);
        let worker = *workers.choose(&mut self.random).unwrap_or(&FIRST_WORKER);
        let leader = self.peers.iter().find(|(_, peer)| peer.leads()).map_or(one, |(id, _)| *id);
        let lasting = self.between(500 * MS, 6 * SECOND);
        let away = self.between(100 * MS, 3 * SECOND);
        match self.scenario.profile.draw(&mut self.random) {
            Fault::Crash => self.crash(one, away),
            Fault::CrashInWrite => {
                let fail = if self.random.random_ratio(1, 2) { Fail::Before } else { Fail::After };
                let writes = self.random.random_range(0..20);
                if let Some(peer) = self.peers.get(&one) {
                    peer.knobs.fails.set(Some((writes, fail)));
                }
            }
            Fault::Blackout => ids.iter().for_each(|id| self.crash(*id, away)),
            Fault::Cut => {
                let (left, right): (Vec<u64>, Vec<u64>) = ids.iter().partition(|_| self.random.random_ratio(1, 2));
                let one_way = self.random.random_ratio(1, 3);
                self.network.cut(&left, &right, one_way);
                self.after(lasting, Event::Mend(Mend::Cuts));
            }
            Fault::Isolate => {
                // Clients still reach it: they are who a deposed leader could deceive.
                let one_way = self.random.random_ratio(1, 4);
                self.network.cut(&[leader], &ids, one_way);
                self.after(lasting, Event::Mend(Mend::Cuts));
            }
            Fault::Weather => {
                self.network.lost_permille = self.random.random_range(0..300);
                self.network.repeated_permille = self.random.random_range(0..100);
                self.network.late_permille = self.random.random_range(0..300);
                self.after(lasting, Event::Mend(Mend::Weather));
            }
            Fault::Pause => {
                let until = self.now + lasting;
                self.peers.entry(one).and_modify(|peer| peer.paused_until = until);
            }
            Fault::SlowDisk => {
                let sync_us = self.between(20 * MS, 400 * MS);
                self.peers.entry(one).and_modify(|peer| peer.knobs.sync_us.set(sync_us));
                self.after(lasting, Event::Mend(Mend::Disk(one)));
            }
            Fault::DiskFull => {
                self.peers.entry(one).and_modify(|peer| peer.knobs.full.set(true));
                self.after(lasting, Event::Mend(Mend::Disk(one)));
            }
            Fault::Clock => {
                let rate_permille = self.random.random_range(500..2_000);
                self.peers.entry(one).and_modify(|peer| peer.rate_permille = rate_permille);
            }
            Fault::Transfer => drop(self.with_node(leader, |node| node.transfer_leader(None))),
            Fault::WorkerCrash => self.worker_crash(worker, away),
            Fault::WorkerCut => {
                self.network.cut(&[worker], &ids, false);
                self.after(lasting, Event::Mend(Mend::Cuts));
            }
            Fault::Judge => self.judge(worker),
        }
    }

    fn mend(&mut self, what: Mend) {
        match what {
            Mend::Cuts => self.network.mend(),
            Mend::Weather => (self.network.lost_permille, self.network.repeated_permille, self.network.late_permille) = (0, 0, 0),
            Mend::Disk(id) => {
                if let Some(peer) = self.peers.get(&id) {
                    peer.knobs.full.set(false);
                    peer.knobs.sync_us.set(MS);
                }
            }
        }
    }

    /// No more faults: from here on the cluster has to show that it recovers.
    fn heal(&mut self) {
        self.healed = true;
        self.network.heal();
        let ids: Vec<u64> = self.peers.keys().copied().collect();
        for id in ids {
            if let Some(peer) = self.peers.get_mut(&id) {
                peer.knobs.full.set(false);
                peer.knobs.fails.set(None);
                peer.knobs.sync_us.set(MS);
                peer.paused_until = 0;
                peer.rate_permille = 1_000;
            }
            self.start(id);
        }
    }

    /// What must be true at the end.
    fn finish(&mut self) {
        let leaders = self.peers.values().filter(|peer| peer.leads()).count();
        if leaders != 1 {
            self.checks.fail(format!("{leaders} leaders long after all was healed"));
        }
        let since = END - 5 * SECOND;
        if let Some((address, _)) = self.clients.iter().find(|(_, client)| client.answered_at < since) {
            self.checks.fail(format!("client {address} has had no answer for 5 s, long after all was healed"));
        }
        self.members_are_settled();
        self.fleet_is_settled();
        self.checks.nothing_is_lost();
        self.give_up();
        for (key, history) in std::mem::take(&mut self.histories) {
            match linearizability::check(&history, linearizability::STEPS_MAX) {
                Verdict::Linearizable => {}
                Verdict::Violated => self.checks.fail(format!("the history of '{key}' is not linearizable")),
                Verdict::Undecided => self.checks.fail(format!("the history of '{key}' can't be decided")),
            }
        }
        (self.answered, self.crashes, self.checks.epoch_max()).hash(&mut self.trace);
    }
}
