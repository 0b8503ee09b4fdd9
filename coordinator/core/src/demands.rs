//! What a deployment demands of the workers that run it.
use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};

use crate::{
    Reject, WorkerId,
    apply::{check, check_text},
    state::Worker,
};

/// Most tags of a worker, and most that a deployment requires.
pub const TAGS_MAX: usize = 32;
/// Most workers that a deployment can name.
pub const PINNED_MAX: usize = 1_000;

/// Facts about a worker that its operator chose, such as `gpu = "h100"`.
pub type Tags = BTreeMap<String, String>;

/// What a deployment demands of the workers that run it. By default nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Demands {
    /// Tags that a worker must have, with these very values.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: Tags,
    /// Its replicas run on these workers only; on any if empty.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub workers: BTreeSet<WorkerId>,
    /// How many GPUs a worker must have.
    #[serde(skip_serializing_if = "is_zero")]
    pub gpus_min: u32,
    /// On how many of a worker's GPUs its weights lie; on all if 0.
    #[serde(skip_serializing_if = "is_zero")]
    pub gpus_used: u32,
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

impl Demands {
    /// Whether anything is demanded. What demands nothing is written as it was before there were demands.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a worker is what is demanded.
    pub fn are_met_by(&self, id: &WorkerId, worker: &Worker) -> bool {
        (self.workers.is_empty() || self.workers.contains(id))
            && self.tags.iter().all(|(tag, value)| worker.tags.get(tag) == Some(value))
            && (self.gpus_min == 0 || self.gpus_min <= gpus(worker))
    }

    /// On how many devices of a worker with so many GPUs the weights lie.
    pub(crate) fn devices_used(&self, gpus: u32) -> u32 {
        if self.gpus_used == 0 { gpus.max(1) } else { self.gpus_used.min(gpus).max(1) }
    }

    pub(crate) fn check(&self) -> Result<(), Reject> {
        check_tags("require", &self.tags)?;
        check(self.workers.len() <= PINNED_MAX, "workers", format!("must be at most {PINNED_MAX}"))
    }
}

/// For people, after "workers": nothing if nothing is demanded.
impl fmt::Display for Demands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut demands: Vec<String> = self.tags.iter().map(|(tag, value)| format!("{tag}={value}")).collect();
        match self.gpus_min {
            0 => {}
            1 => demands.push("a GPU".into()),
            gpus => demands.push(format!("{gpus} GPUs")),
        }
        if !demands.is_empty() {
            write!(f, " with {}", demands.join(", "))?;
        }
        if !self.workers.is_empty() {
            let workers: Vec<&str> = self.workers.iter().map(WorkerId::as_str).collect();
            write!(f, " of {}", workers.join(", "))?;
        }
        Ok(())
    }
}

pub(crate) fn check_tags(field: &str, tags: &Tags) -> Result<(), Reject> {
    check(tags.len() <= TAGS_MAX, field, format!("must be at most {TAGS_MAX} tags"))?;
    for (tag, value) in tags {
        check(!tag.is_empty(), field, "must not have a tag without a name")?;
        check_text(field, tag)?;
        check_text(field, value)?;
    }
    Ok(())
}

pub(crate) fn gpus(worker: &Worker) -> u32 {
    let gpus = worker.devices.iter().filter(|device| device.name.starts_with("cuda")).count();
    u32::try_from(gpus).unwrap_or(u32::MAX)
}
