//! From processes that were started to a cluster that answers: a leader, every worker, every model that was asked for.
//!
//! It follows the cluster's status; who died meanwhile is its caller's business, who gives up on it then.
use std::time::Duration;

use cresset_client::{CallError, Tried};
use cresset_proto::{
    admin::v1::DeployRequest,
    inference::{ModelReadyRequest, grpc_inference_service_client::GrpcInferenceServiceClient},
};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use crate::{
    connect::{Cluster, request},
    deploy::send_deploy,
    output,
    status::{Model, Report},
};

const ELECTION_TIMEOUT: Duration = Duration::from_secs(60);
const REGISTRATION_TIMEOUT: Duration = Duration::from_secs(120);
const DEPLOY_TIMEOUT: Duration = Duration::from_secs(30);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// The newest status, once there is one.
pub type Statuses = watch::Receiver<Option<Report>>;

/// What has to come true.
#[derive(Debug, Clone)]
pub struct Goal {
    /// Ids of the workers.
    pub workers: Vec<String>,
    /// Registrations of an earlier life of this cluster don't count. Incarnations are µs since 1970.
    pub incarnation_min: u64,
    /// Models to deploy.
    pub deploy: Vec<String>,
    /// Public addresses of the coordinators, each of which must answer for each model.
    pub coordinators: Vec<String>,
}

/// Why the cluster didn't become ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    #[error("no leader after {}", output::seconds(ELECTION_TIMEOUT))]
    NoLeader,
    #[error("not registered after {}: {}", output::seconds(REGISTRATION_TIMEOUT), .0.join(", "))]
    NotRegistered(Vec<String>),
    #[error("model '{name}' can't be deployed: {error}")]
    Deploy { name: String, error: CallError },
    #[error("model '{name}' can't be served: {reason}")]
    Model { name: String, reason: String },
    #[error("model '{name}' is ready, and a coordinator doesn't answer for it: {error}")]
    Answer { name: String, error: CallError },
    #[error("the cluster's status can't be followed any more")]
    NoStatus,
}

/// Brings the cluster to its goal.
///
/// # Errors
/// [`ReadyError`] says what didn't come true.
pub async fn reach(goal: Goal, mut statuses: Statuses) -> Result<(), ReadyError> {
    follow(&mut statuses, ELECTION_TIMEOUT, |report| report.leader().is_some().then_some(()))
        .await?
        .ok_or(ReadyError::NoLeader)?;
    let mut missing = goal.workers.clone();
    let all_there = |report: &Report| {
        missing = goal.missing(report);
        missing.is_empty().then_some(())
    };
    let registered = follow(&mut statuses, REGISTRATION_TIMEOUT, all_there).await?;
    registered.ok_or(ReadyError::NotRegistered(missing))?;
    for name in &goal.deploy {
        deploy(&goal, name, &statuses).await?;
    }
    for name in &goal.deploy {
        let settled = |report: &Report| served(report, name);
        // However long a model loads: a failure ends the wait, and so does a death or Ctrl-C, which the caller sees.
        match follow(&mut statuses, Duration::MAX, settled).await? {
            Some(Ok(())) | None => {}
            Some(Err(reason)) => return Err(ReadyError::Model { name: name.clone(), reason }),
        }
    }
    for address in &goal.coordinators {
        for name in &goal.deploy {
            answers(address, name).await?;
        }
    }
    Ok(())
}

impl Goal {
    /// What the report says about this life of the cluster: one that was started again begins with what it last knew.
    pub fn of_this_life(&self, report: &Report) -> Report {
        let mut report = report.clone();
        if !self.missing(&report).is_empty() {
            report.models.clear();
        }
        report.workers.retain(|worker| worker.incarnation >= self.incarnation_min);
        report
    }

    fn missing(&self, report: &Report) -> Vec<String> {
        let here = |id: &&String| {
            let mut workers = report.workers.iter();
            workers.any(|worker| worker.id == **id && worker.state == "ready" && worker.incarnation >= self.incarnation_min)
        };
        self.workers.iter().filter(|id| !here(id)).cloned().collect()
    }
}

/// Looks at every status until `found` finds something; `None` when the time is over.
async fn follow<T>(
    statuses: &mut Statuses,
    limit: Duration,
    mut found: impl FnMut(&Report) -> Option<T>,
) -> Result<Option<T>, ReadyError> {
    let look = async {
        loop {
            let seen = statuses.borrow_and_update().as_ref().and_then(&mut found);
            if let Some(seen) = seen {
                return Ok(seen);
            }
            statuses.changed().await.map_err(|_| ReadyError::NoStatus)?;
        }
    };
    timeout(limit, look).await.ok().transpose()
}

/// Deploys a model, unless a cluster that was here before has it already.
async fn deploy(goal: &Goal, name: &str, statuses: &Statuses) -> Result<(), ReadyError> {
    let known = |report: &Report| report.versions(name).any(|model| model.state != "failed");
    if statuses.borrow().as_ref().is_some_and(known) {
        return Ok(());
    }
    let cluster = Cluster::new(goal.coordinators.clone(), DEPLOY_TIMEOUT);
    let accepted = send_deploy(&cluster, DeployRequest { name: name.to_owned(), ..Default::default() })
        .await
        .map_err(|error| ReadyError::Deploy { name: name.to_owned(), error })?;
    // What was known before was about an earlier deployment.
    let new = |report: &Report| {
        let mut versions = accepted.versions.iter();
        let is_known = |model: &Model, generation| model.generation >= generation;
        versions.all(|new| report.model(name, new.version).is_some_and(|model| is_known(model, new.generation))).then_some(())
    };
    follow(&mut statuses.clone(), Duration::MAX, new).await.map(drop)
}

/// Ready, or with fewer replicas than wanted and no more to come; `Err` when it failed for good.
fn served(report: &Report, name: &str) -> Option<Result<(), String>> {
    let mut versions = report.versions(name).filter(|model| !model.leaving).peekable();
    versions.peek()?;
    let mut all = Some(Ok(()));
    for model in versions {
        match version_served(report, model) {
            Some(Ok(())) => {}
            Some(Err(reason)) => return Some(Err(reason)),
            None => all = None,
        }
    }
    all
}

fn version_served(report: &Report, model: &Model) -> Option<Result<(), String>> {
    match model.state {
        "ready" => Some(Ok(())),
        "failed" | "evicted" => {
            Some(Err(if model.reason.is_empty() { "no reason was given".to_owned() } else { model.reason.clone() }))
        }
        "degraded" => {
            let replicas = || report.replicas_of(&model.name).filter(|(_, replica)| replica.version == model.version);
            replicas().next()?;
            replicas().all(|(_, replica)| matches!(replica.state, "ready" | "failed")).then_some(())?;
            replicas().any(|(_, replica)| replica.state == "failed").then_some(Ok(()))
        }
        _ => None,
    }
}

/// Waits until one coordinator's own service answers for the model: its routes come a moment after the status.
async fn answers(address: &str, name: &str) -> Result<(), ReadyError> {
    const LOOK_EVERY: Duration = Duration::from_millis(20);
    let begun = Instant::now();
    let cluster = Cluster::new(vec![address.to_owned()], ANSWER_TIMEOUT);
    let ask = async |channel, limit| {
        let message = ModelReadyRequest { name: name.to_owned(), version: String::new() };
        GrpcInferenceServiceClient::new(channel).model_ready(request(message, limit)).await
    };
    loop {
        match cluster.call(ask).await {
            Ok(answer) if answer.ready => return Ok(()),
            Ok(_) if begun.elapsed() < ANSWER_TIMEOUT => sleep(LOOK_EVERY).await,
            Ok(_) => {
                let tried = vec![Tried { address: address.to_owned(), error: "not ready".to_owned() }];
                let error = CallError::Unanswered { timeout: ANSWER_TIMEOUT, tried };
                return Err(ReadyError::Answer { name: name.to_owned(), error });
            }
            Err(error) => return Err(ReadyError::Answer { name: name.to_owned(), error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::tests::example;

    fn goal() -> Goal {
        Goal {
            workers: vec!["w1".into(), "w2".into()],
            incarnation_min: 1_700_000_000_000_000,
            deploy: vec![],
            coordinators: vec![],
        }
    }

    #[test]
    fn workers_count_when_this_life_of_them_is_ready() {
        let mut report = Report::from(example());
        assert_eq!(goal().missing(&report), ["w2"]);
        report.workers[1].state = "ready";
        assert!(goal().missing(&report).is_empty());
        report.workers[0].incarnation = 1;
        assert_eq!(goal().missing(&report), ["w1"]);
    }

    #[test]
    fn a_model_is_served_when_it_is_ready_or_as_ready_as_it_gets() {
        let mut report = Report::from(example());
        assert_eq!(served(&report, "broken"), Some(Err("model.pt is not an archive".to_owned())));
        assert_eq!(served(&report, "vad"), None);
        report.workers[1].state = "ready";
        report.workers[1].replicas = vec![report.workers[0].replicas[0].clone()];
        report.workers[1].replicas[0].state = "loading";
        assert_eq!(served(&report, "vad"), None);
        report.workers[1].replicas[0].state = "failed";
        assert_eq!(served(&report, "vad"), Some(Ok(())));
        assert_eq!(served(&report, "unknown"), None);
    }

    #[test]
    fn what_an_earlier_life_left_behind_is_not_told() {
        let mut report = Report::from(example());
        report.workers[1].state = "ready";
        assert_eq!(goal().of_this_life(&report), report);
        report.workers[1].incarnation = 1;
        let told = goal().of_this_life(&report);
        assert_eq!((told.workers.len(), told.models.len()), (1, 0));
    }

    #[tokio::test]
    async fn a_cluster_with_a_leader_and_its_workers_and_no_models_is_ready() {
        let (sender, statuses) = watch::channel(None);
        let mut reaching = Box::pin(reach(goal(), statuses));
        let mut report = Report::from(example());
        sender.send_replace(Some(report.clone()));
        assert!(timeout(Duration::from_millis(1), &mut reaching).await.is_err());
        report.workers[1].state = "ready";
        sender.send_replace(Some(report));
        reaching.await.unwrap();
    }

    #[tokio::test]
    async fn a_status_that_ends_ends_the_wait() {
        let (sender, statuses) = watch::channel(None);
        drop(sender);
        assert!(matches!(reach(goal(), statuses).await, Err(ReadyError::NoStatus)));
    }
}
