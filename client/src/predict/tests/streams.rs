//! Many requests on one stream.
use cresset_proto::{inference::infer_parameter::ParameterChoice, reason::Reason};
use futures::{StreamExt, stream};
use tokio::sync::Semaphore;
use tonic::Code;

use super::*;
use crate::fake::{Do, Seen, fold, number};

fn id(answer: &Result<ModelStreamInferResponse, Status>) -> String {
    answer.as_ref().unwrap().infer_response.as_ref().unwrap().id.clone()
}

fn parameter<'a>(answer: &'a ModelStreamInferResponse, key: &str) -> Option<&'a ParameterChoice> {
    answer.infer_response.as_ref()?.parameters.get(key)?.parameter_choice.as_ref()
}

fn all(
    router: &Router,
    requests: Vec<ModelInferRequest>,
) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + use<> {
    router.stream(stream::iter(requests.into_iter().map(Ok)), CallOptions::default())
}

#[tokio::test]
async fn answers_come_in_order_though_requests_run_side_by_side() {
    let gate = Arc::new(Semaphore::new(0));
    let first = Arc::clone(&gate);
    let worker = Fake::scripted("w1", move |seen| match seen {
        Seen::Infer(request) if request.id == "1" => Do::WaitFor(Arc::clone(&first)),
        _ => Do::Go,
    })
    .await;
    let world = World::new(&[&worker]);
    let answers = tokio::spawn(all(&world.router, (1..=20).map(plain).collect()).collect::<Vec<_>>());
    worker.has_seen(|seen| matches!(seen, Seen::Infer(request) if request.id == "20")).await;
    gate.add_permits(1);
    let answers = answers.await.unwrap();
    assert_eq!(answers.iter().map(id).collect::<Vec<_>>(), (1..=20).map(|id| id.to_string()).collect::<Vec<_>>());
    assert!(
        answers
            .iter()
            .flatten()
            .all(|answer| parameter(answer, "triton_final_response") == Some(&ParameterChoice::BoolParam(true)))
    );
}

#[tokio::test]
async fn an_error_stands_in_its_place_and_the_stream_goes_on() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let unknown = ModelInferRequest { model_name: "nope".into(), id: "2".into(), ..Default::default() };
    let answers: Vec<_> = all(&world.router, vec![plain(1), unknown, step(9, 2), plain(4)]).collect().await;
    assert_eq!(answers.iter().map(id).collect::<Vec<_>>(), ["1", "2", "2", "4"]);
    let errors: Vec<_> = answers.iter().flatten().map(|answer| answer.error_message.as_str()).collect();
    assert_eq!(errors[1], "Request for unknown model: 'nope' is not found");
    assert!(errors[2].contains("must specify the START flag"));
    assert_eq!([errors[0], errors[3]], ["", ""]);
    let failed = answers[1].as_ref().unwrap();
    assert_eq!(parameter(failed, "triton_final_response"), Some(&ParameterChoice::BoolParam(true)));
    assert_eq!(parameter(failed, "cresset_reason"), None, "only for those who ask");
}

#[tokio::test]
async fn rich_errors_carry_code_and_reason() {
    let world = World::new(&[]);
    let unknown = ModelInferRequest { model_name: "nope".into(), ..Default::default() };
    let options = CallOptions { rich_status: true, ..CallOptions::default() };
    let answers: Vec<_> = world.router.stream(stream::iter([Ok(unknown)]), options).collect().await;
    let failed = answers[0].as_ref().unwrap();
    assert_eq!(parameter(failed, "cresset_status_code"), Some(&ParameterChoice::Int64Param(5)));
    assert_eq!(parameter(failed, "cresset_reason"), Some(&ParameterChoice::StringParam("unknown-model".into())));
}

#[tokio::test]
async fn with_tritons_key_the_first_error_ends_the_stream() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let unknown = ModelInferRequest { model_name: "nope".into(), ..Default::default() };
    // The requests never end: the error must end the stream by itself.
    let requests = stream::iter([Ok(plain(1)), Ok(unknown), Ok(plain(3))]).chain(stream::pending());
    let options = CallOptions { stream_errors: true, ..CallOptions::default() };
    let answers: Vec<_> = world.router.stream(requests, options).collect().await;
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[1].as_ref().unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_broken_caller_ends_the_stream() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let requests = stream::iter([Ok(plain(1)), Err(Status::cancelled("gone"))]).chain(stream::pending());
    let answers: Vec<_> = world.router.stream(requests, CallOptions::default()).collect().await;
    assert_eq!(answers.len(), 2);
    assert_eq!(answers[1].as_ref().unwrap_err().code(), Code::Cancelled);
}

#[tokio::test]
async fn requests_at_a_time_are_bounded() {
    let gate = Arc::new(Semaphore::new(0));
    let permits = Arc::clone(&gate);
    let worker = Fake::scripted("w1", move |_| Do::WaitFor(Arc::clone(&permits))).await;
    let settings = RouterSettings { stream_requests_max: 4, ..RouterSettings::default() };
    let world = World::with(&[&worker], IDLE_US, settings);
    let read = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&read);
    let requests = stream::iter((1..=50).map(plain).map(Ok)).inspect(move |_| {
        count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    });
    let answers = tokio::spawn(world.router.stream(requests, CallOptions::default()).collect::<Vec<_>>());
    worker.has_seen(|seen| matches!(seen, Seen::Infer(request) if request.id == "4")).await;
    assert_eq!(worker.infers(), 4);
    assert_eq!(read.load(std::sync::atomic::Ordering::SeqCst), 4);
    gate.add_permits(50);
    assert_eq!(answers.await.unwrap().len(), 50);
}

#[tokio::test]
async fn a_dropped_stream_is_heard_by_the_worker() {
    let worker = Fake::scripted("w1", |_| Do::Hang).await;
    let world = World::new(&[&worker]);
    let answers = tokio::spawn(all(&world.router, vec![plain(1)]).collect::<Vec<_>>());
    worker.has_seen(|seen| matches!(seen, Seen::Infer(_))).await;
    answers.abort();
    worker.cancellation().await;
}

/// Five sequences and plain requests on one stream, while two of three workers die.
#[tokio::test]
async fn sequences_on_one_stream_survive_their_workers() {
    for at in [1, 5, 9, 14, 20] {
        let dies = move |seen: &Seen| matches!(seen, Seen::Step(id) if *id == at);
        let mortal = move |id: &'static str| Fake::scripted(id, move |seen| if dies(seen) { Do::Die } else { Do::Go });
        let workers = [mortal("w1").await, mortal("w2").await];
        let last = Fake::start("w3").await;
        let mut world = World::new(&[&workers[0], &workers[1]]);
        let mut requests = Vec::new();
        for id in 1..=20 {
            requests.extend((1..=5).map(|sequence| step(sequence, id)));
            requests.push(plain(id));
        }
        let answers = tokio::spawn(all(&world.router, requests.clone()).collect::<Vec<_>>());
        workers[0].has_seen(|seen| matches!(seen, Seen::Open(_))).await;
        world.publish(&[&workers[0], &workers[1], &last]);
        let answers = answers.await.unwrap();
        assert_eq!(
            answers.iter().map(id).collect::<Vec<_>>(),
            requests.iter().map(|request| request.id.clone()).collect::<Vec<_>>()
        );
        let mut states = [0_u64; 5];
        for (request, answer) in requests.iter().zip(&answers) {
            let answer = answer.as_ref().unwrap();
            assert_eq!(answer.error_message, "");
            if let Some(ParameterChoice::Int64Param(sequence)) =
                request.parameters.get("sequence_id").and_then(|value| value.parameter_choice.clone())
            {
                let state = &mut states[usize::try_from(sequence).unwrap() - 1];
                *state = fold(*state, request.id.parse().unwrap());
                assert_eq!(number(answer.infer_response.as_ref().unwrap()), *state);
            }
        }
    }
}

#[tokio::test]
async fn a_stream_with_a_reason_in_its_error_keeps_the_models_text() {
    let worker = Fake::scripted("w1", |_| Do::Refuse(Reason::ModelFailed)).await;
    let world = World::new(&[&worker]);
    let answers: Vec<_> = all(&world.router, vec![plain(1)]).collect().await;
    assert_eq!(answers[0].as_ref().unwrap().error_message, "w1 refuses");
}

#[tokio::test]
async fn who_opts_in_is_not_held_up_by_others() {
    let gate = Arc::new(Semaphore::new(0));
    let closed = Arc::clone(&gate);
    let worker = Fake::scripted("w1", move |seen| match seen {
        Seen::Infer(request) if request.id == "1" => Do::WaitFor(Arc::clone(&closed)),
        Seen::Step(10) => Do::WaitFor(Arc::clone(&closed)),
        _ => Do::Go,
    })
    .await;
    let world = World::new(&[&worker]);
    let named = |id: &str, request: ModelInferRequest| ModelInferRequest { id: id.into(), ..request };
    let requests = vec![
        plain(1),
        unordered(plain(2)),
        unordered(named("10", step(7, 1))),
        unordered(step(7, 11)),
        unordered(named("5", step(8, 1))),
        unordered(step(8, 3)),
        plain(4),
    ];
    let mut answers = Box::pin(all(&world.router, requests));
    let mut before = Vec::new();
    for _ in 0..3 {
        before.push(id(&answers.next().await.unwrap()));
    }
    before.sort();
    assert_eq!(before, ["2", "3", "5"], "what waits for nobody comes first: request 2, and sequence 8 (5, 3)");
    gate.add_permits(2);
    let rest: Vec<_> = answers.map(|answer| id(&answer)).collect().await;
    let place = |id: &str| rest.iter().position(|other| other == id).unwrap();
    assert!(place("1") < place("4"), "{rest:?}");
    assert!(place("10") < place("11"), "a sequence keeps its order: {rest:?}");
}

/// One sequence that fills its inbox, and another that must not notice.
#[tokio::test]
async fn a_sequence_that_is_full_holds_up_no_other_that_opts_in() {
    let gate = Arc::new(Semaphore::new(0));
    let closed = Arc::clone(&gate);
    let worker = Fake::scripted("w1", move |seen| match seen {
        Seen::Step(1) => Do::WaitFor(Arc::clone(&closed)),
        _ => Do::Go,
    })
    .await;
    let settings = RouterSettings { session_requests_max: 2, ..RouterSettings::default() };
    let world = World::with(&[&worker], IDLE_US, settings);
    let mut requests: Vec<_> = (1..=5).map(|id| unordered(step(7, id))).collect();
    requests.push(unordered(ModelInferRequest { id: "50".into(), ..step(8, 1) }));
    let mut answers = Box::pin(all(&world.router, requests));
    assert_eq!(id(&answers.next().await.unwrap()), "50");
    gate.add_permits(1);
    let rest: Vec<_> = answers.map(|answer| id(&answer)).collect().await;
    assert_eq!(rest, ["1", "2", "3", "4", "5"]);
}

/// A sequence whose requests say now this and now that: its order comes first.
#[tokio::test]
async fn a_sequence_keeps_its_order_though_only_some_of_its_requests_opt_in() {
    let worker = Fake::start("w1").await;
    let world = World::new(&[&worker]);
    let mixed: Vec<_> = (1..=40).map(|id| if id % 3 == 0 { unordered(step(7, id)) } else { step(7, id) }).collect();
    let answers: Vec<_> = all(&world.router, mixed).collect().await;
    let mut state = 0;
    for (number_of, answer) in (1..=40).zip(&answers) {
        assert_eq!(id(answer), number_of.to_string());
        state = fold(state, number_of);
        assert_eq!(number(answer.as_ref().unwrap().infer_response.as_ref().unwrap()), state);
    }
}
