//! Cresset's wire: what every process says to every other.
//!
//! - [`inference`]: the Open Inference Protocol v2 with Triton's extensions, and `ModelConfig`. Fixed by the outside world.
//! - [`admin`], [`fleet`], [`raft`]: Cresset's own services, versioned by package.
//! - [`ids`], [`tensor`], [`reason`], [`model_config`], [`parameters`], [`shared_memory`]: the few rules that both ends of a
//!   wire must agree on.
//! - [`answers`], [`settings`]: what every server of the protocol says alike.
//!
//! There is no IO here, and nothing that decides anything: only shapes, checks and tables.
#![forbid(unsafe_code)]

pub mod answers;
pub mod ids;
pub mod model_config;
pub mod parameters;
pub mod reason;
pub mod settings;
pub mod shared_memory;
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
    /// `true` from a client that wants the reason of an error, and Cresset's own codes.
    pub const RICH_STATUS: &str = "cresset-rich-status";
    /// A [`Reason`](crate::reason::Reason) beside the gRPC status.
    pub const REASON: &str = "cresset-reason";

    /// When it is worth asking again, in ms: gRPC's own key, which stock clients with a retry policy act on too.
    pub const RETRY_PUSHBACK: &str = "grpc-retry-pushback-ms";

    /// How long whoever refused a call asks to be left alone, if it said so.
    pub fn retry_pushback(metadata: &tonic::metadata::MetadataMap) -> Option<std::time::Duration> {
        let ms = metadata.get(RETRY_PUSHBACK)?.to_str().ok()?.parse::<u32>().ok()?;
        Some(std::time::Duration::from_millis(ms.into()))
    }

    /// How long the caller of a gRPC call waits for its answer, if it said so (`grpc-timeout`).
    pub fn timeout(metadata: &tonic::metadata::MetadataMap) -> Option<std::time::Duration> {
        use std::time::Duration;
        let text = metadata.get("grpc-timeout")?.to_str().ok()?;
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        // The protocol allows eight digits at most.
        let plain = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
        let number: u64 = if plain { digits.parse().ok()? } else { return None };
        Some(match unit {
            "H" => Duration::from_secs(number * 3600),
            "M" => Duration::from_secs(number * 60),
            "S" => Duration::from_secs(number),
            "m" => Duration::from_millis(number),
            "u" => Duration::from_micros(number),
            "n" => Duration::from_nanos(number),
            _ => return None,
        })
    }

    #[cfg(test)]
    mod tests {
        use std::time::Duration;

        use tonic::metadata::{MetadataMap, MetadataValue};

        #[test]
        fn timeouts_are_read_as_the_protocol_writes_them() {
            let read = |text: &str| {
                let mut metadata = MetadataMap::new();
                metadata.insert("grpc-timeout", MetadataValue::try_from(text).unwrap());
                super::timeout(&metadata)
            };
            assert_eq!(read("250m"), Some(Duration::from_millis(250)));
            assert_eq!(read("2S"), Some(Duration::from_secs(2)));
            assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
            for wrong in ["", "m", "x1m", "1", "123456789S", "-1S", "+1S", "1.5S", "1x"] {
                assert_eq!(read(wrong), None, "{wrong}");
            }
        }
    }
}
