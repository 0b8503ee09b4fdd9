//! A backup of what the coordinators agree on, in one file: a tar archive that any tool can list.
//!
//! ```text
//! manifest.json   what is in it, for people and for `cresset backup inspect`
//! state           the cluster's state, as a coordinator's snapshot
//! files/DIGEST    the files that came with a load, as coordinators keep them
//! sha256          the SHA-256 of everything before this entry, in hex: without it, or with another, the file isn't whole
//! ```
//!
//! What lies in the model repository isn't in it: the state pins it by its digests.
use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::repository::archive::{hex, is_digest};

/// The format that this version writes, and the latest that it reads.
pub const FORMAT: u32 = 1;
/// Where a coordinator that is started with an empty folder looks for a backup to begin from.
pub const TO_RESTORE: &str = "restore.cresset-backup";
/// What that file is called once it was begun from.
pub const RESTORED: &str = "restored.cresset-backup";

const MANIFEST: &str = "manifest.json";
const STATE: &str = "state";
const FILES: &str = "files";
const CHECKSUM: &str = "sha256";
/// The largest manifest: that of 100,000 versions has a fifth of it.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// The largest state, which is the largest snapshot.
const STATE_BYTES_MAX: u64 = 1 << 30;

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// The cluster that it is of.
    pub cluster_id: String,
    /// The epoch of its state.
    pub epoch: u64,
    /// When it was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The version of Cresset that made it.
    pub made_by: String,
    /// The coordinators that voted.
    pub voters: Vec<String>,
    /// The workers that weren't dead.
    pub workers: Vec<String>,
    /// What is deployed.
    pub models: Vec<Deployed>,
}

/// A deployed version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployed {
    /// The model.
    pub name: String,
    /// The version.
    pub version: u64,
    /// Lower-case hex SHA-256 of its files.
    pub digest: String,
    /// How many replicas are wanted; 0: as many as fit.
    pub replicas_wanted: u32,
    /// Whether its files came with a load, and so are in the backup too; otherwise they are in the model repository.
    pub stored: bool,
}

/// Why a backup can't be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The file can't be read.
    #[error("can't read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file can't be written.
    #[error("can't write {}: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It isn't a backup, or not a whole one.
    #[error("{} isn't a whole backup: {problem}; use another copy of it, or an earlier backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// A later version made it.
    #[error("{} has format {found}, this version of Cresset reads up to {FORMAT}; use the version that made it", path.display())]
    Later {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// There is a coordinator already.
    #[error("{} already holds a coordinator; a backup begins a new cluster: use an empty folder", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
}

/// Writes a backup.
pub struct Writer<W: Write> {
    archive: tar::Builder<Hashing<W>>,
    modified_s: u64,
}

impl<W: Write> std::fmt::Debug for Writer<W> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").finish_non_exhaustive()
    }
}

impl<W: Write> Writer<W> {
    /// Begins with the manifest and the state.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn new(out: W, manifest: &Manifest, state: &[u8]) -> io::Result<Self> {
        let archive = tar::Builder::new(Hashing { out, hash: Sha256::new() });
        let mut writer = Self { archive, modified_s: manifest.created_unix_ms / 1_000 };
        let text = serde_json::to_vec_pretty(manifest)?;
        writer.entry(MANIFEST, text.len() as u64, &*text)?;
        writer.entry(STATE, state.len() as u64, state)?;
        Ok(writer)
    }

    /// Adds the files of a digest: exactly `bytes` are read.
    ///
    /// # Errors
    /// Those of `files` and of `out`.
    pub fn files(&mut self, digest: &str, bytes: u64, files: impl Read) -> io::Result<()> {
        let mut files = files.take(bytes);
        self.entry(&format!("{FILES}/{digest}"), bytes, &mut files)?;
        if files.limit() == 0 { Ok(()) } else { Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the files became shorter")) }
    }

    /// Ends the backup, and gives back where it went.
    ///
    /// # Errors
    /// Those of `out`.
    pub fn finish(mut self) -> io::Result<W> {
        let checksum = hex(self.archive.get_ref().hash.clone());
        self.entry(CHECKSUM, checksum.len() as u64, checksum.as_bytes())?;
        let mut out = self.archive.into_inner()?.out;
        out.flush()?;
        Ok(out)
    }

    fn entry(&mut self, name: &str, bytes: u64, content: impl Read) -> io::Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes);
        // The state says what runs where: nobody else's business.
        header.set_mode(0o600);
        header.set_mtime(self.modified_s);
        self.archive.append_data(&mut header, name, content)
    }
}

struct Hashing<W> {
    out: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.out.write(bytes)?;
        self.hash.update(&bytes[..written]);
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A backup that was read, and found whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// What is in it.
    pub manifest: Manifest,
    /// The cluster's state.
    pub state: Vec<u8>,
    /// Digests and sizes in bytes of the files in it.
    pub files: Vec<(String, u64)>,
    /// The checksum at its end: it tells this backup from all others.
    pub sha256: String,
    path: PathBuf,
}

impl Backup {
    /// Reads a backup and checks all of it.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn open(path: &Path) -> Result<Self, BackupError> {
        let failed = |source| match source {
            Fault::Io(source) => BackupError::Read { path: path.to_owned(), source },
            Fault::Damaged(problem) => BackupError::Damaged { path: path.to_owned(), problem },
            Fault::Later(found) => BackupError::Later { path: path.to_owned(), found },
        };
        read(path).map_err(failed)
    }

    /// Puts the files that came with loads into a folder, each under its digest.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn unpack_files(&self, folder: &Path) -> Result<(), BackupError> {
        let write = |source| BackupError::Write { path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(write)?;
        let read = |source| BackupError::Read { path: self.path.clone(), source };
        let mut archive = tar::Archive::new(File::open(&self.path).map_err(read)?);
        for entry in archive.entries().map_err(read)? {
            let mut entry = entry.map_err(read)?;
            let Some(digest) = files_digest(&name_of(&entry)) else { continue };
            place(&folder.join(digest), |file| io::copy(&mut entry, file).map(drop)).map_err(write)?;
        }
        Ok(())
    }

    /// Has a coordinator that is started with this folder begin from the backup.
    ///
    /// # Errors
    /// [`BackupError`].
    pub fn prepare(&self, folder: &Path) -> Result<(), BackupError> {
        let write = |source| BackupError::Write { path: folder.to_owned(), source };
        fs::create_dir_all(folder).map_err(write)?;
        if folder.join("identity.json").exists() || folder.join("log").exists() {
            return Err(BackupError::InUse { path: folder.to_owned() });
        }
        let mut from = File::open(&self.path).map_err(|source| BackupError::Read { path: self.path.clone(), source })?;
        place(&folder.join(TO_RESTORE), |file| io::copy(&mut from, file).map(drop)).map_err(write)
    }
}

/// Writes a file so that it is there whole or not at all, also after a power cut.
///
/// # Errors
/// Those of the file system and of `fill`.
pub fn place(path: &Path, fill: impl FnOnce(&mut File) -> io::Result<()>) -> io::Result<()> {
    let beside = path.with_extension("part");
    let mut file = File::create(&beside)?;
    let written = fill(&mut file).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Of no use, and perhaps what filled the disk.
        let _ = fs::remove_file(&beside);
    }
    written?;
    path.parent()
        .map_or(Ok(()), |folder| File::open(if folder.as_os_str().is_empty() { Path::new(".") } else { folder })?.sync_all())
}

enum Fault {
    Io(io::Error),
    Damaged(String),
    Later(u32),
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        // What the archive's reader says of its content.
        match error.kind() {
            io::ErrorKind::Other | io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
                Self::Damaged(error.to_string())
            }
            _ => Self::Io(error),
        }
    }
}

fn read(path: &Path) -> Result<Backup, Fault> {
    let mut file = File::open(path)?;
    let (mut manifest, mut state, mut files, mut checksum) = (None, None, Vec::new(), None);
    for entry in tar::Archive::new(&mut file).entries()? {
        let mut entry = entry?;
        if checksum.is_some() {
            return Err(Fault::Damaged("something comes after its checksum".to_owned()));
        }
        let name = name_of(&entry);
        match name.as_str() {
            MANIFEST => manifest = Some(small(&mut entry, MANIFEST_BYTES_MAX)?),
            STATE => state = Some(small(&mut entry, STATE_BYTES_MAX)?),
            CHECKSUM => checksum = Some((entry.raw_header_position(), small(&mut entry, 64)?)),
            _ => match files_digest(&name) {
                Some(digest) => files.push((digest, entry.size())),
                None => return Err(Fault::Damaged(format!("it has an entry '{}'", name.chars().take(80).collect::<String>()))),
            },
        }
    }
    let lacks = |what: &str| Fault::Damaged(format!("it has no {what}"));
    let (end, checksum) = checksum.ok_or_else(|| Fault::Damaged("its end is missing".to_owned()))?;
    file.seek(SeekFrom::Start(0))?;
    let mut hash = Sha256::new();
    io::copy(&mut file.take(end), &mut hash)?;
    let sha256 = hex(hash);
    if sha256.as_bytes() != checksum {
        return Err(Fault::Damaged("its checksum is another".to_owned()));
    }
    let manifest = manifest.ok_or_else(|| lacks(MANIFEST))?;
    let format = serde_json::from_slice::<serde_json::Value>(&manifest).ok().and_then(|value| value.get("format")?.as_u64());
    if let Some(found) = format.and_then(|format| u32::try_from(format).ok()).filter(|format| *format > FORMAT) {
        return Err(Fault::Later(found));
    }
    let manifest = serde_json::from_slice(&manifest).map_err(|error| Fault::Damaged(format!("{MANIFEST}: {error}")))?;
    Ok(Backup { manifest, state: state.ok_or_else(|| lacks(STATE))?, files, sha256, path: path.to_owned() })
}

fn small(entry: &mut tar::Entry<'_, impl Read>, bytes_max: u64) -> Result<Vec<u8>, Fault> {
    if entry.size() > bytes_max {
        return Err(Fault::Damaged(format!("its {} has {} bytes, the limit is {bytes_max}", name_of(entry), entry.size())));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn name_of(entry: &tar::Entry<'_, impl Read>) -> String {
    String::from_utf8_lossy(&entry.path_bytes()).into_owned()
}

/// The digest in an entry's name, if it can be one; it becomes a file's name.
fn files_digest(name: &str) -> Option<String> {
    let digest = name.strip_prefix(FILES)?.strip_prefix('/')?;
    is_digest(digest).then(|| digest.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let model = Deployed { name: "m".into(), version: 1, digest: "ab".repeat(32), replicas_wanted: 2, stored: true };
        Manifest {
            format: FORMAT,
            cluster_id: "demo".into(),
            epoch: 7,
            created_unix_ms: 1_700_000_000_000,
            made_by: "0.1.0".into(),
            voters: vec!["c1".into()],
            workers: vec!["w1".into()],
            models: vec![model],
        }
    }

    fn written(manifest: &Manifest) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new(), manifest, b"the state").unwrap();
        writer.files(&"ab".repeat(32), 5, &b"files"[..]).unwrap();
        writer.finish().unwrap()
    }

    fn opened(bytes: &[u8]) -> Result<Backup, BackupError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backup");
        fs::write(&path, bytes).unwrap();
        Backup::open(&path)
    }

    #[test]
    fn what_was_written_is_read_and_put_where_it_belongs() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("backup");
        fs::write(&path, written(&manifest())).unwrap();
        let backup = Backup::open(&path).unwrap();
        assert_eq!((&backup.manifest, &*backup.state), (&manifest(), &b"the state"[..]));
        assert_eq!(backup.files, [("ab".repeat(32), 5)]);
        backup.unpack_files(&folder.path().join("files")).unwrap();
        assert_eq!(fs::read(folder.path().join("files").join("ab".repeat(32))).unwrap(), b"files");

        let data = folder.path().join("c1");
        backup.prepare(&data).unwrap();
        assert_eq!(Backup::open(&data.join(TO_RESTORE)).unwrap().sha256, backup.sha256);
        fs::write(data.join("identity.json"), "").unwrap();
        assert!(matches!(backup.prepare(&data), Err(BackupError::InUse { .. })));
    }

    #[test]
    fn a_backup_that_was_cut_or_changed_anywhere_is_refused() {
        let whole = written(&manifest());
        // Behind the checksum there is only padding.
        let end = whole.windows(CHECKSUM.len()).rposition(|window| window == CHECKSUM.as_bytes()).unwrap();
        for at in (0..end).step_by(37).chain([end + 512]) {
            let mut changed = whole.clone();
            changed[at] ^= 1;
            assert!(matches!(opened(&changed), Err(BackupError::Damaged { .. })), "byte {at}");
        }
        for length in (0..end + 512).step_by(101) {
            assert!(matches!(opened(&whole[..length]), Err(BackupError::Damaged { .. })), "{length} bytes");
        }
    }

    #[test]
    fn a_later_format_is_told_apart_from_damage() {
        let later = Manifest { format: FORMAT + 1, ..manifest() };
        assert!(matches!(opened(&written(&later)), Err(BackupError::Later { found: 2, .. })));
    }

    #[test]
    fn what_becomes_shorter_while_it_is_read_is_an_error() {
        let mut writer = Writer::new(Vec::new(), &manifest(), b"").unwrap();
        assert!(writer.files(&"ab".repeat(32), 9, &b"files"[..]).is_err());
    }
}
