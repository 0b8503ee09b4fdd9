//! What is known of a device's thread from outside: its clock, its health, and the way to give it up.
//!
//! A thread inside libtorch can't be stopped. Giving it up means that whoever waits for it is answered at once, and that it
//! finds nothing more to do if it ever comes back.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Semaphore, mpsc, watch};
use tokio_util::sync::CancellationToken;

use super::super::{Device, EngineError};
use super::Job;

/// Whether a device can be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceHealth {
    /// It takes jobs.
    Ready,
    /// It refuses all further jobs, for this reason, until the process is started again.
    Lost(String),
}

/// Called once, with the reason.
type Hook = Box<dyn FnOnce(&str) + Send>;

/// What the thread shares with its handles.
pub(super) struct Shared {
    pub(super) device: Device,
    pub(super) room: Arc<Semaphore>,
    pub(super) health: watch::Sender<DeviceHealth>,
    pub(super) clock: Clock,
    /// Cancelled when the thread is given up while a job holds it.
    pub(super) fenced: CancellationToken,
    pub(super) hooks: Mutex<Vec<Hook>>,
}

impl Shared {
    pub(super) fn new(device: Device, ready_jobs_max: usize) -> Self {
        Self {
            device,
            room: Arc::new(Semaphore::new(ready_jobs_max)),
            health: watch::channel(DeviceHealth::Ready).0,
            clock: Clock::new(),
            fenced: CancellationToken::new(),
            hooks: Mutex::default(),
        }
    }

    pub(super) fn is_lost(&self) -> bool {
        *self.health.borrow() != DeviceHealth::Ready
    }

    /// Takes no further job; the first reason stays.
    pub(super) fn lose(&self, why: String) {
        self.health.send_if_modified(|health| {
            let is_first = *health == DeviceHealth::Ready;
            if is_first {
                *health = DeviceHealth::Lost(why);
            }
            is_first
        });
    }

    fn why(&self) -> String {
        match &*self.health.borrow() {
            DeviceHealth::Lost(why) => why.clone(),
            DeviceHealth::Ready => "its thread has ended".into(),
        }
    }

    /// The error of what finds the device lost.
    pub(super) fn lost(&self) -> EngineError {
        EngineError::DeviceLost(self.why())
    }

    /// The error of what it was lost with.
    pub(super) fn overran(&self) -> EngineError {
        EngineError::Overran(self.why())
    }
}

/// An eye on a device's thread. It doesn't keep the thread alive.
#[derive(Clone)]
pub struct ThreadWatch {
    shared: Arc<Shared>,
    jobs: mpsc::WeakUnboundedSender<Job>,
}

impl ThreadWatch {
    pub(super) fn new(shared: Arc<Shared>, jobs: mpsc::WeakUnboundedSender<Job>) -> Self {
        Self { shared, jobs }
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.shared.device
    }

    /// How long the job that runs now has been running; `None` between jobs.
    pub fn busy_for(&self) -> Option<Duration> {
        self.shared.clock.busy_for()
    }

    /// How long jobs have run since the start, without the one that runs now.
    pub fn busy_total(&self) -> Duration {
        self.shared.clock.total()
    }

    /// Why it takes no more jobs, if so.
    pub fn lost(&self) -> Option<String> {
        self.shared.is_lost().then(|| self.shared.why())
    }

    /// Whether the thread has ended, or will before it takes another job.
    pub fn is_over(&self) -> bool {
        self.jobs.strong_count() == 0 && self.busy_for().is_none()
    }

    /// Gives the thread up: the job that holds it fails with [`EngineError::Overran`], those that wait with
    /// [`EngineError::DeviceLost`], at once.
    pub fn fence(&self, why: &str) {
        self.shared.lose(why.to_owned());
        self.shared.room.close();
        self.shared.fenced.cancel();
        let hooks = std::mem::take(&mut *self.shared.hooks.lock());
        for hook in hooks {
            hook(why);
        }
    }
}

/// The clock of a thread's jobs, for a job that waits for another thread's.
pub struct JobClock(Arc<Shared>);

impl JobClock {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The job waits: it isn't to blame for the time that passes.
    pub fn stop(&self) {
        self.0.clock.stop();
    }

    /// The job goes on, and has its whole time before it.
    pub fn start(&self) {
        self.0.clock.start();
    }
}

/// When the running job began, and what all earlier ones took.
pub(super) struct Clock {
    origin: Instant,
    /// Microseconds from `origin` plus one; zero while idle.
    started_us: AtomicU64,
    total_us: AtomicU64,
}

impl Clock {
    fn new() -> Self {
        Self { origin: Instant::now(), started_us: AtomicU64::new(0), total_us: AtomicU64::new(0) }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_micros()).unwrap_or(u64::MAX - 1) + 1
    }

    pub(super) fn start(&self) {
        self.started_us.store(self.now_us(), Ordering::Relaxed);
    }

    pub(super) fn stop(&self) {
        let took = self.now_us().saturating_sub(self.started_us.swap(0, Ordering::Relaxed));
        self.total_us.fetch_add(took, Ordering::Relaxed);
    }

    pub(super) fn total(&self) -> Duration {
        Duration::from_micros(self.total_us.load(Ordering::Relaxed))
    }

    pub(super) fn busy_for(&self) -> Option<Duration> {
        let started = self.started_us.load(Ordering::Relaxed);
        (started != 0).then(|| Duration::from_micros(self.now_us().saturating_sub(started)))
    }
}
