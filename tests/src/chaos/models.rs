//! What is asked: five kinds of requests, each with a model and scripts of inputs that are the same in every run.

use bytes::Bytes;
use cresset_proto::{
    inference::ModelInferRequest,
    parameters::{bool_parameter, int64_parameter, keys},
    tensor::{Datatype, Tensor, push_input},
};
use cresset_worker::engine::testing::{self, Script};

use crate::{
    harness::{self, ModelRepository, fp32_model},
    reference::bytes_of,
    speech::{CHUNK_SAMPLES, Speech},
};

/// Requests in one pass of a stream.
const REQUESTS: usize = 200;
/// Requests in one pass of the decoupled model.
const DECOUPLED_REQUESTS: usize = 20;
/// Different scripts of each kind.
pub const SCRIPTS: usize = 4;
/// Responses to one request of the decoupled model.
const PARTS: usize = 10;
/// How long a sequence is kept whose caller was cut off.
const IDLE_US: u64 = 20_000_000;

/// What a lane asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Single calls.
    Unary,
    /// Independent requests on one stream.
    Independent,
    /// Sequences of the voice-activity model, which keeps its state inside.
    Speech,
    /// Sequences of a model whose state goes in and out as a tensor.
    Implicit,
    /// Requests that are answered several times.
    Decoupled,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Unary, Self::Independent, Self::Speech, Self::Implicit, Self::Decoupled];

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unary => "unary",
            Self::Independent => "stream",
            Self::Speech => "silero",
            Self::Implicit => "implicit",
            Self::Decoupled => "decoupled",
        }
    }

    /// The model.
    pub fn model(self) -> &'static str {
        match self {
            Self::Unary | Self::Independent => "plus_one",
            Self::Speech => "silero_vad",
            Self::Implicit => "faded_sum",
            Self::Decoupled => "countdown",
        }
    }

    /// Whether its requests share state.
    pub fn is_sequence(self) -> bool {
        matches!(self, Self::Speech | Self::Implicit)
    }

    /// Responses to each request.
    pub fn parts(self) -> usize {
        if self == Self::Decoupled { PARTS } else { 1 }
    }

    /// Requests in one pass.
    pub fn requests(self) -> usize {
        if self == Self::Decoupled { DECOUPLED_REQUESTS } else { REQUESTS }
    }

    /// The input's name, type and shape.
    pub fn input(self) -> (&'static str, Datatype, Vec<i64>) {
        match self {
            Self::Unary | Self::Independent => ("x", Datatype::Fp32, vec![1, 4]),
            Self::Speech => ("x", Datatype::Fp32, vec![1, CHUNK_SAMPLES as i64]),
            Self::Implicit => ("x", Datatype::Fp32, vec![1, 1]),
            Self::Decoupled => ("count", Datatype::Int64, vec![1]),
        }
    }

    /// The request with this input. `bounds` are whether it begins and ends `sequence`.
    pub fn request(self, id: String, input: &Bytes, sequence: i64, bounds: (bool, bool)) -> ModelInferRequest {
        let (name, datatype, shape) = self.input();
        let mut request = ModelInferRequest { model_name: self.model().to_owned(), id, ..Default::default() };
        push_input(&mut request, Tensor { name: name.to_owned(), datatype, shape, data: input.clone() });
        if self.is_sequence() {
            request.parameters.insert(keys::SEQUENCE_ID.to_owned(), int64_parameter(sequence));
            request.parameters.insert(keys::SEQUENCE_START.to_owned(), bool_parameter(bounds.0));
            request.parameters.insert(keys::SEQUENCE_END.to_owned(), bool_parameter(bounds.1));
        }
        request
    }

    /// One of its scripts: the inputs of a pass.
    pub fn script(self, number: usize, speech: &Speech) -> Vec<Bytes> {
        let first = number * self.requests();
        let values = first..first + self.requests();
        let input = |value: usize| match self {
            Self::Unary | Self::Independent => bytes_of(&[value as f32, -(value as f32), 0.5, value as f32 / 3.0]),
            // Numbers whose faded sums are all different.
            Self::Implicit => bytes_of(&[(value as f32 * 0.7).sin() * 10.0]),
            _ => Bytes::from((value as i64).to_le_bytes().to_vec()),
        };
        if self == Self::Speech { speech.chunks(number * 97, self.requests()) } else { values.map(input).collect() }
    }
}

/// The repository with all models.
///
/// # Errors
/// [`harness::Error`].
pub fn repository() -> Result<ModelRepository, harness::Error> {
    let repository = ModelRepository::new()?.with_demo("silero_vad")?;
    repository.add_script("plus_one", &fp32_model(8, "dynamic_batching { }"), &testing::plus_one())?;
    let config = format!(
        "max_batch_size: 4 input [ {{ name: \"x\" data_type: TYPE_FP32 dims: [ 1 ] }} ] \
         output [ {{ name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] }} ] \
         sequence_batching {{ oldest {{ max_candidate_sequences: 256 }} max_sequence_idle_microseconds: {IDLE_US} \
         state [ {{ input_name: \"sum\" output_name: \"sum_out\" data_type: TYPE_FP32 dims: [ 1 ] }} ] }}"
    );
    let faded = "def forward(self, x, sum):\n  sum = sum * 0.5 + x\n  return sum * 1.0, sum\n";
    repository.add_script("faded_sum", &config, &Script::new(faded))?;
    // Each response takes a moment, so that a fault finds a request in the middle of them.
    let config = "max_batch_size: 0 input [ { name: \"count\" data_type: TYPE_INT64 dims: [ 1 ] } ] \
                  output [ { name: \"y\" data_type: TYPE_FP32 dims: [ 1 ] } ] model_transaction_policy { decoupled: true }";
    let countdown = format!(
        "def forward(self, count):\n  self.first = int(count)\n  self.left = {PARTS}\n\n\
         def next(self) -> Optional[Tensor]:\n  if self.left == 0:\n    return None\n  m = self.matrix\n  for i in range(300):\n    \
         m = torch.tanh(m * self.matrix)\n  self.left -= 1\n  return torch.full([1], self.first * 100.0 + self.left) + m[0] * 0\n"
    );
    let script = Script::new(&countdown).attribute("left", "int", "0").attribute("first", "int", "0");
    repository.add_script("countdown", config, &script.parameter("matrix", "torch.full([256], 0.999)"))?;
    Ok(repository)
}
