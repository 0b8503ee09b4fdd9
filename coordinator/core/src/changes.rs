//! What lately changed for routers and workers, so that a router which has the table of an epoch is told the rest and no more, and
//! a worker that isn't concerned nothing.
//!
//! In a cluster of 10,000 models a table is a megabyte, and a death changes ten of its rows. Whoever has no table yet, or one from
//! before what is remembered here, is told everything.
use std::collections::{BTreeSet, VecDeque};

use crate::{WorkerId, routes::Assignment, state::Epoch};

/// Epochs that are remembered.
pub const EPOCHS_MAX: usize = 4_096;
/// Names of models and workers that are remembered, all epochs together.
pub const NAMES_MAX: usize = 65_536;

/// Names that are told at once; whoever missed more is told everything, which is made beside the agreement.
const TOLD_NAMES_MAX: usize = 2_000;

/// What a command is about: models by name, in all their versions, and workers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Touched {
    /// Names of models.
    pub models: BTreeSet<String>,
    /// Workers.
    pub workers: BTreeSet<WorkerId>,
}

impl Touched {
    fn names(&self) -> usize {
        self.models.len() + self.workers.len()
    }

    fn concerns(&self, worker: &WorkerId, told: &[Assignment]) -> bool {
        self.workers.contains(worker) || told.iter().any(|assignment| self.models.contains(&assignment.key.name))
    }
}

/// The last epochs, and what each of them was about.
///
/// No part of what is agreed on: a coordinator that begins from a snapshot remembers less than one that was there. So it isn't
/// written, and states that differ in nothing else are equal.
#[derive(Debug, Clone, Default)]
pub struct Changes {
    /// Each follows the one before.
    epochs: VecDeque<Change>,
    names: usize,
}

#[derive(Debug, Clone)]
struct Change {
    before: Epoch,
    epoch: Epoch,
    touched: Touched,
}

impl PartialEq for Changes {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Changes {
    /// The epoch grew from `before` to `epoch`, by a command that was about this.
    pub(crate) fn note(&mut self, before: Epoch, epoch: Epoch, touched: Touched) {
        if self.epochs.back().is_some_and(|last| last.epoch != before) {
            *self = Self::default();
        }
        self.names += touched.names();
        self.epochs.push_back(Change { before, epoch, touched });
        while self.epochs.len() > EPOCHS_MAX || self.names > NAMES_MAX {
            let Some(oldest) = self.epochs.pop_front() else { return };
            self.names -= oldest.touched.names();
        }
    }

    /// Whether a worker that was `told` what to run at the epoch `known` may have to be told anything else since.
    pub fn concern(&self, known: Epoch, worker: &WorkerId, told: &[Assignment]) -> bool {
        self.after(known).is_none_or(|mut changes| changes.any(|touched| touched.concerns(worker, told)))
    }

    /// What the epochs after `known` were about; `None` if not all of them are remembered, or if it is too much.
    pub(crate) fn since(&self, known: Epoch) -> Option<Touched> {
        if self.after(known)?.map(Touched::names).sum::<usize>() > TOLD_NAMES_MAX {
            return None;
        }
        let mut all = Touched::default();
        for touched in self.after(known)? {
            all.models.extend(touched.models.iter().cloned());
            all.workers.extend(touched.workers.iter().cloned());
        }
        Some(all)
    }

    /// What the epochs after `known` were about, each; `None` if not all of them are remembered, or if there are none.
    fn after(&self, known: Epoch) -> Option<impl Iterator<Item = &Touched>> {
        let first = self.epochs.partition_point(|change| change.epoch <= known);
        self.epochs.get(first).filter(|change| change.before == known)?;
        Some(self.epochs.range(first..).map(|change| &change.touched))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::{
        ClusterState,
        apply::tests::{step, take},
        placement::tests::{Play, history},
        routes::{News, RouteTable, assignments, news, routes},
        snapshot,
        testkit::{founded, mark_dead, registered, w},
    };

    /// Has a table brought up to date with a state, as a router would.
    fn follow(table: &mut RouteTable, state: &ClusterState) {
        let changes = match news(state, table.epoch) {
            News::Nothing => return,
            News::Everything => return *table = routes(state),
            News::Changes(changes) => changes,
        };
        assert_eq!(changes.since, table.epoch);
        let RouteTable { epoch, models, labels, workers, coordinators } = changes.table;
        table.models.retain(|route| !changes.models.contains(&route.key.name));
        table.labels.retain(|(model, ..)| !changes.models.contains(model));
        table.workers.retain(|route| !changes.workers.contains(&route.worker));
        table.models.extend(models);
        table.models.sort_by(|a, b| a.key.cmp(&b.key));
        table.labels.extend(labels);
        table.labels.sort();
        table.workers.extend(workers);
        table.workers.sort_by(|a, b| a.worker.cmp(&b.worker));
        (table.epoch, table.coordinators) = (epoch, coordinators);
    }

    #[test]
    fn whoever_knows_an_epoch_is_told_what_came_after_it() {
        let mut changes = Changes::default();
        let about = |name: &str| Touched { models: BTreeSet::from([name.to_owned()]), ..Touched::default() };
        assert_eq!(changes.since(0), None, "nothing is remembered yet");
        changes.note(5, 6, about("a"));
        changes.note(6, 8, about("b"));
        assert_eq!(changes.since(4), None, "from before what is remembered");
        assert_eq!(changes.since(5).unwrap().models, BTreeSet::from(["a".into(), "b".into()]));
        assert_eq!(changes.since(6).unwrap(), about("b"));
        assert_eq!(changes.since(7), None, "no such epoch was ever told");
        assert_eq!(changes.since(8), None, "there is none after it");
        changes.note(20, 21, about("c"));
        assert_eq!((changes.since(6), changes.since(20)), (None, Some(about("c"))), "what is between isn't known");
    }

    #[test]
    fn what_is_remembered_is_bounded_by_epochs_and_by_names() {
        let mut changes = Changes::default();
        for epoch in 0..EPOCHS_MAX as u64 + 10 {
            changes.note(epoch, epoch + 1, Touched::default());
        }
        assert_eq!((changes.since(9), changes.since(10)), (None, Some(Touched::default())));
        let many = |names: usize| Touched { models: (0..names).map(|n| n.to_string()).collect(), ..Touched::default() };
        let last = EPOCHS_MAX as u64 + 10;
        changes.note(last, last + 1, many(TOLD_NAMES_MAX));
        assert!(changes.since(last).is_some() && changes.since(last - 1).is_some(), "those about nothing cost no names");
        changes.note(last + 1, last + 2, Touched { workers: BTreeSet::from([w("w1")]), ..Touched::default() });
        assert!(changes.since(last + 1).is_some() && changes.since(last).is_none(), "too much to be told at once");
        changes.note(last + 2, last + 3, many(NAMES_MAX - 1));
        assert_eq!(changes.epochs.len(), 2, "those that are named no more are forgotten");
    }

    #[test]
    fn after_a_snapshot_everything_is_told_once() {
        let mut state = registered(&["w1", "w2"]);
        let known = state.epoch;
        mark_dead(&mut state, "w1", 1);
        assert!(matches!(news(&state, known), News::Changes(_)));
        let mut restored = snapshot::decode(&snapshot::encode(&state)).unwrap();
        assert!(matches!(news(&restored, known), News::Everything));
        assert!(matches!(news(&restored, state.epoch), News::Nothing));
        let known = state.epoch;
        mark_dead(&mut restored, "w2", 1);
        let News::Changes(changes) = news(&restored, known) else { panic!("it was there for this one") };
        assert_eq!(changes.workers, BTreeSet::from([w("w2")]));
    }

    proptest! {
        #[test]
        fn a_table_that_follows_changes_is_the_table(steps in vec(step(), 1..60), every in 1..5_usize) {
            let mut state = founded();
            let mut table = routes(&state);
            for (number, step) in steps.iter().enumerate() {
                take(&mut state, step);
                if number % every == 0 {
                    follow(&mut table, &state);
                    prop_assert_eq!(&table, &routes(&state));
                }
            }
        }

        #[test]
        fn whoever_is_not_concerned_has_nothing_else_to_run(steps in vec(step(), 1..60), every in 1..5_usize) {
            let mut state = founded();
            let mut told = BTreeMap::new();
            for (number, step) in steps.iter().enumerate() {
                take(&mut state, step);
                if number % every != 0 {
                    continue;
                }
                for worker in state.workers.keys() {
                    let now = assignments(&state, worker);
                    if let Some((known, before)) = told.insert(worker.clone(), (state.epoch, now.clone())) {
                        let may_differ = known != state.epoch && state.changes.concern(known, worker, &before);
                        prop_assert!(may_differ || now == before, "{worker} would run {before:?}, not {now:?}");
                    }
                }
            }
        }

        #[test]
        fn so_it_is_with_moves_and_evictions(steps in history()) {
            let mut play = Play::default();
            let mut told = BTreeMap::new();
            let mut spared = 0;
            for step in &steps {
                play.step(step);
                for worker in play.state.workers.keys() {
                    let now = assignments(&play.state, worker);
                    if let Some((known, before)) = told.insert(worker.clone(), (play.state.epoch, now.clone())) {
                        let may_differ = known != play.state.epoch && play.state.changes.concern(known, worker, &before);
                        spared += usize::from(known != play.state.epoch && !may_differ);
                        prop_assert!(may_differ || now == before, "{worker} would run {before:?}, not {now:?}");
                    }
                }
            }
            let workers = play.state.workers.len();
            prop_assert!(workers < 4 || steps.len() < 40 || spared > 0, "everybody was concerned by everything");
        }

        #[test]
        fn so_it_is_when_replicas_move_and_are_evicted(steps in history(), every in 1..5_usize) {
            let mut play = Play::default();
            let mut table = routes(&play.state);
            let mut told = BTreeMap::from([("changes", 0), ("everything", 0)]);
            for (number, step) in steps.iter().enumerate() {
                play.step(step);
                if number % every == 0 {
                    match news(&play.state, table.epoch) {
                        News::Changes(_) => *told.get_mut("changes").unwrap() += 1,
                        News::Everything => *told.get_mut("everything").unwrap() += 1,
                        News::Nothing => {}
                    }
                    follow(&mut table, &play.state);
                    prop_assert_eq!(&table, &routes(&play.state));
                }
            }
            prop_assert_eq!(told["everything"], 0, "whoever was there from the beginning needs changes only");
        }
    }
}
