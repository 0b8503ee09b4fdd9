use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    CommandBody,
    command::DeploySpec,
    testkit::{
        self, MIB, cluster, deploy, deployed, drain, fail, hosts, mark_dead, place, plan, ready, register, registered,
        registration, replica, run, spec, w,
    },
};

fn add_zone(state: &mut ClusterState, name: &str, zone: &str) {
    let registration = crate::command::Registration { zone: zone.into(), ..registration(name, 1) };
    run(state, CommandBody::RegisterWorker(registration));
}

#[test]
fn replicas_spread_over_zones_then_over_workers() {
    let mut state = registered(&[]);
    for (name, zone) in [("w1", "a"), ("w2", "a"), ("w3", "b")] {
        add_zone(&mut state, name, zone);
    }
    deploy(&mut state, "m", 1, 2);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w1", "w3"]);
    deploy(&mut state, "n", 1, 2);
    place(&mut state);
    assert_eq!(hosts(&state, "n"), ["w2", "w3"], "w2 had less to do than w1, and w3 is zone b");
}

#[test]
fn a_lost_worker_moves_only_what_it_held() {
    let mut state = registered(&["w1", "w2", "w3"]);
    for model in ["a", "b", "c"] {
        deploy(&mut state, model, 1, 2);
    }
    place(&mut state);
    let held: Vec<String> = state.replicas_on(&w("w2")).map(|(id, _)| id.model.clone()).collect();
    assert_eq!(held.len(), 2, "six replicas on three workers");
    mark_dead(&mut state, "w2", 1);
    let plan = plan(&state);
    assert_eq!(plan.add.iter().map(|id| id.model.clone()).collect::<Vec<_>>(), held);
    assert_eq!(plan.remove, vec![]);
}

#[test]
fn too_few_workers_are_named() {
    let mut state = deployed(&["w1"], "m", 2);
    let first = plan(&state);
    assert_eq!(first.add, vec![replica("m", 1, "w1")]);
    assert_eq!((first.unplaced[0].missing, first.unplaced[0].reason.as_str()), (1, "needs 2 workers, 1 is there"));
    place(&mut state);
    register(&mut state, "w2", 1);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w1", "w2"]);
}

#[test]
fn memory_is_respected_also_of_what_is_still_loading() {
    let mut state = registered(&["w1", "w2"]);
    let big = |name: &str| DeploySpec { size_bytes: 500 * MIB, ..spec(name, 1, 1) };
    for name in ["a", "b", "c"] {
        run(&mut state, CommandBody::Deploy(big(name)));
    }
    let planned = plan(&state);
    assert_eq!(planned.add, vec![replica("a", 1, "w1"), replica("b", 1, "w2")], "600 MiB of 1024 each");
    assert_eq!(planned.unplaced[0].reason, "no other worker has 600 MiB free");
    place(&mut state);
    let heartbeat = BTreeMap::from([(w("w1"), 1024 * MIB), (w("w2"), 1024 * MIB)]);
    let loading = super::plan(&state, &Policy::default(), &heartbeat);
    assert!(loading.is_empty(), "heartbeats don't show yet what is on its way");
    let heartbeat = BTreeMap::from([(w("w1"), 1024 * MIB), (w("w2"), 1300 * MIB)]);
    assert_eq!(super::plan(&state, &Policy::default(), &heartbeat).add, vec![replica("c", 1, "w2")]);
}

#[test]
fn every_model_gets_its_first_replica_before_any_gets_its_second() {
    let mut state = registered(&["w1", "w2"]);
    for name in ["a", "b", "c"] {
        run(&mut state, CommandBody::Deploy(DeploySpec { size_bytes: 400 * MIB, ..spec(name, 1, 2) }));
    }
    let models: Vec<String> = plan(&state).add.into_iter().map(|id| id.model).collect();
    assert_eq!(models, ["a", "a", "b", "c"], "room for four");
}

#[test]
fn what_failed_is_neither_retried_nor_moved() {
    let mut state = deployed(&["w1", "w2", "w3"], "m", 2);
    place(&mut state);
    fail(&mut state, "w1", "corrupt");
    fail(&mut state, "w2", "corrupt");
    assert!(plan(&state).is_empty());
}

#[test]
fn a_leaving_worker_is_relieved_only_when_another_answers() {
    let mut state = cluster(&["w1", "w2"], "m", 1);
    drain(&mut state, "w1", 1);
    assert_eq!((plan(&state).add, plan(&state).remove), (vec![replica("m", 1, "w2")], vec![]));
    place(&mut state);
    assert!(plan(&state).is_empty(), "w2 is loading");
    ready(&mut state, "w2");
    assert_eq!(plan(&state).remove, vec![replica("m", 1, "w1")]);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w2"]);
}

#[test]
fn a_leaving_worker_that_nobody_can_relieve_goes_on() {
    let mut state = cluster(&["w1"], "m", 1);
    drain(&mut state, "w1", 1);
    assert!(plan(&state).is_empty());
    assert_eq!(plan(&state).unplaced[0].reason, "needs 1 worker, 0 are there");
    register(&mut state, "w2", 1);
    place(&mut state);
    fail(&mut state, "w2", "corrupt");
    assert!(plan(&state).is_empty(), "the replacement failed, so the old one stays");
}

#[test]
fn of_too_many_the_ones_that_answer_stay() {
    let mut state = deployed(&["w1", "w2", "w3"], "m", 3);
    place(&mut state);
    ready(&mut state, "w3");
    fail(&mut state, "w2", "out of memory");
    deploy(&mut state, "n", 1, 1);
    place(&mut state);
    state.models.values_mut().for_each(|deployment| deployment.replicas_wanted = 1);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w3"]);
}

#[test]
fn what_leaves_makes_room_in_the_same_plan() {
    let mut state = registered(&["w1"]);
    let sized = |name: &str, size_bytes, replicas| DeploySpec { size_bytes, ..spec(name, 1, replicas) };
    run(&mut state, CommandBody::RegisterWorker(registration("w2", 1)));
    run(&mut state, CommandBody::Deploy(sized("large", 500 * MIB, 2)));
    place(&mut state);
    run(&mut state, CommandBody::Deploy(sized("large", 500 * MIB, 1)));
    run(&mut state, CommandBody::Deploy(sized("also", 500 * MIB, 1)));
    let plan = plan(&state);
    assert_eq!((plan.add.len(), plan.remove.len(), plan.unplaced.len()), (1, 1, 0), "{plan:?}");
    assert_eq!(plan.add[0].worker, plan.remove[0].worker);
}

/// Deploys, deaths, returns and reports, as numbers.
fn history() -> impl Strategy<Value = Vec<(u8, u8, u8)>> {
    vec((0..7_u8, 0..5_u8, 1..4_u8), 1..50)
}

fn play(steps: &[(u8, u8, u8)]) -> ClusterState {
    let mut state = registered(&[]);
    let mut life = 1;
    for (kind, which, count) in steps {
        life += 1;
        let worker = format!("w{which}");
        let incarnation = state.workers.get(&w(&worker)).map_or(1, |worker| worker.incarnation);
        match kind {
            0 => {
                let zone = format!("z{}", which % 2);
                let registration = crate::command::Registration { zone, ..registration(&worker, life) };
                run(&mut state, CommandBody::RegisterWorker(registration));
            }
            1 => {
                let size_bytes = u64::from(*count) * 150 * MIB;
                let spec = DeploySpec { size_bytes, ..spec(&format!("m{which}"), 1, u32::from(*count)) };
                run(&mut state, CommandBody::Deploy(spec));
            }
            2 => drop(mark_dead(&mut state, &worker, incarnation)),
            3 => drop(drain(&mut state, &worker, incarnation)),
            4 if state.workers.contains_key(&w(&worker)) => drop(ready(&mut state, &worker)),
            5 if state.workers.contains_key(&w(&worker)) => drop(fail(&mut state, &worker, "no")),
            _ => drop(place(&mut state)),
        }
    }
    state
}

proptest! {
    #[test]
    fn hard_constraints_hold_and_planning_twice_changes_nothing(steps in history()) {
        let mut state = play(&steps);
        let first = plan(&state);
        prop_assert_eq!(&first, &plan(&state), "deterministic");
        let free = loads(&state, &Policy::default(), &BTreeMap::new());
        let mut taken: BTreeMap<&WorkerId, u64> = BTreeMap::new();
        for id in &first.add {
            prop_assert!(!state.replicas.contains_key(id), "already there");
            prop_assert_eq!(state.workers[&id.worker].state, WorkerState::Ready);
            *taken.entry(&id.worker).or_default() += need_bytes(&state.models[&id.key()], &Policy::default());
        }
        for (worker, bytes) in taken {
            let gone = first.remove.iter().filter(|id| id.worker == *worker);
            let freed: u64 = gone.map(|id| held_bytes(&state.replicas[id], &state.models[&id.key()], &Policy::default(), false)).sum();
            prop_assert!(i128::from(bytes) <= free[worker].memory_free_bytes + i128::from(freed), "{} is overfull", worker);
        }
        place(&mut state);
        let second = plan(&state);
        prop_assert!(second.is_empty(), "{:?}", second);
        for (key, deployment) in &state.models {
            let found = Shard::survey(&state, key, 0);
            let unplaced = second.unplaced.iter().find(|unplaced| unplaced.model == *key);
            let missing = unplaced.map_or(0, |unplaced| unplaced.missing as usize);
            prop_assert_eq!(found.staying.len() + missing, deployment.replicas_wanted as usize);
        }
    }

    #[test]
    fn losing_a_worker_moves_only_what_it_held(steps in history(), lost in 0..5_u8) {
        let mut state = play(&steps);
        place(&mut state);
        let lost = w(&format!("w{lost}"));
        let Some(worker) = state.workers.get(&lost) else { return Ok(()) };
        let incarnation = worker.incarnation;
        let held: BTreeSet<ModelKey> = state.replicas_on(&lost).map(|(id, _)| id.key()).collect();
        mark_dead(&mut state, lost.as_str(), incarnation);
        let plan = plan(&state);
        prop_assert!(plan.add.iter().all(|id| held.contains(&id.key())), "{:?}", plan);
        // What remains may be settled now that the lost one is no longer waited for.
        prop_assert!(plan.remove.iter().all(|id| state.workers[&id.worker].state == WorkerState::Draining), "{:?}", plan);
        prop_assert!(testkit::plan(&state) == plan);
    }
}

#[test]
fn a_worker_that_is_left_alone_gets_nothing_new_and_keeps_what_it_has() {
    let avoiding = |state: &ClusterState| plan_avoiding(state, &Policy::default(), &BTreeMap::new(), &BTreeSet::from([w("w1")]));
    let mut state = cluster(&["w1", "w2", "w3"], "m", 2);
    assert_eq!(hosts(&state, "m"), ["w1", "w2"]);
    assert!(avoiding(&state).is_empty());
    deploy(&mut state, "n", 1, 3);
    let planned = avoiding(&state);
    assert_eq!((planned.add, planned.unplaced.len()), (vec![replica("n", 1, "w2"), replica("n", 1, "w3")], 1));
    assert_eq!(plan(&state).add.len(), 3);
}
