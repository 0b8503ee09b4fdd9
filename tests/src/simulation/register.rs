//! Registers that clients write and read, to have histories that can be judged: a register is a model, its value the size that it was
//! deployed with.
use cresset_core::{ClusterState, CommandBody, command::DeploySpec};

/// Writes a value.
pub fn write(register: &str, value: u64, replicas_wanted: u32) -> CommandBody {
    CommandBody::Deploy(DeploySpec {
        name: register.to_owned(),
        version: 1,
        config: bytes::Bytes::new(),
        digest: "0".into(),
        size_bytes: value,
        replicas_wanted,
        shards: 1,
        platform: "null".into(),
    })
}

/// What a register holds; `None` before the first write.
pub fn read(state: &ClusterState, register: &str) -> Option<u64> {
    state.versions(register).next().map(|(_, deployment)| deployment.size_bytes)
}
