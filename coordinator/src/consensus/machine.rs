//! What the log is for: the state that every peer reaches by applying the same commands.
use std::sync::Arc;

use cresset_core::{
    ClusterState, Command, CommandId, DecodeError, Effect, Outcome, apply,
    level::{LEVEL_KNOWN, Level},
    members::{MemberChange, Members},
    snapshot,
};
use parking_lot::RwLock;

/// A state that is changed by commands only.
pub trait StateMachine {
    /// What became of a command.
    type Outcome;

    /// Applies a committed command. The same state and bytes lead to the same state and outcome on every peer.
    ///
    /// # Errors
    /// Why the command can't be read. The node stops: going on without it would part its state from the others'.
    fn apply(&mut self, index: u64, command: &[u8]) -> Result<Self::Outcome, DecodeError>;

    /// How a command changed the members, if it did. The same one doesn't a second time.
    fn change_made(outcome: &Self::Outcome) -> Option<&MemberChange>;

    /// Who the members are from here on.
    fn follow(&mut self, members: &Members);

    /// The whole state as bytes.
    fn snapshot(&self) -> Vec<u8>;

    /// Checks bytes from a peer: they will be given to [`restore`](Self::restore).
    ///
    /// # Errors
    /// Why they can't be read.
    fn check(&self, snapshot: &[u8]) -> Result<(), DecodeError>;

    /// Replaces the state by that of a snapshot, at which these were the members.
    ///
    /// # Errors
    /// Why the bytes can't be read; the state is as it was.
    fn restore(&mut self, snapshot: &[u8], members: &Members) -> Result<(), DecodeError>;
}

/// An applied command.
#[derive(Debug, Clone)]
pub struct Answer {
    /// Which command.
    pub id: CommandId,
    /// How it was answered.
    pub outcome: Outcome,
    /// What it changed.
    pub effects: Vec<Effect>,
}

/// The cluster's state, readable while the driver applies to it.
#[derive(Debug, Clone)]
pub struct Shared {
    state: Arc<RwLock<ClusterState>>,
    level_known: Level,
}

impl Shared {
    /// Starts from `state`.
    pub fn new(state: ClusterState) -> Self {
        Self { state: Arc::new(RwLock::new(state)), level_known: LEVEL_KNOWN }
    }

    /// The same, which can read no more than a version that knows this level.
    #[must_use]
    pub fn knowing(self, level_known: Level) -> Self {
        Self { level_known, ..self }
    }

    /// The state itself. Writing to it is the driver's alone.
    pub(super) fn state(&self) -> &Arc<RwLock<ClusterState>> {
        &self.state
    }
}

impl StateMachine for Shared {
    type Outcome = Answer;

    fn apply(&mut self, _index: u64, command: &[u8]) -> Result<Answer, DecodeError> {
        let command = Command::decode_knowing(self.level_known, command)?;
        let (outcome, effects) = apply(&mut self.state.write(), &command);
        Ok(Answer { id: command.id, outcome, effects })
    }

    fn change_made(outcome: &Answer) -> Option<&MemberChange> {
        outcome.effects.iter().find_map(|effect| match effect {
            Effect::MembersChanged { change } => Some(change),
            Effect::EpochAdvanced { .. } | Effect::WorkerFenced { .. } => None,
        })
    }

    fn follow(&mut self, members: &Members) {
        self.state.write().members = members.clone();
    }

    fn snapshot(&self) -> Vec<u8> {
        snapshot::encode(&self.state.read())
    }

    fn check(&self, bytes: &[u8]) -> Result<(), DecodeError> {
        snapshot::decode_knowing(self.level_known, bytes).map(|_| ())
    }

    fn restore(&mut self, bytes: &[u8], members: &Members) -> Result<(), DecodeError> {
        let state = ClusterState { members: members.clone(), ..snapshot::decode_knowing(self.level_known, bytes)? };
        *self.state.write() = state;
        Ok(())
    }
}
