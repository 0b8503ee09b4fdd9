//! What every server of the protocol says alike, worker or coordinator: what it offers, and what it refuses.
use tonic::Status;

use crate::{
    inference::{CudaSharedMemoryStatusResponse, ModelInferRequest, ServerMetadataResponse},
    reason::Reason,
    shared_memory::{self, short},
};

/// Which kind of process answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    /// One that runs models.
    Worker,
    /// One that routes to those that do.
    Coordinator,
}

/// Extensions of the protocol that both kinds serve.
const EXTENSIONS: [&str; 10] = [
    "classification",
    "sequence",
    "sequence(string_id)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
];
/// What a client can only share with the host that it runs on.
const WORKERS: [&str; 1] = ["system_shared_memory"];
/// What is decided for the cluster. Without ensembles nothing depends on a model, so all dependents go with it.
const COORDINATORS: [&str; 2] = ["model_repository", "model_repository(unload_dependents)"];

/// Why there is no shared memory by way of a router, and what to do instead.
pub const NO_SHARED_MEMORY: &str = "system shared memory is not supported by way of a coordinator, which may send a request to any host: \
     connect to the port of a worker on the client's own host (`cresset status` lists them), or send the tensors in the request";
/// Why nobody has CUDA's.
const NO_CUDA_SHARED_MEMORY: &str = "CUDA shared memory is not supported by this server: it copies every tensor to its device \
     itself; use system shared memory on the port of a worker on the client's own host, or send the tensors in the request";

/// What `ServerMetadata` answers.
pub fn server_metadata(server: Server, version: &str) -> ServerMetadataResponse {
    let own: &[&str] = match server {
        Server::Worker => &WORKERS,
        Server::Coordinator => &COORDINATORS,
    };
    ServerMetadataResponse {
        name: "cresset".into(),
        version: version.into(),
        extensions: EXTENSIONS.iter().chain(own).map(ToString::to_string).collect(),
    }
}

/// A coordinator's refusal of the calls for system shared memory.
pub fn no_shared_memory() -> Status {
    Reason::Unsupported.status(NO_SHARED_MEMORY)
}

/// Refuses a request whose tensors are in shared memory, or should go there.
///
/// # Errors
/// UNIMPLEMENTED with the way out.
pub fn without_shared_memory(request: &ModelInferRequest) -> Result<(), Status> {
    if shared_memory::is_used(request) { Err(no_shared_memory()) } else { Ok(()) }
}

/// The refusal to register CUDA shared memory. To unregister some is fine: there is none.
pub fn no_cuda_shared_memory() -> Status {
    Reason::Unsupported.status(NO_CUDA_SHARED_MEMORY)
}

/// The refusal to tell the statistics of a model that isn't served, or of a version of it if the model `is_served`; in
/// Triton's words and with its code.
pub fn no_statistics(model: &str, is_served: bool) -> Status {
    let model = short(model);
    Reason::InvalidArgument.status(if is_served {
        format!("requested model version is not available for model '{model}'")
    } else {
        format!("requested model '{model}' is not available")
    })
}

/// The refusal of trace settings for a model that isn't there; in Triton's words and with its code.
pub fn no_trace_settings(model: &str) -> Status {
    Reason::InvalidArgument.status(format!("Request for unknown model : {}", short(model)))
}

/// What `CudaSharedMemoryStatus` answers where no region can be registered.
///
/// # Errors
/// NOT_FOUND for a region by name, in Triton's words.
pub fn cuda_shared_memory_status(name: &str) -> Result<CudaSharedMemoryStatusResponse, Status> {
    if name.is_empty() {
        return Ok(CudaSharedMemoryStatusResponse::default());
    }
    Err(Reason::UnknownRegion.status(format!("Unable to find cuda shared memory region: '{}'", short(name))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_names_its_own_extensions_beside_those_of_both() {
        let of = |server| server_metadata(server, "1").extensions;
        let (worker, coordinator) = (of(Server::Worker), of(Server::Coordinator));
        assert!(worker.contains(&"statistics".to_owned()) && coordinator.contains(&"statistics".to_owned()));
        assert!(worker.contains(&"system_shared_memory".to_owned()) && !worker.contains(&"model_repository".to_owned()));
        assert!(coordinator.contains(&"model_repository".to_owned()));
        assert!(!coordinator.contains(&"system_shared_memory".to_owned()));
    }

    #[test]
    fn cuda_regions_are_never_there() {
        assert!(cuda_shared_memory_status("").unwrap().regions.is_empty());
        let status = cuda_shared_memory_status("x").unwrap_err();
        assert_eq!((status.code(), status.message()), (tonic::Code::NotFound, "Unable to find cuda shared memory region: 'x'"));
    }
}
