//! Whether a request fits its model: names, types, shapes, batch. Pure, and in Triton's words, since clients test on them.
//!
//! A [`Contract`] is what a model's configuration promises its callers, read once when the model is loaded. What the
//! configuration asks for and this worker can't do is refused there, by field, and never at a request.
use std::collections::{BTreeMap, HashMap};

use cresset_proto::{
    inference::{
        DataType, ModelConfig, ModelInferRequest, model_config::SchedulingChoice, model_infer_request::InferRequestedOutputTensor,
    },
    model_config::{SCALAR_PREFIX, is_decoupled, sequence_batching, sequence_idle_us},
    tensor::{Datatype, Tensor},
};

/// Live sequences of one replica unless `max_candidate_sequences` says otherwise: each is a copy of the module's state.
const SEQUENCES_MAX_DEFAULT: usize = 256;

/// A tensor that a configuration declares.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name.
    pub name: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions without the batch; -1 is any.
    pub dims: Vec<i64>,
}

/// How sequences of a model are run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSpec {
    /// How many may be live on one replica.
    pub sequences_max: usize,
    /// After this much time without a request a sequence is over, in µs.
    pub idle_us: u64,
}

/// What a model promises its callers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Contract {
    /// The model's name.
    pub name: String,
    /// 0: the model has no batch dimension. Otherwise every tensor has one, first, and it is at most this.
    pub batch_rows_max: usize,
    /// Inputs, in the configuration's order.
    pub inputs: Vec<TensorSpec>,
    /// Outputs, in the configuration's order.
    pub outputs: Vec<TensorSpec>,
    /// Present if requests share state.
    pub sequence: Option<SequenceSpec>,
    /// How long the oldest request may wait for a fuller batch, in µs.
    pub batch_delay_us: u64,
    /// Constant arguments of `forward`: name to `type:value`.
    pub constants: BTreeMap<String, String>,
    /// Fields that are accepted and have no effect, to be said once in the log.
    pub ignored: Vec<&'static str>,
}

/// A configuration that this worker can't serve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("config.pbtxt: {0}")]
pub struct ContractError(pub String);

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
}

/// A request that fits: ready for a batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Admitted {
    /// Inputs in the contract's order.
    pub inputs: Vec<Tensor>,
    /// Rows of the batch that it takes; 1 for a model without a batch dimension.
    pub rows: usize,
    /// Bytes of all inputs.
    pub bytes: usize,
    /// Indexes of the wanted outputs, in the request's order.
    pub outputs: Vec<usize>,
}

impl Contract {
    /// Reads a configuration.
    ///
    /// # Errors
    /// [`ContractError`] names the field that can't be served.
    pub fn read(config: &ModelConfig) -> Result<Self, ContractError> {
        refuse_unserved(config)?;
        let sequence = sequence_batching(config).map(|settings| {
            use cresset_proto::inference::model_sequence_batching::StrategyChoice;
            let candidates = match &settings.strategy_choice {
                Some(StrategyChoice::Oldest(oldest)) => usize::try_from(oldest.max_candidate_sequences).unwrap_or(0),
                _ => 0,
            };
            SequenceSpec {
                sequences_max: if candidates == 0 { SEQUENCES_MAX_DEFAULT } else { candidates },
                idle_us: sequence_idle_us(config),
            }
        });
        let batch_delay_us = match &config.scheduling_choice {
            Some(SchedulingChoice::DynamicBatching(settings)) => settings.max_queue_delay_microseconds,
            _ => 0,
        };
        let spec = |kind: &str, name: &str, data_type: i32, dims: &[i64]| {
            let datatype = DataType::try_from(data_type).ok().and_then(Datatype::from_config);
            match datatype {
                None => Err(ContractError(format!("{kind} '{name}' has no data_type"))),
                Some(Datatype::Bytes) => Err(ContractError(format!("{kind} '{name}' is TYPE_STRING, which isn't served yet"))),
                Some(datatype) => Ok(TensorSpec { name: name.to_owned(), datatype, dims: dims.to_vec() }),
            }
        };
        let inputs = config.input.iter().map(|input| spec("input", &input.name, input.data_type, &input.dims));
        let outputs = config.output.iter().map(|output| spec("output", &output.name, output.data_type, &output.dims));
        let constants = config
            .parameters
            .iter()
            .filter_map(|(key, value)| key.strip_prefix(SCALAR_PREFIX).map(|name| (name.to_owned(), value.string_value.clone())));
        Ok(Self {
            name: config.name.clone(),
            batch_rows_max: usize::try_from(config.max_batch_size)
                .map_err(|_| ContractError(format!("max_batch_size is {}, it must be 0 or more", config.max_batch_size)))?,
            inputs: inputs.collect::<Result<_, _>>()?,
            outputs: outputs.collect::<Result<_, _>>()?,
            sequence,
            batch_delay_us,
            constants: constants.collect(),
            ignored: ignored(config),
        })
    }

    /// Checks a request whose tensors have been taken out of it.
    ///
    /// # Errors
    /// [`AdmissionError`], always the caller's fault.
    pub fn admit(&self, request: &ModelInferRequest, tensors: Vec<Tensor>) -> Result<Admitted, AdmissionError> {
        let outputs = self.wanted(&request.outputs)?;
        let inputs = self.in_order(tensors)?;
        let bytes = inputs.iter().map(|tensor| tensor.data.len()).sum();
        let mut rows = None;
        for (spec, tensor) in self.inputs.iter().zip(&inputs) {
            self.check(spec, tensor)?;
            if self.batch_rows_max > 0 {
                let batch = tensor.shape.first().copied().unwrap_or(0);
                if *rows.get_or_insert(batch) != batch {
                    return Err(AdmissionError::BatchMismatch { model: self.name.clone(), input: spec.name.clone() });
                }
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

    fn wanted(&self, requested: &[InferRequestedOutputTensor]) -> Result<Vec<usize>, AdmissionError> {
        if requested.is_empty() {
            return Ok((0..self.outputs.len()).collect());
        }
        let find = |name: &str| self.outputs.iter().position(|spec| spec.name == name);
        requested
            .iter()
            .map(|output| {
                find(&output.name)
                    .ok_or_else(|| AdmissionError::UnknownOutput { model: self.name.clone(), output: output.name.clone() })
            })
            .collect()
    }

    fn in_order(&self, tensors: Vec<Tensor>) -> Result<Vec<Tensor>, AdmissionError> {
        let model = || self.name.clone();
        let got = tensors.len();
        let mut by_name: HashMap<String, Tensor> = HashMap::with_capacity(got);
        for tensor in tensors {
            if by_name.contains_key(&tensor.name) {
                return Err(AdmissionError::DuplicateInput { model: model(), input: tensor.name });
            }
            by_name.insert(tensor.name.clone(), tensor);
        }
        let missing: Vec<String> =
            self.inputs.iter().filter(|spec| !by_name.contains_key(&spec.name)).map(|spec| spec.name.clone()).collect();
        if got != self.inputs.len() {
            return Err(AdmissionError::Count { model: model(), expected: self.inputs.len(), got, missing });
        }
        let ordered: Vec<Tensor> = self.inputs.iter().filter_map(|spec| by_name.remove(&spec.name)).collect();
        match by_name.into_keys().next() {
            Some(input) => Err(AdmissionError::UnknownInput { model: model(), input }),
            None => Ok(ordered),
        }
    }

    fn check(&self, spec: &TensorSpec, tensor: &Tensor) -> Result<(), AdmissionError> {
        let (model, input) = (self.name.clone(), spec.name.clone());
        if tensor.datatype != spec.datatype {
            return Err(AdmissionError::Datatype { model, input, got: tensor.datatype, expected: spec.datatype });
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
        Err(AdmissionError::Shape { model, input, expected: shape_text(&expected), got: shape_text(&tensor.shape) })
    }
}

fn shape_text(shape: &[i64]) -> String {
    format!("[{}]", shape.iter().map(i64::to_string).collect::<Vec<_>>().join(","))
}

/// What a configuration may ask for and this worker doesn't do. Each of them changes what a caller gets, so none may be
/// passed over in silence.
fn refuse_unserved(config: &ModelConfig) -> Result<(), ContractError> {
    let refuse = |text: String| Err(ContractError(text));
    if matches!(config.scheduling_choice, Some(SchedulingChoice::EnsembleScheduling(_))) {
        return refuse("ensemble_scheduling isn't served".into());
    }
    if is_decoupled(config) {
        return refuse("model_transaction_policy.decoupled isn't served yet".into());
    }
    if !config.batch_input.is_empty() || !config.batch_output.is_empty() {
        return refuse("batch_input and batch_output aren't served yet".into());
    }
    if let Some(settings) = sequence_batching(config) {
        if !settings.state.is_empty() {
            return refuse("sequence_batching.state isn't served yet; a module that keeps its state inside needs none".into());
        }
        if !settings.control_input.is_empty() {
            return refuse("sequence_batching.control_input isn't served yet".into());
        }
    }
    for input in &config.input {
        let flags = [
            (input.reshape.is_some(), "reshape"),
            (input.is_shape_tensor, "is_shape_tensor"),
            (input.allow_ragged_batch, "allow_ragged_batch"),
            (input.optional, "optional"),
            (input.is_non_linear_format_io, "is_non_linear_format_io"),
        ];
        if let Some((_, field)) = flags.iter().find(|(set, _)| *set) {
            return refuse(format!("{field} of input '{}' isn't served yet", input.name));
        }
    }
    for output in &config.output {
        let flags = [
            (output.reshape.is_some(), "reshape"),
            (output.is_shape_tensor, "is_shape_tensor"),
            (output.is_non_linear_format_io, "is_non_linear_format_io"),
        ];
        if let Some((_, field)) = flags.iter().find(|(set, _)| *set) {
            return refuse(format!("{field} of output '{}' isn't served yet", output.name));
        }
    }
    Ok(())
}

/// Fields that change at most how fast an answer comes.
fn ignored(config: &ModelConfig) -> Vec<&'static str> {
    let batching = match &config.scheduling_choice {
        Some(SchedulingChoice::DynamicBatching(settings)) => Some(settings),
        _ => None,
    };
    [
        (config.optimization.is_some(), "optimization"),
        (!config.instance_group.is_empty(), "instance_group"),
        (!config.model_warmup.is_empty(), "model_warmup"),
        (config.response_cache.is_some(), "response_cache"),
        (config.version_policy.is_some(), "version_policy"),
        (!config.metric_tags.is_empty(), "metric_tags"),
        (config.model_metrics.is_some(), "model_metrics"),
        (config.model_repository_agents.is_some(), "model_repository_agents"),
        (config.model_operations.is_some(), "model_operations"),
        (batching.is_some_and(|settings| !settings.preferred_batch_size.is_empty()), "dynamic_batching.preferred_batch_size"),
        (batching.is_some_and(|settings| settings.priority_levels > 0), "dynamic_batching.priority_levels"),
        (batching.is_some_and(|settings| settings.default_queue_policy.is_some()), "dynamic_batching.default_queue_policy"),
        (batching.is_some_and(|settings| settings.preserve_ordering), "dynamic_batching.preserve_ordering"),
    ]
    .into_iter()
    .filter_map(|(set, field)| set.then_some(field))
    .collect()
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use cresset_proto::model_config::parse_pbtxt;
    use proptest::prelude::*;

    use super::*;

    fn contract(max_batch: usize) -> Contract {
        let text = format!(
            "name: \"simple\" max_batch_size: {max_batch}\n\
             input [ {{ name: \"INPUT0\" data_type: TYPE_INT32 dims: [ 16 ] }}, {{ name: \"INPUT1\" data_type: TYPE_INT32 dims: [ 16 ] }} ]\n\
             output [ {{ name: \"OUTPUT0\" data_type: TYPE_INT32 dims: [ 16 ] }}, {{ name: \"OUTPUT1\" data_type: TYPE_INT32 dims: [ 16 ] }} ]"
        );
        Contract::read(&parse_pbtxt(&text).unwrap()).unwrap()
    }

    fn tensor(name: &str, datatype: Datatype, shape: &[i64]) -> Tensor {
        let elements: i64 = shape.iter().product();
        let bytes = elements as usize * datatype.size().unwrap();
        Tensor { name: name.into(), datatype, shape: shape.to_vec(), data: Bytes::from(vec![0; bytes]) }
    }

    fn refusal(tensors: Vec<Tensor>) -> String {
        contract(8).admit(&ModelInferRequest::default(), tensors).unwrap_err().to_string()
    }

    #[test]
    fn inputs_come_out_in_the_contracts_order() {
        let tensors = vec![tensor("INPUT1", Datatype::Int32, &[3, 16]), tensor("INPUT0", Datatype::Int32, &[3, 16])];
        let admitted = contract(8).admit(&ModelInferRequest::default(), tensors).unwrap();
        assert_eq!(admitted.inputs[0].name, "INPUT0");
        assert_eq!((admitted.rows, admitted.bytes, admitted.outputs), (3, 384, vec![0, 1]));
    }

    #[test]
    fn refusals_are_tritons() {
        let good = |name: &str| tensor(name, Datatype::Int32, &[1, 16]);
        assert!(refusal(vec![good("INPUT0")]).starts_with("expected 2 inputs but got 1 inputs for model 'simple'"));
        assert!(refusal(vec![good("INPUT0"), good("NOPE")]).contains("unexpected inference input 'NOPE' for model 'simple'"));
        assert!(refusal(vec![good("INPUT0"), good("INPUT0")]).starts_with("input 'INPUT0' already exists in request"));
        assert_eq!(
            refusal(vec![tensor("INPUT0", Datatype::Fp32, &[1, 16]), good("INPUT1")]),
            "inference input 'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'"
        );
        assert_eq!(
            refusal(vec![tensor("INPUT0", Datatype::Int32, &[1, 8]), good("INPUT1")]),
            "unexpected shape for input 'INPUT0' for model 'simple'. Expected [-1,16], got [1,8]"
        );
        let nine = |name: &str| tensor(name, Datatype::Int32, &[9, 16]);
        assert!(refusal(vec![nine("INPUT0"), nine("INPUT1")]).contains("batch-size must be <= 8"));
        assert!(refusal(vec![good("INPUT0"), nine("INPUT1")]).contains("batch size does not match other inputs"));
    }

    #[test]
    fn unknown_outputs_are_refused_and_none_means_all() {
        let output = |name: &str| InferRequestedOutputTensor { name: name.into(), ..Default::default() };
        let tensors = || vec![tensor("INPUT0", Datatype::Int32, &[1, 16]), tensor("INPUT1", Datatype::Int32, &[1, 16])];
        let one = ModelInferRequest { outputs: vec![output("OUTPUT1")], ..Default::default() };
        assert_eq!(contract(8).admit(&one, tensors()).unwrap().outputs, [1]);
        let nope = ModelInferRequest { outputs: vec![output("NOPE")], ..Default::default() };
        let error = contract(8).admit(&nope, tensors()).unwrap_err();
        assert_eq!(error.to_string(), "unexpected inference output 'NOPE' for model 'simple'");
    }

    #[test]
    fn what_cannot_be_served_is_refused_by_field_when_the_model_loads() {
        let base = "input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] } ] output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ]";
        for (text, field) in [
            ("model_transaction_policy { decoupled: true }", "decoupled"),
            ("ensemble_scheduling { }", "ensemble_scheduling"),
            ("sequence_batching { state [ { input_name: \"s\" output_name: \"t\" } ] }", "sequence_batching.state"),
            ("batch_input [ { kind: BATCH_ELEMENT_COUNT } ]", "batch_input"),
        ] {
            let error = Contract::read(&parse_pbtxt(&format!("{base} {text}")).unwrap()).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
        let tuned = parse_pbtxt(&format!(
            "{base} instance_group [ {{ count: 2 }} ] dynamic_batching {{ max_queue_delay_microseconds: 9 }}"
        ));
        let contract = Contract::read(&tuned.unwrap()).unwrap();
        assert_eq!((contract.ignored, contract.batch_delay_us), (vec!["instance_group"], 9));
    }

    proptest! {
        #[test]
        fn what_is_admitted_fits(max_batch in 0usize..4, shape in prop::collection::vec(0i64..20, 0..4)) {
            let contract = contract(max_batch);
            let tensors = vec![tensor("INPUT0", Datatype::Int32, &shape), tensor("INPUT1", Datatype::Int32, &shape)];
            match contract.admit(&ModelInferRequest::default(), tensors) {
                Ok(admitted) => {
                    prop_assert_eq!(*shape.last().unwrap(), 16);
                    prop_assert!(max_batch == 0 || admitted.rows <= max_batch);
                    prop_assert_eq!(shape.len(), if max_batch == 0 { 1 } else { 2 });
                }
                Err(error) => prop_assert!(!error.to_string().is_empty()),
            }
        }
    }
}
