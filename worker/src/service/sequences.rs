//! Sequences that a router steers: one stream for each, checkpoints on demand.
use std::{pin::Pin, sync::Arc, time::Instant};

use bytes::Bytes;
use cresset_proto::{
    fleet::v1::{
        KeptAnswer, Open, RunRequest, RunResponse, Step, StepError, TakeRequest, TakeResponse, kept_answer, run_request::Message,
        run_response, sequences_service_server::SequencesService,
    },
    ids::SequenceId,
    inference::ModelInferRequest,
    parameters::{ParameterError, Parameters, keys, number_of},
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
    sequence::{LiveSequence, Standing, detached::Attachment},
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

    // A worker that drains gives what it holds as well: it had better go elsewhere.
    async fn take(&self, request: Request<TakeRequest>) -> Result<Response<TakeResponse>, Status> {
        let held = self.worker.detached.take(request.into_inner()).await;
        held.map(Response::new).map_err(|error| error.status())
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
    let live = sequences.open(open.checkpoint.clone()).await?;
    let _counted = Gauge::up();
    let attachment = match open.resumable {
        Some(resumable) => Some(worker.detached.attach(resumable, served.key.version, open.generation).await?),
        None => None,
    };
    let next = open.checkpoint_ordinal + 1;
    let mut run = Run { worker: Arc::clone(worker), served, live, attachment, is_intact: true };
    let ended = run.steps(next, &mut requests, responses).await;
    run.leave().await;
    ended
}

/// A sequence and the stream that runs it.
struct Run {
    worker: Arc<Worker>,
    served: Arc<ServedModel>,
    live: LiveSequence,
    /// Of a sequence that its client can take up again.
    attachment: Option<Attachment>,
    /// Whether the state is the one after the last answer.
    is_intact: bool,
}

impl Run {
    async fn steps(
        &mut self,
        mut next: u64,
        requests: &mut Streaming<RunRequest>,
        responses: &Responses,
    ) -> Result<(), PredictError> {
        loop {
            let message = tokio::select! {
                biased;
                () = self.wanted_elsewhere() => return Err(self.taken_over()),
                message = requests.message() => message,
            };
            let Ok(Some(RunRequest { message: Some(message) })) = message else { return Ok(()) };
            let Message::Step(step) = message else {
                return Err(PredictError::SequenceProtocol("a sequence is opened once".into()));
            };
            if step.ordinal != next {
                let text = format!("ordinal {} came where {next} was expected", step.ordinal);
                return Err(PredictError::SequenceProtocol(text));
            }
            if self.worker.is_draining() {
                return Err(PredictError::Draining);
            }
            next += 1;
            let response = self.step(step).await;
            tokio::select! {
                biased;
                sent = responses.send(Ok(response)) => if sent.is_err() {
                    return Ok(());
                },
                () = self.wanted_elsewhere() => return Err(self.taken_over()),
            }
            if !self.is_intact {
                // The router knows the state as it was before, and opens the sequence anew.
                return Err(PredictError::Unloaded(self.served.key.model.clone()));
            }
        }
    }

    async fn step(&mut self, mut step: Step) -> RunResponse {
        let span = match &step.request {
            Some(request) => self.worker.span(request),
            None => tracing::Span::none(),
        };
        let request = step.request.get_or_insert_default();
        let parameters = Parameters::read(&request.parameters);
        // Of a client that can take the sequence up again, whatever else its request says.
        let said = |key| number_of(&request.parameters, key);
        let (ordinal, ack) = if self.attachment.is_some() { (said(keys::ORDINAL), said(keys::ACK)) } else { (0, 0) };
        let is_last = parameters.as_ref().is_ok_and(|parameters| parameters.sequence_end);
        let (response, is_intact) = answer(&self.worker, &self.served, &mut self.live, step, parameters).instrument(span).await;
        self.is_intact = is_intact;
        if let (Some(attachment), true) = (&mut self.attachment, is_intact) {
            attachment.acknowledge(ack);
            let (result, is_last) = match response.result.clone() {
                Some(run_response::Result::Response(response)) => (Some(kept_answer::Result::Response(response)), is_last),
                // The sequence didn't hear of its end.
                Some(run_response::Result::Error(error)) => (Some(kept_answer::Result::Error(error)), false),
                None => (None, false),
            };
            attachment.answered(KeptAnswer { ordinal, result }, is_last);
        }
        response
    }

    async fn wanted_elsewhere(&self) {
        match &self.attachment {
            Some(attachment) => attachment.wanted_elsewhere().await,
            None => std::future::pending().await,
        }
    }

    fn taken_over(&self) -> PredictError {
        PredictError::TakenOver(self.attachment.as_ref().map_or_else(String::new, |attachment| attachment.sequence().to_owned()))
    }

    /// Leaves what another router needs to go on.
    async fn leave(mut self) {
        let Some(attachment) = self.attachment.take().filter(|_| self.is_intact) else { return };
        let checkpoint = match attachment.is_over() {
            true => None,
            false => match self.live.checkpoint().await {
                Ok(checkpoint) => Some(checkpoint),
                Err(error) => {
                    tracing::warn!(model = self.served.key.model, %error, "a sequence's state can't be saved for another router");
                    return;
                }
            },
        };
        // Its place is free before anybody hears that it has left.
        drop(self.live);
        attachment.detach(checkpoint);
    }
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
async fn answer(
    worker: &Arc<Worker>,
    served: &ServedModel,
    live: &mut LiveSequence,
    step: Step,
    parameters: Result<Parameters, ParameterError>,
) -> (RunResponse, bool) {
    let _counted = worker.count();
    let begun = Instant::now();
    let ordinal = step.ordinal;
    let mut request = step.request.unwrap_or_default();
    let outcome = match checked(served, parameters, &mut request) {
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

fn checked(
    served: &ServedModel,
    parameters: Result<Parameters, ParameterError>,
    request: &mut ModelInferRequest,
) -> Result<(Parameters, Admitted), PredictError> {
    Ok((parameters?, admit(served, request)?))
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
