//! `make simulate` and `make simulate-mutants`: the control plane in virtual time, for as many seeds as are wanted.
#![forbid(unsafe_code)]

use clap::Parser;
use cresset_tests::simulation::{Mutant, Profile, Scenario, campaign, run};
use serde_json::{Map, json};

/// Seeds that each planted bug must be found within.
const SEEDS_TO_FIND_MAX: u64 = 1_000;

/// Runs the control plane in virtual time under every fault that a seed can think of; ends with 1 if anything was wrong.
#[derive(Parser)]
#[command(name = "cresset-simulate", version)]
struct Args {
    /// How many seeds, of 75 virtual seconds each
    #[arg(long, default_value_t = 600)]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Plant bugs instead, one after the other, and count the seeds until each is found
    #[arg(long)]
    mutants: bool,
    /// Run this seed alone and tell what happened in it
    #[arg(long, conflicts_with_all = ["seeds", "first_seed", "mutants"])]
    seed: Option<u64>,
}

fn main() -> std::process::ExitCode {
    let args = Args::parse();
    let good = match args.seed {
        Some(seed) => replay(seed),
        None if args.mutants => mutants(args.first_seed),
        None => healthy(args.first_seed, args.seeds),
    };
    if good { std::process::ExitCode::SUCCESS } else { std::process::ExitCode::FAILURE }
}

fn healthy(first: u64, count: u64) -> bool {
    let found = campaign::healthy(first, count);
    println!(
        "{} seeds, {:.1} virtual hours, {} operations answered, {} crashes, {} changes of the members, in {:.1} s",
        found.seeds,
        found.simulated_hours(),
        found.answered,
        found.crashes,
        found.member_changes,
        found.took.as_secs_f64()
    );
    for (seed, violation) in &found.violations {
        println!("seed {seed} ({:?}): {violation}; again with --seed {seed}", Profile::of(*seed));
    }
    let summary = json!({
        "seeds": found.seeds,
        "simulated_hours": found.simulated_hours(),
        "hours_per_minute": found.hours_per_core_minute(),
        "violations": found.violations.len(),
    });
    println!("{summary}");
    found.violations.is_empty()
}

fn mutants(first: u64) -> bool {
    std::panic::set_hook(Box::new(|_| {})); // a planted bug may make the raft library panic, which is how it is found
    let mut seeds_to_find = Map::new();
    for mutant in Mutant::ALL {
        let found = campaign::until_found(mutant, first, SEEDS_TO_FIND_MAX);
        let name = format!("{mutant:?}");
        match found.violations.first() {
            Some((seed, violation)) => {
                println!("{name}: seed {seed} ({:?}): {violation}", Profile::of(*seed));
                seeds_to_find.insert(name, json!(seed - first + 1));
            }
            None => println!("{name}: not found in {SEEDS_TO_FIND_MAX} seeds"),
        }
    }
    let (planted, found) = (Mutant::ALL.len(), seeds_to_find.len());
    println!("{}", json!({ "planted": planted, "found": found, "seeds_to_find": seeds_to_find }));
    planted == found
}

fn replay(seed: u64) -> bool {
    let scenario = Scenario::new(seed);
    let report = run(scenario);
    println!("seed {seed} ({:?}): {report:#?}", scenario.profile);
    report.violation.is_none()
}
