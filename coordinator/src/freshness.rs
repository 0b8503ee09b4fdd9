//! How old this coordinator's copy of the state may be.
//!
//! The copy can't tell: a leader that has nothing to say is as silent as one that can't be heard. So this coordinator asks now and then
//! for what a linearizable read waits for (ReadIndex; Ongaro, *Consensus: Bridging Theory and Practice*, 6.4). Once the copy holds
//! that, it holds everything that had been agreed on when it asked.
use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::consensus::Consensus;

/// Between two times that it asks.
const ASK_EVERY: Duration = Duration::from_millis(500);
/// How long it waits for an answer before it asks anew.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);

/// When the copy was last known to be whole. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Freshness(Arc<Mutex<Option<Instant>>>);

impl Freshness {
    /// Asks for ever.
    pub async fn keep(self, consensus: Consensus) {
        let mut ticks = interval(ASK_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // Not when the answer came: what was agreed on in between may be missing.
            let asked = Instant::now();
            if consensus.read_barrier(asked + ASK_TIMEOUT).await.is_ok() {
                *self.0.lock() = Some(asked);
            }
        }
    }

    /// Everything that was agreed on before this is in the copy; `None` if that was never known.
    pub fn as_of(&self) -> Option<Instant> {
        *self.0.lock()
    }
}
