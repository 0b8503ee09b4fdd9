//! The shim's C interface as Rust sees it; `native/engine.h` says what each item means.

#![allow(unsafe_code)]

use std::ffi::{c_char, c_void};

pub const OK: i32 = 0;
pub const OUT_OF_MEMORY: i32 = 2;
pub const RAISED: i32 = 3;
pub const NOT_CHECKPOINTABLE: i32 = 4;
pub const BAD_CHECKPOINT: i32 = 5;
pub const BAD_INPUT: i32 = 6;

pub const TYPE_NONE: i32 = -1;
pub const TYPE_BYTES: i32 = -2;
pub const TYPE_ABSENT: i32 = -3;

pub const ARG_INPUT: i32 = 0;
pub const ARG_DEFAULT: i32 = 1;
pub const ARG_INT: i32 = 2;
pub const ARG_FLOAT: i32 = 3;
pub const ARG_BOOL: i32 = 4;
pub const ARG_TEXT: i32 = 5;
pub const ARG_DICT: i32 = 6;

#[repr(C)]
pub struct Error {
    pub text: *mut c_char,
    pub length: usize,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slice {
    pub data: *const u8,
    pub length: usize,
}

impl Slice {
    pub fn of(bytes: &[u8]) -> Self {
        Self { data: bytes.as_ptr(), length: bytes.len() }
    }
}

#[repr(C)]
pub struct Argument {
    pub kind: i32,
    pub integer: i64,
    pub real: f64,
    pub text: Slice,
}

#[repr(C)]
pub struct Input {
    pub code: i32,
    pub shape: *const i64,
    pub rank: usize,
    pub parts: *const Slice,
    pub part_count: usize,
}

#[repr(C)]
pub struct View {
    pub code: i32,
    pub shape: *const i64,
    pub rank: usize,
    pub data: *const u8,
    pub length: usize,
    pub name: Slice,
}

/// `crst_module`, `crst_staged`, `crst_sequence`, `crst_generation`, `crst_package`, `crst_results` and `crst_tensor` are only ever
/// pointed to.
pub type Handle = c_void;

unsafe extern "C" {
    pub fn crst_free(text: *mut c_char);
    pub fn crst_set_threads(intra: i32, inter: i32, error: *mut Error) -> i32;
    pub fn crst_set_intra_op_threads(intra: i32, error: *mut Error) -> i32;
    pub fn crst_keep_memory(error: *mut Error) -> i32;
    pub fn crst_give_memory_back();
    pub fn crst_cuda_load(path: *const c_char, devices: *mut i32, error: *mut Error) -> i32;
    pub fn crst_cuda_memory(ordinal: i32, free: *mut u64, total: *mut u64, error: *mut Error) -> i32;

    pub fn crst_module_load(path: *const c_char, cuda: i32, out: *mut *mut Handle, error: *mut Error) -> i32;
    pub fn crst_module_twin(module: *mut Handle, out: *mut *mut Handle, error: *mut Error) -> i32;
    pub fn crst_module_free(module: *mut Handle);
    pub fn crst_module_signature(module: *mut Handle, text: *mut *mut c_char, length: *mut usize, error: *mut Error) -> i32;
    pub fn crst_module_bind(
        module: *mut Handle,
        arguments: *const Argument,
        count: usize,
        names: *const Slice,
        name_count: usize,
        error: *mut Error,
    ) -> i32;
    pub fn crst_module_bytes(module: *const Handle) -> u64;
    pub fn crst_module_fingerprint(module: *const Handle) -> u64;
    pub fn crst_module_forward(
        module: *mut Handle,
        inputs: *const Input,
        count: usize,
        out: *mut *mut Handle,
        error: *mut Error,
    ) -> i32;

    pub fn crst_module_second(module: *mut Handle, out: *mut *mut Handle, error: *mut Error) -> i32;
    pub fn crst_module_stage(
        module: *mut Handle,
        inputs: *const Input,
        count: usize,
        out: *mut *mut Handle,
        error: *mut Error,
    ) -> i32;
    pub fn crst_module_compute(module: *mut Handle, staged: *mut Handle, error: *mut Error) -> i32;
    pub fn crst_staged_results(staged: *mut Handle, out: *mut *mut Handle, error: *mut Error) -> i32;
    pub fn crst_staged_free(staged: *mut Handle);

    pub fn crst_sequence_open(module: *mut Handle, out: *mut *mut Handle, error: *mut Error) -> i32;
    pub fn crst_sequence_free(sequence: *mut Handle);
    pub fn crst_sequence_step(
        sequence: *mut Handle,
        inputs: *const Input,
        count: usize,
        out: *mut *mut Handle,
        error: *mut Error,
    ) -> i32;
    pub fn crst_sequence_checkpoint(sequence: *mut Handle, data: *mut *mut c_char, length: *mut usize, error: *mut Error) -> i32;
    pub fn crst_sequence_restore(sequence: *mut Handle, data: *const u8, length: usize, error: *mut Error) -> i32;

    pub fn crst_module_check_next(module: *mut Handle, error: *mut Error) -> i32;
    pub fn crst_generation_open(
        module: *mut Handle,
        inputs: *const Input,
        count: usize,
        out: *mut *mut Handle,
        input_ns: *mut u64,
        infer_ns: *mut u64,
        error: *mut Error,
    ) -> i32;
    pub fn crst_generation_free(generation: *mut Handle);
    pub fn crst_generation_next(generation: *mut Handle, out: *mut *mut Handle, error: *mut Error) -> i32;

    pub fn crst_package_load(path: *const c_char, cuda: i32, out: *mut *mut Handle, error: *mut Error) -> i32;
    pub fn crst_package_free(package: *mut Handle);
    pub fn crst_package_call_spec(package: *mut Handle, text: *mut *mut c_char, length: *mut usize, error: *mut Error) -> i32;
    pub fn crst_package_bind(package: *mut Handle, names: *const Slice, count: usize, error: *mut Error) -> i32;
    pub fn crst_package_bytes(package: *const Handle) -> u64;
    pub fn crst_package_run(
        package: *mut Handle,
        inputs: *const Input,
        count: usize,
        out: *mut *mut Handle,
        error: *mut Error,
    ) -> i32;

    pub fn crst_results_count(results: *const Handle) -> usize;
    pub fn crst_results_times(results: *const Handle, input_ns: *mut u64, infer_ns: *mut u64);
    pub fn crst_results_view(results: *const Handle, index: usize, view: *mut View);
    pub fn crst_results_take(results: *mut Handle, index: usize) -> *mut Handle;
    pub fn crst_results_free(results: *mut Handle);
    pub fn crst_tensor_free(tensor: *mut Handle);

    pub fn crst_testing_save(
        source: *const c_char,
        attributes: *const Slice,
        parameters: *const u8,
        attribute_count: usize,
        path: *const c_char,
        error: *mut Error,
    ) -> i32;
}
