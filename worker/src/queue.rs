//! Requests that wait for a device, and the tasks that cut batches from them.
//!
//! A request is admitted at once or refused at once: the queue is bounded by requests and by bytes. A batch is cut at the
//! last moment, when a device has room for it, so everything that came meanwhile is in it. One request that makes the
//! model raise doesn't take its neighbours with it: a failed batch is run again one by one.
use std::{
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use cresset_proto::tensor::Tensor;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

pub use crate::batching::Bounds;
use crate::{
    admission::Admitted,
    batch::{answers, assemble, shape_class},
    batching::{Decision, Dropped, Full, Line, Ordering, Waiting},
    contract::Contract,
    engine::{
        EngineError, Outputs, Timing,
        device::{PlacedModel, Slot},
    },
    error::PredictError,
    metrics::ModelMetrics,
};

/// What a caller says about how its request may wait.
#[derive(Debug, Clone, Copy, Default)]
pub struct Terms {
    /// When it stops waiting.
    pub deadline: Option<Instant>,
    /// The priority level; 0 is the model's default.
    pub priority: u64,
    /// How long the request may wait in the queue, in µs; 0: as the model's policy says.
    pub timeout_us: u64,
}

/// A request's answer.
#[derive(Debug)]
pub struct Answered {
    /// The outputs that it wanted, then whatever state it asked for.
    pub outputs: Vec<Tensor>,
    /// How long it waited.
    pub queued: Duration,
    /// Where the time of its batch went.
    pub timing: Timing,
}

type Reply = oneshot::Sender<Result<Answered, PredictError>>;

/// The queue of one model, which feeds all its instances.
#[derive(Debug)]
pub struct ModelQueue {
    contract: Arc<Contract>,
    bounds: Bounds,
    metrics: ModelMetrics,
    waiting: Mutex<State>,
    came: Notify,
    origin: Instant,
    ordering: Mutex<Ordering<Option<(Reply, Result<Answered, PredictError>)>>>,
}

#[derive(Debug, Default)]
struct State {
    line: Line<Entry>,
    next_number: u64,
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    admitted: Admitted,
    arrived: Instant,
    /// Position among all requests of the model.
    number: u64,
    reply: Reply,
}

impl ModelQueue {
    /// Starts a queue and a dispatcher for each instance; they end when the queue is closed or dropped.
    pub fn start(contract: Arc<Contract>, instances: Vec<PlacedModel>, bounds: Bounds, metrics: ModelMetrics) -> Arc<Self> {
        let queue = Arc::new(Self {
            contract,
            bounds,
            metrics,
            waiting: Mutex::default(),
            came: Notify::new(),
            origin: Instant::now(),
            ordering: Mutex::default(),
        });
        for instance in instances {
            tokio::spawn(dispatch(Arc::downgrade(&queue), instance));
        }
        queue
    }

    /// Waits in the queue and for the answer. Dropping the future takes the request out of the queue.
    ///
    /// # Errors
    /// [`PredictError`].
    pub async fn run(&self, admitted: Admitted, terms: Terms) -> Result<Answered, PredictError> {
        let (reply, answer) = oneshot::channel();
        self.enter(admitted, terms, reply)?;
        answer.await.unwrap_or_else(|_| Err(PredictError::Unloaded(self.contract.name.clone())))
    }

    fn enter(&self, admitted: Admitted, terms: Terms, reply: Reply) -> Result<(), PredictError> {
        let model = || self.contract.name.clone();
        let queueing = &self.contract.queueing;
        let level = queueing.level(terms.priority);
        let policy = queueing.policy(level);
        let arrived = Instant::now();
        let arrived_us = self.us(arrived);
        let waiting = Waiting {
            arrived_us,
            rows: admitted.rows,
            bytes: admitted.bytes,
            shape_class: shape_class(&self.contract, &admitted),
            level,
            times_out_us: policy.timeout_us(terms.timeout_us).map(|timeout_us| arrived_us.saturating_add(timeout_us)),
            deadline_us: terms.deadline.map(|at| self.us(at)),
        };
        let mut state = self.waiting.lock();
        if state.closed {
            return Err(PredictError::Unloaded(model()));
        }
        let number = state.next_number;
        let entry = Entry { admitted, arrived, number, reply };
        match state.line.push(waiting, entry, policy, &self.bounds) {
            Ok(()) => state.next_number += 1,
            Err((Full::Requests(requests_max), _)) => return Err(PredictError::QueueFull { model: model(), requests_max }),
            Err((Full::Bytes(bytes_max), _)) => return Err(PredictError::QueueBytesFull { model: model(), bytes_max }),
        }
        self.show_length(&state);
        drop(state);
        self.came.notify_one();
        Ok(())
    }

    /// Refuses what waits and whatever comes.
    pub fn close(&self) {
        let mut state = self.waiting.lock();
        state.closed = true;
        let refused = state.line.drain();
        drop(state);
        drop(refused);
        self.came.notify_waiters();
        self.came.notify_one();
    }

    /// Requests that wait. What a device has already begun is not counted.
    pub fn len(&self) -> usize {
        self.waiting.lock().line.len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.origin).as_micros()).unwrap_or(u64::MAX)
    }

    fn show_length(&self, state: &State) {
        self.metrics.waiting.set(i64::try_from(state.line.len()).unwrap_or(i64::MAX));
    }

    /// Takes the next batch out of the line, or says what to wait for. Expired and abandoned requests go first: they
    /// must not cost the device anything.
    fn cut(&self) -> Cut {
        let mut state = self.waiting.lock();
        if state.closed {
            return Cut::Closed;
        }
        let now_us = self.us(Instant::now());
        let queueing = &self.contract.queueing;
        let mut dropped = state.line.expire(queueing, now_us);
        let is_alive = |entry: &Entry| !entry.reply.is_closed();
        let gone = |entry| dropped.push((Dropped::Abandoned, entry));
        let decision = state.line.next(self.contract.batch_rows_max, queueing, now_us, is_alive, gone);
        self.show_length(&state);
        drop(state);
        for (why, entry) in dropped {
            let error = match why {
                Dropped::TimedOut => PredictError::QueueTimeout(self.contract.name.clone()),
                Dropped::Deadline | Dropped::Abandoned => PredictError::Deadline,
            };
            self.settle(entry, Err(error));
        }
        match decision {
            Decision::Idle => Cut::Idle,
            Decision::WaitUntil(at_us) => Cut::WaitUntil(self.origin + Duration::from_micros(at_us)),
            Decision::Cut(batch) => Cut::Batch(batch.into_iter().map(|(_, entry)| entry).collect()),
        }
    }

    /// Gives a request its answer, in its turn if the model preserves the order.
    fn settle(&self, entry: Entry, answer: Result<Answered, PredictError>) {
        // The caller may have gone; then nobody minds.
        if !self.contract.queueing.preserve_ordering {
            let _ = entry.reply.send(answer);
            return;
        }
        let mut ordering = self.ordering.lock();
        for (reply, answer) in ordering.finish(entry.number, Some((entry.reply, answer))).into_iter().flatten() {
            let _ = reply.send(answer);
        }
    }

    fn engine_error(&self, source: EngineError) -> PredictError {
        PredictError::Engine { model: self.contract.name.clone(), source }
    }
}

#[derive(Debug)]
enum Cut {
    Idle,
    WaitUntil(Instant),
    Batch(Vec<Entry>),
    Closed,
}

/// The loop that feeds one instance. It holds the queue weakly: a model that is dropped takes its queue along.
async fn dispatch(queue: Weak<ModelQueue>, model: PlacedModel) {
    loop {
        let Some(line) = queue.upgrade() else { return };
        if line.is_empty() && !line.waiting.lock().closed {
            line.came.notified().await;
        }
        let slot = match model.thread().slot().await {
            Ok(slot) => slot,
            Err(source) => return fail_all(&line, &source),
        };
        match line.cut() {
            Cut::Closed => {
                // The other instances' loops have to hear of it too.
                line.came.notify_one();
                return;
            }
            Cut::Idle => {}
            Cut::WaitUntil(at) => {
                drop(slot);
                let _ = tokio::time::timeout_at(at.into(), line.came.notified()).await;
            }
            Cut::Batch(batch) => start(&line, &model, slot, batch),
        }
    }
}

fn fail_all(line: &ModelQueue, source: &EngineError) {
    let mut state = line.waiting.lock();
    state.closed = true;
    let entries = state.line.drain();
    drop(state);
    line.came.notify_one();
    for entry in entries {
        line.settle(entry, Err(line.engine_error(source.clone())));
    }
}

/// Hands a batch to the device and leaves a task to answer for it, so that the next can be cut meanwhile.
fn start(line: &Arc<ModelQueue>, model: &PlacedModel, slot: Slot, batch: Vec<Entry>) {
    let answer = slot.infer(model, assemble(&line.contract, &admitted(&batch)));
    let (line, model) = (Arc::clone(line), model.clone());
    tokio::spawn(async move {
        match answer.await {
            Ok(outputs) => deliver(&line, batch, &outputs),
            // The fault may be one request's alone; a lost device would fail all of them again.
            Err(error) if batch.len() > 1 && !matches!(error, EngineError::DeviceLost(_)) => {
                for entry in batch {
                    match model.infer(assemble(&line.contract, &[&entry.admitted])).await {
                        Ok(outputs) => deliver(&line, vec![entry], &outputs),
                        Err(source) => line.settle(entry, Err(line.engine_error(source))),
                    }
                }
            }
            Err(source) => {
                for entry in batch {
                    line.settle(entry, Err(line.engine_error(source.clone())));
                }
            }
        }
    });
}

fn admitted(batch: &[Entry]) -> Vec<&Admitted> {
    batch.iter().map(|entry| &entry.admitted).collect()
}

/// Answers each request of a batch with its share of the results.
fn deliver(line: &ModelQueue, batch: Vec<Entry>, outputs: &Outputs) {
    let rows: usize = batch.iter().map(|entry| entry.admitted.rows).sum();
    line.metrics.batch(rows, outputs.timing.total());
    let answers = answers(&line.contract, &admitted(&batch), outputs);
    for (entry, answer) in batch.into_iter().zip(answers) {
        let queued = outputs.timing.began.saturating_duration_since(entry.arrived);
        line.settle(entry, answer.map(|tensors| Answered { outputs: tensors, queued, timing: outputs.timing }));
    }
}
