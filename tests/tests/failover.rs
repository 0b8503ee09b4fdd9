//! One process dies, or falls silent: no caller sees it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use cresset_client::CressetClient;
use cresset_proto::{
    admin::v1::{DeployRequest, WorkerState},
    tensor::{Datatype, Tensor},
};
use cresset_tests::{
    harness::{Cluster, Options, binaries, leader_of, worker_of},
    reference::Reference,
    speaker::{Speaker, Stage, Way},
    speech::{CHUNK_SAMPLES, Speech},
    tally::{Tally, longest_between},
};
use tokio::{sync::watch, task::JoinSet};

use crate::support::{Load, PATIENCE, Target, admin, busiest, cluster, holders, inference, others, plus_one, until_ready};

/// Judged dead in 2.5 s; the rest is for a machine that does other things too.
const VERDICT_MAX: Duration = Duration::from_millis(2_500 + 2_500);

/// The Rust client, and a coordinator that doesn't lead.
async fn both_ways(cluster: &Cluster) -> Vec<Target> {
    let leader = cluster.leader().await.unwrap();
    let beside = inference(cluster, &others(cluster, &leader)[0]).await;
    vec![Target::Client(Arc::new(cluster.client().await.unwrap())), Target::Gateway(beside)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_worker_costs_no_request_and_is_replaced() {
    let repository = plus_one();
    let cluster = cluster(3, 3, &repository, &["plus_one"]);
    let load = Load::start(&both_ways(&cluster).await, 3);
    load.more(300).await;
    let victim = holders(&cluster.status().await.unwrap(), "plus_one")[0].clone();
    let killed = Instant::now();
    cluster.kill(&victim).unwrap();
    let dead = |status: &_| worker_of(status, &victim).filter(|worker| worker.state() == WorkerState::Dead).map(drop);
    cluster.wait_for("the verdict", PATIENCE, dead).await.unwrap();
    let verdict = killed.elapsed();
    until_ready(&cluster, "plus_one").await;
    let replaced = killed.elapsed();
    load.more(300).await;
    let outcome = load.end().await;
    println!(
        "judged dead after {verdict:?}, replaced after {replaced:?}; {} answers, slowest {:?}",
        outcome.answered, outcome.slowest
    );
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(verdict < VERDICT_MAX, "{verdict:?}");
    let now = holders(&cluster.status().await.unwrap(), "plus_one");
    assert!(now.len() == 2 && !now.contains(&victim), "{now:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_worker_is_left_and_its_return_is_a_new_life() {
    let repository = plus_one();
    let cluster = cluster(1, 3, &repository, &["plus_one"]);
    let load = Load::start(&[Target::Client(Arc::new(cluster.client().await.unwrap()))], 4);
    load.more(200).await;
    let status = cluster.status().await.unwrap();
    let victim = holders(&status, "plus_one")[0].clone();
    let before = worker_of(&status, &victim).unwrap().incarnation;
    let stopped = Instant::now();
    cluster.stop(&victim).unwrap();
    let dead = |status: &_| worker_of(status, &victim).filter(|worker| worker.state() == WorkerState::Dead).map(drop);
    cluster.wait_for("the verdict", PATIENCE, dead).await.unwrap();
    let verdict = stopped.elapsed();
    until_ready(&cluster, "plus_one").await;
    load.more(200).await;
    cluster.cont(&victim).unwrap();
    let reborn =
        |status: &_| worker_of(status, &victim).filter(|w| w.state() == WorkerState::Ready && w.incarnation > before).map(drop);
    cluster.wait_for("a new life of the worker", PATIENCE, reborn).await.unwrap();
    let outcome = load.end().await;
    println!("judged dead after {verdict:?}, {} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(verdict > Duration::from_millis(1_250), "silent for {verdict:?} only, no connection was reset");
    assert!(verdict < VERDICT_MAX, "{verdict:?}");
}

/// A worker that stands still is left after half a second or so; the rest is for a machine that does other things too.
const LEFT_MAX: Duration = Duration::from_millis(1_000 + 500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_stands_still_for_a_moment_is_left_and_taken_back_in_the_same_life() {
    let repository = plus_one();
    let cluster = cluster(1, 3, &repository, &["plus_one"]);
    let client = Arc::new(cluster.client().await.unwrap());
    let load = Load::start(&[Target::Client(Arc::clone(&client))], 4);
    load.more(400).await;
    let status = cluster.status().await.unwrap();
    let victim = holders(&status, "plus_one")[0].clone();
    let before = worker_of(&status, &victim).unwrap().incarnation;
    let is_out = || client.router().routes().workers().any(|worker| worker.worker_id == victim && worker.out().is_some());
    cluster.stop(&victim).unwrap();
    let stopped = Instant::now();
    while !is_out() {
        load.more(1).await;
    }
    let left = stopped.elapsed();
    load.more(200).await;
    cluster.cont(&victim).unwrap();
    while is_out() {
        load.more(1).await;
    }
    let back = stopped.elapsed();
    let answered = |status: &_| worker_of(status, &victim).map_or(0, |worker| worker.requests_total);
    let goal = answered(&cluster.status().await.unwrap()) + 50;
    let serves = |status: &_| (answered(status) > goal).then_some(());
    cluster.wait_for("the worker's next answers", PATIENCE, serves).await.unwrap();
    let after = worker_of(&cluster.status().await.unwrap(), &victim).unwrap().incarnation;
    let outcome = load.end().await;
    println!("left after {left:?}, tried again after {back:?}, {} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(left < LEFT_MAX && outcome.slowest < LEFT_MAX, "{left:?}, {:?}", outcome.slowest);
    assert_eq!(after, before, "it was never judged dead");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_costs_no_request_and_is_followed() {
    let repository = plus_one();
    let cluster = cluster(3, 2, &repository, &[]);
    let leader = cluster.leader().await.unwrap();
    let other = others(&cluster, &leader)[0].clone();
    let request =
        DeployRequest { command_id: vec![1; 16].into(), name: "plus_one".into(), version: 0, replicas: 0, ..Default::default() };
    admin(&cluster, &other).await.deploy(request.clone()).await.unwrap();
    until_ready(&cluster, "plus_one").await;
    let load = Load::start(&both_ways(&cluster).await, 3);
    load.more(300).await;
    let killed = Instant::now();
    cluster.kill(&leader).unwrap();
    let next = |status: &_| leader_of(status).filter(|now| now.id != leader).map(|now| now.id.clone());
    cluster.wait_for("another leader", PATIENCE, next).await.unwrap();
    let request = DeployRequest { command_id: vec![2; 16].into(), replicas: 1, ..request };
    let mut admin = admin(&cluster, &other).await;
    admin.deploy(request).await.unwrap();
    let writes_resumed = killed.elapsed();
    load.more(300).await;
    let outcome = load.end().await;
    println!("writes resumed after {writes_resumed:?}, {} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(writes_resumed < Duration::from_secs(5), "{writes_resumed:?}");
}

/// Four speakers, two each way, with so many chunks.
pub(crate) fn speakers(
    client: &Arc<CressetClient>,
    gateway: &watch::Sender<String>,
    speech: &Speech,
    chunks: usize,
) -> Vec<Speaker> {
    (0..4)
        .map(|number| Speaker {
            name: format!("s{number}"),
            model: "silero_vad".into(),
            input: "x".into(),
            way: if number % 2 == 0 { Way::Direct(Arc::clone(client)) } else { Way::Gateway(gateway.subscribe()) },
            chunks: speech.chunks(number * 97, chunks),
            interval: Duration::from_millis(8),
            passes: 1,
        })
        .collect()
}

/// What the model says to these chunks when nothing happens to it.
pub(crate) fn expected(speech: &Speech, start: usize, chunks: usize) -> Vec<bytes::Bytes> {
    let mut reference = Reference::load(&binaries::demo_models(), "silero_vad").unwrap();
    let mut sequence = reference.sequence().unwrap();
    let tensor = |data| Tensor { name: "x".into(), datatype: Datatype::Fp32, shape: vec![1, CHUNK_SAMPLES as i64], data };
    speech.chunks(start, chunks).into_iter().map(|data| sequence.step(&[tensor(data)]).unwrap().remove(0).data).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sequences_survive_their_worker_and_then_the_leader() {
    const CHUNKS: usize = 300;
    let cluster = Cluster::start(&Options::deploying(&["silero_vad"])).unwrap();
    let speech = Speech::load().unwrap();
    let leader = cluster.leader().await.unwrap();
    let beside = others(&cluster, &leader)[0].clone();
    let gateway = watch::Sender::new(cluster.grpc(&beside).unwrap().to_owned());
    let client = Arc::new(cluster.client().await.unwrap());
    let stage = Arc::new(Stage::default());
    let mut speaking = JoinSet::new();
    for (number, speaker) in speakers(&client, &gateway, &speech, CHUNKS).into_iter().enumerate() {
        let stage = Arc::clone(&stage);
        speaking.spawn(async move { (number, speaker.speak(stage).await) });
    }
    assert!(stage.more(4 * 75, PATIENCE).await);
    let (victim, held) = cluster.wait_for("a worker with live sequences", PATIENCE, busiest).await.unwrap();
    let worker_killed = stage.now_us();
    cluster.kill(&victim).unwrap();
    assert!(stage.more(4 * 60, PATIENCE).await);
    let leader_killed = stage.now_us();
    // The leader may have changed since, but never to a dead one.
    let leader = cluster.leader().await.unwrap();
    let leads_beside = leader == beside;
    if !leads_beside {
        cluster.kill(&leader).unwrap();
    }
    let mut tally = Tally::default();
    let mut passes = Vec::new();
    while let Some(done) = speaking.join_next().await {
        let (number, spoken) = done.unwrap();
        let expected = expected(&speech, number * 97, CHUNKS);
        for pass in &spoken {
            tally.add(pass, &expected);
        }
        passes.extend(spoken);
    }
    let pause = |from, to| longest_between(&passes, from, to) / 1_000;
    println!(
        "{tally}; {victim} held {held} of 4; pauses in ms: worker {}, leader {}",
        pause(worker_killed, leader_killed),
        pause(leader_killed, u64::MAX)
    );
    assert!(!leads_beside, "the leader changed by itself");
    assert_eq!((tally.sent, tally.answered), (4 * CHUNKS as u64, 4 * CHUNKS as u64), "{tally}");
    assert!(tally.is_clean(), "{tally}");
}
