//! Whether the disk has room for the log to grow.
//!
//! A log that can't be written is the end of its coordinator, since nobody knows what of it is there. So while there is still room
//! for what can't be put off (votes, terms, the engine's own housekeeping) growth stops: a leader takes no commands, and a
//! follower no entries, as if they had been lost on the way. Once there is room again, both go on.
use std::path::{Path, PathBuf};

use tracing::{info, warn};

/// Room for the log, looked at again and again.
#[derive(Debug)]
pub(super) struct Space {
    dir: PathBuf,
    kept_bytes: u64,
    is_full: bool,
}

impl Space {
    /// In this folder's file system `kept_bytes` are to stay free; 0: it isn't looked at.
    pub(super) fn new(dir: &Path, kept_bytes: u64) -> Self {
        Self { dir: dir.to_owned(), kept_bytes, is_full: false }
    }

    /// How many bytes are free, if too few are.
    pub(super) fn lacks(&mut self) -> Option<u64> {
        if self.kept_bytes == 0 {
            return None;
        }
        // What can't be asked has to be tried.
        let free_bytes = free_bytes(&self.dir)?;
        let was_full = self.is_full;
        self.is_full = is_full(was_full, free_bytes, self.kept_bytes);
        match (was_full, self.is_full) {
            (false, true) => warn!(free_bytes, kept_bytes = self.kept_bytes, "the disk is full: nothing is added to the log"),
            (true, false) => info!(free_bytes, "the disk has room again"),
            _ => {}
        }
        self.is_full.then_some(free_bytes)
    }
}

/// A quarter more has to be free before it counts as free again: it must not change to and fro.
fn is_full(was_full: bool, free_bytes: u64, kept_bytes: u64) -> bool {
    let wanted_bytes = if was_full { kept_bytes.saturating_add(kept_bytes / 4) } else { kept_bytes };
    free_bytes < wanted_bytes
}

fn free_bytes(dir: &Path) -> Option<u64> {
    let told = rustix::fs::statvfs(dir).ok()?;
    Some(told.f_bavail.saturating_mul(told.f_frsize))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_full_until_there_is_clearly_room() {
        assert!(!is_full(false, 100, 100) && is_full(false, 99, 100));
        assert!(is_full(true, 124, 100) && !is_full(true, 125, 100));
    }

    #[test]
    fn a_folder_that_is_there_has_some_room_and_less_than_everything() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Space::new(dir.path(), 1).lacks(), None);
        assert!(Space::new(dir.path(), u64::MAX).lacks().is_some());
        assert_eq!(Space::new(dir.path(), 0).lacks(), None);
    }
}
