//! Requests of decoupled models: any number of responses, each once.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cresset_proto::{inference::infer_parameter::ParameterChoice, reason::Reason};
use futures::{StreamExt, stream};
use tokio::sync::Semaphore;

use super::*;
use crate::fake::{Do, Seen, fold, number};

type Answers = Vec<Result<ModelStreamInferResponse, Status>>;

fn ask(
    router: &Router,
    requests: Vec<ModelInferRequest>,
) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + use<> {
    router.stream(stream::iter(requests.into_iter().map(Ok)), CallOptions::default())
}

/// The answers to request `id`, without an end that was asked for.
fn numbers(answers: &Answers, id: u64) -> Vec<u64> {
    let responses = answers.iter().map(|answer| answer.as_ref().unwrap()).inspect(|answer| assert_eq!(answer.error_message, ""));
    let responses = responses.filter_map(|answer| answer.infer_response.as_ref());
    responses.filter(|response| response.id == id.to_string() && !is_final(response)).map(number).collect()
}

fn is_final(response: &ModelInferResponse) -> bool {
    let value = response.parameters.get("triton_final_response").and_then(|value| value.parameter_choice.as_ref());
    matches!(value, Some(ParameterChoice::BoolParam(true)))
}

fn expected(id: u64, count: u64) -> Vec<u64> {
    (0..count).map(|index| fold(id, index)).collect()
}

#[tokio::test]
async fn a_request_is_answered_any_number_of_times_and_says_its_end_to_who_asks() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let answers: Answers = ask(&world.router, vec![many(1, 5), many(2, 0), many(3, 1)]).collect().await;
    assert_eq!(answers.len(), 6, "no end was asked for: {answers:?}");
    assert_eq!((numbers(&answers, 1), numbers(&answers, 3)), (expected(1, 5), expected(3, 1)));
    let asking = [many(1, 2), many(2, 0)].map(|mut request| {
        request.parameters.insert("triton_enable_empty_final_response".into(), parameters::bool_parameter(true));
        request
    });
    let answers: Answers = ask(&world.router, asking.to_vec()).collect().await;
    assert_eq!(answers.len(), 4);
    for id in ["1", "2"] {
        let all = answers.iter().flatten().filter_map(|answer| answer.infer_response.as_ref());
        let ends: Vec<bool> = all.filter(|response| response.id == id).map(is_final).collect();
        assert!(ends.ends_with(&[true]) && ends.iter().filter(|end| **end).count() == 1, "{ends:?}");
    }
}

#[tokio::test]
async fn responses_go_on_after_the_last_delivered_one_when_the_worker_dies() {
    for at in [0, 1, 7, 19] {
        // The first to get so far dies; it may be either.
        let died = Arc::new(AtomicBool::new(false));
        let mortal = |id: &'static str| {
            let died = Arc::clone(&died);
            Fake::scripted(id, move |seen| match seen {
                Seen::Response(_, index) if *index == at && !died.swap(true, Ordering::SeqCst) => Do::Die,
                _ => Do::Go,
            })
        };
        let workers = [mortal("w1").await, mortal("w2").await];
        let world = World::new(&[&workers[0], &workers[1]]);
        let answers: Answers = ask(&world.router, vec![many(4, 20)]).collect().await;
        assert_eq!(numbers(&answers, 4), expected(4, 20), "killed at {at}");
        let runs = |worker: &Fake| worker.seen().iter().filter(|seen| matches!(seen, Seen::Many(4))).count();
        assert_eq!(runs(&workers[0]) + runs(&workers[1]), 2);
    }
}

#[tokio::test]
async fn a_stream_that_just_ends_is_not_taken_for_the_last_response() {
    let refused = Arc::new(AtomicBool::new(false));
    let once = Arc::clone(&refused);
    let worker = Fake::scripted("w1", move |seen| match seen {
        Seen::Response(_, 2) if !once.swap(true, Ordering::SeqCst) => Do::Refuse(Reason::Draining),
        _ => Do::Go,
    })
    .await;
    let world = World::new(&[&worker]);
    let answers: Answers = ask(&world.router, vec![many(4, 4)]).collect().await;
    assert_eq!(numbers(&answers, 4), expected(4, 4));
    assert!(refused.load(Ordering::SeqCst));
}

#[tokio::test]
async fn an_error_ends_its_request_and_nothing_else() {
    let worker = Fake::scripted("w1", |seen| match seen {
        Seen::Response(1, 2) => Do::Refuse(Reason::ModelFailed),
        _ => Do::Go,
    })
    .await;
    let world = World::new(&[&worker]);
    let answers: Answers = ask(&world.router, vec![many(1, 5), many(2, 3)]).collect().await;
    assert_eq!(
        numbers(&answers.iter().filter(|a| a.as_ref().unwrap().error_message.is_empty()).cloned().collect(), 1),
        expected(1, 2)
    );
    let failed: Vec<_> = answers.iter().flatten().filter(|answer| !answer.error_message.is_empty()).collect();
    assert_eq!(failed.len(), 1);
    assert_eq!(failed[0].error_message, "w1 refuses");
    assert!(is_final(failed[0].infer_response.as_ref().unwrap()));
}

#[tokio::test]
async fn a_model_that_answers_otherwise_the_second_time_is_told_so() {
    let first = Fake::scripted("w1", |seen| if matches!(seen, Seen::Response(_, 3)) { Do::Hang } else { Do::Go }).await;
    let mut world = World::new(&[&first]);
    let counts = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&counts);
    let mut answers = Box::pin(ask(&world.router, vec![many(1, 9)]).inspect(move |_| {
        seen.fetch_add(1, Ordering::SeqCst);
    }));
    for index in 0..3 {
        assert_eq!(number(answers.next().await.unwrap().unwrap().infer_response.as_ref().unwrap()), fold(1, index));
    }
    let second = Fake::start("w2").await;
    second.answers_at_most(1);
    first.die();
    world.publish(&[&second]);
    let last = answers.next().await.unwrap().unwrap();
    assert!(last.error_message.contains("gave only 1 responses when the request was run again after 3"), "{last:?}");
    assert!(answers.next().await.is_none());
    assert_eq!(counts.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn who_leaves_is_heard_by_the_worker() {
    let worker = Fake::scripted("w1", |seen| if matches!(seen, Seen::Response(_, 1)) { Do::Hang } else { Do::Go }).await;
    let world = World::new(&[&worker]);
    let mut answers = Box::pin(ask(&world.router, vec![many(1, 5)]));
    assert!(answers.next().await.unwrap().is_ok());
    drop(answers);
    worker.cancellation().await;
}

#[tokio::test]
async fn a_slow_reader_holds_the_model_back() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    // Far more than fit between the model and the reader.
    const COUNT: u64 = 60_000;
    let mut answers = Box::pin(ask(&world.router, vec![many(1, COUNT as i64)]));
    assert!(answers.next().await.unwrap().is_ok());
    let gone = || worker.seen().iter().filter(|seen| matches!(seen, Seen::Response(..))).count() as u64;
    // A plain request is answered meanwhile: the reader of one stream is nobody else's matter.
    world.router.infer(plain(2), &CallOptions::default()).await.unwrap();
    assert!(gone() < COUNT / 2, "{} of {COUNT} responses went out to nobody", gone());
    let rest = answers.collect::<Answers>().await;
    assert_eq!(rest.len() as u64, COUNT - 1, "the last is {:?}", rest.last());
}

#[tokio::test]
async fn responses_of_several_requests_and_plain_answers_share_a_stream() {
    let gate = Arc::new(Semaphore::new(0));
    let closed = Arc::clone(&gate);
    let worker = Fake::scripted("w1", move |seen| match seen {
        Seen::Response(1, 1) => Do::WaitFor(Arc::clone(&closed)),
        _ => Do::Go,
    })
    .await;
    let world = World::new(&[&worker]);
    let mut answers = Box::pin(ask(&world.router, vec![many(1, 3), many(2, 3), plain(3)]));
    let mut before: Answers = Vec::new();
    // All but what waits behind the gate.
    for _ in 0..5 {
        before.push(answers.next().await.unwrap());
    }
    assert_eq!((numbers(&before, 1), numbers(&before, 2)), (expected(1, 1), expected(2, 3)));
    gate.add_permits(1);
    let rest: Answers = answers.collect().await;
    assert_eq!(numbers(&rest, 1), expected(1, 3)[1..]);
}
