//! A disk that forgets what wasn't synced, takes its time, fills up and dies.
use std::{cell::Cell, collections::VecDeque, rc::Rc};

use cresset_coordinator::consensus::{Batch, LogError, LogStore, MemoryLog, Stored};
use rand::{Rng, rngs::StdRng};

use super::{Mutant, Us};

/// Where a write is to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fail {
    /// Nothing of it was written.
    Before,
    /// It is written, and nobody hears of it.
    After,
}

/// What the world may turn while a node has the disk.
#[derive(Debug, Default)]
pub struct Knobs {
    /// How long one sync takes.
    pub sync_us: Cell<Us>,
    /// How long the writes since the last reset took.
    pub spent_us: Cell<Us>,
    /// Writes until one fails, and how.
    pub fails: Cell<Option<(u32, Fail)>>,
    /// Whether no write fits any more.
    pub full: Cell<bool>,
}

/// A log on a simulated disk.
pub struct Disk {
    /// What each batch led to: the first is on the disk, the others are only in the system's memory.
    states: VecDeque<MemoryLog>,
    /// What the world turns.
    pub knobs: Rc<Knobs>,
    mutant: Option<Mutant>,
}

impl Disk {
    /// An empty one; some of the planted bugs are the disk's.
    pub fn new(mutant: Option<Mutant>) -> Self {
        Self { states: VecDeque::from([MemoryLog::default()]), knobs: Rc::default(), mutant }
    }

    /// The power is gone: of the batches that weren't synced, a prefix of any length is left.
    pub fn crash(&mut self, random: &mut StdRng) {
        let kept = random.random_range(0..self.states.len());
        self.states.truncate(kept + 1);
        self.states.drain(..kept);
        self.knobs.fails.set(None);
    }

    fn refuse(&self, problem: &str) -> LogError {
        LogError::Engine { path: "simulated".into(), action: "write", problem: problem.to_owned() }
    }

    /// Counts down to the write that fails.
    fn fails(&self) -> Option<Fail> {
        let (left, fail) = self.knobs.fails.get()?;
        if left > 0 {
            self.knobs.fails.set(Some((left - 1, fail)));
            return None;
        }
        self.knobs.fails.set(None);
        Some(fail)
    }
}

impl LogStore for Disk {
    fn load(&mut self) -> Result<Option<Stored>, LogError> {
        let last = self.states.back_mut().map_or(Ok(None), MemoryLog::load);
        last.map(|stored| {
            stored.map(|mut stored| {
                if self.mutant == Some(Mutant::ForgetVote) {
                    stored.hard_state.vote = 0;
                }
                if self.mutant == Some(Mutant::ForgetMembers) {
                    let members = stored.snapshot.mut_metadata().mut_conf_state();
                    (members.voters, members.learners, members.voters_outgoing) = (vec![1, 2, 3], vec![], vec![]);
                    members.auto_leave = false;
                }
                stored
            })
        })
    }

    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError> {
        if self.knobs.full.get() {
            return Err(self.refuse("no space left"));
        }
        let fail = self.fails();
        if fail == Some(Fail::Before) {
            return Err(self.refuse("input/output error"));
        }
        let is_synced = batch.sync && self.mutant != Some(Mutant::SendBeforeFsync);
        // After a sync there is no way back to what was before, so nothing has to be copied.
        let last = if is_synced { self.states.pop_back() } else { self.states.back().cloned() };
        let mut next = last.unwrap_or_default();
        let too_far = match self.mutant {
            Some(Mutant::CompactUnapplied) if batch.compact.is_some() && !batch.clear => {
                next.load()?.and_then(|stored| stored.entries.last().map(|entry| (entry.index, entry.term)))
            }
            _ => None,
        };
        next.append(&Batch {
            snapshot: batch.snapshot,
            clear: batch.clear,
            entries: batch.entries,
            compact: too_far.or(batch.compact),
            hard_state: batch.hard_state.clone(),
            sync: batch.sync,
        })?;
        if is_synced {
            self.knobs.spent_us.set(self.knobs.spent_us.get() + self.knobs.sync_us.get());
            self.states.clear();
        }
        self.states.push_back(next);
        if fail == Some(Fail::After) {
            return Err(self.refuse("input/output error"));
        }
        Ok(())
    }
}
