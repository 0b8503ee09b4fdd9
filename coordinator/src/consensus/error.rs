//! What can go wrong for callers, and the one table between that and the wire.
use tonic::{Code, Status};

use super::{
    log::LogError,
    node::{NodeError, NotTaken},
    settings::{COMMAND_BYTES_MAX, Problem},
};

const LEADER: &str = "cresset-leader";

/// Why a proposal has no outcome. The same command may always be proposed again: it is applied once.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProposeError {
    /// It was not proposed: the peer that was asked doesn't lead.
    #[error("no leader took the command; try again in a moment")]
    NotLeader {
        /// Who leads, as far as that peer knows.
        leader: Option<u64>,
    },
    /// It was proposed, and may yet be applied.
    #[error("leadership changed while the command waited for its commit; whether it will be applied is unknown")]
    Indeterminate {
        /// Who leads now, as far as known.
        leader: Option<u64>,
    },
    /// It was not proposed: too many wait.
    #[error("too many commands wait for their commit; try again later")]
    Overloaded,
    /// It was not proposed: it changes the members, as an earlier one still does.
    #[error("another change of the members is under way; try again when it is done")]
    MembersChanging,
    /// It was not proposed: as things are, it would do harm.
    #[error("{problem}")]
    Refused {
        /// Why, and what can be done.
        problem: String,
    },
    /// It can't be proposed.
    #[error("the command has {bytes} bytes, at most {COMMAND_BYTES_MAX} are taken")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// The leader could not be asked, or its answer was lost; the command may have been applied.
    #[error("the leader c{leader} doesn't answer: {problem}")]
    Unreachable {
        /// Who was asked.
        leader: u64,
        /// What went wrong.
        problem: String,
    },
    /// This coordinator is ending.
    #[error("this coordinator is shutting down")]
    Shutdown,
}

impl ProposeError {
    /// Whether proposing the same command here again can help.
    pub fn retryable(&self) -> bool {
        match self {
            Self::NotLeader { .. }
            | Self::Indeterminate { .. }
            | Self::Overloaded
            | Self::MembersChanging
            | Self::Unreachable { .. } => true,
            Self::Refused { .. } | Self::TooLarge { .. } | Self::Shutdown => false,
        }
    }

    pub(super) fn to_status(&self) -> Status {
        let (code, leader) = match self {
            Self::NotLeader { leader } => (Code::FailedPrecondition, *leader),
            Self::Indeterminate { leader } => (Code::Aborted, *leader),
            Self::Overloaded => (Code::ResourceExhausted, None),
            Self::MembersChanging => (Code::OutOfRange, None),
            Self::Refused { .. } => (Code::PermissionDenied, None),
            Self::TooLarge { .. } => (Code::InvalidArgument, None),
            Self::Unreachable { .. } => (Code::Unknown, None),
            Self::Shutdown => (Code::Unavailable, None),
        };
        with_leader(Status::new(code, self.to_string()), leader)
    }

    /// What a status of `asked` means to the caller here.
    pub(super) fn from_status(asked: u64, bytes: usize, status: &Status) -> Self {
        match status.code() {
            Code::FailedPrecondition => Self::NotLeader { leader: leader_of(status) },
            Code::Aborted => Self::Indeterminate { leader: leader_of(status) },
            Code::ResourceExhausted => Self::Overloaded,
            Code::OutOfRange => Self::MembersChanging,
            Code::PermissionDenied => Self::Refused { problem: status.message().to_owned() },
            Code::InvalidArgument if bytes > COMMAND_BYTES_MAX => Self::TooLarge { bytes },
            // A leader of an earlier version, which can't read it.
            Code::InvalidArgument => Self::Refused { problem: status.message().to_owned() },
            // A peer that is ending, or a connection that broke: the command may have got through.
            _ => Self::Unreachable { leader: asked, problem: status.message().to_owned() },
        }
    }
}

impl From<NotTaken> for ProposeError {
    fn from(why: NotTaken) -> Self {
        match why {
            NotTaken::NotLeader { leader } => Self::NotLeader { leader },
            NotTaken::Changing => Self::NotLeader { leader: None },
            NotTaken::Overloaded => Self::Overloaded,
            NotTaken::MembersChanging => Self::MembersChanging,
            NotTaken::Refused(refusal) => Self::Refused { problem: refusal.to_string() },
            NotTaken::TooLarge { bytes } => Self::TooLarge { bytes },
        }
    }
}

/// Why a current read isn't possible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReadError {
    /// No leader could be asked in time, or it has no majority.
    #[error("no leader confirmed the read in time: {problem}")]
    NoLeader {
        /// What the last attempt met.
        problem: String,
    },
    /// A leader confirmed the read, but this coordinator didn't catch up in time.
    #[error("this coordinator has applied entry {applied}, a current read needs {wanted}")]
    Behind {
        /// How far it is.
        applied: u64,
        /// How far it had to be.
        wanted: u64,
    },
    /// Too many reads wait.
    #[error("too many reads wait for the leader; try again later")]
    Overloaded,
    /// This coordinator is ending.
    #[error("this coordinator is shutting down")]
    Shutdown,
}

/// Why one attempt at a read failed; the next may not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum ReadRefused {
    #[error("the peer that was asked doesn't lead")]
    NotLeader { leader: Option<u64> },
    #[error("too many reads wait")]
    Overloaded,
    #[error("the coordinator is shutting down")]
    Shutdown,
    #[error("c{leader} doesn't answer: {problem}")]
    Unreachable { leader: u64, problem: String },
}

impl ReadRefused {
    pub(super) fn to_status(&self) -> Status {
        let (code, leader) = match self {
            Self::NotLeader { leader } => (Code::FailedPrecondition, *leader),
            Self::Overloaded => (Code::ResourceExhausted, None),
            Self::Shutdown | Self::Unreachable { .. } => (Code::Unavailable, None),
        };
        with_leader(Status::new(code, self.to_string()), leader)
    }

    pub(super) fn from_status(asked: u64, status: &Status) -> Self {
        match status.code() {
            Code::FailedPrecondition => Self::NotLeader { leader: leader_of(status) },
            Code::ResourceExhausted => Self::Overloaded,
            _ => Self::Unreachable { leader: asked, problem: status.message().to_owned() },
        }
    }
}

impl From<NotTaken> for ReadRefused {
    fn from(why: NotTaken) -> Self {
        match why {
            NotTaken::NotLeader { leader } => Self::NotLeader { leader },
            NotTaken::Changing => Self::NotLeader { leader: None },
            // Only the first of these is an answer to a read.
            NotTaken::Overloaded | NotTaken::TooLarge { .. } | NotTaken::MembersChanging | NotTaken::Refused(_) => {
                Self::Overloaded
            }
        }
    }
}

/// Why leadership wasn't handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransferError {
    /// The peer that was asked doesn't lead.
    #[error("no leader could be asked to hand over; try again in a moment")]
    NotLeader {
        /// Who does, as far as it knows.
        leader: Option<u64>,
    },
    /// As things are, it can't be.
    #[error("{problem}")]
    Refused {
        /// Why, and what can be done.
        problem: String,
    },
    /// It was begun, and nobody has taken over in time. The leader goes on then.
    #[error("nobody took over in time; `cresset status` shows who leads")]
    TimedOut,
    /// The leader could not be asked, or its answer was lost.
    #[error("the leader c{leader} doesn't answer: {problem}")]
    Unreachable {
        /// Who was asked.
        leader: u64,
        /// What went wrong.
        problem: String,
    },
    /// This coordinator is ending.
    #[error("this coordinator is shutting down")]
    Shutdown,
}

impl TransferError {
    pub(super) fn to_status(&self) -> Status {
        let (code, leader) = match self {
            Self::NotLeader { leader } => (Code::FailedPrecondition, *leader),
            Self::Refused { .. } => (Code::PermissionDenied, None),
            Self::TimedOut => (Code::Aborted, None),
            Self::Unreachable { .. } => (Code::Unknown, None),
            Self::Shutdown => (Code::Unavailable, None),
        };
        with_leader(Status::new(code, self.to_string()), leader)
    }

    pub(super) fn from_status(asked: u64, status: &Status) -> Self {
        match status.code() {
            Code::FailedPrecondition => Self::NotLeader { leader: leader_of(status) },
            Code::PermissionDenied => Self::Refused { problem: status.message().to_owned() },
            Code::Aborted => Self::TimedOut,
            _ => Self::Unreachable { leader: asked, problem: status.message().to_owned() },
        }
    }
}

fn with_leader(mut status: Status, leader: Option<u64>) -> Status {
    if let Some(leader) = leader {
        status.metadata_mut().insert(LEADER, leader.into());
    }
    status
}

fn leader_of(status: &Status) -> Option<u64> {
    status.metadata().get(LEADER)?.to_str().ok()?.parse().ok()
}

/// Why consensus can't start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The settings are wrong.
    #[error("{}", problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Settings {
        /// All of their problems.
        problems: Vec<Problem>,
    },
    /// The data folder can't be used.
    #[error(transparent)]
    Log(#[from] LogError),
    /// What it holds doesn't fit.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// No thread could be started.
    #[error("can't start the raft thread: {0}")]
    Thread(#[source] std::io::Error),
    /// The transport needs one.
    #[error("consensus must be started inside a tokio runtime")]
    NoRuntime,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_survive_the_wire() {
        let errors = [
            ProposeError::NotLeader { leader: Some(2) },
            ProposeError::NotLeader { leader: None },
            ProposeError::Indeterminate { leader: Some(3) },
            ProposeError::Overloaded,
            ProposeError::MembersChanging,
            ProposeError::Refused { problem: "c4 is behind".into() },
            ProposeError::TooLarge { bytes: COMMAND_BYTES_MAX + 9 },
        ];
        for error in errors {
            assert_eq!(ProposeError::from_status(1, COMMAND_BYTES_MAX + 9, &error.to_status()), error);
        }
        let unreadable = Status::invalid_argument("command has format 2, this version reads 1; upgrade this process");
        let problem = unreadable.message().to_owned();
        assert_eq!(ProposeError::from_status(1, 9, &unreadable), ProposeError::Refused { problem });
        let unsure = ProposeError::from_status(1, 9, &ProposeError::Shutdown.to_status());
        assert!(matches!(unsure, ProposeError::Unreachable { leader: 1, .. }) && unsure.retryable());
        for refused in [ReadRefused::NotLeader { leader: Some(2) }, ReadRefused::Overloaded] {
            assert_eq!(ReadRefused::from_status(1, &refused.to_status()), refused);
        }
    }
}
