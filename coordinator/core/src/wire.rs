//! The views of [`routes`](crate::routes) and the values of [`command`](crate::command) as messages of
//! `cresset.fleet.v1`. Shapes only.
use cresset_proto::{fleet::v1 as fleet, ids::IdError};

use crate::{
    command::{Registration, ReplicaReport},
    routes::{Assignment, ModelRoute, RouteChanges, RouteTable, WorkerRoute},
    state::{Device, Epoch, Replica, ReplicaId, ReplicaState},
};

impl From<&RouteTable> for fleet::WatchResponse {
    fn from(table: &RouteTable) -> Self {
        Self {
            epoch: table.epoch,
            models: table.models.iter().map(fleet::ModelRoute::from).collect(),
            workers: table.workers.iter().map(fleet::WorkerRoute::from).collect(),
            labels: table.labels.iter().map(label).collect(),
            coordinator_grpc_addresses: table.coordinators.iter().map(|(_, address)| address.clone()).collect(),
            ..Self::default()
        }
    }
}

impl From<&RouteChanges> for fleet::WatchResponse {
    fn from(changes: &RouteChanges) -> Self {
        Self {
            since_epoch: changes.since,
            models_changed: changes.models.iter().cloned().collect(),
            workers_changed: changes.workers.iter().map(ToString::to_string).collect(),
            ..Self::from(&changes.table)
        }
    }
}

fn label((model, label, version): &(String, String, u64)) -> fleet::Label {
    fleet::Label { model: model.clone(), label: label.clone(), version: *version }
}

impl From<&ModelRoute> for fleet::ModelRoute {
    fn from(route: &ModelRoute) -> Self {
        let shards = (0_u32..)
            .zip(&route.shards)
            .map(|(shard, workers)| fleet::ShardRoute { shard, worker_ids: workers.iter().map(ToString::to_string).collect() });
        Self {
            model: route.key.name.clone(),
            version: route.key.version,
            generation: route.generation,
            config: route.config.clone(),
            shards: shards.collect(),
        }
    }
}

impl From<&WorkerRoute> for fleet::WorkerRoute {
    fn from(route: &WorkerRoute) -> Self {
        Self {
            worker_id: route.worker.to_string(),
            incarnation: route.incarnation,
            grpc_address: route.grpc_address.clone(),
            zone: route.zone.clone(),
        }
    }
}

/// What a worker should run, as it is told.
pub fn intent(epoch: Epoch, assignments: &[Assignment]) -> fleet::Intent {
    let assignments = assignments.iter().map(|assignment| fleet::Assignment {
        model: assignment.key.name.clone(),
        version: assignment.key.version,
        shard: assignment.shard,
        generation: assignment.generation,
        config: assignment.config.clone(),
        digest: assignment.digest.clone(),
        stored: assignment.stored,
    });
    fleet::Intent { epoch, assignments: assignments.collect() }
}

/// A replica as people see it in the status.
pub fn observed(id: &ReplicaId, replica: &Replica) -> fleet::ObservedReplica {
    fleet::ObservedReplica {
        model: id.model.clone(),
        version: id.version,
        shard: id.shard,
        generation: replica.generation,
        state: replica_state(replica.state).into(),
        reason: replica.reason.clone(),
        memory_bytes: replica.memory_bytes,
    }
}

fn replica_state(state: ReplicaState) -> fleet::ReplicaState {
    match state {
        ReplicaState::Assigned => fleet::ReplicaState::Assigned,
        ReplicaState::Loading => fleet::ReplicaState::Loading,
        ReplicaState::Ready => fleet::ReplicaState::Ready,
        ReplicaState::Failed => fleet::ReplicaState::Failed,
    }
}

/// What a worker says about a replica; nothing if it is on its way out, which no state has to know.
pub fn replica_report(observed: fleet::ObservedReplica) -> Option<ReplicaReport> {
    let state = match observed.state() {
        fleet::ReplicaState::Assigned => ReplicaState::Assigned,
        fleet::ReplicaState::Loading => ReplicaState::Loading,
        fleet::ReplicaState::Ready => ReplicaState::Ready,
        fleet::ReplicaState::Failed => ReplicaState::Failed,
        fleet::ReplicaState::Unloading | fleet::ReplicaState::Unspecified => return None,
    };
    Some(ReplicaReport {
        model: observed.model,
        version: observed.version,
        shard: observed.shard,
        generation: observed.generation,
        state,
        reason: observed.reason,
        memory_bytes: observed.memory_bytes,
    })
}

impl TryFrom<fleet::Registration> for Registration {
    type Error = IdError;
    fn try_from(message: fleet::Registration) -> Result<Self, IdError> {
        let device = |device: fleet::Device| Device { name: device.name, memory_bytes: device.memory_bytes };
        Ok(Self {
            worker: message.worker_id.parse()?,
            incarnation: message.incarnation,
            grpc_address: message.grpc_address,
            http_address: message.http_address,
            zone: message.zone,
            devices: message.devices.into_iter().map(device).collect(),
            tags: message.tags.into_iter().collect(),
        })
    }
}
