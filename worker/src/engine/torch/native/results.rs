//! What a call returned: tensors and byte strings, handed out without a copy.

#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::time::Duration;

use bytes::Bytes;

use super::ffi;

/// What a call returned.
pub struct Results(pub(super) NonNull<ffi::Handle>);

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
