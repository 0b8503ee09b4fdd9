//! Sequences on a worker: requests that share a state which the module keeps inside itself.
//!
//! Every live sequence has a copy of the module to itself (the weights are shared). A worker is only a cache of a
//! sequence's state: routers keep the truth, as a checkpoint and the inputs since. So after a request that made the model
//! raise, when nobody knows what became of the state, a sequence simply ends here, and a router opens it anew from its
//! journal. A caller that talks to the worker without a router has to start again, and is told so.
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cresset_proto::{ids::SequenceId, tensor::Tensor};
use dashmap::{DashMap, mapref::entry::Entry};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::{
    admission::{Admitted, Contract, SequenceSpec},
    engine::{
        EngineError, InputParts,
        device::{PlacedModel, PlacedSequence},
    },
    error::PredictError,
    metrics::ModelMetrics,
    queue::slice,
    statistics::{Failure, Recorder, Timing},
};

/// Requests of one sequence that may wait.
const SEQUENCE_REQUESTS_MAX: usize = 256;

/// The sequences of one model on one device.
pub struct Sequences {
    contract: Arc<Contract>,
    spec: SequenceSpec,
    model: PlacedModel,
    metrics: ModelMetrics,
    statistics: Arc<Recorder>,
    room: Arc<Semaphore>,
    direct: DashMap<SequenceId, Direct>,
    next_life: AtomicU64,
}

/// A sequence that its caller steers by id, straight at this worker.
#[derive(Debug)]
struct Direct {
    life: u64,
    requests: mpsc::Sender<DirectRequest>,
}

#[derive(Debug)]
struct DirectRequest {
    admitted: Admitted,
    deadline: Option<Instant>,
    end: bool,
    reply: oneshot::Sender<Result<Vec<Tensor>, PredictError>>,
}

/// A sequence that is open: its place and its copy of the module.
pub struct LiveSequence {
    contract: Arc<Contract>,
    sequence: PlacedSequence,
    metrics: ModelMetrics,
    statistics: Arc<Recorder>,
    _room: OwnedSemaphorePermit,
}

/// A step's result.
#[derive(Debug)]
pub struct Stepped {
    /// The outputs that the request wanted.
    pub outputs: Vec<Tensor>,
    /// The state after the step, if it was asked for and can be had.
    pub checkpoint: Option<Bytes>,
}

/// A step that failed.
#[derive(Debug)]
pub struct StepFailed {
    /// Why.
    pub error: PredictError,
    /// Whether the state is what it was before; if not, the sequence is over here.
    pub state_intact: bool,
}

impl Sequences {
    /// Sequences of a model.
    pub fn new(
        contract: Arc<Contract>,
        spec: SequenceSpec,
        model: PlacedModel,
        metrics: ModelMetrics,
        statistics: Arc<Recorder>,
    ) -> Arc<Self> {
        let room = Arc::new(Semaphore::new(spec.sequences_max));
        Arc::new(Self { contract, spec, model, metrics, statistics, room, direct: DashMap::new(), next_life: AtomicU64::new(1) })
    }

    /// How many sequences are open.
    pub fn live(&self) -> usize {
        self.spec.sequences_max - self.room.available_permits()
    }

    /// Returns once no sequence is open.
    pub async fn empty(&self) {
        let all = u32::try_from(self.spec.sequences_max).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        drop(self.room.acquire_many(all).await);
    }

    /// Opens a sequence: new, or in the state that a checkpoint holds.
    ///
    /// # Errors
    /// [`PredictError::SequencesFull`], or the engine's.
    pub async fn open(&self, checkpoint: Option<Bytes>) -> Result<LiveSequence, PredictError> {
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| PredictError::SequencesFull {
            model: self.contract.name.clone(),
            sequences_max: self.spec.sequences_max,
        })?;
        let engine = |source| PredictError::Engine { model: self.contract.name.clone(), source };
        let sequence = self.model.open_sequence().await.map_err(engine)?;
        if let Some(checkpoint) = checkpoint {
            sequence.restore(checkpoint).await.map_err(engine)?;
        }
        let (metrics, statistics) = (self.metrics.clone(), Arc::clone(&self.statistics));
        Ok(LiveSequence { contract: Arc::clone(&self.contract), sequence, metrics, statistics, _room: room })
    }

    /// Puts a request into its sequence's line; requests of one sequence are run in the order of these calls. The answer
    /// comes through the receiver.
    ///
    /// # Errors
    /// [`PredictError::SequenceNotStarted`], [`PredictError::QueueFull`].
    pub fn enter(
        self: &Arc<Self>,
        id: &SequenceId,
        (start, end): (bool, bool),
        admitted: Admitted,
        deadline: Option<Instant>,
    ) -> Result<oneshot::Receiver<Result<Vec<Tensor>, PredictError>>, PredictError> {
        let requests = if start { self.start(id) } else { self.direct.get(id).map(|direct| direct.requests.clone()) };
        let model = || self.contract.name.clone();
        let not_started = || PredictError::SequenceNotStarted { model: model(), sequence: id.to_string() };
        let requests = requests.ok_or_else(not_started)?;
        let (reply, answer) = oneshot::channel();
        match requests.try_send(DirectRequest { admitted, deadline, end, reply }) {
            Ok(()) => Ok(answer),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(PredictError::QueueFull { model: model(), requests_max: SEQUENCE_REQUESTS_MAX })
            }
            // It ended, by END or by being idle, just now.
            Err(mpsc::error::TrySendError::Closed(_)) => Err(not_started()),
        }
    }

    /// START drops an older sequence of the same id, as Triton does: its line closes when its sender goes.
    fn start(self: &Arc<Self>, id: &SequenceId) -> Option<mpsc::Sender<DirectRequest>> {
        let (requests, line) = mpsc::channel(SEQUENCE_REQUESTS_MAX);
        let life = self.next_life.fetch_add(1, Ordering::Relaxed);
        self.direct.insert(id.clone(), Direct { life, requests: requests.clone() });
        tokio::spawn(run_direct(Arc::clone(self), id.clone(), life, line));
        Some(requests)
    }

    fn forget(&self, id: &SequenceId, life: u64) {
        if let Entry::Occupied(entry) = self.direct.entry(id.clone())
            && entry.get().life == life
        {
            entry.remove();
        }
    }
}

/// The task of a sequence that is steered by id: it ends with END, after the idle time, or when it is started anew.
async fn run_direct(sequences: Arc<Sequences>, id: SequenceId, life: u64, mut line: mpsc::Receiver<DirectRequest>) {
    let idle = Duration::from_micros(sequences.spec.idle_us);
    let mut live: Option<LiveSequence> = None;
    while let Ok(Some(request)) = tokio::time::timeout(idle, line.recv()).await {
        if request.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            let _ = request.reply.send(Err(PredictError::Deadline));
            continue;
        }
        let open = match live.take() {
            Some(open) => Ok(open),
            None => sequences.open(None).await,
        };
        let mut open = match open {
            Ok(open) => open,
            Err(error) => {
                let _ = request.reply.send(Err(error));
                break;
            }
        };
        let (result, intact) = match open.step(&request.admitted, false).await {
            Ok(stepped) => (Ok(stepped.outputs), true),
            Err(failed) => (Err(failed.error), failed.state_intact),
        };
        let over = request.end || !intact;
        if over {
            // Before the answer: who has it may start the next sequence at once and must find room.
            sequences.forget(&id, life);
            drop(open);
        } else {
            live = Some(open);
        }
        let _ = request.reply.send(result);
        if over {
            break;
        }
    }
    sequences.forget(&id, life);
    line.close();
    while let Ok(request) = line.try_recv() {
        let error = PredictError::SequenceNotStarted { model: sequences.contract.name.clone(), sequence: id.to_string() };
        let _ = request.reply.send(Err(error));
    }
}

impl LiveSequence {
    /// Runs the next request. Calls have to be made in turn.
    ///
    /// # Errors
    /// [`StepFailed`] also says what became of the state.
    pub async fn step(&mut self, admitted: &Admitted, want_checkpoint: bool) -> Result<Stepped, StepFailed> {
        let inputs = admitted
            .inputs
            .iter()
            .map(|tensor| InputParts { datatype: tensor.datatype, shape: tensor.shape.clone(), parts: vec![tensor.data.clone()] })
            .collect();
        let came = Instant::now();
        let failed = |source: EngineError| {
            self.statistics.failure(Failure::Backend, came.elapsed());
            StepFailed {
                // Inputs are checked before the module sees them.
                state_intact: matches!(source, EngineError::BadInput(_)),
                error: PredictError::Engine { model: self.contract.name.clone(), source },
            }
        };
        let slot = self.sequence.thread().slot().await.map_err(failed)?;
        let begun = Instant::now();
        let (outputs, checkpoint) = if want_checkpoint {
            let stepped = slot.step_and_checkpoint(&self.sequence, inputs).await.map_err(failed)?;
            (stepped.outputs, Some(stepped.checkpoint))
        } else {
            (slot.step(&self.sequence, inputs).await.map_err(failed)?, None)
        };
        self.metrics.batch(1, begun.elapsed());
        let timing = Timing { began: begun, input: Duration::ZERO, infer: begun.elapsed(), output: Duration::ZERO };
        self.statistics.executed(1, &timing);
        self.statistics.success(1, came.elapsed(), begun.saturating_duration_since(came), &timing);
        let checkpoint = match checkpoint {
            Some(Ok(checkpoint)) => Some(checkpoint),
            Some(Err(error)) => {
                tracing::warn!(model = self.contract.name, %error, "a sequence's state can't be saved");
                None
            }
            None => None,
        };
        match slice(&self.contract, &admitted.outputs, &outputs, (0, 1), 1) {
            Ok(outputs) => Ok(Stepped { outputs, checkpoint }),
            Err(error) => Err(StepFailed { error, state_intact: false }),
        }
    }
}
