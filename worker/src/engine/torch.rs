//! The engine over libtorch.
//!
//! The loaded module lives in the shim (`native/`); only the [`canary`] needs `tch`. One module is kept as
//! the file left it and never runs: sequences are copies of it which share its weights and its
//! compiled code, and a checkpoint is what differs from it.

mod calls;
mod canary;
pub(crate) mod checkpoint;
mod ffi;
mod native;
mod package;
mod types;

use std::time::{Duration, Instant};

use bytes::Bytes;

use self::calls::CallShape;
use self::native::Module;
pub(super) use self::native::{cuda_load, cuda_memory, give_memory_back, testing_save};
pub use self::package::PackageEngine;
use super::archive::{self, Layout};
use super::device::JobClock;
use super::error::{short_message, short_message_about};
use super::signature::{self, Argument, ArgumentKind, Signature};
use super::turns::Turns;
use super::{Device, Engine, EngineError, Generation, InputParts, LoadSpec, Model, Outputs, SequenceModel, Timing};

/// libtorch, linked for the CPU; [`super::cuda::load`] adds GPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct TorchEngine;

/// Sets libtorch's threads for the whole process: `intra` inside one operation, `inter` between
/// operations. Call it once, before the first load; `inter` can't be changed later. From then on the memory of large tensors
/// is kept when they are freed, for the next batch.
///
/// # Errors
/// [`EngineError::Failed`] if libtorch refuses the numbers.
pub fn set_threads(intra: u16, inter: u16) -> Result<(), EngineError> {
    let set = native::set_threads(i32::from(intra.max(1)), i32::from(inter.max(1)));
    set.and_then(|()| native::keep_memory()).map_err(native::Refusal::into_error)
}

impl Engine for TorchEngine {
    fn load(&self, spec: &LoadSpec) -> Result<Box<dyn Model>, EngineError> {
        let contents = archive::check(&spec.path, Layout::TorchScript).map_err(EngineError::CannotLoad)?;
        let cannot_load = |refusal| refusal_at_load(refusal, spec);
        let mut module = Module::load(&spec.path, spec.device).map_err(cannot_load)?;
        let signature = read_signature(&module.signature().map_err(cannot_load)?);
        let refuse = |why: String| EngineError::CannotLoad(short_message(&why));
        let sources = signature::bind(&signature, &spec.inputs, &spec.constants).map_err(refuse)?;
        let names: Vec<&str> = spec.inputs.iter().map(|input| input.name.as_str()).collect();
        module.bind(&sources, &names).map_err(cannot_load)?;
        if spec.decoupled {
            module.check_next().map_err(cannot_load)?;
        }
        Ok(Box::new(TorchModel {
            decoupled: spec.decoupled,
            memory_bytes: module.bytes() + contents.constants_bytes,
            shape_of_calls: CallShape::of(spec),
            turns: matches!(spec.device, Device::Cuda(_)).then(Turns::default),
            module,
            signature,
        }))
    }

    fn try_device(&self, device: Device) -> Result<(), EngineError> {
        canary::sing(device)
    }

    fn set_intra_op_threads(&self, threads: u16) -> Result<(), EngineError> {
        native::set_intra_op_threads(i32::from(threads.max(1))).map_err(native::Refusal::into_error)
    }

    fn name(&self) -> &'static str {
        "libtorch"
    }
}

/// What the shim said while a model was loaded.
fn refusal_at_load(refusal: native::Refusal, spec: &LoadSpec) -> EngineError {
    let message = short_message_about(refusal.text(), &spec.path);
    match refusal.into_error() {
        EngineError::OutOfMemory(_) => EngineError::OutOfMemory(message),
        EngineError::DeviceLost(_) => EngineError::DeviceLost(message),
        _ => EngineError::CannotLoad(message),
    }
}

struct TorchModel {
    module: Module,
    signature: Signature,
    shape_of_calls: CallShape,
    memory_bytes: u64,
    decoupled: bool,
    /// On a GPU, where an instance has two handles.
    turns: Option<Turns>,
}

/// A call on a GPU, whose copies may be made while another handle of the instance computes. Also how long it waited for its turn.
#[allow(unsafe_code)]
fn in_turn(module: &mut Module, turns: &Turns, inputs: &[InputParts]) -> Result<(native::Results, Duration), native::Refusal> {
    let mut staged = module.stage(inputs)?;
    let turn = turns.take();
    // SAFETY: all handles of an instance share its turns, and this one has the turn.
    unsafe { module.compute(&mut staged)? };
    let waited = turn.waited;
    drop(turn);
    Ok((staged.results()?, waited))
}

impl Model for TorchModel {
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError> {
        let began = Instant::now();
        self.shape_of_calls.check(inputs)?;
        let (results, waited) = match &self.turns {
            None => self.module.forward(inputs).map(|results| (results, Duration::ZERO)),
            Some(turns) => in_turn(&mut self.module, turns, inputs),
        }
        .map_err(native::Refusal::into_error)?;
        // What waits for its turn is queued still.
        self.shape_of_calls.outputs(results, began + waited)
    }

    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError> {
        let sequence = self.module.open_sequence().map_err(native::Refusal::into_error)?;
        Ok(Box::new(TorchSequence {
            sequence,
            shape_of_calls: self.shape_of_calls.clone(),
            fingerprint: self.module.fingerprint(),
        }))
    }

    fn open_generation(&mut self, inputs: &[InputParts]) -> Result<Box<dyn Generation>, EngineError> {
        if !self.decoupled {
            return Err(EngineError::Failed("the model is not decoupled".into()));
        }
        let began = Instant::now();
        self.shape_of_calls.check(inputs)?;
        let (generation, input, infer) = self.module.open_generation(inputs).map_err(native::Refusal::into_error)?;
        let opening = Timing::ending_now(began, input, infer);
        Ok(Box::new(TorchGeneration { generation, shape_of_calls: self.shape_of_calls.clone(), opening: Some(opening) }))
    }

    fn twin(&mut self) -> Option<Box<dyn Model>> {
        // A module that has written to its parameters can't share them.
        let module = self.module.twin().ok()?;
        let (signature, shape_of_calls) = (self.signature.clone(), self.shape_of_calls.clone());
        let turns = self.turns.as_ref().map(|_| Turns::default());
        Some(Box::new(Self { module, signature, shape_of_calls, memory_bytes: 0, decoupled: self.decoupled, turns }))
    }

    fn second(&mut self) -> Option<Box<dyn Model>> {
        let turns = self.turns.as_ref()?.beside();
        let module = self.module.second().ok()?;
        let (signature, shape_of_calls) = (self.signature.clone(), self.shape_of_calls.clone());
        Some(Box::new(Self { module, signature, shape_of_calls, memory_bytes: 0, decoupled: self.decoupled, turns: Some(turns) }))
    }

    fn set_clock(&mut self, clock: JobClock) {
        if let Some(turns) = &mut self.turns {
            turns.set_clock(clock);
        }
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

struct TorchGeneration {
    generation: native::Generation,
    shape_of_calls: CallShape,
    /// What taking the request took, until a response carries it.
    opening: Option<Timing>,
}

impl Generation for TorchGeneration {
    fn next(&mut self) -> Result<Option<Outputs>, EngineError> {
        let began = Instant::now();
        let Some(results) = self.generation.next().map_err(native::Refusal::into_error)? else {
            return Ok(None);
        };
        let mut outputs = self.shape_of_calls.outputs(results, began)?;
        if let Some(opening) = self.opening.take() {
            outputs.timing = opening.and_then(outputs.timing);
        }
        Ok(Some(outputs))
    }
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
            "texts" => ArgumentKind::Texts,
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

#[cfg(test)]
mod tests;
