//! Workers' ties to the leader: one stream, one task, for each worker.
//!
//! A session tells its worker what to run whenever that changes, passes heartbeats on, and turns what the worker sees
//! into commands, one at a time and only what the state doesn't know yet. It ends when the stream does, when the
//! worker's life is over, when a newer stream speaks for the worker, or when this coordinator stops leading.
use std::{fmt::Display, pin::pin, time::Duration};

use cresset_core::{
    ClusterState, CommandBody, Outcome, Reject, WorkerId,
    apply::{is_news, is_registered},
    command::{MOVES_MAX, Registration, ReplicaReport, WORKERS_MAX},
    routes::{Assignment, assignments},
    state::{Epoch, Incarnation, ReplicaId, WorkerState},
    wire,
};
use cresset_proto::{
    fleet::v1::{
        Fenced, Heartbeat, JoinRequest, JoinResponse, Observed, Redirect, Registered, join_request, join_response,
        membership_service_server::MembershipService,
    },
    reason::Reason,
};
use futures::{Stream, StreamExt};
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use super::{Beat, Cluster, Event, Fleet, Role, Settings};
use crate::metrics;

/// Messages that may wait for a worker that doesn't read.
const REPLIES_MAX: usize = 16;
/// Replicas in one report; the rest follows.
const REPORTS_PER_COMMAND_MAX: usize = 1_000;

/// The service that workers join.
pub struct Membership<C> {
    context: Context<C>,
    /// Streams that may be open at once; twice the workers, since an old one may linger beside the new.
    streams: std::sync::Arc<Semaphore>,
}

#[derive(Clone)]
struct Context<C> {
    cluster: C,
    fleet: Fleet,
    settings: Settings,
    events: mpsc::Sender<Event>,
    shutdown: CancellationToken,
}

impl<C: Cluster> Membership<C> {
    pub(super) fn new(
        cluster: C,
        fleet: Fleet,
        settings: Settings,
        events: mpsc::Sender<Event>,
        shutdown: CancellationToken,
    ) -> Self {
        let context = Context { cluster, fleet, settings, events, shutdown };
        Self { context, streams: std::sync::Arc::new(Semaphore::new(2 * WORKERS_MAX)) }
    }

    /// Serves one stream. Split from [`join`](MembershipService::join) so that tests need no network.
    pub(super) fn open(
        &self,
        inbound: impl Stream<Item = Result<JoinRequest, Status>> + Send + 'static,
    ) -> Result<ReceiverStream<Result<JoinResponse, Status>>, Status> {
        let permit = std::sync::Arc::clone(&self.streams).try_acquire_owned();
        let permit = permit.map_err(|_| Status::resource_exhausted(format!("{} workers have joined", 2 * WORKERS_MAX)))?;
        let (replies, outbound) = mpsc::channel(REPLIES_MAX);
        let context = self.context.clone();
        tokio::spawn(async move {
            let _permit = permit;
            if let Err(status) = serve(context, pin!(inbound), replies.clone()).await {
                // The worker has gone, or reads nothing: then it doesn't matter.
                let _ = replies.try_send(Err(status));
            }
        });
        Ok(ReceiverStream::new(outbound))
    }
}

#[tonic::async_trait]
impl<C: Cluster> MembershipService for Membership<C> {
    type JoinStream = ReceiverStream<Result<JoinResponse, Status>>;

    async fn join(&self, request: Request<Streaming<JoinRequest>>) -> Result<Response<Self::JoinStream>, Status> {
        Ok(Response::new(self.open(request.into_inner())?))
    }
}

type Replies = mpsc::Sender<Result<JoinResponse, Status>>;
type Inbound<'a, S> = std::pin::Pin<&'a mut S>;

async fn serve<C, S>(context: Context<C>, mut inbound: Inbound<'_, S>, replies: Replies) -> Result<(), Status>
where
    C: Cluster,
    S: Stream<Item = Result<JoinRequest, Status>>,
{
    let limit = Duration::from_millis(context.settings.session_timeout_ms);
    let first = timeout(limit, inbound.next()).await;
    let first = first.map_err(|_| Status::deadline_exceeded(format!("no registration within {} ms", limit.as_millis())))?;
    let Some(first) = first.transpose()? else { return Ok(()) };
    let Some(join_request::Message::Register(registration)) = first.message else {
        return Err(Reason::InvalidArgument.status("the first message must be a registration"));
    };
    let registration = Registration::try_from(registration);
    let registration = registration.map_err(|error| Reason::InvalidArgument.status(error.to_string()))?;
    let (worker, incarnation) = (registration.worker.clone(), registration.incarnation);
    let wire = Wire { replies, limit };

    let role = context.cluster.role();
    if !role.leads {
        return wire.redirect(&context.cluster, role).await;
    }
    // After an election every worker comes at once, and of most there is nothing to agree on.
    let known = context.cluster.read(|state| is_registered(state, &registration).then_some(state.epoch));
    let epoch = match known {
        Some(epoch) => epoch,
        None => match register(&context, registration, limit).await? {
            Ok(epoch) => epoch,
            Err(Past { reject, incarnation_min, is_removed }) => {
                tracing::info!(%worker, incarnation, %reject, "refused a past life");
                return wire.fence(reject.to_string(), incarnation_min, is_removed).await;
            }
        },
    };
    // Only a leader's state is sure to hold the registration by now.
    let role = context.cluster.role();
    if !role.leads {
        return wire.redirect(&context.cluster, role).await;
    }
    let heartbeat_interval_ms = context.settings.heartbeat_interval_ms;
    wire.send(join_response::Message::Registered(Registered { epoch, heartbeat_interval_ms })).await?;
    tracing::info!(%worker, incarnation, epoch, "a worker joined");

    let number = context.fleet.enter(&worker);
    metrics::WORKERS_JOINED.set(i64::try_from(context.fleet.sessions()).unwrap_or(i64::MAX));
    let mut session = Session::new(&context, wire, worker.clone(), incarnation, number);
    session.tell(Event::Registered { worker: worker.clone(), incarnation }).await;
    let ended = session.run(inbound).await;
    let spoke = context.fleet.leave(&worker, number);
    metrics::WORKERS_JOINED.set(i64::try_from(context.fleet.sessions()).unwrap_or(i64::MAX));
    let why = ended.as_ref().map_or_else(|status| status.message(), |end| end.as_str());
    tracing::info!(%worker, incarnation, why, "a worker's stream ended");
    // Of a life that is over, its end is no news.
    if spoke && !matches!(ended, Ok(End::Fenced)) {
        session.tell(Event::Lost { worker, incarnation }).await;
    }
    ended.map(|_| ())
}

/// A life that is over.
struct Past {
    reject: Reject,
    /// The smallest incarnation that is still accepted.
    incarnation_min: Incarnation,
    /// Whether it was taken out on purpose.
    is_removed: bool,
}

/// Has a worker's life agreed on. Returns the epoch from which on it is.
async fn register<C: Cluster>(
    context: &Context<C>,
    registration: Registration,
    limit: Duration,
) -> Result<Result<Epoch, Past>, Status> {
    let (worker, incarnation) = (registration.worker.clone(), registration.incarnation);
    let outcome = timeout(limit, context.cluster.propose(CommandBody::RegisterWorker(registration))).await;
    match outcome.map_err(|_| not_agreed("it took too long"))?.map_err(not_agreed)? {
        Outcome::Done { epoch } | Outcome::Deployed { epoch, .. } | Outcome::DeployedSet { epoch, .. } => Ok(Ok(epoch)),
        Outcome::Rejected(reject @ Reject::StaleIncarnation { incarnation_min, .. }) => {
            let is_removed = context.cluster.read(|state| was_removed(state, &worker, incarnation));
            Ok(Err(Past { reject, incarnation_min, is_removed }))
        }
        Outcome::Rejected(reject) => Err(Reason::Conflict.status(reject.to_string())),
    }
}

/// Whether this life was taken out on purpose: then it has no successor of its own accord.
fn was_removed(state: &ClusterState, worker: &WorkerId, incarnation: Incarnation) -> bool {
    state.workers.get(worker).is_some_and(|known| known.incarnation == incarnation && known.state == WorkerState::Removed)
}

fn not_agreed(error: impl Display) -> Status {
    Reason::Indeterminate.status(format!("the registration wasn't agreed on: {error}"))
}

/// The way down to the worker.
struct Wire {
    replies: Replies,
    limit: Duration,
}

impl Wire {
    async fn send(&self, message: join_response::Message) -> Result<(), Status> {
        let response = JoinResponse { message: Some(message) };
        match timeout(self.limit, self.replies.send(Ok(response))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the worker hung up")),
            Err(_) => Err(Status::deadline_exceeded(format!("nothing was read for {} ms", self.limit.as_millis()))),
        }
    }

    async fn fence(&self, reason: String, incarnation_min: Incarnation, removed: bool) -> Result<(), Status> {
        self.send(join_response::Message::Fenced(Fenced { reason, incarnation_min, removed })).await
    }

    async fn redirect(&self, cluster: &impl Cluster, role: Role) -> Result<(), Status> {
        let address = |peer| cluster.read(|state| state.peers.get(&peer).map(|peer| peer.peer_address.clone()));
        let leader_peer_address = role.leader.filter(|_| !role.leads).and_then(address).unwrap_or_default();
        self.send(join_response::Message::Redirect(Redirect { leader_peer_address })).await
    }
}

/// Why a session ended, for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    HungUp,
    Fenced,
    Superseded,
    NotLeading,
    Shutdown,
}

impl End {
    fn as_str(self) -> &'static str {
        match self {
            Self::HungUp => "hung up",
            Self::Fenced => "fenced",
            Self::Superseded => "another stream speaks for it",
            Self::NotLeading => "not leading any more",
            Self::Shutdown => "shutting down",
        }
    }
}

/// A registered worker's stream.
struct Session<'a, C: Cluster> {
    context: &'a Context<C>,
    wire: Wire,
    worker: WorkerId,
    incarnation: Incarnation,
    number: u64,
    /// The epoch that was looked at last.
    epoch_seen: Option<Epoch>,
    /// What the worker was told last.
    told: Option<Vec<Assignment>>,
    /// All that the worker sees, as it said last.
    observed: Vec<ReplicaReport>,
    /// `observed` may hold what the state doesn't.
    report_due: bool,
    /// The worker said that it leaves.
    leaving: bool,
    drain_due: bool,
    /// At most one: a worker's words are agreed on in their order.
    proposals: JoinSet<Result<Outcome, C::ProposeError>>,
    propose_after: Instant,
}

impl<'a, C: Cluster> Session<'a, C> {
    fn new(context: &'a Context<C>, wire: Wire, worker: WorkerId, incarnation: Incarnation, number: u64) -> Self {
        Self {
            context,
            wire,
            worker,
            incarnation,
            number,
            epoch_seen: None,
            told: None,
            observed: Vec::new(),
            report_due: false,
            leaving: false,
            drain_due: false,
            proposals: JoinSet::new(),
            propose_after: Instant::now(),
        }
    }

    async fn tell(&self, event: Event) {
        // The leader's task ends only with the process.
        let _ = self.context.events.send(event).await;
    }

    async fn run<S>(&mut self, mut inbound: Inbound<'_, S>) -> Result<End, Status>
    where
        S: Stream<Item = Result<JoinRequest, Status>>,
    {
        let mut roles = self.context.cluster.roles();
        let mut epochs = self.context.cluster.epochs();
        loop {
            if let Some(end) = self.keep_up().await? {
                return Ok(end);
            }
            self.propose();
            let held_back = (self.report_due || self.drain_due) && self.proposals.is_empty();
            tokio::select! {
                () = self.context.shutdown.cancelled() => {
                    self.wire.redirect(&self.context.cluster, Role::default()).await?;
                    return Ok(End::Shutdown);
                }
                role = roles.next() => if let Some(role) = role && !role.leads {
                    self.wire.redirect(&self.context.cluster, role).await?;
                    return Ok(End::NotLeading);
                },
                _ = epochs.next() => {}
                message = inbound.next() => match message.transpose()? {
                    Some(message) => self.on_message(message).await?,
                    None => return Ok(End::HungUp),
                },
                Some(outcome) = self.proposals.join_next(), if !self.proposals.is_empty() => self.on_outcome(outcome),
                () = sleep_until(self.propose_after), if held_back => {}
            }
        }
    }

    /// Tells the worker what changed, or that its life is over.
    async fn keep_up(&mut self) -> Result<Option<End>, Status> {
        let superseded = (!self.context.fleet.speaks(&self.worker, self.number)).then_some(End::Superseded);
        let (worker, incarnation, seen) = (&self.worker, self.incarnation, self.epoch_seen.zip(self.told.as_deref()));
        let mut unconcerned = None;
        let view = self.context.cluster.read(|state| {
            if let Some((epoch, told)) = seen
                && (epoch == state.epoch || !state.changes.concern(epoch, worker, told))
            {
                unconcerned = Some(state.epoch);
                return None;
            }
            let floor = match state.workers.get(worker) {
                Some(known) if known.incarnation == incarnation && !known.state.is_over() => None,
                Some(known) => Some(known.incarnation_floor),
                None => Some(incarnation.saturating_add(1)),
            };
            let fence = floor.map(|floor| (floor, was_removed(state, worker, incarnation)));
            Some((state.epoch, fence, assignments(state, worker)))
        });
        let Some((epoch, fence, assignments)) = view else {
            self.epoch_seen = unconcerned;
            return Ok(superseded);
        };
        if let Some((incarnation_min, is_removed)) = fence {
            let reason = format!("incarnation {incarnation} of worker {worker} is over since epoch {epoch}");
            self.wire.fence(reason, incarnation_min, is_removed).await?;
            return Ok(Some(End::Fenced));
        }
        if superseded.is_some() {
            return Ok(superseded);
        }
        self.epoch_seen = Some(epoch);
        self.report_due = !self.observed.is_empty();
        if self.told.as_ref() != Some(&assignments) {
            self.wire.send(join_response::Message::Intent(wire::intent(epoch, &assignments))).await?;
            self.told = Some(assignments);
        }
        Ok(None)
    }

    async fn on_message(&mut self, request: JoinRequest) -> Result<(), Status> {
        match request.message {
            Some(join_request::Message::Heartbeat(heartbeat)) => self.on_heartbeat(&heartbeat).await,
            Some(join_request::Message::Observed(observed)) => return self.on_observed(observed),
            Some(join_request::Message::Leaving(_)) => {
                self.drain_due = !self.leaving;
                self.leaving = true;
            }
            Some(join_request::Message::Register(_)) => {
                return Err(Reason::InvalidArgument.status("a stream registers once; open another"));
            }
            None => {} // a later version's message
        }
        Ok(())
    }

    async fn on_heartbeat(&self, heartbeat: &Heartbeat) {
        let memory_changed = self.context.fleet.heard(&self.worker, Beat::new(self.incarnation, heartbeat));
        self.context.fleet.rested(&self.worker, &heartbeat.idle);
        let (worker, incarnation) = (self.worker.clone(), self.incarnation);
        self.tell(Event::Heartbeat { worker, incarnation, memory_changed }).await;
    }

    fn on_observed(&mut self, observed: Observed) -> Result<(), Status> {
        if observed.replicas.len() > MOVES_MAX {
            let message = format!("replicas has {} entries, the limit is {MOVES_MAX}", observed.replicas.len());
            return Err(Reason::InvalidArgument.status(message));
        }
        self.observed = observed.replicas.into_iter().filter_map(wire::replica_report).collect();
        self.report_due = true;
        Ok(())
    }

    /// Sends the next command on its way, if there is one and none is.
    fn propose(&mut self) {
        if !self.proposals.is_empty() || Instant::now() < self.propose_after {
            return;
        }
        let (worker, incarnation) = (self.worker.clone(), self.incarnation);
        let body = if std::mem::take(&mut self.drain_due) {
            tracing::info!(%worker, incarnation, "a worker leaves");
            CommandBody::DrainWorker { worker, incarnation }
        } else if std::mem::take(&mut self.report_due) {
            let replicas = self.news();
            if replicas.is_empty() {
                return;
            }
            CommandBody::ReportReplicas { worker, incarnation, replicas }
        } else {
            return;
        };
        let cluster = self.context.cluster.clone();
        self.proposals.spawn(async move { cluster.propose(body).await });
    }

    /// What the worker sees and the state doesn't know.
    fn news(&self) -> Vec<ReplicaReport> {
        self.context.cluster.read(|state| {
            let news = self.observed.iter().filter(|report| {
                let id = ReplicaId {
                    model: report.model.clone(),
                    version: report.version,
                    shard: report.shard,
                    worker: self.worker.clone(),
                };
                state.replicas.get(&id).is_some_and(|replica| is_news(replica, report))
            });
            news.take(REPORTS_PER_COMMAND_MAX).cloned().collect()
        })
    }

    fn on_outcome(&mut self, outcome: Result<Result<Outcome, C::ProposeError>, tokio::task::JoinError>) {
        let (worker, incarnation) = (&self.worker, self.incarnation);
        match outcome {
            Ok(Ok(Outcome::Rejected(reject))) => {
                // A fence shows in the epoch as well; anything else won't be right the second time either.
                tracing::warn!(%worker, incarnation, %reject, "a worker's report was refused");
                return;
            }
            Ok(Ok(_)) => {
                self.report_due = true; // there may be more than fitted, or than there was
                return;
            }
            Ok(Err(error)) => tracing::warn!(%worker, incarnation, %error, "a worker's report wasn't agreed on"),
            Err(error) => tracing::error!(%worker, incarnation, %error, "a report's task ended by itself"),
        }
        let leaves = self
            .context
            .cluster
            .read(|state| state.workers.get(worker).is_some_and(|known| known.state == WorkerState::Draining));
        self.report_due = true;
        self.drain_due |= self.leaving && !leaves;
        self.propose_after = Instant::now() + Duration::from_millis(self.context.settings.retry_ms);
    }
}
