//! What routers say of workers, and what the leader makes of it.
//!
//! A router that leaves a worker alone says so now and then, beside those that do answer it. The leader takes the word of more
//! than half of the routers that said anything of a worker lately: one whose own way to a worker is cut must not take it from all
//! the others. Such a worker is *doubted*: `placement` gives it nothing new. If it doesn't even say that it lives, `liveness` asks it
//! sooner; if it does, and the doubt lasts, `placement` moves what it has. The doubt isn't agreed on, only the moves are.
use std::collections::{BTreeMap, BTreeSet};

use crate::{WorkerId, state::Incarnation};

/// The most routers whose word is kept.
pub const ROUTERS_MAX: usize = 4_096;
/// The most workers that one router may speak of.
pub const WORKERS_MAX: usize = 10_000;

/// How long is how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// A router's word counts for so long.
    pub kept_ms: u64,
    /// With a doubt that lasts so long, what a worker has moves elsewhere.
    pub abandon_after_ms: u64,
}

impl Default for Policy {
    fn default() -> Self {
        Self { kept_ms: 2_500, abandon_after_ms: 10_000 }
    }
}

/// What one router says of one worker's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opinion {
    /// Which of its lives.
    pub incarnation: Incarnation,
    /// It is left alone; otherwise it answers.
    pub left_alone: bool,
}

/// What was said lately.
#[derive(Debug, Clone, Default)]
pub struct Opinions {
    policy: Policy,
    routers: BTreeMap<String, Said>,
    /// Since when there is doubt about a life.
    doubts: BTreeMap<(WorkerId, Incarnation), u64>,
}

#[derive(Debug, Clone)]
struct Said {
    at_ms: u64,
    of: BTreeMap<WorkerId, Opinion>,
}

/// How many routers leave a worker alone, and to how many it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// It is left alone by so many.
    pub left_alone: u32,
    /// It answers so many.
    pub answers: u32,
}

impl Tally {
    fn is_doubt(self) -> bool {
        self.left_alone > self.answers
    }
}

impl Opinions {
    /// Nothing was said yet.
    pub fn new(policy: Policy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// A router speaks; what it said before counts no more.
    pub fn said(&mut self, router: &str, of: BTreeMap<WorkerId, Opinion>, now_ms: u64) {
        self.forget(now_ms);
        if self.routers.len() < ROUTERS_MAX || self.routers.contains_key(router) {
            self.routers.insert(router.to_owned(), Said { at_ms: now_ms, of });
        }
        self.weigh(now_ms);
    }

    /// Time has passed.
    pub fn tick(&mut self, now_ms: u64) {
        self.forget(now_ms);
        self.weigh(now_ms);
    }

    /// What is said of a life.
    pub fn of(&self, worker: &WorkerId, incarnation: Incarnation) -> Tally {
        let said = self.routers.values().filter_map(|said| said.of.get(worker));
        said.filter(|opinion| opinion.incarnation == incarnation).fold(Tally::default(), Tally::and)
    }

    /// The lives that are doubted.
    pub fn doubted(&self) -> impl Iterator<Item = (&WorkerId, Incarnation)> {
        self.doubts.keys().map(|(worker, incarnation)| (worker, *incarnation))
    }

    /// The lives that have been doubted for so long that what they have moves elsewhere.
    pub fn abandoned(&self, now_ms: u64) -> BTreeSet<(WorkerId, Incarnation)> {
        let lasting = |since_ms: u64| now_ms.saturating_sub(since_ms) >= self.policy.abandon_after_ms;
        self.doubts.iter().filter(|(_, since_ms)| lasting(**since_ms)).map(|(life, _)| life.clone()).collect()
    }

    fn forget(&mut self, now_ms: u64) {
        self.routers.retain(|_, said| now_ms.saturating_sub(said.at_ms) <= self.policy.kept_ms);
    }

    fn weigh(&mut self, now_ms: u64) {
        let mut tallies: BTreeMap<(WorkerId, Incarnation), Tally> = BTreeMap::new();
        for (worker, opinion) in self.routers.values().flat_map(|said| &said.of) {
            let tally = tallies.entry((worker.clone(), opinion.incarnation)).or_default();
            *tally = tally.and(opinion);
        }
        let before = std::mem::take(&mut self.doubts);
        let doubted = tallies.into_iter().filter(|(_, tally)| tally.is_doubt());
        let since = |life: &(WorkerId, Incarnation)| before.get(life).copied().unwrap_or(now_ms);
        self.doubts = doubted.map(|(life, _)| (life.clone(), since(&life))).collect();
    }
}

impl Tally {
    fn and(self, opinion: &Opinion) -> Self {
        let left_alone = u32::from(opinion.left_alone);
        Self { left_alone: self.left_alone + left_alone, answers: self.answers + 1 - left_alone }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testkit::w;

    fn opinions(of: &[(&str, u64, bool)]) -> BTreeMap<WorkerId, Opinion> {
        of.iter()
            .map(|(worker, incarnation, left_alone)| (w(worker), Opinion { incarnation: *incarnation, left_alone: *left_alone }))
            .collect()
    }

    fn doubted(opinions: &Opinions) -> Vec<(&str, u64)> {
        opinions.doubted().map(|(worker, incarnation)| (worker.as_str(), incarnation)).collect()
    }

    #[test]
    fn the_word_of_more_than_half_counts_as_long_as_it_is_repeated() {
        let mut said = Opinions::new(Policy::default());
        said.said("r1", opinions(&[("w1", 7, true), ("w2", 1, false)]), 0);
        assert_eq!(doubted(&said), [("w1", 7)], "nobody else said anything");
        said.said("r2", opinions(&[("w1", 7, false)]), 100);
        assert_eq!(doubted(&said), [], "one of two isn't more than half");
        said.said("r3", opinions(&[("w1", 7, true)]), 200);
        assert_eq!((doubted(&said), said.of(&w("w1"), 7)), (vec![("w1", 7)], Tally { left_alone: 2, answers: 1 }));
        said.said("r1", opinions(&[]), 300);
        assert_eq!(doubted(&said), [], "it takes its word back");
        said.said("r2", opinions(&[]), 400);
        assert_eq!(doubted(&said), [("w1", 7)]);
        said.tick(2_700);
        assert_eq!(doubted(&said), [("w1", 7)]);
        said.tick(2_701);
        assert_eq!(doubted(&said), [], "words grow old");
    }

    #[test]
    fn a_doubt_must_last_without_a_break_to_count_for_placement_and_is_about_one_life() {
        let mut said = Opinions::new(Policy::default());
        let (out, back) = (opinions(&[("w1", 7, true)]), opinions(&[("w1", 7, false)]));
        for now_ms in (0..=9_000).step_by(500) {
            said.said("r1", out.clone(), now_ms);
        }
        assert!(said.abandoned(9_999).is_empty());
        assert_eq!(said.abandoned(10_000), BTreeSet::from([(w("w1"), 7)]));
        said.said("r1", back, 10_000);
        said.said("r1", out, 10_500);
        assert!(said.abandoned(20_499).is_empty());
        said.said("r1", opinions(&[("w1", 8, true)]), 20_500);
        assert!(said.abandoned(20_500).is_empty(), "another life");
    }

    proptest! {
        #[test]
        fn routers_that_get_answers_protect_a_worker(left_alone in 0_u32..20, answers in 0_u32..20) {
            let mut said = Opinions::new(Policy::default());
            for router in 0..left_alone + answers {
                said.said(&format!("r{router}"), opinions(&[("w1", 1, router < left_alone)]), 0);
            }
            prop_assert_eq!(!doubted(&said).is_empty(), left_alone > answers);
        }
    }
}
