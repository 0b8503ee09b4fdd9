//! What planning costs in a large cluster: 1,000 workers and 10,000 models.
use std::time::Instant;

use super::*;
use crate::{
    command::{DeploySet, Registration},
    testkit::{mark_dead, ready, registered, registration, run, spec, w},
};

const WORKERS: usize = 1_000;
const MODELS: usize = 10_000;

/// Workers in three zones, and models of one and two replicas by turns that nobody was given yet. The models are more than may be
/// deployed as yet, so they are put there.
fn large() -> ClusterState {
    let mut state = registered(&[]);
    for number in 0..WORKERS {
        let zone = format!("z{}", number % 3);
        let worker = Registration { zone, ..registration(&format!("w{number:03}"), 1) };
        run(&mut state, CommandBody::RegisterWorker(worker));
    }
    let mut small = state.clone();
    run(&mut small, CommandBody::DeploySet(DeploySet::from(&spec("m", 1, 1))));
    let like = small.models.values().next().unwrap().clone();
    for number in 0..MODELS {
        let key = ModelKey { name: format!("model-{number:05}"), version: 1 };
        let (generation, replicas_wanted) = (number as u64 + 1, 1 + number as u32 % 2);
        state.models.insert(key, Deployment { generation, replicas_wanted, ..like.clone() });
    }
    state
}

fn planned(state: &ClusterState) -> (Plan, u64) {
    let (policy, seen) = (Policy::default(), Seen::default());
    Planner::new(state, &policy, &seen).plan()
}

/// Carries out plans until there is nothing to plan, and then has all replicas ready.
fn carry_out(state: &mut ClusterState) {
    loop {
        let (mut plan, _) = planned(state);
        if plan.is_empty() {
            break;
        }
        plan.truncate(1_000);
        run(state, plan.into_command());
    }
    let ids: Vec<WorkerId> = state.workers.keys().cloned().collect();
    ids.iter().for_each(|id| drop(ready(state, id.as_str())));
}

#[test]
fn a_search_ends_at_the_first_worker_that_will_do() {
    let mut state = large();
    let (first, looked_at) = planned(&state);
    assert_eq!((first.add.len(), first.unplaced.len()), (MODELS * 3 / 2, 0));
    assert!(looked_at < 4 * first.add.len() as u64, "{looked_at} workers were looked at");
    carry_out(&mut state);
    let (rest, looked_at) = planned(&state);
    assert!(rest.is_empty() && looked_at == 0);
    let held = state.replicas_on(&w("w500")).count();
    assert_eq!(held, MODELS * 3 / 2 / WORKERS);
    mark_dead(&mut state, "w500", 1);
    let (plan, looked_at) = planned(&state);
    assert_eq!(plan.add.len(), held);
    assert!(looked_at < 16 * held as u64, "{looked_at} workers were looked at");
}

/// For people: `cargo test --release -p cresset-core --lib scale -- --ignored --nocapture`.
#[test]
#[ignore = "says how long it takes and asserts nothing"]
fn how_long_it_takes() {
    let mut state = large();
    let timed = |what: &str, mut work: Box<dyn FnMut() + '_>| {
        let mut took_us: Vec<u128> = (0..5)
            .map(|_| {
                let begun = Instant::now();
                work();
                begun.elapsed().as_micros()
            })
            .collect();
        took_us.sort_unstable();
        eprintln!("{what}: median {} us of {took_us:?}", took_us[2]);
    };
    timed("a plan from nothing", Box::new(|| drop(planned(&state))));
    let begun = Instant::now();
    carry_out(&mut state);
    eprintln!("carrying it out, with all reports: {} ms", begun.elapsed().as_millis());
    timed("a plan of nothing", Box::new(|| drop(planned(&state))));
    let begun = Instant::now();
    (0..100).for_each(|number| drop(ready(&mut state, &format!("w{number:03}"))));
    eprintln!("a report: {} us", begun.elapsed().as_micros() / 100);
    let begun = Instant::now();
    mark_dead(&mut state, "w500", 1);
    eprintln!("a death: {} us", begun.elapsed().as_micros());
    timed("a plan after a death", Box::new(|| drop(planned(&state))));
    let (plan, _) = planned(&state);
    let begun = Instant::now();
    run(&mut state, plan.into_command());
    eprintln!("what it says, applied: {} us", begun.elapsed().as_micros());
    timed("routes", Box::new(|| drop(crate::routes::routes(&state))));
}
