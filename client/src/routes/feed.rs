//! The way of tables to those who use them.
//!
//! Every request reads the newest table, on every thread at once, and so reading takes no lock: a table is put in place by one
//! atomic exchange. Only whoever waits for a newer one, because this one didn't help, waits at a channel.
use std::sync::Arc;

use arc_swap::{ArcSwap, Guard};
use cresset_proto::fleet::v1::WatchResponse;
use tokio::{sync::watch, time::Instant};

use super::{RouteError, RouteTable};

/// Where newer tables go in.
#[derive(Debug)]
pub struct RouteSender {
    table: Arc<ArcSwap<RouteTable>>,
    news: watch::Sender<()>,
}

/// The newest table, and word of newer ones. Clones share the table; each has its own idea of what it has seen.
#[derive(Debug, Clone)]
pub struct Routes {
    table: Arc<ArcSwap<RouteTable>>,
    news: watch::Receiver<()>,
}

/// Both ends, with [`RouteTable::unknown`] between them.
pub fn channel() -> (RouteSender, Routes) {
    let table = Arc::new(ArcSwap::from_pointee(RouteTable::unknown()));
    let (sender, receiver) = watch::channel(());
    (RouteSender { table: Arc::clone(&table), news: sender }, Routes { table, news: receiver })
}

impl RouteSender {
    /// Puts a newer table in the place of the last one; one that isn't newer is ignored (`false`).
    ///
    /// # Errors
    /// [`RouteError`]; the old table stays in force then.
    pub fn publish(&self, response: &WatchResponse) -> Result<bool, RouteError> {
        let mut result = Ok(false);
        // In here there is one writer at a time. Readers aren't kept waiting by it.
        self.news.send_if_modified(|()| {
            let table = self.table.load();
            if table.is_received() && response.epoch <= table.epoch() {
                return false;
            }
            result = RouteTable::build(response, &table).map(|newer| {
                self.table.store(Arc::new(newer));
                true
            });
            result.is_ok()
        });
        result
    }

    /// The epoch of the newest table.
    pub fn epoch(&self) -> u64 {
        self.table.load().epoch()
    }

    /// Waits until nobody is left who could use a newer one.
    pub async fn closed(&self) {
        self.news.closed().await;
    }
}

impl Routes {
    /// The newest table, for as long as it is looked at and no longer.
    pub fn load(&self) -> Guard<Arc<RouteTable>> {
        self.table.load()
    }

    /// The newest table.
    pub fn table(&self) -> Arc<RouteTable> {
        self.table.load_full()
    }

    /// The newest table, which counts as seen from now on.
    pub fn update(&mut self) -> Arc<RouteTable> {
        // In this order: a table that comes in between is seen twice, and not missed.
        self.news.mark_unchanged();
        self.table.load_full()
    }

    /// One that has seen everything up to this table.
    #[must_use]
    pub fn since(&self, table: &Arc<RouteTable>) -> Self {
        let mut routes = self.clone();
        if !Arc::ptr_eq(&routes.update(), table) {
            routes.news.mark_changed();
        }
        routes
    }

    /// Waits for a table that wasn't seen; an error when none can come any more.
    ///
    /// # Errors
    /// Nobody feeds the table any more.
    pub async fn changed(&mut self) -> Result<(), watch::error::RecvError> {
        self.news.changed().await
    }

    /// Whether newer tables can still come.
    pub fn is_fed(&self) -> bool {
        self.news.has_changed().is_ok()
    }

    /// Waits for a newer table, at most until `until`.
    pub(crate) async fn newer(&mut self, until: Instant) {
        let newer = async {
            if self.changed().await.is_err() {
                // Only time can help.
                std::future::pending::<()>().await;
            }
        };
        // Both ends are good: the table is looked at again either way.
        let _ = tokio::time::timeout_at(until, newer).await;
    }

    /// Waits until the newest table is as wanted; `None` when it can't come to that any more.
    pub async fn wait_for(&mut self, wanted: impl Fn(&RouteTable) -> bool) -> Option<Arc<RouteTable>> {
        loop {
            let table = self.update();
            if wanted(&table) {
                return Some(table);
            }
            self.changed().await.ok()?;
        }
    }
}
