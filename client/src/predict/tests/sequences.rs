//! Sequences: each answer once, in order, and right, whatever dies.
use cresset_proto::reason::Reason;
use tonic::Code;

use super::*;
use crate::fake::{Do, Seen, fold, number};

/// The answers that sequence 1, 2, …, `count` must have.
fn expected(count: u64) -> Vec<(String, u64)> {
    let mut state = 0;
    let answer = |id: u64| {
        state = fold(state, id);
        (id.to_string(), state)
    };
    (1..=count).map(answer).collect()
}

/// Runs a whole sequence; `window` requests may be unanswered.
async fn run(router: &Router, sequence: i64, count: u64, window: usize) -> Vec<(String, u64)> {
    let mut waiting = std::collections::VecDeque::new();
    let mut answers = Vec::new();
    for id in 1..=count {
        let request = if id == count { last(step(sequence, id)) } else { step(sequence, id) };
        waiting.push_back(router.submit(request, &CallOptions::default()).await.unwrap());
        if waiting.len() >= window {
            answers.push(received(waiting.pop_front().unwrap()).await.unwrap());
        }
    }
    for answer in waiting {
        answers.push(received(answer).await.unwrap());
    }
    answers.iter().map(|response| (response.id.clone(), number(response))).collect()
}

/// A worker that dies when it sees this.
async fn mortal(id: &str, dies: impl Fn(&Seen) -> bool + Send + Sync + 'static) -> Fake {
    Fake::scripted(id, move |seen| if dies(seen) { Do::Die } else { Do::Go }).await
}

#[tokio::test]
async fn a_sequence_sticks_to_its_worker() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await, Fake::start("w3").await];
    let world = World::new(&[&workers[0], &workers[1], &workers[2]]);
    assert_eq!(run(&world.router, 7, 30, 1).await, expected(30));
    let opens: Vec<usize> = workers.iter().map(|worker| worker.opens().len()).collect();
    assert_eq!(opens.iter().sum::<usize>(), 1, "{opens:?}");
    let mut live = world.router.sequences_live();
    live.wait_for(|live| *live == 0).await.unwrap();
}

#[tokio::test]
async fn many_sequences_do_not_mix() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let world = World::new(&[&workers[0], &workers[1]]);
    let all = (1..=40).map(|sequence| run(&world.router, sequence, 20, 3));
    for answers in futures::future::join_all(all).await {
        assert_eq!(answers, expected(20));
    }
}

/// The worker that the sequence is on dies at each point in turn; another one goes on.
async fn dies_everywhere(window: usize) {
    const COUNT: u64 = 20;
    for at in 1..=COUNT {
        for answered in [false, true] {
            let dies = move |seen: &Seen| match seen {
                Seen::Step(id) => !answered && *id == at,
                Seen::Answered(id) => answered && *id == at,
                Seen::Infer(_) | Seen::Open(_) | Seen::Many(_) | Seen::Response(..) | Seen::Live => false,
            };
            let first = mortal("w1", dies).await;
            let second = Fake::start("w2").await;
            let mut world = World::new(&[&first]);
            let router = world.router.clone();
            let answers = tokio::spawn(async move { run(&router, 7, COUNT, window).await });
            first.has_seen(|seen| matches!(seen, Seen::Open(_))).await;
            world.publish(&[&first, &second]);
            assert_eq!(answers.await.unwrap(), expected(COUNT), "died at {at}, answered {answered}, window {window}");
            // What was under way when it died may include the answer with the newest checkpoint.
            let kept = 8 + u64::try_from(window).unwrap();
            for open in second.opens() {
                assert!(open.checkpoint_ordinal + kept >= at, "the journal stays short: {open:?} at {at}");
            }
        }
    }
}

#[tokio::test]
async fn a_worker_may_die_at_any_point_of_a_sequence() {
    dies_everywhere(1).await;
}

#[tokio::test]
async fn a_worker_may_die_at_any_point_of_a_pipelined_sequence() {
    dies_everywhere(6).await;
}

#[tokio::test]
async fn a_worker_may_die_between_two_requests() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await, Fake::start("w3").await];
    let world = World::new(&[&workers[0], &workers[1], &workers[2]]);
    let expected = expected(30);
    for id in 1..=30 {
        let answer = world.router.infer(step(7, id), &CallOptions::default()).await.unwrap();
        assert_eq!((answer.id.clone(), number(&answer)), expected[id as usize - 1]);
        if id == 10 || id == 20 {
            let holder = workers
                .iter()
                .filter(|worker| !worker.opens().is_empty())
                .max_by_key(|worker| worker.seen().iter().filter(|seen| matches!(seen, Seen::Step(step) if *step == id)).count());
            holder.unwrap().die();
        }
    }
}

#[tokio::test]
async fn with_every_worker_dead_a_sequence_waits_for_a_new_one() {
    let workers =
        [mortal("w1", |seen| matches!(seen, Seen::Step(9))).await, mortal("w2", |seen| matches!(seen, Seen::Step(9))).await];
    let mut world = World::new(&[&workers[0], &workers[1]]);
    let router = world.router.clone();
    let answers = tokio::spawn(async move { run(&router, 7, 20, 4).await });
    for worker in &workers {
        worker.has_seen(|seen| matches!(seen, Seen::Step(9))).await;
    }
    let third = Fake::start("w3").await;
    world.publish(&[&third]);
    assert_eq!(answers.await.unwrap(), expected(20));
}

#[tokio::test]
async fn a_fence_and_a_full_worker_are_left() {
    for reason in [Reason::Fenced, Reason::NotHere, Reason::SequencesFull, Reason::Draining, Reason::BadCheckpoint] {
        let good = Fake::start("w1").await;
        let bad = Fake::scripted("w2", move |seen| if matches!(seen, Seen::Open(_)) { Do::Refuse(reason) } else { Do::Go }).await;
        let world = World::new(&[&good, &bad]);
        let mut sequence = 0;
        while bad.opens().is_empty() {
            sequence += 1;
            assert_eq!(run(&world.router, sequence, 10, 3).await, expected(10), "{reason}");
        }
    }
}

#[tokio::test]
async fn a_worker_that_leaves_in_the_middle_is_followed_by_another() {
    let leaving = |seen: &Seen| if matches!(seen, Seen::Step(5)) { Do::Refuse(Reason::Draining) } else { Do::Go };
    let first = Fake::scripted("w1", leaving).await;
    let mut world = World::new(&[&first]);
    let router = world.router.clone();
    let answers = tokio::spawn(async move { run(&router, 7, 12, 4).await });
    first.has_seen(|seen| matches!(seen, Seen::Step(5))).await;
    let second = Fake::start("w2").await;
    world.publish(&[&second]);
    assert_eq!(answers.await.unwrap(), expected(12));
}

#[tokio::test]
async fn a_request_that_fails_is_answered_so_and_the_sequence_goes_on_without_it() {
    let fails = |seen: &Seen| if matches!(seen, Seen::Step(3)) { Do::Fail(Reason::ModelFailed) } else { Do::Go };
    let first = Fake::scripted("w1", fails).await;
    let mut world = World::new(&[&first]);
    let mut state = 0;
    for id in 1..=12 {
        let answer = world.router.infer(step(7, id), &CallOptions::default()).await;
        if id == 3 {
            let status = answer.unwrap_err();
            assert_eq!(
                (status.code(), Reason::of(&status), status.message()),
                (Code::Internal, Some(Reason::ModelFailed), "3 fails")
            );
            continue;
        }
        state = fold(state, id);
        assert_eq!(number(&answer.unwrap()), state);
        if id == 6 {
            // The next worker must not be given request 3: there it would succeed.
            let second = Fake::start("w2").await;
            world.publish(&[&second]);
        }
    }
}

#[tokio::test]
async fn a_replay_that_goes_wrong_is_moved_again() {
    let first = mortal("w1", |seen| matches!(seen, Seen::Answered(6))).await;
    let wrong =
        Fake::scripted("w2", |seen| if matches!(seen, Seen::Step(2)) { Do::Fail(Reason::QueueTimeout) } else { Do::Go }).await;
    let mut world = World::new(&[&first]);
    let router = world.router.clone();
    let answers = tokio::spawn(async move { run(&router, 7, 7, 1).await });
    first.has_seen(|seen| matches!(seen, Seen::Step(6))).await;
    world.publish(&[&wrong]);
    wrong.has_seen(|seen| matches!(seen, Seen::Step(2))).await;
    wrong.rescript(|_| Do::Go);
    assert_eq!(answers.await.unwrap(), expected(7));
}

#[tokio::test]
async fn start_again_drops_the_old_sequence() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    for _ in 0..3 {
        let answer = world.router.infer(step(7, 1), &CallOptions::default()).await.unwrap();
        assert_eq!(number(&answer), fold(0, 1));
        let answer = world.router.infer(step(7, 2), &CallOptions::default()).await.unwrap();
        assert_eq!(number(&answer), fold(fold(0, 1), 2));
    }
    assert_eq!(*world.router.sequences_live().borrow(), 1);
}

#[tokio::test]
async fn after_its_end_or_its_idle_time_a_sequence_must_start_again() {
    let worker = Fake::start("w1").await;
    let world = World::with(&[&worker], 1_000, RouterSettings::default());
    run(&world.router, 7, 3, 1).await;
    let status = world.router.infer(step(7, 4), &CallOptions::default()).await.unwrap_err();
    assert_eq!(Reason::of(&status), Some(Reason::SequenceNotStarted));

    world.router.infer(step(8, 1), &CallOptions::default()).await.unwrap();
    world.router.sequences_live().wait_for(|live| *live == 0).await.unwrap();
    let status = world.router.infer(step(8, 2), &CallOptions::default()).await.unwrap_err();
    assert_eq!(Reason::of(&status), Some(Reason::SequenceNotStarted));
}

#[tokio::test]
async fn a_model_deployed_anew_ends_the_sequence() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    world.router.infer(step(7, 1), &CallOptions::default()).await.unwrap();
    let mut newer = routes(2, &[&worker], IDLE_US);
    newer.models.iter_mut().for_each(|model| model.generation = 2);
    worker.rescript(|seen| if matches!(seen, Seen::Step(2)) { Do::Refuse(Reason::NotHere) } else { Do::Go });
    world.table.publish(&newer).unwrap();
    let status = world.router.infer(step(7, 2), &CallOptions::default()).await.unwrap_err();
    assert_eq!(Reason::of(&status), Some(Reason::SequenceNotStarted));
    assert!(status.message().contains("deployed anew"), "{status}");
}

#[tokio::test]
async fn sequences_and_their_requests_are_bounded() {
    let worker = Fake::start("w1").await;
    let settings =
        RouterSettings { sessions_max: 2, session_requests_max: 2, session_bytes_max: 16, ..RouterSettings::default() };
    let world = World::with(&[&worker], IDLE_US, settings);
    assert_eq!(run(&world.router, 1, 30, 2).await, expected(30));
    for sequence in [2, 3] {
        world.router.infer(step(sequence, 1), &CallOptions::default()).await.unwrap();
    }
    let status = world.router.infer(step(4, 1), &CallOptions::default()).await.unwrap_err();
    assert_eq!((status.code(), Reason::of(&status)), (Code::Unavailable, Some(Reason::SequencesFull)));
}

#[tokio::test]
async fn a_full_journal_waits_for_its_checkpoint() {
    let worker = Fake::start("w1").await;
    let mut settings = RouterSettings::default();
    settings.journal.bytes_max = 3 * prost::Message::encoded_len(&step(7, 1));
    settings.journal.checkpoint_requests = 2;
    let world = World::with(&[&worker], IDLE_US, settings.clone());
    assert_eq!(run(&world.router, 7, 40, 10).await, expected(40));

    // A worker that gives no checkpoints: the sequence says so rather than promise what it can't keep.
    settings.journal.checkpoint_requests = 1_000;
    let world = World::with(&[&worker], IDLE_US, settings);
    for id in 1..=3 {
        world.router.infer(step(7, id), &CallOptions::default()).await.unwrap();
    }
    let status = world.router.infer(step(7, 4), &CallOptions::default()).await.unwrap_err();
    assert!(status.message().contains("journal_bytes_max"), "{status}");
}

#[tokio::test]
async fn a_deadline_passes_while_no_worker_is_there_and_nothing_is_lost() {
    let worker = Fake::start("w1").await;
    let mut world = World::new(&[]);
    let options = CallOptions { deadline: Some(Instant::now() + std::time::Duration::from_millis(50)), ..CallOptions::default() };
    let status = world.router.infer(step(7, 1), &options).await.unwrap_err();
    assert_eq!(status.code(), Code::DeadlineExceeded);
    world.publish(&[&worker]);
    // The request kept its place: what follows is answered as if it had been run, and now it has been.
    let answer = world.router.infer(step(7, 2), &CallOptions::default()).await.unwrap();
    assert_eq!(number(&answer), fold(fold(0, 1), 2));
}
