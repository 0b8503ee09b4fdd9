//! What a worker is, in one word: what is agreed on, and what the leader makes of it between two agreements.
use std::fmt;

use crate::{liveness::Doubt, state::WorkerState};

/// A worker, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Its life is agreed on, and it hasn't been heard of since: it gets nothing yet.
    Joining,
    /// It takes part.
    Ready,
    /// It is leaving: it gets nothing new, and what it has moves away.
    Draining,
    /// It fell silent, or most routers leave it alone. It gets nothing new until the doubt is gone, or it is dead.
    Suspect,
    /// Judged dead. It comes back as a new life only.
    Dead,
    /// Taken out on purpose. It comes back as a new life only.
    Removed,
}

impl Standing {
    /// By the agreed state, and the doubt that the leader has about this life. Only one that takes part can be in doubt: of
    /// the others more is known already.
    pub fn of(state: WorkerState, doubt: Option<Doubt>) -> Self {
        match (state, doubt) {
            (WorkerState::Ready, None) => Self::Ready,
            (WorkerState::Ready, Some(Doubt::Joining)) => Self::Joining,
            (WorkerState::Ready, Some(Doubt::Suspect)) => Self::Suspect,
            (WorkerState::Draining, _) => Self::Draining,
            (WorkerState::Dead, _) => Self::Dead,
            (WorkerState::Removed, _) => Self::Removed,
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Joining => "joining",
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Suspect => "suspect",
            Self::Dead => "dead",
            Self::Removed => "removed",
        })
    }
}
