//! When requests are due in an open loop. Pure: times are values, chance comes from a seed.

use rand::{Rng, SeedableRng, rngs::StdRng};

/// How the gaps between requests are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Arrivals {
    /// All gaps are equal.
    Constant,
    /// Gaps are exponentially distributed, as those of many users who know nothing of each other.
    Poisson,
}

impl Arrivals {
    /// The word for programs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Constant => "constant",
            Self::Poisson => "poisson",
        }
    }
}

/// The moments at which requests are due, without an end.
///
/// They don't depend on how the server does: a request that is sent late is late by the server's fault or by the
/// generator's, and its latency counts from the moment in here.
#[derive(Debug)]
pub struct Schedule {
    arrivals: Arrivals,
    gap_ns: f64,
    next_ns: f64,
    chance: StdRng,
}

impl Schedule {
    /// `rate` in requests per second, above 0. One of `parts` equal schedules, number `part` from 0, that are `rate`
    /// together.
    pub fn new(arrivals: Arrivals, rate: f64, part: u32, parts: u32, seed: u64) -> Self {
        let parts = parts.max(1);
        let gap_ns = 1e9 / rate * f64::from(parts);
        let mut chance = StdRng::seed_from_u64(seed.wrapping_add(u64::from(part)));
        let next_ns = match arrivals {
            Arrivals::Constant => gap_ns * f64::from(part) / f64::from(parts),
            Arrivals::Poisson => exponential(gap_ns, &mut chance),
        };
        Self { arrivals, gap_ns, next_ns, chance }
    }

    /// When the next request is due, in ns since the start.
    pub fn due_ns(&self) -> u64 {
        self.next_ns as u64
    }

    /// Goes on to the one after.
    pub fn advance(&mut self) {
        self.next_ns += match self.arrivals {
            Arrivals::Constant => self.gap_ns,
            Arrivals::Poisson => exponential(self.gap_ns, &mut self.chance),
        };
    }
}

/// A gap with this mean: the inverse of the distribution, applied to a number between 0 and 1.
fn exponential(mean: f64, chance: &mut StdRng) -> f64 {
    // 1 - [0, 1) is never 0, whose logarithm isn't a number.
    -(1.0 - chance.random::<f64>()).ln() * mean
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first(mut schedule: Schedule, count: usize) -> Vec<u64> {
        let step = |_| {
            let due = schedule.due_ns();
            schedule.advance();
            due
        };
        (0..count).map(step).collect()
    }

    #[test]
    fn constant_gaps_do_not_drift() {
        let due = first(Schedule::new(Arrivals::Constant, 3.0, 0, 1, 7), 30_001);
        assert_eq!(due[0], 0);
        assert!(due[30_000].abs_diff(10_000_000_000_000) < 1_000, "10,000 s for 30,000 requests, not {} ns", due[30_000]);
    }

    #[test]
    fn parts_of_a_constant_schedule_interleave() {
        let mut all: Vec<u64> =
            (0..4).flat_map(|part| first(Schedule::new(Arrivals::Constant, 1_000.0, part, 4, 7), 5)).collect();
        all.sort_unstable();
        assert!(all.windows(2).all(|pair| pair[1] - pair[0] == 1_000_000), "{all:?}");
    }

    #[test]
    fn poisson_gaps_have_their_mean_and_their_spread() {
        let due = first(Schedule::new(Arrivals::Poisson, 1_000.0, 0, 1, 42), 50_001);
        let gaps: Vec<f64> = due.windows(2).map(|pair| (pair[1] - pair[0]) as f64 / 1e6).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let deviation = (gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64).sqrt();
        assert!((mean - 1.0).abs() < 0.03 && (deviation - 1.0).abs() < 0.03, "mean {mean} ms, deviation {deviation} ms");
        assert!(due.windows(2).all(|pair| pair[0] <= pair[1]));
    }

    #[test]
    fn a_seed_repeats_a_schedule_and_parts_differ() {
        let run = |part, seed| first(Schedule::new(Arrivals::Poisson, 10.0, part, 2, seed), 20);
        assert_eq!(run(0, 1), run(0, 1));
        assert_ne!(run(0, 1), run(0, 2));
        assert_ne!(run(0, 1), run(1, 1));
    }
}
