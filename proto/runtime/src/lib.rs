//! What every Cresset process needs, and nothing that knows a noun of Cresset.
//!
//! - [`settings`]: configuration from a file, the environment and flags, with all problems reported at once.
//! - [`telemetry`]: logs, traces (OTLP) and trace context in and out of gRPC. The only place that sets them up.
//! - [`process`]: from settings to an exit code.
//! - [`metrics`]: the process's registry.
//! - [`server`]: the gRPC and HTTP shells: health, reflection, limits, drain.
//! - [`shutdown`]: signals, the token tree, and dying with a parent.
#![forbid(unsafe_code)]

pub mod metrics;
pub mod process;
pub mod server;
pub mod settings;
pub mod shutdown;
pub mod telemetry;
