//! `cresset watch`: what changes for routers, as it changes.
//!
//! Each line is about the epochs after the line before: models that changed are told as they are now, in all their versions. A line
//! since epoch 0 tells everything that there is: the first, unless `--from` names an epoch that the coordinators remember.
use std::{collections::BTreeMap, pin::pin};

use cresset_proto::fleet::v1::{ModelRoute, WatchResponse};
use futures::StreamExt;
use serde::Serialize;

use crate::{
    connect::Cluster,
    output::{self, Format},
};

/// Flags of `cresset watch`.
#[derive(clap::Args)]
pub struct Args {
    /// Go on after this epoch, as an earlier watch printed it, instead of beginning with everything that there is
    #[arg(long, value_name = "EPOCH", default_value_t = 0, hide_default_value = true)]
    from: u64,
}

/// One line, as `cresset watch -o json` prints it. Keys are only ever added.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Line {
    epoch: u64,
    /// The epoch that this follows; 0 if it tells everything that there is.
    since: u64,
    /// Models that changed and are there now.
    models: Vec<Model>,
    /// Names of which no version is there any more.
    models_gone: Vec<String>,
    /// Workers that changed and live.
    workers: Vec<Worker>,
    workers_gone: Vec<String>,
    coordinators: Vec<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Model {
    name: String,
    version: u64,
    generation: u64,
    labels: Vec<String>,
    /// Who serves each shard.
    shards: Vec<Vec<String>>,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Worker {
    id: String,
    incarnation: u64,
    address: String,
    zone: String,
}

impl From<WatchResponse> for Line {
    fn from(response: WatchResponse) -> Self {
        let mut labels: BTreeMap<(String, u64), Vec<String>> = BTreeMap::new();
        for label in response.labels {
            labels.entry((label.model, label.version)).or_default().push(label.label);
        }
        let model = |ModelRoute { model: name, version, generation, shards, .. }| Model {
            labels: labels.remove(&(name.clone(), version)).unwrap_or_default(),
            name,
            version,
            generation,
            shards: shards.into_iter().map(|shard| shard.worker_ids).collect(),
        };
        let models: Vec<Model> = response.models.into_iter().map(model).collect();
        let mut models_gone = response.models_changed;
        models_gone.retain(|name| !models.iter().any(|model| model.name == *name));
        let mut workers_gone = response.workers_changed;
        workers_gone.retain(|id| !response.workers.iter().any(|worker| worker.worker_id == *id));
        let worker = |worker: cresset_proto::fleet::v1::WorkerRoute| Worker {
            id: worker.worker_id,
            incarnation: worker.incarnation,
            address: worker.grpc_address,
            zone: worker.zone,
        };
        Self {
            epoch: response.epoch,
            since: response.since_epoch,
            models,
            models_gone,
            workers: response.workers.into_iter().map(worker).collect(),
            workers_gone,
            coordinators: response.coordinator_grpc_addresses,
        }
    }
}

/// Runs `cresset watch`, until it is interrupted.
///
/// # Errors
/// When stdout can't be written.
pub async fn run(cluster: &Cluster, args: &Args, format: Format) -> anyhow::Result<()> {
    let mut changes = pin!(cluster.watch_changes(args.from));
    while let Some(change) = changes.next().await {
        let line = Line::from(change);
        match format {
            Format::Json => output::print(&serde_json::to_string(&line)?)?,
            Format::Table => output::print(&words(&line))?,
        }
    }
    Ok(())
}

fn words(line: &Line) -> String {
    let mut news = Vec::new();
    for Model { name, version, labels, shards, .. } in &line.models {
        let labels = if labels.is_empty() { String::new() } else { format!(" ({})", labels.join(", ")) };
        let shard = |workers: &Vec<String>| if workers.is_empty() { "nobody".to_owned() } else { workers.join(", ") };
        let served: Vec<_> = shards.iter().map(shard).collect();
        news.push(format!("{name}/{version}{labels} on {}", served.join(" | ")));
    }
    news.extend(line.models_gone.iter().map(|name| format!("{name} is gone")));
    news.extend(line.workers.iter().map(|worker| format!("worker {} at {}", worker.id, worker.address)));
    news.extend(line.workers_gone.iter().map(|id| format!("worker {id} is gone")));
    if line.since == 0 {
        news.push(format!("that is all; coordinators {}", line.coordinators.join(", ")));
    } else if news.is_empty() {
        news.push(format!("coordinators {}", line.coordinators.join(", ")));
    }
    format!("epoch {}: {}", line.epoch, news.join("; "))
}

#[cfg(test)]
mod tests {
    use cresset_proto::fleet::v1::{Label, ShardRoute, WorkerRoute};

    use super::*;

    fn change() -> WatchResponse {
        let shard = |shard, workers: &[&str]| ShardRoute { shard, worker_ids: workers.iter().map(ToString::to_string).collect() };
        WatchResponse {
            epoch: 9,
            since_epoch: 7,
            models: vec![ModelRoute {
                model: "vad".into(),
                version: 2,
                generation: 5,
                shards: vec![shard(0, &["w1", "w3"]), shard(1, &[])],
                ..Default::default()
            }],
            models_changed: vec!["old".into(), "vad".into()],
            labels: vec![Label { model: "vad".into(), label: "stable".into(), version: 2 }],
            workers: vec![WorkerRoute { worker_id: "w3".into(), incarnation: 4, grpc_address: "h:1".into(), zone: "a".into() }],
            workers_changed: vec!["w2".into(), "w3".into()],
            coordinator_grpc_addresses: vec!["c:1".into()],
        }
    }

    #[test]
    fn a_change_is_told_in_one_line() {
        let text = words(&Line::from(change()));
        assert_eq!(text, "epoch 9: vad/2 (stable) on w1, w3 | nobody; old is gone; worker w3 at h:1; worker w2 is gone");
        let nothing =
            WatchResponse { epoch: 3, since_epoch: 2, coordinator_grpc_addresses: vec!["c:1".into()], ..Default::default() };
        assert_eq!(words(&Line::from(nothing)), "epoch 3: coordinators c:1");
        let all = WatchResponse { since_epoch: 0, models_changed: vec![], workers_changed: vec![], ..change() };
        assert!(words(&Line::from(all)).ends_with("worker w3 at h:1; that is all; coordinators c:1"));
    }

    #[test]
    fn the_json_shape_is_the_contract() {
        let json = serde_json::to_value(Line::from(change())).unwrap();
        let expected = serde_json::json!({
            "epoch": 9,
            "since": 7,
            "models": [{"name": "vad", "version": 2, "generation": 5, "labels": ["stable"], "shards": [["w1", "w3"], []]}],
            "models_gone": ["old"],
            "workers": [{"id": "w3", "incarnation": 4, "address": "h:1", "zone": "a"}],
            "workers_gone": ["w2"],
            "coordinators": ["c:1"],
        });
        assert_eq!(json, expected);
    }
}
