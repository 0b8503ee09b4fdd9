//! What a configuration can ask for, one test each: from the request to the answer, with real libtorch.
use cresset_proto::inference::{InferParameter, infer_parameter::ParameterChoice};
use cresset_worker::predict::Begun;
use futures::StreamExt;

use super::*;

/// A worker with one model called `m`.
async fn serving(config: &str, script: &Script) -> Bench {
    let models = ModelRepository::new().unwrap();
    models.add_script("m", config, script).unwrap();
    Bench::serving(models, &["m"], AMPLE).await
}

/// An input with raw content.
fn input(name: &str, datatype: &str, shape: &[i64]) -> InferInputTensor {
    InferInputTensor { name: name.into(), datatype: datatype.into(), shape: shape.to_vec(), ..Default::default() }
}

fn floats(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn request(inputs: &[(InferInputTensor, Bytes)]) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "m".into(),
        inputs: inputs.iter().map(|(input, _)| input.clone()).collect(),
        raw_input_contents: inputs.iter().map(|(_, data)| data.clone()).collect(),
        ..Default::default()
    }
}

fn row_of(values: &[f32]) -> (InferInputTensor, Bytes) {
    (input("x", "FP32", &[1, values.len() as i64]), floats(values))
}

fn with(mut request: ModelInferRequest, key: &str, value: ParameterChoice) -> ModelInferRequest {
    request.parameters.insert(key.into(), InferParameter { parameter_choice: Some(value) });
    request
}

#[tokio::test]
async fn an_optional_input_may_be_left_out() {
    let config = "max_batch_size: 4 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] }, \
                  { name: \"bias\" data_type: TYPE_FP32 dims: [ 1 ] optional: true } ] output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ]";
    let script =
        Script::new("def forward(self, x, bias: Optional[Tensor]):\n  if bias is None:\n    return x + 100\n  return x + bias\n");
    let bench = serving(config, &script).await;
    let bias = (input("bias", "FP32", &[1, 1]), floats(&[5.0]));
    let answers =
        join_all([request(&[row_of(&[1.0])]), request(&[row_of(&[2.0]), bias])].map(|request| bench.infer(request))).await;
    assert_eq!(answers.into_iter().map(|answer| values(&answer.unwrap())).collect::<Vec<_>>(), [[101.0], [7.0]]);
}

#[tokio::test]
async fn an_argument_that_cannot_be_left_out_is_refused_when_the_model_loads() {
    let config = fp32_model(0, "").replace("dims: [ -1 ] } ]\noutput", "dims: [ -1 ] optional: true } ]\noutput");
    let bench = serving(&config, &testing::plus_one()).await;
    let observed = bench.worker.models.observed();
    assert!(observed[0].reason.contains("input 'x' is optional"), "{observed:?}");
}

#[tokio::test]
async fn the_model_sees_the_reshaped_tensor_and_the_caller_its_own() {
    let config = "max_batch_size: 4 input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 4 ] reshape: { shape: [ 2, 2 ] } } ] \
                  output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] reshape: { shape: [ ] } } ]";
    let script = Script::new("def forward(self, x):\n  return x[:, 1, 0]\n");
    let answer = serving(config, &script).await.infer(request(&[row_of(&[1.0, 2.0, 3.0, 4.0])])).await.unwrap();
    assert_eq!((answer.outputs[0].shape.clone(), values(&answer)), (vec![1, 1], vec![3.0]));
}

#[tokio::test]
async fn ragged_requests_share_one_call() {
    let config = "max_batch_size: 3 dynamic_batching { max_queue_delay_microseconds: 60000000 } \
                  input [ { name: \"x\" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ] \
                  output [ { name: \"sums\" data_type: TYPE_FP32 dims: [ 2 ] } ] \
                  batch_input [ { kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: \"ends\" data_type: TYPE_INT32 source_input: \"x\" } ]";
    // For each request its sum, and how many requests there were.
    let script = Script::new(
        "def forward(self, x, ends):\n  n = ends.size(0) - 1\n  out = torch.zeros([n, 2])\n  for i in range(n):\n    \
         out[i, 0] = x[int(ends[i]):int(ends[i + 1])].sum()\n    out[i, 1] = n\n  return out\n",
    );
    let bench = serving(config, &script).await;
    let sent = [vec![1.0], vec![1.0, 2.0, 3.0], vec![10.0, 20.0]];
    let answers = join_all(sent.iter().map(|values| bench.infer(request(&[row_of(values)])))).await;
    let answers: Vec<Vec<f32>> = answers.into_iter().map(|answer| values(&answer.unwrap())).collect();
    assert_eq!(answers, [[1.0, 3.0], [6.0, 3.0], [30.0, 3.0]]);
}

#[tokio::test]
async fn byte_strings_go_through_a_model_unharmed() {
    let config = "max_batch_size: 8 input [ { name: \"words\" data_type: TYPE_STRING dims: [ 1 ] } ] \
                  output [ { name: \"out\" data_type: TYPE_STRING dims: [ 1 ] } ]";
    let script = Script::new("def forward(self, words: List[str]) -> List[str]:\n  return words[::-1]\n");
    let bench = serving(config, &script).await;
    let framed = |texts: &[&[u8]]| -> Bytes {
        texts.iter().flat_map(|text| [&(text.len() as u32).to_le_bytes()[..], text].concat()).collect()
    };
    let sent = framed(&[b"he\x00llo", b"\x00\xff\xfe"]);
    let answer = bench.infer(request(&[(input("words", "BYTES", &[2, 1]), sent)])).await.unwrap();
    assert_eq!(answer.outputs[0].shape, [2, 1]);
    assert_eq!(answer.raw_output_contents[0], framed(&[b"\x00\xff\xfe", b"he\x00llo"]));
}

#[tokio::test]
async fn the_best_classes_come_with_their_labels() {
    let models = ModelRepository::new().unwrap();
    let config = fp32_model(4, "").replace("name: \"y\"", "name: \"y\" label_filename: \"labels.txt\"");
    models.add_script("m", &config, &testing::plus_one()).unwrap();
    std::fs::write(models.path().join("m/labels.txt"), "cat\ndog\nfish\n").unwrap();
    let bench = Bench::serving(models, &["m"], AMPLE).await;
    let mut asking = request(&[row_of(&[0.0, 2.0, 1.0])]);
    let parameters = [("classification".to_owned(), int64_parameter(2))].into();
    asking.outputs.push(InferRequestedOutputTensor { name: "y".into(), parameters });
    let answer = bench.infer(asking).await.unwrap();
    assert_eq!((answer.outputs[0].datatype.as_str(), answer.outputs[0].shape.clone()), ("BYTES", vec![1, 2]));
    let text = String::from_utf8_lossy(&answer.raw_output_contents[0]).into_owned();
    assert!(text.contains("3.000000:1:dog") && text.contains("2.000000:2:fish"), "{text:?}");
}

/// A model that takes long for a negative number, and then says how many calls came before.
async fn counting_with(batching: &str) -> Bench {
    serving(&one_by_one(batching), &counting()).await
}

#[tokio::test]
async fn a_higher_priority_goes_first() {
    let bench = counting_with("dynamic_batching { priority_levels: 2 default_priority_level: 2 }").await;
    let ask = |value: f32, priority: u64| {
        bench.infer(with(vector("m", &[value]), keys::PRIORITY, ParameterChoice::Uint64Param(priority)))
    };
    // Two are with the device before the rest is looked at.
    let (_, _, low, high) = futures::join!(ask(-1.0, 0), ask(-1.0, 0), ask(0.0, 2), ask(0.0, 1));
    assert!(values(&high.unwrap()) < values(&low.unwrap()));
}

#[tokio::test]
async fn a_queue_policy_rejects_what_waited_too_long_and_what_is_too_many() {
    // Longer than it takes to put six requests into the queue.
    let policy = "default_queue_policy { default_timeout_microseconds: 1000000 max_queue_size: 4 }";
    let config = fp32_model(8, &format!("dynamic_batching {{ max_queue_delay_microseconds: 60000000 {policy} }}"));
    let bench = serving(&config, &testing::plus_one()).await;
    let answers = join_all((0..6).map(|_| bench.infer(batch_of("m", &[1.0])))).await;
    let reasons: Vec<Option<Reason>> = answers.iter().map(reason).collect();
    let count = |wanted: Reason| reasons.iter().filter(|reason| **reason == Some(wanted)).count();
    assert_eq!((count(Reason::QueueTimeout), count(Reason::QueueFull)), (4, 2), "{reasons:?}");
    assert!(answers[0].as_ref().unwrap_err().to_string().starts_with("Request timeout expired"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instances_run_side_by_side_and_keep_the_order_if_asked_to() {
    // The first request takes long, the second doesn't; with two instances the second would overtake.
    for (preserve, first_is_first) in [(false, false), (true, true)] {
        let more = format!("instance_group [ {{ count: 2 }} ] dynamic_batching {{ preserve_ordering: {preserve} }}");
        let bench = counting_with(&more).await;
        let order = std::sync::Mutex::new(vec![]);
        let ask = async |value: f32| {
            bench.infer(vector("m", &[value])).await.unwrap();
            order.lock().unwrap().push(value < 0.0);
        };
        futures::join!(ask(-1.0), ask(0.0));
        assert_eq!(order.into_inner().unwrap()[0], first_is_first);
    }
}

#[tokio::test]
async fn a_model_is_ready_only_when_its_warm_ups_have_run() {
    let warm = |file: &str| {
        one_by_one(&format!(
            "model_warmup [ {{ name: \"zeros\" count: 3 inputs {{ key: \"x\" value {{ data_type: TYPE_FP32 dims: [ 2 ] zero_data: true }} }} }}, \
             {{ name: \"noise\" inputs {{ key: \"x\" value {{ data_type: TYPE_FP32 dims: [ 1 ] random_data: true }} }} }}, \
             {{ name: \"file\" inputs {{ key: \"x\" value {{ data_type: TYPE_FP32 dims: [ 1 ] input_data_file: \"{file}\" }} }} }} ]"
        ))
    };
    let models = ModelRepository::new().unwrap();
    for (name, file) in [("m", "one"), ("missing", "two")] {
        models.add_script(name, &warm(file), &counting()).unwrap();
    }
    std::fs::create_dir(models.path().join("m/warmup")).unwrap();
    std::fs::write(models.path().join("m/warmup/one"), floats(&[1.0])).unwrap();
    let bench = Bench::serving(models, &["m", "missing"], AMPLE).await;
    // Three zeros, one noise, one file, and this one.
    assert_eq!(values(&bench.infer(vector("m", &[0.0])).await.unwrap()), [6.0]);
    let failed = bench.worker.models.observed().into_iter().find(|replica| replica.model == "missing").unwrap();
    assert!(failed.reason.contains("model_warmup 'file'") && failed.reason.contains("warmup/two"), "{failed:?}");
}

/// Adds what it is given to its state, and says how many rows shared the call, whether it was the first, and its id.
fn implicit(oldest: &str) -> (String, Script) {
    let config = format!(
        "max_batch_size: 4 input [ {{ name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] }} ] \
                  output [ {{ name: \"y\" data_type: TYPE_FP32 dims: [ 4 ] }} ] \
                  sequence_batching {{ oldest {{ max_candidate_sequences: 8 {oldest} }} max_sequence_idle_microseconds: 60000000 \
                  control_input [ {{ name: \"start\" control [ {{ kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ] }} ] }}, \
                                  {{ name: \"id\" control [ {{ kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_INT64 }} ] }} ] \
                  state [ {{ input_name: \"total\" output_name: \"total_out\" data_type: TYPE_FP32 dims: [ 1 ] }} ] }}"
    );
    let script = Script::new(
        "def forward(self, x, start, id, total):\n  total = total + x\n  rows = torch.ones_like(x) * x.size(0)\n  \
         return torch.cat([total, rows, start, id.float()], 1), total\n",
    );
    (config, script)
}

fn one_step(sequence: i64, value: f32, bounds: (bool, bool)) -> ModelInferRequest {
    let mut request = step("m", sequence, value, bounds);
    request.inputs[0].shape = vec![1, 1];
    request
}

#[tokio::test]
async fn sequences_with_state_tensors_share_batches_and_never_mix() {
    // Waits for all three of them, so that they do share.
    let (config, script) = implicit("preferred_batch_size: [ 3 ] max_queue_delay_microseconds: 60000000");
    let bench = serving(&config, &script).await;
    for round in 0..5 {
        let bounds = (round == 0, round == 4);
        let answers = join_all((1..=3).map(|id| bench.infer(one_step(id, id as f32, bounds)))).await;
        for (id, answer) in (1..=3).zip(answers) {
            let got = values(&answer.unwrap());
            assert_eq!(got[0], id as f32 * (round + 1) as f32, "the state of {id} after {round}");
            assert_eq!((got[2], got[3]), (f32::from(u8::from(round == 0)), id as f32));
            assert_eq!(got[1], 3.0, "rows that shared the call of {id} in {round}");
        }
    }
    let served = bench.worker.models.find("m", "").unwrap();
    let Runner::Sequences(sequences) = &served.runner else { panic!("not a model with sequences") };
    assert_eq!(sequences.live(), 0);
}

#[tokio::test]
async fn state_tensors_survive_a_request_that_fails_and_move_with_a_checkpoint() {
    let (config, script) = implicit("");
    let bench = serving(&config, &script).await;
    let served = bench.worker.models.find("m", "").unwrap();
    let Runner::Sequences(sequences) = &served.runner else { panic!("not a model with sequences") };
    let id = SequenceId::Number(7);
    let standing = Standing { id: &id, start: false, end: false };
    let one = |value: f32| cresset_worker::predict::admit(&served, &mut one_step(7, value, (false, false))).unwrap();
    let mut here = sequences.open(None).await.unwrap();
    here.step(one(1.0), standing, Terms::default(), false).await.unwrap();
    let late = Terms { deadline: Some(Instant::now()), ..Terms::default() };
    let failed = here.step(one(50.0), standing, late, false).await.unwrap_err();
    assert!(failed.state_intact, "{failed:?}");
    let checkpoint = here.step(one(2.0), standing, Terms::default(), true).await.unwrap().checkpoint.unwrap();
    let mut there = sequences.open(Some(checkpoint)).await.unwrap();
    let after = there.step(one(3.0), standing, Terms::default(), false).await.unwrap();
    assert_eq!(after.outputs[0].data[..4], 6f32.to_le_bytes());
    assert!(sequences.open(Some(Bytes::from_static(b"rubbish"))).await.is_err());
}

#[tokio::test]
async fn a_new_sequence_waits_for_room_as_long_as_its_caller_does() {
    let models = ModelRepository::new().unwrap();
    models.add_script("sum", &sequences(1, 60_000_000), &testing::running_sum()).unwrap();
    let bench = Bench::serving(models, &["sum"], AMPLE).await;
    bench.infer(step("sum", 1, 1.0, (true, false))).await.unwrap();
    let soon = Some(Instant::now() + Duration::from_millis(20));
    let late = bench.infer_until(step("sum", 2, 1.0, (true, true)), soon).await;
    assert_eq!(reason(&late), Some(Reason::DeadlineExceeded));
    let (second, first) =
        futures::join!(bench.infer(step("sum", 3, 5.0, (true, true))), bench.infer(step("sum", 1, 1.0, (false, true))));
    assert_eq!((values(&first.unwrap()), values(&second.unwrap())), (vec![2.0], vec![5.0]));
}

/// Answers `count` times with rising numbers.
fn repeating() -> (String, Script) {
    let config = "max_batch_size: 0 input [ { name: \"count\" data_type: TYPE_INT64 dims: [ 1 ] } ] \
                  output [ { name: \"y\" data_type: TYPE_INT64 dims: [ 1 ] } ] model_transaction_policy { decoupled: true }";
    let script = Script::new(
        "def forward(self, count):\n  self.left = int(count)\n\ndef next(self) -> Optional[Tensor]:\n  if self.left == 0:\n    \
         return None\n  self.left -= 1\n  return torch.tensor([self.left])\n",
    )
    .attribute("left", "int", "0");
    (config.into(), script)
}

#[tokio::test]
async fn a_decoupled_model_answers_as_often_as_it_likes() {
    let (config, script) = repeating();
    let bench = serving(&config, &script).await;
    let asking = |count: i64| request(&[(input("count", "INT64", &[1]), count.to_le_bytes().to_vec().into())]);
    let begin = |count: i64| match bench.worker.begin_any(asking(count), None, tracing::Span::none()) {
        Begun::Many(answers) => answers,
        Begun::One(_) => panic!("it answers only once"),
    };
    let numbers = |answers: Vec<Result<ModelInferResponse, PredictError>>| -> Vec<i64> {
        let number = |answer: Result<ModelInferResponse, PredictError>| {
            i64::from_le_bytes(answer.unwrap().raw_output_contents[0][..].try_into().unwrap())
        };
        answers.into_iter().map(number).collect()
    };
    let (three, none, five) =
        futures::join!(begin(3).collect::<Vec<_>>(), begin(0).collect::<Vec<_>>(), begin(5).collect::<Vec<_>>());
    assert_eq!((numbers(three), numbers(none), numbers(five)), (vec![2, 1, 0], vec![], vec![4, 3, 2, 1, 0]));
    let unary = bench.infer(asking(1)).await.unwrap_err();
    assert_eq!(unary.status().code(), Code::Unimplemented);
    assert!(unary.to_string().contains("decoupled transaction policy"), "{unary}");
    // Who leaves ends the request.
    let mut endless = begin(i64::MAX);
    assert!(endless.next().await.unwrap().is_ok());
    drop(endless);
    let served = bench.worker.models.find("m", "").unwrap();
    let Runner::Decoupled(decoupled) = &served.runner else { panic!("not a decoupled model") };
    timeout(PATIENCE, decoupled.idle()).await.expect("the request goes on");
}
