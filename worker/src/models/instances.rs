//! The instances of a model: where each belongs, and what brings requests to them.
use std::sync::{Arc, atomic::AtomicUsize};

use cresset_proto::tensor::Tensor;

use super::{LoadError, Runner};
use crate::{
    contract::{Contract, InstanceKind, Memory},
    decoupled::Decoupled,
    devices::Devices,
    engine::{Device, Model, device::PlacedModel},
    metrics::ModelMetrics,
    queue::{Bounds, ModelQueue},
    sequence::{Home, Sequences},
};

/// An instance of a model, before it has its threads.
pub(super) struct Instance {
    pub(super) device: Device,
    pub(super) model: Box<dyn Model>,
    /// Brings inputs to a GPU while the first computes.
    pub(super) second: Option<Box<dyn Model>>,
}

/// The device of each instance that the configuration asks for.
pub(super) fn places(contract: &Contract, devices: &Devices) -> Result<Vec<Device>, LoadError> {
    let gpus: Vec<Device> = devices.all().filter(|device| matches!(device, Device::Cuda(_))).collect();
    let mut places = Vec::new();
    for group in &contract.instances {
        let wanted: Vec<Device> = match group.kind {
            InstanceKind::Cpu => vec![Device::Cpu],
            InstanceKind::Auto if gpus.is_empty() => vec![Device::Cpu],
            InstanceKind::Gpu if gpus.is_empty() => {
                return Err(LoadError::NoDevice("a GPU, and this worker has none".into()));
            }
            InstanceKind::Auto | InstanceKind::Gpu if group.gpus.is_empty() => gpus.clone(),
            InstanceKind::Auto | InstanceKind::Gpu => group.gpus.iter().map(|ordinal| Device::Cuda(*ordinal)).collect(),
        };
        if let Some(missing) = wanted.iter().find(|device| **device != Device::Cpu && !gpus.contains(device)) {
            let there = gpus.len();
            return Err(LoadError::NoDevice(format!("{missing}, and this worker has {there} GPUs, numbered from 0")));
        }
        places.extend(wanted.into_iter().flat_map(|device| std::iter::repeat_n(device, group.count)));
    }
    Ok(places)
}

/// Whether requests of the model are run in batches from a queue, which has work for a second handle.
pub(super) fn runs_batches(contract: &Contract) -> bool {
    let is_inside = contract.sequence.as_ref().is_some_and(|sequence| matches!(sequence.memory, Memory::Inside));
    !contract.decoupled && !is_inside
}

/// What brings requests to the instances.
pub(super) fn runner(
    contract: &Arc<Contract>,
    instances: Vec<Vec<PlacedModel>>,
    initial: Vec<Tensor>,
    bounds: Bounds,
    metrics: &ModelMetrics,
) -> Runner {
    if contract.decoupled {
        let instances = instances.into_iter().flatten().collect();
        return Runner::Decoupled(Decoupled::new(Arc::clone(contract), instances, bounds, metrics.clone()));
    }
    let queue = |instances| ModelQueue::start(Arc::clone(contract), instances, bounds, metrics.clone());
    let Some(spec) = contract.sequence.clone() else { return Runner::Queue(queue(instances)) };
    let home = match spec.memory {
        Memory::Inside => Home::Copies { instances: instances.into_iter().flatten().collect(), next: AtomicUsize::new(0) },
        Memory::Tensors(_) => Home::Queue { queue: queue(instances), initial },
    };
    Runner::Sequences(Sequences::new(Arc::clone(contract), spec, home, metrics.clone()))
}
