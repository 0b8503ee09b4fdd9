//! A sequence that is open: its place, its state, its next step.
use std::{sync::Arc, time::Instant};

use bytes::Bytes;
use cresset_proto::tensor::Tensor;
use tokio::sync::OwnedSemaphorePermit;

use super::{
    controls::{Standing, control_inputs},
    state,
};
use crate::{
    admission::{Admitted, WantedOutput},
    batch::{answers, assemble},
    contract::Contract,
    engine::{EngineError, Outputs, Timing, device::PlacedSequence},
    error::PredictError,
    metrics::ModelMetrics,
    queue::{ModelQueue, Terms},
};

/// A sequence that is open.
pub struct LiveSequence {
    pub(super) contract: Arc<Contract>,
    pub(super) body: Body,
    pub(super) metrics: ModelMetrics,
    pub(super) _room: OwnedSemaphorePermit,
}

/// Where the state is.
pub(super) enum Body {
    /// In a copy of the module.
    Inside(PlacedSequence),
    /// Here; requests share batches with those of other sequences.
    Tensors { queue: Arc<ModelQueue>, states: Vec<Tensor> },
}

/// A step's result.
#[derive(Debug)]
pub struct Stepped {
    /// The outputs that the request wanted.
    pub outputs: Vec<Tensor>,
    /// The state after the step, if it was asked for and can be had.
    pub checkpoint: Option<Bytes>,
    /// How long the request waited.
    pub queued: std::time::Duration,
    /// Where the time of its batch went.
    pub timing: Timing,
}

/// A step that failed.
#[derive(Debug)]
pub struct StepFailed {
    /// Why.
    pub error: PredictError,
    /// Whether the state is what it was before; if not, the sequence is over here.
    pub state_intact: bool,
}

impl LiveSequence {
    /// The state after the last step.
    ///
    /// # Errors
    /// The engine's; [`EngineError::NotCheckpointable`] for a model whose state can't be saved.
    pub async fn checkpoint(&self) -> Result<Bytes, EngineError> {
        match &self.body {
            Body::Inside(sequence) => sequence.checkpoint().await,
            Body::Tensors { states, .. } => Ok(state::save(&self.contract, states)),
        }
    }

    /// Runs the next request. Calls have to be made in turn.
    ///
    /// # Errors
    /// [`StepFailed`] also says what became of the state.
    pub async fn step(
        &mut self,
        mut admitted: Admitted,
        standing: Standing<'_>,
        terms: Terms,
        want_checkpoint: bool,
    ) -> Result<Stepped, StepFailed> {
        let controls = control_inputs(&self.contract, standing).map_err(|error| StepFailed { error, state_intact: true })?;
        admitted.inputs.extend(controls.into_iter().map(Some));
        match &mut self.body {
            Body::Inside(sequence) => step_inside(&self.contract, sequence, &self.metrics, admitted, want_checkpoint).await,
            Body::Tensors { queue, states } => step_tensors(&self.contract, queue, states, admitted, terms, want_checkpoint)
                .await
                // What came out of a step that failed is dropped, and the state with it.
                .map_err(|error| StepFailed { error, state_intact: true }),
        }
    }
}

async fn step_inside(
    contract: &Contract,
    sequence: &PlacedSequence,
    metrics: &ModelMetrics,
    admitted: Admitted,
    want_checkpoint: bool,
) -> Result<Stepped, StepFailed> {
    let inputs = assemble(contract, &[&admitted]);
    let failed = |source: EngineError| StepFailed {
        // Inputs are checked before the module sees them.
        state_intact: matches!(source, EngineError::BadInput(_)),
        error: PredictError::Engine { model: contract.name.clone(), source },
    };
    let begun = Instant::now();
    let slot = sequence.thread().slot().await.map_err(failed)?;
    let (outputs, checkpoint) = if want_checkpoint {
        let stepped = slot.step_and_checkpoint(sequence, inputs).await.map_err(failed)?;
        (stepped.outputs, Some(stepped.checkpoint))
    } else {
        (slot.step(sequence, inputs).await.map_err(failed)?, None)
    };
    let Outputs { tensors, timing } = outputs;
    metrics.batch(1, &timing);
    let checkpoint = match checkpoint {
        Some(Ok(checkpoint)) => Some(checkpoint),
        Some(Err(error)) => {
            tracing::warn!(model = contract.name, %error, "a sequence's state can't be saved");
            None
        }
        None => None,
    };
    let answer = answers(contract, &[&admitted], &tensors).pop();
    let queued = timing.began.saturating_duration_since(begun);
    match answer.unwrap_or_else(|| Err(PredictError::Unloaded(contract.name.clone()))) {
        Ok(outputs) => Ok(Stepped { outputs, checkpoint, queued, timing }),
        Err(error) => Err(StepFailed { error, state_intact: false }),
    }
}

async fn step_tensors(
    contract: &Contract,
    queue: &Arc<ModelQueue>,
    states: &mut Vec<Tensor>,
    mut admitted: Admitted,
    terms: Terms,
    want_checkpoint: bool,
) -> Result<Stepped, PredictError> {
    let wanted = admitted.outputs.len();
    for (at, state) in states.iter().enumerate() {
        admitted.bytes += state.data.len();
        admitted.inputs.push(Some(state.clone()));
        admitted.outputs.push(WantedOutput { index: contract.outputs.len() + at, classes: 0 });
    }
    let mut answered = queue.run(admitted, terms).await?;
    let after = answered.outputs.split_off(wanted);
    let broken = |text| PredictError::BrokenPromise { model: contract.name.clone(), text };
    *states = state::returned(contract, after).map_err(broken)?;
    let checkpoint = want_checkpoint.then(|| state::save(contract, states));
    Ok(Stepped { outputs: answered.outputs, checkpoint, queued: answered.queued, timing: answered.timing })
}
