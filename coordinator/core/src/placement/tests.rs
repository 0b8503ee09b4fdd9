use proptest::{collection::vec, prelude::*};

use super::{load::freed_bytes, *};
use crate::{
    CommandBody,
    claim::Claim,
    command::DeploySpec,
    demands::{Demands, Tags},
    routes,
    state::{Device, WorkerState},
    testkit::{
        self, MIB, cluster, deploy, deploy_claiming, deploy_demanding, deployed, drain, fail, hosts, mark_dead, place,
        place_seeing, plan, ready, register, registered, registration, replica, run, spec, w,
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
pub(crate) fn history() -> impl Strategy<Value = Vec<(u8, u8, u8)>> {
    vec((0..11_u8, 0..5_u8, 1..4_u8), 1..50)
}

/// What is seen of the workers, as numbers: which of them are in doubt, and which for long.
fn sight() -> impl Strategy<Value = Seen> {
    vec(0..4_u8, 5).prop_map(|doubts| {
        let whose = |least: u8| -> BTreeSet<WorkerId> {
            let doubtful = doubts.iter().enumerate().filter(|(_, doubt)| **doubt >= least);
            doubtful.map(|(which, _)| w(&format!("w{which}"))).collect()
        };
        Seen { avoided: whose(2), abandoned: whose(3), ..Seen::default() }
    })
}

fn tagged(value: u8) -> Demands {
    Demands { tags: Tags::from([("t".into(), value.to_string())]), ..Demands::default() }
}

/// A cluster in which a history happens.
pub(crate) struct Play {
    pub(crate) state: ClusterState,
    life: u64,
}

impl Default for Play {
    fn default() -> Self {
        Self { state: registered(&[]), life: 1 }
    }
}

pub(super) fn play(steps: &[(u8, u8, u8)]) -> ClusterState {
    let mut play = Play::default();
    steps.iter().for_each(|step| play.step(step));
    play.state
}

impl Play {
    pub(crate) fn step(&mut self, (kind, which, count): &(u8, u8, u8)) {
        self.life += 1;
        let (state, life) = (&mut self.state, self.life);
        let worker = format!("w{which}");
        let incarnation = state.workers.get(&w(&worker)).map_or(1, |worker| worker.incarnation);
        match kind {
            0 => {
                let zone = format!("z{}", which % 2);
                let tags = tagged(count % 2).tags;
                let registration = crate::command::Registration { zone, tags, ..registration(&worker, life) };
                run(state, CommandBody::RegisterWorker(registration));
            }
            1 => {
                let size_bytes = u64::from(*count) * 150 * MIB;
                let spec = DeploySpec { size_bytes, ..spec(&format!("m{which}"), 1, u32::from(*count)) };
                run(state, CommandBody::Deploy(spec));
            }
            2 => drop(mark_dead(state, &worker, incarnation)),
            3 => drop(drain(state, &worker, incarnation)),
            4 if state.workers.contains_key(&w(&worker)) => drop(ready(state, &worker)),
            5 if state.workers.contains_key(&w(&worker)) => drop(fail(state, &worker, "no")),
            7 => drop(deploy_demanding(state, &format!("m{which}"), u32::from(*count), tagged(which % 2))),
            8 => {
                let workers = BTreeSet::from([w(&format!("w{count}")), w("w0")]);
                drop(deploy_demanding(state, &format!("m{which}"), 1, Demands { workers, ..Demands::default() }));
            }
            9 => {
                let anew = DeploySpec { digest: format!("{life:064x}"), ..spec(&format!("m{which}"), 1, u32::from(*count)) };
                run(state, CommandBody::Deploy(anew));
            }
            10 => {
                let claim = Claim { priority: u32::from(*count), evictable: which % 2 == 0 };
                drop(deploy_claiming(state, &format!("m{which}"), u64::from(*count) * 150 * MIB, claim));
            }
            _ => drop(place(state)),
        }
    }
}

/// Whether a plan only moves what is at rest. That may follow another plan, since what ends or begins isn't at rest.
pub(crate) fn only_evens_out(plan: &Plan) -> bool {
    plan.remove.is_empty()
        && plan.evict.is_empty()
        && plan.add.len() == plan.relieve.len()
        && plan.add.len() <= Policy::default().moves_max
}

proptest! {
    #[test]
    fn hard_constraints_hold_and_planning_twice_changes_nothing(steps in history(), seen in sight()) {
        let mut state = play(&steps);
        let policy = Policy::default();
        let first = plan_seeing(&state, &policy, &seen);
        prop_assert_eq!(&first, &plan_seeing(&state, &policy, &seen), "deterministic");
        let nothing_seen = Seen::default();
        let unplanned = Planner::new(&state, &policy, &nothing_seen);
        let free = |worker: &WorkerId| unplanned.loads.get(worker).unwrap();
        let mut taken: BTreeMap<&WorkerId, u64> = BTreeMap::new();
        for id in &first.add {
            let (worker, demands) = (&state.workers[&id.worker], &state.models[&id.key()].demands);
            prop_assert!(!state.replicas.contains_key(id) || first.remove.contains(id), "already there");
            prop_assert_eq!(worker.state, WorkerState::Ready);
            prop_assert!(demands.are_met_by(&id.worker, worker) && !seen.avoided.contains(&id.worker), "{:?}", id);
            *taken.entry(&id.worker).or_default() += need_bytes(&state.models[&id.key()], &policy, free(&id.worker));
        }
        for (worker, bytes) in taken {
            let gone = first.remove.iter().filter(|id| id.worker == *worker);
            let evicted = first.evict.iter().filter(|id| id.worker == *worker);
            let evicted = evicted.map(|id| freed_bytes(&state.replicas[id], &state.models[&id.key()], &policy, free(worker)));
            let gone = gone.map(|id| held_bytes(&state.replicas[id], &state.models[&id.key()], &policy, free(worker)));
            let freed: u64 = evicted.chain(gone).sum();
            prop_assert!(i128::from(bytes) <= free(worker).memory_free_bytes + i128::from(freed), "{} is overfull", worker);
        }
        let served = |state: &ClusterState| -> BTreeSet<ModelKey> {
            let whole = routes::routes(state).models.into_iter().filter(|model| model.shards.iter().all(|shard| !shard.is_empty()));
            whole.map(|model| model.key).collect()
        };
        let served_before = served(&state);
        let under_way = |state: &ClusterState| {
            let surveys = state.models.keys().map(|key| Shard::survey(state, key, 0));
            surveys.filter(|shard| !shard.is_settled()).map(|shard| shard.moving.len()).sum::<usize>()
        };
        // What answers and begins elsewhere; what is given up where enough others are needs no place.
        let relieved = |id: &ReplicaId| state.replicas[id].answering().is_some();
        let begun = |key: &ModelKey| {
            let begins = first.add.iter().filter(|id| id.is_of(key)).count();
            first.relieve.iter().filter(|id| id.is_of(key) && relieved(id)).count().min(begins)
        };
        prop_assert!(state.models.keys().map(begun).sum::<usize>() <= policy.moves_max.saturating_sub(under_way(&state)));
        let claim = |id: &ReplicaId| state.models[&id.key()].claim;
        for id in &first.evict {
            let mut comes = first.add.iter().filter(|other| other.worker == id.worker);
            prop_assert!(comes.any(|other| claim(id).gives_way_to(&claim(other))), "{:?} goes for nothing", id);
        }
        let evicted: BTreeSet<ModelKey> = first.evict.iter().map(ReplicaId::key).collect();
        let expected = &served_before - &evicted;
        let gone = first.evict.clone();
        run(&mut state, first.into_command());
        prop_assert!(gone.iter().all(|id| !state.replicas.contains_key(id)), "a plan is carried out");
        prop_assert!(served(&state).is_superset(&expected), "a plan costs nobody an answer");
        let second = plan_seeing(&state, &policy, &seen);
        prop_assert!(only_evens_out(&second), "{:?}", second);
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
        prop_assert!(plan.add.iter().all(|id| held.contains(&id.key()) || plan.relieve.iter().chain(&plan.evict).any(|moved| moved.key() == id.key())), "{:?}", plan);
        // What remains may be settled now that the lost one is no longer waited for; and what moves needn't wait for it any more.
        let gives_up = |id: &ReplicaId| Shard::survey(&state, &id.key(), id.shard).gives_up(&id.worker);
        prop_assert!(plan.remove.iter().all(gives_up), "{:?}", plan);
        prop_assert!(testkit::plan(&state) == plan);
    }
}

#[test]
fn replicas_go_only_where_a_deployment_wants_them() {
    let mut state = registered(&["w3"]);
    for (name, value) in [("w1", 0), ("w2", 1)] {
        let registration = crate::command::Registration { tags: tagged(value).tags, ..registration(name, 1) };
        run(&mut state, CommandBody::RegisterWorker(registration));
    }
    deploy_demanding(&mut state, "m", 2, tagged(1));
    let planned = plan(&state);
    assert_eq!(
        (planned.add, planned.unplaced[0].reason.as_str()),
        (vec![replica("m", 1, "w2")], "needs 2 workers with t=1, 1 is there")
    );
    let forced = CommandBody::Place { epoch_seen: 0, add: vec![replica("m", 1, "w1")], remove: vec![] };
    assert!(matches!(run(&mut state, forced), crate::Outcome::Rejected(crate::Reject::StalePlan { .. })), "whoever plans");
    let workers = BTreeSet::from([w("w1"), w("w3"), w("w8")]);
    deploy_demanding(&mut state, "n", 3, Demands { workers, ..Demands::default() });
    let planned = plan(&state);
    assert_eq!(planned.unplaced[1].reason, "needs 3 workers of w1, w3, w8, 2 are there");
    place(&mut state);
    assert_eq!(hosts(&state, "n"), ["w1", "w3"]);
}

#[test]
fn a_deployment_that_wants_other_workers_moves_there_and_answers_meanwhile() {
    let mut state = cluster(&["w1", "w2", "w3"], "m", 2);
    let workers = BTreeSet::from([w("w2"), w("w3")]);
    deploy_demanding(&mut state, "m", 2, Demands { workers, ..Demands::default() });
    let planned = plan(&state);
    assert_eq!((planned.relieve, planned.add), (vec![replica("m", 1, "w1")], vec![replica("m", 1, "w3")]));
    place(&mut state);
    assert_eq!(routes::routes(&state).models[0].shards[0], [w("w1"), w("w2")]);
    ready(&mut state, "w3");
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w2", "w3"]);
}

#[test]
fn a_replica_fits_each_device_that_it_is_on() {
    let device = |name: &str| Device { name: name.into(), memory_bytes: 1024 * MIB };
    let mut state = registered(&["w1"]);
    let devices = vec![device("cuda:0"), device("cuda:1")];
    run(&mut state, CommandBody::RegisterWorker(crate::command::Registration { devices, ..registration("w2", 1) }));
    let sized = |size_bytes, gpus_min, gpus_used| {
        let mut set = crate::command::DeploySet::from(&DeploySpec { size_bytes, ..spec("m", 1, 1) });
        set.versions[0].demands = Demands { gpus_min, gpus_used, ..Demands::default() };
        CommandBody::DeploySet(set)
    };
    let reason = |state: &ClusterState| plan(state).unplaced.first().map(|unplaced| unplaced.reason.clone());
    run(&mut state, sized(800 * MIB, 1, 0));
    assert_eq!(plan(&state).add, [replica("m", 1, "w2")], "960 MiB on both");
    run(&mut state, sized(900 * MIB, 1, 0));
    assert_eq!(reason(&state).unwrap(), "needs 1 worker with a GPU, 0 are there; 1 more with less than 1080 MiB");
    run(&mut state, sized(100 * MIB, 3, 0));
    assert_eq!(reason(&state).unwrap(), "needs 1 worker with 3 GPUs, 0 are there");
    run(&mut state, sized(500 * MIB, 1, 0));
    place(&mut state);
    let free = |state: &ClusterState| {
        let (policy, seen) = (Policy::default(), Seen::default());
        Planner::new(state, &policy, &seen).loads.get(&w("w2")).unwrap().memory_free_bytes / i128::from(MIB)
    };
    assert_eq!(free(&state), 2048 - 2 * 600);
    run(&mut state, sized(500 * MIB, 1, 1));
    assert_eq!(free(&state), 2048 - 600, "on one of them");
}

#[test]
fn both_generations_take_memory_while_a_version_is_loaded_anew() {
    let mut state = registered(&["w1"]);
    let sized =
        |name: &str, digest: u8, size_bytes| DeploySpec { size_bytes, digest: format!("{digest:064x}"), ..spec(name, 1, 1) };
    run(&mut state, CommandBody::Deploy(sized("large", 1, 400 * MIB)));
    place(&mut state);
    ready(&mut state, "w1");
    run(&mut state, CommandBody::Deploy(sized("large", 2, 300 * MIB)));
    run(&mut state, CommandBody::Deploy(sized("also", 1, 200 * MIB)));
    // 480 MiB of the old one, 360 of the new one, 240 for the other, of 1024.
    let heartbeat = BTreeMap::from([(w("w1"), (1024 - 480) * MIB)]);
    for said in [&BTreeMap::new(), &heartbeat] {
        let planned = super::plan(&state, &Policy::default(), said);
        assert_eq!((planned.add, planned.unplaced[0].reason.as_str()), (vec![], "no other worker has 240 MiB free"));
    }
    ready(&mut state, "w1");
    assert_eq!(plan(&state).add, [replica("also", 1, "w1")], "the old one has gone");
}

#[test]
fn a_worker_that_is_left_alone_gets_nothing_new_and_keeps_what_it_has() {
    let seen = Seen { avoided: BTreeSet::from([w("w1")]), ..Seen::default() };
    let avoiding = |state: &ClusterState| plan_seeing(state, &Policy::default(), &seen);
    let mut state = cluster(&["w1", "w2", "w3"], "m", 2);
    assert_eq!(hosts(&state, "m"), ["w1", "w2"]);
    assert!(avoiding(&state).is_empty());
    deploy(&mut state, "n", 1, 3);
    let planned = avoiding(&state);
    assert_eq!((planned.add, planned.unplaced.len()), (vec![replica("n", 1, "w2"), replica("n", 1, "w3")], 1));
    assert_eq!(plan(&state).add.len(), 3);
}

/// What is seen when routers have left these workers alone for long.
fn abandoning(workers: &[&str]) -> Seen {
    let workers: BTreeSet<WorkerId> = workers.iter().map(|name| w(name)).collect();
    Seen { avoided: workers.clone(), abandoned: workers, ..Seen::default() }
}

#[test]
fn what_all_leave_alone_is_replaced_and_serves_until_then() {
    let mut state = cluster(&["w1", "w2", "w3"], "m", 2);
    let seen = abandoning(&["w1"]);
    let first = place_seeing(&mut state, &seen);
    assert_eq!(
        (&first.relieve, &first.add, &first.remove),
        (&vec![replica("m", 1, "w1")], &vec![replica("m", 1, "w3")], &vec![])
    );
    let served = |state: &ClusterState| routes::routes(state).models[0].shards[0].clone();
    assert_eq!(served(&state), [w("w1"), w("w2")], "whoever can reach it, may");
    assert!(plan_seeing(&state, &Policy::default(), &seen).is_empty(), "w3 is loading");
    assert!(plan(&state).is_empty(), "and the next leader, who hasn't heard of any doubt, goes on with it");
    ready(&mut state, "w3");
    assert_eq!(served(&state), [w("w2"), w("w3")]);
    assert_eq!(plan(&state).remove, vec![replica("m", 1, "w1")]);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w2", "w3"]);
    assert!(plan_seeing(&state, &Policy::default(), &seen).is_empty());
}

#[test]
fn no_more_than_the_budget_is_on_the_move() {
    let mut state = registered(&["w1"]);
    for number in 0..10 {
        deploy(&mut state, &format!("m{number}"), 1, 1);
    }
    place(&mut state);
    ready(&mut state, "w1");
    register(&mut state, "w2", 1);
    let seen = abandoning(&["w1"]);
    for begun in [4, 8, 10] {
        assert_eq!(place_seeing(&mut state, &seen).relieve.len(), if begun == 10 { 2 } else { 4 });
        assert!(plan_seeing(&state, &Policy::default(), &seen).is_empty());
        assert_eq!(
            (state.replicas_on(&w("w1")).count(), state.replicas_on(&w("w2")).count()),
            (if begun == 10 { 2 } else { 14 - begun }, begun)
        );
        ready(&mut state, "w2");
    }
    place_seeing(&mut state, &seen);
    assert_eq!((state.replicas_on(&w("w1")).count(), state.replicas_on(&w("w2")).count()), (0, 10));
}

#[test]
fn what_never_answered_on_a_worker_that_is_left_alone_just_goes_and_what_failed_stays() {
    let mut state = deployed(&["w1", "w2"], "m", 1);
    place(&mut state);
    let moved = place_seeing(&mut state, &abandoning(&["w1"]));
    assert_eq!((moved.relieve.len(), moved.add.len(), moved.remove.len()), (1, 1, 1));
    assert_eq!(hosts(&state, "m"), ["w2"]);
    fail(&mut state, "w2", "corrupt");
    assert!(plan_seeing(&state, &Policy::default(), &abandoning(&["w2"])).is_empty());
}

#[test]
fn a_move_that_fails_takes_nothing_away() {
    let mut state = cluster(&["w1", "w2", "w3"], "m", 2);
    let seen = abandoning(&["w1"]);
    place_seeing(&mut state, &seen);
    fail(&mut state, "w3", "out of memory");
    assert!(plan_seeing(&state, &Policy::default(), &seen).is_empty());
    assert_eq!(routes::routes(&state).models[0].shards[0], [w("w1"), w("w2")]);
    deploy(&mut state, "m", 1, 2);
    ready(&mut state, "w3");
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w2", "w3"]);
}

#[test]
fn where_most_workers_are_left_alone_or_nobody_can_take_over_nothing_moves() {
    let state = cluster(&["w1", "w2", "w3"], "m", 2);
    assert!(plan_seeing(&state, &Policy::default(), &abandoning(&["w1", "w2"])).is_empty());
    let state = cluster(&["w1", "w2"], "m", 2);
    assert!(plan_seeing(&state, &Policy::default(), &abandoning(&["w1"])).is_empty());
}
