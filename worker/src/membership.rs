//! The worker's tie to the cluster: it registers with the leader, sends heartbeats, says what it sees, and takes intents.
//!
//! While no coordinator can be reached the worker goes on serving what it holds: routers keep their routes too. A worker
//! that was judged dead, because it was paused or cut off, begins another life: what it has loaded stays, and what was
//! sent to its old life is refused.
use std::{collections::BTreeMap, sync::Arc, time::Duration};

use cresset_proto::fleet::v1::{
    Device, Fenced, Heartbeat, Idle, JoinRequest, JoinResponse, Leaving, Observed, Registration, join_request, join_response,
    membership_service_client::MembershipServiceClient,
};
use rand::Rng;
use tokio::{
    sync::{mpsc, watch},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming, transport::Endpoint};

use crate::{models::ServedModel, predict::Worker};

/// How long a coordinator may take to accept a connection or a registration, in ms.
const ANSWER_TIMEOUT_MS: u64 = 2_000;
/// How often heartbeats are sent until the leader says otherwise, in ms.
const HEARTBEAT_INTERVAL_MS: u32 = 250;
/// How long models have been idle is said in one of so many heartbeats: nobody decides by seconds of it.
const IDLE_EVERY_BEATS: u64 = 20;
/// The pause before the next coordinator is tried, in ms; doubled up to the maximum, with jitter.
const RETRY_PAUSE_MS: std::ops::Range<u64> = 20..400;
/// Messages that may wait for the leader.
const MESSAGES_MAX: usize = 16;

/// What a worker tells about itself.
#[derive(Debug, Clone)]
pub struct Introduction {
    /// Where it answers predictions.
    pub grpc_address: String,
    /// Where its metrics are.
    pub http_address: String,
    /// Its failure zone.
    pub zone: String,
    /// Facts about it that its operator chose.
    pub tags: BTreeMap<String, String>,
    /// What it runs models on.
    pub devices: Vec<Device>,
}

/// Where the tie stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tie {
    /// No leader knows this worker at the moment.
    Loose,
    /// Registered with a leader.
    Registered,
    /// The leader knows that this worker is leaving, and has moved its replicas' routes.
    Left,
    /// This worker was taken out of the cluster.
    Removed,
}

/// The membership task's parts.
pub struct Membership {
    worker: Arc<Worker>,
    introduction: Introduction,
    coordinators: Vec<String>,
    tie: watch::Sender<Tie>,
    leaving: CancellationToken,
}

#[derive(Debug, thiserror::Error)]
enum Parted {
    #[error("can't reach {address}: {source}")]
    Unreachable { address: String, source: tonic::transport::Error },
    #[error("{address} didn't answer within {ANSWER_TIMEOUT_MS} ms")]
    Silent { address: String },
    #[error("{0}")]
    Status(#[from] Status),
    #[error("the leader is at '{0}'")]
    Redirected(String),
    #[error("this life is over: {}", .0.reason)]
    Fenced(Fenced),
    #[error("the coordinator closed the stream")]
    Closed,
    #[error("left in order")]
    Left,
}

impl Membership {
    /// Parts of the task; `leaving` tells the cluster that this worker goes away.
    pub fn new(
        worker: Arc<Worker>,
        introduction: Introduction,
        coordinators: Vec<String>,
        leaving: CancellationToken,
    ) -> (Self, watch::Receiver<Tie>) {
        let (tie, watched) = watch::channel(Tie::Loose);
        (Self { worker, introduction, coordinators, tie, leaving }, watched)
    }

    /// Runs until `stop` is cancelled or the worker has left.
    pub async fn run(self, stop: CancellationToken) {
        tokio::select! {
            () = self.keep_joined() => {}
            () = stop.cancelled() => {}
        }
        self.tie.send_if_modified(|tie| *tie != Tie::Removed && std::mem::replace(tie, Tie::Left) != Tie::Left);
    }

    async fn keep_joined(&self) {
        let mut turn = rand::rng().random_range(0..self.coordinators.len().max(1));
        let mut pause_ms = RETRY_PAUSE_MS.start;
        let mut hint: Option<String> = None;
        loop {
            let listed = self.coordinators.get(turn % self.coordinators.len().max(1)).cloned();
            let Some(address) = hint.take().or(listed) else { return };
            let parted = self.join(&address).await;
            if *self.tie.borrow() == Tie::Registered {
                tracing::info!(coordinator = address, reason = %parted, "parted from the leader");
                pause_ms = RETRY_PAUSE_MS.start;
            }
            self.tie.send_replace(Tie::Loose);
            match parted {
                Parted::Left => return,
                Parted::Redirected(leader) if !leader.is_empty() => hint = Some(leader),
                Parted::Fenced(fenced) if fenced.removed => {
                    tracing::warn!(reason = fenced.reason, "this worker was removed from the cluster");
                    self.tie.send_replace(Tie::Removed);
                    return;
                }
                Parted::Fenced(fenced) => self.begin_new_life(&fenced),
                error => tracing::debug!(%error, "trying the next coordinator"),
            }
            if hint.is_none() {
                turn += 1;
            }
            if self.leaving.is_cancelled() && turn > 2 * self.coordinators.len() {
                // Nobody can be told. The routers will notice by themselves.
                return;
            }
            // A pause in any case: two coordinators that each think the other leads must not be asked in a tight loop.
            let jittered_ms = rand::rng().random_range(pause_ms / 2..=pause_ms);
            sleep(Duration::from_millis(jittered_ms)).await;
            pause_ms = (pause_ms * 2).min(RETRY_PAUSE_MS.end);
        }
    }

    fn begin_new_life(&self, fenced: &Fenced) {
        let incarnation = fenced.incarnation_min.max(self.worker.incarnation() + 1);
        tracing::warn!(reason = fenced.reason, incarnation, "this worker begins another life");
        self.worker.models.forget_epoch();
        self.worker.set_incarnation(incarnation);
    }

    async fn join(&self, address: &str) -> Parted {
        match self.try_join(address).await {
            Ok(never) => match never {},
            Err(parted) => parted,
        }
    }

    async fn try_join(&self, address: &str) -> Result<std::convert::Infallible, Parted> {
        let limit = Duration::from_millis(ANSWER_TIMEOUT_MS);
        let unreachable = |source| Parted::Unreachable { address: address.to_owned(), source };
        let channel = Endpoint::from_shared(format!("http://{address}"))
            .map_err(unreachable)?
            .connect_timeout(limit)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(1))
            .keep_alive_timeout(Duration::from_secs(1))
            .connect()
            .await
            .map_err(unreachable)?;
        let (up, messages) = mpsc::channel(MESSAGES_MAX);
        let register = join_request::Message::Register(self.registration());
        up.send(JoinRequest { message: Some(register) }).await.map_err(|_| Parted::Closed)?;
        let mut client = MembershipServiceClient::new(channel).max_decoding_message_size(usize::MAX);
        let silent = |_| Parted::Silent { address: address.to_owned() };
        let mut down = timeout(limit, client.join(ReceiverStream::new(messages))).await.map_err(silent)??.into_inner();
        let interval_ms = loop {
            match timeout(limit, down.message()).await.map_err(silent)?? {
                Some(JoinResponse { message: Some(join_response::Message::Registered(registered)) }) => {
                    // What a leader of the past still has on its way to this worker is of an earlier epoch.
                    self.worker.models.begin_at(registered.epoch);
                    break registered.heartbeat_interval_ms;
                }
                Some(other) => self.take(other)?,
                None => return Err(Parted::Closed),
            }
        };
        tracing::info!(leader = address, incarnation = self.worker.incarnation(), "registered");
        self.tie.send_replace(Tie::Registered);
        self.stay(up, down, interval_ms).await
    }

    async fn stay(
        &self,
        up: mpsc::Sender<JoinRequest>,
        mut down: Streaming<JoinResponse>,
        interval_ms: u32,
    ) -> Result<std::convert::Infallible, Parted> {
        let interval_ms = if interval_ms == 0 { HEARTBEAT_INTERVAL_MS } else { interval_ms };
        let mut beat = interval(Duration::from_millis(interval_ms.into()));
        beat.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut changes = self.worker.models.changes();
        changes.mark_changed();
        let mut told = false;
        let mut beats: u64 = 0;
        loop {
            let message = tokio::select! {
                biased;
                () = self.leaving.cancelled(), if !told => {
                    told = true;
                    join_request::Message::Leaving(Leaving {})
                }
                response = down.message() => {
                    let response = response?.ok_or(if told { Parted::Left } else { Parted::Closed })?;
                    self.take(response)?;
                    continue;
                }
                Ok(()) = changes.changed() => {
                    join_request::Message::Observed(Observed { replicas: self.worker.models.observed() })
                }
                _ = beat.tick() => {
                    let idle = if beats.is_multiple_of(IDLE_EVERY_BEATS) { self.idle() } else { vec![] };
                    beats += 1;
                    join_request::Message::Heartbeat(Heartbeat { idle, ..self.heartbeat() })
                }
            };
            up.send(JoinRequest { message: Some(message) })
                .await
                .map_err(|_| if told { Parted::Left } else { Parted::Closed })?;
        }
    }

    fn take(&self, response: JoinResponse) -> Result<(), Parted> {
        match response.message {
            Some(join_response::Message::Intent(intent)) => {
                if let Err(error) = self.worker.models.act_on(&intent) {
                    tracing::warn!(%error, "an intent was refused");
                } else if self.leaving.is_cancelled() && intent.assignments.is_empty() {
                    return Err(Parted::Left);
                }
                Ok(())
            }
            Some(join_response::Message::Redirect(redirect)) => Err(Parted::Redirected(redirect.leader_peer_address)),
            Some(join_response::Message::Fenced(fenced)) => Err(Parted::Fenced(fenced)),
            Some(join_response::Message::Registered(_)) | None => Ok(()),
        }
    }

    fn registration(&self) -> Registration {
        Registration {
            worker_id: self.worker.id.to_string(),
            incarnation: self.worker.incarnation(),
            grpc_address: self.introduction.grpc_address.clone(),
            http_address: self.introduction.http_address.clone(),
            zone: self.introduction.zone.clone(),
            devices: self.introduction.devices.clone(),
            tags: self.introduction.tags.clone().into_iter().collect(),
            software_version: env!("CARGO_PKG_VERSION").into(),
        }
    }

    fn idle(&self) -> Vec<Idle> {
        let now = std::time::Instant::now();
        let of = |served: &Arc<ServedModel>| Idle {
            model: served.key.model.clone(),
            version: served.key.version,
            idle_s: served.metrics.statistics.idle(now).as_secs(),
        };
        self.worker.models.served().iter().map(of).collect()
    }

    fn heartbeat(&self) -> Heartbeat {
        let total: u64 = self.introduction.devices.iter().map(|device| device.memory_bytes).sum();
        let used: u64 = self.worker.models.served().iter().map(|served| served.memory_bytes).sum();
        Heartbeat {
            epoch: self.worker.models.epoch(),
            memory_free_bytes: total.saturating_sub(used),
            requests_in_flight: self.worker.in_flight(),
            requests_total: self.worker.requests_total(),
            sequences_live: u64::try_from(crate::metrics::sequences().get()).unwrap_or(0),
            idle: vec![],
        }
    }
}
