//! What routers are told: this coordinator's own, and those outside that watch.
//!
//! Each is told what changed since the epoch that it has, however fast it reads: the state remembers enough for that. A whole table
//! is for those that have none, or one of long ago. It is built from a view of the state, beside everything else: the agreement
//! doesn't wait for it, however large the cluster is; and it is kept for the next of them, who is told what changed since.
use std::{sync::Arc, time::Duration};

use cresset_core::{
    routes::{News, news, routes},
    state::Epoch,
};
use cresset_proto::fleet::v1::WatchResponse;
use futures::{Stream, stream};
use tokio::{
    sync::Mutex,
    time::{Instant, sleep_until},
};

use crate::consensus::Consensus;

/// The routes, as of the state here. Cheap to clone.
#[derive(Clone)]
pub struct Tables {
    consensus: Consensus,
    /// The last whole table that was built. Locked while the next is.
    whole: Arc<Mutex<Option<Arc<WatchResponse>>>>,
}

/// A router is told something at once, unless it was told so often lately that it is only kept busy: then what comes within this
/// time is told together.
const TELL_EVERY: Duration = Duration::from_millis(5);
/// How often it is told at once: that many times as often as it would be in all that time (a generic cell rate algorithm).
const TELL_BURST: u32 = 32;

/// What a router can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// Whole tables only.
    Tables,
    /// What changed, too.
    Changes,
}

impl Tables {
    /// Follows the state here.
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus, whole: Arc::default() }
    }

    /// Everything that is newer than the table of the epoch `known`: now, and whenever there is more. Who has none gets one at once.
    /// Ends with the process.
    pub fn since(&self, known: Option<Epoch>, takes: Takes) -> impl Stream<Item = Arc<WatchResponse>> + Send + use<> {
        let start = (self.clone(), self.consensus.epoch(), known, Instant::now());
        stream::unfold(start, move |(tables, mut epochs, known, due)| async move {
            if due > Instant::now() + TELL_EVERY * TELL_BURST {
                sleep_until(due - TELL_EVERY * TELL_BURST).await;
            }
            loop {
                // Before looking, so that what comes while it is looked at is seen the next time.
                epochs.mark_unchanged();
                if let Some(newer) = tables.newer(known, takes).await {
                    let known = Some(newer.epoch);
                    return Some((newer, (tables, epochs, known, due.max(Instant::now()) + TELL_EVERY)));
                }
                epochs.changed().await.ok()?;
            }
        })
    }

    async fn newer(&self, known: Option<Epoch>, takes: Takes) -> Option<Arc<WatchResponse>> {
        let news = known.map_or(News::Everything, |known| news(&self.consensus.state(), known));
        let told = match (news, takes) {
            (News::Nothing, _) => return None,
            (News::Changes(changes), Takes::Changes) => changes,
            (News::Changes(_), Takes::Tables) | (News::Everything, _) => return self.whole(known, takes).await,
        };
        Some(Arc::new(WatchResponse::from(&told)))
    }

    /// A whole table newer than `known`: the newest, or one from which on the rest can be told as changes.
    async fn whole(&self, known: Option<Epoch>, takes: Takes) -> Option<Arc<WatchResponse>> {
        let mut kept = self.whole.lock().await;
        if let Some(table) = kept.as_ref().filter(|table| known.is_none_or(|known| table.epoch > known)) {
            let rest = news(&self.consensus.state(), table.epoch);
            if rest == News::Nothing || (takes == Takes::Changes && rest != News::Everything) {
                return Some(Arc::clone(table));
            }
        }
        let consensus = self.consensus.clone();
        let built = tokio::task::spawn_blocking(move || WatchResponse::from(&routes(&consensus.view()))).await;
        let table = built.map(Arc::new);
        if let Err(error) = &table {
            tracing::error!(%error, ?known, "routes can't be built; the last ones stay");
        }
        *kept = table.ok();
        kept.clone()
    }
}
