//! `instance_group`: how many copies of a model a worker runs, and on what.
use cresset_proto::inference::{ModelConfig, ModelInstanceGroup, model_instance_group};

use super::{ContractError, refuse};

/// Most copies of one model on one worker.
pub const INSTANCES_MAX: usize = 256;

/// What copies run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum InstanceKind {
    /// GPUs if the worker has any, else its CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// GPUs; a worker without any can't serve the model.
    Gpu,
}

/// A group of equal copies.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct InstanceSpec {
    /// What they run on.
    pub kind: InstanceKind,
    /// Copies, for each GPU if they run on GPUs; 0: as many as the worker thinks right (one).
    pub count: usize,
    /// Ordinals of the GPUs; empty: all.
    pub gpus: Vec<u32>,
}

pub(super) fn read(config: &ModelConfig) -> Result<Vec<InstanceSpec>, ContractError> {
    let groups: Vec<InstanceSpec> =
        config.instance_group.iter().filter(|group| !group.passive).map(group).collect::<Result<_, _>>()?;
    if groups.is_empty() && !config.instance_group.is_empty() {
        return refuse("instance_group: all groups are passive, so nothing could answer");
    }
    let total: usize = groups.iter().map(|group| group.count * group.gpus.len().max(1)).sum();
    if total > INSTANCES_MAX {
        return refuse(format!("instance_group asks for {total} copies, the limit is {INSTANCES_MAX}"));
    }
    Ok(if groups.is_empty() { vec![InstanceSpec { count: 1, ..InstanceSpec::default() }] } else { groups })
}

fn group(group: &ModelInstanceGroup) -> Result<InstanceSpec, ContractError> {
    if !group.secondary_devices.is_empty() {
        return refuse("instance_group.secondary_devices isn't served: libtorch has no such devices");
    }
    let count = match group.count {
        0 => 1,
        count => {
            usize::try_from(count).map_err(|_| ContractError(format!("instance_group.count is {count}, it must be 1 or more")))?
        }
    };
    if count > INSTANCES_MAX {
        return refuse(format!("instance_group.count is {count}, the limit is {INSTANCES_MAX}"));
    }
    let gpus = group
        .gpus
        .iter()
        .map(|gpu| u32::try_from(*gpu).map_err(|_| ContractError(format!("instance_group.gpus has {gpu}, ordinals start at 0"))));
    let gpus = gpus.collect::<Result<Vec<_>, _>>()?;
    let kind = match model_instance_group::Kind::try_from(group.kind) {
        Ok(model_instance_group::Kind::Cpu) => InstanceKind::Cpu,
        Ok(model_instance_group::Kind::Gpu) => InstanceKind::Gpu,
        // The engine places the whole model: what the model would choose is what we choose.
        Ok(model_instance_group::Kind::Auto | model_instance_group::Kind::Model) => InstanceKind::Auto,
        Err(_) => return refuse("instance_group has an unknown kind"),
    };
    if kind == InstanceKind::Cpu && !gpus.is_empty() {
        return refuse("instance_group: KIND_CPU can't have gpus");
    }
    Ok(InstanceSpec { kind, count, gpus })
}
