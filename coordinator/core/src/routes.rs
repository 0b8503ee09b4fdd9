//! What routers and workers are told.
//!
//! Both are views of the state, computed anew whenever the epoch grows; nobody keeps them.
use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use crate::{
    PeerId, WorkerId,
    changes::Touched,
    placement::Shard,
    state::{ClusterState, Deployment, Epoch, Generation, Incarnation, ModelKey, Replica, Worker},
};

/// Who serves what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RouteTable {
    /// The epoch of the state that this was made from.
    pub epoch: Epoch,
    /// Every deployed model, also one that nobody serves yet: a router can tell "not ready" from "not there".
    pub models: Vec<ModelRoute>,
    /// Names for versions: model, label, version.
    pub labels: Vec<(String, String, u64)>,
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
    /// The deployment that answers: the newest, or the one before while no replica has come to the newest.
    pub generation: Generation,
    /// An encoded `inference.ModelConfig`, that deployment's.
    pub config: Bytes,
    /// Workers whose replica answers, for each shard in turn.
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

/// What is new to somebody who has the table of an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Nothing.
    Nothing,
    /// This, and nothing else.
    Changes(RouteChanges),
    /// So much, or since so long ago, that it takes the whole table.
    Everything,
}

/// What changed in a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteChanges {
    /// The epoch of the table in which it did; 0 of the empty one, with which a cluster begins.
    pub since: Epoch,
    /// Models, by name, of which anything may have changed: all that the old table has of them is void.
    pub models: BTreeSet<String>,
    /// Workers of which the same is true.
    pub workers: BTreeSet<WorkerId>,
    /// What there is now of these models and workers. The coordinators are all.
    pub table: RouteTable,
}

/// The routes of a state.
pub fn routes(state: &ClusterState) -> RouteTable {
    let labels = state.labels.iter().flat_map(|(model, labels)| labels_of(model, labels));
    RouteTable {
        epoch: state.epoch,
        models: state.models.iter().map(|(key, deployment)| model_route(state, key, deployment)).collect(),
        labels: labels.collect(),
        workers: state.workers.iter().filter_map(|(id, worker)| worker_route(id, worker)).collect(),
        coordinators: coordinators(state),
    }
}

/// What is new in a state to somebody who has the table of the epoch `known`.
pub fn news(state: &ClusterState, known: Epoch) -> News {
    if known >= state.epoch {
        return News::Nothing;
    }
    let Some(Touched { models, workers }) = state.changes.since(known) else { return News::Everything };
    let labels = models.iter().filter_map(|name| state.labels.get(name).map(|labels| labels_of(name, labels)));
    let versions = models.iter().flat_map(|name| state.versions(name));
    let known_workers = workers.iter().filter_map(|id| state.workers.get(id).map(|worker| (id, worker)));
    let table = RouteTable {
        epoch: state.epoch,
        models: versions.map(|(key, deployment)| model_route(state, key, deployment)).collect(),
        labels: labels.flatten().collect(),
        workers: known_workers.filter_map(|(id, worker)| worker_route(id, worker)).collect(),
        coordinators: coordinators(state),
    };
    News::Changes(RouteChanges { since: known, models, workers, table })
}

fn model_route(state: &ClusterState, key: &ModelKey, deployment: &Deployment) -> ModelRoute {
    let (generation, config) = told(state, key, deployment);
    let shards = (0..deployment.shards).map(|shard| serving(state, key, shard, |_| true)).collect();
    ModelRoute { key: key.clone(), generation, config: config.clone(), shards }
}

fn labels_of<'a>(model: &'a str, labels: &'a BTreeMap<String, u64>) -> impl Iterator<Item = (String, String, u64)> + 'a {
    labels.iter().map(move |(label, version)| (model.to_owned(), label.clone(), *version))
}

/// None of one that is dead.
fn worker_route(id: &WorkerId, worker: &Worker) -> Option<WorkerRoute> {
    (!worker.state.is_over()).then(|| WorkerRoute {
        worker: id.clone(),
        incarnation: worker.incarnation,
        grpc_address: worker.grpc_address.clone(),
        zone: worker.zone.clone(),
    })
}

/// One that was just added hasn't said where it is.
fn coordinators(state: &ClusterState) -> Vec<(PeerId, String)> {
    let known = state.peers.iter().filter(|(_, peer)| !peer.grpc_address.is_empty());
    known.map(|(id, peer)| (*id, peer.grpc_address.clone())).collect()
}

/// What a model is to its callers: the newest deployment, unless only replicas of the one before answer.
fn told<'a>(state: &'a ClusterState, key: &ModelKey, deployment: &'a Deployment) -> (Generation, &'a Bytes) {
    let newest = (deployment.generation, &deployment.config);
    let Some(former) = &deployment.former else { return newest };
    let answers = state.replicas_of(key).filter_map(|(_, replica)| replica.answering()).max();
    match answers {
        Some(generation) if generation < deployment.generation => (former.generation, &former.config),
        Some(_) | None => newest,
    }
}

/// Workers whose replica answers and is `wanted`. One that leaves is named only while no other answers, since it may end at any
/// time; one that moves is named until the others are all ready.
pub(crate) fn serving(state: &ClusterState, key: &ModelKey, shard: u32, wanted: impl Fn(&Replica) -> bool) -> Vec<WorkerId> {
    let answers = |(_, replica): &(&WorkerId, &Replica)| replica.answering().is_some() && wanted(replica);
    let names = |replicas: &[(&WorkerId, &Replica)]| -> Vec<WorkerId> {
        replicas.iter().filter(|replica| answers(replica)).map(|(worker, _)| (*worker).clone()).collect()
    };
    let found = Shard::survey(state, key, shard);
    let replicas_wanted = state.models.get(key).map_or(0, |deployment| deployment.replicas_wanted as usize);
    let mut named = names(&found.staying);
    if named.is_empty() {
        let alive = |id: &WorkerId| state.workers.get(id).is_some_and(|worker| !worker.state.is_over());
        named.extend(names(&found.leaving).into_iter().filter(alive));
    }
    if !found.relieves_moving(replicas_wanted) {
        named.extend(names(&found.moving));
    }
    named.sort();
    named
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
    /// Whether the coordinators keep the files.
    pub stored: bool,
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
            stored: deployment.stored,
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
