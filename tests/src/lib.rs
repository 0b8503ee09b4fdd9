//! What tests, the demo and later measurements share.
//!
//! - [`mod@bench`]: the parts of `make bench`.
//! - [`harness`]: a real cluster of real processes, and ways to hurt it.
//! - [`mod@reference`]: the same model run in this process, without a cluster, to compare with.
//! - [`speech`]: the recorded speech that the voice-activity model is fed with.
//! - [`speaker`]: streams it through a cluster as a live microphone would, and writes down what came back and when.
//! - [`tally`]: counts what was lost, repeated, out of order or wrong, and how long the pauses were.
//!
//! Nothing here fakes a part of Cresset: what is tested is what is shipped.
#![forbid(unsafe_code)]

pub mod bench;
pub mod harness;
pub mod reference;
pub mod speaker;
pub mod speech;
pub mod tally;
