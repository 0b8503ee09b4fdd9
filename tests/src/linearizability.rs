//! Whether what concurrent clients saw of one register can be explained by one order of their operations.
//!
//! The algorithm is that of Wing and Gong ("Testing and verifying concurrent objects", 1993) with Lowe's memory of what was
//! tried ("Testing for linearizability", 2017): operations are put in order one by one, each only before the first return
//! of those that are left, and a set of operations that led nowhere with the same value isn't tried twice.
use std::collections::{BTreeSet, HashSet};

/// Steps for the history of one register. One that can't be decided in so many is a finding.
pub const STEPS_MAX: usize = 5_000_000;

/// What an operation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Put a value into the register. Values are never written twice.
    Write(u64),
    /// Saw what it holds; `None` before the first write.
    Read(Option<u64>),
}

/// One operation of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Operation {
    /// When it began, on a clock that all clients share.
    pub invoked: u64,
    /// When its answer came; `None` if none did, so that it may take effect at any time or never.
    pub returned: Option<u64>,
    /// What it did.
    pub action: Action,
}

/// What a history is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// One order explains it.
    Linearizable,
    /// No order does.
    Violated,
    /// The steps didn't suffice to tell.
    Undecided,
}

/// Judges the history of one register in at most `steps_max` steps.
pub fn check(history: &[Operation], steps_max: usize) -> Verdict {
    let read: BTreeSet<u64> = history
        .iter()
        .filter_map(|operation| match operation.action {
            Action::Read(value) => value,
            Action::Write(_) => None,
        })
        .collect();
    // A write that nobody waited for and nobody saw explains nothing; with many of those, the search would never end.
    let matters = |operation: &&Operation| match (operation.returned, operation.action) {
        (Some(_), _) => true,
        (None, Action::Write(value)) => read.contains(&value),
        (None, Action::Read(_)) => false,
    };
    let operations: Vec<Operation> = history.iter().filter(matters).copied().collect();
    Search::new(&operations).run(&operations, steps_max)
}

/// The calls and returns that aren't in order yet, as a list that gives places back in the reverse order.
struct Search {
    /// For each entry: which operation, and whether it is its return.
    entries: Vec<(usize, bool)>,
    next: Vec<usize>,
    previous: Vec<usize>,
    /// Where each operation's return is.
    returns: Vec<usize>,
}

/// The list's both ends: entry 0.
const END: usize = 0;

impl Search {
    fn new(operations: &[Operation]) -> Self {
        let mut events: Vec<(u64, bool, usize)> = Vec::with_capacity(operations.len() * 2);
        for (number, operation) in operations.iter().enumerate() {
            events.push((operation.invoked, false, number));
            events.push((operation.returned.unwrap_or(u64::MAX), true, number));
        }
        // Of a call and a return at the same time the call is first: they may have overlapped.
        events.sort_unstable();
        let mut entries = vec![(usize::MAX, true)];
        entries.extend(events.iter().map(|(_, is_return, number)| (*number, *is_return)));
        let count = entries.len();
        let mut returns = vec![END; operations.len()];
        for (place, (number, is_return)) in entries.iter().enumerate().skip(1) {
            if *is_return {
                returns[*number] = place;
            }
        }
        Self {
            entries,
            next: (1..=count).map(|place| place % count).collect(),
            previous: (0..count).map(|place| (place + count - 1) % count).collect(),
            returns,
        }
    }

    fn take_out(&mut self, place: usize) {
        let (before, after) = (self.previous[place], self.next[place]);
        self.next[before] = after;
        self.previous[after] = before;
    }

    fn put_back(&mut self, place: usize) {
        let (before, after) = (self.previous[place], self.next[place]);
        self.next[before] = place;
        self.previous[after] = place;
    }

    fn run(mut self, operations: &[Operation], steps_max: usize) -> Verdict {
        let mut done = vec![0_u64; operations.len().div_ceil(64)];
        let mut tried: HashSet<(Vec<u64>, Option<u64>)> = HashSet::new();
        let mut taken: Vec<(usize, Option<u64>)> = Vec::new();
        let mut value = None;
        let mut place = self.next[END];
        for _ in 0..steps_max {
            if self.next[END] == END {
                return Verdict::Linearizable;
            }
            let (number, is_return) = self.entries[place];
            if is_return {
                // Something had to be in order before this and isn't: the last choice was wrong.
                let Some((call, before)) = taken.pop() else { return Verdict::Violated };
                let (number, _) = self.entries[call];
                value = before;
                done[number / 64] &= !(1 << (number % 64));
                self.put_back(self.returns[number]);
                self.put_back(call);
                place = self.next[call];
                continue;
            }
            let after = match operations[number].action {
                Action::Write(written) => Some(Some(written)),
                Action::Read(seen) => (seen == value).then_some(value),
            };
            if let Some(after) = after {
                done[number / 64] |= 1 << (number % 64);
                if tried.insert((done.clone(), after)) {
                    taken.push((place, value));
                    value = after;
                    self.take_out(place);
                    self.take_out(self.returns[number]);
                    place = self.next[END];
                    continue;
                }
                done[number / 64] &= !(1 << (number % 64));
            }
            place = self.next[place];
        }
        Verdict::Undecided
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AMPLE: usize = 1_000_000;

    fn operation(invoked: u64, returned: impl Into<Option<u64>>, action: Action) -> Operation {
        Operation { invoked, returned: returned.into(), action }
    }

    #[test]
    fn a_read_sees_the_last_write_that_ended_or_one_that_overlaps() {
        let writes = [operation(0, 10, Action::Write(1)), operation(20, 40, Action::Write(2))];
        for (seen, verdict) in [(Some(1), Verdict::Linearizable), (Some(2), Verdict::Linearizable), (None, Verdict::Violated)] {
            let history = [&writes[..], &[operation(25, 30, Action::Read(seen))]].concat();
            assert_eq!(check(&history, AMPLE), verdict, "{seen:?}");
        }
        let late = [&writes[..], &[operation(50, 60, Action::Read(Some(1)))]].concat();
        assert_eq!(check(&late, AMPLE), Verdict::Violated, "a stale read");
    }

    #[test]
    fn reads_never_go_back() {
        let history = [
            operation(0, 100, Action::Write(1)),
            operation(10, 20, Action::Read(Some(1))),
            operation(30, 40, Action::Read(None)),
        ];
        assert_eq!(check(&history, AMPLE), Verdict::Violated);
    }

    #[test]
    fn a_write_without_an_answer_may_take_effect_at_any_time_or_never() {
        let write = operation(0, None, Action::Write(1));
        for seen in [None, Some(1)] {
            assert_eq!(check(&[write, operation(500, 510, Action::Read(seen))], AMPLE), Verdict::Linearizable, "{seen:?}");
        }
        let back = [write, operation(10, 20, Action::Read(Some(1))), operation(30, 40, Action::Read(None))];
        assert_eq!(check(&back, AMPLE), Verdict::Violated);
    }

    #[test]
    fn too_few_steps_are_no_verdict() {
        let history: Vec<_> = (0..20).map(|at| operation(at, 100, Action::Write(at))).collect();
        assert_eq!(check(&history, 3), Verdict::Undecided);
    }

    /// A history with a known order: each operation takes effect at a moment inside its interval.
    fn lawful() -> impl Strategy<Value = Vec<Operation>> {
        proptest::collection::vec((0_u64..8, 0_u64..8, any::<bool>()), 1..60).prop_map(|drawn| {
            let mut value = None;
            let act = |(number, (before, after, writes)): (usize, (u64, u64, bool))| {
                let at = number as u64 * 4;
                let action = if writes {
                    value = Some(number as u64);
                    Action::Write(number as u64)
                } else {
                    Action::Read(value)
                };
                operation(at.saturating_sub(before), at + after, action)
            };
            drawn.into_iter().enumerate().map(act).collect()
        })
    }

    proptest! {
        #[test]
        fn lawful_histories_are_linearizable(history in lawful()) {
            prop_assert_eq!(check(&history, AMPLE), Verdict::Linearizable);
        }

        #[test]
        fn a_value_that_was_never_written_is_never_explained(history in lawful(), at in 0_u64..200) {
            let odd = operation(at, at + 5, Action::Read(Some(9_999)));
            prop_assert_eq!(check(&[&history[..], &[odd]].concat(), AMPLE), Verdict::Violated);
        }
    }
}
