//! Cresset's control plane as pure functions.
//!
//! The coordinators agree on a list of commands; this crate says what each command does to the cluster's state, and
//! what should be proposed next. Everything here is a function of its arguments: there is no tokio, no clock, no
//! randomness, no IO and no order that depends on a hash. Time comes in as a value, effects go out as values, so that
//! every peer reaches the same state and every test replays exactly.
//!
//! - [`state`]: what the cluster knows. Changed by [`apply`](mod@apply) only.
//! - [`command`]: what may be proposed, and how it was answered.
//! - [`apply`](mod@apply): the only mutator.
//! - [`snapshot`]: the state as bytes.
//! - [`members`]: who the coordinators are that agree.
//! - [`level`]: what all of them are known to understand.
//! - [`placement`]: which moves would bring the replicas closer to what is wanted.
//! - [`demands`]: what a deployment demands of the workers that run it.
//! - [`claim`]: what it may claim of memory that isn't enough for all.
//! - [`liveness`]: who should be judged dead.
//! - [`standing`]: what a worker is, in one word.
//! - [`routes`]: what routers and workers are told.
//! - [`status`]: what people are told about models.
//! - [`wire`]: the same views as messages of `cresset.fleet.v1`.
#![forbid(unsafe_code)]

pub mod apply;
pub mod changes;
pub mod claim;
mod codec;
pub mod command;
pub mod demands;
pub mod level;
pub mod liveness;
pub mod members;
pub mod opinions;
pub mod placement;
pub mod routes;
pub mod snapshot;
pub mod standing;
pub mod state;
pub mod status;
#[cfg(test)]
mod testkit;
pub mod wire;

pub use apply::{Effect, apply};
pub use codec::DecodeError;
pub use command::{Command, CommandBody, CommandId, Outcome, Reject};
pub use cresset_proto::ids::{PeerId, WorkerId};
pub use state::ClusterState;
