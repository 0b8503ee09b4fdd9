//! GPUs: libtorch's CUDA half is opened at run time, so that one binary serves machines with and
//! without one.

use std::path::Path;

use super::EngineError;
use super::torch::{cuda_load, cuda_memory};

/// The file that is opened.
const LIBRARY: &str = "libtorch_cuda.so";

/// Opens `libtorch_cuda.so` in a folder of libraries; returns how many GPUs there are (at least one).
/// It has to be of the very release that the worker is linked with. Call it at the start of the
/// process: libtorch decides once, at the first question about a GPU, whether it has any.
///
/// # Errors
/// [`EngineError::DeviceLost`] if the library isn't there or can't be opened (a library it depends on
/// is missing, the driver is too old), or if it finds no GPU.
pub fn load(library_dir: &Path) -> Result<u32, EngineError> {
    let path = library_dir.join(LIBRARY);
    if !path.is_file() {
        return Err(EngineError::DeviceLost(format!(
            "{LIBRARY} is not in the folder of libtorch's libraries, take the one of the same libtorch release, or use the cpu"
        )));
    }
    let devices = cuda_load(&path).map_err(|refusal| {
        let why = super::error::short_message_about(refusal.text(), &path);
        EngineError::DeviceLost(format!("{LIBRARY} can't be used: {why}"))
    })?;
    match u32::try_from(devices) {
        Ok(count) if count > 0 => Ok(count),
        _ => Err(EngineError::DeviceLost(format!("{LIBRARY} finds no GPU, check the driver, or use the cpu"))),
    }
}

/// Free and total bytes of a GPU.
///
/// # Errors
/// [`EngineError::DeviceLost`] if the CUDA runtime can't say.
pub fn memory_bytes(ordinal: u32) -> Result<(u64, u64), EngineError> {
    let lost = |why: &str| EngineError::DeviceLost(super::short_message(why));
    let ordinal = i32::try_from(ordinal).map_err(|_| lost("no such GPU"))?;
    cuda_memory(ordinal).map_err(|refusal| lost(refusal.text()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_or_broken_library_is_a_clear_error() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let missing = load(dir.path()).expect_err("nothing is there");
        assert!(matches!(&missing, EngineError::DeviceLost(why) if why.contains("is not in the folder")), "{missing}");
        std::fs::write(dir.path().join(LIBRARY), b"not a library").expect("written");
        let broken = load(dir.path()).expect_err("not a library");
        assert!(matches!(&broken, EngineError::DeviceLost(why) if why.contains("can't be used")), "{broken}");
        assert!(!broken.to_string().contains(&*dir.path().to_string_lossy()), "{broken}");
    }
}
