//! Rubbish of every kind, for as long as `CRESSET_FUZZ_SECONDS` says (two minutes): requests against a worker with real
//! models, and configurations. Whatever comes in, an answer or an error with a status comes out, no thread panics, and
//! memory grows by no more than a small multiple of the message.
//!
//! It is deterministic but for the time: a failure prints the number of its case, and `CRESSET_FUZZ_CASE` runs that one alone.
#![forbid(unsafe_code)]

mod configurations;
mod requests;

use std::time::{Duration, Instant};

use peak_alloc::PeakAlloc;
use rand::{Rng, SeedableRng, rngs::StdRng};

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Memory that a case may take beside a multiple of its input: buffers of fixed size, and what other threads do meanwhile.
const SPARE_BYTES: usize = 64 << 20;
/// How many times its input a case may take: decoded, checked, copied once, and an error's words.
const TIMES_INPUT: usize = 24;

/// The cases to run, until time is over.
struct Cases {
    until: Instant,
    only: Option<u64>,
    next: u64,
}

impl Cases {
    fn new() -> Self {
        let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
        let seconds = number("CRESSET_FUZZ_SECONDS").unwrap_or(120);
        let only = number("CRESSET_FUZZ_CASE");
        // Two tests share the time.
        Self { until: Instant::now() + Duration::from_secs(seconds) / 2, only, next: only.unwrap_or(0) }
    }
}

impl Iterator for Cases {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        let over = match self.only {
            Some(only) => self.next > only,
            None => Instant::now() >= self.until,
        };
        self.next += 1;
        (!over).then_some(self.next - 1)
    }
}

/// The randomness of a case.
fn random(case: u64) -> StdRng {
    StdRng::seed_from_u64(case)
}

/// Runs a case and holds its memory against the size of what it was given.
fn bounded<T>(case: u64, input_bytes: usize, run: impl FnOnce() -> T) -> T {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let result = run();
    let took = MEMORY.peak_usage().saturating_sub(before);
    let limit = SPARE_BYTES + TIMES_INPUT * input_bytes;
    assert!(took <= limit, "case {case} took {took} bytes for an input of {input_bytes}, the limit is {limit}");
    result
}

/// Changes some bytes: flips, cuts, doubles, inserts.
fn scramble(bytes: &mut Vec<u8>, random: &mut StdRng) {
    for _ in 0..random.random_range(1..8) {
        let at = random.random_range(0..=bytes.len());
        match random.random_range(0..5) {
            0 if at < bytes.len() => bytes[at] ^= 1 << random.random_range(0..8),
            1 => bytes.truncate(at),
            2 => bytes.insert(at, random.random()),
            3 if at < bytes.len() => {
                let end = random.random_range(at..=bytes.len().min(at + 64));
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ if at < bytes.len() => bytes[at] = *[0, 1, 0x7f, 0x80, 0xff].get(random.random_range(0..5)).unwrap_or(&0),
            _ => {}
        }
    }
}
