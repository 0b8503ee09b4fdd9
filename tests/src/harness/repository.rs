//! Model repositories for tests: the demo models as they are, and tiny ones made on the spot.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use cresset_worker::engine::testing::Script;
use tempfile::TempDir;

use super::{Error, binaries, failed};

/// A model repository in a temporary folder.
#[derive(Debug)]
pub struct ModelRepository(TempDir);

/// A `config.pbtxt` for one FP32 input `x` of any length and one FP32 output `y`, batched along the first dimension up to
/// `max_batch_size`. `more` is appended.
pub fn fp32_model(max_batch_size: u32, more: &str) -> String {
    format!(
        "platform: \"pytorch_libtorch\"\nmax_batch_size: {max_batch_size}\n\
         input [ {{ name: \"x\" data_type: TYPE_FP32 dims: [ -1 ] }} ]\n\
         output [ {{ name: \"y\" data_type: TYPE_FP32 dims: [ -1 ] }} ]\n{more}\n"
    )
}

impl ModelRepository {
    /// An empty one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn new() -> Result<Self, Error> {
        let folder = tempfile::Builder::new().prefix("cresset-models-").tempdir();
        folder.map(Self).map_err(failed("no temporary folder"))
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds one of the demo models: a link to the prepared one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn with_demo(self, name: &str) -> Result<Self, Error> {
        symlink(binaries::demo_models().join(name), self.path().join(name)).map_err(failed(format!("can't link {name}")))?;
        Ok(self)
    }

    /// Adds a model made of a script, as version 1.
    ///
    /// # Errors
    /// [`Error::Io`], with the compiler's words if the script is wrong.
    pub fn with_script(self, name: &str, config: &str, script: &Script) -> Result<Self, Error> {
        self.add_script(name, config, script).map(|()| self)
    }

    /// [`with_script`](Self::with_script), in place.
    ///
    /// # Errors
    /// As [`with_script`](Self::with_script).
    pub fn add_script(&self, name: &str, config: &str, script: &Script) -> Result<(), Error> {
        let file = self.add_config(name, config)?;
        script.save(&file).map_err(|error| failed(format!("can't save {name}"))(std::io::Error::other(error)))
    }

    /// Adds a version of a model that is there, made of a script, or puts another script into it.
    ///
    /// # Errors
    /// As [`with_script`](Self::with_script).
    pub fn add_version(&self, name: &str, version: u64, script: &Script) -> Result<(), Error> {
        let folder = self.path().join(name).join(version.to_string());
        fs::create_dir_all(&folder).map_err(failed(format!("can't make {}", folder.display())))?;
        let saved = script.save(&folder.join("model.pt"));
        saved.map_err(|error| failed(format!("can't save {name}"))(std::io::Error::other(error)))
    }

    /// Adds a model whose file is these bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn add_bytes(&self, name: &str, config: &str, bytes: &[u8]) -> Result<(), Error> {
        let file = self.add_config(name, config)?;
        fs::write(&file, bytes).map_err(failed(format!("can't write {}", file.display())))
    }

    /// Writes the configuration, and says where version 1's model file belongs.
    fn add_config(&self, name: &str, config: &str) -> Result<PathBuf, Error> {
        let version = self.path().join(name).join("1");
        fs::create_dir_all(&version).map_err(failed(format!("can't make {}", version.display())))?;
        let path = self.path().join(name).join("config.pbtxt");
        fs::write(&path, config).map_err(failed(format!("can't write {}", path.display())))?;
        Ok(version.join("model.pt"))
    }
}
