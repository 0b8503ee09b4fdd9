//! Turns to compute, for the handles of one instance on a GPU.
//!
//! An instance has two handles there, each on a thread of its own (double buffering): while one computes, the other brings its
//! inputs to the GPU, or its results back. Only one of them computes at a time, so a model that keeps something inside sees one call
//! after the other, as anywhere.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};

use super::device::JobClock;

/// The turns of one instance, as one of its handles sees them.
#[derive(Default)]
pub struct Turns {
    turn: Arc<Mutex<()>>,
    clock: Option<JobClock>,
}

/// A handle's turn to compute; dropping it gives the turn to whoever waits.
pub struct Turn<'a> {
    guard: Option<MutexGuard<'a, ()>>,
    /// How long it was waited for.
    pub waited: Duration,
}

impl Turns {
    /// The same turns, for another handle.
    pub fn beside(&self) -> Self {
        Self { turn: Arc::clone(&self.turn), clock: None }
    }

    /// From here on this clock stands still while the handle waits for its turn, since what it waits for has a limit of its own,
    /// and begins anew with the turn.
    pub fn set_clock(&mut self, clock: JobClock) {
        self.clock = Some(clock);
    }

    /// Waits for the handle's turn.
    pub fn take(&self) -> Turn<'_> {
        if let Some(clock) = &self.clock {
            clock.stop();
        }
        let since = Instant::now();
        let (guard, waited) = match self.turn.try_lock() {
            Some(guard) => (guard, Duration::ZERO),
            None => (self.turn.lock(), since.elapsed()),
        };
        if let Some(clock) = &self.clock {
            clock.start();
        }
        Turn { guard: Some(guard), waited }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some(guard) = self.guard.take() {
            // Without this, a handle that comes back at once could take turn after turn.
            MutexGuard::unlock_fair(guard);
        }
    }
}
