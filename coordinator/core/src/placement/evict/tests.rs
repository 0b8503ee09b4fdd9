use std::collections::BTreeMap;

use crate::{
    ClusterState, Command, CommandBody, CommandId, Outcome, Reject,
    claim::Claim,
    placement::{self, Policy, Seen},
    routes, snapshot,
    state::ModelKey,
    status::{ModelState, models},
    testkit::{MIB, deploy_claiming, hosts, place, plan, ready, register, registered, replica, run, w},
};

fn evictable(priority: u32) -> Claim {
    Claim { priority, evictable: true }
}

fn claiming(priority: u32) -> Claim {
    Claim { priority, evictable: false }
}

/// A worker of 1024 MiB with models of these sizes in MiB, which take a fifth more, all ready.
fn full(models: &[(&str, u64, Claim)]) -> ClusterState {
    let mut state = registered(&["w1"]);
    for (name, size_mib, claim) in models {
        deploy_claiming(&mut state, name, size_mib * MIB, *claim);
    }
    place(&mut state);
    ready(&mut state, "w1");
    assert_eq!(state.replicas.len(), models.len(), "all have room");
    state
}

fn status(state: &ClusterState, name: &str) -> (ModelState, String) {
    let status = models(state, &plan(state)).into_iter().find(|model| model.key.name == name).unwrap();
    (status.state, status.reason)
}

#[test]
fn what_matters_more_takes_the_room_of_what_may_go_and_that_comes_back_when_there_is_some() {
    let mut state = full(&[("low", 500, evictable(0))]);
    deploy_claiming(&mut state, "high", 500 * MIB, claiming(1));
    let planned = plan(&state);
    let (low, high) = (vec![replica("low", 1, "w1")], vec![replica("high", 1, "w1")]);
    assert_eq!((&planned.evict, &planned.add, planned.remove.len()), (&low, &high, 0));
    assert_eq!(planned.unplaced[0].model.name, "low");
    place(&mut state);
    assert_eq!((hosts(&state, "high").len(), hosts(&state, "low").len()), (1, 0));
    assert!(plan(&state).is_empty());
    ready(&mut state, "w1");
    let (word, reason) = status(&state, "low");
    assert_eq!(word, ModelState::Evicted);
    assert!(reason.ends_with("comes back when there is room: no other worker has 600 MiB free"), "{reason}");
    assert_eq!(snapshot::decode(&snapshot::encode(&state)).unwrap(), state);
    register(&mut state, "w2", 1);
    place(&mut state);
    ready(&mut state, "w2");
    assert_eq!((hosts(&state, "low"), status(&state, "low").0), (vec!["w2".into()], ModelState::Ready));
}

#[test]
fn what_may_not_go_or_matters_as_much_stays() {
    for (there, comes) in [(claiming(0), claiming(9)), (evictable(1), claiming(1)), (evictable(2), claiming(1))] {
        let mut state = full(&[("there", 500, there)]);
        deploy_claiming(&mut state, "comes", 500 * MIB, comes);
        assert!(plan(&state).is_empty());
        assert_eq!(status(&state, "comes").0, ModelState::Failed);
    }
}

#[test]
fn as_few_go_as_will_do_and_the_lowest_priority_first() {
    let there = [("a", 100, evictable(0)), ("b", 400, evictable(0)), ("c", 200, evictable(1))];
    let evicted = |size_mib: u64| {
        let mut state = full(&there);
        deploy_claiming(&mut state, "new", size_mib * MIB, claiming(2));
        let names: Vec<String> = plan(&state).evict.into_iter().map(|id| id.model).collect();
        place(&mut state);
        assert_eq!(hosts(&state, "new"), ["w1"]);
        names
    };
    // 184 MiB are free.
    assert_eq!(evicted(150), Vec::<String>::new());
    assert_eq!(evicted(200), ["a"], "120 MiB more are enough");
    assert_eq!(evicted(400), ["b"], "480 MiB more are enough without a's 120");
    assert_eq!(evicted(600), ["a", "b"]);
    assert_eq!(evicted(700), ["b", "c"], "a's 120 MiB aren't needed then");
}

fn idle(models: &[(&str, u64)]) -> Seen {
    let key = |name: &str| ModelKey { name: name.into(), version: 1 };
    Seen { idle_s: models.iter().map(|(name, idle_s)| (key(name), *idle_s)).collect(), ..Seen::default() }
}

#[test]
fn of_one_priority_what_was_idle_the_longest_goes_first() {
    let mut state = full(&[("a", 300, evictable(0)), ("b", 300, evictable(0))]);
    deploy_claiming(&mut state, "new", 500 * MIB, claiming(1));
    let evicted = |seen: &[(&str, u64)]| -> Vec<String> {
        let planned = placement::plan_seeing(&state, &Policy::default(), &idle(seen));
        planned.evict.into_iter().map(|id| id.model).collect()
    };
    assert_eq!(evicted(&[]), ["a"]);
    assert_eq!(evicted(&[("a", 10), ("b", 600)]), ["b"]);
    assert_eq!(evicted(&[("a", 600), ("b", 10)]), ["a"]);
    assert_eq!(evicted(&[("a", 20), ("b", 50)]), ["a"], "both were used a moment ago");
    assert_eq!(evicted(&[("b", 600)]), ["b"], "what isn't known counts as used");
}

#[test]
fn a_lower_priority_goes_before_what_was_idle_and_what_is_idle_before_fewer() {
    let mut state = full(&[("low", 300, evictable(0)), ("idle", 300, evictable(1))]);
    deploy_claiming(&mut state, "new", 500 * MIB, claiming(2));
    let planned = placement::plan_seeing(&state, &Policy::default(), &idle(&[("idle", 86_400)]));
    assert_eq!(planned.evict, [replica("low", 1, "w1")]);

    let mut state = full(&[("busy", 600, evictable(0)), ("old", 100, evictable(0)), ("older", 100, evictable(0))]);
    deploy_claiming(&mut state, "new", 200 * MIB, claiming(2));
    let seen = idle(&[("busy", 1), ("old", 3_000), ("older", 86_400)]);
    let mut planned = placement::plan_seeing(&state, &Policy::default(), &seen);
    planned.evict.sort();
    assert_eq!(planned.evict, [replica("old", 1, "w1"), replica("older", 1, "w1")], "64 MiB are free, 240 needed");
}

#[test]
fn room_is_made_where_what_goes_was_idle_the_longest() {
    let mut state = registered(&["w1", "w2"]);
    for name in ["a", "b"] {
        deploy_claiming(&mut state, name, 600 * MIB, evictable(0));
    }
    place(&mut state);
    for worker in ["w1", "w2"] {
        ready(&mut state, worker);
    }
    let host = |name: &str| hosts(&state, name)[0].clone();
    let (of_a, of_b) = (host("a"), host("b"));
    assert_ne!(of_a, of_b);
    let mut state = state.clone();
    deploy_claiming(&mut state, "new", 500 * MIB, claiming(1));
    for (seen, goes, there) in [(idle(&[("a", 900)]), "a", &of_a), (idle(&[("b", 900)]), "b", &of_b)] {
        let planned = placement::plan_seeing(&state, &Policy::default(), &seen);
        assert_eq!((planned.evict, planned.add), (vec![replica(goes, 1, there)], vec![replica("new", 1, there)]));
    }
}

#[test]
fn idleness_grows_by_doublings_of_a_minute() {
    let of = [0, 59, 60, 179, 180, 3_600, u64::MAX].map(super::idleness);
    assert_eq!(of, [0, 0, 1, 1, 2, 5, 58]);
}

#[test]
fn what_matters_more_gets_its_replicas_first() {
    let mut state = registered(&["w1"]);
    deploy_claiming(&mut state, "a", 500 * MIB, claiming(0));
    deploy_claiming(&mut state, "b", 500 * MIB, claiming(1));
    assert_eq!(plan(&state).add, [replica("b", 1, "w1")]);
}

#[test]
fn nothing_goes_for_nothing_whoever_plans() {
    let mut state = full(&[("low", 500, evictable(0)), ("other", 200, claiming(3))]);
    deploy_claiming(&mut state, "high", 500 * MIB, claiming(1));
    let evict = |evict: &[&str], add: &[&str]| {
        let ids = |names: &[&str]| names.iter().map(|name| replica(name, 1, "w1")).collect();
        CommandBody::Evict { epoch_seen: 0, evict: ids(evict), relieve: vec![], add: ids(add), remove: vec![] }
    };
    for refused in [evict(&["low"], &[]), evict(&["low"], &["other"]), evict(&["other"], &[])] {
        assert!(matches!(run(&mut state, refused), Outcome::Rejected(Reject::StalePlan { .. })));
    }
    let whole = Command { id: CommandId([7; 16]), body: evict(&["low", "other"], &["high"]) };
    assert_eq!(Command::decode(&whole.encode()).unwrap(), whole);
    run(&mut state, whole.body);
    assert_eq!((hosts(&state, "low").len(), hosts(&state, "other").len(), hosts(&state, "high").len()), (0, 1, 1));
    assert_eq!(routes::routes(&state).models.len(), 3, "routers still know what was evicted");
}

#[test]
fn a_worker_whose_figures_lag_behind_is_not_asked_for_more() {
    let mut state = full(&[("low", 300, evictable(0)), ("lower", 300, evictable(0))]);
    state.replicas.change_on(&w("w1"), |replica| replica.memory_bytes = 360 * MIB);
    let said = BTreeMap::from([(w("w1"), (1024 - 720) * MIB)]);
    let planned = |state: &ClusterState| placement::plan(state, &Policy::default(), &said);
    deploy_claiming(&mut state, "high", 400 * MIB, claiming(1));
    let first = planned(&state);
    assert_eq!(first.evict, [replica("low", 1, "w1")]);
    run(&mut state, first.into_command());
    deploy_claiming(&mut state, "higher", 200 * MIB, claiming(2));
    assert!(planned(&state).is_empty(), "what was evicted isn't gone yet by the worker's word");
}
