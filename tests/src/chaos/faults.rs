//! What goes wrong, and when. Pure: a schedule is a function of a seed, a time and the faults that may come.

use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// The calm before the first fault: what a lane's pace is without any.
pub const CALM_MS: u64 = 5_000;
/// Between a cluster that is whole again and its next fault, at least.
const PAUSE_MS_MIN: u64 = 800;
/// The same, at most.
const PAUSE_MS_MAX: u64 = 2_200;

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// SIGKILL to a worker, which is started again.
    KillWorker,
    /// SIGKILL to the coordinator that leads, which is started again.
    KillLeader,
    /// SIGKILL to any coordinator, which is started again.
    KillCoordinator,
    /// SIGSTOP to a worker, then SIGCONT.
    StopWorker,
    /// SIGSTOP to the leader, then SIGCONT.
    StopLeader,
    /// A worker's link is cut: nothing comes in or goes out, and no connection ends.
    CutWorker,
    /// The leader's link is cut.
    CutLeader,
    /// What a worker sends is lost; it hears all the same.
    MuteWorker,
    /// What is sent to a worker is lost; it can speak.
    DeafenWorker,
    /// What the leader sends is lost; it hears all the same.
    MuteLeader,
    /// Every connection of a worker is reset.
    ResetWorker,
    /// Every connection of a coordinator is reset.
    ResetCoordinator,
    /// A coordinator's disk is full, while there are writes to agree on.
    FillDisk,
    /// SIGKILL to all coordinators but one.
    KillMajority,
    /// SIGKILL to every process, all of which are started again.
    KillEverything,
}

/// What a fault needs beyond processes that can be signalled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Nothing.
    Nothing,
    /// Each process in a network namespace of its own.
    Namespaces,
    /// A small file system under a coordinator's folder.
    Mount,
}

/// How a fault counts in the figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A worker that is gone and known to be.
    WorkerKill,
    /// A worker that is silent, or whose connections broke, while it lives.
    WorkerGray,
    /// Anything about one coordinator.
    Coordinator,
    /// No majority.
    Majority,
    /// Nobody is left.
    Everything,
}

impl Fault {
    /// All of them.
    pub const ALL: [Self; 15] = [
        Self::KillWorker,
        Self::KillLeader,
        Self::KillCoordinator,
        Self::StopWorker,
        Self::StopLeader,
        Self::CutWorker,
        Self::CutLeader,
        Self::MuteWorker,
        Self::DeafenWorker,
        Self::MuteLeader,
        Self::ResetWorker,
        Self::ResetCoordinator,
        Self::FillDisk,
        Self::KillMajority,
        Self::KillEverything,
    ];

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::KillWorker => "kill-worker",
            Self::KillLeader => "kill-leader",
            Self::KillCoordinator => "kill-coordinator",
            Self::StopWorker => "stop-worker",
            Self::StopLeader => "stop-leader",
            Self::CutWorker => "cut-worker",
            Self::CutLeader => "cut-leader",
            Self::MuteWorker => "mute-worker",
            Self::DeafenWorker => "deafen-worker",
            Self::MuteLeader => "mute-leader",
            Self::ResetWorker => "reset-worker",
            Self::ResetCoordinator => "reset-coordinator",
            Self::FillDisk => "fill-disk",
            Self::KillMajority => "kill-majority",
            Self::KillEverything => "kill-everything",
        }
    }

    /// The fault of that name.
    pub fn of(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// What it takes to cause it.
    pub fn needs(self) -> Needs {
        match self {
            Self::CutWorker
            | Self::CutLeader
            | Self::MuteWorker
            | Self::DeafenWorker
            | Self::MuteLeader
            | Self::ResetWorker
            | Self::ResetCoordinator => Needs::Namespaces,
            Self::FillDisk => Needs::Mount,
            _ => Needs::Nothing,
        }
    }

    /// How it counts.
    pub fn class(self) -> Class {
        match self {
            Self::KillWorker => Class::WorkerKill,
            Self::StopWorker | Self::CutWorker | Self::MuteWorker | Self::DeafenWorker | Self::ResetWorker => Class::WorkerGray,
            Self::KillMajority => Class::Majority,
            Self::KillEverything => Class::Everything,
            _ => Class::Coordinator,
        }
    }

    /// Whether processes die of it.
    pub fn kills(self) -> bool {
        matches!(self, Self::KillWorker | Self::KillLeader | Self::KillCoordinator | Self::KillMajority | Self::KillEverything)
    }

    /// How often it is in each round of the deck that a schedule is dealt from.
    fn copies(self) -> usize {
        match self {
            Self::KillWorker => 4,
            Self::KillLeader => 2,
            _ => 1,
        }
    }

    /// How long it lasts, from and to, in ms.
    fn lasts_ms(self) -> (u64, u64) {
        match self {
            Self::ResetWorker | Self::ResetCoordinator => (1, 1),
            Self::KillWorker | Self::KillLeader | Self::KillCoordinator => (200, 1_500),
            Self::KillMajority => (2_000, 4_000),
            Self::KillEverything => (200, 1_000),
            _ => (1_500, 5_000),
        }
    }

    /// What a cluster needs to be whole again after it, roughly, in ms. A schedule of a certain time is dealt by this; how
    /// long it really takes is measured.
    fn recovery_ms(self) -> u64 {
        match self {
            Self::ResetWorker | Self::ResetCoordinator => 100,
            Self::StopWorker | Self::StopLeader | Self::KillLeader | Self::KillCoordinator => 300,
            Self::FillDisk => 3_500,
            _ => 900,
        }
    }
}

/// One fault of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// How long after the cluster is whole, in ms.
    pub after_ms: u64,
    /// What.
    pub fault: Fault,
    /// Whom, where there is a choice: the member of this number, modulo their count.
    pub place: u32,
    /// How long, in ms.
    pub lasts_ms: u64,
}

/// Deals the faults of a run: rounds of a shuffled deck of `allowed`, so that each comes before any comes again, until
/// about `seconds` are full.
pub fn schedule(seed: u64, seconds: u64, allowed: &[Fault]) -> Vec<Step> {
    let mut deck: Vec<Fault> = Fault::ALL.into_iter().filter(|fault| allowed.contains(fault)).collect();
    deck = deck.into_iter().flat_map(|fault| std::iter::repeat_n(fault, fault.copies())).collect();
    let mut random = StdRng::seed_from_u64(seed);
    let (mut steps, mut at_ms) = (Vec::new(), CALM_MS);
    while !deck.is_empty() {
        deck.shuffle(&mut random);
        for &fault in &deck {
            let (from, to) = fault.lasts_ms();
            let step = Step {
                after_ms: random.random_range(PAUSE_MS_MIN..=PAUSE_MS_MAX),
                fault,
                place: random.random(),
                lasts_ms: random.random_range(from..=to),
            };
            at_ms += step.after_ms + step.lasts_ms + fault.recovery_ms();
            if at_ms > seconds * 1_000 {
                return steps;
            }
            steps.push(step);
        }
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_seed_and_a_time_are_one_schedule() {
        let first = schedule(7, 600, &Fault::ALL);
        assert_eq!(schedule(7, 600, &Fault::ALL), first);
        assert_ne!(schedule(8, 600, &Fault::ALL), first);
        let shorter = schedule(7, 300, &Fault::ALL);
        assert_eq!(shorter, first[..shorter.len()], "a shorter run is the beginning of a longer one");
        assert!(shorter.len() < first.len());
    }

    #[test]
    fn every_allowed_fault_comes_and_no_other() {
        let allowed = [Fault::KillLeader, Fault::StopWorker, Fault::KillWorker];
        let mut reversed = allowed;
        reversed.reverse();
        let steps = schedule(1, 120, &allowed);
        assert_eq!(steps, schedule(1, 120, &reversed), "the order in which they are named is no matter");
        let seen: BTreeSet<_> = steps.iter().map(|step| step.fault).collect();
        assert_eq!(seen, allowed.into_iter().collect());
        assert_eq!(schedule(1, 120, &[]), []);
        let all: BTreeSet<_> = schedule(3, 200, &Fault::ALL).iter().map(|step| step.fault).collect();
        assert_eq!(all.len(), Fault::ALL.len());
    }

    #[test]
    fn bounds_are_kept_and_the_time_is_about_full() {
        for seed in 0..50 {
            let steps = schedule(seed, 300, &Fault::ALL);
            let mut total = CALM_MS;
            for step in &steps {
                let (from, to) = step.fault.lasts_ms();
                assert!((from..=to).contains(&step.lasts_ms) && (PAUSE_MS_MIN..=PAUSE_MS_MAX).contains(&step.after_ms));
                total += step.after_ms + step.lasts_ms + step.fault.recovery_ms();
            }
            assert!((285_000..=300_000).contains(&total), "{total}");
        }
    }

    #[test]
    fn names_are_unique_and_read_back() {
        for fault in Fault::ALL {
            assert_eq!(Fault::of(fault.name()), Some(fault));
        }
        assert_eq!(Fault::of("earthquake"), None);
    }
}
