//! Room for what matters more: where no worker has any, replicas of models that may be evicted go.
//!
//! A model is evicted only for one of a higher priority that begins on the same worker in the same plan, so nothing goes for
//! nothing. The lowest priority goes first; of those, what has been idle the longest; and as few replicas as will do.
use std::{cmp::Reverse, collections::BTreeMap};

use super::{
    Planner, Site,
    load::{Load, freed_bytes, need_bytes},
    suits,
};
use crate::WorkerId;

/// Searches for room in one plan. Each looks at all workers, and what finds none now is looked for again in the next plan.
pub(super) const SEARCHES_MAX: usize = 200;

/// How long a model has been idle, roughly: below a minute 0, then one more each time that it doubles. So what differs by seconds
/// doesn't decide what goes.
pub(super) fn idleness(idle_s: u64) -> u32 {
    (idle_s / 60 + 1).ilog2()
}

/// What room on a worker costs. Lower is better; fields are compared top to bottom, so their order is the policy.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Cost {
    /// The highest priority that gives way.
    priority: u32,
    /// The least idle one that gives way.
    idleness: Reverse<u32>,
    /// As few as will do.
    replicas: usize,
    /// Survive a zone.
    replicas_in_zone: usize,
    /// And always agree: the worker with the most free, then by its place.
    memory_free_bytes: Reverse<i128>,
    worker: usize,
}

/// Replicas that can be evicted, by worker: the places of their shards.
pub(super) type Evictable<'a> = BTreeMap<&'a WorkerId, Vec<usize>>;

impl<'a> Planner<'a> {
    /// What can be evicted at all.
    pub(super) fn evictable(&self) -> Evictable<'a> {
        let mut evictable: Evictable<'a> = BTreeMap::new();
        for (at, site) in self.sites.iter().enumerate().filter(|(_, site)| {
            // What moves is left alone until it has arrived.
            site.deployment.claim.evictable && site.found.moving.is_empty()
        }) {
            site.found.staying.iter().for_each(|(worker, _)| evictable.entry(worker).or_default().push(at));
        }
        evictable
    }

    /// Evicts what has to go for another replica of a shard, and says where that is to begin and which shards lost one.
    pub(super) fn evict_for(&mut self, at: usize, evictable: &Evictable<'a>) -> Option<(&'a WorkerId, Vec<usize>)> {
        if self.searches_left == 0 || evictable.is_empty() {
            return None;
        }
        self.searches_left -= 1;
        let room = |planner: &Self, place: usize, load: &Load<'a>| {
            let victims = planner.victims(at, load, evictable.get(load.id)?)?;
            let priority = victims.iter().map(|victim| planner.sites[*victim].deployment.claim.priority).max()?;
            let idleness = victims.iter().map(|victim| planner.sites[*victim].idleness).min()?;
            let site = &planner.sites[at];
            let hosts = site.found.staying.iter().map(|(worker, _)| *worker).chain(site.begun.iter().copied());
            let cost = Cost {
                priority,
                idleness: Reverse(idleness),
                replicas: victims.len(),
                replicas_in_zone: planner.loads.in_zone_of(load, hosts),
                memory_free_bytes: Reverse(load.memory_free_bytes),
                worker: place,
            };
            Some((cost, load.id, victims))
        };
        let rooms = self.loads.all().iter().enumerate().filter_map(|(place, load)| room(self, place, load));
        let (_, worker, victims) = rooms.min_by(|(a, ..), (b, ..)| a.cmp(b))?;
        for &victim in &victims {
            self.evict(victim, worker);
        }
        Some((worker, victims))
    }

    /// The shards that would each have to give up their replica on a worker for another one of this shard, if they can.
    fn victims(&self, at: usize, load: &Load<'a>, evictable: &[usize]) -> Option<Vec<usize>> {
        let (site, policy) = (&self.sites[at], self.policy);
        let hosts_it = site.begun.contains(&load.id) || site.found.hosts().any(|worker| worker == load.id);
        // What a worker says is free lacks nothing yet of what is on its way: it isn't asked for more until that has come.
        let is_unsure = load.is_reported && load.is_settling;
        if load.is_avoided || hosts_it || is_unsure || !suits(load, site.deployment, policy) {
            return None;
        }
        let mut missing = i128::from(need_bytes(site.deployment, policy, load)) - load.memory_free_bytes;
        let gives_way = |other: &&usize| {
            let other = &self.sites[**other];
            let goes = other.ended.contains(&load.id) || other.evicted.contains(&load.id) || other.relieved.contains(&load.id);
            other.deployment.claim.gives_way_to(&site.deployment.claim) && !goes
        };
        let candidate = |&other: &usize| {
            let freed_bytes = self.freed_bytes(other, load);
            let Site { deployment, idleness, .. } = &self.sites[other];
            (freed_bytes > 0).then_some((deployment.claim.priority, Reverse(*idleness), other, freed_bytes))
        };
        let mut candidates: Vec<_> = evictable.iter().filter(gives_way).filter_map(candidate).collect();
        candidates.sort_unstable();
        let mut victims = Vec::new();
        for candidate in candidates {
            if missing <= 0 {
                break;
            }
            missing -= candidate.3;
            victims.push(candidate);
        }
        if missing > 0 {
            return None;
        }
        // Those that aren't needed after all stay, the highest priority and what was used last first.
        for index in (0..victims.len()).rev() {
            if missing + victims[index].3 <= 0 {
                missing += victims.remove(index).3;
            }
        }
        Some(victims.into_iter().map(|(_, _, other, _)| other).collect())
    }

    fn freed_bytes(&self, at: usize, load: &Load<'a>) -> i128 {
        let site = &self.sites[at];
        let there = site.found.staying.iter().find(|(worker, _)| *worker == load.id);
        there.map_or(0, |(_, replica)| i128::from(freed_bytes(replica, site.deployment, self.policy, load)))
    }

    fn evict(&mut self, at: usize, worker: &'a WorkerId) {
        let (policy, site) = (self.policy, &mut self.sites[at]);
        let Some((_, replica)) = site.found.staying.iter().find(|(host, _)| *host == worker) else { return };
        let (replica, deployment) = (*replica, site.deployment);
        site.evicted.push(worker);
        self.loads.change(worker, |load| {
            load.replicas = load.replicas.saturating_sub(1);
            load.memory_free_bytes += i128::from(freed_bytes(replica, deployment, policy, load));
        });
    }
}

#[cfg(test)]
mod tests;
