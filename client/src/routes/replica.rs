//! One life of a worker, and what a router counts of it: all of it without a lock, since every request changes some.
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use cresset_proto::fleet::v1::WorkerRoute;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::ModelRoute;
use crate::{
    balance::{self, SHARE_MIN},
    ejection::{Cause, Event, Peers, Phase, Standing, Verdict},
    latency::{Recent, SLOWNESS_MAX},
};

/// One life of a worker, as a router sees it. Shared by all models that it serves.
#[derive(Debug)]
pub struct Replica {
    /// The worker.
    pub worker_id: String,
    /// Which life of it.
    pub incarnation: u64,
    /// `host:port` of its gRPC service.
    pub address: String,
    /// What it shares its fate with; empty for unknown.
    pub zone: String,
    /// Its number in [`balance`].
    pub(crate) id: u64,
    /// Tells it from every other life that this process ever knew.
    pub(crate) serial: u64,
    in_flight: AtomicU32,
    /// A [`Recent`]: how long its answers take, as a multiple of what is usual for their models.
    slowness: AtomicU64,
    /// On the router's clock, when it was first thought of; 0 before.
    first_seen_ms: AtomicU64,
    /// On the router's clock; 0 when nothing is held against it.
    failing_until_ms: AtomicU64,
    /// On the router's clock in µs, when it last answered in time; 0 before.
    answered_us: AtomicU64,
    /// Locked only when something is held against it.
    standing: Mutex<Standing>,
    /// Whether there is anything in `standing` that an answer would change.
    is_spotless: AtomicBool,
    /// `standing`'s phase: one of [`SERVING`], [`OUT`], [`ON_TRIAL`].
    phase: AtomicU8,
    /// How often it was taken out.
    ejections: AtomicU64,
    /// How often it was taken out for its silence: connections of before aren't used any more.
    silences: AtomicU32,
    ejected: Notify,
    gone: CancellationToken,
}

const SERVING: u8 = 0;
const OUT: u8 = 1;
const ON_TRIAL: u8 = 2;

impl Replica {
    /// A worker's life that nothing is known of yet.
    pub fn new(worker_id: impl Into<String>, incarnation: u64, address: impl Into<String>) -> Self {
        static LIVES: AtomicU64 = AtomicU64::new(0);
        let worker_id = worker_id.into();
        Self {
            id: balance::id_of(&worker_id),
            serial: LIVES.fetch_add(1, Ordering::Relaxed),
            worker_id,
            incarnation,
            address: address.into(),
            zone: String::new(),
            in_flight: AtomicU32::new(0),
            slowness: AtomicU64::new(Recent::default().to_bits()),
            first_seen_ms: AtomicU64::new(0),
            failing_until_ms: AtomicU64::new(0),
            answered_us: AtomicU64::new(0),
            standing: Mutex::default(),
            is_spotless: AtomicBool::new(true),
            phase: AtomicU8::new(SERVING),
            ejections: AtomicU64::new(0),
            silences: AtomicU32::new(0),
            ejected: Notify::new(),
            gone: CancellationToken::new(),
        }
    }

    /// The same worker in a zone.
    #[must_use]
    pub fn in_zone(self, zone: impl Into<String>) -> Self {
        Self { zone: zone.into(), ..self }
    }

    /// Takes note of an answer to a request of `route` that took so long.
    pub(crate) fn note_answer(&self, route: &ModelRoute, took: Duration, now_us: u64) {
        let now_ms = now_us / 1_000;
        self.note_success();
        let took_us = took.as_secs_f32() * 1e6;
        if took_us <= route.patience(now_ms).as_secs_f32() * 1e6 {
            self.answered_us.store(now_us.max(1), Ordering::Relaxed);
            if !self.is_spotless.load(Ordering::Relaxed) {
                self.note(Event::Answered, Peers { replicas: 1, out: 0 }, now_ms, 0.0);
            }
        }
        route.note_longest(took_us, now_ms);
        let usual_us = change(&route.usual_us, |usual| usual.mean(took_us, now_ms)).value().max(1.0);
        let slowness = (took_us / usual_us).min(SLOWNESS_MAX);
        change(&self.slowness, |recent| recent.peak(slowness, now_ms));
    }

    /// How slow it is now, as a multiple of the usual.
    pub(crate) fn slowness(&self, now_ms: u64) -> f32 {
        Recent::from_bits(self.slowness.load(Ordering::Relaxed)).faded(1.0, now_ms)
    }

    /// What part of its due it may get: it grows to 1 during `slow_start` after it was first thought of.
    pub(crate) fn share(&self, slow_start: Duration, now_ms: u64) -> f32 {
        let mut first_ms = self.first_seen_ms.load(Ordering::Relaxed);
        if first_ms == 0 {
            first_ms = now_ms.max(1);
            // Whoever is first is right: they all mean now.
            let _ = self.first_seen_ms.compare_exchange(0, first_ms, Ordering::Relaxed, Ordering::Relaxed);
        }
        let age_ms = now_ms.saturating_sub(first_ms) as f32;
        (age_ms / (slow_start.as_secs_f32() * 1e3).max(1.0)).clamp(SHARE_MIN, 1.0)
    }

    /// Requests that this router has there, over all models.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Holds a failure against the replica until `until_ms` on the router's clock.
    pub(crate) fn note_failure(&self, until_ms: u64) {
        self.failing_until_ms.fetch_max(until_ms, Ordering::Relaxed);
    }

    /// Forgives everything: it has answered.
    pub(crate) fn note_success(&self) {
        if self.failing_until_ms.load(Ordering::Relaxed) != 0 {
            self.failing_until_ms.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_failing(&self, now_ms: u64) -> bool {
        self.failing_until_ms.load(Ordering::Relaxed) > now_ms
    }

    /// Takes note of what was seen of it, and says what follows.
    pub(crate) fn note(&self, event: Event, peers: Peers, now_ms: u64, jitter: f32) -> Verdict {
        let mut standing = self.standing.lock();
        let verdict = standing.on(event, peers, now_ms, jitter);
        self.is_spotless.store(standing.is_spotless(), Ordering::Relaxed);
        let phase = match standing.phase() {
            Phase::Serving => SERVING,
            Phase::Out(_) => OUT,
            Phase::OnTrial => ON_TRIAL,
        };
        self.phase.store(phase, Ordering::Relaxed);
        if let Verdict::Eject { cause, .. } = verdict {
            self.silences.fetch_add(u32::from(cause == Cause::Silence), Ordering::Relaxed);
            self.ejections.fetch_add(1, Ordering::SeqCst);
            self.ejected.notify_waiters();
        }
        if verdict == Verdict::Restore {
            // From the beginning, as a fresh one: what held it back may not be over.
            self.first_seen_ms.store(0, Ordering::Relaxed);
            tracing::info!(worker = %self.worker_id, incarnation = self.incarnation, "a worker is back");
        }
        verdict
    }

    /// Why it is out, if it is.
    pub fn out(&self) -> Option<Cause> {
        if self.phase.load(Ordering::Relaxed) != OUT {
            return None;
        }
        match self.standing.lock().phase() {
            Phase::Out(cause) => Some(cause),
            Phase::Serving | Phase::OnTrial => None,
        }
    }

    /// Whether it should be left alone: it is out, or on trial with a request to show for it.
    pub(crate) fn is_out(&self) -> bool {
        match self.phase.load(Ordering::Relaxed) {
            SERVING => false,
            ON_TRIAL => self.in_flight() > 0,
            _ => true,
        }
    }

    /// Whether it answered in time after this moment.
    pub(crate) fn has_answered_since(&self, since_us: u64) -> bool {
        self.answered_us.load(Ordering::Relaxed) > since_us
    }

    /// How often it was taken out.
    pub(crate) fn ejections(&self) -> u64 {
        self.ejections.load(Ordering::SeqCst)
    }

    pub(crate) fn silences(&self) -> u32 {
        self.silences.load(Ordering::Relaxed)
    }

    /// Ends when it was taken out more often than `seen`.
    pub(crate) async fn ejected(&self, seen: u64) {
        loop {
            let mut news = std::pin::pin!(self.ejected.notified());
            // First listen, then look: what comes in between is heard.
            news.as_mut().enable();
            if self.ejections() > seen {
                return;
            }
            news.await;
        }
    }

    /// Ends when a newer table no longer knows this life of the worker: it was judged dead, or has left.
    pub async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Whether [`gone`](Self::gone) has ended.
    pub fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    /// A newer table no longer knows it.
    pub(super) fn leave(&self) {
        self.gone.cancel();
    }

    /// Whether this is the life that a table tells of.
    pub(super) fn is(&self, route: &WorkerRoute) -> bool {
        self.worker_id == route.worker_id
            && self.incarnation == route.incarnation
            && self.address == route.grpc_address
            && self.zone == route.zone
    }
}

/// Changes a shared [`Recent`] and returns what it is now.
fn change(shared: &AtomicU64, next: impl Fn(Recent) -> Recent) -> Recent {
    let mut bits = shared.load(Ordering::Relaxed);
    loop {
        let newer = next(Recent::from_bits(bits));
        match shared.compare_exchange_weak(bits, newer.to_bits(), Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return newer,
            Err(meanwhile) => bits = meanwhile,
        }
    }
}

/// One request in flight at a replica.
#[derive(Debug)]
pub struct InFlight(Arc<Replica>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}
