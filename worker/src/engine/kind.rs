//! Which engine runs a model, by its configuration and its file.

use std::collections::BTreeMap;
use std::path::Path;

use super::null::{NullModel, NullSpec};
use super::torch::PackageEngine;
use super::{Device, Engine, EngineError, LoadSpec, Model, TorchEngine};

/// The parameter of `config.pbtxt` that says how long a null model's call takes, in µs.
const NULL_SLEEP: &str = "cresset.null.sleep_us";
/// The longest that it may say: an hour.
const NULL_SLEEP_US_MAX: u64 = 3_600_000_000;

/// An engine, and what it has to know beside the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// A TorchScript module (`.pt`).
    #[default]
    TorchScript,
    /// A package that AOTInductor compiled (`.pt2`).
    Package,
    /// No model at all: see [`NullSpec`].
    Null(NullSpec),
}

impl EngineKind {
    /// Reads a configuration's `platform`, `backend` and parameters. The platform `torch_aoti` or a file `.pt2` is a package,
    /// the platform or backend `null` the null engine; the platform `pytorch_libtorch`, the backend `pytorch`, or nothing at
    /// all is TorchScript.
    ///
    /// # Errors
    /// What isn't served, by field, and what is.
    pub fn of(platform: &str, backend: &str, file: &Path, parameters: &BTreeMap<String, String>) -> Result<Self, String> {
        match (platform, backend) {
            ("null", "null" | "") | ("", "null") => Ok(Self::Null(NullSpec { sleep_us: sleep_us(parameters)? })),
            ("torch_aoti", "pytorch" | "") => Ok(Self::Package),
            ("pytorch_libtorch" | "", "pytorch" | "") => {
                let compiled = file.extension().is_some_and(|extension| extension == "pt2");
                Ok(if compiled { Self::Package } else { Self::TorchScript })
            }
            (platform, "pytorch" | "null" | "") => {
                Err(format!("platform '{platform}' is not served, use 'pytorch_libtorch', 'torch_aoti' or 'null'"))
            }
            (_, backend) => Err(format!("backend '{backend}' is not served, use 'pytorch' or 'null'")),
        }
    }
}

fn sleep_us(parameters: &BTreeMap<String, String>) -> Result<u64, String> {
    let Some(text) = parameters.get(NULL_SLEEP) else { return Ok(0) };
    let number = text.trim().parse().ok().filter(|sleep_us| *sleep_us <= NULL_SLEEP_US_MAX);
    number.ok_or_else(|| format!("parameter '{NULL_SLEEP}' is '{text}', it must be microseconds from 0 to {NULL_SLEEP_US_MAX}"))
}

/// All engines; which one runs a model is said by its [`LoadSpec::kind`].
#[derive(Clone, Copy, Debug, Default)]
pub struct AnyEngine {
    /// Whether models of the null engine may be served. They answer without a model, so nobody should get one by mistake.
    pub null_enabled: bool,
}

impl Engine for AnyEngine {
    fn load(&self, spec: &LoadSpec) -> Result<Box<dyn Model>, EngineError> {
        match spec.kind {
            EngineKind::TorchScript => TorchEngine.load(spec),
            EngineKind::Package => PackageEngine.load(spec),
            EngineKind::Null(null) if self.null_enabled => Ok(Box::new(NullModel::new(null, spec))),
            EngineKind::Null(_) => Err(EngineError::CannotLoad(
                "the null engine answers without a model and is only for scale tests; \
                 a worker serves it if it is started with the setting null-engine"
                    .into(),
            )),
        }
    }

    fn try_device(&self, device: Device) -> Result<(), EngineError> {
        TorchEngine.try_device(device)
    }

    fn set_intra_op_threads(&self, threads: u16) -> Result<(), EngineError> {
        TorchEngine.set_intra_op_threads(threads)
    }

    fn name(&self) -> &'static str {
        "any"
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::spec_of;
    use super::*;

    fn of(platform: &str, backend: &str, file: &str) -> Result<EngineKind, String> {
        EngineKind::of(platform, backend, file.as_ref(), &BTreeMap::new())
    }

    #[test]
    fn the_configuration_and_the_file_choose_the_engine() {
        for (platform, backend, file, kind) in [
            ("pytorch_libtorch", "", "1/model.pt", EngineKind::TorchScript),
            ("", "pytorch", "model.pt", EngineKind::TorchScript),
            ("", "", "silero_vad.jit", EngineKind::TorchScript),
            ("pytorch_libtorch", "pytorch", "model.pt2", EngineKind::Package),
            ("torch_aoti", "", "model.pt", EngineKind::Package),
            ("", "null", "model.pt", EngineKind::Null(NullSpec::default())),
            ("null", "", "model.pt2", EngineKind::Null(NullSpec::default())),
        ] {
            assert_eq!(of(platform, backend, file), Ok(kind), "{platform} {backend} {file}");
        }
        for (platform, backend, field) in [
            ("onnxruntime_onnx", "", "platform 'onnxruntime_onnx'"),
            ("", "python", "backend 'python'"),
            ("pytorch_libtorch", "null", "platform 'pytorch_libtorch'"),
        ] {
            let refusal = of(platform, backend, "model.pt").expect_err(field);
            assert!(refusal.contains(field), "{refusal}");
        }
    }

    #[test]
    fn a_null_models_sleep_is_a_parameter() {
        let with = |text: &str| {
            let parameters = BTreeMap::from([(NULL_SLEEP.to_owned(), text.to_owned())]);
            EngineKind::of("null", "", "model.pt".as_ref(), &parameters)
        };
        assert_eq!(with("250"), Ok(EngineKind::Null(NullSpec { sleep_us: 250 })));
        for wrong in ["", "-1", "1e3", "3600000001"] {
            assert!(with(wrong).expect_err(wrong).contains("cresset.null.sleep_us"), "{wrong}");
        }
    }

    #[test]
    fn the_null_engine_has_to_be_allowed() {
        let spec = LoadSpec { kind: EngineKind::Null(NullSpec::default()), ..spec_of("nowhere".as_ref()) };
        let refused = AnyEngine::default().load(&spec).err().expect("nobody allowed it");
        assert!(matches!(&refused, EngineError::CannotLoad(why) if why.contains("null-engine")), "{refused}");
    }
}
