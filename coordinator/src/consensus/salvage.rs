//! What can be had of a coordinator that doesn't run, when those that it agreed with are lost.
use std::path::Path;

use cresset_core::ClusterState;
use raft::eraftpb::EntryType;

use super::{
    engine_log::EngineLog,
    identity::Identity,
    log::{LogError, LogStore},
    machine::{Shared, StateMachine},
    node::restore,
};

/// What a data folder says.
#[derive(Debug)]
pub struct Salvaged {
    /// The cluster that it belongs to.
    pub cluster_id: String,
    /// The state after the last entry.
    pub state: ClusterState,
}

/// Whose folder it is: the cluster, and the coordinator's number. `None` if nobody's yet.
///
/// # Errors
/// [`LogError`] if that can't be read.
pub fn owner(dir: &Path) -> Result<Option<(String, u64)>, LogError> {
    Identity::owner(dir)
}

/// Reads the state out of a data folder, whose coordinator must not run. `None` if it holds none.
///
/// The entries that this coordinator doesn't know to be agreed on count too: the others may have been told so, and answered
/// their callers, before they were lost. Those callers that got no answer may find it done.
///
/// # Errors
/// [`LogError`] if it is in use, damaged, or has lost what it promised.
pub fn salvage(dir: &Path) -> Result<Option<Salvaged>, LogError> {
    let Some((cluster_id, id)) = owner(dir)? else { return Ok(None) };
    let damaged = |problem: String| LogError::Damaged { path: dir.to_owned(), problem };
    let Some(stored) = EngineLog::open(dir, &cluster_id, id)?.load()? else { return Ok(None) };
    let mut machine = Shared::new(ClusterState::new(&cluster_id));
    let snapshot = &stored.snapshot;
    if snapshot.get_metadata().index > 0 {
        restore(&mut machine, snapshot).map_err(|error| damaged(error.to_string()))?;
    }
    for entry in stored.entries.iter().filter(|entry| entry.index > snapshot.get_metadata().index) {
        // A change of the members has its command beside it.
        let command = if entry.get_entry_type() == EntryType::EntryNormal { &entry.data } else { &entry.context };
        if !command.is_empty() {
            let applied = machine.apply(entry.index, command);
            applied.map_err(|error| damaged(format!("entry {} can't be read: {error}", entry.index)))?;
        }
    }
    let state = machine.state().read().clone();
    Ok(Some(Salvaged { cluster_id, state }))
}
