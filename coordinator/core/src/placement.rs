//! Which moves would bring the replicas closer to what is wanted.
//!
//! A pure function of the state, the policy and the memory that workers report. The rules, strongest first:
//!
//! 1. Replicas of one shard are on distinct workers, new ones only on workers that are ready and have the memory.
//! 2. What answers stays where it is: nothing is moved for a nicer spread, and a replica on a leaving worker goes only
//!    once the others are settled.
//! 3. A failed replica keeps its place. Another worker would most likely fail in the same way, so a model that can't
//!    load would wander through the whole cluster. Deploying again tries again.
//! 4. Every shard gets its first replica before any gets its second.
//! 5. A worker that routers leave alone (see `opinions`) gets nothing new, and keeps what it has.
//! 6. Among the workers left: a zone that lacks the shard, then the fewest replicas, then the most free memory.
//!
//! Not done yet: moving replicas onto workers that joined later, and packing by size.
use std::collections::{BTreeMap, BTreeSet};

use crate::{
    WorkerId,
    state::{ClusterState, Deployment, Epoch, ModelKey, Replica, ReplicaId, ReplicaState, WorkerState},
};

/// What an operator may turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What a replica takes beyond the size of its files, in percent of it.
    pub memory_overhead_percent: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { memory_overhead_percent: 20 }
    }
}

/// Moves to propose, and what can't be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The epoch of the state that this was made from.
    pub epoch: Epoch,
    /// Replicas to begin.
    pub add: Vec<ReplicaId>,
    /// Replicas to end.
    pub remove: Vec<ReplicaId>,
    /// Shards that stay short of replicas, in the order of their names.
    pub unplaced: Vec<Unplaced>,
}

impl Plan {
    /// Whether there is nothing to propose.
    pub fn is_empty(&self) -> bool {
        self.add.is_empty() && self.remove.is_empty()
    }
}

/// A shard for which not enough workers were found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unplaced {
    /// The model.
    pub model: ModelKey,
    /// Which part of it.
    pub shard: u32,
    /// Replicas that found no place.
    pub missing: u32,
    /// Why, for people.
    pub reason: String,
}

/// Where a shard's replicas are, by what becomes of them.
#[derive(Debug, Default)]
pub(crate) struct Shard<'a> {
    /// On workers that take work.
    pub(crate) staying: Vec<(&'a WorkerId, &'a Replica)>,
    /// On workers that leave or are gone.
    pub(crate) leaving: Vec<&'a WorkerId>,
    /// Workers that take work and whose replica answers, in this generation or still in the one before.
    pub(crate) answering: Vec<&'a WorkerId>,
}

impl<'a> Shard<'a> {
    /// Looks up the replicas of one shard.
    pub(crate) fn survey(state: &'a ClusterState, key: &ModelKey, shard: u32) -> Self {
        let mut found = Self::default();
        for (id, replica) in state.replicas_of(key).filter(|(id, _)| id.shard == shard) {
            if state.workers.get(&id.worker).is_some_and(|worker| worker.state == WorkerState::Ready) {
                found.staying.push((&id.worker, replica));
                if replica.answering().is_some() {
                    found.answering.push(&id.worker);
                }
            } else {
                found.leaving.push(&id.worker);
            }
        }
        found
    }

    /// Whether no replica is on its way any more: each one answers or has failed.
    fn settled(&self) -> bool {
        self.staying.iter().all(|(_, replica)| matches!(replica.state, ReplicaState::Ready | ReplicaState::Failed))
    }
}

/// Plans the moves for a state. `memory_free_bytes` is what workers last said; for a worker that isn't in it, its devices'
/// whole memory less its replicas is taken.
///
/// Applying the plan and planning again plans nothing.
pub fn plan(state: &ClusterState, policy: &Policy, memory_free_bytes: &BTreeMap<WorkerId, u64>) -> Plan {
    plan_avoiding(state, policy, memory_free_bytes, &BTreeSet::new())
}

/// [`plan`], where some workers get nothing new. What they have stays: the state takes no more replicas than are wanted.
pub fn plan_avoiding(
    state: &ClusterState,
    policy: &Policy,
    memory_free_bytes: &BTreeMap<WorkerId, u64>,
    avoided: &BTreeSet<WorkerId>,
) -> Plan {
    let mut planner = Planner {
        state,
        policy,
        avoided,
        loads: loads(state, policy, memory_free_bytes),
        plan: Plan { epoch: state.epoch, ..Plan::default() },
    };
    let mut short = BTreeSet::new();
    for (key, deployment) in &state.models {
        for shard in 0..deployment.shards {
            let found = Shard::survey(state, key, shard);
            planner.remove_surplus(key, deployment, shard, &found);
            if found.staying.len() < deployment.replicas_wanted as usize {
                short.insert((found.staying.len(), key, shard));
            }
        }
    }
    planner.fill(short);
    for (key, deployment) in &state.models {
        for shard in 0..deployment.shards {
            planner.release_leaving(key, shard);
        }
    }
    planner.plan
}

/// What a worker carries, the planned moves included.
struct Load<'a> {
    zone: &'a str,
    replicas: u32,
    /// Below 0 where more was placed than fits by today's figures.
    memory_free_bytes: i128,
    /// Whether the worker said how much is free.
    is_reported: bool,
}

fn loads<'a>(
    state: &'a ClusterState,
    policy: &Policy,
    memory_free_bytes: &BTreeMap<WorkerId, u64>,
) -> BTreeMap<&'a WorkerId, Load<'a>> {
    let mut loads = BTreeMap::new();
    for (id, worker) in state.workers_ready() {
        let whole = worker.devices.iter().fold(0_u64, |sum, device| sum.saturating_add(device.memory_bytes));
        let reported = memory_free_bytes.get(id);
        let memory_free_bytes = match reported {
            Some(free) if whole > 0 || *free > 0 => *free,
            None if whole > 0 => whole,
            _ => u64::MAX, // a worker that doesn't know its memory decides by trying
        };
        let (memory_free_bytes, is_reported) = (i128::from(memory_free_bytes), reported.is_some());
        loads.insert(id, Load { zone: &worker.zone, replicas: 0, memory_free_bytes, is_reported });
    }
    for (id, replica) in &state.replicas {
        let Some(load) = loads.get_mut(&id.worker) else { continue };
        load.replicas += 1;
        if let Some(deployment) = state.models.get(&id.key()) {
            load.memory_free_bytes -= i128::from(held_bytes(replica, deployment, policy, load.is_reported));
        }
    }
    loads
}

/// What a replica takes that the figure of its worker's free memory doesn't lack already.
fn held_bytes(replica: &Replica, deployment: &Deployment, policy: &Policy, is_reported: bool) -> u64 {
    // A heartbeat's figure already lacks what is loaded, and doesn't yet lack what is only on its way.
    match replica.state {
        ReplicaState::Ready if is_reported => 0,
        ReplicaState::Failed => 0,
        ReplicaState::Ready | ReplicaState::Assigned | ReplicaState::Loading => need_bytes(deployment, policy),
    }
}

fn need_bytes(deployment: &Deployment, policy: &Policy) -> u64 {
    let overhead = deployment.size_bytes / 100 * policy.memory_overhead_percent.min(1_000);
    deployment.size_bytes.saturating_add(overhead)
}

/// How well a worker suits a shard. Lower is better; fields are compared top to bottom, so their order is the policy.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fit<'a> {
    /// Survive a zone.
    replicas_in_zone: usize,
    /// Spread.
    replicas: u32,
    /// Leave room where there is little. Coarse, since free memory changes by itself.
    memory_free_gib: std::cmp::Reverse<i128>,
    /// And always agree.
    worker: &'a WorkerId,
}

/// How gladly a replica is given up where there is one too many. Lower goes first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Worth<'a> {
    /// What answers goes last.
    answers: bool,
    /// And what has failed first.
    progress: u8,
    /// Survive a zone.
    replicas_in_zone: std::cmp::Reverse<usize>,
    /// Spread.
    replicas: std::cmp::Reverse<u32>,
    /// And always agree.
    worker: std::cmp::Reverse<&'a WorkerId>,
}

struct Planner<'a> {
    state: &'a ClusterState,
    policy: &'a Policy,
    avoided: &'a BTreeSet<WorkerId>,
    loads: BTreeMap<&'a WorkerId, Load<'a>>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn zone_count<'b>(&self, zone: &str, workers: impl Iterator<Item = &'b WorkerId>) -> usize {
        workers.filter(|worker| self.loads.get(worker).is_some_and(|load| load.zone == zone)).count()
    }

    fn remove_surplus(&mut self, key: &ModelKey, deployment: &Deployment, shard: u32, found: &Shard<'a>) {
        let mut staying = found.staying.clone();
        while staying.len() > deployment.replicas_wanted as usize {
            let worth = |(worker, replica): &(&'a WorkerId, &Replica)| {
                let load = self.loads.get(worker);
                let hosts = staying.iter().map(|(worker, _)| *worker);
                Worth {
                    answers: replica.answering().is_some(),
                    progress: match replica.state {
                        ReplicaState::Failed => 0,
                        ReplicaState::Assigned => 1,
                        ReplicaState::Loading => 2,
                        ReplicaState::Ready => 3,
                    },
                    replicas_in_zone: std::cmp::Reverse(load.map_or(0, |load| self.zone_count(load.zone, hosts))),
                    replicas: std::cmp::Reverse(load.map_or(0, |load| load.replicas)),
                    worker: std::cmp::Reverse(worker),
                }
            };
            let Some(index) = (0..staying.len()).min_by_key(|index| worth(&staying[*index])) else { return };
            let (worker, replica) = staying.remove(index);
            if let Some(load) = self.loads.get_mut(worker) {
                load.replicas = load.replicas.saturating_sub(1);
                // Else the next plan would find room that this one didn't see.
                load.memory_free_bytes += i128::from(held_bytes(replica, deployment, self.policy, load.is_reported));
            }
            self.plan.remove.push(replica_id(key, shard, worker));
        }
    }

    /// Gives each shard that is short its next replica, the one with the fewest first.
    fn fill(&mut self, mut short: BTreeSet<(usize, &ModelKey, u32)>) {
        while let Some((count, key, shard)) = short.pop_first() {
            let Some(deployment) = self.state.models.get(key) else { continue };
            let wanted = deployment.replicas_wanted as usize;
            match self.best_worker(key, deployment, shard) {
                Some(worker) => {
                    if let Some(load) = self.loads.get_mut(worker) {
                        load.replicas += 1;
                        load.memory_free_bytes -= i128::from(need_bytes(deployment, self.policy));
                    }
                    self.plan.add.push(replica_id(key, shard, worker));
                    if count + 1 < wanted {
                        short.insert((count + 1, key, shard));
                    }
                }
                None => {
                    let missing = u32::try_from(wanted - count).unwrap_or(u32::MAX);
                    let reason = self.why_unplaced(deployment);
                    self.plan.unplaced.push(Unplaced { model: key.clone(), shard, missing, reason });
                }
            }
        }
        self.plan.add.sort();
        self.plan.unplaced.sort_by(|a, b| (&a.model, a.shard).cmp(&(&b.model, b.shard)));
    }

    fn best_worker(&self, key: &ModelKey, deployment: &Deployment, shard: u32) -> Option<&'a WorkerId> {
        let found = Shard::survey(self.state, key, shard);
        let planned = self.plan.add.iter().filter(|id| id.is_of(key) && id.shard == shard).map(|id| &id.worker);
        let hosts: Vec<&WorkerId> = found.staying.iter().map(|(worker, _)| *worker).chain(planned).collect();
        let need_bytes = need_bytes(deployment, self.policy);
        let candidates = self.loads.iter().filter(|(worker, load)| {
            !self.avoided.contains(**worker) && !hosts.contains(worker) && i128::from(need_bytes) <= load.memory_free_bytes // must
        });
        let fits = candidates.map(|(worker, load)| Fit {
            replicas_in_zone: self.zone_count(load.zone, hosts.iter().copied()),
            replicas: load.replicas,
            memory_free_gib: std::cmp::Reverse(load.memory_free_bytes >> 30),
            worker,
        });
        fits.min().map(|fit| fit.worker)
    }

    fn why_unplaced(&self, deployment: &Deployment) -> String {
        let (wanted, there) = (deployment.replicas_wanted as usize, self.loads.len());
        if there < wanted {
            let workers = if wanted == 1 { "worker" } else { "workers" };
            let are = if there == 1 { "is" } else { "are" };
            format!("needs {wanted} {workers}, {there} {are} there")
        } else {
            format!("no other worker has {} MiB free", need_bytes(deployment, self.policy).div_ceil(1 << 20))
        }
    }

    /// Ends replicas on workers that leave: at once if they don't answer, else when the others are settled.
    fn release_leaving(&mut self, key: &ModelKey, shard: u32) {
        let found = Shard::survey(self.state, key, shard);
        let coming = self.plan.add.iter().any(|id| id.is_of(key) && id.shard == shard);
        let relieved = !coming && found.settled() && !found.answering.is_empty();
        for worker in found.leaving {
            let id = replica_id(key, shard, worker);
            let answers = self.state.replicas.get(&id).is_some_and(|replica| replica.answering().is_some());
            if relieved || !answers {
                self.plan.remove.push(id);
            }
        }
        self.plan.remove.sort();
    }
}

pub(crate) fn replica_id(key: &ModelKey, shard: u32, worker: &WorkerId) -> ReplicaId {
    ReplicaId { model: key.name.clone(), version: key.version, shard, worker: worker.clone() }
}

#[cfg(test)]
mod tests;
