//! Replicas that are half dead: left alone, and taken back.
use std::time::Duration;

use super::*;
use crate::{
    ejection::Cause,
    fake::{Do, Seen, fold, number},
};

async fn answered(router: &Router, id: u64) -> Duration {
    let began = Instant::now();
    let answer = router.infer(plain(id), &CallOptions::default()).await.unwrap();
    assert_eq!(answer.id, id.to_string());
    began.elapsed()
}

/// So many quick answers that the router knows what is usual.
async fn used_to(world: &World, workers: &[&Fake]) {
    while workers.iter().any(|worker| worker.infers() < 5) {
        answered(&world.router, 1).await;
    }
}

fn ejections(world: &World) -> [u64; 4] {
    [Cause::Silence, Cause::Slow, Cause::Failures, Cause::Canary].map(|cause| world.router.counts().ejections(cause))
}

fn out(world: &World) -> Vec<Option<Cause>> {
    world.router.routes().workers().map(|replica| replica.out()).collect()
}

#[tokio::test]
async fn a_stopped_worker_is_left_within_a_second_and_taken_back_when_it_goes_on() {
    let [stopped, other] = [Fake::start("w1").await, Fake::start("w2").await];
    let world = World::new(&[&stopped, &other]);
    used_to(&world, &[&stopped, &other]).await;
    stopped.freeze(true);
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    // Eight at a time, so that some are there when it stops.
    while out(&world)[0].is_none() {
        let calls = (0..8).map(|id| answered(&world.router, id));
        slowest = futures::future::join_all(calls).await.into_iter().fold(slowest, Duration::max);
    }
    // 250 ms until it is suspect and 300 ms for its answer; the rest is for a machine that does other things too.
    assert!(slowest < Duration::from_millis(1_200) && began.elapsed() < Duration::from_millis(1_500), "{slowest:?}");
    assert_eq!((ejections(&world), out(&world)), ([1, 0, 0, 0], vec![Some(Cause::Silence), None]));
    let infers = stopped.infers();
    for id in 0..50 {
        assert!(answered(&world.router, id).await < Duration::from_millis(250));
    }
    stopped.freeze(false);
    while stopped.infers() < infers + 20 {
        answered(&world.router, 1).await;
        tokio::task::yield_now().await;
    }
    assert_eq!((ejections(&world), out(&world)), ([1, 0, 0, 0], vec![None, None]));
}

#[tokio::test]
async fn a_sequence_leaves_a_stopped_worker() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let world = World::new(&[&workers[0], &workers[1]]);
    let mut state = 0;
    for id in 1..=40 {
        if id == 20 {
            workers.iter().find(|worker| !worker.opens().is_empty()).unwrap().freeze(true);
        }
        let began = Instant::now();
        let answer = world.router.infer(step(7, id), &CallOptions::default()).await.unwrap();
        state = fold(state, id);
        assert_eq!(number(&answer), state);
        assert!(began.elapsed() < Duration::from_millis(1_200), "{id}: {:?}", began.elapsed());
    }
    assert_eq!(ejections(&world), [1, 0, 0, 0]);
}

#[tokio::test]
async fn the_only_replica_is_waited_for() {
    let only = Fake::start("w1").await;
    let world = World::new(&[&only]);
    used_to(&world, &[&only]).await;
    only.freeze(true);
    let router = world.router.clone();
    let request = tokio::spawn(async move { answered(&router, 9).await });
    while out(&world) != [Some(Cause::Silence)] {
        tokio::task::yield_now().await;
    }
    only.freeze(false);
    request.await.unwrap();
    while out(&world) != [None] {
        answered(&world.router, 9).await;
    }
}

#[tokio::test]
async fn a_slow_worker_that_lives_is_left_only_if_the_others_are_quick() {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let [slow, other] = [Fake::start("w1").await, Fake::start("w2").await];
    let world = World::new(&[&slow, &other]);
    used_to(&world, &[&slow, &other]).await;
    let waits = || {
        let gate = Arc::clone(&gate);
        move |_: &Seen| Do::WaitFor(Arc::clone(&gate))
    };
    // All alike: each is asked whether it lives, and stays.
    slow.rescript(waits());
    other.rescript(waits());
    let calls: Vec<_> = (0..8)
        .map(|id| {
            let router = world.router.clone();
            tokio::spawn(async move { answered(&router, id).await })
        })
        .collect();
    slow.has_seen(|seen| matches!(seen, Seen::Live)).await;
    other.has_seen(|seen| matches!(seen, Seen::Live)).await;
    gate.add_permits(8);
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(ejections(&world), [0; 4]);
    // One alone: it goes, and what it has is answered elsewhere. The long answers of before are forgotten first.
    other.rescript(|_| Do::Go);
    while ejections(&world)[1] == 0 {
        futures::future::join_all((0..4).map(|id| answered(&world.router, id))).await;
    }
    assert_eq!(out(&world), [Some(Cause::Slow), None]);
}

#[tokio::test]
async fn a_failed_canary_takes_a_worker_out_at_once() {
    let [ill, other] = [Fake::scripted("w1", |_| Do::Refuse(Reason::DeviceUnhealthy)).await, Fake::start("w2").await];
    let world = World::new(&[&ill, &other]);
    while ejections(&world) == [0; 4] {
        answered(&world.router, 1).await;
    }
    assert_eq!((ejections(&world), ill.infers()), ([0, 0, 0, 1], 1));
    ill.rescript(|_| Do::Go);
    while ill.infers() < 5 {
        answered(&world.router, 1).await;
    }
    assert_eq!(out(&world), [None, None]);
}
