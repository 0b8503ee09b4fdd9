//! The route table of the newest epoch, built once for everybody here who wants it: this coordinator's own router, and every router
//! outside that watches.
//!
//! It is built from a view of the state, beside everything else: the agreement doesn't wait for it, however large the cluster is.
//! When the epoch grows faster than tables can be built, those in between are left out.
use std::sync::Arc;

use cresset_core::routes::routes;
use cresset_proto::fleet::v1::WatchResponse;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::consensus::Consensus;

/// The newest table: now, and after each change. The first one may be of an epoch before the state's.
pub type Tables = watch::Receiver<Arc<WatchResponse>>;

/// Tables that follow the state here until `closing`.
pub fn follow(consensus: &Consensus, tasks: &TaskTracker, closing: &CancellationToken) -> Tables {
    let (newest, tables) = watch::channel(Arc::new(table(consensus)));
    tasks.spawn(closing.clone().run_until_cancelled_owned(build(consensus.clone(), newest)));
    tables
}

async fn build(consensus: Consensus, newest: watch::Sender<Arc<WatchResponse>>) {
    let mut applied = consensus.applied();
    loop {
        let epoch = applied.borrow_and_update().epoch;
        if epoch > newest.borrow().epoch {
            let from = consensus.clone();
            // Of a large cluster it takes a while.
            match tokio::task::spawn_blocking(move || table(&from)).await {
                Ok(table) => drop(newest.send_replace(Arc::new(table))),
                Err(error) => tracing::error!(%error, epoch, "routes can't be built; the last ones stay"),
            }
        }
        if applied.changed().await.is_err() {
            return;
        }
    }
}

fn table(consensus: &Consensus) -> WatchResponse {
    WatchResponse::from(&routes(&consensus.view()))
}
