//! Requests against a worker with real models of every kind.
use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use cresset_client::repository::Repository;
use cresset_proto::{
    fleet::v1::{Assignment, Intent, ReplicaState},
    inference::{
        InferParameter, InferTensorContents, ModelInferRequest, ModelInferResponse,
        infer_parameter::ParameterChoice,
        model_infer_request::{InferInputTensor, InferRequestedOutputTensor},
    },
    parameters::keys,
    reason::Reason,
};
use cresset_tests::harness::{ModelRepository, fp32_model};
use cresset_worker::{
    engine::{
        Device, TorchEngine,
        device::DeviceThread,
        testing::{self, Script},
    },
    error::PredictError,
    models::Models,
    predict::{Begun, Worker},
    queue::Bounds,
};
use futures::StreamExt;
use prost::Message;
use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use tokio::time::timeout;

use crate::{Cases, bounded, random, scramble};

const MODELS: [&str; 5] = ["rows", "one", "words", "sums", "repeat"];
const NAMES: [&str; 9] = ["rows", "one", "words", "sums", "repeat", "x", "y", "count", ""];
const DATATYPES: [&str; 16] = [
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES", "BF16",
    "", "fp32",
];
const PATIENCE: Duration = Duration::from_secs(60);

async fn worker(repository: &ModelRepository) -> Arc<Worker> {
    let sequences = "sequence_batching { max_sequence_idle_microseconds: 1000 oldest { max_candidate_sequences: 4 } }";
    repository.add_script("rows", &fp32_model(4, ""), &testing::plus_one()).unwrap();
    repository.add_script("one", &fp32_model(0, ""), &testing::raises_on_negative()).unwrap();
    repository.add_script("sums", &fp32_model(0, sequences), &testing::running_sum()).unwrap();
    let words = "max_batch_size: 4 input [ { name: \"x\" data_type: TYPE_STRING dims: [ -1 ] } ] \
                 output [ { name: \"y\" data_type: TYPE_STRING dims: [ -1 ] } ]";
    repository.add_script("words", words, &Script::new("def forward(self, x: List[str]) -> List[str]:\n  return x\n")).unwrap();
    let repeat = "max_batch_size: 0 input [ { name: \"count\" data_type: TYPE_INT64 dims: [ 1 ] } ] \
                  output [ { name: \"y\" data_type: TYPE_INT64 dims: [ 1 ] } ] model_transaction_policy { decoupled: true }";
    let repeating = Script::new(
        "def forward(self, count):\n  self.left = min(int(count), 5)\n\ndef next(self) -> Optional[Tensor]:\n  if self.left <= 0:\n    \
         return None\n  self.left -= 1\n  return torch.tensor([self.left])\n",
    );
    repository.add_script("repeat", repeat, &repeating.attribute("left", "int", "0")).unwrap();
    let store = Repository::new(repository.path());
    let bounds = Bounds { requests_max: 64, bytes_max: 1 << 24 };
    let devices = vec![DeviceThread::spawn(Device::Cpu).unwrap()];
    let worker = Worker::new("w1".parse().unwrap(), 1, Models::new(store.clone(), Arc::new(TorchEngine), devices, bounds));
    let assignments = MODELS.map(|name| {
        let stored = store.read(name, None).unwrap();
        let config = stored.config.encode_to_vec().into();
        Assignment { model: stored.name, version: 1, shard: 0, generation: 1, config, digest: stored.digest, stored: false }
    });
    worker.models.act_on(&Intent { epoch: 1, assignments: assignments.to_vec() }).unwrap();
    let mut changes = worker.models.changes();
    let ready = async {
        while !worker.models.observed().iter().all(|replica| replica.state() == ReplicaState::Ready) {
            changes.changed().await.unwrap();
        }
    };
    timeout(PATIENCE, ready).await.expect("the models don't load");
    worker
}

#[test]
fn any_request_gets_an_answer_or_a_status() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let repository = ModelRepository::new().unwrap();
    let worker = runtime.block_on(worker(&repository));
    let (mut cases, mut decoded, mut answered) = (0u64, 0u64, 0u64);
    for case in Cases::new() {
        let mut random = random(case);
        let mut bytes = request(&mut random).encode_to_vec();
        if random.random_bool(0.3) {
            scramble(&mut bytes, &mut random);
        }
        cases += 1;
        let outcome = bounded(case, bytes.len(), || {
            let Ok(request) = ModelInferRequest::decode(Bytes::copy_from_slice(&bytes)) else { return None };
            Some(runtime.block_on(async { timeout(PATIENCE, ask(&worker, request)).await.expect("an answer") }))
        });
        match outcome {
            None => {}
            Some(Ok(responses)) => {
                (decoded, answered) = (decoded + 1, answered + 1);
                for response in responses {
                    assert_eq!(response.outputs.len(), response.raw_output_contents.len(), "CRESSET_FUZZ_CASE={case}");
                }
            }
            Some(Err(error)) => {
                decoded += 1;
                let status = error.status();
                // A panic on a device's thread is a lost device.
                let fault = matches!(error.reason(), Reason::DeviceUnhealthy | Reason::Internal | Reason::NotHere);
                assert!(!fault && !status.message().is_empty(), "CRESSET_FUZZ_CASE={case}: {status:?}");
            }
        }
    }
    // And everybody still answers.
    for name in ["rows", "one"] {
        let good = runtime.block_on(ask(&worker, valid(name)));
        assert!(good.is_ok(), "{name} after {cases} cases: {good:?}");
    }
    assert!(decoded > 0 && answered > 0, "{decoded} of {cases} were decoded, {answered} answered");
    println!("{cases} requests: {decoded} were decoded, {answered} answered");
}

async fn ask(worker: &Arc<Worker>, request: ModelInferRequest) -> Result<Vec<ModelInferResponse>, PredictError> {
    match worker.begin_any(request, None, tracing::Span::none()) {
        Begun::One(answer) => answer.await.map(|response| vec![response]),
        Begun::Many(answers) => answers.collect::<Vec<_>>().await.into_iter().collect(),
    }
}

/// A request that the model answers.
fn valid(model: &str) -> ModelInferRequest {
    let (input, datatype, shape, data) = match model {
        "rows" => ("x", "FP32", vec![2, 3], vec![0; 24]),
        "words" => ("x", "BYTES", vec![1, 2], vec![1, 0, 0, 0, 255, 0, 0, 0, 0]),
        "repeat" => ("count", "INT64", vec![1], 2i64.to_le_bytes().to_vec()),
        _ => ("x", "FP32", vec![2], vec![0; 8]),
    };
    let tensor = InferInputTensor { name: input.into(), datatype: datatype.into(), shape, ..Default::default() };
    let mut request = ModelInferRequest {
        model_name: model.into(),
        inputs: vec![tensor],
        raw_input_contents: vec![data.into()],
        ..Default::default()
    };
    if model == "sums" {
        for (key, value) in
            [(keys::SEQUENCE_ID, ParameterChoice::Int64Param(7)), (keys::SEQUENCE_START, ParameterChoice::BoolParam(true))]
        {
            request.parameters.insert(key.into(), InferParameter { parameter_choice: Some(value) });
        }
    }
    request
}

/// A valid request with some things changed.
fn request(random: &mut StdRng) -> ModelInferRequest {
    let mut request = valid(MODELS.choose(random).copied().unwrap_or("one"));
    for _ in 0..random.random_range(0..4) {
        change(&mut request, random);
    }
    request
}

fn change(request: &mut ModelInferRequest, random: &mut StdRng) {
    match random.random_range(0..11) {
        0 => request.model_name = name(random),
        1 => {
            request.model_version =
                ["", "1", "2", "-1", "latest", "99999999999999999999"].choose(random).copied().unwrap_or("").into()
        }
        2 => request.raw_input_contents.push(data(random)),
        3 => drop(request.raw_input_contents.pop()),
        4 => request.outputs.push(InferRequestedOutputTensor { name: name(random), parameters: [parameter(random)].into() }),
        5 => request.parameters.extend([parameter(random)]),
        6 => request.inputs.push(input(random)),
        _ => {
            let fresh = input(random);
            let Some(tensor) = request.inputs.first_mut() else { return };
            match random.random_range(0..5) {
                0 => tensor.name = fresh.name,
                1 => tensor.datatype = fresh.datatype,
                2 => tensor.contents = fresh.contents,
                3 => tensor.parameters = fresh.parameters,
                _ => tensor.shape = fresh.shape,
            }
        }
    }
}

fn name(random: &mut StdRng) -> String {
    NAMES.choose(random).copied().unwrap_or_default().to_owned()
}

fn data(random: &mut StdRng) -> Bytes {
    let length = random.random_range(0..40);
    (0..length).map(|_| if random.random_bool(0.5) { 0 } else { random.random() }).collect()
}

fn input(random: &mut StdRng) -> InferInputTensor {
    let dims = [0, 1, 2, 3, 4, -1, i64::MAX, i64::MIN, 1 << 32];
    let contents = InferTensorContents {
        fp32_contents: vec![1.0; random.random_range(0..4)],
        int64_contents: vec![1; random.random_range(0..2)],
        bytes_contents: vec![data(random); random.random_range(0..3)],
        ..Default::default()
    };
    InferInputTensor {
        name: name(random),
        datatype: DATATYPES.choose(random).copied().unwrap_or_default().into(),
        shape: (0..random.random_range(0..5)).map(|_| dims.choose(random).copied().unwrap_or(1)).collect(),
        parameters: if random.random_bool(0.2) { [parameter(random)].into() } else { Default::default() },
        contents: random.random_bool(0.5).then_some(contents),
    }
}

fn parameter(random: &mut StdRng) -> (String, InferParameter) {
    let known = [
        keys::SEQUENCE_ID,
        keys::SEQUENCE_START,
        keys::SEQUENCE_END,
        keys::PRIORITY,
        keys::TIMEOUT,
        keys::EMPTY_FINAL,
        keys::UNORDERED,
        "classification",
        "shared_memory_region",
        "shared_memory_offset",
        "shared_memory_byte_size",
        "triton_x",
        "anything",
    ];
    let value = match random.random_range(0..6) {
        0 => Some(ParameterChoice::BoolParam(random.random())),
        1 => Some(ParameterChoice::Int64Param([0, 1, 7, -1, i64::MAX, i64::MIN].choose(random).copied().unwrap_or(0))),
        2 => Some(ParameterChoice::StringParam("s".repeat(random.random_range(0..200)))),
        3 => Some(ParameterChoice::DoubleParam(f64::NAN)),
        4 => Some(ParameterChoice::Uint64Param(random.random())),
        _ => None,
    };
    (known.choose(random).copied().unwrap_or("anything").to_owned(), InferParameter { parameter_choice: value })
}
