//! Small steps that tests tell their stories in. Each one goes through `apply`, as everything does.
use std::collections::BTreeMap;

use crate::{
    ClusterState, Command, CommandBody, CommandId, Outcome, PeerId, WorkerId, apply,
    claim::Claim,
    command::{Cause, DeploySet, DeploySpec, Registration, ReplicaReport, VersionSpec},
    demands::{Demands, Tags},
    level::LEVEL_KNOWN,
    placement,
    state::{Device, ReplicaId, ReplicaState},
};

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) fn w(name: &str) -> WorkerId {
    name.parse().unwrap()
}

/// Applies under an id that wasn't used before.
pub(crate) fn run(state: &mut ClusterState, body: CommandBody) -> Outcome {
    let id = CommandId((state.remembered.len() as u128).to_be_bytes());
    assert!(state.remembered.get(&id).is_none(), "tests stay below the bound");
    apply(state, &Command { id, body }).0
}

pub(crate) fn registration(name: &str, incarnation: u64) -> Registration {
    Registration {
        worker: w(name),
        incarnation,
        grpc_address: format!("{name}:1"),
        http_address: format!("{name}:2"),
        zone: String::new(),
        devices: vec![Device { name: "cpu".into(), memory_bytes: 1024 * MIB }],
        tags: Tags::new(),
    }
}

pub(crate) fn register(state: &mut ClusterState, name: &str, incarnation: u64) -> Outcome {
    run(state, CommandBody::RegisterWorker(registration(name, incarnation)))
}

/// A cluster in which nothing has happened but that all coordinators know everything.
fn upgraded() -> ClusterState {
    ClusterState { level: LEVEL_KNOWN, ..ClusterState::new("test") }
}

/// A cluster in which nothing has happened, of three coordinators.
pub(crate) fn founded() -> ClusterState {
    let mut state = upgraded();
    state.members.voters = (1..=3).map(PeerId).collect();
    state
}

/// A cluster in which these workers registered, in their first life.
pub(crate) fn registered(names: &[&str]) -> ClusterState {
    let mut state = upgraded();
    for name in names {
        register(&mut state, name, 1);
    }
    state
}

pub(crate) fn spec(name: &str, version: u64, replicas_wanted: u32) -> DeploySpec {
    DeploySpec {
        name: name.into(),
        version,
        config: format!("{name} {version}").into(),
        digest: format!("{version:064x}"),
        size_bytes: 10 * MIB,
        replicas_wanted,
        shards: 1,
        platform: "pytorch_libtorch".into(),
    }
}

/// Deploys a model that demands something of its workers.
pub(crate) fn deploy_demanding(state: &mut ClusterState, name: &str, replicas_wanted: u32, demands: Demands) -> Outcome {
    let mut set = DeploySet::from(&spec(name, 1, replicas_wanted));
    set.versions[0].demands = demands;
    run(state, CommandBody::DeploySet(set))
}

/// Deploys a model of some size that may claim something, one replica of it.
pub(crate) fn deploy_claiming(state: &mut ClusterState, name: &str, size_bytes: u64, claim: Claim) -> Outcome {
    let mut set = DeploySet::from(&DeploySpec { size_bytes, ..spec(name, 1, 1) });
    set.versions[0].claim = claim;
    run(state, CommandBody::DeploySet(set))
}

pub(crate) fn deploy(state: &mut ClusterState, name: &str, version: u64, replicas_wanted: u32) -> Outcome {
    run(state, CommandBody::Deploy(spec(name, version, replicas_wanted)))
}

/// Several versions of a model, two replicas each.
pub(crate) fn versions(name: &str, numbers: &[u64], only: bool) -> DeploySet {
    let version = |version: &u64| VersionSpec {
        version: *version,
        digest: format!("{version:064x}"),
        size_bytes: 10 * MIB,
        replicas_wanted: 2,
        demands: Demands::default(),
        claim: Claim::default(),
    };
    DeploySet { versions: numbers.iter().map(version).collect(), only, ..DeploySet::from(&spec(name, 1, 2)) }
}

/// A cluster with a model that nobody was given yet.
pub(crate) fn deployed(workers: &[&str], name: &str, replicas_wanted: u32) -> ClusterState {
    let mut state = registered(workers);
    deploy(&mut state, name, 1, replicas_wanted);
    state
}

pub(crate) fn plan(state: &ClusterState) -> placement::Plan {
    placement::plan(state, &placement::Policy::default(), &BTreeMap::new())
}

/// Plans once and applies it.
pub(crate) fn place(state: &mut ClusterState) -> Outcome {
    let plan = plan(state);
    run(state, plan.into_command())
}

/// Plans by what is seen, applies that, and says what it was.
pub(crate) fn place_seeing(state: &mut ClusterState, seen: &placement::Seen) -> placement::Plan {
    let plan = placement::plan_seeing(state, &placement::Policy::default(), seen);
    run(state, plan.clone().into_command());
    plan
}

pub(crate) fn remove_worker(state: &mut ClusterState, worker: &str, incarnation: u64) -> Outcome {
    run(state, CommandBody::RemoveWorker { worker: w(worker), incarnation })
}

fn report(state: &mut ClusterState, worker: &str, version: Option<u64>, to: ReplicaState, reason: &str) -> Outcome {
    let id = w(worker);
    let meant = state.replicas_on(&id).filter(|(id, _)| version.is_none_or(|version| id.version == version));
    let replicas = meant.map(|(id, replica)| ReplicaReport {
        model: id.model.clone(),
        version: id.version,
        shard: id.shard,
        generation: replica.generation,
        state: to,
        reason: reason.into(),
        memory_bytes: 10 * MIB,
    });
    let replicas = replicas.collect();
    let incarnation = state.workers[&w(worker)].incarnation;
    run(state, CommandBody::ReportReplicas { worker: w(worker), incarnation, replicas })
}

/// The worker says that all it has is ready.
pub(crate) fn ready(state: &mut ClusterState, worker: &str) -> Outcome {
    report(state, worker, None, ReplicaState::Ready, "")
}

/// The worker says that what it has of this version is ready.
pub(crate) fn ready_version(state: &mut ClusterState, worker: &str, version: u64) -> Outcome {
    report(state, worker, Some(version), ReplicaState::Ready, "")
}

/// The worker says that all it has failed.
pub(crate) fn fail(state: &mut ClusterState, worker: &str, reason: &str) -> Outcome {
    report(state, worker, None, ReplicaState::Failed, reason)
}

/// The worker says that what it has of this version failed.
pub(crate) fn fail_version(state: &mut ClusterState, worker: &str, version: u64, reason: &str) -> Outcome {
    report(state, worker, Some(version), ReplicaState::Failed, reason)
}

/// A cluster with a model that is ready wherever it was placed.
pub(crate) fn cluster(workers: &[&str], name: &str, replicas_wanted: u32) -> ClusterState {
    let mut state = deployed(workers, name, replicas_wanted);
    place(&mut state);
    for worker in workers {
        ready(&mut state, worker);
    }
    state
}

pub(crate) fn mark_dead(state: &mut ClusterState, worker: &str, incarnation: u64) -> Outcome {
    run(state, CommandBody::MarkDead { worker: w(worker), incarnation, cause: Cause::Silence })
}

pub(crate) fn drain(state: &mut ClusterState, worker: &str, incarnation: u64) -> Outcome {
    run(state, CommandBody::DrainWorker { worker: w(worker), incarnation })
}

pub(crate) fn replica(model: &str, version: u64, worker: &str) -> ReplicaId {
    ReplicaId { model: model.into(), version, shard: 0, worker: w(worker) }
}

/// Names of the workers that have a replica of the model.
pub(crate) fn hosts(state: &ClusterState, model: &str) -> Vec<String> {
    state.replicas.keys().filter(|id| id.model == model).map(|id| id.worker.to_string()).collect()
}
