//! The devices of this worker, watched: what runs on them, how long, and whether they can be trusted.
//!
//! What is decided is decided in [`health`](crate::health); here are the clock, the threads and the consequences. A device
//! that is lost, or a call that runs longer than its model may, costs this process its life: the worker hands over and
//! starts again.
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::{
    contract::Contract,
    engine::{
        Device, Engine, EngineError, Model,
        device::{DeviceThread, PlacedModel, ThreadWatch},
    },
    health::{Next, Pulse, overrun},
    metrics,
};

/// How often the devices are looked at. A call that runs too long is noticed so much later.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// The devices of this worker.
pub struct Devices {
    /// One for each device, for canaries; models have threads of their own.
    threads: Vec<DeviceThread>,
    pulses: Mutex<BTreeMap<Device, Pulse>>,
    placed: Mutex<Vec<Placed>>,
    /// Whether any device is fenced: all that a request looks at as a rule.
    any_fenced: AtomicBool,
    execution_max_ms: AtomicU64,
    intra_op_threads: AtomicU16,
    given_up: CancellationToken,
    origin: Instant,
}

/// A model's instance, on a thread of its own.
struct Placed {
    model: String,
    thread: ThreadWatch,
    limit: Option<Duration>,
}

impl Devices {
    /// These devices, all of them trusted.
    pub fn new(threads: Vec<DeviceThread>) -> Self {
        let pulses = threads.iter().map(|thread| (thread.device(), Pulse::new(0))).collect();
        for thread in &threads {
            metrics::device_healthy(thread.device(), true);
        }
        Self {
            threads,
            pulses: Mutex::new(pulses),
            placed: Mutex::default(),
            any_fenced: false.into(),
            execution_max_ms: 0.into(),
            intra_op_threads: 1.into(),
            given_up: CancellationToken::new(),
            origin: Instant::now(),
        }
    }

    /// How long a call of a model may run whose configuration doesn't say, in ms; 0 for any time.
    pub fn set_execution_max_ms(&self, execution_max_ms: u64) {
        self.execution_max_ms.store(execution_max_ms, Ordering::Relaxed);
    }

    /// How many threads compute at a time, where models compute on a processor; the instances of a model share them.
    pub fn set_intra_op_threads(&self, threads: u16) {
        self.intra_op_threads.store(threads, Ordering::Relaxed);
    }

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = Device> {
        self.threads.iter().map(DeviceThread::device)
    }

    /// Gives a loaded model a thread of its own on a device.
    ///
    /// # Errors
    /// What the system says when it has no thread left.
    pub fn place(
        &self,
        device: Device,
        model: Box<dyn Model>,
        contract: &Contract,
        engine: Arc<dyn Engine>,
    ) -> std::io::Result<PlacedModel> {
        let threads = contract.intra_op_threads(self.intra_op_threads.load(Ordering::Relaxed));
        let thread = DeviceThread::spawn_with(device, move || {
            if let Err(error) = engine.set_intra_op_threads(threads) {
                tracing::warn!(%error, threads, "a model's thread computes with as many threads as it likes");
            }
        })?;
        let limit_ms = contract.execution_max_ms().unwrap_or_else(|| self.execution_max_ms.load(Ordering::Relaxed));
        let limit = (limit_ms > 0).then(|| Duration::from_millis(limit_ms));
        self.placed.lock().push(Placed { model: contract.name.clone(), thread: thread.watch(), limit });
        Ok(thread.place(model))
    }

    /// Why one of these devices is fenced, if one is.
    pub fn fenced(&self, devices: &[Device]) -> Option<String> {
        if !self.any_fenced.load(Ordering::Relaxed) {
            return None;
        }
        let pulses = self.pulses.lock();
        let why = devices.iter().find_map(|device| Some((device, pulses.get(device)?.fenced()?)));
        why.map(|(device, why)| format!("{device} is fenced: {why}"))
    }

    /// Cancelled when a device can only be used again by a new process.
    pub fn given_up(&self) -> &CancellationToken {
        &self.given_up
    }

    /// Watches the devices for ever, and says when one of them was fenced or is trusted again.
    pub async fn watch(self: Arc<Self>, engine: Arc<dyn Engine>, changed: impl Fn() + Send + Sync + 'static) {
        let changed: Arc<dyn Fn() + Send + Sync> = Arc::new(changed);
        let mut ticks = interval(LOOK_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let before = self.view();
            for device in self.look() {
                let (this, engine, changed) = (Arc::clone(&self), Arc::clone(&engine), Arc::clone(&changed));
                tokio::spawn(async move {
                    let before = this.view();
                    this.try_device(device, engine).await;
                    this.tell(&before, &*changed);
                });
            }
            self.tell(&before, &*changed);
        }
    }

    /// Gives up what has run too long, notes what was lost, and says which devices should be tried now.
    fn look(&self) -> Vec<Device> {
        let mut work: BTreeMap<Device, (bool, u64)> = BTreeMap::new();
        let mut lost: Vec<(Device, String)> = Vec::new();
        let mut placed = self.placed.lock();
        placed.retain(|placed| !placed.thread.is_over());
        for Placed { model, thread, limit } in placed.iter() {
            let running = thread.busy_for();
            if thread.lost().is_none()
                && let Some(why) = overrun(model, running, *limit)
            {
                tracing::error!(device = %thread.device(), model, reason = why, "a call is given up, and the device with it");
                metrics::overrun(model);
                thread.fence(&why);
            }
            lost.extend(thread.lost().map(|why| (thread.device(), why)));
            let (is_busy, total_us) = work.entry(thread.device()).or_default();
            *is_busy |= running.is_some();
            *total_us += u64::try_from(thread.busy_total().as_micros()).unwrap_or(u64::MAX);
        }
        drop(placed);
        let now_ms = self.now_ms();
        let mut pulses = self.pulses.lock();
        for (device, why) in lost {
            if let Some(pulse) = pulses.get_mut(&device) {
                pulse.lose(why);
                self.given_up.cancel();
            }
        }
        let due = pulses.iter_mut().filter_map(|(device, pulse)| {
            let (is_busy, total_us) = work.get(device).copied().unwrap_or_default();
            (pulse.look(now_ms, is_busy, total_us) == Next::SendCanary).then_some(*device)
        });
        due.collect()
    }

    /// Sends a canary, on the device's own thread.
    async fn try_device(&self, device: Device, engine: Arc<dyn Engine>) {
        let Some(thread) = self.threads.iter().find(|thread| thread.device() == device) else { return };
        let result = match thread.slot().await {
            Ok(slot) => slot.check(move || engine.try_device(device)).await,
            Err(error) => Err(error),
        };
        metrics::canary(device, result.is_ok());
        let mut pulses = self.pulses.lock();
        let Some(pulse) = pulses.get_mut(&device) else { return };
        match result {
            Err(EngineError::DeviceLost(why)) => {
                pulse.lose(why);
                self.given_up.cancel();
            }
            result => pulse.sang(self.now_ms(), result.map_err(|error| error.to_string())),
        }
    }

    fn view(&self) -> Vec<(Device, Option<String>)> {
        self.pulses.lock().iter().map(|(device, pulse)| (*device, pulse.fenced().map(str::to_owned))).collect()
    }

    fn tell(&self, before: &[(Device, Option<String>)], changed: &(dyn Fn() + Send + Sync)) {
        let after = self.view();
        if after == before {
            return;
        }
        for (device, fenced) in &after {
            metrics::device_healthy(*device, fenced.is_none());
            match fenced {
                Some(reason) => tracing::error!(%device, reason, "a device is fenced"),
                None => tracing::info!(%device, "a device is trusted"),
            }
        }
        self.any_fenced.store(after.iter().any(|(_, fenced)| fenced.is_some()), Ordering::Relaxed);
        changed();
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}
