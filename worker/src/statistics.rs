//! What a model has done since it was loaded: counts and times, as `ModelStatistics` tells them.
//!
//! The meaning of each number is Triton's. A *request* is counted once, when it is answered, with its whole time, its time in
//! the queue, and the times of the execution that it was part of: requests that shared a batch each have the batch's times.
//! An *inference* is a row of a request that succeeded. An *execution* is one call of the model, counted by its rows; a
//! response of a decoupled model is counted by its index. A request that was refused before it was in line (a wrong shape, an
//! unknown input) is counted nowhere.
//!
//! Time comes in as a value. What is here belongs to one load of a model; the next load begins at zero.
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cresset_proto::{
    inference::{
        InferBatchStatistics, InferResponseStatistics, InferStatistics, MemoryUsage, ModelStatistics, StatisticDuration,
    },
    reason::Reason,
};
use parking_lot::Mutex;

use crate::engine::Timing;

/// Batch sizes that are listed on their own. Batches of further sizes are in the other counts only.
pub const BATCH_SIZES_MAX: usize = 512;
/// Indexes of a decoupled model's responses that are listed. Later responses are in the other counts only.
pub const RESPONSE_INDEXES_MAX: usize = 1024;

/// Why a request that was in line failed, as Triton's metrics sort it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// There was no room for it, or it waited longer than its queue's policy allows.
    Rejected,
    /// Its caller went away, or its deadline passed.
    Canceled,
    /// The model or its device.
    Backend,
    /// Anything else.
    Other,
}

impl Failure {
    /// Every one, in the order of Triton's documentation.
    pub const ALL: [Self; 4] = [Self::Rejected, Self::Canceled, Self::Backend, Self::Other];

    /// The label of the metric.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rejected => "REJECTED",
            Self::Canceled => "CANCELED",
            Self::Backend => "BACKEND",
            Self::Other => "OTHER",
        }
    }

    /// The failure that a refusal is.
    pub const fn of(reason: Reason) -> Self {
        match reason {
            Reason::QueueFull | Reason::SequencesFull | Reason::QueueTimeout => Self::Rejected,
            Reason::DeadlineExceeded => Self::Canceled,
            Reason::ModelFailed | Reason::OutOfMemory | Reason::DeviceUnhealthy | Reason::Suspect | Reason::BadCheckpoint => {
                Self::Backend
            }
            _ => Self::Other,
        }
    }
}

/// What became of one response of a decoupled model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResponseKind {
    /// It has outputs.
    Success,
    /// It is an error.
    Fail,
    /// It has no outputs, only its place in the order.
    Empty,
    /// Nobody waits for it any more.
    Cancel,
}

/// How often, and how long together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// How often.
    pub count: u64,
    /// Nanoseconds.
    pub ns: u64,
}

impl Sum {
    fn add(&mut self, took: Duration) {
        self.join(Self { count: 1, ns: u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) });
    }

    fn join(&mut self, other: Self) {
        self.count += other.count;
        self.ns = self.ns.saturating_add(other.ns);
    }

    fn wire(self) -> Option<StatisticDuration> {
        Some(StatisticDuration { count: self.count, ns: self.ns })
    }
}

/// Counts of requests and executions, all of the same moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Totals {
    /// Rows of requests that succeeded.
    pub inferences: u64,
    /// Calls of the model.
    pub executions: u64,
    /// Requests that succeeded.
    pub success: Sum,
    /// Requests that failed, in the order of [`Failure::ALL`].
    pub failures: [Sum; Failure::ALL.len()],
    /// Time in the queue, of requests that succeeded; the same goes for the next three.
    pub queue: Sum,
    /// See [`Timing::input`].
    pub input: Sum,
    /// See [`Timing::infer`].
    pub infer: Sum,
    /// See [`Timing::output`].
    pub output: Sum,
    /// When the last execution began, from the recorder's beginning.
    last: Option<Duration>,
    /// By rows, in ascending order.
    batches: Vec<(u64, Parts)>,
}

impl Totals {
    /// Adds the counts of another recorder, but for those by batch size.
    pub fn add(&mut self, other: &Self) {
        self.inferences += other.inferences;
        self.executions += other.executions;
        for (sum, more) in [
            (&mut self.success, other.success),
            (&mut self.queue, other.queue),
            (&mut self.input, other.input),
            (&mut self.infer, other.infer),
            (&mut self.output, other.output),
        ] {
            sum.join(more);
        }
        self.failures.iter_mut().zip(&other.failures).for_each(|(sum, more)| sum.join(*more));
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Parts {
    input: Sum,
    infer: Sum,
    output: Sum,
}

impl Parts {
    fn add(&mut self, timing: &Timing) {
        self.input.add(timing.input);
        self.infer.add(timing.infer);
        self.output.add(timing.output);
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Response {
    infer: Sum,
    output: Sum,
    success: Sum,
    fail: Sum,
    empty: Sum,
    cancel: Sum,
}

/// Counts what one loaded version of a model does. Cheap: one short lock for a request, one for an execution, and no
/// allocation but for a batch size or a response index that is new.
#[derive(Debug)]
pub struct Recorder {
    began: Instant,
    began_epoch_ms: u64,
    load: Duration,
    totals: Mutex<Totals>,
    responses: Mutex<Vec<Response>>,
    pending: AtomicU64,
}

impl Recorder {
    /// Nothing counted yet. `now` and `now_epoch_ms` are the same moment on both clocks, `load` is how long loading took.
    pub fn new(now: Instant, now_epoch_ms: u64, load: Duration) -> Arc<Self> {
        Arc::new(Self {
            began: now,
            began_epoch_ms: now_epoch_ms,
            load,
            totals: Mutex::default(),
            responses: Mutex::default(),
            pending: 0.into(),
        })
    }

    /// The model was called with this many rows.
    pub fn executed(&self, rows: u64, timing: &Timing) {
        let at = timing.began.saturating_duration_since(self.began);
        let mut totals = self.totals.lock();
        totals.executions += 1;
        totals.last = totals.last.max(Some(at));
        match totals.batches.binary_search_by_key(&rows, |(rows, _)| *rows) {
            Ok(place) => totals.batches[place].1.add(timing),
            Err(place) if totals.batches.len() < BATCH_SIZES_MAX => {
                let mut parts = Parts::default();
                parts.add(timing);
                totals.batches.insert(place, (rows, parts));
            }
            Err(_) => {}
        }
    }

    /// How long nothing has been computed, since it was loaded if nothing ever was.
    pub fn idle(&self, now: Instant) -> Duration {
        let last = self.totals.lock().last.unwrap_or_default();
        now.saturating_duration_since(self.began + last)
    }

    /// A request of this many rows was answered, `total` after it came and `queue` of that in line. `timing` is that of the
    /// execution that it was part of.
    pub fn success(&self, rows: u64, total: Duration, queue: Duration, timing: &Timing) {
        let mut totals = self.totals.lock();
        totals.inferences += rows;
        totals.success.add(total);
        totals.queue.add(queue);
        totals.input.add(timing.input);
        totals.infer.add(timing.infer);
        totals.output.add(timing.output);
    }

    /// A request that was in line failed, `total` after it came.
    pub fn failure(&self, why: Failure, total: Duration) {
        self.totals.lock().failures[why as usize].add(total);
    }

    /// A request's caller went away, `total` after it came.
    pub fn cancelled(&self, total: Duration) {
        self.failure(Failure::Canceled, total);
    }

    /// A decoupled model gave its response number `index` (from 0) to a request. `infer` is the model's time for it, `output`
    /// that of making bytes of it; for a cancelled one `infer` is the time of cleaning up.
    pub fn response(&self, index: u64, infer: Duration, output: Duration, kind: ResponseKind) {
        let Some(index) = usize::try_from(index).ok().filter(|index| *index < RESPONSE_INDEXES_MAX) else { return };
        let mut responses = self.responses.lock();
        if responses.len() <= index {
            responses.resize(index + 1, Response::default());
        }
        let response = &mut responses[index];
        if kind != ResponseKind::Cancel {
            response.infer.add(infer);
        }
        match kind {
            ResponseKind::Success => {
                response.output.add(output);
                response.success.add(infer + output);
            }
            ResponseKind::Fail => {
                response.output.add(output);
                response.fail.add(infer + output);
            }
            ResponseKind::Empty => response.empty.add(infer),
            ResponseKind::Cancel => response.cancel.add(infer),
        }
    }

    /// A request waits to be executed, until the guard goes.
    pub fn pending(self: &Arc<Self>) -> Pending {
        self.pending.fetch_add(1, Ordering::Relaxed);
        Pending(Arc::clone(self))
    }

    /// Requests that wait to be executed.
    pub fn pending_count(&self) -> u64 {
        self.pending.load(Ordering::Relaxed)
    }

    /// How long loading took.
    pub fn load(&self) -> Duration {
        self.load
    }

    /// The counts so far.
    pub fn totals(&self) -> Totals {
        self.totals.lock().clone()
    }

    /// The counts so far as the wire has them.
    pub fn snapshot(&self, name: &str, version: u64, memory_usage: Vec<MemoryUsage>) -> ModelStatistics {
        let totals = self.totals();
        let epoch_ms = |at: Duration| self.began_epoch_ms.saturating_add(u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
        let mut fail = Sum::default();
        totals.failures.iter().for_each(|failed| fail.join(*failed));
        // There is no cache of responses.
        let none = Sum::default().wire();
        ModelStatistics {
            name: name.to_owned(),
            version: version.to_string(),
            last_inference: totals.last.map_or(0, epoch_ms),
            inference_count: totals.inferences,
            execution_count: totals.executions,
            inference_stats: Some(InferStatistics {
                success: totals.success.wire(),
                fail: fail.wire(),
                queue: totals.queue.wire(),
                compute_input: totals.input.wire(),
                compute_infer: totals.infer.wire(),
                compute_output: totals.output.wire(),
                cache_hit: none,
                cache_miss: none,
            }),
            batch_stats: totals.batches.iter().map(|(rows, parts)| parts.wire(*rows)).collect(),
            memory_usage,
            response_stats: self.responses(),
        }
    }

    fn responses(&self) -> HashMap<String, InferResponseStatistics> {
        let responses = self.responses.lock().clone();
        responses.iter().enumerate().map(|(index, response)| (index.to_string(), response.wire())).collect()
    }
}

impl Parts {
    fn wire(&self, rows: u64) -> InferBatchStatistics {
        InferBatchStatistics {
            batch_size: rows,
            compute_input: self.input.wire(),
            compute_infer: self.infer.wire(),
            compute_output: self.output.wire(),
        }
    }
}

impl Response {
    fn wire(&self) -> InferResponseStatistics {
        InferResponseStatistics {
            compute_infer: self.infer.wire(),
            compute_output: self.output.wire(),
            success: self.success.wire(),
            fail: self.fail.wire(),
            empty_response: self.empty.wire(),
            cancel: self.cancel.wire(),
        }
    }
}

/// A request that waits.
#[derive(Debug)]
pub struct Pending(Arc<Recorder>);

impl Drop for Pending {
    fn drop(&mut self) {
        self.0.pending.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
