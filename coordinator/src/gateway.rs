//! Predictions for clients of any language: the router, fed from this coordinator's own copy of the state.
//!
//! The copy is kept when there is no leader, and so are the routes: predictions go on.
use std::{pin::pin, time::Duration};

use cresset_client::{
    Router, RouterSettings,
    routes::{RouteSender, channel},
};
use cresset_core::state::Epoch;
use futures::StreamExt;
use tokio::sync::watch;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    metrics,
    tables::{Tables, Takes},
};

/// How often metrics are told what the router knows.
const FIGURES_EVERY: Duration = Duration::from_millis(500);
/// Before routes are asked for again that couldn't be used.
const AGAIN: Duration = Duration::from_millis(500);

/// A router whose routes follow these tables until `closing`, and the epoch that it was told of last.
pub fn router(
    tables: Tables,
    settings: RouterSettings,
    tasks: &TaskTracker,
    closing: &CancellationToken,
) -> (Router, watch::Receiver<Epoch>) {
    let (sender, watched) = channel();
    let (told, routed) = watch::channel(0);
    tasks.spawn(closing.clone().run_until_cancelled_owned(follow(tables, sender, told)));
    let router = Router::new(watched, settings);
    tasks.spawn(closing.clone().run_until_cancelled_owned(tell(router.clone())));
    (router, routed)
}

/// Shows what the router does.
async fn tell(router: Router) {
    let mut ticks = tokio::time::interval(FIGURES_EVERY);
    loop {
        ticks.tick().await;
        metrics::show_router(&router);
    }
}

async fn follow(tables: Tables, sender: RouteSender, told: watch::Sender<Epoch>) {
    loop {
        let mut newer = pin!(tables.since(Some(sender.epoch()).filter(|epoch| *epoch > 0), Takes::Changes));
        while let Some(table) = newer.next().await {
            let published = sender.publish(&table);
            told.send_replace(table.epoch);
            if let Err(error) = published {
                tracing::error!(%error, epoch = table.epoch, "routes can't be used; the last ones stay");
                break;
            }
        }
        // What can't be used may be followed by what can.
        tokio::time::sleep(AGAIN).await;
    }
}
