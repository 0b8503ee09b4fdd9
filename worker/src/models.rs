//! The models of a worker: fetch, verify, load, serve, unload.
//!
//! Loading happens beside the devices' threads, one model at a time, so that it never holds up a request. What fails to
//! load is reported with its reason and isn't tried again until it is deployed anew. The table that requests look into is
//! replaced as a whole: a lookup takes no lock.
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use cresset_client::repository::Repository;
use cresset_proto::{
    fleet::v1::{Assignment, Intent, ObservedReplica, ReplicaState},
    ids::model_version,
    inference::ModelConfig,
    tensor::element_count,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Semaphore, watch};

use crate::{
    admission::{Contract, ContractError},
    assignment::{ReplicaKey, StaleIntent, Step, steps},
    engine::{Engine, EngineError, EngineKind, InputBinding, InputParts, LoadSpec, Model, OutputBinding, device::DeviceThread},
    error::PredictError,
    metrics::ModelMetrics,
    queue::{Bounds, ModelQueue},
    sequence::Sequences,
};

/// A model that answers.
pub struct ServedModel {
    /// Which replica this is.
    pub key: ReplicaKey,
    /// Which deployment of the model it belongs to.
    pub generation: u64,
    /// What its callers were promised.
    pub contract: Arc<Contract>,
    /// Its configuration.
    pub config: ModelConfig,
    /// How requests reach it.
    pub runner: Runner,
    /// Its metrics.
    pub metrics: ModelMetrics,
    /// Bytes of its weights and buffers.
    pub memory_bytes: u64,
}

/// How requests reach a model.
pub enum Runner {
    /// Independent requests, in batches.
    Queue(Arc<ModelQueue>),
    /// Requests that share state.
    Sequences(Arc<Sequences>),
}

impl Drop for ServedModel {
    fn drop(&mut self) {
        if let Runner::Queue(queue) = &self.runner {
            queue.close();
        }
    }
}

/// Why a replica can't be served; the text goes to the operator.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Repository(#[from] cresset_client::repository::RepositoryError),
    #[error(
        "the files of model '{model}' version {version} are not those that were deployed: their SHA-256 is {found}, deployed was {wanted}; deploy it again"
    )]
    Digest { model: String, version: u64, found: String, wanted: String },
    #[error("the configuration that came from the coordinator can't be read: {0}")]
    Config(#[from] prost::DecodeError),
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error("config.pbtxt: parameter 'cresset.scalar.{name}': {text}")]
    Scalar { name: String, text: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("loading was cut short")]
    Aborted,
}

/// The largest input that a warm-up call makes up, in bytes.
const WARM_UP_BYTES_MAX: usize = 64 << 20;

type Table = HashMap<String, BTreeMap<u64, Arc<ServedModel>>>;

/// The models of this worker. Clones are handles to the same ones.
#[derive(Clone)]
pub struct Models {
    inner: Arc<Inner>,
}

struct Inner {
    repository: Repository,
    engine: Arc<dyn Engine>,
    devices: Vec<DeviceThread>,
    bounds: Bounds,
    table: ArcSwap<Table>,
    observed: Mutex<Observed>,
    changes: watch::Sender<u64>,
    loading: Semaphore,
}

#[derive(Default)]
struct Observed {
    acted_on: u64,
    replicas: BTreeMap<ReplicaKey, ObservedReplica>,
}

impl Models {
    /// No models yet. `devices` must not be empty.
    pub fn new(repository: Repository, engine: Arc<dyn Engine>, devices: Vec<DeviceThread>, bounds: Bounds) -> Self {
        let inner = Inner {
            repository,
            engine,
            devices,
            bounds,
            table: ArcSwap::default(),
            observed: Mutex::default(),
            changes: watch::channel(0).0,
            loading: Semaphore::new(1),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The model that a request means; an empty version is the highest that is here.
    ///
    /// # Errors
    /// [`PredictError::BadVersion`], [`PredictError::UnknownModel`], [`PredictError::UnknownVersion`].
    pub fn find(&self, model: &str, version: &str) -> Result<Arc<ServedModel>, PredictError> {
        let wanted = model_version(version)?;
        let table = self.inner.table.load();
        let versions = table.get(model).ok_or_else(|| PredictError::UnknownModel(model.to_owned()))?;
        let found = match wanted {
            None => versions.values().next_back(),
            Some(version) => versions.get(&version),
        };
        let version = wanted.unwrap_or_default();
        found.cloned().ok_or_else(|| PredictError::UnknownVersion { model: model.to_owned(), version })
    }

    /// All models that answer.
    pub fn served(&self) -> Vec<Arc<ServedModel>> {
        self.inner.table.load().values().flat_map(BTreeMap::values).cloned().collect()
    }

    /// What the leader should know, and a number that grows with each change of it.
    pub fn observed(&self) -> Vec<ObservedReplica> {
        self.inner.observed.lock().replicas.values().cloned().collect()
    }

    /// Changes whenever [`observed`](Self::observed) does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// The newest epoch that was acted on.
    pub fn epoch(&self) -> u64 {
        self.inner.observed.lock().acted_on
    }

    /// A new life of this worker: epochs that it saw belong to the old one.
    pub fn forget_epoch(&self) {
        self.inner.observed.lock().acted_on = 0;
    }

    /// Starts whatever is needed so that this worker runs `intent`.
    ///
    /// # Errors
    /// [`StaleIntent`]; nothing is changed then.
    pub fn act_on(&self, intent: &Intent) -> Result<(), StaleIntent> {
        let steps = {
            let mut observed = self.inner.observed.lock();
            let running = observed.replicas.iter().map(|(key, replica)| (key.clone(), replica.generation)).collect();
            let steps = steps(&running, intent, observed.acted_on)?;
            observed.acted_on = intent.epoch;
            for step in &steps {
                match step {
                    Step::Unload(key) => drop(observed.replicas.remove(key)),
                    Step::Load(assignment) => {
                        observed.replicas.insert(ReplicaKey::of(assignment), replica(assignment, ReplicaState::Loading));
                    }
                }
            }
            steps
        };
        for step in steps {
            match step {
                Step::Unload(key) => {
                    tracing::info!(model = key.model, version = key.version, "unloading");
                    self.inner.remove(&key);
                }
                Step::Load(assignment) => drop(tokio::spawn(Arc::clone(&self.inner).load(assignment))),
            }
        }
        self.inner.changed();
        Ok(())
    }
}

/// One call with zeros: libtorch compiles a graph at its first call, and no request should wait for that. Free dimensions
/// are taken as 1.
fn warm(model: &mut dyn Model, contract: &Contract) -> Result<(), EngineError> {
    let inputs: Vec<InputParts> = contract
        .inputs
        .iter()
        .map(|spec| {
            let batch = (contract.batch_rows_max > 0).then_some(1);
            let shape: Vec<i64> = batch.into_iter().chain(spec.dims.iter().map(|dim| if *dim < 0 { 1 } else { *dim })).collect();
            let bytes = element_count(&shape).and_then(|count| count.checked_mul(spec.datatype.size()?)).unwrap_or(usize::MAX);
            let zeros = if bytes <= WARM_UP_BYTES_MAX { Bytes::from(vec![0; bytes]) } else { Bytes::new() };
            InputParts { datatype: spec.datatype, shape, parts: vec![zeros] }
        })
        .collect();
    match contract.sequence {
        Some(_) => model.open_sequence()?.step(&inputs).map(drop),
        None => model.infer(&inputs).map(drop),
    }
}

fn replica(assignment: &Assignment, state: ReplicaState) -> ObservedReplica {
    ObservedReplica {
        model: assignment.model.clone(),
        version: assignment.version,
        shard: assignment.shard,
        generation: assignment.generation,
        state: state.into(),
        ..Default::default()
    }
}

impl Inner {
    fn changed(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    /// Whether the replica is still wanted in this generation.
    fn is_wanted(&self, key: &ReplicaKey, generation: u64) -> bool {
        self.observed.lock().replicas.get(key).is_some_and(|replica| replica.generation == generation)
    }

    async fn load(self: Arc<Self>, assignment: Assignment) {
        let key = ReplicaKey::of(&assignment);
        // The semaphore is never closed, so there is always a permit in the end.
        let _one_at_a_time = self.loading.acquire().await;
        if !self.is_wanted(&key, assignment.generation) {
            return;
        }
        tracing::info!(model = key.model, version = key.version, generation = assignment.generation, "loading");
        let begun = std::time::Instant::now();
        let loader = Arc::clone(&self);
        let task = assignment.clone();
        let loaded = tokio::task::spawn_blocking(move || loader.read_and_load(&task)).await.unwrap_or(Err(LoadError::Aborted));
        let mut observed = self.observed.lock();
        // An undeployment may have overtaken the load; then what was loaded is dropped here.
        let Some(entry) = observed.replicas.get_mut(&key).filter(|entry| entry.generation == assignment.generation) else {
            return;
        };
        match loaded {
            Ok(served) => {
                entry.state = ReplicaState::Ready.into();
                entry.memory_bytes = served.memory_bytes;
                self.insert(Arc::new(served));
                tracing::info!(model = key.model, version = key.version, took_ms = begun.elapsed().as_millis(), "ready");
            }
            Err(error) => {
                entry.state = ReplicaState::Failed.into();
                entry.reason = error.to_string();
                tracing::error!(model = key.model, version = key.version, %error, "a model can't be served");
            }
        }
        drop(observed);
        self.changed();
    }

    fn read_and_load(&self, assignment: &Assignment) -> Result<ServedModel, LoadError> {
        let key = ReplicaKey::of(assignment);
        let stored = self.repository.read(&key.model, Some(key.version))?;
        if stored.digest != assignment.digest {
            let (found, wanted) = (stored.digest, assignment.digest.clone());
            return Err(LoadError::Digest { model: key.model, version: key.version, found, wanted });
        }
        let mut config = ModelConfig::decode(assignment.config.clone())?;
        config.name.clone_from(&key.model);
        let contract = Contract::read(&config)?;
        if !contract.ignored.is_empty() {
            tracing::warn!(model = key.model, fields = ?contract.ignored, "fields of config.pbtxt have no effect");
        }
        let parameters = config.parameters.iter().map(|(key, value)| (key.clone(), value.string_value.clone())).collect();
        let kind = EngineKind::of(&config.platform, &config.backend, &stored.file, &parameters).map_err(ContractError)?;
        let device = self.device(&key);
        let mut model = self.engine.load(&LoadSpec {
            path: stored.file,
            device: device.device(),
            kind,
            inputs: contract
                .inputs
                .iter()
                .map(|spec| InputBinding { name: spec.name.clone(), datatype: spec.datatype })
                .collect(),
            constants: contract
                .constants
                .iter()
                .map(|(name, text)| match text.parse() {
                    Ok(scalar) => Ok((name.clone(), scalar)),
                    Err(text) => Err(LoadError::Scalar { name: name.clone(), text }),
                })
                .collect::<Result<_, _>>()?,
            outputs: contract
                .outputs
                .iter()
                .map(|spec| OutputBinding { name: spec.name.clone(), datatype: Some(spec.datatype), dims: spec.dims.clone() })
                .collect(),
            batched: contract.batch_rows_max > 0,
            decoupled: false,
        })?;
        if let Err(error) = warm(model.as_mut(), &contract) {
            tracing::debug!(model = key.model, %error, "the warm-up call failed, which may be because of its made-up input");
        }
        let placed = device.place(model);
        let metrics = ModelMetrics::new(&key.model, key.version);
        let memory_bytes = placed.memory_bytes();
        let contract = Arc::new(contract);
        let runner = match contract.sequence.clone() {
            Some(spec) => Runner::Sequences(Sequences::new(Arc::clone(&contract), spec, placed, metrics.clone())),
            None => Runner::Queue(ModelQueue::start(Arc::clone(&contract), placed, self.bounds, metrics.clone())),
        };
        Ok(ServedModel { key, generation: assignment.generation, contract, config, runner, metrics, memory_bytes })
    }

    /// Models are spread over the devices by their names, so that a restart finds the same place.
    fn device(&self, key: &ReplicaKey) -> &DeviceThread {
        let sum = key.model.bytes().fold(key.version as usize, |sum, byte| sum.wrapping_mul(31).wrapping_add(usize::from(byte)));
        &self.devices[sum % self.devices.len()]
    }

    fn insert(&self, served: Arc<ServedModel>) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            table.entry(served.key.model.clone()).or_default().insert(served.key.version, Arc::clone(&served));
            table
        });
    }

    fn remove(&self, key: &ReplicaKey) {
        self.table.rcu(|table| {
            let mut table = Table::clone(table);
            if let Some(versions) = table.get_mut(&key.model) {
                versions.remove(&key.version);
                if versions.is_empty() {
                    table.remove(&key.model);
                }
            }
            table
        });
    }
}
