//! The worker's process: settings in, [`cresset_worker::run`], exit code out.
#![forbid(unsafe_code)]
use std::process::ExitCode;

use anyhow::Context;
use cresset_runtime::{process, server::listen, shutdown, telemetry};
use cresset_worker::{
    Ended, Listeners,
    config::{Config, PROGRAM},
    run,
};

fn main() -> ExitCode {
    process::run(&PROGRAM, Config::read, serve)
}

/// By default the threads of OpenMP, with which libtorch computes on a CPU, wait for one another by spinning, which takes the
/// cores away from the threads that read requests and write answers: on two cores that was half of all CPU time under load with
/// a small model. To sleep costs large models nothing that could be measured.
const SLEEP_RATHER_THAN_SPIN: (&str, &str) = ("OMP_WAIT_POLICY", "PASSIVE");

fn serve(config: Config) -> anyhow::Result<()> {
    let (name, value) = SLEEP_RATHER_THAN_SPIN;
    if std::env::var_os("GOMP_SPINCOUNT").is_none() {
        process::with_variable(name, value).with_context(|| format!("can't start again with {name}={value}"))?;
    }
    serve_async(config)
}

#[tokio::main]
async fn serve_async(config: Config) -> anyhow::Result<()> {
    let _telemetry = telemetry::start("cresset-worker", config.id.as_str(), &config.log)?;
    if let Some(parent) = config.exit_with_parent {
        shutdown::with_parent(parent)?;
    }
    let stop = shutdown::on_signal()?;
    let listeners = Listeners {
        grpc: listen(&config.grpc).await.context("the setting 'grpc'")?,
        http: listen(&config.http).await.context("the setting 'http'")?,
    };
    let ended = run(config, listeners, stop).await?;
    if ended == Ended::GivenUp {
        tracing::warn!("starting again: a thread of this process is held by a call that doesn't return, or its device is lost");
        return Err(process::start_again()).context("can't start again");
    }
    Ok(())
}
