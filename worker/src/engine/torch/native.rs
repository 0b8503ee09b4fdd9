//! Safe handles over the shim: every `unsafe` call of the engine is in here and in the files below.

#![allow(unsafe_code)]

mod module;
mod package;
mod results;

use std::ffi::{CString, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

pub use self::module::{Generation, Module, Sequence};
pub use self::package::Package;
pub use self::results::Results;
use super::ffi;
use super::types::code;
use crate::engine::error::short_message;
use crate::engine::{Device, EngineError, InputParts};

/// What the shim said when it refused.
pub struct Refusal {
    code: i32,
    text: String,
}

impl Refusal {
    pub(super) fn plain(text: &str) -> Self {
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

/// The shim's number of a device.
fn cuda_ordinal(device: Device) -> Result<i32, Refusal> {
    match device {
        Device::Cpu => Ok(-1),
        Device::Cuda(ordinal) => i32::try_from(ordinal).map_err(|_| Refusal::plain("no such GPU")),
    }
}

fn slices(names: &[&str]) -> Vec<ffi::Slice> {
    names.iter().map(|name| ffi::Slice::of(name.as_bytes())).collect()
}

/// Lends the inputs to a call of the shim that gives a handle back.
fn with_inputs(
    inputs: &[InputParts],
    mut call: impl FnMut(*const ffi::Input, usize, *mut *mut ffi::Handle, *mut ffi::Error) -> i32,
) -> Result<NonNull<ffi::Handle>, Refusal> {
    let parts: Vec<Vec<ffi::Slice>> =
        inputs.iter().map(|input| input.parts.iter().map(|part| ffi::Slice::of(part)).collect()).collect();
    let lent = |(input, parts): (&InputParts, &Vec<ffi::Slice>)| ffi::Input {
        code: if input.is_absent() { ffi::TYPE_ABSENT } else { code(input.datatype) },
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

/// Sets libtorch's threads for the whole process.
pub fn set_threads(intra: i32, inter: i32) -> Result<(), Refusal> {
    // SAFETY: no pointers but the error's.
    checked(|error| unsafe { ffi::crst_set_threads(intra, inter, error) })
}

/// Sets the threads inside one operation for what the calling thread runs.
pub fn set_intra_op_threads(intra: i32) -> Result<(), Refusal> {
    // SAFETY: no pointers but the error's.
    checked(|error| unsafe { ffi::crst_set_intra_op_threads(intra, error) })
}

/// Has large blocks of freed tensors kept for new ones, from now on.
pub fn keep_memory() -> Result<(), Refusal> {
    // SAFETY: no pointers but the error's. Tensors that are there already are freed as they were made: each carries its deleter.
    checked(|error| unsafe { ffi::crst_keep_memory(error) })
}

/// Gives freed memory back to the system.
pub fn give_memory_back() {
    // SAFETY: no pointers; it may be called from any thread at any time.
    unsafe { ffi::crst_give_memory_back() }
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
