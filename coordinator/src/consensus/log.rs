//! What Raft must not forget: the trait that a disk implements, and the window of it that is kept in memory.
//!
//! Everything that Raft may read back is held in memory (a snapshot and the entries since, both bounded), so a disk is
//! read once, at start, and only written from then on. That keeps [`LogStore`] small enough for a simulated disk, and
//! turns a damaged file into a refused start instead of a surprise at the first peer that has to catch up.
use std::{cell::Cell, collections::VecDeque, path::PathBuf};

use raft::{
    GetEntriesContext, RaftState, Storage, StorageError,
    eraftpb::{ConfState, Entry, HardState, Snapshot},
};

/// A durable log with one writer.
pub trait LogStore {
    /// Reads everything back; `None` if nothing was ever written. Called once, before any [`append`](Self::append).
    ///
    /// # Errors
    /// [`LogError`] if something is missing or damaged. The node must not start then.
    fn load(&mut self) -> Result<Option<Stored>, LogError>;

    /// Writes a batch: all of it or, after a crash, nothing. With `sync` it is on the disk when this returns.
    ///
    /// # Errors
    /// [`LogError`]; the store must not be used any more.
    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError>;

    /// Called about once a second, and at an orderly end: time for work that needs no batch.
    ///
    /// # Errors
    /// [`LogError`]; the store must not be used any more.
    fn checkpoint(&mut self) -> Result<(), LogError> {
        Ok(())
    }
}

impl<L: LogStore + ?Sized> LogStore for &mut L {
    fn load(&mut self) -> Result<Option<Stored>, LogError> {
        (**self).load()
    }

    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError> {
        (**self).append(batch)
    }

    fn checkpoint(&mut self) -> Result<(), LogError> {
        (**self).checkpoint()
    }
}

/// What [`LogStore::load`] found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stored {
    /// Term, vote and commit.
    pub hard_state: HardState,
    /// The last snapshot.
    pub snapshot: Snapshot,
    /// Index of the last entry that was dropped, and its term.
    pub base: (u64, u64),
    /// All entries after `base`, without a gap.
    pub entries: Vec<Entry>,
}

/// One atomic write, its parts in the order in which they take effect.
#[derive(Debug, Default)]
pub struct Batch<'a> {
    /// A newer snapshot.
    pub snapshot: Option<&'a Snapshot>,
    /// With a snapshot from the leader: every entry that was there is void.
    pub clear: bool,
    /// Entries to add. They replace what is stored from the index of the first one on.
    pub entries: &'a [Entry],
    /// Drop the entries up to this index; `(index, its term)`.
    pub compact: Option<(u64, u64)>,
    /// Term, vote and commit, as they are after this batch.
    pub hard_state: HardState,
    /// A promise depends on it: don't return before the disk holds it.
    pub sync: bool,
}

/// Why a log can't be read or written. Always fatal: a node that goes on could break a promise.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The folder or one of its files can't be used.
    #[error("data folder {}: can't {action}: {source}; check that it exists, that this user may write to it and that the disk isn't full", path.display())]
    Io {
        /// What was used.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another process has it.
    #[error("data folder {} is in use by another process; stop that one, or give each coordinator a folder of its own", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// It belongs to another coordinator or cluster.
    #[error("data folder {} belongs to coordinator c{found_id} of cluster '{found_cluster}', this is c{expected_id} of '{expected_cluster}'; point data_dir at the right folder", path.display())]
    Foreign {
        /// The folder.
        path: PathBuf,
        /// Who it should belong to.
        expected_cluster: String,
        /// Who it should belong to.
        expected_id: u64,
        /// Who it belongs to.
        found_cluster: String,
        /// Who it belongs to.
        found_id: u64,
    },
    /// The log ends before what this node has promised, or promised something else.
    #[error("data folder {}: the log has lost {what}: expected {expected}, found {found}; this coordinator must not vote with it: restore the folder from before the damage, or replace this coordinator by one with a new id and an empty folder", path.display())]
    Lost {
        /// The folder.
        path: PathBuf,
        /// What is lost.
        what: &'static str,
        /// What was promised.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Something that was read makes no sense.
    #[error("data folder {}: the log is damaged: {problem}; this coordinator must not vote with it: restore the folder from before the damage, or replace this coordinator by one with a new id and an empty folder", path.display())]
    Damaged {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// The log engine failed.
    #[error("data folder {}: can't {action}: {problem}", path.display())]
    Engine {
        /// The folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the engine said.
        problem: String,
    },
}

/// The newest entries, without a gap.
#[derive(Debug, Default)]
pub(super) struct Tail {
    base: (u64, u64),
    entries: VecDeque<Entry>,
    bytes: u64,
}

impl Tail {
    /// Takes over what was stored.
    pub(super) fn new(base: (u64, u64), entries: Vec<Entry>) -> Self {
        let bytes = entries.iter().map(weight).sum();
        Self { base, entries: entries.into(), bytes }
    }

    pub(super) fn first(&self) -> u64 {
        self.base.0 + 1
    }

    pub(super) fn last(&self) -> u64 {
        self.base.0 + self.entries.len() as u64
    }

    /// The term of an entry, or of the last one that was dropped.
    pub(super) fn term(&self, index: u64) -> Option<u64> {
        if index == self.base.0 {
            return Some(self.base.1);
        }
        self.get(index).map(|entry| entry.term)
    }

    fn get(&self, index: u64) -> Option<&Entry> {
        let position = index.checked_sub(self.first())?;
        self.entries.get(usize::try_from(position).ok()?)
    }

    fn slice(&self, low: u64, high: u64, bytes_max: Option<u64>) -> Vec<Entry> {
        let mut found = Vec::new();
        let mut bytes = 0;
        for index in low..high {
            let Some(entry) = self.get(index) else { break };
            bytes += weight(entry);
            if !found.is_empty() && bytes_max.is_some_and(|max| bytes > max) {
                break;
            }
            found.push(entry.clone());
        }
        found
    }

    /// Adds entries, replacing what is there from the first one's index on. They must continue what is there.
    fn append(&mut self, entries: &[Entry]) {
        let Some(start) = entries.first().map(|entry| entry.index) else { return };
        assert!(self.first() <= start && start <= self.last() + 1, "entries from {start} leave a gap");
        while self.last() >= start {
            if let Some(entry) = self.entries.pop_back() {
                self.bytes -= weight(&entry);
            }
        }
        self.bytes += entries.iter().map(weight).sum::<u64>();
        self.entries.extend(entries.iter().cloned());
    }

    fn compact(&mut self, base: (u64, u64)) {
        while self.base.0 < base.0 {
            let Some(entry) = self.entries.pop_front() else { break };
            self.bytes -= weight(&entry);
            self.base = (entry.index, entry.term);
        }
        self.base = base;
    }

    /// Where to cut so that at most `entries_max` entries, and at most `bytes_max` bytes, stay before `index`.
    fn cut_before(&self, index: u64, entries_max: u64, bytes_max: u64) -> u64 {
        let mut cut = index;
        let mut bytes = 0;
        while cut > self.base.0 && index - cut < entries_max {
            bytes += self.get(cut).map_or(0, weight);
            if bytes > bytes_max {
                break;
            }
            cut -= 1;
        }
        cut
    }
}

/// An entry's share of memory: its data, and about what a small one costs beside it.
fn weight(entry: &Entry) -> u64 {
    entry.data.len() as u64 + 64
}

/// A [`LogStore`] as the raft library wants to see it.
pub(super) struct Shelf<L> {
    store: L,
    tail: Tail,
    hard_state: HardState,
    snapshot: Snapshot,
    /// Somebody needs a snapshot that this one can't serve.
    fresh_wanted: Cell<bool>,
}

impl<L: LogStore> Shelf<L> {
    /// Puts what was stored on the shelf.
    pub(super) fn new(store: L, stored: Stored) -> Self {
        let Stored { hard_state, snapshot, base, entries } = stored;
        Self { store, tail: Tail::new(base, entries), hard_state, snapshot, fresh_wanted: Cell::new(false) }
    }

    pub(super) fn into_store(self) -> L {
        self.store
    }

    pub(super) fn store_mut(&mut self) -> &mut L {
        &mut self.store
    }

    pub(super) fn snapshot_held(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(super) fn conf_state(&self) -> &ConfState {
        self.snapshot.get_metadata().get_conf_state()
    }

    pub(super) fn term_of(&self, index: u64) -> Option<u64> {
        self.tail.term(index)
    }

    pub(super) fn take_fresh_wanted(&self) -> bool {
        self.fresh_wanted.replace(false)
    }

    /// Writes what one `Ready` asks for, all of it or nothing.
    pub(super) fn persist(
        &mut self,
        hard_state: Option<&HardState>,
        snapshot: Option<&Snapshot>,
        entries: &[Entry],
        sync: bool,
    ) -> Result<(), LogError> {
        if let Some(hard_state) = hard_state {
            self.hard_state = hard_state.clone();
        }
        let base = snapshot.map(|snapshot| (snapshot.get_metadata().index, snapshot.get_metadata().term));
        self.store.append(&Batch {
            snapshot,
            clear: snapshot.is_some(),
            entries,
            compact: base,
            hard_state: self.hard_state.clone(),
            sync,
        })?;
        if let (Some(snapshot), Some(base)) = (snapshot, base) {
            self.snapshot = snapshot.clone();
            self.tail = Tail::new(base, Vec::new());
        }
        self.tail.append(entries);
        Ok(())
    }

    /// Notes how far the log is committed. Nothing is promised by it, so it needn't be synced.
    pub(super) fn save_commit(&mut self, commit: u64) -> Result<(), LogError> {
        self.hard_state.commit = commit;
        self.store.append(&Batch { hard_state: self.hard_state.clone(), ..Batch::default() })
    }

    /// Replaces the snapshot by one of our own and drops the entries that nobody will ask for.
    pub(super) fn save_snapshot(&mut self, snapshot: Snapshot, keep_entries: u64, keep_bytes: u64) -> Result<(), LogError> {
        let index = snapshot.get_metadata().index;
        let cut = self.tail.cut_before(index, keep_entries, keep_bytes);
        let base = (cut, self.tail.term(cut).unwrap_or_default());
        // A snapshot is of applied entries, so they are committed even if the disk hasn't heard of it yet.
        self.hard_state.commit = self.hard_state.commit.max(index);
        self.store.append(&Batch {
            snapshot: Some(&snapshot),
            compact: Some(base),
            hard_state: self.hard_state.clone(),
            sync: true,
            ..Batch::default()
        })?;
        self.snapshot = snapshot;
        self.tail.compact(base);
        Ok(())
    }
}

impl<L: LogStore> Storage for Shelf<L> {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(RaftState::new(self.hard_state.clone(), self.conf_state().clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.tail.first() {
            return Err(StorageError::Compacted.into());
        }
        if high > self.tail.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        Ok(self.tail.slice(low, high, max_size.into()))
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.tail.base.0 {
            return Err(StorageError::Compacted.into());
        }
        self.tail.term(index).ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.tail.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.tail.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let metadata = self.snapshot.get_metadata();
        let conf = metadata.get_conf_state();
        // A peer ignores, without a word, a snapshot that doesn't name it, and would be sent it for ever.
        let names_it = conf.voters.contains(&to) || conf.learners.contains(&to) || conf.voters_outgoing.contains(&to);
        if metadata.index < request_index || !names_it {
            self.fresh_wanted.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(self.snapshot.clone())
    }
}

/// A log in memory, for tests and for a simulated disk: it survives the node, not the process.
#[derive(Debug, Clone, Default)]
pub struct MemoryLog {
    stored: Option<Stored>,
}

impl LogStore for MemoryLog {
    fn load(&mut self) -> Result<Option<Stored>, LogError> {
        Ok(self.stored.clone())
    }

    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError> {
        let stored = self.stored.take().unwrap_or_default();
        self.stored = Some(merge(stored, batch));
        Ok(())
    }
}

/// What is stored after a batch: the meaning of [`LogStore::append`], in plain words.
pub(super) fn merge(stored: Stored, batch: &Batch<'_>) -> Stored {
    let Stored { snapshot, base, entries, .. } = stored;
    let mut tail = if batch.clear { Tail::new(base, Vec::new()) } else { Tail::new(base, entries) };
    if let (true, Some(base)) = (batch.clear, batch.compact) {
        tail.base = base;
    }
    tail.append(batch.entries);
    if let Some(base) = batch.compact {
        tail.compact(base);
    }
    Stored {
        hard_state: batch.hard_state.clone(),
        snapshot: batch.snapshot.cloned().unwrap_or(snapshot),
        base: tail.base,
        entries: tail.entries.into(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in super::super) fn entry(index: u64, term: u64, data: &[u8]) -> Entry {
        Entry { index, term, data: data.to_vec().into(), ..Entry::default() }
    }

    fn tail() -> Tail {
        Tail::new((10, 2), (11..=20).map(|index| entry(index, 2 + index / 15, b"0123456789")).collect())
    }

    #[test]
    fn a_tail_knows_the_terms_of_what_it_holds_and_of_the_entry_before() {
        let tail = tail();
        assert_eq!((tail.first(), tail.last()), (11, 20));
        assert_eq!([9, 10, 11, 15, 20, 21].map(|index| tail.term(index)), [None, Some(2), Some(2), Some(3), Some(3), None]);
    }

    #[test]
    fn a_slice_holds_at_least_one_entry_and_stops_at_its_size() {
        let tail = tail();
        let indexes = |max| tail.slice(12, 21, max).iter().map(|entry| entry.index).collect::<Vec<_>>();
        assert_eq!(indexes(Some(0)), [12]);
        assert_eq!(indexes(Some(2 * 74)), [12, 13]);
        assert_eq!(indexes(None).len(), 9);
    }

    #[test]
    fn later_entries_replace_what_conflicts_and_the_byte_count_follows() {
        let mut tail = tail();
        tail.append(&[entry(13, 9, b"x"), entry(14, 9, b"y")]);
        assert_eq!((tail.last(), tail.term(12), tail.term(13)), (14, Some(2), Some(9)));
        assert_eq!(tail.bytes, 2 * 74 + 2 * 65);
        tail.compact((13, 9));
        assert_eq!((tail.first(), tail.term(13), tail.bytes), (14, Some(9), 65));
        tail.compact((14, 9));
        assert_eq!((tail.first(), tail.last(), tail.bytes), (15, 14, 0));
    }

    #[test]
    fn the_cut_keeps_no_more_than_it_may() {
        let tail = tail();
        assert_eq!(tail.cut_before(20, 3, u64::MAX), 17);
        assert_eq!(tail.cut_before(20, 100, u64::MAX), 10);
        assert_eq!(tail.cut_before(20, 100, 2 * 74), 18);
        assert_eq!(tail.cut_before(20, 0, u64::MAX), 20);
    }
}
