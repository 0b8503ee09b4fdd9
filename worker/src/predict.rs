//! From a request to an answer, the same for unary calls, streams and sequences that routers steer.
//!
//! The order of checks is Triton's: version, model, parameters, tensors, outputs, fit.
use std::{
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use cresset_proto::{
    answers::NO_SHARED_MEMORY,
    ids::WorkerId,
    inference::{ModelInferRequest, ModelInferResponse},
    parameters::Parameters,
    shared_memory::{SharedMemoryError, is_used},
    tensor::{Tensor, push_output, take_inputs},
};
use futures::{FutureExt, StreamExt, future::BoxFuture, stream::BoxStream};
use tracing::{Instrument, Span};

use crate::{
    admission::Admitted,
    decoupled::Responses,
    error::PredictError,
    metrics,
    models::{Models, Runner, ServedModel},
    queue::{Answered, Terms},
    sequence::{Standing, detached::Detached},
    shared_memory::{Placements, SharedMemory},
    statistics::Failure,
};

/// What every service of this worker shares.
pub struct Worker {
    /// Its name.
    pub id: WorkerId,
    /// Its models.
    pub models: Models,
    /// What clients on this host share with it.
    pub shared_memory: SharedMemory,
    /// Sequences that may have lost their router.
    pub detached: Arc<Detached>,
    incarnation: AtomicU64,
    draining: AtomicBool,
    requests_total: AtomicU64,
    in_flight: AtomicU64,
}

impl Worker {
    /// A worker in a new life.
    pub fn new(id: WorkerId, incarnation: u64, models: Models) -> Arc<Self> {
        Arc::new(Self {
            id,
            models,
            shared_memory: SharedMemory::default(),
            detached: Arc::default(),
            incarnation: incarnation.into(),
            draining: false.into(),
            requests_total: 0.into(),
            in_flight: 0.into(),
        })
    }

    /// Which life this is.
    pub fn incarnation(&self) -> u64 {
        self.incarnation.load(Ordering::Acquire)
    }

    /// Begins another life; routers that mean the old one are refused from here on.
    pub fn set_incarnation(&self, incarnation: u64) {
        self.incarnation.store(incarnation, Ordering::Release);
    }

    /// Takes nothing new from here on.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Release);
    }

    /// Whether nothing new is taken.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }

    /// Requests answered or refused since the start.
    pub fn requests_total(&self) -> u64 {
        self.requests_total.load(Ordering::Relaxed)
    }

    /// Requests between arrival and answer.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Refuses a call that means another life of this worker.
    ///
    /// # Errors
    /// [`PredictError::Fenced`], [`PredictError::Draining`].
    pub fn fence(&self, wanted: Option<u64>) -> Result<(), PredictError> {
        let running = self.incarnation();
        match wanted {
            Some(wanted) if wanted != running => Err(PredictError::Fenced { running, wanted }),
            _ if self.is_draining() => Err(PredictError::Draining),
            _ => Ok(()),
        }
    }

    /// Counts a request from here until the guard goes.
    pub fn count(self: &Arc<Self>) -> Counted {
        self.requests_total.fetch_add(1, Ordering::Relaxed);
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        metrics::in_flight().inc();
        Counted(Arc::clone(self))
    }

    /// The span of a request.
    pub fn span(&self, request: &ModelInferRequest) -> Span {
        tracing::info_span!(
            "predict",
            worker = %self.id,
            incarnation = self.incarnation(),
            epoch = self.models.epoch(),
            model = %request.model_name,
            version = %request.model_version,
            request = %request.id,
        )
    }

    /// Checks a request and puts it into its line at once, so that requests of a sequence keep their order; the future
    /// waits for the answer. For calls that can have only one.
    pub fn begin(
        self: &Arc<Self>,
        mut request: ModelInferRequest,
        deadline: Option<Instant>,
        span: Span,
    ) -> impl Future<Output = Result<ModelInferResponse, PredictError>> + Send + use<> {
        let watch = self.watch();
        let entered = span.in_scope(|| self.enter(&mut request, deadline, false));
        one(watch, entered, request.id).instrument(span)
    }

    /// As [`begin`](Self::begin), for callers that take any number of answers.
    pub fn begin_any(self: &Arc<Self>, mut request: ModelInferRequest, deadline: Option<Instant>, span: Span) -> Begun {
        let watch = self.watch();
        match span.in_scope(|| self.enter(&mut request, deadline, true)) {
            Ok((served, Waiting::Decoupled(responses), placements)) => {
                Begun::Many(many(watch, served, responses, placements, request.id, span))
            }
            entered => Begun::One(one(watch, entered, request.id).instrument(span).boxed()),
        }
    }

    fn watch(self: &Arc<Self>) -> Watch {
        Watch { _counted: self.count(), begun: Instant::now() }
    }

    fn enter(&self, request: &mut ModelInferRequest, deadline: Option<Instant>, takes_many: bool) -> Entered {
        let served = self.models.find_to_run(&request.model_name, &request.model_version).map_err(|error| (None, error))?;
        match line_up(&served, request, deadline, takes_many, &self.shared_memory) {
            Ok((waiting, placements)) => Ok((served, waiting, placements)),
            Err(error) => Err((Some(served), error)),
        }
    }
}

/// A request that was taken.
pub enum Begun {
    /// It has one answer.
    One(BoxFuture<'static, Result<ModelInferResponse, PredictError>>),
    /// It has any number of them.
    Many(BoxStream<'static, Result<ModelInferResponse, PredictError>>),
}

type Entered = Result<(Arc<ServedModel>, Waiting, Placements), (Option<Arc<ServedModel>>, PredictError)>;

/// Counts a request and knows when it came.
struct Watch {
    _counted: Counted,
    begun: Instant,
}

impl Watch {
    /// Notes how a request ended, once.
    fn ended(&self, served: Option<&ServedModel>, result: Result<(), &PredictError>) {
        let took = self.begun.elapsed();
        if let Some(served) = served {
            served.metrics.request(result.err().map(|error| error.reason().as_str()), took);
        }
        if let Some(error) = result.err().filter(|error| error.is_ours()) {
            tracing::warn!(%error, "a request failed");
        }
    }
}

async fn one(watch: Watch, entered: Entered, id: String) -> Result<ModelInferResponse, PredictError> {
    let (served, waiting, placements) = match entered {
        Ok(entered) => entered,
        Err((served, error)) => {
            watch.ended(served.as_deref(), Err(&error));
            // What was refused before it was in line is counted only if there was no room for it.
            if let Some(served) = served.filter(|_| Failure::of(error.reason()) == Failure::Rejected) {
                served.metrics.statistics.failure(Failure::Rejected, watch.begun.elapsed());
            }
            return Err(error);
        }
    };
    let rows = waiting.rows();
    let answer = waiting.answer(&served).await;
    let times = answer.as_ref().map(|answered| (answered.queued, answered.timing));
    served.metrics.ended(rows, watch.begun.elapsed(), times);
    let answer = answer.and_then(|answered| {
        let mut response = respond(Some(&served), id, answered.outputs);
        placements.apply(&mut response)?;
        Ok(response)
    });
    watch.ended(Some(&served), answer.as_ref().map(drop));
    answer
}

fn many(
    watch: Watch,
    served: Arc<ServedModel>,
    responses: Responses,
    placements: Placements,
    id: String,
    span: Span,
) -> BoxStream<'static, Result<ModelInferResponse, PredictError>> {
    let state = Some((watch, responses, placements));
    let next = move |state: Option<(Watch, Responses, Placements)>| {
        let (served, id, span) = (Arc::clone(&served), id.clone(), span.clone());
        async move {
            let (watch, mut responses, placements) = state?;
            let answer = match responses.recv().await {
                Some(Ok(answered)) => {
                    let mut response = respond(Some(&served), id, answered.outputs);
                    placements.apply(&mut response).map(|()| response).map_err(PredictError::from)
                }
                Some(Err(error)) => Err(error),
                None => {
                    watch.ended(Some(&served), Ok(()));
                    return None;
                }
            };
            if let Err(error) = &answer {
                span.in_scope(|| watch.ended(Some(&served), Err(error)));
                return Some((answer, None));
            }
            Some((answer, Some((watch, responses, placements))))
        }
    };
    futures::stream::unfold(state, next).boxed()
}

/// A request that has passed every check.
enum Waiting {
    Queue(Admitted, Terms),
    Sequence(tokio::sync::oneshot::Receiver<Result<Answered, PredictError>>),
    Decoupled(Responses),
}

impl Waiting {
    /// Rows of the request.
    fn rows(&self) -> usize {
        match self {
            Self::Queue(admitted, _) => admitted.rows,
            // Requests of sequences have one row; a decoupled model's request is counted where it is run.
            Self::Sequence(_) | Self::Decoupled(_) => 1,
        }
    }

    async fn answer(self, served: &ServedModel) -> Result<Answered, PredictError> {
        let unloaded = || PredictError::Unloaded(served.key.model.clone());
        match (self, &served.runner) {
            (Self::Queue(admitted, terms), Runner::Queue(queue)) => match terms.deadline {
                Some(at) => {
                    let waited = tokio::time::timeout_at(at.into(), queue.run(admitted, terms));
                    waited.await.unwrap_or(Err(PredictError::Deadline))
                }
                None => queue.run(admitted, terms).await,
            },
            (Self::Sequence(answer), _) => answer.await.unwrap_or_else(|_| Err(unloaded())),
            (Self::Queue(..) | Self::Decoupled(_), _) => Err(unloaded()),
        }
    }
}

fn line_up(
    served: &ServedModel,
    request: &mut ModelInferRequest,
    deadline: Option<Instant>,
    takes_many: bool,
    memory: &SharedMemory,
) -> Result<(Waiting, Placements), PredictError> {
    if served.contract.decoupled && !takes_many {
        return Err(PredictError::Unsupported("ModelInfer RPC doesn't support models with decoupled transaction policy".into()));
    }
    let parameters = Parameters::read(&request.parameters)?;
    let terms = Terms { deadline, priority: parameters.priority, timeout_us: parameters.timeout_us };
    let (tensors, placements) = memory.take(request)?;
    let admitted = served.contract.admit(request, tensors)?;
    let waiting = match &served.runner {
        // Sequence parameters on a model whose requests are independent mean nothing, as in Triton.
        Runner::Queue(_) => Waiting::Queue(admitted, terms),
        Runner::Decoupled(decoupled) => Waiting::Decoupled(decoupled.run(admitted, terms)?),
        Runner::Sequences(sequences) => {
            let id = parameters.sequence_id.ok_or_else(|| PredictError::NoSequenceId(served.key.model.clone()))?;
            let standing = Standing { id: &id, start: parameters.sequence_start, end: parameters.sequence_end };
            Waiting::Sequence(sequences.enter(standing, admitted, terms)?)
        }
    };
    Ok((waiting, placements))
}

/// Checks the tensors of a request against its model. They have to be in the request itself: this is for requests that came
/// by way of a router, whose client may be on another host.
///
/// # Errors
/// [`PredictError::Tensor`], [`PredictError::SharedMemory`], [`PredictError::Admission`].
pub fn admit(served: &ServedModel, request: &mut ModelInferRequest) -> Result<Admitted, PredictError> {
    if is_used(request) {
        return Err(SharedMemoryError::NotServed(NO_SHARED_MEMORY).into());
    }
    let tensors = take_inputs(request)?;
    Ok(served.contract.admit(request, tensors)?)
}

/// The response that carries these outputs.
pub fn respond(served: Option<&ServedModel>, id: String, outputs: Vec<Tensor>) -> ModelInferResponse {
    let mut response = ModelInferResponse { id, ..Default::default() };
    if let Some(served) = served {
        response.model_name.clone_from(&served.key.model);
        response.model_version = served.key.version.to_string();
    }
    for tensor in outputs {
        push_output(&mut response, tensor);
    }
    response
}

/// A request that is being worked on.
pub struct Counted(Arc<Worker>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        metrics::in_flight().dec();
    }
}
