//! `make bench`: measures routing alone, and a local cluster beside libtorch in process, and writes down the figures as a table, as JSON and as
//! a plot.
#![forbid(unsafe_code)]

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::Context;
use clap::{Parser, Subcommand, ValueEnum};
use cresset_tests::{
    bench::{
        inprocess::{self, ReferenceArgs},
        memory, overhead, overload, plot,
        results::{Machine, Results},
        routing,
        stage::{Pace, Stage},
        survival, tail, throughput,
    },
    harness::binaries::root,
};

/// Measures routing, overhead, throughput, tail latency, overload, survival of streams and memory of a local cluster, each beside libtorch in process.
#[derive(Parser)]
#[command(name = "cresset-bench", version, args_conflicts_with_subcommands = true)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', value_name = "PART,…")]
    only: Vec<Chosen>,
    /// What models run on, with and without Cresset
    #[arg(long, value_enum, default_value_t = OnDevice::Cpu)]
    device: OnDevice,
    /// One short round: to see that it works
    #[arg(long, conflicts_with_all = ["deep", "rounds"])]
    quick: bool,
    /// Memory over 10 million requests and 100,000 streams
    #[arg(long)]
    deep: bool,
    /// How often everything is measured [default: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: Option<u8>,
    /// Where results.json and results.svg go [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Command {
    /// Run models for the bench itself
    #[command(hide = true)]
    Reference(ReferenceArgs),
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnDevice {
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Chosen {
    Routing,
    Overhead,
    Throughput,
    Tail,
    Overload,
    Survival,
    Memory,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let done = match &args.command {
        Some(Command::Reference(reference)) => inprocess::serve(reference),
        None => bench(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cresset-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench(args: &Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    let say = |what: &str| eprintln!("cresset-bench: {:>4.0} s  {what}", begun.elapsed().as_secs_f64());
    let wants = |part| args.only.is_empty() || args.only.contains(&part);
    let mut pace = if args.quick { Pace::QUICK } else { Pace::USUAL };
    pace.rounds = args.rounds.map_or(pace.rounds, usize::from);
    let pace = if args.deep { pace.deep() } else { pace };
    let out = args.out.clone().unwrap_or_else(|| root().join("target/bench"));
    fs::create_dir_all(&out).with_context(|| format!("can't make {}", out.display()))?;

    say("making the models");
    let stage = Stage::set(pace, args.device == OnDevice::Cuda)?;
    stage.end_with_signals()?;
    let machine = Machine::ask(stage.cores);
    let mut results = Results {
        machine,
        rounds: pace.rounds,
        routing: None,
        overhead: None,
        throughput: None,
        tail: None,
        overload: None,
        survival: None,
        memory: None,
    };
    if wants(Chosen::Routing) {
        say("routing");
        results.routing = Some(routing::measure(pace.rounds, pace.time / 2)?);
    }
    if wants(Chosen::Survival) {
        say("survival");
        results.survival = Some(survival::measure(pace)?);
    }
    let mut tuning = None;
    if wants(Chosen::Throughput) {
        say("searching the best batch and threads of libtorch in process");
        tuning = Some(throughput::tune(&stage)?);
    }
    if wants(Chosen::Memory) {
        say("memory");
        results.memory = Some(memory::measure(&stage)?);
    }
    if wants(Chosen::Overhead) || wants(Chosen::Throughput) || wants(Chosen::Tail) || wants(Chosen::Overload) {
        say("starting a cluster");
        let cluster = stage.cluster()?;
        if wants(Chosen::Overhead) {
            say("overhead");
            results.overhead = Some(overhead::measure(&stage, &cluster)?);
        }
        if let Some(tuning) = &tuning {
            say("throughput");
            results.throughput = Some(throughput::measure(&stage, &cluster, tuning)?);
        }
        if wants(Chosen::Tail) {
            say("tail");
            results.tail = Some(tail::measure(&stage, &cluster)?);
        }
        if wants(Chosen::Overload) {
            say("overload");
            results.overload = Some(overload::measure(&stage, &cluster)?);
        }
    }
    let json = out.join("results.json");
    let svg = out.join("results.svg");
    fs::write(&json, serde_json::to_string_pretty(&results.to_json())?)
        .with_context(|| format!("can't write {}", json.display()))?;
    plot::draw(&results, &svg)?;
    println!("{}", results.table());
    say(&format!("{} and {}", json.display(), svg.display()));
    Ok(())
}
