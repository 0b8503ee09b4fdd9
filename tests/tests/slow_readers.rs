//! Callers that send and don't read: they are held back, nothing piles up for them, and nobody else notices.
use std::time::Duration;

use cresset_proto::{
    inference::{ModelInferRequest, grpc_inference_service_client::GrpcInferenceServiceClient},
    tensor::{Datatype, Tensor, push_input},
};
use cresset_tests::harness::ModelRepository;
use cresset_worker::engine::testing::Script;
use futures::StreamExt;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::support::{PATIENCE, cluster, inference};

/// Numbers of a request and of its answer: 64 KiB.
const WIDTH: usize = 16_384;
/// Requests that would be 256 MiB of answers: far more than windows and queues hold.
const FAR_TOO_MANY: usize = 4_096;
/// Who can't hand a request over for so long is being held back.
const HELD_BACK: Duration = Duration::from_secs(2);

fn echo() -> ModelRepository {
    let config = format!(
        "max_batch_size: 0 input [ {{ name: \"x\" data_type: TYPE_FP32 dims: [ {WIDTH} ] }} ] \
         output [ {{ name: \"y\" data_type: TYPE_FP32 dims: [ {WIDTH} ] }} ]"
    );
    ModelRepository::new().unwrap().with_script("echo", &config, &Script::new("def forward(self, x):\n  return x\n")).unwrap()
}

fn request(number: usize) -> ModelInferRequest {
    let mut request = ModelInferRequest { model_name: "echo".into(), id: number.to_string(), ..Default::default() };
    let data = vec![0; WIDTH * 4].into();
    push_input(&mut request, Tensor { name: "x".into(), datatype: Datatype::Fp32, shape: vec![WIDTH as i64], data });
    request
}

/// Sends on a stream without reading until it is held back, then reads: how many requests were taken.
async fn flood(mut client: GrpcInferenceServiceClient<Channel>, mut neighbour: GrpcInferenceServiceClient<Channel>) -> usize {
    let (sender, requests) = mpsc::channel(1);
    let mut answers = client.model_stream_infer(ReceiverStream::new(requests)).await.unwrap().into_inner();
    let mut sent = 0;
    while sent < FAR_TOO_MANY && timeout(HELD_BACK, sender.send(request(sent))).await.is_ok() {
        sent += 1;
    }
    let beside = timeout(PATIENCE, neighbour.model_infer(request(0))).await.expect("a neighbour waits");
    assert_eq!(beside.unwrap().into_inner().outputs[0].shape, [WIDTH as i64]);
    drop(sender);
    let mut received = 0;
    while let Some(answer) = timeout(PATIENCE, answers.next()).await.expect("the answers stopped") {
        let answer = answer.unwrap();
        assert_eq!(answer.error_message, "");
        assert_eq!(answer.infer_response.unwrap().id, received.to_string());
        received += 1;
    }
    assert_eq!(received, sent);
    sent
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_not_read_from() {
    let repository = echo();
    let cluster = cluster(1, 1, &repository, &["echo"]);
    for id in ["w1", "c1"] {
        let taken = flood(inference(&cluster, id).await, inference(&cluster, id).await).await;
        println!("{id} took {taken} requests of 64 KiB");
        assert!(taken < FAR_TOO_MANY / 2, "{id} took {taken} requests whose answers nobody read");
    }
}
