//! Requests that wait for a device, and what a device's thread does with them.
//!
//! A request is admitted at once or refused at once: the queue is bounded by requests and by bytes. The threads of the
//! handles of the model's instances take batches from it themselves, at the last moment, so everything that came meanwhile is
//! in one; a request costs two hand-overs, to the thread and back. (An instance has one handle, or two on a GPU: see
//! [`Handles`].) One request that makes the model raise doesn't take its neighbours with it: a failed batch is run again one by one.
mod driver;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

use cresset_proto::tensor::Tensor;
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::oneshot};

use self::driver::{Cut, Driver};
pub use crate::batching::Bounds;
use crate::{
    admission::Admitted,
    batch::{answers, assemble, shape_class},
    batching::{Decision, Dropped, Full, Handles, Line, Ordering, Pace, Waiting},
    contract::Contract,
    engine::{
        EngineError, Model, Outputs, Timing,
        device::{PlacedModel, Turn},
    },
    error::PredictError,
    metrics::ModelMetrics,
    statistics::Pending,
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
pub struct ModelQueue {
    contract: Arc<Contract>,
    bounds: Bounds,
    metrics: ModelMetrics,
    /// The handles of all instances.
    handles: Vec<PlacedModel>,
    /// For each the other one of its instance.
    partners: Vec<Option<usize>>,
    instances: u64,
    waiting: Mutex<State>,
    /// What each handle runs at the moment.
    running: Vec<Mutex<Running>>,
    /// How long batches run of late, in µs; 0 before the first.
    batch_us: AtomicU64,
    /// Callers that have gone since the line was last searched for them.
    gone: AtomicU64,
    ordering: Mutex<Ordering<(Reply, Result<Answered, PredictError>)>>,
    origin: Instant,
    /// For waking instances at a time.
    runtime: Handle,
}

impl std::fmt::Debug for ModelQueue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelQueue").field("model", &self.contract.name).finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct State {
    line: Line<Entry>,
    next_number: u64,
    handles: Handles,
    /// When a handle will be woken to look again.
    alarm: Option<Instant>,
    /// Why nothing is taken any more.
    closed: Option<Closed>,
}

impl State {
    /// Takes an idle handle that would find work.
    fn wake(&mut self, contract: &Contract) -> Option<usize> {
        let is_full = self.line.is_full(contract.batch_rows_max);
        self.handles.wake(is_full)
    }
}

/// What a handle runs, where it can be answered if the handle never comes back.
#[derive(Debug, Default)]
struct Running {
    batch: Vec<Entry>,
    /// Taken from the queue with it, to be run after it.
    rest: Vec<Entry>,
}

#[derive(Debug, Clone)]
enum Closed {
    Unloaded,
    Lost(EngineError),
}

#[derive(Debug)]
struct Entry {
    admitted: Admitted,
    arrived: Instant,
    /// Position among all requests of the model.
    number: u64,
    /// Counts it while it waits.
    pending: Option<Pending>,
    reply: Reply,
}

/// Whoever waits for an answer.
struct Caller<'a> {
    gone: &'a AtomicU64,
    waits: bool,
}

impl Drop for Caller<'_> {
    fn drop(&mut self) {
        if self.waits {
            self.gone.fetch_add(1, Relaxed);
        }
    }
}

impl ModelQueue {
    /// A queue in front of these instances, each with its handles, on the runtime that this is called on.
    pub fn start(contract: Arc<Contract>, instances: Vec<Vec<PlacedModel>>, bounds: Bounds, metrics: ModelMetrics) -> Arc<Self> {
        let of_handle = |(instance, handles): (usize, &Vec<PlacedModel>)| std::iter::repeat_n(instance, handles.len());
        let handles = Handles::new(&instances.iter().enumerate().flat_map(of_handle).collect::<Vec<_>>());
        let partners = (0..instances.iter().map(Vec::len).sum()).map(|handle| handles.partner(handle)).collect();
        let state = State { line: Line::default(), next_number: 0, handles, alarm: None, closed: None };
        let count = instances.len() as u64;
        let handles: Vec<PlacedModel> = instances.into_iter().flatten().collect();
        let running = handles.iter().map(|_| Mutex::default()).collect();
        let queue = Arc::new(Self {
            contract,
            bounds,
            metrics,
            handles,
            partners,
            instances: count,
            waiting: Mutex::new(state),
            running,
            batch_us: 0.into(),
            gone: 0.into(),
            ordering: Mutex::default(),
            origin: Instant::now(),
            runtime: Handle::current(),
        });
        for (handle, model) in queue.handles.iter().enumerate() {
            let queue = Arc::downgrade(&queue);
            model.thread().on_fence(move |why| {
                if let Some(queue) = queue.upgrade() {
                    queue.abandon(handle, Some(why));
                }
            });
        }
        queue
    }

    /// Waits in the queue and for the answer. Dropping the future takes the request out of the queue.
    ///
    /// # Errors
    /// [`PredictError`].
    pub async fn run(self: &Arc<Self>, admitted: Admitted, terms: Terms) -> Result<Answered, PredictError> {
        let (reply, answer) = oneshot::channel();
        self.enter(admitted, terms, reply)?;
        // If the caller goes, it is counted after the reply is closed.
        let mut caller = Caller { gone: &self.gone, waits: true };
        let answer = answer.await;
        caller.waits = false;
        answer.unwrap_or_else(|_| Err(PredictError::Unloaded(self.contract.name.clone())))
    }

    fn enter(self: &Arc<Self>, admitted: Admitted, terms: Terms, reply: Reply) -> Result<(), PredictError> {
        let level = self.contract.queueing.level(terms.priority);
        let arrived = Instant::now();
        let arrived_us = self.us(arrived);
        let policy = self.contract.queueing.policy(level);
        let waiting = Waiting {
            arrived_us,
            rows: admitted.rows,
            bytes: admitted.bytes,
            shape_class: shape_class(&self.contract, &admitted),
            level,
            times_out_us: policy.timeout_us(terms.timeout_us).map(|timeout_us| arrived_us.saturating_add(timeout_us)),
            deadline_us: terms.deadline.map(|at| self.us(at)),
        };
        let pending = Some(self.metrics.statistics.pending());
        let mut entry = Some(Entry { admitted, arrived, number: 0, pending, reply });
        let mut state = self.waiting.lock();
        let mut swept = Vec::new();
        let mut taken = self.take_in(&mut state, waiting, &mut entry);
        // Refused for others who have gone: once more without them.
        if taken.is_err() && self.gone.swap(0, Relaxed) > 0 {
            swept = state.line.sweep(|entry| !entry.reply.is_closed());
            taken = self.take_in(&mut state, waiting, &mut entry);
        }
        self.show_length(&state);
        let idle = if taken.is_ok() { state.wake(&self.contract) } else { None };
        drop(state);
        for entry in swept {
            self.settle(entry, Err(PredictError::Deadline));
        }
        if let Some(handle) = idle {
            self.wake(handle);
        }
        taken
    }

    /// Takes a request into the line, or leaves it where it is and says why.
    fn take_in(&self, state: &mut State, waiting: Waiting, entry: &mut Option<Entry>) -> Result<(), PredictError> {
        let model = || self.contract.name.clone();
        if let Some(closed) = &state.closed {
            return Err(self.closed_error(closed));
        }
        // What can't be answered in time had better hear so at once, while there is time to go elsewhere; and behind it
        // others would be answered too late as well.
        if let Some(deadline_us) = waiting.deadline_us
            && let Some(pace) = self.pace()
            && let Some(takes_us) = state.line.takes_us(waiting.level, waiting.rows, &pace)
            && waiting.arrived_us.saturating_add(takes_us) > deadline_us
        {
            return Err(PredictError::TooLate { model: model(), takes_ms: takes_us / 1_000, pushback: self.pushback() });
        }
        let Some(mut taken) = entry.take() else { return Ok(()) };
        taken.number = state.next_number;
        let policy = self.contract.queueing.policy(waiting.level);
        let Err((full, refused)) = state.line.push(waiting, taken, policy, &self.bounds) else {
            state.next_number += 1;
            return Ok(());
        };
        *entry = Some(refused);
        let pushback = self.pushback();
        Err(match full {
            Full::Requests(requests_max) => PredictError::QueueFull { model: model(), requests_max, pushback },
            Full::Bytes(bytes_max) => PredictError::QueueBytesFull { model: model(), bytes_max, pushback },
        })
    }

    /// How fast the line moves; `None` before the first batch.
    fn pace(&self) -> Option<Pace> {
        let batch_us = self.batch_us.load(Relaxed);
        let pace = Pace { batch_us, rows_max: self.contract.batch_rows_max, instances: self.instances };
        (batch_us > 0).then_some(pace)
    }

    /// When a full queue may have room: once the next batch is cut. A ms at least, and a second at most.
    fn pushback(&self) -> Duration {
        Duration::from_micros(self.batch_us.load(Relaxed).clamp(1_000, 1_000_000))
    }

    /// Has a handle look for work until there is none.
    fn wake(self: &Arc<Self>, handle: usize) {
        if let Some(model) = self.handles.get(handle) {
            let mut driver = Driver::new(self, handle);
            model.drive(move |model| driver.turn(model));
        }
    }

    /// Wakes a handle at a time, unless one is woken before that anyway.
    fn wake_at(self: &Arc<Self>, at: Instant) {
        let mut state = self.waiting.lock();
        if state.alarm.is_some_and(|alarm| alarm <= at) {
            return;
        }
        state.alarm = Some(at);
        drop(state);
        let queue = Arc::downgrade(self);
        self.runtime.spawn(async move {
            tokio::time::sleep_until(at.into()).await;
            let Some(queue) = queue.upgrade() else { return };
            let mut state = queue.waiting.lock();
            if state.alarm == Some(at) {
                state.alarm = None;
            }
            let idle = state.wake(&queue.contract);
            drop(state);
            if let Some(handle) = idle {
                queue.wake(handle);
            }
        });
    }

    /// Refuses what waits and whatever comes.
    pub fn close(&self) {
        self.close_for(Closed::Unloaded);
    }

    fn close_for(&self, why: Closed) {
        let mut state = self.waiting.lock();
        let closed = state.closed.get_or_insert(why).clone();
        let refused = state.line.drain();
        self.show_length(&state);
        drop(state);
        for entry in refused {
            self.settle(entry, Err(self.closed_error(&closed)));
        }
    }

    /// Why the device is lost, if it is.
    fn lost(&self) -> Option<EngineError> {
        match &self.waiting.lock().closed {
            Some(Closed::Lost(lost)) => Some(lost.clone()),
            _ => None,
        }
    }

    fn closed_error(&self, closed: &Closed) -> PredictError {
        match closed {
            Closed::Unloaded => PredictError::Unloaded(self.contract.name.clone()),
            Closed::Lost(source) => self.engine_error(source.clone()),
        }
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

    /// Takes the next batch out of the line for a handle, or notes that it is idle. Expired and abandoned requests go
    /// first: they must not cost the device anything.
    fn cut(&self, handle: usize) -> Cut {
        let mut state = self.waiting.lock();
        let now_us = self.us(Instant::now());
        let queueing = &self.contract.queueing;
        let mut dropped = state.line.expire(queueing, now_us);
        let is_alive = |entry: &Entry| !entry.reply.is_closed();
        let gone = |entry| dropped.push((Dropped::Abandoned, entry));
        let rows_max = self.contract.batch_rows_max;
        let decision = if state.handles.may_cut(handle, state.line.is_full(rows_max)) {
            state.line.next(rows_max, queueing, now_us, is_alive, gone)
        } else {
            Decision::Idle
        };
        if !matches!(decision, Decision::Cut(_)) {
            // Under the same lock as the decision: whoever comes next finds the handle idle and wakes it.
            state.handles.rest(handle);
        }
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

    /// Runs a batch and answers its requests. On the device's thread.
    fn run_batch(&self, model: &mut dyn Model, handle: usize, mut batch: Vec<Entry>) -> Turn {
        batch.iter_mut().for_each(|entry| entry.pending = None);
        let mut rest = Vec::new();
        loop {
            let Some((ran, result)) = self.infer(model, handle, batch, &mut rest) else { return self.gone(handle) };
            match result {
                Ok(outputs) => self.deliver(ran, &outputs),
                Err(EngineError::DeviceLost(why)) => return self.lose(ran.into_iter().chain(rest.into_iter().rev()), why),
                // The fault may be one request's alone.
                Err(_) if ran.len() > 1 => rest = ran.into_iter().rev().collect(),
                Err(source) => {
                    for entry in ran {
                        self.settle(entry, Err(self.engine_error(source.clone())));
                    }
                }
            }
            let Some(next) = rest.pop() else { return Turn::Again };
            batch = vec![next];
            // Each call has its own time.
            if let Some(handle) = self.handles.get(handle) {
                handle.thread().lap();
            }
        }
    }

    /// Runs the model on a batch, which lies where [`abandon`](Self::abandon) finds it meanwhile; `None` if that happened.
    fn infer(
        &self,
        model: &mut dyn Model,
        handle: usize,
        batch: Vec<Entry>,
        rest: &mut Vec<Entry>,
    ) -> Option<(Vec<Entry>, Result<Outputs, EngineError>)> {
        let place = self.running.get(handle)?;
        let inputs = assemble(&self.contract, &admitted(&batch));
        *place.lock() = Running { batch, rest: std::mem::take(rest) };
        // A partner that is given up is lost first, and then this batch is looked for: one of both sees the other. Without this, it
        // would wait for a turn that never comes.
        let result = match self.partner(handle).filter(|partner| partner.thread().is_lost()) {
            Some(partner) => Err(partner.thread().lost()),
            None => model.infer(&inputs),
        };
        let ran = std::mem::take(&mut *place.lock());
        *rest = ran.rest;
        (!ran.batch.is_empty()).then_some((ran.batch, result))
    }

    /// The other handle of the same instance.
    fn partner(&self, handle: usize) -> Option<&PlacedModel> {
        self.handles.get(self.partners.get(handle).copied().flatten()?)
    }

    /// The handle came back after it had been given up.
    fn gone(&self, handle: usize) -> Turn {
        match self.lost().or_else(|| Some(self.handles.get(handle)?.thread().lost())) {
            Some(EngineError::DeviceLost(why)) => Turn::Lost(why),
            _ => Turn::Done,
        }
    }

    /// Answers for a handle that won't: whoever it ran alone `overran`; of several, each is suspect. What its partner has waits
    /// for it, and finds the device lost, as does what waits in the line.
    fn abandon(&self, handle: usize, overran: Option<&str>) {
        let (Some(model), Some(running)) = (self.handles.get(handle), self.running.get(handle)) else { return };
        let lost = self.lost().unwrap_or_else(|| model.thread().lost());
        self.close_for(Closed::Lost(lost.clone()));
        let Running { batch, rest } = std::mem::take(&mut *running.lock());
        let partner = self.partners.get(handle).copied().flatten().and_then(|partner| self.running.get(partner));
        if let Some(Running { batch, rest }) = partner.map(|running| std::mem::take(&mut *running.lock())) {
            for entry in batch.into_iter().chain(rest) {
                self.settle(entry, Err(self.engine_error(lost.clone())));
            }
        }
        let requests = batch.len();
        for entry in batch {
            let error = match overran {
                Some(why) if requests == 1 => self.engine_error(EngineError::Overran(why.to_owned())),
                _ => PredictError::Suspect { model: self.contract.name.clone(), source: lost.clone(), requests },
            };
            self.settle(entry, Err(error));
        }
        for entry in rest {
            self.settle(entry, Err(self.engine_error(lost.clone())));
        }
    }

    fn lose(&self, batch: impl Iterator<Item = Entry>, why: String) -> Turn {
        let lost = EngineError::DeviceLost(why.clone());
        for entry in batch {
            self.settle(entry, Err(self.engine_error(lost.clone())));
        }
        self.close_for(Closed::Lost(lost));
        Turn::Lost(why)
    }

    /// Answers each request of a batch with its share of the results.
    fn deliver(&self, batch: Vec<Entry>, outputs: &Outputs) {
        let rows: usize = batch.iter().map(|entry| entry.admitted.rows).sum();
        let took_us = u64::try_from(outputs.timing.total().as_micros()).unwrap_or(u64::MAX);
        let before_us = self.batch_us.load(Relaxed);
        self.batch_us.store(Pace::smoothed_us(before_us, took_us), Relaxed);
        self.metrics.batch(rows, &outputs.timing);
        let answers = answers(&self.contract, &admitted(&batch), outputs);
        for (entry, answer) in batch.into_iter().zip(answers) {
            let queued = outputs.timing.began.saturating_duration_since(entry.arrived);
            self.settle(entry, answer.map(|tensors| Answered { outputs: tensors, queued, timing: outputs.timing }));
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
        for (reply, answer) in ordering.finish(entry.number, (entry.reply, answer)) {
            let _ = reply.send(answer);
        }
    }

    fn engine_error(&self, source: EngineError) -> PredictError {
        PredictError::Engine { model: self.contract.name.clone(), source }
    }
}

fn admitted(batch: &[Entry]) -> Vec<&Admitted> {
    batch.iter().map(|entry| &entry.admitted).collect()
}
