//! Whether a request fits its model: names, types, shapes, batch. Pure, and in Triton's words, since clients test on them.
use std::collections::HashMap;

use cresset_proto::{
    inference::{ModelInferRequest, infer_parameter::ParameterChoice, model_infer_request::InferRequestedOutputTensor},
    tensor::{Datatype, Tensor},
};

use crate::contract::{Contract, InputSpec};

/// The key of a requested output that asks for the best classes instead of the tensor.
const CLASSIFICATION: &str = "classification";

/// A request that doesn't fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)]
pub enum AdmissionError {
    #[error("expected {expected} inputs but got {got} inputs for model '{model}'. Missing required input(s) {missing:?}")]
    Count { model: String, expected: usize, got: usize, missing: Vec<String> },
    #[error("unexpected inference input '{input}' for model '{model}'")]
    UnknownInput { model: String, input: String },
    #[error("input '{input}' already exists in request for model '{model}'")]
    DuplicateInput { model: String, input: String },
    #[error("inference input '{input}' data-type is '{got}', but model '{model}' expects '{expected}'")]
    Datatype { model: String, input: String, got: Datatype, expected: Datatype },
    #[error("unexpected shape for input '{input}' for model '{model}'. Expected {expected}, got {got}")]
    Shape { model: String, input: String, expected: String, got: String },
    #[error("inference request batch-size must be <= {limit} for '{model}', got {got}")]
    BatchTooLarge { model: String, limit: usize, got: i64 },
    #[error("input '{input}' batch size does not match other inputs for '{model}'")]
    BatchMismatch { model: String, input: String },
    #[error("unexpected inference output '{output}' for model '{model}'")]
    UnknownOutput { model: String, output: String },
    #[error("sequence inference request to model '{model}' must specify batch-size 1, got {got}")]
    SequenceBatch { model: String, got: i64 },
    #[error("parameter 'classification' of output '{output}' must be an int64 of 1 or more")]
    Classification { output: String },
    #[error("output '{output}' of model '{model}' is BYTES, which has no best classes: leave the parameter 'classification' out")]
    NotClassifiable { model: String, output: String },
}

/// An output that a request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WantedOutput {
    /// Its place in the contract; those after the contract's outputs are its states.
    pub index: usize,
    /// The best so many classes instead of the tensor; 0 for the tensor.
    pub classes: usize,
}

/// A request that fits: ready for a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Inputs in the contract's order, in the model's shapes; `None` for one that was left out.
    pub inputs: Vec<Option<Tensor>>,
    /// Rows of the batch that it takes; 1 for a model without a batch dimension.
    pub rows: usize,
    /// Bytes of all inputs.
    pub bytes: usize,
    /// The wanted outputs, in the request's order.
    pub outputs: Vec<WantedOutput>,
}

impl Contract {
    /// Checks a request whose tensors have been taken out of it.
    ///
    /// # Errors
    /// [`AdmissionError`], always the caller's fault.
    pub fn admit(&self, request: &ModelInferRequest, tensors: Vec<Tensor>) -> Result<Admitted, AdmissionError> {
        let outputs = self.wanted(&request.outputs)?;
        let mut inputs = self.in_order(tensors)?;
        let bytes = inputs.iter().flatten().map(|tensor| tensor.data.len()).sum();
        let mut rows = None;
        for (spec, tensor) in self.inputs.iter().zip(&mut inputs) {
            let Some(tensor) = tensor else { continue };
            self.check(spec, tensor)?;
            if self.batch_rows_max > 0 {
                let batch = tensor.shape.first().copied().unwrap_or(0);
                if *rows.get_or_insert(batch) != batch {
                    return Err(AdmissionError::BatchMismatch { model: self.name.clone(), input: spec.name.clone() });
                }
            }
            if let Some(reshape) = &spec.reshape {
                tensor.shape = reshaped(&tensor.shape, usize::from(self.batch_rows_max > 0), &spec.dims, reshape);
            }
        }
        let rows = rows.unwrap_or(1);
        match usize::try_from(rows).ok().filter(|rows| self.batch_rows_max == 0 || *rows <= self.batch_rows_max) {
            None => Err(AdmissionError::BatchTooLarge { model: self.name.clone(), limit: self.batch_rows_max, got: rows }),
            Some(_) if self.sequence.is_some() && rows != 1 => {
                Err(AdmissionError::SequenceBatch { model: self.name.clone(), got: rows })
            }
            Some(rows) => Ok(Admitted { inputs, rows, bytes, outputs }),
        }
    }

    fn wanted(&self, requested: &[InferRequestedOutputTensor]) -> Result<Vec<WantedOutput>, AdmissionError> {
        if requested.is_empty() {
            return Ok((0..self.outputs.len()).map(|index| WantedOutput { index, classes: 0 }).collect());
        }
        requested.iter().map(|output| self.wanted_output(output)).collect()
    }

    fn wanted_output(&self, requested: &InferRequestedOutputTensor) -> Result<WantedOutput, AdmissionError> {
        let output = || requested.name.clone();
        let Some(index) = self.outputs.iter().position(|spec| spec.name == requested.name) else {
            return Err(AdmissionError::UnknownOutput { model: self.name.clone(), output: output() });
        };
        let classes = match requested.parameters.get(CLASSIFICATION).map(|value| &value.parameter_choice) {
            None => 0,
            Some(Some(ParameterChoice::Int64Param(classes))) if *classes > 0 => usize::try_from(*classes).unwrap_or(usize::MAX),
            Some(_) => return Err(AdmissionError::Classification { output: output() }),
        };
        if classes > 0 && self.outputs.get(index).is_some_and(|spec| spec.datatype == Datatype::Bytes) {
            return Err(AdmissionError::NotClassifiable { model: self.name.clone(), output: output() });
        }
        Ok(WantedOutput { index, classes })
    }

    fn in_order(&self, tensors: Vec<Tensor>) -> Result<Vec<Option<Tensor>>, AdmissionError> {
        // Most clients send all inputs in the configuration's order.
        if tensors.len() == self.inputs.len() && tensors.iter().zip(&self.inputs).all(|(tensor, spec)| tensor.name == spec.name) {
            return Ok(tensors.into_iter().map(Some).collect());
        }
        let model = || self.name.clone();
        let got = tensors.len();
        let mut by_name: HashMap<String, Tensor> = HashMap::with_capacity(got);
        for tensor in tensors {
            if by_name.contains_key(&tensor.name) {
                return Err(AdmissionError::DuplicateInput { model: model(), input: tensor.name });
            }
            by_name.insert(tensor.name.clone(), tensor);
        }
        let missing = |spec: &&InputSpec| !spec.optional && !by_name.contains_key(&spec.name);
        let missing: Vec<String> = self.inputs.iter().filter(missing).map(|spec| spec.name.clone()).collect();
        let has_optional = self.inputs.iter().any(|spec| spec.optional);
        if got > self.inputs.len() || !missing.is_empty() && (has_optional || got != self.inputs.len()) {
            return Err(AdmissionError::Count { model: model(), expected: self.inputs.len(), got, missing });
        }
        let ordered: Vec<Option<Tensor>> = self.inputs.iter().map(|spec| by_name.remove(&spec.name)).collect();
        match by_name.into_keys().next() {
            Some(input) => Err(AdmissionError::UnknownInput { model: model(), input }),
            None => Ok(ordered),
        }
    }

    fn check(&self, spec: &InputSpec, tensor: &Tensor) -> Result<(), AdmissionError> {
        let (model, input) = (|| self.name.clone(), || spec.name.clone());
        if tensor.datatype != spec.datatype {
            let (got, expected) = (tensor.datatype, spec.datatype);
            return Err(AdmissionError::Datatype { model: model(), input: input(), got, expected });
        }
        let dims = match (self.batch_rows_max, tensor.shape.split_first()) {
            (0, _) => Some(&tensor.shape[..]),
            (_, Some((_, rest))) => Some(rest),
            (_, None) => None,
        };
        let fits = dims.is_some_and(|dims| {
            dims.len() == spec.dims.len() && dims.iter().zip(&spec.dims).all(|(dim, wanted)| *wanted == -1 || dim == wanted)
        });
        if fits {
            return Ok(());
        }
        let mut expected = spec.dims.clone();
        if self.batch_rows_max > 0 {
            expected.insert(0, -1);
        }
        Err(AdmissionError::Shape {
            model: model(),
            input: input(),
            expected: shape_text(&expected),
            got: shape_text(&tensor.shape),
        })
    }
}

/// The shape that `to` describes for a tensor whose shape fits `from`: free dimensions keep their order. The first `batch`
/// dimensions stay. The configuration was checked to keep the number of elements.
pub fn reshaped(shape: &[i64], batch: usize, from: &[i64], to: &[i64]) -> Vec<i64> {
    let (head, dims) = shape.split_at(batch.min(shape.len()));
    let mut free = dims.iter().zip(from).filter(|(_, wanted)| **wanted == -1).map(|(dim, _)| *dim);
    let dims = to.iter().map(|dim| if *dim == -1 { free.next().unwrap_or(1) } else { *dim });
    head.iter().copied().chain(dims).collect()
}

fn shape_text(shape: &[i64]) -> String {
    format!("[{}]", shape.iter().map(i64::to_string).collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests;
