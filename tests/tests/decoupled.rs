//! A model that answers a request any number of times, by way of a coordinator and of the Rust client, while its worker is
//! killed in the middle.

use std::sync::Arc;

use cresset_proto::{
    admin::v1::WorkerState,
    inference::{
        ModelInferRequest, ModelStatisticsRequest, ModelStreamInferResponse, StatisticDuration, infer_parameter::ParameterChoice,
    },
    parameters::bool_parameter,
    tensor::{Datatype, Tensor, push_input},
};
use cresset_tests::harness::{Cluster, ModelRepository, worker_of};
use cresset_worker::engine::testing::Script;
use futures::{Stream, StreamExt, stream, stream::BoxStream};
use tokio::time::timeout;
use tonic::Status;

use crate::support::{PATIENCE, cluster, holders, inference, others, until_ready};

/// Numbers in one response: half a MiB, so that only a few responses fit between the model and a caller that doesn't read.
const WIDTH: usize = 65_536;
/// Responses to one request: far more than fit.
const COUNT: i64 = 160;
/// Responses that the caller reads before the worker is killed.
const READ_BEFORE: usize = 5;

/// Answers `count` times, with falling numbers.
fn countdown() -> ModelRepository {
    let config = format!(
        "max_batch_size: 0 input [ {{ name: \"count\" data_type: TYPE_INT64 dims: [ 1 ] }} ] \
         output [ {{ name: \"y\" data_type: TYPE_INT64 dims: [ {WIDTH} ] }} ] model_transaction_policy {{ decoupled: true }}"
    );
    let source = format!(
        "def forward(self, count):\n  self.left = int(count)\n\ndef next(self) -> Optional[Tensor]:\n  if self.left == 0:\n    \
         return None\n  self.left -= 1\n  return torch.full([{WIDTH}], self.left)\n"
    );
    let script = Script::new(&source).attribute("left", "int", "0");
    ModelRepository::new().unwrap().with_script("countdown", &config, &script).unwrap()
}

fn request(count: i64) -> ModelInferRequest {
    let mut request = ModelInferRequest { model_name: "countdown".into(), id: "c".into(), ..Default::default() };
    let data = count.to_le_bytes().to_vec().into();
    push_input(&mut request, Tensor { name: "count".into(), datatype: Datatype::Int64, shape: vec![1], data });
    request.parameters.insert("triton_enable_empty_final_response".into(), bool_parameter(true));
    request
}

/// The first number of each response, and whether it was the last of its request.
fn read(message: Result<ModelStreamInferResponse, Status>) -> (Option<i64>, bool) {
    let message = message.unwrap();
    assert_eq!(message.error_message, "");
    let response = message.infer_response.unwrap();
    let is_last = response.parameters["triton_final_response"].parameter_choice == Some(ParameterChoice::BoolParam(true));
    let number = response.raw_output_contents.first().map(|raw| {
        assert_eq!(raw.len(), WIDTH * 8);
        i64::from_le_bytes(raw[..8].try_into().unwrap())
    });
    (number, is_last)
}

/// The worker that is answering the model's only request.
async fn answering(cluster: &Cluster) -> String {
    for id in holders(&cluster.status().await.unwrap(), "countdown") {
        let asked = ModelStatisticsRequest { name: "countdown".into(), version: String::new() };
        let statistics = inference(cluster, &id).await.model_statistics(asked).await.unwrap().into_inner();
        // It is in the middle: one more request was answered for the first time than ended.
        let model = &statistics.model_stats[0];
        let count = |duration: Option<&StatisticDuration>| duration.map_or(0, |duration| duration.count);
        let ended = count(model.inference_stats.as_ref().and_then(|stats| stats.success.as_ref()));
        if count(model.response_stats.get("0").and_then(|stats| stats.success.as_ref())) > ended {
            return id;
        }
    }
    panic!("no worker is in the middle of the request");
}

/// Reads some responses, kills the worker, and reads the rest: each comes once, in order.
async fn survives(cluster: &Cluster, answers: impl Stream<Item = Result<ModelStreamInferResponse, Status>>) -> String {
    let mut answers = Box::pin(answers);
    let mut numbers = Vec::new();
    for _ in 0..READ_BEFORE {
        numbers.push(read(answers.next().await.unwrap()));
    }
    let victim = answering(cluster).await;
    cluster.kill(&victim).unwrap();
    let rest = timeout(PATIENCE, answers.map(read).collect::<Vec<_>>()).await.expect("the responses stopped");
    numbers.extend(rest);
    let expected = (0..COUNT).rev().map(|left| (Some(left), false)).chain([(None, true)]);
    assert!(numbers.iter().copied().eq(expected), "{numbers:?}");
    println!("{victim} was killed after {READ_BEFORE} of {COUNT} responses were read");
    victim
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn decoupled_responses_go_on_where_they_were_when_a_worker_is_killed() {
    let repository = countdown();
    let cluster = cluster(3, 3, &repository, &["countdown"]);
    let leader = cluster.leader().await.unwrap();
    let mut gateway = inference(&cluster, &others(&cluster, &leader)[0]).await.max_decoding_message_size(16 << 20);
    let through: BoxStream<'_, _> =
        gateway.model_stream_infer(stream::iter([request(COUNT)])).await.unwrap().into_inner().boxed();
    let victim = survives(&cluster, through).await;

    let dead = |status: &_| worker_of(status, &victim).filter(|worker| worker.state() == WorkerState::Dead).map(drop);
    cluster.wait_for("the verdict", PATIENCE, dead).await.unwrap();
    until_ready(&cluster, "countdown").await;
    let client = Arc::new(cluster.client().await.unwrap());
    survives(&cluster, client.stream(stream::iter([request(COUNT)]))).await;

    // Nothing and one are numbers of responses too.
    let few: Vec<_> = client.stream(stream::iter([request(0), request(1)])).map(read).collect().await;
    assert_eq!(few.iter().filter(|(_, is_last)| *is_last).count(), 2);
    assert_eq!(few.iter().filter_map(|(number, _)| *number).collect::<Vec<_>>(), [0]);
}
