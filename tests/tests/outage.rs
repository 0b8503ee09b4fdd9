//! More dies than a cluster can do without: what was acknowledged is never lost, and what can go on goes on.

use std::{sync::Arc, time::Instant};

use cresset_proto::admin::v1::{CoordinatorRole, DeployRequest, ModelState, StatusResponse};
use cresset_tests::harness::leader_of;

use crate::support::{Load, PATIENCE, Target, admin, cluster, command, inference, numbers, plus_one, row, until_ready};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_the_last_routes_serve_on_and_it_heals() {
    let repository = plus_one();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    let client = Target::Client(Arc::new(cluster.client().await.unwrap()));
    let left = "c3";
    let load = Load::start(&[client, Target::Gateway(inference(&cluster, left).await)], 2);
    load.more(100).await;
    cluster.kill_all(["c1", "c2"]).unwrap();
    let alone = |status: &StatusResponse| (!status.current && leader_of(status).is_none()).then_some(());
    cluster.wait_for("a status that nobody confirmed", PATIENCE, alone).await.unwrap();
    load.more(200).await;
    let refused = command(&cluster, &["--timeout", "1s", "deploy", "plus_one", "--replicas", "1"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    cluster.restart_process("c1").unwrap();
    let healed = |status: &_| leader_of(status).map(drop);
    cluster.wait_for("a leader again", PATIENCE, healed).await.unwrap();
    let accepted = command(&cluster, &["deploy", "plus_one", "--replicas", "1", "--wait"]);
    assert_eq!(accepted.code, Some(0), "{accepted:?}");
    load.more(50).await;
    let outcome = load.end().await;
    assert_eq!(outcome.failures, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everybody_killed_comes_back_with_what_was_acknowledged() {
    let repository = plus_one().with_demo("digits").unwrap();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    let mut admin = admin(&cluster, "c1").await;
    let request =
        DeployRequest { command_id: vec![7; 16].into(), name: "digits".into(), version: 0, replicas: 1, ..Default::default() };
    let acknowledged = admin.deploy(request).await.unwrap().into_inner();
    // Right after the acknowledgement: the worker hasn't even loaded it.
    let ids = cluster.ids();
    cluster.kill_all(ids.iter().map(String::as_str)).unwrap();
    let begun = Instant::now();
    for id in &ids {
        cluster.restart_process(id).unwrap();
    }
    until_ready(&cluster, "plus_one").await;
    let digits = cluster.wait_for_model("digits", ModelState::Ready, PATIENCE).await.unwrap();
    println!("everything answers {:?} after the restart", begun.elapsed());
    assert_eq!((digits.generation, digits.replicas_wanted), (acknowledged.generation, 1));
    let all =
        |status: &StatusResponse| (!status.coordinators.iter().any(|c| c.role() == CoordinatorRole::Unreachable)).then_some(());
    cluster.wait_for("all coordinators", PATIENCE, all).await.unwrap();
    for id in ["c1", "c2", "c3"] {
        let answer = inference(&cluster, id).await.model_infer(row("plus_one", &[41.0])).await;
        assert_eq!(numbers(&answer.unwrap().into_inner()), [42.0], "{id}");
    }
}
