//! Moves of replicas that could stay where they are, but had better not.
//!
//! A move costs nobody an answer: the replica is marked, another one begins elsewhere, and the marked one goes only when all
//! others of its shard are ready. The mark is part of the agreed state, so a new leader carries on with what the last one
//! began. At most [`Policy::moves_max`](super::Policy::moves_max) replicas are on the move at once.
use super::{
    Planner, Site,
    shard::{Hosted, relieve_moving},
};
use crate::{
    WorkerId,
    state::{Deployment, Replica, ReplicaState},
};

impl<'a> Planner<'a> {
    /// Ends replicas that others are ready in the place of.
    pub(super) fn release_moving(&mut self, at: usize, staying: &Hosted<'a>) {
        if self.sites[at].found.moving.is_empty() {
            return;
        }
        let relieved = relieve_moving(staying, self.sites[at].wanted());
        for (worker, replica) in self.sites[at].found.moving.clone() {
            if relieved || replica.answering().is_none() {
                self.end(at, worker, replica);
            }
        }
    }

    /// Ends what doesn't answer where its deployment doesn't want it any more, and returns what stays. Before places are looked
    /// for: it frees some.
    pub(super) fn remove_misplaced(&mut self, at: usize) -> Hosted<'a> {
        let deployment = self.sites[at].deployment;
        let staying = self.sites[at].found.staying.clone();
        if deployment.demands.is_none() {
            return staying;
        }
        let is_lost = |(worker, replica): &(&'a WorkerId, &'a Replica)| {
            replica.answering().is_none() && self.is_misplaced(deployment, worker)
        };
        let (lost, staying): (Hosted<'a>, Hosted<'a>) = staying.into_iter().partition(is_lost);
        for (worker, replica) in lost {
            self.unburden(worker);
            self.sites[at].relieved.push(worker);
            self.end(at, worker, replica);
        }
        staying
    }

    /// Begins moves, as many as may be under way, and returns how many more may be.
    pub(super) fn relieve(&mut self) -> usize {
        let mut left = self.policy.moves_max.saturating_sub(self.under_way());
        for at in 0..self.sites.len() {
            let deployment = self.sites[at].deployment;
            if !deployment.demands.is_none() {
                self.relieve_where(at, &mut left, |planner, worker| planner.is_misplaced(deployment, worker));
            }
        }
        if self.loads.all().iter().any(|load| load.is_abandoned) {
            for at in 0..self.sites.len() {
                self.relieve_where(at, &mut left, Self::is_abandoned);
            }
        }
        left
    }

    /// Moves the replicas of a shard off some workers.
    fn relieve_where(&mut self, at: usize, left: &mut usize, off: impl Fn(&Self, &WorkerId) -> bool) {
        let site = &self.sites[at];
        let moves = site.found.staying.iter().filter(|(worker, _)| off(self, worker));
        let moves: Hosted<'a> = moves.copied().collect();
        moves.into_iter().for_each(|(worker, replica)| self.relieve_one(at, worker, replica, left));
    }

    /// Whether what is on a worker should be elsewhere, since it is left alone.
    fn is_abandoned(&self, worker: &WorkerId) -> bool {
        self.may_move && self.loads.get(worker).is_some_and(|load| load.is_abandoned)
    }

    /// Whether a replica had better be elsewhere.
    pub(super) fn is_out_of_place(&self, deployment: &Deployment, worker: &WorkerId) -> bool {
        self.is_misplaced(deployment, worker) || self.is_abandoned(worker)
    }

    /// Whether a replica is where its deployment doesn't want it any more.
    pub(super) fn is_misplaced(&self, deployment: &Deployment, worker: &WorkerId) -> bool {
        self.may_move && self.loads.get(worker).is_some_and(|load| !deployment.demands.are_met_by(worker, load.worker))
    }

    /// Moves a replica, if it can be and there is a place for it.
    fn relieve_one(&mut self, at: usize, from: &'a WorkerId, replica: &Replica, left: &mut usize) {
        let site = &self.sites[at];
        let answers = replica.answering().is_some();
        let ends = !site.keeps(from);
        // What has failed would fail elsewhere too. What doesn't answer takes nothing along, so it counts for nothing.
        if site.deployment.leaving || replica.state == ReplicaState::Failed || (answers && *left == 0) || ends {
            return;
        }
        let Some(to) = self.best_worker(at, Some(from)) else { return };
        self.unburden(from);
        self.sites[at].relieved.push(from);
        if answers {
            *left -= 1;
        } else {
            self.end(at, from, replica);
        }
        self.begin(at, to);
    }

    /// Replicas that are on the move now. One whose successor failed isn't: it stays where it is. One whose worker leaves isn't
    /// either: it has to go.
    fn under_way(&self) -> usize {
        let coming = self.sites.iter().filter(|site| !site.begun.is_empty() || !site.found.is_settled());
        let moving = |site: &Site<'a>| site.found.moving.iter().filter(|(worker, _)| !site.ended.contains(worker)).count();
        coming.map(moving).sum()
    }
}
