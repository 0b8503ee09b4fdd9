//! The durable log: `raft-engine` with an [identity](super::identity) file beside it.
//!
//! Each batch carries a small record of the state after it (term, vote, commit, and where the log begins and ends), in
//! the same atomic write as its entries. What lies outside that range is void, whatever the engine still has of it.
use std::{
    fs::{self, File, TryLockError},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
};

use protobuf::Message as _;
use raft::eraftpb::{Entry, HardState, Snapshot};
use raft_engine::{Command, Config, Engine, LogBatch, MessageExt, ReadableSize, RecoveryMode};
use tracing::warn;

use super::{
    identity::{Identity, Watermark, io_error},
    log::{Batch, LogError, LogStore, Stored},
};

const REGION: u64 = 1;
const STATE: &[u8] = b"state";
const SNAPSHOT: &[u8] = b"snapshot";
const STATE_FORMAT: u8 = 1;
const STATE_BYTES: usize = 1 + 7 * 8;
/// The identity file is rewritten at least after so many entries.
const RECORD_ENTRIES: u64 = 1_000;
/// Entries that are read at a time when the log is read through.
const READ_ENTRIES: u64 = 256;

struct Entries;

impl MessageExt for Entries {
    type Entry = Entry;
    fn index(entry: &Entry) -> u64 {
        entry.index
    }
}

/// The durable log of one coordinator.
pub struct EngineLog {
    // Fields are dropped in this order: the folder is unlocked last.
    engine: Engine,
    identity: Identity,
    dir: PathBuf,
    state: State,
    unrecorded_entries: u64,
    _lock: File,
}

/// What is written with every batch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct State {
    term: u64,
    vote: u64,
    commit: u64,
    base_index: u64,
    base_term: u64,
    last_index: u64,
    snapshot_index: u64,
}

impl State {
    fn fields(self) -> [u64; 7] {
        let Self { term, vote, commit, base_index, base_term, last_index, snapshot_index } = self;
        [term, vote, commit, base_index, base_term, last_index, snapshot_index]
    }

    fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(STATE_BYTES);
        bytes.push(STATE_FORMAT);
        self.fields().iter().for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (&STATE_FORMAT, body) = bytes.split_first()? else { return None };
        let (fields, []) = body.as_chunks::<8>() else { return None };
        let fields: [[u8; 8]; 7] = fields.try_into().ok()?;
        let [term, vote, commit, base_index, base_term, last_index, snapshot_index] = fields.map(u64::from_le_bytes);
        Some(Self { term, vote, commit, base_index, base_term, last_index, snapshot_index })
    }

    fn watermark(self) -> Watermark {
        Watermark { term: self.term, vote: self.vote, index: self.last_index }
    }
}

impl EngineLog {
    /// Opens the log in a folder, or makes one in a folder that holds none.
    ///
    /// # Errors
    /// [`LogError`] if the folder can't be used, is in use, belongs to another node, or has lost its identity file.
    pub fn open(dir: &Path, cluster_id: &str, node_id: u64) -> Result<Self, LogError> {
        fs::create_dir_all(dir).map_err(|error| io_error(dir, "create it", error))?;
        let lock = lock(dir)?;
        let log_dir = dir.join("log");
        let identity = match Identity::open(dir, cluster_id, node_id)? {
            Some(identity) => identity,
            None if holds_files(&log_dir)? => {
                let problem = "there is a log, but identity.json is missing".to_owned();
                return Err(LogError::Damaged { path: dir.to_owned(), problem });
            }
            // Before the log: if we are killed in between, the next start finds a folder that promised nothing yet.
            None => Identity::create(dir, cluster_id, node_id)?,
        };
        let Some(log_dir) = log_dir.to_str() else {
            let problem = "its path isn't UTF-8".to_owned();
            return Err(LogError::Engine { path: dir.to_owned(), action: "use it", problem });
        };
        let config = Config {
            dir: log_dir.to_owned(),
            // A torn tail after a power loss is normal; the watermark says whether too much is gone.
            recovery_mode: RecoveryMode::TolerateTailCorruption,
            recovery_threads: 1,
            target_file_size: ReadableSize::mb(8),
            purge_threshold: ReadableSize::mb(32),
            enable_log_recycle: false,
            ..Config::default()
        };
        let tail = Tail::of(Path::new(log_dir)).map_err(|error| io_error(dir, "read the end of its log", error))?;
        let engine = Engine::open(config).map_err(|error| engine_error(dir, "open the log", &error))?;
        tail.iter().for_each(Tail::tell_if_torn);
        let dir = dir.to_owned();
        Ok(Self { engine, identity, dir, state: State::default(), unrecorded_entries: 0, _lock: lock })
    }

    fn damaged(&self, problem: String) -> LogError {
        LogError::Damaged { path: self.dir.clone(), problem }
    }

    fn lost(&self, what: &'static str, expected: String, found: String) -> LogError {
        LogError::Lost { path: self.dir.clone(), what, expected, found }
    }

    /// Compares what was found with what was promised.
    fn check_watermark(&self, state: State) -> Result<(), LogError> {
        let mark = self.identity.watermark();
        if state.term < mark.term {
            return Err(self.lost("terms", format!("term {} or later", mark.term), format!("term {}", state.term)));
        }
        if state.term == mark.term && mark.vote != 0 && state.vote != mark.vote {
            let expected = format!("a vote for c{} in term {}", mark.vote, mark.term);
            return Err(self.lost("a vote", expected, format!("c{}", state.vote)));
        }
        if state.last_index < mark.index {
            let expected = format!("entry {} or later", mark.index);
            return Err(self.lost("entries", expected, format!("entry {} as the last", state.last_index)));
        }
        Ok(())
    }

    /// Reads every entry, so that damage in the middle of a file is found now.
    fn read_entries(&self, state: State) -> Result<Vec<Entry>, LogError> {
        let mut entries: Vec<Entry> = Vec::new();
        let end = state.last_index + 1;
        let mut next = state.base_index + 1;
        let mut term = state.base_term;
        while next < end {
            let until = end.min(next + READ_ENTRIES);
            self.engine
                .fetch_entries_to::<Entries>(REGION, next, until, None, &mut entries)
                .map_err(|error| self.damaged(format!("entries {next} to {} can't be read: {error}", until - 1)))?;
            for entry in &entries[(next - state.base_index - 1) as usize..] {
                if entry.index != next || entry.term < term {
                    let found = format!("entry {} of term {}", entry.index, entry.term);
                    return Err(self.damaged(format!("found {found} where entry {next} of term {term} belongs")));
                }
                (next, term) = (next + 1, entry.term);
            }
            if next != until {
                return Err(self.damaged(format!("entry {next} is missing")));
            }
        }
        Ok(entries)
    }

    fn write(&self, mut batch: LogBatch, sync: bool) -> Result<(), LogError> {
        // The engine panics when fsync fails. What the disk holds is unknown then, so nobody goes on with this log: the
        // panic becomes an error that ends the node.
        match catch_unwind(AssertUnwindSafe(|| self.engine.write(&mut batch, sync))) {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(engine_error(&self.dir, "write the log", &error)),
            Err(_) => {
                let problem = "fsync failed".to_owned();
                Err(LogError::Engine { path: self.dir.clone(), action: "write the log", problem })
            }
        }
    }

    /// Records the state as the new watermark, if that would change anything.
    fn record(&mut self) -> Result<(), LogError> {
        self.unrecorded_entries = 0;
        if self.identity.watermark() == self.state.watermark() {
            return Ok(());
        }
        self.identity.record(self.state.watermark())
    }

    /// The state after `batch`.
    fn state_after(&self, batch: &Batch<'_>) -> State {
        let mut state = self.state;
        let HardState { term, vote, commit, .. } = batch.hard_state;
        (state.term, state.vote, state.commit) = (term, vote, commit);
        if let Some((index, term)) = batch.compact {
            (state.base_index, state.base_term) = (index, term);
        }
        if batch.clear {
            state.last_index = state.base_index;
        }
        if let Some(last) = batch.entries.last() {
            state.last_index = last.index;
        }
        if let Some(snapshot) = batch.snapshot {
            state.snapshot_index = snapshot.get_metadata().index;
        }
        state
    }
}

impl LogStore for EngineLog {
    fn load(&mut self) -> Result<Option<Stored>, LogError> {
        let Some(bytes) = self.engine.get(REGION, STATE) else {
            let mark = self.identity.watermark();
            if mark == Watermark::default() {
                return Ok(None);
            }
            let expected = format!("term {} and entry {} or later", mark.term, mark.index);
            return Err(self.lost("everything", expected, "an empty log".to_owned()));
        };
        let state = State::decode(&bytes).ok_or_else(|| self.damaged("its state record doesn't parse".to_owned()))?;
        self.check_watermark(state)?;
        let snapshot: Option<Snapshot> = self
            .engine
            .get_message(REGION, SNAPSHOT)
            .map_err(|error| self.damaged(format!("the snapshot doesn't parse: {error}")))?;
        // One that joins has promised something before it has a snapshot: the term that it heard of.
        let snapshot = snapshot.or_else(|| (state.snapshot_index == 0).then(Snapshot::default));
        let snapshot = snapshot.ok_or_else(|| self.damaged("the snapshot is missing".to_owned()))?;
        let found = snapshot.get_metadata().index;
        let ordered = state.base_index <= found && found <= state.commit && state.commit <= state.last_index;
        if found != state.snapshot_index || !ordered {
            return Err(self.damaged(format!("its state record {state:?} and its snapshot at {found} don't fit")));
        }
        let entries = self.read_entries(state)?;
        let mut hard_state = HardState::default();
        (hard_state.term, hard_state.vote, hard_state.commit) = (state.term, state.vote, state.commit);
        self.state = state;
        Ok(Some(Stored { hard_state, snapshot, base: (state.base_index, state.base_term), entries }))
    }

    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError> {
        let after = self.state_after(batch);
        let rewritten = batch.entries.first().map_or(u64::MAX, |first| first.index - 1);
        let kept = if batch.clear { after.base_index } else { rewritten };
        let mark = self.identity.watermark();
        if kept < mark.index {
            // A new leader replaces entries that were never committed. The mark may not stand above what will be there
            // if we are killed before the next one is recorded.
            self.identity.record(Watermark { index: kept, ..mark })?;
        }
        let engine_batch = self.engine_batch(batch, after)?;
        self.write(engine_batch, batch.sync)?;
        let promised = (after.term, after.vote) != (self.state.term, self.state.vote);
        self.unrecorded_entries += batch.entries.len() as u64;
        self.state = after;
        if promised || self.unrecorded_entries >= RECORD_ENTRIES {
            self.record()?;
        }
        if batch.compact.is_some() {
            self.engine.purge_expired_files().map_err(|error| engine_error(&self.dir, "purge the log", &error))?;
        }
        Ok(())
    }

    fn checkpoint(&mut self) -> Result<(), LogError> {
        self.record()
    }
}

impl EngineLog {
    fn engine_batch(&self, batch: &Batch<'_>, after: State) -> Result<LogBatch, LogError> {
        let failed = |error| engine_error(&self.dir, "prepare a write", &error);
        let mut engine_batch = LogBatch::with_capacity(4);
        if batch.clear {
            let index = self.state.last_index.max(after.base_index) + 1;
            engine_batch.add_command(REGION, Command::Compact { index });
        }
        engine_batch.add_entries::<Entries>(REGION, batch.entries).map_err(failed)?;
        if let (Some((index, _)), false) = (batch.compact, batch.clear) {
            engine_batch.add_command(REGION, Command::Compact { index: index + 1 });
        }
        if let Some(snapshot) = batch.snapshot {
            let bytes = snapshot.write_to_bytes().map_err(|error| failed(error.into()))?;
            engine_batch.put(REGION, SNAPSHOT.to_vec(), bytes).map_err(failed)?;
        }
        engine_batch.put(REGION, STATE.to_vec(), after.encode()).map_err(failed)?;
        Ok(engine_batch)
    }
}

/// How far the newest file of a log is written.
struct Tail {
    path: PathBuf,
    bytes: u64,
}

impl Tail {
    /// `None` for a log without files. A file may end in room that was taken for later, which holds zeros.
    fn of(log_dir: &Path) -> io::Result<Option<Self>> {
        let entries = match fs::read_dir(log_dir) {
            Ok(entries) => entries.collect::<Result<Vec<_>, _>>()?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let files = entries.into_iter().map(|entry| entry.path());
        // Their names are numbers with leading zeros.
        let Some(path) = files.filter(|path| path.extension().is_some_and(|kind| kind == "raftlog")).max() else {
            return Ok(None);
        };
        let written = fs::read(&path)?.iter().rposition(|byte| *byte != 0);
        Ok(Some(Self { bytes: written.map_or(0, |last| last as u64 + 1), path }))
    }

    /// The engine has opened the log and has cut off what wasn't whole. Whether too much is gone, the watermark tells.
    fn tell_if_torn(&self) {
        let kept = fs::metadata(&self.path).map_or(self.bytes, |metadata| metadata.len());
        if kept < self.bytes {
            let (file, cut_bytes) = (self.path.display(), self.bytes - kept);
            warn!(%file, kept_bytes = kept, cut_bytes, "the log's last write was cut short; what is left of it is left out");
        }
    }
}

/// Takes the folder for this process; the system gives it back when the process ends, however it ends.
fn lock(dir: &Path) -> Result<File, LogError> {
    let file = File::create(dir.join("lock")).map_err(|error| io_error(dir, "create its lock file", error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(LogError::InUse { path: dir.to_owned() }),
        Err(TryLockError::Error(error)) => Err(io_error(dir, "lock it", error)),
    }
}

fn holds_files(dir: &Path) -> Result<bool, LogError> {
    match fs::read_dir(dir) {
        Ok(mut files) => Ok(files.next().is_some()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io_error(dir, "list its log folder", error)),
    }
}

fn engine_error(dir: &Path, action: &'static str, error: &raft_engine::Error) -> LogError {
    LogError::Engine { path: dir.to_owned(), action, problem: error.to_string() }
}

#[cfg(test)]
mod tests;
