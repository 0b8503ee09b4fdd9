//! Tests of whole clusters, and of the house itself. Each test has a cluster of its own, on ports of its own.
#![forbid(unsafe_code)]

mod bad_models;
mod bench;
mod beside;
mod commands;
mod conformance;
mod damage;
mod datapath;
mod decoupled;
mod drain;
mod failover;
mod gpu;
mod health;
mod house;
mod in_process;
mod lifecycle;
mod linearizability;
mod members;
mod oracle;
mod outage;
mod recovery;
mod resume;
mod settings;
mod simulation;
mod slow_readers;
mod support;
mod telemetry;
mod versions;
mod watch;
mod wiring;
