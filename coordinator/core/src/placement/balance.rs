//! Moves that even out what the workers carry: when a worker has come, or others have gone.
//!
//! Nobody needs them, so they come last, within what the budget of moves leaves, and only what is whole and at rest takes part:
//! no shard whose replicas aren't all ready, none that names its workers, and none that this plan does anything else about. A
//! replica goes from a worker to one that has at least two fewer, and not into a zone that has more of its shard. So each move
//! makes the whole more even (the sum of the squares falls), and a state in which no such move is left stays as it is. No worker
//! gets more this way than its fair share.
use std::collections::{BTreeMap, BTreeSet};

use super::{Planner, Site, takes};
use crate::{WorkerId, state::ReplicaState};

/// Workers that may be looked at for all these moves of a plan. Where many can't be moved, what is left uneven stays so rather than
/// that every plan takes long.
const LOOKED_AT_MAX: u64 = 100_000;

/// A replica that had better be elsewhere.
struct Step<'a> {
    at: usize,
    from: &'a WorkerId,
    to: &'a WorkerId,
}

impl<'a> Planner<'a> {
    /// Begins as many moves as are left.
    pub(super) fn balance(&mut self, left: usize) {
        if left == 0 || !self.may_even_out || !self.loads.is_uneven() {
            return;
        }
        let failing = self.failing();
        let mut movable: BTreeMap<&'a WorkerId, Vec<usize>> = BTreeMap::new();
        for (at, site) in self.sites.iter().enumerate().filter(|(_, site)| site.is_at_rest()) {
            site.found.staying.iter().for_each(|(worker, _)| movable.entry(worker).or_default().push(at));
        }
        let looked_at_last = self.loads.looked_at.saturating_add(LOOKED_AT_MAX);
        for _ in 0..left {
            let Some(Step { at, from, to }) = self.step(&movable, &failing, looked_at_last) else { return };
            self.unburden(from);
            self.sites[at].relieved.push(from);
            self.begin(at, to);
        }
    }

    /// The next move: off the worker that has the most and has anything to give.
    fn step(
        &mut self,
        movable: &BTreeMap<&'a WorkerId, Vec<usize>>,
        failing: &BTreeSet<&'a WorkerId>,
        looked_at_last: u64,
    ) -> Option<Step<'a>> {
        for from in self.loads.heaviest() {
            for &at in movable.get(from).into_iter().flatten() {
                if self.loads.looked_at > looked_at_last {
                    return None;
                }
                if let Some(to) = self.lighter_worker(at, from, failing) {
                    return Some(Step { at, from, to });
                }
            }
        }
        None
    }

    /// Where a replica would be better than where it is.
    fn lighter_worker(&mut self, at: usize, from: &WorkerId, failing: &BTreeSet<&WorkerId>) -> Option<&'a WorkerId> {
        let (policy, site) = (self.policy, &self.sites[at]);
        if !site.is_at_rest() {
            return None; // this plan moved another one of its replicas
        }
        let here = self.loads.get(from)?;
        let replicas_max = here.replicas.saturating_sub(2).min(self.loads.fair_share().saturating_sub(1));
        let hosts: BTreeSet<&WorkerId> = site.found.hosts().collect();
        let others: Vec<&WorkerId> = hosts.iter().copied().filter(|worker| *worker != from).collect();
        let in_zone_max = self.loads.in_zone_of(here, others.iter().copied());
        let to = self
            .loads
            .best(&hosts, &others, replicas_max, |load| takes(load, site.deployment, policy) && !failing.contains(load.id))?;
        let in_zone = self.loads.get(to).map(|there| self.loads.in_zone_of(there, others.iter().copied()));
        in_zone.is_some_and(|in_zone| in_zone <= in_zone_max).then_some(to)
    }

    /// Workers on which the successor of a replica that moves has failed: no good place for what has a better one.
    fn failing(&self) -> BTreeSet<&'a WorkerId> {
        let moving = self.sites.iter().filter(|site| !site.found.moving.is_empty());
        let failed = moving.flat_map(|site| &site.found.staying).filter(|(_, replica)| replica.state == ReplicaState::Failed);
        failed.map(|(worker, _)| *worker).collect()
    }
}

impl Site<'_> {
    /// Whether all that is wanted is ready, nothing begins, ends or moves, and nobody said where it should be.
    fn is_at_rest(&self) -> bool {
        let is_free = !self.deployment.leaving && self.deployment.demands.workers.is_empty();
        let is_untouched = [&self.begun, &self.ended, &self.relieved, &self.evicted].iter().all(|workers| workers.is_empty());
        let is_whole = self.found.staying.len() == self.wanted() && self.found.relieves_moving(self.wanted());
        is_free && is_untouched && is_whole && self.found.leaving.is_empty() && self.found.moving.is_empty()
    }
}

#[cfg(test)]
mod tests;
