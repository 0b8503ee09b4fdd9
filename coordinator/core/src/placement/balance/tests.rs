use std::collections::BTreeMap;

use proptest::prelude::*;

use crate::{
    ClusterState, CommandBody, WorkerId,
    command::Registration,
    demands::Demands,
    placement::{
        Plan, Policy, Seen, Shard, plan_seeing,
        tests::{history, play},
    },
    routes,
    state::ReplicaId,
    testkit::{
        cluster, deploy, deploy_demanding, fail, hosts, mark_dead, place, plan, ready, register, registered, registration,
        replica, run, w,
    },
};

/// How many replicas each worker has that stay.
fn carried(state: &ClusterState) -> BTreeMap<&WorkerId, usize> {
    let mut carried: BTreeMap<&WorkerId, usize> = state.workers_ready().map(|(id, _)| (id, 0)).collect();
    for (id, _) in state.replicas.iter().filter(|(_, replica)| !replica.moving) {
        carried.entry(&id.worker).and_modify(|count| *count += 1);
    }
    carried
}

/// Carries out plans, and has all that begins come up, until there is nothing to plan. Returns the replicas that moved.
fn settle(state: &mut ClusterState) -> Vec<ReplicaId> {
    let mut moved = Vec::new();
    for _ in 0..200 {
        let plan = plan(state);
        if plan.is_empty() && state.replicas.values().all(|replica| !replica.moving) {
            break;
        }
        moved.extend(plan.relieve.iter().cloned());
        run(state, plan.into_command());
        let ids: Vec<WorkerId> = state.workers_ready().map(|(id, _)| id.clone()).collect();
        ids.iter().for_each(|id| drop(ready(state, id.as_str())));
    }
    moved
}

#[test]
fn a_worker_that_comes_gets_its_fair_share_a_few_at_a_time() {
    let mut state = registered(&["w1", "w2"]);
    for number in 0..12 {
        deploy(&mut state, &format!("m{number:02}"), 1, 1);
    }
    settle(&mut state);
    register(&mut state, "w3", 1);
    let restless = Seen { restless: true, ..Seen::default() };
    assert!(plan_seeing(&state, &Policy::default(), &restless).is_empty(), "it may go again at once");
    let first = plan(&state);
    assert_eq!((first.relieve.len(), first.add.len(), first.remove.len()), (4, 4, 0), "the budget");
    assert!(first.add.iter().all(|id| id.worker == w("w3")));
    place(&mut state);
    assert!(plan(&state).is_empty(), "what moves answers where it was until the other is ready");
    assert!(routes::routes(&state).models.iter().all(|model| model.shards[0].len() == 1));
    settle(&mut state);
    assert_eq!(carried(&state).into_values().collect::<Vec<_>>(), [4, 4, 4]);
    assert!(plan(&state).is_empty());
}

#[test]
fn one_replica_more_is_not_worth_a_move() {
    let mut state = registered(&["w1"]);
    deploy(&mut state, "a", 1, 1);
    settle(&mut state);
    register(&mut state, "w2", 1);
    assert_eq!(plan(&state), Plan { epoch: state.epoch, ..Plan::default() });
    deploy(&mut state, "b", 1, 1);
    deploy(&mut state, "c", 1, 1);
    settle(&mut state);
    assert_eq!(carried(&state).into_values().collect::<Vec<_>>(), [2, 1]);
}

#[test]
fn what_names_its_workers_or_would_share_a_zone_stays() {
    let mut state = registered(&["w1"]);
    for model in ["a", "b", "c"] {
        let demands = Demands { workers: [w("w1"), w("w2")].into(), ..Demands::default() };
        deploy_demanding(&mut state, model, 1, demands);
    }
    settle(&mut state);
    register(&mut state, "w2", 1);
    assert!(plan(&state).is_empty());

    let mut state = registered(&[]);
    let enter = |state: &mut ClusterState, name: &str, zone: &str| {
        run(state, CommandBody::RegisterWorker(Registration { zone: zone.into(), ..registration(name, 1) }));
    };
    enter(&mut state, "w1", "a");
    enter(&mut state, "w2", "b");
    for model in ["a", "b", "c", "d"] {
        deploy(&mut state, model, 1, 2);
    }
    settle(&mut state);
    enter(&mut state, "w3", "b");
    settle(&mut state);
    let carried: Vec<usize> = carried(&state).into_values().collect();
    assert_eq!(carried, [4, 2, 2], "a replica of each stays in zone a");
}

#[test]
fn a_worker_on_which_moves_fail_gets_no_more_of_them() {
    let mut state = registered(&["w1"]);
    for number in 0..20 {
        deploy(&mut state, &format!("m{number:02}"), 1, 1);
    }
    settle(&mut state);
    register(&mut state, "w2", 1);
    place(&mut state);
    fail(&mut state, "w2", "no such file");
    assert!(plan(&state).is_empty());
    assert!(routes::routes(&state).models.iter().all(|model| model.shards[0] == [w("w1")]), "and all answers");
}

#[test]
fn a_worker_in_doubt_neither_gives_nor_gets() {
    let mut state = cluster(&["w1"], "a", 1);
    for model in ["b", "c", "d"] {
        deploy(&mut state, model, 1, 1);
    }
    settle(&mut state);
    register(&mut state, "w2", 1);
    for doubtful in ["w1", "w2"] {
        let seen = Seen { avoided: [w(doubtful)].into(), ..Seen::default() };
        assert!(plan_seeing(&state, &Policy::default(), &seen).is_empty(), "{doubtful}");
    }
    assert_eq!(plan(&state).add.len(), 2);
    mark_dead(&mut state, "w2", 1);
    assert_eq!((hosts(&state, "a"), state.replicas.contains_key(&replica("a", 1, "w1"))), (vec!["w1".into()], true));
}

proptest! {
    #[test]
    fn a_worker_that_comes_gets_what_was_missing_and_at_most_its_fair_share(steps in history()) {
        let mut state = play(&steps);
        settle(&mut state);
        let before = plan(&state);
        prop_assert!(before.is_empty(), "it comes to rest: {:?}", before);
        register(&mut state, "w9", 1);
        let missing = |id: &ReplicaId| before.unplaced.iter().any(|unplaced| unplaced.model == id.key());
        let first = plan(&state);
        let moves = |id: &ReplicaId| first.relieve.iter().chain(&first.evict).any(|moved| moved.key() == id.key());
        prop_assert!(first.add.iter().all(|id| missing(id) || moves(id)), "{:?}", first);
        let evicted = |id: &ReplicaId| first.evict.iter().any(|gone| gone.key() == id.key());
        let begun: usize = first.add.iter().filter(|id| !missing(id) && !evicted(id)).count();
        prop_assert!(begun <= Policy::default().moves_max);
        let pinned = |id: &ReplicaId| !state.models[&id.key()].demands.workers.is_empty();
        prop_assert!(!first.relieve.iter().any(pinned), "{:?}", first);
        let moved = settle(&mut state);
        prop_assert!(plan(&state).is_empty(), "it comes to rest again");
        let got = state.replicas_on(&w("w9")).filter(|(id, _)| moved.iter().any(|other| other.key() == id.key())).count();
        let fair = carried(&state).values().sum::<usize>().div_ceil(state.workers_ready().count());
        prop_assert!(got <= fair, "{} of {} moved: {:?}", got, fair, moved);
    }

    #[test]
    fn moves_that_even_out_end_and_make_it_more_even(steps in history(), lopsided in 0..5_u8) {
        let mut state = play(&steps);
        // What one worker lost comes back to it in another life.
        let name = format!("w{lopsided}");
        let incarnation = state.workers.get(&w(&name)).map_or(1, |worker| worker.incarnation);
        mark_dead(&mut state, &name, incarnation);
        settle(&mut state);
        register(&mut state, &name, 1_000);
        let uneven = |state: &ClusterState| carried(state).values().map(|count| count * count).sum::<usize>();
        let zones = |state: &ClusterState| -> usize {
            let shared = |key| {
                let mut taken: BTreeMap<&str, usize> = BTreeMap::new();
                for (worker, _) in Shard::survey(state, key, 0).staying {
                    *taken.entry(&state.workers[worker].zone).or_default() += 1;
                }
                taken.values().map(|count| count * count).sum::<usize>()
            };
            state.models.keys().map(shared).sum()
        };
        for _ in 0..100 {
            let before = (uneven(&state), zones(&state), state.replicas.len());
            let plan = plan(&state);
            let moves = plan.relieve.len();
            let only_moves = moves == plan.add.len() && plan.remove.is_empty();
            run(&mut state, plan.into_command());
            if only_moves && moves > 0 && state.replicas.len() == before.2 + moves {
                prop_assert!(uneven(&state) + 2 * moves <= before.0 && zones(&state) <= before.1);
            }
            let ids: Vec<WorkerId> = state.workers_ready().map(|(id, _)| id.clone()).collect();
            ids.iter().for_each(|id| drop(ready(&mut state, id.as_str())));
        }
        prop_assert!(plan(&state).is_empty(), "it ends");
    }
}
