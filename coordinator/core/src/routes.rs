//! What routers and workers are told.
//!
//! Both are views of the state, computed anew whenever the epoch grows; nobody keeps them.
use bytes::Bytes;

use crate::{
    PeerId, WorkerId,
    placement::Shard,
    state::{ClusterState, Deployment, Epoch, Generation, Incarnation, ModelKey, ReplicaState, WorkerState},
};

/// Who serves what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteTable {
    /// The epoch of the state that this was made from.
    pub epoch: Epoch,
    /// Every deployed model, also one that nobody serves yet: a router can tell "not ready" from "not there".
    pub models: Vec<ModelRoute>,
    /// Every worker that isn't dead.
    pub workers: Vec<WorkerRoute>,
    /// Public gRPC addresses of the coordinators, in the order of their ids.
    pub coordinators: Vec<(PeerId, String)>,
}

/// Who serves a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRoute {
    /// The model.
    pub key: ModelKey,
    /// Replicas of this generation or a later one serve it.
    pub generation: Generation,
    /// An encoded `inference.ModelConfig`.
    pub config: Bytes,
    /// Workers whose replica is ready, for each shard in turn.
    pub shards: Vec<Vec<WorkerId>>,
}

/// How to reach a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerRoute {
    /// Who.
    pub worker: WorkerId,
    /// Which of its lives.
    pub incarnation: Incarnation,
    /// `host:port` of inference.
    pub grpc_address: String,
    /// Where it is; empty for unknown.
    pub zone: String,
}

/// The routes of a state.
pub fn routes(state: &ClusterState) -> RouteTable {
    let models = state.models.iter().map(|(key, deployment)| ModelRoute {
        key: key.clone(),
        generation: deployment.generation,
        config: deployment.config.clone(),
        shards: (0..deployment.shards).map(|shard| serving(state, key, deployment, shard)).collect(),
    });
    let alive = state.workers.iter().filter(|(_, worker)| worker.state != WorkerState::Dead);
    let workers = alive.map(|(id, worker)| WorkerRoute {
        worker: id.clone(),
        incarnation: worker.incarnation,
        grpc_address: worker.grpc_address.clone(),
        zone: worker.zone.clone(),
    });
    RouteTable {
        epoch: state.epoch,
        models: models.collect(),
        workers: workers.collect(),
        coordinators: state.peers.iter().map(|(id, peer)| (*id, peer.grpc_address.clone())).collect(),
    }
}

/// Workers whose replica answers. One that leaves is named only while no other answers.
pub(crate) fn serving(state: &ClusterState, key: &ModelKey, deployment: &Deployment, shard: u32) -> Vec<WorkerId> {
    let answers = |worker: &WorkerId| {
        let id = crate::placement::replica_id(key, shard, worker);
        let replica = state.replicas.get(&id);
        replica.is_some_and(|r| r.state == ReplicaState::Ready && r.generation >= deployment.generation)
    };
    let found = Shard::survey(state, key, shard);
    let staying: Vec<WorkerId> = found.answering.into_iter().filter(|worker| answers(worker)).cloned().collect();
    if !staying.is_empty() {
        return staying;
    }
    let alive = |id: &WorkerId| state.workers.get(id).is_some_and(|worker| worker.state != WorkerState::Dead);
    found.leaving.into_iter().filter(|worker| alive(worker) && answers(worker)).cloned().collect()
}

/// One replica that a worker should run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Assignment {
    /// The model.
    pub key: ModelKey,
    /// Which part of it.
    pub shard: u32,
    /// Load it anew if this grew.
    pub generation: Generation,
    /// An encoded `inference.ModelConfig`.
    pub config: Bytes,
    /// SHA-256 that the files must have.
    pub digest: String,
}

/// Everything that a worker should run; what isn't in it should go.
pub fn assignments(state: &ClusterState, worker: &WorkerId) -> Vec<Assignment> {
    let wanted = state.replicas_on(worker).filter_map(|(id, replica)| {
        let key = id.key();
        let deployment = state.models.get(&key)?;
        Some(Assignment {
            key,
            shard: id.shard,
            generation: replica.generation,
            config: deployment.config.clone(),
            digest: deployment.digest.clone(),
        })
    });
    wanted.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::{cluster, deployed, drain, mark_dead, place, ready, register, w};

    fn served_by(state: &ClusterState) -> Vec<&str> {
        let table = routes(state);
        let workers = table.models[0].shards[0].clone();
        state.workers.keys().map(WorkerId::as_str).filter(|name| workers.contains(&w(name))).collect()
    }

    #[test]
    fn only_ready_replicas_are_routed() {
        let mut state = deployed(&["w1", "w2"], "m", 2);
        place(&mut state);
        assert_eq!(routes(&state).models.len(), 1, "a router knows the model before anybody serves it");
        assert_eq!(served_by(&state), Vec::<&str>::new());
        ready(&mut state, "w2");
        assert_eq!(served_by(&state), ["w2"]);
    }

    #[test]
    fn a_new_life_serves_only_once_it_says_so() {
        let mut state = cluster(&["w1", "w2"], "m", 2);
        assert_eq!(served_by(&state), ["w1", "w2"]);
        register(&mut state, "w1", 2);
        assert_eq!(served_by(&state), ["w2"]);
        assert_eq!(routes(&state).workers[0].incarnation, 2);
    }

    #[test]
    fn the_dead_are_not_routed() {
        let mut state = cluster(&["w1", "w2"], "m", 2);
        mark_dead(&mut state, "w1", 1);
        assert_eq!(served_by(&state), ["w2"]);
        assert_eq!(routes(&state).workers.len(), 1);
    }

    #[test]
    fn a_leaving_worker_serves_until_another_does() {
        let mut state = cluster(&["w1", "w2"], "m", 1);
        assert_eq!(served_by(&state), ["w1"]);
        drain(&mut state, "w1", 1);
        assert_eq!(served_by(&state), ["w1"]);
        place(&mut state);
        assert_eq!(served_by(&state), ["w1"], "w2 is only loading");
        ready(&mut state, "w2");
        assert_eq!(served_by(&state), ["w2"]);
    }

    #[test]
    fn a_worker_is_told_what_it_should_run() {
        let mut state = deployed(&["w1", "w2"], "m", 1);
        place(&mut state);
        let told = assignments(&state, &w("w1"));
        assert_eq!(told.len(), 1);
        assert_eq!((told[0].key.name.as_str(), told[0].key.version, told[0].generation), ("m", 1, 1));
        assert_eq!(assignments(&state, &w("w2")), vec![]);
    }
}
