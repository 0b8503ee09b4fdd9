//! The only mutator of the cluster's state.
//!
//! Every peer runs this on every committed command, so it is a function of its two arguments and nothing else. It trusts
//! no value in a command: whatever can't be right is rejected with the state untouched. What it can't decide alone (where
//! replicas go, who is dead) arrives as a command that it checks again, since the state may have moved on in between.
//!
//! The epoch grows exactly when something that workers or routers are told may have changed. Being reported as loading
//! or as failed changes neither, unless the replica was ready before.
//!
//! `deployments` has the part that is about models: versions, generations and labels.
mod deployments;

use std::collections::{BTreeMap, BTreeSet};

use crate::{
    Command, CommandBody, Outcome, PeerId, Reject, WorkerId,
    changes::Touched,
    claim::Claim,
    command::{DEVICES_MAX, MOVES_MAX, PEERS_MAX, REASON_BYTES_MAX, Registration, ReplicaReport, TEXT_BYTES_MAX, WORKERS_MAX},
    demands::check_tags,
    level,
    members::{self, MemberChange},
    placement::Shard,
    state::{ClusterState, Epoch, Incarnation, PeerInfo, Replica, ReplicaId, ReplicaState, Worker, WorkerState},
};

/// What a command means beyond the state. Informative: whoever misses one finds the same in the state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Effect {
    /// Workers and routers have to be told something new.
    EpochAdvanced {
        /// The new epoch.
        epoch: Epoch,
    },
    /// Lives of this worker below the bound are over; a stream that belongs to one has to end.
    WorkerFenced {
        /// Whose.
        worker: WorkerId,
        /// The smallest incarnation that is still accepted.
        incarnation_min: Incarnation,
    },
    /// The members change. Not informative only: whoever keeps the members has to follow it, at this very entry.
    MembersChanged {
        /// How.
        change: MemberChange,
    },
}

/// Applies a committed command.
///
/// A command that was applied before gets the same answer and changes nothing, also if it was rejected.
pub fn apply(state: &mut ClusterState, command: &Command) -> (Outcome, Vec<Effect>) {
    if let Some(outcome) = state.remembered.get(&command.id) {
        return (outcome.clone(), Vec::new());
    }
    let epoch_before = state.epoch;
    let mut effects = Vec::new();
    // Before the change, which may take away what tells it.
    let touched = touched(state, &command.body);
    let outcome = match change(state, &command.body, &touched, &mut effects) {
        Ok(outcome) => outcome,
        Err(reject) => Outcome::Rejected(reject),
    };
    if state.epoch != epoch_before {
        state.changes.note(epoch_before, state.epoch, touched);
        effects.push(Effect::EpochAdvanced { epoch: state.epoch });
    }
    state.remembered.insert(command.id, outcome.clone());
    (outcome, effects)
}

fn change(state: &mut ClusterState, body: &CommandBody, touched: &Touched, effects: &mut Vec<Effect>) -> Result<Outcome, Reject> {
    match body {
        CommandBody::AnnouncePeer { peer, info } => announce_peer(state, *peer, info)?,
        CommandBody::ChangeMembers(change) => members::change(state, change, effects)?,
        CommandBody::RegisterWorker(registration) => register(state, registration, effects)?,
        CommandBody::DrainWorker { worker, incarnation } => drain(state, worker, *incarnation)?,
        CommandBody::MarkDead { worker, incarnation, .. } => mark_dead(state, worker, *incarnation, effects)?,
        CommandBody::Deploy(spec) => return deployments::deploy_one(state, spec),
        CommandBody::DeploySet(set) => return deployments::deploy(state, set),
        CommandBody::Undeploy { name } => deployments::undeploy(state, name)?,
        CommandBody::UndeployVersion { name, version } => deployments::undeploy_version(state, name, *version)?,
        CommandBody::SetLabels { name, labels } => deployments::set_labels(state, name, labels)?,
        CommandBody::RemoveWorker { worker, incarnation } => remove_worker(state, worker, *incarnation, effects)?,
        CommandBody::Place { epoch_seen, add, remove } => place(state, *epoch_seen, &Moves { add, remove, ..NO_MOVES })?,
        CommandBody::Rearrange { epoch_seen, relieve, add, remove } => {
            place(state, *epoch_seen, &Moves { relieve, add, remove, ..NO_MOVES })?;
        }
        CommandBody::Evict { epoch_seen, evict, relieve, add, remove } => {
            place(state, *epoch_seen, &Moves { evict, relieve, add, remove })?;
        }
        CommandBody::ReportReplicas { worker, incarnation, replicas } => report(state, worker, *incarnation, replicas)?,
        CommandBody::RaiseLevel { level } => level::raise(state, *level),
    }
    // A deployment sees to it itself. A command may only end waits of what it is about, so that it costs as much as that.
    touched.models.iter().for_each(|name| deployments::settle(state, name));
    Ok(Outcome::Done { epoch: state.epoch })
}

/// What a command is about: beyond that it ends no wait, and changes nothing that a router or a worker is told.
fn touched(state: &ClusterState, body: &CommandBody) -> Touched {
    let models = |names: &[&String]| Touched { models: names.iter().copied().cloned().collect(), ..Touched::default() };
    let of = |moves: &[&Vec<ReplicaId>]| {
        let ids = || moves.iter().flat_map(|ids| ids.iter());
        Touched { workers: ids().map(|id| id.worker.clone()).collect(), ..models(&ids().map(|id| &id.model).collect::<Vec<_>>()) }
    };
    let on = |worker: &WorkerId| Touched {
        workers: BTreeSet::from([worker.clone()]),
        ..models(&state.replicas_on(worker).map(|(id, _)| &id.model).collect::<Vec<_>>())
    };
    match body {
        // The coordinators' addresses are told with every change.
        CommandBody::AnnouncePeer { .. } | CommandBody::ChangeMembers(_) | CommandBody::RaiseLevel { .. } => Touched::default(),
        CommandBody::Deploy(spec) => models(&[&spec.name]),
        CommandBody::DeploySet(set) => models(&[&set.name]),
        CommandBody::SetLabels { name, .. } | CommandBody::Undeploy { name } | CommandBody::UndeployVersion { name, .. } => {
            models(&[name])
        }
        CommandBody::RegisterWorker(registration) => on(&registration.worker),
        CommandBody::DrainWorker { worker, .. }
        | CommandBody::MarkDead { worker, .. }
        | CommandBody::RemoveWorker { worker, .. } => on(worker),
        CommandBody::Place { add, remove, .. } => of(&[add, remove]),
        CommandBody::Rearrange { relieve, add, remove, .. } => of(&[relieve, add, remove]),
        CommandBody::Evict { evict, relieve, add, remove, .. } => of(&[evict, relieve, add, remove]),
        CommandBody::ReportReplicas { replicas, .. } => models(&replicas.iter().map(|report| &report.model).collect::<Vec<_>>()),
    }
}

fn announce_peer(state: &mut ClusterState, peer: PeerId, info: &PeerInfo) -> Result<(), Reject> {
    check(peer.0 > 0, "peer", "must not be 0")?;
    check_text("grpc_address", &info.grpc_address)?;
    check_text("http_address", &info.http_address)?;
    check_text("peer_address", &info.peer_address)?;
    if !state.members.contains(peer) {
        return Err(Reject::NotAMember { peer });
    }
    if state.peers.get(&peer) == Some(info) {
        return Ok(());
    }
    if !state.peers.contains_key(&peer) && state.peers.len() >= PEERS_MAX {
        return Err(too_many("coordinators", PEERS_MAX));
    }
    state.peers.insert(peer, info.clone());
    advance(state);
    Ok(())
}

/// Whether the state holds this very life, so that there is nothing to agree on when it registers again.
pub fn is_registered(state: &ClusterState, registration: &Registration) -> bool {
    let known = state.workers.get(&registration.worker);
    known.is_some_and(|worker| !worker.state.is_over() && *worker == lives(registration, worker.state))
}

fn lives(registration: &Registration, state: WorkerState) -> Worker {
    Worker {
        incarnation: registration.incarnation,
        incarnation_floor: registration.incarnation,
        grpc_address: registration.grpc_address.clone(),
        http_address: registration.http_address.clone(),
        zone: registration.zone.clone(),
        devices: registration.devices.clone(),
        tags: registration.tags.clone(),
        state,
    }
}

fn register(state: &mut ClusterState, registration: &Registration, effects: &mut Vec<Effect>) -> Result<(), Reject> {
    let Registration { worker: id, incarnation, .. } = registration;
    // Zero is proto3's "not given"; the upper half leaves room for the fence above the last life.
    check((1..=u64::MAX / 2).contains(incarnation), "incarnation", "must be between 1 and 2^63-1")?;
    check_text("grpc_address", &registration.grpc_address)?;
    check(!registration.grpc_address.is_empty(), "grpc_address", "must not be empty")?;
    check_text("http_address", &registration.http_address)?;
    check_text("zone", &registration.zone)?;
    check(registration.devices.len() <= DEVICES_MAX, "devices", format!("must be at most {DEVICES_MAX}"))?;
    check_tags("tags", &registration.tags)?;
    for device in &registration.devices {
        check_text("devices.name", &device.name)?;
    }
    let known = state.workers.get(id).cloned();
    if let Some(worker) = &known
        && *incarnation < worker.incarnation_floor
    {
        return Err(stale(id, *incarnation, worker.incarnation_floor));
    }
    if known.is_none() && state.workers.len() >= WORKERS_MAX {
        forget_longest_dead(state)?;
    }
    let same_life = known.as_ref().is_some_and(|worker| worker.incarnation == *incarnation);
    // The same life under a new leader: what it was told before still holds.
    let next = lives(registration, known.as_ref().filter(|_| same_life).map_or(WorkerState::Ready, |worker| worker.state));
    if known.as_ref() == Some(&next) {
        return Ok(());
    }
    state.workers.insert(id.clone(), next);
    let epoch = advance(state);
    if !same_life {
        // The new life holds nothing yet, and no route may name it as if it did.
        state.replicas.change_on(id, |replica| reset(replica, epoch));
        effects.push(Effect::WorkerFenced { worker: id.clone(), incarnation_min: *incarnation });
    }
    Ok(())
}

/// Makes room for a new worker. The dead one's fence goes with it, which is harmless once it holds no replica.
fn forget_longest_dead(state: &mut ClusterState) -> Result<(), Reject> {
    let dead = state.workers.iter().filter(|(_, worker)| worker.state.is_over());
    let longest = dead.min_by_key(|(id, worker)| (worker.incarnation, *id)).map(|(id, _)| id.clone());
    let longest = longest.ok_or_else(|| too_many("workers", WORKERS_MAX))?;
    state.workers.remove(&longest);
    Ok(())
}

fn drain(state: &mut ClusterState, id: &WorkerId, incarnation: Incarnation) -> Result<(), Reject> {
    let worker = living(state, id, incarnation)?;
    if worker.state != WorkerState::Draining {
        worker.state = WorkerState::Draining;
        advance(state);
    }
    Ok(())
}

fn mark_dead(state: &mut ClusterState, id: &WorkerId, incarnation: Incarnation, effects: &mut Vec<Effect>) -> Result<(), Reject> {
    let known = state.workers.get(id);
    if known.is_some_and(|worker| worker.state == WorkerState::Dead && worker.incarnation == incarnation) {
        return Ok(()); // the verdict was repeated
    }
    living(state, id, incarnation)?;
    end_life(state, id, incarnation, WorkerState::Dead, effects);
    Ok(())
}

/// Nothing may be lost by it: what is at work has to be relieved first.
fn remove_worker(
    state: &mut ClusterState,
    id: &WorkerId,
    incarnation: Incarnation,
    effects: &mut Vec<Effect>,
) -> Result<(), Reject> {
    let worker = state.workers.get(id).ok_or_else(|| Reject::UnknownWorker { worker: id.clone() })?;
    if worker.incarnation != incarnation {
        return Err(stale(id, incarnation, worker.incarnation_floor));
    }
    let at_work = |doing: String| Reject::WorkerAtWork { worker: id.clone(), doing };
    match worker.state {
        WorkerState::Removed => return Ok(()), // it was repeated
        WorkerState::Ready => return Err(at_work("taking part".into())),
        WorkerState::Draining | WorkerState::Dead => {}
    }
    let held = state.replicas_on(id).count();
    if held > 0 {
        return Err(at_work(format!("leaving, and still holds {held} replica{}", if held == 1 { "" } else { "s" })));
    }
    end_life(state, id, incarnation, WorkerState::Removed, effects);
    Ok(())
}

/// A life is over. Nothing of it is accepted any more.
fn end_life(state: &mut ClusterState, id: &WorkerId, incarnation: Incarnation, as_what: WorkerState, effects: &mut Vec<Effect>) {
    let Some(worker) = state.workers.get_mut(id) else { return };
    worker.state = as_what;
    worker.incarnation_floor = incarnation.saturating_add(1);
    let incarnation_min = worker.incarnation_floor;
    state.replicas.remove_on(id);
    advance(state);
    effects.push(Effect::WorkerFenced { worker: id.clone(), incarnation_min });
}

/// The moves of a plan.
struct Moves<'a> {
    evict: &'a [ReplicaId],
    relieve: &'a [ReplicaId],
    add: &'a [ReplicaId],
    remove: &'a [ReplicaId],
}

const NO_MOVES: Moves<'static> = Moves { evict: &[], relieve: &[], add: &[], remove: &[] };

/// Makes those moves of the plan that are still right. A plan is made from a state that may be gone when it is
/// committed, and to refuse the whole of it for one worker's report would only cost a round; but no move may break what
/// placement promises, so each is judged alone by [`may_add`], [`may_remove`] and [`evicted`].
fn place(state: &mut ClusterState, epoch_seen: Epoch, planned: &Moves<'_>) -> Result<(), Reject> {
    let Moves { evict, relieve, add, remove } = *planned;
    let moves = [evict, relieve, add, remove].iter().fold(0_usize, |sum, ids| sum.saturating_add(ids.len()));
    check(moves <= MOVES_MAX, "moves", format!("must be at most {MOVES_MAX}"))?;
    let mut changed = false;
    // What goes may begin elsewhere in the place of others in turn.
    loop {
        let evicted = evicted(state, evict, add);
        if evicted.is_empty() {
            break;
        }
        evicted.iter().for_each(|id| drop(state.replicas.remove(id)));
        changed = true;
    }
    for id in relieve {
        // What isn't deployed has no replicas, and on a worker that leaves a replica moves anyway.
        if let Some(replica) = state.replicas.get_mut(id).filter(|replica| !replica.moving) {
            replica.moving = true;
            changed = true;
        }
    }
    for id in remove {
        if may_remove(state, id) {
            state.replicas.remove(id);
            changed = true;
        }
    }
    let epoch = state.epoch.saturating_add(1);
    for id in add {
        if let Some(generation) = may_add(state, id) {
            state.replicas.insert(id.clone(), assigned(generation, epoch));
            changed = true;
        }
    }
    if changed {
        advance(state);
    } else if moves > 0 {
        return Err(Reject::StalePlan { epoch_seen, epoch: state.epoch });
    }
    Ok(())
}

/// Those replicas that may go for the sake of what begins: nothing may go for nothing.
fn evicted(state: &ClusterState, evict: &[ReplicaId], add: &[ReplicaId]) -> Vec<ReplicaId> {
    if evict.is_empty() {
        return Vec::new();
    }
    let claim = |id: &ReplicaId| state.models.get(&id.key()).map(|deployment| deployment.claim);
    let mut comes: BTreeMap<&WorkerId, Claim> = BTreeMap::new();
    for id in add.iter().filter(|id| may_add(state, id).is_some()) {
        let Some(claim) = claim(id) else { continue };
        let highest = comes.entry(&id.worker).or_insert(claim);
        highest.priority = highest.priority.max(claim.priority);
    }
    let gives_way = |id: &&ReplicaId| {
        let id: &ReplicaId = id;
        let (Some(claim), Some(highest)) = (claim(id), comes.get(&id.worker)) else { return false };
        state.replicas.contains_key(id) && claim.gives_way_to(highest)
    };
    evict.iter().filter(gives_way).cloned().collect()
}

/// The generation of the new replica, if the shard is deployed, lacks one, and the worker takes it and has none yet.
fn may_add(state: &ClusterState, id: &ReplicaId) -> Option<u64> {
    let deployment = state.models.get(&id.key())?;
    let worker = state.workers.get(&id.worker)?;
    let takes_work = worker.state == WorkerState::Ready && deployment.demands.are_met_by(&id.worker, worker);
    let fits = takes_work && id.shard < deployment.shards && !state.replicas.contains_key(id);
    let shard = Shard::survey(state, &id.key(), id.shard);
    (fits && shard.staying.len() < deployment.replicas_wanted as usize).then_some(deployment.generation)
}

/// Whether the replica is one too many, or on a worker that leaves; never the last one that answers.
fn may_remove(state: &ClusterState, id: &ReplicaId) -> bool {
    let (Some(replica), Some(deployment)) = (state.replicas.get(id), state.models.get(&id.key())) else { return false };
    let shard = Shard::survey(state, &id.key(), id.shard);
    let leaves = shard.gives_up(&id.worker);
    let answers_elsewhere = shard.answering().any(|worker| *worker != id.worker);
    let surplus = shard.staying.len() > deployment.replicas_wanted as usize;
    (leaves || surplus) && (answers_elsewhere || replica.answering().is_none())
}

fn report(state: &mut ClusterState, id: &WorkerId, incarnation: Incarnation, reports: &[ReplicaReport]) -> Result<(), Reject> {
    check(reports.len() <= MOVES_MAX, "replicas", format!("must be at most {MOVES_MAX}"))?;
    living(state, id, incarnation)?;
    let mut routes_changed = false;
    for report in reports {
        let replica = ReplicaId { model: report.model.clone(), version: report.version, shard: report.shard, worker: id.clone() };
        // What isn't assigned any more, or was assigned anew since, is on its way out at the worker too.
        let Some(replica) = state.replicas.get_mut(&replica) else { continue };
        if replica.generation != report.generation {
            continue;
        }
        let answered_before = replica.answering();
        if report.state == ReplicaState::Ready {
            replica.former = 0; // it has taken the former one's place
        }
        replica.state = report.state;
        replica.reason = cut(&report.reason, REASON_BYTES_MAX);
        replica.memory_bytes = report.memory_bytes;
        routes_changed |= replica.answering() != answered_before;
    }
    if routes_changed {
        advance(state);
    }
    Ok(())
}

/// Whether a report would tell the state something. Memory alone isn't news once it is known: it changes by itself, and the
/// log is no place for that.
pub fn is_news(replica: &Replica, report: &ReplicaReport) -> bool {
    let memory_unknown = replica.memory_bytes == 0 && report.memory_bytes != 0;
    let differs = replica.state != report.state || replica.reason != cut(&report.reason, REASON_BYTES_MAX);
    replica.generation == report.generation && (differs || memory_unknown)
}

fn assigned(generation: u64, epoch: Epoch) -> Replica {
    Replica { generation, state: ReplicaState::Assigned, reason: String::new(), epoch, memory_bytes: 0, former: 0, moving: false }
}

fn reset(replica: &mut Replica, epoch: Epoch) {
    *replica = assigned(replica.generation, epoch);
}

/// The worker, if this life of it is the one that counts.
fn living<'a>(state: &'a mut ClusterState, id: &WorkerId, incarnation: Incarnation) -> Result<&'a mut Worker, Reject> {
    match state.workers.get_mut(id) {
        None => Err(Reject::UnknownWorker { worker: id.clone() }),
        Some(worker) if worker.incarnation != incarnation || worker.state.is_over() => {
            Err(stale(id, incarnation, worker.incarnation_floor))
        }
        Some(worker) => Ok(worker),
    }
}

pub(crate) fn advance(state: &mut ClusterState) -> Epoch {
    state.epoch = state.epoch.saturating_add(1);
    state.epoch
}

fn next_generation(state: &mut ClusterState) -> u64 {
    state.generation_last = state.generation_last.saturating_add(1);
    state.generation_last
}

pub(crate) fn check(holds: bool, field: &str, problem: impl Into<String>) -> Result<(), Reject> {
    if holds { Ok(()) } else { Err(Reject::Invalid { field: field.into(), problem: problem.into() }) }
}

pub(crate) fn check_text(field: &str, text: &str) -> Result<(), Reject> {
    check(text.len() <= TEXT_BYTES_MAX, field, format!("must be at most {TEXT_BYTES_MAX} bytes"))
}

fn stale(worker: &WorkerId, incarnation: Incarnation, incarnation_min: Incarnation) -> Reject {
    Reject::StaleIncarnation { worker: worker.clone(), incarnation, incarnation_min }
}

pub(crate) fn too_many(what: &str, max: usize) -> Reject {
    Reject::TooMany { what: what.into(), max: max as u64 }
}

/// At most `bytes_max` bytes of the text, whole characters.
fn cut(text: &str, bytes_max: usize) -> String {
    text[..text.floor_char_boundary(bytes_max)].to_owned()
}

#[cfg(test)]
pub(crate) mod tests;
