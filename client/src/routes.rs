//! Who serves what: the table that a router chooses from.
//!
//! A table is immutable and is shared as `Arc<RouteTable>` in a `watch` channel, so that a request sees one consistent table
//! and can wait for a newer one. What outlives a table is a [`Replica`]'s count of requests in flight: the next table takes
//! over the counters of each worker that still lives the same life.
//!
//! Absent here: where tables come from (see `coordinators`, or the coordinator's own state) and connections (see `workers`).
use std::{
    borrow::Borrow,
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use cresset_proto::{
    fleet::v1::{ModelRoute as WireRoute, WatchResponse, WorkerRoute},
    ids::{VersionError, VersionText, version_text},
    inference::{ModelConfig, ModelInferRequest},
    model_config,
    reason::Reason,
};
use prost::Message;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use crate::{
    balance::{self, SHARE_MIN},
    latency::{Recent, SLOWNESS_MAX},
};

/// One life of a worker, as a router sees it. Shared by all models that it serves.
#[derive(Debug)]
pub struct Replica {
    /// The worker.
    pub worker_id: String,
    /// Which life of it.
    pub incarnation: u64,
    /// `host:port` of its gRPC service.
    pub address: String,
    /// What it shares its fate with; empty for unknown.
    pub zone: String,
    /// Its number in [`balance`].
    pub(crate) id: u64,
    in_flight: AtomicU32,
    /// A [`Recent`]: how long its answers take, as a multiple of what is usual for their models.
    slowness: AtomicU64,
    /// On the router's clock, when it was first thought of; 0 before.
    first_seen_ms: AtomicU64,
    /// On the router's clock; 0 when nothing is held against it.
    failing_until_ms: AtomicU64,
    gone: CancellationToken,
}

impl Replica {
    /// A worker's life that nothing is known of yet.
    pub fn new(worker_id: impl Into<String>, incarnation: u64, address: impl Into<String>) -> Self {
        let worker_id = worker_id.into();
        Self {
            id: balance::id_of(&worker_id),
            worker_id,
            incarnation,
            address: address.into(),
            zone: String::new(),
            in_flight: AtomicU32::new(0),
            slowness: AtomicU64::new(Recent::default().to_bits()),
            first_seen_ms: AtomicU64::new(0),
            failing_until_ms: AtomicU64::new(0),
            gone: CancellationToken::new(),
        }
    }

    /// The same worker in a zone.
    #[must_use]
    pub fn in_zone(self, zone: impl Into<String>) -> Self {
        Self { zone: zone.into(), ..self }
    }

    /// Takes note of an answer to a request of `route` that took so long.
    pub(crate) fn note_answer(&self, route: &ModelRoute, took: Duration, now_ms: u64) {
        self.note_success();
        let took_us = took.as_secs_f32() * 1e6;
        let usual_us = change(&route.usual_us, |usual| usual.mean(took_us, now_ms)).value().max(1.0);
        let slowness = (took_us / usual_us).min(SLOWNESS_MAX);
        change(&self.slowness, |recent| recent.peak(slowness, now_ms));
    }

    /// How slow it is now, as a multiple of the usual.
    pub(crate) fn slowness(&self, now_ms: u64) -> f32 {
        Recent::from_bits(self.slowness.load(Ordering::Relaxed)).faded(1.0, now_ms)
    }

    /// What part of its due it may get: it grows to 1 during `slow_start` after it was first thought of.
    pub(crate) fn share(&self, slow_start: Duration, now_ms: u64) -> f32 {
        let mut first_ms = self.first_seen_ms.load(Ordering::Relaxed);
        if first_ms == 0 {
            first_ms = now_ms.max(1);
            // Whoever is first is right: they all mean now.
            let _ = self.first_seen_ms.compare_exchange(0, first_ms, Ordering::Relaxed, Ordering::Relaxed);
        }
        let age_ms = now_ms.saturating_sub(first_ms) as f32;
        (age_ms / (slow_start.as_secs_f32() * 1e3).max(1.0)).clamp(SHARE_MIN, 1.0)
    }

    /// Requests that this router has there, over all models.
    pub fn in_flight(&self) -> u32 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request until the guard is dropped.
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Holds a failure against the replica until `until_ms` on the router's clock.
    pub(crate) fn note_failure(&self, until_ms: u64) {
        self.failing_until_ms.fetch_max(until_ms, Ordering::Relaxed);
    }

    /// Forgives everything: it has answered.
    pub(crate) fn note_success(&self) {
        if self.failing_until_ms.load(Ordering::Relaxed) != 0 {
            self.failing_until_ms.store(0, Ordering::Relaxed);
        }
    }

    pub(crate) fn is_failing(&self, now_ms: u64) -> bool {
        self.failing_until_ms.load(Ordering::Relaxed) > now_ms
    }

    /// Ends when a newer table no longer knows this life of the worker: it was judged dead, or has left.
    pub async fn gone(&self) {
        self.gone.cancelled().await;
    }

    /// Whether [`gone`](Self::gone) has ended.
    pub fn is_gone(&self) -> bool {
        self.gone.is_cancelled()
    }

    fn is(&self, route: &WorkerRoute) -> bool {
        self.worker_id == route.worker_id
            && self.incarnation == route.incarnation
            && self.address == route.grpc_address
            && self.zone == route.zone
    }
}

/// Changes a shared [`Recent`] and returns what it is now.
fn change(shared: &AtomicU64, next: impl Fn(Recent) -> Recent) -> Recent {
    let mut bits = shared.load(Ordering::Relaxed);
    loop {
        let newer = next(Recent::from_bits(bits));
        match shared.compare_exchange_weak(bits, newer.to_bits(), Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return newer,
            Err(meanwhile) => bits = meanwhile,
        }
    }
}

/// One request in flight at a replica.
#[derive(Debug)]
pub struct InFlight(Arc<Replica>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

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
}

impl ModelRoute {
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
    models: BTreeMap<String, BTreeMap<u64, Arc<ModelRoute>>>,
    labels: BTreeMap<String, BTreeMap<String, u64>>,
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
}

impl RouteTable {
    /// The table of a router that has heard of nothing yet: it waits rather than refuse.
    pub fn unknown() -> Self {
        Self::default()
    }

    /// A table made of what a coordinator sent, taking over the counters of `previous`. Workers of `previous` that are no
    /// longer there are told so: what is in flight at them moves.
    ///
    /// # Errors
    /// [`RouteError`]; `previous` stays in force then.
    pub fn build(response: &WatchResponse, previous: &RouteTable) -> Result<Self, RouteError> {
        let mut workers: BTreeMap<String, Arc<Replica>> = BTreeMap::new();
        for route in &response.workers {
            let replica = match previous.workers.get(&route.worker_id) {
                Some(known) if known.is(route) && !known.is_gone() => Arc::clone(known),
                _ => Arc::new(Replica::new(&*route.worker_id, route.incarnation, &*route.grpc_address).in_zone(&*route.zone)),
            };
            workers.insert(route.worker_id.clone(), replica);
        }
        let mut models: BTreeMap<String, BTreeMap<u64, Arc<ModelRoute>>> = BTreeMap::new();
        for wire in &response.models {
            let known = previous.models.get(&wire.model).and_then(|versions| versions.get(&wire.version));
            let route = model_route(wire, &workers, known)?;
            models.entry(wire.model.clone()).or_default().insert(wire.version, Arc::new(route));
        }
        let mut labels: BTreeMap<String, BTreeMap<String, u64>> = BTreeMap::new();
        for wire in &response.labels {
            labels.entry(wire.model.clone()).or_default().insert(wire.label.clone(), wire.version);
        }
        // Only now: a table that can't be built must change nothing.
        for (id, replica) in &previous.workers {
            if !workers.get(id).is_some_and(|kept| Arc::ptr_eq(kept, replica)) {
                replica.gone.cancel();
            }
        }
        let coordinators = response.coordinator_grpc_addresses.clone();
        Ok(Self { epoch: response.epoch, received: true, models, labels, workers, coordinators })
    }

    /// Replaces the table in `sender` by a newer one; one that isn't newer is ignored (`false`).
    ///
    /// # Errors
    /// [`RouteError`]; the old table stays in force then.
    pub fn publish(sender: &watch::Sender<Arc<RouteTable>>, response: &WatchResponse) -> Result<bool, RouteError> {
        let mut result = Ok(false);
        sender.send_if_modified(|table| {
            if table.received && response.epoch <= table.epoch {
                return false;
            }
            match Self::build(response, table) {
                Ok(newer) => {
                    *table = Arc::new(newer);
                    result = Ok(true);
                    true
                }
                Err(error) => {
                    result = Err(error);
                    false
                }
            }
        });
        result
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
        self.models.values().flat_map(BTreeMap::values)
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
        let versions = self.models.get(name).into_iter().flatten();
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
        replicas: ids.iter().filter_map(|id| workers.get(id)).cloned().collect(),
    })
}

#[cfg(test)]
mod tests;
