//! `cresset deploy`, `cresset undeploy`, `cresset label` and `cresset repository`.
//!
//! A command carries an id chosen here, the same in every retry, so that it is applied once whoever had to be asked.
//! Waiting follows the cluster's status as it changes; nothing is polled.
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use cresset_client::CallError;
use cresset_proto::{
    admin::v1::{
        Demands, DeployRequest, DeployResponse, DeployedVersion, LabelRequest, RepositoryRequest, UndeployRequest,
        UndeployResponse, admin_service_client::AdminServiceClient,
    },
    ids::check_label,
};
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    connect::{Cluster, request},
    output::{self, Format},
    settings::Settings,
    status::Report,
};

pub(crate) const WAIT_DEFAULT: Duration = Duration::from_secs(60);

/// Flags of `cresset deploy`.
#[derive(clap::Args)]
pub struct DeployArgs {
    /// The model's folder in the repository
    name: String,
    /// Serve exactly this version in addition to those that are served [default: those that the model's version_policy
    /// chooses, by itself the highest in the repository, and no others; a version that has a label stays too]
    #[arg(long, value_name = "V", value_parser = clap::value_parser!(u64).range(1..))]
    version: Option<u64>,
    /// On how many workers each version [default: as it is; for a new one 2, or as many as there are workers if fewer]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    replicas: Option<u32>,
    /// Only on workers that have this tag: their setting `tags`. Again for more; with --on it takes the place of all that was
    /// demanded before [default: as it is]
    #[arg(long, value_name = "TAG=VALUE", value_parser = tag)]
    require: Vec<(String, String)>,
    /// Only on these workers, w1,w2; --on any lifts it [default: as it is]
    #[arg(long, value_name = "WORKERS", value_delimiter = ',')]
    on: Vec<String>,
    /// Where memory is short, what has more of it is given a place first, if need be that of what is --evictable and has less
    /// [default: as it is; 0 at first]
    #[arg(long, value_name = "N")]
    priority: Option<u32>,
    /// It may be ended to make room for what has a higher priority, and comes back when there is room; --evictable=false lifts it
    /// [default: as it is]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    evictable: Option<bool>,
    /// Wait until every replica is ready; exit 1 with the reason if that can't be
    #[arg(long)]
    wait: bool,
}

/// Flags of `cresset undeploy`.
#[derive(clap::Args)]
pub struct UndeployArgs {
    /// The deployed model
    name: String,
    /// Only this version [default: all of them]
    #[arg(long, value_name = "V", value_parser = clap::value_parser!(u64).range(1..))]
    version: Option<u64>,
    /// Wait until no living worker holds it any more
    #[arg(long)]
    wait: bool,
}

/// Flags of `cresset label`.
#[derive(clap::Args)]
pub struct LabelArgs {
    /// The deployed model
    name: String,
    /// A label and the version that it is to point at, as in canary=2; canary= takes the label away. All at once, or none
    #[arg(required = true, value_name = "LABEL=VERSION", value_parser = label)]
    labels: Vec<(String, u64)>,
}

fn label(text: &str) -> Result<(String, u64), String> {
    let (label, version) = text.split_once('=').ok_or("it must be LABEL=VERSION, as in canary=2, or LABEL= to take it away")?;
    check_label(label).map_err(|error| error.to_string())?;
    match version {
        "" => Ok((label.to_owned(), 0)),
        number => match number.parse() {
            Ok(version) if version > 0 => Ok((label.to_owned(), version)),
            Ok(_) | Err(_) => Err(format!("version '{number}' must be a whole number from 1")),
        },
    }
}

fn tag(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((tag, value)) if !tag.is_empty() => Ok((tag.to_owned(), value.to_owned())),
        Some(_) | None => Err("it must be TAG=VALUE, as in gpu=h100".to_owned()),
    }
}

impl DeployArgs {
    /// What is demanded of workers, if that is said.
    fn demands(&self) -> Option<Demands> {
        if self.require.is_empty() && self.on.is_empty() {
            return None;
        }
        let workers = self.on.iter().filter(|worker| *worker != "any").cloned().collect();
        Some(Demands { tags: self.require.iter().cloned().collect(), workers })
    }

    /// All but the id.
    fn request(&self) -> DeployRequest {
        DeployRequest {
            name: self.name.clone(),
            version: self.version.unwrap_or(0),
            replicas: self.replicas.unwrap_or(0),
            demands: self.demands(),
            priority: self.priority,
            evictable: self.evictable,
            ..Default::default()
        }
    }
}

/// Why a deployment wasn't brought about.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// It can't be served as things are.
    #[error("model '{name}' can't be served: {reason}")]
    Failed { name: String, reason: String },
    /// Someone else's command came in between.
    #[error("model '{name}' was undeployed meanwhile")]
    Gone { name: String },
    /// The time is over.
    #[error("model '{name}' {doing} after {}: {state}; give it longer with --timeout", output::seconds(*after))]
    TimedOut { name: String, doing: &'static str, after: Duration, state: String },
    /// The cluster can't be asked.
    #[error(transparent)]
    Call(#[from] CallError),
}

#[derive(Serialize)]
struct Deployed<'a> {
    name: &'a str,
    /// The highest.
    version: u64,
    /// All that this was about.
    versions: Vec<u64>,
    generation: u64,
    epoch: u64,
    /// Only with `--wait`.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
}

/// Runs `cresset deploy`.
///
/// # Errors
/// When it is refused, when nobody answers, and with `--wait` when the model can't be served.
pub async fn deploy(cluster: &Cluster, args: &DeployArgs, settings: &Settings) -> anyhow::Result<()> {
    let begun = Instant::now();
    let accepted = send_deploy(cluster, args.request()).await?;
    let versions: Vec<u64> = accepted.versions.iter().map(|deployed| deployed.version).collect();
    let label = versions.iter().map(|version| format!("{}/{version}", args.name)).collect::<Vec<_>>().join(", ");
    let is = if versions.len() == 1 { "is" } else { "are" };
    if args.wait {
        eprintln!("cresset: {label} {is} accepted, waiting until ready");
        wait_ready(cluster, &args.name, &accepted, settings.given_timeout.unwrap_or(WAIT_DEFAULT)).await?;
    }
    match settings.output {
        Format::Json => output::print_json(&Deployed {
            name: &args.name,
            version: accepted.version,
            versions,
            generation: accepted.generation,
            epoch: accepted.epoch,
            state: args.wait.then_some("ready"),
        })?,
        Format::Table if args.wait => output::print(&format!("{label} {is} ready after {}", output::seconds(begun.elapsed())))?,
        Format::Table => output::print(&format!("{label} {is} accepted; `cresset status` shows the progress"))?,
    }
    Ok(())
}

/// Sends the command, once however often it has to be asked.
///
/// # Errors
/// [`CallError`] of the cluster.
pub async fn send_deploy(cluster: &Cluster, wanted: DeployRequest) -> Result<DeployResponse, CallError> {
    let message = DeployRequest { command_id: command_id(), ..wanted };
    let ask = async |channel, limit| AdminServiceClient::new(channel).deploy(request(message.clone(), limit)).await;
    cluster.call(ask).await
}

/// An id for a command, at random.
pub fn command_id() -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(&rand::random::<[u8; 16]>())
}

/// What a status says about a deployment that is waited for.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Pending(String),
    Ready,
    Failed(String),
    Gone,
}

fn progress(report: &Report, name: &str, accepted: &DeployResponse) -> Progress {
    let versions = accepted.versions.iter().map(|deployed| version_progress(report, name, deployed, accepted.epoch));
    // The first that isn't ready tells what is waited for, unless one can't be served at all.
    versions.fold(Progress::Ready, |whole, one| match (&whole, &one) {
        (Progress::Failed(_), _) | (_, Progress::Ready) => whole,
        (_, Progress::Failed(_)) | (Progress::Ready, _) => one,
        _ => whole,
    })
}

fn version_progress(report: &Report, name: &str, wanted: &DeployedVersion, epoch: u64) -> Progress {
    let known = report.model(name, wanted.version);
    let Some(model) = known.filter(|model| model.generation >= wanted.generation) else {
        let is_old = report.epoch < epoch || known.is_some();
        return if is_old { Progress::Pending("not known there yet".to_owned()) } else { Progress::Gone };
    };
    let reason = if model.reason.is_empty() { String::new() } else { format!(" ({})", model.reason) };
    match model.state {
        "ready" => Progress::Ready,
        _ if model.stuck && model.reason.is_empty() => Progress::Failed("no reason was given".to_owned()),
        _ if model.stuck => Progress::Failed(model.reason.clone()),
        state => {
            Progress::Pending(format!("{state}, {} of {} replicas ready{reason}", model.replicas_ready, model.replicas_wanted))
        }
    }
}

async fn wait_ready(cluster: &Cluster, name: &str, accepted: &DeployResponse, limit: Duration) -> Result<(), WaitError> {
    let name_owned = || name.to_owned();
    let mut last = "no status came".to_owned();
    let mut watch = cluster.watch();
    let follow = async {
        loop {
            let report = Report::from(watch.next().await?);
            match progress(&report, name, accepted) {
                Progress::Ready => return Ok(()),
                Progress::Failed(reason) => return Err(WaitError::Failed { name: name_owned(), reason }),
                Progress::Gone => return Err(WaitError::Gone { name: name_owned() }),
                Progress::Pending(state) => last = state,
            }
        }
    };
    let outcome = timeout(limit, follow).await;
    outcome.unwrap_or_else(|_| {
        Err(WaitError::TimedOut {
            name: name_owned(),
            doing: "isn't ready",
            after: limit,
            state: with_error(last, watch.last_error()),
        })
    })
}

fn with_error(state: String, error: Option<&(String, String)>) -> String {
    match error {
        Some((address, error)) => format!("{state} ({address}: {error})"),
        None => state,
    }
}

/// Runs `cresset undeploy`.
///
/// # Errors
/// When it is refused, when nobody answers, and with `--wait` when workers still hold it as the time is over.
pub async fn undeploy(cluster: &Cluster, args: &UndeployArgs, settings: &Settings) -> anyhow::Result<()> {
    let message = UndeployRequest { command_id: command_id(), name: args.name.clone(), version: args.version.unwrap_or(0) };
    let ask = async |channel, limit| AdminServiceClient::new(channel).undeploy(request(message.clone(), limit)).await;
    let accepted: UndeployResponse = cluster.call(ask).await?;
    if args.wait {
        wait_gone(cluster, args, &accepted, settings.given_timeout.unwrap_or(WAIT_DEFAULT)).await?;
    }
    match settings.output {
        Format::Json => {
            let json = serde_json::json!({"name": args.name, "version": args.version, "epoch": accepted.epoch});
            output::print_json(&json)?;
        }
        Format::Table => {
            let version = args.version.map_or(String::new(), |version| format!("/{version}"));
            output::print(&format!("{}{version} is undeployed", args.name))?;
        }
    }
    Ok(())
}

async fn wait_gone(
    cluster: &Cluster,
    args: &UndeployArgs,
    accepted: &UndeployResponse,
    limit: Duration,
) -> Result<(), WaitError> {
    let name = args.name.as_str();
    let meant = |version| args.version.is_none_or(|wanted| wanted == version);
    let mut last = "no status came".to_owned();
    let mut watch = cluster.watch();
    let follow = async {
        loop {
            let report = Report::from(watch.next().await?);
            let holders: Vec<_> =
                report.replicas_of(name).filter(|(_, r)| meant(r.version)).map(|(worker, _)| worker.id.as_str()).collect();
            if report.epoch >= accepted.epoch && holders.is_empty() {
                return Ok(());
            }
            last = format!("on {}", holders.join(", "));
        }
    };
    let outcome = timeout(limit, follow).await;
    outcome.unwrap_or_else(|_| {
        let state = with_error(last, watch.last_error());
        Err(WaitError::TimedOut { name: name.to_owned(), doing: "is still held", after: limit, state })
    })
}

/// Runs `cresset label`.
///
/// # Errors
/// When it is refused, or nobody answers.
pub async fn set_labels(cluster: &Cluster, args: &LabelArgs, format: Format) -> anyhow::Result<()> {
    let labels: BTreeMap<String, u64> = args.labels.iter().cloned().collect();
    if labels.len() < args.labels.len() {
        anyhow::bail!("a label is given twice");
    }
    let message = LabelRequest { command_id: command_id(), name: args.name.clone(), labels: labels.into_iter().collect() };
    let ask = async |channel, limit| AdminServiceClient::new(channel).label(request(message.clone(), limit)).await;
    let accepted = cluster.call(ask).await?;
    match format {
        Format::Json => output::print_json(&serde_json::json!({"name": args.name, "epoch": accepted.epoch}))?,
        Format::Table => output::print(&format!("the labels of {} are set; `cresset status` shows them", args.name))?,
    }
    Ok(())
}

#[derive(Serialize)]
struct RepositoryRow {
    name: String,
    versions: Vec<u64>,
    platform: String,
    size_bytes: u64,
    deployed: bool,
    /// Why it can't be deployed.
    #[serde(skip_serializing_if = "String::is_empty")]
    problem: String,
}

/// Runs `cresset repository`.
///
/// # Errors
/// When nobody answers, or stdout can't be written.
pub async fn repository(cluster: &Cluster, format: Format) -> anyhow::Result<()> {
    let ask = async |channel, limit| AdminServiceClient::new(channel).repository(request(RepositoryRequest {}, limit)).await;
    let listed = cluster.call(ask).await?;
    let row = |model: cresset_proto::admin::v1::RepositoryModel| RepositoryRow {
        problem: output::one_line(&model.problem),
        name: model.name,
        versions: model.versions,
        platform: model.platform,
        size_bytes: model.size_bytes,
        deployed: model.deployed,
    };
    let rows: Vec<_> = listed.models.into_iter().map(row).collect();
    match format {
        Format::Json => output::print_json(&serde_json::json!({ "models": rows }))?,
        Format::Table => output::print(&repository_table(&rows))?,
    }
    Ok(())
}

fn repository_table(rows: &[RepositoryRow]) -> String {
    let cells = |row: &RepositoryRow| {
        let versions = row.versions.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let state = match (row.deployed, row.problem.as_str()) {
            (true, "") => "deployed",
            (false, "") => "-",
            (_, problem) => problem,
        };
        vec![row.name.clone(), versions, row.platform.clone(), output::bytes(row.size_bytes), state.to_owned()]
    };
    output::table(&["MODEL", "VERSIONS", "PLATFORM", "SIZE", "STATE"], rows.iter().map(cells).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::example;

    fn accepted(generation: u64, epoch: u64) -> DeployResponse {
        DeployResponse { version: 1, generation, epoch, versions: vec![DeployedVersion { version: 1, generation }] }
    }

    #[test]
    fn a_failed_model_ends_the_wait_with_its_reason() {
        let report = Report::from(example());
        assert_eq!(progress(&report, "broken", &accepted(7, 12)), Progress::Failed("model.pt is not an archive".to_owned()));
        let pending = Progress::Pending("degraded, 1 of 2 replicas ready (1 of 2 replicas)".to_owned());
        assert_eq!(progress(&report, "vad", &accepted(7, 12)), pending);
    }

    #[test]
    fn what_an_older_status_says_about_an_earlier_deployment_does_not_count() {
        let report = Report::from(example());
        assert!(matches!(progress(&report, "broken", &accepted(8, 13)), Progress::Pending(_)));
        assert!(matches!(progress(&report, "new", &accepted(8, 13)), Progress::Pending(_)));
        assert_eq!(progress(&report, "new", &accepted(8, 12)), Progress::Gone);
    }

    #[test]
    fn every_version_is_waited_for_and_one_failure_ends_it() {
        let mut status = example();
        let second = cresset_proto::admin::v1::Model { version: 2, ..status.models[1].clone() };
        status.models[1].state = cresset_proto::admin::v1::ModelState::Ready.into();
        status.models[1].stuck = false;
        status.models.push(second);
        let mut both = accepted(7, 12);
        let report = Report::from(status);
        assert_eq!(progress(&report, "broken", &both), Progress::Ready);
        both.versions.push(DeployedVersion { version: 2, generation: 7 });
        assert_eq!(progress(&report, "broken", &both), Progress::Failed("model.pt is not an archive".to_owned()));
    }

    #[test]
    fn demands_are_sent_only_where_they_are_said() {
        use clap::Parser;
        #[derive(Parser)]
        struct Line {
            #[command(flatten)]
            args: DeployArgs,
        }
        let args = |args: &[&str]| Line::try_parse_from(["deploy", "m"].iter().chain(args)).unwrap().args;
        let demands = |given: &[&str]| args(given).demands();
        let claim = |given: &[&str]| (args(given).request().priority, args(given).request().evictable);
        assert_eq!(claim(&[]), (None, None));
        assert_eq!(claim(&["--priority", "3", "--evictable"]), (Some(3), Some(true)));
        assert_eq!(claim(&["--evictable=false", "--wait"]), (None, Some(false)));
        assert_eq!(demands(&[]), None);
        let both = demands(&["--require", "gpu=h100", "--require", "tier=", "--on", "w1,w2"]).unwrap();
        assert_eq!((both.tags.len(), both.tags["gpu"].as_str(), both.workers), (2, "h100", vec!["w1".into(), "w2".into()]));
        assert_eq!(demands(&["--on", "any"]), Some(Demands::default()), "nothing any more");
        assert!(Line::try_parse_from(["deploy", "m", "--require", "gpu"]).is_err());
    }

    #[test]
    fn labels_are_read_as_they_are_written() {
        assert_eq!(label("canary=2"), Ok(("canary".to_owned(), 2)));
        assert_eq!(label("canary="), Ok(("canary".to_owned(), 0)));
        for wrong in ["canary", "=2", "2=2", "canary=0", "canary=two", "a b=1"] {
            assert!(label(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_repository_shows_why_a_model_cannot_be_deployed() {
        let row = |name: &str, problem: &str| RepositoryRow {
            name: name.to_owned(),
            versions: vec![1, 3],
            platform: "pytorch_libtorch".to_owned(),
            size_bytes: 2048,
            deployed: false,
            problem: problem.to_owned(),
        };
        let text = repository_table(&[row("vad", ""), row("bad", "config.pbtxt line 3 column 5: expected ':'")]);
        assert!(text.contains("vad    1, 3      pytorch_libtorch  2.0 KiB  -\n"), "{text}");
        assert!(text.contains("line 3 column 5"), "{text}");
    }
}
