//! Who a data folder belongs to, and how far its log must reach.
//!
//! A log engine opens an empty log without an error when its file is gone or its header is damaged. A voter that forgot
//! what it promised can elect two leaders, so a small file beside the log remembers the highest promise that is known to
//! be on the disk. The log may reach further, never less far.
use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::log::LogError;

const FILE: &str = "identity.json";
const FORMAT: u32 = 1;

/// The highest promise that is known to be on the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Watermark {
    /// The term that was reached.
    pub(super) term: u64,
    /// Who was voted for in that term; 0 for nobody.
    pub(super) vote: u64,
    /// The last entry.
    pub(super) index: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    cluster_id: String,
    node_id: u64,
    watermark: Watermark,
    crc32: u32,
}

impl Record {
    fn checksum(&self) -> u32 {
        let Watermark { term, vote, index } = self.watermark;
        let text = format!("{} {} {} {term} {vote} {index}", self.format, self.cluster_id, self.node_id);
        crc32fast::hash(text.as_bytes())
    }
}

/// The identity file of a data folder.
#[derive(Debug)]
pub(super) struct Identity {
    dir: PathBuf,
    cluster_id: String,
    node_id: u64,
    watermark: Watermark,
}

impl Identity {
    /// Reads the file of a folder and checks that the folder is ours; `None` if there is none yet.
    ///
    /// # Errors
    /// [`LogError::Foreign`], [`LogError::Damaged`] or [`LogError::Io`].
    pub(super) fn open(dir: &Path, cluster_id: &str, node_id: u64) -> Result<Option<Self>, LogError> {
        let Some(record) = read(dir)? else { return Ok(None) };
        if record.cluster_id != cluster_id || record.node_id != node_id {
            return Err(LogError::Foreign {
                path: dir.to_owned(),
                expected_cluster: cluster_id.to_owned(),
                expected_id: node_id,
                found_cluster: record.cluster_id,
                found_id: record.node_id,
            });
        }
        Ok(Some(Self { dir: dir.to_owned(), cluster_id: record.cluster_id, node_id, watermark: record.watermark }))
    }

    /// Whose folder it is: the cluster, and the coordinator's number. `None` if nobody's yet.
    ///
    /// # Errors
    /// [`LogError::Damaged`] or [`LogError::Io`].
    pub(super) fn owner(dir: &Path) -> Result<Option<(String, u64)>, LogError> {
        Ok(read(dir)?.map(|record| (record.cluster_id, record.node_id)))
    }

    /// Makes the folder ours.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub(super) fn create(dir: &Path, cluster_id: &str, node_id: u64) -> Result<Self, LogError> {
        let watermark = Watermark::default();
        let mut identity = Self { dir: dir.to_owned(), cluster_id: cluster_id.to_owned(), node_id, watermark };
        identity.record(watermark)?;
        Ok(identity)
    }

    /// What was recorded last.
    pub(super) fn watermark(&self) -> Watermark {
        self.watermark
    }

    /// Replaces the recorded watermark; it is on the disk when this returns.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub(super) fn record(&mut self, watermark: Watermark) -> Result<(), LogError> {
        let mut record =
            Record { format: FORMAT, cluster_id: self.cluster_id.clone(), node_id: self.node_id, watermark, crc32: 0 };
        record.crc32 = record.checksum();
        replace(&self.dir, &record).map_err(|error| io_error(&self.dir, "write identity.json", error))?;
        self.watermark = watermark;
        Ok(())
    }
}

/// Reads the file and checks that it is whole.
fn read(dir: &Path) -> Result<Option<Record>, LogError> {
    let text = match fs::read(dir.join(FILE)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(dir, "read identity.json", error)),
    };
    let damaged = |problem: String| LogError::Damaged { path: dir.to_owned(), problem };
    let record: Record =
        serde_json::from_slice(&text).map_err(|error| damaged(format!("identity.json doesn't parse: {error}")))?;
    if record.format != FORMAT {
        return Err(damaged(format!("identity.json has format {}, this version knows {FORMAT}", record.format)));
    }
    if record.crc32 != record.checksum() {
        return Err(damaged("identity.json has a wrong checksum".to_owned()));
    }
    Ok(Some(record))
}

/// The old file stays whole until the new one is.
fn replace(dir: &Path, record: &Record) -> io::Result<()> {
    let temporary = dir.join("identity.json.tmp");
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(record)?)?;
    file.sync_all()?;
    fs::rename(&temporary, dir.join(FILE))?;
    // The rename itself is only on the disk once the folder is.
    File::open(dir)?.sync_all()
}

/// An error of the file system, with the folder and what was tried.
pub(super) fn io_error(dir: &Path, action: &'static str, source: io::Error) -> LogError {
    LogError::Io { path: dir.to_owned(), action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_recorded_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Identity::open(dir.path(), "demo", 1).unwrap().is_none());
        let mark = Watermark { term: 7, vote: 2, index: 99 };
        Identity::create(dir.path(), "demo", 1).unwrap().record(mark).unwrap();
        let identity = Identity::open(dir.path(), "demo", 1).unwrap().expect("it was written");
        assert_eq!(identity.watermark(), mark);
    }

    #[test]
    fn another_cluster_or_node_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        Identity::create(dir.path(), "demo", 1).unwrap();
        let error = Identity::open(dir.path(), "demo", 2).unwrap_err();
        assert!(error.to_string().contains("belongs to coordinator c1 of cluster 'demo', this is c2"), "{error}");
        assert!(matches!(Identity::open(dir.path(), "other", 1), Err(LogError::Foreign { .. })));
    }

    #[test]
    fn a_changed_or_cut_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        Identity::create(dir.path(), "demo", 1).unwrap().record(Watermark { term: 7, vote: 2, index: 99 }).unwrap();
        let path = dir.path().join(FILE);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("99", "98")).unwrap();
        assert!(matches!(Identity::open(dir.path(), "demo", 1), Err(LogError::Damaged { .. })));
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(matches!(Identity::open(dir.path(), "demo", 1), Err(LogError::Damaged { .. })));
    }
}
