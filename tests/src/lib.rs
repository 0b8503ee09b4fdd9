//! What tests, the demo and later measurements share.
//!
//! - [`mod@bench`]: the parts of `make bench`.
//! - [`mod@chaos`]: a cluster under load that is hurt in every way one machine allows; `make chaos`.
//! - [`harness`]: a real cluster of real processes, and ways to hurt it.
//! - [`linearizability`]: judges what concurrent clients saw of a register.
//! - [`mod@reference`]: the same model run in this process, without a cluster, to compare with.
//! - [`simulation`]: the control plane in virtual time, hurt in every way that a seed can think of.
//! - [`speech`]: the recorded speech that the voice-activity model is fed with.
//! - [`speaker`]: streams it through a cluster as a live microphone would, and writes down what came back and when.
//! - [`tally`]: counts what was lost, repeated, out of order or wrong, and how long the pauses were.
//!
//! What is tested is what is shipped. Only [`simulation`] imitates what is around it: disks, networks and clocks.
#![forbid(unsafe_code)]

pub mod bench;
pub mod chaos;
pub mod harness;
pub mod linearizability;
pub mod reference;
pub mod simulation;
pub mod speaker;
pub mod speech;
pub mod tally;
