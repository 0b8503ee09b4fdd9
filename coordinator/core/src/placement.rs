//! Which moves would bring the replicas closer to what is wanted.
//!
//! A pure function of the state, the policy and what is seen of the workers. The rules, strongest first:
//!
//! 1. Replicas of one shard are on distinct workers, new ones only on workers that are ready, are what the deployment demands
//!    (tags, GPUs, or the workers that it names) and have the memory: on each device that the replica is on, and while a version
//!    is loaded anew in its place, for both.
//! 2. What answers stays where it is until another is ready in its place (see `moves`), and a replica on a leaving worker goes
//!    only once the others are settled.
//! 3. A failed replica keeps its place. Another worker would most likely fail in the same way, so a model that can't
//!    load would wander through the whole cluster. Deploying again tries again.
//! 4. Every shard gets its first replica before any gets its second.
//! 5. A worker that is in doubt gets nothing new. When the doubt lasts, what it has moves, a few replicas at a time.
//! 6. Among the workers left: a zone that lacks the shard, then the fewest replicas, then the most free memory.
mod load;
mod moves;
mod shard;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use self::load::{Load, device_bytes, fits_devices, held_bytes, loads, need_bytes};
pub(crate) use self::shard::Shard;
use crate::{
    CommandBody, WorkerId,
    state::{ClusterState, Deployment, Epoch, ModelKey, Replica, ReplicaId, ReplicaState},
};

/// What an operator may turn.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// What a replica takes beyond the size of its files, in percent of it.
    pub memory_overhead_percent: u64,
    /// Replicas that may be on the move at once. Those of workers that died or leave aren't counted: they have to.
    pub moves_max: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self { memory_overhead_percent: 20, moves_max: 4 }
    }
}

/// What is seen of the workers, and isn't agreed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    /// What workers last said. For one that isn't in it, its devices' whole memory less its replicas is taken.
    pub memory_free_bytes: BTreeMap<WorkerId, u64>,
    /// Workers that get nothing new.
    pub avoided: BTreeSet<WorkerId>,
    /// Those of them whose replicas are to move.
    pub abandoned: BTreeSet<WorkerId>,
}

/// Moves to propose, and what can't be done.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The epoch of the state that this was made from.
    pub epoch: Epoch,
    /// Replicas that are to move: they stay until others, which are among those to begin, are ready in their place.
    pub relieve: Vec<ReplicaId>,
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
        self.relieve.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }

    /// At most so many of the moves; the others are planned again.
    pub fn truncate(&mut self, moves_max: usize) {
        self.relieve.truncate(moves_max);
        self.add.truncate(moves_max - self.relieve.len());
        self.remove.truncate(moves_max - self.relieve.len() - self.add.len());
    }

    /// What to propose.
    pub fn into_command(self) -> CommandBody {
        let Self { epoch: epoch_seen, relieve, add, remove, .. } = self;
        if relieve.is_empty() {
            CommandBody::Place { epoch_seen, add, remove }
        } else {
            CommandBody::Rearrange { epoch_seen, relieve, add, remove }
        }
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

/// Plans the moves for a state, by the memory that workers report and nothing else.
pub fn plan(state: &ClusterState, policy: &Policy, memory_free_bytes: &BTreeMap<WorkerId, u64>) -> Plan {
    plan_seeing(state, policy, &Seen { memory_free_bytes: memory_free_bytes.clone(), ..Seen::default() })
}

/// Plans the moves for a state.
///
/// Applying the plan and planning again plans nothing.
pub fn plan_seeing(state: &ClusterState, policy: &Policy, seen: &Seen) -> Plan {
    let loads = loads(state, policy, &seen.memory_free_bytes);
    let mut planner = Planner { state, policy, seen, loads, plan: Plan { epoch: state.epoch, ..Plan::default() } };
    let shards =
        state.models.iter().flat_map(|(key, deployment)| (0..deployment.shards).map(move |shard| (key, deployment, shard)));
    let mut short = BTreeSet::new();
    for (key, deployment, shard) in shards.clone() {
        let mut found = Shard::survey(state, key, shard);
        planner.remove_misplaced(key, deployment, shard, &mut found);
        planner.remove_surplus(key, deployment, shard, &mut found);
        planner.release_moving(key, deployment, shard, &found);
        if found.staying.len() < deployment.replicas_wanted as usize {
            short.insert((found.staying.len(), key, shard));
        }
    }
    planner.fill(short);
    planner.relieve();
    for (key, _, shard) in shards {
        planner.release_leaving(key, shard);
    }
    planner.plan.add.sort();
    planner.plan.remove.sort();
    planner.plan
}

/// How well a worker suits a shard. Lower is better; fields are compared top to bottom, so their order is the policy.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Fit<'a> {
    /// Survive a zone.
    replicas_in_zone: usize,
    /// Spread.
    replicas: u32,
    /// Leave room where there is little. Coarse, since free memory changes by itself.
    memory_free_gib: Reverse<i128>,
    /// And always agree.
    worker: &'a WorkerId,
}

/// How gladly a replica is given up where there is one too many. Lower goes first.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Worth<'a> {
    /// What had better not be on its worker goes first.
    suits: bool,
    /// What answers goes last.
    answers: bool,
    /// And what has failed first.
    progress: u8,
    /// Survive a zone.
    replicas_in_zone: Reverse<usize>,
    /// Spread.
    replicas: Reverse<u32>,
    /// And always agree.
    worker: Reverse<&'a WorkerId>,
}

struct Planner<'a> {
    state: &'a ClusterState,
    policy: &'a Policy,
    seen: &'a Seen,
    loads: BTreeMap<&'a WorkerId, Load<'a>>,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn zone_count<'b>(&self, zone: &str, workers: impl Iterator<Item = &'b WorkerId>) -> usize {
        workers.filter(|worker| self.loads.get(worker).is_some_and(|load| load.zone == zone)).count()
    }

    /// Gives up what is more than wanted, what is worth least first. What answers where it had better not be waits until those
    /// that stay are ready.
    fn remove_surplus(&mut self, key: &ModelKey, deployment: &Deployment, shard: u32, found: &mut Shard<'a>) {
        let mut given_up = Vec::new();
        while found.staying.len() > deployment.replicas_wanted as usize {
            let staying = &found.staying;
            let worth = |(worker, replica): &(&'a WorkerId, &Replica)| self.worth(worker, replica, deployment, staying);
            let Some(index) = (0..staying.len()).min_by_key(|index| worth(&staying[*index])) else { break };
            let (worker, replica) = found.staying.remove(index);
            if let Some(load) = self.loads.get_mut(worker) {
                load.replicas = load.replicas.saturating_sub(1);
            }
            given_up.push((worker, replica));
        }
        let all_ready = found.staying.iter().all(|(_, replica)| replica.state == ReplicaState::Ready);
        for (worker, replica) in given_up {
            let is_out_of_place = self.is_out_of_place(deployment, worker);
            if is_out_of_place {
                // It is in nobody's way then, whatever else of its shard moves.
                self.plan.relieve.push(replica_id(key, shard, worker));
            }
            if all_ready || !is_out_of_place || replica.answering().is_none() {
                self.end(key, deployment, shard, worker, replica);
            }
        }
    }

    fn worth(
        &self,
        worker: &'a WorkerId,
        replica: &Replica,
        deployment: &Deployment,
        staying: &[(&'a WorkerId, &'a Replica)],
    ) -> Worth<'a> {
        let load = self.loads.get(worker);
        let hosts = staying.iter().map(|(worker, _)| *worker);
        Worth {
            suits: !self.is_out_of_place(deployment, worker),
            answers: replica.answering().is_some(),
            progress: match replica.state {
                ReplicaState::Failed => 0,
                ReplicaState::Assigned => 1,
                ReplicaState::Loading => 2,
                ReplicaState::Ready => 3,
            },
            replicas_in_zone: Reverse(load.map_or(0, |load| self.zone_count(load.zone, hosts))),
            replicas: Reverse(load.map_or(0, |load| load.replicas)),
            worker: Reverse(worker),
        }
    }

    /// Ends a replica in this plan. What it held is free from here: else the next plan would find room that this one didn't see.
    fn end(&mut self, key: &ModelKey, deployment: &Deployment, shard: u32, worker: &'a WorkerId, replica: &Replica) {
        if let Some(load) = self.loads.get_mut(worker) {
            load.memory_free_bytes += i128::from(held_bytes(replica, deployment, self.policy, load));
        }
        self.plan.remove.push(replica_id(key, shard, worker));
    }

    /// Whether this plan ends the replica there.
    fn has_ended(&self, key: &ModelKey, shard: u32, worker: &WorkerId) -> bool {
        self.plan.remove.contains(&replica_id(key, shard, worker))
    }

    /// Begins a replica in this plan.
    fn begin(&mut self, key: &ModelKey, deployment: &Deployment, shard: u32, worker: &'a WorkerId) {
        if let Some(load) = self.loads.get_mut(worker) {
            load.replicas += 1;
            load.memory_free_bytes -= i128::from(need_bytes(deployment, self.policy, load));
        }
        self.plan.add.push(replica_id(key, shard, worker));
    }

    /// Gives each shard that is short its next replica, the one with the fewest first.
    fn fill(&mut self, mut short: BTreeSet<(usize, &ModelKey, u32)>) {
        while let Some((count, key, shard)) = short.pop_first() {
            let Some(deployment) = self.state.models.get(key) else { continue };
            let wanted = deployment.replicas_wanted as usize;
            match self.best_worker(key, deployment, shard, None) {
                Some(worker) => {
                    self.begin(key, deployment, shard, worker);
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
        self.plan.unplaced.sort_by(|a, b| (&a.model, a.shard).cmp(&(&b.model, b.shard)));
    }

    /// Where another replica would be best. `relieved` is the worker that has the one in whose place it comes: it has it until
    /// the move is over, but the new one may be in the same zone.
    fn best_worker(
        &self,
        key: &ModelKey,
        deployment: &Deployment,
        shard: u32,
        relieved: Option<&WorkerId>,
    ) -> Option<&'a WorkerId> {
        let found = Shard::survey(self.state, key, shard);
        let planned = self.plan.add.iter().filter(|id| id.is_of(key) && id.shard == shard).map(|id| &id.worker);
        let staying = found.staying.iter().map(|(worker, _)| *worker).filter(|worker| Some(*worker) != relieved);
        let staying: Vec<&WorkerId> = staying.chain(planned.clone()).collect();
        // Where a replica ends in this plan, its successor may begin.
        let hosts: Vec<&WorkerId> = found.hosts().filter(|worker| !self.has_ended(key, shard, worker)).chain(planned).collect();
        let candidates =
            self.loads.iter().filter(|(worker, load)| !hosts.contains(worker) && self.takes(worker, load, deployment));
        let fits = candidates.map(|(worker, load)| Fit {
            replicas_in_zone: self.zone_count(load.zone, staying.iter().copied()),
            replicas: load.replicas,
            memory_free_gib: Reverse(load.memory_free_bytes >> 30),
            worker,
        });
        fits.min().map(|fit| fit.worker)
    }

    /// Whether a worker may be given a replica of this, as it stands in the plan.
    fn takes(&self, worker: &WorkerId, load: &Load<'_>, deployment: &Deployment) -> bool {
        !self.seen.avoided.contains(worker)
            && self.suits(worker, load, deployment)
            && i128::from(need_bytes(deployment, self.policy, load)) <= load.memory_free_bytes
    }

    /// Whether a worker is what the deployment demands, however much there is on it.
    fn suits(&self, worker: &WorkerId, load: &Load<'_>, deployment: &Deployment) -> bool {
        deployment.demands.are_met_by(worker, load.worker) && fits_devices(deployment, self.policy, load)
    }

    fn why_unplaced(&self, deployment: &Deployment) -> String {
        let wanted = deployment.replicas_wanted as usize;
        let suitable = self.loads.iter().filter(|(worker, load)| self.suits(worker, load, deployment)).map(|(worker, _)| *worker);
        let (avoided, usable): (Vec<&WorkerId>, Vec<&WorkerId>) =
            suitable.partition(|worker| self.seen.avoided.contains(*worker));
        let there = usable.len();
        let need_mib = device_bytes(deployment.size_bytes, self.policy).div_ceil(1 << 20);
        if there >= wanted {
            return format!("no other worker has {need_mib} MiB free");
        }
        let workers = if wanted == 1 { "worker" } else { "workers" };
        let are = if there == 1 { "is" } else { "are" };
        let mut reason = format!("needs {wanted} {workers}{}, {there} {are} there", deployment.demands);
        let small = |(worker, load): &(&&WorkerId, &Load<'_>)| {
            deployment.demands.are_met_by(worker, load.worker) && !fits_devices(deployment, self.policy, load)
        };
        match self.loads.iter().filter(small).count() {
            0 => {}
            small => reason += &format!("; {small} more with less than {need_mib} MiB"),
        }
        if !avoided.is_empty() {
            let names: Vec<&str> = avoided.into_iter().map(WorkerId::as_str).collect();
            reason += &format!("; in doubt: {}", names.join(", "));
        }
        reason
    }

    /// Ends replicas on workers that leave: at once if they don't answer, else when the others are settled.
    fn release_leaving(&mut self, key: &ModelKey, shard: u32) {
        let mut found = Shard::survey(self.state, key, shard);
        // What ends in this plan isn't waited for.
        found.staying.retain(|(worker, _)| !self.has_ended(key, shard, worker));
        found.answering.retain(|worker| !self.has_ended(key, shard, worker));
        let coming = self.plan.add.iter().any(|id| id.is_of(key) && id.shard == shard);
        let relieved = !coming && found.is_settled() && !found.answering.is_empty();
        for worker in found.leaving {
            let id = replica_id(key, shard, worker);
            let answers = self.state.replicas.get(&id).is_some_and(|replica| replica.answering().is_some());
            if relieved || !answers {
                self.plan.remove.push(id);
            }
        }
    }
}

pub(crate) fn replica_id(key: &ModelKey, shard: u32, worker: &WorkerId) -> ReplicaId {
    ReplicaId { model: key.name.clone(), version: key.version, shard, worker: worker.clone() }
}

#[cfg(test)]
mod tests;
