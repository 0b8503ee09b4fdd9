//! The load of this process: lanes by the Rust client, by its streams that outlive coordinators, and by generated code that
//! knows a list of coordinators.
//!
//! A lane asks at a steady pace and writes down what it sent and what came. It knows nothing of faults. What a stream or a
//! call leaves unanswered when it breaks it asks again: at the next address of its list, as any client that was given
//! several would, or with the same Rust client.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use cresset_client::{CallOptions, Coordinators, CressetClient, ResumeSettings};
use cresset_proto::inference::{
    ModelInferRequest, ModelInferResponse, ModelStreamInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient,
};
use futures::{StreamExt, stream::BoxStream};
use tokio::{
    sync::mpsc,
    task::JoinSet,
    time::{Interval, MissedTickBehavior, interval, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};

use super::{
    models::Kind,
    record::{Break, Delivered, Lane, Pass, Way},
};

/// How long a caller of the Rust client gives a call; the router has to do with it.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a caller with a list of addresses gives one of them.
const TRY_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a request is asked again before it is given up. No outage of a run lasts as long.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a stream with open requests may be silent before its caller gives it up.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Before the same request is asked again where nobody else is left to ask.
const PAUSE: Duration = Duration::from_millis(100);
/// Requests that may wait to be taken from a stream.
const UNTAKEN_MAX: usize = 64;

/// The time of a run, and its end.
#[derive(Debug, Clone)]
pub struct Stage {
    begun: Instant,
    over: CancellationToken,
}

impl Default for Stage {
    fn default() -> Self {
        Self { begun: Instant::now(), over: CancellationToken::new() }
    }
}

impl Stage {
    /// µs since the run began.
    pub fn now_us(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Asks all lanes to end, each with its last answer.
    pub fn end(&self) {
        self.over.cancel();
    }

    /// Whether they were asked to.
    pub fn is_over(&self) -> bool {
        self.over.is_cancelled()
    }
}

/// Whom a lane asks.
#[derive(Debug, Clone)]
pub enum Target {
    /// The Rust client.
    Client(Arc<CressetClient>),
    /// The first of these addresses, and the next one when it fails.
    List(Vec<String>),
    /// One of the coordinators, by a stream that outlives it.
    Coordinators(Coordinators),
}

/// A lane that is about to begin.
#[derive(Debug)]
pub struct Caller {
    /// What is asked.
    pub kind: Kind,
    /// Whom.
    pub target: Target,
    /// Which script.
    pub script: usize,
    /// Its inputs.
    pub inputs: Vec<Bytes>,
    /// From one request to the next.
    pub interval: Duration,
    /// Which of the addresses is asked first.
    pub first_address: usize,
}

impl Caller {
    /// Asks until the stage is over.
    pub async fn call(self, stage: Stage) -> Lane {
        let this = Arc::new(self);
        let passes = if this.kind == Kind::Unary { calls(&this, &stage).await } else { this.streams(&stage).await };
        let way = match this.target {
            Target::Client(_) => Way::Client,
            Target::List(_) => Way::Plain,
            Target::Coordinators(_) => Way::Resumed,
        };
        let interval_us = u64::try_from(this.interval.as_micros()).unwrap_or(u64::MAX);
        Lane { kind: this.kind, way, script: this.script, interval_us, passes }
    }

    /// One pass through the whole script, by the Rust client or the first address.
    pub async fn once(&self, stage: &Stage) -> Pass {
        let mut ticks = steady(self.interval);
        self.stream(stage, &mut ticks, 0, 0).await
    }

    async fn streams(&self, stage: &Stage) -> Vec<Pass> {
        let mut passes = Vec::new();
        let mut ticks = steady(self.interval);
        let (mut first, mut address) = (0, self.first_address);
        while !stage.is_over() {
            let pass = self.stream(stage, &mut ticks, first, address).await;
            first = 0;
            if pass.broken.is_some() {
                address += 1;
                // The requests of a sequence are nothing without those before.
                if !self.kind.is_sequence() {
                    first = (pass.first + answered(&pass, self.kind.parts())) % self.inputs.len();
                }
                if pass.delivered.is_empty() {
                    tokio::time::sleep(PAUSE).await;
                }
            }
            passes.push(pass);
        }
        passes
    }

    /// One stream: the script from `first` to its end.
    async fn stream(&self, stage: &Stage, ticks: &mut Interval, first: usize, address: usize) -> Pass {
        let address = self.address(address);
        let (requests, queued) = mpsc::channel(UNTAKEN_MAX);
        let broken = CancellationToken::new();
        let sequence = i64::try_from(rand::random::<u64>() >> 1).unwrap_or(i64::MAX).max(1);
        let speaking = async {
            let mut sent = Vec::new();
            for (ordinal, input) in self.inputs[first..].iter().enumerate() {
                tokio::select! {
                    _ = ticks.tick() => {}
                    () = broken.cancelled() => break,
                }
                let is_last = first + ordinal + 1 == self.inputs.len() || stage.is_over();
                let request = self.kind.request(ordinal.to_string(), input, sequence, (ordinal == 0, is_last));
                sent.push(stage.now_us());
                tokio::select! {
                    taken = requests.send(request) => if taken.is_err() { break },
                    () = broken.cancelled() => break,
                }
                if is_last {
                    break;
                }
            }
            drop(requests);
            sent
        };
        let listening = async {
            let mut delivered = Vec::new();
            let broken_by = match self.open(address.as_deref(), ReceiverStream::new(queued)).await {
                Ok(answers) => listen(stage, answers, &mut delivered).await.err(),
                Err(status) => Some(status),
            };
            broken.cancel();
            (delivered, broken_by.map(|status| break_of(stage, &status)))
        };
        let (sent, (delivered, broken)) = tokio::join!(speaking, listening);
        Pass { address, first, sent, delivered, broken }
    }

    fn address(&self, number: usize) -> Option<String> {
        match &self.target {
            Target::Client(_) | Target::Coordinators(_) => None,
            Target::List(addresses) => addresses.get(number % addresses.len().max(1)).cloned(),
        }
    }

    async fn open(
        &self,
        address: Option<&str>,
        requests: ReceiverStream<ModelInferRequest>,
    ) -> Result<BoxStream<'static, Result<ModelStreamInferResponse, Status>>, Status> {
        match &self.target {
            Target::Client(client) => Ok(client.stream(requests).boxed()),
            Target::Coordinators(coordinators) => Ok(coordinators.stream(requests, ResumeSettings::default()).boxed()),
            Target::List(_) => {
                let channel = endpoint(address.unwrap_or_default())?.connect().await;
                let channel = channel.map_err(|error| Status::unavailable(error.to_string()))?;
                let opening = async move { GrpcInferenceServiceClient::new(channel).model_stream_infer(requests).await };
                let late = |_| Status::unavailable("no answer to the stream's beginning");
                Ok(timeout(SILENCE_MAX, opening).await.map_err(late)??.into_inner().boxed())
            }
        }
    }
}

/// How many requests at the beginning of a pass have all their responses.
fn answered(pass: &Pass, parts: usize) -> usize {
    let mut got = vec![0; pass.sent.len()];
    for ordinal in pass.delivered.iter().filter_map(|response| response.ordinal) {
        if let Some(got) = got.get_mut(ordinal) {
            *got += 1;
        }
    }
    got.iter().take_while(|got| **got >= parts).count()
}

/// Takes answers until the stream ends.
async fn listen(
    stage: &Stage,
    mut answers: BoxStream<'static, Result<ModelStreamInferResponse, Status>>,
    delivered: &mut Vec<Delivered>,
) -> Result<(), Status> {
    let silent = |_| Status::deadline_exceeded(format!("nothing came for {} s", SILENCE_MAX.as_secs()));
    while let Some(answer) = timeout(SILENCE_MAX, answers.next()).await.map_err(silent)? {
        let ModelStreamInferResponse { error_message, infer_response } = answer?;
        let response = infer_response.unwrap_or_default();
        if !error_message.is_empty() {
            return Err(Status::unknown(format!("request {}: {error_message}", response.id)));
        }
        delivered.push(delivery(stage, response));
    }
    Ok(())
}

fn delivery(stage: &Stage, mut response: ModelInferResponse) -> Delivered {
    // An answer without an output is different from every right one.
    let output = if response.raw_output_contents.is_empty() { Bytes::new() } else { response.raw_output_contents.swap_remove(0) };
    Delivered { ordinal: response.id.parse().ok(), at_us: stage.now_us(), output }
}

fn break_of(stage: &Stage, status: &Status) -> Break {
    let mut message = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        message += &format!(": {error}");
        source = error.source();
    }
    Break { at_us: stage.now_us(), code: format!("{:?}", status.code()), message, gave_up: false }
}

/// Whom the single calls of a lane ask first: the address that answered last.
struct Phones {
    channels: Vec<(String, Channel)>,
    current: AtomicUsize,
}

impl Phones {
    fn of(caller: &Caller) -> Self {
        let Target::List(addresses) = &caller.target else { return Self { channels: vec![], current: AtomicUsize::new(0) } };
        let channel = |address: &String| Some((address.clone(), endpoint(address).ok()?.connect_lazy()));
        Self { channels: addresses.iter().filter_map(channel).collect(), current: AtomicUsize::new(caller.first_address) }
    }

    fn current(&self) -> Option<(usize, &(String, Channel))> {
        let current = self.current.load(Ordering::Relaxed);
        self.channels.get(current % self.channels.len().max(1)).map(|phone| (current, phone))
    }

    /// Goes on to the next address, unless another call has already left this one.
    fn leave(&self, number: usize) {
        let _ = self.current.compare_exchange(number, number + 1, Ordering::Relaxed, Ordering::Relaxed);
    }
}

/// Single calls, each on a task of its own so that a slow one doesn't slow the pace.
async fn calls(caller: &Arc<Caller>, stage: &Stage) -> Vec<Pass> {
    let mut ticks = steady(caller.interval);
    let phones = Arc::new(Phones::of(caller));
    let mut running = JoinSet::new();
    let mut passes = Vec::new();
    for place in (0..caller.inputs.len()).cycle() {
        ticks.tick().await;
        if stage.is_over() {
            break;
        }
        let (caller, phones, stage) = (Arc::clone(caller), Arc::clone(&phones), stage.clone());
        running.spawn(async move { one(&caller, &phones, &stage, place).await });
        while let Some(done) = running.try_join_next() {
            passes.extend(done.unwrap_or_default());
        }
    }
    while let Some(done) = running.join_next().await {
        passes.extend(done.unwrap_or_default());
    }
    passes
}

/// One request until it is answered: a pass for each attempt.
async fn one(caller: &Caller, phones: &Phones, stage: &Stage, place: usize) -> Vec<Pass> {
    let begun = Instant::now();
    let mut passes = Vec::new();
    loop {
        let request = caller.kind.request("0".to_owned(), &caller.inputs[place], 0, (false, false));
        let mut pass = Pass { first: place, sent: vec![stage.now_us()], ..Pass::default() };
        let answer = match (&caller.target, phones.current()) {
            (Target::List(_), Some((number, (address, channel)))) => {
                pass.address = Some(address.clone());
                let mut request = Request::new(request);
                request.set_timeout(TRY_TIMEOUT);
                let answer = GrpcInferenceServiceClient::new(channel.clone()).model_infer(request).await;
                if answer.is_err() {
                    phones.leave(number);
                }
                answer.map(tonic::Response::into_inner)
            }
            (Target::List(_) | Target::Coordinators(_), _) => Err(Status::internal("no usable address")),
            (Target::Client(client), _) => {
                let deadline = Some(tokio::time::Instant::now() + CALL_TIMEOUT);
                client.router().infer(request, &CallOptions { deadline, rich_status: true, ..CallOptions::default() }).await
            }
        };
        let gave_up = begun.elapsed() > PATIENCE;
        let is_answered = answer.is_ok();
        match answer {
            Ok(response) => pass.delivered.push(delivery(stage, response)),
            Err(status) => pass.broken = Some(Break { gave_up, ..break_of(stage, &status) }),
        }
        passes.push(pass);
        if is_answered || gave_up {
            return passes;
        }
        // The next address is asked at once; when the round is over there is nobody else to ask.
        if passes.len().is_multiple_of(phones.channels.len().max(1)) {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// A connection of a caller that wants to know soon when nobody is there any more.
fn endpoint(address: &str) -> Result<Endpoint, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}"));
    let endpoint = endpoint.map_err(|error| Status::invalid_argument(error.to_string()))?;
    let second = Duration::from_secs(1);
    let endpoint = endpoint.connect_timeout(second).tcp_nodelay(true).http2_keep_alive_interval(second / 2);
    Ok(endpoint.keep_alive_timeout(second).keep_alive_while_idle(true))
}

/// Ticks at a steady pace. Those that nobody waited for are left out.
fn steady(period: Duration) -> Interval {
    let mut ticks = interval(period.max(Duration::from_micros(1)));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}
