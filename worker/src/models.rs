//! The models of a worker: fetch, verify, load, serve, unload.
//!
//! Loading happens beside the devices' threads, one model at a time, so that it never holds up a request. What fails to
//! load is reported with its reason and isn't tried again until it is deployed anew. The table that requests look into is
//! replaced as a whole: a lookup takes no lock.
mod instances;
mod load;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use cresset_client::repository::Repository;
use cresset_proto::{
    fleet::v1::{Assignment, Intent, ObservedReplica, ReplicaState},
    ids::model_version,
    inference::ModelConfig,
    tensor::Tensor,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::{Semaphore, watch};

use self::instances::{Instance, places, runner, runs_batches};
use self::load::{Background, labels, load_spec, read_side_file, takes_what_is_left_out};
use crate::{
    assignment::{Fence, ReplicaKey, StaleIntent, Step, steps},
    contract::{Contract, ContractError},
    decoupled::Decoupled,
    devices::Devices,
    engine::{
        Device, Engine, EngineError, EngineKind,
        device::{DeviceThread, PlacedModel},
    },
    error::PredictError,
    files::{FetchError, Files},
    metrics::{self, ModelMetrics},
    queue::{Bounds, ModelQueue},
    sequence::{self, Sequences},
    warm_up::{WarmUpError, warm_up},
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
    /// Where it runs; its weights are on each of them.
    pub devices: Vec<Device>,
    /// Bytes of its weights and buffers.
    pub memory_bytes: u64,
}

/// How requests reach a model.
pub enum Runner {
    /// Independent requests, in batches.
    Queue(Arc<ModelQueue>),
    /// Requests that share state.
    Sequences(Arc<Sequences>),
    /// Requests with any number of answers.
    Decoupled(Arc<Decoupled>),
}

impl Drop for ServedModel {
    fn drop(&mut self) {
        match &self.runner {
            Runner::Queue(queue) => queue.close(),
            Runner::Sequences(sequences) => sequences.close(),
            // Who still reads holds its own copy of the model.
            Runner::Decoupled(_) => {}
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
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("the configuration that came from the coordinator can't be read: {0}")]
    Config(#[from] prost::DecodeError),
    #[error(transparent)]
    Contract(#[from] ContractError),
    #[error("config.pbtxt: parameter 'cresset.scalar.{name}': {text}")]
    Scalar { name: String, text: String },
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    WarmUp(#[from] WarmUpError),
    #[error("{0}")]
    File(String),
    #[error("instance_group asks for {0}")]
    NoDevice(String),
    #[error("can't start a thread for the model: {0}")]
    Thread(std::io::Error),
    #[error("loading was cut short")]
    Aborted,
    #[error("loading took longer than the worker's max-load-ms, which is {limit_ms}")]
    TooLong { limit_ms: u64 },
    #[error(
        "{0} loads of this worker took longer than its max-load-ms and haven't ended: it loads no more until it is started again"
    )]
    TooManyHang(usize),
}

/// A model that is read and warm, and has no threads yet.
struct Loaded {
    key: ReplicaKey,
    generation: u64,
    contract: Contract,
    config: ModelConfig,
    /// Its instances, and where each belongs.
    models: Vec<Instance>,
    /// What state a sequence begins with.
    initial: Vec<Tensor>,
}

type Table = HashMap<String, BTreeMap<u64, Arc<ServedModel>>>;

/// The models of this worker. Clones are handles to the same ones.
#[derive(Clone)]
pub struct Models {
    inner: Arc<Inner>,
}

struct Inner {
    repository: Repository,
    files: Files,
    engine: Arc<dyn Engine>,
    devices: Arc<Devices>,
    bounds: Bounds,
    table: ArcSwap<Table>,
    observed: Mutex<Observed>,
    changes: watch::Sender<u64>,
    /// One at a time.
    loading: Semaphore,
    background: Background,
}

#[derive(Default)]
struct Observed {
    fence: Fence,
    replicas: BTreeMap<ReplicaKey, ObservedReplica>,
}

impl Models {
    /// No models yet. `devices` must not be empty.
    pub fn new(repository: Repository, engine: Arc<dyn Engine>, devices: Vec<DeviceThread>, bounds: Bounds) -> Self {
        Self::with_files(repository, Files::none(), engine, devices, bounds)
    }

    /// The same, where models can have files that the coordinators keep.
    pub fn with_files(
        repository: Repository,
        files: Files,
        engine: Arc<dyn Engine>,
        devices: Vec<DeviceThread>,
        bounds: Bounds,
    ) -> Self {
        let inner = Inner {
            repository,
            files,
            engine,
            devices: Arc::new(Devices::new(devices)),
            bounds,
            table: ArcSwap::default(),
            observed: Mutex::default(),
            changes: watch::channel(0).0,
            loading: Semaphore::new(1),
            background: Background::default(),
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

    /// The versions of a model that answer, ascending.
    pub fn versions(&self, model: &str) -> Vec<u64> {
        self.inner.table.load().get(model).map(|versions| versions.keys().copied().collect()).unwrap_or_default()
    }

    /// As [`find`](Self::find), for a request: a model on a device that is fenced doesn't run it.
    ///
    /// # Errors
    /// Those of [`find`](Self::find), and [`PredictError::Engine`] with [`EngineError::DeviceLost`].
    pub fn find_to_run(&self, model: &str, version: &str) -> Result<Arc<ServedModel>, PredictError> {
        let served = self.find(model, version)?;
        match self.inner.devices.fenced(&served.devices) {
            None => Ok(served),
            Some(why) => Err(PredictError::Engine { model: served.key.model.clone(), source: EngineError::DeviceLost(why) }),
        }
    }

    /// How long a load and its warm-up may take, in ms; 0 for any time, as it is before this is called. A load that takes longer
    /// has failed, and the next one begins; the newest limit counts for loads that begin after it.
    pub fn set_load_max_ms(&self, load_max_ms: u64) {
        self.inner.background.set_limit_ms(load_max_ms);
    }

    /// What the models run on.
    pub fn devices(&self) -> &Arc<Devices> {
        &self.inner.devices
    }

    /// Watches the devices for ever.
    pub async fn watch_devices(self) {
        let inner = Arc::clone(&self.inner);
        Arc::clone(&self.inner.devices).watch(Arc::clone(&self.inner.engine), move || inner.changed()).await;
    }

    /// All models that answer.
    pub fn served(&self) -> Vec<Arc<ServedModel>> {
        self.inner.table.load().values().flat_map(BTreeMap::values).cloned().collect()
    }

    /// What the leader should know, and a number that grows with each change of it.
    pub fn observed(&self) -> Vec<ObservedReplica> {
        let mut replicas: Vec<ObservedReplica> = self.inner.observed.lock().replicas.values().cloned().collect();
        for served in self.served() {
            let Some(why) = self.inner.devices.fenced(&served.devices) else { continue };
            let is_it = |replica: &&mut ObservedReplica| {
                replica.model == served.key.model
                    && replica.version == served.key.version
                    && replica.shard == served.key.shard
                    && replica.state() == ReplicaState::Ready
            };
            if let Some(replica) = replicas.iter_mut().find(is_it) {
                replica.state = ReplicaState::Failed.into();
                replica.reason = why;
            }
        }
        replicas
    }

    /// Changes whenever [`observed`](Self::observed) does.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    /// The newest epoch that was acted on.
    pub fn epoch(&self) -> u64 {
        self.inner.observed.lock().fence.acted_on()
    }

    /// A new life of this worker: epochs that it saw belong to the old one.
    pub fn forget_epoch(&self) {
        self.inner.observed.lock().fence.begin_life();
    }

    /// The worker has registered, in this epoch: intents of earlier ones are refused from here on.
    pub fn begin_at(&self, epoch: u64) {
        self.inner.observed.lock().fence.registered(epoch);
    }

    /// Starts whatever is needed so that this worker runs `intent`.
    ///
    /// # Errors
    /// [`StaleIntent`]; nothing is changed then.
    pub fn act_on(&self, intent: &Intent) -> Result<(), StaleIntent> {
        let steps = {
            let mut observed = self.inner.observed.lock();
            let running = observed.replicas.iter().map(|(key, replica)| (key.clone(), replica.generation)).collect();
            let steps = steps(&running, intent, observed.fence.oldest())?;
            observed.fence.act_on(intent.epoch);
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
        // What a load that is under way has fetched is still in the intent, or nobody wants it any more.
        let kept = intent.assignments.iter().filter(|assignment| assignment.stored).map(|assignment| &*assignment.digest);
        self.inner.files.keep_only(&kept.collect());
        self.inner.changed();
        Ok(())
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
        let loaded = Arc::clone(&self).fetch_and_load(assignment.clone()).await;
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

    async fn fetch_and_load(self: Arc<Self>, assignment: Assignment) -> Result<ServedModel, LoadError> {
        let repository = if assignment.stored {
            Repository::new(self.files.fetch(&assignment.digest, &assignment.model, assignment.version).await?)
        } else {
            self.repository.clone()
        };
        let this = Arc::clone(&self);
        let begun = std::time::Instant::now();
        let load = move || this.read_and_load(&repository, &assignment);
        let loaded = self.background.run(load).await?;
        self.place(loaded, begun.elapsed())
    }

    fn read_and_load(&self, repository: &Repository, assignment: &Assignment) -> Result<Loaded, LoadError> {
        let key = ReplicaKey::of(assignment);
        let mut config = ModelConfig::decode(assignment.config.clone())?;
        config.name.clone_from(&key.model);
        // What was deployed counts, whatever the repository's config.pbtxt says by now.
        let stored = repository.read_as(&key.model, Some(key.version), config.clone())?;
        if stored.digest != assignment.digest {
            let (found, wanted) = (stored.digest, assignment.digest.clone());
            return Err(LoadError::Digest { model: key.model, version: key.version, found, wanted });
        }
        let mut contract = Contract::read(&config)?;
        if !contract.ignored.is_empty() {
            tracing::warn!(model = key.model, fields = ?contract.ignored, "fields of config.pbtxt have no effect");
        }
        let folder = repository.root().join(&key.model);
        let read = |sub: &str, file: &str| read_side_file(&folder.join(sub).join(file), sub, file);
        contract.labels = labels(&contract, |file| read("", file)).map_err(LoadError::File)?;
        let initial = sequence::state::initial(&contract, |file| read("initial_state", file)).map_err(LoadError::File)?;
        let kind =
            EngineKind::of(&config.platform, &config.backend, &stored.file, &contract.parameters).map_err(ContractError)?;
        let mut spec = load_spec(&contract, stored.file, kind)?;
        let mut models: Vec<Instance> = Vec::new();
        for device in places(&contract, &self.devices)? {
            let twin = models.iter_mut().find(|other| other.device == device).and_then(|other| other.model.twin());
            spec.device = device;
            let mut model = match twin {
                Some(twin) => twin,
                None => self.engine.load(&spec)?,
            };
            takes_what_is_left_out(&contract, model.signature()).map_err(LoadError::File)?;
            warm_up(model.as_mut(), &contract, &initial, |file| read("warmup", file))?;
            let second = if runs_batches(&contract) { model.second() } else { None };
            models.push(Instance { device, model, second });
        }
        Ok(Loaded { key, generation: assignment.generation, contract, config, models, initial })
    }

    /// Gives each instance a thread. Not from a thread that stands back for requests, since a thread begins with the priority of
    /// the one that starts it.
    fn place(&self, loaded: Loaded, took: Duration) -> Result<ServedModel, LoadError> {
        let Loaded { key, generation, contract, config, models, initial } = loaded;
        let devices = models.iter().map(|instance| instance.device).collect();
        let mut instances: Vec<Vec<PlacedModel>> = Vec::new();
        for Instance { device, model, second } in models {
            let place = |handle| self.devices.place(device, handle, &contract, Arc::clone(&self.engine));
            let handles = [Some(model), second].into_iter().flatten().map(place).collect::<Result<_, _>>();
            instances.push(handles.map_err(LoadError::Thread)?);
        }
        let metrics = ModelMetrics::new(&key.model, key.version, metrics::triton::recorder(&key.model, key.version, took));
        let memory_bytes = instances.iter().flatten().map(PlacedModel::memory_bytes).sum();
        let contract = Arc::new(contract);
        let runner = runner(&contract, instances, initial, self.bounds, &metrics);
        Ok(ServedModel { key, generation, contract, config, runner, metrics, devices, memory_bytes })
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
