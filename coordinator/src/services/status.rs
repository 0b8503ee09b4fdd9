//! What an operator is told of the whole cluster.
//!
//! Heartbeats are known to the leader only, so another coordinator asks it. Without a leader it answers from its own copy,
//! and says that nobody confirmed it.
use std::{collections::BTreeMap, time::Duration};

use cresset_core::{
    PeerId,
    demands::Demands,
    standing::Standing,
    state::PeerInfo,
    status::{ModelState, models},
    wire::observed,
};
use cresset_proto::{
    admin::v1::{
        self, Coordinator, CoordinatorRole, Model, StatusRequest, StatusResponse, Worker,
        admin_service_client::AdminServiceClient,
    },
    fleet::v1::Device,
};
use futures::future::join_all;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout};
use tonic::transport::{Channel, Endpoint};

use super::Context;
use crate::consensus::Role;

/// How long another coordinator may take to tell its role.
const PEER_TIMEOUT: Duration = Duration::from_millis(400);
/// How long the leader may take to answer for another coordinator, or to confirm that it leads.
pub(super) const LEADER_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Connections to the public ports of the other coordinators.
#[derive(Default)]
pub(super) struct Peers(Mutex<BTreeMap<String, Channel>>);

impl Peers {
    fn client(&self, address: &str) -> Option<AdminServiceClient<Channel>> {
        self.channel(address).map(AdminServiceClient::new)
    }

    fn channel(&self, address: &str) -> Option<Channel> {
        let mut channels = self.0.lock();
        if !channels.contains_key(address) {
            let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?.connect_timeout(PEER_TIMEOUT);
            channels.insert(address.to_owned(), endpoint.connect_lazy());
        }
        channels.get(address).cloned()
    }
}

impl Context {
    /// The status, from the leader if there is one.
    pub(super) async fn status(&self, request: &StatusRequest) -> StatusResponse {
        if request.only_self {
            return StatusResponse {
                coordinators: vec![self.own_role()],
                answered_by: self.id.to_string(),
                ..Default::default()
            };
        }
        if !request.allow_stale
            && let Some(answer) = self.ask_leader().await
        {
            return answer;
        }
        let current = !request.allow_stale && self.consensus.read_barrier(Instant::now() + LEADER_TIMEOUT).await.is_ok();
        self.own_status(current).await
    }

    /// The leader's administration, if another coordinator leads.
    pub(super) fn leader(&self) -> Option<AdminServiceClient<Channel>> {
        self.leader_channel().map(AdminServiceClient::new)
    }

    /// The way to the leader's public port, if another coordinator leads.
    pub(super) fn leader_channel(&self) -> Option<Channel> {
        let leader = self.consensus.raft().borrow().leader.map(PeerId).filter(|leader| *leader != self.id)?;
        let address = self.consensus.state().peers.get(&leader)?.grpc_address.clone();
        self.peers.channel(&address)
    }

    /// The leader's answer, if another coordinator leads and answers.
    async fn ask_leader(&self) -> Option<StatusResponse> {
        let mut client = self.leader()?;
        let asked = client.status(StatusRequest::default());
        Some(timeout(LEADER_TIMEOUT, asked).await.ok()?.ok()?.into_inner())
    }

    async fn own_status(&self, current: bool) -> StatusResponse {
        // Before the copy is looked at, which may be newer then; how long ago that was counts from the answer.
        let as_of = self.freshness.as_of();
        let coordinators = self.roles().await;
        let beats = self.fleet.beats();
        let state = self.consensus.view();
        let plan = self.fleet.plan(&state);
        let idle_s = self.fleet.idle_s();
        let workers = state.workers.iter().map(|(id, worker)| {
            let beat = beats.get(id).copied();
            let said = self.fleet.opinions(id, worker.incarnation);
            Worker {
                id: id.to_string(),
                incarnation: worker.incarnation,
                state: worker_state(self.fleet.standing(id, worker)).into(),
                grpc_address: worker.grpc_address.clone(),
                zone: worker.zone.clone(),
                devices: worker
                    .devices
                    .iter()
                    .map(|device| Device { name: device.name.clone(), memory_bytes: device.memory_bytes })
                    .collect(),
                memory_free_bytes: beat.map_or(0, |beat| beat.memory_free_bytes),
                replicas: state.replicas_on(id).map(|(replica_id, replica)| observed(replica_id, replica)).collect(),
                requests_total: beat.map_or(0, |beat| beat.requests_total),
                requests_in_flight: beat.map_or(0, |beat| beat.requests_in_flight),
                sequences_live: beat.map_or(0, |beat| beat.sequences_live),
                routers_without: said.left_alone,
                routers_with: said.answers,
                tags: worker.tags.clone().into_iter().collect(),
            }
        });
        let workers = workers.collect();
        let models = models(&state, &plan).into_iter().map(|model| {
            let deployment = state.models.get(&model.key);
            let claim = deployment.map(|deployment| deployment.claim).unwrap_or_default();
            Model {
                name: model.key.name.clone(),
                version: model.key.version,
                generation: model.generation,
                shards: model.shards,
                replicas_wanted: model.replicas_wanted,
                replicas_ready: model.replicas_ready,
                state: model_state(model.state).into(),
                reason: model.reason,
                labels: model.labels,
                leaving: model.leaving,
                stuck: model.stuck,
                demands: deployment.map(|deployment| demands(&deployment.demands)),
                priority: claim.priority,
                evictable: claim.evictable,
                idle_s: idle_s.get(&model.key).copied(),
            }
        });
        StatusResponse {
            cluster_id: state.cluster_id.clone(),
            epoch: state.epoch,
            coordinators,
            workers,
            models: models.collect(),
            answered_by: self.id.to_string(),
            current,
            level: state.level.into(),
            age_ms: if current { Some(0) } else { as_of.and_then(|as_of| u64::try_from(as_of.elapsed().as_millis()).ok()) },
        }
    }

    fn own_role(&self) -> Coordinator {
        let raft = *self.consensus.raft().borrow();
        let role = match raft.role {
            Role::Leader => CoordinatorRole::Leader,
            Role::Follower => CoordinatorRole::Follower,
            Role::Candidate => CoordinatorRole::Candidate,
            Role::Learner => CoordinatorRole::Learner,
        };
        Coordinator {
            id: self.id.to_string(),
            grpc_address: self.consensus.state().peers.get(&self.id).map(|info| info.grpc_address.clone()).unwrap_or_default(),
            role: role.into(),
            term: raft.term,
            commit_index: raft.commit,
            applied_index: raft.applied,
            level_known: self.consensus.level_known().into(),
        }
    }

    /// Every coordinator's role, from itself; one that doesn't answer is unreachable.
    async fn roles(&self) -> Vec<Coordinator> {
        let peers: Vec<(PeerId, PeerInfo)> = self.consensus.state().peers.iter().map(|(id, info)| (*id, info.clone())).collect();
        join_all(peers.into_iter().map(|(id, info)| async move {
            if id == self.id {
                return self.own_role();
            }
            let unreachable = Coordinator {
                id: id.to_string(),
                grpc_address: info.grpc_address.clone(),
                role: CoordinatorRole::Unreachable.into(),
                ..Default::default()
            };
            let Some(mut client) = self.peers.client(&info.grpc_address) else { return unreachable };
            let asked = client.status(StatusRequest { only_self: true, ..Default::default() });
            match timeout(PEER_TIMEOUT, asked).await {
                Ok(Ok(answer)) => answer.into_inner().coordinators.pop().unwrap_or(unreachable),
                Ok(Err(_)) | Err(_) => unreachable,
            }
        }))
        .await
    }
}

fn demands(demands: &Demands) -> v1::Demands {
    v1::Demands {
        tags: demands.tags.clone().into_iter().collect(),
        workers: demands.workers.iter().map(ToString::to_string).collect(),
    }
}

fn worker_state(standing: Standing) -> v1::WorkerState {
    match standing {
        Standing::Joining => v1::WorkerState::Joining,
        Standing::Ready => v1::WorkerState::Ready,
        Standing::Draining => v1::WorkerState::Draining,
        Standing::Suspect => v1::WorkerState::Suspect,
        Standing::Dead => v1::WorkerState::Dead,
        Standing::Removed => v1::WorkerState::Removed,
    }
}

fn model_state(state: ModelState) -> v1::ModelState {
    match state {
        ModelState::Ready => v1::ModelState::Ready,
        ModelState::Loading => v1::ModelState::Loading,
        ModelState::Degraded => v1::ModelState::Degraded,
        ModelState::Failed => v1::ModelState::Failed,
        ModelState::Evicted => v1::ModelState::Evicted,
    }
}
