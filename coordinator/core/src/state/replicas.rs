//! Which worker should run what, found by model and by worker alike.
use std::{
    borrow::Borrow,
    cmp::Ordering,
    collections::{BTreeMap, BTreeSet},
    ops::{Bound, Deref},
};

use serde::{Deserialize, Serialize};

use super::{ModelKey, Replica, ReplicaId};
use crate::WorkerId;

/// Every replica, in the order of their ids. It reads as the map that it is; what changes it keeps both ways to find one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Replicas {
    by_id: BTreeMap<ReplicaId, Replica>,
    /// The same ids by worker. None that has nothing is in it.
    by_worker: BTreeMap<WorkerId, BTreeSet<ReplicaId>>,
}

impl Replicas {
    /// The replicas of a model, all its shards together.
    pub fn of<'a, 'k>(&'a self, key: &'k ModelKey) -> impl Iterator<Item = (&'a ReplicaId, &'a Replica)> + use<'a, 'k> {
        self.from(Place(&key.name, key.version, 0, "")).take_while(move |(id, _)| id.is_of(key))
    }

    /// The replicas of one shard of a model.
    pub fn of_shard<'a, 'k>(
        &'a self,
        key: &'k ModelKey,
        shard: u32,
    ) -> impl Iterator<Item = (&'a ReplicaId, &'a Replica)> + use<'a, 'k> {
        self.from(Place(&key.name, key.version, shard, "")).take_while(move |(id, _)| id.shard == shard && id.is_of(key))
    }

    /// The replicas on a worker.
    pub fn on(&self, worker: &WorkerId) -> impl Iterator<Item = (&ReplicaId, &Replica)> {
        let ids = self.by_worker.get(worker).into_iter().flatten();
        ids.filter_map(|id| self.by_id.get_key_value(id))
    }

    fn from(&self, first: Place<'_>) -> impl Iterator<Item = (&ReplicaId, &Replica)> + use<'_> {
        self.by_id.range::<dyn Placed, _>((Bound::Included(&first as &dyn Placed), Bound::Unbounded))
    }

    pub(crate) fn get_mut(&mut self, id: &ReplicaId) -> Option<&mut Replica> {
        self.by_id.get_mut(id)
    }

    pub(crate) fn insert(&mut self, id: ReplicaId, replica: Replica) {
        self.by_worker.entry(id.worker.clone()).or_default().insert(id.clone());
        self.by_id.insert(id, replica);
    }

    pub(crate) fn remove(&mut self, id: &ReplicaId) -> Option<Replica> {
        if let Some(ids) = self.by_worker.get_mut(&id.worker) {
            ids.remove(id);
            if ids.is_empty() {
                self.by_worker.remove(&id.worker);
            }
        }
        self.by_id.remove(id)
    }

    /// Takes all replicas of a model away.
    pub(crate) fn remove_of(&mut self, key: &ModelKey) {
        let ids: Vec<ReplicaId> = self.of(key).map(|(id, _)| id.clone()).collect();
        ids.iter().for_each(|id| drop(self.remove(id)));
    }

    /// Takes all replicas on a worker away.
    pub(crate) fn remove_on(&mut self, worker: &WorkerId) {
        for id in self.by_worker.remove(worker).unwrap_or_default() {
            self.by_id.remove(&id);
        }
    }

    /// Changes all replicas on a worker.
    pub(crate) fn change_on(&mut self, worker: &WorkerId, mut change: impl FnMut(&mut Replica)) {
        for id in self.by_worker.get(worker).into_iter().flatten() {
            if let Some(replica) = self.by_id.get_mut(id) {
                change(replica);
            }
        }
    }
}

impl Deref for Replicas {
    type Target = BTreeMap<ReplicaId, Replica>;
    fn deref(&self) -> &Self::Target {
        &self.by_id
    }
}

impl<'a> IntoIterator for &'a Replicas {
    type Item = (&'a ReplicaId, &'a Replica);
    type IntoIter = std::collections::btree_map::Iter<'a, ReplicaId, Replica>;
    fn into_iter(self) -> Self::IntoIter {
        self.by_id.iter()
    }
}

impl FromIterator<(ReplicaId, Replica)> for Replicas {
    fn from_iter<I: IntoIterator<Item = (ReplicaId, Replica)>>(replicas: I) -> Self {
        let mut all = Self::default();
        replicas.into_iter().for_each(|(id, replica)| all.insert(id, replica));
        all
    }
}

// Written as the one map: the other follows from it.
impl Serialize for Replicas {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.by_id.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Replicas {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Ok(BTreeMap::<ReplicaId, Replica>::deserialize(deserializer)?.into_iter().collect())
    }
}

/// A replica's id by its parts, to look from where there is none, without a copy: no worker is called "".
struct Place<'a>(&'a str, u64, u32, &'a str);

/// What has a place in the order of ids.
trait Placed {
    fn place(&self) -> (&str, u64, u32, &str);
}

impl Placed for Place<'_> {
    fn place(&self) -> (&str, u64, u32, &str) {
        (self.0, self.1, self.2, self.3)
    }
}

impl Placed for ReplicaId {
    fn place(&self) -> (&str, u64, u32, &str) {
        (&self.model, self.version, self.shard, self.worker.as_str())
    }
}

impl<'a> Borrow<dyn Placed + 'a> for ReplicaId {
    fn borrow(&self) -> &(dyn Placed + 'a) {
        self
    }
}

impl PartialEq for dyn Placed + '_ {
    fn eq(&self, other: &Self) -> bool {
        self.place() == other.place()
    }
}

impl Eq for dyn Placed + '_ {}

impl PartialOrd for dyn Placed + '_ {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for dyn Placed + '_ {
    fn cmp(&self, other: &Self) -> Ordering {
        self.place().cmp(&other.place())
    }
}
