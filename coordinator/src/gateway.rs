//! Predictions for clients of any language: the router, fed from this coordinator's own copy of the state.
//!
//! The copy is kept when there is no leader, and so are the routes: predictions go on.
use std::{pin::pin, time::Duration};

use cresset_client::{
    Router, RouterSettings,
    routes::{RouteSender, channel},
};
use futures::StreamExt;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    metrics,
    tables::{Tables, Takes},
};

/// How often metrics are told what the router knows.
const FIGURES_EVERY: Duration = Duration::from_millis(500);
/// Before routes are asked for again that couldn't be used.
const AGAIN: Duration = Duration::from_millis(500);

/// A router whose routes follow these tables until `closing`.
pub fn router(tables: Tables, settings: RouterSettings, tasks: &TaskTracker, closing: &CancellationToken) -> Router {
    let (sender, watched) = channel();
    tasks.spawn(closing.clone().run_until_cancelled_owned(follow(tables, sender)));
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

async fn follow(tables: Tables, sender: RouteSender) {
    loop {
        let mut newer = pin!(tables.since(Some(sender.epoch()).filter(|epoch| *epoch > 0), Takes::Changes));
        while let Some(table) = newer.next().await {
            if let Err(error) = sender.publish(&table) {
                tracing::error!(%error, epoch = table.epoch, "routes can't be used; the last ones stay");
                break;
            }
        }
        // What can't be used may be followed by what can.
        tokio::time::sleep(AGAIN).await;
    }
}
