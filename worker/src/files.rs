//! Files of models that no repository holds: fetched from the coordinators by their SHA-256, and kept while they are deployed.
//!
//! An archive is unpacked as it comes, in the layout of a repository with this one model in it, and takes its place only when
//! it is whole and its digest right.
use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use cresset_client::repository::archive::{ArchiveError, Unpack};
use cresset_proto::fleet::v1::{GetRequest, files_service_client::FilesServiceClient};
use tokio::time::timeout;
use tonic::{Status, transport::Endpoint};

/// How long a coordinator may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long the next piece may take.
const PIECE_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of one archive.
const ARCHIVE_BYTES_MAX: u64 = 32 << 30;

/// Why files can't be had; the text goes to the operator.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// This worker knows no coordinators.
    #[error("the files {0} are kept by coordinators, and this worker was told of none")]
    NoCoordinators(String),
    /// None of them could give it.
    #[error("no coordinator could give the files {digest}: {problems}")]
    Nowhere {
        /// What was asked for.
        digest: String,
        /// What each said.
        problems: String,
    },
    /// The file system.
    #[error("can't keep files that came from a coordinator: {0}")]
    Io(#[from] io::Error),
}

/// Why one coordinator couldn't give it.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Connect(#[from] tonic::transport::Error),
    #[error("{}", .0.message())]
    Status(#[from] Status),
    #[error("it fell silent")]
    Silent,
    #[error("it sends more than {ARCHIVE_BYTES_MAX} bytes")]
    TooLong,
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The files that this worker has fetched.
#[derive(Debug)]
pub struct Files {
    coordinators: Vec<String>,
    folder: PathBuf,
}

impl Files {
    /// Keeps files in this folder of its own; what an earlier life of the worker left there is deleted.
    ///
    /// # Errors
    /// When the folder can't be made.
    pub fn new(coordinators: Vec<String>, folder: PathBuf) -> io::Result<Self> {
        match fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        fs::create_dir_all(&folder)?;
        Ok(Self { coordinators, folder })
    }

    /// For a worker without a cluster.
    pub fn none() -> Self {
        Self { coordinators: vec![], folder: PathBuf::new() }
    }

    /// The root of a repository that holds one version of a model, with the files of this digest.
    ///
    /// # Errors
    /// [`FetchError`].
    pub async fn fetch(&self, digest: &str, model: &str, version: u64) -> Result<PathBuf, FetchError> {
        let root = self.folder.join(digest).join(version.to_string());
        if root.is_dir() {
            return Ok(root);
        }
        if self.coordinators.is_empty() {
            return Err(FetchError::NoCoordinators(digest.to_owned()));
        }
        let mut problems = Vec::new();
        let part = self.folder.join(format!("{digest}.{version}.part"));
        for address in &self.coordinators {
            let unpacked = part.join(model).join(version.to_string());
            match fetch_from(address, digest, &unpacked).await {
                Ok(()) => {
                    fs::create_dir_all(self.folder.join(digest))?;
                    fs::rename(&part, &root)?;
                    tracing::info!(model, version, digest, coordinator = address, "fetched the files of a model");
                    return Ok(root);
                }
                Err(refused) => problems.push(format!("{address}: {refused}")),
            }
            fs::remove_dir_all(&part)
                .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
        }
        Err(FetchError::Nowhere { digest: digest.to_owned(), problems: problems.join("; ") })
    }

    /// Deletes what isn't deployed here any more.
    pub fn keep_only(&self, digests: &BTreeSet<&str>) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let digest = name.split('.').next().unwrap_or_default();
            if !digests.contains(digest)
                && let Err(error) = fs::remove_dir_all(entry.path())
            {
                tracing::warn!(name, %error, "files of a model that isn't deployed can't be deleted");
            }
        }
    }
}

async fn fetch_from(address: &str, digest: &str, folder: &Path) -> Result<(), Refused> {
    let channel = Endpoint::from_shared(format!("http://{address}"))?.connect_timeout(CONNECT_TIMEOUT).connect().await?;
    let request = GetRequest { digest: digest.to_owned() };
    let asked = timeout(PIECE_TIMEOUT, FilesServiceClient::new(channel).get(request)).await;
    let mut pieces = asked.map_err(|_| Refused::Silent)??.into_inner();
    fs::create_dir_all(folder)?;
    let mut unpack = Unpack::new(folder);
    let mut left = ARCHIVE_BYTES_MAX;
    while let Some(piece) = timeout(PIECE_TIMEOUT, pieces.message()).await.map_err(|_| Refused::Silent)?? {
        left = left.checked_sub(piece.data.len() as u64).ok_or(Refused::TooLong)?;
        unpack.write(&piece.data)?;
    }
    Ok(unpack.finish(digest)?)
}

impl Drop for Files {
    fn drop(&mut self) {
        if !self.folder.as_os_str().is_empty() {
            // The folder is this worker's own; whatever can't be deleted is deleted by its next life.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
