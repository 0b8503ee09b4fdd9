//! What goes wrong, and how often. A swarm of profiles finds more than one that does a little of everything: a storm of
//! crashes meets a forgotten vote ten times sooner than mixed weather.
use rand::{Rng, rngs::StdRng};

use super::{MS, SECOND, Us};

/// Which faults come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// A little of everything.
    Mixed,
    /// Coordinators die all the time, most in the middle of a write.
    CrashStorm,
    /// The network is cut, in one direction too, and loses, repeats and delays.
    Network,
    /// Disks are slow, fail and fill up; the power goes everywhere at once.
    Disks,
    /// Processes stand still and clocks run at different rates.
    Clocks,
    /// Workers come, go, and are cut off.
    Fleet,
    /// Coordinators are added, promoted, replaced and removed, while others die and are cut off.
    Members,
}

impl Profile {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Mixed, Self::CrashStorm, Self::Network, Self::Disks, Self::Clocks, Self::Fleet, Self::Members];

    /// The profile of a seed.
    pub fn of(seed: u64) -> Self {
        Self::ALL[(seed % Self::ALL.len() as u64) as usize]
    }

    /// The mean time between two faults.
    pub(super) fn pause_us(self) -> Us {
        match self {
            Self::CrashStorm => 250 * MS,
            Self::Fleet | Self::Network => 700 * MS,
            Self::Mixed | Self::Disks | Self::Clocks | Self::Members => SECOND,
        }
    }

    /// Between two looks of the operator at the members, if there is one: at least, and less than.
    pub(super) fn operator_pause_us(self) -> Option<(Us, Us)> {
        match self {
            Self::Members => Some((100 * MS, 1_500 * MS)),
            Self::Mixed => Some((SECOND, 5 * SECOND)),
            Self::CrashStorm | Self::Network | Self::Disks | Self::Clocks | Self::Fleet => None,
        }
    }

    /// How often each fault comes, relative to the others.
    fn weights(self) -> &'static [(Fault, u32)] {
        use Fault::{Blackout, Clock, Crash, CrashInWrite, Cut, DiskFull, Isolate, Judge, Pause, SlowDisk, Transfer, Weather};
        use Fault::{WorkerCrash, WorkerCut};
        match self {
            Self::Mixed => &[
                (Crash, 4),
                (CrashInWrite, 4),
                (Cut, 4),
                (Isolate, 3),
                (Weather, 2),
                (Pause, 3),
                (SlowDisk, 2),
                (DiskFull, 1),
                (Blackout, 1),
                (Clock, 1),
                (Transfer, 2),
                (WorkerCrash, 4),
                (WorkerCut, 2),
                (Judge, 2),
            ],
            Self::CrashStorm => &[(Crash, 4), (CrashInWrite, 10), (Blackout, 1), (Transfer, 2), (Cut, 1), (WorkerCrash, 1)],
            Self::Network => &[(Cut, 6), (Isolate, 6), (Weather, 6), (Crash, 1), (Transfer, 3), (WorkerCut, 2)],
            Self::Disks => &[(SlowDisk, 5), (DiskFull, 4), (CrashInWrite, 5), (Blackout, 3), (Crash, 2)],
            Self::Clocks => &[(Pause, 8), (Clock, 5), (Isolate, 2), (Transfer, 1), (WorkerCrash, 2), (Crash, 1)],
            Self::Members => &[
                (Crash, 4),
                (CrashInWrite, 4),
                (Cut, 3),
                (Isolate, 3),
                (Transfer, 4),
                (Weather, 2),
                (Pause, 2),
                (SlowDisk, 1),
                (Blackout, 1),
            ],
            Self::Fleet => &[(WorkerCrash, 10), (WorkerCut, 5), (Judge, 8), (Pause, 2), (Crash, 2), (Cut, 1)],
        }
    }

    /// Draws the next fault.
    pub(super) fn draw(self, random: &mut StdRng) -> Fault {
        let weights = self.weights();
        let mut left = random.random_range(0..weights.iter().map(|(_, weight)| weight).sum::<u32>());
        for &(fault, weight) in weights {
            if left < weight {
                return fault;
            }
            left -= weight;
        }
        Fault::Crash
    }
}

/// One thing that goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// A coordinator dies and comes back.
    Crash,
    /// A coordinator dies in the middle of one of its next writes.
    CrashInWrite,
    /// All coordinators die at the same moment.
    Blackout,
    /// A random set of coordinators is cut off from the others, in one direction perhaps.
    Cut,
    /// The leader alone is cut off from the other coordinators.
    Isolate,
    /// Packets are lost, repeated and delayed for a while.
    Weather,
    /// A coordinator stands still, as after SIGSTOP.
    Pause,
    /// Syncs of one disk take long.
    SlowDisk,
    /// One disk takes nothing more for a while.
    DiskFull,
    /// A coordinator's clock runs at another rate.
    Clock,
    /// Somebody asks the leader to hand over.
    Transfer,
    /// A worker dies and comes back in another life.
    WorkerCrash,
    /// A worker is cut off from all coordinators.
    WorkerCut,
    /// An operator calls a life of a worker dead, of which they heard a while ago.
    Judge,
}
