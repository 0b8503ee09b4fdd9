//! What planning costs in a large cluster: 1,000 workers and 10,000 models.
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
