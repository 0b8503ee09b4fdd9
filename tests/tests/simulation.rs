//! The control plane in virtual time: [`cresset_tests::simulation`].
use cresset_tests::simulation::{Mutant, Profile, Scenario, campaign, run};

/// Seeds of 75 virtual seconds, the profiles in turn.
const SEEDS: u64 = 600;

#[test]
fn nothing_is_wrong_whatever_goes_wrong() {
    let found = campaign::healthy(0, SEEDS);
    println!("{:.1} virtual hours, {} operations, {} crashes", found.simulated_hours(), found.answered, found.crashes);
    let first = found.violations.first().map(|(seed, violation)| format!("seed {seed} ({:?}): {violation}", Profile::of(*seed)));
    assert_eq!(
        first,
        None,
        "{} of {SEEDS} seeds found something; run target/release/cresset-simulate --seed N",
        found.violations.len()
    );
    // A simulation in which nothing happens finds nothing either.
    assert_eq!(found.seeds, SEEDS);
    assert!(found.answered > SEEDS * 300, "clients had only {} answers", found.answered);
    assert!(found.crashes > SEEDS * 10, "only {} lives ended", found.crashes);
    assert!(found.member_changes > SEEDS, "only {} changes of the members", found.member_changes);
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in 0..Profile::ALL.len() as u64 {
        let first = run(Scenario::new(seed));
        assert_eq!(run(Scenario::new(seed)), first, "seed {seed}");
        assert_ne!(run(Scenario::new(seed + Profile::ALL.len() as u64)).hash, first.hash, "the seed decides nothing");
    }
}

#[test]
fn planted_bugs_are_found() {
    for mutant in Mutant::ALL {
        let found = campaign::until_found(mutant, 0, 1_000);
        assert!(!found.violations.is_empty(), "{mutant:?} was not found in {} seeds", found.seeds);
    }
}
