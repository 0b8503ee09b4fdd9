//! What it costs in calm that sequences survive: the same streams with checkpoints, without, and as a plain stream of the protocol
//! straight to the worker, which a dead worker would end.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use bytes::Bytes;
use cresset_client::{CressetClient, RouterSettings, SequenceFigures};
use cresset_proto::inference::{
    ModelInferRequest, ModelStreamInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient,
};
use futures::{StreamExt, stream::BoxStream};
use hdrhistogram::Histogram;
use tokio::{sync::mpsc, task::JoinSet};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use super::{
    figures::{Part, median},
    stage::{Pace, WORKER},
    usage::cpu_seconds,
};
use crate::{
    chaos::models::{self, Kind},
    harness::{Cluster, Options},
    speech::Speech,
};

/// Streams at a time, each with one request under way.
const STREAMS: usize = 16;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The models with state, and how the figures begin.
const KINDS: [(Kind, &str); 2] = [(Kind::Speech, "speech"), (Kind::Implicit, "implicit")];

/// How a sequence reaches its worker.
#[derive(Clone)]
enum Way {
    /// Through a router.
    Router(Arc<CressetClient>),
    /// On a stream of the protocol to the worker itself.
    Plain(Channel),
}

impl Way {
    async fn open(&self, requests: mpsc::Receiver<ModelInferRequest>) -> anyhow::Result<BoxStream<'static, Answer>> {
        let requests = ReceiverStream::new(requests);
        Ok(match self {
            Self::Router(client) => client.stream(requests).boxed(),
            Self::Plain(channel) => {
                GrpcInferenceServiceClient::new(channel.clone()).model_stream_infer(requests).await?.into_inner().boxed()
            }
        })
    }
}

type Answer = Result<ModelStreamInferResponse, Status>;

/// Measures each model each way in turns.
///
/// # Errors
/// When a process fails, or a request.
pub fn measure(pace: Pace) -> anyhow::Result<Part> {
    let speech = Speech::load()?;
    let repository = models::repository()?;
    let names: Vec<&str> = KINDS.iter().map(|(kind, _)| kind.model()).collect();
    let model_repository = repository.path().into();
    let cluster = Cluster::start(&Options { coordinators: 1, workers: 1, model_repository, ..Options::deploying(&names) })?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    runtime.block_on(async {
        let never = cresset_client::journal::Limits {
            checkpoint_requests: u64::MAX,
            checkpoint_bytes: usize::MAX,
            ..RouterSettings::default().journal
        };
        let client = async |journal| {
            let settings = RouterSettings { journal, ..RouterSettings::default() };
            CressetClient::connect_with(cluster.endpoints(), settings, CONNECT_TIMEOUT).await
        };
        let surviving = Arc::new(client(RouterSettings::default().journal).await?);
        let ways = [
            ("surviving", Way::Router(Arc::clone(&surviving))),
            ("without_checkpoints", Way::Router(Arc::new(client(never).await?))),
            ("plain", Way::Plain(Endpoint::from_shared(format!("http://{}", cluster.grpc(WORKER)?))?.connect().await?)),
        ];
        let mut part = Part::default();
        part.fact("streams", STREAMS);
        for round in 0..pace.rounds {
            for (kind, name) in KINDS {
                let inputs: Arc<[Bytes]> = kind.script(0, &speech).into();
                for (way_name, way) in &ways {
                    let before = surviving.router().sequence_figures();
                    let seen = talk(&cluster, way, kind, &inputs, pace.time).await?;
                    part.add(&format!("{name}_{way_name}_p50_us"), seen.p50_us);
                    part.add(&format!("{name}_{way_name}_requests_per_second"), seen.rate);
                    part.add(&format!("{name}_{way_name}_worker_cpu_us"), seen.worker_cpu_us);
                    part.add(&format!("{name}_{way_name}_client_cpu_us"), seen.client_cpu_us);
                    if *way_name == "surviving" {
                        costs(&mut part, name, &seen, before, surviving.router().sequence_figures());
                    }
                }
                let rate = |way: &str| part.rounds(&format!("{name}_{way}_requests_per_second"))[round];
                let over = ["without_checkpoints", "plain"].map(|off| (off, rate(off) / rate("surviving")));
                for (off, more) in over {
                    part.add(&format!("{name}_over_{off}"), more);
                }
            }
        }
        Ok(part)
    })
}

/// What was kept and sent for it.
fn costs(part: &mut Part, name: &str, seen: &Seen, before: SequenceFigures, after: SequenceFigures) {
    let checkpoints = (after.checkpoints_bytes - before.checkpoints_bytes) as f64;
    part.add(&format!("{name}_checkpoint_bytes_per_second"), checkpoints / seen.seconds);
    part.add(&format!("{name}_checkpoint_bytes_per_request"), checkpoints / seen.requests as f64);
    part.add(&format!("{name}_journal_bytes_per_stream"), seen.journals_bytes / STREAMS as f64);
}

struct Seen {
    requests: u64,
    seconds: f64,
    rate: f64,
    p50_us: f64,
    worker_cpu_us: f64,
    client_cpu_us: f64,
    /// Of all streams, in the middle of the looks at them.
    journals_bytes: f64,
}

/// Sequences one after the other on each of several streams, for so long.
async fn talk(cluster: &Cluster, way: &Way, kind: Kind, inputs: &Arc<[Bytes]>, time: Duration) -> anyhow::Result<Seen> {
    let pids = [cluster.process(WORKER)?.pid(), std::process::id()];
    let cpu_before = [cpu_seconds(pids[0])?, cpu_seconds(pids[1])?];
    let began = Instant::now();
    let mut speaking = JoinSet::new();
    for number in 0..STREAMS {
        speaking.spawn(speak(way.clone(), kind, Arc::clone(inputs), 1 + number as i64, began + time));
    }
    let mut journals = vec![];
    let (mut took, mut ticks) = (Histogram::<u64>::new(3)?, tokio::time::interval(time / 20));
    while !speaking.is_empty() {
        tokio::select! {
            done = speaking.join_next() => if let Some(done) = done { took.add(done??)?; },
            _ = ticks.tick() => if let Way::Router(client) = way {
                journals.push(client.router().sequence_figures().journals_bytes as f64);
            },
        }
    }
    let (requests, seconds) = (took.len(), began.elapsed().as_secs_f64());
    let cpu_us = |process: usize| anyhow::Ok((cpu_seconds(pids[process])? - cpu_before[process]) * 1e6 / requests as f64);
    Ok(Seen {
        requests,
        seconds,
        rate: requests as f64 / seconds,
        p50_us: took.value_at_quantile(0.5) as f64 / 1e3,
        worker_cpu_us: cpu_us(0)?,
        client_cpu_us: cpu_us(1)?,
        journals_bytes: median(&journals),
    })
}

/// How long each answer took, in ns.
async fn speak(way: Way, kind: Kind, inputs: Arc<[Bytes]>, sequence: i64, until: Instant) -> anyhow::Result<Histogram<u64>> {
    let mut took = Histogram::new(3)?;
    while Instant::now() < until {
        let (requests, queued) = mpsc::channel(1);
        let mut answers = way.open(queued).await?;
        for (place, input) in inputs.iter().enumerate() {
            let began = Instant::now();
            let bounds = (place == 0, place + 1 == inputs.len());
            requests.send(kind.request(place.to_string(), input, sequence, bounds)).await?;
            let answer = answers.next().await.context("the stream ended")??;
            if !answer.error_message.is_empty() {
                bail!("{}: {}", kind.model(), answer.error_message);
            }
            took.record(u64::try_from(began.elapsed().as_nanos())?)?;
        }
        drop(requests);
        while answers.next().await.is_some() {}
    }
    Ok(took)
}
