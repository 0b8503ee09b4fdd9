//! What a request, or a sequence's stream, has tried so far, and where it goes next.
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cresset_proto::metadata::retry_pushback;
use tokio::time::Instant;
use tonic::Status;

use super::Inner;
use crate::{
    balance::{self, Candidate},
    retry::{self, Budget, Failure, Kind, Pays, Verdict, allowance::Allowance},
    routes::{ModelRoute, Replica},
};

/// The memory of one request's failures.
#[derive(Debug)]
pub(super) struct Failover {
    kind: Kind,
    tried: Vec<Arc<Replica>>,
    moves_left: u32,
    overloads_left: u32,
    failures: u32,
}

impl Failover {
    /// For a new request, which pays in for those that have to be run again.
    pub(super) fn new(router: &Inner, kind: Kind) -> Self {
        if kind != Kind::Sequence {
            router.repetitions.pay_in(router.now_ms());
        }
        Self::untried(router, kind)
    }

    /// For a request that may never be sent.
    pub(super) fn untried(router: &Inner, kind: Kind) -> Self {
        let mut fresh = Self { kind, tried: Vec::new(), moves_left: 0, overloads_left: 0, failures: 0 };
        fresh.reset(router);
        fresh
    }

    /// Forgets everything: there was an answer.
    pub(super) fn reset(&mut self, router: &Inner) {
        self.tried.clear();
        self.failures = 0;
        self.overloads_left = router.settings.overloads_max;
        self.moves_left = match self.kind {
            Kind::Unary | Kind::Decoupled => router.settings.moves_max,
            Kind::Sequence => router.settings.sequence_moves_max,
        };
    }

    /// Tries everybody again.
    pub(super) fn forgive(&mut self) {
        self.tried.clear();
    }

    fn candidate(&self, router: &Inner, replica: &Arc<Replica>, now_ms: u64) -> Candidate {
        let settings = &router.settings;
        Candidate {
            id: replica.id,
            in_flight: replica.in_flight(),
            slowness: replica.slowness(now_ms),
            share: replica.share(settings.slow_start, now_ms),
            far: !settings.zone.is_empty() && !replica.zone.is_empty() && replica.zone != settings.zone,
            tried: self.has_tried(replica),
            failing: replica.is_failing(now_ms) || replica.is_out(),
        }
    }

    fn has_tried(&self, replica: &Arc<Replica>) -> bool {
        replica.is_gone() || self.tried.iter().any(|tried| Arc::ptr_eq(tried, replica))
    }

    /// Whether one that wasn't tried is in better health than `replica`, where the request is.
    pub(super) fn has_better(&self, route: &ModelRoute, replica: &Arc<Replica>) -> bool {
        let better = |other: &Arc<Replica>| !Arc::ptr_eq(other, replica) && !self.has_tried(other) && !other.is_out();
        route.replicas.iter().any(better)
    }

    /// The best replica that wasn't tried.
    pub(super) fn pick(&self, router: &Inner, route: &ModelRoute) -> Option<Arc<Replica>> {
        self.pick_as(router, route, |_, candidate| candidate)
    }

    /// The best replica for a second copy of a request that is at `replica`: none is better than one that isn't well.
    pub(super) fn pick_beside(&self, router: &Inner, route: &ModelRoute, replica: &Arc<Replica>) -> Option<Arc<Replica>> {
        self.pick_as(router, route, |other, candidate| {
            let is_no_use = candidate.failing || Arc::ptr_eq(other, replica);
            Candidate { tried: candidate.tried || is_no_use, ..candidate }
        })
    }

    fn pick_as(
        &self,
        router: &Inner,
        route: &ModelRoute,
        seen: impl Fn(&Arc<Replica>, Candidate) -> Candidate,
    ) -> Option<Arc<Replica>> {
        let now_ms = router.now_ms();
        let look = |index: usize| seen(&route.replicas[index], self.candidate(router, &route.replicas[index], now_ms));
        route.replicas.get(balance::choose(route.replicas.len(), look, rand::random())?).cloned()
    }

    /// The replica that hasn't been tried where a sequence belongs.
    pub(super) fn place(&self, router: &Inner, route: &ModelRoute, key: u64) -> Option<Arc<Replica>> {
        let now_ms = router.now_ms();
        let candidates: Vec<_> = route.replicas.iter().map(|replica| self.candidate(router, replica, now_ms)).collect();
        route.replicas.get(balance::place(&candidates, key)?).cloned()
    }

    /// Takes note of a failure at `replica` and says what follows. Time left to `deadline` bounds it.
    pub(super) fn failed(
        &mut self,
        router: &Arc<Inner>,
        route: Option<&ModelRoute>,
        replica: &Arc<Replica>,
        status: &Status,
        deadline: Instant,
    ) -> Verdict {
        let failure = Failure::of(status);
        router.blame(replica, failure);
        self.failures += 1;
        if !self.tried.iter().any(|tried| Arc::ptr_eq(tried, replica)) {
            self.tried.push(Arc::clone(replica));
        }
        let now_ms = router.now_ms();
        let budget = Budget {
            // What a sequence has been through can't be given up for others' sake.
            allowed: self.kind == Kind::Sequence || router.repetitions.is_any_left(now_ms),
            jitter: rand::random(),
            moves_left: self.moves_left,
            overloads_left: self.overloads_left,
            failures: self.failures,
            pushback_ms: retry_pushback(status.metadata()).map_or(0, millis),
            others: route.is_some_and(|route| route.replicas.iter().any(|replica| !self.has_tried(replica))),
            now_ms,
            deadline_ms: now_ms + millis(deadline.saturating_duration_since(Instant::now())),
        };
        let verdict = retry::decide(failure, failure.point(), self.kind, &budget);
        if let Verdict::Move { pays, .. } | Verdict::Wait { pays, .. } = verdict {
            match pays {
                Pays::Nothing => {}
                Pays::Move => self.moves_left -= 1,
                Pays::Overload => self.overloads_left -= 1,
            }
            if pays != Pays::Nothing && self.kind != Kind::Sequence {
                router.repetitions.take_out(now_ms);
            }
            if pays != Pays::Overload {
                replica.note_failure(now_ms + millis(router.settings.failing_for));
            }
            tracing::debug!(worker = %replica.worker_id, incarnation = replica.incarnation, ?failure, ?verdict, "a request moves");
        }
        verdict
    }
}

/// What a router may have run again; see [`Allowance`].
#[derive(Debug)]
pub(super) struct Repetitions(AtomicU64);

impl Default for Repetitions {
    fn default() -> Self {
        Self(Allowance::full().to_bits().into())
    }
}

impl Repetitions {
    fn pay_in(&self, now_ms: u64) {
        self.change(|saved| Some(saved.paid_in(now_ms)));
    }

    fn is_any_left(&self, now_ms: u64) -> bool {
        Allowance::from_bits(self.0.load(Ordering::Relaxed)).taken_out(now_ms).is_some()
    }

    /// Takes one out. Where several threads take the last one, all of them had it.
    fn take_out(&self, now_ms: u64) {
        self.change(|saved| saved.taken_out(now_ms));
    }

    fn change(&self, next: impl Fn(Allowance) -> Option<Allowance>) {
        let next = |bits| next(Allowance::from_bits(bits)).map(Allowance::to_bits);
        // Nothing left to change is as good.
        let _ = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
