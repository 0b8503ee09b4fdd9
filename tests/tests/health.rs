//! Devices that fail, and calls that never return: fenced, reported, answered for, and left behind by a new process.

use std::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use cresset_client::repository::Repository;
use cresset_proto::{
    admin::v1::{StatusResponse, WorkerState},
    fleet::v1::{Assignment, Intent, ObservedReplica, ReplicaState},
    inference::{ModelInferRequest, ModelInferResponse},
    reason::Reason,
};
use cresset_tests::harness::{ModelRepository, fp32_model};
use cresset_worker::{
    engine::{
        Datatype, Device, Engine, EngineError, Generation, InputParts, LoadSpec, Model, OutputTensor, Outputs, SequenceModel,
        Signature, Timing,
        device::DeviceThread,
        testing::{Script, plus_one as plus_one_script},
    },
    error::PredictError,
    models::{Models, Runner},
    predict::Worker,
    queue::Bounds,
};
use prost::Message;
use tokio::{sync::Notify, task::JoinHandle, time::timeout};
use tonic::Code;

use crate::support::{Load, PATIENCE, Target, admin, cluster, holders, inference, numbers, plus_one, row, until_ready};

/// A request that begins with this never comes back.
const POISON: f32 = 666.0;
/// A request that begins with this waits until the gate opens.
const GATED: f32 = 7.0;

/// Opens once, for everybody.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }

    fn wait(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
    }
}

/// An engine without libtorch whose device can fall sick, and whose calls stay away as long as the test wants.
#[derive(Default)]
struct Fake {
    sick: AtomicBool,
    gate: Arc<Gate>,
    /// Told when a call waits at the gate.
    inside: Arc<Notify>,
    end: Arc<Gate>,
    /// Whether loads stay away until the end.
    loads_hang: AtomicBool,
}

impl Engine for Fake {
    fn load(&self, _: &LoadSpec) -> Result<Box<dyn Model>, EngineError> {
        if self.loads_hang.load(Ordering::SeqCst) {
            self.end.wait();
        }
        let (gate, inside, end) = (Arc::clone(&self.gate), Arc::clone(&self.inside), Arc::clone(&self.end));
        Ok(Box::new(FakeModel { gate, inside, end, signature: Signature::default() }))
    }

    fn try_device(&self, _: Device) -> Result<(), EngineError> {
        if self.sick.load(Ordering::SeqCst) { Err(EngineError::Failed("one and one is three".into())) } else { Ok(()) }
    }

    fn name(&self) -> &'static str {
        "fake"
    }
}

struct FakeModel {
    gate: Arc<Gate>,
    inside: Arc<Notify>,
    end: Arc<Gate>,
    signature: Signature,
}

impl Model for FakeModel {
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        let first = |bytes: &bytes::Bytes| f32::from_le_bytes(bytes[..4].try_into().unwrap());
        let firsts: Vec<f32> = inputs[0].parts.iter().map(first).collect();
        if firsts.contains(&GATED) {
            self.inside.notify_one();
            self.gate.wait();
        }
        if firsts.contains(&POISON) {
            self.end.wait();
        }
        let (datatype, shape) = (Datatype::Fp32, inputs[0].shape.clone());
        let tensors = vec![OutputTensor { datatype, shape, data: inputs[0].parts.concat().into() }];
        Ok(Outputs { tensors, timing: Timing::of_model(std::time::Instant::now()) })
    }

    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError> {
        Err(EngineError::Failed("no state".into()))
    }

    fn open_generation(&mut self, _: &[InputParts]) -> Result<Box<dyn Generation>, EngineError> {
        Err(EngineError::Failed("one answer".into()))
    }

    fn memory_bytes(&self) -> u64 {
        1
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }
}

/// A worker's models over the fake, watched.
struct Ward {
    worker: Arc<Worker>,
    engine: Arc<Fake>,
    watching: JoinHandle<()>,
    assignment: Assignment,
    _models: ModelRepository,
}

impl Ward {
    /// Serves `plus_one` with this limit of a call, in ms.
    async fn open(limit_ms: u64) -> Self {
        let parameter = format!(
            "dynamic_batching {{ }}\nparameters {{ key: \"cresset.max_execution_ms\" value: {{ string_value: \"{limit_ms}\" }} }}"
        );
        let models =
            ModelRepository::new().unwrap().with_script("plus_one", &fp32_model(2, &parameter), &plus_one_script()).unwrap();
        let store = Repository::new(models.path());
        let engine = Arc::new(Fake::default());
        let bounds = Bounds { requests_max: 16, bytes_max: 1 << 20 };
        let device = DeviceThread::spawn(Device::Cpu).unwrap();
        let served = Models::new(store.clone(), Arc::clone(&engine) as _, vec![device], bounds);
        let watching = tokio::spawn(served.clone().watch_devices());
        let worker = Worker::new("w1".parse().unwrap(), 1, served);
        let stored = store.read("plus_one", None).unwrap();
        let config = stored.config.encode_to_vec().into();
        let assignment =
            Assignment { model: stored.name, version: 1, shard: 0, generation: 1, config, digest: stored.digest, stored: false };
        let ward = Self { worker, engine, watching, assignment, _models: models };
        ward.deploy(1);
        ward.seen(ReplicaState::Ready).await;
        ward
    }

    /// Assigns the model in this generation.
    fn deploy(&self, generation: u64) {
        let assignment = Assignment { generation, ..self.assignment.clone() };
        self.worker.models.act_on(&Intent { epoch: generation, assignments: vec![assignment] }).unwrap();
    }

    /// Waits until the leader would be told this of the replica.
    async fn seen(&self, state: ReplicaState) -> ObservedReplica {
        let mut changes = self.worker.models.changes();
        let told = async {
            loop {
                changes.mark_unchanged();
                if let Some(replica) = self.worker.models.observed().into_iter().find(|replica| replica.state() == state) {
                    return replica;
                }
                changes.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, told).await.unwrap_or_else(|_| panic!("never {state:?}: {:?}", self.worker.models.observed()))
    }

    fn ask(&self, first: f32) -> JoinHandle<Result<ModelInferResponse, PredictError>> {
        tokio::spawn(self.worker.begin(row("plus_one", &[first]), None, tracing::Span::none()))
    }

    async fn reason(&self, asked: JoinHandle<Result<ModelInferResponse, PredictError>>) -> (Reason, String) {
        let error = timeout(PATIENCE, asked).await.expect("nobody waits for what was given up").unwrap().unwrap_err();
        (error.reason(), error.to_string())
    }

    /// Waits until so many requests are in the queue.
    async fn waiting(&self, requests: usize) {
        let served = self.worker.models.find("plus_one", "").unwrap();
        let Runner::Queue(queue) = &served.runner else { panic!("not a queue") };
        let in_line = async {
            while queue.len() != requests {
                tokio::task::yield_now().await;
            }
        };
        timeout(PATIENCE, in_line).await.expect("requests get into the queue");
    }
}

impl Drop for Ward {
    fn drop(&mut self) {
        self.watching.abort();
        self.engine.gate.open();
        self.engine.end.open();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_that_never_ends_has_failed_and_the_next_one_begins() {
    let ward = Ward::open(0).await;
    ward.worker.models.set_load_max_ms(100);
    ward.engine.loads_hang.store(true, Ordering::SeqCst);
    ward.deploy(2);
    let failed = ward.seen(ReplicaState::Failed).await;
    assert_eq!(failed.reason, "loading took longer than the worker's max-load-ms, which is 100");
    ward.ask(1.0).await.unwrap().expect("what was served before goes on");
    ward.engine.loads_hang.store(false, Ordering::SeqCst);
    ward.deploy(3);
    ward.seen(ReplicaState::Ready).await;
    ward.ask(1.0).await.unwrap().unwrap();
    // A thread each; more of them than four are refused without one.
    ward.engine.loads_hang.store(true, Ordering::SeqCst);
    for generation in 4..7 {
        ward.deploy(generation);
        assert!(ward.seen(ReplicaState::Failed).await.reason.contains("max-load-ms, which is 100"));
    }
    ward.deploy(7);
    let refused = ward.seen(ReplicaState::Failed).await.reason;
    assert!(refused.starts_with("4 loads of this worker") && refused.ends_with("until it is started again"), "{refused}");
    ward.engine.loads_hang.store(false, Ordering::SeqCst);
    ward.engine.end.open();
    // Threads that have ended count no more.
    let mut generation = 8;
    loop {
        ward.deploy(generation);
        let mut changes = ward.worker.models.changes();
        let ended = async {
            loop {
                let state = ward.worker.models.observed()[0].state();
                if state != ReplicaState::Loading {
                    return state;
                }
                changes.changed().await.unwrap();
            }
        };
        if timeout(PATIENCE, ended).await.expect("a load ends") == ReplicaState::Ready {
            break;
        }
        generation += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_device_that_fails_its_canary_is_fenced_until_one_succeeds() {
    let ward = Ward::open(0).await;
    ward.ask(1.0).await.unwrap().unwrap();
    ward.engine.sick.store(true, Ordering::SeqCst);
    let failed = ward.seen(ReplicaState::Failed).await;
    assert_eq!(failed.reason, "cpu is fenced: a canary inference failed: the model failed: one and one is three");
    let (reason, text) = ward.reason(ward.ask(1.0)).await;
    assert_eq!(reason, Reason::DeviceUnhealthy, "{text}");
    assert!(!ward.worker.models.devices().given_up().is_cancelled(), "it may get well");
    ward.engine.sick.store(false, Ordering::SeqCst);
    ward.seen(ReplicaState::Ready).await;
    ward.ask(1.0).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_runs_too_long_is_answered_for_and_so_is_what_waits_behind_it() {
    let ward = Ward::open(2_000).await;
    let gated = ward.ask(GATED);
    timeout(PATIENCE, ward.engine.inside.notified()).await.expect("it gets to the model");
    // Two fit into a batch: the third waits behind them.
    let mut asked = vec![];
    for first in [POISON, 1.0, 2.0] {
        asked.push(ward.ask(first));
        ward.waiting(asked.len()).await;
    }
    ward.engine.gate.open();
    gated.await.unwrap().unwrap();
    let mut reasons = vec![];
    for asked in asked {
        reasons.push(ward.reason(asked).await);
    }
    let words: Vec<Reason> = reasons.iter().map(|(reason, _)| *reason).collect();
    assert_eq!(words, [Reason::Suspect, Reason::Suspect, Reason::DeviceUnhealthy], "{reasons:?}");
    assert!(reasons.iter().all(|(_, text)| text.contains("max_execution_ms, which is 2000")), "{reasons:?}");
    timeout(PATIENCE, ward.worker.models.devices().given_up().cancelled()).await.expect("this process is given up");
    assert!(ward.seen(ReplicaState::Failed).await.reason.contains("max_execution_ms"));
    assert_eq!(ward.reason(ward.ask(1.0)).await.0, Reason::DeviceUnhealthy);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_ran_too_long_alone_is_to_blame() {
    let ward = Ward::open(500).await;
    let (reason, text) = ward.reason(ward.ask(POISON)).await;
    assert_eq!(reason, Reason::ModelFailed, "it would hold the next worker too: {text}");
    assert_eq!(text, "model 'plus_one': a call of model 'plus_one' ran longer than its max_execution_ms, which is 500");
}

/// Ids, incarnations and whether they serve, of all workers.
fn lives(status: &StatusResponse) -> Vec<(String, u64)> {
    let ready = status.workers.iter().filter(|worker| worker.state() == WorkerState::Ready);
    let mut lives: Vec<_> = ready.map(|worker| (worker.id.clone(), worker.incarnation)).collect();
    lives.sort();
    lives
}

/// `forward` never returns for a request that begins with the magic number.
fn hanging() -> Script {
    Script::new(&format!("def forward(self, x):\n  while bool((x == {POISON:?}).any()):\n    x = x * 1\n  return x + 1\n"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_with_a_call_that_never_returns_hands_over_and_starts_again() {
    let parameter = "dynamic_batching { }\nparameters { key: \"cresset.max_execution_ms\" value: { string_value: \"1500\" } }";
    let repository = plus_one().with_script("hang", &fp32_model(8, parameter), &hanging()).unwrap();
    let mut cluster = cluster(1, 2, &repository, &["plus_one", "hang"]);
    for model in ["plus_one", "hang"] {
        until_ready(&cluster, model).await;
    }
    let mut service = inference(&cluster, "c1").await;
    let before = lives(
        &admin(&cluster, "c1").await.status(cresset_proto::admin::v1::StatusRequest::default()).await.unwrap().into_inner(),
    );
    assert_eq!(before.len(), 2);
    let load = Load::start(&[Target::Gateway(service.clone()), Target::Client(Arc::new(cluster.client().await.unwrap()))], 2);
    load.more(100).await;

    let poison: ModelInferRequest = row("hang", &[POISON]);
    let held = timeout(PATIENCE, service.model_infer(poison)).await.expect("it is given up").unwrap_err();
    assert_eq!(held.code(), Code::Internal, "{held:?}");
    assert!(held.message().contains("ran longer than its max_execution_ms, which is 1500"), "{held:?}");
    // The other replica answers meanwhile.
    assert_eq!(numbers(&service.model_infer(row("hang", &[1.0])).await.unwrap().into_inner()), [2.0]);

    let again = |status: &StatusResponse| {
        let after = lives(status);
        let reborn = after.iter().zip(&before).filter(|(now, then)| now.0 == then.0 && now.1 > then.1).count();
        let whole = holders(status, "hang").len() == 2 && holders(status, "plus_one").len() == 2;
        (after.len() == 2 && reborn == 1 && whole).then_some(())
    };
    cluster.wait_for("one worker in a new life, both with all models", PATIENCE, again).await.unwrap();
    load.more(100).await;
    let outcome = load.end().await;
    assert!(outcome.failures.is_empty(), "{outcome:?}");

    // Its process is the same to everybody outside: `cresset up` has seen no death, and its end is still the worker's.
    for id in cluster.ids() {
        assert!(cluster.process(&id).unwrap().is_alive(), "{id} died");
    }
    cluster.kill_up().unwrap();
    for id in ["w1", "w2"] {
        cluster.process(id).unwrap().wait(Duration::from_secs(20)).unwrap();
    }
}
