//! A cluster's control plane in one thread and in virtual time, hurt in every way that a seed can think of.
//!
//! What runs is what is shipped: [`Node`](cresset_coordinator::consensus::Node), which is the Raft driver without its
//! thread, over a disk and a network that are simulated; `apply`, `placement`, `liveness` and `routes`. What is imitated is
//! their shells: workers that beat and load, the leader's duties, clients that write and read, an operator who changes the
//! members. One seed decides everything
//! (delays, losses, crashes, pauses, clocks), so a run that fails can be had again, to the last message.
//!
//! A run has two phases. In the first, faults come and go and only safety is asked for: `checks` looks after every step. In
//! the second all is healed, and progress is demanded: a leader, equal peers, answered clients, placed replicas. At the end
//! the clients' histories are held against a register each, by [`linearizability`](crate::linearizability).
//!
//! Whether it finds bugs is shown by planting some: see [`Mutant`]. They live here, in the disk, the state machine and the
//! clients, so that the shipped code has no switch for them.
//!
//! Absent: sockets, and so the driver, `Consensus` and the gRPC transport. `tests/tests/wiring` has those in a simulated network,
//! and the process tests have them as they are.
pub mod campaign;
mod checks;
mod clients;
pub mod disk;
mod faults;
mod fleet;
mod machine;
mod members;
mod network;
mod peer;
pub mod register;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use faults::Profile;

/// Microseconds of virtual time.
pub type Us = u64;
const MS: Us = 1_000;
const SECOND: Us = 1_000 * MS;

/// How long faults may come, and how long the cluster has afterwards to show that it recovers.
pub const CHAOS_SECONDS: u64 = 60;
/// See [`CHAOS_SECONDS`].
pub const HEALED_SECONDS: u64 = 15;

const END: Us = (CHAOS_SECONDS + HEALED_SECONDS) * SECOND;

/// A bug that is planted to see whether the simulation finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutant {
    /// A promise leaves before the disk holds it: a write that should be synced isn't.
    SendBeforeFsync,
    /// A restarted peer has forgotten whom it voted for.
    ForgetVote,
    /// A snapshot lacks the remembered commands, so a command that is retried after it is applied again.
    ApplyTwiceAfterSnapshot,
    /// A retried command is applied again in any case.
    NoDeduplication,
    /// A peer that believes that it leads answers reads from its own state.
    ReadFromDeposedLeader,
    /// A verdict on one life of a worker strikes its next one.
    VerdictOnNewLife,
    /// Compaction drops entries that weren't applied when the snapshot was made.
    CompactUnapplied,
    /// A command is answered when it is proposed, not when it is applied.
    AnswerAtPropose,
    /// A restarted peer takes the founders for the members.
    ForgetMembers,
}

impl Mutant {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::SendBeforeFsync,
        Self::ForgetVote,
        Self::ApplyTwiceAfterSnapshot,
        Self::NoDeduplication,
        Self::ReadFromDeposedLeader,
        Self::VerdictOnNewLife,
        Self::CompactUnapplied,
        Self::AnswerAtPropose,
        Self::ForgetMembers,
    ];
}

/// What to simulate.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// Decides everything that isn't given here.
    pub seed: u64,
    /// Which faults come.
    pub profile: Profile,
    /// A bug to plant.
    pub mutant: Option<Mutant>,
}

impl Scenario {
    /// The healthy code under the seed's own profile.
    pub fn new(seed: u64) -> Self {
        Self { seed, profile: Profile::of(seed), mutant: None }
    }
}

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The first thing that was wrong.
    pub violation: Option<String>,
    /// Of everything that happened, in order: equal for equal runs.
    pub hash: u64,
    /// Writes and reads that were answered.
    pub answered: u64,
    /// Coordinators' lives that ended.
    pub crashes: u64,
    /// Terms that had a leader.
    pub leaders: u64,
    /// Changes of the members that were made.
    pub member_changes: u64,
    /// Virtual time that has passed.
    pub seconds: u64,
}

/// Runs a scenario to its end, or to the first violation.
pub fn run(scenario: Scenario) -> Report {
    // A panic is a finding like any other. Nothing of the world outlives it.
    catch_unwind(AssertUnwindSafe(|| world::World::new(scenario).run())).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
        Report {
            violation: Some(format!("panicked: {text}")),
            hash: 0,
            answered: 0,
            crashes: 0,
            leaders: 0,
            member_changes: 0,
            seconds: 0,
        }
    })
}
