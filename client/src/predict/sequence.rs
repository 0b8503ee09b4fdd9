//! One sequence: the task that owns its journal and its stream to a worker.
//!
//! Requests come in by the inbox, get their ordinal in the journal, and go to the worker that the sequence sticks to. When
//! that one fails, the next worker gets the checkpoint and all requests since, and answers that were delivered before are
//! discarded. It gives up only when nobody waits any more, or when the model itself is gone.
//!
//! The task ends when the inbox is closed (after END, or by a newer START) and everything is answered, or when nothing has
//! happened for as long as the model's configuration allows.
use std::{collections::VecDeque, sync::Arc, time::Duration};

use cresset_proto::{
    fleet::v1::{
        Open, RunRequest, RunResponse, Step, run_request, run_response, sequences_service_client::SequencesServiceClient,
    },
    inference::ModelInferResponse,
    model_config,
    parameters::{keys, number_of},
    reason::Reason,
};
use futures::{StreamExt, TryFutureExt, stream::BoxStream};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc},
    time::Instant,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status};
use tracing::Instrument;

use super::{
    CallOptions, Inner,
    call::{deadline_exceeded, outcome},
    failover::Failover,
    resumable::{Place, Resumable, step_status},
    sessions::{Ask, Beginning, Key, Reply},
    vigil::{Vigil, judged_dead, left},
};
use crate::{
    journal::{Accept, Journal, Lane, Outcome},
    retry::{Kind, PAUSE_MS_MAX, Pays, Verdict},
    routes::{InFlight, ModelRoute, Replica, Routes, Version},
    workers::Connection,
};

/// Requests that wait to be written to a worker's connection.
const LINK_QUEUE: usize = 16;

/// A request that has an ordinal and no answer. In order of the ordinals, without gaps.
struct Pending {
    /// The client's own; 0 for one that doesn't number its requests.
    ordinal: u64,
    deadline: Instant,
    /// `None` when the caller's deadline has passed.
    reply: Option<Reply>,
    _permits: [OwnedSemaphorePermit; 2],
}

impl Pending {
    fn is_awaited(&self) -> bool {
        self.reply.as_ref().is_some_and(|reply| !reply.is_closed())
    }
}

/// The stream to the worker that the sequence sticks to.
struct Link {
    replica: Arc<Replica>,
    connection: Connection,
    lane: Lane,
    requests: mpsc::Sender<RunRequest>,
    responses: BoxStream<'static, Result<RunResponse, Status>>,
    vigil: Vigil,
    _in_flight: InFlight,
}

/// The task's state.
pub(super) struct Session {
    router: Arc<Inner>,
    key: Key,
    id: u64,
    version: u64,
    generation: u64,
    idle: Duration,
    options: CallOptions,
    inbox: mpsc::Receiver<Ask>,
    inbox_open: bool,
    routes: Routes,
    journal: Journal,
    /// Of a client that may come back by way of another router.
    resumable: Option<Resumable>,
    /// The last ordinal of such a client that was taken.
    taken: u64,
    pending: VecDeque<Pending>,
    /// Didn't fit the journal; goes in when a checkpoint makes room.
    parked: Option<Ask>,
    link: Option<Link>,
    failover: Failover,
    /// No new link before this, unless newer routes come.
    resume_at: Option<Instant>,
    active_at: Instant,
}

/// What the task wakes up for.
enum Event {
    Answer(Option<Result<RunResponse, Status>>),
    Room,
    Ask(Option<Ask>),
    WorkerGone,
    WorkerOut,
    Overdue,
    Retry,
    Deadline,
    Idle,
}

impl Session {
    pub(super) fn new(router: Arc<Inner>, key: Key, beginning: Beginning, route: &ModelRoute, options: CallOptions) -> Self {
        let idle_us = model_config::sequence_idle_us(&route.config);
        let Beginning { id, version, generation, journal, resumable, taken, inbox } = beginning;
        Self {
            key,
            id,
            version,
            generation,
            idle: Duration::from_micros(idle_us),
            options,
            inbox,
            inbox_open: true,
            routes: router.routes.clone(),
            journal,
            resumable,
            taken,
            pending: VecDeque::new(),
            parked: None,
            link: None,
            failover: Failover::new(&router, Kind::Sequence),
            resume_at: None,
            active_at: Instant::now(),
            router,
        }
    }

    /// Lives the sequence's life.
    pub(super) async fn run(self) {
        let span = tracing::debug_span!("sequence", model = %self.key.model, sequence = %self.key.sequence);
        self.live().instrument(span).await;
    }

    async fn live(mut self) {
        self.router.sessions.count_bytes(0, self.bytes());
        loop {
            self.connect();
            if !self.inbox_open && !self.is_awaited() {
                break;
            }
            let before = self.bytes();
            match self.next_event().await {
                Event::Answer(Some(Ok(response))) => self.on_answer(response),
                Event::Answer(Some(Err(status))) => self.on_link_failed(status),
                // The worker may end the stream only after us.
                Event::Answer(None) => self.on_link_failed(Status::unknown("the worker ended the sequence's stream")),
                Event::Room => self.send(),
                Event::Ask(Some(ask)) => self.on_ask(ask),
                Event::Ask(None) => self.inbox_open = false,
                Event::WorkerGone => self.leave(judged_dead),
                Event::WorkerOut => self.on_worker_out(),
                Event::Overdue => self.on_overdue(),
                Event::Retry => {
                    self.resume_at = None;
                    self.failover.forgive();
                }
                Event::Deadline => self.on_deadline(),
                Event::Idle => self.expire(),
            }
            self.router.sessions.count_bytes(before, self.bytes());
        }
        self.router.sessions.count_bytes(self.bytes(), 0);
        self.router.sessions.close(&self.key, self.id);
    }

    async fn next_event(&mut self) -> Event {
        let open = self.pending.iter().filter(|pending| pending.reply.is_some()).map(|pending| pending.deadline);
        let deadline = open.chain(self.parked.iter().map(|ask| ask.deadline)).min();
        let awaited = self.is_awaited();
        let has_more = self.link.as_ref().is_some_and(|link| link.lane.has_more(&self.journal));
        let waiting = self.link.is_none() && awaited;
        let resume_at = self.resume_at;
        let idle_at = self.active_at + self.idle;
        let can_take = self.inbox_open && self.parked.is_none();
        let overdue_at = self.link.as_ref().and_then(|link| link.vigil.overdue_at(|| self.patience()));
        let link = self.link.as_mut();
        let seen = link.as_ref().map_or(0, |link| link.vigil.ejections_seen);
        let (requests, responses, replica) = match link {
            Some(link) => (Some(&link.requests), Some(&mut link.responses), Some(&link.replica)),
            None => (None, None, None),
        };
        tokio::select! {
            biased;
            answer = maybe(responses.map(StreamExt::next)) => Event::Answer(answer),
            room = maybe(requests.filter(|_| has_more).map(mpsc::Sender::reserve)) => match room {
                Ok(_) => Event::Room,
                Err(_) => Event::Answer(None),
            },
            ask = self.inbox.recv(), if can_take => Event::Ask(ask),
            () = maybe(replica.map(|replica| replica.gone())) => Event::WorkerGone,
            () = maybe(replica.map(|replica| replica.ejected(seen))) => Event::WorkerOut,
            () = maybe(overdue_at.map(tokio::time::sleep_until)) => Event::Overdue,
            changed = self.routes.changed(), if waiting && self.routes.is_fed() => {
                let _ = changed;
                Event::Retry
            }
            () = maybe(resume_at.filter(|_| waiting).map(tokio::time::sleep_until)) => Event::Retry,
            () = maybe(deadline.map(tokio::time::sleep_until)) => Event::Deadline,
            () = tokio::time::sleep_until(idle_at), if !awaited && self.inbox_open => Event::Idle,
        }
    }

    /// Whether anybody waits for an answer.
    fn is_awaited(&self) -> bool {
        self.parked.is_some() || self.pending.iter().any(Pending::is_awaited)
    }

    /// Bytes of what is kept.
    fn bytes(&self) -> usize {
        self.journal.bytes() + self.resumable.as_ref().map_or(0, Resumable::bytes)
    }

    fn on_ask(&mut self, ask: Ask) {
        self.active_at = Instant::now();
        let Some(ask) = self.first_time(ask) else { return };
        let Ask { request, mark, deadline, reply, permits } = ask;
        let total = self.router.sessions.journals_bytes.load(std::sync::atomic::Ordering::Relaxed);
        if total > self.router.settings.journals_bytes_max && self.pending.is_empty() {
            let limit = self.router.settings.journals_bytes_max;
            let text = format!(
                "the journals of all sequences hold {total} bytes, the limit is journals_bytes_max = {limit}; end some sequences"
            );
            let _ = reply.send(Err(Reason::QueueFull.status(text)));
            return;
        }
        match self.journal.push(request) {
            Ok(_) => {
                let ordinal = mark.map_or(0, |mark| mark.ordinal);
                self.taken = self.taken.max(ordinal);
                self.pending.push_back(Pending { ordinal, deadline, reply: Some(reply), _permits: permits });
                self.send();
            }
            // An answer under way may bring the checkpoint that makes room.
            Err((_, request)) if !self.pending.is_empty() => {
                self.parked = Some(Ask { request: *request, mark, deadline, reply, permits });
            }
            Err((full, _)) => {
                // The caller may have gone.
                let _ = reply.send(Err(Reason::QueueFull.status(full.to_string())));
            }
        }
    }

    /// Hands a request back if it is the sequence's next; one that came before gets its answer, now or when it is there.
    fn first_time(&mut self, ask: Ask) -> Option<Ask> {
        let (Some(resumable), Some(mark)) = (&mut self.resumable, ask.mark) else { return Some(ask) };
        let place = resumable.place(mark, self.taken, self.router.settings.kept);
        let answer = match place {
            Place::Next => return Some(ask),
            Place::Known(answer) => *answer,
            Place::Refused(status) => Err(status),
            Place::UnderWay => {
                let pending = self.pending.iter_mut().find(|pending| pending.ordinal == mark.ordinal);
                match pending {
                    Some(pending) => (pending.deadline, pending.reply) = (ask.deadline, Some(ask.reply)),
                    None => {
                        let text = format!("request {} of sequence {} is out of turn", mark.ordinal, self.key.sequence);
                        // The caller may have gone.
                        let _ = ask.reply.send(Err(Reason::InvalidArgument.status(text)));
                    }
                }
                return None;
            }
        };
        let _ = ask.reply.send(answer);
        None
    }

    /// Makes sure of a link when somebody waits for an answer and the time for it has come.
    fn connect(&mut self) {
        if self.link.is_some() || self.resume_at.is_some() || !self.is_awaited() {
            return;
        }
        let table = self.routes.update();
        let Some(route) = table.model(&self.key.model, Version::Exactly(self.version)) else {
            let text = format!("Request for unknown model: '{}' is not found", self.key.model);
            return self.end(&Reason::UnknownModel.status(text));
        };
        if route.generation != self.generation {
            let text = format!(
                "sequence {} ended because model '{}' was deployed anew; start it again",
                self.key.sequence, self.key.model
            );
            return self.end(&Reason::SequenceNotStarted.status(text));
        }
        let Some(replica) = self.failover.place(&self.router, route, self.key.place()) else {
            // Newer routes or the callers' deadlines end this; or time, if there is somebody to try again.
            if !route.replicas.is_empty() {
                self.resume_at = Some(Instant::now() + Duration::from_millis(PAUSE_MS_MAX));
            }
            return;
        };
        match self.open(&replica) {
            Ok(link) => {
                tracing::debug!(worker = %replica.worker_id, epoch = table.epoch(), from = link.lane.checkpoint_ordinal, "on a worker");
                self.link = Some(link);
                self.send();
            }
            Err(status) => self.on_failure(&replica, &status),
        }
    }

    /// Begins a stream; whether the worker takes it shows in the answers.
    fn open(&self, replica: &Arc<Replica>) -> Result<Link, Status> {
        let connection = self.router.workers.connection(replica)?;
        let lane = Lane::open(&self.journal);
        let open = Open {
            model: self.key.model.clone(),
            version: self.version,
            generation: self.generation,
            incarnation: replica.incarnation,
            sequence_id: self.key.sequence.to_string(),
            checkpoint: lane.checkpoint.clone(),
            checkpoint_ordinal: lane.checkpoint_ordinal,
            resumable: self.resumable.as_ref().map(Resumable::open),
        };
        let (requests, outgoing) = mpsc::channel(LINK_QUEUE);
        let first = RunRequest { message: Some(run_request::Message::Open(open)) };
        requests.try_send(first).map_err(|_| Status::internal("a new queue is full"))?;
        let bytes_max = self.router.workers.message_bytes_max();
        let mut client = SequencesServiceClient::new(connection.channel.clone())
            .max_decoding_message_size(bytes_max)
            .max_encoding_message_size(bytes_max);
        let call = self.options.wrap(ReceiverStream::new(outgoing), replica, None);
        let responses = async move { client.run(call).await.map(Response::into_inner) }.try_flatten_stream().boxed();
        let _in_flight = replica.enter();
        let vigil = Vigil::new(replica);
        Ok(Link { replica: Arc::clone(replica), connection, lane, requests, responses, vigil, _in_flight })
    }

    /// Gives the link what it has room for.
    fn send(&mut self) {
        let Some(link) = self.link.as_mut() else { return };
        while link.requests.capacity() > 0 {
            let Some(next) = link.lane.send(&self.journal) else { return };
            let step = Step { ordinal: next.wire_ordinal, request: Some(next.request), want_checkpoint: next.want_checkpoint };
            // It can only fail when the connection has ended, and then the answers say so.
            let _ = link.requests.try_send(RunRequest { message: Some(run_request::Message::Step(step)) });
            link.vigil.sent();
        }
    }

    fn on_answer(&mut self, answer: RunResponse) {
        let Some(link) = self.link.as_mut() else { return };
        let (outcome, answered) = match answer.result {
            Some(run_response::Result::Response(response)) => (Outcome::Answered, Ok(response)),
            Some(run_response::Result::Error(error)) => (Outcome::Failed, Err(step_status(&error))),
            None => return self.on_link_failed(Status::internal("the worker sent an answer without a result")),
        };
        if let Err(status) = &answered
            && is_the_workers(status)
        {
            return self.on_link_failed(Status::with_metadata(status.code(), status.message(), status.metadata().clone()));
        }
        let Some(ordinal) = link.lane.answered(answer.ordinal) else {
            return self.on_link_failed(Status::internal(format!("the worker answered {} out of turn", answer.ordinal)));
        };
        let took = link.vigil.answered();
        match self.journal.accept(ordinal, outcome) {
            Accept::Deliver => {
                match self.routes.load().model(&self.key.model, Version::Exactly(self.version)) {
                    Some(route) => link.replica.note_answer(route, took, self.router.now_us()),
                    None => link.replica.note_success(),
                }
                self.failover.reset(&self.router);
                self.deliver(answered);
            }
            Accept::Duplicate => {}
            Accept::Diverged => {
                return self.on_link_failed(Status::internal(format!("request {ordinal} failed when it was run again")));
            }
            Accept::Gap => return self.on_link_failed(Status::internal(format!("the worker answered {ordinal} out of turn"))),
        }
        if let Some(state) = answer.checkpoint {
            self.router.sessions.count_checkpoint(state.len());
            let applied = self.journal.request(ordinal).map_or(0, |request| number_of(&request.parameters, keys::ORDINAL));
            if self.journal.checkpoint(ordinal, state)
                && let Some(resumable) = &mut self.resumable
            {
                resumable.applied = applied;
            }
        }
        if let Some(ask) = self.parked.take() {
            self.on_ask(ask);
        }
    }

    fn deliver(&mut self, answer: Result<ModelInferResponse, Status>) {
        self.active_at = Instant::now();
        let Some(pending) = self.pending.pop_front() else { return };
        if let Some(resumable) = &mut self.resumable {
            resumable.keep(pending.ordinal, &answer);
        }
        if let Some(reply) = pending.reply {
            // The caller may have gone.
            let _ = reply.send(answer);
        }
    }

    fn on_link_failed(&mut self, status: Status) {
        if let Some(link) = self.link.take() {
            self.router.workers.failed(&link.connection, &status);
            self.on_failure(&link.replica, &status);
        }
    }

    /// Leaves the worker for a reason that isn't the connection's.
    fn leave(&mut self, why: impl FnOnce(&Replica) -> Status) {
        if let Some(status) = self.link.as_ref().map(|link| why(&link.replica)) {
            self.on_link_failed(status);
        }
    }

    /// How long the worker may be silent while it owes an answer.
    fn patience(&self) -> Duration {
        let table = self.routes.load();
        let route = table.model(&self.key.model, Version::Exactly(self.version));
        // A model that is gone ends the sequence by itself.
        route.map_or(self.router.settings.request_timeout, |route| route.patience(self.router.now_ms()))
    }

    fn on_overdue(&mut self) {
        let Some(link) = self.link.as_mut() else { return };
        let since = link.vigil.note_overdue();
        if let Some(route) = self.routes.load().model(&self.key.model, Version::Exactly(self.version)) {
            self.router.overdue(&link.replica, route, since);
        }
    }

    /// The worker is left alone from now on; the sequence goes on elsewhere if there is an elsewhere.
    fn on_worker_out(&mut self) {
        let Some(link) = self.link.as_mut() else { return };
        link.vigil.ejections_seen = link.replica.ejections();
        let table = self.routes.load();
        let route = table.model(&self.key.model, Version::Exactly(self.version));
        if route.is_some_and(|route| self.failover.has_better(route, &link.replica)) {
            self.leave(left);
        }
    }

    fn on_failure(&mut self, replica: &Arc<Replica>, status: &Status) {
        let table = self.routes.update();
        let route = table.model(&self.key.model, Version::Exactly(self.version)).map(AsRef::as_ref);
        // The deadlines of the callers are looked after one by one.
        let far = Instant::now() + self.router.settings.request_timeout;
        let pause_ms = match self.failover.failed(&self.router, route, replica, status, far) {
            Verdict::Move { after_ms, .. } => after_ms,
            Verdict::Wait { at_most_ms, .. } => at_most_ms,
            Verdict::GiveUp => {
                let status = Status::with_metadata(status.code(), status.message(), status.metadata().clone());
                return self.end(&outcome(status, &self.key.model));
            }
        };
        self.resume_at = (pause_ms > 0).then(|| Instant::now() + Duration::from_millis(pause_ms));
    }

    /// Answers those whose time is over. Their requests keep their places: they may have been run.
    fn on_deadline(&mut self) {
        let now = Instant::now();
        for pending in self.pending.iter_mut().filter(|pending| pending.deadline <= now) {
            if let Some(reply) = pending.reply.take() {
                let _ = reply.send(Err(deadline_exceeded(&self.key.model)));
            }
        }
        if let Some(ask) = self.parked.take_if(|ask| ask.deadline <= now) {
            let _ = ask.reply.send(Err(deadline_exceeded(&self.key.model)));
        }
    }

    /// Nothing has happened for too long. What slipped into the inbox at the last moment is still served.
    fn expire(&mut self) {
        tracing::debug!(idle_ms = self.idle.as_millis(), "an idle sequence ends");
        self.router.sessions.close(&self.key, self.id);
        self.inbox.close();
    }

    /// The sequence can't go on: everybody hears why.
    fn end(&mut self, status: &Status) {
        tracing::debug!(%status, "a sequence ends early");
        self.router.sessions.close(&self.key, self.id);
        self.inbox.close();
        self.inbox_open = false;
        let said = || Status::with_metadata(status.code(), status.message(), status.metadata().clone());
        for reply in self.pending.drain(..).filter_map(|pending| pending.reply) {
            let _ = reply.send(Err(said()));
        }
        if let Some(ask) = self.parked.take() {
            let _ = ask.reply.send(Err(said()));
        }
        while let Ok(ask) = self.inbox.try_recv() {
            let _ = ask.reply.send(Err(said()));
        }
    }
}

/// The future, or none that ever ends.
async fn maybe<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Whether an error that stands for one request is really about the worker, so that the sequence had better move.
fn is_the_workers(status: &Status) -> bool {
    use crate::retry::{Budget, Failure, decide};
    let budget = Budget {
        moves_left: 1,
        overloads_left: 1,
        failures: 1,
        allowed: true,
        jitter: 1.0,
        others: true,
        pushback_ms: 0,
        now_ms: 0,
        deadline_ms: 1,
    };
    let failure = Failure::of(status);
    match decide(failure, failure.point(), Kind::Sequence, &budget) {
        // No room for one request: that is its answer.
        Verdict::GiveUp | Verdict::Move { pays: Pays::Overload, .. } => false,
        Verdict::Move { .. } | Verdict::Wait { .. } => true,
    }
}
