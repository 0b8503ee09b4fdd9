//! The answers of a sequence that its client may not have yet.
//!
//! A client that can take its stream up again numbers the requests of a sequence and says, with each, which one was answered
//! last. Everything after that is kept here: by the router that answers, and by the worker that runs the sequence, so that the
//! death of the one doesn't take away what was computed and never arrived. A request that comes a second time is answered from
//! here and not run again.
//!
//! Absent here: time, IO, and the sequence's state, which is the [journal](crate::journal)'s.
use std::collections::VecDeque;

use cresset_proto::fleet::v1::KeptAnswer;
use prost::Message;

/// How much is kept for one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Answers.
    pub answers_max: usize,
    /// Their bytes.
    pub bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { answers_max: 1024, bytes_max: 4 << 20 }
    }
}

/// No further request is taken until the client says what it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "{answers} answers of {bytes} bytes of this sequence were not acknowledged; the limits are kept_answers_max = {} and kept_bytes_max = {}: send cresset_ack with each request",
    .limits.answers_max, .limits.bytes_max
)]
pub struct KeptFull {
    /// Answers kept.
    pub answers: usize,
    /// Their bytes.
    pub bytes: usize,
    /// The limits.
    pub limits: Limits,
}

/// Answers in order of their ordinals, all after the one that was acknowledged.
#[derive(Debug, Default)]
pub struct Kept {
    answers: VecDeque<KeptAnswer>,
    bytes: usize,
    /// Nothing up to here is kept: the client has it, or it was dropped.
    floor: u64,
}

impl Kept {
    /// What somebody else has kept.
    pub fn of(answers: Vec<KeptAnswer>, ack: u64) -> Self {
        let mut kept = Self { floor: ack, ..Self::default() };
        for answer in answers {
            kept.keep(answer);
        }
        kept
    }

    /// The client has the answer to `ordinal`, and all before it.
    pub fn acknowledge(&mut self, ordinal: u64) {
        self.floor = self.floor.max(ordinal);
        while self.answers.front().is_some_and(|answer| answer.ordinal <= ordinal) {
            self.drop_oldest();
        }
    }

    /// Keeps an answer, unless it is kept already, or the client has it.
    pub fn keep(&mut self, answer: KeptAnswer) {
        if answer.ordinal > self.last() {
            self.bytes += answer.encoded_len();
            self.answers.push_back(answer);
        }
    }

    /// Drops the oldest, whoever may want it: the sequence can't be taken up again from before it.
    pub fn drop_oldest(&mut self) {
        if let Some(answer) = self.answers.pop_front() {
            self.bytes -= answer.encoded_len();
            self.floor = self.floor.max(answer.ordinal);
        }
    }

    /// The answer to a request.
    pub fn get(&self, ordinal: u64) -> Option<&KeptAnswer> {
        let index = self.answers.binary_search_by_key(&ordinal, |answer| answer.ordinal).ok()?;
        self.answers.get(index)
    }

    /// All that is kept up to `ordinal`.
    pub fn up_to(&self, ordinal: u64) -> Vec<KeptAnswer> {
        self.answers.iter().take_while(|answer| answer.ordinal <= ordinal).cloned().collect()
    }

    /// The last ordinal of which the answer is known here, or was.
    pub fn last(&self) -> u64 {
        self.answers.back().map_or(self.floor, |answer| answer.ordinal)
    }

    /// Up to which ordinal nothing is kept.
    pub fn floor(&self) -> u64 {
        self.floor
    }

    /// Bytes of the answers.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether there is room for the answer to one more request.
    ///
    /// # Errors
    /// [`KeptFull`]: the client has to acknowledge something first.
    pub fn has_room(&self, limits: Limits) -> Result<(), KeptFull> {
        let full = self.answers.len() >= limits.answers_max || self.bytes >= limits.bytes_max;
        if full { Err(KeptFull { answers: self.answers.len(), bytes: self.bytes, limits }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn answer(ordinal: u64) -> KeptAnswer {
        KeptAnswer { ordinal, result: None }
    }

    #[test]
    fn what_is_acknowledged_goes_and_what_is_kept_stays_as_it_was() {
        let mut kept = Kept::of((3..=6).map(answer).collect(), 3);
        assert_eq!((kept.get(3), kept.get(4), kept.last()), (None, Some(&answer(4)), 6));
        kept.keep(answer(5));
        assert_eq!(kept.up_to(5), [answer(4), answer(5)]);
        kept.acknowledge(5);
        assert_eq!((kept.floor(), kept.up_to(u64::MAX)), (5, vec![answer(6)]));
        // Ordinals may have gaps: those of other sequences of the stream.
        kept.keep(answer(11));
        assert_eq!((kept.get(8), kept.last()), (None, 11));
    }

    #[test]
    fn a_client_that_never_acknowledges_is_told_so() {
        let limits = Limits { answers_max: 2, bytes_max: 1 << 20 };
        let mut kept = Kept::default();
        kept.keep(answer(1));
        kept.has_room(limits).unwrap();
        kept.keep(answer(2));
        assert!(kept.has_room(limits).unwrap_err().to_string().contains("cresset_ack"));
        kept.acknowledge(1);
        kept.has_room(limits).unwrap();
    }

    proptest! {
        #[test]
        fn bytes_are_those_of_what_is_kept(steps in proptest::collection::vec((0_u64..4, 0_u64..3), 0..60)) {
            let mut kept = Kept::default();
            let mut next = 0;
            for (ahead, acked) in steps {
                next += ahead;
                kept.keep(answer(next));
                if acked == 0 {
                    kept.drop_oldest();
                }
                kept.acknowledge(next.saturating_sub(acked * 5));
                let all = kept.up_to(u64::MAX);
                prop_assert_eq!(kept.bytes(), all.iter().map(KeptAnswer::encoded_len).sum::<usize>());
                prop_assert!(all.iter().all(|answer| answer.ordinal > kept.floor()));
                prop_assert!(all.windows(2).all(|pair| pair[0].ordinal < pair[1].ordinal));
            }
        }
    }
}
