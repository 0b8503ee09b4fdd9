//! Watching replicas while they work: who is overdue is asked whether it lives, who is out is asked until it is back, and what waits
//! for it moves. What follows from what is decided by [`ejection`](crate::ejection).
use std::{
    pin::{Pin, pin},
    sync::{Arc, Weak},
    time::Duration,
};

use cresset_proto::{
    inference::{ServerLiveRequest, grpc_inference_service_client::GrpcInferenceServiceClient},
    reason::Reason,
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tonic::Status;

use super::{Inner, call::deadline_exceeded, failover::Failover};
use crate::{
    ejection::{Cause, Event, Peers, Verdict},
    retry::Failure,
    routes::{ModelRoute, Replica},
};

/// How long a replica may take to say that it lives.
const ASKED_FOR: Duration = Duration::from_millis(300);
/// Most requests are answered before it is worth while to listen for news of their replica.
const UNWATCHED: Duration = Duration::from_millis(10);

/// The wait for one replica's answers to requests that were sent one after the other.
#[derive(Debug)]
pub(super) struct Vigil {
    /// How often the replica was out when it was chosen.
    pub(super) ejections_seen: u64,
    unanswered: u32,
    /// Since the request before was answered, or the oldest was sent.
    since: Option<Instant>,
    /// When it was last found overdue.
    overdue: Option<Instant>,
}

impl Vigil {
    pub(super) fn new(replica: &Replica) -> Self {
        Self { ejections_seen: replica.ejections(), unanswered: 0, since: None, overdue: None }
    }

    pub(super) fn sent(&mut self) {
        self.unanswered += 1;
        self.since.get_or_insert_with(Instant::now);
    }

    /// How long the answer took, counted from the one before.
    pub(super) fn answered(&mut self) -> Duration {
        let now = Instant::now();
        self.unanswered = self.unanswered.saturating_sub(1);
        self.overdue = None;
        let before = std::mem::replace(&mut self.since, (self.unanswered > 0).then_some(now));
        before.map_or(Duration::ZERO, |before| now - before)
    }

    /// When what is waited for becomes suspicious.
    pub(super) fn overdue_at(&self, patience: impl FnOnce() -> Duration) -> Option<Instant> {
        self.overdue.or(self.since).map(|since| since + patience())
    }

    /// Takes note that it has, and says since when it was waited.
    pub(super) fn note_overdue(&mut self) -> Instant {
        let now = Instant::now();
        self.overdue = Some(now);
        self.since.unwrap_or(now)
    }
}

/// Waits for an answer of `replica` until the deadline, until the replica is gone, or until it is out and another can take over.
pub(super) async fn attended<T>(
    router: &Arc<Inner>,
    replica: &Arc<Replica>,
    route: &ModelRoute,
    failover: &Failover,
    deadline: Instant,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let began = Instant::now();
    let ejections_seen = replica.ejections();
    let mut answer = pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => return answer,
        () = sleep_until(deadline.min(began + UNWATCHED)) => {}
    }
    // Boxed, since most requests are over by now.
    Box::pin(watched(router, replica, route, failover, deadline, Watch { began, ejections_seen }, answer)).await
}

/// Since when an answer is waited for.
struct Watch {
    began: Instant,
    /// How often the replica had been out by then.
    ejections_seen: u64,
}

async fn watched<T>(
    router: &Arc<Inner>,
    replica: &Arc<Replica>,
    route: &ModelRoute,
    failover: &Failover,
    deadline: Instant,
    Watch { began, mut ejections_seen }: Watch,
    mut answer: Pin<&mut impl Future<Output = Result<T, Status>>>,
) -> Result<T, Status> {
    let patience = route.patience(router.now_ms());
    let mut overdue_at = began + patience;
    loop {
        tokio::select! {
            biased;
            answer = &mut answer => return answer,
            () = replica.gone() => return Err(judged_dead(replica)),
            () = replica.ejected(ejections_seen) => {
                ejections_seen = replica.ejections();
                if failover.has_better(route, replica) {
                    return Err(left(replica));
                }
            }
            () = sleep_until(deadline.min(overdue_at)) => {
                if Instant::now() >= deadline {
                    return Err(deadline_exceeded(""));
                }
                overdue_at = Instant::now() + patience;
                router.overdue(replica, route, began);
            }
        }
    }
}

/// The leader says that it is dead.
pub(super) fn judged_dead(replica: &Replica) -> Status {
    Reason::Fenced.status(format!("worker {} was judged dead", replica.worker_id))
}

/// This router says that it had better be left.
pub(super) fn left(replica: &Replica) -> Status {
    match replica.out() {
        // It can't have been the request's fault, nor can it do the work twice while it is silent.
        Some(Cause::Silence) | None => Reason::Fenced.status(format!("worker {} doesn't answer", replica.worker_id)),
        Some(cause) => Reason::Suspect.status(format!("worker {} was taken out: {}", replica.worker_id, cause.as_str())),
    }
}

impl Inner {
    /// A request that was sent at `began` is unanswered for longer than usual.
    pub(super) fn overdue(self: &Arc<Self>, replica: &Arc<Replica>, route: &ModelRoute, began: Instant) {
        let began_us = self.us(began);
        let other = |other: &&Arc<Replica>| !Arc::ptr_eq(other, replica) && other.has_answered_since(began_us);
        // One that has never answered may be at its first request, which takes as long as it takes.
        let others_answer = replica.has_answered_since(0) && route.replicas.iter().any(|replica| other(&replica));
        self.note(replica, Event::Overdue { others_answer });
    }

    /// A request failed.
    pub(super) fn blame(self: &Arc<Self>, replica: &Arc<Replica>, failure: Failure) {
        if let Some(event) = crate::ejection::blame(failure) {
            self.note(replica, event);
        }
    }

    fn note(self: &Arc<Self>, replica: &Arc<Replica>, event: Event) {
        let now_ms = self.now_ms();
        match replica.note(event, self.peers(replica), now_ms, rand::random()) {
            Verdict::Nothing | Verdict::Restore | Verdict::Try => {}
            Verdict::Ask => drop(tokio::spawn(ask_once(Arc::downgrade(self), Arc::clone(replica)))),
            Verdict::Eject { cause, pause_ms } => {
                self.counts.ejected(cause);
                tracing::warn!(
                    worker = %replica.worker_id, incarnation = replica.incarnation, cause = cause.as_str(),
                    "a worker is left alone"
                );
                tokio::spawn(ask_until_back(Arc::downgrade(self), Arc::clone(replica), Duration::from_millis(pause_ms)));
            }
            // Said only to the one that asks until it is back.
            Verdict::AskLater { .. } => {}
        }
    }

    /// What the models of this replica could do without it.
    fn peers(&self, replica: &Arc<Replica>) -> Peers {
        let table = self.routes.load();
        let alone = Peers { replicas: 1, out: 0 };
        let routes = table.routes_of(replica).filter(|route| route.replicas.len() > 1);
        let peers = routes.map(|route| Peers {
            replicas: route.replicas.len(),
            out: route.replicas.iter().filter(|other| !Arc::ptr_eq(other, replica) && other.out().is_some()).count(),
        });
        peers.reduce(Peers::worse).unwrap_or(alone)
    }

    /// Whether the replica lives; `None` if that can't be told, since this process itself stood still.
    async fn lives(&self, replica: &Arc<Replica>) -> Option<bool> {
        let Ok(connection) = self.workers.connection(replica) else { return Some(false) };
        let mut client = GrpcInferenceServiceClient::new(connection.channel.clone());
        let began = Instant::now();
        let answer = timeout(ASKED_FOR, client.server_live(ServerLiveRequest {})).await;
        match answer {
            Ok(Ok(_)) => Some(true),
            // A server that refuses lives; anything else is the connection's.
            Ok(Err(status)) => {
                self.workers.failed(&connection, &status);
                Some(!matches!(Failure::of(&status), Failure::Unreachable | Failure::Broken))
            }
            Err(_) => (began.elapsed() < 2 * ASKED_FOR).then_some(false),
        }
    }
}

/// Asks a suspect once.
async fn ask_once(router: Weak<Inner>, replica: Arc<Replica>) {
    let Some(router) = router.upgrade() else { return };
    // In doubt it lives: whatever waits for it is overdue again soon.
    let answered = router.lives(&replica).await.unwrap_or(true);
    router.note(&replica, Event::Asked { answered });
}

/// Asks one that is out until it lives, or until it is gone for good.
async fn ask_until_back(router: Weak<Inner>, replica: Arc<Replica>, mut pause: Duration) {
    loop {
        tokio::select! {
            () = replica.gone() => return,
            () = sleep(pause) => {}
        }
        let Some(router) = router.upgrade() else { return };
        let answered = router.lives(&replica).await.unwrap_or(false);
        match replica.note(Event::Asked { answered }, router.peers(&replica), router.now_ms(), rand::random()) {
            Verdict::AskLater { pause_ms } => pause = Duration::from_millis(pause_ms),
            _ => return,
        }
    }
}
