//! What must hold, whatever happens.
use std::{
    collections::{BTreeMap, BTreeSet},
    hash::{DefaultHasher, Hash, Hasher},
};

use cresset_coordinator::consensus::{RaftStatus, Role};
use cresset_core::{
    ClusterState, Command, CommandBody, CommandId, Effect, Outcome, WorkerId,
    members::Members,
    routes::{ModelRoute, routes},
    state::{Epoch, Incarnation, ModelKey},
};
use cresset_proto::fleet::v1::WatchResponse;
use prost::Message;

use super::machine::Applied;

/// What the checks ask about a state right after a command.
pub(super) struct Seen {
    epoch_before: Epoch,
    epoch: Epoch,
    /// Present if the epoch grew.
    routes: Option<Routes>,
    broken: Option<String>,
}

struct Routes {
    hash: u64,
    workers: Vec<(WorkerId, Incarnation)>,
}

impl Seen {
    pub(super) fn of(state: &ClusterState, epoch_before: Epoch, command: &Command) -> Self {
        let changed = state.epoch != epoch_before;
        let routes = changed.then(|| Routes::of(state));
        let broken = if changed { broken(state).or_else(|| misjudged(state, command)) } else { None };
        Self { epoch_before, epoch: state.epoch, routes, broken }
    }
}

impl Seen {
    /// Deploying a model anew must not take it from those who call it.
    pub(super) fn deployed(&mut self, before: &BTreeSet<ModelKey>, after: &ClusterState) {
        let still = served(after);
        let gone = before.iter().find(|key| after.models.contains_key(key) && !still.contains(key));
        if let Some(gone) = gone {
            self.broken = Some(format!("nobody serves {gone:?} any more because it was deployed again"));
        }
    }
}

/// The models that a router finds a worker for.
pub(super) fn served(state: &ClusterState) -> BTreeSet<ModelKey> {
    let whole = |model: &ModelRoute| model.shards.iter().all(|workers| !workers.is_empty());
    routes(state).models.into_iter().filter(whole).map(|model| model.key).collect()
}

impl Routes {
    fn of(state: &ClusterState) -> Self {
        let table = routes(state);
        let mut hash = DefaultHasher::new();
        WatchResponse::from(&table).encode_to_vec().hash(&mut hash);
        let workers = table.workers.into_iter().map(|route| (route.worker, route.incarnation)).collect();
        Self { hash: hash.finish(), workers }
    }
}

/// The constraints of placement, which `apply` promises to keep whoever plans.
fn broken(state: &ClusterState) -> Option<String> {
    for (id, replica) in &state.replicas {
        let Some(deployment) = state.models.get(&id.key()) else {
            return Some(format!("{id:?} is a replica of a model that isn't deployed"));
        };
        if id.shard >= deployment.shards {
            return Some(format!("{id:?} is a replica of shard {} of {}", id.shard, deployment.shards));
        }
        if state.workers.get(&id.worker).is_none_or(|worker| worker.state.is_over()) {
            return Some(format!("{id:?} is on a worker that is dead or unknown"));
        }
        if replica.epoch > state.epoch {
            return Some(format!("{id:?} is of epoch {}, the state of {}", replica.epoch, state.epoch));
        }
    }
    None
}

/// A verdict that was carried out must have struck the life that it was about.
fn misjudged(state: &ClusterState, command: &Command) -> Option<String> {
    let CommandBody::MarkDead { worker, incarnation, .. } = &command.body else { return None };
    let known = state.workers.get(worker)?;
    (known.incarnation != *incarnation)
        .then(|| format!("a verdict on life {incarnation} of {worker} struck life {}", known.incarnation))
}

/// The witness of a whole run.
#[derive(Default)]
pub(super) struct Checks {
    violation: Option<String>,
    leaders: BTreeMap<u64, u64>,
    /// What each index of the log holds.
    entries: BTreeMap<u64, CommandId>,
    /// How each command was answered first.
    outcomes: BTreeMap<CommandId, Outcome>,
    routes: BTreeMap<Epoch, u64>,
    lives: BTreeMap<u64, Life>,
    acknowledged: Vec<CommandId>,
    members: BTreeMap<u64, Members>,
}

/// One life of a coordinator.
#[derive(Default)]
struct Life {
    applied: u64,
    epoch: Epoch,
    fences: BTreeMap<WorkerId, Incarnation>,
}

impl Checks {
    pub(super) fn fail(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(super) fn violation(&self) -> Option<&str> {
        self.violation.as_deref()
    }

    pub(super) fn leaders(&self) -> u64 {
        self.leaders.len() as u64
    }

    pub(super) fn epoch_max(&self) -> Epoch {
        self.routes.keys().next_back().copied().unwrap_or(0)
    }

    /// A coordinator has begun another life, from what its disk held.
    pub(super) fn restarted(&mut self, peer: u64, applied: u64) {
        self.lives.insert(peer, Life { applied, ..Life::default() });
    }

    /// One leader in a term.
    pub(super) fn status(&mut self, status: &RaftStatus) {
        if status.role != Role::Leader {
            return;
        }
        let first = *self.leaders.entry(status.term).or_insert(status.id);
        if first != status.id {
            self.fail(format!("c{first} and c{} both lead term {}", status.id, status.term));
        }
    }

    /// The same command at the same index everywhere, each applied once, and what follows from its effects.
    pub(super) fn applied(&mut self, peer: u64, index: u64, applied: &Applied) {
        let Applied { command, outcome, effects, seen } = applied;
        let first = *self.entries.entry(index).or_insert(command.id);
        if first != command.id {
            self.fail(format!("index {index} holds command {first}, and {} on c{peer}", command.id));
        }
        let known = self.outcomes.entry(command.id).or_insert_with(|| outcome.clone());
        if known != outcome {
            let text = format!("command {} was answered {known:?}, and {outcome:?} on c{peer} at {index}", command.id);
            self.fail(text);
        }
        if let Some(broken) = &seen.broken {
            self.fail(format!("c{peer} at {index}: {broken}"));
        }
        if seen.epoch < seen.epoch_before {
            self.fail(format!("c{peer} at {index}: the epoch fell from {} to {}", seen.epoch_before, seen.epoch));
        }
        let life = self.lives.entry(peer).or_default();
        let before = std::mem::replace(&mut life.applied, index);
        for effect in effects {
            if let Effect::WorkerFenced { worker, incarnation_min } = effect {
                life.fences.insert(worker.clone(), *incarnation_min);
            }
        }
        let named = seen.routes.iter().flat_map(|routes| &routes.workers);
        let mut fenced = named.filter(|(worker, incarnation)| life.fences.get(worker).is_some_and(|min| incarnation < min));
        let fenced =
            fenced.next().map(|(worker, incarnation)| format!("routes name life {incarnation} of {worker}, which is fenced"));
        if index <= before {
            self.fail(format!("c{peer} applied {index} after {before}"));
        }
        if let Some(fenced) = fenced {
            self.fail(format!("c{peer} at {index}: {fenced}"));
        }
        if let Some(routes) = &seen.routes {
            self.same_routes(peer, seen.epoch, routes.hash);
        }
    }

    /// A look at a state as routers get it, whether it was reached by commands or by a snapshot.
    pub(super) fn look(&mut self, peer: u64, state: &ClusterState) {
        let life = self.lives.entry(peer).or_default();
        let before = std::mem::replace(&mut life.epoch, state.epoch);
        if state.epoch < before {
            self.fail(format!("c{peer} went from epoch {before} to {}", state.epoch));
        }
        if state.epoch > before && state.epoch > 0 {
            self.same_routes(peer, state.epoch, Routes::of(state).hash);
        }
    }

    fn same_routes(&mut self, peer: u64, epoch: Epoch, hash: u64) {
        let first = *self.routes.entry(epoch).or_insert(hash);
        if first != hash {
            self.fail(format!("the routes of epoch {epoch} on c{peer} aren't those that others saw"));
        }
    }

    /// The same members at the same index everywhere.
    pub(super) fn members(&mut self, peer: u64, applied: u64, members: &Members) {
        let first = self.members.entry(applied).or_insert_with(|| members.clone());
        if first != members {
            let text = format!("at {applied} the members are {first:?}, and {members:?} on c{peer}");
            self.fail(text);
        }
    }

    /// A snapshot has taken the place of commands.
    pub(super) fn jumped(&mut self, peer: u64, applied: u64) {
        let life = self.lives.entry(peer).or_default();
        life.applied = life.applied.max(applied);
    }

    /// A client was told that its command is in force.
    pub(super) fn acknowledged(&mut self, id: CommandId) {
        self.acknowledged.push(id);
    }

    /// At the end, all that was acknowledged is part of what everybody has applied.
    pub(super) fn nothing_is_lost(&mut self) {
        let lost = self.acknowledged.iter().find(|id| !self.outcomes.contains_key(id));
        if let Some(lost) = lost.copied() {
            self.fail(format!("command {lost} was acknowledged and is lost"));
        }
    }
}
