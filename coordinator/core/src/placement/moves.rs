//! Moves of replicas that could stay where they are, but had better not.
//!
//! A move costs nobody an answer: the replica is marked, another one begins elsewhere, and the marked one goes only when all
//! others of its shard are ready. The mark is part of the agreed state, so a new leader carries on with what the last one
//! began. At most [`Policy::moves_max`](super::Policy::moves_max) replicas are on the move at once.
use super::{Planner, Shard, replica_id};
use crate::{
    WorkerId,
    state::{Deployment, ModelKey, Replica, ReplicaId, ReplicaState},
};

impl<'a> Planner<'a> {
    /// Ends replicas that others are ready in the place of.
    pub(super) fn release_moving(&mut self, key: &ModelKey, deployment: &Deployment, shard: u32, found: &Shard<'a>) {
        let relieved = found.relieves_moving(deployment.replicas_wanted as usize);
        for worker in found.moving.iter().copied() {
            let Some(replica) = self.state.replicas.get(&replica_id(key, shard, worker)) else { continue };
            if relieved || replica.answering().is_none() {
                self.end(key, deployment, shard, worker, replica);
            }
        }
    }

    /// Ends what doesn't answer where its deployment doesn't want it any more. Before places are looked for: it frees some.
    pub(super) fn remove_misplaced(&mut self, key: &ModelKey, deployment: &Deployment, shard: u32, found: &mut Shard<'a>) {
        let is_lost = |(worker, replica): &(&'a WorkerId, &'a Replica)| {
            replica.answering().is_none() && self.is_misplaced(deployment, worker)
        };
        let (lost, staying) = std::mem::take(&mut found.staying).into_iter().partition(is_lost);
        found.staying = staying;
        for (worker, replica) in lost {
            if let Some(load) = self.loads.get_mut(worker) {
                load.replicas = load.replicas.saturating_sub(1);
            }
            self.plan.relieve.push(replica_id(key, shard, worker));
            self.end(key, deployment, shard, worker, replica);
        }
    }

    /// Begins moves, as many as may be under way.
    pub(super) fn relieve(&mut self) {
        let mut left = self.policy.moves_max.saturating_sub(self.under_way());
        for (key, deployment) in self.state.models.iter().filter(|(_, deployment)| !deployment.demands.is_none()) {
            for (id, replica) in self.state.replicas_of(key) {
                if self.is_misplaced(deployment, &id.worker) {
                    self.relieve_one(id, replica, &mut left);
                }
            }
        }
        for (id, replica) in &self.state.replicas {
            if self.is_abandoned(&id.worker) {
                self.relieve_one(id, replica, &mut left);
            }
        }
    }

    /// Whether what is on a worker should be elsewhere, since it is left alone. Where most are, the fault lies rather with whoever
    /// leaves them alone.
    fn is_abandoned(&self, worker: &WorkerId) -> bool {
        2 * self.seen.abandoned.len() <= self.loads.len() && self.seen.abandoned.contains(worker)
    }

    /// Whether a replica had better be elsewhere.
    pub(super) fn is_out_of_place(&self, deployment: &Deployment, worker: &WorkerId) -> bool {
        self.is_misplaced(deployment, worker) || self.is_abandoned(worker)
    }

    /// Whether a replica is where its deployment doesn't want it any more.
    pub(super) fn is_misplaced(&self, deployment: &Deployment, worker: &WorkerId) -> bool {
        self.loads.get(worker).is_some_and(|load| !deployment.demands.are_met_by(worker, load.worker))
    }

    /// Moves a replica, if it can be and there is a place for it.
    fn relieve_one(&mut self, id: &'a ReplicaId, replica: &Replica, left: &mut usize) {
        let key = id.key();
        let Some(deployment) = self.state.models.get(&key).filter(|deployment| !deployment.leaving) else { return };
        let answers = replica.answering().is_some();
        // What has failed would fail elsewhere too. What doesn't answer takes nothing along, so it counts for nothing.
        if replica.moving || replica.state == ReplicaState::Failed || (answers && *left == 0) || self.ends(id) {
            return;
        }
        let Some((from, _)) = self.loads.get_key_value(&id.worker) else { return };
        let from = *from;
        let Some(to) = self.best_worker(&key, deployment, id.shard, Some(&id.worker)) else { return };
        if let Some(load) = self.loads.get_mut(from) {
            load.replicas = load.replicas.saturating_sub(1);
        }
        self.plan.relieve.push(id.clone());
        if answers {
            *left -= 1;
        } else {
            self.end(&key, deployment, id.shard, from, replica);
        }
        self.begin(&key, deployment, id.shard, to);
    }

    /// Whether the replica gives up its place in this plan anyway.
    fn ends(&self, id: &ReplicaId) -> bool {
        self.plan.remove.contains(id) || self.plan.relieve.contains(id)
    }

    /// Replicas that are on the move now. One whose successor failed isn't: it stays where it is.
    fn under_way(&self) -> usize {
        let moving = self.state.replicas.iter().filter(|(_, replica)| replica.moving);
        let is_under_way = |id: &ReplicaId| {
            let key = id.key();
            let comes = self.plan.add.iter().any(|added| added.is_of(&key) && added.shard == id.shard);
            comes || !Shard::survey(self.state, &key, id.shard).is_settled()
        };
        moving.filter(|(id, _)| is_under_way(id)).count()
    }
}
