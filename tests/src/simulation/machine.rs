//! The shipped state machine, with a witness.
use cresset_coordinator::consensus::StateMachine;
use cresset_core::{
    ClusterState, Command, CommandBody, CommandId, DecodeError, Effect, Outcome, apply,
    members::{MemberChange, Members},
    snapshot,
    state::Remembered,
};

use super::Mutant;

/// The cluster's state on one peer.
pub(super) struct Machine {
    pub(super) state: ClusterState,
    mutant: Option<Mutant>,
}

/// A command that was applied, as the peer that applied it saw it.
pub(super) struct Applied {
    pub(super) command: Command,
    pub(super) outcome: Outcome,
    pub(super) effects: Vec<Effect>,
    /// What the state was like right after it, as far as the checks ask.
    pub(super) seen: super::checks::Seen,
}

impl Machine {
    pub(super) fn new(mutant: Option<Mutant>) -> Self {
        Self { state: ClusterState::new("simulation"), mutant }
    }

    /// What the planted bug makes of a command.
    fn spoilt(&self, index: u64, mut command: Command) -> Command {
        match (self.mutant, &mut command.body) {
            (Some(Mutant::NoDeduplication), _) => {
                let mut id = command.id.0;
                id[..8].copy_from_slice(&index.to_be_bytes());
                command.id = CommandId(id);
            }
            (Some(Mutant::VerdictOnNewLife), CommandBody::MarkDead { worker, incarnation, .. }) => {
                *incarnation = self.state.workers.get(worker).map_or(*incarnation, |known| known.incarnation);
            }
            _ => {}
        }
        command
    }
}

impl StateMachine for Machine {
    type Outcome = Applied;

    fn apply(&mut self, index: u64, bytes: &[u8]) -> Result<Applied, DecodeError> {
        let command = Command::decode(bytes)?;
        let epoch_before = self.state.epoch;
        let served_before = matches!(command.body, CommandBody::Deploy(_)).then(|| super::checks::served(&self.state));
        let spoilt = self.spoilt(index, command.clone());
        let (outcome, effects) = apply(&mut self.state, &spoilt);
        let mut seen = super::checks::Seen::of(&self.state, epoch_before, &command);
        if let Some(before) = served_before {
            seen.deployed(&before, &self.state);
        }
        Ok(Applied { command, outcome, effects, seen })
    }

    fn change_made(applied: &Applied) -> Option<&MemberChange> {
        applied.effects.iter().find_map(|effect| match effect {
            Effect::MembersChanged { change } => Some(change),
            Effect::EpochAdvanced { .. } | Effect::WorkerFenced { .. } => None,
        })
    }

    fn follow(&mut self, members: &Members) {
        self.state.members = members.clone();
    }

    fn snapshot(&self) -> Vec<u8> {
        if self.mutant == Some(Mutant::ApplyTwiceAfterSnapshot) {
            return snapshot::encode(&ClusterState { remembered: Remembered::default(), ..self.state.clone() });
        }
        snapshot::encode(&self.state)
    }

    fn check(&self, bytes: &[u8]) -> Result<(), DecodeError> {
        snapshot::decode(bytes).map(drop)
    }

    fn restore(&mut self, bytes: &[u8], members: &Members) -> Result<(), DecodeError> {
        self.state = ClusterState { members: members.clone(), ..snapshot::decode(bytes)? };
        Ok(())
    }
}
