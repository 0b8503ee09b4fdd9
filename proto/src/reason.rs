//! Why a call was refused, in words that a program can act on.
//!
//! A gRPC code alone can't tell a router whether a request may move: Triton's clients expect UNAVAILABLE both for a full
//! queue and for a server that is going away. So every refusal carries a [`Reason`] in its metadata, and the one table
//! below says which code a stock client sees. What a router does with a reason is the router's business (`client::retry`).
use std::{fmt, str::FromStr, time::Duration};

use tonic::{Code, Status, metadata::MetadataValue};

use crate::metadata::{REASON, RETRY_PUSHBACK};

macro_rules! reasons {
    ($($(#[$doc:meta])* $name:ident = $text:literal => $code:ident;)*) => {
        /// Why a call was refused.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Reason { $($(#[$doc])* $name,)* }

        impl Reason {
            /// Every reason, in the order of the table.
            pub const ALL: &'static [Reason] = &[$(Reason::$name,)*];

            /// The gRPC code that a client sees.
            pub const fn code(self) -> Code {
                match self { $(Self::$name => Code::$code,)* }
            }

            /// The word on the wire.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }
        }

        impl FromStr for Reason {
            type Err = ();
            fn from_str(text: &str) -> Result<Self, ()> {
                match text { $($text => Ok(Self::$name),)* _ => Err(()) }
            }
        }
    };
}

reasons! {
    /// The request is wrong in itself; it would be wrong anywhere.
    InvalidArgument = "invalid-argument" => InvalidArgument;
    /// Nobody has deployed such a model, or such a version of it.
    UnknownModel = "unknown-model" => NotFound;
    /// The model is deployed, and this worker doesn't hold it (any more, or yet).
    NotHere = "not-here" => Unavailable;
    /// The caller means another life of this worker.
    Fenced = "fenced" => FailedPrecondition;
    /// The worker is going away and takes nothing new.
    Draining = "draining" => Unavailable;
    /// The queue is at its bound.
    QueueFull = "queue-full" => Unavailable;
    /// No room for one more sequence.
    SequencesFull = "sequences-full" => Unavailable;
    /// The request waited longer than its queue policy allows.
    QueueTimeout = "queue-timeout" => Unavailable;
    /// The caller's deadline passed before the request was run.
    DeadlineExceeded = "deadline-exceeded" => DeadlineExceeded;
    /// A sequence was continued that isn't open.
    SequenceNotStarted = "sequence-not-started" => InvalidArgument;
    /// A client wants to go on with a sequence whose state nobody has any more.
    SequenceLost = "sequence-lost" => Aborted;
    /// A later connection of the same client has the sequence now.
    TakenOver = "taken-over" => Aborted;
    /// The state of a sequence couldn't be taken over.
    BadCheckpoint = "bad-checkpoint" => Internal;
    /// The model raised an error.
    ModelFailed = "model-failed" => Internal;
    /// The device ran out of memory for this batch.
    OutOfMemory = "out-of-memory" => Unavailable;
    /// The device can't be trusted at the moment.
    DeviceUnhealthy = "device-unhealthy" => Unavailable;
    /// It ran together with others when their device was given up: any of them may be to blame.
    Suspect = "suspect" => Unavailable;
    /// No replica is ready.
    NoReplica = "no-replica" => Unavailable;
    /// No coordinator leads at the moment.
    NoLeader = "no-leader" => Unavailable;
    /// It may or may not have happened; asking again with the same id is safe.
    Indeterminate = "indeterminate" => Unavailable;
    /// There is one of that name already.
    AlreadyExists = "already-exists" => AlreadyExists;
    /// No shared memory region is registered under that name.
    UnknownRegion = "unknown-region" => NotFound;
    /// A shared memory object can't be opened, read or written.
    RegionFailed = "region-failed" => Internal;
    /// The state of things forbids it.
    Conflict = "conflict" => FailedPrecondition;
    /// Not built, or not for this model.
    Unsupported = "unsupported" => Unimplemented;
    /// A load failed.
    LoadFailed = "load-failed" => Internal;
    /// A defect of Cresset's own.
    Internal = "internal" => Internal;
}

impl Reason {
    /// A status with this reason beside it.
    pub fn status(self, message: impl Into<String>) -> Status {
        let mut status = Status::new(self.code(), message);
        status.metadata_mut().insert(REASON, MetadataValue::from_static(self.as_str()));
        status
    }

    /// A status with this reason, and when it is worth asking again.
    pub fn status_with_pushback(self, message: impl Into<String>, pushback: Duration) -> Status {
        let mut status = self.status(message);
        let ms = u32::try_from(pushback.as_millis()).unwrap_or(u32::MAX);
        status.metadata_mut().insert(RETRY_PUSHBACK, MetadataValue::from(ms));
        status
    }

    /// The reason that a status carries, if it came from Cresset.
    pub fn of(status: &Status) -> Option<Self> {
        status.metadata().get(REASON)?.to_str().ok()?.parse().ok()
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::retry_pushback;

    #[test]
    fn a_reason_survives_the_wire() {
        for reason in Reason::ALL {
            let status = reason.status("x");
            assert_eq!(Reason::of(&status), Some(*reason));
            assert_eq!(status.code(), reason.code());
        }
        assert_eq!(Reason::of(&Status::unavailable("from someone else")), None);
        let status = Reason::QueueFull.status_with_pushback("x", Duration::from_millis(70));
        assert_eq!(retry_pushback(status.metadata()), Some(Duration::from_millis(70)));
        assert_eq!((Reason::of(&status), retry_pushback(Status::ok("").metadata())), (Some(Reason::QueueFull), None));
    }
}
