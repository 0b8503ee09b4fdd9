//! Where the replicas of one shard are, and what becomes of them.
use crate::{
    WorkerId,
    state::{ClusterState, ModelKey, Replica, ReplicaState, WorkerState},
};

/// Where a shard's replicas are, by what becomes of them.
#[derive(Debug, Default)]
pub(crate) struct Shard<'a> {
    /// On workers that take work, and there to stay.
    pub(crate) staying: Vec<(&'a WorkerId, &'a Replica)>,
    /// On workers that leave or are gone.
    pub(crate) leaving: Vec<&'a WorkerId>,
    /// On workers that take work, until others are ready in their place.
    pub(crate) moving: Vec<&'a WorkerId>,
    /// Of those that stay, the ones that answer, in this generation or still in the one before.
    pub(crate) answering: Vec<&'a WorkerId>,
}

impl<'a> Shard<'a> {
    /// Looks up the replicas of one shard.
    pub(crate) fn survey(state: &'a ClusterState, key: &ModelKey, shard: u32) -> Self {
        let mut found = Self::default();
        for (id, replica) in state.replicas_of(key).filter(|(id, _)| id.shard == shard) {
            if !state.workers.get(&id.worker).is_some_and(|worker| worker.state == WorkerState::Ready) {
                found.leaving.push(&id.worker);
            } else if replica.moving {
                found.moving.push(&id.worker);
            } else {
                found.staying.push((&id.worker, replica));
                if replica.answering().is_some() {
                    found.answering.push(&id.worker);
                }
            }
        }
        found
    }

    /// Whether no replica is on its way any more: each one answers or has failed.
    pub(crate) fn is_settled(&self) -> bool {
        self.staying.iter().all(|(_, replica)| matches!(replica.state, ReplicaState::Ready | ReplicaState::Failed))
    }

    /// Whether those that stay answer in place of those that move: every one does. A move is nobody's need, so a replica that
    /// failed elsewhere isn't made up for by less.
    pub(crate) fn relieves_moving(&self, replicas_wanted: usize) -> bool {
        let ready = self.staying.iter().filter(|(_, replica)| replica.state == ReplicaState::Ready).count();
        ready >= replicas_wanted && ready == self.staying.len()
    }

    /// Whether the replica there gives up its place.
    pub(crate) fn gives_up(&self, worker: &WorkerId) -> bool {
        self.leaving.contains(&worker) || self.moving.contains(&worker)
    }

    /// Every worker that has a replica.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = &'a WorkerId> {
        let staying = self.staying.iter().map(|(worker, _)| *worker);
        staying.chain(self.leaving.iter().copied()).chain(self.moving.iter().copied())
    }
}
