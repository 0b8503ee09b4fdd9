//! Who may use shared memory: clients on this worker's own host, and nobody else. Names of regions can be guessed, and whoever
//! uses one reads and writes the memory of a process on this host.
use cresset_proto::{
    inference::{ModelInferRequest, SystemSharedMemoryRegisterRequest, SystemSharedMemoryStatusResponse},
    reason::Reason,
    shared_memory,
};
use tonic::{Extensions, Request, Status, transport::server::TcpConnectInfo};

use crate::shared_memory::{RegionError, SharedMemory};

const ONLY_HERE: &str = "system shared memory is only for clients on the worker's own host, and this call came from another: \
     connect to a worker on the client's host, or send the tensors in the request";

/// Whether a call comes from this host.
pub(super) fn is_here(extensions: &Extensions) -> bool {
    match extensions.get::<TcpConnectInfo>() {
        Some(TcpConnectInfo { remote_addr: Some(remote), local_addr }) => {
            remote.ip().is_loopback() || local_addr.is_some_and(|local| local.ip() == remote.ip())
        }
        // Nobody knows where from, so it isn't from here.
        Some(_) | None => false,
    }
}

/// Refuses a call from another host.
pub(super) fn only_here(extensions: &Extensions) -> Result<(), Status> {
    if is_here(extensions) { Ok(()) } else { Err(elsewhere()) }
}

/// Lets a request through unless it speaks of shared memory and comes from another host. A stream ends with that: there is
/// nothing that a later request of it could do better.
pub(super) fn checked(request: ModelInferRequest, is_here: bool) -> Result<ModelInferRequest, Status> {
    if is_here || !shared_memory::is_used(&request) { Ok(request) } else { Err(elsewhere()) }
}

fn elsewhere() -> Status {
    Reason::Unsupported.status(ONLY_HERE)
}

pub(super) fn status(memory: &SharedMemory, name: &str) -> Result<SystemSharedMemoryStatusResponse, Status> {
    Ok(SystemSharedMemoryStatusResponse { regions: memory.status(name).map_err(|error| refused(&error))? })
}

pub(super) fn register(memory: &SharedMemory, request: Request<SystemSharedMemoryRegisterRequest>) -> Result<(), Status> {
    let SystemSharedMemoryRegisterRequest { name, key, offset, byte_size } = request.into_inner();
    memory.register(&name, &key, offset, byte_size).map_err(|error| refused(&error))?;
    tracing::info!(name, key, offset, byte_size, "a shared memory region is registered");
    Ok(())
}

fn refused(error: &RegionError) -> Status {
    error.reason().status(error.to_string())
}

#[cfg(test)]
mod tests {
    use cresset_proto::{inference::model_infer_request::InferInputTensor, parameters::string_parameter, shared_memory::REGION};

    use super::*;

    #[test]
    fn requests_from_another_host_may_not_speak_of_shared_memory() {
        let mut request = ModelInferRequest { inputs: vec![InferInputTensor::default()], ..Default::default() };
        assert!(checked(request.clone(), false).is_ok());
        request.inputs[0].parameters.insert(REGION.into(), string_parameter("r"));
        assert!(checked(request.clone(), true).is_ok());
        assert_eq!(checked(request, false).unwrap_err().code(), tonic::Code::Unimplemented);
    }

    #[test]
    fn callers_from_another_host_are_refused() {
        let from = |remote: Option<&str>, local: Option<&str>| {
            let mut extensions = Extensions::default();
            let address = |text: Option<&str>| text.map(|text| format!("{text}:1").parse().unwrap());
            extensions.insert(TcpConnectInfo { local_addr: address(local), remote_addr: address(remote) });
            is_here(&extensions)
        };
        assert!(from(Some("127.0.0.1"), Some("127.0.0.1")) && from(Some("[::1]"), Some("[::1]")));
        assert!(from(Some("10.0.0.7"), Some("10.0.0.7")), "its own address from inside");
        assert!(!from(Some("10.0.0.8"), Some("10.0.0.7")) && !from(Some("10.0.0.8"), None) && !from(None, Some("10.0.0.7")));
        assert_eq!(only_here(&Extensions::default()).unwrap_err().code(), tonic::Code::Unimplemented);
    }
}
