//! `sequence_batching`: requests that share state.
use std::collections::BTreeSet;

use cresset_proto::{
    inference::{
        DataType, ModelConfig, ModelSequenceBatching,
        model_sequence_batching::{self as wire, StrategyChoice, control, initial_state::StateData},
    },
    model_config::{sequence_batching, sequence_idle_us},
    tensor::{Datatype, element_count},
};

use super::{ContractError, check_dims, datatype, instances, refuse, warm_up::is_file_name};

/// Live sequences of one replica unless the configuration says otherwise.
const SEQUENCES_MAX_DEFAULT: usize = 256;
/// Most live sequences of one replica.
const SEQUENCES_MAX: usize = 100_000;
/// The largest state tensor of one sequence, in bytes.
const STATE_BYTES_MAX: usize = 1 << 28;

/// How sequences get their places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strategy {
    /// Each has a slot of a batch for its whole life.
    Direct,
    /// The oldest ready requests share a batch.
    Oldest,
}

/// Where a sequence's state is between its requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Memory {
    /// In the module's own attributes: each sequence has a copy of the module.
    Inside,
    /// In tensors that go in with each request and come out of it: sequences share batches.
    Tensors(Vec<StateSpec>),
}

/// A state tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateSpec {
    /// The input of `forward` that takes it.
    pub input: String,
    /// The output that it comes back as.
    pub output: String,
    /// The type of its elements.
    pub datatype: Datatype,
    /// Its dimensions without the batch; -1 is any.
    pub dims: Vec<i64>,
    /// Its dimensions at the start of a sequence.
    pub initial_dims: Vec<i64>,
    /// The file of the model's `initial_state` folder that holds its first value; `None`: zeros.
    pub initial_file: Option<String>,
}

/// What a control input tells the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlKind {
    /// Whether this is a sequence's first request.
    Start,
    /// Whether this is its last.
    End,
    /// Whether there is a request at all; always, since batches have no empty slots here.
    Ready,
    /// The sequence's id.
    CorrelationId,
}

/// An input that tells the model about the sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Control {
    /// The input of `forward` that takes it.
    pub input: String,
    /// What it tells.
    pub kind: ControlKind,
    /// The type of its one element.
    pub datatype: Datatype,
    /// Its bytes for false and for true; both empty for an id.
    pub false_true: [Vec<u8>; 2],
}

/// How sequences of a model are run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceSpec {
    /// How they get their places.
    pub strategy: Strategy,
    /// Where their state is.
    pub memory: Memory,
    /// What the model is told with each request.
    pub controls: Vec<Control>,
    /// How many may be live on one replica.
    pub sequences_max: usize,
    /// After this much time without a request a sequence is over, in µs.
    pub idle_us: u64,
}

impl SequenceSpec {
    /// The state tensors; none if the module keeps its state inside.
    pub fn states(&self) -> &[StateSpec] {
        match &self.memory {
            Memory::Inside => &[],
            Memory::Tensors(states) => states,
        }
    }
}

pub(super) fn read(config: &ModelConfig, batch_rows_max: usize) -> Result<Option<SequenceSpec>, ContractError> {
    let Some(settings) = sequence_batching(config) else { return Ok(None) };
    let states = settings.state.iter().map(state).collect::<Result<Vec<_>, _>>()?;
    let controls = controls(settings)?;
    let mut names = BTreeSet::new();
    let inputs = config.input.iter().map(|input| &input.name);
    for name in inputs.chain(controls.iter().map(|control| &control.input)).chain(states.iter().map(|state| &state.input)) {
        if !names.insert(name) {
            return refuse(format!("sequence_batching: '{name}' names two inputs"));
        }
    }
    let memory = if states.is_empty() { Memory::Inside } else { Memory::Tensors(states) };
    let strategy = match &settings.strategy_choice {
        Some(StrategyChoice::Oldest(_)) => Strategy::Oldest,
        _ => Strategy::Direct,
    };
    let sequences_max = match (&settings.strategy_choice, &memory) {
        (Some(StrategyChoice::Oldest(oldest)), _) if oldest.max_candidate_sequences > 0 => {
            oldest.max_candidate_sequences as usize
        }
        // A copy of the module is cheap, and the strategy's slots mean nothing to it.
        (_, Memory::Inside) | (Some(StrategyChoice::Oldest(_)), _) => SEQUENCES_MAX_DEFAULT,
        (_, Memory::Tensors(_)) => {
            let copies: usize = instances::read(config)?.iter().map(|group| group.count * group.gpus.len().max(1)).sum();
            copies.max(1) * batch_rows_max.max(1)
        }
    };
    if sequences_max > SEQUENCES_MAX {
        return refuse(format!(
            "sequence_batching.oldest.max_candidate_sequences is {sequences_max}, the limit is {SEQUENCES_MAX}"
        ));
    }
    Ok(Some(SequenceSpec { strategy, memory, controls, sequences_max, idle_us: sequence_idle_us(config) }))
}

fn state(settings: &wire::State) -> Result<StateSpec, ContractError> {
    let field = "sequence_batching.state";
    let name = &settings.input_name;
    if name.is_empty() || settings.output_name.is_empty() {
        return refuse(format!("{field} needs an input_name and an output_name"));
    }
    check_dims(field, name, &settings.dims)?;
    let datatype = datatype(field, name, settings.data_type)?;
    let Some(element_bytes) = datatype.size() else {
        return refuse(format!("{field} '{name}' is TYPE_STRING, which can't be state"));
    };
    let ([] | [_]) = &settings.initial_state[..] else {
        return refuse(format!("{field} '{name}' has {} initial_state, one is the limit", settings.initial_state.len()));
    };
    let initial = settings.initial_state.first();
    // Free dimensions start as 1, unless the initial state says otherwise.
    let mut initial_dims: Vec<i64> = settings.dims.iter().map(|dim| (*dim).max(1)).collect();
    let mut initial_file = None;
    if let Some(initial) = initial {
        if initial.data_type != DataType::TypeInvalid as i32 && initial.data_type != settings.data_type {
            return refuse(format!("{field} '{name}': initial_state has another data_type"));
        }
        if !initial.dims.is_empty() {
            let fits = initial.dims.len() == settings.dims.len()
                && initial.dims.iter().zip(&settings.dims).all(|(start, dim)| *start >= 0 && (*dim == -1 || dim == start));
            if !fits {
                return refuse(format!(
                    "{field} '{name}': the dims {:?} of initial_state don't fit {:?}",
                    initial.dims, settings.dims
                ));
            }
            initial_dims.clone_from(&initial.dims);
        }
        match &initial.state_data {
            Some(StateData::DataFile(file)) if is_file_name(file) => initial_file = Some(file.clone()),
            Some(StateData::DataFile(file)) => {
                return refuse(format!(
                    "{field} '{name}': data_file '{file}' must be the name of a file in the model's folder initial_state"
                ));
            }
            Some(StateData::ZeroData(_)) | None => {}
        }
    }
    let bytes = element_count(&initial_dims).and_then(|count| count.checked_mul(element_bytes));
    if bytes.is_none_or(|bytes| bytes > STATE_BYTES_MAX) {
        return refuse(format!("{field} '{name}' takes more than {STATE_BYTES_MAX} bytes for each sequence"));
    }
    let output = settings.output_name.clone();
    Ok(StateSpec { input: name.clone(), output, datatype, dims: settings.dims.clone(), initial_dims, initial_file })
}

fn controls(settings: &ModelSequenceBatching) -> Result<Vec<Control>, ContractError> {
    let mut controls: Vec<Control> = Vec::new();
    for input in &settings.control_input {
        let [only] = &input.control[..] else {
            return refuse(format!(
                "sequence_batching.control_input '{}' has {} controls, it needs exactly one",
                input.name,
                input.control.len()
            ));
        };
        let control = control_of(&input.name, only)?;
        if controls.iter().any(|other| other.kind == control.kind) {
            return refuse(format!("sequence_batching.control_input '{}' repeats a kind of control", input.name));
        }
        controls.push(control);
    }
    Ok(controls)
}

fn control_of(name: &str, settings: &wire::Control) -> Result<Control, ContractError> {
    let field = format!("sequence_batching.control_input '{name}'");
    let kind = match control::Kind::try_from(settings.kind) {
        Ok(control::Kind::ControlSequenceStart) => ControlKind::Start,
        Ok(control::Kind::ControlSequenceEnd) => ControlKind::End,
        Ok(control::Kind::ControlSequenceReady) => ControlKind::Ready,
        Ok(control::Kind::ControlSequenceCorrid) => ControlKind::CorrelationId,
        Err(_) => return refuse(format!("{field} has an unknown kind")),
    };
    let input = name.to_owned();
    if kind == ControlKind::CorrelationId {
        let datatype = datatype("sequence_batching.control_input", name, settings.data_type)?;
        return match datatype {
            Datatype::Int32 | Datatype::Uint32 | Datatype::Int64 | Datatype::Uint64 | Datatype::Bytes => {
                Ok(Control { input, kind, datatype, false_true: Default::default() })
            }
            _ => refuse(format!("{field}: an id is TYPE_INT32, TYPE_UINT32, TYPE_INT64, TYPE_UINT64 or TYPE_STRING")),
        };
    }
    let values = [
        (Datatype::Int32, settings.int32_false_true.iter().map(|value| value.to_le_bytes().to_vec()).collect::<Vec<_>>()),
        (Datatype::Fp32, settings.fp32_false_true.iter().map(|value| value.to_le_bytes().to_vec()).collect()),
        (Datatype::Bool, settings.bool_false_true.iter().map(|value| vec![u8::from(*value)]).collect()),
    ];
    let mut given = values.into_iter().filter(|(_, values)| !values.is_empty());
    match (given.next(), given.next()) {
        (Some((datatype, values)), None) => match <[Vec<u8>; 2]>::try_from(values) {
            Ok(false_true) => Ok(Control { input, kind, datatype, false_true }),
            Err(values) => refuse(format!("{field} has {} values, it needs two: for false and for true", values.len())),
        },
        _ => refuse(format!("{field} needs exactly one of int32_false_true, fp32_false_true and bool_false_true")),
    }
}
