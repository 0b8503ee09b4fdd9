//! Checks a model's archive before libtorch sees it.
//!
//! libtorch is built without the checksum test of its zip reader: a flipped bit in a weight would be
//! served, and one in a pickle can do worse than fail. So every record is read once here and held
//! against the archive's own checksums. A file that is whole but malicious is not what this finds.

use std::fs::File;
use std::io::{BufReader, Read};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use zip::ZipArchive;
use zip::result::ZipError;

/// Records in one archive at most; real models have a few thousand.
const RECORDS_MAX: usize = 1 << 20;

/// What an archive has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// A TorchScript module.
    TorchScript,
    /// An AOTInductor package.
    Package,
}

/// What an archive holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Contents {
    /// Bytes of tensors that are constants of the code, which no attribute shows.
    pub constants_bytes: u64,
}

/// Reads the whole file and compares every record with its checksum.
///
/// # Errors
/// A message without the path: the file is missing, is no zip archive, is cut or damaged, or isn't of
/// this layout.
pub fn check(path: &Path, layout: Layout) -> Result<Contents, String> {
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => "the file is not there".to_string(),
        kind => format!("the file can't be opened ({kind})"),
    })?;
    if !file.metadata().is_ok_and(|metadata| metadata.is_file()) {
        return Err("it is not a regular file".into());
    }
    // The zip reader's arithmetic on a damaged file may trip an overflow check, which is a panic.
    catch_unwind(AssertUnwindSafe(|| check_records(file, layout)))
        .unwrap_or_else(|_| Err("the archive is damaged (its directory makes no sense)".into()))
}

fn check_records(file: File, layout: Layout) -> Result<Contents, String> {
    let mut archive = ZipArchive::new(BufReader::with_capacity(1 << 16, file)).map_err(|error| match error {
        ZipError::InvalidArchive(_) => "the file is not an archive as torch writes it, or it is cut short".to_string(),
        other => format!("the archive is damaged ({other})"),
    })?;
    if archive.len() > RECORDS_MAX {
        return Err(format!("the archive has {} records, the limit is {RECORDS_MAX}", archive.len()));
    }
    let mut contents = Contents::default();
    let mut has_code = false;
    let mut buffer = vec![0_u8; 1 << 18];
    for index in 0..archive.len() {
        let mut record = archive.by_index(index).map_err(|error| format!("the archive is damaged ({error})"))?;
        // libtorch unpacks a package into a folder by these names.
        if record.enclosed_name().is_none() {
            return Err("the archive has a record whose name leads out of it".into());
        }
        let name = inner_name(record.name()).to_string();
        let mut bytes = 0_u64;
        loop {
            // The reader compares the checksum when it comes to the end.
            match record.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => bytes += count as u64,
                Err(_) => return Err(format!("the archive is damaged: record '{name}' fails its checksum")),
            }
        }
        if bytes != record.size() {
            return Err(format!("the archive is damaged: record '{name}' has another length than it says"));
        }
        has_code |= match layout {
            Layout::TorchScript => name.starts_with("code/"),
            Layout::Package => name.starts_with("data/aotinductor/") && name.ends_with(".so"),
        };
        if name.starts_with("constants/") {
            contents.constants_bytes += bytes;
        }
    }
    if has_code {
        return Ok(contents);
    }
    Err(match layout {
        Layout::TorchScript => "the archive holds no TorchScript code (a state_dict is not a model: save with torch.jit.save)",
        Layout::Package => "the archive holds no compiled code (an exported program is not a package: save it with torch._inductor.aoti_compile_and_package)",
    }
    .into())
}

/// A record's name without the folder that every record of an archive is in.
fn inner_name(name: &str) -> &str {
    name.split_once('/').map_or(name, |(_, inner)| inner)
}
