//! What workers should run, looked up once for all of them when the epoch grows.
//!
//! Every session asks at every epoch, and each would have to look through all replicas of the cluster for those of its worker.
use std::{collections::BTreeMap, sync::Arc};

use cresset_core::{
    ClusterState, WorkerId,
    routes::{Assignment, all_assignments},
    state::Epoch,
};
use parking_lot::Mutex;

/// The assignments of the newest epoch that was asked for. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Intents(Arc<Mutex<Newest>>);

#[derive(Debug, Default)]
struct Newest {
    /// `None` before the first question.
    epoch: Option<Epoch>,
    /// A worker that should run nothing isn't in it.
    by_worker: BTreeMap<WorkerId, Vec<Assignment>>,
}

impl Intents {
    /// Everything that a worker should run by this state.
    pub(super) fn of(&self, state: &ClusterState, worker: &WorkerId) -> Vec<Assignment> {
        // The first one looks it up; the others would have to do the same, and so wait for it.
        let mut newest = self.0.lock();
        if newest.epoch != Some(state.epoch) {
            *newest = Newest { epoch: Some(state.epoch), by_worker: all_assignments(state) };
        }
        newest.by_worker.get(worker).cloned().unwrap_or_default()
    }
}
