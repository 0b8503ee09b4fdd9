use std::{collections::BTreeMap, sync::atomic::Ordering, time::Duration};

use cresset_core::{
    CommandBody,
    command::Cause,
    level::{LEVEL_FIRST, LEVEL_KNOWN},
    opinions::Opinion,
    standing::Standing,
    state::{ReplicaState as Replica, WorkerState},
};
use cresset_proto::{
    fleet::v1::{Observed, ReplicaState, join_request, join_response},
    reason::Reason,
};
use futures::StreamExt;
use tokio::time::Instant;
use tonic::Code;

use super::{
    Cluster,
    fleet::RESTLESS_MS,
    testkit::{Coordinator, hosts, worker_id},
};

/// How long it took, on the tests' own clock: it advances only while nothing else can be done.
fn since_ms(start: Instant) -> u128 {
    start.elapsed().as_millis()
}

#[tokio::test(start_paused = true)]
async fn a_model_is_placed_loaded_and_moved_when_its_worker_is_killed() {
    let coordinator = Coordinator::start();
    let cluster = &coordinator.cluster;
    let w1 = coordinator.run_worker("w1", 1).await;
    let _w2 = coordinator.run_worker("w2", 1).await;
    cluster.deploy("m", 1);
    let ready = |state: &cresset_core::ClusterState, name: &str| {
        let mut replicas = state.replicas.iter();
        replicas.any(|(id, replica)| id.worker == worker_id(name) && replica.state == Replica::Ready)
    };
    cluster.until(|state| ready(state, "w1")).await;

    let killed = Instant::now();
    drop(w1);
    cluster.until(|state| ready(state, "w2")).await;
    assert!(since_ms(killed) < 50, "the stream broke and nobody answered: {} ms", since_ms(killed));
    assert_eq!(coordinator.probes.load(Ordering::Relaxed), 1);
    assert_eq!(cluster.hosts("m"), ["w2"]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_came_gets_its_share_once_it_has_stayed_for_a_while() {
    let coordinator = Coordinator::start();
    let cluster = &coordinator.cluster;
    let _w1 = coordinator.run_worker("w1", 1).await;
    let names = ["a", "b", "c", "d"];
    names.iter().for_each(|name| cluster.deploy(name, 1));
    let hosts_of = |state: &cresset_core::ClusterState| names.iter().flat_map(|name| hosts(state, name)).collect::<Vec<_>>();
    cluster.until(|state| hosts_of(state).len() == 4 && state.replicas.values().all(|r| r.state == Replica::Ready)).await;
    let _w2 = coordinator.run_worker("w2", 1).await;
    let came = Instant::now();
    cluster.until(|state| hosts_of(state).iter().filter(|host| host.as_str() == "w2").count() == 2).await;
    assert!((u128::from(RESTLESS_MS)..u128::from(RESTLESS_MS) + 500).contains(&since_ms(came)), "{} ms", since_ms(came));
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_falls_silent_is_judged_after_the_timeout() {
    let coordinator = Coordinator::start();
    let w1 = coordinator.run_worker("w1", 1).await;
    let _w2 = coordinator.run_worker("w2", 1).await;
    coordinator.cluster.deploy("m", 2);
    coordinator.cluster.until(|state| hosts(state, "m").len() == 2).await;
    w1.silent.cancel();
    let silent = Instant::now();
    coordinator.cluster.until(|state| state.workers[&worker_id("w1")].state == WorkerState::Dead).await;
    assert!((2_250..=2_700).contains(&since_ms(silent)), "{} ms", since_ms(silent));
    assert_eq!(coordinator.probes.load(Ordering::Relaxed), 0, "its stream is still open");
    assert_eq!(coordinator.cluster.hosts("m"), ["w2"]);
}

/// One router leaves the worker alone.
fn left_alone(coordinator: &Coordinator, name: &str) {
    let opinion = Opinion { incarnation: 1, left_alone: true };
    coordinator.fleet.said("r1", BTreeMap::from([(worker_id(name), opinion)]));
}

#[tokio::test(start_paused = true)]
async fn a_silent_worker_that_routers_leave_alone_is_judged_sooner() {
    let coordinator = Coordinator::start();
    let w1 = coordinator.run_worker("w1", 1).await;
    w1.silent.cancel();
    let silent = Instant::now();
    left_alone(&coordinator, "w1");
    coordinator.cluster.until(|state| state.workers[&worker_id("w1")].state == WorkerState::Dead).await;
    assert!((1_250..=1_800).contains(&since_ms(silent)), "{} ms", since_ms(silent));
    assert_eq!(coordinator.probes.load(Ordering::Relaxed), 1, "it was asked first");
}

#[tokio::test(start_paused = true)]
async fn a_worker_whose_stream_broke_but_lives_may_come_back() {
    let coordinator = Coordinator::start();
    coordinator.answer.store(true, Ordering::Relaxed);
    let first = coordinator.run_worker("w1", 1).await;
    drop(first);
    tokio::time::sleep(Duration::from_millis(2_000)).await;
    let _again = coordinator.run_worker("w1", 1).await;
    tokio::time::sleep(Duration::from_millis(5_000)).await;
    assert_eq!(coordinator.probes.load(Ordering::Relaxed), 1);
    let judged = coordinator.cluster.log().into_iter().filter(|body| matches!(body, CommandBody::MarkDead { .. })).count();
    assert_eq!(judged, 0);
}

#[tokio::test(start_paused = true)]
async fn a_new_leader_gives_everybody_a_full_timeout() {
    let coordinator = Coordinator::start();
    let w1 = coordinator.run_worker("w1", 1).await;
    coordinator.cluster.follow(2);
    drop(w1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    coordinator.cluster.lead_again();
    let leading = Instant::now();
    coordinator.cluster.until(|state| state.workers[&worker_id("w1")].state == WorkerState::Dead).await;
    assert!((2_500..=2_700).contains(&since_ms(leading)), "{} ms", since_ms(leading));
    let expected = CommandBody::MarkDead { worker: worker_id("w1"), incarnation: 1, cause: Cause::Unreachable };
    assert_eq!(coordinator.cluster.log().last(), Some(&expected));
    assert_eq!(coordinator.probes.load(Ordering::Relaxed), 1, "it might have been on its way");
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_lives_may_take_long_to_find_a_new_leader() {
    let coordinator = Coordinator::start();
    coordinator.answer.store(true, Ordering::Relaxed);
    let w1 = coordinator.run_worker("w1", 1).await;
    coordinator.cluster.follow(2);
    drop(w1);
    tokio::time::sleep(Duration::from_secs(60)).await;
    coordinator.cluster.lead_again();
    tokio::time::sleep(Duration::from_secs(12)).await;
    let commands = coordinator.cluster.log().len();
    let _back = coordinator.run_worker("w1", 1).await;
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert_eq!(coordinator.cluster.log().len(), commands, "neither judged, nor is there anything to agree on");
    assert!((4..=5).contains(&coordinator.probes.load(Ordering::Relaxed)), "it was asked once in a timeout");
}

#[tokio::test(start_paused = true)]
async fn a_verdict_that_was_not_agreed_on_is_repeated() {
    let coordinator = Coordinator::start();
    let w1 = coordinator.run_worker("w1", 1).await;
    coordinator.cluster.set_deaf(true);
    drop(w1);
    tokio::time::sleep(Duration::from_millis(500)).await;
    coordinator.cluster.set_deaf(false);
    let start = Instant::now();
    coordinator.cluster.until(|state| state.workers[&worker_id("w1")].state == WorkerState::Dead).await;
    assert!(since_ms(start) <= 600, "within the interval of a second: {} ms", since_ms(start));
}

#[tokio::test(start_paused = true)]
async fn a_plan_that_was_not_agreed_on_is_made_again() {
    let coordinator = Coordinator::start();
    let _w1 = coordinator.run_worker("w1", 1).await;
    coordinator.cluster.set_deaf(true);
    coordinator.cluster.deploy("m", 1);
    tokio::time::sleep(Duration::from_millis(1_000)).await;
    coordinator.cluster.set_deaf(false);
    coordinator.cluster.until(|state| hosts(state, "m") == ["w1"]).await;
}

#[tokio::test(start_paused = true)]
async fn memory_that_comes_free_is_used() {
    let coordinator = Coordinator::start();
    let mut w1 = coordinator.join("w1", 1).await;
    w1.hear().await;
    w1.intent().await;
    w1.beat(1_000);
    while coordinator.fleet.beats().is_empty() {
        tokio::task::yield_now().await;
    }
    coordinator.cluster.deploy("m", 1);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(coordinator.cluster.hosts("m"), Vec::<String>::new(), "it needs a MiB");
    w1.beat(1 << 30);
    coordinator.cluster.until(|state| hosts(state, "m") == ["w1"]).await;
}

#[tokio::test(start_paused = true)]
async fn a_worker_is_told_all_it_should_run_and_again_when_that_changes() {
    let coordinator = Coordinator::start();
    let mut w1 = coordinator.join("w1", 1).await;
    let join_response::Message::Registered(registered) = w1.hear().await else { panic!("not registered") };
    assert_eq!(registered.heartbeat_interval_ms, 250);
    w1.beat(1 << 30);
    assert_eq!(w1.intent().await.assignments.len(), 0, "what it may still run from before should go");
    coordinator.cluster.deploy("m", 1);
    let intent = w1.intent().await;
    assert_eq!((intent.assignments[0].model.as_str(), intent.assignments[0].generation), ("m", 1));
    assert_eq!(intent.assignments[0].digest, "digest");
    coordinator.cluster.apply(CommandBody::Undeploy { name: "m".into() });
    let gone = w1.intent().await;
    assert!(gone.assignments.is_empty() && gone.epoch > intent.epoch);
}

#[tokio::test(start_paused = true)]
async fn only_news_is_agreed_on() {
    let coordinator = Coordinator::start();
    let cluster = &coordinator.cluster;
    let mut w1 = coordinator.join("w1", 1).await;
    w1.beat(1 << 30);
    cluster.deploy("m", 1);
    let intent = loop {
        if let join_response::Message::Intent(intent) = w1.hear().await
            && !intent.assignments.is_empty()
        {
            break intent;
        }
    };
    let reports = || cluster.log().iter().filter(|body| matches!(body, CommandBody::ReportReplicas { .. })).count();
    for _ in 0..3 {
        w1.observe(&intent, ReplicaState::Loading);
        w1.beat(1);
        tokio::time::sleep(Duration::from_millis(250)).await;
    }
    assert_eq!(reports(), 1);
    cluster.set_deaf(true);
    w1.observe(&intent, ReplicaState::Ready);
    tokio::time::sleep(Duration::from_millis(250)).await;
    cluster.set_deaf(false);
    cluster.until(|state| state.replicas.values().all(|replica| replica.state == Replica::Ready)).await;
    assert_eq!(reports(), 2);
    w1.say(join_request::Message::Observed(Observed::default()));
    tokio::time::sleep(Duration::from_millis(250)).await;
    assert_eq!(reports(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_leaves_is_relieved() {
    let coordinator = Coordinator::start();
    let mut w1 = coordinator.join("w1", 1).await;
    w1.beat(1 << 30);
    coordinator.cluster.deploy("m", 1);
    coordinator.cluster.until(|state| hosts(state, "m") == ["w1"]).await;
    coordinator.cluster.set_deaf(true);
    w1.leave();
    tokio::time::sleep(Duration::from_millis(100)).await;
    coordinator.cluster.set_deaf(false);
    coordinator.cluster.until(|state| state.workers[&worker_id("w1")].state == WorkerState::Draining).await;
    let _w2 = coordinator.run_worker("w2", 1).await;
    coordinator.cluster.until(|state| hosts(state, "m") == ["w2"]).await;
    let last = loop {
        if let join_response::Message::Intent(intent) = w1.hear().await
            && intent.epoch > 3
        {
            break intent;
        }
    };
    assert!(last.assignments.is_empty(), "it may go now");
    drop(w1);
    coordinator.cluster.until(|state| state.workers[&worker_id("w1")].state == WorkerState::Removed).await;
    let deaths = coordinator.cluster.log().into_iter().filter(|body| matches!(body, CommandBody::MarkDead { .. })).count();
    assert_eq!(deaths, 0, "it went as it should");
}

/// What people are told of a worker.
fn standing(coordinator: &Coordinator, name: &str) -> Standing {
    let id = worker_id(name);
    coordinator.cluster.read(|state| coordinator.fleet.standing(&id, &state.workers[&id]))
}

#[tokio::test(start_paused = true)]
async fn a_worker_gets_nothing_before_it_was_heard_and_nothing_while_it_is_suspect() {
    let coordinator = Coordinator::start();
    let mut w1 = coordinator.join("w1", 1).await;
    w1.hear().await;
    coordinator.cluster.deploy("m", 1);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!((standing(&coordinator, "w1"), coordinator.cluster.hosts("m")), (Standing::Joining, vec![]));
    w1.beat(1 << 30);
    coordinator.cluster.until(|state| hosts(state, "m") == ["w1"]).await;
    assert_eq!(standing(&coordinator, "w1"), Standing::Ready);

    let _w2 = coordinator.run_worker("w2", 1).await;
    tokio::time::sleep(Duration::from_millis(1_700)).await;
    assert_eq!(standing(&coordinator, "w1"), Standing::Suspect, "silent for 1.7 s");
    coordinator.cluster.deploy("n", 2);
    coordinator.cluster.until(|state| hosts(state, "n") == ["w2"]).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!((coordinator.cluster.hosts("n"), coordinator.cluster.hosts("m")), (vec!["w2".into()], vec!["w1".into()]));
    w1.beat(1 << 30);
    coordinator.cluster.until(|state| hosts(state, "n") == ["w1", "w2"]).await;
    assert_eq!(standing(&coordinator, "w1"), Standing::Ready);
}

#[tokio::test(start_paused = true)]
async fn what_a_worker_has_that_all_routers_leave_alone_moves_though_it_beats() {
    let coordinator = Coordinator::start();
    let _w1 = coordinator.run_worker("w1", 1).await;
    coordinator.cluster.deploy("m", 1);
    coordinator.cluster.until(|state| hosts(state, "m") == ["w1"]).await;
    let _w2 = coordinator.run_worker("w2", 1).await;
    let begun = Instant::now();
    while coordinator.cluster.hosts("m") != ["w2"] {
        left_alone(&coordinator, "w1");
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert!(since_ms(begun) < 20_000, "nothing moved");
    }
    assert!((10_000..=11_000).contains(&since_ms(begun)), "{} ms", since_ms(begun));
    assert_eq!(standing(&coordinator, "w1"), Standing::Suspect);
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert_eq!((standing(&coordinator, "w1"), coordinator.cluster.hosts("m")), (Standing::Ready, vec!["w2".into()]));
}

#[tokio::test(start_paused = true)]
async fn the_level_is_raised_once_by_a_leader_that_hears_it_of_everybody() {
    let coordinator = Coordinator::start();
    let raised = || {
        let log = coordinator.cluster.log();
        log.into_iter().filter(|body| matches!(body, CommandBody::RaiseLevel { .. })).collect::<Vec<_>>()
    };
    coordinator.cluster.begins_with(&[1, 2, 3]);
    coordinator.cluster.knows(1, LEVEL_KNOWN);
    coordinator.cluster.knows(2, LEVEL_KNOWN);
    coordinator.cluster.knows(3, LEVEL_FIRST);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(raised(), []);
    // What isn't agreed on is tried again.
    coordinator.cluster.set_deaf(true);
    coordinator.cluster.knows(3, LEVEL_KNOWN);
    tokio::time::sleep(Duration::from_secs(2)).await;
    coordinator.cluster.set_deaf(false);
    coordinator.cluster.until(|state| state.level == LEVEL_KNOWN).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(raised(), [CommandBody::RaiseLevel { level: LEVEL_KNOWN }]);
}

#[tokio::test(start_paused = true)]
async fn a_worker_that_was_removed_is_told_so() {
    let coordinator = Coordinator::start();
    let mut w1 = coordinator.join("w1", 1).await;
    w1.hear().await;
    w1.intent().await;
    coordinator.cluster.apply(CommandBody::DrainWorker { worker: worker_id("w1"), incarnation: 1 });
    coordinator.cluster.apply(CommandBody::RemoveWorker { worker: worker_id("w1"), incarnation: 1 });
    let join_response::Message::Fenced(fenced) = w1.hear().await else { panic!("not fenced") };
    assert_eq!((fenced.incarnation_min, fenced.removed), (2, true));
    let mut again = coordinator.join("w1", 1).await;
    let join_response::Message::Fenced(fenced) = again.hear().await else { panic!("not fenced") };
    assert_eq!((fenced.incarnation_min, fenced.removed), (2, true), "if it didn't hear");
    let mut next = coordinator.join("w1", 2).await;
    assert!(matches!(next.hear().await, join_response::Message::Registered(_)), "started again");
}

#[tokio::test(start_paused = true)]
async fn a_past_life_is_fenced_while_it_speaks_and_when_it_asks() {
    let coordinator = Coordinator::start();
    let mut old = coordinator.join("w1", 5).await;
    old.hear().await;
    old.intent().await;
    let _new = coordinator.run_worker("w1", 6).await;
    let join_response::Message::Fenced(fenced) = old.hear().await else { panic!("not fenced") };
    assert_eq!(fenced.incarnation_min, 6);
    assert!(old.responses.next().await.is_none(), "and that is the end");

    let mut older = coordinator.join("w1", 4).await;
    let join_response::Message::Fenced(fenced) = older.hear().await else { panic!("not fenced") };
    assert_eq!(fenced.incarnation_min, 6);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(coordinator.probes.load(Ordering::Relaxed), 0, "the new life is well");
}

#[tokio::test(start_paused = true)]
async fn a_follower_names_the_leader() {
    let coordinator = Coordinator::start();
    coordinator.cluster.announce(2, "c2:9");
    let mut early = coordinator.join("w1", 1).await;
    early.hear().await;
    early.intent().await;
    coordinator.cluster.follow(2);
    let join_response::Message::Redirect(redirect) = early.hear().await else { panic!("not redirected") };
    assert_eq!(redirect.leader_peer_address, "c2:9");
    assert!(early.responses.next().await.is_none());

    let mut late = coordinator.join("w2", 1).await;
    let join_response::Message::Redirect(redirect) = late.hear().await else { panic!("not redirected") };
    assert_eq!(redirect.leader_peer_address, "c2:9");
    assert!(coordinator.cluster.log().iter().filter(|body| matches!(body, CommandBody::RegisterWorker(_))).count() == 1);
    assert!(coordinator.fleet.beats().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_makes_no_sense_is_refused() {
    let coordinator = Coordinator::start();
    let mut silent = {
        let (requests, inbound) = tokio::sync::mpsc::channel(1);
        let responses = coordinator.membership.open(tokio_stream::wrappers::ReceiverStream::new(inbound)).unwrap();
        (requests, responses)
    };
    let status = silent.1.next().await.unwrap().unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);

    let mut unnamed = coordinator.join("not a name", 1).await;
    let status = unnamed.responses.next().await.unwrap().unwrap_err();
    assert_eq!(Reason::of(&status), Some(Reason::InvalidArgument));

    let mut lifeless = coordinator.join("w1", 0).await;
    let status = lifeless.responses.next().await.unwrap().unwrap_err();
    assert_eq!(status.message(), "incarnation must be between 1 and 2^63-1");
}

#[tokio::test(start_paused = true)]
async fn a_coordinator_that_stops_sends_its_workers_away() {
    let coordinator = Coordinator::start();
    let mut w1 = coordinator.join("w1", 1).await;
    w1.hear().await;
    w1.intent().await;
    coordinator.shutdown.cancel();
    let join_response::Message::Redirect(redirect) = w1.hear().await else { panic!("not redirected") };
    assert_eq!(redirect.leader_peer_address, "");
}
