//! Predictions for clients of any language: the router, fed from this coordinator's own copy of the state.
//!
//! The copy is kept when there is no leader, and so are the routes: predictions go on.
use std::time::Duration;

use cresset_client::{
    Router, RouterSettings,
    routes::{RouteSender, channel},
};
use cresset_core::routes::routes;
use cresset_proto::fleet::v1::WatchResponse;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{consensus::Consensus, metrics};

/// How often metrics are told what the router knows.
const FIGURES_EVERY: Duration = Duration::from_millis(500);

/// A router whose routes follow the state here until `closing`.
pub fn router(consensus: &Consensus, settings: RouterSettings, tasks: &TaskTracker, closing: &CancellationToken) -> Router {
    let (table, watched) = channel();
    tasks.spawn(closing.clone().run_until_cancelled_owned(follow(consensus.clone(), table)));
    let router = Router::new(watched, settings);
    tasks.spawn(closing.clone().run_until_cancelled_owned(tell(router.clone())));
    router
}

/// Shows what the router does.
async fn tell(router: Router) {
    let mut ticks = tokio::time::interval(FIGURES_EVERY);
    loop {
        ticks.tick().await;
        metrics::show_router(&router);
    }
}

async fn follow(consensus: Consensus, table: RouteSender) {
    let mut applied = consensus.applied();
    let mut sent = None;
    loop {
        let epoch = applied.borrow_and_update().epoch;
        if sent != Some(epoch) {
            sent = Some(epoch);
            let response = WatchResponse::from(&routes(&consensus.state()));
            if let Err(error) = table.publish(&response) {
                tracing::error!(%error, epoch, "routes can't be used; the last ones stay");
            }
        }
        if applied.changed().await.is_err() {
            return;
        }
    }
}
