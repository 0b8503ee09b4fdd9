//! What people are told about models: one word, and why.
use crate::{
    placement::{Plan, Shard},
    routes::serving,
    state::{ClusterState, Deployment, Generation, ModelKey, ReplicaState},
};

/// A model, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModelState {
    /// Every wanted replica answers.
    Ready,
    /// It doesn't answer yet, and may without anybody's help.
    Loading,
    /// It answers, with fewer replicas than wanted, or still as it was before it was deployed anew.
    Degraded,
    /// It doesn't answer, and won't without help.
    Failed,
    /// It doesn't answer: memory is short, and it gives way to others. It comes back when there is room.
    Evicted,
}

/// What people are told about a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelStatus {
    /// The model.
    pub key: ModelKey,
    /// Which deployment of it.
    pub generation: Generation,
    /// Parts that it is cut into.
    pub shards: u32,
    /// Replicas wanted of each shard.
    pub replicas_wanted: u32,
    /// Replicas of this generation that answer; of the shard that has the fewest.
    pub replicas_ready: u32,
    /// In one word.
    pub state: ModelState,
    /// Why it isn't ready; empty if it is.
    pub reason: String,
    /// Nothing of this generation answers, and nothing will without help. What was deployed before may answer.
    pub stuck: bool,
    /// It goes as soon as what was deployed instead has come up.
    pub leaving: bool,
    /// Names that requests can use for this version.
    pub labels: Vec<String>,
}

/// The status of every model. `plan` is the newest plan for this state: it knows what found no place.
pub fn models(state: &ClusterState, plan: &Plan) -> Vec<ModelStatus> {
    state.models.iter().map(|(key, deployment)| model(state, plan, key, deployment)).collect()
}

fn model(state: &ClusterState, plan: &Plan, key: &ModelKey, deployment: &Deployment) -> ModelStatus {
    let count = |workers: Vec<_>| u32::try_from(workers.len()).unwrap_or(u32::MAX);
    let ready = |shard| count(serving(state, key, shard, |replica| replica.state == ReplicaState::Ready));
    let (replicas_ready, weakest) = (0..deployment.shards).map(|shard| (ready(shard), shard)).min().unwrap_or((0, 0));
    let answers = (0..deployment.shards).all(|shard| count(serving(state, key, shard, |_| true)) > 0);
    let coming = (0..deployment.shards).all(|shard| may_come(state, plan, key, shard));
    let state_word = match replicas_ready {
        n if n >= deployment.replicas_wanted => ModelState::Ready,
        0 if answers => ModelState::Degraded,
        0 if coming => ModelState::Loading,
        0 if gives_way(plan, key, deployment) => ModelState::Evicted,
        0 => ModelState::Failed,
        _ => ModelState::Degraded,
    };
    let mut reason = match state_word {
        ModelState::Ready => String::new(),
        ModelState::Evicted => {
            let why = why(state, plan, key, weakest);
            format!("it gives way to models of a higher priority and comes back when there is room: {why}")
        }
        _ => why(state, plan, key, weakest),
    };
    if answers && replicas_ready == 0 {
        reason += "; what was deployed before answers";
    }
    ModelStatus {
        key: key.clone(),
        generation: deployment.generation,
        shards: deployment.shards,
        replicas_wanted: deployment.replicas_wanted,
        replicas_ready,
        state: state_word,
        reason,
        stuck: replicas_ready == 0 && !coming,
        leaving: deployment.leaving,
        labels: state.labels_of(key).map(str::to_owned).collect(),
    }
}

/// Whether a model may be evicted, and memory alone is lacking for it.
fn gives_way(plan: &Plan, key: &ModelKey, deployment: &Deployment) -> bool {
    let mut unplaced = plan.unplaced.iter().filter(|unplaced| unplaced.model == *key);
    deployment.claim.evictable && unplaced.any(|unplaced| unplaced.lacks_memory)
}

/// Whether a replica of the shard answers or is on its way, placed or only planned.
fn may_come(state: &ClusterState, plan: &Plan, key: &ModelKey, shard: u32) -> bool {
    let found = Shard::survey(state, key, shard);
    let on_its_way = found.staying.iter().any(|(_, replica)| replica.state != ReplicaState::Failed);
    on_its_way || plan.add.iter().any(|id| id.is_of(key) && id.shard == shard)
}

/// The first thing that a person should know: a failure, then a lack of room, then that it takes a while.
fn why(state: &ClusterState, plan: &Plan, key: &ModelKey, shard: u32) -> String {
    let found = Shard::survey(state, key, shard);
    let failed = found.staying.iter().find(|(_, replica)| replica.state == ReplicaState::Failed);
    if let Some((worker, replica)) = failed {
        let reason = if replica.reason.is_empty() { "failed without a reason" } else { &replica.reason };
        return format!("{worker}: {reason}");
    }
    if let Some(unplaced) = plan.unplaced.iter().find(|unplaced| unplaced.model == *key && unplaced.shard == shard) {
        return unplaced.reason.clone();
    }
    let loading = found.staying.iter().filter(|(_, replica)| replica.state != ReplicaState::Ready).count();
    let planned = plan.add.iter().filter(|id| id.is_of(key) && id.shard == shard).count();
    match loading + planned {
        0 => "waiting for a place".into(),
        1 => "1 replica is loading".into(),
        n => format!("{n} replicas are loading"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::{
        placement,
        testkit::{self, cluster, deployed, fail, mark_dead, place, ready},
    };

    fn status(state: &ClusterState) -> (ModelState, u32, String) {
        let plan = placement::plan(state, &placement::Policy::default(), &BTreeMap::new());
        let status = models(state, &plan).remove(0);
        (status.state, status.replicas_ready, status.reason)
    }

    #[test]
    fn a_model_comes_up() {
        let mut state = deployed(&["w1", "w2"], "m", 2);
        assert_eq!(status(&state), (ModelState::Loading, 0, "2 replicas are loading".into()), "planned, not placed yet");
        place(&mut state);
        assert_eq!(status(&state), (ModelState::Loading, 0, "2 replicas are loading".into()));
        ready(&mut state, "w1");
        assert_eq!(status(&state), (ModelState::Degraded, 1, "1 replica is loading".into()));
        ready(&mut state, "w2");
        assert_eq!(status(&state), (ModelState::Ready, 2, String::new()));
    }

    #[test]
    fn a_lost_worker_degrades_and_says_what_is_missing() {
        let mut state = cluster(&["w1", "w2"], "m", 2);
        mark_dead(&mut state, "w1", 1);
        assert_eq!(status(&state), (ModelState::Degraded, 1, "needs 2 workers, 1 is there".into()));
    }

    #[test]
    fn a_corrupt_model_fails_with_its_reason() {
        let mut state = deployed(&["w1", "w2"], "m", 2);
        place(&mut state);
        fail(&mut state, "w1", "model.pt is truncated");
        assert_eq!(status(&state), (ModelState::Loading, 0, "w1: model.pt is truncated".into()));
        fail(&mut state, "w2", "model.pt is truncated");
        assert_eq!(status(&state), (ModelState::Failed, 0, "w1: model.pt is truncated".into()));
    }

    #[test]
    fn without_workers_nothing_is_coming() {
        let mut state = ClusterState::new("c");
        testkit::deploy(&mut state, "m", 1, 1);
        assert_eq!(status(&state), (ModelState::Failed, 0, "needs 1 worker, 0 are there".into()));
    }
}
