//! What goes into a call of a model, and what comes out.

use std::ops::Deref;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::Datatype;

/// One input of a call: the parts that, one after the other, are the whole tensor.
#[derive(Clone, Debug)]
pub struct InputParts {
    /// The type of the elements.
    pub datatype: Datatype,
    /// The shape of the whole, after concatenation along the first dimension.
    pub shape: Vec<i64>,
    /// Row-major little-endian bytes, one entry for each request of the batch (or just one).
    pub parts: Vec<Bytes>,
}

/// One output of a call.
#[derive(Clone, Debug)]
pub struct OutputTensor {
    /// The type of the elements.
    pub datatype: Datatype,
    /// The dimensions.
    pub shape: Vec<i64>,
    /// Row-major little-endian bytes; they are the result's own memory, nothing was copied.
    pub data: Bytes,
}

/// What a call returned, and where its time went.
#[derive(Clone, Debug)]
pub struct Outputs {
    /// The outputs, in the order of the [`LoadSpec`](super::LoadSpec).
    pub tensors: Vec<OutputTensor>,
    /// Where the time went.
    pub timing: Timing,
}

impl Deref for Outputs {
    type Target = [OutputTensor];

    fn deref(&self) -> &[OutputTensor] {
        &self.tensors
    }
}

/// When a call began on its device, and how long each part of it took.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// When the device's thread turned to it.
    pub began: Instant,
    /// From the request's bytes to tensors, the copy to the device included.
    pub input: Duration,
    /// The model itself.
    pub infer: Duration,
    /// From what the model returned to bytes.
    pub output: Duration,
}

impl Timing {
    /// Of a call that ends now and whose time all went into the model.
    pub fn of_model(began: Instant) -> Self {
        Self { began, input: Duration::ZERO, infer: began.elapsed(), output: Duration::ZERO }
    }

    /// Of a call that ends now: what is neither input nor model is output.
    pub fn ending_now(began: Instant, input: Duration, infer: Duration) -> Self {
        Self { began, input, infer, output: began.elapsed().saturating_sub(input + infer) }
    }

    /// Of this and what came later for the same response.
    pub fn and_then(self, later: Self) -> Self {
        Self {
            began: self.began,
            input: self.input + later.input,
            infer: self.infer + later.infer,
            output: self.output + later.output,
        }
    }

    /// All parts together.
    pub fn total(&self) -> Duration {
        self.input + self.infer + self.output
    }
}
