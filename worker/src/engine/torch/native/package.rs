//! An AOTInductor package.

#![allow(unsafe_code)]

use std::path::Path;
use std::ptr::NonNull;

use super::{Refusal, Results, c_path, checked, cuda_ordinal, ffi, not_null, slices, take_text, with_inputs};
use crate::engine::{Device, InputParts};

/// A model that was compiled to native code.
pub struct Package(NonNull<ffi::Handle>);

// SAFETY: the shim keeps no thread-local state for a handle; exclusive use is enforced by `&mut`.
unsafe impl Send for Package {}

impl Drop for Package {
    fn drop(&mut self) {
        // SAFETY: the handle is ours and not used again.
        unsafe { ffi::crst_package_free(self.0.as_ptr()) }
    }
}

impl Package {
    pub fn load(path: &Path, device: Device) -> Result<Self, Refusal> {
        let (path, cuda) = (c_path(path)?, cuda_ordinal(device)?);
        let mut handle = std::ptr::null_mut();
        // SAFETY: the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_package_load(path.as_ptr(), cuda, &raw mut handle, error) })?;
        not_null(handle).map(Self)
    }

    /// The specifications of its inputs and of its outputs, in JSON.
    pub fn call_spec(&mut self) -> Result<(String, String), Refusal> {
        let mut text = std::ptr::null_mut();
        let mut length = 0;
        // SAFETY: the handle is live and exclusively ours; the pointers are valid for the call.
        checked(|error| unsafe { ffi::crst_package_call_spec(self.0.as_ptr(), &raw mut text, &raw mut length, error) })?;
        // SAFETY: the shim filled both.
        let lines = unsafe { take_text(text, length) };
        let lines = String::from_utf8_lossy(&lines).into_owned();
        let (inputs, outputs) = lines.split_once('\n').ok_or_else(|| Refusal::plain("the package has no call specification"))?;
        Ok((inputs.to_owned(), outputs.trim_end().to_owned()))
    }

    /// Gives the inputs their names; there have to be as many as the package takes.
    pub fn bind(&mut self, names: &[&str]) -> Result<(), Refusal> {
        let names = slices(names);
        // SAFETY: the handle is live and exclusively ours; the names outlive the call.
        checked(|error| unsafe { ffi::crst_package_bind(self.0.as_ptr(), names.as_ptr(), names.len(), error) })
    }

    /// Bytes of its constants.
    pub fn bytes(&self) -> u64 {
        // SAFETY: the handle is live; the shim only reads a number that was set at load.
        unsafe { ffi::crst_package_bytes(self.0.as_ptr()) }
    }

    pub fn run(&mut self, inputs: &[InputParts]) -> Result<Results, Refusal> {
        with_inputs(inputs, |inputs, count, out, error| {
            // SAFETY: the handle is live and exclusively ours; `with_inputs` keeps the rest valid.
            unsafe { ffi::crst_package_run(self.0.as_ptr(), inputs, count, out, error) }
        })
        .map(Results)
    }
}
