//! `cresset drain`: a worker leaves under load, and nobody notices.
use std::sync::Arc;

use cresset_proto::admin::v1::{StatusResponse, WorkerState};
use cresset_tests::{
    harness::{Cluster, Options, worker_of},
    speaker::Stage,
    speech::Speech,
    tally::Tally,
};
use tokio::{sync::watch, task::JoinSet};

use crate::{
    failover::{expected, speakers},
    support::{Load, PATIENCE, Target, busiest, cluster, command, holders, others, plus_one},
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
