//! The state of a large cluster, made by the shipped core, and what it costs to plan it, to write it down and to read it back.

use std::{collections::BTreeMap, time::Instant};

use anyhow::ensure;
use cresset_core::{
    ClusterState, Command, CommandBody, CommandId, apply,
    command::Cause,
    placement::{self, Policy},
    snapshot,
    state::{Deployment, Device, ModelKey, REMEMBERED_COMMANDS_MAX, Replica, ReplicaState, Replicas, Worker, WorkerState},
};
use cresset_proto::inference::{ModelConfig, ModelInput, ModelOutput};
use prost::Message;

use crate::bench::figures::Part;

/// Moves in one command, as the leader proposes them.
const MOVES_PER_COMMAND: usize = 1_000;
/// Files of a model.
pub(super) const MODEL_BYTES: u64 = 1 << 30;
/// Memory of a worker: for half as many models again as it gets, so that there is room for those of a dead one.
pub(super) const WORKER_BYTES: u64 = MODEL_BYTES * 18;
/// The life that workers are in.
pub(super) const INCARNATION: u64 = 1;
const MS: f64 = 1e3;
const MB: f64 = 1e6;

/// How large a cluster is.
#[derive(Debug, Clone)]
pub(super) struct Size {
    /// Where each worker is asked.
    pub(super) workers: Vec<String>,
    /// Each with one replica.
    pub(super) models: usize,
}

/// The id of a worker.
pub(super) fn worker(number: usize) -> String {
    format!("worker-{number:04}")
}

/// Measures what needs no process, and returns the state in which everything runs where it should.
pub(super) fn measure(size: &Size, rounds: usize, part: &mut Part) -> anyhow::Result<ClusterState> {
    let mut nothing = unplaced(size)?;
    answer_many(&mut nothing);
    let mut placed = nothing.clone();
    for _ in 0..rounds {
        let began = Instant::now();
        let plan = placement::plan(&nothing, &Policy::default(), &BTreeMap::new());
        part.add("plan_ms", began.elapsed().as_secs_f64() * MS);
        ensure!(plan.add.len() == size.models && plan.unplaced.is_empty(), "a plan leaves models without a place");
        placed = nothing.clone();
        let commands: Vec<Command> = plan.add.chunks(MOVES_PER_COMMAND).map(|add| place(plan.epoch, add.to_vec())).collect();
        let began = Instant::now();
        for command in &commands {
            apply(&mut placed, command).0.accepted()?;
        }
        part.add("apply_plan_ms", began.elapsed().as_secs_f64() * MS);
    }
    let ready = |replica: &Replica| Replica { state: ReplicaState::Ready, memory_bytes: MODEL_BYTES, ..replica.clone() };
    placed.replicas = placed.replicas.iter().map(|(id, replica)| (id.clone(), ready(replica))).collect::<Replicas>().into();
    for _ in 0..rounds {
        let began = Instant::now();
        let bytes = snapshot::encode(&placed);
        part.add("snapshot_write_ms", began.elapsed().as_secs_f64() * MS);
        part.add("snapshot_mb", bytes.len() as f64 / MB);
        let began = Instant::now();
        let read = snapshot::decode(&bytes)?;
        part.add("snapshot_load_ms", began.elapsed().as_secs_f64() * MS);
        ensure!(read.replicas.len() == size.models, "a snapshot lost replicas");
    }
    Ok(placed)
}

/// Workers and models, and nothing anywhere.
fn unplaced(size: &Size) -> anyhow::Result<ClusterState> {
    let mut state = ClusterState::new("before");
    for (number, address) in size.workers.iter().enumerate() {
        state.workers.insert(worker(number).parse()?, registered(number, address));
    }
    for number in 0..size.models {
        state.generation_last += 1;
        let key = ModelKey { name: format!("team-{}/model-{number:05}", number % 17), version: 1 };
        let deployment = deployed(&key.name, state.generation_last);
        state.models.insert(key, deployment);
    }
    state.epoch = (size.workers.len() + size.models) as u64;
    Ok(state)
}

/// As the state holds a worker of [`fleet`](super::fleet).
fn registered(number: usize, address: &str) -> Worker {
    Worker {
        incarnation: INCARNATION,
        incarnation_floor: INCARNATION,
        grpc_address: address.into(),
        http_address: address.into(),
        zone: zone(number),
        devices: vec![Device { name: "cuda:0".into(), memory_bytes: WORKER_BYTES }],
        state: WorkerState::Ready,
        tags: BTreeMap::default(),
    }
}

/// The zone of a worker: one of three.
pub(super) fn zone(number: usize) -> String {
    format!("zone-{}", number % 3)
}

fn deployed(name: &str, generation: u64) -> Deployment {
    let config = ModelConfig {
        name: name.to_owned(),
        platform: "pytorch_libtorch".into(),
        max_batch_size: 8,
        input: vec![ModelInput { name: "x".into(), dims: vec![-1, 512], ..Default::default() }],
        output: vec![ModelOutput { name: "y".into(), dims: vec![-1, 10], ..Default::default() }],
        ..Default::default()
    };
    Deployment {
        generation,
        config: config.encode_to_vec().into(),
        digest: format!("{generation:064x}"),
        size_bytes: MODEL_BYTES,
        replicas_wanted: 1,
        shards: 1,
        platform: config.platform,
        stored: false,
        former: None,
        leaving: false,
        demands: Default::default(),
        claim: Default::default(),
    }
}

fn place(epoch_seen: u64, add: Vec<cresset_core::state::ReplicaId>) -> Command {
    Command { id: CommandId(rand::random()), body: CommandBody::Place { epoch_seen, add, remove: vec![] } }
}

/// A cluster that has been up for long remembers as many answers as it may.
fn answer_many(state: &mut ClusterState) {
    let Ok(worker) = "worker-that-left-long-ago".parse() else { return };
    let body = CommandBody::MarkDead { worker, incarnation: INCARNATION, cause: Cause::Silence };
    for _ in 0..REMEMBERED_COMMANDS_MAX {
        apply(state, &Command { id: CommandId(rand::random()), body: body.clone() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_cluster_is_placed_evenly_and_read_back() {
        let mut part = Part::default();
        let size = Size { workers: vec!["127.0.0.1:1".into(); 4], models: 40 };
        let state = measure(&size, 2, &mut part).unwrap();
        for number in 0..size.workers.len() {
            let id = worker(number).parse().unwrap();
            assert_eq!(state.replicas_on(&id).count(), 10);
        }
        assert_eq!(state.remembered.len(), REMEMBERED_COMMANDS_MAX);
        assert!(part.median("plan_ms").is_some() && part.median("snapshot_mb").is_some_and(|mb| mb > 0.1), "{part:?}");
        // Another worker's models find room on the others.
        let mut without = state.clone();
        let dead = worker(0).parse().unwrap();
        apply(
            &mut without,
            &Command {
                id: CommandId([7; 16]),
                body: CommandBody::MarkDead { worker: dead, incarnation: INCARNATION, cause: Cause::Silence },
            },
        );
        let plan = placement::plan(&without, &Policy::default(), &BTreeMap::new());
        assert_eq!((plan.add.len(), plan.unplaced.len()), (10, 0));
    }
}
