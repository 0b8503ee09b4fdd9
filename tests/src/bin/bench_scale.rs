//! `make bench-scale`: what a large fleet costs three coordinators, as a table, as JSON and as a plot.
#![forbid(unsafe_code)]

use std::{fs, path::PathBuf, process::ExitCode, time::Duration, time::Instant};

use anyhow::Context;
use clap::Parser;
use cresset_tests::{
    bench::scale::{self, Pace},
    harness::binaries::root,
};

/// Measures what fleets of up to a thousand workers with ten models each cost three coordinators, and how fast they act for them.
#[derive(Parser)]
#[command(name = "cresset-bench-scale", version)]
struct Args {
    /// Small fleets: to see that it works
    #[arg(long, conflicts_with_all = ["workers", "seconds"])]
    quick: bool,
    /// Sizes of the fleet [default: 10,100,300,1000]
    #[arg(long, value_delimiter = ',', value_name = "N,…", value_parser = clap::value_parser!(u16).range(2..=1_000))]
    workers: Vec<u16>,
    /// How long the coordinators' CPU time in calm is watched [default: 20]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u16).range(1..=3_600))]
    seconds: Option<u16>,
    /// Where scale.json and scale.svg go, and where coordinators write their logs meanwhile [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

// One worker thread beside this one: the fleet mustn't take the cores from the coordinators. What this thread starts dies with it.
#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() -> ExitCode {
    match bench(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cresset-bench-scale: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(args: &Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    let say = |what: &str| eprintln!("cresset-bench-scale: {:>4.0} s  {what}", begun.elapsed().as_secs_f64());
    let mut pace = if args.quick { Pace::quick() } else { Pace::usual() };
    if !args.workers.is_empty() {
        pace.workers = args.workers.iter().copied().map(usize::from).collect();
    }
    pace.calm = args.seconds.map_or(pace.calm, |seconds| Duration::from_secs(seconds.into()));
    let out = args.out.clone().unwrap_or_else(|| root().join("target/bench"));
    fs::create_dir_all(&out).with_context(|| format!("can't make {}", out.display()))?;
    let (report, measured) = scale::measure(&pace, &out, say).await?;
    let (json, svg) = (out.join("scale.json"), out.join("scale.svg"));
    fs::write(&json, serde_json::to_string_pretty(&report.to_json())?)
        .with_context(|| format!("can't write {}", json.display()))?;
    report.draw(&svg)?;
    say(&format!("{} and {}", json.display(), svg.display()));
    println!("{}\n{}", report.table(), report.to_json());
    measured
}
