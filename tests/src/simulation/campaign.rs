//! Many seeds at once, on every core.
use std::{
    num::NonZero,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use super::{Mutant, Report, Scenario, run};

/// What came of many seeds.
#[derive(Debug, Clone, Default)]
pub struct Campaign {
    /// Seeds that were run to their end.
    pub seeds: u64,
    /// Virtual seconds, all together.
    pub simulated_seconds: u64,
    /// Operations that clients had answered.
    pub answered: u64,
    /// Lives of coordinators that ended.
    pub crashes: u64,
    /// Changes of the members that were made.
    pub member_changes: u64,
    /// Seeds that found something, in order, with what it was.
    pub violations: Vec<(u64, String)>,
    /// True time that it took.
    pub took: Duration,
}

impl Campaign {
    /// Virtual hours.
    pub fn simulated_hours(&self) -> f64 {
        self.simulated_seconds as f64 / 3_600.0
    }

    /// Virtual hours for each minute of true time on each core.
    pub fn hours_per_core_minute(&self) -> f64 {
        self.simulated_hours() / (self.took.as_secs_f64() / 60.0) / cores() as f64
    }

    fn add(&mut self, seed: u64, report: Report) {
        self.seeds += 1;
        self.simulated_seconds += report.seconds;
        self.answered += report.answered;
        self.crashes += report.crashes;
        self.member_changes += report.member_changes;
        self.violations.extend(report.violation.map(|violation| (seed, violation)));
    }
}

fn cores() -> usize {
    thread::available_parallelism().map_or(1, NonZero::get)
}

/// Runs the seeds from `first`, `count` of them, each under its own profile.
pub fn healthy(first: u64, count: u64) -> Campaign {
    campaign(first, count, None, false)
}

/// Plants a bug and runs seeds from `first` until one finds it, at most `count`.
pub fn until_found(mutant: Mutant, first: u64, count: u64) -> Campaign {
    campaign(first, count, Some(mutant), true)
}

fn campaign(first: u64, count: u64, mutant: Option<Mutant>, stop_early: bool) -> Campaign {
    let begun = Instant::now();
    let next = AtomicU64::new(first);
    let end = AtomicU64::new(first.saturating_add(count));
    let found = Mutex::new(Campaign::default());
    thread::scope(|scope| {
        for _ in 0..cores() {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= end.load(Ordering::Relaxed) {
                        return;
                    }
                    let report = run(Scenario { mutant, ..Scenario::new(seed) });
                    if stop_early && report.violation.is_some() {
                        // Seeds before this one are still run, so that the first that finds it is the first.
                        end.fetch_min(seed, Ordering::Relaxed);
                    }
                    // A panic inside a run was caught there: nothing here leaves the lock poisoned.
                    found.lock().unwrap_or_else(std::sync::PoisonError::into_inner).add(seed, report);
                }
            });
        }
    });
    let mut campaign = found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
    campaign.violations.sort();
    campaign.took = begun.elapsed();
    campaign
}
