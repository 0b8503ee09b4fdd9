//! Which requests wait, and when a batch is cut from them. Pure: the queue asks, time comes in as a value.
//!
//! An idle device never waits for a fuller batch unless the model's configuration tells it to
//! (`max_queue_delay_microseconds`). Requests of one batch have equal shapes beyond the batch dimension; the oldest request
//! of the highest level decides which shape goes next, so none starves within its level.
//!
//! Levels, preferred sizes and timeouts mean what they mean in Triton's dynamic batcher (its `model_configuration.md`,
//! "Dynamic Batcher").
mod handles;

use std::collections::{BTreeMap, VecDeque};

pub use self::handles::Handles;
use crate::contract::{QueuePolicy, Queueing, TimeoutAction};

/// Requests that one decision looks at, as a multiple of the batch's rows.
const LOOK_AHEAD: usize = 4;

/// A request in the line, as far as batching cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Waiting {
    /// When it came, in µs of the process's clock.
    pub arrived_us: u64,
    /// Rows that it takes of a batch.
    pub rows: usize,
    /// Bytes of its inputs.
    pub bytes: usize,
    /// Equal for requests that fit into one batch.
    pub shape_class: u64,
    /// Its priority level; 1 is the highest, 0 where there are none.
    pub level: u64,
    /// When its queue policy acts on it.
    pub times_out_us: Option<u64>,
    /// When its caller stops waiting.
    pub deadline_us: Option<u64>,
}

/// Bounds of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Requests that may wait.
    pub requests_max: usize,
    /// Bytes of inputs that may wait.
    pub bytes_max: usize,
}

/// How fast a line moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// What a batch takes, in µs.
    pub batch_us: u64,
    /// Rows of a full batch.
    pub rows_max: usize,
    /// Batches that run side by side.
    pub instances: u64,
}

impl Pace {
    /// What batches take is smoothed. A shorter one counts for more: one that was slow for a reason of its own must not turn
    /// requests away for long.
    pub fn smoothed_us(before_us: u64, took_us: u64) -> u64 {
        match before_us {
            0 => took_us,
            _ if took_us < before_us => before_us.midpoint(took_us),
            _ => before_us - before_us / 8 + took_us / 8,
        }
    }
}

/// The line is full; the request was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// So many requests wait, at this level or altogether.
    Requests(usize),
    /// Their inputs take so many bytes.
    Bytes(usize),
}

/// Why a request left the line without being run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Its caller has stopped waiting.
    Deadline,
    /// Its queue policy rejects it.
    TimedOut,
    /// Its caller has gone.
    Abandoned,
}

/// What to do when a device is free.
#[derive(Debug, PartialEq, Eq)]
pub enum Decision<T> {
    /// Nothing waits.
    Idle,
    /// Ask again at this time, or when a request comes.
    WaitUntil(u64),
    /// Run these together, in this order.
    Cut(Vec<(Waiting, T)>),
}

/// The requests of one model that wait, by level and in order of arrival.
#[derive(Debug)]
pub struct Line<T> {
    levels: BTreeMap<u64, Level<T>>,
    requests: usize,
    bytes: usize,
    /// Nothing times out before this.
    quiet_until_us: u64,
}

#[derive(Debug)]
struct Level<T> {
    /// In order of arrival.
    fresh: VecDeque<(Waiting, T)>,
    /// Those that have waited too long and were moved behind.
    delayed: VecDeque<(Waiting, T)>,
    /// Rows of all of them.
    rows: usize,
}

impl<T> Default for Line<T> {
    fn default() -> Self {
        Self { levels: BTreeMap::new(), requests: 0, bytes: 0, quiet_until_us: u64::MAX }
    }
}

impl<T> Default for Level<T> {
    fn default() -> Self {
        Self { fresh: VecDeque::new(), delayed: VecDeque::new(), rows: 0 }
    }
}

impl<T> Level<T> {
    fn len(&self) -> usize {
        self.fresh.len() + self.delayed.len()
    }
}

/// A place in the line: level, whether delayed, position.
type Place = (u64, bool, usize);

impl<T> Line<T> {
    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.requests
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.requests == 0
    }

    /// Whether as many rows wait as a batch can have; of one request, if batches have no rows.
    pub fn is_full(&self, rows_max: usize) -> bool {
        self.levels.values().map(|level| level.rows).sum::<usize>() >= rows_max.max(1)
    }

    /// Puts a request at the end of its level.
    ///
    /// # Errors
    /// [`Full`], and the request back. One request is always taken into an empty line, however large.
    pub fn push(&mut self, waiting: Waiting, payload: T, policy: &QueuePolicy, bounds: &Bounds) -> Result<(), (Full, T)> {
        if self.requests >= bounds.requests_max {
            return Err((Full::Requests(bounds.requests_max), payload));
        }
        if self.requests > 0 && self.bytes.saturating_add(waiting.bytes) > bounds.bytes_max {
            return Err((Full::Bytes(bounds.bytes_max), payload));
        }
        let level = self.levels.entry(waiting.level).or_default();
        if policy.requests_max > 0 && level.len() >= policy.requests_max {
            return Err((Full::Requests(policy.requests_max), payload));
        }
        level.fresh.push_back((waiting, payload));
        level.rows += waiting.rows;
        self.requests += 1;
        self.bytes += waiting.bytes;
        for at in [waiting.times_out_us, waiting.deadline_us].into_iter().flatten() {
            self.quiet_until_us = self.quiet_until_us.min(at);
        }
        Ok(())
    }

    /// About how long a request of `rows` rows at `level` would take from now to its answer, in µs, at this pace, with a
    /// quarter more for what can't be foreseen. What is running now counts by half. `None` if nothing waits.
    pub fn takes_us(&self, level: u64, rows: usize, pace: &Pace) -> Option<u64> {
        if self.is_empty() {
            return None;
        }
        let ahead: usize = self.levels.range(..=level).map(|(_, level)| level.rows).sum();
        let batches = ahead.saturating_add(rows).div_ceil(pace.rows_max.max(1)) as u64;
        let turns = batches.div_ceil(pace.instances.max(1));
        let takes_us = pace.batch_us.saturating_mul(turns.saturating_mul(2).saturating_add(1)) / 2;
        Some(takes_us.saturating_add(takes_us / 4))
    }

    /// Takes everything out.
    pub fn drain(&mut self) -> Vec<T> {
        let levels = std::mem::take(self).levels;
        levels.into_values().flat_map(|level| level.fresh.into_iter().chain(level.delayed)).map(|(_, payload)| payload).collect()
    }

    /// Takes out what must not be run any more and moves behind what a policy says so of. Costs nothing until something
    /// times out.
    pub fn expire(&mut self, queueing: &Queueing, now_us: u64) -> Vec<(Dropped, T)> {
        if now_us < self.quiet_until_us {
            return vec![];
        }
        let mut dropped = Vec::new();
        let mut next_us = u64::MAX;
        for (number, level) in &mut self.levels {
            let action = queueing.policy(*number).action;
            let fresh = std::mem::take(&mut level.fresh);
            for (mut waiting, payload) in std::mem::take(&mut level.delayed).into_iter().chain(fresh) {
                let why = match (waiting.deadline_us, waiting.times_out_us, action) {
                    (Some(at), _, _) if at <= now_us => Some(Dropped::Deadline),
                    (_, Some(at), TimeoutAction::Reject) if at <= now_us => Some(Dropped::TimedOut),
                    _ => None,
                };
                if let Some(why) = why {
                    level.rows -= waiting.rows;
                    self.requests -= 1;
                    self.bytes -= waiting.bytes;
                    dropped.push((why, payload));
                    continue;
                }
                next_us = next_us.min(waiting.deadline_us.unwrap_or(u64::MAX));
                match waiting.times_out_us {
                    Some(at) if at <= now_us => {
                        // Times out once only; then it is behind for good.
                        waiting.times_out_us = Some(0);
                        level.delayed.push_back((waiting, payload));
                    }
                    at => {
                        next_us = next_us.min(at.unwrap_or(u64::MAX));
                        level.fresh.push_back((waiting, payload));
                    }
                }
            }
        }
        self.quiet_until_us = next_us;
        dropped
    }

    /// Takes out those whose callers have gone, wherever they are in the line. It looks at each request.
    pub fn sweep(&mut self, is_alive: impl Fn(&T) -> bool) -> Vec<T> {
        let mut gone = Vec::new();
        for level in self.levels.values_mut() {
            for queue in [&mut level.fresh, &mut level.delayed] {
                for (waiting, payload) in std::mem::take(queue) {
                    if is_alive(&payload) {
                        queue.push_back((waiting, payload));
                        continue;
                    }
                    level.rows -= waiting.rows;
                    self.requests -= 1;
                    self.bytes -= waiting.bytes;
                    gone.push(payload);
                }
            }
        }
        gone
    }

    /// Decides at `now_us`. `is_alive` says whether a request's caller is still there; those that are gone are taken out
    /// when they are met and given to `gone`.
    pub fn next(
        &mut self,
        rows_max: usize,
        queueing: &Queueing,
        now_us: u64,
        is_alive: impl Fn(&T) -> bool,
        mut gone: impl FnMut(T),
    ) -> Decision<T> {
        loop {
            match self.choose(rows_max, queueing, now_us, &is_alive) {
                Choice::Nothing => return Decision::Idle,
                Choice::Gone(place) => {
                    if let Some((_, payload)) = self.remove(place) {
                        gone(payload);
                    }
                }
                Choice::Wait(until_us) => return Decision::WaitUntil(until_us.min(self.quiet_until_us.max(now_us + 1))),
                Choice::Take(places) => return Decision::Cut(self.take(&places)),
            }
        }
    }

    fn choose(&self, rows_max: usize, queueing: &Queueing, now_us: u64, is_alive: &impl Fn(&T) -> bool) -> Choice {
        let look_at = rows_max.saturating_mul(LOOK_AHEAD).max(1);
        let mut walk = self.walk().take(look_at);
        let Some((first, oldest, payload)) = walk.next() else { return Choice::Nothing };
        if !is_alive(payload) {
            return Choice::Gone(first);
        }
        let mut chosen = vec![first];
        let mut rows = oldest.rows;
        let mut came_first_us = oldest.arrived_us;
        let is_preferred = |rows: usize| queueing.preferred_rows.binary_search(&rows).is_ok();
        let mut preferred = is_preferred(rows).then_some(1);
        let mut is_full = rows >= rows_max;
        for (place, waiting, payload) in walk {
            if is_full {
                break;
            }
            if waiting.shape_class != oldest.shape_class {
                continue;
            }
            if !is_alive(payload) {
                return Choice::Gone(place);
            }
            // The first that doesn't fit ends the batch: a later, smaller one must not overtake it for ever.
            if rows.checked_add(waiting.rows).is_none_or(|sum| sum > rows_max) {
                is_full = true;
                break;
            }
            chosen.push(place);
            rows += waiting.rows;
            came_first_us = came_first_us.min(waiting.arrived_us);
            if is_preferred(rows) {
                preferred = Some(chosen.len());
            }
            is_full = rows >= rows_max;
        }
        let wait_until_us = came_first_us.saturating_add(queueing.delay_us);
        match preferred {
            // The largest preferred size that fits goes at once and the rest waits for its own; a request that has waited
            // long enough goes with whatever is there.
            Some(count) if queueing.delay_us == 0 || wait_until_us > now_us => {
                chosen.truncate(count);
                Choice::Take(chosen)
            }
            _ if is_full || wait_until_us <= now_us => Choice::Take(chosen),
            _ => Choice::Wait(wait_until_us),
        }
    }

    /// Every request, in the order in which they are served.
    fn walk(&self) -> impl Iterator<Item = (Place, &Waiting, &T)> {
        self.levels.iter().flat_map(|(number, level)| {
            let fresh =
                level.fresh.iter().enumerate().map(move |(at, (waiting, payload))| ((*number, false, at), waiting, payload));
            let delayed =
                level.delayed.iter().enumerate().map(move |(at, (waiting, payload))| ((*number, true, at), waiting, payload));
            fresh.chain(delayed)
        })
    }

    fn remove(&mut self, (number, delayed, at): Place) -> Option<(Waiting, T)> {
        let level = self.levels.get_mut(&number)?;
        let queue = if delayed { &mut level.delayed } else { &mut level.fresh };
        let removed = queue.remove(at)?;
        level.rows -= removed.0.rows;
        self.requests -= 1;
        self.bytes -= removed.0.bytes;
        Some(removed)
    }

    /// Takes these places, which are in the order of [`walk`](Self::walk).
    fn take(&mut self, places: &[Place]) -> Vec<(Waiting, T)> {
        // The usual case: the front of one queue.
        if let [(number, false, 0), .., (last, false, end)] = places
            && number == last
            && *end + 1 == places.len()
            && let Some(level) = self.levels.get_mut(number)
        {
            let taken: Vec<_> = level.fresh.drain(..=*end).collect();
            level.rows -= taken.iter().map(|(waiting, _)| waiting.rows).sum::<usize>();
            self.requests -= taken.len();
            self.bytes -= taken.iter().map(|(waiting, _)| waiting.bytes).sum::<usize>();
            return taken;
        }
        // From the back, so that the places before stay right.
        let mut taken: Vec<_> = places.iter().rev().filter_map(|place| self.remove(*place)).collect();
        taken.reverse();
        taken
    }
}

enum Choice {
    Nothing,
    Gone(Place),
    Wait(u64),
    Take(Vec<Place>),
}

/// Puts answers back into the order in which their requests came (`preserve_ordering`). Each request has a number, from 0
/// without gaps; an answer is held until all before it have left.
#[derive(Debug)]
pub struct Ordering<A> {
    next: u64,
    held: BTreeMap<u64, A>,
}

impl<A> Default for Ordering<A> {
    fn default() -> Self {
        Self { next: 0, held: BTreeMap::new() }
    }
}

impl<A> Ordering<A> {
    /// Takes the answer of request `number` and gives those that may leave now, in order.
    pub fn finish(&mut self, number: u64, answer: A) -> Vec<A> {
        self.held.insert(number, answer);
        let mut free = Vec::new();
        while let Some(answer) = self.held.remove(&self.next) {
            free.push(answer);
            self.next += 1;
        }
        free
    }
}

#[cfg(test)]
mod tests;
