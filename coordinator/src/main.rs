//! The coordinator's process: settings in, [`cresset_coordinator::run`], exit code out.
#![forbid(unsafe_code)]
use std::process::ExitCode;

use anyhow::Context;
use cresset_coordinator::{
    Listeners,
    config::{Config, PROGRAM},
    run,
};
use cresset_runtime::{process, server::listen, shutdown, telemetry};

fn main() -> ExitCode {
    process::run(&PROGRAM, Config::read, serve)
}

#[tokio::main]
async fn serve(config: Config) -> anyhow::Result<()> {
    let _telemetry = telemetry::start("cresset-coordinator", &config.id.to_string(), &config.log)?;
    if let Some(parent) = config.exit_with_parent {
        shutdown::with_parent(parent)?;
    }
    let stop = shutdown::on_signal()?;
    let listeners = Listeners {
        grpc: listen(&config.grpc).await.context("the setting 'grpc'")?,
        http: listen(&config.http).await.context("the setting 'http'")?,
        peer: listen(&config.peer).await.context("the setting 'peer'")?,
    };
    Ok(run(config, listeners, stop).await?)
}
