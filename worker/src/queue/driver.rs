//! What a handle's thread does for its queue: one batch after the other, until there is none.
use std::{
    sync::{Arc, Weak},
    time::Instant,
};

use super::{Entry, ModelQueue};
use crate::engine::{Model, device::Turn};

/// What a handle is given to do.
pub(super) enum Cut {
    Idle,
    WaitUntil(Instant),
    Batch(Vec<Entry>),
}

/// What a handle's thread does for its queue. It holds the queue weakly: a model that is dropped takes its queue along.
pub(super) struct Driver {
    queue: Weak<ModelQueue>,
    handle: usize,
    ended: bool,
}

impl Driver {
    pub(super) fn new(queue: &Arc<ModelQueue>, handle: usize) -> Self {
        Self { queue: Arc::downgrade(queue), handle, ended: false }
    }

    /// Runs the next batch, if there is one.
    pub(super) fn turn(&mut self, model: &mut dyn Model) -> Turn {
        let Some(queue) = self.queue.upgrade() else { return Turn::Done };
        match queue.cut(self.handle) {
            Cut::Batch(batch) => queue.run_batch(model, self.handle, batch),
            Cut::Idle => self.end(),
            Cut::WaitUntil(at) => {
                queue.wake_at(at);
                self.end()
            }
        }
    }

    fn end(&mut self) -> Turn {
        self.ended = true;
        Turn::Done
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // Dropped before its end: the device is lost, and nobody would look at the queue again.
        if !self.ended
            && let Some(queue) = self.queue.upgrade()
        {
            queue.abandon(self.handle, None);
        }
    }
}
