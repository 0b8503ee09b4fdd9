//! Digests of versions, remembered while their files stay as they are: a large model takes long to read, and it is deployed
//! more often than it changes.
use std::{
    collections::HashMap,
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime},
};

use parking_lot::Mutex;

/// Versions that are remembered; one more, and all are forgotten.
const REMEMBERED_MAX: usize = 10_000;
/// Files that changed so lately may change again without a trace: their times are no finer than a tick of the system.
const SETTLED_AFTER: Duration = Duration::from_secs(2);

/// What is remembered, by folder. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Digests(Arc<Mutex<HashMap<PathBuf, Remembered>>>);

/// How the files were when they were read, and what their digest was.
type Remembered = (Vec<Stamp>, String);

/// What changes with a file: which one it is, its length, when its content and when anything of it changed, in seconds and
/// nanoseconds.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    name: String,
    file: (u64, u64),
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Digests {
    /// The digest of these files, read by `read` unless it is known.
    ///
    /// # Errors
    /// What `read` says.
    pub(super) fn get<E>(
        &self,
        folder: &Path,
        files: &[(String, u64)],
        read: impl FnOnce() -> Result<String, E>,
    ) -> Result<String, E> {
        // A file that can't be asked can't be read either, and that says why.
        let Ok(before) = stamps(folder, files) else { return read() };
        if let Some((stamps, digest)) = self.0.lock().get(folder)
            && *stamps == before
        {
            return Ok(digest.clone());
        }
        let began = SystemTime::now();
        let digest = read()?;
        if before.iter().all(|stamp| stamp.is_settled(began)) {
            let mut remembered = self.0.lock();
            if remembered.len() >= REMEMBERED_MAX && !remembered.contains_key(folder) {
                remembered.clear();
            }
            remembered.insert(folder.to_owned(), (before, digest.clone()));
        }
        Ok(digest)
    }
}

impl Stamp {
    fn is_settled(&self, at: SystemTime) -> bool {
        let since = at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.saturating_sub(SETTLED_AFTER).as_secs());
        self.changed.0.max(self.modified.0) < i64::try_from(since).unwrap_or(0)
    }
}

fn stamps(folder: &Path, files: &[(String, u64)]) -> io::Result<Vec<Stamp>> {
    let stamp = |(name, _): &(String, u64)| {
        let file = std::fs::metadata(folder.join(name))?;
        Ok(Stamp {
            name: name.clone(),
            file: (file.dev(), file.ino()),
            bytes: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    };
    files.iter().map(stamp).collect()
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, fs::File};

    use super::*;

    #[test]
    fn files_are_read_again_once_they_changed_and_not_before() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.pt");
        std::fs::write(&path, "weights").unwrap();
        let files = [("model.pt".to_owned(), 7)];
        let (digests, reads) = (Digests::default(), Cell::new(0));
        let get = || {
            let read = || {
                reads.set(reads.get() + 1);
                Ok::<_, io::Error>(format!("digest {}", reads.get()))
            };
            digests.get(folder.path(), &files, read).unwrap()
        };
        // Written a moment ago: it could be written once more within the same tick.
        assert_eq!((get(), get()), ("digest 1".to_owned(), "digest 2".to_owned()));

        // The times of a file's metadata can't be set back, so what is remembered stands for files that have settled.
        digests.0.lock().insert(folder.path().to_owned(), (stamps(folder.path(), &files).unwrap(), "known".to_owned()));
        assert_eq!((get(), reads.get()), ("known".to_owned(), 2));
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(get(), "digest 3", "its time is another, and it isn't trusted for being old");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(get(), "digest 4", "whoever reads it says what is wrong");
    }

    #[test]
    fn a_file_settles_two_seconds_after_its_last_change() {
        let changed = |seconds| Stamp { name: String::new(), file: (0, 0), bytes: 0, modified: (5, 0), changed: (seconds, 0) };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(100);
        assert!(changed(97).is_settled(at));
        assert!(!changed(98).is_settled(at) && !changed(200).is_settled(at));
    }
}
