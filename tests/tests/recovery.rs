//! What a backup brings back, and what one coordinator that is left can do.
use std::{collections::BTreeMap, fs, path::Path, sync::Arc, time::Duration};

use cresset_proto::{
    admin::v1::ModelState,
    inference::{
        ModelRepositoryParameter, RepositoryModelLoadRequest, model_repository_parameter::ParameterChoice as RepositoryChoice,
    },
};
use cresset_tests::harness::{Cluster, ModelRepository, Options};
use cresset_worker::engine::testing;
use tokio::time::{Instant, sleep};

use crate::{
    beside::{Beside, blocks, done, peer_address, shell},
    support::{Load, PATIENCE, Target, cluster, command, inference, numbers, plus_one, row},
};

const BACKUP: &str = "deploy/runbooks/back-up-and-restore.md";
const QUORUM: &str = "deploy/runbooks/lost-quorum.md";
/// Between two looks at what can't be watched.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// A model that is in no repository: its files come with the load.
async fn load_with_files(cluster: &Cluster) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.pt");
    testing::plus_one().save(&path).unwrap();
    let json = r#"{"platform": "pytorch_libtorch", "max_batch_size": 8,
        "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}]}"#;
    let parameter = |choice| ModelRepositoryParameter { parameter_choice: Some(choice) };
    let parameters = [
        ("config".to_owned(), parameter(RepositoryChoice::StringParam(json.to_owned()))),
        ("file:1/model.pt".to_owned(), parameter(RepositoryChoice::BytesParam(fs::read(path).unwrap().into()))),
    ];
    let request = RepositoryModelLoadRequest {
        model_name: "brought".into(),
        parameters: parameters.into_iter().collect(),
        ..Default::default()
    };
    inference(cluster, "c1").await.repository_model_load(request).await.unwrap();
}

fn cluster_id(cluster: &Cluster) -> String {
    fs::read_to_string(cluster.data_dir().join("cluster-id")).unwrap().trim().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_was_made_under_load_begins_a_new_cluster() {
    let repository = plus_one();
    let mut old = cluster(3, 2, &repository, &["plus_one"]);
    load_with_files(&old).await;
    let label = command(&old, &["label", "plus_one", "stable=1"]);
    assert_eq!(label.code, Some(0), "{label:?}");
    let load = Load::start(&[Target::Gateway(inference(&old, "c1").await)], 2);
    load.more(100).await;
    let folder = tempfile::tempdir().unwrap();
    let steps: [String; 6] = blocks(BACKUP, "sh").try_into().expect("six steps");
    let [create, inspect, ..] = &steps;
    done(shell(create, &old.endpoints(), folder.path()));
    load.more(100).await;
    let outcome = load.end().await;
    assert_eq!(outcome.failures, Vec::<String>::new());
    // What comes after it isn't in it.
    assert_eq!(command(&old, &["undeploy", "plus_one"]).code, Some(0));

    let seen = done(shell(&format!("{} -o json", inspect.trim()), &[], folder.path()));
    let seen: serde_json::Value = serde_json::from_str(&seen).unwrap();
    assert_eq!(seen["cluster_id"], cluster_id(&old));
    let models: BTreeMap<&str, bool> = seen["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| (m["name"].as_str().unwrap(), m["stored"].as_bool().unwrap()))
        .collect();
    assert_eq!(models, [("brought", true), ("plus_one", false)].into());
    let epoch = seen["epoch"].as_u64().unwrap();

    let file = folder.path().join("cluster.cresset-backup");
    let whole = fs::read(&file).unwrap();
    let damaged = folder.path().join("damaged.cresset-backup");
    let mut bytes = whole.clone();
    bytes[whole.len() / 2] ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let refused = shell("cresset backup inspect damaged.cresset-backup", &[], folder.path());
    assert!(refused.code == Some(1) && refused.stderr.contains("isn't a whole backup"), "{refused:?}");

    old.shut_down().unwrap();
    let options =
        Options { restore: Some(file.clone()), model_repository: repository.path().into(), workers: 2, ..Options::default() };
    let new = Cluster::start(&options).unwrap();
    assert_ne!(cluster_id(&new), cluster_id(&old));
    for model in ["plus_one", "brought"] {
        new.wait_for_model(model, ModelState::Ready, PATIENCE).await.unwrap();
    }
    let status = new.status().await.unwrap();
    assert!(status.epoch > epoch && status.cluster_id == cluster_id(&new), "{status:?}");
    for (model, version) in [("plus_one", "stable"), ("brought", "")] {
        let request = cresset_proto::inference::ModelInferRequest { model_version: version.into(), ..row(model, &[1.0]) };
        let answer = inference(&new, "c2").await.model_infer(request).await.unwrap().into_inner();
        assert_eq!(numbers(&answer), [2.0], "{model}");
    }
    // A folder that holds a cluster isn't overwritten.
    let again = format!("cresset backup restore cluster.cresset-backup --data-dir {}", new.data_dir().join("c1").display());
    let refused = shell(&again, &[], folder.path());
    assert!(refused.code == Some(1) && refused.stderr.contains("already holds a coordinator"), "{refused:?}");
}

/// Coordinators for 10.0.0.1 and on, each with the settings of a runbook.
fn restored(count: u8, settings: &str, repository: &ModelRepository, prepare: impl Fn(&Beside)) -> Vec<Beside> {
    let mut all: Vec<Beside> = (1..=count).map(|n| Beside::new(20 + n)).collect();
    let hosts: Vec<String> = all.iter().map(|one| one.host.clone()).collect();
    for (n, one) in (1..).zip(&mut all) {
        let own = settings.replace("id = \"c1\"", &format!("id = \"c{n}\""));
        let own: String = own
            .lines()
            .map(
                |line| {
                    if line.starts_with("peers") { line.to_owned() } else { line.replace("10.0.0.1:", &format!("10.0.0.{n}:")) }
                },
            )
            .map(|line| line + "\n")
            .collect();
        let names: Vec<String> = (1..=count).map(|n| format!("10.0.0.{n}:")).collect();
        let addresses: Vec<String> = hosts.iter().map(|host| format!("{host}:")).collect();
        let mut replaced: Vec<(&str, &str)> =
            names.iter().map(String::as_str).zip(addresses.iter().map(String::as_str)).collect();
        replaced.push(("/srv/models", repository.path().to_str().unwrap()));
        one.configure(&own, &replaced);
        prepare(one);
        one.start();
    }
    all
}

/// Runs a command until it succeeds and prints what is looked for.
async fn until(block: &str, endpoints: &[String], folder: &Path, is_there: impl Fn(&str) -> bool) -> String {
    let mut ran = None;
    eventually(async || {
        let last = ran.insert(shell(block, endpoints, folder));
        if last.code == Some(0) && is_there(&last.stdout) { Ok(()) } else { Err(format!("{last:?}")) }
    })
    .await;
    ran.unwrap().stdout
}

/// Looks again and again at what nobody can be told of, until it is so.
async fn eventually(mut look: impl AsyncFnMut() -> Result<(), String>) {
    let limit = Instant::now() + PATIENCE;
    while let Err(seen) = look().await {
        assert!(Instant::now() < limit, "{seen}");
        sleep(ASK_AGAIN).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn coordinators_begin_from_a_backup_as_the_runbook_says() {
    let repository = plus_one();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cluster.cresset-backup");
    let [create, _, restore, start, look, _]: [String; 6] = blocks(BACKUP, "sh").try_into().expect("six steps");
    {
        let old = cluster(1, 1, &repository, &["plus_one"]);
        done(shell(&create, &old.endpoints(), folder.path()));
    }
    assert_eq!(start.trim(), "cresset-coordinator --config coordinator.toml");
    let [settings] = blocks(BACKUP, "toml").try_into().unwrap();
    let prepare = |one: &Beside| {
        let own = restore.replace("/var/lib/cresset", one.data().to_str().unwrap());
        done(shell(&own.replace("cluster.cresset-backup", file.to_str().unwrap()), &[], folder.path()));
    };
    let new = restored(3, &settings, &repository, prepare);
    let endpoints: Vec<String> = new.iter().map(|one| format!("{}:8001", one.host)).collect();
    let status = until(&look, &endpoints, folder.path(), |text| text.contains("production-2") && text.contains("c3")).await;
    assert!(status.contains("plus_one"), "{status}");
    for one in &new {
        let left = one.data().join("restore.cresset-backup");
        eventually(async || if left.exists() { Err("it wasn't begun from".to_owned()) } else { Ok(()) }).await;
        assert!(one.data().join("restored.cresset-backup").exists());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_is_left_goes_on_alone_as_the_runbook_says() {
    let repository = plus_one();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    load_with_files(&cluster).await;
    assert_eq!(command(&cluster, &["label", "plus_one", "stable=1"]).code, Some(0));
    let (peer, grpc, http) =
        (peer_address(&cluster, "c1"), cluster.grpc("c1").unwrap().to_owned(), cluster.http("c1").unwrap().to_owned());
    // What was acknowledged is on two disks at least: c1 has it once it says so itself.
    cluster.wait_for_model("brought", ModelState::Ready, PATIENCE).await.unwrap();
    let labelled = cluster.status().await.unwrap().epoch;
    eventually(async || {
        let epoch = cluster.own_status("c1").await.unwrap().epoch;
        if epoch < labelled { Err(format!("c1 stays behind at {epoch}")) } else { Ok(()) }
    })
    .await;
    let load = Load::start(&[Target::Client(Arc::new(cluster.client().await.unwrap()))], 2);
    load.more(100).await;
    cluster.kill_all(["c1", "c2", "c3"]).unwrap();

    let mut left = Beside::new(11);
    let [settings] = blocks(QUORUM, "toml").try_into().unwrap();
    let data = cluster.data_dir().join("c1");
    let here = settings.replace("/var/lib/cresset", data.to_str().unwrap());
    let replaced = [
        ("10.0.0.1:8003", &*peer),
        ("10.0.0.1:8001", &grpc),
        ("10.0.0.1:8002", &http),
        ("/srv/models", repository.path().to_str().unwrap()),
    ];
    let [start, look, add, promote]: [String; 4] = blocks(QUORUM, "sh").try_into().expect("four steps");
    assert_eq!(start.trim(), "cresset-coordinator --config coordinator.toml");
    let old = cluster_id(&cluster);
    // Under the old name it is refused, and nothing is touched.
    left.configure(&here.replace("production-2", &old), &replaced);
    left.start();
    let (code, log) = left.ended().await;
    assert!(code == Some(1) && log.contains("is the name of the group that is given up"), "{code:?}\n{log}");
    left.configure(&here, &replaced);
    left.start();
    let endpoints = [grpc.clone()];
    let folder = left.folder.path().to_owned();
    let ready = until(&look, &endpoints, &folder, |text| text.contains("production-2") && text.contains("brought")).await;
    assert!(ready.contains("plus_one"), "{ready}");
    for deployed in ["plus_one", "brought"] {
        let is_ready = |text: &str| {
            let status: serde_json::Value = serde_json::from_str(text).unwrap();
            let ready = |model: &serde_json::Value| model["name"] == deployed && model["state"] == "ready";
            status["models"].as_array().unwrap().iter().any(ready)
        };
        until("cresset status -o json", &endpoints, &folder, is_ready).await;
    }
    assert!(data.join("restored.cresset-backup").exists());

    let mut second = Beside::new(12);
    let joined = settings
        .replace("force-new-group = true", "join = true")
        .replace("id = \"c1\"", "id = \"c2\"")
        .replace("peers = [\"c1=10.0.0.1:8003\"]", &format!("peers = [\"c1={peer}\", \"c2={}:8003\"]", second.host))
        .replace("10.0.0.1", &second.host);
    second.configure(&joined, &[("/srv/models", repository.path().to_str().unwrap())]);
    done(shell(&add.replace("10.0.0.2", &second.host), &endpoints, &folder));
    second.start();
    until(&promote, &endpoints, &folder, |_| true).await;
    load.more(100).await;
    let outcome = load.end().await;
    assert_eq!(outcome.failures, Vec::<String>::new(), "what workers serve goes on");
    let members = done(shell("cresset member list", &endpoints, &folder));
    assert_eq!(members.lines().filter(|line| line.contains("voter")).count(), 2, "{members}");

    // One of the lost ones comes back after all: it is told whom it calls.
    cluster.restart_process("c2").unwrap();
    let log = cluster.data_dir().join("logs/c2.log");
    eventually(async || {
        let text = fs::read_to_string(&log).unwrap();
        if text.contains("this is cluster 'production-2'") { Ok(()) } else { Err(text) }
    })
    .await;
}
