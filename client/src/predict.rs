//! Predictions: one request, the requests of a sequence, and streams of both, each with failover.
//!
//! [`Router`] is the whole of it for a caller. `unary` sends single requests, `sequence` owns what a sequence needs to
//! survive its worker, `sessions` finds it by its id, `resumable` lets it survive its router, `many` runs a request that is
//! answered any number of times, `answered` remembers answers of requests that may come again, `stream` puts many requests on
//! one stream, each answer in its place, `failover` keeps count of what a request has tried, `hedge` sends a second copy of
//! one that takes long, `vigil` watches the replicas while they work.
mod answered;
mod call;
mod counts;
mod failover;
mod hedge;
mod many;
mod resumable;
mod sequence;
mod sessions;
mod stream;
mod unary;
mod vigil;

use std::{sync::Arc, time::Duration};

use cresset_proto::{
    answers::without_shared_memory,
    fleet::v1::{Opinion, ReportRequest},
    inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse},
    parameters::Parameters,
    reason::Reason,
};
use futures::{Stream, stream::unfold};
use tokio::{
    sync::{oneshot, watch},
    time::Instant,
};
use tonic::{Status, transport::Channel};

pub use call::CallOptions;
pub use counts::Counts;
pub use sessions::SequenceFigures;
pub use stream::until_end;

use crate::{
    predict::{
        answered::Answered,
        failover::{Failover, Repetitions},
        hedge::Hedges,
        sessions::Sessions,
    },
    retry::Kind,
    routes::{LookupError, ModelRoute, Replica, RouteTable, Routes, Version},
    settings::RouterSettings,
    workers::Workers,
};

/// Between two reports of workers that are left alone.
const REPORT_INTERVAL: Duration = Duration::from_millis(500);
/// A worker that answered within this time is one that answers.
const ANSWERED_LATELY_US: u64 = 2_000_000;

/// The router: predictions on whichever replica is best, moved to another when it fails. Clones are cheap and share
/// connections and sequences.
#[derive(Debug, Clone)]
pub struct Router(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    routes: Routes,
    settings: RouterSettings,
    workers: Workers,
    /// Connections for what a caller may leave unread for long; see `ConnectionSettings::for_unread`.
    unread: Workers,
    sessions: Arc<Sessions>,
    answered: Arc<Answered>,
    repetitions: Arc<Repetitions>,
    hedges: Arc<Hedges>,
    counts: Arc<Counts>,
    started: Instant,
}

/// What lanes of one router have in common beside the routes.
struct Shared {
    sessions: Arc<Sessions>,
    answered: Arc<Answered>,
    /// What may be run again or twice is a share of all requests, whichever lane they come by.
    repetitions: Arc<Repetitions>,
    hedges: Arc<Hedges>,
    counts: Arc<Counts>,
    started: Instant,
}

/// A request that is all that the router must know of it.
struct Checked {
    request: ModelInferRequest,
    parameters: Parameters,
    route: Arc<ModelRoute>,
    version: Version,
    deadline: Instant,
}

/// What a request is, once it is known whether it belongs to a sequence.
#[expect(clippy::large_enum_variant, reason = "it lives for a moment, and a box would be an allocation for most requests")]
enum Work {
    /// With which version it means, and what it is known by if its caller may send it again. That is boxed, as few may.
    Single(ModelInferRequest, Version, Option<Box<answered::Key>>),
    /// The session has it; this is where its answer comes.
    Sequence(oneshot::Receiver<Result<ModelInferResponse, Status>>),
}

impl Router {
    /// A router over a table of routes that others keep fresh.
    pub fn new(routes: Routes, settings: RouterSettings) -> Self {
        let bounds = answered::Bounds { window: settings.answers_window, bytes_max: settings.answers_bytes_max };
        Self::connected(
            routes,
            settings,
            Shared {
                sessions: Arc::new(Sessions::new()),
                answered: Arc::new(Answered::new(bounds)),
                repetitions: Arc::default(),
                hedges: Arc::default(),
                counts: Arc::default(),
                started: Instant::now(),
            },
        )
    }

    /// The same router with connections of its own, for a thread that has a runtime of its own.
    #[must_use]
    pub fn with_own_connections(&self) -> Self {
        let inner = &*self.0;
        let shared = Shared {
            sessions: Arc::clone(&inner.sessions),
            answered: Arc::clone(&inner.answered),
            repetitions: Arc::clone(&inner.repetitions),
            hedges: Arc::clone(&inner.hedges),
            counts: Arc::clone(&inner.counts),
            started: inner.started,
        };
        Self::connected(inner.routes.clone(), inner.settings.clone(), shared)
    }

    fn connected(routes: Routes, settings: RouterSettings, shared: Shared) -> Self {
        let Shared { sessions, answered, repetitions, hedges, counts, started } = shared;
        let workers = Workers::new(settings.connection);
        let unread = Workers::new(settings.connection.for_unread());
        Self(Arc::new(Inner { routes, settings, workers, unread, sessions, answered, repetitions, hedges, counts, started }))
    }

    /// The newest routes.
    pub fn routes(&self) -> Arc<RouteTable> {
        self.0.routes.table()
    }

    /// The replica that a request of this model would be sent to now; `None` while nobody serves it. What every request pays
    /// before it is sent: at most a microsecond with 1,000 workers and 10,000 models, and no lock (`cresset-bench --only routing`).
    ///
    /// # Errors
    /// [`LookupError`].
    pub fn choose(&self, model: &str, version: &Version) -> Result<Option<Arc<Replica>>, LookupError> {
        let table = self.0.routes.load();
        let route = table.lookup(model, version)?;
        Ok(Failover::untried(&self.0, Kind::Unary).pick(&self.0, route))
    }

    /// Waits until the routes are of this epoch, or a later one. Returns at once when nobody feeds them any more.
    pub async fn wait_for_epoch(&self, epoch: u64) {
        let mut routes = self.0.routes.clone();
        let _ = routes.wait_for(|table| table.epoch() >= epoch).await;
    }

    /// What the router did beside sending requests.
    pub fn counts(&self) -> &Counts {
        &self.0.counts
    }

    /// What the router makes of the workers, for the leader; `None` while it leaves none alone.
    pub fn opinions(&self) -> Option<Vec<Opinion>> {
        let table = self.0.routes.load();
        if table.workers().all(|worker| worker.out().is_none()) {
            return None;
        }
        let lately_us = self.0.now_us().saturating_sub(ANSWERED_LATELY_US);
        let opinion = |worker: &Arc<Replica>| {
            let left_alone = worker.out().is_some();
            let is_any = left_alone || worker.has_answered_since(lately_us);
            is_any.then(|| Opinion { worker_id: worker.worker_id.clone(), incarnation: worker.incarnation, left_alone })
        };
        Some(table.workers().filter_map(opinion).collect())
    }

    /// What is to be told to the leader under this name, as it comes: which workers are left alone here, for as long as there are
    /// any. It never ends.
    pub fn reports(&self, name: String) -> impl Stream<Item = ReportRequest> + Send + use<> {
        unfold((self.clone(), name, false), |(router, name, mut has_said_any)| async move {
            loop {
                tokio::time::sleep(REPORT_INTERVAL).await;
                let opinions = router.opinions();
                // Once more at the end: it takes its word back.
                if opinions.is_some() || has_said_any {
                    has_said_any = opinions.is_some();
                    let report = ReportRequest { router: name.clone(), opinions: opinions.unwrap_or_default() };
                    return Some((report, (router, name, has_said_any)));
                }
            }
        })
    }

    /// How many sequences are open, as it changes.
    pub fn sequences_live(&self) -> watch::Receiver<usize> {
        self.0.sessions.live()
    }

    /// What sequences cost and did.
    pub fn sequence_figures(&self) -> SequenceFigures {
        self.0.sessions.figures()
    }

    /// The router's own connection to a worker, for calls that aren't predictions.
    ///
    /// # Errors
    /// UNAVAILABLE when the worker's address isn't one.
    pub fn channel(&self, worker: &Arc<Replica>) -> Result<Channel, Status> {
        Ok(self.0.workers.connection(worker)?.channel)
    }

    /// Runs one request, alone or as the next of its sequence. Dropping the future cancels the request at the worker, except
    /// one of a sequence, which keeps its place there.
    ///
    /// # Errors
    /// What a client of Triton would see; see [`CallOptions::rich_status`].
    pub async fn infer(&self, request: ModelInferRequest, options: &CallOptions) -> Result<ModelInferResponse, Status> {
        self.0.infer(request, options).await.map_err(|status| call::dress(status, options.rich_status))
    }

    /// Runs requests as they come and yields their answers in the order of the requests. One that fails is answered by an
    /// `error_message` in its place, and the stream goes on. Answers of decoupled models leave as they come, and so do those of
    /// requests that say `cresset_unordered`, except that those of one sequence keep their order.
    pub fn stream<S>(
        &self,
        requests: S,
        options: CallOptions,
    ) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + Send + use<S>
    where
        S: Stream<Item = Result<ModelInferRequest, Status>> + Send + 'static,
    {
        stream::run(Arc::clone(&self.0), requests, options)
    }

    /// Hands a request of a sequence over, in order of the calls, and returns where its answer will come.
    pub(crate) async fn submit(
        &self,
        request: ModelInferRequest,
        options: &CallOptions,
    ) -> Result<oneshot::Receiver<Result<ModelInferResponse, Status>>, Status> {
        let deadline = self.0.deadline(options);
        let checked = self.0.check(request, deadline, true).await?;
        match self.0.begin(checked, options).await? {
            Work::Sequence(answer) => Ok(answer),
            Work::Single(request, ..) => {
                let text = format!("model '{}' has no sequences: its configuration lacks sequence_batching", request.model_name);
                Err(Reason::InvalidArgument.status(text))
            }
        }
    }
}

impl Inner {
    /// Milliseconds on the router's own clock.
    fn now_ms(&self) -> u64 {
        self.now_us() / 1_000
    }

    fn now_us(&self) -> u64 {
        self.us(Instant::now())
    }

    fn us(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.started).as_micros()).unwrap_or(u64::MAX)
    }

    fn deadline(&self, options: &CallOptions) -> Instant {
        let own = Instant::now() + self.settings.request_timeout;
        options.deadline.map_or(own, |deadline| deadline.min(own))
    }

    async fn infer(self: &Arc<Self>, request: ModelInferRequest, options: &CallOptions) -> Result<ModelInferResponse, Status> {
        let deadline = self.deadline(options);
        let checked = self.check(request, deadline, true).await?;
        match self.begin(checked, options).await? {
            Work::Single(request, version, key) => unary::infer(self, request, version, key, options, deadline).await,
            Work::Sequence(answer) => received(answer).await,
        }
    }

    /// Checks what the router must know of a request, in Triton's order.
    async fn check(&self, request: ModelInferRequest, deadline: Instant, unary: bool) -> Result<Checked, Status> {
        let version = version_of(&request.model_version)?;
        let route = self.route(&request.model_name, &version, deadline).await?;
        if route.decoupled && unary {
            return Err(Reason::Unsupported.status("ModelInfer RPC doesn't support models with decoupled transaction policy"));
        }
        if route.shards > 1 {
            let text = format!("model '{}' has {} shards; models of several shards aren't served yet", route.name, route.shards);
            return Err(Reason::Unsupported.status(text));
        }
        let parameters = Parameters::read(&request.parameters).map_err(|error| error.reason().status(error.to_string()))?;
        without_shared_memory(&request)?;
        Ok(Checked { request, parameters, route, version, deadline })
    }

    /// Enqueues a request if it is part of a sequence.
    async fn begin(self: &Arc<Self>, checked: Checked, options: &CallOptions) -> Result<Work, Status> {
        let Checked { request, parameters, route, version, deadline } = checked;
        if !route.stateful {
            let key = parameters.request_id.map(|id| Box::new(answered::Key::of(&request, id)));
            return Ok(Work::Single(request, version, key));
        }
        // Boxed, as all that follows is on few requests' way: a future is moved several times before it runs, and what is
        // seldom needed should not make all of them large.
        let submitted = Box::pin(sessions::submit(self, &route, version, request, parameters, options, deadline));
        submitted.await.map(Work::Sequence)
    }

    /// The route of a model; waits for the first table if none has come yet.
    async fn route(&self, name: &str, version: &Version, deadline: Instant) -> Result<Arc<ModelRoute>, Status> {
        if !self.routes.load().is_received() {
            Box::pin(self.first_table(deadline)).await?;
        }
        lookup(&self.routes.load(), name, version).cloned()
    }

    async fn first_table(&self, deadline: Instant) -> Result<(), Status> {
        let mut routes = self.routes.clone();
        let patience = deadline.min(Instant::now() + self.settings.route_wait);
        match tokio::time::timeout_at(patience, routes.wait_for(RouteTable::is_received)).await {
            Ok(Some(_)) => Ok(()),
            _ => Err(Reason::NoReplica.status("no routes are known yet: no coordinator has sent any")),
        }
    }
}

/// The answer of a session; an error if the session ended without one.
pub(crate) async fn received(
    answer: oneshot::Receiver<Result<ModelInferResponse, Status>>,
) -> Result<ModelInferResponse, Status> {
    let lost = |_| Err(Reason::NoReplica.status("the sequence ended before this request was answered"));
    answer.await.unwrap_or_else(lost)
}

/// The route of a model, or Triton's words for its absence.
fn lookup<'a>(table: &'a RouteTable, name: &str, version: &Version) -> Result<&'a Arc<ModelRoute>, Status> {
    table.lookup(name, version).map_err(|error| error.status())
}

/// Reads `model_version`: empty for the highest that is served, else a number from 0, or what may be a label.
fn version_of(text: &str) -> Result<Version, Status> {
    Version::read(text).map_err(|error| Reason::InvalidArgument.status(error.to_string()))
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod checks {
    use tonic::Code;

    use super::*;

    #[test]
    fn versions_are_numbers_labels_or_nothing() {
        assert_eq!(version_of("").unwrap(), Version::Highest);
        assert_eq!(version_of("7").unwrap(), Version::Exactly(7));
        assert_eq!(version_of("latest").unwrap(), Version::Label("latest".into()));
        let neither = version_of("1.0").unwrap_err();
        assert_eq!(neither.code(), Code::InvalidArgument);
        assert!(neither.message().starts_with("failed to get model version from specified version string '1.0'"));
        assert!(version_of("-1").unwrap_err().message().starts_with("invalid model version specified '-1'"));
    }

    #[tokio::test(start_paused = true)]
    async fn without_any_table_a_request_waits_and_then_says_why() {
        let (_sender, routes) = crate::routes::channel();
        let router = Router::new(routes, RouterSettings::default());
        let started = Instant::now();
        let request = ModelInferRequest { model_name: "m".into(), ..Default::default() };
        let status = router.infer(request, &CallOptions::default()).await.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert_eq!(started.elapsed(), RouterSettings::default().route_wait);
    }
}
