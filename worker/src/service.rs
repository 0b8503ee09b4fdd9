//! The worker's gRPC services: decode, ask, encode. Nothing is decided here.
mod inference;
mod sequences;
mod settings;
mod shared_memory;
mod statistics;
mod stream;

use std::{sync::Arc, time::Instant};

use cresset_proto::{
    DESCRIPTORS,
    fleet::v1::sequences_service_server::SequencesServiceServer,
    inference::grpc_inference_service_server::GrpcInferenceServiceServer,
    metadata::{INCARNATION, timeout},
};
use cresset_runtime::server::{self, HealthReporter};
use tonic::{codec::CompressionEncoding, metadata::MetadataMap, service::Routes};

use crate::{error::PredictError, predict::Worker};

/// What the health service knows this port's services by; the empty name stands for all of them.
pub const NAMES: [&str; 3] = ["", "inference.GRPCInferenceService", "cresset.fleet.v1.SequencesService"];

/// All services of a worker's port, for each of the threads that serve connections.
///
/// # Errors
/// [`server::Error::Reflection`].
pub async fn routes(
    worker: Arc<Worker>,
    threads: usize,
    message_bytes_max: usize,
) -> Result<(Vec<Routes>, HealthReporter), server::Error> {
    let inference = GrpcInferenceServiceServer::new(inference::Inference { worker: Arc::clone(&worker) })
        .max_decoding_message_size(message_bytes_max)
        .max_encoding_message_size(message_bytes_max)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let sequences = SequencesServiceServer::new(sequences::Sequences { worker })
        .max_decoding_message_size(message_bytes_max)
        .max_encoding_message_size(message_bytes_max);
    let routes = Routes::new(inference).add_service(sequences);
    server::with_health_and_reflection(std::iter::repeat_n(routes, threads), DESCRIPTORS).await
}

/// When the caller stops waiting. A little before its own clock says so, so that it hears it from us, with the right code.
fn deadline(metadata: &MetadataMap) -> Option<Instant> {
    timeout(metadata).and_then(|timeout| Instant::now().checked_add(timeout.saturating_sub(timeout / 50)))
}

/// The life of this worker that the caller means.
fn wanted_incarnation(metadata: &MetadataMap) -> Option<u64> {
    metadata.get(INCARNATION)?.to_str().ok()?.parse().ok()
}

fn fence(worker: &Worker, metadata: &MetadataMap) -> Result<(), PredictError> {
    worker.fence(wanted_incarnation(metadata))
}
