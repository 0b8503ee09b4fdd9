//! What may be proposed, and how it was answered.
//!
//! A command carries everything that its effect depends on, since [`apply`](mod@crate::apply) knows no clock and asks
//! nobody. Its id is chosen by whoever wants it done and stays the same in every retry.
mod id;

use std::{collections::BTreeMap, fmt};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

pub use self::id::{CommandId, CommandIdError};
use crate::{
    PeerId, WorkerId,
    claim::Claim,
    codec::{self, DecodeError, blob},
    demands::{Demands, Tags},
    level::{LEVEL_FIRST, LEVEL_KNOWN, Level},
    members::MemberChange,
    state::{Device, Epoch, Generation, Incarnation, PeerInfo, ReplicaId, ReplicaState},
};

/// Longest address, zone, device name, platform or digest that is kept.
pub const TEXT_BYTES_MAX: usize = 512;
/// Longest reason that is kept; the rest is cut off.
pub const REASON_BYTES_MAX: usize = 512;
/// Largest encoded model configuration.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;
/// Most coordinators, learners included.
pub const PEERS_MAX: usize = 32;
/// Most coordinators that vote.
pub const VOTERS_MAX: usize = 9;
/// Most workers that are remembered; the longest dead give way.
pub const WORKERS_MAX: usize = 1_000;
/// Most models that can be deployed, each version counted; see [`crate::level::models_max`].
pub const MODELS_MAX: usize = 20_000;
/// As [`MODELS_MAX`], at the first feature level.
pub const MODELS_MAX_FIRST: usize = 1_000;
/// Most versions that one command deploys.
pub const VERSIONS_MAX: usize = 64;
/// Most labels of a model.
pub const LABELS_MAX: usize = 32;
/// Most devices of a worker.
pub const DEVICES_MAX: usize = 64;
/// Most replicas of a shard.
pub const REPLICAS_MAX: u32 = 1_000;
/// Most shards of a model.
pub const SHARDS_MAX: u32 = 64;
/// Most moves of a plan, and most replicas in a report.
pub const MOVES_MAX: usize = 10_000;

/// A change that somebody wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The same in every retry.
    pub id: CommandId,
    /// What to do.
    pub body: CommandBody,
}

impl Command {
    /// As bytes for the log and for the wire between coordinators.
    pub fn encode(&self) -> Vec<u8> {
        codec::encode(self.body.level(), self)
    }

    /// Reads what [`encode`](Self::encode) wrote. A peer that can't read a *committed* command has to stop: skipping it would
    /// part its state from the others'.
    ///
    /// # Errors
    /// [`DecodeError`] if the bytes are damaged, or of a level that this version doesn't know.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::decode_knowing(LEVEL_KNOWN, bytes)
    }

    /// The same, as a version does that knows no more than this level.
    ///
    /// # Errors
    /// As of [`decode`](Self::decode).
    pub fn decode_knowing(known: Level, bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode("command", known, bytes).map(|(_, command)| command)
    }
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CommandBody {
    /// A coordinator says where it can be reached.
    AnnouncePeer {
        /// Who speaks.
        peer: PeerId,
        /// Where it is.
        info: PeerInfo,
    },
    /// A worker joins, or joins again.
    RegisterWorker(Registration),
    /// A worker leaves in an orderly way.
    DrainWorker {
        /// Who leaves.
        worker: WorkerId,
        /// Which of its lives.
        incarnation: Incarnation,
    },
    /// The leader's verdict on one life of a worker.
    MarkDead {
        /// Who is judged.
        worker: WorkerId,
        /// Which of its lives.
        incarnation: Incarnation,
        /// What it was judged by.
        cause: Cause,
    },
    /// Serve one version of a model instead of all others. Logs of earlier versions of Cresset have it; [`Self::DeploySet`]
    /// says the same and more.
    Deploy(DeploySpec),
    /// Stop serving a model in all its versions.
    Undeploy {
        /// The model's name.
        name: String,
    },
    /// The leader's plan. Each move is judged by itself against the state at hand.
    Place {
        /// The epoch that the plan was made from; for messages only.
        epoch_seen: Epoch,
        /// Replicas to begin.
        add: Vec<ReplicaId>,
        /// Replicas to end.
        remove: Vec<ReplicaId>,
    },
    /// What a worker says about its replicas; only what changed.
    ReportReplicas {
        /// Who speaks.
        worker: WorkerId,
        /// Which of its lives.
        incarnation: Incarnation,
        /// What it sees.
        replicas: Vec<ReplicaReport>,
    },
    /// Serve these versions of a model, all or none of them.
    DeploySet(DeploySet),
    /// Stop serving one version of a model.
    UndeployVersion {
        /// The model's name.
        name: String,
        /// The version.
        version: u64,
    },
    /// Move labels of a model, all or none of them.
    SetLabels {
        /// The model's name.
        name: String,
        /// Where each label is to point; 0 takes it away.
        labels: BTreeMap<String, u64>,
    },
    /// Add, promote or remove a coordinator.
    ChangeMembers(MemberChange),
    /// A worker that is dead, or that leaves and holds nothing any more, doesn't belong to the cluster any longer.
    RemoveWorker {
        /// Who.
        worker: WorkerId,
        /// Which of its lives.
        incarnation: Incarnation,
    },
    /// The leader's plan, where replicas that answer are to move. As [`Self::Place`], with each move judged by itself.
    Rearrange {
        /// The epoch that the plan was made from; for messages only.
        epoch_seen: Epoch,
        /// Replicas that stay until others are ready in their place.
        relieve: Vec<ReplicaId>,
        /// Replicas to begin.
        add: Vec<ReplicaId>,
        /// Replicas to end.
        remove: Vec<ReplicaId>,
    },
    /// The leader's plan, where replicas make room for others of a higher priority. As [`Self::Rearrange`] beyond that.
    Evict {
        /// The epoch that the plan was made from; for messages only.
        epoch_seen: Epoch,
        /// Replicas to end for the sake of those that begin on the same workers.
        evict: Vec<ReplicaId>,
        /// Replicas that stay until others are ready in their place.
        relieve: Vec<ReplicaId>,
        /// Replicas to begin.
        add: Vec<ReplicaId>,
        /// Replicas to end.
        remove: Vec<ReplicaId>,
    },
    /// Every member is known to know this feature level: from here on it is in force.
    RaiseLevel {
        /// The level.
        level: Level,
    },
}

/// A worker, as it introduces itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Its name, the same from life to life.
    pub worker: WorkerId,
    /// This life; above every earlier one.
    pub incarnation: Incarnation,
    /// `host:port` of inference.
    pub grpc_address: String,
    /// `host:port` of `/metrics` and `/healthz`.
    pub http_address: String,
    /// What it shares its fate with; empty for unknown.
    pub zone: String,
    /// What it computes on.
    pub devices: Vec<Device>,
    /// Facts about it that its operator chose.
    #[serde(default, skip_serializing_if = "Tags::is_empty")]
    pub tags: Tags,
}

/// What to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploySpec {
    /// The model's name.
    pub name: String,
    /// Its version, from 1.
    pub version: u64,
    /// An encoded `inference.ModelConfig`.
    #[serde(with = "blob")]
    pub config: Bytes,
    /// SHA-256 over the version's files, in hexadecimal.
    pub digest: String,
    /// Size of the version's files.
    pub size_bytes: u64,
    /// Replicas wanted of each shard.
    pub replicas_wanted: u32,
    /// Parts that the model is cut into; 1 for a model that fits a device.
    pub shards: u32,
    /// What runs it, as in `pytorch_libtorch`.
    pub platform: String,
}

/// Which versions of a model to serve. What they share is said once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeploySet {
    /// The model's name.
    pub name: String,
    /// An encoded `inference.ModelConfig`.
    #[serde(with = "blob")]
    pub config: Bytes,
    /// Parts that the model is cut into; 1 for a model that fits a device.
    pub shards: u32,
    /// What runs it, as in `pytorch_libtorch`.
    pub platform: String,
    /// The versions; at least one, none twice.
    pub versions: Vec<VersionSpec>,
    /// Whether the coordinators keep the files, as archives of the versions' digests, rather than the model repository.
    #[serde(default)]
    pub stored: bool,
    /// Whether versions that aren't listed leave. One that a label points at stays in any case.
    pub only: bool,
}

/// One version of a [`DeploySet`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionSpec {
    /// The version, from 1.
    pub version: u64,
    /// SHA-256 over the version's files, in hexadecimal.
    pub digest: String,
    /// Size of the version's files.
    pub size_bytes: u64,
    /// Replicas wanted of each shard.
    pub replicas_wanted: u32,
    /// What it demands of the workers that run it.
    #[serde(default, skip_serializing_if = "Demands::is_none")]
    pub demands: Demands,
    /// What it may claim where memory is short.
    #[serde(default, skip_serializing_if = "Claim::is_default")]
    pub claim: Claim,
}

impl From<&DeploySpec> for DeploySet {
    fn from(spec: &DeploySpec) -> Self {
        let version = VersionSpec {
            version: spec.version,
            digest: spec.digest.clone(),
            size_bytes: spec.size_bytes,
            replicas_wanted: spec.replicas_wanted,
            demands: Demands::default(),
            claim: Claim::default(),
        };
        Self {
            name: spec.name.clone(),
            config: spec.config.clone(),
            shards: spec.shards,
            platform: spec.platform.clone(),
            versions: vec![version],
            stored: false,
            only: true,
        }
    }
}

/// What a worker says about one replica.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReplicaReport {
    /// The model's name.
    pub model: String,
    /// The model's version.
    pub version: u64,
    /// Which part of the model.
    pub shard: u32,
    /// Which assignment this is about.
    pub generation: Generation,
    /// How far it has come.
    pub state: ReplicaState,
    /// Why it failed; empty otherwise.
    pub reason: String,
    /// Memory that it takes.
    pub memory_bytes: u64,
}

/// What a worker was judged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// No heartbeat for the whole timeout.
    Silence,
    /// Its connection broke, and nobody answered at its address.
    Unreachable,
    /// An operator said so.
    Operator,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Silence => "no heartbeat within the timeout",
            Self::Unreachable => "its connection broke and it doesn't answer",
            Self::Operator => "an operator said so",
        })
    }
}

/// How a command was answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// The state is now as the command wants it.
    Done {
        /// The epoch after it.
        epoch: Epoch,
    },
    /// The model is deployed; its replicas come up from here.
    Deployed {
        /// The version that is deployed.
        version: u64,
        /// Replicas of at least this generation serve it.
        generation: Generation,
        /// The epoch after it.
        epoch: Epoch,
    },
    /// Nothing was changed.
    Rejected(Reject),
    /// The versions are deployed; their replicas come up from here.
    DeployedSet {
        /// Each version with the generation that serves it: replicas of at least this one do.
        versions: Vec<(u64, Generation)>,
        /// The epoch after it.
        epoch: Epoch,
    },
}

impl Outcome {
    /// As bytes for the wire between coordinators.
    pub fn encode(&self) -> Vec<u8> {
        // Only who sent a command gets its outcome, and so knows what can come of it.
        codec::encode(LEVEL_FIRST, self)
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    /// [`DecodeError`] if the bytes are damaged.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode("outcome", LEVEL_FIRST, bytes).map(|(_, outcome)| outcome)
    }

    /// The outcome as a result, for callers for whom a rejection is an error.
    ///
    /// # Errors
    /// The [`Reject`].
    pub fn accepted(self) -> Result<Self, Reject> {
        if let Self::Rejected(reject) = self { Err(reject) } else { Ok(self) }
    }
}

/// Why a command changed nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Reject {
    /// A value that can never be right.
    #[error("{field} {problem}")]
    Invalid {
        /// Which value.
        field: String,
        /// What is wrong with it, and its limit.
        problem: String,
    },
    /// There is no such worker.
    #[error("worker {worker} isn't known; it has to register first")]
    UnknownWorker {
        /// Who was named.
        worker: WorkerId,
    },
    /// This is about a past life of the worker.
    #[error("incarnation {incarnation} of worker {worker} is over; the smallest accepted is {incarnation_min}")]
    StaleIncarnation {
        /// Who was named.
        worker: WorkerId,
        /// The life that was named.
        incarnation: Incarnation,
        /// The smallest that is accepted.
        incarnation_min: Incarnation,
    },
    /// The worker is at work.
    #[error(
        "worker {worker} is {doing}; `cresset drain {worker} --wait` has what it runs begin elsewhere first, then it can be removed"
    )]
    WorkerAtWork {
        /// Who was named.
        worker: WorkerId,
        /// What it is or does.
        doing: String,
    },
    /// The model isn't deployed.
    #[error("model '{name}' isn't deployed")]
    UnknownModel {
        /// What was named.
        name: String,
    },
    /// The model is deployed, this version of it isn't.
    #[error("model '{name}' isn't deployed in version {version}")]
    UnknownVersion {
        /// The model.
        name: String,
        /// The version that was named.
        version: u64,
    },
    /// Requests may come by this label.
    #[error("version {version} of model '{name}' has the label '{label}'; move the label first, or take it away")]
    Labelled {
        /// The model.
        name: String,
        /// Its version.
        version: u64,
        /// A label that points at it.
        label: String,
    },
    /// No move of the plan fits the state any more.
    #[error("the plan was made from epoch {epoch_seen}, and none of its moves fits epoch {epoch}; plan again")]
    StalePlan {
        /// The epoch that the plan was made from.
        epoch_seen: Epoch,
        /// The epoch at hand.
        epoch: Epoch,
    },
    /// There is no such coordinator in the part that the change is about.
    #[error("{peer} isn't a member, or not of that kind; `cresset member list` shows who is")]
    NotAMember {
        /// Who was named.
        peer: PeerId,
    },
    /// The coordinator is what it is to become.
    #[error("{peer} is a member already, or votes already; `cresset member list` shows who is")]
    AlreadyMember {
        /// Who was named.
        peer: PeerId,
    },
    /// Ids are never used again.
    #[error(
        "{peer} can't be used: ids up to that of a removed coordinator aren't given again; take {next} or above, with an empty folder"
    )]
    PeerIdUsed {
        /// Who was named.
        peer: PeerId,
        /// The smallest that is free.
        next: PeerId,
    },
    /// One at a time.
    #[error("another change of the members is under way; try again when it is done")]
    MembersChanging,
    /// A bound of the state.
    #[error("there are {max} {what} already, which is the limit; remove one first")]
    TooMany {
        /// Of what.
        what: String,
        /// The limit.
        max: u64,
    },
}
