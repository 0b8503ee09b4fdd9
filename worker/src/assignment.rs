//! The difference between what a worker should run and what it runs. Pure.
//!
//! The leader sends whole intents, each with an epoch. An intent of an older epoch than one that was acted on, or than the
//! one in which the worker registered, is refused: it comes from a leader of the past.
use std::collections::BTreeMap;

use cresset_proto::fleet::v1::{Assignment, Intent};

/// Names one replica on this worker.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReplicaKey {
    /// The model's name.
    pub model: String,
    /// Its version.
    pub version: u64,
    /// The part of it.
    pub shard: u32,
}

impl ReplicaKey {
    /// The key of an assignment.
    pub fn of(assignment: &Assignment) -> Self {
        Self { model: assignment.model.clone(), version: assignment.version, shard: assignment.shard }
    }
}

/// One step towards the intent.
#[derive(Debug, Clone, PartialEq)]
pub enum Step {
    /// Load this; another generation of it may be running and serves until this one is ready.
    Load(Assignment),
    /// Stop serving this and free it.
    Unload(ReplicaKey),
}

/// An intent that is older than what the worker acts on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an intent of epoch {got} came after one of epoch {acted_on}")]
pub struct StaleIntent {
    /// The intent's epoch.
    pub got: u64,
    /// The newest epoch that was acted on.
    pub acted_on: u64,
}

/// What keeps leaders of the past out. A worker that can reach nobody goes on with what it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fence {
    acted_on: u64,
    registered_at: u64,
}

impl Fence {
    /// The newest epoch that was acted on.
    pub fn acted_on(&self) -> u64 {
        self.acted_on
    }

    /// The oldest epoch that is accepted.
    pub fn oldest(&self) -> u64 {
        self.acted_on.max(self.registered_at)
    }

    /// The worker has registered in this epoch: every leader from then on knows of it.
    pub fn registered(&mut self, epoch: u64) {
        self.registered_at = epoch;
    }

    /// An intent of this epoch is acted on.
    pub fn act_on(&mut self, epoch: u64) {
        self.acted_on = epoch;
    }

    /// Another life begins. What it may act on shows when it registers.
    pub fn begin_life(&mut self) {
        self.acted_on = 0;
    }
}

/// What to do so that the worker runs `intent`. `running` holds the generation of every replica that is loaded, loading
/// or failed: a failed one isn't tried again until its generation changes.
///
/// # Errors
/// [`StaleIntent`].
pub fn steps(running: &BTreeMap<ReplicaKey, u64>, intent: &Intent, acted_on: u64) -> Result<Vec<Step>, StaleIntent> {
    if intent.epoch < acted_on {
        return Err(StaleIntent { got: intent.epoch, acted_on });
    }
    let wanted: BTreeMap<ReplicaKey, &Assignment> =
        intent.assignments.iter().map(|assignment| (ReplicaKey::of(assignment), assignment)).collect();
    let unload = running.keys().filter(|key| !wanted.contains_key(key)).cloned().map(Step::Unload);
    let load = wanted
        .iter()
        .filter(|(key, assignment)| running.get(key) != Some(&assignment.generation))
        .map(|(_, assignment)| Step::Load((*assignment).clone()));
    // Memory is freed before more is taken.
    Ok(unload.chain(load).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn assignment(model: &str, generation: u64) -> Assignment {
        Assignment { model: model.into(), version: 1, generation, ..Default::default() }
    }

    fn key(model: &str) -> ReplicaKey {
        ReplicaKey::of(&assignment(model, 0))
    }

    #[test]
    fn loads_what_is_new_and_unloads_what_is_gone_first() {
        let running = BTreeMap::from([(key("a"), 1), (key("b"), 1)]);
        let intent = Intent { epoch: 5, assignments: vec![assignment("b", 2), assignment("c", 1)] };
        let steps = steps(&running, &intent, 5).unwrap();
        assert_eq!(steps, [Step::Unload(key("a")), Step::Load(assignment("b", 2)), Step::Load(assignment("c", 1))]);
    }

    #[test]
    fn an_old_leaders_intent_is_refused() {
        let intent = Intent { epoch: 4, assignments: vec![] };
        assert_eq!(steps(&BTreeMap::new(), &intent, 5), Err(StaleIntent { got: 4, acted_on: 5 }));
    }

    #[test]
    fn a_life_takes_nothing_of_before_it_registered() {
        let mut fence = Fence::default();
        fence.registered(5);
        let intent = |epoch| Intent { epoch, assignments: vec![assignment("a", 1)] };
        assert_eq!(steps(&BTreeMap::new(), &intent(4), fence.oldest()), Err(StaleIntent { got: 4, acted_on: 5 }));
        assert_eq!(steps(&BTreeMap::new(), &intent(5), fence.oldest()).unwrap().len(), 1);
        fence.act_on(9);
        fence.registered(7);
        assert_eq!(fence.oldest(), 9, "with a leader that lacks what the last one had, in the same life");
        fence.begin_life();
        fence.registered(12);
        let late = steps(&BTreeMap::new(), &intent(11), fence.oldest());
        assert_eq!(late, Err(StaleIntent { got: 11, acted_on: 12 }), "it was sent to the life before");
        assert_eq!(fence.acted_on(), 0);
    }

    proptest! {
        #[test]
        fn acting_on_an_intent_leaves_nothing_to_do(
            running in prop::collection::btree_map("[a-e]", 0u64..3, 0..5),
            wanted in prop::collection::btree_map("[a-e]", 0u64..3, 0..5),
        ) {
            let mut running: BTreeMap<ReplicaKey, u64> = running.into_iter().map(|(model, g)| (key(&model), g)).collect();
            let assignments = wanted.iter().map(|(model, g)| assignment(model, *g)).collect();
            let intent = Intent { epoch: 1, assignments };
            for step in steps(&running, &intent, 0).unwrap() {
                match step {
                    Step::Load(assignment) => drop(running.insert(ReplicaKey::of(&assignment), assignment.generation)),
                    Step::Unload(key) => drop(running.remove(&key)),
                }
            }
            prop_assert_eq!(steps(&running, &intent, 1).unwrap(), vec![]);
        }
    }
}
