//! Who serves what: the table that a router chooses from.
//!
//! A table is immutable and is shared as `Arc<RouteTable>` through [`Routes`], so that a request sees one consistent table
//! and can wait for a newer one. What outlives a table is what a [`Replica`] counts: the next table takes over the counters of
//! each worker that still lives the same life.
//!
//! Absent here: where tables come from (see `coordinators`, or the coordinator's own state) and connections (see `workers`).
mod feed;
mod replica;

use std::{
    borrow::Borrow,
    collections::{BTreeMap, HashMap},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use cresset_proto::{
    fleet::v1::{ModelRoute as WireRoute, WatchResponse},
    ids::{VersionError, VersionText, version_text},
    inference::{ModelConfig, ModelInferRequest},
    model_config,
    reason::Reason,
};
use prost::Message;
use tonic::Status;

pub use self::{
    feed::{RouteSender, Routes, channel},
    replica::{InFlight, Replica},
};
use crate::{
    ejection,
    latency::{self, Recent},
};

/// One version of a model and who serves it.
#[derive(Debug)]
pub struct ModelRoute {
    /// The model's name.
    pub name: String,
    /// Its version.
    pub version: u64,
    /// Which deployment of it.
    pub generation: u64,
    /// Its configuration.
    pub config: Arc<ModelConfig>,
    /// Requests share state by `sequence_id`.
    pub stateful: bool,
    /// One request can have several responses.
    pub decoupled: bool,
    /// How many parts the model is cut into.
    pub shards: u32,
    /// Ready replicas; of the first shard where there are several.
    pub replicas: Vec<Arc<Replica>>,
    /// A [`Recent`]: how long an answer takes, in µs, wherever it comes from. Shared by all tables of a deployment.
    usual_us: Arc<AtomicU64>,
    /// A [`Recent`]: the longest that an answer took in the last seconds, in µs. Shared likewise.
    longest_us: Arc<AtomicU64>,
    /// The 95th percentile of unary answers in µs, as the bits of an f32; 0 for unknown. Shared likewise.
    p95_us: Arc<AtomicU32>,
}

impl ModelRoute {
    /// How long a request may be unanswered before its replica is suspect.
    pub fn patience(&self, now_ms: u64) -> Duration {
        let usual = Recent::from_bits(self.usual_us.load(Ordering::Relaxed));
        let longest = Recent::from_bits(self.longest_us.load(Ordering::Relaxed)).crested(now_ms);
        let known = (!usual.is_unknown()).then(|| usual.value());
        Duration::from_millis(ejection::patience_ms(known, longest))
    }

    /// The 95th percentile of unary answers, once there was one.
    pub(crate) fn p95(&self) -> Option<Duration> {
        let micros = f32::from_bits(self.p95_us.load(Ordering::Relaxed));
        (micros > 0.0).then(|| Duration::from_micros(micros as u64))
    }

    /// Takes note of how long a unary answer took.
    pub(crate) fn note_p95(&self, took: Duration) {
        let took_us = took.as_secs_f32() * 1e6;
        let next = |bits| Some(latency::p95(f32::from_bits(bits), took_us).to_bits());
        // It always has a next one.
        let _ = self.p95_us.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    fn note_longest(&self, took_us: f32, now_ms: u64) {
        let longest = Recent::from_bits(self.longest_us.load(Ordering::Relaxed));
        // Few are, and then the last to say so is right enough.
        if took_us >= longest.crested(now_ms) {
            self.longest_us.store(longest.crest(took_us, now_ms).to_bits(), Ordering::Relaxed);
        }
    }

    /// Says in the request which version was meant by a label: workers know none.
    pub fn address(&self, version: &Version, request: &mut ModelInferRequest) {
        if matches!(version, Version::Label(_)) {
            request.model_version = self.version.to_string();
        }
    }
}

/// Which version of a model a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Version {
    /// The highest one that is served.
    Highest,
    /// This one.
    Exactly(u64),
    /// The one that this label points at, at the time.
    Label(Arc<str>),
}

impl Version {
    /// Reads `model_version`. Whether a label is one shows in the table.
    ///
    /// # Errors
    /// [`VersionError`], in Triton's words.
    pub fn read(text: &str) -> Result<Self, VersionError> {
        Ok(match version_text(text)? {
            VersionText::Highest => Self::Highest,
            VersionText::Number(version) => Self::Exactly(version),
            VersionText::Label(label) => Self::Label(label.into()),
        })
    }
}

/// Why there is no route for a request; in Triton's words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// No such model.
    #[error("Request for unknown model: '{0}' is not found")]
    Model(String),
    /// The model is there, this version isn't.
    #[error("Request for unknown model: '{model}' version {version} is not found")]
    Version {
        /// The model.
        model: String,
        /// The version that was asked for.
        version: u64,
    },
    /// What stands there is no version.
    #[error(transparent)]
    Text(#[from] VersionError),
}

impl LookupError {
    /// With the code that Triton's clients expect.
    pub fn status(&self) -> Status {
        let reason = match self {
            Self::Model(_) | Self::Version { .. } => Reason::UnknownModel,
            Self::Text(_) => Reason::InvalidArgument,
        };
        reason.status(self.to_string())
    }
}

/// A table of routes, as of one epoch.
#[derive(Debug, Default)]
pub struct RouteTable {
    epoch: u64,
    received: bool,
    /// Hashed, as every request looks here: in a tree of 10,000 names it meets a dozen of them on its way.
    models: HashMap<Arc<str>, Arc<BTreeMap<u64, Arc<ModelRoute>>>>,
    labels: BTreeMap<String, Arc<BTreeMap<String, u64>>>,
    workers: BTreeMap<String, Arc<Replica>>,
    coordinators: Vec<String>,
}

/// A table that can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RouteError {
    /// A model's configuration doesn't decode.
    #[error("the route of model '{model}' version {version} has a configuration that doesn't decode: {cause}")]
    Config {
        /// The model.
        model: String,
        /// Its version.
        version: u64,
        /// What prost says.
        cause: String,
    },
    /// It says what changed in another table than the one here.
    #[error("it is what changed since epoch {since}, and the table here is of epoch {here}")]
    Gap {
        /// The epoch that it follows.
        since: u64,
        /// The epoch of the table here.
        here: u64,
    },
}

impl RouteTable {
    /// The table of a router that has heard of nothing yet: it waits rather than refuse.
    pub fn unknown() -> Self {
        Self::default()
    }

    /// A table made of what a coordinator sent, whole or what changed in `previous`, taking over the counters of `previous`. Workers
    /// of `previous` that are no longer there are told so: what is in flight at them moves.
    ///
    /// # Errors
    /// [`RouteError`]; `previous` stays in force then.
    pub fn build(response: &WatchResponse, previous: &RouteTable) -> Result<Self, RouteError> {
        let mut table = if response.since_epoch == 0 { Self::default() } else { previous.without_changed(response)? };
        (table.epoch, table.received) = (response.epoch, true);
        for route in &response.workers {
            let replica = match previous.workers.get(&route.worker_id) {
                Some(known) if known.is(route) && !known.is_gone() => Arc::clone(known),
                _ => Arc::new(Replica::new(&*route.worker_id, route.incarnation, &*route.grpc_address).in_zone(&*route.zone)),
            };
            table.workers.insert(route.worker_id.clone(), replica);
        }
        for wire in &response.models {
            let known = previous.models.get(&*wire.model).and_then(|versions| versions.get(&wire.version));
            let route = Arc::new(model_route(wire, &table.workers, known)?);
            Arc::make_mut(table.models.entry(wire.model.as_str().into()).or_default()).insert(wire.version, route);
        }
        for wire in &response.labels {
            Arc::make_mut(table.labels.entry(wire.model.clone()).or_default()).insert(wire.label.clone(), wire.version);
        }
        // Only now: a table that can't be built must change nothing.
        for (id, replica) in &previous.workers {
            if !table.workers.get(id).is_some_and(|kept| Arc::ptr_eq(kept, replica)) {
                replica.leave();
            }
        }
        table.coordinators.clone_from(&response.coordinator_grpc_addresses);
        Ok(table)
    }

    /// What is left of this table when what changed is taken away.
    fn without_changed(&self, response: &WatchResponse) -> Result<Self, RouteError> {
        if response.since_epoch != self.epoch || !self.received {
            return Err(RouteError::Gap { since: response.since_epoch, here: self.epoch });
        }
        let (mut models, mut labels, mut workers) = (self.models.clone(), self.labels.clone(), self.workers.clone());
        for name in &response.models_changed {
            models.remove(name.as_str());
            labels.remove(name);
        }
        for id in &response.workers_changed {
            workers.remove(id);
        }
        Ok(Self { models, labels, workers, ..Self::default() })
    }

    /// The epoch that the table is of; 0 when nothing was received.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Whether it came from a coordinator; a table that didn't can't tell an unknown model from a known one.
    pub fn is_received(&self) -> bool {
        self.received
    }

    /// Public addresses of the coordinators, as the cluster knows them.
    pub fn coordinators(&self) -> &[String] {
        &self.coordinators
    }

    /// All models, in order of name and version.
    pub fn models(&self) -> impl Iterator<Item = &Arc<ModelRoute>> {
        let by_name: BTreeMap<_, _> = self.models.iter().collect();
        by_name.into_values().flat_map(|versions| versions.values())
    }

    /// The versions of one model, ascending.
    pub fn versions(&self, name: &str) -> impl Iterator<Item = &Arc<ModelRoute>> {
        self.models.get(name).into_iter().flat_map(|versions| versions.values())
    }

    /// The routes that a replica is part of.
    pub(crate) fn routes_of(&self, replica: &Arc<Replica>) -> impl Iterator<Item = &Arc<ModelRoute>> {
        let routes = self.models.values().flat_map(|versions| versions.values());
        routes.filter(|route| route.replicas.iter().any(|other| Arc::ptr_eq(other, replica)))
    }

    /// All workers, in order of their ids.
    pub fn workers(&self) -> impl Iterator<Item = &Arc<Replica>> {
        self.workers.values()
    }

    /// Whether any version of the model is deployed.
    pub fn has_model(&self, name: &str) -> bool {
        self.models.contains_key(name)
    }

    /// The versions of a model that have a ready replica, ascending.
    pub fn versions_ready(&self, name: &str) -> impl Iterator<Item = u64> {
        let versions = self.models.get(name).into_iter().flat_map(|versions| versions.iter());
        versions.filter(|(_, route)| !route.replicas.is_empty()).map(|(version, _)| *version)
    }

    /// The route of a model. [`Version::Highest`] prefers versions that have a ready replica.
    pub fn model(&self, name: &str, version: impl Borrow<Version>) -> Option<&Arc<ModelRoute>> {
        let versions = self.models.get(name)?;
        match version.borrow() {
            Version::Exactly(version) => versions.get(version),
            Version::Label(label) => versions.get(self.labels.get(name)?.get(&**label)?),
            Version::Highest => {
                let ready = versions.values().rev().find(|route| !route.replicas.is_empty());
                ready.or_else(|| versions.values().next_back())
            }
        }
    }

    /// [`model`](Self::model), or why there is none.
    ///
    /// # Errors
    /// [`LookupError`].
    pub fn lookup(&self, name: &str, version: &Version) -> Result<&Arc<ModelRoute>, LookupError> {
        self.model(name, version).ok_or_else(|| match version {
            Version::Exactly(version) if self.has_model(name) => LookupError::Version { model: name.into(), version: *version },
            Version::Label(label) => VersionError::NoLabel { label: label.to_string(), model: name.to_owned() }.into(),
            Version::Exactly(_) | Version::Highest => LookupError::Model(name.to_owned()),
        })
    }
}

fn model_route(
    wire: &WireRoute,
    workers: &BTreeMap<String, Arc<Replica>>,
    known: Option<&Arc<ModelRoute>>,
) -> Result<ModelRoute, RouteError> {
    let known = known.filter(|known| known.generation == wire.generation);
    let config = match known {
        // A deployment's configuration never changes, and tables do often.
        Some(known) => Arc::clone(&known.config),
        None => Arc::new(ModelConfig::decode(wire.config.clone()).map_err(|error| RouteError::Config {
            model: wire.model.clone(),
            version: wire.version,
            cause: error.to_string(),
        })?),
    };
    let first = wire.shards.iter().min_by_key(|shard| shard.shard);
    let ids = first.map_or(&[][..], |shard| &shard.worker_ids);
    Ok(ModelRoute {
        name: wire.model.clone(),
        version: wire.version,
        generation: wire.generation,
        stateful: model_config::sequence_batching(&config).is_some(),
        decoupled: model_config::is_decoupled(&config),
        config,
        shards: u32::try_from(wire.shards.len()).unwrap_or(u32::MAX),
        usual_us: known.map_or_else(Arc::default, |known| Arc::clone(&known.usual_us)),
        longest_us: known.map_or_else(Arc::default, |known| Arc::clone(&known.longest_us)),
        p95_us: known.map_or_else(Arc::default, |known| Arc::clone(&known.p95_us)),
        replicas: ids.iter().filter_map(|id| workers.get(id)).cloned().collect(),
    })
}

#[cfg(test)]
mod tests;
