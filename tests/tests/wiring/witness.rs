//! Who sees everything, and says what was wrong.
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    time::Duration,
};

use cresset_coordinator::consensus::{Consensus, NodeError, RaftStatus, Role};
use cresset_core::state::Epoch;
use cresset_tests::linearizability::{self, Action, Operation, Verdict};

use super::{IDS, coordinator::CLIENTS};

/// Until then faults come.
pub const CHAOS_END: Duration = Duration::from_secs(40);
/// Until then clients write: afterwards there is something to settle.
pub const WRITES_END: Duration = Duration::from_secs(57);
/// The end. What is healed has to work by then.
pub const END: Duration = Duration::from_secs(60);
/// Answers that came later than this show that a client was served after all was healed.
const HEALED: Duration = Duration::from_secs(50);

/// The witness of one run.
#[derive(Default)]
pub struct Witness {
    violation: RefCell<Option<String>>,
    histories: RefCell<BTreeMap<String, Vec<Operation>>>,
    leaders: RefCell<BTreeMap<u64, u64>>,
    living: RefCell<BTreeMap<u64, Consensus>>,
    seen: RefCell<BTreeMap<u64, (RaftStatus, Epoch)>>,
    answered_at: RefCell<BTreeMap<(u64, u64), Duration>>,
    hash: RefCell<DefaultHasher>,
    values: Cell<u64>,
    pub answered: Cell<u64>,
    pub disks_failed: Cell<u64>,
    pub handed_over: Cell<u64>,
}

fn now() -> Duration {
    turmoil::sim_elapsed().unwrap_or_default()
}

impl Witness {
    pub fn fail(&self, what: String) {
        self.violation.borrow_mut().get_or_insert(what);
    }

    /// A coordinator has begun another life.
    pub fn lives(&self, id: u64, consensus: Consensus) {
        // What it had applied before may not have been on its disk.
        self.seen.borrow_mut().remove(&id);
        self.living.borrow_mut().insert(id, consensus);
        self.happened(("lives", id));
    }

    /// A life ended by itself, which it does only when its disk fails.
    pub fn ended(&self, id: u64, how: &Result<(), NodeError>) {
        match how {
            Err(NodeError::Log(_)) => self.disks_failed.set(self.disks_failed.get() + 1),
            other => self.fail(format!("c{id} ended by itself: {other:?}")),
        }
        self.happened(("ended", id));
    }

    /// Looks at everybody after each step: one leader in a term, and an epoch that only grows.
    pub fn look(&self) {
        for (&id, consensus) in &*self.living.borrow() {
            let status = *consensus.raft().borrow();
            let epoch = *consensus.epoch().borrow();
            let before = self.seen.borrow_mut().insert(id, (status, epoch));
            if before == Some((status, epoch)) {
                continue;
            }
            self.happened((id, status.term, status.role as u8, status.commit, status.applied, epoch));
            if let Some((_, before)) = before.filter(|(_, before)| *before > epoch) {
                self.fail(format!("c{id} went back from epoch {before} to {epoch}"));
            }
            if status.role == Role::Leader {
                let first = *self.leaders.borrow_mut().entry(status.term).or_insert(id);
                if first != id {
                    self.fail(format!("c{first} and c{id} both lead term {}", status.term));
                }
            }
        }
    }

    /// Values are never written twice.
    pub fn fresh_value(&self) -> u64 {
        self.values.set(self.values.get() + 1);
        self.values.get()
    }

    /// An operation has begun; where it is in its register's history. Until it returns it may take effect at any time or never.
    pub fn begun(&self, key: &str, action: Action) -> usize {
        let mut histories = self.histories.borrow_mut();
        let history = histories.entry(key.to_owned()).or_default();
        history.push(Operation { invoked: micros(now()), returned: None, action });
        history.len() - 1
    }

    /// An operation has returned, and what it did or saw.
    pub fn returned(&self, key: &str, operation: usize, action: Action) {
        self.happened(("returned", key, operation, format!("{action:?}")));
        if let Some(known) = self.histories.borrow_mut().get_mut(key).and_then(|history| history.get_mut(operation)) {
            (known.returned, known.action) = (Some(micros(now())), action);
        }
    }

    /// A client was served.
    pub fn answered(&self, id: u64, client: u64) {
        self.answered.set(self.answered.get() + 1);
        self.answered_at.borrow_mut().insert((id, client), now());
    }

    /// Leadership was handed over because somebody asked for it.
    pub fn handed_over(&self) {
        self.handed_over.set(self.handed_over.get() + 1);
    }

    fn happened(&self, what: impl Hash) {
        (now(), what).hash(&mut *self.hash.borrow_mut());
    }

    pub fn leaders(&self) -> u64 {
        self.leaders.borrow().len() as u64
    }

    pub fn hash(&self) -> u64 {
        self.hash.borrow().finish()
    }

    pub fn violation(&self) -> Option<String> {
        self.violation.borrow().clone()
    }

    /// What must hold at the end: everybody was served, all have the same state, and one order explains what clients saw.
    pub fn close(&self) {
        for (id, client) in IDS.flat_map(|id| (0..CLIENTS).map(move |client| (id, client))) {
            let last = self.answered_at.borrow().get(&(id, client)).copied();
            if last.is_none_or(|last| last < HEALED) {
                self.fail(format!("client {client} of c{id} wasn't served after all was healed, last at {last:?}"));
            }
        }
        let states: Vec<_> = self.living.borrow().values().map(Consensus::view).collect();
        if let Some(pair) = states.windows(2).find(|pair| pair[0] != pair[1]) {
            self.fail(format!("two coordinators differ at the end: {:?} and {:?}", pair[0], pair[1]));
        }
        for (key, history) in &*self.histories.borrow() {
            match linearizability::check(history, linearizability::STEPS_MAX) {
                Verdict::Linearizable => {}
                verdict => self.fail(format!("the history of {key} is {verdict:?}")),
            }
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
