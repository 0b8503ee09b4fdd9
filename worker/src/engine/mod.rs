//! Running models: a synchronous engine, and the one thread that owns a device.
//!
//! An [`Engine`] loads a model file into a [`Model`]; a model answers stateless calls itself and opens
//! a [`SequenceModel`], a copy with a state of its own, for each live sequence. All of it is
//! synchronous and knows no queue, no batch policy and no clock: [`device::DeviceThread`] runs it,
//! one call at a time for a device.
//!
//! # Decoupled models
//! A model with `model_transaction_policy { decoupled: true }` answers a request 0 to n times. In TorchScript it is a module
//! with two methods: `forward` takes the request (what it returns is ignored), and `next(self)`, which takes no arguments
//! and returns an `Optional` of what any `forward` may return, is called until it returns `None`:
//!
//! ```python
//! class Countdown(torch.nn.Module):
//!     def __init__(self):
//!         super().__init__()
//!         self.left = torch.zeros(1)
//!
//!     def forward(self, start: Tensor):
//!         self.left = start
//!
//!     @torch.jit.export
//!     def next(self) -> Optional[Tensor]:
//!         if bool(self.left <= 0):
//!             return None
//!         self.left = self.left - 1
//!         return self.left + 1
//! ```
//!
//! Each request gets a copy of the module in the state in which the file left it (the weights are shared), so what `forward`
//! puts into attributes never mixes with another request's, and responses of several requests may take turns.
//!
//! Absent on purpose: reading `config.pbtxt` (the caller says what it wants in a [`LoadSpec`]),
//! deciding which models keep state, and downloading.

pub mod archive;
mod call;
pub mod cuda;
pub mod device;
mod error;
mod kind;
mod null;
pub mod prepare;
pub mod priority;
pub mod signature;
pub mod testing;
mod torch;
mod turns;

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
pub use cresset_proto::tensor::Datatype;

pub use self::call::{InputParts, OutputTensor, Outputs, Timing};
pub use self::error::{EngineError, MESSAGE_BYTES_MAX, short_message};
pub use self::kind::{AnyEngine, EngineKind};
pub use self::null::NullSpec;
pub use self::signature::{Argument, ArgumentKind, Signature};
pub(crate) use self::torch::checkpoint as seal;
pub use self::torch::{PackageEngine, TorchEngine, set_threads};

/// Where a model runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Device {
    /// The CPU.
    Cpu,
    /// The GPU with this ordinal; [`cuda::load`] has to have succeeded before.
    Cuda(u32),
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
        }
    }
}

/// A value for an argument of `forward` that is the same in every call.
#[derive(Clone, Debug, PartialEq)]
pub enum Scalar {
    /// `int:16000`
    Int(i64),
    /// `float:0.5`
    Float(f64),
    /// `bool:true`
    Bool(bool),
    /// `str:abc`
    Text(String),
}

impl std::str::FromStr for Scalar {
    type Err = String;

    /// Reads `int:16000`, `float:0.5`, `bool:true` or `str:abc`.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (kind, value) = text
            .split_once(':')
            .ok_or_else(|| format!("'{text}' has no type, write int:, float:, bool: or str: before the value"))?;
        let wrong = || format!("'{value}' is not of the type {kind}");
        match kind {
            "int" => value.trim().parse().map(Self::Int).map_err(|_| wrong()),
            "float" => value.trim().parse().map(Self::Float).map_err(|_| wrong()),
            "bool" => value.trim().parse().map(Self::Bool).map_err(|_| wrong()),
            "str" => Ok(Self::Text(value.to_string())),
            _ => Err(format!("'{kind}' is not a type, write int:, float:, bool: or str: before the value")),
        }
    }
}

/// An input as the model's configuration declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputBinding {
    /// The configuration's name. How it finds its argument is said at [`signature::bind`].
    pub name: String,
    /// The datatype that every call has to bring.
    pub datatype: Datatype,
}

/// An output as the model's configuration declares it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputBinding {
    /// The configuration's name. With `__N` at the end of all names N is the position in what
    /// `forward` returns; a module that returns a dict is asked by name; else the order counts.
    pub name: String,
    /// The datatype that the module has to return, if anybody cares.
    pub datatype: Option<Datatype>,
    /// Its dimensions without the batch, -1 for any. Only an engine that makes answers up needs them.
    pub dims: Vec<i64>,
}

/// What to load, and how its arguments and results map to the configuration.
#[derive(Clone, Debug)]
pub struct LoadSpec {
    /// The model file.
    pub path: PathBuf,
    /// Where to put it.
    pub device: Device,
    /// Which engine runs it.
    pub kind: EngineKind,
    /// The inputs, in the configuration's order: the order of the inputs of every call.
    pub inputs: Vec<InputBinding>,
    /// Arguments of `forward` with a fixed value, by the argument's name.
    pub constants: BTreeMap<String, Scalar>,
    /// The outputs, in the configuration's order: the order of the outputs of every call.
    pub outputs: Vec<OutputBinding>,
    /// Whether the first dimension of every input and output is the batch.
    pub batched: bool,
    /// Whether requests get 0 to n responses, through [`Model::open_generation`].
    pub decoupled: bool,
}

/// Loads models. One for a process is enough; it may be shared between threads.
pub trait Engine: Send + Sync {
    /// Loads a model and checks that its arguments fit. Slow (it reads the whole file): call it from
    /// a thread that may block, never from a device's.
    ///
    /// # Errors
    /// [`EngineError::CannotLoad`] with the reason, [`EngineError::OutOfMemory`], or
    /// [`EngineError::DeviceLost`].
    fn load(&self, spec: &LoadSpec) -> Result<Box<dyn Model>, EngineError>;

    /// Computes something tiny on the device and compares the result: whether the device still does what it should. It runs
    /// on a thread of the device. An engine without a device of its own has nothing to try.
    ///
    /// # Errors
    /// [`EngineError::Failed`] for a wrong result, else as [`Model::infer`].
    fn try_device(&self, _device: Device) -> Result<(), EngineError> {
        Ok(())
    }

    /// From here on the calls of the thread that this is called on compute with so many threads each, where they compute on a
    /// processor.
    ///
    /// # Errors
    /// [`EngineError::Failed`] if the library refuses the number.
    fn set_intra_op_threads(&self, _threads: u16) -> Result<(), EngineError> {
        Ok(())
    }

    /// A word for logs and metrics.
    fn name(&self) -> &str;
}

/// A loaded model.
pub trait Model: Send {
    /// Runs the model once, inputs and outputs in the order of the [`LoadSpec`]. What a module keeps
    /// inside is kept from call to call: use [`Model::open_sequence`] for a module that does.
    ///
    /// # Errors
    /// [`EngineError::BadInput`] for inputs that don't fit, [`EngineError::Failed`] for what the
    /// module raised, [`EngineError::OutOfMemory`], [`EngineError::DeviceLost`].
    fn infer(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError>;

    /// A copy in the state in which the file left it. The weights are shared, so it is cheap.
    ///
    /// # Errors
    /// [`EngineError::Failed`] or [`EngineError::OutOfMemory`].
    fn open_sequence(&mut self) -> Result<Box<dyn SequenceModel>, EngineError>;

    /// Gives a request to a copy of its own, which answers it 0 to n times. Only for a model that was loaded with
    /// [`LoadSpec::decoupled`].
    ///
    /// # Errors
    /// As [`Model::infer`].
    fn open_generation(&mut self, inputs: &[InputParts]) -> Result<Box<dyn Generation>, EngineError>;

    /// Another instance that shares the weights, for a thread of its own; `None` if it has to be loaded from the file again.
    fn twin(&mut self) -> Option<Box<dyn Model>> {
        None
    }

    /// A second handle on this very instance, for a thread of its own: it brings the inputs of its call, and takes the results
    /// back, while this one computes, and waits for its turn to compute. `None` where that makes no sense.
    fn second(&mut self) -> Option<Box<dyn Model>> {
        None
    }

    /// Told once, by the thread that it is [placed](device::DeviceThread::place) on. A model stops the clock while it waits for
    /// another's turn.
    fn set_clock(&mut self, _clock: device::JobClock) {}

    /// Weights, buffers and constants, in bytes; of a twin none.
    fn memory_bytes(&self) -> u64;

    /// The arguments of `forward` and what it returns.
    fn signature(&self) -> &Signature;
}

/// A copy of a model with a state of its own.
pub trait SequenceModel: Send {
    /// Runs the next request of the sequence.
    ///
    /// # Errors
    /// As [`Model::infer`]. After an error the state may be anything between before and after the
    /// step: continue from a checkpoint.
    fn step(&mut self, inputs: &[InputParts]) -> Result<Outputs, EngineError>;

    /// The state as bytes. The same state gives the same bytes.
    ///
    /// # Errors
    /// [`EngineError::NotCheckpointable`] if an attribute that changed can't be saved.
    fn checkpoint(&mut self) -> Result<Bytes, EngineError>;

    /// Puts the sequence into a saved state, of this or another copy of the same model. All or nothing.
    ///
    /// # Errors
    /// [`EngineError::BadCheckpoint`] for bytes that are damaged, of another format version or of
    /// another model.
    fn restore(&mut self, checkpoint: &[u8]) -> Result<(), EngineError>;
}

/// The responses to one request of a decoupled model.
pub trait Generation: Send {
    /// The next response, or `None` after the last. The first one's timing has the request's own part in it: it began when
    /// the request did. Not to be called again after `None` or an error.
    ///
    /// # Errors
    /// As [`Model::infer`], but for [`EngineError::BadInput`].
    fn next(&mut self) -> Result<Option<Outputs>, EngineError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scalar_is_read_with_its_type() {
        assert_eq!("int:16000".parse(), Ok(Scalar::Int(16000)));
        assert_eq!("float:0.5".parse(), Ok(Scalar::Float(0.5)));
        assert_eq!("bool:true".parse(), Ok(Scalar::Bool(true)));
        assert_eq!("str:a:b".parse(), Ok(Scalar::Text("a:b".into())));
        for wrong in ["16000", "int:x", "float:", "bool:1", "long:1"] {
            assert!(wrong.parse::<Scalar>().is_err(), "{wrong}");
        }
    }
}
