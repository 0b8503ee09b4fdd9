//! `make bench`: what Cresset costs, each figure beside its reference, in one run on one machine.
//!
//! | room | its job |
//! | --- | --- |
//! | [`models`] | the models that are measured |
//! | [`stage`] | models, clusters and times that all parts share |
//! | [`inprocess`] | the reference: libtorch in a process of its own |
//! | [`bare`] | the reference for a call: tonic without Cresset |
//! | [`generator`] | the load: `cresset bench` |
//! | [`routing`], [`overhead`], [`throughput`], [`tail`], [`overload`], [`survival`], [`memory`] | the parts |
//! | [`figures`], [`results`], [`plot`] | middles and spreads, the table and the JSON, the plot |
//! | [`usage`] | what a process used, as the kernel counts it |
//! | [`quorum`] | `make bench-quorum`: three coordinators beside three members of etcd |
//! | [`scale`] | `make bench-scale`: what a large fleet costs the coordinators |
//!
//! A figure and its reference are measured in turns, so that what else the machine does meets both.

pub mod bare;
pub mod figures;
pub mod generator;
pub mod inprocess;
pub mod memory;
pub mod models;
pub mod overhead;
pub mod overload;
pub mod plot;
pub mod quorum;
pub mod results;
pub mod routing;
pub mod scale;
pub mod stage;
pub mod survival;
mod table;
pub mod tail;
pub mod throughput;
pub mod usage;
