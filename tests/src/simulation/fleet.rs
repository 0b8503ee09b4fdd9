//! Workers that beat, load and die, and what a leader does about them.
use std::collections::BTreeMap;

use cresset_core::{
    Command, CommandBody, CommandId, PeerId, WorkerId,
    apply::is_news,
    command::{Cause, Registration, ReplicaReport},
    level::{self, LEVEL_KNOWN, Level},
    liveness::{Liveness, Policy, Verdict},
    placement::{self, plan},
    routes::{Assignment, assignments},
    state::{Epoch, Incarnation, ReplicaId, ReplicaState},
};

use super::{
    MS, Us,
    network::Address,
    world::{Event, Request, World},
};

/// Between two heartbeats.
const BEAT: Us = 250 * MS;
/// Between two looks of a leader at its duties.
const DUTY: Us = 100 * MS;
/// How long a leader waits for a plan to be applied before it makes another.
const PLAN_PATIENCE_MS: u64 = 2_000;

/// A worker process, without models.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) id: WorkerId,
    pub(super) incarnation: Incarnation,
    pub(super) alive: bool,
    /// The newest intent that this life has acted on.
    epoch: Epoch,
    replicas: BTreeMap<(String, u64, u32), (u64, Us)>,
}

impl Worker {
    pub(super) fn new(id: WorkerId) -> Self {
        Self { id, incarnation: 1, alive: true, epoch: 0, replicas: BTreeMap::new() }
    }

    fn reports(&self, now: Us) -> Vec<ReplicaReport> {
        let report = |((model, version, shard), (generation, ready_at)): (&(String, u64, u32), &(u64, Us))| ReplicaReport {
            model: model.clone(),
            version: *version,
            shard: *shard,
            generation: *generation,
            state: if *ready_at <= now { ReplicaState::Ready } else { ReplicaState::Loading },
            reason: String::new(),
            memory_bytes: 1,
        };
        self.replicas.iter().map(report).collect()
    }

    fn new_life(&mut self, incarnation: Incarnation) {
        (self.incarnation, self.epoch) = (incarnation, 0);
        self.replicas.clear();
    }
}

/// What a worker hears.
#[derive(Debug, Clone)]
pub(super) enum Order {
    /// What to run.
    Intent { epoch: Epoch, assignments: Vec<Assignment> },
    /// This life is over.
    Fenced { incarnation_min: Incarnation },
}

/// One term of leading.
pub(super) struct Duties {
    term: u64,
    /// Everything that earlier leaders did is known.
    caught_up: bool,
    liveness: Liveness,
    /// The plan that is on its way.
    placing: Option<(CommandId, u64)>,
}

impl World {
    /// A worker beats: with every coordinator, since it can't know which one leads.
    pub(super) fn on_beat(&mut self, address: Address) {
        self.after(BEAT, Event::Beat { worker: address });
        let Some(worker) = self.workers.get(&address).filter(|worker| worker.alive) else { return };
        let (id, incarnation, reports) = (worker.id.clone(), worker.incarnation, worker.reports(self.now));
        for to in self.existing() {
            let request = Request::Beat { worker: id.clone(), incarnation, reports: reports.clone() };
            self.request(address, to, request);
        }
    }

    pub(super) fn on_order(&mut self, address: Address, incarnation: Incarnation, order: Order) {
        let now = self.now;
        let takes = self.between(50 * MS, 800 * MS);
        let Some(worker) = self.workers.get_mut(&address) else { return };
        if !worker.alive || worker.incarnation != incarnation {
            return;
        }
        match order {
            Order::Fenced { incarnation_min } => worker.new_life(incarnation_min.max(incarnation + 1)),
            // An intent that is older than what was acted on comes from a leader that was.
            Order::Intent { epoch, .. } if epoch < worker.epoch => {}
            Order::Intent { epoch, assignments } => {
                worker.epoch = epoch;
                let wanted = assignments.into_iter().map(|a| ((a.key.name, a.key.version, a.shard), a.generation));
                let next = wanted.map(|(key, generation)| {
                    let ready_at = match worker.replicas.get(&key) {
                        Some((known, ready_at)) if *known == generation => *ready_at,
                        _ => now + takes,
                    };
                    (key, (generation, ready_at))
                });
                worker.replicas = next.collect();
            }
        }
    }

    /// A worker dies; after a while the next life begins.
    pub(super) fn worker_crash(&mut self, address: Address, away: Us) {
        if let Some(worker) = self.workers.get_mut(&address).filter(|worker| worker.alive) {
            worker.alive = false;
            self.after(away, Event::WorkerRestart { worker: address });
        }
    }

    pub(super) fn worker_restart(&mut self, address: Address) {
        if let Some(worker) = self.workers.get_mut(&address) {
            worker.alive = true;
            worker.new_life(worker.incarnation + 1);
        }
    }

    /// A heartbeat reaches a coordinator. Only a leader that has caught up cares.
    pub(super) fn on_heartbeat(
        &mut self,
        id: u64,
        address: Address,
        worker: &WorkerId,
        incarnation: Incarnation,
        reports: Vec<ReplicaReport>,
    ) {
        let now = self.now;
        let Some(peer) = self.peers.get_mut(&id).filter(|peer| peer.leads()) else { return };
        let clock_ms = peer.clock_ms(now);
        let Some(duties) = peer.duties.as_mut().filter(|duties| duties.caught_up) else { return };
        let Some(node) = &peer.node else { return };
        let state = &node.machine().state;
        let known = state.workers.get(worker).map(|known| (known.incarnation, known.incarnation_floor, known.state));
        match known {
            Some((current, floor, _)) if incarnation < floor.max(current) => {
                let incarnation_min = floor.max(current);
                self.order(id, address, incarnation, Order::Fenced { incarnation_min });
            }
            Some((current, _, standing)) if current == incarnation && !standing.is_over() => {
                duties.liveness.heartbeat(worker, incarnation, clock_ms);
                let is_new = |report: &ReplicaReport| {
                    let id = ReplicaId {
                        model: report.model.clone(),
                        version: report.version,
                        shard: report.shard,
                        worker: worker.clone(),
                    };
                    state.replicas.get(&id).is_some_and(|replica| is_news(replica, report))
                };
                let news: Vec<ReplicaReport> = reports.into_iter().filter(is_new).collect();
                let order = Order::Intent { epoch: state.epoch, assignments: assignments(state, worker) };
                self.order(id, address, incarnation, order);
                if !news.is_empty() {
                    let worker = worker.clone();
                    self.propose(id, CommandBody::ReportReplicas { worker, incarnation, replicas: news });
                }
            }
            _ => {
                let registration = Registration {
                    worker: worker.clone(),
                    incarnation,
                    grpc_address: format!("{worker}:1"),
                    http_address: String::new(),
                    zone: String::new(),
                    devices: vec![],
                    tags: BTreeMap::new(),
                };
                self.propose(id, CommandBody::RegisterWorker(registration));
            }
        }
    }

    fn order(&mut self, from: u64, address: Address, incarnation: Incarnation, order: Order) {
        for at in self.network.route(from, address, self.now, &mut self.random) {
            self.at(at, Event::Order { worker: address, incarnation, order: order.clone() });
        }
    }

    /// A coordinator looks at what a leader has to do.
    pub(super) fn on_duty(&mut self, id: u64, life: u32) {
        let rate_permille = self.peers.get(&id).map_or(1_000, |peer| peer.rate_permille);
        self.after(DUTY * 1_000 / rate_permille, Event::Duty { peer: id, life });
        let now = self.now;
        // Who lives says what it knows. All are of this version.
        let alive = self.peers.iter().filter(|(_, peer)| peer.node.is_some());
        let known: BTreeMap<PeerId, Level> = alive.map(|(id, _)| (PeerId(*id), LEVEL_KNOWN)).collect();
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let Some(node) = &peer.node else { return };
        self.checks.look(id, &node.machine().state);
        let term = node.status().term;
        if !peer.leads() {
            peer.duties = None;
            return;
        }
        let clock_ms = peer.clock_ms(now);
        if peer.duties.as_ref().is_none_or(|duties| duties.term != term) {
            let liveness = Liveness::new(Policy::default(), clock_ms);
            peer.duties = Some(Duties { term, caught_up: false, liveness, placing: None });
        }
        let Some(duties) = peer.duties.as_mut() else { return };
        if !duties.caught_up {
            return self.catch_up(id, term);
        }
        let Some(node) = &peer.node else { return };
        let state = &node.machine().state;
        duties.liveness.follow(state, clock_ms);
        let mut verdicts = duties.liveness.tick(clock_ms);
        // A probe is a call there and back. It takes no time here.
        for verdict in std::mem::take(&mut verdicts) {
            let Verdict::Probe { worker, incarnation } = verdict else {
                verdicts.push(verdict);
                continue;
            };
            let reached = self.workers.iter().any(|(address, known)| {
                let is_cut = self.network.is_cut(id, *address) || self.network.is_cut(*address, id);
                known.id == worker && known.alive && !is_cut
            });
            if reached {
                duties.liveness.probe_ok(&worker, incarnation, clock_ms);
            } else {
                verdicts.extend(duties.liveness.probe_failed(&worker, incarnation, clock_ms));
            }
        }
        let is_placing =
            duties.placing.is_some_and(|(command, until_ms)| state.remembered.get(&command).is_none() && clock_ms < until_ms);
        let raise = level::to_raise(state, &known);
        let plan = (!is_placing).then(|| plan(state, &placement::Policy::default(), &BTreeMap::new()));
        for verdict in verdicts {
            if let Verdict::Dead { worker, incarnation, cause } = verdict {
                self.propose(id, CommandBody::MarkDead { worker, incarnation, cause });
            }
        }
        if let Some(level) = raise {
            self.propose(id, CommandBody::RaiseLevel { level });
        }
        if let Some(plan) = plan.filter(|plan| !plan.is_empty()) {
            let command = self.propose(id, plan.into_command());
            if let Some(duties) = self.peers.get_mut(&id).and_then(|peer| peer.duties.as_mut()) {
                duties.placing = Some((command, clock_ms + PLAN_PATIENCE_MS));
            }
        }
    }

    pub(super) fn caught_up(&mut self, id: u64, term: u64) {
        let clock_ms = self.peers.get(&id).map_or(0, |peer| peer.clock_ms(self.now));
        let duties = self.peers.get_mut(&id).and_then(|peer| peer.duties.as_mut());
        if let Some(duties) = duties.filter(|duties| duties.term == term && !duties.caught_up) {
            duties.caught_up = true;
            // A new leader calls nobody dead before one full timeout of its own.
            duties.liveness = Liveness::new(Policy::default(), clock_ms);
        }
    }

    /// An operator's verdict, on a life that they heard of a while ago.
    pub(super) fn judge(&mut self, address: Address) {
        let Some(worker) = self.workers.get(&address) else { return };
        let (worker, incarnation) = (worker.id.clone(), worker.incarnation);
        let delay = self.between(0, 3_000 * MS);
        self.after(delay, Event::Verdict { worker, incarnation });
    }

    pub(super) fn on_verdict(&mut self, worker: WorkerId, incarnation: Incarnation) {
        let leader = self.peers.iter().find(|(_, peer)| peer.leads()).map(|(id, _)| *id);
        if let Some(leader) = leader {
            self.propose(leader, CommandBody::MarkDead { worker, incarnation, cause: Cause::Operator });
        }
    }

    /// Proposes what a coordinator wants itself. Nobody waits for it.
    fn propose(&mut self, id: u64, body: CommandBody) -> CommandId {
        let command = Command { id: self.fresh_id(), body };
        let bytes = command.encode();
        // Not taken: it is wanted again at the next look.
        let _ = self.with_node(id, |node| node.propose(bytes));
        command.id
    }

    /// At the end: every model has as many ready replicas as it wants and there are workers for.
    pub(super) fn fleet_is_settled(&mut self) {
        let leader = self.peers.values().find(|peer| peer.leads());
        let Some(state) = leader.and_then(|peer| Some(&peer.node.as_ref()?.machine().state)) else { return };
        let ready_workers = state.workers_ready().count();
        let mut problem = None;
        for (key, deployment) in &state.models {
            let wanted = (deployment.replicas_wanted as usize).min(ready_workers);
            let ready = state.replicas_of(key).filter(|(_, replica)| replica.state == ReplicaState::Ready).count();
            if ready != wanted {
                problem = Some(format!("{} has {ready} ready replicas, {wanted} are possible", key.name));
            }
        }
        if ready_workers != self.workers.len() {
            problem = Some(format!("{ready_workers} of {} workers are ready", self.workers.len()));
        }
        if let Some(problem) = problem {
            self.checks.fail(format!("{problem}, long after all was healed"));
        }
    }
}
