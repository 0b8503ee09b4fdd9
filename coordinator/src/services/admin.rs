//! Administration: status, deployments, the model repository.
use std::{pin::Pin, sync::Arc, time::Duration};

use cresset_core::{Command, CommandBody, CommandId, Outcome, Reject, command::DeploySpec};
use cresset_proto::{
    admin::v1::{
        DeployRequest, DeployResponse, RepositoryModel, RepositoryRequest, RepositoryResponse, StatusRequest, StatusResponse,
        UndeployRequest, UndeployResponse, WatchStatusRequest, admin_service_server::AdminService,
    },
    reason::Reason,
};
use futures::{Stream, StreamExt};
use prost::Message;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::{Request, Response, Status};

use super::{Context, deadline, repository_status};

/// How often a watched status is looked at anew; what only heartbeats tell changes without a command.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// The least time between two messages of a watch.
const WATCH_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Admin {
    pub(super) context: Arc<Context>,
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.context.status(request.get_ref()).await))
    }

    type WatchStatusStream = Pin<Box<dyn Stream<Item = Result<StatusResponse, Status>> + Send>>;

    async fn watch_status(&self, _: Request<WatchStatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        let context = Arc::clone(&self.context);
        let closing = context.closing.clone().cancelled_owned();
        let mut ticks = interval(WATCH_INTERVAL);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let start = (context.clone(), context.consensus.applied(), ticks, None::<StatusResponse>);
        let statuses = futures::stream::unfold(start, |(context, mut applied, mut ticks, last)| async move {
            loop {
                applied.mark_unchanged();
                let status = context.status(&StatusRequest::default()).await;
                if last.as_ref() != Some(&status) {
                    return Some((Ok(status.clone()), (context, applied, ticks, Some(status))));
                }
                tokio::select! {
                    changed = applied.changed() => changed.ok()?,
                    _ = ticks.tick() => {}
                }
                tokio::time::sleep(WATCH_PAUSE).await;
            }
        });
        Ok(Response::new(Box::pin(statuses.take_until(closing))))
    }

    async fn deploy(&self, request: Request<DeployRequest>) -> Result<Response<DeployResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = command_id(&request.command_id)?;
        Ok(Response::new(self.context.deploy(id, &request.name, request.version, request.replicas, deadline).await?))
    }

    async fn undeploy(&self, request: Request<UndeployRequest>) -> Result<Response<UndeployResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = command_id(&request.command_id)?;
        let command = Command { id, body: CommandBody::Undeploy { name: request.name } };
        let outcome = self.context.agree(&command, deadline).await?;
        Ok(Response::new(UndeployResponse { epoch: epoch_of(&outcome) }))
    }

    async fn repository(&self, _: Request<RepositoryRequest>) -> Result<Response<RepositoryResponse>, Status> {
        let repository = self.context.repository.clone();
        let index = tokio::task::spawn_blocking(move || repository.index()).await;
        let index =
            index.map_err(|error| Reason::Internal.status(error.to_string()))?.map_err(|error| repository_status(&error))?;
        let state = self.context.consensus.state();
        let models = index.into_iter().map(|entry| RepositoryModel {
            deployed: state.deployment(&entry.name).is_some(),
            name: entry.name,
            versions: entry.versions,
            platform: entry.platform,
            size_bytes: entry.size_bytes,
            problem: entry.problem.unwrap_or_default(),
        });
        Ok(Response::new(RepositoryResponse { models: models.collect() }))
    }
}

impl Context {
    /// Deploys a model from the repository; `version` and `replicas` of 0 are the defaults.
    pub(super) async fn deploy(
        &self,
        id: CommandId,
        name: &str,
        version: u64,
        replicas: u32,
        deadline: Instant,
    ) -> Result<DeployResponse, Status> {
        let stored = self.stored(name, (version > 0).then_some(version)).await?;
        let replicas_wanted = if replicas == 0 { self.consensus.state().replicas_default() } else { replicas };
        let spec = DeploySpec {
            name: stored.name,
            version: stored.version,
            config: stored.config.encode_to_vec().into(),
            digest: stored.digest,
            size_bytes: stored.size_bytes,
            replicas_wanted,
            shards: 1,
            platform: if stored.config.platform.is_empty() { "pytorch_libtorch".into() } else { stored.config.platform },
        };
        let outcome = self.agree(&Command { id, body: CommandBody::Deploy(spec) }, deadline).await?;
        match outcome {
            Outcome::Deployed { version, generation, epoch } => Ok(DeployResponse { version, generation, epoch }),
            Outcome::Done { epoch } => Ok(DeployResponse { version: stored.version, generation: 0, epoch }),
            Outcome::Rejected(reject) => Err(super::reject_status(&reject)),
        }
    }

    /// Undeploys a model; one that isn't deployed is fine.
    pub(super) async fn undeploy(&self, name: &str, deadline: Instant) -> Result<(), Status> {
        let command = Command { id: CommandId(rand::random()), body: CommandBody::Undeploy { name: name.to_owned() } };
        match self.propose(&command, deadline).await?.accepted() {
            Ok(_) | Err(Reject::UnknownModel { .. }) => Ok(()),
            Err(reject) => Err(super::reject_status(&reject)),
        }
    }
}

pub(super) fn epoch_of(outcome: &Outcome) -> u64 {
    match outcome {
        Outcome::Done { epoch } | Outcome::Deployed { epoch, .. } => *epoch,
        Outcome::Rejected(_) => 0,
    }
}

fn command_id(bytes: &[u8]) -> Result<CommandId, Status> {
    match <[u8; 16]>::try_from(bytes) {
        Ok(id) => Ok(CommandId(id)),
        Err(_) => {
            Err(Reason::InvalidArgument.status(format!("command_id has {} bytes, it must have 16 random ones", bytes.len())))
        }
    }
}
