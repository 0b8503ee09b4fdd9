//! A second copy of a unary request that takes unusually long: the first answer wins, and the other copy is cancelled.
//!
//! Off by default. After the 95th percentile of its model, to another replica that is well, and at most one in twenty requests
//! ([`HedgeAllowance`]), so that a cluster that is slow as a whole isn't given more to do.
use std::{
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};
use tonic::Status;

use super::{Inner, failover::Failover};
use crate::{
    retry::{Failure, Kind, allowance::HedgeAllowance, may_hedge},
    routes::{ModelRoute, Replica},
};

/// What came of a request's one or two copies.
pub(super) struct Attempt<T> {
    /// Who answered, or who failed first.
    pub(super) replica: Arc<Replica>,
    /// How long it took that one.
    pub(super) took: Duration,
    pub(super) result: Result<T, Status>,
}

/// What all requests of a router may spend on second copies.
#[derive(Debug, Default)]
pub(super) struct Hedges(AtomicU32);

impl Hedges {
    fn pay_in(&self) {
        self.change(|saved| Some(saved.paid_in()));
    }

    fn take_out(&self) -> bool {
        self.change(HedgeAllowance::taken_out)
    }

    fn change(&self, next: impl Fn(HedgeAllowance) -> Option<HedgeAllowance>) -> bool {
        let next = |millis| next(HedgeAllowance(millis)).map(|saved| saved.0);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }
}

/// Sends a request to `replica` by `send`, and a second copy to another if the answer is late and hedging is on.
pub(super) async fn hedged<T, F>(
    router: &Arc<Inner>,
    failover: &Failover,
    route: &ModelRoute,
    replica: Arc<Replica>,
    send: impl Fn(Arc<Replica>) -> F,
) -> Attempt<T>
where
    F: Future<Output = Result<T, Status>>,
{
    let began = Instant::now();
    let first_took = |replica, result| Attempt { replica, took: began.elapsed(), result };
    let mut first = pin!(send(Arc::clone(&replica)));
    if !router.settings.hedging || !may_hedge(Kind::Unary) {
        let result = first.await;
        return first_took(replica, result);
    }
    router.hedges.pay_in();
    if let Some(patience) = route.p95() {
        tokio::select! {
            biased;
            result = &mut first => return router.known(route, began, first_took(replica, result)),
            () = sleep(patience) => {}
        }
        if let Some(other) = failover.pick_beside(router, route, &replica).filter(|_| router.hedges.take_out()) {
            // Boxed, so that it costs room only where it happens.
            let second = Box::pin(send(Arc::clone(&other)));
            let hedged = Box::pin(router.both(first, replica, &other, began, second)).await;
            return router.known(route, began, hedged);
        }
    }
    let result = first.await;
    router.known(route, began, first_took(replica, result))
}

impl Inner {
    /// Waits for the first good answer of two.
    async fn both<T>(
        self: &Arc<Self>,
        mut first: impl Future<Output = Result<T, Status>> + Unpin,
        replica: Arc<Replica>,
        other: &Arc<Replica>,
        began: Instant,
        mut second: impl Future<Output = Result<T, Status>> + Unpin,
    ) -> Attempt<T> {
        self.counts.hedged();
        let second_began = Instant::now();
        let (failed, result) = tokio::select! {
            biased;
            result = &mut first => match result {
                Ok(answer) => return Attempt { replica, took: began.elapsed(), result: Ok(answer) },
                Err(status) => (Some(status), second.await),
            },
            result = &mut second => (None, result),
        };
        match (result, failed) {
            (Ok(answer), failed) => {
                if let Some(status) = failed {
                    self.blame(&replica, Failure::of(&status));
                }
                self.counts.hedge_won();
                Attempt { replica: Arc::clone(other), took: second_began.elapsed(), result: Ok(answer) }
            }
            // What the request comes to is the first copy's affair; of the second only its replica's health is of interest.
            (Err(second), failed) => {
                self.blame(other, Failure::of(&second));
                let result = match failed {
                    Some(status) => Err(status),
                    None => first.await,
                };
                Attempt { replica, took: began.elapsed(), result }
            }
        }
    }

    /// Learns what the model's 95th percentile is. What was hedged counts from its beginning, or the figure would sink by itself.
    fn known<T>(&self, route: &ModelRoute, began: Instant, attempt: Attempt<T>) -> Attempt<T> {
        if attempt.result.is_ok() {
            route.note_p95(began.elapsed());
        }
        attempt
    }
}
