//! `cresset drain`, and SIGTERM to one process after the other: they leave under load, and nobody notices.
use std::sync::Arc;

use cresset_client::{ConnectionSettings, Coordinators};
use cresset_proto::{
    admin::v1::{StatusResponse, WorkerState},
    inference::{ServerReadyRequest, grpc_inference_service_client::GrpcInferenceServiceClient},
};
use cresset_tests::{
    chaos::models,
    harness::{Cluster, Options, worker_of},
    speaker::Stage,
    speech::Speech,
    tally::Tally,
};
use rustix::process::Signal;
use tokio::{sync::watch, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use crate::{
    failover::{expected, speakers},
    resume::{self, KINDS, Speaker},
    support::{Load, PATIENCE, Target, busiest, cluster, command, holders, others, plus_one, until_ready},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_leaves_under_load_and_no_request_fails() {
    let repository = plus_one();
    let mut cluster = cluster(1, 3, &repository, &["plus_one"]);
    let status = cluster.status().await.unwrap();
    let leaving = holders(&status, "plus_one")[0].clone();
    let before = worker_of(&status, &leaving).unwrap().incarnation;
    let load = Load::start(&[Target::Client(Arc::new(cluster.client().await.unwrap()))], 6);
    load.more(300).await;
    let drained = command(&cluster, &["drain", &leaving, "--wait", "-o", "json"]);
    assert_eq!(drained.code, Some(0), "{drained:?}");
    assert_eq!((&drained.json()["worker"], &drained.json()["empty"]), (&leaving.as_str().into(), &true.into()));
    load.more(300).await;
    let status = cluster.status().await.unwrap();
    assert_eq!(worker_of(&status, &leaving).unwrap().state(), WorkerState::Draining);
    let now = holders(&status, "plus_one");
    assert!(now.len() == 2 && !now.contains(&leaving), "{now:?}");

    // Once more changes nothing, and started again it takes part again.
    assert_eq!(command(&cluster, &["drain", &leaving, "--wait"]).code, Some(0));
    cluster.kill(&leaving).unwrap();
    cluster.restart_process(&leaving).unwrap();
    let back = |status: &StatusResponse| {
        worker_of(status, &leaving).filter(|worker| worker.state() == WorkerState::Ready && worker.incarnation > before).map(drop)
    };
    cluster.wait_for("the worker is back", PATIENCE, back).await.unwrap();
    load.more(100).await;
    let outcome = load.end().await;
    println!("{} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());

    let unknown = command(&cluster, &["drain", "nobody"]);
    assert!(unknown.code == Some(1) && unknown.stderr.contains("worker nobody isn't known"), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_go_on_elsewhere_when_their_worker_leaves() {
    const CHUNKS: usize = 250;
    let cluster = Cluster::start(&Options::deploying(&["silero_vad"])).unwrap();
    let speech = Speech::load().unwrap();
    let gateway = watch::Sender::new(cluster.grpc(&others(&cluster, "nobody")[0]).unwrap().to_owned());
    let client = Arc::new(cluster.client().await.unwrap());
    let stage = Arc::new(Stage::default());
    let mut speaking = JoinSet::new();
    for (number, speaker) in speakers(&client, &gateway, &speech, CHUNKS).into_iter().enumerate() {
        let stage = Arc::clone(&stage);
        speaking.spawn(async move { (number, speaker.speak(stage).await) });
    }
    assert!(stage.more(4 * 60, PATIENCE).await);
    let (leaving, _) = cluster.wait_for("a worker with live sequences", PATIENCE, busiest).await.unwrap();
    let drained = command(&cluster, &["--timeout", "20s", "drain", &leaving, "--wait"]);
    assert_eq!(drained.code, Some(0), "{drained:?}");
    let mut tally = Tally::default();
    while let Some(done) = speaking.join_next().await {
        let (number, spoken) = done.unwrap();
        let expected = expected(&speech, number * 97, CHUNKS);
        spoken.iter().for_each(|pass| tally.add(pass, &expected));
    }
    println!("{tally}, {leaving} left");
    assert_eq!((tally.sent, tally.answered), (4 * CHUNKS as u64, 4 * CHUNKS as u64), "{tally}");
    assert!(tally.is_clean(), "{tally}");
}

/// Stops a process as an operator does, and starts it again.
async fn restart(cluster: &mut Cluster, id: &str) {
    cluster.process(id).unwrap().signal(Signal::TERM).unwrap();
    cluster.process(id).unwrap().wait(PATIENCE).unwrap();
    cluster.restart_process(id).unwrap();
}

/// Restarts every process, workers first, each when the one before serves again and every model has all its replicas.
async fn restart_all(cluster: &mut Cluster, models: &[&str]) {
    let workers: Vec<String> = cluster.file().workers.iter().map(|member| member.id.clone()).collect();
    let coordinators: Vec<String> = cluster.file().coordinators.iter().map(|member| member.id.clone()).collect();
    for id in &workers {
        let before = worker_of(&cluster.status().await.unwrap(), id).unwrap().incarnation;
        restart(cluster, id).await;
        let back = |status: &StatusResponse| {
            worker_of(status, id).filter(|w| w.state() == WorkerState::Ready && w.incarnation > before).map(drop)
        };
        cluster.wait_for("the worker is back", PATIENCE, back).await.unwrap();
        for model in models {
            until_ready(cluster, model).await;
        }
    }
    for id in &coordinators {
        restart(cluster, id).await;
        // It listens as soon as it can say how it is.
        cluster.leader().await.unwrap();
        while !is_ready(cluster, id).await {
            tokio::task::yield_now().await;
        }
    }
}

async fn is_ready(cluster: &Cluster, id: &str) -> bool {
    let Ok(channel) = Endpoint::from_shared(format!("http://{}", cluster.grpc(id).unwrap())).unwrap().connect().await else {
        return false;
    };
    let ready = GrpcInferenceServiceClient::new(channel).server_ready(ServerReadyRequest {}).await;
    ready.is_ok_and(|answer| answer.into_inner().ready)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_process_is_restarted_under_load_and_nothing_fails_or_is_lost() {
    let repository = models::repository().unwrap();
    let names: Vec<&str> = KINDS.iter().map(|kind| kind.model()).collect();
    let mut cluster = cluster(3, 3, &repository, &names);
    let speech = Speech::load().unwrap();
    let coordinators = Coordinators::new(cluster.endpoints(), ConnectionSettings::default());
    let client = Target::Client(Arc::new(cluster.client().await.unwrap()));
    let load = Load::start(&[client, Target::Doors(coordinators.clone())], 3);
    let (over, mut running, mut counts) = (CancellationToken::new(), JoinSet::new(), Vec::new());
    for (number, kind) in KINDS.into_iter().enumerate() {
        let speaker = Speaker::learn(kind, number, &speech, &cluster).await;
        let (answered, count) = watch::channel(0);
        counts.push(count);
        running.spawn(speaker.speak(coordinators.clone(), over.clone(), answered));
    }
    load.more(300).await;
    resume::more(&counts).await;
    restart_all(&mut cluster, &names).await;
    load.more(300).await;
    resume::more(&counts).await;
    over.cancel();
    while let Some(done) = running.join_next().await {
        done.unwrap();
    }
    let outcome = load.end().await;
    let streamed: usize = counts.iter().map(|count| *count.borrow()).sum();
    println!("{} answers, slowest {:?}; {streamed} on streams", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_was_drained_is_removed_and_stops_and_is_welcome_when_it_is_started_again() {
    let repository = plus_one();
    let mut cluster = cluster(1, 2, &repository, &["plus_one"]);
    let before = worker_of(&cluster.status().await.unwrap(), "w1").unwrap().incarnation;
    let refused = command(&cluster, &["worker", "remove", "w1"]);
    assert!(refused.code == Some(1) && refused.stderr.contains("worker w1 is taking part; `cresset drain w1"), "{refused:?}");
    assert_eq!(command(&cluster, &["drain", "w1", "--wait"]).code, Some(0));
    let removed = command(&cluster, &["worker", "remove", "w1", "-o", "json"]);
    assert_eq!((removed.code, &removed.json()["incarnation"]), (Some(0), &before.into()), "{removed:?}");
    let gone = |status: &StatusResponse| worker_of(status, "w1").filter(|w| w.state() == WorkerState::Removed).map(drop);
    cluster.wait_for("w1 is removed", PATIENCE, gone).await.unwrap();
    cluster.process("w1").unwrap().wait(PATIENCE).unwrap();

    cluster.restart_process("w1").unwrap();
    let back = |status: &StatusResponse| {
        worker_of(status, "w1").filter(|w| w.state() == WorkerState::Ready && w.incarnation > before).map(drop)
    };
    cluster.wait_for("w1 again", PATIENCE, back).await.unwrap();
}
