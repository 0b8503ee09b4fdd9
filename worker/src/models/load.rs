//! What a load needs beside the model's own file, and where it runs.
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::oneshot, time::timeout};

use super::LoadError;
use crate::{
    contract::{Contract, OutputSpec},
    engine::{Device, EngineKind, InputBinding, LoadSpec, OutputBinding, Signature, priority},
};

/// The largest label, warm-up or initial-state file, in bytes.
const SIDE_FILE_BYTES_MAX: u64 = 1 << 30;

/// Loads that were given up and still hold a thread. Beyond these, only a new process gets rid of them.
const HUNG_MAX: usize = 4;

/// Where loads run, and how long each may.
#[derive(Default)]
pub(super) struct Background {
    /// How long a load may take, in ms; 0 for any time.
    limit_ms: AtomicU64,
    /// Loads that were given up; dead once their thread has ended.
    hung: Mutex<Vec<Weak<()>>>,
}

impl Background {
    pub(super) fn set_limit_ms(&self, limit_ms: u64) {
        self.limit_ms.store(limit_ms, Ordering::Relaxed);
    }

    /// Runs `work` on a thread of its own that stands back for requests, with all threads that it starts. Nothing stops a thread
    /// inside libtorch, so one that takes too long is left behind.
    pub(super) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, LoadError> + Send + 'static,
    ) -> Result<T, LoadError> {
        if self.hung() >= HUNG_MAX {
            return Err(LoadError::TooManyHang(HUNG_MAX));
        }
        let (done, result) = oneshot::channel();
        let runtime = Handle::current();
        let life = Arc::new(());
        let lives = Arc::downgrade(&life);
        let body = move || {
            priority::stand_back("loading");
            let _within = runtime.enter();
            // Whoever waited may have gone.
            let _ = done.send(work());
            drop(life);
        };
        std::thread::Builder::new().name("load".into()).spawn(body).map_err(LoadError::Thread)?;
        let limit_ms = self.limit_ms.load(Ordering::Relaxed);
        let limit = if limit_ms == 0 { Duration::MAX } else { Duration::from_millis(limit_ms) };
        let Ok(ended) = timeout(limit, result).await else {
            self.hung.lock().push(lives);
            return Err(LoadError::TooLong { limit_ms });
        };
        // It panicked if it said nothing.
        ended.unwrap_or(Err(LoadError::Aborted))
    }

    fn hung(&self) -> usize {
        let mut hung = self.hung.lock();
        hung.retain(|life| life.strong_count() > 0);
        hung.len()
    }
}

/// What the engine has to know. The device is filled in for each instance.
pub(super) fn load_spec(contract: &Contract, path: PathBuf, kind: EngineKind) -> Result<LoadSpec, LoadError> {
    let inputs = contract.inputs.iter().map(|spec| (spec.name.as_str(), spec.datatype)).chain(contract.hidden_inputs());
    let outputs = contract.outputs.iter().map(|spec| (&spec.name, spec.datatype, spec.reshape.as_ref().unwrap_or(&spec.dims)));
    let states = contract.states().iter().map(|state| (&state.output, state.datatype, &state.dims));
    let constants = contract.constants.iter().map(|(name, text)| match text.parse() {
        Ok(scalar) => Ok((name.clone(), scalar)),
        Err(text) => Err(LoadError::Scalar { name: name.clone(), text }),
    });
    Ok(LoadSpec {
        path,
        device: Device::Cpu,
        kind,
        inputs: inputs.map(|(name, datatype)| InputBinding { name: name.to_owned(), datatype }).collect(),
        constants: constants.collect::<Result<_, _>>()?,
        outputs: outputs
            .chain(states)
            .map(|(name, datatype, dims)| OutputBinding { name: name.clone(), datatype: Some(datatype), dims: dims.clone() })
            .collect(),
        batched: contract.batch_rows_max > 0,
        decoupled: contract.decoupled,
    })
}

/// The labels of each output's classes, one for each line of its file.
pub(super) fn labels(contract: &Contract, read: impl Fn(&str) -> Result<Bytes, String>) -> Result<Vec<Vec<String>>, String> {
    let of = |spec: &OutputSpec| match &spec.label_file {
        None => Ok(vec![]),
        Some(file) => Ok(String::from_utf8_lossy(&read(file)?).lines().map(str::to_owned).collect()),
    };
    contract.outputs.iter().map(of).collect()
}

pub(super) fn read_side_file(path: &Path, folder: &str, file: &str) -> Result<Bytes, String> {
    let name = if folder.is_empty() { file.to_owned() } else { format!("{folder}/{file}") };
    let fail = |error: std::io::Error| format!("can't read the model's file {name}: {error}");
    let bytes = std::fs::metadata(path).map_err(fail)?.len();
    if bytes > SIDE_FILE_BYTES_MAX {
        return Err(format!("the model's file {name} has {bytes} bytes, the limit is {SIDE_FILE_BYTES_MAX}"));
    }
    std::fs::read(path).map(Bytes::from).map_err(fail)
}

/// Whether the arguments of `forward` that optional inputs are bound to by name can do without them.
pub(super) fn takes_what_is_left_out(contract: &Contract, signature: &Signature) -> Result<(), String> {
    for spec in contract.inputs.iter().filter(|spec| spec.optional) {
        let argument = signature.arguments.iter().find(|argument| argument.name == spec.name);
        if argument.is_some_and(|argument| !argument.has_default && !argument.type_name.starts_with("Optional")) {
            let name = &spec.name;
            return Err(format!(
                "input '{name}' is optional, so argument '{name}' of forward must be Optional or have a default"
            ));
        }
    }
    Ok(())
}
