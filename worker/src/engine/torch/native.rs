//! Safe handles over the shim: every `unsafe` call of the engine is in this file.

#![allow(unsafe_code)]

use std::ffi::{CString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;
use std::time::Duration;

use bytes::Bytes;

use super::ffi;
use super::types::code;
use crate::engine::error::short_message;
use crate::engine::signature::Source;
use crate::engine::{Device, EngineError, InputParts, Scalar};

/// What the shim said when it refused.
pub struct Refusal {
    code: i32,
    text: String,
}

impl Refusal {
    fn plain(text: &str) -> Self {
        Self { code: 1, text: text.to_string() }
    }

    /// The text, whole.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// As the error of a call.
    pub fn into_error(self) -> EngineError {
        let text = &self.text;
        let message = if self.code == ffi::RAISED { raised(text) } else { short_message(text) };
        let out_of_memory = ["out of memory", "can't allocate memory", "not enough memory"];
        match self.code {
            ffi::OUT_OF_MEMORY => EngineError::OutOfMemory(message),
            ffi::NOT_CHECKPOINTABLE => EngineError::NotCheckpointable(message),
            ffi::BAD_CHECKPOINT => EngineError::BadCheckpoint(message),
            ffi::BAD_INPUT => EngineError::BadInput(message),
            ffi::RAISED => EngineError::Failed(message),
            // Inside TorchScript libtorch's errors lose their class, only their words are left.
            _ if out_of_memory.iter().any(|words| message.contains(words)) => EngineError::OutOfMemory(message),
            _ if message.contains("CUDA error:") => EngineError::DeviceLost(message),
            _ => EngineError::Failed(message),
        }
    }
}

/// What a module raised, with its class as Python shows it.
fn raised(text: &str) -> String {
    let is_class = |word: &str| !word.is_empty() && word.chars().all(|c| c.is_alphanumeric() || "._".contains(c));
    let (class, message) = text.split_once(':').filter(|(class, _)| is_class(class)).unwrap_or(("RuntimeError", text));
    let class = class.rsplit('.').next().unwrap_or(class);
    let first = message.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("");
    short_message(format!("{class}: {first}").trim_end_matches([':', ' ']))
}

/// Calls the shim and turns its code and text into a result.
fn checked(call: impl FnOnce(*mut ffi::Error) -> i32) -> Result<(), Refusal> {
    let mut error = ffi::Error { text: std::ptr::null_mut(), length: 0 };
    let code = call(&raw mut error);
    if code == ffi::OK {
        return Ok(());
    }
    // SAFETY: the shim either leaves `text` null or fills it for us to free.
    let text = unsafe { take_text(error.text, error.length) };
    Err(Refusal { code, text: String::from_utf8_lossy(&text).into_owned() })
}

/// Copies and frees a text that the shim gave out.
///
/// # Safety
/// `text` is null, or came from the shim with this length and is not used again.
unsafe fn take_text(text: *mut c_char, length: usize) -> Vec<u8> {
    if text.is_null() {
        return Vec::new();
    }
    // SAFETY: by contract `length` bytes are readable, and the text is ours to free.
    unsafe {
        let copy = std::slice::from_raw_parts(text.cast::<u8>(), length).to_vec();
        ffi::crst_free(text);
        copy
    }
}

fn c_path(path: &Path) -> Result<CString, Refusal> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Refusal::plain("the path has a zero byte"))
}

fn not_null(handle: *mut ffi::Handle) -> Result<NonNull<ffi::Handle>, Refusal> {
    NonNull::new(handle).ok_or_else(|| Refusal::plain("libtorch gave nothing back"))
}

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
        let cuda = match device {
            Device::Cpu => -1,
            Device::Cuda(ordinal) => i32::try_from(ordinal).map_err(|_| Refusal::plain("no such GPU"))?,
        };
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_module_load(path.as_ptr(), cuda, &raw mut handle, error) })?;
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
        let names: Vec<ffi::Slice> = names.iter().map(|name| ffi::Slice::of(name.as_bytes())).collect();
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

/// Lends the inputs to a call of the shim that gives a handle back.
fn with_inputs(
    inputs: &[InputParts],
    mut call: impl FnMut(*const ffi::Input, usize, *mut *mut ffi::Handle, *mut ffi::Error) -> i32,
) -> Result<NonNull<ffi::Handle>, Refusal> {
    let parts: Vec<Vec<ffi::Slice>> =
        inputs.iter().map(|input| input.parts.iter().map(|part| ffi::Slice::of(part)).collect()).collect();
    let lent = |(input, parts): (&InputParts, &Vec<ffi::Slice>)| ffi::Input {
        code: code(input.datatype),
        shape: input.shape.as_ptr(),
        rank: input.shape.len(),
        parts: parts.as_ptr(),
        part_count: parts.len(),
    };
    let tensors: Vec<ffi::Input> = inputs.iter().zip(&parts).map(lent).collect();
    let mut handle = std::ptr::null_mut();
    checked(|error| call(tensors.as_ptr(), tensors.len(), &raw mut handle, error))?;
    not_null(handle)
}

/// What a call returned.
pub struct Results(NonNull<ffi::Handle>);

/// One value of the results.
pub struct ResultView {
    /// The type of its elements.
    pub code: i32,
    pub shape: Vec<i64>,
    /// The dict key; or, for a value that can't be answered, its type.
    pub name: String,
}

impl ResultView {
    /// Whether it is a tensor or byte strings.
    pub fn is_answerable(&self) -> bool {
        self.code != ffi::TYPE_NONE
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_results_free(self.0.as_ptr()) }
    }
}

impl Results {
    pub fn len(&self) -> usize {
        // SAFETY: the handle is live.
        unsafe { ffi::crst_results_count(self.0.as_ptr()) }
    }

    /// How long the inputs took to become tensors, and how long the module ran.
    pub fn times(&self) -> (Duration, Duration) {
        let (mut input_ns, mut infer_ns) = (0, 0);
        // SAFETY: the handle is live; the shim writes the two numbers.
        unsafe { ffi::crst_results_times(self.0.as_ptr(), &raw mut input_ns, &raw mut infer_ns) };
        (Duration::from_nanos(input_ns), Duration::from_nanos(infer_ns))
    }

    fn raw_view(&self, index: usize) -> ffi::View {
        assert!(index < self.len(), "a result index is checked by its user");
        let nothing = ffi::Slice::of(&[]);
        let mut view = ffi::View {
            code: ffi::TYPE_NONE,
            shape: std::ptr::null(),
            rank: 0,
            data: std::ptr::null(),
            length: 0,
            name: nothing,
        };
        // SAFETY: the handle is live and the index is in range.
        unsafe { ffi::crst_results_view(self.0.as_ptr(), index, &raw mut view) };
        view
    }

    pub fn view(&self, index: usize) -> ResultView {
        let view = self.raw_view(index);
        // SAFETY: the shape and the name live as long as the results; a null pointer is never read.
        let (shape, name) = unsafe { (copied(view.shape, view.rank), copied(view.name.data, view.name.length)) };
        ResultView { code: view.code, shape, name: String::from_utf8_lossy(&name).into_owned() }
    }

    /// The bytes of a tensor, kept alive by it. A second take of the same index gives nothing.
    pub fn take(&mut self, index: usize) -> Bytes {
        let view = self.raw_view(index);
        if view.data.is_null() || view.length == 0 {
            return Bytes::new();
        }
        // SAFETY: the handle is live and the index is in range.
        let tensor = unsafe { ffi::crst_results_take(self.0.as_ptr(), index) };
        NonNull::new(tensor).map_or_else(Bytes::new, |tensor| {
            Bytes::from_owner(TensorBytes { tensor: Tensor(tensor), data: view.data, length: view.length })
        })
    }
}

/// # Safety
/// `data` is null or points to `length` readable items.
unsafe fn copied<T: Copy>(data: *const T, length: usize) -> Vec<T> {
    if data.is_null() || length == 0 {
        return Vec::new();
    }
    // SAFETY: by contract.
    unsafe { std::slice::from_raw_parts(data, length) }.to_vec()
}

struct Tensor(NonNull<ffi::Handle>);

// SAFETY: the shim made sure that nobody else holds the tensor; it is only read, and freed once.
unsafe impl Send for Tensor {}
// SAFETY: as above.
unsafe impl Sync for Tensor {}

impl Drop for Tensor {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_tensor_free(self.0.as_ptr()) }
    }
}

struct TensorBytes {
    #[allow(dead_code, reason = "keeps the bytes alive")]
    tensor: Tensor,
    data: *const u8,
    length: usize,
}

// SAFETY: the bytes belong to `tensor`, which nobody writes to any more.
unsafe impl Send for TensorBytes {}

impl AsRef<[u8]> for TensorBytes {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `tensor` is alive and `data` is its memory, `length` bytes long.
        unsafe { std::slice::from_raw_parts(self.data, self.length) }
    }
}

/// Sets libtorch's threads for the whole process.
pub fn set_threads(intra: i32, inter: i32) -> Result<(), Refusal> {
    // SAFETY: no pointers but the error's.
    checked(|error| unsafe { ffi::crst_set_threads(intra, inter, error) })
}

/// Opens `libtorch_cuda.so`; returns how many GPUs there are.
pub fn cuda_load(path: &Path) -> Result<i32, Refusal> {
    let path = c_path(path)?;
    let mut devices = 0;
    // SAFETY: the pointers are valid for the call.
    checked(|error| unsafe { ffi::crst_cuda_load(path.as_ptr(), &raw mut devices, error) })?;
    Ok(devices)
}

/// Free and total bytes of a GPU.
pub fn cuda_memory(ordinal: i32) -> Result<(u64, u64), Refusal> {
    let (mut free, mut total) = (0, 0);
    // SAFETY: the pointers are valid for the call.
    checked(|error| unsafe { ffi::crst_cuda_memory(ordinal, &raw mut free, &raw mut total, error) })?;
    Ok((free, total))
}

/// Writes a module made of TorchScript source: `attributes` are (name, type, expression, is a parameter).
pub fn testing_save(source: &str, attributes: &[(String, String, String, bool)], path: &Path) -> Result<(), Refusal> {
    let source = CString::new(source).map_err(|_| Refusal::plain("the source has a zero byte"))?;
    let path = c_path(path)?;
    let texts: Vec<ffi::Slice> = attributes
        .iter()
        .flat_map(|(name, kind, value, _)| [name, kind, value])
        .map(|text| ffi::Slice::of(text.as_bytes()))
        .collect();
    let parameters: Vec<u8> = attributes.iter().map(|attribute| u8::from(attribute.3)).collect();
    // SAFETY: all pointers are valid for the call, and three texts belong to each attribute.
    checked(|error| unsafe {
        ffi::crst_testing_save(source.as_ptr(), texts.as_ptr(), parameters.as_ptr(), attributes.len(), path.as_ptr(), error)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_raised_is_shown_as_python_shows_it() {
        assert_eq!(raised("builtins.ValueError: too short\n  more"), "ValueError: too short");
        assert_eq!(raised("mine.errors.Odd: a: b"), "Odd: a: b");
        assert_eq!(raised("RuntimeError: "), "RuntimeError");
        assert_eq!(raised("AssertionError: too few"), "AssertionError: too few");
        assert_eq!(raised("it is bad: very"), "RuntimeError: it is bad: very");
    }

    #[test]
    fn words_tell_errors_apart_that_lost_their_class() {
        let error = |text: &str| Refusal::plain(text).into_error();
        assert!(matches!(error("RuntimeError: CUDA out of memory. Tried to allocate"), EngineError::OutOfMemory(_)));
        assert!(matches!(error("CUDA error: an illegal memory access"), EngineError::DeviceLost(_)));
        assert!(matches!(error("anything else"), EngineError::Failed(_)));
    }
}
