//! What a router did beside sending requests, for whoever shows it: all lanes of a router count together.
use std::sync::atomic::{AtomicU64, Ordering};

use crate::ejection::Cause;

/// Counters of one router, since it began.
#[derive(Debug, Default)]
pub struct Counts {
    silence: AtomicU64,
    slow: AtomicU64,
    failures: AtomicU64,
    canary: AtomicU64,
    hedges: AtomicU64,
    hedges_won: AtomicU64,
}

impl Counts {
    pub(super) fn ejected(&self, cause: Cause) {
        self.of(cause).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn hedged(&self) {
        self.hedges.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn hedge_won(&self) {
        self.hedges_won.fetch_add(1, Ordering::Relaxed);
    }

    /// Second copies of requests that took long.
    pub fn hedges(&self) -> u64 {
        self.hedges.load(Ordering::Relaxed)
    }

    /// Those that answered first.
    pub fn hedges_won(&self) -> u64 {
        self.hedges_won.load(Ordering::Relaxed)
    }

    /// How often a replica was taken out for this cause.
    pub fn ejections(&self, cause: Cause) -> u64 {
        self.of(cause).load(Ordering::Relaxed)
    }

    fn of(&self, cause: Cause) -> &AtomicU64 {
        match cause {
            Cause::Silence => &self.silence,
            Cause::Slow => &self.slow,
            Cause::Failures => &self.failures,
            Cause::Canary => &self.canary,
        }
    }
}
