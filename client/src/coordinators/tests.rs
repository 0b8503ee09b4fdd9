//! Coordinators that die, lag or don't lead.
use std::pin::pin;

use cresset_proto::{
    admin::v1::{DeployRequest, StatusRequest},
    fleet::v1::WatchResponse,
};
use futures::StreamExt;
use tokio::net::TcpListener;

use super::*;
use crate::fake::FakeCoordinator;

/// An address where nobody is.
async fn nobody() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap().to_string()
}

fn table(epoch: u64, coordinators: &[&FakeCoordinator]) -> WatchResponse {
    let coordinator_grpc_addresses = coordinators.iter().map(|coordinator| coordinator.address.to_string()).collect();
    WatchResponse { epoch, coordinator_grpc_addresses, ..Default::default() }
}

fn coordinators(addresses: impl IntoIterator<Item = String>) -> Coordinators {
    Coordinators::new(addresses, ConnectionSettings::default())
}

async fn who_answers(coordinators: &Coordinators, timeout: Duration) -> Result<String, CallError> {
    let status = |mut client: AdminServiceClient<Channel>| async move { client.status(StatusRequest::default()).await };
    coordinators.admin(timeout, status).await.map(|response| response.answered_by)
}

async fn epoch_comes(routes: &mut Routes, epoch: u64) {
    routes.wait_for(|table| table.epoch() == epoch).await.unwrap();
}

#[tokio::test]
async fn whoever_can_answer_is_found_and_remembered() {
    let follower = FakeCoordinator::start("c1", false, table(1, &[])).await;
    let leader = FakeCoordinator::start("c2", true, table(1, &[])).await;
    let addresses = [nobody().await, follower.address.to_string(), "no address".into(), leader.address.to_string()];
    let coordinators = coordinators(addresses);
    assert_eq!(who_answers(&coordinators, Duration::from_secs(10)).await.unwrap(), "c2");
    assert_eq!(coordinators.current().unwrap().0, leader.address.to_string());
}

#[tokio::test]
async fn a_no_is_not_asked_for_twice() {
    let both = [FakeCoordinator::start("c1", true, table(1, &[])).await, FakeCoordinator::start("c2", true, table(1, &[])).await];
    let coordinators = coordinators(both.iter().map(|coordinator| coordinator.address.to_string()));
    let deploy = |mut client: AdminServiceClient<Channel>| async move { client.deploy(DeployRequest::default()).await };
    let error = coordinators.admin(Duration::from_secs(10), deploy).await.unwrap_err();
    assert_eq!(error.to_string(), "c1 knows no such model");
    assert!(matches!(error, CallError::Refused(status) if status.code() == Code::NotFound));
}

#[tokio::test]
async fn giving_up_names_everybody_that_was_tried() {
    let follower = FakeCoordinator::start("c1", false, table(1, &[])).await;
    let dead = nobody().await;
    let coordinators = coordinators([dead.clone(), follower.address.to_string()]);
    let error = who_answers(&coordinators, Duration::from_millis(300)).await.unwrap_err().to_string();
    assert!(error.contains(&dead) && error.contains("refused"), "{error}");
    assert!(error.contains(&follower.address.to_string()) && error.contains("c1 knows no leader"), "{error}");
    let none: [String; 0] = [];
    assert!(matches!(
        who_answers(&Coordinators::new(none, ConnectionSettings::default()), Duration::ZERO).await,
        Err(CallError::NoEndpoints)
    ));
}

#[tokio::test]
async fn routes_stay_fresh_across_deaths_and_learned_addresses() {
    let second = FakeCoordinator::start("c2", true, table(1, &[])).await;
    let first = FakeCoordinator::start("c1", true, table(3, &[&second])).await;
    let coordinators = coordinators([first.address.to_string()]);
    let shutdown = CancellationToken::new();
    let mut routes = coordinators.watch_routes(shutdown.clone());
    epoch_comes(&mut routes, 3).await;
    assert_eq!(coordinators.addresses(), [first.address.to_string(), second.address.to_string()]);

    first.publish(table(4, &[&second]));
    epoch_comes(&mut routes, 4).await;

    first.die();
    // The other one lags behind at first: its table must not come back.
    let mut watched = second.watched.subscribe();
    watched.wait_for(|epochs| epochs.contains(&4)).await.unwrap();
    assert_eq!(routes.update().epoch(), 4);
    second.publish(table(5, &[&second]));
    epoch_comes(&mut routes, 5).await;

    second.die();
    shutdown.cancel();
    assert!(routes.wait_for(|table| table.epoch() > 5).await.is_none(), "the watch has ended");
    assert_eq!(routes.load().epoch(), 5, "and the last table stays");
}

#[tokio::test]
async fn whoever_watches_hears_nothing_twice_and_goes_on_from_where_it_was() {
    let second = FakeCoordinator::start("c2", true, table(6, &[])).await;
    let first = FakeCoordinator::start("c1", true, table(7, &[&second])).await;
    let coordinators = coordinators([first.address.to_string()]);
    let mut changes = pin!(coordinators.watch_changes(6));
    assert_eq!(changes.next().await.unwrap().epoch, 7);
    first.publish(WatchResponse { since_epoch: 7, ..table(8, &[&second]) });
    assert_eq!(changes.next().await.unwrap().epoch, 8);
    first.die();
    let mut watched = second.watched.subscribe();
    watched.wait_for(|epochs| epochs.ends_with(&[8])).await.unwrap();
    // It lags behind at first, and says nothing that is known.
    second.publish(table(8, &[]));
    second.publish(table(9, &[]));
    let next = changes.next().await.unwrap();
    assert_eq!((next.epoch, next.since_epoch), (9, 0));
}

#[tokio::test]
async fn a_table_that_cannot_follow_is_asked_for_whole() {
    let only = FakeCoordinator::start("c1", true, table(3, &[])).await;
    let mut routes = coordinators([only.address.to_string()]).watch_routes(CancellationToken::new());
    epoch_comes(&mut routes, 3).await;
    only.publish(WatchResponse { since_epoch: 2, ..table(4, &[]) });
    only.watched.subscribe().wait_for(|epochs| epochs.len() > 1 && epochs.iter().all(|epoch| *epoch == 0)).await.unwrap();
    only.publish(table(5, &[]));
    epoch_comes(&mut routes, 5).await;
}

#[test]
fn addresses_are_kept_once_and_bounded() {
    let coordinators = coordinators(["a:1".into(), "a:1".into(), String::new(), "b:1".into()]);
    assert_eq!(coordinators.addresses(), ["a:1", "b:1"]);
    coordinators.learn((0..100).map(|port| format!("c:{port}")));
    assert_eq!(coordinators.addresses().len(), ENDPOINTS_MAX);
}
