//! The whole client: routes from coordinators, predictions on workers.

use super::*;
use crate::fake::{Fake, FakeCoordinator, Seen, fold, number, routes};

fn request(id: u64) -> ModelInferRequest {
    ModelInferRequest { id: id.to_string(), ..Default::default() }
}

#[tokio::test]
async fn predictions_go_on_while_a_worker_and_every_coordinator_die() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let coordinator = FakeCoordinator::start("c1", true, routes(1, &[&workers[0], &workers[1]], 60_000_000)).await;
    let client = CressetClient::connect([coordinator.address.to_string()]).await.unwrap();
    let mut sequence = client.sequence("seq");
    let mut state = 0;
    for id in 1..=20 {
        let answer = sequence.send(request(id)).await.unwrap();
        state = fold(state, id);
        assert_eq!(number(&answer.await.unwrap()), state);
        if id == 5 {
            coordinator.die();
        }
        if id == 10 {
            workers.iter().find(|worker| !worker.opens().is_empty()).unwrap().die();
        }
    }
    let answer = sequence.finish(request(21)).await.unwrap();
    assert_eq!(number(&answer.await.unwrap()), fold(state, 21));
    let plain = ModelInferRequest { model_name: "plain".into(), id: "9".into(), ..Default::default() };
    assert_eq!(client.infer(plain).await.unwrap().id, "9");
}

#[tokio::test]
async fn requests_of_a_sequence_may_be_sent_before_their_answers_are_there() {
    let worker = Fake::start("w1").await;
    let coordinator = FakeCoordinator::start("c1", true, routes(1, &[&worker], 60_000_000)).await;
    let client = CressetClient::connect([coordinator.address.to_string()]).await.unwrap();
    let (mut first, mut second) = (client.sequence("seq"), client.sequence("seq"));
    assert_ne!(first.id(), second.id());
    let mut answers = Vec::new();
    for id in 1..=10 {
        answers.push((id, first.send(request(id)).await.unwrap(), second.send(request(id)).await.unwrap()));
    }
    let mut state = 0;
    for (id, first, second) in answers {
        state = fold(state, id);
        assert_eq!((number(&first.await.unwrap()), number(&second.await.unwrap())), (state, state));
    }
    assert!(worker.seen().iter().any(|seen| matches!(seen, Seen::Open(open) if open.sequence_id == first.id().to_string())));
    // A model without state has no sequences.
    let status = client.sequence("plain").send(request(1)).await.unwrap_err();
    assert!(status.message().contains("sequence_batching"), "{status}");
}

#[tokio::test]
async fn without_a_coordinator_connecting_says_whom_it_asked() {
    let none: [String; 0] = [];
    assert_eq!(CressetClient::connect(none).await.unwrap_err(), ConnectError::NoEndpoints);
    let timeout = Duration::from_millis(200);
    let error = CressetClient::connect_with(["127.0.0.1:1"], RouterSettings::default(), timeout).await.unwrap_err();
    assert_eq!(error.to_string(), "no coordinator sent routes within 200 ms; tried 127.0.0.1:1");
}

#[tokio::test]
async fn the_coordinators_hear_which_workers_are_left_alone_and_when_that_ends() {
    let workers = [Fake::start("w1").await, Fake::start("w2").await];
    let coordinator = FakeCoordinator::start("c1", true, routes(1, &[&workers[0], &workers[1]], 60_000_000)).await;
    let client = CressetClient::connect([coordinator.address.to_string()]).await.unwrap();
    let ask = async || client.infer(ModelInferRequest { model_name: "plain".into(), ..Default::default() }).await.unwrap();
    while workers[0].infers() == 0 {
        ask().await;
    }
    workers[0].freeze(true);
    let mut reported = coordinator.reported.subscribe();
    while reported.borrow().is_empty() {
        ask().await;
    }
    let first = reported.borrow_and_update()[0].clone();
    let said: Vec<_> =
        first.opinions.iter().map(|opinion| (&*opinion.worker_id, opinion.incarnation, opinion.left_alone)).collect();
    assert_eq!(said, [("w1", 1, true), ("w2", 1, false)]);
    workers[0].freeze(false);
    while reported.borrow().iter().all(|report| !report.opinions.is_empty()) {
        ask().await;
    }
    assert!(reported.borrow().iter().all(|report| report.router == first.router));
}
