use std::time::Duration;

use cresset_proto::fleet::v1::{Label, ShardRoute, WorkerRoute};

use super::*;

fn worker(id: &str, incarnation: u64) -> WorkerRoute {
    WorkerRoute { worker_id: id.into(), incarnation, grpc_address: format!("{id}.example:1"), zone: String::new() }
}

fn model(version: u64, ids: &[&str]) -> WireRoute {
    let worker_ids = ids.iter().map(|id| (*id).to_owned()).collect();
    let shards = vec![ShardRoute { shard: 0, worker_ids }];
    WireRoute { model: "m".into(), version, generation: 1, shards, ..Default::default() }
}

fn response(epoch: u64, workers: Vec<WorkerRoute>, models: Vec<WireRoute>) -> WatchResponse {
    WatchResponse { epoch, models, workers, ..Default::default() }
}

fn table(response: &WatchResponse) -> RouteTable {
    RouteTable::build(response, &RouteTable::unknown()).unwrap()
}

#[test]
fn the_highest_version_with_a_replica_is_served() {
    let table = table(&response(1, vec![worker("w1", 1)], vec![model(1, &["w1"]), model(2, &["w1"]), model(3, &[])]));
    assert_eq!(table.model("m", Version::Highest).unwrap().version, 2);
    assert_eq!(table.model("m", Version::Exactly(3)).unwrap().version, 3);
    assert!(table.model("m", Version::Exactly(4)).is_none());
    assert!(table.model("n", Version::Highest).is_none() && !table.has_model("n"));
}

#[test]
fn a_label_leads_to_its_version_and_moves_with_the_table() {
    let label = |label: &str, version| Label { model: "m".into(), label: label.into(), version };
    let mut response = response(1, vec![worker("w1", 1)], vec![model(1, &["w1"]), model(2, &["w1"])]);
    response.labels = vec![label("stable", 1), label("canary", 2)];
    let first = table(&response);
    let canary = Version::read("canary").unwrap();
    let route = first.lookup("m", &canary).unwrap();
    assert_eq!(route.version, 2);
    let mut request = ModelInferRequest { model_version: "canary".into(), ..Default::default() };
    route.address(&canary, &mut request);
    assert_eq!(request.model_version, "2", "a worker knows no labels");
    response.labels = vec![label("canary", 1)];
    let second = RouteTable::build(&response, &first).unwrap();
    assert_eq!(second.lookup("m", &canary).unwrap().version, 1);
    for (name, text) in [("m", "stable"), ("n", "canary")] {
        let refused = second.lookup(name, &Version::read(text).unwrap()).unwrap_err().status();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
        let words = format!("failed to get model version from specified version string '{text}'");
        assert!(refused.message().starts_with(&words), "{refused:?}");
    }
    assert_eq!(second.versions_ready("m").collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_model_without_any_replica_is_still_known() {
    let table = table(&response(1, vec![], vec![model(1, &["w9"]), model(2, &[])]));
    let route = table.model("m", Version::Highest).unwrap();
    assert_eq!((route.version, route.replicas.len()), (2, 0), "a worker that isn't in the table is no replica");
}

#[test]
fn counters_survive_an_update_and_die_with_the_incarnation() {
    let first = table(&response(1, vec![worker("w1", 1), worker("w2", 1)], vec![model(1, &["w1", "w2"])]));
    let old: Vec<_> = first.workers().cloned().collect();
    let _at_w1 = old[0].enter();
    let second = response(2, vec![worker("w1", 1), worker("w2", 2)], vec![model(1, &["w1", "w2"])]);
    let second = RouteTable::build(&second, &first).unwrap();
    let replicas = &second.model("m", Version::Highest).unwrap().replicas;
    assert!(Arc::ptr_eq(&replicas[0], &old[0]));
    assert_eq!(replicas[0].in_flight(), 1);
    assert!(!Arc::ptr_eq(&replicas[1], &old[1]));
    assert!(!old[0].is_gone() && old[1].is_gone());
}

#[test]
fn changes_replace_what_they_name_and_nothing_else() {
    let named = |name: &str, version, ids: &[&str]| WireRoute { model: name.into(), ..model(version, ids) };
    let label = |version| Label { model: "m".into(), label: "stable".into(), version };
    let workers = vec![worker("w1", 1), worker("w2", 1), worker("w3", 1)];
    let mut whole = response(5, workers, vec![model(1, &["w1", "w2"]), named("n", 1, &["w2"]), named("gone", 1, &["w1"])]);
    whole.labels = vec![label(1)];
    let first = table(&whole);
    let before: Vec<_> = first.workers().cloned().collect();
    let mut changes = response(7, vec![worker("w3", 2)], vec![model(2, &["w2", "w3"])]);
    changes.since_epoch = 5;
    changes.models_changed = vec!["m".into(), "gone".into()];
    changes.workers_changed = vec!["w1".into(), "w3".into()];
    changes.labels = vec![label(2)];
    let second = RouteTable::build(&changes, &first).unwrap();
    assert_eq!((second.epoch(), second.is_received()), (7, true));
    let now: Vec<_> = second.workers().map(|worker| (worker.worker_id.as_str(), worker.incarnation)).collect();
    assert_eq!(now, [("w2", 1), ("w3", 2)]);
    assert_eq!(second.versions("m").map(|route| route.version).collect::<Vec<_>>(), [2]);
    assert!(
        !second.has_model("gone")
            && Arc::ptr_eq(first.model("n", Version::Highest).unwrap(), second.model("n", Version::Highest).unwrap())
    );
    assert_eq!(second.lookup("m", &Version::read("stable").unwrap()).unwrap().version, 2);
    let replicas = &second.model("m", Version::Highest).unwrap().replicas;
    assert!(Arc::ptr_eq(&replicas[0], &before[1]), "its counters go on");
    assert_eq!(before.iter().map(|worker| worker.is_gone()).collect::<Vec<_>>(), [true, false, true]);
    assert!(first.has_model("gone") && first.versions("m").count() == 1, "the table before is what it was");
}

#[test]
fn changes_of_another_table_are_refused() {
    let (sender, routes) = channel();
    let changes = |since_epoch, epoch| WatchResponse { since_epoch, ..response(epoch, vec![worker("w1", 1)], vec![]) };
    let gap = |since, here| Err(RouteError::Gap { since, here });
    assert_eq!(sender.publish(&changes(3, 4)), gap(3, 0), "there is none yet");
    assert_eq!(sender.publish(&response(5, vec![], vec![])), Ok(true));
    assert_eq!(sender.publish(&changes(4, 6)), gap(4, 5));
    assert_eq!(sender.publish(&changes(6, 7)), gap(6, 5));
    assert_eq!((routes.table().epoch(), routes.table().workers().count()), (5, 0));
    assert_eq!(sender.publish(&changes(5, 6)), Ok(true));
    assert_eq!(sender.publish(&changes(5, 6)), Ok(false), "known already");
    assert_eq!((routes.table().epoch(), routes.table().workers().count()), (6, 1));
}

#[test]
fn epochs_only_grow_and_a_broken_table_changes_nothing() {
    let (sender, receiver) = channel();
    assert!(!receiver.load().is_received());
    let good = response(5, vec![worker("w1", 1)], vec![model(1, &["w1"])]);
    assert_eq!(sender.publish(&good), Ok(true));
    assert_eq!(sender.publish(&response(5, vec![], vec![])), Ok(false));
    assert_eq!(sender.publish(&response(4, vec![], vec![])), Ok(false));
    let mut broken = response(6, vec![], vec![model(1, &[])]);
    broken.models[0].generation = 2;
    broken.models[0].config = vec![0xff].into();
    assert!(matches!(sender.publish(&broken), Err(RouteError::Config { .. })));
    let table = receiver.table();
    assert_eq!(table.epoch(), 5);
    assert!(!table.workers().next().unwrap().is_gone());
}

#[test]
fn slowness_is_measured_against_what_is_usual_for_the_model() {
    let table = table(&response(1, vec![worker("w1", 1), worker("w2", 1)], vec![model(1, &["w1", "w2"])]));
    let route = table.model("m", Version::Highest).unwrap();
    let (fast, slow) = (&route.replicas[0], &route.replicas[1]);
    for now_ms in (0..20_000).step_by(10) {
        fast.note_answer(route, Duration::from_millis(1), now_ms * 1_000);
        slow.note_answer(route, Duration::from_millis(5), now_ms * 1_000);
    }
    let (fast_now, slow_now) = (fast.slowness(20_000), slow.slowness(20_000));
    assert!(fast_now < 0.8 && slow_now > 1.5 && slow_now / fast_now > 3.0, "{fast_now} {slow_now}");
    assert!((slow.slowness(60_000) - 1.0).abs() < 0.01, "without news it is like any other");
}

#[test]
fn a_new_replica_gets_its_due_by_and_by() {
    let (replica, start) = (Replica::new("w1", 1, "x:1"), Duration::from_secs(10));
    let shares = [50_000, 52_500, 57_500, 60_000, 90_000].map(|now_ms| replica.share(start, now_ms));
    assert_eq!(shares, [0.1, 0.25, 0.75, 1.0, 1.0]);
}

#[test]
fn guards_count_down_when_dropped() {
    let replica = Arc::new(Replica::new("w1", 1, "x:1"));
    let guards = [replica.enter(), replica.enter()];
    assert_eq!(replica.in_flight(), 2);
    drop(guards);
    assert_eq!(replica.in_flight(), 0);
    replica.note_failure(100);
    assert!(replica.is_failing(99) && !replica.is_failing(100));
    replica.note_success();
    assert!(!replica.is_failing(1));
}
