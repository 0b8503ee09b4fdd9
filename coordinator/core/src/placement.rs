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
//! 7. What has a higher priority gets its replicas before what has a lower one, and where no worker has room, what may be evicted
//!    makes some (see `evict`).
//! 8. When all that is done, what the workers carry is evened out, a few replicas at a time (see `balance`).
mod balance;
mod evict;
mod load;
mod moves;
mod shard;

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

pub(crate) use self::shard::Shard;
use self::{
    evict::Evictable,
    load::{Load, Loads, device_bytes, fits_devices, held_bytes, need_bytes},
    shard::{Hosted, are_settled},
};
use crate::{
    CommandBody, WorkerId,
    level::{LEVEL_CLAIMS, LEVEL_REARRANGE},
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
    /// For how long each model has answered nobody, in s. One that isn't in it counts as used a moment ago.
    pub idle_s: BTreeMap<ModelKey, u64>,
    /// Workers came or went a moment ago: what is uneven stays so, since it may not be for long.
    pub restless: bool,
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
    /// Replicas to end for the sake of others, which are among those to begin: the last that answers included.
    pub evict: Vec<ReplicaId>,
    /// Shards that stay short of replicas, in the order of their names.
    pub unplaced: Vec<Unplaced>,
}

impl Plan {
    /// Whether there is nothing to propose.
    pub fn is_empty(&self) -> bool {
        [&self.relieve, &self.add, &self.remove, &self.evict].iter().all(|moves| moves.is_empty())
    }

    /// At most so many of the moves; the others are planned again.
    pub fn truncate(&mut self, moves_max: usize) {
        self.relieve.truncate(moves_max);
        self.add.truncate(moves_max - self.relieve.len());
        self.remove.truncate(moves_max - self.relieve.len() - self.add.len());
        // What makes room goes with what it is for.
        self.evict.retain(|id| self.add.iter().any(|begins| begins.worker == id.worker));
    }

    /// What to propose.
    pub fn into_command(self) -> CommandBody {
        let Self { epoch: epoch_seen, relieve, add, remove, evict, unplaced: _ } = self;
        if !evict.is_empty() {
            CommandBody::Evict { epoch_seen, evict, relieve, add, remove }
        } else if relieve.is_empty() {
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
    /// Whether there are workers enough, and only memory is lacking.
    pub lacks_memory: bool,
    /// Why, for people.
    pub reason: String,
}

/// Plans the moves for a state, by the memory that workers report and nothing else.
pub fn plan(state: &ClusterState, policy: &Policy, memory_free_bytes: &BTreeMap<WorkerId, u64>) -> Plan {
    plan_seeing(state, policy, &Seen { memory_free_bytes: memory_free_bytes.clone(), ..Seen::default() })
}

/// Plans the moves for a state.
///
/// Applying the plan and planning again plans nothing, but for moves that even out what the first one left at rest.
pub fn plan_seeing(state: &ClusterState, policy: &Policy, seen: &Seen) -> Plan {
    Planner::new(state, policy, seen).plan().0
}

/// How gladly a replica is given up where there is one too many. Lower goes first; fields are compared top to bottom, so their
/// order is the policy.
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

/// When a shard gets its next replica. Lower is sooner; fields are compared top to bottom, so their order is the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Turn {
    priority: Reverse<u32>,
    /// The fewest first.
    replicas: usize,
    /// And always agree.
    at: usize,
}

/// One shard, and what the plan does about it. Kept by shard, so that no question about one looks at all the moves.
struct Site<'a> {
    key: &'a ModelKey,
    deployment: &'a Deployment,
    shard: u32,
    /// For how long the model has answered nobody, roughly: see [`evict::idleness`].
    idleness: u32,
    /// As the state has it.
    found: Shard<'a>,
    /// Workers on which a replica begins.
    begun: Vec<&'a WorkerId>,
    /// Workers on which one ends.
    ended: Vec<&'a WorkerId>,
    /// Workers on which one gives up its place.
    relieved: Vec<&'a WorkerId>,
    /// Workers on which one makes room for another model's.
    evicted: Vec<&'a WorkerId>,
}

impl Site<'_> {
    fn replica_id(&self, worker: &WorkerId) -> ReplicaId {
        replica_id(self.key, self.shard, worker)
    }

    /// Whether a replica that is there, and was to stay, does by this plan.
    fn keeps(&self, worker: &WorkerId) -> bool {
        ![&self.ended, &self.relieved, &self.evicted].iter().any(|gone| gone.contains(&worker))
    }

    fn wanted(&self) -> usize {
        self.deployment.replicas_wanted as usize
    }
}

struct Planner<'a> {
    policy: &'a Policy,
    loads: Loads<'a>,
    /// In the order of the shards' names.
    sites: Vec<Site<'a>>,
    unplaced: Vec<Unplaced>,
    epoch: Epoch,
    /// Whether every coordinator can read that replicas which answer are to move. What was begun goes on in any case: it is in
    /// the state.
    may_move: bool,
    /// Whether replicas may move for nothing but evenness.
    may_even_out: bool,
    /// How often room may yet be made in this plan.
    searches_left: usize,
}

impl<'a> Planner<'a> {
    fn new(state: &'a ClusterState, policy: &'a Policy, seen: &Seen) -> Self {
        let mut loads = Loads::new(state, seen);
        let shards =
            state.models.iter().flat_map(|(key, deployment)| (0..deployment.shards).map(move |at| (key, deployment, at)));
        let site = |(key, deployment, shard)| {
            let found = Shard::survey(state, key, shard);
            loads.carry(deployment, &found, policy);
            Site {
                key,
                deployment,
                shard,
                idleness: seen.idle_s.get(key).map_or(0, |idle_s| evict::idleness(*idle_s)),
                found,
                begun: Vec::new(),
                ended: Vec::new(),
                relieved: Vec::new(),
                evicted: Vec::new(),
            }
        };
        let sites = shards.map(site).collect();
        loads.rank();
        let may_move = state.level >= LEVEL_REARRANGE;
        let may_even_out = may_move && !seen.restless;
        let searches_left = if state.level >= LEVEL_CLAIMS { evict::SEARCHES_MAX } else { 0 };
        Self { policy, loads, sites, unplaced: Vec::new(), epoch: state.epoch, may_move, may_even_out, searches_left }
    }

    /// The plan, and how many workers were looked at for it.
    fn plan(mut self) -> (Plan, u64) {
        let mut short = BTreeSet::new();
        for at in 0..self.sites.len() {
            let staying = self.remove_misplaced(at);
            let staying = self.remove_surplus(at, staying);
            self.release_moving(at, &staying);
            if staying.len() < self.sites[at].wanted() {
                short.insert(self.turn(at, staying.len()));
            }
        }
        self.fill(short);
        let moves_left = self.relieve();
        for at in 0..self.sites.len() {
            self.release_leaving(at);
        }
        self.balance(moves_left);
        let looked_at = self.loads.looked_at;
        (self.into_plan(), looked_at)
    }

    fn into_plan(self) -> Plan {
        let ids = |of: for<'s> fn(&'s Site<'a>) -> &'s [&'a WorkerId]| -> Vec<ReplicaId> {
            let ids = self.sites.iter().flat_map(|site| of(site).iter().map(|worker| site.replica_id(worker)));
            let mut ids: Vec<ReplicaId> = ids.collect();
            ids.sort();
            ids
        };
        let (relieve, add, remove) = (ids(|site| &site.relieved), ids(|site| &site.begun), ids(|site| &site.ended));
        let evict = ids(|site| &site.evicted);
        let mut unplaced = self.unplaced;
        unplaced.sort_by(|a, b| (&a.model, a.shard).cmp(&(&b.model, b.shard)));
        Plan { epoch: self.epoch, relieve, add, remove, evict, unplaced }
    }

    /// Gives up what is more than wanted, what is worth least first, and returns what stays. What answers where it had better not
    /// be waits until those that stay are ready.
    fn remove_surplus(&mut self, at: usize, mut staying: Hosted<'a>) -> Hosted<'a> {
        let (deployment, wanted) = (self.sites[at].deployment, self.sites[at].wanted());
        let mut given_up = Vec::new();
        while staying.len() > wanted {
            let worth = |(worker, replica): &(&'a WorkerId, &Replica)| self.worth(worker, replica, deployment, &staying);
            let Some(index) = (0..staying.len()).min_by_key(|index| worth(&staying[*index])) else { break };
            let (worker, replica) = staying.remove(index);
            self.unburden(worker);
            given_up.push((worker, replica));
        }
        let all_ready = staying.iter().all(|(_, replica)| replica.state == ReplicaState::Ready);
        for (worker, replica) in given_up {
            let is_out_of_place = self.is_out_of_place(deployment, worker);
            if is_out_of_place {
                // It is in nobody's way then, whatever else of its shard moves.
                self.sites[at].relieved.push(worker);
            }
            if all_ready || !is_out_of_place || replica.answering().is_none() {
                self.end(at, worker, replica);
            }
        }
        staying
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
            replicas_in_zone: Reverse(load.map_or(0, |load| self.loads.in_zone_of(load, hosts))),
            replicas: Reverse(load.map_or(0, |load| load.replicas)),
            worker: Reverse(worker),
        }
    }

    /// What is there doesn't count any more, though it may take memory yet.
    fn unburden(&mut self, worker: &WorkerId) {
        self.loads.change(worker, |load| load.replicas = load.replicas.saturating_sub(1));
    }

    /// Ends a replica in this plan. What it held is free from here: else the next plan would find room that this one didn't see.
    fn end(&mut self, at: usize, worker: &'a WorkerId, replica: &Replica) {
        let (policy, deployment) = (self.policy, self.sites[at].deployment);
        self.loads.change(worker, |load| load.memory_free_bytes += i128::from(held_bytes(replica, deployment, policy, load)));
        self.sites[at].ended.push(worker);
    }

    /// Begins a replica in this plan.
    fn begin(&mut self, at: usize, worker: &'a WorkerId) {
        let (policy, deployment) = (self.policy, self.sites[at].deployment);
        self.loads.change(worker, |load| {
            load.replicas += 1;
            load.memory_free_bytes -= i128::from(need_bytes(deployment, policy, load));
        });
        self.sites[at].begun.push(worker);
    }

    /// When a shard with so many replicas gets its next one.
    fn turn(&self, at: usize, count: usize) -> Turn {
        Turn { priority: Reverse(self.sites[at].deployment.claim.priority), replicas: count, at }
    }

    /// Gives each shard that is short its next replica.
    fn fill(&mut self, mut short: BTreeSet<Turn>) {
        let evictable = self.evictable();
        while let Some(Turn { replicas: count, at, .. }) = short.pop_first() {
            let wanted = self.sites[at].wanted();
            match self.best_worker(at, None).or_else(|| self.make_room(at, &evictable, &mut short)) {
                Some(worker) => {
                    self.begin(at, worker);
                    if count + 1 < wanted {
                        short.insert(self.turn(at, count + 1));
                    }
                }
                None => {
                    let Site { key, deployment, shard, .. } = self.sites[at];
                    let missing = u32::try_from(wanted - count).unwrap_or(u32::MAX);
                    let (lacks_memory, reason) = self.why_unplaced(deployment);
                    self.unplaced.push(Unplaced { model: key.clone(), shard, missing, lacks_memory, reason });
                }
            }
        }
    }

    /// Evicts others for a replica of a shard, and says where that is to begin.
    fn make_room(&mut self, at: usize, evictable: &Evictable<'a>, short: &mut BTreeSet<Turn>) -> Option<&'a WorkerId> {
        let (worker, victims) = self.evict_for(at, evictable)?;
        for victim in victims {
            // Their turn comes later: what gives way has a lower priority.
            let site = &self.sites[victim];
            let count = site.found.staying.iter().filter(|(worker, _)| site.keeps(worker)).count();
            short.remove(&self.turn(victim, count + 1));
            short.insert(self.turn(victim, count));
        }
        Some(worker)
    }

    /// Where another replica would be best. `relieved` is the worker that has the one in whose place it comes: it has it until
    /// the move is over, but the new one may be in the same zone.
    fn best_worker(&mut self, at: usize, relieved: Option<&WorkerId>) -> Option<&'a WorkerId> {
        let (policy, site) = (self.policy, &self.sites[at]);
        if i128::from(device_bytes(site.deployment.size_bytes, policy)) > self.loads.room_bytes_max() {
            return None; // nobody has room for it, so nobody needs to be asked
        }
        let staying = site.found.staying.iter().map(|(worker, _)| *worker);
        let staying = staying.filter(|worker| Some(*worker) != relieved && !site.evicted.contains(worker));
        let staying: Vec<&WorkerId> = staying.chain(site.begun.iter().copied()).collect();
        // Where a replica ends in this plan, its successor may begin.
        let hosts = site.found.hosts().filter(|worker| !site.ended.contains(worker));
        let hosts: BTreeSet<&WorkerId> = hosts.chain(site.begun.iter().copied()).collect();
        self.loads.best(&hosts, &staying, u32::MAX, |load| takes(load, site.deployment, policy))
    }

    /// Whether only memory is lacking, and why, for people.
    fn why_unplaced(&self, deployment: &Deployment) -> (bool, String) {
        let wanted = deployment.replicas_wanted as usize;
        let suitable = || self.loads.all().iter().filter(|load| suits(load, deployment, self.policy));
        let there = suitable().filter(|load| !load.is_avoided).take(wanted).count();
        let need_mib = device_bytes(deployment.size_bytes, self.policy).div_ceil(1 << 20);
        if there >= wanted {
            return (true, format!("no other worker has {need_mib} MiB free"));
        }
        let workers = if wanted == 1 { "worker" } else { "workers" };
        let are = if there == 1 { "is" } else { "are" };
        let mut reason = format!("needs {wanted} {workers}{}, {there} {are} there", deployment.demands);
        let small = |load: &&Load<'_>| {
            deployment.demands.are_met_by(load.id, load.worker) && !fits_devices(deployment, self.policy, load)
        };
        match self.loads.all().iter().filter(small).count() {
            0 => {}
            small => reason += &format!("; {small} more with less than {need_mib} MiB"),
        }
        let avoided: Vec<&str> = suitable().filter(|load| load.is_avoided).map(|load| load.id.as_str()).collect();
        if !avoided.is_empty() {
            reason += &format!("; in doubt: {}", avoided.join(", "));
        }
        (false, reason)
    }

    /// Ends replicas on workers that leave: at once if they don't answer, else when the others are settled.
    fn release_leaving(&mut self, at: usize) {
        let site = &mut self.sites[at];
        if site.found.leaving.is_empty() {
            return;
        }
        // What ends in this plan isn't waited for.
        let mut staying = site.found.staying.clone();
        staying.retain(|(worker, _)| !site.ended.contains(worker) && !site.evicted.contains(worker));
        let answers = staying.iter().any(|(_, replica)| replica.answering().is_some());
        let relieved = site.begun.is_empty() && are_settled(&staying) && answers;
        for (worker, replica) in &site.found.leaving {
            if relieved || replica.answering().is_none() {
                site.ended.push(worker);
            }
        }
    }
}

/// Whether a worker may be given a replica of this, as it stands in the plan.
fn takes(load: &Load<'_>, deployment: &Deployment, policy: &Policy) -> bool {
    i128::from(need_bytes(deployment, policy, load)) <= load.memory_free_bytes
        && !load.is_avoided
        && suits(load, deployment, policy)
}

/// Whether a worker is what the deployment demands, however much there is on it.
fn suits(load: &Load<'_>, deployment: &Deployment, policy: &Policy) -> bool {
    deployment.demands.are_met_by(load.id, load.worker) && fits_devices(deployment, policy, load)
}

pub(crate) fn replica_id(key: &ModelKey, shard: u32, worker: &WorkerId) -> ReplicaId {
    ReplicaId { model: key.name.clone(), version: key.version, shard, worker: worker.clone() }
}

#[cfg(test)]
mod scale;
#[cfg(test)]
pub(crate) mod tests;
