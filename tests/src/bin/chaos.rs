//! `make chaos`: a cluster under load, hurt in every way that one machine allows; every response is checked.
#![forbid(unsafe_code)]

use std::{os::unix::process::CommandExt, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use cresset_tests::chaos::{self, NOT_YET, Settings, faults::Fault, network};
use tokio::signal::unix::{SignalKind, signal};

/// Hurts a cluster under load in every way that one machine allows and checks every response; ends with 1 if anything was
/// wrong, or if the load wasn't reached.
#[derive(Parser)]
#[command(name = "cresset-chaos", version)]
struct Args {
    /// About how long, in seconds
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(10..=86_400))]
    seconds: u64,
    /// Decides which faults come; drawn and printed unless given
    #[arg(long)]
    seed: Option<u64>,
    /// Only these faults
    #[arg(long, value_delimiter = ',', value_parser = fault)]
    only: Vec<Fault>,
    /// No faults whose promise isn't kept yet
    #[arg(long)]
    everyday: bool,
    /// Streams at once
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    streams: u32,
    /// Single calls a second
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(3..=10_000))]
    rate: u32,
    /// Use the loopback interface even where namespaces are allowed
    #[arg(long)]
    loopback: bool,
    /// This process is already in namespaces of its own
    #[arg(long, hide = true)]
    apart: bool,
}

fn fault(name: &str) -> Result<Fault, String> {
    let names = || Fault::ALL.map(Fault::name).join(", ");
    Fault::of(name).ok_or_else(|| format!("no such fault; there are {}", names()))
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cresset-chaos: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<bool> {
    if !args.apart && !args.loopback {
        match network::apart() {
            Some(prefix) => return Err(again(&prefix)),
            None => {
                eprintln!("namespaces aren't allowed here: everything runs on the loopback interface, without network faults")
            }
        }
    }
    let mut allowed = if args.only.is_empty() { Fault::ALL.to_vec() } else { args.only.clone() };
    let mut left_out = Vec::new();
    if args.everyday {
        allowed.retain(|fault| !NOT_YET.iter().any(|(not_yet, _)| not_yet == fault));
        left_out.extend(NOT_YET.iter().map(|(fault, why)| (*fault, (*why).to_owned())));
    }
    let settings = Settings {
        seed: args.seed.unwrap_or_else(|| u64::from(rand::random::<u32>())),
        seconds: args.seconds,
        allowed,
        left_out,
        streams: args.streams as usize,
        rate: args.rate,
        is_apart: args.apart,
    };
    // Processes live as long as the thread that started them, so faults are done from this one.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let report = runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            report = chaos::run(settings) => report,
            _ = terminate.recv() => anyhow::bail!("stopped by SIGTERM"),
            _ = interrupt.recv() => anyhow::bail!("stopped by Ctrl-C"),
        }
    })?;
    print!("{}", report.text());
    println!("{}", report.json());
    Ok(report.is_good())
}

/// Becomes the same program in namespaces of its own. Comes back only with an error.
fn again(prefix: &[std::ffi::OsString]) -> anyhow::Error {
    let this = match std::env::current_exe().context("who am I?") {
        Ok(this) => this,
        Err(error) => return error,
    };
    let mut command = std::process::Command::new(&prefix[0]);
    command.args(&prefix[1..]).arg(this).args(std::env::args_os().skip(1)).arg("--apart");
    anyhow::Error::from(command.exec()).context("can't start again in namespaces")
}
