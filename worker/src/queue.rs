//! Requests that wait for a device, and the task that cuts batches from them.
//!
//! A request is admitted at once or refused at once: the queue is bounded by requests and by bytes. A batch is cut at the
//! last moment, when the device has room for it, so everything that came meanwhile is in it. One request that makes the
//! model raise doesn't take its neighbours with it: a failed batch is run again one by one.
use std::{
    collections::VecDeque,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Arc, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use cresset_proto::tensor::Tensor;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

use crate::{
    admission::{Admitted, Contract},
    batching::{self, Decision, Limits, Waiting},
    engine::{
        EngineError, InputParts, OutputTensor,
        device::{PlacedModel, Slot},
    },
    error::PredictError,
    metrics::ModelMetrics,
    statistics::{Failure, Pending, Recorder, Timing},
};

/// Entries of the queue that one decision looks at, as a multiple of the batch's rows.
const LOOK_AHEAD: usize = 4;

/// Bounds of one model's queue.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Requests that may wait.
    pub requests_max: usize,
    /// Bytes of inputs that may wait.
    pub bytes_max: usize,
}

/// The queue of one model on one device.
#[derive(Debug)]
pub struct ModelQueue {
    contract: Arc<Contract>,
    bounds: Bounds,
    metrics: ModelMetrics,
    statistics: Arc<Recorder>,
    waiting: Mutex<Line>,
    came: Notify,
    origin: Instant,
}

#[derive(Debug, Default)]
struct Line {
    entries: VecDeque<Entry>,
    bytes: usize,
    closed: bool,
}

#[derive(Debug)]
struct Entry {
    admitted: Admitted,
    arrived: Instant,
    /// Until it is executed.
    pending: Option<Pending>,
    arrived_us: u64,
    shape_class: u64,
    deadline: Option<Instant>,
    reply: oneshot::Sender<Result<Vec<Tensor>, PredictError>>,
}

impl ModelQueue {
    /// Starts a queue and its dispatcher, which ends when the queue is closed or dropped.
    pub fn start(
        contract: Arc<Contract>,
        model: PlacedModel,
        bounds: Bounds,
        metrics: ModelMetrics,
        statistics: Arc<Recorder>,
    ) -> Arc<Self> {
        let (waiting, came, origin) = (Mutex::default(), Notify::new(), Instant::now());
        let queue = Arc::new(Self { contract, bounds, metrics, statistics, waiting, came, origin });
        tokio::spawn(dispatch(Arc::downgrade(&queue), model));
        queue
    }

    /// Waits in the queue and for the answer. Dropping the future takes the request out of the queue.
    ///
    /// # Errors
    /// [`PredictError`].
    pub async fn run(&self, admitted: Admitted, deadline: Option<Instant>) -> Result<Vec<Tensor>, PredictError> {
        let (reply, answer) = oneshot::channel();
        self.enter(admitted, deadline, reply)?;
        answer.await.unwrap_or_else(|_| Err(PredictError::Unloaded(self.contract.name.clone())))
    }

    fn enter(
        &self,
        admitted: Admitted,
        deadline: Option<Instant>,
        reply: oneshot::Sender<Result<Vec<Tensor>, PredictError>>,
    ) -> Result<(), PredictError> {
        let model = || self.contract.name.clone();
        let mut line = self.waiting.lock();
        if line.closed {
            return Err(PredictError::Unloaded(model()));
        }
        if line.entries.len() >= self.bounds.requests_max {
            self.statistics.failure(Failure::Rejected, Duration::ZERO);
            return Err(PredictError::QueueFull { model: model(), requests_max: self.bounds.requests_max });
        }
        if line.bytes.saturating_add(admitted.bytes) > self.bounds.bytes_max && !line.entries.is_empty() {
            self.statistics.failure(Failure::Rejected, Duration::ZERO);
            return Err(PredictError::QueueBytesFull { model: model(), bytes_max: self.bounds.bytes_max });
        }
        line.bytes += admitted.bytes;
        let shape_class = shape_class(&admitted, self.contract.batch_rows_max > 0);
        let (arrived, pending) = (Instant::now(), Some(self.statistics.pending()));
        line.entries.push_back(Entry { admitted, arrived, pending, arrived_us: self.now_us(), shape_class, deadline, reply });
        self.metrics.waiting.set(i64::try_from(line.entries.len()).unwrap_or(i64::MAX));
        drop(line);
        self.came.notify_one();
        Ok(())
    }

    /// Refuses what waits and whatever comes.
    pub fn close(&self) {
        let mut line = self.waiting.lock();
        line.closed = true;
        line.entries.clear();
        line.bytes = 0;
        drop(line);
        self.came.notify_one();
    }

    /// Whether nothing waits. What the device has already begun is not counted.
    pub fn is_empty(&self) -> bool {
        self.waiting.lock().entries.is_empty()
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Takes the next batch out of the line, or says what to wait for. Expired and abandoned requests go first: they
    /// must not cost the device anything.
    fn cut(&self) -> Cut {
        let mut line = self.waiting.lock();
        if line.closed {
            return Cut::Closed;
        }
        let now = Instant::now();
        let mut at = 0;
        while let Some(entry) = line.entries.get(at) {
            if entry.reply.is_closed() || entry.deadline.is_some_and(|deadline| deadline <= now) {
                if let Some(entry) = line.entries.remove(at) {
                    self.statistics.cancelled(entry.arrived.elapsed());
                    line.bytes -= entry.admitted.bytes;
                    let _ = entry.reply.send(Err(PredictError::Deadline));
                }
            } else {
                at += 1;
            }
        }
        let limits = Limits { rows_max: self.contract.batch_rows_max, delay_us: self.contract.batch_delay_us };
        let view: Vec<Waiting> = line
            .entries
            .iter()
            .take(limits.rows_max.saturating_mul(LOOK_AHEAD).max(1))
            .map(|entry| Waiting { arrived_us: entry.arrived_us, rows: entry.admitted.rows, shape_class: entry.shape_class })
            .collect();
        let cut = match batching::decide(&view, &limits, self.now_us()) {
            Decision::Idle => Cut::Idle,
            Decision::WaitUntil(at_us) => Cut::WaitUntil(self.origin + Duration::from_micros(at_us)),
            Decision::Cut(positions) => {
                // From the back, so that the positions before stay right.
                let mut batch: Vec<Entry> = positions.iter().rev().filter_map(|at| line.entries.remove(*at)).collect();
                batch.reverse();
                line.bytes -= batch.iter().map(|entry| entry.admitted.bytes).sum::<usize>();
                Cut::Batch(batch)
            }
        };
        self.metrics.waiting.set(i64::try_from(line.entries.len()).unwrap_or(i64::MAX));
        cut
    }
}

#[derive(Debug)]
enum Cut {
    Idle,
    WaitUntil(Instant),
    Batch(Vec<Entry>),
    Closed,
}

/// Requests whose shapes differ beyond the batch can't share one. Equal hashes of different shapes would make a batch
/// fail, and its requests would then be run one by one: correct, and too rare to be paid for with a comparison.
fn shape_class(admitted: &Admitted, batched: bool) -> u64 {
    let mut hasher = DefaultHasher::new();
    for tensor in &admitted.inputs {
        tensor.shape.get(usize::from(batched)..).hash(&mut hasher);
    }
    hasher.finish()
}

/// The loop that feeds the device. It holds the queue weakly: a model that is dropped takes its queue along.
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
            Cut::Closed => return,
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
    let entries = std::mem::take(&mut *line.waiting.lock()).entries;
    line.waiting.lock().closed = true;
    for entry in entries {
        let _ = entry.reply.send(Err(PredictError::Engine { model: line.contract.name.clone(), source: source.clone() }));
    }
}

/// Hands a batch to the device and leaves a task to answer for it, so that the next can be cut meanwhile.
fn start(line: &Arc<ModelQueue>, model: &PlacedModel, slot: Slot, mut batch: Vec<Entry>) {
    batch.iter_mut().for_each(|entry| entry.pending = None);
    let answer = slot.infer(model, assemble(&batch));
    let (line, model) = (Arc::clone(line), model.clone());
    tokio::spawn(async move {
        let begun = Instant::now();
        let rows: usize = batch.iter().map(|entry| entry.admitted.rows).sum();
        let result = answer.await;
        line.metrics.batch(rows, begun.elapsed());
        let timing = Timing { began: begun, input: Duration::ZERO, infer: begun.elapsed(), output: Duration::ZERO };
        line.statistics.executed(rows as u64, &timing);
        match result {
            Ok(outputs) => deliver(&line, batch, rows, &outputs, &timing),
            // The fault may be one request's alone; a lost device would fail all of them again.
            Err(error) if batch.len() > 1 && !matches!(error, EngineError::DeviceLost(_)) => {
                one_by_one(&line, &model, batch).await
            }
            Err(source) => {
                for entry in batch {
                    line.statistics.failure(Failure::Backend, entry.arrived.elapsed());
                    let error = PredictError::Engine { model: line.contract.name.clone(), source: source.clone() };
                    let _ = entry.reply.send(Err(error));
                }
            }
        }
    });
}

async fn one_by_one(line: &ModelQueue, model: &PlacedModel, batch: Vec<Entry>) {
    for entry in batch {
        let one = [entry];
        let begun = Instant::now();
        let result = model.infer(assemble(&one)).await;
        let timing = Timing { began: begun, input: Duration::ZERO, infer: begun.elapsed(), output: Duration::ZERO };
        let [entry] = one;
        line.statistics.executed(entry.admitted.rows as u64, &timing);
        match result {
            Ok(outputs) => {
                let rows = entry.admitted.rows;
                deliver(line, vec![entry], rows, &outputs, &timing);
            }
            Err(source) => {
                line.statistics.failure(Failure::Backend, entry.arrived.elapsed());
                let _ = entry.reply.send(Err(PredictError::Engine { model: line.contract.name.clone(), source }));
            }
        }
    }
}

/// The inputs of a batch: each tensor is the requests' bytes one after the other, copied once, by the engine.
fn assemble(batch: &[Entry]) -> Vec<InputParts> {
    let Some(first) = batch.first() else { return vec![] };
    let rows: i64 = batch.iter().map(|entry| i64::try_from(entry.admitted.rows).unwrap_or(i64::MAX)).sum();
    first
        .admitted
        .inputs
        .iter()
        .enumerate()
        .map(|(index, tensor)| {
            let mut shape = tensor.shape.clone();
            if batch.len() > 1
                && let Some(dim) = shape.first_mut()
            {
                *dim = rows;
            }
            let parts = batch.iter().filter_map(|entry| entry.admitted.inputs.get(index)).map(|tensor| tensor.data.clone());
            InputParts { datatype: tensor.datatype, shape, parts: parts.collect() }
        })
        .collect()
}

/// Cuts the outputs of a batch and answers each request with its rows.
fn deliver(line: &ModelQueue, batch: Vec<Entry>, rows: usize, outputs: &[OutputTensor], timing: &Timing) {
    let mut start = 0;
    for entry in batch {
        let end = start + entry.admitted.rows;
        let answer = slice(&line.contract, &entry.admitted.outputs, outputs, (start, end), rows);
        let (total, queue) = (entry.arrived.elapsed(), timing.began.saturating_duration_since(entry.arrived));
        match &answer {
            Ok(_) => line.statistics.success(entry.admitted.rows as u64, total, queue, timing),
            Err(_) => line.statistics.failure(Failure::Backend, total),
        }
        // The caller may have gone.
        let _ = entry.reply.send(answer);
        start = end;
    }
}

/// The wanted outputs of rows `start..end` of a batch of `rows`.
pub fn slice(
    contract: &Contract,
    wanted: &[usize],
    outputs: &[OutputTensor],
    (start, end): (usize, usize),
    rows: usize,
) -> Result<Vec<Tensor>, PredictError> {
    let broken = |text: String| PredictError::BrokenPromise { model: contract.name.clone(), text };
    wanted
        .iter()
        .map(|index| {
            let spec = contract.outputs.get(*index).ok_or_else(|| broken(format!("there is no output {index}")))?;
            let output = outputs.get(*index).ok_or_else(|| {
                broken(format!(
                    "forward returned {} outputs, the configuration declares {}",
                    outputs.len(),
                    contract.outputs.len()
                ))
            })?;
            if output.datatype != spec.datatype {
                let text = format!(
                    "output '{}' came out as {}, the configuration declares {}",
                    spec.name, output.datatype, spec.datatype
                );
                return Err(broken(text));
            }
            let (shape, data) = if contract.batch_rows_max == 0 {
                (output.shape.clone(), output.data.clone())
            } else {
                rows_of(output, start, end, rows).ok_or_else(|| {
                    broken(format!("output '{}' has the shape {:?} for a batch of {rows}", spec.name, output.shape))
                })?
            };
            Ok(Tensor { name: spec.name.clone(), datatype: output.datatype, shape, data })
        })
        .collect()
}

fn rows_of(output: &OutputTensor, start: usize, end: usize, rows: usize) -> Option<(Vec<i64>, Bytes)> {
    let (dim, rest) = output.shape.split_first()?;
    if usize::try_from(*dim).ok()? != rows {
        return None;
    }
    let row_bytes = output.data.len().checked_div(rows).unwrap_or(0);
    let mut shape = vec![i64::try_from(end - start).ok()?];
    shape.extend_from_slice(rest);
    Some((shape, output.data.slice(start * row_bytes..end * row_bytes)))
}
