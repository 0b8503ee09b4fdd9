//! The one thread that runs everything on a device.
//!
//! Jobs reach it in two ways. A queue of requests [drives](PlacedModel::drive) its model: the thread itself asks for the
//! next batch as soon as it has finished one, so a batch is cut as late as possible and nobody has to be woken in between.
//! Everything else takes a [`Slot`]: while one such job runs, the next is ready, and whoever has a third waits. Loading
//! happens on the caller's thread and freeing on a thread of its own: neither holds up a job.
//!
//! Absent on purpose: queues, priorities and deadlines, which belong to whoever drives or waits.

mod fence;
mod garbage;

use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot, watch};
use tokio_util::sync::WaitForCancellationFutureOwned;

use self::fence::Shared;
pub use self::fence::{DeviceHealth, JobClock, ThreadWatch};
pub use self::garbage::freed;
use super::{Device, EngineError, Generation, InputParts, Model, Outputs, SequenceModel, Signature, short_message};

/// Jobs in slots that are ready while one runs.
const READY_JOBS_MAX: usize = 1;
/// Deeply nested modules recurse; the default of 2 MiB is a page fault away from the end.
const STACK_BYTES: usize = 16 << 20;

/// A job returns the reason if the device is lost after it.
type Job = Box<dyn FnOnce() -> Option<String> + Send>;

/// A handle to a device's thread; clones are handles to the same one. The thread ends when the last
/// handle, and the last model placed on it, is dropped.
#[derive(Clone)]
pub struct DeviceThread {
    /// Bounded by whoever sends: one job for each slot, and one for each driver.
    jobs: mpsc::UnboundedSender<Job>,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for DeviceThread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceThread").field("device", &self.device()).finish_non_exhaustive()
    }
}

impl DeviceThread {
    /// Starts the thread of a device.
    ///
    /// # Errors
    /// What the system says when it has no thread left.
    pub fn spawn(device: Device) -> std::io::Result<Self> {
        Self::spawn_with(device, || {})
    }

    /// [`spawn`](Self::spawn) with something that the thread does before anything else.
    ///
    /// # Errors
    /// As [`spawn`](Self::spawn).
    pub fn spawn_with(device: Device, begin: impl FnOnce() + Send + 'static) -> std::io::Result<Self> {
        let (jobs, inbox) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new(device, READY_JOBS_MAX));
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new().name(format!("engine-{device}")).stack_size(STACK_BYTES).spawn(move || {
            begin();
            serve(inbox, &theirs);
        })?;
        Ok(Self { jobs, shared })
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    /// The device's health, now and when it changes.
    pub fn health(&self) -> watch::Receiver<DeviceHealth> {
        self.shared.health.subscribe()
    }

    /// How long the job that runs now has been running; `None` if the device is idle. A job that runs
    /// for minutes is a device that hangs: nothing can stop it, but somebody should be told.
    pub fn busy_for(&self) -> Option<Duration> {
        self.shared.clock.busy_for()
    }

    /// How long jobs have run since the start, all of them together, without the one that runs now.
    pub fn busy_total(&self) -> Duration {
        self.shared.clock.total()
    }

    /// The running job begins another piece of work: [`busy_for`](Self::busy_for) counts from here.
    pub fn lap(&self) {
        self.shared.clock.stop();
        self.shared.clock.start();
    }

    /// An eye on this thread that doesn't keep it alive.
    pub fn watch(&self) -> ThreadWatch {
        ThreadWatch::new(Arc::clone(&self.shared), self.jobs.downgrade())
    }

    /// Has `hook` called when the thread is given up, with the reason.
    pub fn on_fence(&self, hook: impl FnOnce(&str) + Send + 'static) {
        self.shared.hooks.lock().push(Box::new(hook));
    }

    /// Puts a loaded model in this thread's care.
    pub fn place(&self, mut model: Box<dyn Model>) -> PlacedModel {
        model.set_clock(JobClock::new(Arc::clone(&self.shared)));
        let (memory_bytes, signature) = (model.memory_bytes(), model.signature().clone());
        PlacedModel {
            thread: self.clone(),
            model: Arc::new(Kept::large(model)),
            facts: Arc::new(Facts { memory_bytes, signature }),
        }
    }

    /// Waits until the device can take a job. First come, first served.
    ///
    /// # Errors
    /// [`EngineError::DeviceLost`].
    pub async fn slot(&self) -> Result<Slot, EngineError> {
        // It is closed when the thread is given up.
        let permit = Arc::clone(&self.shared.room).acquire_owned().await.map_err(|_| self.lost())?;
        if self.shared.is_lost() {
            return Err(self.lost());
        }
        Ok(Slot { permit, jobs: self.jobs.clone(), shared: Arc::clone(&self.shared) })
    }

    /// Whether it takes no more jobs.
    pub fn is_lost(&self) -> bool {
        self.shared.is_lost()
    }

    /// The error of a device that is lost.
    pub fn lost(&self) -> EngineError {
        self.shared.lost()
    }
}

/// The thread's loop. After the device is lost, jobs are dropped unrun, which their callers notice.
fn serve(mut inbox: mpsc::UnboundedReceiver<Job>, shared: &Shared) {
    while let Some(job) = inbox.blocking_recv() {
        if shared.is_lost() {
            continue;
        }
        shared.clock.start();
        // A job that panics leaves only its own model in doubt, but a panic here is a bug of ours or a
        // device gone mad: either way this device's answers are not to be trusted any more.
        let verdict = catch_unwind(AssertUnwindSafe(job)).unwrap_or_else(|panic| Some(panic_message(&*panic)));
        shared.clock.stop();
        if let Some(why) = verdict {
            shared.lose(why);
        }
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("of an unknown kind");
    short_message(&format!("a job panicked: {text}"))
}

/// Room for one job on a device. Dropping it unused gives the room to the next in line.
pub struct Slot {
    permit: OwnedSemaphorePermit,
    jobs: mpsc::UnboundedSender<Job>,
    shared: Arc<Shared>,
}

impl Slot {
    /// Runs `check` on the thread: whether the device can still compute.
    pub fn check(self, check: impl FnOnce() -> Result<(), EngineError> + Send + 'static) -> Answer<()> {
        self.submit(IfAbandoned::Run, check)
    }

    /// As [`Model::infer`]. If the answer is dropped before the job begins, it is not run.
    pub fn infer(self, model: &PlacedModel, inputs: Vec<InputParts>) -> Answer<Outputs> {
        let kept = Arc::clone(&model.model);
        self.submit(IfAbandoned::Skip, move || kept.with(|model| model.infer(&inputs)))
    }

    /// As [`Model::open_sequence`].
    pub fn open_sequence(self, model: &PlacedModel) -> Answer<PlacedSequence> {
        let (kept, thread) = (Arc::clone(&model.model), model.thread.clone());
        self.submit(IfAbandoned::Skip, move || {
            let sequence = kept.with(|model| model.open_sequence())?;
            Ok(PlacedSequence { thread, sequence: Arc::new(Kept::small(sequence)) })
        })
    }

    /// As [`SequenceModel::step`]. It runs even if the answer is dropped: the sequence's next step
    /// has to find this one done.
    pub fn step(self, sequence: &PlacedSequence, inputs: Vec<InputParts>) -> Answer<Outputs> {
        let kept = Arc::clone(&sequence.sequence);
        self.submit(IfAbandoned::Run, move || kept.with(|sequence| sequence.step(&inputs)))
    }

    /// [`SequenceModel::step`], then [`SequenceModel::checkpoint`] if the step succeeded, in one job.
    pub fn step_and_checkpoint(self, sequence: &PlacedSequence, inputs: Vec<InputParts>) -> Answer<SteppedAndSaved> {
        let kept = Arc::clone(&sequence.sequence);
        self.submit(IfAbandoned::Run, move || {
            kept.with(|sequence| {
                let outputs = sequence.step(&inputs)?;
                Ok(SteppedAndSaved { outputs, checkpoint: sequence.checkpoint() })
            })
        })
    }

    /// As [`SequenceModel::checkpoint`].
    pub fn checkpoint(self, sequence: &PlacedSequence) -> Answer<Bytes> {
        let kept = Arc::clone(&sequence.sequence);
        self.submit(IfAbandoned::Skip, move || kept.with(|sequence| sequence.checkpoint()))
    }

    /// As [`SequenceModel::restore`].
    pub fn restore(self, sequence: &PlacedSequence, checkpoint: Bytes) -> Answer<()> {
        let kept = Arc::clone(&sequence.sequence);
        self.submit(IfAbandoned::Run, move || kept.with(|sequence| sequence.restore(&checkpoint)))
    }

    /// As [`Model::open_generation`]. If the answer is dropped before the job begins, it is not run.
    pub fn open_generation(self, model: &PlacedModel, inputs: Vec<InputParts>) -> Answer<PlacedGeneration> {
        let (kept, thread) = (Arc::clone(&model.model), model.thread.clone());
        self.submit(IfAbandoned::Skip, move || {
            let generation = kept.with(|model| model.open_generation(&inputs))?;
            Ok(PlacedGeneration { thread, generation: Arc::new(Kept::small(generation)) })
        })
    }

    /// As [`Generation::next`]. If the answer is dropped before the job begins, it is not run, and the response is the next
    /// one still.
    pub fn next(self, generation: &PlacedGeneration) -> Answer<Option<Outputs>> {
        let kept = Arc::clone(&generation.generation);
        self.submit(IfAbandoned::Skip, move || kept.with(|generation| generation.next()))
    }

    fn submit<T: Send + 'static>(
        self,
        abandoned: IfAbandoned,
        run: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
    ) -> Answer<T> {
        let (answer, receiver) = oneshot::channel();
        let permit = self.permit;
        let begun = Arc::new(AtomicBool::new(false));
        let begins = Arc::clone(&begun);
        let job: Job = Box::new(move || {
            // While this runs, the next may get ready.
            drop(permit);
            if abandoned == IfAbandoned::Skip && answer.is_closed() {
                return None;
            }
            begins.store(true, Ordering::Relaxed);
            let result = run();
            let lost = match &result {
                Err(EngineError::DeviceLost(why)) => Some(why.clone()),
                _ => None,
            };
            // Nobody may be waiting any more, and that is fine.
            let _ = answer.send(result);
            lost
        });
        // If the thread has ended, the answer's other end goes with the job, and its owner hears of that.
        let _ = self.jobs.send(job);
        let fenced = Box::pin(self.shared.fenced.clone().cancelled_owned());
        Answer { receiver, shared: self.shared, begun, fenced }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum IfAbandoned {
    Skip,
    Run,
}

/// What [`Slot::step_and_checkpoint`] gives.
#[derive(Debug)]
pub struct SteppedAndSaved {
    /// The outputs of the step.
    pub outputs: Outputs,
    /// The state after it; an error here leaves the step valid.
    pub checkpoint: Result<Bytes, EngineError>,
}

/// The answer of a job that has been handed to the device.
#[must_use = "an answer that is dropped abandons its job"]
pub struct Answer<T> {
    receiver: oneshot::Receiver<Result<T, EngineError>>,
    shared: Arc<Shared>,
    begun: Arc<AtomicBool>,
    fenced: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl<T> Future for Answer<T> {
    type Output = Result<T, EngineError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match Pin::new(&mut self.receiver).poll(context) {
            Poll::Ready(Ok(result)) => return Poll::Ready(result),
            // The job was dropped: it panicked, or the device was lost before its turn.
            Poll::Ready(Err(_)) => return Poll::Ready(Err(self.shared.lost())),
            Poll::Pending => {}
        }
        // Nobody waits for a thread that was given up: the job that holds it is to blame, those behind it are not.
        let begun = self.begun.load(Ordering::Relaxed);
        self.fenced.as_mut().poll(context).map(|()| Err(if begun { self.shared.overran() } else { self.shared.lost() }))
    }
}

/// What a driver says after a turn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// There may be more to do.
    Again,
    /// There is nothing to do.
    Done,
    /// The device is lost, for this reason.
    Lost(String),
}

fn drive(
    jobs: mpsc::UnboundedSender<Job>,
    model: Arc<Kept<dyn Model>>,
    mut turn: impl FnMut(&mut dyn Model) -> Turn + Send + 'static,
) {
    let again = jobs.clone();
    let job: Job = Box::new(move || {
        match model.with(|model| Ok(turn(model))) {
            Ok(Turn::Again) => drive(again, model, turn),
            Ok(Turn::Done) | Err(_) => {}
            Ok(Turn::Lost(why)) => return Some(why),
        }
        None
    });
    // If the thread has ended, the driver is dropped, as it is when the device is lost.
    let _ = jobs.send(job);
}

/// A model that runs on a device's thread. Clones are the same model; the last one frees it.
#[derive(Clone)]
pub struct PlacedModel {
    thread: DeviceThread,
    model: Arc<Kept<dyn Model>>,
    facts: Arc<Facts>,
}

struct Facts {
    memory_bytes: u64,
    signature: Signature,
}

impl PlacedModel {
    /// The thread that runs it.
    pub fn thread(&self) -> &DeviceThread {
        &self.thread
    }

    /// As [`Model::memory_bytes`].
    pub fn memory_bytes(&self) -> u64 {
        self.facts.memory_bytes
    }

    /// As [`Model::signature`].
    pub fn signature(&self) -> &Signature {
        &self.facts.signature
    }

    /// Has the thread call `turn` with the model, again and again, until it says that there is nothing to do. Other jobs get
    /// their turns in between. A driver must not be started again before it has ended; when the device is lost, `turn` is
    /// dropped without having said so.
    pub fn drive(&self, turn: impl FnMut(&mut dyn Model) -> Turn + Send + 'static) {
        drive(self.thread.jobs.clone(), Arc::clone(&self.model), turn);
    }

    /// Waits for a slot and runs the model in it.
    ///
    /// # Errors
    /// As [`Model::infer`].
    pub async fn infer(&self, inputs: Vec<InputParts>) -> Result<Outputs, EngineError> {
        self.thread.slot().await?.infer(self, inputs).await
    }

    /// Waits for a slot and gives a request of a decoupled model to it.
    ///
    /// # Errors
    /// As [`Model::open_generation`].
    pub async fn open_generation(&self, inputs: Vec<InputParts>) -> Result<PlacedGeneration, EngineError> {
        self.thread.slot().await?.open_generation(self, inputs).await
    }

    /// Waits for a slot and opens a sequence in it.
    ///
    /// # Errors
    /// As [`Model::open_sequence`].
    pub async fn open_sequence(&self) -> Result<PlacedSequence, EngineError> {
        self.thread.slot().await?.open_sequence(self).await
    }
}

/// A sequence that runs on its model's thread. Its calls have to be made in turn. Dropping it frees it.
pub struct PlacedSequence {
    thread: DeviceThread,
    sequence: Arc<Kept<dyn SequenceModel>>,
}

impl PlacedSequence {
    /// The thread that runs it.
    pub fn thread(&self) -> &DeviceThread {
        &self.thread
    }

    /// Waits for a slot and runs the next step in it.
    ///
    /// # Errors
    /// As [`SequenceModel::step`].
    pub async fn step(&self, inputs: Vec<InputParts>) -> Result<Outputs, EngineError> {
        self.thread.slot().await?.step(self, inputs).await
    }

    /// Waits for a slot and saves the state in it.
    ///
    /// # Errors
    /// As [`SequenceModel::checkpoint`].
    pub async fn checkpoint(&self) -> Result<Bytes, EngineError> {
        self.thread.slot().await?.checkpoint(self).await
    }

    /// Waits for a slot and puts the sequence into a saved state in it.
    ///
    /// # Errors
    /// As [`SequenceModel::restore`].
    pub async fn restore(&self, checkpoint: Bytes) -> Result<(), EngineError> {
        self.thread.slot().await?.restore(self, checkpoint).await
    }
}

/// The responses to a request of a decoupled model, on its model's thread. Its calls have to be made in turn; every one is a
/// job of its own, so that other work runs in between. Dropping it frees it, also before the last response.
pub struct PlacedGeneration {
    thread: DeviceThread,
    generation: Arc<Kept<dyn Generation>>,
}

impl PlacedGeneration {
    /// The thread that runs it.
    pub fn thread(&self) -> &DeviceThread {
        &self.thread
    }

    /// Waits for a slot and makes the next response in it.
    ///
    /// # Errors
    /// As [`Generation::next`].
    pub async fn next(&self) -> Result<Option<Outputs>, EngineError> {
        self.thread.slot().await?.next(self).await
    }
}

/// Something that only jobs touch and that is freed on the thread for freeing. The lock is never
/// waited for: jobs run one after the other.
struct Kept<T: ?Sized + Send + 'static> {
    value: Option<Mutex<Box<T>>>,
    is_large: bool,
}

impl<T: ?Sized + Send + 'static> Kept<T> {
    /// A model: its weights are in nobody else's hands.
    fn large(value: Box<T>) -> Self {
        Self { value: Some(Mutex::new(value)), is_large: true }
    }

    /// A copy that shares its weights.
    fn small(value: Box<T>) -> Self {
        Self { value: Some(Mutex::new(value)), is_large: false }
    }

    fn with<R>(&self, use_it: impl FnOnce(&mut T) -> Result<R, EngineError>) -> Result<R, EngineError> {
        match &self.value {
            Some(value) => use_it(&mut value.lock()),
            None => Err(EngineError::Failed("the model is being freed".into())),
        }
    }
}

impl<T: ?Sized + Send + 'static> Drop for Kept<T> {
    fn drop(&mut self) {
        if let Some(value) = self.value.take() {
            garbage::free(Box::new(value), self.is_large);
        }
    }
}

#[cfg(test)]
mod tests;
