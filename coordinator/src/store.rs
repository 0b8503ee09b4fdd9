//! Archives of models that no repository holds, each kept under its SHA-256.
//!
//! Who loads a model with files of its own gives them to one coordinator. That one writes the archive here, and gives it to
//! the other coordinators; only when a majority has it may a command name it. Workers ask any coordinator for it. A
//! coordinator that lacks one that is deployed, because it was down at the time, fetches it from another. What no deployment
//! names is deleted, except for a while after it came: the command that names it may be on its way.
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{self, Read, Write},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use cresset_client::repository::archive::{Archive, ArchiveError, Check, is_digest};
use cresset_proto::{
    fleet::v1::{
        GetRequest, GetResponse, PutRequest, PutResponse, files_service_client::FilesServiceClient,
        files_service_server::FilesService,
    },
    reason::Reason,
};
use futures::{Stream, StreamExt, future::join_all, stream};
use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming, transport::Endpoint};

use crate::consensus::Consensus;

/// Most bytes of all archives together.
const STORE_BYTES_MAX: u64 = 32 << 30;
/// Bytes in one message.
const CHUNK_BYTES: usize = 1 << 20;
/// How long an archive may wait for the command that names it.
const UNNAMED: Duration = Duration::from_secs(600);
/// How often is looked for what is missing or not needed any more, beside after each change.
const LOOK_EVERY: Duration = Duration::from_secs(30);
/// How long another coordinator may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long it may take to take or to give a whole archive.
const TRANSFER_TIMEOUT: Duration = Duration::from_secs(300);

/// Why an archive can't be kept or had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// What names it isn't a SHA-256.
    #[error("'{0}' isn't a SHA-256 in 64 lower-case hexadecimal digits")]
    Digest(String),
    /// The bound.
    #[error(
        "the files of models take {STORE_BYTES_MAX} bytes on this coordinator, which is the limit; unload some that were loaded with files"
    )]
    Full,
    /// The content isn't what its digest says.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The file system.
    #[error("can't keep the files of a model: {0}")]
    Io(#[from] io::Error),
    /// Too few have it.
    #[error("only {kept} of {all} coordinators could keep the files, a majority must: {problems}")]
    NoMajority {
        /// How many have it.
        kept: usize,
        /// How many coordinators there are.
        all: usize,
        /// What the others said.
        problems: String,
    },
}

impl StoreError {
    /// As a status for whoever asked.
    pub fn status(&self) -> Status {
        let reason = match self {
            Self::Digest(_) | Self::Archive(_) => Reason::InvalidArgument,
            Self::Full => Reason::Conflict,
            Self::Io(_) => Reason::LoadFailed,
            Self::NoMajority { .. } => Reason::NoLeader,
        };
        reason.status(self.to_string())
    }
}

/// The archives of this coordinator. Clones are handles to the same ones.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

/// Tells the peer addresses of the other coordinators, as they are now.
pub type Others = Box<dyn Fn() -> Vec<String> + Send + Sync>;

struct Inner {
    folder: PathBuf,
    cluster_id: String,
    others: Others,
    /// Archives that no deployment has named yet, with the time when each came.
    unnamed: Mutex<BTreeMap<String, Instant>>,
}

fn check_digest(digest: &str) -> Result<(), StoreError> {
    if is_digest(digest) { Ok(()) } else { Err(StoreError::Digest(digest.chars().take(80).collect())) }
}

impl Store {
    /// The store in this folder, which is made if it isn't there.
    ///
    /// # Errors
    /// When the folder can't be made or read.
    pub fn open(folder: &Path, cluster_id: &str, others: Others) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let mut unnamed = BTreeMap::new();
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if check_digest(&name).is_ok() {
                // Which ones are named shows once the log has been read.
                unnamed.insert(name, Instant::now());
            } else {
                fs::remove_file(folder.join(name))?; // cut short by the end of an earlier process
            }
        }
        let inner = Inner { folder: folder.to_owned(), cluster_id: cluster_id.to_owned(), others, unnamed: Mutex::new(unnamed) };
        Ok(Self { inner: Arc::new(inner) })
    }

    fn path(&self, digest: &str) -> PathBuf {
        self.inner.folder.join(digest)
    }

    /// Whether the archive is here.
    pub fn has(&self, digest: &str) -> bool {
        check_digest(digest).is_ok() && self.path(digest).is_file()
    }

    fn digests(&self) -> io::Result<Vec<String>> {
        let names = fs::read_dir(&self.inner.folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        Ok(names.collect::<io::Result<Vec<_>>>()?.into_iter().filter(|name| check_digest(name).is_ok()).collect())
    }

    fn bytes(&self) -> io::Result<u64> {
        fs::read_dir(&self.inner.folder)?.try_fold(0, |sum: u64, entry| Ok(sum.saturating_add(entry?.metadata()?.len())))
    }

    /// Keeps an archive as it comes, if it is what its digest says.
    async fn keep(&self, digest: &str, mut pieces: impl Stream<Item = Result<Bytes, Status>> + Unpin) -> Result<(), Status> {
        check_digest(digest).map_err(|error| error.status())?;
        self.inner.unnamed.lock().insert(digest.to_owned(), Instant::now());
        if self.has(digest) {
            return Ok(());
        }
        let mut room = STORE_BYTES_MAX.saturating_sub(self.bytes().map_err(|error| StoreError::from(error).status())?);
        let part = self.inner.folder.join(format!("{digest}.{:016x}.part", rand::random::<u64>()));
        let kept = async {
            let mut file = fs::File::create_new(&part).map_err(StoreError::from).map_err(|error| error.status())?;
            let mut check = Check::default();
            while let Some(piece) = pieces.next().await {
                let piece = piece?;
                room = room.checked_sub(piece.len() as u64).ok_or_else(|| StoreError::Full.status())?;
                check.update(&piece);
                // Pieces are small; what takes its time is that they are made durable, below.
                file.write_all(&piece).map_err(StoreError::from).map_err(|error| error.status())?;
                tokio::task::yield_now().await;
            }
            check.finish(digest).map_err(StoreError::from).map_err(|error| error.status())?;
            let (folder, part, path) = (self.inner.folder.clone(), part.clone(), self.path(digest));
            let durable = move || -> io::Result<()> {
                file.sync_all()?;
                fs::rename(part, path)?;
                fs::File::open(folder)?.sync_all()
            };
            let durable = tokio::task::spawn_blocking(durable).await;
            let durable = durable.map_err(|error| Reason::Internal.status(error.to_string()))?;
            durable.map_err(StoreError::from).map_err(|error| error.status())
        };
        let kept = kept.await;
        if kept.is_err() {
            // Whatever is left of it is of no use; that it was never there is fine.
            let _ = fs::remove_file(&part);
        }
        kept
    }

    /// Keeps an archive here and at the other coordinators; done when each has it or has failed, and a majority has it.
    ///
    /// # Errors
    /// A status for whoever gave it.
    pub async fn spread(&self, archive: &Archive) -> Result<(), Status> {
        let pieces: Vec<_> = archive.parts.iter().cloned().flat_map(chunks).map(Ok).collect();
        self.keep(&archive.digest, stream::iter(pieces)).await?;
        let others = (self.inner.others)();
        let gives = others.iter().map(|address| async move {
            let given = timeout(TRANSFER_TIMEOUT, self.give(address, archive)).await;
            let given = given.unwrap_or_else(|_| Err(Status::deadline_exceeded("took too long")));
            given.map_err(|status| format!("{address}: {}", status.message()))
        });
        let problems: Vec<String> = join_all(gives).await.into_iter().filter_map(Result::err).collect();
        let all = others.len() + 1;
        let kept = all - problems.len();
        if kept * 2 > all { Ok(()) } else { Err(StoreError::NoMajority { kept, all, problems: problems.join("; ") }.status()) }
    }

    async fn give(&self, address: &str, archive: &Archive) -> Result<(), Status> {
        let cluster_id = self.inner.cluster_id.clone();
        let first = PutRequest { cluster_id, digest: archive.digest.clone(), data: Bytes::new() };
        let pieces: Vec<Bytes> = archive.parts.iter().flat_map(|part| chunks(part.clone())).collect();
        let rest = pieces.into_iter().map(|data| PutRequest { data, ..Default::default() });
        let requests = stream::iter(std::iter::once(first).chain(rest));
        client(address).await?.put(requests).await.map(drop)
    }

    /// Where the archives are, each under its digest.
    pub fn folder(&self) -> &Path {
        &self.inner.folder
    }

    /// Sees to it that an archive is here.
    ///
    /// # Errors
    /// Why no other coordinator gave it.
    pub async fn need(&self, digest: &str) -> Result<(), Status> {
        if self.has(digest) { Ok(()) } else { self.fetch(digest).await }
    }

    /// Fetches an archive from another coordinator.
    async fn fetch(&self, digest: &str) -> Result<(), Status> {
        let mut last = Status::unavailable("there is no other coordinator");
        for address in (self.inner.others)() {
            let fetched = async {
                let pieces = client(&address).await?.get(GetRequest { digest: digest.to_owned() }).await?.into_inner();
                self.keep(digest, pieces.map(|piece| piece.map(|piece| piece.data))).await
            };
            match timeout(TRANSFER_TIMEOUT, fetched).await.unwrap_or_else(|_| Err(Status::deadline_exceeded("took too long"))) {
                Ok(()) => return Ok(()),
                Err(status) => last = status,
            }
        }
        Err(last)
    }

    /// Brings the store in line with what is deployed, now and after each change, until `closing`.
    pub async fn follow(self, consensus: Consensus, closing: CancellationToken) {
        let follow = async {
            let mut applied = consensus.applied();
            let mut ticks = interval(LOOK_EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tokio::select! {
                    _ = ticks.tick() => {}
                    changed = applied.changed() => if changed.is_err() { return },
                }
                let named: BTreeSet<String> = {
                    let state = consensus.state();
                    state.models.values().filter(|model| model.stored).map(|model| model.digest.clone()).collect()
                };
                if let Err(error) = self.sweep(&named) {
                    tracing::warn!(%error, "files of models that aren't needed can't be deleted");
                }
                for digest in named.iter().filter(|digest| !self.has(digest)) {
                    match self.fetch(digest).await {
                        Ok(()) => tracing::info!(digest, "fetched files of a model from another coordinator"),
                        Err(status) => tracing::warn!(digest, error = status.message(), "files of a model are missing here"),
                    }
                }
            }
        };
        closing.run_until_cancelled(follow).await;
    }

    /// Deletes what isn't named and has waited long enough to be.
    fn sweep(&self, named: &BTreeSet<String>) -> io::Result<()> {
        let mut unnamed = self.inner.unnamed.lock();
        unnamed.retain(|digest, since| !named.contains(digest) && since.elapsed() < UNNAMED);
        for digest in self.digests()? {
            if !named.contains(&digest) && !unnamed.contains_key(&digest) {
                fs::remove_file(self.path(&digest))?;
                tracing::info!(digest, "deleted files of a model that no deployment names");
            }
        }
        Ok(())
    }
}

async fn client(address: &str) -> Result<FilesServiceClient<tonic::transport::Channel>, Status> {
    let unreachable = |error: tonic::transport::Error| Status::unavailable(error.to_string());
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(unreachable)?;
    Ok(FilesServiceClient::new(endpoint.connect_timeout(CONNECT_TIMEOUT).connect().await.map_err(unreachable)?))
}

/// Pieces that fit a message.
fn chunks(mut part: Bytes) -> impl Iterator<Item = Bytes> {
    std::iter::from_fn(move || (!part.is_empty()).then(|| part.split_to(part.len().min(CHUNK_BYTES))))
}

#[tonic::async_trait]
impl FilesService for Store {
    async fn put(&self, request: Request<Streaming<PutRequest>>) -> Result<Response<PutResponse>, Status> {
        let mut requests = request.into_inner();
        let Some(first) = requests.message().await? else { return Err(Status::invalid_argument("the stream is empty")) };
        if first.cluster_id != self.inner.cluster_id {
            let ours = &self.inner.cluster_id;
            return Err(Status::permission_denied(format!(
                "this is cluster '{ours}', the caller is of another; check its peers"
            )));
        }
        let rest = requests.map(|request| request.map(|request| request.data));
        self.keep(&first.digest, stream::iter([Ok(first.data)]).chain(rest)).await?;
        Ok(Response::new(PutResponse {}))
    }

    type GetStream = Pin<Box<dyn Stream<Item = Result<GetResponse, Status>> + Send>>;

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<Self::GetStream>, Status> {
        let digest = request.into_inner().digest;
        check_digest(&digest).map_err(|error| error.status())?;
        let absent = |_| Status::not_found(format!("the files {digest} aren't kept here"));
        let file = fs::File::open(self.path(&digest)).map_err(absent)?;
        let pieces = stream::unfold(Some(file), |file| async move {
            let mut file = file?;
            let read = move || {
                let mut data = vec![0; CHUNK_BYTES];
                file.read(&mut data).map(|count| {
                    data.truncate(count);
                    (data, file)
                })
            };
            match tokio::task::spawn_blocking(read).await.map_err(io::Error::other).flatten() {
                Ok((data, _)) if data.is_empty() => None,
                Ok((data, file)) => Some((Ok(GetResponse { data: data.into() }), Some(file))),
                Err(error) => Some((Err(Status::internal(format!("can't read the files of a model: {error}"))), None)),
            }
        });
        Ok(Response::new(Box::pin(pieces)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn alone() -> Others {
        Box::new(Vec::new)
    }

    fn archive(content: &'static [u8]) -> Archive {
        Archive::of(&[("model.pt".to_owned(), Bytes::from_static(content))].into())
    }

    #[tokio::test]
    async fn an_archive_is_kept_until_no_deployment_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), "c", alone()).unwrap();
        let (one, two) = (archive(b"one"), archive(b"two"));
        store.spread(&one).await.unwrap();
        store.spread(&two).await.unwrap();
        store.sweep(&BTreeSet::new()).unwrap();
        assert!(store.has(&one.digest) && store.has(&two.digest), "the command may be on its way");
        store.sweep(&[one.digest.clone(), two.digest.clone()].into()).unwrap();
        store.sweep(&[one.digest.clone()].into()).unwrap();
        assert!(store.has(&one.digest) && !store.has(&two.digest));
        let again = Store::open(folder.path(), "c", alone()).unwrap();
        again.sweep(&BTreeSet::new()).unwrap();
        assert!(again.has(&one.digest), "the log hasn't been read yet");
    }

    #[tokio::test]
    async fn what_is_not_what_it_says_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), "c", alone()).unwrap();
        let wrong = Archive { digest: "0".repeat(64), ..archive(b"one") };
        let refused = store.spread(&wrong).await.unwrap_err();
        assert!(refused.message().contains("SHA-256"), "{refused:?}");
        let refused = store.spread(&Archive { digest: "../x".into(), ..archive(b"one") }).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing is left of it");
    }

    #[tokio::test]
    async fn a_minority_is_not_enough() {
        let folder = tempfile::tempdir().unwrap();
        let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
        let store = Store::open(folder.path(), "c", Box::new(move || vec![closed.clone(), closed.clone()])).unwrap();
        let refused = store.spread(&archive(b"one")).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unavailable);
        assert!(refused.message().starts_with("only 1 of 3 coordinators"), "{refused:?}");
    }
}
