//! The engine over libtorch.
//!
//! The loaded module lives in the shim (`native/`); nothing here needs `tch`. One module is kept as
//! the file left it and never runs: sequences are copies of it which share its weights and its
//! compiled code, and a checkpoint is what differs from it.

mod checkpoint;
mod ffi;
mod native;

use std::time::Instant;

use bytes::Bytes;

use self::native::{Module, Results};
pub(super) use self::native::{cuda_load, cuda_memory, testing_save};
use super::error::{short_message, short_message_about};
use super::signature::{self, Argument, ArgumentKind, Signature};
use super::{
    Datatype, Engine, EngineError, InputBinding, InputParts, LoadSpec, Model, OutputBinding, OutputTensor, Outputs,
    SequenceModel, Timing, archive,
};

/// libtorch, linked for the CPU; [`super::cuda::load`] adds GPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct TorchEngine;

/// Sets libtorch's threads for the whole process: `intra` inside one operation, `inter` between
/// operations. Call it once, before the first load; `inter` can't be changed later.
///
/// # Errors
/// [`EngineError::Failed`] if libtorch refuses the numbers.
pub fn set_threads(intra: u16, inter: u16) -> Result<(), EngineError> {
    native::set_threads(i32::from(intra.max(1)), i32::from(inter.max(1))).map_err(native::Refusal::into_error)
}

impl Engine for TorchEngine {
    fn load(&self, spec: &LoadSpec) -> Result<Box<dyn Model>, EngineError> {
        let contents = archive::check(&spec.path).map_err(EngineError::CannotLoad)?;
        let cannot_load = |refusal: native::Refusal| {
            let message = short_message_about(refusal.text(), &spec.path);
            match refusal.into_error() {
                EngineError::OutOfMemory(_) => EngineError::OutOfMemory(message),
                EngineError::DeviceLost(_) => EngineError::DeviceLost(message),
                _ => EngineError::CannotLoad(message),
            }
        };
        let mut module = Module::load(&spec.path, spec.device).map_err(cannot_load)?;
        let signature = read_signature(&module.signature().map_err(cannot_load)?);
        let refuse = |why: String| EngineError::CannotLoad(short_message(&why));
        if let Some(input) = spec.inputs.iter().find(|input| scalar_type(input.datatype).is_none()) {
            return Err(refuse(format!("input '{}' is {}, which no tensor can hold yet", input.name, input.datatype)));
        }
        let sources = signature::bind(&signature, &spec.inputs, &spec.constants).map_err(refuse)?;
        let names: Vec<&str> = spec.inputs.iter().map(|input| input.name.as_str()).collect();
        module.bind(&sources, &names).map_err(cannot_load)?;
        Ok(Box::new(TorchModel {
            memory_bytes: module.bytes() + contents.constants_bytes,
            shape_of_calls: CallShape { inputs: spec.inputs.clone(), outputs: spec.outputs.clone() },
            module,
            signature,
        }))
    }

    fn name(&self) -> &'static str {
        "libtorch"
    }
}

struct TorchModel {
    module: Module,
    signature: Signature,
    shape_of_calls: CallShape,
    memory_bytes: u64,
}

impl Model for TorchModel {
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        let began = Instant::now();
        self.shape_of_calls.check(inputs)?;
        let results = self.module.forward(inputs).map_err(native::Refusal::into_error)?;
        self.shape_of_calls.outputs(results, began)
    }

    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError> {
        let sequence = self.module.open_sequence().map_err(native::Refusal::into_error)?;
        Ok(Box::new(TorchSequence {
            sequence,
            shape_of_calls: self.shape_of_calls.clone(),
            fingerprint: self.module.fingerprint(),
        }))
    }

    fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }
}

struct TorchSequence {
    sequence: native::Sequence,
    shape_of_calls: CallShape,
    fingerprint: u64,
}

impl SequenceModel for TorchSequence {
    fn step(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        let began = Instant::now();
        self.shape_of_calls.check(inputs)?;
        let results = self.sequence.step(inputs).map_err(native::Refusal::into_error)?;
        self.shape_of_calls.outputs(results, began)
    }

    fn checkpoint(&mut self) -> Result<Bytes, EngineError> {
        let state = self.sequence.checkpoint().map_err(native::Refusal::into_error)?;
        Ok(checkpoint::seal(self.fingerprint, &state))
    }

    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), EngineError> {
        let state =
            checkpoint::unseal(self.fingerprint, checkpoint).map_err(|why| EngineError::BadCheckpoint(why.to_string()))?;
        self.sequence.restore(state).map_err(|refusal| match refusal.into_error() {
            EngineError::Failed(why) => EngineError::BadCheckpoint(why),
            other => other,
        })
    }
}

/// What goes in and comes out of every call.
#[derive(Clone)]
struct CallShape {
    inputs: Vec<InputBinding>,
    outputs: Vec<OutputBinding>,
}

impl CallShape {
    fn check(&self, inputs: &[InputParts]) -> Result<(), EngineError> {
        if inputs.len() != self.inputs.len() {
            let (want, got) = (self.inputs.len(), inputs.len());
            return Err(EngineError::BadInput(format!("expected {want} inputs, got {got}")));
        }
        for (input, binding) in inputs.iter().zip(&self.inputs) {
            check_input(input, binding).map_err(|why| EngineError::BadInput(short_message(&why)))?;
        }
        Ok(())
    }

    fn outputs(&self, mut results: Results, began: Instant) -> Result<Outputs, EngineError> {
        let (input, infer) = results.times();
        let fail = |why: String| EngineError::Failed(short_message(&why));
        let views: Vec<_> = (0..results.len()).map(|index| results.view(index)).collect();
        let names: Vec<&str> = views.iter().map(|view| view.name.as_str()).collect();
        let is_dict = views.iter().any(|view| view.scalar_type >= 0 && !view.name.is_empty());
        let places = places(&self.outputs, &names, is_dict).map_err(fail)?;
        let mut outputs: Vec<OutputTensor> = Vec::with_capacity(places.len());
        for (binding, &place) in self.outputs.iter().zip(&places) {
            let view = &views[place];
            let name = &binding.name;
            let Some(datatype) = datatype(view.scalar_type) else {
                let kind = if view.scalar_type < 0 { view.name.as_str() } else { "tensor of a type with no name here" };
                return Err(fail(format!("output '{name}' is a {kind}, which can't be answered")));
            };
            if let Some(declared) = binding.datatype
                && declared != datatype
            {
                return Err(fail(format!("output '{name}' is {datatype}, the configuration says {declared}")));
            }
            // Two outputs of the configuration may name one result: a take leaves nothing behind.
            let data = match places.iter().take(outputs.len()).position(|&earlier| earlier == place) {
                Some(earlier) => outputs[earlier].data.clone(),
                None => results.take(place),
            };
            outputs.push(OutputTensor { datatype, shape: view.shape.clone(), data });
        }
        Ok(Outputs { tensors: outputs, timing: Timing::ending_now(began, input, infer) })
    }
}

fn check_input(input: &InputParts, binding: &InputBinding) -> Result<(), String> {
    let name = &binding.name;
    if input.datatype != binding.datatype {
        return Err(format!("input '{name}' is {}, expected {}", input.datatype, binding.datatype));
    }
    let size =
        input.datatype.size().ok_or_else(|| format!("input '{name}' is {}, which no tensor can hold yet", input.datatype))?;
    let elements = input.shape.iter().try_fold(1_usize, |product, &dimension| {
        usize::try_from(dimension).ok().and_then(|dimension| product.checked_mul(dimension))
    });
    let want = elements
        .and_then(|elements| elements.checked_mul(size))
        .filter(|&want| i64::try_from(want).is_ok())
        .ok_or_else(|| format!("input '{name}' has the impossible shape {:?}", input.shape))?;
    let got: usize = input.parts.iter().map(Bytes::len).sum();
    if got != want {
        return Err(format!("input '{name}' has {got} bytes, its shape {:?} needs {want}", input.shape));
    }
    Ok(())
}

/// For each declared output the index of its result.
fn places(outputs: &[OutputBinding], names: &[&str], is_dict: bool) -> Result<Vec<usize>, String> {
    let by_position = outputs.iter().all(|output| signature::position_in_name(&output.name).is_some());
    let place = |(order, output): (usize, &OutputBinding)| {
        let name = &output.name;
        if is_dict && let Some(place) = names.iter().position(|key| key == name) {
            return Ok(place);
        }
        let place = if by_position { signature::position_in_name(name).unwrap_or(order) } else { order };
        if is_dict && !by_position {
            Err(format!("the module returned no '{name}', only {}", names.join(", ")))
        } else if place >= names.len() {
            Err(format!("the module returned {} values, output '{name}' is number {place} (from 0)", names.len()))
        } else {
            Ok(place)
        }
    };
    outputs.iter().enumerate().map(place).collect()
}

/// Reads the lines of the shim's signature.
fn read_signature(lines: &str) -> Signature {
    let mut signature = Signature::default();
    for line in lines.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let [what, name, kind, type_name, has_default] = fields[..] else {
            continue;
        };
        if what == "ret" {
            signature.returns = type_name.to_string();
            continue;
        }
        let kind = match kind {
            "tensor" => ArgumentKind::Tensor,
            "int" => ArgumentKind::Int,
            "float" => ArgumentKind::Float,
            "bool" => ArgumentKind::Bool,
            "str" => ArgumentKind::Text,
            "dict" => ArgumentKind::Dict,
            _ => ArgumentKind::Other,
        };
        signature.arguments.push(Argument {
            name: name.to_string(),
            kind,
            type_name: type_name.to_string(),
            has_default: has_default == "1",
        });
    }
    signature
}

/// `c10::ScalarType` of a datatype.
const SCALAR_TYPES: [(Datatype, i32); 13] = [
    (Datatype::Uint8, 0),
    (Datatype::Int8, 1),
    (Datatype::Int16, 2),
    (Datatype::Int32, 3),
    (Datatype::Int64, 4),
    (Datatype::Fp16, 5),
    (Datatype::Fp32, 6),
    (Datatype::Fp64, 7),
    (Datatype::Bool, 11),
    (Datatype::Bf16, 15),
    (Datatype::Uint16, 27),
    (Datatype::Uint32, 28),
    (Datatype::Uint64, 29),
];

fn scalar_type(datatype: Datatype) -> Option<i32> {
    SCALAR_TYPES.iter().find(|(known, _)| *known == datatype).map(|(_, code)| *code)
}

fn datatype(scalar_type: i32) -> Option<Datatype> {
    SCALAR_TYPES.iter().find(|(_, code)| *code == scalar_type).map(|(known, _)| *known)
}

#[cfg(test)]
mod tests;
