//! Sequences on a worker: requests that share state.
//!
//! A module that keeps its state inside itself has a copy for every live sequence (the weights are shared); state that goes
//! in and out as tensors is kept here, and requests of different sequences share batches. A worker is only a cache of a
//! sequence's state: routers keep the truth, as a checkpoint and the inputs since. So after a request that made a module
//! with inner state raise, when nobody knows what became of it, a sequence simply ends here, and a router opens it anew from
//! its journal. A caller that talks to the worker without a router has to start again, and is told so.
mod controls;
pub mod detached;
mod live;
pub mod state;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cresset_proto::{ids::SequenceId, tensor::Tensor};
use dashmap::{DashMap, mapref::entry::Entry};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use self::live::Body;
pub use self::{
    controls::{Standing, control_inputs},
    live::{LiveSequence, StepFailed, Stepped},
};
use crate::{
    admission::Admitted,
    contract::{Contract, SequenceSpec},
    engine::device::PlacedModel,
    error::{PUSHBACK, PredictError},
    metrics::ModelMetrics,
    queue::{Answered, ModelQueue, Terms},
};

/// Requests of one sequence that may wait.
const SEQUENCE_REQUESTS_MAX: usize = 256;
/// Sequences that may wait for another to end.
const BACKLOG_SEQUENCES_MAX: usize = 1024;

/// The sequences of one model.
pub struct Sequences {
    contract: Arc<Contract>,
    spec: SequenceSpec,
    home: Home,
    metrics: ModelMetrics,
    room: Arc<Semaphore>,
    backlog: Semaphore,
    direct: DashMap<SequenceId, Direct>,
    next_life: AtomicU64,
}

/// Where sequences run.
pub enum Home {
    /// Each in a copy of one of these.
    Copies {
        /// The model's instances; never empty.
        instances: Vec<PlacedModel>,
        /// Whose turn it is.
        next: AtomicUsize,
    },
    /// All through one queue, with their state beside them.
    Queue {
        /// The queue.
        queue: Arc<ModelQueue>,
        /// What a sequence begins with.
        initial: Vec<Tensor>,
    },
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
    terms: Terms,
    start: bool,
    end: bool,
    reply: oneshot::Sender<Result<Answered, PredictError>>,
}

impl Sequences {
    /// Sequences of a model.
    pub fn new(contract: Arc<Contract>, spec: SequenceSpec, home: Home, metrics: ModelMetrics) -> Arc<Self> {
        let room = Arc::new(Semaphore::new(spec.sequences_max));
        let backlog = Semaphore::new(BACKLOG_SEQUENCES_MAX);
        Arc::new(Self { contract, spec, home, metrics, room, backlog, direct: DashMap::new(), next_life: AtomicU64::new(1) })
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

    /// Refuses what waits and whatever comes.
    pub fn close(&self) {
        if let Home::Queue { queue, .. } = &self.home {
            queue.close();
        }
    }

    fn full(&self) -> PredictError {
        PredictError::SequencesFull { model: self.contract.name.clone(), sequences_max: self.spec.sequences_max }
    }

    /// Opens a sequence, new or in the state that a checkpoint holds; or refuses at once, so that its router can ask
    /// another replica.
    ///
    /// # Errors
    /// [`PredictError::SequencesFull`], or the engine's.
    pub async fn open(&self, checkpoint: Option<Bytes>) -> Result<LiveSequence, PredictError> {
        let room = Arc::clone(&self.room).try_acquire_owned().map_err(|_| self.full())?;
        self.open_in(room, checkpoint).await
    }

    /// Opens a new sequence, waiting in the backlog for another to end.
    async fn open_in_turn(&self, deadline: Option<Instant>) -> Result<LiveSequence, PredictError> {
        let room = match Arc::clone(&self.room).try_acquire_owned() {
            Ok(room) => room,
            Err(_) => {
                let _waits = self.backlog.try_acquire().map_err(|_| self.full())?;
                let turn = Arc::clone(&self.room).acquire_owned();
                let turn = match deadline {
                    Some(deadline) => tokio::time::timeout_at(deadline.into(), turn).await.map_err(|_| PredictError::Deadline)?,
                    None => turn.await,
                };
                // The semaphore is never closed.
                turn.map_err(|_| self.full())?
            }
        };
        self.open_in(room, None).await
    }

    async fn open_in(&self, room: OwnedSemaphorePermit, checkpoint: Option<Bytes>) -> Result<LiveSequence, PredictError> {
        let engine = |source| PredictError::Engine { model: self.contract.name.clone(), source };
        let body = match &self.home {
            Home::Copies { instances, next } => {
                let turn = next.fetch_add(1, Ordering::Relaxed) % instances.len().max(1);
                let instance = instances.get(turn).ok_or_else(|| PredictError::Unloaded(self.contract.name.clone()))?;
                let sequence = instance.open_sequence().await.map_err(engine)?;
                if let Some(checkpoint) = checkpoint {
                    sequence.restore(checkpoint).await.map_err(engine)?;
                }
                Body::Inside(sequence)
            }
            Home::Queue { queue, initial } => {
                let states = match checkpoint {
                    Some(checkpoint) => state::restore(&self.contract, &checkpoint).map_err(engine)?,
                    None => initial.clone(),
                };
                Body::Tensors { queue: Arc::clone(queue), states }
            }
        };
        Ok(LiveSequence { contract: Arc::clone(&self.contract), body, metrics: self.metrics.clone(), _room: room })
    }

    /// Puts a request into its sequence's line; requests of one sequence are run in the order of these calls. The answer
    /// comes through the receiver.
    ///
    /// # Errors
    /// [`PredictError::SequenceNotStarted`], [`PredictError::QueueFull`].
    pub fn enter(
        self: &Arc<Self>,
        standing: Standing<'_>,
        admitted: Admitted,
        terms: Terms,
    ) -> Result<oneshot::Receiver<Result<Answered, PredictError>>, PredictError> {
        let Standing { id, start, end } = standing;
        let requests = if start { self.start(id) } else { self.direct.get(id).map(|direct| direct.requests.clone()) };
        let model = || self.contract.name.clone();
        let not_started = || PredictError::SequenceNotStarted { model: model(), sequence: id.to_string() };
        let requests = requests.ok_or_else(not_started)?;
        let (reply, answer) = oneshot::channel();
        match requests.try_send(DirectRequest { admitted, terms, start, end, reply }) {
            Ok(()) => Ok(answer),
            Err(mpsc::error::TrySendError::Full(_)) => {
                Err(PredictError::QueueFull { model: model(), requests_max: SEQUENCE_REQUESTS_MAX, pushback: PUSHBACK })
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
        let DirectRequest { admitted, terms, start, end, reply } = request;
        if terms.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            let _ = reply.send(Err(PredictError::Deadline));
            continue;
        }
        let open = match live.take() {
            Some(open) => Ok(open),
            None => sequences.open_in_turn(terms.deadline).await,
        };
        let mut open = match open {
            Ok(open) => open,
            Err(error) => {
                let _ = reply.send(Err(error));
                break;
            }
        };
        let standing = Standing { id: &id, start, end };
        let (result, intact) = match open.step(admitted, standing, terms, false).await {
            Ok(Stepped { outputs, queued, timing, .. }) => (Ok(Answered { outputs, queued, timing }), true),
            Err(failed) => (Err(failed.error), failed.state_intact),
        };
        let over = end || !intact;
        if over {
            // Before the answer: who has it may start the next sequence at once and must find room.
            sequences.forget(&id, life);
            drop(open);
        } else {
            live = Some(open);
        }
        let _ = reply.send(result);
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
