//! What the driver tells the rest of the process.
//!
//! Each thing has a watch of its own, so that whoever waits for one isn't woken by another: in a large cluster a thousand sessions
//! wait for the next epoch, and entries that change none come by the thousand.
use cresset_core::{Effect, state::Epoch};
use tokio::sync::{broadcast, watch};

use super::node::{RaftStatus, Role};

/// How far the state has come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// The last applied entry.
    pub index: u64,
    /// The state's epoch.
    pub epoch: Epoch,
}

/// Who leads, as a peer knows it: what a [`RaftStatus`] says beside how far the log has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leadership {
    /// The term that this is about.
    pub term: u64,
    /// What this peer does in it.
    pub role: Role,
    /// Who leads it, as far as this peer knows.
    pub leader: Option<u64>,
}

impl From<&RaftStatus> for Leadership {
    fn from(&RaftStatus { term, role, leader, .. }: &RaftStatus) -> Self {
        Self { term, role, leader }
    }
}

/// The driver's side.
pub(super) struct Published {
    raft: watch::Sender<RaftStatus>,
    leadership: watch::Sender<Leadership>,
    applied: watch::Sender<Applied>,
    epoch: watch::Sender<Epoch>,
    pub(super) effects: broadcast::Sender<(u64, Effect)>,
}

/// Everybody else's.
#[derive(Clone)]
pub(super) struct Watched {
    pub(super) raft: watch::Receiver<RaftStatus>,
    pub(super) leadership: watch::Receiver<Leadership>,
    pub(super) applied: watch::Receiver<Applied>,
    pub(super) epoch: watch::Receiver<Epoch>,
    pub(super) effects: broadcast::Sender<(u64, Effect)>,
}

impl Published {
    /// Both sides. Effects that wait for the slowest listener are at most `effects_max`.
    pub(super) fn new(now: RaftStatus, epoch: Epoch, effects_max: usize) -> (Self, Watched) {
        let (raft_sender, raft) = watch::channel(now);
        let (leadership_sender, leadership) = watch::channel(Leadership::from(&now));
        let (applied_sender, applied) = watch::channel(Applied { index: now.applied, epoch });
        let (epoch_sender, epoch) = watch::channel(epoch);
        let (effects, _) = broadcast::channel(effects_max);
        let published = Self {
            raft: raft_sender,
            leadership: leadership_sender,
            applied: applied_sender,
            epoch: epoch_sender,
            effects: effects.clone(),
        };
        (published, Watched { raft, leadership, applied, epoch, effects })
    }

    /// What was told last.
    pub(super) fn last(&self) -> RaftStatus {
        *self.raft.borrow()
    }

    /// Tells where things stand; `epoch` is the state's.
    pub(super) fn tell(&self, now: RaftStatus, epoch: Epoch) {
        // How far the state has come before who leads: a new leader is believed to know what it has applied.
        tell_if_new(&self.applied, Applied { index: now.applied, epoch });
        tell_if_new(&self.epoch, epoch);
        tell_if_new(&self.raft, now);
        tell_if_new(&self.leadership, Leadership::from(&now));
    }
}

fn tell_if_new<T: PartialEq + Copy>(told: &watch::Sender<T>, now: T) {
    told.send_if_modified(|before| std::mem::replace(before, now) != now);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_waits_for_an_epoch_or_a_leader_is_not_woken_by_entries() {
        let status = |applied, term| RaftStatus { id: 1, role: Role::Follower, term, leader: Some(2), commit: applied, applied };
        let (published, watched) = Published::new(status(1, 1), 5, 8);
        let news = || {
            let Watched { mut raft, mut leadership, mut applied, mut epoch, .. } = watched.clone();
            raft.mark_unchanged();
            leadership.mark_unchanged();
            applied.mark_unchanged();
            epoch.mark_unchanged();
            move || [raft.has_changed(), leadership.has_changed(), applied.has_changed(), epoch.has_changed()].map(Result::unwrap)
        };
        let seen = news();
        published.tell(status(1, 1), 5);
        assert_eq!(seen(), [false; 4], "nothing happened");
        let seen = news();
        published.tell(status(2, 1), 5);
        assert_eq!(seen(), [true, false, true, false], "an entry that no worker or router is told of");
        let seen = news();
        published.tell(status(3, 1), 6);
        assert_eq!(seen(), [true, false, true, true]);
        let seen = news();
        published.tell(status(3, 2), 6);
        assert_eq!(seen(), [true, true, false, false]);
        assert_eq!((published.last(), *watched.epoch.borrow()), (status(3, 2), 6));
    }
}
