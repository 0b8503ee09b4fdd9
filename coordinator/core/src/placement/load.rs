//! What workers carry: replicas and memory.
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use super::{Policy, Seen, Shard};
use crate::{
    WorkerId,
    demands::gpus,
    state::{ClusterState, Deployment, Replica, ReplicaState, Worker},
};

/// What a worker carries, the planned moves included.
pub(super) struct Load<'a> {
    pub(super) id: &'a WorkerId,
    pub(super) worker: &'a Worker,
    gpus: u32,
    /// The memory of each device, the largest first. One that doesn't know its memory decides by trying.
    devices_bytes: Vec<u64>,
    /// Its zone, by the place among all of them.
    zone: usize,
    /// Those that stay there.
    pub(super) replicas: u32,
    /// Below 0 where more was placed than fits by today's figures.
    pub(super) memory_free_bytes: i128,
    /// Whether the worker said how much is free.
    pub(super) is_reported: bool,
    /// Something that it was given hasn't come up yet.
    pub(super) is_settling: bool,
    /// It gets nothing new.
    pub(super) is_avoided: bool,
    /// What it has moves.
    pub(super) is_abandoned: bool,
}

/// How well a worker suits, the zone aside. Lower is better; fields are compared top to bottom, so their order is the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// Spread.
    pub(super) replicas: u32,
    /// Leave room where there is little. Coarse, since free memory changes by itself.
    memory_free_gib: Reverse<i128>,
    /// And always agree: its place in the order of names.
    pub(super) worker: usize,
}

/// The workers that take part, each by its place in the order of their names.
pub(super) struct Loads<'a> {
    all: Vec<Load<'a>>,
    places: BTreeMap<&'a WorkerId, usize>,
    /// Those that may get something, the best first, so that a search ends at the first that will do.
    candidates: BTreeSet<Rank>,
    /// The same by their free memory.
    rooms: BTreeSet<(i128, usize)>,
    /// How many candidates each zone has.
    zone_candidates: Vec<usize>,
    /// For one search: how many of the shard's replicas each zone has. All 0 between searches.
    zone_replicas: Vec<usize>,
    /// Workers that searches looked at, for tests to see that their number stays small.
    pub(super) looked_at: u64,
}

impl<'a> Loads<'a> {
    /// The workers, with nothing on them yet.
    pub(super) fn new(state: &'a ClusterState, seen: &Seen) -> Self {
        let ready: Vec<(&WorkerId, &Worker)> = state.workers_ready().collect();
        // Where most are left alone, the fault lies rather with whoever leaves them alone.
        let abandons = 2 * seen.abandoned.len() <= ready.len();
        let names: BTreeSet<&str> = ready.iter().map(|(_, worker)| worker.zone.as_str()).collect();
        let zones: BTreeMap<&str, usize> = names.into_iter().enumerate().map(|(place, name)| (name, place)).collect();
        let load = |(id, worker): &(&'a WorkerId, &'a Worker)| {
            let reported = seen.memory_free_bytes.get(*id).copied();
            Load {
                id,
                worker,
                gpus: gpus(worker),
                devices_bytes: devices_bytes(worker),
                zone: zones[worker.zone.as_str()],
                replicas: 0,
                memory_free_bytes: memory_bytes(worker, reported),
                is_reported: reported.is_some(),
                is_settling: false,
                is_avoided: seen.avoided.contains(*id),
                is_abandoned: abandons && seen.abandoned.contains(*id),
            }
        };
        Self {
            all: ready.iter().map(load).collect(),
            places: ready.iter().enumerate().map(|(place, (id, _))| (*id, place)).collect(),
            candidates: BTreeSet::new(),
            rooms: BTreeSet::new(),
            zone_candidates: vec![0; zones.len()],
            zone_replicas: vec![0; zones.len()],
            looked_at: 0,
        }
    }

    /// Takes in what a shard's replicas take. Only before [`rank`](Self::rank).
    pub(super) fn carry(&mut self, deployment: &Deployment, found: &Shard<'a>, policy: &Policy) {
        for (id, replica) in found.staying.iter().chain(&found.moving) {
            let Some(load) = self.places.get(id).and_then(|place| self.all.get_mut(*place)) else { continue };
            load.replicas += u32::from(!replica.moving);
            load.is_settling |= matches!(replica.state, ReplicaState::Assigned | ReplicaState::Loading);
            load.memory_free_bytes -= i128::from(held_bytes(replica, deployment, policy, load));
        }
    }

    /// Puts those in order that may get something.
    pub(super) fn rank(&mut self) {
        for (place, load) in self.all.iter().enumerate().filter(|(_, load)| !load.is_avoided) {
            self.candidates.insert(load.rank(place));
            self.rooms.insert((load.memory_free_bytes, place));
            self.zone_candidates[load.zone] += 1;
        }
    }

    pub(super) fn all(&self) -> &[Load<'a>] {
        &self.all
    }

    pub(super) fn get(&self, worker: &WorkerId) -> Option<&Load<'a>> {
        self.places.get(worker).map(|place| &self.all[*place])
    }

    /// How many of these workers are in a zone.
    pub(super) fn in_zone_of<'b>(&self, load: &Load<'_>, workers: impl Iterator<Item = &'b WorkerId>) -> usize {
        workers.filter(|worker| self.get(worker).is_some_and(|other| other.zone == load.zone)).count()
    }

    /// Changes what a worker carries, and puts it where it then belongs.
    pub(super) fn change(&mut self, worker: &WorkerId, change: impl FnOnce(&mut Load<'a>)) {
        let Some(&place) = self.places.get(worker) else { return };
        let load = &mut self.all[place];
        let (rank, room) = (load.rank(place), (load.memory_free_bytes, place));
        change(load);
        if !load.is_avoided {
            self.candidates.remove(&rank);
            self.candidates.insert(load.rank(place));
            self.rooms.remove(&room);
            self.rooms.insert((load.memory_free_bytes, place));
        }
    }

    /// Whether a worker has at least two replicas more than one that may get some.
    pub(super) fn is_uneven(&self) -> bool {
        let least = self.candidates.first().map(|rank| rank.replicas.saturating_add(2));
        least.is_some_and(|least| self.candidates.last().is_some_and(|rank| rank.replicas >= least))
    }

    /// Those that have at least two replicas more than one that may get some, the most first.
    pub(super) fn heaviest(&self) -> Vec<&'a WorkerId> {
        let least = self.candidates.first().map_or(u32::MAX, |rank| rank.replicas.saturating_add(2));
        let mut heaviest: Vec<Rank> = self.candidates.iter().copied().filter(|rank| rank.replicas >= least).collect();
        heaviest.sort_by_key(|rank| (Reverse(rank.replicas), rank.worker));
        heaviest.into_iter().map(|rank| self.all[rank.worker].id).collect()
    }

    /// How many replicas each worker would have if all had the same, rounded up.
    pub(super) fn fair_share(&self) -> u32 {
        let replicas: u64 = self.all.iter().map(|load| u64::from(load.replicas)).sum();
        u32::try_from(replicas.div_ceil(self.all.len().max(1) as u64)).unwrap_or(u32::MAX)
    }

    /// The most memory that any candidate has free.
    pub(super) fn room_bytes_max(&self) -> i128 {
        self.rooms.last().map_or(i128::MIN, |(bytes, _)| *bytes)
    }

    /// The best place for another replica of a shard, of those with at most so many replicas: in a zone that has the fewest of it,
    /// then by rank.
    pub(super) fn best(
        &mut self,
        hosts: &BTreeSet<&WorkerId>,
        staying: &[&WorkerId],
        replicas_max: u32,
        takes: impl Fn(&Load<'a>) -> bool,
    ) -> Option<&'a WorkerId> {
        let zones: Vec<usize> = staying.iter().filter_map(|worker| self.get(worker)).map(|load| load.zone).collect();
        zones.iter().for_each(|zone| self.zone_replicas[*zone] += 1);
        let least = self.zone_replicas_least(&zones);
        let best = self.search(hosts, replicas_max, least, takes);
        zones.iter().for_each(|zone| self.zone_replicas[*zone] = 0);
        best
    }

    /// No candidate is in a zone that has fewer of the shard. `zones` are those that have some of it.
    fn zone_replicas_least(&self, zones: &[usize]) -> usize {
        let taken: BTreeSet<usize> = zones.iter().copied().filter(|zone| self.zone_candidates[*zone] > 0).collect();
        let free = self.zone_candidates.iter().filter(|count| **count > 0).count() > taken.len();
        if free { 0 } else { taken.iter().map(|zone| self.zone_replicas[*zone]).min().unwrap_or(0) }
    }

    fn search(
        &mut self,
        hosts: &BTreeSet<&WorkerId>,
        replicas_max: u32,
        least: usize,
        takes: impl Fn(&Load<'a>) -> bool,
    ) -> Option<&'a WorkerId> {
        let mut best: Option<(usize, &'a WorkerId)> = None;
        for rank in self.candidates.iter().take_while(|rank| rank.replicas <= replicas_max) {
            self.looked_at += 1;
            let load = &self.all[rank.worker];
            let replicas_in_zone = self.zone_replicas[load.zone];
            let is_better = best.is_none_or(|(least, _)| replicas_in_zone < least);
            if !is_better || !takes(load) || hosts.contains(load.id) {
                continue;
            }
            best = Some((replicas_in_zone, load.id));
            if replicas_in_zone == least {
                break;
            }
        }
        best.map(|(_, worker)| worker)
    }
}

impl Load<'_> {
    fn rank(&self, worker: usize) -> Rank {
        Rank { replicas: self.replicas, memory_free_gib: Reverse(self.memory_free_bytes >> 30), worker }
    }
}

/// What a worker has free with nothing on it: what it said, or all that it has.
fn memory_bytes(worker: &Worker, reported: Option<u64>) -> i128 {
    let whole = worker.devices.iter().fold(0_u64, |sum, device| sum.saturating_add(device.memory_bytes));
    i128::from(match reported {
        Some(free) if whole > 0 || free > 0 => free,
        None if whole > 0 => whole,
        _ => u64::MAX, // a worker that doesn't know its memory decides by trying
    })
}

/// What a replica takes that the figure of its worker's free memory doesn't lack already.
pub(super) fn held_bytes(replica: &Replica, deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    // A heartbeat's figure already lacks what is loaded, and doesn't yet lack what is only on its way.
    let own = match replica.state {
        ReplicaState::Ready if load.is_reported => 0,
        ReplicaState::Failed => 0,
        ReplicaState::Ready | ReplicaState::Assigned | ReplicaState::Loading => need_bytes(deployment, policy, load),
    };
    // While a version is loaded anew in its place, the one before is there as well, until the new one is ready.
    let former = match &deployment.former {
        Some(former) if replica.former > 0 && !load.is_reported => on_worker(former.size_bytes, deployment, policy, load),
        Some(_) | None => 0,
    };
    own.saturating_add(former)
}

/// What ending a replica gives back, once it is gone: also what the figure of its worker's free memory lacks already.
pub(super) fn freed_bytes(replica: &Replica, deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    match replica.state {
        ReplicaState::Ready if load.is_reported && replica.memory_bytes > 0 => replica.memory_bytes,
        ReplicaState::Ready => need_bytes(deployment, policy, load),
        ReplicaState::Assigned | ReplicaState::Loading | ReplicaState::Failed => held_bytes(replica, deployment, policy, load),
    }
}

/// What a new replica takes of this worker.
pub(super) fn need_bytes(deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    on_worker(deployment.size_bytes, deployment, policy, load)
}

/// What a replica takes of each device that it is on.
pub(super) fn device_bytes(size_bytes: u64, policy: &Policy) -> u64 {
    let overhead = size_bytes / 100 * policy.memory_overhead_percent.min(1_000);
    size_bytes.saturating_add(overhead)
}

fn on_worker(size_bytes: u64, deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    device_bytes(size_bytes, policy).saturating_mul(deployment.demands.devices_used(load.gpus).into())
}

/// Whether each device that a replica would be on is large enough for it, whatever else is there.
pub(super) fn fits_devices(deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> bool {
    let used = deployment.demands.devices_used(load.gpus) as usize;
    let least = load.devices_bytes.get(used.saturating_sub(1));
    least.is_none_or(|bytes| device_bytes(deployment.size_bytes, policy) <= *bytes)
}

fn devices_bytes(worker: &Worker) -> Vec<u64> {
    let known = |bytes: u64| if bytes == 0 { u64::MAX } else { bytes };
    let mut devices: Vec<u64> = worker.devices.iter().map(|device| known(device.memory_bytes)).collect();
    devices.sort_unstable_by(|a, b| b.cmp(a));
    devices
}
