//! Deployments, as administrators and as Triton's clients ask for them: read the repository, have it agreed on, wait for it.
use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use cresset_client::repository::{Repository, StoredModel, archive::Archive};
use cresset_core::{
    Command, CommandBody, CommandId, Outcome, Reject,
    claim::Claim,
    command::{DeploySet, VersionSpec},
    demands::Demands,
    state::ModelKey,
    status::{ModelState, models},
};
use cresset_proto::{
    admin::v1::{DeployResponse, DeployedVersion},
    inference::{ModelConfig, model_instance_group::Kind},
    model_config::{model_filename, platform_of},
    reason::Reason,
};
use prost::Message;
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::Context;

/// What somebody wants to have served.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanted {
    /// The model's name.
    pub(super) name: String,
    /// This version beside those that are served; `None` for those that the version policy chooses, and no others.
    pub(super) version: Option<u64>,
    /// Of each version; 0 for as many as it has, or the default.
    pub(super) replicas: u32,
    /// Tags and workers; `None`: those that it has.
    pub(super) demands: Option<Demands>,
    /// What gets memory first; `None`: as it is.
    pub(super) priority: Option<u32>,
    /// Whether it may make room for others; `None`: as it is.
    pub(super) evictable: Option<bool>,
    /// Instead of the repository's.
    pub(super) config: Option<ModelConfig>,
    /// Files of each version, by their names, instead of the repository's. They need a configuration.
    pub(super) files: BTreeMap<u64, BTreeMap<String, Bytes>>,
}

/// One version with what has to be agreed on about it.
struct Version {
    number: u64,
    digest: String,
    size_bytes: u64,
}

impl Context {
    /// Deploys a model, from the repository or with files of its own.
    pub(super) async fn deploy(&self, id: CommandId, wanted: Wanted, deadline: Instant) -> Result<DeployResponse, Status> {
        let stored = !wanted.files.is_empty();
        let (versions, config) = if stored { self.given(&wanted).await? } else { self.in_repository(&wanted).await? };
        let platform = platform_of(&config).to_owned();
        let versions = {
            let state = self.consensus.state();
            let version = |version: Version| {
                let key = ModelKey { name: wanted.name.clone(), version: version.number };
                let has = state.models.get(&key).map(|deployment| deployment.replicas_wanted);
                let like =
                    state.models.get(&key).or_else(|| state.versions(&wanted.name).last().map(|(_, deployment)| deployment));
                let demands = wanted.demands.clone().or_else(|| Some(like?.demands.clone())).unwrap_or_default();
                let claim = like.map(|deployment| deployment.claim).unwrap_or_default();
                VersionSpec {
                    demands: with_gpus(demands, &config),
                    claim: Claim {
                        priority: wanted.priority.unwrap_or(claim.priority),
                        evictable: wanted.evictable.unwrap_or(claim.evictable),
                    },
                    version: version.number,
                    digest: version.digest,
                    size_bytes: version.size_bytes,
                    replicas_wanted: match wanted.replicas {
                        0 => has.unwrap_or_else(|| state.replicas_default()),
                        replicas => replicas,
                    },
                }
            };
            versions.into_iter().map(version).collect()
        };
        let only = wanted.version.is_none();
        let config = config.encode_to_vec().into();
        let set = DeploySet { name: wanted.name, config, shards: 1, platform, versions, stored, only };
        let outcome = self.agree(&Command { id, body: CommandBody::DeploySet(set) }, deadline).await?;
        self.until_routed(epoch_of(&outcome), deadline).await;
        match outcome {
            Outcome::DeployedSet { versions, epoch } => Ok(response(versions, epoch)),
            Outcome::Deployed { version, generation, epoch } => Ok(response(vec![(version, generation)], epoch)),
            Outcome::Done { .. } => {
                Err(Reason::Conflict.status("this command_id was used for another command; choose a new one"))
            }
            Outcome::Rejected(reject) => Err(super::reject_status(&reject)),
        }
    }

    async fn in_repository(&self, wanted: &Wanted) -> Result<(Vec<Version>, ModelConfig), Status> {
        let stored = self.stored(wanted).await?;
        let Some(first) = stored.first() else { return Err(Reason::Internal.status("the repository chose no version")) };
        let config = first.config.clone();
        let version =
            |stored: StoredModel| Version { number: stored.version, digest: stored.digest, size_bytes: stored.size_bytes };
        Ok((stored.into_iter().map(version).collect(), config))
    }

    /// Has the files that came with a load kept by the coordinators, before anything is agreed on that needs them.
    async fn given(&self, wanted: &Wanted) -> Result<(Vec<Version>, ModelConfig), Status> {
        let Some(config) = wanted.config.clone() else {
            let text = format!("failed to load '{}': parameters 'file:' need the parameter 'config' beside them", wanted.name);
            return Err(Reason::InvalidArgument.status(text));
        };
        let there: Vec<u64> = wanted.files.keys().copied().collect();
        let chosen = Repository::choose_given(&wanted.name, config, &there);
        let (chosen, config) = chosen.map_err(|error| super::repository_status(&error))?;
        let mut versions = Vec::new();
        for number in chosen {
            let files = wanted.files.get(&number).cloned().unwrap_or_default();
            if let Some(file) = model_filename(&config).filter(|file| !files.contains_key(*file)) {
                let text = format!("failed to load '{}': there is no parameter 'file:{number}/{file}'", wanted.name);
                return Err(Reason::InvalidArgument.status(text));
            }
            let archive = tokio::task::spawn_blocking(move || Archive::of(&files)).await;
            let archive = archive.map_err(|error| Reason::Internal.status(error.to_string()))?;
            self.store.spread(&archive).await?;
            versions.push(Version { number, digest: archive.digest, size_bytes: archive.size_bytes });
        }
        Ok((versions, config))
    }

    /// Undeploys a model in all its versions; one that isn't deployed is fine.
    pub(super) async fn undeploy(&self, name: &str, deadline: Instant) -> Result<(), Status> {
        let command = Command { id: CommandId(rand::random()), body: CommandBody::Undeploy { name: name.to_owned() } };
        match self.propose(&command, deadline).await?.accepted() {
            Ok(_) | Err(Reject::UnknownModel { .. }) => Ok(()),
            Err(reject) => Err(super::reject_status(&reject)),
        }
    }

    /// Waits until every wanted replica of every version is ready.
    pub(super) async fn until_ready(&self, name: &str, versions: &[DeployedVersion], deadline: Instant) -> Result<(), Status> {
        let failed = |text: &str| Reason::LoadFailed.status(format!("load failed for model '{name}': {text}"));
        let mut applied = self.consensus.applied();
        for wanted in versions {
            loop {
                let (epoch, status) = {
                    let state = self.consensus.view();
                    let mut all = models(&state, &self.fleet.plan(&state)).into_iter();
                    (state.epoch, all.find(|model| model.key.name == name && model.key.version == wanted.version))
                };
                let Some(status) = status else { return Err(failed("it was unloaded meanwhile")) };
                match status.state {
                    ModelState::Ready => {
                        self.until_routed(epoch, deadline).await;
                        break;
                    }
                    ModelState::Failed | ModelState::Evicted => return Err(failed(&status.reason)),
                    _ if status.stuck => return Err(failed(&status.reason)),
                    ModelState::Loading | ModelState::Degraded => {}
                }
                let late = |_| Reason::DeadlineExceeded.status(format!("model '{name}' isn't ready yet: {}", status.reason));
                let changed = timeout_at(deadline, applied.changed()).await.map_err(late)?;
                changed.map_err(|_| Reason::NoLeader.status("this coordinator is shutting down"))?;
            }
        }
        Ok(())
    }
}

/// Demands, and those of a model's configuration: the GPUs of its instances.
fn with_gpus(demands: Demands, config: &ModelConfig) -> Demands {
    let groups: Vec<_> = config.instance_group.iter().filter(|group| !group.passive).collect();
    let ordinals: BTreeSet<i32> = groups.iter().flat_map(|group| group.gpus.iter().copied()).collect();
    let needs_gpus = groups.iter().any(|group| group.kind() == Kind::Gpu);
    let highest = ordinals.last().and_then(|ordinal| u32::try_from(*ordinal).ok());
    let gpus_min = if needs_gpus { highest.map_or(1, |ordinal| ordinal.saturating_add(1)) } else { 0 };
    // A group without a list has its copies on every GPU.
    let is_listed = !groups.is_empty() && groups.iter().all(|group| !group.gpus.is_empty());
    let gpus_used = if is_listed { u32::try_from(ordinals.len()).unwrap_or(u32::MAX) } else { 0 };
    Demands { gpus_min, gpus_used, ..demands }
}

fn response(versions: Vec<(u64, u64)>, epoch: u64) -> DeployResponse {
    let (version, generation) = versions.iter().copied().max().unwrap_or_default();
    let versions = versions.into_iter().map(|(version, generation)| DeployedVersion { version, generation }).collect();
    DeployResponse { version, generation, epoch, versions }
}

/// The epoch after a command.
pub(super) fn epoch_of(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Done { epoch } | Outcome::Deployed { epoch, .. } | Outcome::DeployedSet { epoch, .. } => *epoch,
        Outcome::Rejected(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use cresset_proto::inference::ModelInstanceGroup;

    use super::*;

    #[test]
    fn gpus_that_a_configuration_names_are_demanded() {
        let group =
            |kind: Kind, gpus: &[i32]| ModelInstanceGroup { kind: kind.into(), gpus: gpus.to_vec(), ..Default::default() };
        let demanded = |groups: Vec<ModelInstanceGroup>| {
            let demands = with_gpus(Demands::default(), &ModelConfig { instance_group: groups, ..Default::default() });
            (demands.gpus_min, demands.gpus_used)
        };
        assert_eq!(demanded(vec![]), (0, 0), "whatever there is");
        assert_eq!(demanded(vec![group(Kind::Gpu, &[])]), (1, 0), "all GPUs, one at least");
        assert_eq!(demanded(vec![group(Kind::Gpu, &[0, 2])]), (3, 2));
        assert_eq!(demanded(vec![group(Kind::Gpu, &[1]), group(Kind::Gpu, &[1])]), (2, 1), "copies share their weights");
        assert_eq!(demanded(vec![group(Kind::Auto, &[0])]), (0, 1));
        let passive = ModelInstanceGroup { passive: true, ..group(Kind::Gpu, &[3]) };
        assert_eq!(demanded(vec![group(Kind::Cpu, &[]), passive]), (0, 0));
        assert_eq!(demanded(vec![group(Kind::Gpu, &[-1])]).0, 1, "refused where it is loaded");
    }
}
