//! Feature levels: what every coordinator is known to understand.
//!
//! Coordinators are upgraded one after the other, so for a while some of them know commands that others can't read; and one
//! that can't read a committed command has to stop. So what a version of Cresset adds belongs to a level. Each coordinator
//! tells the others the highest one that it knows, and the state has the one that is in force. It rises once every member is
//! known to know a higher one ([`to_raise`]), and never falls. What needs more than is in force is refused until then
//! ([`Needs`]).
//!
//! The leading byte of a command is the level that its reader has to know, that of a snapshot the level that is in force. A
//! version that doesn't know it says so by name, rather than to guess. What was written before there were levels has a 1 there.
use std::{collections::BTreeMap, fmt};

use crate::{
    ClusterState, CommandBody, PeerId,
    command::{MODELS_MAX, MODELS_MAX_FIRST},
};

/// A feature level.
pub type Level = u8;

/// The level of what was there before there were levels.
pub const LEVEL_FIRST: Level = 1;
/// The highest level that this version of Cresset knows.
pub const LEVEL_KNOWN: Level = 2;
/// The level from which on workers can be removed.
pub const LEVEL_REMOVE_WORKER: Level = 2;
/// The level from which on replicas that answer can be moved.
pub const LEVEL_REARRANGE: Level = 2;
/// The level from which on deployments have priorities, and make room for one another.
pub const LEVEL_CLAIMS: Level = 2;
/// The level from which on there may be [`MODELS_MAX`] models.
pub const LEVEL_MODELS: Level = 2;

/// What has to be in force for a command to be proposed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Needs {
    /// At least this level.
    pub level: Level,
    /// What the command does, for people.
    pub what: &'static str,
}

impl Needs {
    /// Whether it may be proposed where this level is in force.
    ///
    /// # Errors
    /// [`LevelTooLow`], with the way out.
    pub fn met_by(self, in_force: Level) -> Result<(), LevelTooLow> {
        if in_force >= self.level { Ok(()) } else { Err(LevelTooLow { needs: self, in_force }) }
    }
}

/// A command that not every coordinator is known to understand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LevelTooLow {
    /// What it needs.
    pub needs: Needs,
    /// What is in force.
    pub in_force: Level,
}

impl std::error::Error for LevelTooLow {}

impl fmt::Display for LevelTooLow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Needs { level, what }, in_force) = (self.needs, self.in_force);
        write!(
            f,
            "{what} needs feature level {level}, and {in_force} is in force, since not every coordinator is known to know {level}; \
             finish the upgrade: `cresset status` shows who holds it up"
        )
    }
}

/// Most models that can be deployed, each version counted. Every coordinator has to come to the same answer, so it grows with the
/// level.
pub fn models_max(in_force: Level) -> usize {
    if in_force >= LEVEL_MODELS { MODELS_MAX } else { MODELS_MAX_FIRST }
}

impl CommandBody {
    /// The level that a reader of the command has to know.
    pub fn level(&self) -> Level {
        match self {
            Self::RaiseLevel { level } => *level,
            _ => self.needs().level,
        }
    }

    /// What has to be in force before the command is proposed.
    pub fn needs(&self) -> Needs {
        let (level, what) = match self {
            Self::RemoveWorker { .. } => (LEVEL_REMOVE_WORKER, "removing a worker"),
            Self::Rearrange { .. } => (LEVEL_REARRANGE, "moving replicas that answer"),
            Self::Evict { .. } => (LEVEL_CLAIMS, "making room for a higher priority"),
            Self::DeploySet(set) if set.versions.iter().any(|version| !version.claim.is_default()) => {
                (LEVEL_CLAIMS, "a deployment with a priority")
            }
            // Raised is what isn't in force yet. The leader has asked every member, see `to_raise`.
            Self::RaiseLevel { .. } => (LEVEL_FIRST, "raising the feature level"),
            Self::AnnouncePeer { .. }
            | Self::RegisterWorker(_)
            | Self::DrainWorker { .. }
            | Self::MarkDead { .. }
            | Self::Deploy(_)
            | Self::Undeploy { .. }
            | Self::Place { .. }
            | Self::ReportReplicas { .. }
            | Self::DeploySet(_)
            | Self::UndeployVersion { .. }
            | Self::SetLabels { .. }
            | Self::ChangeMembers(_) => (LEVEL_FIRST, "this"),
        };
        Needs { level, what }
    }
}

/// The level to raise the state's to, if every member, voter or learner, is known to know a higher one than is in force.
/// `known` is what they said, that of the one that asks included; a member that isn't in it may know nothing.
pub fn to_raise(state: &ClusterState, known: &BTreeMap<PeerId, Level>) -> Option<Level> {
    let by_each = state.members.all().into_iter().map(|member| known.get(&member).copied().unwrap_or_default());
    by_each.min().filter(|by_all| *by_all > state.level)
}

/// Raises it. Once more, or behind one that raised it further, is no news.
pub(crate) fn raise(state: &mut ClusterState, level: Level) {
    state.level = state.level.max(level);
}

#[cfg(test)]
mod tests;
