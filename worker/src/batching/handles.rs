//! Which handle of a model's instances takes the next batch. Pure.
//!
//! An instance on a GPU has two handles: one brings the inputs of its batch while the other's computes. That way a batch is cut
//! before its turn, and what comes later can't be in it, so it is done for full batches only: they lose nothing by it.

/// The handles of a model's instances, and which of them have nothing to do.
#[derive(Debug)]
pub struct Handles {
    /// The other handle of the same instance.
    partners: Vec<Option<usize>>,
    is_idle: Vec<bool>,
    /// The last one to have become idle is the first to be woken: what it needs is still in the caches.
    idle: Vec<usize>,
}

impl Handles {
    /// Handles that are all idle. For each its instance; the first of an instance may have one partner.
    pub fn new(instances: &[usize]) -> Self {
        let partner = |handle: usize| {
            let other = |(at, of): (usize, &usize)| (at != handle && instances.get(handle) == Some(of)).then_some(at);
            instances.iter().enumerate().find_map(other)
        };
        let handles = 0..instances.len();
        Self {
            partners: handles.clone().map(partner).collect(),
            is_idle: vec![true; instances.len()],
            idle: handles.rev().collect(),
        }
    }

    /// The other handle of the same instance.
    pub fn partner(&self, handle: usize) -> Option<usize> {
        *self.partners.get(handle)?
    }

    /// Notes that a handle has nothing to do.
    pub fn rest(&mut self, handle: usize) {
        if let Some(is_idle @ false) = self.is_idle.get_mut(handle) {
            *is_idle = true;
            self.idle.push(handle);
        }
    }

    /// Takes an idle handle that would find work; `is_full` says whether a full batch waits.
    pub fn wake(&mut self, is_full: bool) -> Option<usize> {
        let at = self
            .idle
            .iter()
            .rposition(|&handle| !self.is_ahead(handle))
            .or_else(|| if is_full { self.idle.len().checked_sub(1) } else { None })?;
        let handle = self.idle.remove(at);
        if let Some(is_idle) = self.is_idle.get_mut(handle) {
            *is_idle = false;
        }
        Some(handle)
    }

    /// Whether a handle may take a batch now.
    pub fn may_cut(&self, handle: usize, is_full: bool) -> bool {
        is_full || !self.is_ahead(handle)
    }

    /// Whether the handle's instance is busy with its partner's batch.
    fn is_ahead(&self, handle: usize) -> bool {
        self.partner(handle).is_some_and(|partner| self.is_idle.get(partner) == Some(&false))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_with_one_handle_take_whatever_waits() {
        let mut handles = Handles::new(&[0, 1]);
        assert_eq!(handles.wake(false), Some(0));
        assert_eq!(handles.wake(false), Some(1));
        assert_eq!(handles.wake(true), None);
        assert!(handles.may_cut(0, false));
        handles.rest(1);
        handles.rest(0);
        handles.rest(0);
        assert_eq!((handles.wake(false), handles.wake(false), handles.wake(false)), (Some(0), Some(1), None), "the last first");
    }

    #[test]
    fn a_second_handle_takes_full_batches_only_while_the_first_is_busy() {
        let mut handles = Handles::new(&[0, 0]);
        assert_eq!(handles.wake(false), Some(0));
        assert_eq!(handles.wake(false), None, "the first will take what comes when it is done");
        assert_eq!(handles.wake(true), Some(1));
        assert!(!handles.may_cut(1, false), "the batch may have gone meanwhile");
        assert!(handles.may_cut(1, true));
        handles.rest(0);
        assert!(handles.may_cut(1, false), "nobody else would take it");
        assert_eq!(handles.wake(false), None);
        handles.rest(1);
        assert_eq!(handles.wake(false), Some(1));
    }

    #[test]
    fn an_idle_instance_comes_before_the_second_handle_of_a_busy_one() {
        let mut handles = Handles::new(&[0, 0, 1, 1]);
        assert_eq!(handles.wake(true), Some(0));
        assert_eq!(handles.wake(true), Some(2));
        assert_eq!(handles.wake(false), None);
        handles.rest(0);
        assert_eq!(handles.wake(true), Some(0));
        assert_eq!(handles.wake(true), Some(1));
        assert_eq!(handles.wake(true), Some(3));
        assert_eq!((handles.partner(2), handles.partner(1)), (Some(3), Some(0)));
    }
}
