//! A live microphone: one chunk after the other at a steady pace, whether the answers come or not.
//!
//! A speaker talks either through the Rust client, whose router sends to workers directly, or through the public
//! `ModelStreamInfer` of one coordinator, with nothing but generated code, as any other client would. It knows nothing of the
//! kills that happen meanwhile.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cresset_client::CressetClient;
use cresset_proto::{
    inference::{
        ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
        grpc_inference_service_client::GrpcInferenceServiceClient,
    },
    parameters::{bool_parameter, int64_parameter, keys},
    tensor::{Datatype, Tensor, push_input},
};
use futures::{StreamExt, stream::FuturesUnordered};
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use crate::{
    speech::CHUNK_SAMPLES,
    tally::{Delivered, Pass},
};

/// How long a speaker waits for its next answer before it gives the rest up as lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Which way a speaker's chunks go.
#[derive(Debug, Clone)]
pub enum Way {
    /// The Rust client.
    Direct(Arc<CressetClient>),
    /// `ModelStreamInfer` of the coordinator at this `host:port`. When the address changes, the speaker ends its sequence
    /// and begins the next one there.
    Gateway(watch::Receiver<String>),
}

/// What all speakers of one run share.
#[derive(Debug)]
pub struct Stage {
    begun: Instant,
    /// Answers so far, all speakers together.
    answered: AtomicU64,
    progress: watch::Sender<u64>,
    over: watch::Sender<bool>,
}

impl Default for Stage {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            answered: AtomicU64::new(0),
            progress: watch::Sender::new(0),
            over: watch::Sender::new(false),
        }
    }
}

impl Stage {
    /// µs since the run began.
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Answers so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until so many answers have come since now, or until `limit` is over. Says whether they came.
    pub async fn more(&self, answers: u64, limit: Duration) -> bool {
        let goal = self.answered() + answers;
        let mut progress = self.progress.subscribe();
        timeout(limit, progress.wait_for(|answered| *answered >= goal)).await.is_ok_and(|seen| seen.is_ok())
    }

    /// Asks all speakers to end their sequences.
    pub fn end(&self) {
        self.over.send_replace(true);
    }

    fn is_over(&self) -> bool {
        *self.over.borrow()
    }

    fn note(&self) {
        let answered = self.answered.fetch_add(1, Ordering::Relaxed) + 1;
        self.progress.send_replace(answered);
    }
}

/// One speaker.
#[derive(Debug)]
pub struct Speaker {
    /// Goes into the ids of its requests.
    pub name: String,
    /// The model.
    pub model: String,
    /// Its input.
    pub input: String,
    /// The way its chunks go.
    pub way: Way,
    /// What it says, chunk by chunk.
    pub chunks: Vec<Bytes>,
    /// From one chunk to the next.
    pub interval: Duration,
    /// How often it says it, each time as a new sequence; it stops earlier when the stage is over.
    pub passes: usize,
}

impl Speaker {
    /// Speaks to the end.
    pub async fn speak(self, stage: Arc<Stage>) -> Vec<Pass> {
        let mut passes = Vec::new();
        for number in 0..self.passes {
            if stage.is_over() {
                break;
            }
            let prefix = format!("{}.{number}", self.name);
            let pass = match &self.way {
                Way::Direct(client) => self.through_client(client, &stage, &prefix).await,
                Way::Gateway(address) => self.through_gateway(address.clone(), &stage, &prefix).await,
            };
            passes.push(pass);
        }
        passes
    }

    fn request(&self, id: &str, chunk: &Bytes) -> ModelInferRequest {
        let mut request = ModelInferRequest { model_name: self.model.clone(), id: id.to_owned(), ..Default::default() };
        push_input(
            &mut request,
            Tensor {
                name: self.input.clone(),
                datatype: Datatype::Fp32,
                shape: vec![1, CHUNK_SAMPLES as i64],
                data: chunk.clone(),
            },
        );
        request
    }

    async fn through_client(&self, client: &CressetClient, stage: &Stage, prefix: &str) -> Pass {
        let (handed, mut handed_over) = mpsc::channel(self.chunks.len().max(1));
        let mut sequence = Some(client.sequence(&self.model));
        let mut sent = Vec::new();
        let begun_us = stage.now_us();
        let speaking = async {
            let mut ticks = steady(self.interval);
            for (number, chunk) in self.chunks.iter().enumerate() {
                ticks.tick().await;
                let id = format!("{prefix}.{number}");
                let request = self.request(&id, chunk);
                let is_last = number + 1 == self.chunks.len() || stage.is_over();
                let answer = match sequence.take() {
                    Some(last) if is_last => last.finish(request).await,
                    Some(mut open) => {
                        let answer = open.send(request).await;
                        sequence = Some(open);
                        answer
                    }
                    None => break,
                };
                sent.push(id.clone());
                let failed = answer.is_err();
                // The other half keeps its end open until this one is dropped.
                let _ = handed.send((id, answer)).await;
                if failed || is_last {
                    break;
                }
            }
            drop(handed);
        };
        let listening = async {
            let mut delivered = Vec::new();
            // Polled in the order in which answers woke it, so that one that overtakes another is seen to.
            let mut open = FuturesUnordered::new();
            let mut more = true;
            while more || !open.is_empty() {
                let next = tokio::select! {
                    handed = handed_over.recv(), if more => {
                        match handed {
                            Some((id, Ok(answer))) => open.push(async move { (id, answer.await) }),
                            Some((id, Err(status))) => delivered.push(answer_of(stage, id, Err(status))),
                            None => more = false,
                        }
                        continue;
                    }
                    answer = timeout(ANSWER_TIMEOUT, open.next()), if !open.is_empty() => answer,
                };
                let Ok(Some((id, answer))) = next else { break };
                delivered.push(answer_of(stage, id, answer));
            }
            delivered
        };
        let ((), delivered) = tokio::join!(speaking, listening);
        Pass { sent, begun_us, delivered }
    }

    async fn through_gateway(&self, mut address: watch::Receiver<String>, stage: &Stage, prefix: &str) -> Pass {
        let begun_us = stage.now_us();
        let target = format!("http://{}", address.borrow_and_update().as_str());
        let (requests, queued) = mpsc::channel(16);
        let sequence_id = i64::try_from(rand::random::<u64>() >> 1).unwrap_or(i64::MAX).max(1);
        let mut sent = Vec::new();
        let speaking = async {
            let mut ticks = steady(self.interval);
            for (number, chunk) in self.chunks.iter().enumerate() {
                ticks.tick().await;
                let id = format!("{prefix}.{number}");
                let mut request = self.request(&id, chunk);
                let moves = address.has_changed().unwrap_or(false);
                let is_last = number + 1 == self.chunks.len() || stage.is_over() || moves;
                request.parameters.insert(keys::SEQUENCE_ID.to_owned(), int64_parameter(sequence_id));
                request.parameters.insert(keys::SEQUENCE_START.to_owned(), bool_parameter(number == 0));
                request.parameters.insert(keys::SEQUENCE_END.to_owned(), bool_parameter(is_last));
                sent.push(id);
                if requests.send(request).await.is_err() || is_last {
                    break;
                }
            }
            drop(requests);
        };
        let listening = async {
            let mut delivered = Vec::new();
            if let Err(status) = listen(target, queued, stage, &mut delivered).await {
                delivered.push(answer_of(stage, format!("{prefix}.stream"), Err(status)));
            }
            delivered
        };
        let ((), delivered) = tokio::join!(speaking, listening);
        Pass { sent, begun_us, delivered }
    }
}

/// Ticks that make up for the time that was lost, as a microphone does.
fn steady(period: Duration) -> tokio::time::Interval {
    let mut ticks = interval(period.max(Duration::from_micros(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    ticks
}

async fn listen(
    target: String,
    requests: mpsc::Receiver<ModelInferRequest>,
    stage: &Stage,
    delivered: &mut Vec<Delivered>,
) -> Result<(), Status> {
    let unreachable = |error: tonic::transport::Error| Status::unavailable(error.to_string());
    let mut client = GrpcInferenceServiceClient::connect(target).await.map_err(unreachable)?;
    let mut answers = client.model_stream_infer(ReceiverStream::new(requests)).await?.into_inner();
    loop {
        let late = |_| Status::deadline_exceeded("no answer in time");
        match timeout(ANSWER_TIMEOUT, answers.message()).await.map_err(late)?? {
            Some(ModelStreamInferResponse { error_message, infer_response }) => {
                let response = infer_response.unwrap_or_default();
                let id = response.id.clone();
                let answer = if error_message.is_empty() { Ok(response) } else { Err(Status::unknown(error_message)) };
                delivered.push(answer_of(stage, id, answer));
            }
            None => return Ok(()),
        }
    }
}

/// What a caller sees. The id is the one that the answer itself brings; `asked` stands in where an error has none.
fn answer_of(stage: &Stage, asked: String, answer: Result<ModelInferResponse, Status>) -> Delivered {
    let at_us = stage.now_us();
    match answer {
        Ok(mut response) => {
            stage.note();
            let output = match response.raw_output_contents.len() {
                1 => Ok(response.raw_output_contents.swap_remove(0)),
                count => Err(format!("{count} outputs instead of one")),
            };
            Delivered { id: response.id, at_us, output }
        }
        Err(status) => Delivered { id: asked, at_us, output: Err(format!("{:?}: {}", status.code(), status.message())) },
    }
}
