//! Predictions for clients of any language: the router, fed from this coordinator's own copy of the state.
//!
//! The copy is kept when there is no leader, and so are the routes: predictions go on.
use std::sync::Arc;

use cresset_client::{RouteTable, Router, RouterSettings};
use cresset_core::routes::routes;
use cresset_proto::fleet::v1::WatchResponse;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::consensus::Consensus;

/// A router whose routes follow the state here until `closing`.
pub fn router(consensus: &Consensus, settings: RouterSettings, tasks: &TaskTracker, closing: &CancellationToken) -> Router {
    let (table, watched) = watch::channel(Arc::new(RouteTable::unknown()));
    tasks.spawn(closing.clone().run_until_cancelled_owned(follow(consensus.clone(), table)));
    Router::new(watched, settings)
}

async fn follow(consensus: Consensus, table: watch::Sender<Arc<RouteTable>>) {
    let mut applied = consensus.applied();
    let mut sent = None;
    loop {
        let epoch = applied.borrow_and_update().epoch;
        if sent != Some(epoch) {
            sent = Some(epoch);
            let response = WatchResponse::from(&routes(&consensus.state()));
            if let Err(error) = RouteTable::publish(&table, &response) {
                tracing::error!(%error, epoch, "routes can't be used; the last ones stay");
            }
        }
        if applied.changed().await.is_err() {
            return;
        }
    }
}
