//! Coordinators over their real wiring, in virtual time: the shipped driver, transport, peer service and handle, with tonic and
//! hyper below them, on the hosts and in the network of [`turmoil`], whose one seed decides everything.
//!
//! What [`cresset_tests::simulation`] leaves out is here: streams that break and come back, connections that stall, snapshots in
//! chunks, proposals and reads that one coordinator sends on to another. What that has and this hasn't: workers, members that
//! change, clocks that jump.
mod coordinator;
mod faults;
mod network;
mod witness;

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    panic::{AssertUnwindSafe, catch_unwind},
    rc::Rc,
};

use cresset_tests::simulation::{Mutant, disk::Disk};
use rand::{SeedableRng, rngs::StdRng};

use self::{
    coordinator::{Shelf, name},
    faults::Faults,
    witness::{END, Witness},
};

/// The coordinators.
const IDS: RangeInclusive<u64> = 1..=3;
/// Seeds of 60 virtual seconds, unless `CRESSET_WIRING_SEEDS` says otherwise.
const SEEDS: u64 = 36;

/// A bug that is put in to see whether it is found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    /// A coordinator answers reads from what it has, without asking who leads.
    ReadWithoutAsking,
    /// A disk that says that it has what it hasn't.
    DiskThatLies,
}

/// What a run came to.
#[derive(Debug, PartialEq, Eq)]
struct Report {
    violation: Option<String>,
    /// Of everything that happened, in order.
    hash: u64,
    answered: u64,
    leaders: u64,
    crashes: u64,
    cuts: u64,
    disks_failed: u64,
    snapshots: u64,
    handed_over: u64,
}

fn run(seed: u64, planted: Option<Planted>) -> Report {
    let mutant = (planted == Some(Planted::DiskThatLies)).then_some(Mutant::SendBeforeFsync);
    let shelf = |id| (id, Rc::new(Shelf { disk: Disk::new(mutant).into(), life: 0.into(), snapshots: 0.into() }));
    let shelves: BTreeMap<u64, Rc<Shelf>> = IDS.map(shelf).collect();
    let witness = Rc::new(Witness::default());
    let mut sim = faults::calm(seed).build();
    for (&id, shelf) in &shelves {
        let (shelf, witness) = (Rc::clone(shelf), Rc::clone(&witness));
        sim.host(name(id), move || coordinator::run(seed, id, Rc::clone(&shelf), Rc::clone(&witness), planted));
    }
    let mut faults = Faults::new(StdRng::seed_from_u64(seed), shelves.clone(), seed.is_multiple_of(2));
    while sim.elapsed() < END && witness.violation().is_none() {
        faults.turn(&mut sim);
        // A panic is a finding like any other.
        match catch_unwind(AssertUnwindSafe(|| sim.step())) {
            Ok(Ok(_)) => witness.look(),
            Ok(Err(error)) => witness.fail(format!("a host failed: {error}")),
            Err(_) => witness.fail("a host panicked".to_owned()),
        }
    }
    if witness.violation().is_none() {
        witness.close();
    }
    Report {
        violation: witness.violation(),
        hash: witness.hash(),
        answered: witness.answered.get(),
        leaders: witness.leaders(),
        crashes: faults.crashes,
        cuts: faults.cuts,
        disks_failed: witness.disks_failed.get(),
        handed_over: witness.handed_over.get(),
        snapshots: shelves.values().map(|shelf| shelf.snapshots.get()).sum(),
    }
}

fn setting(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |set| set.parse().unwrap_or_else(|_| panic!("{name} is '{set}', it must be a number")))
}

#[test]
fn coordinators_agree_over_their_real_wiring() {
    let (first, seeds) = (setting("CRESSET_WIRING_FIRST_SEED", 0), setting("CRESSET_WIRING_SEEDS", SEEDS));
    let began = std::time::Instant::now();
    let mut sums = [0; 7];
    for seed in first..first + seeds {
        let Report { violation, answered, leaders, crashes, cuts, disks_failed, snapshots, handed_over, .. } = run(seed, None);
        assert_eq!(violation, None, "seed {seed}; CRESSET_WIRING_FIRST_SEED={seed} CRESSET_WIRING_SEEDS=1 has it again");
        for (sum, more) in sums.iter_mut().zip([answered, leaders, crashes, cuts, disks_failed, snapshots, handed_over]) {
            *sum += more;
        }
    }
    let [answered, leaders, crashes, cuts, disks_failed, snapshots, handed_over] = sums;
    println!(
        "{seeds} seeds, {} virtual s in {:.0} s: {answered} operations, {leaders} leaders, {crashes} crashes, {cuts} cuts, {disks_failed} failed disks, {snapshots} snapshots sent, {handed_over} times handed over",
        seeds * END.as_secs(),
        began.elapsed().as_secs_f64()
    );
    // A run in which nothing happens finds nothing either.
    assert!(answered > seeds * 400, "clients had only {answered} answers");
    assert!(
        seeds < SEEDS || [leaders, crashes, cuts, disks_failed, snapshots, handed_over].iter().all(|count| *count > seeds),
        "{sums:?}"
    );
}

#[test]
fn a_seed_is_the_same_run_over_the_wiring_too() {
    let reports: Vec<Report> = (0..4).map(|seed| run(seed, None)).collect();
    for (seed, report) in (0..).zip(&reports) {
        assert_eq!(&run(seed, None), report, "seed {seed}");
    }
    assert_ne!(reports[0].hash, reports[2].hash, "the seed decides nothing");
}

#[test]
fn what_is_planted_in_the_wiring_is_found() {
    for planted in [Planted::ReadWithoutAsking, Planted::DiskThatLies] {
        let found = (0..40).find_map(|seed| run(seed, Some(planted)).violation.map(|violation| (seed, violation)));
        println!("{planted:?}: {found:?}");
        assert!(found.is_some(), "{planted:?} wasn't found");
    }
}
