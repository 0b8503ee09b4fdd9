//! What changes is told to whoever watches: nothing missed, nothing twice, whoever dies; and a copy of the state says how old it is.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader},
    pin::pin,
    process::{Child, Command, Stdio},
};

use cresset_client::{ConnectionSettings, Coordinators};
use cresset_proto::{
    admin::v1::StatusResponse,
    fleet::v1::{Label, ModelRoute, WatchResponse, WorkerRoute},
};
use cresset_tests::harness::{Cluster, binaries, leader_of};
use futures::StreamExt;
use serde_json::Value;
use tokio::time::timeout;

use crate::support::{PATIENCE, cluster, command, plus_one};

/// What somebody knows who has heard all that was told.
#[derive(Debug, Default, PartialEq)]
struct Known {
    epoch: u64,
    models: BTreeMap<(String, u64), ModelRoute>,
    labels: BTreeMap<(String, String), Label>,
    workers: BTreeMap<String, WorkerRoute>,
    coordinators: Vec<String>,
}

impl Known {
    fn hear(&mut self, told: WatchResponse) {
        if told.since_epoch == 0 {
            *self = Self::default();
        } else {
            assert_eq!(told.since_epoch, self.epoch, "something was missed, or told twice");
        }
        assert!(told.epoch > self.epoch);
        self.models.retain(|(name, _), _| !told.models_changed.contains(name));
        self.labels.retain(|(name, _), _| !told.models_changed.contains(name));
        self.workers.retain(|id, _| !told.workers_changed.contains(id));
        self.models.extend(told.models.into_iter().map(|route| ((route.model.clone(), route.version), route)));
        self.labels.extend(told.labels.into_iter().map(|label| ((label.model.clone(), label.label.clone()), label)));
        self.workers.extend(told.workers.into_iter().map(|worker| (worker.worker_id.clone(), worker)));
        (self.epoch, self.coordinators) = (told.epoch, told.coordinator_grpc_addresses);
    }
}

/// What there is, by somebody who has just come.
async fn whole(cluster: &Cluster) -> Known {
    let coordinators = Coordinators::new(cluster.endpoints(), ConnectionSettings::default());
    let mut known = Known::default();
    known.hear(timeout(PATIENCE, pin!(coordinators.watch_changes(0)).next()).await.unwrap().unwrap());
    known
}

/// Waits until a coordinator has all that the leader has.
async fn back(cluster: &Cluster, id: &str) {
    let is_back = |status: &StatusResponse| {
        let committed = leader_of(status)?.commit_index;
        status.coordinators.iter().find(|c| c.id == id && c.applied_index >= committed).map(drop)
    };
    cluster.wait_for(&format!("{id} back"), PATIENCE, is_back).await.unwrap();
}

fn label(cluster: &Cluster, version: usize) -> u64 {
    let labelled = command(cluster, &["label", "plus_one", &format!("v{version}=1"), "-o", "json"]);
    assert_eq!(labelled.code, Some(0), "{labelled:?}");
    labelled.json()["epoch"].as_u64().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_watch_misses_nothing_and_hears_nothing_twice_while_coordinators_die() {
    let repository = plus_one();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    let coordinators = Coordinators::new(cluster.endpoints(), ConnectionSettings::default());
    let mut changes = pin!(coordinators.watch_changes(0));
    let mut known = Known::default();
    let mut wholes = 0;
    let ids = ["c1", "c2", "c3"];
    for (number, id) in ids.iter().cycle().take(6).enumerate() {
        // Whoever is watched, and whoever leads, is among them.
        cluster.kill(id).unwrap();
        let epochs = [label(&cluster, 2 * number), label(&cluster, 2 * number + 1)];
        while known.epoch < epochs[1] {
            let told = timeout(PATIENCE, changes.next()).await.expect("the watch goes on").unwrap();
            wholes += usize::from(told.since_epoch == 0);
            known.hear(told);
        }
        cluster.restart_process(id).unwrap();
        back(&cluster, id).await;
    }
    assert_eq!(wholes, 1, "each coordinator remembers enough");
    assert_eq!(known.labels.len(), 12);
    assert_eq!(known, whole(&cluster).await, "whoever heard all changes knows what there is");
}

/// `cresset watch`, until it is dropped.
struct Watching {
    child: Child,
    lines: std::io::Lines<BufReader<std::process::ChildStdout>>,
}

impl Watching {
    fn start(cluster: &Cluster, args: &[&str]) -> Self {
        let mut command: Command = binaries::command("cresset");
        command.args(["--endpoints", &cluster.endpoints().join(","), "watch"]).args(args);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    fn next(&mut self) -> String {
        self.lines.next().expect("it goes on").unwrap()
    }

    fn json(&mut self) -> Value {
        serde_json::from_str(&self.next()).unwrap()
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_command_line_watches_from_where_it_was() {
    let repository = plus_one();
    let cluster = cluster(3, 1, &repository, &["plus_one"]);
    let mut watching = Watching::start(&cluster, &["-o", "json"]);
    let first = watching.json();
    assert_eq!((&first["since"], &first["models"][0]["name"]), (&Value::from(0), &Value::from("plus_one")), "{first}");
    assert_eq!((&first["workers"][0]["id"], first["coordinators"].as_array().unwrap().len()), (&Value::from("w1"), 3), "{first}");
    let epoch = label(&cluster, 1);
    let second = watching.json();
    assert_eq!((&second["epoch"], &second["since"]), (&Value::from(epoch), &first["epoch"]), "{second}");
    assert_eq!(second["models"][0]["labels"], serde_json::json!(["v1"]));
    drop(watching);

    let last = label(&cluster, 2);
    let mut again = Watching::start(&cluster, &["--from", &epoch.to_string()]);
    assert_eq!(again.next(), format!("epoch {last}: plus_one/1 (v1, v2) on w1"));
    let undeployed = command(&cluster, &["undeploy", "plus_one"]);
    assert_eq!(undeployed.code, Some(0), "{undeployed:?}");
    let gone = again.next();
    assert!(gone.ends_with(": plus_one is gone"), "{gone}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_says_how_old_it_may_be() {
    let repository = plus_one();
    let cluster = cluster(3, 1, &repository, &["plus_one"]);
    let current = command(&cluster, &["status", "-o", "json"]).json();
    assert_eq!((&current["current"], &current["age_ms"]), (&Value::from(true), &Value::from(0)), "{current}");
    let stale = || {
        let ran = command(&cluster, &["status", "--stale", "-o", "json"]);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let status = ran.json();
        assert_eq!(status["current"], false, "{status}");
        (status["age_ms"].as_u64().expect("it has heard of a leader"), status["epoch"].as_u64().unwrap(), ran.stderr)
    };
    let (_, epoch, said) = stale();
    assert!(said.contains("'s own copy: what was agreed on in the last "), "{said}");
    assert_eq!(Some(epoch), current["epoch"].as_u64());

    // Nobody can tell any more, and the copy grows old.
    cluster.kill_all(["c2", "c3"]).unwrap();
    let killed = std::time::Instant::now();
    loop {
        // What it was told on their last day may come a moment later.
        let since = killed.elapsed().as_millis();
        let (age_ms, epoch_now, _) = stale();
        assert_eq!(epoch_now, epoch);
        if since > 3_000 {
            assert!(u128::from(age_ms) + 500 > since, "{age_ms} ms old, {since} ms after the others died");
            break;
        }
    }
}
