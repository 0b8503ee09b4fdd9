//! What was sent against what came back. Pure: times are values.
//!
//! The count trusts nothing but what a caller of the client sees: each request carries an id, and each answer has to bring
//! back the next one, once.

use std::{collections::HashMap, fmt};

use bytes::Bytes;

use crate::reference::difference;

/// The largest difference that still counts as equal: the order of a sum may differ from one run to the next.
pub const DIFFERENCE_MAX: f32 = 1e-5;

/// One answer, as it was delivered.
#[derive(Debug, Clone)]
pub struct Delivered {
    /// The id that it brought back.
    pub id: String,
    /// When, in µs since the run began.
    pub at_us: u64,
    /// Its first output's bytes, or the error.
    pub output: Result<Bytes, String>,
}

/// One sequence from its first request to its last answer.
#[derive(Debug, Clone, Default)]
pub struct Pass {
    /// Ids of the requests that were handed over, in that order.
    pub sent: Vec<String>,
    /// When the first one was, in µs since the run began.
    pub begun_us: u64,
    /// What came back, in the order of delivery.
    pub delivered: Vec<Delivered>,
}

/// A silence of one sequence, from one answer to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gap {
    /// The answer before it, or the first request.
    pub from_us: u64,
    /// The answer after it.
    pub to_us: u64,
}

impl Gap {
    /// How long it was.
    pub fn micros(&self) -> u64 {
        self.to_us.saturating_sub(self.from_us)
    }

    /// Whether any of it lies between two moments.
    pub fn touches(&self, from_us: u64, to_us: u64) -> bool {
        self.to_us >= from_us && self.from_us <= to_us
    }
}

/// The count over many sequences.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tally {
    /// Requests that were handed over.
    pub sent: u64,
    /// Of these, how many got an answer that isn't an error.
    pub answered: u64,
    /// Of these, how many got none, or an error.
    pub lost: u64,
    /// Answers beyond the first to the same request, and answers to requests that nobody made.
    pub repeated: u64,
    /// Answers that came after one to a later request.
    pub out_of_order: u64,
    /// The largest difference from the reference.
    pub largest_difference: f32,
    /// Answers that differ by more than [`DIFFERENCE_MAX`].
    pub wrong: u64,
    /// The first error that an answer brought.
    pub first_error: Option<String>,
}

impl Tally {
    /// Counts one sequence in; `expected` are the reference's outputs, one for each request.
    pub fn add(&mut self, pass: &Pass, expected: &[Bytes]) {
        let ordinal: HashMap<&str, usize> = pass.sent.iter().enumerate().map(|(at, id)| (id.as_str(), at)).collect();
        let mut seen = vec![false; pass.sent.len()];
        let mut answered = vec![false; pass.sent.len()];
        let mut latest = None;
        for answer in &pass.delivered {
            let Some(&at) = ordinal.get(answer.id.as_str()) else {
                self.repeated += 1;
                continue;
            };
            self.repeated += u64::from(seen[at]);
            seen[at] = true;
            self.out_of_order += u64::from(latest.is_some_and(|latest| at < latest));
            latest = latest.max(Some(at));
            match &answer.output {
                Ok(output) => {
                    answered[at] = true;
                    self.compare(output, expected.get(at));
                }
                Err(error) => {
                    self.first_error.get_or_insert_with(|| format!("{}: {error}", answer.id));
                }
            }
        }
        let count = answered.iter().filter(|answered| **answered).count() as u64;
        self.sent += pass.sent.len() as u64;
        self.answered += count;
        self.lost += pass.sent.len() as u64 - count;
    }

    fn compare(&mut self, output: &[u8], expected: Option<&Bytes>) {
        let apart = expected.map_or(f32::INFINITY, |expected| difference(output, expected));
        self.largest_difference = self.largest_difference.max(apart);
        self.wrong += u64::from(apart > DIFFERENCE_MAX);
    }

    /// Two counts as one.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            answered: self.answered + other.answered,
            lost: self.lost + other.lost,
            repeated: self.repeated + other.repeated,
            out_of_order: self.out_of_order + other.out_of_order,
            largest_difference: self.largest_difference.max(other.largest_difference),
            wrong: self.wrong + other.wrong,
            first_error: self.first_error.clone().or_else(|| other.first_error.clone()),
        }
    }

    /// Whether every request got its one right answer, in order.
    pub fn is_clean(&self) -> bool {
        self.sent > 0 && self.lost == 0 && self.repeated == 0 && self.out_of_order == 0 && self.wrong == 0
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { sent, answered, lost, repeated, out_of_order, largest_difference, .. } = self;
        write!(f, "sent {sent}, answered {answered}, lost {lost}, repeated {repeated}, out of order {out_of_order}, ")?;
        write!(f, "largest difference {largest_difference:e}")?;
        match &self.first_error {
            Some(error) => write!(f, ", first error {error}"),
            None => Ok(()),
        }
    }
}

/// The silences of one sequence.
pub fn gaps(pass: &Pass) -> impl Iterator<Item = Gap> {
    let before = std::iter::once(pass.begun_us).chain(pass.delivered.iter().map(|answer| answer.at_us));
    before.zip(&pass.delivered).map(|(from_us, answer)| Gap { from_us, to_us: answer.at_us })
}

/// The longest silence that touches the time between two moments, in µs.
pub fn longest_between<'a>(passes: impl IntoIterator<Item = &'a Pass>, from_us: u64, to_us: u64) -> u64 {
    passes.into_iter().flat_map(gaps).filter(|gap| gap.touches(from_us, to_us)).map(|gap| gap.micros()).max().unwrap_or(0)
}

/// The middle of some numbers; of an even count, the lower one of the two.
pub fn median(mut values: Vec<u64>) -> u64 {
    values.sort_unstable();
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::bytes_of;

    fn pass(sent: usize, delivered: &[usize]) -> Pass {
        let answer = |(number, at): (usize, &usize)| Delivered {
            id: at.to_string(),
            at_us: (number as u64 + 1) * 10,
            output: Ok(bytes_of(&[*at as f32])),
        };
        Pass {
            sent: (0..sent).map(|at| at.to_string()).collect(),
            begun_us: 0,
            delivered: delivered.iter().enumerate().map(answer).collect(),
        }
    }

    fn tally(pass: &Pass) -> Tally {
        let expected: Vec<_> = (0..pass.sent.len()).map(|at| bytes_of(&[at as f32])).collect();
        let mut tally = Tally::default();
        tally.add(pass, &expected);
        tally
    }

    #[test]
    fn a_clean_run_is_clean_and_nothing_at_all_is_not() {
        assert!(tally(&pass(3, &[0, 1, 2])).is_clean());
        assert!(!tally(&pass(0, &[])).is_clean());
    }

    #[test]
    fn each_fault_is_counted_by_its_name() {
        let faults = |sent, delivered: &[usize]| {
            let tally = tally(&pass(sent, delivered));
            assert!(!tally.is_clean());
            (tally.lost, tally.repeated, tally.out_of_order)
        };
        assert_eq!(faults(3, &[0, 2]), (1, 0, 0));
        assert_eq!(faults(3, &[0, 1, 1, 2]), (0, 1, 0));
        assert_eq!(faults(3, &[0, 2, 1]), (0, 0, 1));
        assert_eq!(faults(2, &[0, 1, 7]), (0, 1, 0), "nobody asked for 7");
        assert_eq!(faults(3, &[0, 1, 2, 0]), (0, 1, 1), "an old one again");
    }

    #[test]
    fn an_error_is_no_answer_and_a_wrong_answer_is_no_right_one() {
        let mut broken = pass(2, &[0, 1]);
        broken.delivered[1].output = Err("gone".into());
        let count = tally(&broken);
        assert_eq!((count.answered, count.lost, count.first_error.as_deref()), (1, 1, Some("1: gone")));
        let mut wrong = pass(2, &[0, 1]);
        wrong.delivered[1].output = Ok(bytes_of(&[1.5]));
        let count = tally(&wrong);
        assert_eq!((count.lost, count.wrong, count.largest_difference), (0, 1, 0.5));
        assert!(!count.is_clean());
        wrong.delivered[1].output = Ok(bytes_of(&[f32::NAN]));
        assert_eq!(tally(&wrong).wrong, 1);
    }

    #[test]
    fn pauses_belong_to_the_time_they_touch() {
        let mut pass = pass(3, &[0, 1, 2]);
        pass.delivered[1].at_us = 500;
        pass.delivered[2].at_us = 510;
        assert_eq!(gaps(&pass).map(|gap| gap.micros()).collect::<Vec<_>>(), [10, 490, 10]);
        assert_eq!(longest_between([&pass], 100, 200), 490, "one that began before and ended after");
        assert_eq!(longest_between([&pass], 505, 600), 10);
        assert_eq!(longest_between([&pass], 1_000, 2_000), 0);
        assert_eq!(median(vec![9, 1, 5]), 5);
        assert_eq!(median(vec![]), 0);
    }
}
