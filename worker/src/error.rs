//! Why a worker refuses or fails a request, and the one table from there to the wire.
use std::time::Duration;

use cresset_proto::{
    ids::VersionError, parameters::ParameterError, reason::Reason, shared_memory::SharedMemoryError, tensor::TensorError,
};
use tonic::Status;

use crate::{admission::AdmissionError, engine::EngineError};

/// When to ask again where nobody can tell when there will be room.
pub const PUSHBACK: Duration = Duration::from_millis(100);

/// Why a request got no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PredictError {
    /// No such model here.
    #[error("Request for unknown model: '{0}' is not found")]
    UnknownModel(String),
    /// The model is here, this version of it isn't.
    #[error("Request for unknown model: '{model}' version {version} is not found")]
    UnknownVersion {
        /// The model.
        model: String,
        /// The version.
        version: u64,
    },
    /// The version isn't a number.
    #[error(transparent)]
    BadVersion(#[from] VersionError),
    /// The caller means another deployment of the model than the one that runs.
    #[error("model '{model}' runs as generation {running} here, the request is for {wanted}")]
    WrongGeneration {
        /// The model.
        model: String,
        /// The generation here.
        running: u64,
        /// The generation that was meant.
        wanted: u64,
    },
    /// The caller means another life of this worker.
    #[error("the request is for incarnation {wanted} of this worker, which is incarnation {running}")]
    Fenced {
        /// This life.
        running: u64,
        /// The life that was meant.
        wanted: u64,
    },
    /// The worker is going away.
    #[error("Server is stopping, it has stopped accepting new inference requests")]
    Draining,
    /// The model was unloaded while the request waited.
    #[error("model '{0}' was unloaded")]
    Unloaded(String),
    /// What waits already takes longer than the request may.
    #[error("model '{model}' would take about {takes_ms} ms for what waits and this request, longer than its deadline allows")]
    TooLate {
        /// The model.
        model: String,
        /// Until its answer, in ms.
        takes_ms: u64,
        /// When to ask again.
        pushback: Duration,
    },
    /// The queue is at its bound of requests.
    #[error("Exceeds maximum queue size: {requests_max} requests wait for model '{model}'")]
    QueueFull {
        /// The model.
        model: String,
        /// The bound.
        requests_max: usize,
        /// When there may be room.
        pushback: Duration,
    },
    /// The queue is at its bound of bytes.
    #[error("Exceeds maximum queue size: requests for model '{model}' may take {bytes_max} bytes together")]
    QueueBytesFull {
        /// The model.
        model: String,
        /// The bound.
        bytes_max: usize,
        /// When there may be room.
        pushback: Duration,
    },
    /// No room for one more sequence.
    #[error("model '{model}' has {sequences_max} live sequences, which is its limit; end one, or raise max_candidate_sequences")]
    SequencesFull {
        /// The model.
        model: String,
        /// The bound.
        sequences_max: usize,
    },
    /// The request waited longer than its model's queue policy allows.
    #[error("Request timeout expired for model '{0}'")]
    QueueTimeout(String),
    /// The deadline passed while the request waited.
    #[error("Deadline Exceeded")]
    Deadline,
    /// The tensors are wrong in themselves.
    #[error(transparent)]
    Tensor(#[from] TensorError),
    /// An output can't go to shared memory.
    #[error(transparent)]
    SharedMemory(#[from] SharedMemoryError),
    /// The request doesn't fit the model.
    #[error(transparent)]
    Admission(#[from] AdmissionError),
    /// A parameter has the wrong kind.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// A model whose requests share state was asked without a sequence id.
    #[error("inference request to model '{0}' must specify a non-zero or non-empty correlation ID")]
    NoSequenceId(String),
    /// A sequence was continued that isn't open here.
    #[error(
        "inference request for sequence {sequence} to model '{model}' must specify the START flag on the first request of the sequence"
    )]
    SequenceNotStarted {
        /// The model.
        model: String,
        /// The sequence.
        sequence: String,
    },
    /// Nobody can go on with a sequence here.
    #[error("sequence {sequence} of model '{model}' isn't held here as its client left it")]
    SequenceLost {
        /// The model.
        model: String,
        /// The sequence.
        sequence: String,
    },
    /// A later router has the sequence.
    #[error("a later connection of the same client goes on with sequence {0}")]
    TakenOver(String),
    /// The model wants the sequence's id in a form that this one doesn't have.
    #[error("sequence id '{sequence}' doesn't fit the CORRID control input of model '{model}', which is {datatype}")]
    CorrelationId {
        /// The model.
        model: String,
        /// The sequence.
        sequence: String,
        /// What the model wants.
        datatype: cresset_proto::tensor::Datatype,
    },
    /// A message of the sequences protocol came out of turn.
    #[error("sequence stream: {0}")]
    SequenceProtocol(String),
    /// The model returned something else than it promised.
    #[error("model '{model}': {text}")]
    BrokenPromise {
        /// The model.
        model: String,
        /// What is wrong with its output.
        text: String,
    },
    /// The engine's own words.
    #[error("model '{model}': {source}")]
    Engine {
        /// The model.
        model: String,
        /// What happened.
        source: EngineError,
    },
    /// The device was given up while it ran this request together with others: any of them may be to blame.
    #[error("model '{model}': {source}; this request was one of {requests} that ran then")]
    Suspect {
        /// The model.
        model: String,
        /// What happened.
        source: EngineError,
        /// Requests of the batch.
        requests: usize,
    },
    /// Not built for this.
    #[error("{0}")]
    Unsupported(String),
}

impl PredictError {
    /// What a router acts on; it also sets the gRPC code.
    pub fn reason(&self) -> Reason {
        // No `_` arm: a new variant has to choose.
        match self {
            Self::UnknownModel(_) | Self::UnknownVersion { .. } => Reason::UnknownModel,
            Self::WrongGeneration { .. } | Self::Unloaded(_) => Reason::NotHere,
            Self::Fenced { .. } => Reason::Fenced,
            Self::Draining => Reason::Draining,
            Self::QueueFull { .. } | Self::QueueBytesFull { .. } | Self::TooLate { .. } => Reason::QueueFull,
            Self::SequencesFull { .. } => Reason::SequencesFull,
            Self::QueueTimeout(_) => Reason::QueueTimeout,
            Self::Deadline => Reason::DeadlineExceeded,
            Self::Parameter(error) => error.reason(),
            Self::Tensor(error) => error.reason(),
            Self::SharedMemory(error) => error.reason(),
            Self::BadVersion(_)
            | Self::Admission(_)
            | Self::NoSequenceId(_)
            | Self::CorrelationId { .. }
            | Self::SequenceProtocol(_) => Reason::InvalidArgument,
            Self::SequenceNotStarted { .. } => Reason::SequenceNotStarted,
            Self::SequenceLost { .. } => Reason::SequenceLost,
            Self::TakenOver(_) => Reason::TakenOver,
            Self::BrokenPromise { .. } => Reason::ModelFailed,
            Self::Engine { source, .. } => match source {
                EngineError::CannotLoad(_) => Reason::LoadFailed,
                EngineError::BadInput(_) => Reason::InvalidArgument,
                EngineError::Failed(_) | EngineError::NotCheckpointable(_) | EngineError::Overran(_) => Reason::ModelFailed,
                EngineError::OutOfMemory(_) => Reason::OutOfMemory,
                EngineError::BadCheckpoint(_) => Reason::BadCheckpoint,
                EngineError::DeviceLost(_) => Reason::DeviceUnhealthy,
            },
            Self::Suspect { .. } => Reason::Suspect,
            Self::Unsupported(_) => Reason::Unsupported,
        }
    }

    /// The status that goes to the caller.
    pub fn status(&self) -> Status {
        match self {
            Self::QueueFull { pushback, .. } | Self::QueueBytesFull { pushback, .. } | Self::TooLate { pushback, .. } => {
                self.reason().status_with_pushback(self.to_string(), *pushback)
            }
            Self::SequencesFull { .. } => self.reason().status_with_pushback(self.to_string(), PUSHBACK),
            _ => self.reason().status(self.to_string()),
        }
    }

    /// Whether this is the fault of the model or the worker rather than of the request, and so worth a line in the log.
    pub fn is_ours(&self) -> bool {
        matches!(
            self.reason(),
            Reason::ModelFailed
                | Reason::OutOfMemory
                | Reason::DeviceUnhealthy
                | Reason::Suspect
                | Reason::BadCheckpoint
                | Reason::Internal
        )
    }
}
