//! Where the replicas of one shard are, and what becomes of them.
use crate::{
    WorkerId,
    state::{ClusterState, ModelKey, Replica, ReplicaState, WorkerState},
};

/// Replicas of one shard, each with its worker, in the order of the workers' names.
pub(crate) type Hosted<'a> = Vec<(&'a WorkerId, &'a Replica)>;

/// Where a shard's replicas are, by what becomes of them.
#[derive(Debug, Default)]
pub(crate) struct Shard<'a> {
    /// On workers that take work, and there to stay.
    pub(crate) staying: Hosted<'a>,
    /// On workers that leave or are gone.
    pub(crate) leaving: Hosted<'a>,
    /// On workers that take work, until others are ready in their place.
    pub(crate) moving: Hosted<'a>,
}

impl<'a> Shard<'a> {
    /// Looks up the replicas of one shard.
    pub(crate) fn survey(state: &'a ClusterState, key: &ModelKey, shard: u32) -> Self {
        let mut found = Self::default();
        for (id, replica) in state.replicas.of_shard(key, shard) {
            let takes_work = state.workers.get(&id.worker).is_some_and(|worker| worker.state == WorkerState::Ready);
            let kind = match replica.moving {
                _ if !takes_work => &mut found.leaving,
                true => &mut found.moving,
                false => &mut found.staying,
            };
            kind.push((&id.worker, replica));
        }
        found
    }

    /// Of those that stay, the ones that answer, in this generation or still in the one before.
    pub(crate) fn answering(&self) -> impl Iterator<Item = &'a WorkerId> {
        self.staying.iter().filter(|(_, replica)| replica.answering().is_some()).map(|(worker, _)| *worker)
    }

    /// Whether no replica is on its way any more: each one answers or has failed.
    pub(crate) fn is_settled(&self) -> bool {
        are_settled(&self.staying)
    }

    /// Whether those that stay answer in place of those that move.
    pub(crate) fn relieves_moving(&self, replicas_wanted: usize) -> bool {
        relieve_moving(&self.staying, replicas_wanted)
    }

    /// Whether the replica there gives up its place.
    pub(crate) fn gives_up(&self, worker: &WorkerId) -> bool {
        self.leaving.iter().chain(&self.moving).any(|(host, _)| *host == worker)
    }

    /// Every worker that has a replica.
    pub(crate) fn hosts(&self) -> impl Iterator<Item = &'a WorkerId> {
        self.staying.iter().chain(&self.leaving).chain(&self.moving).map(|(worker, _)| *worker)
    }
}

/// Whether none of these replicas is on its way.
pub(super) fn are_settled(staying: &[(&WorkerId, &Replica)]) -> bool {
    staying.iter().all(|(_, replica)| matches!(replica.state, ReplicaState::Ready | ReplicaState::Failed))
}

/// Whether these replicas answer in place of others that move: every one does. A move is nobody's need, so a replica that failed
/// elsewhere isn't made up for by less.
pub(super) fn relieve_moving(staying: &[(&WorkerId, &Replica)], replicas_wanted: usize) -> bool {
    let ready = staying.iter().filter(|(_, replica)| replica.state == ReplicaState::Ready).count();
    ready >= replicas_wanted && ready == staying.len()
}
