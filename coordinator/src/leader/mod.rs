//! What a coordinator does while it leads.
//!
//! Every coordinator runs [`Leader`]; it does nothing until consensus says that this one leads, and everything it knows
//! ends with the term. Its duties, each a pure function of `cresset-core` with a shell around it: judge workers that
//! fell silent ([`liveness`]), keep the replicas where they should be ([`placement`]), and tell
//! workers what to run ([`sessions`]). It owns no truth: whatever it decides is a command, and the state may say no.
//!
//! Absent: anything on the path of a prediction. With no leader at all, workers and routers go on as they are.
pub mod cluster;
pub mod fleet;
pub mod probe;
pub mod sessions;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use cresset_core::{
    CommandBody, Outcome, WorkerId,
    command::Cause,
    level::{self, LEVEL_REMOVE_WORKER},
    liveness::{self, Doubt, Liveness, Verdict},
    placement::{self, Plan},
    state::{Epoch, Incarnation, WorkerState},
};
use futures::StreamExt;
use tokio::{
    sync::{Semaphore, mpsc},
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};
use tokio_util::sync::CancellationToken;

pub use self::{
    cluster::{Cluster, Role},
    fleet::{Beat, Fleet},
    probe::Probe,
    sessions::Membership,
};
use crate::metrics;

/// Events that may wait for the leader's task; more, and the sessions wait.
const EVENTS_MAX: usize = 1_024;
/// Between the beginnings of two plans: what changes together is planned together.
const PLAN_PAUSE: Duration = Duration::from_millis(5);
/// Moves in one command; the rest of a plan follows when it is applied.
const MOVES_PER_COMMAND_MAX: usize = 1_000;
/// Workers that are asked at once whether they live.
const PROBES_MAX: usize = 64;

/// How the duties are done.
#[derive(Debug, Clone)]
pub struct Settings {
    /// How often workers are asked to say that they live.
    pub heartbeat_interval_ms: u32,
    /// How often silence is looked for.
    pub tick_ms: u64,
    /// How long a worker whose stream broke may take to answer.
    pub probe_timeout_ms: u64,
    /// How long a proposal may take before it is given up; it may be applied nevertheless.
    pub proposal_timeout_ms: u64,
    /// How long to wait after a proposal failed.
    pub retry_ms: u64,
    /// How long a worker may take to introduce itself, and to take a message.
    pub session_timeout_ms: u64,
    /// When silence is death.
    pub liveness: liveness::Policy,
    /// Where replicas go.
    pub placement: placement::Policy,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            heartbeat_interval_ms: 250,
            tick_ms: 100,
            probe_timeout_ms: 300,
            proposal_timeout_ms: 2_000,
            retry_ms: 250,
            session_timeout_ms: 5_000,
            liveness: liveness::Policy::default(),
            placement: placement::Policy::default(),
        }
    }
}

/// What sessions tell the leader's task.
#[derive(Debug)]
enum Event {
    Registered { worker: WorkerId, incarnation: Incarnation },
    Heartbeat { worker: WorkerId, incarnation: Incarnation, memory_changed: bool },
    Lost { worker: WorkerId, incarnation: Incarnation },
}

/// The task of the leader's duties.
pub struct Leader<C> {
    cluster: C,
    fleet: Fleet,
    settings: Settings,
    probe: Probe,
    events: mpsc::Receiver<Event>,
    /// Where the clock of liveness begins. Monotonic, so a wall clock that jumps harms nobody.
    started: Instant,
}

/// Sets up the duties: the task to [`run`](Leader::run), the service for the peer port, and the heartbeats for the status.
pub fn new<C: Cluster>(
    cluster: C,
    settings: Settings,
    probe: Probe,
    shutdown: CancellationToken,
) -> (Leader<C>, Membership<C>, Fleet) {
    let fleet = Fleet::new(settings.placement.clone());
    let (sender, events) = mpsc::channel(EVENTS_MAX);
    let membership = Membership::new(cluster.clone(), fleet.clone(), settings.clone(), sender, shutdown);
    let leader = Leader { cluster, fleet: fleet.clone(), settings, probe, events, started: Instant::now() };
    (leader, membership, fleet)
}

impl<C: Cluster> Leader<C> {
    /// Does the duties whenever this coordinator leads, until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let mut roles = self.cluster.roles();
        loop {
            let role = tokio::select! {
                () = shutdown.cancelled() => return,
                role = roles.next() => role,
                // Sessions end with the term too; what they say until then has no listener.
                Some(_) = self.events.recv() => continue,
            };
            let Some(role) = role else { return };
            if !role.leads {
                continue;
            }
            tracing::info!(term = role.term, "leading");
            metrics::LEADING.set(1);
            let term = Term::new(&mut self, role.term);
            let ended = tokio::select! {
                () = shutdown.cancelled() => true,
                () = term.run() => false,
            };
            metrics::LEADING.set(0);
            self.fleet.doubt(fleet::Doubts::new());
            tracing::info!(term = role.term, "not leading any more");
            if ended {
                return;
            }
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// What a task of a term came back with.
enum Done {
    Probed {
        worker: WorkerId,
        incarnation: Incarnation,
        answered: bool,
    },
    Judged,
    /// `short`: replicas are missing that more memory could place.
    Planned {
        short: bool,
        took: Duration,
        then: Then,
    },
    Raised,
}

/// What became of a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// There was nothing to do.
    Nothing,
    /// It is agreed on.
    Placed,
    /// It isn't.
    Failed,
}

/// One term of leading.
struct Term<'a, C> {
    leader: &'a mut Leader<C>,
    term: u64,
    liveness: Liveness,
    tasks: JoinSet<Done>,
    probes: Arc<Semaphore>,
    /// The epoch whose workers are listened for.
    followed: Option<Epoch>,
    /// The state or the workers' memory changed since the last plan.
    plan_due: bool,
    /// Replicas are missing that more memory could place.
    short: bool,
    /// A plan is on its way; the next is made from what it leads to.
    placing: bool,
    /// No plan before this: one has just begun, or failed.
    place_after: Instant,
    /// A higher feature level is on its way.
    raising: bool,
    /// Whether workers came or went a moment ago, as of the last tick.
    restless: bool,
    /// Lives whose replicas move, as of the last plan.
    abandoned: BTreeSet<(WorkerId, Incarnation)>,
}

impl<'a, C: Cluster> Term<'a, C> {
    fn new(leader: &'a mut Leader<C>, term: u64) -> Self {
        let liveness = Liveness::new(leader.settings.liveness.clone(), leader.now_ms());
        Self {
            leader,
            term,
            liveness,
            tasks: JoinSet::new(),
            probes: Arc::new(Semaphore::new(PROBES_MAX)),
            followed: None,
            plan_due: true,
            short: false,
            placing: false,
            place_after: Instant::now(),
            raising: false,
            restless: true,
            abandoned: BTreeSet::new(),
        }
    }

    fn holds(&self) -> bool {
        let role = self.leader.cluster.role();
        role.leads && role.term == self.term
    }

    async fn run(mut self) {
        // Before this, the state may lack what the last leader did.
        while let Err(error) = self.leader.cluster.catch_up().await {
            if !self.holds() {
                return;
            }
            tracing::debug!(term = self.term, %error, "not caught up yet");
            sleep(Duration::from_millis(self.leader.settings.retry_ms)).await;
        }
        let mut roles = self.leader.cluster.roles();
        let mut indexes = self.leader.cluster.indexes();
        let mut ticks = interval(Duration::from_millis(self.leader.settings.tick_ms.max(1)));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        self.follow();
        loop {
            tokio::select! {
                role = roles.next() => if role.is_none() || !self.holds() { return },
                index = indexes.next() => match index {
                    Some(_) => self.follow(),
                    None => return,
                },
                Some(event) = self.leader.events.recv() => self.on_event(event),
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => self.on_done(done),
                _ = ticks.tick() => self.tick(),
                () = sleep_until(self.place_after), if self.plan_due && !self.placing => {}
            }
            self.place();
        }
    }

    fn tick(&mut self) {
        let now_ms = self.leader.now_ms();
        let mut verdicts = self.liveness.tick(now_ms);
        for (worker, incarnation) in self.leader.fleet.doubted() {
            verdicts.extend(self.liveness.doubted(&worker, incarnation, now_ms));
        }
        self.act(verdicts);
        self.doubt();
        self.raise_level();
        let restless = self.leader.fleet.is_restless();
        self.plan_due |= self.restless && !restless;
        self.restless = restless;
        let abandoned = self.leader.fleet.abandoned();
        if abandoned != self.abandoned {
            let workers: Vec<&str> = abandoned.iter().map(|(worker, _)| worker.as_str()).collect();
            tracing::warn!(?workers, "most routers have left workers alone for long: what they have moves");
            self.abandoned = abandoned;
            self.plan_due = true;
        }
    }

    /// Raises the feature level, once every coordinator is known to know a higher one.
    fn raise_level(&mut self) {
        if self.raising {
            return;
        }
        let known = self.leader.cluster.levels_known();
        let Some(level) = self.leader.cluster.read(|state| level::to_raise(state, &known)) else { return };
        self.raising = true;
        let cluster = self.leader.cluster.clone();
        let limit = Duration::from_millis(self.leader.settings.proposal_timeout_ms);
        self.tasks.spawn(async move {
            match timeout(limit, cluster.propose(CommandBody::RaiseLevel { level })).await {
                Ok(Ok(outcome)) => tracing::info!(level, ?outcome, "every coordinator knows it: raised the feature level"),
                // It is repeated at the next tick.
                Ok(Err(error)) => tracing::debug!(level, %error, "a higher feature level wasn't agreed on"),
                Err(_) => tracing::debug!(level, "a higher feature level wasn't agreed on in time"),
            }
            Done::Raised
        });
    }

    /// Brings what is known of doubts up to date.
    fn doubt(&mut self) {
        let now_ms = self.leader.now_ms();
        let mut doubts: fleet::Doubts =
            self.liveness.doubts(now_ms).map(|(worker, incarnation, doubt)| (worker.clone(), (incarnation, doubt))).collect();
        for (worker, incarnation) in self.leader.fleet.doubted() {
            doubts.insert(worker, (incarnation, Doubt::Suspect));
        }
        self.plan_due |= self.leader.fleet.doubt(doubts);
    }

    fn follow(&mut self) {
        let now_ms = self.leader.now_ms();
        self.leader.cluster.read(|state| {
            // Whoever comes or goes makes the epoch grow.
            if self.followed.replace(state.epoch) != Some(state.epoch) {
                self.liveness.follow(state, now_ms);
            }
        });
        self.plan_due = true;
    }

    fn on_event(&mut self, event: Event) {
        let now_ms = self.leader.now_ms();
        match event {
            Event::Registered { worker, incarnation } => {
                self.liveness.registered(&worker, incarnation, now_ms);
                self.doubt();
            }
            Event::Heartbeat { worker, incarnation, memory_changed } => {
                let was_in_doubt = self.liveness.doubt(&worker, incarnation, now_ms).is_some();
                self.liveness.heartbeat(&worker, incarnation, now_ms);
                self.plan_due |= memory_changed && (self.short || self.placing);
                if was_in_doubt {
                    self.doubt();
                }
            }
            Event::Lost { worker, incarnation } => {
                let verdicts = self.liveness.connection_lost(&worker, incarnation);
                self.act(verdicts);
                self.doubt();
            }
        }
    }

    fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        match done {
            Ok(Done::Probed { worker, incarnation, answered: true }) => {
                self.liveness.probe_ok(&worker, incarnation, self.leader.now_ms());
            }
            Ok(Done::Probed { worker, incarnation, answered: false }) => {
                let verdicts = self.liveness.probe_failed(&worker, incarnation, self.leader.now_ms());
                self.act(verdicts);
            }
            Ok(Done::Judged) => {}
            Ok(Done::Raised) => self.raising = false,
            Ok(Done::Planned { short, took, then }) => {
                (self.placing, self.short) = (false, short);
                self.plan_due |= then != Then::Nothing;
                // In a large cluster every report would cost a plan: planning takes half a core at most.
                self.place_after = self.place_after.max(Instant::now() + took);
                if then == Then::Failed {
                    self.place_after = Instant::now() + Duration::from_millis(self.leader.settings.retry_ms);
                }
            }
            Err(error) => {
                tracing::error!(%error, "a duty's task ended by itself");
                (self.placing, self.raising) = (false, false);
            }
        }
    }

    fn act(&mut self, verdicts: Vec<Verdict>) {
        for verdict in verdicts {
            match verdict {
                Verdict::Probe { worker, incarnation } => self.ask(worker, incarnation),
                Verdict::Dead { worker, incarnation, cause } => self.judge(worker, incarnation, cause),
            }
        }
    }

    fn ask(&mut self, worker: WorkerId, incarnation: Incarnation) {
        let address = self.leader.cluster.read(|state| state.workers.get(&worker).map(|known| known.grpc_address.clone()));
        let Some(address) = address else { return };
        let answer = (self.leader.probe)(address);
        let probes = Arc::clone(&self.probes);
        self.tasks.spawn(async move {
            // Too many at once, and the time that each has would go to the others.
            let _turn = probes.acquire_owned().await;
            let answered = answer.await;
            tracing::info!(%worker, incarnation, answered, "probed a worker that is in doubt");
            Done::Probed { worker, incarnation, answered }
        });
    }

    fn judge(&mut self, worker: WorkerId, incarnation: Incarnation, cause: Cause) {
        let cluster = self.leader.cluster.clone();
        let limit = Duration::from_millis(self.leader.settings.proposal_timeout_ms);
        let has_left = cluster.read(|state| {
            let is_draining = state.workers.get(&worker).is_some_and(|known| known.state == WorkerState::Draining);
            // Until every coordinator can read that it left, it is dead like any other.
            is_draining && state.level >= LEVEL_REMOVE_WORKER && state.replicas_on(&worker).next().is_none()
        });
        self.tasks.spawn(async move {
            if has_left {
                let body = CommandBody::RemoveWorker { worker: worker.clone(), incarnation };
                match timeout(limit, cluster.propose(body)).await {
                    Ok(Ok(outcome)) => tracing::info!(%worker, incarnation, ?outcome, "a worker has left in order"),
                    // It is repeated while the worker stays silent.
                    Ok(Err(error)) => tracing::warn!(%worker, incarnation, %error, "a worker's end wasn't agreed on"),
                    Err(_) => tracing::warn!(%worker, incarnation, "a worker's end wasn't agreed on in time"),
                }
                return Done::Judged;
            }
            let body = CommandBody::MarkDead { worker: worker.clone(), incarnation, cause };
            match timeout(limit, cluster.propose(body)).await {
                Ok(Ok(Outcome::Rejected(reject))) => tracing::info!(%worker, incarnation, %reject, "a verdict came too late"),
                Ok(Ok(_)) => {
                    metrics::DEATHS.with_label_values(&[metrics::cause(cause)]).inc();
                    tracing::warn!(%worker, incarnation, %cause, "judged a worker dead");
                }
                // It is repeated while the worker stays silent.
                Ok(Err(error)) => tracing::warn!(%worker, incarnation, %error, "a verdict wasn't agreed on"),
                Err(_) => tracing::warn!(%worker, incarnation, "a verdict wasn't agreed on in time"),
            }
            Done::Judged
        });
    }

    /// Plans anew if something changed, and proposes what there is to do.
    fn place(&mut self) {
        if !self.plan_due || self.placing || Instant::now() < self.place_after {
            return;
        }
        (self.plan_due, self.placing) = (false, true);
        self.place_after = Instant::now() + PLAN_PAUSE;
        let (cluster, fleet) = (self.leader.cluster.clone(), self.leader.fleet.clone());
        let limit = Duration::from_millis(self.leader.settings.proposal_timeout_ms);
        self.tasks.spawn(async move {
            // Of a large cluster it takes a while: heartbeats are heard meanwhile, and commands applied.
            let view = cluster.view();
            let planning = tokio::task::spawn_blocking(move || {
                let begun = Instant::now();
                (fleet.plan(&view), begun.elapsed())
            });
            let Ok((plan, took)) = planning.await else {
                tracing::error!("planning ended by itself");
                return Done::Planned { short: false, took: Duration::ZERO, then: Then::Failed };
            };
            let short = !plan.unplaced.is_empty();
            let then = if plan.is_empty() { Then::Nothing } else { carry_out(&cluster, plan, limit).await };
            Done::Planned { short, took, then }
        });
    }
}

/// Proposes what a plan asks for, or the first part of it.
async fn carry_out<C: Cluster>(cluster: &C, mut plan: Plan, limit: Duration) -> Then {
    plan.truncate(MOVES_PER_COMMAND_MAX);
    let (relieved, added, removed, epoch_seen) = (plan.relieve.len(), plan.add.len(), plan.remove.len(), plan.epoch);
    let evicted = plan.evict.len();
    match timeout(limit, cluster.propose(plan.into_command())).await {
        Ok(Ok(Outcome::Rejected(reject))) => tracing::info!(epoch_seen, %reject, "a plan came too late"),
        Ok(Ok(_)) => {
            metrics::MOVES.with_label_values(&["add"]).inc_by(added as u64);
            metrics::MOVES.with_label_values(&["remove"]).inc_by(removed as u64);
            metrics::MOVES.with_label_values(&["relieve"]).inc_by(relieved as u64);
            metrics::MOVES.with_label_values(&["evict"]).inc_by(evicted as u64);
            tracing::info!(epoch_seen, relieved, added, removed, evicted, "placed replicas");
            return Then::Placed;
        }
        Ok(Err(error)) => tracing::warn!(epoch_seen, %error, "a plan wasn't agreed on"),
        Err(_) => tracing::warn!(epoch_seen, "a plan wasn't agreed on in time"),
    }
    Then::Failed
}

#[cfg(test)]
mod testkit;
#[cfg(test)]
mod tests;
