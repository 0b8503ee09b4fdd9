//! Small TorchScript models for tests, made without Python. No server code uses this.

use std::collections::BTreeMap;
use std::path::Path;

use super::torch::testing_save;
use super::{Device, EngineError, EngineKind, LoadSpec};

/// The library that takes the place of libtorch's CUDA half where there is no GPU (`native/simulated_gpu.cpp`).
#[cfg(feature = "simulated-gpu")]
pub fn simulated_gpu() -> &'static Path {
    Path::new(env!("SIMULATED_GPU"))
}

/// A TorchScript model on the CPU without inputs or outputs, to begin from.
pub fn spec_of(path: &Path) -> LoadSpec {
    LoadSpec {
        path: path.to_path_buf(),
        device: Device::Cpu,
        kind: EngineKind::TorchScript,
        inputs: Vec::new(),
        constants: BTreeMap::new(),
        outputs: Vec::new(),
        batched: false,
        decoupled: false,
    }
}

/// A module in the making: TorchScript source for its methods, and attributes with initial values.
///
/// ```no_run
/// # use cresset_worker::engine::testing::Script;
/// Script::new("def forward(self, x):\n  return x * self.factor\n")
///     .parameter("factor", "torch.full([1], 2.0)")
///     .save("model.pt".as_ref())?;
/// # Ok::<(), cresset_worker::engine::EngineError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Script {
    source: String,
    attributes: Vec<(String, String, String, bool)>,
}

impl Script {
    /// Starts from the source of the module's methods, `forward` among them.
    pub fn new(source: &str) -> Self {
        Self { source: source.to_string(), attributes: Vec::new() }
    }

    /// Adds an attribute: its TorchScript type and an expression for its first value, such as
    /// `("calls", "int", "0")` or `("seen", "Dict[str, Tensor]", "{}")`.
    #[must_use]
    pub fn attribute(mut self, name: &str, type_name: &str, expression: &str) -> Self {
        self.attributes.push((name.into(), type_name.into(), expression.into(), false));
        self
    }

    /// Adds a tensor attribute.
    #[must_use]
    pub fn buffer(self, name: &str, expression: &str) -> Self {
        self.attribute(name, "Tensor", expression)
    }

    /// Adds a weight.
    #[must_use]
    pub fn parameter(mut self, name: &str, expression: &str) -> Self {
        self.attributes.push((name.into(), "Tensor".into(), expression.into(), true));
        self
    }

    /// Writes the module as TorchScript saves it.
    ///
    /// # Errors
    /// [`EngineError::Failed`] with what the compiler or the file system said.
    pub fn save(&self, path: &Path) -> Result<(), EngineError> {
        testing_save(&self.source, &self.attributes, path).map_err(|refusal| EngineError::Failed(refusal.text().to_string()))
    }
}

/// `forward(x) -> x + 1`, for any shape and type.
pub fn plus_one() -> Script {
    Script::new("def forward(self, x):\n  return x + 1\n")
}

/// A module that keeps its state inside: returns the sum of everything it has been given, of shape `[1]`.
pub fn running_sum() -> Script {
    Script::new(
        "def forward(self, x):\n  self.total = self.total + x.sum()\n  self.calls += 1\n  return self.total.reshape([1])\n",
    )
    .buffer("total", "torch.zeros([])")
    .attribute("calls", "int", "0")
}

/// Raises when the first element is negative, else returns its input.
pub fn raises_on_negative() -> Script {
    Script::new("def forward(self, x):\n  assert float(x.flatten()[0]) >= 0.0, \"a negative first element\"\n  return x\n")
}

/// Two inputs, a tuple of two results: sum and difference.
pub fn sum_and_difference() -> Script {
    Script::new("def forward(self, a, b):\n  return a + b, a - b\n")
}

/// Returns `Dict[str, Tensor]` with `sum` and `difference`.
pub fn dict_output() -> Script {
    Script::new("def forward(self, a, b):\n  return {\"sum\": a + b, \"difference\": a - b}\n")
}

/// Multiplies `size` by `size` matrices `rounds` times before it returns its input: slow on purpose,
/// in proportion to `rounds`.
pub fn slow(size: u32, rounds: u32) -> Script {
    Script::new(&format!(
        "def forward(self, x):\n  m = self.matrix\n  for i in range({rounds}):\n    m = torch.tanh(torch.mm(m, self.matrix))\n  return x + m[0, 0] * 0\n"
    ))
    .parameter("matrix", &format!("torch.ones([{size}, {size}]) * 0.001"))
}
