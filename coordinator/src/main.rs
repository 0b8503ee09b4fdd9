//! The coordinator's process: settings in, [`cresset_coordinator::run`], exit code out.
#![forbid(unsafe_code)]
use std::process::ExitCode;

use anyhow::Context;
use cresset_coordinator::{
    Listeners,
    config::{Config, PROGRAM},
    run,
};
use cresset_runtime::{
    server::listen,
    settings::{Invocation, Settings},
    shutdown, telemetry,
};

fn main() -> ExitCode {
    let (settings, check) = match PROGRAM.invoke() {
        Invocation::Exit { text, code } => {
            if code == 0 {
                print!("{text}")
            } else {
                eprint!("{text}")
            }
            return ExitCode::from(code);
        }
        Invocation::Run(settings) => (settings, false),
        Invocation::Check(settings) => (settings, true),
    };
    match (read(settings), check) {
        (None, _) => ExitCode::from(2),
        (Some(_), true) => {
            println!("the configuration is right");
            ExitCode::SUCCESS
        }
        (Some(config), false) => match serve(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("cresset-coordinator: {error:#}");
                ExitCode::FAILURE
            }
        },
    }
}

fn read(settings: Settings) -> Option<Config> {
    Config::read(settings).map_err(|problems| eprintln!("{problems}")).ok()
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
