//! Administration: status, deployments, the model repository.
use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};

use cresset_core::{
    Command, CommandBody, CommandId, Reject, WorkerId,
    state::{Incarnation, WorkerState},
};
use cresset_proto::{
    admin::v1::{
        BackupRequest, ChangeMembersRequest, ChangeMembersResponse, Demands, DeployRequest, DeployResponse, DrainWorkerRequest,
        DrainWorkerResponse, LabelRequest, LabelResponse, MembersRequest, MembersResponse, RemoveWorkerRequest,
        RemoveWorkerResponse, RepositoryModel, RepositoryRequest, RepositoryResponse, StatusRequest, StatusResponse,
        TransferLeadershipRequest, TransferLeadershipResponse, UndeployRequest, UndeployResponse, WatchStatusRequest,
        admin_service_server::AdminService,
    },
    reason::Reason,
};
use futures::{Stream, StreamExt};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tonic::{Request, Response, Status};

use super::{
    Context, backup, deadline,
    deploy::{Wanted, epoch_of},
    members, reject_status, repository_status,
};

/// How often a watched status is looked at anew; what only heartbeats tell changes without a command.
const WATCH_INTERVAL: Duration = Duration::from_millis(250);
/// The least time between two messages of a watch.
const WATCH_PAUSE: Duration = Duration::from_millis(100);

pub(super) struct Admin {
    pub(super) context: Arc<Context>,
}

impl Admin {
    /// The newest life of a worker, and what it is: known for sure, since a life that has ended is beyond any command.
    async fn newest_life(&self, worker: &WorkerId, deadline: Instant) -> Result<(Incarnation, WorkerState), Status> {
        let barrier = self.context.consensus.read_barrier(deadline).await;
        barrier.map_err(|error| Reason::NoLeader.status(error.to_string()))?;
        let known = self.context.consensus.state().workers.get(worker).map(|worker| (worker.incarnation, worker.state));
        known.ok_or_else(|| reject_status(&Reject::UnknownWorker { worker: worker.clone() }))
    }
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
                let mut status = context.status(&StatusRequest::default()).await;
                // That time passes is no news.
                status.age_ms = None;
                status.models.iter_mut().for_each(|model| model.idle_s = None);
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
        let version = (request.version > 0).then_some(request.version);
        let demands = request.demands.map(demands).transpose()?;
        let DeployRequest { name, replicas, priority, evictable, .. } = request;
        let wanted = Wanted { name, version, replicas, demands, priority, evictable, ..Default::default() };
        Ok(Response::new(self.context.deploy(id, wanted, deadline).await?))
    }

    async fn undeploy(&self, request: Request<UndeployRequest>) -> Result<Response<UndeployResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = command_id(&request.command_id)?;
        let UndeployRequest { name, version, .. } = request;
        let body = if version == 0 { CommandBody::Undeploy { name } } else { CommandBody::UndeployVersion { name, version } };
        let outcome = self.context.agree(&Command { id, body }, deadline).await?;
        Ok(Response::new(UndeployResponse { epoch: epoch_of(&outcome) }))
    }

    async fn label(&self, request: Request<LabelRequest>) -> Result<Response<LabelResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = command_id(&request.command_id)?;
        let body = CommandBody::SetLabels { name: request.name, labels: request.labels.into_iter().collect() };
        let outcome = self.context.agree(&Command { id, body }, deadline).await?;
        Ok(Response::new(LabelResponse { epoch: epoch_of(&outcome) }))
    }

    async fn drain_worker(&self, request: Request<DrainWorkerRequest>) -> Result<Response<DrainWorkerResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = command_id(&request.command_id)?;
        let worker = worker_id(&request.worker_id)?;
        let incarnation = match self.newest_life(&worker, deadline).await? {
            (_, WorkerState::Dead) => {
                let text = format!("worker {worker} is dead, and what it held is being placed elsewhere already");
                return Err(Reason::Conflict.status(text));
            }
            (_, WorkerState::Removed) => {
                return Err(Reason::Conflict.status(format!("worker {worker} was removed, and holds nothing")));
            }
            (incarnation, _) => incarnation,
        };
        let body = CommandBody::DrainWorker { worker, incarnation };
        let outcome = self.context.agree(&Command { id, body }, deadline).await?;
        Ok(Response::new(DrainWorkerResponse { epoch: epoch_of(&outcome), incarnation }))
    }

    async fn remove_worker(&self, request: Request<RemoveWorkerRequest>) -> Result<Response<RemoveWorkerResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let id = command_id(&request.command_id)?;
        let worker = worker_id(&request.worker_id)?;
        let (incarnation, _) = self.newest_life(&worker, deadline).await?;
        let body = CommandBody::RemoveWorker { worker, incarnation };
        let outcome = self.context.agree(&Command { id, body }, deadline).await?;
        Ok(Response::new(RemoveWorkerResponse { epoch: epoch_of(&outcome), incarnation }))
    }

    async fn members(&self, _: Request<MembersRequest>) -> Result<Response<MembersResponse>, Status> {
        Ok(Response::new(self.context.members().await))
    }

    async fn change_members(&self, request: Request<ChangeMembersRequest>) -> Result<Response<ChangeMembersResponse>, Status> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        let (id, change) = (command_id(&request.command_id)?, members::change(request.change)?);
        let epoch = self.context.change_members(id, &change, deadline).await?;
        Ok(Response::new(ChangeMembersResponse { epoch }))
    }

    async fn transfer_leadership(
        &self,
        request: Request<TransferLeadershipRequest>,
    ) -> Result<Response<TransferLeadershipResponse>, Status> {
        let deadline = deadline(request.metadata());
        let leader = self.context.transfer_leadership(&request.into_inner().to, deadline).await?;
        Ok(Response::new(TransferLeadershipResponse { leader: leader.to_string() }))
    }

    type BackupStream = backup::Pieces;

    async fn backup(&self, request: Request<BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        let pieces = self.context.backup(deadline(request.metadata())).await?;
        Ok(Response::new(pieces))
    }

    async fn repository(&self, _: Request<RepositoryRequest>) -> Result<Response<RepositoryResponse>, Status> {
        let repository = self.context.repository.clone();
        let index = tokio::task::spawn_blocking(move || repository.index()).await;
        let index =
            index.map_err(|error| Reason::Internal.status(error.to_string()))?.map_err(|error| repository_status(&error))?;
        let state = self.context.consensus.state();
        let deployed: BTreeSet<&str> = state.models.keys().map(|key| key.name.as_str()).collect();
        let models = index.into_iter().map(|entry| RepositoryModel {
            deployed: deployed.contains(entry.name.as_str()),
            name: entry.name,
            versions: entry.versions,
            platform: entry.platform,
            size_bytes: entry.size_bytes,
            problem: entry.problem.unwrap_or_default(),
        });
        Ok(Response::new(RepositoryResponse { models: models.collect() }))
    }
}

fn demands(message: Demands) -> Result<cresset_core::demands::Demands, Status> {
    let workers = message.workers.iter().map(|worker| worker_id(worker)).collect::<Result<_, _>>()?;
    Ok(cresset_core::demands::Demands { tags: message.tags.into_iter().collect(), workers, ..Default::default() })
}

fn worker_id(text: &str) -> Result<WorkerId, Status> {
    text.parse().map_err(|error| Reason::InvalidArgument.status(format!("worker_id: {error}")))
}

fn command_id(bytes: &[u8]) -> Result<CommandId, Status> {
    match <[u8; 16]>::try_from(bytes) {
        Ok(id) => Ok(CommandId(id)),
        Err(_) => {
            Err(Reason::InvalidArgument.status(format!("command_id has {} bytes, it must have 16 random ones", bytes.len())))
        }
    }
}
