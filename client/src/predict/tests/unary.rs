//! Single requests.
use std::time::Duration;

use cresset_proto::reason::Reason;
use tonic::Code;

use super::*;
use crate::fake::{Do, Seen};

async fn answered(router: &Router) -> ModelInferResponse {
    router.infer(plain(7), &CallOptions::default()).await.unwrap()
}

async fn refused(router: &Router, request: ModelInferRequest) -> Status {
    router.infer(request, &CallOptions::default()).await.unwrap_err()
}

#[tokio::test]
async fn a_request_is_small_enough_to_be_moved_about() {
    let good = Fake::start("w1").await;
    let world = World::new(&[&good]);
    let options = CallOptions::default();
    let request = world.router.infer(plain(7), &options);
    let bytes = std::mem::size_of_val(&request);
    println!("{bytes} bytes");
    // It is copied as a whole several times before it runs: a fifth of a coordinator's time went there when it was larger.
    assert!(bytes <= 4_096, "{bytes}");
    request.await.unwrap();
}

/// However the first worker fails, the other answers and the caller sees nothing of it.
async fn moves(wrong: Do) {
    let good = Fake::start("w1").await;
    let bad = Fake::scripted("w2", move |_| wrong.clone()).await;
    let world = World::new(&[&good, &bad]);
    // Two choices is random: go on until the bad one was asked.
    while bad.infers() == 0 {
        assert_eq!(answered(&world.router).await.id, "7");
    }
    // It is avoided for a while.
    let infers = bad.infers();
    for _ in 0..10 {
        answered(&world.router).await;
    }
    assert_eq!(bad.infers(), infers);
    assert!(world.router.routes().workers().all(|replica| replica.in_flight() == 0));
}

#[tokio::test]
async fn a_killed_worker_is_not_noticed_by_the_caller() {
    moves(Do::Die).await;
}

#[tokio::test]
async fn a_draining_worker_is_left() {
    moves(Do::Refuse(Reason::Draining)).await;
}

#[tokio::test]
async fn a_fence_is_left() {
    moves(Do::Refuse(Reason::Fenced)).await;
}

#[tokio::test]
async fn a_worker_without_the_model_is_left() {
    moves(Do::Refuse(Reason::NotHere)).await;
}

#[tokio::test]
async fn a_worker_that_is_judged_dead_is_left_in_the_middle() {
    let hung = Fake::scripted("w1", |_| Do::Hang).await;
    let other = Fake::start("w2").await;
    let mut world = World::new(&[&hung]);
    let router = world.router.clone();
    let request = tokio::spawn(async move { answered(&router).await });
    hung.has_seen(|seen| matches!(seen, Seen::Infer(_))).await;
    world.publish(&[&other]);
    assert_eq!(request.await.unwrap().id, "7");
    hung.cancellation().await;
}

#[tokio::test]
async fn full_queues_are_left_twice_and_then_told() {
    let workers =
        futures::future::join_all(["w1", "w2", "w3", "w4"].map(|id| Fake::scripted(id, |_| Do::Refuse(Reason::QueueFull)))).await;
    let world = World::new(&workers.iter().collect::<Vec<_>>());
    let status = refused(&world.router, plain(1)).await;
    assert_eq!((status.code(), Reason::of(&status)), (Code::Unavailable, Some(Reason::QueueFull)));
    assert_eq!(workers.iter().map(Fake::infers).sum::<usize>(), 3);
    let rich = CallOptions { rich_status: true, ..CallOptions::default() };
    assert_eq!(world.router.infer(plain(1), &rich).await.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn an_error_of_the_request_itself_is_told_at_once() {
    for reason in [Reason::InvalidArgument, Reason::ModelFailed, Reason::QueueTimeout] {
        let workers =
            [Fake::scripted("w1", move |_| Do::Refuse(reason)).await, Fake::scripted("w2", move |_| Do::Refuse(reason)).await];
        let world = World::new(&[&workers[0], &workers[1]]);
        let status = refused(&world.router, plain(1)).await;
        assert_eq!((status.code(), Reason::of(&status)), (reason.code(), Some(reason)));
        assert_eq!(workers[0].infers() + workers[1].infers(), 1);
    }
}

#[tokio::test]
async fn a_request_that_kills_its_workers_is_stopped() {
    let workers = futures::future::join_all(["w1", "w2", "w3", "w4", "w5", "w6"].map(|id| Fake::scripted(id, |_| Do::Die))).await;
    let world = World::new(&workers.iter().collect::<Vec<_>>());
    assert_eq!(refused(&world.router, plain(1)).await.code(), Code::Unavailable);
    assert_eq!(workers.iter().map(Fake::infers).sum::<usize>(), 4, "once, and three moves");
}

#[tokio::test]
async fn without_a_replica_a_request_waits_for_newer_routes() {
    let worker = Fake::start("w1").await;
    let mut world = World::new(&[]);
    let router = world.router.clone();
    let request = tokio::spawn(async move { answered(&router).await });
    world.publish(&[&worker]);
    assert_eq!(request.await.unwrap().id, "7");
}

#[tokio::test(start_paused = true)]
async fn without_any_replica_it_says_so_in_the_end() {
    let world = World::new(&[]);
    let started = Instant::now();
    let status = refused(&world.router, ModelInferRequest { model_name: "late".into(), ..Default::default() }).await;
    assert_eq!((status.code(), Reason::of(&status)), (Code::Unavailable, Some(Reason::NoReplica)));
    assert_eq!(status.message(), "Request for unknown model: 'late' version 1 is not at ready state");
    assert_eq!(started.elapsed(), RouterSettings::default().route_wait);

    let options = CallOptions { deadline: Some(Instant::now() + Duration::from_millis(300)), ..CallOptions::default() };
    let status = world.router.infer(plain(1), &options).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
}

#[tokio::test]
async fn an_only_replica_that_fails_is_tried_again() {
    let failures = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&failures);
    let worker = Fake::scripted("w1", move |_| match count.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
        0 | 1 => Do::Refuse(Reason::DeviceUnhealthy),
        _ => Do::Go,
    })
    .await;
    let world = World::new(&[&worker]);
    answered(&world.router).await;
    assert_eq!(worker.infers(), 3);
}

#[tokio::test]
async fn what_is_not_there_is_named_as_triton_names_it() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let request = |model: &str, version: &str| ModelInferRequest {
        model_name: model.into(),
        model_version: version.into(),
        ..Default::default()
    };
    let cases = [
        (request("nope", ""), Code::NotFound, "Request for unknown model: 'nope' is not found"),
        (request("plain", "9"), Code::NotFound, "Request for unknown model: 'plain' version 9 is not found"),
        (request("many", ""), Code::Unimplemented, "ModelInfer RPC doesn't support models with decoupled transaction policy"),
        (
            request("seq", ""),
            Code::InvalidArgument,
            "inference request to model 'seq' must specify a non-zero or non-empty correlation ID",
        ),
        (
            step(7, 2),
            Code::InvalidArgument,
            "inference request for sequence 7 to model 'seq' must specify the START flag on the first request of the sequence",
        ),
    ];
    for (request, code, text) in cases {
        let status = refused(&world.router, request).await;
        assert_eq!((status.code(), status.message()), (code, text));
    }
    assert_eq!(refused(&world.router, request("plain", "latest")).await.code(), Code::InvalidArgument);
    assert_eq!(worker.infers(), 0);
}

#[tokio::test]
async fn a_caller_that_hangs_up_is_heard_by_the_worker() {
    let worker = Fake::scripted("w1", |_| Do::Hang).await;
    let world = World::new(&[&worker]);
    let router = world.router.clone();
    let request = tokio::spawn(async move { answered(&router).await });
    worker.has_seen(|seen| matches!(seen, Seen::Infer(_))).await;
    request.abort();
    worker.cancellation().await;
    assert!(request.await.unwrap_err().is_cancelled());
    assert_eq!(world.router.routes().workers().map(|replica| replica.in_flight()).sum::<u32>(), 0);
}

#[tokio::test]
async fn a_deadline_ends_the_request_here_and_at_the_worker() {
    let worker = Fake::scripted("w1", |_| Do::Hang).await;
    let world = World::new(&[&worker]);
    let options = CallOptions { deadline: Some(Instant::now() + Duration::from_millis(200)), ..CallOptions::default() };
    let status = world.router.infer(plain(1), &options).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::DeadlineExceeded, Some(Reason::DeadlineExceeded)));
    worker.cancellation().await;
}

#[tokio::test]
async fn load_spreads_by_what_is_in_flight() {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let script = |gate: &Arc<tokio::sync::Semaphore>| {
        let gate = Arc::clone(gate);
        move |_: &Seen| Do::WaitFor(Arc::clone(&gate))
    };
    let workers = [Fake::scripted("w1", script(&gate)).await, Fake::scripted("w2", script(&gate)).await];
    let world = World::new(&[&workers[0], &workers[1]]);
    let requests: Vec<_> = (0..20)
        .map(|_| {
            let router = world.router.clone();
            tokio::spawn(async move { answered(&router).await })
        })
        .collect();
    while workers.iter().map(Fake::infers).sum::<usize>() < 20 {
        tokio::task::yield_now().await;
    }
    assert_eq!((workers[0].infers(), workers[1].infers()), (10, 10));
    gate.add_permits(20);
    for request in requests {
        request.await.unwrap();
    }
}

#[tokio::test]
async fn a_request_that_comes_again_with_its_id_is_not_run_again() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let with_id = |id: &str, own: u64| {
        let mut request = plain(own);
        request.parameters.insert("cresset_request_id".into(), parameters::string_parameter(id));
        request
    };
    let elsewhere = world.router.with_own_connections();
    for (router, own) in [(&world.router, 7), (&world.router, 8), (&elsewhere, 9)] {
        let answer = router.infer(with_id("a", own), &CallOptions::default()).await.unwrap();
        assert_eq!(answer.id, own.to_string(), "the answer belongs to the request that it comes for");
    }
    assert_eq!(worker.infers(), 1);
    world.router.infer(with_id("b", 7), &CallOptions::default()).await.unwrap();
    world.router.infer(with_id("", 7), &CallOptions::default()).await.unwrap();
    world.router.infer(with_id("", 7), &CallOptions::default()).await.unwrap();
    assert_eq!(worker.infers(), 4);
    let refused = refused(&world.router, with_id(&"x".repeat(129), 7)).await;
    assert_eq!(refused.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn an_outage_is_not_made_worse_by_requests_that_are_run_again() {
    const REQUESTS: usize = 1_500;
    let [one, other] = [
        Fake::scripted("w1", |_| Do::Refuse(Reason::Internal)).await,
        Fake::scripted("w2", |_| Do::Refuse(Reason::Internal)).await,
    ];
    let world = World::new(&[&one, &other]);
    let begun = std::time::Instant::now();
    for _ in 0..REQUESTS / 100 {
        let calls = (0..100).map(|_| refused(&world.router, plain(1)));
        assert!(futures::future::join_all(calls).await.iter().all(|status| Reason::of(status) == Some(Reason::Internal)));
    }
    let again = one.infers() + other.infers() - REQUESTS;
    let came = REQUESTS / 5 + 50 * (1 + begun.elapsed().as_secs() as usize);
    let saved = crate::retry::allowance::SAVED_MAX as usize;
    // A hundred that run at a time may each have seen the last one.
    assert!((saved..=saved + came + 100).contains(&again), "{again} were run again");
}

/// A world in which requests may have a second copy, and so many requests were answered.
async fn hedging(workers: &[&Fake], answers: usize) -> World {
    let world = World::with(workers, IDLE_US, RouterSettings { hedging: true, ..RouterSettings::default() });
    for _ in 0..answers {
        answered(&world.router).await;
    }
    world
}

#[tokio::test]
async fn a_request_that_takes_long_has_a_second_copy_and_the_first_one_is_cancelled() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let world = hedging(&[&workers[0], &workers[1]], 200).await;
    let before = world.router.counts().hedges();
    workers[0].rescript(|_| Do::Hang);
    let infers = workers[0].infers();
    while workers[0].infers() == infers {
        assert_eq!(answered(&world.router).await.id, "7");
    }
    workers[0].cancellation().await;
    let counts = world.router.counts();
    assert!(counts.hedges() > before && counts.hedges_won() > 0, "{counts:?}");
    assert!(world.router.routes().workers().all(|replica| replica.in_flight() == 0));
}

#[tokio::test]
async fn no_more_than_one_request_in_twenty_has_a_second_copy() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let world = hedging(&[&workers[0], &workers[1]], 400).await;
    let copies = world.router.counts().hedges();
    assert!(copies <= 20, "{copies}");
    assert_eq!(workers[0].infers() + workers[1].infers(), 400 + usize::try_from(copies).unwrap());

    let calm = World::new(&[&workers[0], &workers[1]]);
    for _ in 0..100 {
        answered(&calm.router).await;
    }
    assert_eq!(calm.router.counts().hedges(), 0, "off by default");
}

#[tokio::test]
async fn a_second_copy_that_fails_is_not_told_to_the_caller() {
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let world = hedging(&[&workers[0], &workers[1]], 200).await;
    // Whoever is asked first lets it wait, and whoever is asked second refuses.
    let asked = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    for worker in &workers {
        let (gate, asked) = (Arc::clone(&gate), Arc::clone(&asked));
        worker.rescript(move |_| match asked.fetch_add(1, std::sync::atomic::Ordering::SeqCst) {
            0 => Do::WaitFor(Arc::clone(&gate)),
            _ => {
                gate.add_permits(1);
                Do::Refuse(Reason::InvalidArgument)
            }
        });
    }
    assert_eq!(answered(&world.router).await.id, "7");
    assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 2);
}
