//! A TorchScript module, its sequences and its generations.

#![allow(unsafe_code)]

use std::path::Path;
use std::ptr::NonNull;
use std::time::Duration;

use super::{Refusal, Results, c_path, checked, cuda_ordinal, ffi, not_null, slices, take_text, with_inputs};
use crate::engine::signature::Source;
use crate::engine::{Device, InputParts, Scalar};

/// A loaded module.
pub struct Module(NonNull<ffi::Handle>);

// SAFETY: the shim keeps no thread-local state for a handle; exclusive use is enforced by `&mut`.
unsafe impl Send for Module {}

impl Drop for Module {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_module_free(self.0.as_ptr()) }
    }
}

impl Module {
    pub fn load(path: &Path, device: Device) -> Result<Self, Refusal> {
        let path = c_path(path)?;
        let cuda = cuda_ordinal(device)?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_module_load(path.as_ptr(), cuda, &raw mut handle, error) })?;
        not_null(handle).map(Self)
    }

    /// Another module with the same parameters, for a thread of its own.
    pub fn twin(&mut self) -> Result<Self, Refusal> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is live and exclusively ours. What both modules share is only read from here on: the shim refuses a
        // call that has written to it.
        checked(|error| unsafe { ffi::crst_module_twin(self.0.as_ptr(), &raw mut handle, error) })?;
        not_null(handle).map(Self)
    }

    /// Another handle on the same instance, on a GPU.
    pub fn second(&mut self) -> Result<Self, Refusal> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is live and exclusively ours. What both handles share beyond what twins do is used in `compute` only.
        checked(|error| unsafe { ffi::crst_module_second(self.0.as_ptr(), &raw mut handle, error) })?;
        not_null(handle).map(Self)
    }

    /// The lines that `native/engine.h` describes.
    pub fn signature(&mut self) -> Result<String, Refusal> {
        let mut text = std::ptr::null_mut();
        let mut length = 0;
        // SAFETY: the handle is live and exclusively ours; the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_module_signature(self.0.as_ptr(), &raw mut text, &raw mut length, error) })?;
        // SAFETY: the shim filled both.
        let lines = unsafe { take_text(text, length) };
        Ok(String::from_utf8_lossy(&lines).into_owned())
    }

    pub fn bind(&mut self, sources: &[Source], names: &[&str]) -> Result<(), Refusal> {
        let nothing = ffi::Slice::of(&[]);
        let arguments: Vec<ffi::Argument> = sources
            .iter()
            .map(|source| {
                let (kind, integer, real, text) = match source {
                    Source::Input(index) => (ffi::ARG_INPUT, i64::try_from(*index).unwrap_or(i64::MAX), 0.0, nothing),
                    Source::Default => (ffi::ARG_DEFAULT, 0, 0.0, nothing),
                    Source::AllInputs => (ffi::ARG_DICT, 0, 0.0, nothing),
                    Source::Constant(Scalar::Int(value)) => (ffi::ARG_INT, *value, 0.0, nothing),
                    Source::Constant(Scalar::Float(value)) => (ffi::ARG_FLOAT, 0, *value, nothing),
                    Source::Constant(Scalar::Bool(value)) => (ffi::ARG_BOOL, i64::from(*value), 0.0, nothing),
                    Source::Constant(Scalar::Text(value)) => (ffi::ARG_TEXT, 0, 0.0, ffi::Slice::of(value.as_bytes())),
                };
                ffi::Argument { kind, integer, real, text }
            })
            .collect();
        let names = slices(names);
        // SAFETY: as above; the texts that `arguments` and `names` point to outlive the call.
        checked(|error| unsafe {
            ffi::crst_module_bind(self.0.as_ptr(), arguments.as_ptr(), arguments.len(), names.as_ptr(), names.len(), error)
        })
    }

    pub fn bytes(&self) -> u64 {
        // SAFETY: the handle is live; the shim only reads a number that was set at load.
        unsafe { ffi::crst_module_bytes(self.0.as_ptr()) }
    }

    pub fn fingerprint(&self) -> u64 {
        // SAFETY: as in `bytes`.
        unsafe { ffi::crst_module_fingerprint(self.0.as_ptr()) }
    }

    pub fn forward(&mut self, inputs: &[InputParts]) -> Result<Results, Refusal> {
        with_inputs(inputs, |inputs, count, out, error| {
            // SAFETY: the handle is live and exclusively ours; `with_inputs` keeps the rest valid.
            unsafe { ffi::crst_module_forward(self.0.as_ptr(), inputs, count, out, error) }
        })
        .map(Results)
    }

    /// Has the inputs of a call copied to the GPU.
    pub fn stage(&mut self, inputs: &[InputParts]) -> Result<Staged, Refusal> {
        with_inputs(inputs, |inputs, count, out, error| {
            // SAFETY: the handle is live and exclusively ours; `with_inputs` keeps the rest valid. The inputs' bytes are copied before
            // this returns.
            unsafe { ffi::crst_module_stage(self.0.as_ptr(), inputs, count, out, error) }
        })
        .map(Staged)
    }

    /// Calls `forward` with what was staged, and waits for the GPU.
    ///
    /// # Safety
    /// No other handle of the instance is in a call of this meanwhile.
    pub unsafe fn compute(&mut self, staged: &mut Staged) -> Result<(), Refusal> {
        // SAFETY: both handles are live and exclusively ours; for the instance that handles share the caller answers.
        checked(|error| unsafe { ffi::crst_module_compute(self.0.as_ptr(), staged.0.as_ptr(), error) })
    }

    pub fn open_sequence(&mut self) -> Result<Sequence, Refusal> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is live and exclusively ours.
        checked(|error| unsafe { ffi::crst_sequence_open(self.0.as_ptr(), &raw mut handle, error) })?;
        not_null(handle).map(Sequence)
    }

    /// Whether it can be a decoupled model.
    pub fn check_next(&mut self) -> Result<(), Refusal> {
        // SAFETY: the handle is live and exclusively ours.
        checked(|error| unsafe { ffi::crst_module_check_next(self.0.as_ptr(), error) })
    }

    /// Gives a request to a new copy; also how long the inputs took to become tensors, and how long `forward` ran.
    pub fn open_generation(&mut self, inputs: &[InputParts]) -> Result<(Generation, Duration, Duration), Refusal> {
        let (mut input_ns, mut infer_ns) = (0, 0);
        let handle = with_inputs(inputs, |inputs, count, out, error| {
            // SAFETY: the handle is live and exclusively ours; `with_inputs` keeps the rest valid.
            unsafe {
                let module = self.0.as_ptr();
                ffi::crst_generation_open(module, inputs, count, out, &raw mut input_ns, &raw mut infer_ns, error)
            }
        })?;
        Ok((Generation(handle), Duration::from_nanos(input_ns), Duration::from_nanos(infer_ns)))
    }
}

/// A call on a GPU, under way.
pub struct Staged(NonNull<ffi::Handle>);

impl Drop for Staged {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_staged_free(self.0.as_ptr()) }
    }
}

impl Staged {
    /// Copies the results back and waits for that.
    pub fn results(self) -> Result<Results, Refusal> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is live and exclusively ours, and this is the one call for its results.
        checked(|error| unsafe { ffi::crst_staged_results(self.0.as_ptr(), &raw mut handle, error) })?;
        not_null(handle).map(Results)
    }
}

/// A copy of a module with a state of its own. It keeps what it shares with its module alive.
pub struct Sequence(NonNull<ffi::Handle>);

// SAFETY: as for `Module`; what two handles share (weights, compiled code) libtorch guards itself.
unsafe impl Send for Sequence {}

impl Drop for Sequence {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_sequence_free(self.0.as_ptr()) }
    }
}

impl Sequence {
    pub fn step(&mut self, inputs: &[InputParts]) -> Result<Results, Refusal> {
        with_inputs(inputs, |inputs, count, out, error| {
            // SAFETY: the handle is live and exclusively ours; `with_inputs` keeps the rest valid.
            unsafe { ffi::crst_sequence_step(self.0.as_ptr(), inputs, count, out, error) }
        })
        .map(Results)
    }

    pub fn checkpoint(&mut self) -> Result<Vec<u8>, Refusal> {
        let mut data = std::ptr::null_mut();
        let mut length = 0;
        // SAFETY: the handle is live and exclusively ours; the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_sequence_checkpoint(self.0.as_ptr(), &raw mut data, &raw mut length, error) })?;
        // SAFETY: the shim filled both.
        Ok(unsafe { take_text(data, length) })
    }

    pub fn restore(&mut self, state: &[u8]) -> Result<(), Refusal> {
        // SAFETY: the handle is live and exclusively ours; `state` outlives the call.
        checked(|error| unsafe { ffi::crst_sequence_restore(self.0.as_ptr(), state.as_ptr(), state.len(), error) })
    }
}

/// The responses to one request of a decoupled model. It keeps what it shares with its module alive.
pub struct Generation(NonNull<ffi::Handle>);

// SAFETY: as for `Sequence`.
unsafe impl Send for Generation {}

impl Drop for Generation {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_generation_free(self.0.as_ptr()) }
    }
}

impl Generation {
    /// The next response, or `None` after the last.
    pub fn next(&mut self) -> Result<Option<Results>, Refusal> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: the handle is live and exclusively ours; the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_generation_next(self.0.as_ptr(), &raw mut handle, error) })?;
        Ok(NonNull::new(handle).map(Results))
    }
}
