//! Sequences whose router may be gone: their state and their last answers, for the router that comes next.
//!
//! A sequence that its client can take up again is *attached* while a router's stream runs it. When the stream ends, or another
//! router asks for the sequence, it is *detached*: its state is saved, its place is free, and what is left are bytes, for a
//! while. Only the last router counts: it comes with the number of its client's connection, and a smaller one is refused.
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use cresset_client::kept::{Kept, Limits};
use cresset_proto::fleet::v1::{KeptAnswer, Resumable, ResumeKey, TakeRequest, TakeResponse};
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{error::PredictError, metrics};

/// What one detached sequence takes beside its state and its answers, in bytes.
const HELD_BYTES: usize = 512;

/// How much is held, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// How long a sequence is held after its router went.
    pub window: Duration,
    /// Sequences that are held.
    pub sequences_max: usize,
    /// Bytes of their states and answers, and as many again of the answers of those that run.
    pub bytes_max: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { window: Duration::from_secs(30), sequences_max: 10_000, bytes_max: 256 << 20 }
    }
}

/// A sequence's name: model, stream of the client, and id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key(String, String, String);

impl From<ResumeKey> for Key {
    fn from(ResumeKey { model, stream_id, sequence }: ResumeKey) -> Self {
        Self(model, stream_id, sequence)
    }
}

/// The sequences of one worker that can be taken up again.
#[derive(Debug, Default)]
pub struct Detached {
    table: Mutex<Table>,
    /// Bytes of the answers that are kept for attached sequences.
    attached_bytes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Table {
    bounds: Bounds,
    /// A sequence id may have been used for several sequences, one after the other.
    lives: HashMap<Key, Vec<Life>>,
    next_serial: u64,
    oldest_first: VecDeque<(Key, u64, Instant)>,
    count: usize,
    bytes: usize,
}

#[derive(Debug)]
struct Life {
    /// The ordinal of its first request.
    first: u64,
    attempt: u64,
    /// Changes whenever the life's place does.
    serial: u64,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Attached(Tie),
    Held(Arc<Held>, usize),
}

/// The stream that runs a sequence.
#[derive(Debug, Clone, Default)]
struct Tie {
    /// It is asked to leave.
    leave: CancellationToken,
    /// It has left.
    left: CancellationToken,
}

/// A sequence without a router.
#[derive(Debug)]
struct Held {
    version: u64,
    generation: u64,
    applied: u64,
    /// `None` once it has ended.
    checkpoint: Option<Bytes>,
    kept: Kept,
}

impl Detached {
    /// Sets the bounds, for what comes from here on.
    pub fn set_bounds(&self, bounds: Bounds) {
        self.table.lock().bounds = bounds;
    }

    /// Attaches a sequence to the stream that runs it, after the stream that ran it before has left.
    ///
    /// # Errors
    /// [`PredictError::TakenOver`] when a later router has it.
    pub async fn attach(
        self: &Arc<Self>,
        resumable: Resumable,
        version: u64,
        generation: u64,
    ) -> Result<Attachment, PredictError> {
        let Resumable { key, first, attempt, applied, answers } = resumable;
        let key = Key::from(key.unwrap_or_default());
        let tie = Tie::default();
        let serial = loop {
            let before = match self.table.lock().attach(&key, first, attempt, &tie)? {
                Attach::Done(serial) => break serial,
                Attach::After(before) => before,
            };
            before.leave.cancel();
            before.left.cancelled().await;
        };
        let floor = answers.first().map_or(applied, |answer| answer.ordinal.saturating_sub(1)).min(applied);
        let mut attachment = Attachment {
            detached: Arc::clone(self),
            key,
            serial,
            tie,
            version,
            generation,
            applied,
            is_over: false,
            kept: Kept::of(vec![], floor),
        };
        for answer in answers {
            attachment.keep(answer);
        }
        Ok(attachment)
    }

    /// What is held of a sequence. A stream that runs it has to leave first; whoever asked before is refused from here on.
    ///
    /// # Errors
    /// [`PredictError::TakenOver`]; [`PredictError::SequenceLost`] when nothing is held that goes on where the client is.
    pub async fn take(&self, request: TakeRequest) -> Result<TakeResponse, PredictError> {
        let TakeRequest { key, ordinal, ack, attempt } = request;
        let key = Key::from(key.unwrap_or_default());
        loop {
            let before = match self.table.lock().take(&key, ordinal, attempt)? {
                Take::Held(first, held) => return held.response(first, ack).ok_or_else(|| lost(&key)),
                Take::After(before) => before,
            };
            before.leave.cancel();
            before.left.cancelled().await;
        }
    }

    /// Drops what was held for too long, now and then, for ever.
    pub async fn sweep(&self) {
        let mut ticks = tokio::time::interval(Duration::from_secs(1));
        loop {
            ticks.tick().await;
            self.table.lock().forget();
        }
    }

    /// How many sequences are held.
    pub fn held(&self) -> usize {
        self.table.lock().count
    }
}

fn lost(key: &Key) -> PredictError {
    PredictError::SequenceLost { model: key.0.clone(), sequence: key.2.clone() }
}

enum Attach {
    Done(u64),
    After(Tie),
}

enum Take {
    Held(u64, Arc<Held>),
    After(Tie),
}

impl Held {
    fn response(&self, first: u64, ack: u64) -> Option<TakeResponse> {
        // The client doesn't send again what was answered: it must be part of the state, and all that comes after be kept.
        if self.applied < ack || self.kept.floor() > ack {
            return None;
        }
        let answers = self.kept.up_to(self.applied).into_iter().filter(|answer| answer.ordinal > ack).collect();
        let Self { version, generation, applied, checkpoint, .. } = self;
        Some(TakeResponse {
            version: *version,
            generation: *generation,
            first,
            applied: *applied,
            checkpoint: checkpoint.clone(),
            answers,
        })
    }

    fn bytes(&self) -> usize {
        self.kept.bytes() + self.checkpoint.as_ref().map_or(0, Bytes::len) + HELD_BYTES
    }
}

impl Table {
    fn attach(&mut self, key: &Key, first: u64, attempt: u64, tie: &Tie) -> Result<Attach, PredictError> {
        self.next_serial += 1;
        let serial = self.next_serial;
        let lives = self.lives.entry(key.clone()).or_default();
        let place = Place::Attached(tie.clone());
        match lives.iter_mut().find(|life| life.first == first) {
            Some(life) if life.attempt > attempt => return Err(PredictError::TakenOver(key.2.clone())),
            Some(Life { place: Place::Attached(before), .. }) => return Ok(Attach::After(before.clone())),
            Some(life) => {
                if let Place::Held(_, bytes) = life.place {
                    self.count -= 1;
                    self.bytes -= bytes;
                }
                *life = Life { first, attempt, serial, place };
            }
            None => lives.push(Life { first, attempt, serial, place }),
        }
        self.tell();
        Ok(Attach::Done(serial))
    }

    fn take(&mut self, key: &Key, ordinal: u64, attempt: u64) -> Result<Take, PredictError> {
        self.forget();
        self.next_serial += 1;
        let serial = self.next_serial;
        let lives = self.lives.get_mut(key).into_iter().flatten();
        let life = lives.filter(|life| life.first < ordinal).max_by_key(|life| life.first).ok_or_else(|| lost(key))?;
        if life.attempt > attempt {
            return Err(PredictError::TakenOver(key.2.clone()));
        }
        life.attempt = attempt;
        match &life.place {
            Place::Attached(before) => Ok(Take::After(before.clone())),
            Place::Held(held, _) => {
                // Held for as long again: who takes it may die as well.
                life.serial = serial;
                self.oldest_first.push_back((key.clone(), serial, Instant::now()));
                Ok(Take::Held(life.first, Arc::clone(held)))
            }
        }
    }

    /// A stream has left; what it left behind is held.
    fn leave(&mut self, key: &Key, serial: u64, held: Option<Held>) {
        self.next_serial += 1;
        let next = self.next_serial;
        let Some(lives) = self.lives.get_mut(key) else { return };
        let Some(at) = lives.iter().position(|life| life.serial == serial) else { return };
        match held {
            Some(held) => {
                let bytes = held.bytes();
                if let Some(life) = lives.get_mut(at) {
                    (life.serial, life.place) = (next, Place::Held(Arc::new(held), bytes));
                }
                self.count += 1;
                self.bytes += bytes;
                self.oldest_first.push_back((key.clone(), next, Instant::now()));
            }
            None => {
                lives.swap_remove(at);
                if lives.is_empty() {
                    self.lives.remove(key);
                }
            }
        }
        self.forget();
    }

    /// Drops what is too old, or too much.
    fn forget(&mut self) {
        self.forget_at(Instant::now());
    }

    fn forget_at(&mut self, now: Instant) {
        while let Some((_, _, since)) = self.oldest_first.front() {
            let too_much = self.count > self.bounds.sequences_max || self.bytes > self.bounds.bytes_max;
            if !too_much && now.saturating_duration_since(*since) < self.bounds.window {
                break;
            }
            let Some((key, serial, _)) = self.oldest_first.pop_front() else { break };
            let Some(lives) = self.lives.get_mut(&key) else { continue };
            let is_it = |life: &Life| life.serial == serial && matches!(life.place, Place::Held(..));
            if let Some(at) = lives.iter().position(is_it)
                && let Place::Held(_, bytes) = lives.swap_remove(at).place
            {
                self.count -= 1;
                self.bytes -= bytes;
            }
            if lives.is_empty() {
                self.lives.remove(&key);
            }
        }
        self.tell();
    }

    fn tell(&self) {
        metrics::sequences_detached(self.count, self.bytes);
    }
}

/// An attached sequence. Dropped without [`detach`](Self::detach), nothing of it is held.
#[derive(Debug)]
pub struct Attachment {
    detached: Arc<Detached>,
    key: Key,
    serial: u64,
    tie: Tie,
    version: u64,
    generation: u64,
    /// The last request whose answer is known; the state is the one after it.
    applied: u64,
    is_over: bool,
    kept: Kept,
}

impl Attachment {
    /// Returns when the sequence has to be detached.
    pub async fn wanted_elsewhere(&self) {
        self.tie.leave.cancelled().await;
    }

    /// Notes what the client has.
    pub fn acknowledge(&mut self, ack: u64) {
        let before = self.kept.bytes();
        self.kept.acknowledge(ack);
        self.detached.attached_bytes.fetch_sub(before - self.kept.bytes(), Ordering::Relaxed);
    }

    /// Notes the answer to a request, which was perhaps the last.
    pub fn answered(&mut self, answer: KeptAnswer, is_last: bool) {
        self.applied = answer.ordinal;
        self.is_over |= is_last;
        self.keep(answer);
    }

    fn keep(&mut self, answer: KeptAnswer) {
        let before = self.kept.bytes();
        self.kept.keep(answer);
        let total = &self.detached.attached_bytes;
        let all = total.fetch_add(self.kept.bytes() - before, Ordering::Relaxed);
        let bytes_max = self.detached.table.lock().bounds.bytes_max;
        // Routers see to it that a client acknowledges; this bounds what others can do.
        let limits = Limits { answers_max: 2 * Limits::default().answers_max, bytes_max: usize::MAX };
        if self.kept.has_room(limits).is_err() || all > bytes_max {
            let before = self.kept.bytes();
            self.kept.drop_oldest();
            total.fetch_sub(before - self.kept.bytes(), Ordering::Relaxed);
        }
    }

    /// The sequence's id.
    pub fn sequence(&self) -> &str {
        &self.key.2
    }

    /// Whether there is no state to save.
    pub fn is_over(&self) -> bool {
        self.is_over
    }

    /// Detaches the sequence, with the state after the last request, or without one when it has ended.
    pub fn detach(mut self, checkpoint: Option<Bytes>) {
        let kept = std::mem::take(&mut self.kept);
        self.detached.attached_bytes.fetch_sub(kept.bytes(), Ordering::Relaxed);
        let (version, generation, applied) = (self.version, self.generation, self.applied);
        let held = Held { version, generation, applied, checkpoint, kept };
        self.detached.table.lock().leave(&self.key, self.serial, Some(held));
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.detached.attached_bytes.fetch_sub(self.kept.bytes(), Ordering::Relaxed);
        self.detached.table.lock().leave(&self.key, self.serial, None);
        self.tie.left.cancel();
    }
}

#[cfg(test)]
mod tests;
