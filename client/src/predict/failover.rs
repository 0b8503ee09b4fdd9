//! What a request, or a sequence's stream, has tried so far, and where it goes next.
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cresset_proto::metadata::retry_pushback;
use tokio::{sync::watch, time::Instant};
use tonic::Status;

use super::Inner;
use crate::{
    balance::{self, Candidate},
    retry::{self, Budget, Failure, Kind, Pays, Verdict, allowance::Allowance},
    routes::{ModelRoute, Replica, RouteTable},
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
    pub(super) fn new(router: &Inner, kind: Kind) -> Self {
        let mut fresh = Self { kind, tried: Vec::new(), moves_left: 0, overloads_left: 0, failures: 0 };
        fresh.reset(router);
        if kind != Kind::Sequence {
            router.repetitions.pay_in(router.now_ms());
        }
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

    fn candidates(&self, router: &Inner, route: &ModelRoute) -> Vec<Candidate> {
        let now_ms = router.now_ms();
        let settings = &router.settings;
        let candidate = |replica: &Arc<Replica>| Candidate {
            id: replica.id,
            in_flight: replica.in_flight(),
            slowness: replica.slowness(now_ms),
            share: replica.share(settings.slow_start, now_ms),
            far: !settings.zone.is_empty() && !replica.zone.is_empty() && replica.zone != settings.zone,
            tried: replica.is_gone() || self.tried.iter().any(|tried| Arc::ptr_eq(tried, replica)),
            failing: replica.is_failing(now_ms),
        };
        route.replicas.iter().map(candidate).collect()
    }

    /// The best replica that wasn't tried.
    pub(super) fn pick(&self, router: &Inner, route: &ModelRoute) -> Option<Arc<Replica>> {
        let index = balance::pick(&self.candidates(router, route), rand::random())?;
        route.replicas.get(index).cloned()
    }

    /// The replica that hasn't been tried where a sequence belongs.
    pub(super) fn place(&self, router: &Inner, route: &ModelRoute, key: u64) -> Option<Arc<Replica>> {
        let index = balance::place(&self.candidates(router, route), key)?;
        route.replicas.get(index).cloned()
    }

    /// Takes note of a failure at `replica` and says what follows. Time left to `deadline` bounds it.
    pub(super) fn failed(
        &mut self,
        router: &Inner,
        route: Option<&ModelRoute>,
        replica: &Arc<Replica>,
        status: &Status,
        deadline: Instant,
    ) -> Verdict {
        let failure = Failure::of(status);
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
            others: route.is_some_and(|route| self.candidates(router, route).iter().any(|candidate| !candidate.tried)),
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

/// Waits for a newer table, at most until `until`.
pub(super) async fn newer_routes(routes: &mut watch::Receiver<Arc<RouteTable>>, until: Instant) {
    let newer = async {
        if routes.changed().await.is_err() {
            // Nobody feeds the table any more; only time can help.
            std::future::pending::<()>().await;
        }
    };
    // Both ends are good: the table is looked at again either way.
    let _ = tokio::time::timeout_at(until, newer).await;
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
