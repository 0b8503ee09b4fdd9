//! The files of one version of a model as one stream of bytes, for models that no repository holds.
//!
//! For each file, in order of names: its name's length and name, its length, its content; numbers are 8 bytes, little endian.
//! SHA-256 over the stream is the version's digest, the same as of the same files in a repository, so an archive is known by
//! its digest, and who has received one can check that it is whole.
use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use bytes::Bytes;
use sha2::{Digest, Sha256};

/// Longest name of a file, in bytes.
const NAME_BYTES_MAX: usize = 1_024;

/// Why an archive can't be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The content isn't what its digest says.
    #[error("the archive's SHA-256 is {found}, it should be {wanted}")]
    Digest {
        /// What arrived.
        found: String,
        /// What was asked for.
        wanted: String,
    },
    /// The bytes aren't an archive.
    #[error("the archive is damaged: {0}")]
    Malformed(&'static str),
    /// The file system.
    #[error("can't unpack the archive: {0}")]
    Io(#[from] io::Error),
}

/// Whether a file of this name can be in a version's folder, and nowhere else.
pub fn is_file_name(name: &str) -> bool {
    let plain = |part: &str| !matches!(part, "" | "." | "..") && !part.chars().any(|c| c == '\\' || c.is_control());
    name.len() <= NAME_BYTES_MAX && name.split('/').all(plain)
}

/// What comes before a file's content.
pub(super) fn header(name: &str, size: u64) -> Vec<u8> {
    let mut header = (name.len() as u64).to_le_bytes().to_vec();
    header.extend_from_slice(name.as_bytes());
    header.extend_from_slice(&size.to_le_bytes());
    header
}

pub(crate) fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a text can be a digest: 64 lower-case hex digits.
pub fn is_digest(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// An archive in memory.
#[derive(Debug, Clone)]
pub struct Archive {
    /// Lower-case hex SHA-256 over the whole.
    pub digest: String,
    /// Bytes of the files together.
    pub size_bytes: u64,
    /// The stream, in pieces of any size.
    pub parts: Vec<Bytes>,
}

impl Archive {
    /// Packs files, by their names.
    pub fn of(files: &BTreeMap<String, Bytes>) -> Self {
        let mut hash = Sha256::new();
        let (mut parts, mut size_bytes) = (Vec::new(), 0);
        for (name, content) in files {
            for part in [Bytes::from(header(name, content.len() as u64)), content.clone()] {
                hash.update(&part);
                parts.push(part);
            }
            size_bytes += content.len() as u64;
        }
        Self { digest: hex(hash), size_bytes, parts }
    }
}

/// Checks a stream's digest as it goes by.
#[derive(Debug, Default)]
pub struct Check(Sha256);

impl Check {
    /// Takes the next piece.
    pub fn update(&mut self, piece: &[u8]) {
        self.0.update(piece);
    }

    /// Whether the whole is what it should be.
    ///
    /// # Errors
    /// [`ArchiveError::Digest`].
    pub fn finish(self, wanted: &str) -> Result<(), ArchiveError> {
        let found = hex(self.0);
        if found == wanted { Ok(()) } else { Err(ArchiveError::Digest { found, wanted: wanted.to_owned() }) }
    }
}

/// Writes the files of an archive into a folder as the stream comes.
#[derive(Debug)]
pub struct Unpack {
    folder: PathBuf,
    check: Check,
    header: Vec<u8>,
    file: Option<(File, u64)>,
}

impl Unpack {
    /// Into this folder, which has to be there.
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_owned(), check: Check::default(), header: Vec::new(), file: None }
    }

    /// Takes the next piece of the stream.
    ///
    /// # Errors
    /// [`ArchiveError::Malformed`], [`ArchiveError::Io`].
    pub fn write(&mut self, mut piece: &[u8]) -> Result<(), ArchiveError> {
        self.check.update(piece);
        while !piece.is_empty() {
            match &mut self.file {
                Some((file, left)) => {
                    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(piece.len());
                    file.write_all(&piece[..count])?;
                    piece = &piece[count..];
                    *left -= count as u64;
                }
                None => piece = self.read_header(piece)?,
            }
            if matches!(self.file, Some((_, 0))) {
                self.file = None;
            }
        }
        Ok(())
    }

    /// Takes what belongs to the header of the next file, and opens that once the header is whole.
    fn read_header<'a>(&mut self, piece: &'a [u8]) -> Result<&'a [u8], ArchiveError> {
        let number = |bytes: &[u8]| bytes.first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let name_bytes = match number(&self.header) {
            Some(count) if count > NAME_BYTES_MAX as u64 => return Err(ArchiveError::Malformed("a file's name is too long")),
            Some(count) => usize::try_from(count).unwrap_or(usize::MAX),
            None => {
                let count = (8 - self.header.len()).min(piece.len());
                self.header.extend_from_slice(&piece[..count]);
                return Ok(&piece[count..]);
            }
        };
        let whole = 16 + name_bytes;
        let count = (whole - self.header.len()).min(piece.len());
        self.header.extend_from_slice(&piece[..count]);
        if self.header.len() == whole {
            let name = std::str::from_utf8(&self.header[8..8 + name_bytes]).ok().filter(|name| is_file_name(name));
            let name = name.ok_or(ArchiveError::Malformed("a file's name leads out of its folder"))?;
            let size = number(&self.header[8 + name_bytes..]).unwrap_or(0);
            let path = self.folder.join(name);
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            self.file = Some((File::create_new(&path)?, size));
            self.header.clear();
        }
        Ok(&piece[count..])
    }

    /// Checks that the archive is whole and what was asked for.
    ///
    /// # Errors
    /// [`ArchiveError::Malformed`], [`ArchiveError::Digest`].
    pub fn finish(self, digest: &str) -> Result<(), ArchiveError> {
        if self.file.is_some() || !self.header.is_empty() {
            return Err(ArchiveError::Malformed("it ends too early"));
        }
        self.check.finish(digest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn files(contents: &[(&str, &[u8])]) -> BTreeMap<String, Bytes> {
        contents.iter().map(|(name, content)| ((*name).to_owned(), Bytes::copy_from_slice(content))).collect()
    }

    fn unpack(parts: &[Bytes], digest: &str) -> Result<tempfile::TempDir, ArchiveError> {
        let folder = tempfile::tempdir().unwrap();
        let mut unpack = Unpack::new(folder.path());
        for part in parts {
            unpack.write(part)?;
        }
        unpack.finish(digest).map(|()| folder)
    }

    proptest! {
        #[test]
        fn what_is_packed_comes_out_however_it_is_cut(
            files in prop::collection::btree_map("[a-c]{1,3}", prop::collection::vec(any::<u8>(), 0..40), 0..4),
            piece in 1usize..30,
        ) {
            let files: BTreeMap<String, Bytes> = files.into_iter().map(|(name, bytes)| (name, bytes.into())).collect();
            let archive = Archive::of(&files);
            let whole: Vec<u8> = archive.parts.concat();
            let pieces: Vec<Bytes> = whole.chunks(piece).map(Bytes::copy_from_slice).collect();
            let folder = unpack(&pieces, &archive.digest).unwrap();
            for (name, content) in &files {
                prop_assert_eq!(&Bytes::from(fs::read(folder.path().join(name)).unwrap()), content);
            }
            prop_assert_eq!(fs::read_dir(folder.path()).unwrap().count(), files.len());
        }
    }

    #[test]
    fn what_is_damaged_or_leads_out_is_refused() {
        let archive = Archive::of(&files(&[("model.pt", b"weights"), ("sub/x", b"")]));
        assert!(unpack(&archive.parts, &archive.digest).is_ok());
        assert!(matches!(unpack(&archive.parts[..1], &archive.digest), Err(ArchiveError::Malformed("it ends too early"))));
        assert!(matches!(unpack(&archive.parts[..2], &archive.digest), Err(ArchiveError::Digest { .. })));
        for name in ["../x", "/x", "a//b", "", ".", "a/../../b"] {
            let archive = Archive::of(&files(&[(name, b"x")]));
            assert!(matches!(unpack(&archive.parts, &archive.digest), Err(ArchiveError::Malformed(_))), "{name}");
        }
        assert!(unpack(&[Bytes::from_static(&[0xff; 64])], "").is_err());
    }
}
