//! Requests that are answered any number of times.
//!
//! Each request has a copy of the model to itself, which is asked for one response after the other; other requests' turns
//! come in between. A caller that reads slowly slows its own request down and nobody else's.
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::sync::{Semaphore, mpsc};

use crate::{
    admission::Admitted,
    batch::{answers, assemble},
    contract::Contract,
    engine::{
        EngineError, Outputs, Timing,
        device::{PlacedGeneration, PlacedModel},
    },
    error::{PUSHBACK, PredictError},
    metrics::ModelMetrics,
    queue::{Answered, Bounds, Terms},
    statistics::{Failure, ResponseKind},
};

/// Requests of one model that are being answered at once.
const OPEN_REQUESTS_MAX: usize = 256;
/// Responses to one request that its caller hasn't taken yet; beyond them the model isn't asked on.
const RESPONSES_MAX: usize = 4;

/// The responses to one request, until the channel ends.
pub type Responses = mpsc::Receiver<Result<Answered, PredictError>>;

/// The requests of one decoupled model.
pub struct Decoupled {
    contract: Arc<Contract>,
    instances: Vec<PlacedModel>,
    next: AtomicUsize,
    open: Semaphore,
    waiting: Arc<Semaphore>,
    bounds: Bounds,
    metrics: ModelMetrics,
}

impl Decoupled {
    /// Requests of a model; `instances` must not be empty.
    pub fn new(contract: Arc<Contract>, instances: Vec<PlacedModel>, bounds: Bounds, metrics: ModelMetrics) -> Arc<Self> {
        let waiting = Arc::new(Semaphore::new(bounds.requests_max.min(Semaphore::MAX_PERMITS)));
        let open = Semaphore::new(OPEN_REQUESTS_MAX);
        Arc::new(Self { contract, instances, next: AtomicUsize::new(0), open, waiting, bounds, metrics })
    }

    /// Requests that wait or are being answered.
    pub fn len(&self) -> usize {
        self.bounds.requests_max.saturating_sub(self.waiting.available_permits())
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns once there are none.
    pub async fn idle(&self) {
        let all = u32::try_from(self.bounds.requests_max.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        // The semaphore is never closed.
        drop(self.waiting.acquire_many(all).await);
    }

    /// Takes a request. Dropping the receiver ends it.
    ///
    /// # Errors
    /// [`PredictError::QueueFull`].
    pub fn run(self: &Arc<Self>, admitted: Admitted, terms: Terms) -> Result<Responses, PredictError> {
        let permit = Arc::clone(&self.waiting).try_acquire_owned().map_err(|_| PredictError::QueueFull {
            model: self.contract.name.clone(),
            requests_max: self.bounds.requests_max,
            pushback: PUSHBACK,
        })?;
        let (responses, receiver) = mpsc::channel(RESPONSES_MAX);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let _permit = permit;
            let came = Instant::now();
            let statistics = &this.metrics.statistics;
            tokio::select! {
                ended = this.answer(&admitted, terms, came, &responses) => match ended {
                    Ok(Some((queued, timing))) => {
                        // One execution, as Triton counts it, however often it answered.
                        this.metrics.batch(admitted.rows, &timing);
                        statistics.success(admitted.rows as u64, came.elapsed(), queued, &timing);
                    }
                    Ok(None) => statistics.cancelled(came.elapsed()),
                    Err(error) => {
                        statistics.failure(Failure::of(error.reason()), came.elapsed());
                        let _ = responses.send(Err(error)).await;
                    }
                },
                // The caller has gone: what the device has begun ends there, and nothing more is begun.
                () = responses.closed() => statistics.cancelled(came.elapsed()),
            }
        });
        Ok(receiver)
    }

    /// Gives the responses; what the request took altogether, or `None` if its caller went away.
    async fn answer(
        &self,
        admitted: &Admitted,
        terms: Terms,
        came: Instant,
        responses: &mpsc::Sender<Result<Answered, PredictError>>,
    ) -> Result<Option<(Duration, Timing)>, PredictError> {
        let pending = self.metrics.statistics.pending();
        let turn = self.open.acquire();
        let turn = match terms.deadline {
            Some(at) => tokio::time::timeout_at(at.into(), turn).await.map_err(|_| PredictError::Deadline)?,
            None => turn.await,
        };
        // The semaphore is never closed.
        let _turn = turn.map_err(|_| PredictError::Unloaded(self.contract.name.clone()))?;
        let generation = self.open_generation(admitted).await?;
        drop(pending);
        let mut sum: Option<Timing> = None;
        for index in 0.. {
            if terms.deadline.is_some_and(|at| at <= Instant::now()) {
                return Err(PredictError::Deadline);
            }
            let Some(outputs) = generation.next().await.map_err(|source| self.engine_error(source))? else { break };
            let timing = outputs.timing;
            sum = Some(sum.map_or(timing, |sum| sum.and_then(timing)));
            let answer = self.share(admitted, &outputs, came)?;
            self.metrics.statistics.response(index, timing.input + timing.infer, timing.output, ResponseKind::Success);
            if responses.send(Ok(answer)).await.is_err() {
                return Ok(None);
            }
        }
        let timing = sum.unwrap_or_else(|| Timing::of_model(Instant::now()));
        Ok(Some((timing.began.saturating_duration_since(came), timing)))
    }

    async fn open_generation(&self, admitted: &Admitted) -> Result<PlacedGeneration, PredictError> {
        let turn = self.next.fetch_add(1, Ordering::Relaxed) % self.instances.len().max(1);
        let instance = self.instances.get(turn).ok_or_else(|| PredictError::Unloaded(self.contract.name.clone()))?;
        let inputs = assemble(&self.contract, &[admitted]);
        instance.open_generation(inputs).await.map_err(|source| self.engine_error(source))
    }

    fn share(&self, admitted: &Admitted, outputs: &Outputs, came: Instant) -> Result<Answered, PredictError> {
        let answer = answers(&self.contract, &[admitted], outputs).pop();
        let outputs_of_request = answer.unwrap_or_else(|| Err(PredictError::Unloaded(self.contract.name.clone())))?;
        let queued = outputs.timing.began.saturating_duration_since(came);
        Ok(Answered { outputs: outputs_of_request, queued, timing: outputs.timing })
    }

    fn engine_error(&self, source: EngineError) -> PredictError {
        PredictError::Engine { model: self.contract.name.clone(), source }
    }
}
