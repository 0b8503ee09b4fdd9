//! Calls to a model before it counts as ready: those that its configuration asks for (`model_warmup`), or one with zeros,
//! since libtorch prepares a graph at its first call and no request should wait for that.
use bytes::{BufMut, Bytes, BytesMut};
use cresset_proto::{
    ids::SequenceId,
    tensor::{Datatype, Tensor, element_count},
};
use rand::{Rng, RngCore, SeedableRng, rngs::StdRng};

use crate::{
    admission::Admitted,
    batch::assemble,
    contract::{Contract, Filling, WarmUp, WarmUpInput},
    engine::{EngineError, InputParts, Model},
    sequence::{Standing, control_inputs},
};

/// The largest input that is made up when the configuration doesn't ask for a warm-up, in bytes.
const DEFAULT_BYTES_MAX: usize = 64 << 20;
/// Longest made-up string, in bytes.
const STRING_BYTES_MAX: usize = 16;

/// Why a warm-up that the configuration asks for failed. The model isn't ready then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WarmUpError {
    /// A file of the model's folder `warmup`.
    #[error("model_warmup '{name}': {text}")]
    File {
        /// The warm-up.
        name: String,
        /// The file and what is wrong with it.
        text: String,
    },
    /// The call.
    #[error("model_warmup '{name}' failed: {source}")]
    Call {
        /// The warm-up.
        name: String,
        /// What the engine says.
        source: EngineError,
    },
}

/// Makes the calls. `read` gives the content of a file in the model's folder `warmup`, `initial` is the state in which a
/// sequence begins.
///
/// # Errors
/// [`WarmUpError`] for a warm-up that the configuration asks for. The one that nobody asked for may fail: its input is
/// made up.
pub fn warm_up(
    model: &mut dyn Model,
    contract: &Contract,
    initial: &[Tensor],
    read: impl Fn(&str) -> Result<Bytes, String>,
) -> Result<(), WarmUpError> {
    if contract.warm_ups.is_empty() {
        if let Some(inputs) = default_inputs(contract, initial)
            && let Err(error) = call(model, contract, &inputs)
        {
            tracing::debug!(model = contract.name, %error, "the warm-up call failed, which may be because of its made-up input");
        }
        return Ok(());
    }
    for warm_up in &contract.warm_ups {
        let name = || warm_up.name.clone();
        let inputs = asked_inputs(contract, warm_up, initial, &read).map_err(|text| WarmUpError::File { name: name(), text })?;
        for _ in 0..warm_up.count {
            call(model, contract, &inputs).map_err(|source| WarmUpError::Call { name: name(), source })?;
        }
    }
    Ok(())
}

fn call(model: &mut dyn Model, contract: &Contract, inputs: &[InputParts]) -> Result<(), EngineError> {
    match &contract.sequence {
        // A copy, so that the model itself stays as its file left it.
        Some(spec) if spec.states().is_empty() => model.open_sequence()?.step(inputs).map(drop),
        None if contract.decoupled => model.open_generation(inputs)?.next().map(drop),
        _ => model.infer(inputs).map(drop),
    }
}

/// One row of zeros; free dimensions are taken as 1. `None` if that would be too large.
fn default_inputs(contract: &Contract, initial: &[Tensor]) -> Option<Vec<InputParts>> {
    let mut inputs = Vec::with_capacity(contract.inputs.len());
    for spec in &contract.inputs {
        let dims: Vec<i64> = spec.dims.iter().map(|dim| (*dim).max(1)).collect();
        let shape = with_batch(contract, 1, &dims);
        let elements = element_count(&shape)?;
        let bytes = elements.checked_mul(spec.datatype.size().unwrap_or(4)).filter(|bytes| *bytes <= DEFAULT_BYTES_MAX)?;
        let tensor = Tensor { name: spec.name.clone(), datatype: spec.datatype, shape, data: vec![0; bytes].into() };
        inputs.push(Some(reshape(contract, spec.name.as_str(), tensor)));
    }
    Some(batch(contract, inputs, 1, initial))
}

fn asked_inputs(
    contract: &Contract,
    warm_up: &WarmUp,
    initial: &[Tensor],
    read: &impl Fn(&str) -> Result<Bytes, String>,
) -> Result<Vec<InputParts>, String> {
    let mut inputs = Vec::with_capacity(contract.inputs.len());
    for spec in &contract.inputs {
        let tensor = match warm_up.inputs.get(&spec.name) {
            None => None,
            Some(input) => {
                let data = filled(input, warm_up.rows, read)?;
                let shape = with_batch(contract, warm_up.rows, &input.dims);
                let tensor = Tensor { name: spec.name.clone(), datatype: input.datatype, shape, data };
                Some(reshape(contract, &spec.name, tensor))
            }
        };
        inputs.push(tensor);
    }
    Ok(batch(contract, inputs, warm_up.rows, initial))
}

fn with_batch(contract: &Contract, rows: usize, dims: &[i64]) -> Vec<i64> {
    let rows = i64::try_from(rows).unwrap_or(i64::MAX);
    (contract.batch_rows_max > 0).then_some(rows).into_iter().chain(dims.iter().copied()).collect()
}

fn reshape(contract: &Contract, name: &str, mut tensor: Tensor) -> Tensor {
    let spec = contract.inputs.iter().find(|spec| spec.name == name);
    if let Some((spec, reshape)) = spec.and_then(|spec| spec.reshape.as_ref().map(|reshape| (spec, reshape))) {
        tensor.shape = crate::admission::reshaped(&tensor.shape, usize::from(contract.batch_rows_max > 0), &spec.dims, reshape);
    }
    tensor
}

/// The inputs of a call, with what the model is told of a sequence and the state that one begins with, once for each row.
fn batch(contract: &Contract, mut inputs: Vec<Option<Tensor>>, rows: usize, initial: &[Tensor]) -> Vec<InputParts> {
    let standing = Standing { id: &SequenceId::Number(1), start: true, end: true };
    // A text where the model wants a number can't happen: the id is a number, and that fits every kind of id.
    let controls = control_inputs(contract, standing).unwrap_or_default();
    inputs.extend(controls.into_iter().chain(initial.iter().cloned()).map(|tensor| Some(repeated(contract, tensor, rows))));
    let admitted = Admitted { inputs, rows, bytes: 0, outputs: vec![] };
    assemble(contract, &[&admitted])
}

fn repeated(contract: &Contract, mut tensor: Tensor, rows: usize) -> Tensor {
    if contract.batch_rows_max > 0
        && rows > 1
        && let Some(dim) = tensor.shape.first_mut()
    {
        *dim = i64::try_from(rows).unwrap_or(i64::MAX);
        tensor.data = tensor.data.repeat(rows).into();
    }
    tensor
}

fn filled(input: &WarmUpInput, rows: usize, read: &impl Fn(&str) -> Result<Bytes, String>) -> Result<Bytes, String> {
    let elements = element_count(&input.dims).unwrap_or(0);
    let bytes = elements.saturating_mul(input.datatype.size().unwrap_or(4));
    Ok(match &input.filling {
        Filling::Zero => vec![0; bytes.saturating_mul(rows)].into(),
        Filling::Random => random(input.datatype, elements.saturating_mul(rows)),
        // The file holds one row, as in Triton.
        Filling::File(file) => {
            let data = read(file)?;
            if input.datatype.size().is_some() && data.len() != bytes {
                return Err(format!("warmup/{file} has {} bytes, the dims {:?} need {bytes}", data.len(), input.dims));
            }
            data.repeat(rows).into()
        }
    })
}

/// The same numbers every time: a warm-up that fails fails again.
fn random(datatype: Datatype, elements: usize) -> Bytes {
    let mut random = StdRng::seed_from_u64(1);
    let mut out = BytesMut::with_capacity(elements.saturating_mul(datatype.size().unwrap_or(STRING_BYTES_MAX)));
    for _ in 0..elements {
        match datatype {
            Datatype::Fp32 => out.put_f32_le(random.random()),
            Datatype::Fp64 => out.put_f64_le(random.random()),
            Datatype::Fp16 => out.put_u16_le(half::f16::from_f32(random.random()).to_bits()),
            Datatype::Bf16 => out.put_u16_le(half::bf16::from_f32(random.random()).to_bits()),
            Datatype::Bool => out.put_u8(u8::from(random.random::<bool>())),
            Datatype::Bytes => {
                let length = random.random_range(0..=STRING_BYTES_MAX);
                out.put_u32_le(u32::try_from(length).unwrap_or(0));
                (0..length).for_each(|_| out.put_u8(random.random_range(b'a'..=b'z')));
            }
            other => {
                let mut bytes = [0; 8];
                random.fill_bytes(&mut bytes);
                out.put_slice(bytes.get(..other.size().unwrap_or(8)).unwrap_or_default());
            }
        }
    }
    out.freeze()
}
