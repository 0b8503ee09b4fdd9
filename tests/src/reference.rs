//! The truth to compare with: a model of the repository run in this process, on this thread, without a cluster.

use std::{collections::BTreeMap, path::Path};

use bytes::Bytes;
use cresset_client::repository::{Repository, RepositoryError};
use cresset_proto::{
    inference::{DataType, ModelConfig},
    model_config::SCALAR_PREFIX,
    tensor::{Datatype, Tensor},
};
use cresset_worker::engine::{
    Device, Engine, EngineError, EngineKind, InputBinding, InputParts, LoadSpec, Model, OutputBinding, Scalar, SequenceModel,
    TorchEngine, set_threads,
};

/// Why there is no reference.
#[derive(Debug, thiserror::Error)]
pub enum ReferenceError {
    /// The repository.
    #[error(transparent)]
    Repository(#[from] RepositoryError),
    /// The engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// A constant argument.
    #[error("{0}")]
    Scalar(String),
}

/// A model of a repository, loaded here.
pub struct Reference {
    model: Box<dyn Model>,
    config: ModelConfig,
}

/// One sequence of it.
pub struct ReferenceSequence {
    sequence: Box<dyn SequenceModel>,
    config: ModelConfig,
}

impl Reference {
    /// Loads the highest version of a model on the processor.
    ///
    /// # Errors
    /// [`ReferenceError`].
    pub fn load(repository: &Path, name: &str) -> Result<Self, ReferenceError> {
        Self::load_on(Device::Cpu, repository, name)
    }

    /// Loads the highest version of a model. For a GPU libtorch's CUDA half has to be open.
    ///
    /// # Errors
    /// [`ReferenceError`].
    pub fn load_on(device: Device, repository: &Path, name: &str) -> Result<Self, ReferenceError> {
        let stored = Repository::new(repository).read(name, None)?;
        let config = stored.config;
        let datatype = |number: i32| DataType::try_from(number).ok().and_then(Datatype::from_config);
        let binding =
            |name: &str, number| InputBinding { name: name.to_owned(), datatype: datatype(number).unwrap_or(Datatype::Fp32) };
        let mut constants = BTreeMap::new();
        for (key, value) in &config.parameters {
            if let Some(argument) = key.strip_prefix(SCALAR_PREFIX) {
                let scalar: Scalar = value.string_value.parse().map_err(ReferenceError::Scalar)?;
                constants.insert(argument.to_owned(), scalar);
            }
        }
        let spec = LoadSpec {
            path: stored.file,
            device,
            kind: EngineKind::TorchScript,
            inputs: config.input.iter().map(|input| binding(&input.name, input.data_type)).collect(),
            constants,
            outputs: config
                .output
                .iter()
                .map(|output| OutputBinding {
                    name: output.name.clone(),
                    datatype: datatype(output.data_type),
                    dims: output.dims.clone(),
                })
                .collect(),
            batched: config.max_batch_size > 0,
            decoupled: false,
        };
        // As on a worker with one core: many tests run at once, and the models are small.
        set_threads(1, 1)?;
        Ok(Self { model: TorchEngine.load(&spec)?, config })
    }

    /// One stateless call.
    ///
    /// # Errors
    /// The engine's.
    pub fn infer(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let outputs = self.model.infer(&parts(inputs))?;
        Ok(named(&self.config, outputs.tensors))
    }

    /// A new sequence.
    ///
    /// # Errors
    /// The engine's.
    pub fn sequence(&mut self) -> Result<ReferenceSequence, EngineError> {
        Ok(ReferenceSequence { sequence: self.model.open_sequence()?, config: self.config.clone() })
    }
}

impl ReferenceSequence {
    /// The next step.
    ///
    /// # Errors
    /// The engine's.
    pub fn step(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let outputs = self.sequence.step(&parts(inputs))?;
        Ok(named(&self.config, outputs.tensors))
    }
}

fn parts(inputs: &[Tensor]) -> Vec<InputParts> {
    let part =
        |input: &Tensor| InputParts { datatype: input.datatype, shape: input.shape.clone(), parts: vec![input.data.clone()] };
    inputs.iter().map(part).collect()
}

fn named(config: &ModelConfig, outputs: Vec<cresset_worker::engine::OutputTensor>) -> Vec<Tensor> {
    let name = |(output, declared): (cresset_worker::engine::OutputTensor, &cresset_proto::inference::ModelOutput)| Tensor {
        name: declared.name.clone(),
        datatype: output.datatype,
        shape: output.shape,
        data: output.data,
    };
    outputs.into_iter().zip(&config.output).map(name).collect()
}

/// Little-endian FP32 bytes as numbers.
pub fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.as_chunks().0.iter().map(|four| f32::from_le_bytes(*four)).collect()
}

/// Numbers as little-endian FP32 bytes.
pub fn bytes_of(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// The largest difference between two FP32 tensors, element by element; infinite if one is longer or has a NaN that the
/// other hasn't.
pub fn difference(left: &[u8], right: &[u8]) -> f32 {
    let (left, right) = (floats(left), floats(right));
    if left.len() != right.len() {
        return f32::INFINITY;
    }
    let apart = |(left, right): (&f32, &f32)| match (left.is_nan(), right.is_nan()) {
        (true, true) => 0.0,
        (false, false) => (left - right).abs(),
        _ => f32::INFINITY,
    };
    left.iter().zip(&right).map(apart).fold(0.0, f32::max)
}
