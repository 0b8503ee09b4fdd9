//! What a model's configuration promises its callers, read once when the model is loaded. Pure.
//!
//! What a configuration asks for and this worker can't do is refused here, by field, and never at a request; what changes
//! at most how fast an answer comes is listed in [`Contract::ignored`] and said once in the log. The table of all fields is
//! in `proto/PROTOCOL.md`.
mod execution;
mod fields;
mod instances;
mod queueing;
mod sequence;
mod warm_up;

use std::collections::BTreeMap;

use cresset_proto::{
    inference::{BatchInput as WireBatchInput, DataType, ModelConfig, ModelInput, ModelOutput, batch_input},
    model_config::{SCALAR_PREFIX, is_decoupled},
    tensor::Datatype,
};

pub use self::{
    instances::{InstanceKind, InstanceSpec},
    queueing::{QueuePolicy, Queueing, TimeoutAction},
    sequence::{Control, ControlKind, Memory, SequenceSpec, StateSpec, Strategy},
    warm_up::{Filling, WarmUp, WarmUpInput},
};

/// Most inputs, and most outputs, of a model.
pub const TENSORS_MAX: usize = 1024;
/// Largest `max_batch_size`.
pub const BATCH_ROWS_MAX: usize = 65_536;

/// An input that a configuration declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InputSpec {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// What a request's shape has to be, without the batch; -1 is any.
    pub dims: Vec<i64>,
    /// What the model sees instead, if `reshape` is given: as many -1 as `dims` has, in the same order.
    pub reshape: Option<Vec<i64>>,
    /// A request may leave it out; `forward` gets its default then, or None.
    pub optional: bool,
    /// Requests of one batch may differ in shape: the model sees all their elements in one dimension.
    pub ragged: bool,
}

/// An output that a configuration declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutputSpec {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// What a caller sees, without the batch; -1 is any.
    pub dims: Vec<i64>,
    /// What the model returns instead, if `reshape` is given.
    pub reshape: Option<Vec<i64>>,
    /// The file of labels for classification, in the model's folder.
    pub label_file: Option<String>,
    /// The input whose shape in each request says which elements are that request's (`batch_output`).
    pub scattered_like: Option<usize>,
}

/// A tensor that is computed from the requests of a batch and given to the model beside their inputs (`batch_input`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchInput {
    /// The input of `forward` that takes it.
    pub name: String,
    /// What is computed.
    pub kind: batch_input::Kind,
    /// INT32 or FP32.
    pub datatype: Datatype,
    /// The input that it is computed from.
    pub source: usize,
}

/// What a model promises its callers.
#[derive(Debug, Clone, PartialEq)]
pub struct Contract {
    /// The model's name.
    pub name: String,
    /// 0: the model has no batch dimension. Otherwise every tensor has one, first, and it is at most this.
    pub batch_rows_max: usize,
    /// Inputs that callers bring, in the configuration's order.
    pub inputs: Vec<InputSpec>,
    /// Outputs that callers get, in the configuration's order.
    pub outputs: Vec<OutputSpec>,
    /// Tensors computed from a batch.
    pub batch_inputs: Vec<BatchInput>,
    /// Present if requests share state.
    pub sequence: Option<SequenceSpec>,
    /// One request can have any number of responses.
    pub decoupled: bool,
    /// How requests wait.
    pub queueing: Queueing,
    /// Copies of the model on this worker, as the configuration asks for them; never empty.
    pub instances: Vec<InstanceSpec>,
    /// Calls to make before the model counts as ready.
    pub warm_ups: Vec<WarmUp>,
    /// Constant arguments of `forward`: name to `type:value`.
    pub constants: BTreeMap<String, String>,
    /// The other parameters of the configuration.
    pub parameters: BTreeMap<String, String>,
    /// Labels of each output's classes; empty where there are none. Read from `label_filename` when the model is loaded.
    pub labels: Vec<Vec<String>>,
    /// Fields that are accepted and have no effect, to be said once in the log.
    pub ignored: Vec<String>,
}

/// A configuration that this worker can't serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.pbtxt: {0}")]
pub struct ContractError(pub String);

fn refuse<T>(text: impl Into<String>) -> Result<T, ContractError> {
    Err(ContractError(text.into()))
}

impl Contract {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ContractError`] names the field that can't be served.
    pub fn read(config: &ModelConfig) -> Result<Self, ContractError> {
        fields::refuse_unserved(config)?;
        let batch_rows_max = usize::try_from(config.max_batch_size).ok().filter(|rows| *rows <= BATCH_ROWS_MAX);
        let Some(batch_rows_max) = batch_rows_max else {
            return refuse(format!("max_batch_size is {}, it must be from 0 to {BATCH_ROWS_MAX}", config.max_batch_size));
        };
        for (count, field) in [(config.input.len(), "input"), (config.output.len(), "output")] {
            if count > TENSORS_MAX {
                return refuse(format!("{field} has {count} entries, the limit is {TENSORS_MAX}"));
            }
        }
        let inputs = config.input.iter().map(input_spec).collect::<Result<Vec<_>, _>>()?;
        let outputs = config.output.iter().map(|output| output_spec(config, output, &inputs)).collect::<Result<Vec<_>, _>>()?;
        if inputs.iter().any(|input| input.ragged) && batch_rows_max == 0 {
            return refuse("allow_ragged_batch needs max_batch_size above 0: without a batch dimension nothing is batched");
        }
        let (constants, parameters) = config
            .parameters
            .iter()
            .map(|(key, value)| (key.clone(), value.string_value.clone()))
            .partition::<BTreeMap<_, _>, _>(|(key, _)| key.starts_with(SCALAR_PREFIX));
        let sequence = sequence::read(config, batch_rows_max)?;
        let decoupled = is_decoupled(config);
        if decoupled && sequence.is_some() {
            return refuse("model_transaction_policy.decoupled and sequence_batching can't be combined");
        }
        let contract = Self {
            name: config.name.clone(),
            batch_rows_max,
            batch_inputs: batch_inputs(config, &inputs)?,
            inputs,
            outputs,
            sequence,
            decoupled,
            queueing: queueing::read(config, batch_rows_max)?,
            instances: instances::read(config)?,
            warm_ups: warm_up::read(config, batch_rows_max)?,
            constants: constants.into_iter().map(|(key, value)| (key[SCALAR_PREFIX.len()..].to_owned(), value)).collect(),
            parameters,
            labels: vec![],
            ignored: fields::ignored(config),
        };
        contract.names_are_unique()?;
        contract.execution_is_right()?;
        Ok(contract)
    }

    fn names_are_unique(&self) -> Result<(), ContractError> {
        for (field, names) in [
            (
                "input",
                self.inputs
                    .iter()
                    .map(|spec| &spec.name)
                    .chain(self.batch_inputs.iter().map(|batch| &batch.name))
                    .collect::<Vec<_>>(),
            ),
            ("output", self.outputs.iter().map(|spec| &spec.name).collect()),
        ] {
            let mut seen = std::collections::BTreeSet::new();
            if let Some(twice) = names.into_iter().find(|name| !seen.insert(name.as_str())) {
                return refuse(format!("{field} '{twice}' is declared twice"));
            }
        }
        Ok(())
    }

    /// The tensors that the model takes beside its callers' inputs, in the order in which the engine gets them: what is
    /// computed from the batch, then what tells about the sequence, then its state.
    pub fn hidden_inputs(&self) -> impl Iterator<Item = (&str, Datatype)> {
        let sequence = self.sequence.iter();
        let batch = self.batch_inputs.iter().map(|input| (input.name.as_str(), input.datatype));
        let controls = sequence.clone().flat_map(|spec| &spec.controls).map(|control| (control.input.as_str(), control.datatype));
        batch.chain(controls).chain(sequence.flat_map(SequenceSpec::states).map(|state| (state.input.as_str(), state.datatype)))
    }

    /// The state tensors that the model returns after its callers' outputs.
    pub fn states(&self) -> &[StateSpec] {
        self.sequence.as_ref().map_or(&[], SequenceSpec::states)
    }

    /// How many sequences or batches of rows can be under way at once.
    pub fn instances_total(&self) -> usize {
        self.instances.iter().map(|group| group.count * group.gpus.len().max(1)).sum::<usize>().max(1)
    }
}

fn datatype(field: &str, name: &str, data_type: i32) -> Result<Datatype, ContractError> {
    DataType::try_from(data_type)
        .ok()
        .and_then(Datatype::from_config)
        .ok_or_else(|| ContractError(format!("{field} '{name}' has no data_type")))
}

fn check_dims(field: &str, name: &str, dims: &[i64]) -> Result<(), ContractError> {
    match dims.iter().find(|dim| **dim == 0 || **dim < -1) {
        Some(dim) => refuse(format!("{field} '{name}' has the dimension {dim}; dimensions are 1 or more, or -1 for any")),
        None => Ok(()),
    }
}

/// `reshape` has to keep the number of elements, whatever the free dimensions are.
fn check_reshape(field: &str, name: &str, dims: &[i64], reshape: &[i64]) -> Result<(), ContractError> {
    let free = |dims: &[i64]| dims.iter().filter(|dim| **dim == -1).count();
    let fixed = |dims: &[i64]| dims.iter().filter(|dim| **dim != -1).try_fold(1i64, |product, dim| product.checked_mul(*dim));
    check_dims(field, name, reshape)?;
    if free(dims) == free(reshape) && fixed(dims) == fixed(reshape) {
        return Ok(());
    }
    refuse(format!("{field} '{name}': reshape {reshape:?} has not as many elements as dims {dims:?}"))
}

fn input_spec(input: &ModelInput) -> Result<InputSpec, ContractError> {
    check_dims("input", &input.name, &input.dims)?;
    let reshape = input.reshape.as_ref().map(|reshape| reshape.shape.clone());
    if let Some(reshape) = &reshape {
        check_reshape("input", &input.name, &input.dims, reshape)?;
    }
    let spec = InputSpec {
        name: input.name.clone(),
        datatype: datatype("input", &input.name, input.data_type)?,
        dims: input.dims.clone(),
        reshape,
        optional: input.optional,
        ragged: input.allow_ragged_batch,
    };
    if spec.ragged && (spec.datatype == Datatype::Bytes || spec.optional || spec.reshape.is_some()) {
        return refuse(format!(
            "input '{}': allow_ragged_batch can't be combined with TYPE_STRING, optional or reshape",
            spec.name
        ));
    }
    Ok(spec)
}

fn output_spec(config: &ModelConfig, output: &ModelOutput, inputs: &[InputSpec]) -> Result<OutputSpec, ContractError> {
    check_dims("output", &output.name, &output.dims)?;
    let reshape = output.reshape.as_ref().map(|reshape| reshape.shape.clone());
    if let Some(reshape) = &reshape {
        check_reshape("output", &output.name, &output.dims, reshape)?;
    }
    let scatter = config.batch_output.iter().find(|batch| batch.target_name.contains(&output.name));
    let scattered_like = match scatter.map(|batch| batch.source_input.first()) {
        None => None,
        Some(Some(source)) => Some(position(inputs, "batch_output", source)?),
        Some(None) => return refuse(format!("batch_output for '{}' has no source_input", output.name)),
    };
    Ok(OutputSpec {
        name: output.name.clone(),
        datatype: datatype("output", &output.name, output.data_type)?,
        dims: output.dims.clone(),
        reshape,
        label_file: (!output.label_filename.is_empty()).then(|| output.label_filename.clone()),
        scattered_like,
    })
}

fn position(inputs: &[InputSpec], field: &str, name: &str) -> Result<usize, ContractError> {
    let found = inputs.iter().position(|input| input.name == *name);
    found.ok_or_else(|| ContractError(format!("{field}: source_input '{name}' is not an input of the model")))
}

fn batch_inputs(config: &ModelConfig, inputs: &[InputSpec]) -> Result<Vec<BatchInput>, ContractError> {
    let read = |batch: &WireBatchInput| {
        let [source] = &batch.source_input[..] else {
            return refuse(format!("batch_input has {} source_input, it needs exactly one", batch.source_input.len()));
        };
        let kind =
            batch_input::Kind::try_from(batch.kind).map_err(|_| ContractError("batch_input has an unknown kind".into()))?;
        let source = position(inputs, "batch_input", source)?;
        let datatype = match DataType::try_from(batch.data_type) {
            Ok(DataType::TypeInt32) => Datatype::Int32,
            Ok(DataType::TypeFp32) => Datatype::Fp32,
            _ => return refuse("batch_input: data_type must be TYPE_INT32 or TYPE_FP32"),
        };
        if batch.target_name.is_empty() {
            return refuse("batch_input has no target_name");
        }
        Ok(batch
            .target_name
            .iter()
            .map(move |name| BatchInput { name: name.clone(), kind, datatype, source })
            .collect::<Vec<_>>())
    };
    let read = config.batch_input.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    if !read.is_empty() && config.max_batch_size == 0 {
        return refuse("batch_input needs max_batch_size above 0");
    }
    Ok(read.into_iter().flatten().collect())
}

#[cfg(test)]
mod tests;
