//! Sequences whose client comes back by way of another router.
use cresset_proto::{parameters::keys, reason::Reason};

use super::*;
use crate::fake::{Do, Seen, fold, number};

/// Request `ordinal` of sequence 7 of a stream, by its client's connection number `attempt`.
fn marked(ordinal: u64, ack: u64, attempt: i64) -> ModelInferRequest {
    let mut request = step(7, ordinal);
    let int = |number: u64| parameters::int64_parameter(i64::try_from(number).unwrap());
    request.parameters.insert(keys::STREAM_ID.into(), parameters::string_parameter("stream"));
    request.parameters.insert(keys::ORDINAL.into(), int(ordinal));
    request.parameters.insert(keys::ACK.into(), int(ack));
    request.parameters.insert(keys::ATTEMPT.into(), parameters::int64_parameter(attempt));
    request
}

fn expected(count: u64) -> Vec<u64> {
    let next = |state: &mut u64, id| {
        *state = fold(*state, id);
        Some(*state)
    };
    (1..=count).scan(0, next).collect()
}

async fn ask(router: &Router, request: ModelInferRequest) -> Result<u64, Status> {
    router.infer(request, &CallOptions::default()).await.map(|response| number(&response))
}

fn reason<T: std::fmt::Debug>(result: Result<T, Status>) -> Option<Reason> {
    Reason::of(&result.unwrap_err())
}

/// Two routers of one cluster, and what a client sees that was at the first until `asked` requests were asked, `had` were
/// answered as far as it knows, and then goes on at the second.
async fn goes_on(workers: &[&Fake], asked: u64, had: u64, count: u64) -> Vec<u64> {
    let (first, second) = (World::new(workers), World::new(workers));
    let mut answers = Vec::new();
    for ordinal in 1..=asked {
        answers.push(ask(&first.router, marked(ordinal, ordinal.min(had + 1) - 1, 1)).await.unwrap());
    }
    answers.truncate(usize::try_from(had).unwrap());
    for ordinal in had + 1..=count {
        answers.push(ask(&second.router, marked(ordinal, ordinal - 1, 2)).await.unwrap());
    }
    answers
}

#[tokio::test]
async fn a_client_goes_on_by_way_of_another_router_wherever_it_was() {
    for asked in [1_u64, 2, 7, 8, 9, 16] {
        for had in asked.saturating_sub(5)..=asked {
            let worker = Fake::start("w1").await;
            assert_eq!(goes_on(&[&worker], asked, had, 20).await, expected(20), "asked {asked}, had {had}");
            let steps = worker.seen().iter().filter(|seen| matches!(seen, Seen::Step(_))).count();
            // Nothing is run twice, except that a sequence of which the client has nothing begins anew.
            assert_eq!(steps, if had == 0 { 20 + usize::try_from(asked).unwrap() } else { 20 });
        }
    }
}

#[tokio::test]
async fn the_worker_is_found_among_many_and_may_be_gone_from_where_sequences_belong() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await, Fake::start("w3").await, Fake::start("w4").await];
    let all: Vec<&Fake> = workers.iter().collect();
    for only in &workers {
        let first = World::new(&[only]);
        for ordinal in 1..=10 {
            ask(&first.router, marked(ordinal, ordinal - 1, 1)).await.unwrap();
        }
        let second = World::new(&all);
        assert_eq!(ask(&second.router, marked(11, 10, 2)).await.unwrap(), expected(11)[10], "on {}", only.id);
        // Another worker may have an older state of it, and must not be asked to go on from there.
        only.forget();
        let third = World::new(&all);
        let again = ask(&third.router, marked(12, 11, 3)).await;
        match again {
            Ok(answer) => assert_eq!(answer, expected(12)[11]),
            Err(status) => assert_eq!(Reason::of(&status), Some(Reason::SequenceLost)),
        }
        workers.iter().for_each(Fake::forget);
    }
}

#[tokio::test]
async fn a_worker_may_die_after_the_router_did() {
    for at in 9..=14 {
        let workers = [Fake::start("w1").await, Fake::start("w2").await];
        let first = World::new(&[&workers[0]]);
        for ordinal in 1..=8 {
            ask(&first.router, marked(ordinal, ordinal.saturating_sub(3), 1)).await.unwrap();
        }
        workers[0].rescript(move |seen| if matches!(seen, Seen::Step(id) if *id == at) { Do::Die } else { Do::Go });
        let mut second = World::new(&[&workers[0]]);
        let mut answers = Vec::new();
        for ordinal in 6..=8 {
            answers.push(ask(&second.router, marked(ordinal, 5, 2)).await.unwrap());
        }
        second.publish(&[&workers[0], &workers[1]]);
        for ordinal in 9..=16 {
            answers.push(ask(&second.router, marked(ordinal, 5, 2)).await.unwrap());
        }
        assert_eq!(answers, expected(16)[5..], "died at {at}");
        // And then the second router: the worker that got the sequence has got the answers with it.
        let third = World::new(&[&workers[1]]);
        for ordinal in 6..=18 {
            assert_eq!(ask(&third.router, marked(ordinal, 5, 3)).await.unwrap(), expected(18)[ordinal as usize - 1]);
        }
    }
}

#[tokio::test]
async fn when_nobody_has_it_the_client_hears_so_and_may_send_it_all_again() {
    let worker = Fake::start("w1").await;
    let first = World::new(&[&worker]);
    for ordinal in 1..=5 {
        ask(&first.router, marked(ordinal, ordinal - 1, 1)).await.unwrap();
    }
    worker.forget();
    let second = World::new(&[&worker]);
    assert_eq!(reason(ask(&second.router, marked(6, 5, 2)).await), Some(Reason::SequenceLost));
    let again = (1..=6).map(|ordinal| marked(ordinal, ordinal - 1, 2));
    let mut answers = Vec::new();
    for request in again {
        answers.push(ask(&second.router, request).await.unwrap());
    }
    assert_eq!(answers, expected(6));
}

#[tokio::test]
async fn an_older_connection_is_refused_once_a_later_one_went_on() {
    let worker = Fake::start("w1").await;
    let (first, second) = (World::new(&[&worker]), World::new(&[&worker]));
    for ordinal in 1..=4 {
        ask(&first.router, marked(ordinal, ordinal - 1, 1)).await.unwrap();
    }
    ask(&second.router, marked(4, 3, 2)).await.unwrap();
    // Its router doesn't know yet, and its worker does.
    assert_eq!(reason(ask(&first.router, marked(5, 4, 1)).await), Some(Reason::TakenOver));
    assert_eq!(reason(ask(&first.router, marked(6, 4, 1)).await), Some(Reason::TakenOver));
    assert_eq!(ask(&second.router, marked(5, 4, 2)).await.unwrap(), expected(5)[4]);
    // Back at the first router, which has an old state of it.
    assert_eq!(ask(&first.router, marked(6, 5, 3)).await.unwrap(), expected(6)[5]);
}

#[tokio::test]
async fn a_connection_may_break_while_its_router_lives() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let permits = Arc::new(tokio::sync::Semaphore::new(0));
    let held = Arc::clone(&permits);
    worker.rescript(move |seen| if matches!(seen, Seen::Step(3)) { Do::WaitFor(Arc::clone(&held)) } else { Do::Go });
    let mut old = Vec::new();
    for ordinal in 1..=4 {
        old.push(world.router.submit(marked(ordinal, 0, 1), &CallOptions::default()).await.unwrap());
    }
    worker.has_seen(|seen| matches!(seen, Seen::Step(3))).await;
    // The client has the first answer; the second is known, the third under way, the fourth waits.
    let mut new = Vec::new();
    for ordinal in 2..=5 {
        new.push(world.router.submit(marked(ordinal, 1, 2), &CallOptions::default()).await.unwrap());
    }
    permits.add_permits(1);
    for (answer, expected) in new.into_iter().zip(&expected(5)[1..]) {
        assert_eq!(number(&received(answer).await.unwrap()), *expected);
    }
    let steps = worker.seen().iter().filter(|seen| matches!(seen, Seen::Step(_))).count();
    assert_eq!(steps, 5);
    drop(old);
    // A request that still comes by the old connection doesn't count.
    assert_eq!(reason(ask(&world.router, marked(5, 1, 1)).await), Some(Reason::TakenOver));
}

#[tokio::test]
async fn a_client_that_does_not_acknowledge_is_refused_before_anything_is_lost() {
    let worker = Fake::start("w1").await;
    let kept = crate::kept::Limits { answers_max: 3, bytes_max: 1 << 20 };
    let world = World::with(&[&worker], IDLE_US, RouterSettings { kept, ..RouterSettings::default() });
    for ordinal in 1..=3 {
        ask(&world.router, marked(ordinal, 0, 1)).await.unwrap();
    }
    let refused = ask(&world.router, marked(4, 0, 1)).await.unwrap_err();
    assert!(refused.message().contains("send cresset_ack"), "{refused}");
    // Its number isn't used again, and the sequence goes on.
    let next = ask(&world.router, marked(5, 3, 1)).await.unwrap();
    assert_eq!(next, fold(expected(3)[2], 5));
    let second = World::new(&[&worker]);
    assert_eq!(ask(&second.router, marked(6, 5, 2)).await.unwrap(), fold(next, 6));
}

#[tokio::test]
async fn marks_that_make_no_sense_are_refused() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    for (ordinal, ack) in [(0, 0), (1, 1)] {
        let status = ask(&world.router, ModelInferRequest { id: "1".into(), ..marked(ordinal, ack, 1) }).await.unwrap_err();
        assert!(status.message().contains("'cresset_ordinal'"), "{status}");
    }
}

#[tokio::test]
async fn the_rest_of_a_decoupled_answer_can_be_asked_for() {
    use futures::StreamExt;
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let mut request = many(5, 6);
    request.parameters.insert(keys::ACK.into(), parameters::int64_parameter(4));
    let stream = world.router.stream(futures::stream::iter([Ok(request)]), CallOptions::default());
    let answers: Vec<u64> = stream.map(|answer| number(&answer.unwrap().infer_response.unwrap())).collect().await;
    assert_eq!(answers, [fold(5, 4), fold(5, 5)]);
}
