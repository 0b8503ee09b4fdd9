//! A backup, made while everything goes on.
use std::io::{self, BufWriter, Write};

use cresset_core::ClusterState;
use cresset_proto::{admin::v1::BackupResponse, reason::Reason};
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::Context;
use crate::recovery;

/// The bytes of a backup, in pieces.
pub(super) type Pieces = ReceiverStream<Result<BackupResponse, Status>>;

/// Bytes of one piece, and how many wait for a slow reader.
const PIECE_BYTES: usize = 256 << 10;
const PIECES_MAX: usize = 4;

impl Context {
    /// A backup of what is agreed on as of now, with the files that came with loads.
    ///
    /// # Errors
    /// When that isn't known for sure, or a file isn't to be had.
    pub(super) async fn backup(&self, deadline: Instant) -> Result<Pieces, Status> {
        let barrier = self.consensus.read_barrier(deadline).await;
        barrier.map_err(|error| Reason::NoLeader.status(error.to_string()))?;
        let state = self.consensus.state().clone();
        for model in state.models.values().filter(|model| model.stored) {
            self.store.need(&model.digest).await?;
        }
        let (pieces, stream) = mpsc::channel(PIECES_MAX);
        let folder = self.store.folder().to_owned();
        tokio::task::spawn_blocking(move || send(&state, &folder, pieces));
        Ok(ReceiverStream::new(stream))
    }
}

fn send(state: &ClusterState, files: &std::path::Path, pieces: mpsc::Sender<Result<BackupResponse, Status>>) {
    let out = BufWriter::with_capacity(PIECE_BYTES, Sending(pieces.clone()));
    if let Err(error) = recovery::write(state, files, out) {
        let gone = error.kind() == io::ErrorKind::NotFound;
        let text = if gone { "a model left while its files were read; try again".to_owned() } else { error.to_string() };
        // Whoever asked may have gone: that is an error of writing too.
        let _ = pieces.blocking_send(Err(Reason::Conflict.status(format!("the backup isn't whole: {text}"))));
    }
}

struct Sending(mpsc::Sender<Result<BackupResponse, Status>>);

impl Write for Sending {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let piece = BackupResponse { data: bytes.to_vec().into() };
        self.0.blocking_send(Ok(piece)).map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
