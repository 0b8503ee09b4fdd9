//! Makes the demo models: weights and data that `make fetch` brought become TorchScript.
//!
//! A worker needs none of this; it is here because only `engine` may name `tch`. Each model is made
//! in a scratch folder, loaded back from its file and checked there, and then renamed into the model
//! repository, so that a model that lies in the repository has passed its check. A stamp beside the
//! repository names what it was made from; a model whose stamp still holds isn't made again.
//!
//! Tracing writes down the operations of one run. A size that went through Rust as a number would be
//! written down as a constant, so the models are built only from operations that take their sizes
//! from the tensors, and the checks use other shapes than the trace did.

mod digits;
mod minilm;
mod silero;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use sha2::{Digest, Sha256};
use tch::{CModule, TchError, Tensor};

use super::error::short_message;

/// Where things are, and whether to do it all again.
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder of fetched things; the model repository is `models` in it.
    pub home: PathBuf,
    /// The folder with `NAME/config.pbtxt` and what else belongs beside it.
    pub templates: PathBuf,
    /// Make also what is up to date.
    pub force: bool,
}

/// Why a model could not be prepared.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// A part that `make fetch` brings isn't there.
    #[error("{} is missing: run `make fetch`", .0.display())]
    NotFetched(PathBuf),
    /// A file or folder can't be read or written.
    #[error("{}: {source}", path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// libtorch refused an operation.
    #[error("{model}: {}", short_message(&.source.to_string()))]
    Torch {
        /// The model in the making.
        model: &'static str,
        /// What it said.
        source: TchError,
    },
    /// The weights, the data or the reference aren't what the model needs.
    #[error("{model}: {problem}")]
    BadInput {
        /// The model in the making.
        model: &'static str,
        /// What is wrong with which part.
        problem: String,
    },
    /// The model was made, and its answers are wrong; it isn't put into the repository.
    #[error("{model} fails its check: {problem}")]
    WrongAnswers {
        /// The model in the making.
        model: &'static str,
        /// What came out, and what should have.
        problem: String,
    },
}

/// One demo model.
struct Recipe {
    name: &'static str,
    /// Grows when the code that makes it changes what it makes.
    revision: u32,
    /// The stamp of `make fetch` under `home/stamps` that names the parts it is made from.
    parts: &'static str,
    /// What beside `config.pbtxt` goes from the templates into the repository.
    beside: &'static [&'static str],
    /// What of the templates is only read.
    read: &'static [&'static str],
    /// Writes the TorchScript file and checks it. Returns a line about the check.
    make: fn(&Options, &Path) -> Result<String, PrepareError>,
}

const RECIPES: [Recipe; 3] = [silero::RECIPE, minilm::RECIPE, digits::RECIPE];

/// Makes and checks every demo model that isn't up to date, reporting a line for each.
///
/// # Errors
/// The first model that can't be made or fails its check; those before it are in the repository.
pub fn prepare_all(options: &Options, report: &mut dyn FnMut(&str)) -> Result<(), PrepareError> {
    for recipe in &RECIPES {
        let stamp_path = options.home.join("stamps").join(format!("{}.prepared", recipe.name));
        let stamp = recipe.stamp(options)?;
        let model = options.home.join("models").join(recipe.name).join("1/model.pt");
        let current = fs::read_to_string(&stamp_path).is_ok_and(|text| text == stamp) && model.is_file();
        if current && !options.force {
            continue;
        }
        let started = Instant::now();
        report(&format!("{}: preparing", recipe.name));
        let check = recipe.put_into_repository(options)?;
        write(&stamp_path, stamp.as_bytes())?;
        report(&format!("{}: ready, {check}, {:.1} s", recipe.name, started.elapsed().as_secs_f32()));
    }
    Ok(())
}

impl Recipe {
    /// What the model is made from, in one line.
    fn stamp(&self, options: &Options) -> Result<String, PrepareError> {
        let parts = options.home.join("stamps").join(self.parts);
        let mut hash = Sha256::new();
        hash.update(self.revision.to_le_bytes());
        hash.update(fs::read(&parts).map_err(|_| PrepareError::NotFetched(parts))?);
        for name in ["config.pbtxt"].iter().chain(self.beside).chain(self.read) {
            hash.update(read(&options.templates.join(self.name).join(name))?);
        }
        let digest: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(digest + "\n")
    }

    fn put_into_repository(&self, options: &Options) -> Result<String, PrepareError> {
        let scratch = options.home.join("downloads").join(format!("{}.prepared", self.name));
        let fresh = scratch.join("new");
        if scratch.exists() {
            fs::remove_dir_all(&scratch).map_err(at(&scratch))?;
        }
        fs::create_dir_all(fresh.join("1")).map_err(at(&fresh))?;
        let check = (self.make)(options, &fresh.join("1/model.pt"))?;
        if fresh.join("1/model.pt").exists() {
            for name in ["config.pbtxt"].iter().chain(self.beside) {
                write(&fresh.join(name), &read(&options.templates.join(self.name).join(name))?)?;
            }
            let target = options.home.join("models").join(self.name);
            fs::create_dir_all(options.home.join("models")).map_err(at(&target))?;
            if target.exists() {
                fs::rename(&target, scratch.join("old")).map_err(at(&target))?;
            }
            fs::rename(&fresh, &target).map_err(at(&target))?;
        }
        fs::remove_dir_all(&scratch).map_err(at(&scratch))?;
        Ok(check)
    }
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PrepareError {
    let path = path.to_owned();
    |source| PrepareError::File { path, source }
}

fn read(path: &Path) -> Result<Vec<u8>, PrepareError> {
    fs::read(path).map_err(at(path))
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), PrepareError> {
    fs::write(path, bytes).map_err(at(path))
}

/// A map from libtorch's error to ours.
fn torch(model: &'static str) -> impl Fn(TchError) -> PrepareError {
    move |source| PrepareError::Torch { model, source }
}

/// Traces `forward` over `examples` into a file.
fn trace(
    model: &'static str,
    examples: &[Tensor],
    path: &Path,
    forward: impl Fn(&[Tensor]) -> Result<Tensor, TchError>,
) -> Result<(), PrepareError> {
    let _no_grad = tch::no_grad_guard();
    let mut failure = None;
    let mut body = |inputs: &[Tensor]| match forward(inputs) {
        Ok(output) => vec![output],
        Err(error) => {
            failure = Some(error);
            Vec::new()
        }
    };
    let module = CModule::create_by_tracing(model, "forward", examples, &mut body).map_err(torch(model))?;
    match failure {
        Some(error) => Err(torch(model)(error)),
        None => module.save(path).map_err(torch(model)),
    }
}

/// The values of a tensor, row by row.
fn values(model: &'static str, tensor: &Tensor) -> Result<Vec<f32>, PrepareError> {
    let flat = tensor.f_flatten(0, -1).and_then(|flat| flat.f_contiguous()).map_err(torch(model))?;
    Vec::try_from(flat).map_err(torch(model))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ADD_ONE: Recipe = Recipe {
        name: "add_one",
        revision: 1,
        parts: "parts.json",
        beside: &["labels.txt"],
        read: &[],
        make: |_, path| {
            let example = Tensor::from_slice(&[1.0f32, 2.0]);
            trace("add_one", &[example], path, |inputs| inputs[0].f_add_scalar(1.0))?;
            Ok("no check".into())
        },
    };

    fn options(folder: &Path) -> Options {
        let options = Options { home: folder.join("home"), templates: folder.join("templates"), force: false };
        fs::create_dir_all(options.home.join("stamps")).unwrap();
        fs::create_dir_all(options.templates.join("add_one")).unwrap();
        fs::write(options.home.join("stamps/parts.json"), "1").unwrap();
        for name in ["config.pbtxt", "labels.txt"] {
            fs::write(options.templates.join("add_one").join(name), name).unwrap();
        }
        options
    }

    #[test]
    fn a_made_model_lies_in_the_repository_and_takes_other_sizes() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        for _ in 0..2 {
            ADD_ONE.put_into_repository(&options).unwrap();
        }
        let model = options.home.join("models/add_one");
        assert_eq!(fs::read_to_string(model.join("labels.txt")).unwrap(), "labels.txt");
        let loaded = CModule::load(model.join("1/model.pt")).unwrap();
        let output = loaded.forward_ts(&[Tensor::from_slice(&[1.0f32, 2.0, 3.0])]).unwrap();
        assert_eq!(values("add_one", &output).unwrap(), [2.0, 3.0, 4.0]);
        assert_eq!(fs::read_dir(options.home.join("downloads")).unwrap().count(), 0, "scratch folders stay behind");
    }

    #[test]
    fn a_failed_trace_leaves_the_repository_alone() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        let broken = Recipe {
            make: |_, path| {
                let example = Tensor::from_slice(&[1.0f32, 2.0]);
                trace("add_one", &[example], path, |inputs| inputs[0].f_reshape([3i64]))?;
                Ok(String::new())
            },
            ..ADD_ONE
        };
        let error = broken.put_into_repository(&options).unwrap_err();
        assert!(matches!(error, PrepareError::Torch { .. }), "{error}");
        assert!(!options.home.join("models").exists());
        ADD_ONE.put_into_repository(&options).unwrap();
    }

    #[test]
    fn the_stamp_changes_with_every_part() {
        let folder = tempfile::tempdir().unwrap();
        let options = options(folder.path());
        let first = ADD_ONE.stamp(&options).unwrap();
        fs::write(options.home.join("stamps/parts.json"), "2").unwrap();
        let second = ADD_ONE.stamp(&options).unwrap();
        fs::write(options.templates.join("add_one/labels.txt"), "else").unwrap();
        let third = ADD_ONE.stamp(&options).unwrap();
        assert!(first != second && second != third);
        fs::remove_file(options.home.join("stamps/parts.json")).unwrap();
        assert!(matches!(ADD_ONE.stamp(&options), Err(PrepareError::NotFetched(_))));
    }
}
