//! `cresset bench`: load on a model of any server of the Open Inference Protocol, and what came of it.
//!
//! | room | its job |
//! | --- | --- |
//! | [`args`] | the flags |
//! | [`inputs`] | what to send: given arrays, and made-up ones; pure but for a seed |
//! | [`schedule`] | when requests of an open loop are due; pure but for a seed |
//! | [`tally`] | latencies and failures, added up; pure |
//! | [`wire`] | requests as bytes that are encoded once, and the little of an answer that is looked at |
//! | [`http2`] | connections and calls |
//! | [`caller`], [`lane`] | one request at a time, as a call of its own or on a shared stream |
//! | [`drive`], [`timer`] | the closed and the open loop |
//! | [`run`](mod@run) | threads, connections, the common start, CPU time |
//! | [`report`] | the table and the JSON |

mod args;
mod caller;
mod drive;
mod http2;
mod inputs;
mod lane;
mod process;
mod report;
mod run;
mod schedule;
mod tally;
mod timer;
mod wire;

use std::{collections::BTreeMap, fmt, sync::Arc};

use anyhow::ensure;
use cresset_client::CallError;
use cresset_proto::{
    inference::{
        ModelConfig, ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, ModelMetadataResponse,
        grpc_inference_service_client::GrpcInferenceServiceClient,
    },
    tensor,
};
use prost::Message;
use serde::Serialize;
use tonic::Code;

pub use self::args::Args;
use self::{
    caller::{FirstAnswers, Script},
    inputs::Wishes,
    report::{Level, Report},
    run::Run,
    schedule::Arrivals,
};
use crate::{
    connect::{Cluster, request},
    output::{self, Format},
    predict,
    settings::Settings,
};

/// One level of load.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Load {
    /// So many requests are kept in flight.
    Closed {
        /// How many.
        concurrency: u32,
    },
    /// Requests are sent when it is time to.
    Open {
        /// Requests per second.
        rate: f64,
        /// How they are spread.
        #[serde(serialize_with = "as_word")]
        arrivals: Arrivals,
        /// How many may be in flight.
        inflight_max: u32,
    },
}

fn as_word<S: serde::Serializer>(arrivals: &Arrivals, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(arrivals.as_str())
}

impl Load {
    fn is_closed(self) -> bool {
        matches!(self, Self::Closed { .. })
    }

    /// The levels that the user asked for.
    fn levels(args: &Args) -> Vec<Self> {
        let open = |rate: &f64| Self::Open { rate: *rate, arrivals: args.arrivals, inflight_max: args.inflight_max };
        let closed = |concurrency: &u32| Self::Closed { concurrency: *concurrency };
        match (args.rate.is_empty(), args.concurrency.is_empty()) {
            (false, _) => args.rate.iter().map(open).collect(),
            (true, false) => args.concurrency.iter().map(closed).collect(),
            (true, true) => vec![closed(&1)],
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed { concurrency } => write!(f, "{concurrency} in flight"),
            Self::Open { rate, .. } => write!(f, "{rate}/s"),
        }
    }
}

/// Runs `cresset bench`.
///
/// # Errors
/// When there is nothing to send or nobody to send it to, when a level got no answer at all, and with `--check` when an
/// answer differs.
pub async fn run(cluster: &Cluster, args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let (message, is_decoupled) = message(cluster, args).await?;
    let batch = rows(&message);
    let body = message.encode_to_vec();
    let endpoints: Vec<_> = settings.endpoints.iter().take(args.connections as usize).cloned().collect();
    let mut report = Report {
        model: args.name.clone(),
        version: message.model_version.clone(),
        endpoints: endpoints.clone(),
        mode: if args.stream { "stream" } else { "unary" },
        batch,
        request_bytes: body.len(),
        connections: args.connections,
        sequence_length: args.sequence_length,
        levels: vec![],
    };
    let script = Script {
        body: body.into(),
        limit: settings.timeout(),
        tells_deadline: args.deadline,
        sequence_length: args.sequence_length,
        wants_final: is_decoupled,
        first: args.check.then(|| Arc::new(FirstAnswers::default())),
    };
    eprintln!("cresset: {} at {}: {} bytes a request", args.name, endpoints.join(", "), report.request_bytes);
    for load in Load::levels(args) {
        let (tally, costs) = Run::new(args, load, &endpoints, &script).go().await?;
        report.levels.push(Level::of(load, &tally, &costs, batch, &args.percentiles));
    }
    match settings.output {
        Format::Json => output::print_json(&report)?,
        Format::Table => output::print(&report.table(&args.percentiles))?,
    }
    report.notes().iter().for_each(|note| eprintln!("cresset: {note}"));
    for level in &report.levels {
        ensure!(level.answered > 0, "{}: no request was answered", level.load);
        ensure!(level.mismatched == 0, "{}: {} answers differ from the first", level.load, level.mismatched);
    }
    Ok(())
}

/// The request to send again and again, and whether the model is decoupled.
async fn message(cluster: &Cluster, args: &Args) -> anyhow::Result<(ModelInferRequest, bool)> {
    // Files that aren't there are found before anyone is asked.
    let arrays = predict::read_files(&args.inputs)?;
    let version = args.version.map(|version| version.to_string()).unwrap_or_default();
    let metadata = metadata(cluster, &args.name, &version).await?;
    let config = config(cluster, &args.name, &version).await?;
    let given = predict::tensors(&args.inputs, arrays, &metadata)?;
    let given: BTreeMap<_, _> = given.into_iter().map(|tensor| (tensor.name.clone(), tensor)).collect();
    let shapes = args.shapes.iter().map(|arg| (arg.name.clone(), arg.shape.clone())).collect();
    let wishes = Wishes { shapes, batch: args.batch, seed: args.seed };
    let has_batch = config.as_ref().map(|config| config.max_batch_size > 0);
    let mut message = ModelInferRequest { model_name: args.name.clone(), model_version: version, ..Default::default() };
    for input in inputs::inputs(&metadata.inputs, has_batch, given, &wishes)? {
        tensor::push_input(&mut message, input);
    }
    let is_decoupled = config.and_then(|config| config.model_transaction_policy).is_some_and(|policy| policy.decoupled);
    Ok((message, is_decoupled))
}

/// Rows of a request: its first dimension, where all inputs share it.
fn rows(message: &ModelInferRequest) -> u64 {
    let mut firsts = message.inputs.iter().map(|input| input.shape.first().copied().unwrap_or(1));
    let first = firsts.next().unwrap_or(1);
    if firsts.all(|other| other == first) { u64::try_from(first).unwrap_or(1).max(1) } else { 1 }
}

async fn metadata(cluster: &Cluster, name: &str, version: &str) -> Result<ModelMetadataResponse, CallError> {
    let message = ModelMetadataRequest { name: name.to_owned(), version: version.to_owned() };
    let ask =
        async |channel, limit| GrpcInferenceServiceClient::new(channel).model_metadata(request(message.clone(), limit)).await;
    cluster.call(ask).await
}

/// The model's configuration; `None` from a server that has no such call.
async fn config(cluster: &Cluster, name: &str, version: &str) -> Result<Option<ModelConfig>, CallError> {
    let message = ModelConfigRequest { name: name.to_owned(), version: version.to_owned() };
    let ask = async |channel, limit| GrpcInferenceServiceClient::new(channel).model_config(request(message.clone(), limit)).await;
    match cluster.call(ask).await {
        Ok(answer) => Ok(answer.config),
        Err(CallError::Refused(status)) if status.code() == Code::Unimplemented => Ok(None),
        Err(error) => Err(error),
    }
}
