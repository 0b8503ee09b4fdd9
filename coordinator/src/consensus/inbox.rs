//! The one way to the driver: a closed set of inputs through a queue that is bounded in number and in bytes.
use std::sync::{
    Arc, Weak,
    atomic::{AtomicUsize, Ordering},
};

use bytes::Bytes;
use cresset_core::{CommandId, level::Needs, members::MemberChange};
use tokio::{
    sync::{
        mpsc::{Receiver, Sender, channel, error::TrySendError},
        oneshot,
    },
    time::{Instant, timeout_at},
};

use super::{
    guard::Refused,
    node::{MemberSeen, NotTaken},
    pending::{ProposeReply, ReadReply},
};

/// Inputs that may wait.
const INPUTS_MAX: usize = 4_096;
/// Their bytes, unless a single one has more.
const BYTES_MAX: usize = 64 << 20;

/// Everything that can happen to a driver, beside the passing of time.
#[derive(Debug)]
pub(super) enum Input {
    /// Somebody wants a command applied, which may change the members.
    Propose { id: CommandId, command: Vec<u8>, needs: Needs, change: Option<MemberChange>, reply: ProposeReply },
    /// Somebody wants to read what is current.
    Read { reply: ReadReply },
    /// A message from a peer.
    Message { from: u64, message: Bytes },
    /// A snapshot from a peer; `taken` is answered once it is on the disk.
    Snapshot { from: u64, message: Bytes, data: Bytes, taken: oneshot::Sender<Result<(), Refused>> },
    /// Messages to this peer get lost.
    Unreachable { peer: u64 },
    /// A snapshot has reached this peer, or hasn't.
    SnapshotSent { peer: u64, arrived: bool },
    /// Hand leadership to this peer, or to any; `reply` says whether that was begun.
    TransferLeadership { to: Option<u64>, reply: oneshot::Sender<Result<(), NotTaken>> },
    /// Somebody wants to know what a leader knows of each member.
    Members { reply: oneshot::Sender<Vec<MemberSeen>> },
    /// Another peer says that this one was removed.
    Removed { by: u64 },
    /// Another peer says that a feature level is in force that this one doesn't know.
    Outdated { by: u64, level: u32 },
    /// End.
    Stop,
}

impl Input {
    fn bytes(&self) -> usize {
        match self {
            Self::Propose { command, .. } => command.len(),
            Self::Message { message, .. } => message.len(),
            Self::Snapshot { message, data, .. } => message.len() + data.len(),
            Self::Read { .. }
            | Self::Unreachable { .. }
            | Self::SnapshotSent { .. }
            | Self::TransferLeadership { .. }
            | Self::Members { .. }
            | Self::Removed { .. }
            | Self::Outdated { .. }
            | Self::Stop => 0,
        }
    }
}

/// Why an input wasn't taken. It is given back.
#[derive(Debug)]
pub(super) enum NotQueued {
    Full(Input),
    Closed,
}

/// Where inputs are put. Cheap to clone; never waits.
#[derive(Debug, Clone)]
pub(super) struct Inbox(Arc<Entrance>);

#[derive(Debug)]
struct Entrance {
    sender: Sender<Input>,
    bytes: Arc<AtomicUsize>,
}

/// An [`Inbox`] for the driver's own side: the driver ends once nobody else can put anything in.
#[derive(Debug, Clone)]
pub(super) struct WeakInbox(Weak<Entrance>);

impl WeakInbox {
    /// The inbox, if anybody else has it.
    pub(super) fn upgrade(&self) -> Option<Inbox> {
        self.0.upgrade().map(Inbox)
    }
}

impl Inbox {
    /// A queue, and where its inputs come out.
    pub(super) fn new() -> (Self, Arrivals) {
        let (sender, receiver) = channel(INPUTS_MAX);
        let bytes = Arc::new(AtomicUsize::new(0));
        (Self(Arc::new(Entrance { sender, bytes: Arc::clone(&bytes) })), Arrivals { receiver, bytes })
    }

    /// The same, without keeping the driver alive.
    pub(super) fn downgrade(&self) -> WeakInbox {
        WeakInbox(Arc::downgrade(&self.0))
    }

    /// Puts an input into the queue, or gives it back at once.
    pub(super) fn put(&self, input: Input) -> Result<(), NotQueued> {
        let Entrance { sender, bytes } = &*self.0;
        let weight = input.bytes();
        let before = bytes.fetch_add(weight, Ordering::AcqRel);
        if before > 0 && weight > 0 && before.saturating_add(weight) > BYTES_MAX {
            bytes.fetch_sub(weight, Ordering::AcqRel);
            return Err(NotQueued::Full(input));
        }
        sender.try_send(input).map_err(|error| {
            bytes.fetch_sub(weight, Ordering::AcqRel);
            match error {
                TrySendError::Full(input) => NotQueued::Full(input),
                TrySendError::Closed(_) => NotQueued::Closed,
            }
        })
    }

    /// Puts an input that must not be lost. Waits while the queue is full; `false` once the driver has ended.
    pub(super) async fn put_surely(&self, mut input: Input) -> bool {
        loop {
            match self.put(input) {
                Ok(()) => return true,
                Err(NotQueued::Closed) => return false,
                Err(NotQueued::Full(back)) => input = back,
            }
            // The driver takes inputs off by the hundred; there is nothing to be woken by.
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    }
}

/// Where the driver finds its inputs.
#[derive(Debug)]
pub(super) struct Arrivals {
    receiver: Receiver<Input>,
    bytes: Arc<AtomicUsize>,
}

impl Arrivals {
    /// The next input, if one comes before `deadline`. `Err` once nobody can put one in any more.
    pub(super) async fn next(&mut self, deadline: Instant) -> Result<Option<Input>, ()> {
        match timeout_at(deadline, self.receiver.recv()).await {
            Ok(Some(input)) => Ok(Some(self.taken(input))),
            Ok(None) => Err(()),
            Err(_) => Ok(None),
        }
    }

    /// An input that is there already.
    pub(super) fn waiting(&mut self) -> Option<Input> {
        self.receiver.try_recv().ok().map(|input| self.taken(input))
    }

    fn taken(&self, input: Input) -> Input {
        self.bytes.fetch_sub(input.bytes(), Ordering::AcqRel);
        input
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(bytes: usize) -> Input {
        Input::Message { from: 1, message: vec![0; bytes].into() }
    }

    #[test]
    fn the_queue_is_bounded_in_number() {
        let (inbox, mut arrivals) = Inbox::new();
        for _ in 0..INPUTS_MAX {
            inbox.put(Input::Unreachable { peer: 1 }).unwrap();
        }
        assert!(matches!(inbox.put(Input::Stop), Err(NotQueued::Full(Input::Stop))));
        arrivals.waiting().expect("there are many");
        inbox.put(Input::Stop).unwrap();
        drop(arrivals);
        assert!(matches!(inbox.put(Input::Stop), Err(NotQueued::Closed)));
    }

    #[test]
    fn the_queue_is_bounded_in_bytes_but_takes_one_input_of_any_size() {
        let (inbox, mut arrivals) = Inbox::new();
        inbox.put(message(BYTES_MAX + 1)).unwrap();
        assert!(matches!(inbox.put(message(1)), Err(NotQueued::Full(_))));
        inbox.put(Input::Stop).unwrap();
        arrivals.waiting().expect("it is there");
        inbox.put(message(1)).unwrap();
    }
}
