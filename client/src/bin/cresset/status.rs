//! `cresset status`: what the cluster says about itself, as tables or as JSON.
//!
//! [`Report`] is the contract for programs; `cresset up` draws its live view from the same values.
use std::{collections::BTreeMap, time::Duration};

use cresset_client::CallError;
use cresset_proto::{
    admin::v1::{
        self as admin, CoordinatorRole, ModelState, StatusRequest, StatusResponse, WorkerState,
        admin_service_client::AdminServiceClient,
    },
    fleet::v1::{ObservedReplica, ReplicaState},
};
use serde::Serialize;

use crate::{
    connect::{Cluster, request},
    output::{self, Format},
};

/// Flags of `cresset status`.
#[derive(clap::Args)]
pub struct Args {
    /// Print again at every change, until interrupted; with -o json one object a line
    #[arg(short, long)]
    watch: bool,
    /// Take the copy of whichever coordinator answers first, without asking the leader; it says how old it may be
    #[arg(long, conflicts_with = "watch")]
    stale: bool,
}

/// The cluster's status, as `cresset status -o json` prints it. Keys are only ever added.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    pub cluster_id: String,
    pub epoch: u64,
    /// The coordinator that told.
    pub answered_by: String,
    /// Whether nothing newer had been agreed on, as the leader confirmed. False while there is no leader.
    pub current: bool,
    /// Everything that had been agreed on so long ago is in it, in ms; 0 if it is current, null if that isn't known.
    pub age_ms: Option<u64>,
    /// The feature level that is in force; 0 if a version before there were levels answered.
    pub level: u32,
    pub coordinators: Vec<Coordinator>,
    pub workers: Vec<Worker>,
    pub models: Vec<Model>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Coordinator {
    pub id: String,
    pub address: String,
    /// `leader`, `follower`, `learner` or `unreachable`.
    pub role: &'static str,
    pub term: u64,
    /// Committed, as far as this coordinator knows.
    pub log_index: u64,
    pub applied_index: u64,
    /// The highest feature level that it knows; 0 if it didn't say.
    pub level_known: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Worker {
    pub id: String,
    pub incarnation: u64,
    /// `joining`, `ready`, `draining`, `suspect`, `dead` or `removed`.
    pub state: &'static str,
    pub address: String,
    pub zone: String,
    /// Names of its devices, comma-separated.
    pub device: String,
    pub memory_bytes: u64,
    pub memory_free_bytes: u64,
    pub replicas: Vec<Replica>,
    pub requests_total: u64,
    pub requests_in_flight: u64,
    pub sequences_live: u64,
    /// Routers that leave it alone.
    pub routers_without: u32,
    /// Routers that it answers, as far as they said; only while others leave it alone.
    pub routers_with: u32,
    /// Facts about it that its operator chose.
    pub tags: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replica {
    pub model: String,
    pub version: u64,
    pub shard: u32,
    /// `assigned`, `loading`, `ready`, `failed` or `unloading`.
    pub state: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
    pub memory_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Model {
    pub name: String,
    pub version: u64,
    /// Which deployment of the name this is.
    pub generation: u64,
    /// `ready`, `loading`, `degraded`, `failed` or `evicted`.
    pub state: &'static str,
    /// Why it isn't ready; empty if it is.
    pub reason: String,
    pub shards: u32,
    pub replicas_wanted: u32,
    pub replicas_ready: u32,
    /// Names that requests can use for this version.
    pub labels: Vec<String>,
    /// It goes as soon as what was deployed instead has come up.
    pub leaving: bool,
    /// Nothing of this generation answers, and nothing will without help. What was deployed before may answer.
    pub stuck: bool,
    /// Tags that it demands of the workers that run it.
    pub tags_required: BTreeMap<String, String>,
    /// The workers that it demands; any if empty.
    pub workers_required: Vec<String>,
    /// What has a higher priority is given a place first.
    pub priority: u32,
    /// It may be ended to make room for what has a higher priority.
    pub evictable: bool,
    /// For how long it has computed nothing on any worker, in s; null if that isn't known.
    pub idle_s: Option<u64>,
}

impl Report {
    /// The coordinator that leads, if one does.
    pub fn leader(&self) -> Option<&Coordinator> {
        self.coordinators.iter().find(|coordinator| coordinator.role == "leader")
    }

    /// The deployed versions of a model, ascending.
    pub fn versions<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Model> {
        self.models.iter().filter(move |model| model.name == name)
    }

    /// One deployed version of a model.
    pub fn model(&self, name: &str, version: u64) -> Option<&Model> {
        self.models.iter().find(|model| model.name == name && model.version == version)
    }

    /// Replicas of one model, on workers that live.
    pub fn replicas_of<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Worker, &'a Replica)> {
        let living = self.workers.iter().filter(|worker| !worker.is_over());
        living
            .flat_map(|worker| worker.replicas.iter().map(move |replica| (worker, replica)))
            .filter(move |(_, r)| r.model == name)
    }
}

impl From<StatusResponse> for Report {
    fn from(status: StatusResponse) -> Self {
        let mut report = Self {
            cluster_id: status.cluster_id,
            epoch: status.epoch,
            answered_by: status.answered_by,
            current: status.current,
            age_ms: status.age_ms,
            level: status.level,
            coordinators: status.coordinators.into_iter().map(Coordinator::from).collect(),
            workers: status.workers.into_iter().map(Worker::from).collect(),
            models: status.models.into_iter().map(Model::from).collect(),
        };
        report.coordinators.sort_by_key(|coordinator| natural(&coordinator.id));
        report.workers.sort_by_key(|worker| natural(&worker.id));
        report.models.sort_by(|a, b| (&a.name, a.version).cmp(&(&b.name, b.version)));
        report
    }
}

/// `w2` before `w10`.
fn natural(id: &str) -> (String, u64, String) {
    let digits_at = id.find(|c: char| c.is_ascii_digit()).unwrap_or(id.len());
    (id[..digits_at].to_owned(), id[digits_at..].parse().unwrap_or(u64::MAX), id.to_owned())
}

impl From<admin::Coordinator> for Coordinator {
    fn from(coordinator: admin::Coordinator) -> Self {
        let role = match coordinator.role() {
            CoordinatorRole::Leader => "leader",
            // Between two leaders every peer is a follower of nobody for a moment.
            CoordinatorRole::Follower | CoordinatorRole::Candidate => "follower",
            CoordinatorRole::Learner => "learner",
            CoordinatorRole::Unreachable | CoordinatorRole::Unspecified => "unreachable",
        };
        Self {
            role,
            id: coordinator.id,
            address: coordinator.grpc_address,
            term: coordinator.term,
            log_index: coordinator.commit_index,
            applied_index: coordinator.applied_index,
            level_known: coordinator.level_known,
        }
    }
}

impl Worker {
    /// Whether this life of it is over.
    pub fn is_over(&self) -> bool {
        matches!(self.state, "dead" | "removed")
    }
}

impl From<admin::Worker> for Worker {
    fn from(worker: admin::Worker) -> Self {
        let state = match worker.state() {
            WorkerState::Ready | WorkerState::Unspecified => "ready",
            WorkerState::Draining => "draining",
            WorkerState::Dead => "dead",
            WorkerState::Joining => "joining",
            WorkerState::Suspect => "suspect",
            WorkerState::Removed => "removed",
        };
        Self {
            state,
            id: worker.id,
            incarnation: worker.incarnation,
            address: worker.grpc_address,
            zone: worker.zone,
            device: worker.devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>().join(","),
            memory_bytes: worker.devices.iter().map(|device| device.memory_bytes).fold(0, u64::saturating_add),
            memory_free_bytes: worker.memory_free_bytes,
            replicas: worker.replicas.into_iter().map(Replica::from).collect(),
            requests_total: worker.requests_total,
            requests_in_flight: worker.requests_in_flight,
            sequences_live: worker.sequences_live,
            routers_without: worker.routers_without,
            routers_with: worker.routers_with,
            tags: worker.tags.into_iter().collect(),
        }
    }
}

impl From<ObservedReplica> for Replica {
    fn from(replica: ObservedReplica) -> Self {
        let state = match replica.state() {
            ReplicaState::Assigned | ReplicaState::Unspecified => "assigned",
            ReplicaState::Loading => "loading",
            ReplicaState::Ready => "ready",
            ReplicaState::Failed => "failed",
            ReplicaState::Unloading => "unloading",
        };
        Self {
            state,
            model: replica.model,
            version: replica.version,
            shard: replica.shard,
            reason: output::one_line(&replica.reason),
            memory_bytes: replica.memory_bytes,
        }
    }
}

impl From<admin::Model> for Model {
    fn from(model: admin::Model) -> Self {
        let state = match model.state() {
            ModelState::Ready => "ready",
            ModelState::Loading | ModelState::Unspecified => "loading",
            ModelState::Degraded => "degraded",
            ModelState::Failed => "failed",
            ModelState::Evicted => "evicted",
        };
        let demands = model.demands.unwrap_or_default();
        Self {
            state,
            name: model.name,
            version: model.version,
            generation: model.generation,
            reason: output::one_line(&model.reason),
            shards: model.shards,
            replicas_wanted: model.replicas_wanted,
            replicas_ready: model.replicas_ready,
            labels: model.labels,
            leaving: model.leaving,
            stuck: model.stuck,
            tags_required: demands.tags.into_iter().collect(),
            workers_required: demands.workers,
            priority: model.priority,
            evictable: model.evictable,
            idle_s: model.idle_s,
        }
    }
}

/// Runs `cresset status`.
///
/// # Errors
/// When no coordinator answers, or stdout can't be written.
pub async fn run(cluster: &Cluster, args: &Args, format: Format) -> anyhow::Result<()> {
    let report = if args.stale { Report::from(status(cluster, true).await?) } else { ask(cluster).await? };
    if !report.current {
        eprintln!("cresset: {}", copy_words(&report));
    }
    if !args.watch {
        match format {
            Format::Json => output::print_json(&report)?,
            Format::Table => output::print(&tables(&report))?,
        }
        return Ok(());
    }
    watch(cluster, report, format).await
}

async fn watch(cluster: &Cluster, first: Report, format: Format) -> anyhow::Result<()> {
    let screen = console::Term::stdout();
    let mut watch = cluster.watch().follow_leader();
    let mut report = first;
    loop {
        match format {
            Format::Json => output::print(&serde_json::to_string(&report)?)?,
            Format::Table => {
                if screen.is_term() {
                    screen.clear_screen()?;
                }
                output::print(&tables(&report))?;
            }
        }
        let shown = report;
        report = loop {
            let next = Report::from(watch.next().await?);
            if next != shown {
                break next;
            }
        };
    }
}

/// Whose copy a report is, and how old it may be.
fn copy_words(report: &Report) -> String {
    match report.age_ms {
        Some(age_ms) => {
            let age = output::seconds(Duration::from_millis(age_ms));
            format!("this is {}'s own copy: what was agreed on in the last {age} may be missing", report.answered_by)
        }
        None => format!("this is {}'s own copy and may be old: no leader ever confirmed it", report.answered_by),
    }
}

/// Asks for a status that is certainly current; where no coordinator leads, for whatever copy there is, and says so.
async fn ask(cluster: &Cluster) -> Result<Report, CallError> {
    const CURRENT_TIMEOUT_MAX: Duration = Duration::from_secs(5);
    let half = (cluster.timeout() / 2).min(CURRENT_TIMEOUT_MAX);
    let tried = match status(&cluster.within(half), false).await {
        Ok(answer) => return Ok(Report::from(answer)),
        Err(CallError::Unanswered { tried, .. }) => tried,
        Err(error) => return Err(error),
    };
    let copy = match status(&cluster.within(cluster.timeout() - half), true).await {
        Ok(copy) => Report::from(copy),
        Err(CallError::Unanswered { tried, .. }) => return Err(CallError::Unanswered { timeout: cluster.timeout(), tried }),
        Err(error) => return Err(error),
    };
    let why = tried.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
    eprintln!("cresset: nobody could say what is current: {why}");
    Ok(copy)
}

async fn status(cluster: &Cluster, allow_stale: bool) -> Result<StatusResponse, CallError> {
    let ask = async |channel, limit| {
        AdminServiceClient::new(channel).status(request(StatusRequest { allow_stale, ..Default::default() }, limit)).await
    };
    cluster.call(ask).await
}

/// The report for people.
fn tables(report: &Report) -> String {
    let leader = report.leader().map_or("no leader".to_owned(), |leader| format!("leader {} (term {})", leader.id, leader.term));
    let mut text = format!("cluster {}, epoch {}, {leader}{}\n\n", report.cluster_id, report.epoch, level_words(report));
    let coordinator =
        |c: &Coordinator| vec![c.id.clone(), c.address.clone(), c.role.to_owned(), c.term.to_string(), c.log_index.to_string()];
    let rows = report.coordinators.iter().map(coordinator).collect();
    text += &output::table(&["COORDINATOR", "ADDRESS", "ROLE", "TERM", "LOG"], rows);
    let worker = |w: &Worker| {
        let replicas: Vec<_> = w.replicas.iter().map(replica_words).collect();
        let replicas = if replicas.is_empty() { "-".to_owned() } else { replicas.join(", ") };
        let memory = format!("{} of {}", output::bytes(w.memory_free_bytes), output::bytes(w.memory_bytes));
        vec![
            w.id.clone(),
            match w.routers_without {
                0 => w.state.to_owned(),
                without => format!("{}, left alone by {without} of {} routers", w.state, without + w.routers_with),
            },
            w.device.clone(),
            memory,
            w.requests_in_flight.to_string(),
            w.incarnation.to_string(),
            replicas,
        ]
    };
    let rows = report.workers.iter().map(worker).collect();
    text += "\n";
    text += &output::table(&["WORKER", "STATE", "DEVICE", "MEMORY FREE", "IN FLIGHT", "INCARNATION", "REPLICAS"], rows);
    let model = |m: &Model| {
        let replicas = format!("{}/{}", m.replicas_ready, m.replicas_wanted);
        let dash = |text: &str| if text.is_empty() { "-".to_owned() } else { text.to_owned() };
        let state = if m.leaving { format!("{}, leaving", m.state) } else { m.state.to_owned() };
        let labels = dash(&m.labels.join(", "));
        vec![m.name.clone(), m.version.to_string(), labels, state, m.shards.to_string(), replicas, dash(&m.reason)]
    };
    let rows = report.models.iter().map(model).collect();
    text += "\n";
    text += &output::table(&["MODEL", "VERSION", "LABELS", "STATE", "SHARDS", "REPLICAS", "REASON"], rows);
    for worker in &report.workers {
        for replica in worker.replicas.iter().filter(|replica| !replica.reason.is_empty()) {
            text += &format!("\n{} on {}: {}", replica_words(replica), worker.id, replica.reason);
        }
    }
    text
}

/// The feature level in force, and while an upgrade isn't finished, who holds it up.
fn level_words(report: &Report) -> String {
    if report.level == 0 {
        return String::new();
    }
    let highest = report.coordinators.iter().map(|c| c.level_known).max().unwrap_or_default();
    let behind: Vec<&str> = report.coordinators.iter().filter(|c| c.level_known < highest).map(|c| c.id.as_str()).collect();
    if highest <= report.level || behind.is_empty() {
        return format!(", feature level {}", report.level);
    }
    format!(", feature level {} (of {highest}: not known to be known by {})", report.level, behind.join(", "))
}

/// `vad/1 ready`, with the shard where it isn't the first.
pub fn replica_words(replica: &Replica) -> String {
    let shard = if replica.shard == 0 { String::new() } else { format!(" shard {}", replica.shard) };
    format!("{}/{}{shard} {}", replica.model, replica.version, replica.state)
}

#[cfg(test)]
pub mod tests {
    use cresset_proto::fleet::v1::Device;

    use super::*;

    /// A cluster in the middle of a failover, for tests here and of the live view.
    pub fn example() -> StatusResponse {
        let coordinator = |id: &str, role: CoordinatorRole| admin::Coordinator {
            id: id.to_owned(),
            grpc_address: format!("127.0.0.1:80{}1", &id[1..]),
            role: role as i32,
            term: 3,
            commit_index: 41,
            applied_index: 40,
            level_known: if id == "c1" { 0 } else { 2 },
        };
        let replica = |model: &str, state: ReplicaState, reason: &str| ObservedReplica {
            model: model.to_owned(),
            version: 1,
            state: state as i32,
            reason: reason.to_owned(),
            ..Default::default()
        };
        let worker = |id: &str, state: WorkerState, replicas: Vec<ObservedReplica>| admin::Worker {
            id: id.to_owned(),
            incarnation: 1_700_000_000_000_001,
            state: state as i32,
            devices: vec![Device { name: "cpu".to_owned(), memory_bytes: 4 << 30 }],
            memory_free_bytes: 3 << 30,
            replicas,
            requests_total: 100,
            requests_in_flight: 2,
            ..Default::default()
        };
        let model = |name: &str, state: ModelState, ready: u32, reason: &str| admin::Model {
            name: name.to_owned(),
            version: 1,
            generation: 7,
            shards: 1,
            replicas_wanted: 2,
            replicas_ready: ready,
            state: state as i32,
            reason: reason.to_owned(),
            labels: if name == "vad" { vec!["canary".to_owned(), "stable".to_owned()] } else { vec![] },
            leaving: false,
            stuck: state == ModelState::Failed,
            demands: None,
            priority: 0,
            evictable: false,
            idle_s: None,
        };
        StatusResponse {
            cluster_id: "local-0123abcd".to_owned(),
            epoch: 12,
            answered_by: "c2".to_owned(),
            current: true,
            level: 1,
            age_ms: Some(0),
            coordinators: vec![
                coordinator("c10", CoordinatorRole::Candidate),
                coordinator("c2", CoordinatorRole::Leader),
                coordinator("c1", CoordinatorRole::Unreachable),
            ],
            workers: vec![
                worker("w2", WorkerState::Dead, vec![]),
                worker(
                    "w1",
                    WorkerState::Ready,
                    vec![
                        replica("vad", ReplicaState::Ready, ""),
                        replica("broken", ReplicaState::Failed, "model.pt is not an archive"),
                    ],
                ),
            ],
            models: vec![
                model("vad", ModelState::Degraded, 1, "1 of 2 replicas"),
                model("broken", ModelState::Failed, 0, "model.pt is not an archive"),
            ],
        }
    }

    #[test]
    fn the_json_shape_is_the_contract() {
        let json = serde_json::to_value(Report::from(example())).unwrap();
        assert_eq!(json["current"], true);
        assert_eq!(json["level"], 1);
        assert_eq!(json["age_ms"], 0);
        assert_eq!(json["coordinators"][1]["level_known"], 2);
        assert_eq!(json["coordinators"][0]["id"], "c1");
        assert_eq!(json["coordinators"][0]["role"], "unreachable");
        assert_eq!(json["coordinators"][1]["role"], "leader");
        assert_eq!(json["coordinators"][1]["log_index"], 41);
        assert_eq!(json["coordinators"][2]["role"], "follower");
        assert_eq!(json["workers"][0]["id"], "w1");
        assert_eq!(json["workers"][0]["incarnation"], 1_700_000_000_000_001u64);
        assert_eq!(json["workers"][0]["device"], "cpu");
        assert_eq!(json["workers"][1]["state"], "dead");
        let replicas = &json["workers"][0]["replicas"];
        assert_eq!(
            replicas[0],
            serde_json::json!({"model": "vad", "version": 1, "shard": 0, "state": "ready", "memory_bytes": 0})
        );
        assert_eq!(replicas[1]["reason"], "model.pt is not an archive");
        assert_eq!(json["models"][0]["name"], "broken");
        assert_eq!(json["models"][0]["state"], "failed");
        assert_eq!(json["models"][1]["state"], "degraded");
        assert_eq!(json["models"][1]["labels"], serde_json::json!(["canary", "stable"]));
        assert_eq!(json["models"][0]["stuck"], true);
        assert_eq!(json["models"][1]["replicas_wanted"], 2);
        assert_eq!(json["models"][1]["replicas_ready"], 1);
        assert_eq!(json["models"][1]["reason"], "1 of 2 replicas");
    }

    #[test]
    fn the_tables_say_who_leads_and_why_something_failed() {
        let text = tables(&Report::from(example()));
        for part in [
            "cluster local-0123abcd, epoch 12, leader c2 (term 3), feature level 1 (of 2: not known to be known by c1)",
            "c1           127.0.0.1:8011   unreachable  3     41",
            "3.0 GiB of 4.0 GiB",
            "vad/1 ready, broken/1 failed",
            "canary, stable  degraded  1       1/2",
            "broken/1 failed on w1: model.pt is not an archive",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_copy_says_how_old_it_may_be() {
        let copy = |age_ms| copy_words(&Report::from(StatusResponse { age_ms, current: false, ..example() }));
        assert_eq!(copy(Some(1_500)), "this is c2's own copy: what was agreed on in the last 1.5 s may be missing");
        assert_eq!(copy(None), "this is c2's own copy and may be old: no leader ever confirmed it");
    }

    #[test]
    fn an_empty_cluster_has_empty_lists() {
        let json = serde_json::to_value(Report::from(StatusResponse::default())).unwrap();
        for list in ["coordinators", "workers", "models"] {
            assert_eq!(json[list], serde_json::json!([]));
        }
    }
}
