//! One worker's data path in this process: queue, batches, deadlines, sequences, models that come and go under load.
//!
//! The device is a real thread with real libtorch. Where an order matters, the test's runtime has one thread: requests that
//! are joined enter the queue before anything is cut from it.
mod features;
mod overload;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use cresset_client::repository::Repository;
use cresset_proto::{
    fleet::v1::{Assignment, Intent, ReplicaState},
    ids::SequenceId,
    inference::{
        ModelInferRequest, ModelInferResponse,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    parameters::{bool_parameter, int64_parameter, keys},
    reason::Reason,
};
use cresset_tests::harness::{ModelRepository, fp32_model};
use cresset_worker::{
    engine::{
        Device, Engine, TorchEngine,
        device::DeviceThread,
        testing::{self, Script},
    },
    error::PredictError,
    models::{Models, Runner},
    predict::Worker,
    queue::{Bounds, Terms},
    sequence::Standing,
};
use futures::future::join_all;
use prost::Message;
use tokio::{sync::watch, time::timeout};
use tonic::Code;

/// Longer than any of this takes.
const PATIENCE: Duration = Duration::from_secs(60);
const AMPLE: Bounds = Bounds { requests_max: 1000, bytes_max: 1 << 30 };
/// Long enough to be waited behind, short enough to be waited for.
const SLOW_ROUNDS: u32 = 40_000;

/// A worker without a cluster.
struct Bench {
    worker: Arc<Worker>,
    store: Repository,
    epoch: u64,
    _models: ModelRepository,
}

impl Bench {
    async fn serving(models: ModelRepository, names: &[&str], bounds: Bounds) -> Self {
        Self::on(Arc::new(TorchEngine), models, names, bounds).await
    }

    async fn on(engine: Arc<dyn Engine>, models: ModelRepository, names: &[&str], bounds: Bounds) -> Self {
        let store = Repository::new(models.path());
        let device = DeviceThread::spawn(Device::Cpu).unwrap();
        let served = Models::new(store.clone(), engine, vec![device], bounds);
        let worker = Worker::new("w1".parse().unwrap(), 1, served);
        let mut bench = Self { worker, store, epoch: 0, _models: models };
        bench.assign(names);
        bench.settled(names.len()).await;
        bench
    }

    /// Asks for these models and no others.
    fn assign(&mut self, names: &[&str]) {
        self.epoch += 1;
        let assignments = names.iter().map(|name| {
            let stored = self.store.read(name, None).unwrap();
            let config = stored.config.encode_to_vec().into();
            Assignment { model: stored.name, version: 1, shard: 0, generation: 1, config, digest: stored.digest, stored: false }
        });
        let intent = Intent { epoch: self.epoch, assignments: assignments.collect() };
        self.worker.models.act_on(&intent).unwrap();
    }

    /// Waits until this many replicas are there and none of them is still loading.
    async fn settled(&self, replicas: usize) {
        let models = &self.worker.models;
        let mut changes = models.changes();
        let all = async {
            loop {
                changes.mark_unchanged();
                let observed = models.observed();
                let is_settled = |state| matches!(state, ReplicaState::Ready | ReplicaState::Failed);
                if observed.len() == replicas && observed.iter().all(|replica| is_settled(replica.state())) {
                    return;
                }
                changes.changed().await.unwrap();
            }
        };
        timeout(PATIENCE, all).await.expect("models don't settle");
    }

    async fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse, PredictError> {
        self.infer_until(request, None).await
    }

    async fn infer_until(
        &self,
        request: ModelInferRequest,
        deadline: Option<Instant>,
    ) -> Result<ModelInferResponse, PredictError> {
        let answer = self.worker.begin(request, deadline, tracing::Span::none());
        timeout(PATIENCE, answer).await.expect("no answer")
    }
}

/// A request of `rows` rows with one value each.
fn batch_of(model: &str, values: &[f32]) -> ModelInferRequest {
    let mut request = vector(model, values);
    request.inputs[0].shape = vec![values.len() as i64, 1];
    request
}

/// A request for a model without a batch dimension.
fn vector(model: &str, values: &[f32]) -> ModelInferRequest {
    let input = InferInputTensor {
        name: "x".into(),
        datatype: "FP32".into(),
        shape: vec![values.len() as i64],
        ..InferInputTensor::default()
    };
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    ModelInferRequest {
        model_name: model.into(),
        inputs: vec![input],
        raw_input_contents: vec![Bytes::from(data)],
        ..ModelInferRequest::default()
    }
}

fn step(model: &str, sequence: i64, value: f32, (start, end): (bool, bool)) -> ModelInferRequest {
    let mut request = vector(model, &[value]);
    request.parameters.insert(keys::SEQUENCE_ID.into(), int64_parameter(sequence));
    request.parameters.insert(keys::SEQUENCE_START.into(), bool_parameter(start));
    request.parameters.insert(keys::SEQUENCE_END.into(), bool_parameter(end));
    request
}

fn values(response: &ModelInferResponse) -> Vec<f32> {
    let bytes = response.raw_output_contents[0].chunks_exact(4);
    bytes.map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
}

fn reason<T>(answer: &Result<T, PredictError>) -> Option<Reason> {
    answer.as_ref().err().map(PredictError::reason)
}

/// Says how many rows shared its batch, and raises if any of them is negative.
fn crowd() -> Script {
    Script::new("def forward(self, x):\n  assert float(x.min()) >= 0.0, \"a negative element\"\n  return x * 0 + x.size(0)\n")
}

/// Says how often it was run; takes long if the first number is negative.
fn counting() -> Script {
    // Nothing that libtorch would share out among threads: on a busy machine they would wait for each other.
    Script::new(&format!(
        "def forward(self, x):\n  self.calls += 1\n  if float(x[0]) < 0.0:\n    m = self.vector\n    for i in range({SLOW_ROUNDS}):\n      \
         m = torch.tanh(m + 0.1)\n    x = x + m[0] * 0\n  return x * 0 + self.calls\n"
    ))
    .attribute("calls", "int", "0")
    .parameter("vector", "torch.ones([16])")
}

/// Makes requests wait until a batch is full, but no longer than this.
fn waiting_for_more(delay_us: u64) -> String {
    format!("dynamic_batching {{ max_queue_delay_microseconds: {delay_us} }}")
}

fn one_by_one(more: &str) -> String {
    fp32_model(0, more)
}

fn sequences(sequences_max: usize, idle_us: u64) -> String {
    one_by_one(&format!(
        "sequence_batching {{ max_sequence_idle_microseconds: {idle_us} oldest {{ max_candidate_sequences: {sequences_max} }} }}"
    ))
}

#[tokio::test]
async fn a_full_queue_refuses_at_once_and_serves_again() {
    let models = ModelRepository::new().unwrap();
    models.add_script("m", &fp32_model(8, &waiting_for_more(50_000)), &testing::plus_one()).unwrap();
    let bench = Bench::serving(models, &["m"], Bounds { requests_max: 2, ..AMPLE }).await;
    let answers = join_all((0..8).map(|_| bench.infer(batch_of("m", &[1.0])))).await;
    let refused: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert_eq!(refused.len(), 6, "{answers:?}");
    for error in refused {
        assert_eq!((error.reason(), error.status().code()), (Reason::QueueFull, Code::Unavailable));
        assert!(error.to_string().starts_with("Exceeds maximum queue size"), "{error}");
    }
    assert_eq!(values(&bench.infer(batch_of("m", &[1.0])).await.unwrap()), [2.0]);
}

#[tokio::test]
async fn a_queue_is_bounded_in_bytes_too_but_takes_a_large_request_when_empty() {
    let models = ModelRepository::new().unwrap();
    let echo = Script::new("def forward(self, x):\n  return x\n");
    models.add_script("echo", &fp32_model(8, &waiting_for_more(50_000)), &echo).unwrap();
    let bench = Bench::serving(models, &["echo"], Bounds { bytes_max: 10, ..AMPLE }).await;
    let large = [1.0; 4];
    let answers = join_all([&large[..], &[1.0][..]].map(|values| bench.infer(batch_of("echo", values)))).await;
    assert_eq!(answers.iter().map(reason).collect::<Vec<_>>(), [None, Some(Reason::QueueFull)]);
}

#[tokio::test]
async fn a_request_that_makes_the_model_raise_does_not_fail_its_batch() {
    let models = ModelRepository::new().unwrap();
    models.add_script("crowd", &fp32_model(8, &waiting_for_more(60_000_000)), &crowd()).unwrap();
    let bench = Bench::serving(models, &["crowd"], AMPLE).await;
    let ask = |value: f32| bench.infer(batch_of("crowd", &[value]));
    let good = join_all((0..8u8).map(|value| ask(value.into()))).await;
    for answer in good {
        assert_eq!(values(&answer.unwrap()), [8.0], "they didn't share a batch");
    }
    let answers = join_all((0..8u8).map(|value| ask(if value == 3 { -1.0 } else { value.into() }))).await;
    for (number, answer) in answers.into_iter().enumerate() {
        match answer {
            Err(error) => {
                assert_eq!((number, error.status().code()), (3, Code::Internal));
                assert!(error.to_string().contains("a negative element"), "{error}");
            }
            Ok(response) => assert!(number != 3 && values(&response) == [1.0], "{number}: {response:?}"),
        }
    }
}

#[tokio::test]
async fn requests_of_many_sizes_and_shapes_get_their_own_rows_back() {
    let models = ModelRepository::new().unwrap();
    let twice = Script::new("def forward(self, x):\n  return x * 2\n");
    models.add_script("twice", &fp32_model(8, ""), &twice).unwrap();
    let bench = Bench::serving(models, &["twice"], AMPLE).await;
    let requests = (1..=60usize).map(|number| {
        let (rows, columns) = (number % 8 + 1, number % 3 + 1);
        let given: Vec<f32> = (0..rows * columns).map(|at| (number * 100 + at) as f32).collect();
        let mut request = vector("twice", &given);
        request.inputs[0].shape = vec![rows as i64, columns as i64];
        let bench = &bench;
        async move { (given, vec![rows as i64, columns as i64], bench.infer(request).await.unwrap()) }
    });
    for (given, shape, response) in join_all(requests).await {
        assert_eq!(response.outputs[0].shape, shape);
        assert_eq!(values(&response), given.iter().map(|value| value * 2.0).collect::<Vec<_>>());
    }
}

/// A worker whose model counts its calls, and takes long for a negative number: so many requests for that come first.
async fn busy() -> (Bench, f32) {
    let models = ModelRepository::new().unwrap();
    models.add_script("counting", &one_by_one(""), &counting()).unwrap();
    let bench = Bench::serving(models, &["counting"], AMPLE).await;
    let so_far = values(&bench.infer(vector("counting", &[0.0])).await.unwrap())[0];
    (bench, so_far)
}

#[tokio::test]
async fn a_request_whose_deadline_passed_is_never_run() {
    let (bench, so_far) = busy().await;
    let slow = join_all((0..3).map(|_| bench.infer(vector("counting", &[-1.0]))));
    let deadline = Some(Instant::now() + Duration::from_millis(20));
    let late = join_all((0..5).map(|_| bench.infer_until(vector("counting", &[0.0]), deadline)));
    let (slow, late) = futures::join!(slow, late);
    assert!(slow.iter().all(Result::is_ok));
    for answer in late {
        assert_eq!(reason(&answer), Some(Reason::DeadlineExceeded), "{answer:?}");
    }
    assert_eq!(values(&bench.infer(vector("counting", &[0.0])).await.unwrap()), [so_far + 4.0], "expired requests were run");
}

#[tokio::test]
async fn a_request_whose_caller_left_is_never_run() {
    let (bench, so_far) = busy().await;
    let slow = join_all((0..3).map(|_| bench.infer(vector("counting", &[-1.0]))));
    let mut left = Box::pin(join_all((0..5).map(|_| bench.infer(vector("counting", &[0.0])))));
    let gone = async move {
        // Enough to enter the queue, and then it is dropped.
        assert!(futures::poll!(&mut left).is_pending());
        drop(left);
    };
    let (slow, ()) = futures::join!(slow, gone);
    assert!(slow.iter().all(Result::is_ok));
    assert_eq!(values(&bench.infer(vector("counting", &[0.0])).await.unwrap()), [so_far + 4.0], "abandoned requests were run");
}

#[tokio::test]
async fn those_who_left_make_nobody_late() {
    let (bench, _) = busy().await;
    let slow = || bench.infer(vector("counting", &[-1.0]));
    let began = Instant::now();
    for _ in 0..8 {
        slow().await.unwrap();
    }
    // Far more than the slow one that runs takes, and far less than a hundred of them.
    let patience = (began.elapsed() / 8) * 10;
    let hurried = || bench.infer_until(vector("counting", &[0.0]), Some(Instant::now() + patience));
    let mut runs = Box::pin(slow());
    let mut left = Box::pin(join_all((0..100).map(|_| slow())));
    assert!(futures::poll!(&mut runs).is_pending() && futures::poll!(&mut left).is_pending());
    let refused = hurried().await;
    assert!(matches!(refused, Err(PredictError::TooLate { .. })), "{refused:?}");
    drop(left);
    let (_, answer) = futures::join!(runs, hurried());
    answer.unwrap();
}

/// Calls a model without a pause and counts what was served and what was refused, which only "goes" may do.
async fn call_until(name: &str, worker: Arc<Worker>, counts: watch::Sender<(u32, u32)>, stopped: watch::Receiver<bool>) {
    while !*stopped.borrow() {
        let answer = worker.begin(batch_of(name, &[1.0, 2.0]), None, tracing::Span::none());
        match timeout(PATIENCE, answer).await.expect("a request was forgotten") {
            Ok(response) => {
                assert_eq!(values(&response), [2.0, 3.0]);
                counts.send_modify(|(served, _)| *served += 1);
            }
            Err(error) => {
                let expected = matches!(error.reason(), Reason::UnknownModel | Reason::NotHere);
                assert!(expected && name == "goes", "{name}: {error}");
                counts.send_modify(|(_, refused)| *refused += 1);
                // Unlike an answer, a refusal doesn't wait for anything.
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Waits until each caller's counts have moved as they should from where they are now.
async fn everybody(callers: &mut [(&str, watch::Receiver<(u32, u32)>)], moved: impl Fn(&str, (u32, u32), (u32, u32)) -> bool) {
    for (name, seen) in callers {
        let before = *seen.borrow();
        let enough = seen.wait_for(|counts| moved(name, *counts, before));
        timeout(PATIENCE, enough).await.expect("a caller stands still").expect("a caller has ended");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_come_and_go_under_load() {
    let models = ModelRepository::new().unwrap();
    for name in ["stays", "goes"] {
        models.add_script(name, &fp32_model(8, ""), &testing::plus_one()).unwrap();
    }
    models.add_bytes("corrupt", &fp32_model(8, ""), b"no archive").unwrap();
    let mut bench = Bench::serving(models, &["stays", "goes"], AMPLE).await;
    let (stop, stopped) = watch::channel(false);
    let mut progress = Vec::new();
    let mut callers = Vec::new();
    for name in ["stays", "goes"].repeat(3) {
        let (counts, seen) = watch::channel((0_u32, 0_u32));
        progress.push((name, seen));
        callers.push(tokio::spawn(call_until(name, Arc::clone(&bench.worker), counts, stopped.clone())));
    }
    for _ in 0..10 {
        bench.assign(&["stays", "corrupt"]);
        bench.settled(2).await;
        everybody(
            &mut progress,
            |name, (served, refused), before| {
                if name == "goes" { refused > before.1 } else { served > before.0 }
            },
        )
        .await;
        bench.assign(&["stays", "goes"]);
        bench.settled(2).await;
        // It answers again.
        everybody(&mut progress, |_, (served, _), before| served > before.0).await;
    }
    stop.send_replace(true);
    for (caller, (name, seen)) in join_all(callers).await.into_iter().zip(progress) {
        caller.unwrap();
        assert_eq!(name == "goes", seen.borrow().1 > 0, "{name}: {:?}", *seen.borrow());
    }
    assert_eq!(bench.worker.in_flight(), 0);
}

#[tokio::test]
async fn files_that_changed_since_the_deployment_are_not_loaded() {
    let models = ModelRepository::new().unwrap();
    models.add_script("m", &fp32_model(8, ""), &testing::plus_one()).unwrap();
    let mut bench = Bench::serving(models, &[], AMPLE).await;
    let stored = bench.store.read("m", None).unwrap();
    std::fs::write(&stored.file, b"something else").unwrap();
    let config = stored.config.encode_to_vec().into();
    let assignment =
        Assignment { model: "m".into(), version: 1, shard: 0, generation: 1, config, digest: stored.digest, stored: false };
    bench.epoch += 1;
    bench.worker.models.act_on(&Intent { epoch: bench.epoch, assignments: vec![assignment] }).unwrap();
    bench.settled(1).await;
    let replica = bench.worker.models.observed().remove(0);
    assert_eq!(replica.state(), ReplicaState::Failed);
    assert!(replica.reason.contains("SHA-256"), "{}", replica.reason);
    assert_eq!(reason(&bench.infer(batch_of("m", &[1.0])).await), Some(Reason::UnknownModel));
}

#[tokio::test]
async fn sequences_have_a_limit_and_an_end_makes_room() {
    let models = ModelRepository::new().unwrap();
    models.add_script("sum", &sequences(2, 60_000_000), &testing::running_sum()).unwrap();
    let bench = Bench::serving(models, &["sum"], AMPLE).await;
    for id in [1, 2] {
        bench.infer(step("sum", id, 1.0, (true, false))).await.unwrap();
    }
    let served = bench.worker.models.find("sum", "").unwrap();
    let Runner::Sequences(line) = &served.runner else { panic!("not a model with sequences") };
    // A router is told at once, so that it can ask another replica.
    let third = line.open(None).await.map(drop);
    assert_eq!(reason(&third), Some(Reason::SequencesFull));
    assert_eq!(third.unwrap_err().status().code(), Code::Unavailable);
    assert_eq!(values(&bench.infer(step("sum", 1, 1.0, (false, true))).await.unwrap()), [2.0]);
    assert_eq!(values(&bench.infer(step("sum", 3, 5.0, (true, false))).await.unwrap()), [5.0]);
    assert_eq!(values(&bench.infer(step("sum", 2, 1.0, (false, false))).await.unwrap()), [2.0]);
}

#[tokio::test]
async fn many_sequences_at_once_keep_their_order_and_their_state() {
    let models = ModelRepository::new().unwrap();
    models.add_script("sum", &sequences(64, 60_000_000), &testing::running_sum()).unwrap();
    let bench = Bench::serving(models, &["sum"], AMPLE).await;
    // Begun in order and all at once: requests of one sequence don't wait for each other's answers.
    let steps = (0..20).flat_map(|at| (1..=50i64).map(move |id| (id, at)));
    let answers = join_all(steps.clone().map(|(id, at)| bench.infer(step("sum", id, id as f32, (at == 0, at == 19))))).await;
    for ((id, at), answer) in steps.zip(answers) {
        assert_eq!(values(&answer.unwrap()), [(id * (at + 1)) as f32], "sequence {id}, request {at}");
    }
    let served = bench.worker.models.find("sum", "").unwrap();
    let Runner::Sequences(sequences) = &served.runner else { panic!("not a model with sequences") };
    assert_eq!(sequences.live(), 0);
}

#[tokio::test]
async fn a_silent_sequence_is_over_after_its_idle_time() {
    let models = ModelRepository::new().unwrap();
    models.add_script("sum", &sequences(1, 50_000), &testing::running_sum()).unwrap();
    let bench = Bench::serving(models, &["sum"], AMPLE).await;
    bench.infer(step("sum", 1, 1.0, (true, false))).await.unwrap();
    let served = bench.worker.models.find("sum", "").unwrap();
    let Runner::Sequences(sequences) = &served.runner else { panic!("not a model with sequences") };
    timeout(PATIENCE, sequences.empty()).await.expect("the sequence stays");
    let late = bench.infer(step("sum", 1, 1.0, (false, false))).await;
    assert_eq!(reason(&late), Some(Reason::SequenceNotStarted));
    assert_eq!(values(&bench.infer(step("sum", 2, 7.0, (true, true))).await.unwrap()), [7.0], "its room is free");
}

#[tokio::test]
async fn a_checkpoint_continues_a_sequence_elsewhere_with_every_bit() {
    let models = ModelRepository::new().unwrap().with_demo("silero_vad").unwrap();
    let bench = Bench::serving(models, &["silero_vad"], AMPLE).await;
    let served = bench.worker.models.find("silero_vad", "").unwrap();
    let Runner::Sequences(sequences) = &served.runner else { panic!("not a model with sequences") };
    let chunk = |at: usize| {
        let values: Vec<f32> = (0..512).map(|n| ((at * 512 + n) as f32 * 0.05).sin() * 0.3).collect();
        let mut request = vector("silero_vad", &values);
        request.inputs[0].shape = vec![1, 512];
        cresset_worker::predict::admit(&served, &mut request).unwrap()
    };
    let id = SequenceId::Number(1);
    let standing = Standing { id: &id, start: false, end: false };
    let mut one = sequences.open(None).await.unwrap();
    for at in 0..7 {
        one.step(chunk(at), standing, Terms::default(), false).await.unwrap();
    }
    let checkpoint = one.step(chunk(7), standing, Terms::default(), true).await.unwrap().checkpoint.unwrap();
    let mut other = sequences.open(Some(checkpoint)).await.unwrap();
    for at in 8..16 {
        let (here, there) = (
            one.step(chunk(at), standing, Terms::default(), false).await.unwrap(),
            other.step(chunk(at), standing, Terms::default(), false).await.unwrap(),
        );
        assert_eq!(here.outputs, there.outputs, "chunk {at}");
    }
    assert!(sequences.open(Some(Bytes::from_static(b"no checkpoint"))).await.is_err());
}

#[tokio::test]
async fn a_model_that_returns_other_than_promised_is_told_apart_from_a_wrong_request() {
    let models = ModelRepository::new().unwrap();
    let cut = Script::new("def forward(self, x):\n  return x[:1]\n");
    models.add_script("loses_rows", &fp32_model(8, ""), &cut).unwrap();
    let wide = Script::new("def forward(self, x):\n  return x.double()\n");
    models.add_script("other_type", &fp32_model(8, ""), &wide).unwrap();
    let bench = Bench::serving(models, &["loses_rows", "other_type"], AMPLE).await;
    for (model, words) in [("loses_rows", "shape"), ("other_type", "FP64")] {
        let error = bench.infer(batch_of(model, &[1.0, 2.0])).await.unwrap_err();
        assert_eq!(error.status().code(), Code::Internal, "{error}");
        assert!(error.to_string().contains(model) && error.to_string().contains(words), "{error}");
    }
    let mut asking = batch_of("loses_rows", &[1.0]);
    asking.outputs.push(InferRequestedOutputTensor { name: "nope".into(), ..Default::default() });
    assert_eq!(bench.infer(asking).await.unwrap_err().status().code(), Code::InvalidArgument);
}
