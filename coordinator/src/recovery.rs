//! What a coordinator begins with: with nothing, with a backup, or with what is left of a group that lost its majority.
//!
//! Beginning from a file is one way for all: it lies in the data folder, its state becomes that of a new group by another name,
//! and once the log holds it the file is renamed. A process that ends in between begins again.
use std::{
    fs,
    io::BufWriter,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use cresset_client::backup::{Backup, BackupError, Deployed, FORMAT, Manifest, RESTORED, TO_RESTORE, Writer, place};
use cresset_core::{ClusterState, DecodeError, PeerId, WorkerId, snapshot};

use crate::{
    config::Config,
    consensus::{self, LogError},
};

/// Why a coordinator can't begin.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// The file can't be used.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// Its state can't be read.
    #[error("the state in {TO_RESTORE}: {0}")]
    State(#[from] DecodeError),
    /// The data folder can't be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Two groups by one name could mix.
    #[error(
        "'{0}' is the name of the group that is given up; the new one needs another --cluster-id, so that none of the old \
         coordinators is ever taken for one of it"
    )]
    SameName(String),
    /// One that joins is told everything by the others.
    #[error("with --join true a coordinator begins with what the others tell it; take {TO_RESTORE} out of its folder")]
    Joins,
    /// A new group begins with the one that has something left.
    #[error(
        "--force-new-group makes a group of this coordinator alone, so --peers must name no other; add others afterwards: start them \
         with empty folders and --join true, and `cresset member add`"
    )]
    NotAlone,
    /// There is nothing to go on from.
    #[error("--force-new-group goes on from what a coordinator's folder holds, and this one holds nothing")]
    Nothing,
    /// A file can't be written.
    #[error("can't {action} in the data folder: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
}

/// The state to found a group with, should the folder be empty.
///
/// # Errors
/// [`RecoveryError`]; what the folder held is still there.
pub fn initial(config: &Config) -> Result<ClusterState, RecoveryError> {
    let (dir, name) = (&config.data_dir, &config.cluster_id);
    if config.force_new_group {
        force(config)?;
    }
    let file = dir.join(TO_RESTORE);
    if !file.exists() {
        return Ok(ClusterState::new(name));
    }
    if config.join {
        return Err(RecoveryError::Joins);
    }
    let backup = Backup::open(&file)?;
    if backup.manifest.cluster_id == *name {
        return Err(RecoveryError::SameName(name.clone()));
    }
    backup.unpack_files(&dir.join("files"))?;
    tracing::warn!(from = backup.manifest.cluster_id, epoch = backup.manifest.epoch, cluster = name, "begins from a backup");
    Ok(snapshot::decode(&backup.state)?.reborn(name, backup.sha256))
}

/// To be called once the log holds what was begun with.
///
/// # Errors
/// When the file can't be renamed.
pub fn begun(config: &Config) -> Result<(), RecoveryError> {
    let file = config.data_dir.join(TO_RESTORE);
    if !file.exists() {
        return Ok(());
    }
    let renamed = fs::rename(file, config.data_dir.join(RESTORED));
    renamed.map_err(|source| RecoveryError::Io { action: "rename the backup", source })
}

/// Makes a backup of what the folder's log holds, and moves the log aside.
fn force(config: &Config) -> Result<(), RecoveryError> {
    let (dir, file) = (&config.data_dir, config.data_dir.join(TO_RESTORE));
    if config.peers.keys().any(|peer| *peer != config.id) {
        return Err(RecoveryError::NotAlone);
    }
    let Some((old, _)) = consensus::owner(dir)? else {
        // Either the log has been moved aside already, or there was none.
        return if file.exists() { Ok(()) } else { Err(RecoveryError::Nothing) };
    };
    if old == config.cluster_id {
        if dir.join(RESTORED).exists() || file.exists() {
            tracing::info!("the new group has begun; --force-new-group isn't needed any more");
            return Ok(());
        }
        return Err(RecoveryError::SameName(old));
    }
    let io = |action| move |source| RecoveryError::Io { action, source };
    let (log, aside) = (dir.join("log"), dir.join(format!("before-{}", unix_ms())));
    // Otherwise it ended between the two moves: what was salvaged is whole, and the log is aside.
    let is_to_salvage = log.exists() || !file.exists();
    if is_to_salvage {
        let salvaged = consensus::salvage(dir)?.ok_or(RecoveryError::Nothing)?;
        place(&file, |out| write(&salvaged.state, &dir.join("files"), BufWriter::new(out)))
            .map_err(io("write what was salvaged"))?;
    }
    fs::create_dir(&aside).map_err(io("make a folder for the old log"))?;
    if is_to_salvage {
        // The log first: an identity without a log is told apart from a damaged folder, a log without an identity isn't.
        fs::rename(log, aside.join("log")).map_err(io("move the old log aside"))?;
    }
    fs::rename(dir.join("identity.json"), aside.join("identity.json")).map_err(io("move the old log aside"))?;
    tracing::warn!(group = old, aside = %aside.display(), "gave up the group that lost its majority; its log is kept aside");
    Ok(())
}

/// Writes a backup of this state with those of its files that are in `files`.
///
/// # Errors
/// Those of `out` and of the files.
pub fn write(state: &ClusterState, files: &Path, out: impl std::io::Write) -> std::io::Result<()> {
    let mut writer = Writer::new(out, &manifest(state), &snapshot::encode(state))?;
    let stored = state.models.values().filter(|model| model.stored).map(|model| &model.digest);
    for digest in stored.collect::<std::collections::BTreeSet<_>>() {
        let file = fs::File::open(files.join(digest))?;
        writer.files(digest, file.metadata()?.len(), file)?;
    }
    writer.finish().map(drop)
}

fn manifest(state: &ClusterState) -> Manifest {
    let lives = |(id, worker): (&WorkerId, &cresset_core::state::Worker)| (!worker.state.is_over()).then(|| id.to_string());
    Manifest {
        format: FORMAT,
        cluster_id: state.cluster_id.clone(),
        epoch: state.epoch,
        created_unix_ms: unix_ms(),
        made_by: env!("CARGO_PKG_VERSION").to_owned(),
        voters: state.members.voters.iter().map(PeerId::to_string).collect(),
        workers: state.workers.iter().filter_map(lives).collect(),
        models: state
            .models
            .iter()
            .map(|(key, model)| Deployed {
                name: key.name.clone(),
                version: key.version,
                digest: model.digest.clone(),
                replicas_wanted: model.replicas_wanted,
                stored: model.stored,
            })
            .collect(),
    }
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
