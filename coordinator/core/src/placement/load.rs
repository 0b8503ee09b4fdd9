//! What workers carry: replicas and memory.
use std::collections::BTreeMap;

use super::Policy;
use crate::{
    WorkerId,
    demands::gpus,
    state::{ClusterState, Deployment, Replica, ReplicaState, Worker},
};

/// What a worker carries, the planned moves included.
pub(super) struct Load<'a> {
    pub(super) worker: &'a Worker,
    gpus: u32,
    /// The memory of each device, the largest first. One that doesn't know its memory decides by trying.
    devices_bytes: Vec<u64>,
    pub(super) zone: &'a str,
    /// Those that stay there.
    pub(super) replicas: u32,
    /// Below 0 where more was placed than fits by today's figures.
    pub(super) memory_free_bytes: i128,
    /// Whether the worker said how much is free.
    pub(super) is_reported: bool,
}

pub(super) fn loads<'a>(
    state: &'a ClusterState,
    policy: &Policy,
    memory_free_bytes: &BTreeMap<WorkerId, u64>,
) -> BTreeMap<&'a WorkerId, Load<'a>> {
    let mut loads = BTreeMap::new();
    for (id, worker) in state.workers_ready() {
        let whole = worker.devices.iter().fold(0_u64, |sum, device| sum.saturating_add(device.memory_bytes));
        let reported = memory_free_bytes.get(id);
        let memory_free_bytes = match reported {
            Some(free) if whole > 0 || *free > 0 => *free,
            None if whole > 0 => whole,
            _ => u64::MAX, // a worker that doesn't know its memory decides by trying
        };
        let (memory_free_bytes, is_reported) = (i128::from(memory_free_bytes), reported.is_some());
        loads.insert(
            id,
            Load {
                worker,
                gpus: gpus(worker),
                devices_bytes: devices_bytes(worker),
                zone: &worker.zone,
                replicas: 0,
                memory_free_bytes,
                is_reported,
            },
        );
    }
    for (id, replica) in &state.replicas {
        let Some(load) = loads.get_mut(&id.worker) else { continue };
        load.replicas += u32::from(!replica.moving);
        if let Some(deployment) = state.models.get(&id.key()) {
            load.memory_free_bytes -= i128::from(held_bytes(replica, deployment, policy, load));
        }
    }
    loads
}

/// What a replica takes that the figure of its worker's free memory doesn't lack already.
pub(super) fn held_bytes(replica: &Replica, deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    // A heartbeat's figure already lacks what is loaded, and doesn't yet lack what is only on its way.
    let own = match replica.state {
        ReplicaState::Ready if load.is_reported => 0,
        ReplicaState::Failed => 0,
        ReplicaState::Ready | ReplicaState::Assigned | ReplicaState::Loading => need_bytes(deployment, policy, load),
    };
    // While a version is loaded anew in its place, the one before is there as well, until the new one is ready.
    let former = match &deployment.former {
        Some(former) if replica.former > 0 && !load.is_reported => on_worker(former.size_bytes, deployment, policy, load),
        Some(_) | None => 0,
    };
    own.saturating_add(former)
}

/// What a new replica takes of this worker.
pub(super) fn need_bytes(deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    on_worker(deployment.size_bytes, deployment, policy, load)
}

/// What a replica takes of each device that it is on.
pub(super) fn device_bytes(size_bytes: u64, policy: &Policy) -> u64 {
    let overhead = size_bytes / 100 * policy.memory_overhead_percent.min(1_000);
    size_bytes.saturating_add(overhead)
}

fn on_worker(size_bytes: u64, deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> u64 {
    device_bytes(size_bytes, policy).saturating_mul(deployment.demands.devices_used(load.gpus).into())
}

/// Whether each device that a replica would be on is large enough for it, whatever else is there.
pub(super) fn fits_devices(deployment: &Deployment, policy: &Policy, load: &Load<'_>) -> bool {
    let used = deployment.demands.devices_used(load.gpus) as usize;
    let least = load.devices_bytes.get(used.saturating_sub(1));
    least.is_none_or(|bytes| device_bytes(deployment.size_bytes, policy) <= *bytes)
}

fn devices_bytes(worker: &Worker) -> Vec<u64> {
    let known = |bytes: u64| if bytes == 0 { u64::MAX } else { bytes };
    let mut devices: Vec<u64> = worker.devices.iter().map(|device| known(device.memory_bytes)).collect();
    devices.sort_unstable_by(|a, b| b.cmp(a));
    devices
}
