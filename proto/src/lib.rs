//! Cresset's wire: what every process says to every other.
//!
//! - [`inference`]: the Open Inference Protocol v2 with Triton's extensions, and `ModelConfig`. Fixed by the outside world.
//! - [`admin`], [`fleet`], [`raft`]: Cresset's own services, versioned by package.
//! - [`ids`], [`tensor`], [`reason`], [`model_config`], [`parameters`]: the few rules that both ends of a wire must agree on.
//!
//! There is no IO here, and nothing that decides anything: only shapes, checks and tables.
#![forbid(unsafe_code)]

pub mod ids;
pub mod model_config;
pub mod parameters;
pub mod reason;
pub mod tensor;

/// The Open Inference Protocol v2 with Triton's extensions (package `inference`).
#[allow(missing_docs, clippy::all, rustdoc::all)]
pub mod inference {
    tonic::include_proto!("inference");
}

pub use cresset::{admin, fleet, raft};

/// The packages `cresset.*`, nested as the generated code expects it.
mod cresset {
    /// Operators' services.
    pub mod admin {
        /// Version 1.
        #[allow(missing_docs, clippy::all, rustdoc::all)]
        pub mod v1 {
            tonic::include_proto!("cresset.admin.v1");
        }
    }

    /// Membership of workers, routes, and sequences between routers and workers.
    pub mod fleet {
        /// Version 1.
        #[allow(missing_docs, clippy::all, rustdoc::all)]
        pub mod v1 {
            tonic::include_proto!("cresset.fleet.v1");
        }
    }

    /// The coordinators' own transport.
    pub mod raft {
        /// Version 1.
        #[allow(missing_docs, clippy::all, rustdoc::all)]
        pub mod v1 {
            tonic::include_proto!("cresset.raft.v1");
        }
    }
}

/// The encoded `FileDescriptorSet` of everything above, for gRPC reflection and for tests.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Metadata keys that Cresset adds to calls. Callers may see them; none is ever required of a stock client.
pub mod metadata {
    /// Which life of a worker a router means (decimal). A worker of another life refuses the call.
    pub const INCARNATION: &str = "cresset-incarnation";
    /// A [`Reason`](crate::reason::Reason) beside the gRPC status.
    pub const REASON: &str = "cresset-reason";
}
