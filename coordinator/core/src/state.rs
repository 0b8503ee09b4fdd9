//! What the cluster knows: members, deployments, and which worker should run what.
//!
//! Plain data, the same on every peer. Nothing here decides; [`apply`](mod@crate::apply) is the only code that changes it.
//! Absent on purpose: heartbeats, free memory and anything else that changes by itself. That lives on the leader.
mod copy_on_write;
mod replicas;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::{copy_on_write::CopyOnWrite, replicas::Replicas};
use crate::{
    PeerId, WorkerId,
    changes::Changes,
    claim::Claim,
    codec::blob,
    command::{CommandId, Outcome},
    demands::{Demands, Tags},
    level::{LEVEL_FIRST, Level},
    members::Members,
};

/// One life of a worker process. Grows from life to life.
pub type Incarnation = u64;
/// The version of assignments and routes. Only grows.
pub type Epoch = u64;
/// Which deployment a replica belongs to. One counter serves the whole cluster, so no two deployments share one.
pub type Generation = u64;

/// Answers that are remembered, so that a command whose caller had to retry is applied once.
pub const REMEMBERED_COMMANDS_MAX: usize = 10_000;

/// Epochs and generations that a group leaves out when it goes on from a state that may not be the last: more than any uses.
const REBORN_AHEAD: u64 = 1 << 32;

/// Everything that the coordinators agree on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterState {
    /// The cluster's name; two clusters never mix.
    pub cluster_id: String,
    /// The feature level in force: what every coordinator is known to understand. A snapshot begins with it, so it isn't written
    /// a second time.
    #[serde(skip)]
    pub level: Level,
    /// Grows when assignments, routes, workers or the coordinators' addresses change.
    pub epoch: Epoch,
    /// The last generation that was given to a deployment or a retried replica.
    pub generation_last: Generation,
    /// Where each coordinator can be reached, as it announced it.
    pub peers: BTreeMap<PeerId, PeerInfo>,
    /// Who agrees. Raft writes it down with the log and with each snapshot, so it isn't written here.
    #[serde(skip)]
    pub members: Members,
    /// The coordinators that it was founded by; empty if an earlier version of Cresset founded it, or as long as it isn't known.
    #[serde(default)]
    pub founders: BTreeSet<PeerId>,
    /// What it began from: the checksum of a backup; empty if nothing had happened before it.
    #[serde(default)]
    pub origin: String,
    /// The highest id of a coordinator that was removed. No id up to it is ever given again.
    #[serde(default)]
    pub peer_removed_last: Option<PeerId>,
    /// Every worker that ever registered, dead ones included: their fences outlive them.
    pub workers: CopyOnWrite<BTreeMap<WorkerId, Worker>>,
    /// What is deployed: any number of versions of each name.
    pub models: CopyOnWrite<BTreeMap<ModelKey, Deployment>>,
    /// Names for versions, by model. Each points at a version that is deployed and stays.
    #[serde(default)]
    pub labels: CopyOnWrite<BTreeMap<String, BTreeMap<String, u64>>>,
    /// Which worker should run what.
    pub replicas: CopyOnWrite<Replicas>,
    /// Answers to recent commands.
    pub remembered: Remembered,
    /// What lately changed for routers.
    #[serde(skip)]
    pub changes: Changes,
}

impl ClusterState {
    /// The state of a cluster in which nothing has happened yet.
    pub fn new(cluster_id: impl Into<String>) -> Self {
        Self { cluster_id: cluster_id.into(), level: LEVEL_FIRST, ..Self::default() }
    }

    /// The state in which a new group of coordinators, by another name, goes on from this one. Who the coordinators were is
    /// forgotten. Workers and what they run stay: those that are still there find themselves again and have nothing to load, and
    /// the others are soon judged dead.
    ///
    /// The old group may have gone on after this state, so the new one leaves out what it can have used: workers and routers
    /// keep out what is of an earlier epoch than they know, and tell deployments by their generations.
    #[must_use]
    pub fn reborn(self, cluster_id: impl Into<String>, origin: impl Into<String>) -> Self {
        Self {
            cluster_id: cluster_id.into(),
            epoch: self.epoch + REBORN_AHEAD,
            generation_last: self.generation_last + REBORN_AHEAD,
            peers: BTreeMap::new(),
            members: Members::default(),
            founders: BTreeSet::new(),
            peer_removed_last: None,
            origin: origin.into(),
            ..self
        }
    }

    /// A copy that remembers no answers and no changes, and so costs next to nothing. Nothing may be applied to it.
    #[must_use]
    pub fn without_answers(&self) -> Self {
        Self {
            cluster_id: self.cluster_id.clone(),
            level: self.level,
            epoch: self.epoch,
            generation_last: self.generation_last,
            peers: self.peers.clone(),
            members: self.members.clone(),
            founders: self.founders.clone(),
            origin: self.origin.clone(),
            peer_removed_last: self.peer_removed_last,
            workers: self.workers.clone(),
            models: self.models.clone(),
            labels: self.labels.clone(),
            replicas: self.replicas.clone(),
            remembered: Remembered::default(),
            changes: Changes::default(),
        }
    }

    /// The deployed versions of the model called `name`, ascending, those that leave included.
    pub fn versions<'a, 'n>(&'a self, name: &'n str) -> impl Iterator<Item = (&'a ModelKey, &'a Deployment)> + use<'a, 'n> {
        let first = ModelKey { name: name.to_owned(), version: 0 };
        self.models.range(first..).take_while(move |(key, _)| key.name == name)
    }

    /// The labels of one version of a model.
    pub fn labels_of<'a>(&'a self, key: &'a ModelKey) -> impl Iterator<Item = &'a str> {
        let labels = self.labels.get(&key.name).into_iter().flatten();
        labels.filter(|(_, version)| **version == key.version).map(|(label, _)| label.as_str())
    }

    /// The replicas of a model, all its shards together.
    pub fn replicas_of<'a, 'k>(&'a self, key: &'k ModelKey) -> impl Iterator<Item = (&'a ReplicaId, &'a Replica)> + use<'a, 'k> {
        self.replicas.of(key)
    }

    /// The replicas that a worker should run.
    pub fn replicas_on(&self, worker: &WorkerId) -> impl Iterator<Item = (&ReplicaId, &Replica)> {
        self.replicas.on(worker)
    }

    /// The workers that can take new replicas.
    pub fn workers_ready(&self) -> impl Iterator<Item = (&WorkerId, &Worker)> {
        self.workers.iter().filter(|(_, worker)| worker.state == WorkerState::Ready)
    }

    /// How many replicas a deployment gets that doesn't say: 2, or as many as there are workers if fewer.
    pub fn replicas_default(&self) -> u32 {
        if self.workers_ready().count() == 1 { 1 } else { 2 }
    }
}

/// Where a coordinator can be reached. One that was added and hasn't announced itself yet has a `peer_address` only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerInfo {
    /// `host:port` of the public gRPC services.
    pub grpc_address: String,
    /// `host:port` of `/metrics` and `/healthz`.
    pub http_address: String,
    /// `host:port` of consensus and membership.
    pub peer_address: String,
}

/// A worker process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Its newest life.
    pub incarnation: Incarnation,
    /// The smallest incarnation that may register. Above `incarnation` once this life was judged dead.
    pub incarnation_floor: Incarnation,
    /// `host:port` of inference.
    pub grpc_address: String,
    /// `host:port` of `/metrics` and `/healthz`.
    pub http_address: String,
    /// What it shares its fate with: a rack, a zone. Empty for unknown.
    pub zone: String,
    /// What it computes on.
    pub devices: Vec<Device>,
    /// Whether it may be given work.
    pub state: WorkerState,
    /// Facts about it that its operator chose, for deployments to demand.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
}

/// What a worker computes on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// `cpu` or `cuda:0`.
    pub name: String,
    /// All of its memory, used or not.
    pub memory_bytes: u64,
}

/// Whether a worker may be given work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerState {
    /// It takes new replicas.
    Ready,
    /// It is leaving: it takes nothing new, and what it has moves away.
    Draining,
    /// Judged dead. It holds nothing until a new life registers.
    Dead,
    /// Taken out on purpose: it left in order, or an operator gave up on it. It holds nothing until a new life registers.
    Removed,
}

impl WorkerState {
    /// Whether this life is over: it holds nothing, and is heard no more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Dead | Self::Removed)
    }
}

/// A model in one of its versions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ModelKey {
    /// The model's name.
    pub name: String,
    /// Triton's version number.
    pub version: u64,
}

/// What was asked for when a model was deployed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deployment {
    /// Which deployment this is. A replica serves it if its own generation is at least this.
    pub generation: Generation,
    /// An encoded `inference.ModelConfig`.
    #[serde(with = "blob")]
    pub config: Bytes,
    /// SHA-256 over the version's files, in hexadecimal.
    pub digest: String,
    /// Size of the version's files; placement takes it for the memory that a replica needs.
    pub size_bytes: u64,
    /// Replicas wanted of each shard.
    pub replicas_wanted: u32,
    /// Parts that the model is cut into.
    pub shards: u32,
    /// What runs it, as in `pytorch_libtorch`.
    pub platform: String,
    /// Whether the coordinators keep the files, as an archive of this digest, rather than the model repository.
    #[serde(default)]
    pub stored: bool,
    /// What replicas still answer as that have not come to this generation yet.
    #[serde(default)]
    pub former: Option<Former>,
    /// Its time is over as soon as the versions that were deployed instead have come up.
    #[serde(default)]
    pub leaving: bool,
    /// What it demands of the workers that run it.
    #[serde(default, skip_serializing_if = "Demands::is_none")]
    pub demands: Demands,
    /// What it may claim where memory is short.
    #[serde(default, skip_serializing_if = "Claim::is_default")]
    pub claim: Claim,
}

/// What a version was before it was deployed anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Former {
    /// Which deployment that was.
    pub generation: Generation,
    /// An encoded `inference.ModelConfig`.
    #[serde(with = "blob")]
    pub config: Bytes,
    /// Size of its files; 0 if an earlier version of Cresset wrote it down.
    #[serde(default)]
    pub size_bytes: u64,
}

/// One copy of a shard on one worker. Being a key, it can't exist twice on the same worker.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ReplicaId {
    /// The model's name.
    pub model: String,
    /// The model's version.
    pub version: u64,
    /// Which part of the model, from 0.
    pub shard: u32,
    /// Where it runs.
    pub worker: WorkerId,
}

impl ReplicaId {
    /// Whether this is a replica of that model in that version.
    pub fn is_of(&self, key: &ModelKey) -> bool {
        self.version == key.version && self.model == key.name
    }

    /// The model that this is a replica of.
    pub fn key(&self) -> ModelKey {
        ModelKey { name: self.model.clone(), version: self.version }
    }
}

/// What is known about a replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Replica {
    /// What the worker is told; a report about another generation is about something else.
    pub generation: Generation,
    /// What the worker last said about it.
    pub state: ReplicaState,
    /// Why it failed; empty otherwise.
    pub reason: String,
    /// The epoch in which it was assigned.
    pub epoch: Epoch,
    /// Memory that it takes, as the worker measured it.
    pub memory_bytes: u64,
    /// The earlier generation that the worker goes on answering as until this one is ready; 0 for none. A worker puts the new
    /// one in the old one's place only when it is loaded and warm, and keeps the old one if that fails.
    #[serde(default)]
    pub former: Generation,
    /// It is to move: it stays, and answers, until another one is ready in its place.
    #[serde(default, skip_serializing_if = "is_false")]
    pub moving: bool,
}

/// Left out when it is written, so that versions of Cresset before it read what has no use for it.
fn is_false(value: &bool) -> bool {
    !value
}

impl Replica {
    /// The generation that it answers as, if it answers.
    pub fn answering(&self) -> Option<Generation> {
        match self.state {
            ReplicaState::Ready => Some(self.generation),
            ReplicaState::Assigned | ReplicaState::Loading | ReplicaState::Failed => (self.former > 0).then_some(self.former),
        }
    }
}

/// How far a replica has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ReplicaState {
    /// The worker hasn't said anything about it.
    Assigned,
    /// The worker fetches, loads or warms it.
    Loading,
    /// It answers.
    Ready,
    /// It can't be served there, and isn't tried again until the model is deployed again.
    Failed,
}

/// The answers to the last [`REMEMBERED_COMMANDS_MAX`] commands, oldest dropped first.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Remembered {
    order: VecDeque<CommandId>,
    outcomes: BTreeMap<CommandId, Outcome>,
}

impl Remembered {
    /// The answer that was given to this command.
    pub fn get(&self, id: &CommandId) -> Option<&Outcome> {
        self.outcomes.get(id)
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    pub(crate) fn insert(&mut self, id: CommandId, outcome: Outcome) {
        if self.outcomes.insert(id, outcome).is_none() {
            self.order.push_back(id);
        }
        while self.order.len() > REMEMBERED_COMMANDS_MAX {
            if let Some(oldest) = self.order.pop_front() {
                self.outcomes.remove(&oldest);
            }
        }
    }
}

// Written as a list in order of arrival, so that the bound holds across a snapshot too.
impl Serialize for Remembered {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeSeq;
        let mut list = serializer.serialize_seq(Some(self.order.len()))?;
        for id in &self.order {
            list.serialize_element(&(id, self.outcomes.get(id)))?;
        }
        list.end()
    }
}

impl<'de> Deserialize<'de> for Remembered {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let list = Vec::<(CommandId, Option<Outcome>)>::deserialize(deserializer)?;
        let mut remembered = Self::default();
        for (id, outcome) in list {
            let outcome = outcome.ok_or_else(|| serde::de::Error::custom("remembered command without an outcome"))?;
            remembered.insert(id, outcome);
        }
        Ok(remembered)
    }
}
