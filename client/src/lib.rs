//! Cresset's router: it chooses a replica for each request, and moves work to another when a node dies.
//!
//! The router runs inside every coordinator, behind the public gRPC service, and inside the Rust client. A table of routes
//! goes in ([`routes`]), predictions come out ([`predict`]), and no coordinator needs to be alive in between.
//!
//! - [`balance`], [`latency`], [`ejection`], [`retry`], [`journal`], [`kept`] decide, and are pure: no tokio, clock, randomness or IO.
//! - [`routes`] is the table, [`coordinators`] keeps it fresh from any coordinator that answers, [`workers`] holds the
//!   connections.
//! - [`predict`] is the router itself: unary calls, sequences and streams with failover.
//! - [`resume`] is a stream by way of coordinators, for programs that can't reach workers.
//! - [`CressetClient`] puts them together for a Rust program.
//!
//! - [`repository`] reads a model repository's folder; it is here because coordinators and workers both need it.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use cresset_client::CressetClient;
//! use cresset_proto::inference::ModelInferRequest;
//!
//! let client = CressetClient::connect(["127.0.0.1:8001"]).await?;
//! let mut speech = client.sequence("silero_vad");
//! let answer = speech.send(ModelInferRequest::default()).await?; // with the chunk's tensor in it
//! println!("{:?}", answer.await?.raw_output_contents);
//! # Ok(())
//! # }
//! ```
//!
//! What the router doesn't do: it never looks into a tensor, and it never asks a coordinator on a request's way.
#![forbid(unsafe_code)]

pub mod backup;
pub mod balance;
mod client;
mod coalesce;
pub mod coordinators;
pub mod ejection;
#[cfg(test)]
mod fake;
pub mod journal;
pub mod kept;
pub mod latency;
pub mod predict;
pub mod repository;
pub mod resume;
pub mod retry;
pub mod routes;
mod settings;
pub mod workers;

pub use client::{ConnectError, CressetClient, SequenceAnswer, SequenceHandle};
pub use coordinators::{CallError, Coordinators, Tried};
pub use predict::{CallOptions, Router, SequenceFigures};
pub use resume::ResumeSettings;
pub use routes::{LookupError, ModelRoute, Replica, RouteTable, Version};
pub use settings::RouterSettings;
pub use workers::ConnectionSettings;
