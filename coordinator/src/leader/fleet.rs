//! What workers say about themselves between two agreements: heartbeats.
//!
//! Known on the leader only, never in the log, gone with its term. The status reads it; placement takes the memory.
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use cresset_core::{
    ClusterState, WorkerId,
    command::MOVES_MAX,
    liveness::Doubt,
    opinions::{Opinion, Opinions, Tally},
    placement::{self, Plan, Seen},
    standing::Standing,
    state::{Incarnation, ModelKey, Worker},
};
use cresset_proto::fleet::v1 as fleet;
use parking_lot::RwLock;
use tokio::time::Instant;

/// How long after a worker came or went no replicas move for nothing but evenness, in ms: one that comes back soon, or goes again,
/// would have them moved for nothing.
pub(super) const RESTLESS_MS: u64 = 30_000;

/// The newest heartbeat of a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beat {
    /// The life that sent it.
    pub incarnation: Incarnation,
    /// The newest intent that the worker acts on.
    pub epoch: u64,
    /// Free memory of its devices, all together.
    pub memory_free_bytes: u64,
    /// Requests that it works on or has queued.
    pub requests_in_flight: u64,
    /// Requests that it answered in this life.
    pub requests_total: u64,
    /// Sequences that it holds.
    pub sequences_live: u64,
}

impl Beat {
    pub(super) fn new(incarnation: Incarnation, heartbeat: &fleet::Heartbeat) -> Self {
        Self {
            incarnation,
            epoch: heartbeat.epoch,
            memory_free_bytes: heartbeat.memory_free_bytes,
            requests_in_flight: heartbeat.requests_in_flight,
            requests_total: heartbeat.requests_total,
            sequences_live: heartbeat.sequences_live,
        }
    }
}

/// Heartbeats, shared by the sessions that hear them and whoever wants to know. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Fleet(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    policy: placement::Policy,
    session_last: AtomicU64,
    /// A lock, since every holder only copies a few numbers.
    tables: RwLock<Tables>,
    /// What routers say of workers.
    opinions: RwLock<Opinions>,
    clock: Clock,
}

/// Milliseconds since the fleet began. Monotonic, so a wall clock that jumps harms nobody.
#[derive(Debug)]
struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[derive(Debug, Default)]
struct Tables {
    beats: BTreeMap<WorkerId, Beat>,
    /// The stream that speaks for each worker; an older one of the same worker is a leftover.
    sessions: BTreeMap<WorkerId, u64>,
    /// How long each worker's models have been idle, as it said last.
    rests: BTreeMap<WorkerId, Rests>,
    /// The lives that the leader doubts. Empty unless this coordinator leads.
    doubts: Doubts,
    /// When a worker last came or went.
    changed_ms: u64,
}

#[derive(Debug)]
struct Rests {
    heard_ms: u64,
    /// In s, then.
    idle_s: Vec<(ModelKey, u64)>,
}

/// Lives that aren't trusted with anything new, and why.
pub(super) type Doubts = BTreeMap<WorkerId, (Incarnation, Doubt)>;

impl Fleet {
    /// An empty fleet; `policy` is what [`plan`](Self::plan) goes by.
    pub fn new(policy: placement::Policy) -> Self {
        Self(Arc::new(Inner { policy, ..Inner::default() }))
    }

    /// The newest heartbeat of each worker that has a stream here. Empty unless this coordinator leads.
    pub fn beats(&self) -> BTreeMap<WorkerId, Beat> {
        self.0.tables.read().beats.clone()
    }

    /// The placement plan for a state, by what is known of the workers here. It is what the leader acts on; on other
    /// coordinators it is a good guess, for the status.
    pub fn plan(&self, state: &ClusterState) -> Plan {
        let is_current = |id: &WorkerId, incarnation: Incarnation| {
            state.workers.get(id).is_some_and(|worker| worker.incarnation == incarnation)
        };
        let mut seen = Seen::default();
        {
            let tables = self.0.tables.read();
            // A past life's memory says nothing about the new one's.
            let beats = tables.beats.iter().filter(|(id, beat)| is_current(id, beat.incarnation));
            seen.memory_free_bytes = beats.map(|(id, beat)| (id.clone(), beat.memory_free_bytes)).collect();
            let doubts = tables.doubts.iter().filter(|(id, (incarnation, _))| is_current(id, *incarnation));
            seen.avoided = doubts.map(|(id, _)| id.clone()).collect();
        }
        let abandoned = self.abandoned().into_iter().filter(|(id, incarnation)| is_current(id, *incarnation));
        if state.models.values().any(|deployment| deployment.claim.evictable) {
            seen.idle_s = self.idle_s();
        }
        seen.abandoned = abandoned.map(|(id, _)| id).collect();
        seen.avoided.extend(seen.abandoned.iter().cloned());
        seen.restless = self.is_restless();
        placement::plan_seeing(state, &self.0.policy, &seen)
    }

    /// What a worker is, as far as is known here.
    pub fn standing(&self, id: &WorkerId, worker: &Worker) -> Standing {
        let doubt = self.0.tables.read().doubts.get(id).filter(|(incarnation, _)| *incarnation == worker.incarnation).copied();
        Standing::of(worker.state, doubt.map(|(_, doubt)| doubt))
    }

    /// The lives that the leader doubts from now on. Returns whether they are others than before.
    pub(super) fn doubt(&self, doubts: Doubts) -> bool {
        let mut tables = self.0.tables.write();
        let differs = tables.doubts != doubts;
        tables.doubts = doubts;
        differs
    }

    /// A router says what it makes of the workers.
    pub fn said(&self, router: &str, of: BTreeMap<WorkerId, Opinion>) {
        self.0.opinions.write().said(router, of, self.0.clock.now_ms());
    }

    /// What routers say of a worker's life.
    pub fn opinions(&self, worker: &WorkerId, incarnation: Incarnation) -> Tally {
        self.0.opinions.read().of(worker, incarnation)
    }

    /// The lives that most routers leave alone.
    pub(super) fn doubted(&self) -> Vec<(WorkerId, Incarnation)> {
        let mut opinions = self.0.opinions.write();
        opinions.tick(self.0.clock.now_ms());
        opinions.doubted().map(|(worker, incarnation)| (worker.clone(), incarnation)).collect()
    }

    /// Those whose replicas move for it.
    pub(super) fn abandoned(&self) -> BTreeSet<(WorkerId, Incarnation)> {
        self.0.opinions.read().abandoned(self.0.clock.now_ms())
    }

    /// Whether workers came or went a moment ago.
    pub(super) fn is_restless(&self) -> bool {
        self.0.clock.now_ms().saturating_sub(self.0.tables.read().changed_ms) < RESTLESS_MS
    }

    /// How many workers have a stream here.
    pub fn sessions(&self) -> usize {
        self.0.tables.read().sessions.len()
    }

    /// A new stream speaks for the worker. Returns the stream's number.
    pub(super) fn enter(&self, worker: &WorkerId) -> u64 {
        let session = self.0.session_last.fetch_add(1, Ordering::Relaxed) + 1;
        let mut tables = self.0.tables.write();
        tables.sessions.insert(worker.clone(), session);
        tables.changed_ms = self.0.clock.now_ms();
        session
    }

    /// Whether this stream still speaks for the worker.
    pub(super) fn speaks(&self, worker: &WorkerId, session: u64) -> bool {
        self.0.tables.read().sessions.get(worker) == Some(&session)
    }

    /// The stream ended. Returns whether it spoke for the worker until now.
    pub(super) fn leave(&self, worker: &WorkerId, session: u64) -> bool {
        let mut tables = self.0.tables.write();
        let spoke = tables.sessions.get(worker) == Some(&session);
        if spoke {
            tables.sessions.remove(worker);
            tables.beats.remove(worker);
            tables.rests.remove(worker);
            tables.changed_ms = self.0.clock.now_ms();
        }
        spoke
    }

    /// Keeps a heartbeat. Returns whether the worker's free memory changed.
    pub(super) fn heard(&self, worker: &WorkerId, beat: Beat) -> bool {
        let before = self.0.tables.write().beats.insert(worker.clone(), beat);
        before.is_none_or(|before| before.memory_free_bytes != beat.memory_free_bytes)
    }

    /// Keeps how long a worker's models have been idle, where it says so.
    pub(super) fn rested(&self, worker: &WorkerId, idle: &[fleet::Idle]) {
        if idle.is_empty() {
            return;
        }
        let of = |idle: &fleet::Idle| (ModelKey { name: idle.model.clone(), version: idle.version }, idle.idle_s);
        let idle_s = idle.iter().take(MOVES_MAX).map(of).collect();
        let heard_ms = self.0.clock.now_ms();
        self.0.tables.write().rests.insert(worker.clone(), Rests { heard_ms, idle_s });
    }

    /// For how long each model has computed nothing on any worker, in s, as far as was heard: taken to go on
    /// until a worker says otherwise.
    pub fn idle_s(&self) -> BTreeMap<ModelKey, u64> {
        let now_ms = self.0.clock.now_ms();
        let mut least: BTreeMap<ModelKey, u64> = BTreeMap::new();
        for Rests { heard_ms, idle_s } in self.0.tables.read().rests.values() {
            let since_s = now_ms.saturating_sub(*heard_ms) / 1_000;
            for (key, idle_s) in idle_s {
                let here_s = idle_s.saturating_add(since_s);
                least.entry(key.clone()).and_modify(|least| *least = here_s.min(*least)).or_insert(here_s);
            }
        }
        least
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::advance;

    use super::*;

    fn idle(model: &str, idle_s: u64) -> fleet::Idle {
        fleet::Idle { model: model.into(), version: 1, idle_s }
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_is_as_idle_as_where_it_was_used_last() {
        let fleet = Fleet::new(placement::Policy::default());
        let [w1, w2]: [WorkerId; 2] = ["w1", "w2"].map(|id| id.parse().unwrap());
        let key = |name: &str| ModelKey { name: name.into(), version: 1 };
        let session = fleet.enter(&w1);
        fleet.rested(&w1, &[idle("m", 100), idle("n", 90_000)]);
        advance(Duration::from_secs(30)).await;
        fleet.rested(&w2, &[idle("m", 7)]);
        fleet.rested(&w2, &[]);
        assert_eq!(
            fleet.idle_s(),
            BTreeMap::from([(key("m"), 7), (key("n"), 90_030)]),
            "a heartbeat that says nothing changes nothing"
        );
        advance(Duration::from_secs(60)).await;
        fleet.rested(&w1, &[idle("m", 1), idle("n", 2)]);
        assert_eq!(fleet.idle_s(), BTreeMap::from([(key("m"), 1), (key("n"), 2)]));
        fleet.leave(&w1, session);
        assert_eq!(fleet.idle_s(), BTreeMap::from([(key("m"), 67)]), "what runs nowhere is nowhere idle");
    }
}
