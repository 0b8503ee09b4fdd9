//! What a deployment may claim of memory that isn't enough for all.
use serde::{Deserialize, Serialize};

/// What a deployment may claim where memory is short. By default nothing of others, and others nothing of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Claim {
    /// What has a higher priority is given a place first.
    #[serde(skip_serializing_if = "is_zero")]
    pub priority: u32,
    /// Replicas of it, the last one that answers included, may be ended to make room for what has a higher priority. They come back
    /// when there is room.
    #[serde(skip_serializing_if = "is_false")]
    pub evictable: bool,
}

impl Claim {
    /// Whether it is as it was before there were claims, and so is left out when it is written.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether this one makes room for the other.
    pub fn gives_way_to(&self, other: &Self) -> bool {
        self.evictable && self.priority < other.priority
    }
}

fn is_zero(value: &u32) -> bool {
    *value == 0
}

fn is_false(value: &bool) -> bool {
    !value
}
