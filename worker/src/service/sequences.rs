//! Sequences that a router steers: one stream for each, checkpoints on demand.
use std::{pin::Pin, sync::Arc, time::Instant};

use bytes::Bytes;
use cresset_proto::{
    fleet::v1::{
        Open, RunRequest, RunResponse, Step, StepError, run_request::Message, run_response,
        sequences_service_server::SequencesService,
    },
    ids::SequenceId,
    inference::ModelInferRequest,
    parameters::Parameters,
};
use futures::Stream;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use tracing::Instrument;

use crate::{
    admission::Admitted,
    error::PredictError,
    metrics,
    models::{Runner, ServedModel},
    predict::{Worker, admit, respond},
    queue::Terms,
    sequence::{LiveSequence, Standing},
};

/// Responses that may wait for a slow reader; beyond them the sequence isn't run on.
const RESPONSES_MAX: usize = 16;

pub(super) struct Sequences {
    pub(super) worker: Arc<Worker>,
}

#[tonic::async_trait]
impl SequencesService for Sequences {
    type RunStream = Pin<Box<dyn Stream<Item = Result<RunResponse, Status>> + Send>>;

    async fn run(&self, request: Request<Streaming<RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let worker = Arc::clone(&self.worker);
        let requests = request.into_inner();
        let (responses, stream) = mpsc::channel(RESPONSES_MAX);
        tokio::spawn(async move {
            if let Err(error) = run(&worker, requests, &responses).await {
                // The router may have gone, and then nobody needs to hear it.
                let _ = responses.send(Err(error.status())).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

type Responses = mpsc::Sender<Result<RunResponse, Status>>;

async fn run(worker: &Arc<Worker>, mut requests: Streaming<RunRequest>, responses: &Responses) -> Result<(), PredictError> {
    let Some(open) = first(&mut requests).await? else { return Ok(()) };
    worker.fence(Some(open.incarnation))?;
    let served = find(worker, &open)?;
    let Runner::Sequences(sequences) = &served.runner else {
        let text = format!("model '{}' keeps no state, its requests are independent", open.model);
        return Err(PredictError::SequenceProtocol(text));
    };
    let mut live = sequences.open(open.checkpoint.clone()).await?;
    let _counted = Gauge::up();
    let mut next = open.checkpoint_ordinal + 1;
    while let Ok(Some(RunRequest { message: Some(message) })) = requests.message().await {
        let Message::Step(step) = message else {
            return Err(PredictError::SequenceProtocol("a sequence is opened once".into()));
        };
        if step.ordinal != next {
            let text = format!("ordinal {} came where {next} was expected", step.ordinal);
            return Err(PredictError::SequenceProtocol(text));
        }
        if worker.is_draining() {
            return Err(PredictError::Draining);
        }
        next += 1;
        let span = match &step.request {
            Some(request) => worker.span(request),
            None => tracing::Span::none(),
        };
        let (response, intact) = answer(worker, &served, &mut live, step).instrument(span).await;
        if responses.send(Ok(response)).await.is_err() {
            return Ok(());
        }
        if !intact {
            // The router knows the state as it was before, and opens the sequence anew.
            return Err(PredictError::Unloaded(open.model));
        }
    }
    Ok(())
}

async fn first(requests: &mut Streaming<RunRequest>) -> Result<Option<Open>, PredictError> {
    match requests.message().await {
        Ok(Some(RunRequest { message: Some(Message::Open(open)) })) => Ok(Some(open)),
        Ok(Some(_)) => Err(PredictError::SequenceProtocol("the first message must be open".into())),
        Ok(None) | Err(_) => Ok(None),
    }
}

fn find(worker: &Worker, open: &Open) -> Result<Arc<ServedModel>, PredictError> {
    let served = worker.models.find_to_run(&open.model, &open.version.to_string()).map_err(|error| match error {
        // The router's routes said that it is here: it was, or it will be.
        PredictError::UnknownModel(model) | PredictError::UnknownVersion { model, .. } => PredictError::Unloaded(model),
        other => other,
    })?;
    // A replica that was tried again is of a later generation than its deployment, and as good.
    if served.generation >= open.generation {
        Ok(served)
    } else {
        let (running, wanted) = (served.generation, open.generation);
        Err(PredictError::WrongGeneration { model: open.model.clone(), running, wanted })
    }
}

/// The response of a step, and whether the sequence's state can be trusted after it.
async fn answer(worker: &Arc<Worker>, served: &ServedModel, live: &mut LiveSequence, step: Step) -> (RunResponse, bool) {
    let _counted = worker.count();
    let begun = Instant::now();
    let ordinal = step.ordinal;
    let mut request = step.request.unwrap_or_default();
    let outcome = match checked(served, &mut request) {
        Ok((parameters, admitted)) => {
            // Routers send the caller's own parameters along. One that came without an id is told apart by its stream.
            let id = parameters.sequence_id.unwrap_or(SequenceId::Number(0));
            let standing = Standing { id: &id, start: parameters.sequence_start, end: parameters.sequence_end };
            let terms = Terms { priority: parameters.priority, timeout_us: parameters.timeout_us, deadline: None };
            let stepped = live.step(admitted, standing, terms, step.want_checkpoint).await;
            let times = stepped.as_ref().map(|stepped| (stepped.queued, stepped.timing)).map_err(|failed| &failed.error);
            served.metrics.ended(1, begun.elapsed(), times);
            stepped.map_err(|failed| (failed.error, failed.state_intact))
        }
        Err(error) => Err((error, true)),
    };
    let reason = outcome.as_ref().err().map(|(error, _)| error.reason().as_str());
    served.metrics.request(reason, begun.elapsed());
    match outcome {
        Ok(stepped) => {
            let response = respond(Some(served), request.id, stepped.outputs);
            (message(ordinal, run_response::Result::Response(response), stepped.checkpoint), true)
        }
        Err((error, intact)) => {
            if error.is_ours() {
                tracing::warn!(%error, "a request of a sequence failed");
            }
            let reason = error.reason();
            let code = reason.code() as i32;
            let error = StepError { code, reason: reason.as_str().into(), message: error.to_string() };
            (message(ordinal, run_response::Result::Error(error), None), intact)
        }
    }
}

fn checked(served: &ServedModel, request: &mut ModelInferRequest) -> Result<(Parameters, Admitted), PredictError> {
    let parameters = Parameters::read(&request.parameters)?;
    Ok((parameters, admit(served, request)?))
}

fn message(ordinal: u64, result: run_response::Result, checkpoint: Option<Bytes>) -> RunResponse {
    RunResponse { ordinal, result: Some(result), checkpoint }
}

/// Counts an open sequence.
struct Gauge;

impl Gauge {
    fn up() -> Self {
        metrics::sequences().inc();
        Self
    }
}

impl Drop for Gauge {
    fn drop(&mut self) {
        metrics::sequences().dec();
    }
}
