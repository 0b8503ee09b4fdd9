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
use tracing::{Instrument, Span};

use crate::{
    admission::Admitted,
    error::PredictError,
    metrics,
    models::{Models, Runner, ServedModel},
    shared_memory::{Placements, SharedMemory},
};

/// What every service of this worker shares.
pub struct Worker {
    /// Its name.
    pub id: WorkerId,
    /// Its models.
    pub models: Models,
    /// What clients on this host share with it.
    pub shared_memory: SharedMemory,
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
    /// waits for the answer.
    pub fn begin(
        self: &Arc<Self>,
        mut request: ModelInferRequest,
        deadline: Option<Instant>,
        span: Span,
    ) -> impl Future<Output = Result<ModelInferResponse, PredictError>> + Send + use<> {
        let counted = self.count();
        let begun = Instant::now();
        let entered = span.in_scope(|| self.enter(&mut request, deadline));
        async move {
            let _counted = counted;
            let (served, answer) = match entered {
                Ok((served, waiting, placements)) => {
                    let outputs = waiting.answer(&served).await;
                    let answer = outputs.and_then(|outputs| {
                        let mut response = respond(Some(&served), request.id, outputs);
                        placements.apply(&mut response)?;
                        Ok(response)
                    });
                    (Some(served), answer)
                }
                Err((served, error)) => (served, Err(error)),
            };
            if let Some(served) = &served {
                served.metrics.request(answer.as_ref().err().map(|error| error.reason().as_str()), begun.elapsed());
            }
            answer.inspect_err(|error| {
                if error.is_ours() {
                    tracing::warn!(%error, "a request failed");
                }
            })
        }
        .instrument(span)
    }

    #[allow(clippy::type_complexity)]
    fn enter(
        &self,
        request: &mut ModelInferRequest,
        deadline: Option<Instant>,
    ) -> Result<(Arc<ServedModel>, Waiting, Placements), (Option<Arc<ServedModel>>, PredictError)> {
        let served = self.models.find(&request.model_name, &request.model_version).map_err(|error| (None, error))?;
        match line_up(&served, request, deadline, &self.shared_memory) {
            Ok((waiting, placements)) => Ok((served, waiting, placements)),
            Err(error) => Err((Some(served), error)),
        }
    }
}

/// A request that has passed every check.
enum Waiting {
    Queue(Admitted, Option<Instant>),
    Sequence(tokio::sync::oneshot::Receiver<Result<Vec<Tensor>, PredictError>>),
}

impl Waiting {
    async fn answer(self, served: &ServedModel) -> Result<Vec<Tensor>, PredictError> {
        let unloaded = || PredictError::Unloaded(served.key.model.clone());
        match (self, &served.runner) {
            (Self::Queue(admitted, deadline), Runner::Queue(queue)) => match deadline {
                Some(at) => {
                    let waited = tokio::time::timeout_at(at.into(), queue.run(admitted, deadline));
                    waited.await.unwrap_or(Err(PredictError::Deadline))
                }
                None => queue.run(admitted, None).await,
            },
            (Self::Queue(..), Runner::Sequences(_)) => Err(unloaded()),
            (Self::Sequence(answer), _) => answer.await.unwrap_or_else(|_| Err(unloaded())),
        }
    }
}

fn line_up(
    served: &ServedModel,
    request: &mut ModelInferRequest,
    deadline: Option<Instant>,
    memory: &SharedMemory,
) -> Result<(Waiting, Placements), PredictError> {
    let parameters = Parameters::read(&request.parameters)?;
    let (tensors, placements) = memory.take(request)?;
    let admitted = served.contract.admit(request, tensors)?;
    let waiting = match &served.runner {
        // Sequence parameters on a model whose requests are independent mean nothing, as in Triton.
        Runner::Queue(_) => Waiting::Queue(admitted, deadline),
        Runner::Sequences(sequences) => {
            let id = parameters.sequence_id.ok_or_else(|| PredictError::NoSequenceId(served.key.model.clone()))?;
            let bounds = (parameters.sequence_start, parameters.sequence_end);
            Waiting::Sequence(sequences.enter(&id, bounds, admitted, deadline)?)
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
