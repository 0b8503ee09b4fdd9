//! `make bench-quorum`: three coordinators beside three members of etcd, as a table, as JSON, and in `quorum.json`.
#![forbid(unsafe_code)]

use std::{fs, path::PathBuf, process::ExitCode, time::Instant};

use anyhow::Context;
use clap::Parser;
use cresset_tests::{
    bench::quorum::{self, Pace},
    harness::binaries::root,
};

/// Measures how fast three coordinators agree, and how long they are without a leader when theirs is killed, beside three members of
/// etcd.
#[derive(Parser)]
#[command(name = "cresset-bench-quorum", version)]
struct Args {
    /// One short round: to see that it works
    #[arg(long, conflicts_with_all = ["rounds", "kills"])]
    quick: bool,
    /// How often each rate is measured [default: 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=100))]
    rounds: Option<u8>,
    /// How often each leader is killed [default: 50]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1_000))]
    kills: Option<u16>,
    /// Where quorum.json goes, and where both write their logs meanwhile [default: target/bench]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
}

// One thread: what it starts dies with the thread that started it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    match bench(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cresset-bench-quorum: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn bench(args: &Args) -> anyhow::Result<()> {
    let begun = Instant::now();
    let say = |what: &str| eprintln!("cresset-bench-quorum: {:>4.0} s  {what}", begun.elapsed().as_secs_f64());
    let mut pace = if args.quick { Pace::QUICK } else { Pace::USUAL };
    pace.rounds = args.rounds.map_or(pace.rounds, usize::from);
    pace.kills = args.kills.map_or(pace.kills, usize::from);
    let out = args.out.clone().unwrap_or_else(|| root().join("target/bench"));
    fs::create_dir_all(&out).with_context(|| format!("can't make {}", out.display()))?;
    let report = quorum::measure(pace, &out, say).await?;
    let path = out.join("quorum.json");
    let json = report.to_json();
    fs::write(&path, serde_json::to_string_pretty(&json)?).with_context(|| format!("can't write {}", path.display()))?;
    say(&format!("{}", path.display()));
    println!("{}\n{json}", report.table());
    Ok(())
}
