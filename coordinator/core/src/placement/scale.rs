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

/// What this thread has computed so far, where the system says so, so that a busy machine doesn't count.
fn computed_us(since: Instant) -> u128 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let told_ns = told.and_then(|text| text.split_whitespace().next()?.parse::<u128>().ok());
    told_ns.map_or_else(|| since.elapsed().as_micros(), |ns| ns / 1_000)
}

/// `cargo test --release -p cresset-core --lib how_long -- --nocapture` prints the figures. The two that are promised are held
/// here, in time that was computed and not waited for.
#[test]
fn how_long_it_takes() {
    let since = Instant::now();
    let timed = |what: &str, times: u128, work: &mut dyn FnMut()| {
        let before_us = computed_us(since);
        (0..times).for_each(|_| work());
        let us = (computed_us(since) - before_us) / times;
        eprintln!("{what}: {us} us");
        us
    };
    let mut state = large();
    let from_nothing_us = timed("a plan from nothing", 5, &mut || drop(planned(&state)));
    timed("carrying it out, with all reports", 1, &mut || carry_out(&mut state));
    timed("a plan of nothing", 5, &mut || drop(planned(&state)));
    let mut reports = (0..100).map(|number| format!("w{number:03}"));
    timed("a report", 100, &mut || drop(ready(&mut state, &reports.next().unwrap())));
    timed("a death", 1, &mut || drop(mark_dead(&mut state, "w500", 1)));
    let after_death_us = timed("a plan after a death", 5, &mut || drop(planned(&state)));
    let (plan, _) = planned(&state);
    timed("what it says, applied", 1, &mut || drop(run(&mut state, plan.clone().into_command())));
    run(&mut state, CommandBody::RegisterWorker(registration("w500", 2)));
    timed("a plan after a worker came", 5, &mut || drop(planned(&state)));
    timed("routes", 5, &mut || drop(crate::routes::routes(&state)));
    assert!(from_nothing_us <= 1_000_000, "a plan from nothing takes {from_nothing_us} us");
    assert!(after_death_us <= 100_000, "a plan after a death takes {after_death_us} us");
}
