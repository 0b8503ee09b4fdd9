//! The truth of a sequence: its last checkpoint and the requests since.
//!
//! Workers only cache it. When the worker of a sequence dies, another one gets the checkpoint and the requests after it, and
//! answers them all again; what was delivered before is discarded here, so the caller gets each answer once and in order.
//!
//! Two pure parts. [`Journal`] lives as long as the sequence. A [`Lane`] is one life of the stream to one worker: it numbers
//! what is sent there. The two count alike until a request fails by itself: such a request left no trace in the state, so it
//! is not replayed, while the numbers on a stream must have no gaps.
//!
//! Absent here: time, IO, who waits for an answer, and which worker is next.
use std::collections::VecDeque;

use bytes::Bytes;
use cresset_proto::inference::ModelInferRequest;
use prost::Message;

/// Bounds and rhythm of a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most bytes of requests that a journal keeps.
    pub bytes_max: usize,
    /// Ask for a checkpoint with every so many-th request.
    pub checkpoint_requests: u64,
    /// Ask for a checkpoint after so many bytes of requests.
    pub checkpoint_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes_max: 64 << 20, checkpoint_requests: 8, checkpoint_bytes: 1 << 20 }
    }
}

/// The journal has no room for one more request until a checkpoint trims it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a request of {request_bytes} bytes doesn't fit the sequence's journal, which holds {held_bytes} bytes since its last checkpoint; the limit is journal_bytes_max = {bytes_max}"
)]
pub struct JournalFull {
    /// Size of the request.
    pub request_bytes: usize,
    /// What is in the journal.
    pub held_bytes: usize,
    /// The limit.
    pub bytes_max: usize,
}

/// How a worker answered a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// With a response; the state went on.
    Answered,
    /// With an error of this request alone; the state is what it was.
    Failed,
}

/// What to do with an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accept {
    /// The caller gets it.
    Deliver,
    /// The caller has it already.
    Duplicate,
    /// A request that was answered before failed when it was run again: this worker's state is not the sequence's state.
    Diverged,
    /// An answer out of turn; nothing after it can be trusted.
    Gap,
}

#[derive(Debug)]
struct Entry {
    ordinal: u64,
    bytes: usize,
    want_checkpoint: bool,
    request: ModelInferRequest,
}

/// One sequence's requests since its last checkpoint.
#[derive(Debug)]
pub struct Journal {
    limits: Limits,
    checkpoint: Option<Bytes>,
    checkpoint_ordinal: u64,
    /// In order of their ordinals, all after the checkpoint. Requests that failed by themselves are not here.
    entries: VecDeque<Entry>,
    entries_bytes: usize,
    next_ordinal: u64,
    next_deliver: u64,
    asked_ordinal: u64,
    bytes_since_asked: usize,
}

impl Journal {
    /// The journal of a new sequence.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            checkpoint: None,
            checkpoint_ordinal: 0,
            entries: VecDeque::new(),
            entries_bytes: 0,
            next_ordinal: 1,
            next_deliver: 1,
            asked_ordinal: 0,
            bytes_since_asked: 0,
        }
    }

    /// The journal of a sequence that goes on from a state that somebody else kept.
    pub fn from_checkpoint(limits: Limits, state: Bytes) -> Self {
        Self { checkpoint: Some(state), ..Self::new(limits) }
    }

    /// A request that is kept.
    pub fn request(&self, ordinal: u64) -> Option<&ModelInferRequest> {
        self.entry_from(ordinal).filter(|entry| entry.ordinal == ordinal).map(|entry| &entry.request)
    }

    /// Takes the next request and gives it its ordinal.
    ///
    /// # Errors
    /// [`JournalFull`], with the request, which can be pushed again once a checkpoint came.
    pub fn push(&mut self, request: ModelInferRequest) -> Result<u64, (JournalFull, Box<ModelInferRequest>)> {
        let bytes = request.encoded_len();
        let bytes_max = self.limits.bytes_max;
        if self.entries_bytes + bytes > bytes_max {
            let full = JournalFull { request_bytes: bytes, held_bytes: self.entries_bytes, bytes_max };
            return Err((full, Box::new(request)));
        }
        let ordinal = self.next_ordinal;
        self.next_ordinal += 1;
        self.entries_bytes += bytes;
        self.bytes_since_asked += bytes;
        let want_checkpoint = ordinal - self.asked_ordinal >= self.limits.checkpoint_requests
            || self.bytes_since_asked >= self.limits.checkpoint_bytes;
        if want_checkpoint {
            self.asked_ordinal = ordinal;
            self.bytes_since_asked = 0;
        }
        self.entries.push_back(Entry { ordinal, bytes, want_checkpoint, request });
        Ok(ordinal)
    }

    /// Takes note of the answer to a request.
    pub fn accept(&mut self, ordinal: u64, outcome: Outcome) -> Accept {
        if ordinal >= self.next_ordinal || ordinal > self.next_deliver {
            return Accept::Gap;
        }
        if ordinal < self.next_deliver {
            return match outcome {
                Outcome::Answered => Accept::Duplicate,
                Outcome::Failed => Accept::Diverged,
            };
        }
        self.next_deliver += 1;
        if outcome == Outcome::Failed {
            self.forget(ordinal);
        }
        Accept::Deliver
    }

    /// Drops a request that failed by itself.
    fn forget(&mut self, ordinal: u64) {
        let Ok(index) = self.entries.binary_search_by_key(&ordinal, |entry| entry.ordinal) else { return };
        if let Some(entry) = self.entries.remove(index) {
            self.entries_bytes -= entry.bytes;
            if entry.want_checkpoint {
                // The checkpoint may not come with an error: let the next request ask again.
                self.asked_ordinal = self.asked_ordinal.min(self.checkpoint_ordinal);
                self.bytes_since_asked = self.entries_bytes;
            }
        }
    }

    /// Keeps the state after `ordinal` and forgets the requests up to it. Call it after [`accept`](Self::accept) of that
    /// ordinal. Older checkpoints, and ones ahead of what was delivered, are ignored: `false`.
    pub fn checkpoint(&mut self, ordinal: u64, state: Bytes) -> bool {
        if ordinal <= self.checkpoint_ordinal || ordinal >= self.next_deliver {
            return false;
        }
        self.checkpoint = Some(state);
        self.checkpoint_ordinal = ordinal;
        self.asked_ordinal = self.asked_ordinal.max(ordinal);
        while self.entries.front().is_some_and(|entry| entry.ordinal <= ordinal) {
            if let Some(entry) = self.entries.pop_front() {
                self.entries_bytes -= entry.bytes;
            }
        }
        true
    }

    /// Requests that have no answer yet.
    pub fn unanswered(&self) -> u64 {
        self.next_ordinal - self.next_deliver
    }

    /// Bytes of the requests kept.
    pub fn bytes(&self) -> usize {
        self.entries_bytes
    }

    /// The first entry from `ordinal` on.
    fn entry_from(&self, ordinal: u64) -> Option<&Entry> {
        let index = self.entries.partition_point(|entry| entry.ordinal < ordinal);
        self.entries.get(index)
    }
}

/// What a worker must do next on a lane.
#[derive(Debug, Clone)]
pub struct Outgoing {
    /// Its number on this stream.
    pub wire_ordinal: u64,
    /// The request.
    pub request: ModelInferRequest,
    /// Whether its state afterwards is wanted.
    pub want_checkpoint: bool,
}

/// One life of a sequence's stream to one worker.
#[derive(Debug)]
pub struct Lane {
    /// The state to begin with; absent at the beginning of the sequence.
    pub checkpoint: Option<Bytes>,
    /// After which ordinal that state was taken. The stream counts on from here.
    pub checkpoint_ordinal: u64,
    next_journal: u64,
    next_wire: u64,
    /// Ordinals, in the journal, of what was sent and not answered, in order.
    sent: VecDeque<u64>,
    next_answer: u64,
}

impl Lane {
    /// Begins at the journal's checkpoint: everything after it will be sent.
    pub fn open(journal: &Journal) -> Self {
        let next = journal.checkpoint_ordinal + 1;
        Self {
            checkpoint: journal.checkpoint.clone(),
            checkpoint_ordinal: journal.checkpoint_ordinal,
            next_journal: next,
            next_wire: next,
            sent: VecDeque::new(),
            next_answer: next,
        }
    }

    /// Whether [`send`](Self::send) has something.
    pub fn has_more(&self, journal: &Journal) -> bool {
        journal.entry_from(self.next_journal).is_some()
    }

    /// The next request to send; counts as sent.
    pub fn send(&mut self, journal: &Journal) -> Option<Outgoing> {
        let entry = journal.entry_from(self.next_journal)?;
        let wire_ordinal = self.next_wire;
        self.next_wire += 1;
        self.next_journal = entry.ordinal + 1;
        self.sent.push_back(entry.ordinal);
        Some(Outgoing { wire_ordinal, request: entry.request.clone(), want_checkpoint: entry.want_checkpoint })
    }

    /// The ordinal in the journal that an answer belongs to; `None` when the answer is out of turn.
    pub fn answered(&mut self, wire_ordinal: u64) -> Option<u64> {
        if wire_ordinal != self.next_answer {
            return None;
        }
        let ordinal = self.sent.pop_front()?;
        self.next_answer += 1;
        Some(ordinal)
    }

    /// Requests that were sent here and not answered here.
    pub fn in_flight(&self) -> usize {
        self.sent.len()
    }
}

#[cfg(test)]
mod tests;
