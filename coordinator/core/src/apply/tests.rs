use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{
    CommandId, DecodeError,
    command::{CONFIG_BYTES_MAX, Cause, DeploySet, DeploySpec, VersionSpec},
    level::LEVEL_KNOWN,
    placement, routes, snapshot,
    state::{ModelKey, REMEMBERED_COMMANDS_MAX},
    testkit::{
        self, cluster, deployed, fail, founded, hosts, mark_dead, place, ready, register, registered, replica, run, spec, w,
    },
};

fn stale(worker: &str, incarnation: u64, incarnation_min: u64) -> Outcome {
    Outcome::Rejected(Reject::StaleIncarnation { worker: w(worker), incarnation, incarnation_min })
}

fn deploy(state: &mut ClusterState, spec: DeploySpec) -> Outcome {
    run(state, CommandBody::Deploy(spec))
}

#[test]
fn a_command_is_applied_once_however_often_it_arrives() {
    let mut state = registered(&["w1"]);
    let command = Command { id: CommandId([9; 16]), body: CommandBody::Deploy(spec("m", 1, 1)) };
    let (first, effects) = apply(&mut state, &command);
    assert_eq!(first, Outcome::Deployed { version: 1, generation: 1, epoch: 2 });
    assert_eq!(effects, vec![Effect::EpochAdvanced { epoch: 2 }]);
    run(&mut state, CommandBody::Undeploy { name: "m".into() });

    let mut restored = snapshot::decode(&snapshot::encode(&state)).unwrap();
    assert_eq!(apply(&mut restored, &command), (first, vec![]), "a snapshot remembers it too");
    assert_eq!(restored, state, "the retry didn't deploy it again");
}

#[test]
fn a_rejection_is_remembered_as_well() {
    let mut state = registered(&[]);
    let command = Command { id: CommandId([9; 16]), body: CommandBody::Undeploy { name: "m".into() } };
    let rejected = Outcome::Rejected(Reject::UnknownModel { name: "m".into() });
    assert_eq!(apply(&mut state, &command).0, rejected);
    testkit::deploy(&mut state, "m", 1, 1);
    assert_eq!(apply(&mut state, &command).0, rejected);
    assert!(state.versions("m").next().is_some());
}

#[test]
fn remembered_commands_are_bounded_and_the_oldest_go_first() {
    let mut state = registered(&[]);
    for number in 0..=REMEMBERED_COMMANDS_MAX as u128 {
        let body = CommandBody::Undeploy { name: "m".into() };
        apply(&mut state, &Command { id: CommandId(number.to_be_bytes()), body });
    }
    assert_eq!(state.remembered.len(), REMEMBERED_COMMANDS_MAX);
    assert!(state.remembered.get(&CommandId(0_u128.to_be_bytes())).is_none());
    assert!(state.remembered.get(&CommandId(1_u128.to_be_bytes())).is_some());
}

/// style.md's story: the verdict on a past life must not harm the new one.
#[test]
fn a_worker_that_restarts_between_verdict_and_commit_keeps_its_replicas() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    register(&mut state, "w2", 2);
    let epoch = state.epoch;
    assert_eq!(mark_dead(&mut state, "w2", 1), stale("w2", 1, 2));
    assert_eq!(state.epoch, epoch);
    assert_eq!(hosts(&state, "m"), ["w1", "w2"]);
}

#[test]
fn the_dead_lose_their_replicas_and_come_back_only_as_a_new_life() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    let command = Command {
        id: CommandId([9; 16]),
        body: CommandBody::MarkDead { worker: w("w1"), incarnation: 1, cause: Cause::Unreachable },
    };
    let (_, effects) = apply(&mut state, &command);
    let fenced = Effect::WorkerFenced { worker: w("w1"), incarnation_min: 2 };
    assert_eq!(effects, vec![fenced, Effect::EpochAdvanced { epoch: state.epoch }]);
    assert_eq!(hosts(&state, "m"), ["w2"]);

    let epoch = state.epoch;
    assert_eq!(mark_dead(&mut state, "w1", 1), Outcome::Done { epoch }, "a repeated verdict is no news");
    assert_eq!(register(&mut state, "w1", 1), stale("w1", 1, 2), "it didn't know that it was dead");
    assert_eq!(ready(&mut state, "w1"), stale("w1", 1, 2));
    assert_eq!(register(&mut state, "w1", 2), Outcome::Done { epoch: epoch + 1 });
    assert_eq!(state.workers[&w("w1")].state, WorkerState::Ready);
}

#[test]
fn a_worker_is_removed_once_it_holds_nothing_and_comes_back_only_as_a_new_life() {
    let mut state = cluster(&["w1", "w2"], "m", 1);
    let at_work = |outcome: Outcome| matches!(outcome, Outcome::Rejected(Reject::WorkerAtWork { .. }));
    assert!(at_work(testkit::remove_worker(&mut state, "w1", 1)), "it takes part");
    testkit::drain(&mut state, "w1", 1);
    let refused = testkit::remove_worker(&mut state, "w1", 1);
    let Outcome::Rejected(reject) = refused else { panic!("{refused:?}") };
    assert!(reject.to_string().contains("leaving, and still holds 1 replica; `cresset drain w1 --wait`"), "{reject}");
    place(&mut state);
    ready(&mut state, "w2");
    place(&mut state);
    let command = Command { id: CommandId([9; 16]), body: CommandBody::RemoveWorker { worker: w("w1"), incarnation: 1 } };
    let (_, effects) = apply(&mut state, &command);
    let fenced = Effect::WorkerFenced { worker: w("w1"), incarnation_min: 2 };
    assert_eq!(effects, vec![fenced, Effect::EpochAdvanced { epoch: state.epoch }]);
    assert_eq!(state.workers[&w("w1")].state, WorkerState::Removed);
    assert!(routes::routes(&state).workers.iter().all(|route| route.worker != w("w1")));

    let epoch = state.epoch;
    assert_eq!(testkit::remove_worker(&mut state, "w1", 1), Outcome::Done { epoch }, "once more is no news");
    assert_eq!(register(&mut state, "w1", 1), stale("w1", 1, 2));
    assert_eq!(ready(&mut state, "w1"), stale("w1", 1, 2));
    assert_eq!(mark_dead(&mut state, "w1", 1), stale("w1", 1, 2), "a late verdict doesn't change what it is");
    assert_eq!(testkit::remove_worker(&mut state, "w1", 2), stale("w1", 2, 2));
    assert_eq!(snapshot::decode(&snapshot::encode(&state)).unwrap(), state);
    register(&mut state, "w1", 2);
    assert_eq!(state.workers[&w("w1")].state, WorkerState::Ready);

    mark_dead(&mut state, "w2", 1);
    assert!(matches!(testkit::remove_worker(&mut state, "w2", 1), Outcome::Done { .. }), "what is dead can go");
    assert_eq!(state.workers[&w("w2")].state, WorkerState::Removed);
}

#[test]
fn registering_again_with_the_same_life_is_no_news() {
    let mut state = cluster(&["w1"], "m", 1);
    let before = (state.epoch, state.replicas.clone());
    register(&mut state, "w1", 1);
    assert_eq!((state.epoch, state.replicas.clone()), before);

    let mut moved = testkit::registration("w1", 1);
    moved.grpc_address = "elsewhere:1".into();
    run(&mut state, CommandBody::RegisterWorker(moved));
    assert_eq!(state.workers[&w("w1")].grpc_address, "elsewhere:1");
    assert_eq!((state.epoch, &state.replicas), (before.0 + 1, &before.1), "only its address is new");
}

#[test]
fn a_leaving_worker_stays_leaving_under_a_new_leader_and_is_welcome_in_a_new_life() {
    let mut state = registered(&["w1"]);
    testkit::drain(&mut state, "w1", 1);
    register(&mut state, "w1", 1);
    assert_eq!(state.workers[&w("w1")].state, WorkerState::Draining);
    register(&mut state, "w1", 2);
    assert_eq!(state.workers[&w("w1")].state, WorkerState::Ready);
}

#[test]
fn a_new_life_starts_over_with_what_it_should_run() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    fail(&mut state, "w1", "out of memory");
    register(&mut state, "w1", 5);
    let replica = &state.replicas[&replica("m", 1, "w1")];
    assert_eq!((replica.state, replica.reason.as_str()), (ReplicaState::Assigned, ""));
    assert_eq!(register(&mut state, "w1", 4), stale("w1", 4, 5));
}

#[test]
fn deploying_the_same_again_changes_nothing() {
    let mut state = cluster(&["w1"], "m", 1);
    let before = (state.epoch, state.models.clone(), state.replicas.clone());
    let outcome = testkit::deploy(&mut state, "m", 1, 1);
    assert_eq!(outcome, Outcome::Deployed { version: 1, generation: 1, epoch: before.0 });
    assert_eq!((state.epoch, state.models.clone(), state.replicas.clone()), before);
}

#[test]
fn wanting_more_replicas_leaves_those_that_answer_alone() {
    let mut state = cluster(&["w1", "w2", "w3"], "m", 1);
    let outcome = testkit::deploy(&mut state, "m", 1, 3);
    assert!(matches!(outcome, Outcome::Deployed { generation: 1, .. }), "{outcome:?}");
    assert_eq!(state.replicas[&replica("m", 1, "w1")].state, ReplicaState::Ready);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w1", "w2", "w3"]);
    testkit::deploy(&mut state, "m", 1, 1);
    place(&mut state);
    assert_eq!(hosts(&state, "m"), ["w1"], "the one that answers stays");
}

#[test]
fn deploying_again_retries_what_failed_and_only_that() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    fail(&mut state, "w2", "out of memory");
    testkit::deploy(&mut state, "m", 1, 2);
    let w1 = &state.replicas[&replica("m", 1, "w1")];
    let w2 = &state.replicas[&replica("m", 1, "w2")];
    assert_eq!((w1.state, w1.generation), (ReplicaState::Ready, 1));
    assert_eq!((w2.state, w2.generation), (ReplicaState::Assigned, 2));
    ready(&mut state, "w2");
    assert_eq!(routes::routes(&state).models[0].shards[0], vec![w("w1"), w("w2")], "a later generation serves too");
}

#[test]
fn a_name_that_is_deployed_again_gets_a_generation_of_its_own() {
    let mut state = cluster(&["w1"], "m", 1);
    run(&mut state, CommandBody::Undeploy { name: "m".into() });
    assert_eq!((state.models.len(), state.replicas.len()), (0, 0));
    let outcome = testkit::deploy(&mut state, "m", 1, 1);
    assert!(matches!(outcome, Outcome::Deployed { generation: 2, .. }), "{outcome:?}");
}

#[test]
fn a_report_about_another_generation_or_life_is_not_heard() {
    let mut state = deployed(&["w1"], "m", 1);
    place(&mut state);
    let report = |generation, incarnation| CommandBody::ReportReplicas {
        worker: w("w1"),
        incarnation,
        replicas: vec![ReplicaReport {
            model: "m".into(),
            version: 1,
            shard: 0,
            generation,
            state: ReplicaState::Ready,
            reason: String::new(),
            memory_bytes: 0,
        }],
    };
    let epoch = state.epoch;
    assert_eq!(run(&mut state, report(0, 1)), Outcome::Done { epoch });
    assert_eq!(run(&mut state, report(1, 2)), stale("w1", 2, 1));
    assert_eq!(run(&mut state, report(1, 1)), Outcome::Done { epoch: epoch + 1 });
}

#[test]
fn long_reasons_are_cut_at_a_character() {
    let mut state = deployed(&["w1"], "m", 1);
    place(&mut state);
    fail(&mut state, "w1", &format!("x{}", "é".repeat(400)));
    let reason = &state.replicas[&replica("m", 1, "w1")].reason;
    assert_eq!(reason.len(), 511);
}

#[test]
fn a_plan_that_came_too_late_does_no_harm() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    let place_add = |add| CommandBody::Place { epoch_seen: 1, add, remove: vec![] };
    let place_remove = |remove| CommandBody::Place { epoch_seen: 1, add: vec![], remove };
    let rejected = Outcome::Rejected(Reject::StalePlan { epoch_seen: 1, epoch: state.epoch });
    for add in [replica("m", 1, "w1"), replica("m", 9, "w1"), replica("gone", 1, "w1"), replica("m", 1, "w9")] {
        assert_eq!(run(&mut state, place_add(vec![add])), rejected);
    }
    let no_surplus = place_remove(vec![replica("m", 1, "w1")]);
    assert_eq!(run(&mut state, no_surplus), rejected);

    testkit::drain(&mut state, "w1", 1);
    testkit::drain(&mut state, "w2", 1);
    let the_last_that_answers = place_remove(vec![replica("m", 1, "w1"), replica("m", 1, "w2")]);
    run(&mut state, the_last_that_answers);
    assert_eq!(hosts(&state, "m"), ["w1", "w2"]);
}

#[test]
fn nonsense_is_refused_by_name_and_limit() {
    let mut state = registered(&[]);
    let long = "x".repeat(513);
    let bad = [
        DeploySpec { name: "../m".into(), ..spec("m", 1, 1) },
        spec("m", 0, 1),
        spec("m", 1, 0),
        spec("m", 1, 1_001),
        DeploySpec { shards: 0, ..spec("m", 1, 1) },
        DeploySpec { digest: long.clone(), ..spec("m", 1, 1) },
        DeploySpec { config: vec![0; CONFIG_BYTES_MAX + 1].into(), ..spec("m", 1, 1) },
    ];
    for spec in bad {
        let outcome = deploy(&mut state, spec);
        assert!(matches!(outcome, Outcome::Rejected(Reject::Invalid { .. })), "{outcome:?}");
    }
    for incarnation in [0, u64::MAX] {
        let outcome = register(&mut state, "w1", incarnation);
        let expected = Reject::Invalid { field: "incarnation".into(), problem: "must be between 1 and 2^63-1".into() };
        assert_eq!(outcome, Outcome::Rejected(expected));
    }
    assert_eq!(state.epoch, 0);
}

#[test]
fn workers_are_bounded_and_the_longest_dead_give_way() {
    let mut state = registered(&[]);
    for number in 0..WORKERS_MAX {
        register(&mut state, &format!("w{number}"), 1 + number as u64);
    }
    let full = Outcome::Rejected(Reject::TooMany { what: "workers".into(), max: WORKERS_MAX as u64 });
    assert_eq!(register(&mut state, "one-more", 1), full);
    mark_dead(&mut state, "w7", 8);
    mark_dead(&mut state, "w5", 6);
    register(&mut state, "one-more", 1);
    assert_eq!(state.workers.len(), WORKERS_MAX);
    assert!(!state.workers.contains_key(&w("w5")) && state.workers.contains_key(&w("w7")));
}

#[test]
fn a_coordinator_that_moved_is_news_for_routers() {
    let mut state = founded();
    let announce = |address: &str| CommandBody::AnnouncePeer {
        peer: PeerId(2),
        info: PeerInfo { grpc_address: address.into(), http_address: "h".into(), peer_address: "p".into() },
    };
    assert_eq!(run(&mut state, announce("a:1")), Outcome::Done { epoch: 1 });
    assert_eq!(run(&mut state, announce("a:1")), Outcome::Done { epoch: 1 });
    assert_eq!(run(&mut state, announce("b:1")), Outcome::Done { epoch: 2 });
    assert_eq!(routes::routes(&state).coordinators, vec![(PeerId(2), "b:1".to_owned())]);
}

#[test]
fn bytes_of_a_later_level_are_refused_by_number() {
    let command = Command { id: CommandId([1; 16]), body: CommandBody::Undeploy { name: "m".into() } };
    let mut bytes = command.encode();
    assert_eq!(Command::decode(&bytes).unwrap(), command);
    bytes[0] = LEVEL_KNOWN + 1;
    assert!(
        matches!(Command::decode(&bytes), Err(DecodeError::Level { found, known: LEVEL_KNOWN, .. }) if found == LEVEL_KNOWN + 1)
    );
    assert!(snapshot::decode(&[]).is_err());
}

/// Worlds so small that commands keep meeting each other.
fn worker() -> impl Strategy<Value = WorkerId> {
    (1..=4_u8).prop_map(|n| w(&format!("w{n}")))
}

fn model() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a".to_owned(), "b".to_owned()])
}

fn replica_id() -> impl Strategy<Value = ReplicaId> {
    (model(), 1..=2_u64, 0..=1_u32, worker()).prop_map(|(model, version, shard, worker)| ReplicaId {
        model,
        version,
        shard,
        worker,
    })
}

fn deploy_spec() -> impl Strategy<Value = DeploySpec> {
    (model(), 0..=2_u64, 0..=3_u32, 1..=2_u32, 0..=1_u8).prop_map(|(name, version, replicas, shards, content)| DeploySpec {
        shards,
        config: vec![content].into(),
        ..spec(&name, version, replicas)
    })
}

fn replica_report() -> impl Strategy<Value = ReplicaReport> {
    let states = [ReplicaState::Assigned, ReplicaState::Loading, ReplicaState::Ready, ReplicaState::Failed];
    let fields = (replica_id(), 0..=6_u64, prop::sample::select(states.to_vec()), ".{0,4}");
    fields.prop_map(|(id, generation, state, reason)| ReplicaReport {
        model: id.model,
        version: id.version,
        shard: id.shard,
        generation,
        state,
        reason,
        memory_bytes: generation,
    })
}

/// A step of a history; what the leader would propose depends on the state, so it is named here and made later.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Body(CommandBody),
    Plan,
    AllReady(WorkerId),
}

pub(crate) fn step() -> impl Strategy<Value = Step> {
    let causes = [Cause::Silence, Cause::Unreachable, Cause::Operator];
    let body = prop_oneof![
        (0..=3_u64, ".{0,3}").prop_map(|(peer, address)| CommandBody::AnnouncePeer {
            peer: PeerId(peer),
            info: PeerInfo { grpc_address: address, http_address: String::new(), peer_address: String::new() },
        }),
        (worker(), 0..=5_u64)
            .prop_map(|(worker, incarnation)| CommandBody::RegisterWorker(testkit::registration(worker.as_str(), incarnation))),
        (worker(), 1..=5_u64).prop_map(|(worker, incarnation)| CommandBody::DrainWorker { worker, incarnation }),
        (worker(), 1..=5_u64, prop::sample::select(causes.to_vec()))
            .prop_map(|(worker, incarnation, cause)| CommandBody::MarkDead { worker, incarnation, cause }),
        deploy_spec().prop_map(CommandBody::Deploy),
        (deploy_spec(), any::<bool>(), any::<bool>()).prop_map(|(spec, both, only)| {
            let mut set = DeploySet { only, ..DeploySet::from(&spec) };
            if both {
                set.versions.push(VersionSpec { version: 3 - spec.version, ..set.versions[0].clone() });
            }
            CommandBody::DeploySet(set)
        }),
        model().prop_map(|name| CommandBody::Undeploy { name }),
        (model(), 1..=2_u64).prop_map(|(name, version)| CommandBody::UndeployVersion { name, version }),
        (model(), prop::collection::btree_map("[a-c1]", 0..=2_u64, 0..3))
            .prop_map(|(name, labels)| CommandBody::SetLabels { name, labels }),
        (0..=9_u64, vec(replica_id(), 0..4), vec(replica_id(), 0..4)).prop_map(|(epoch_seen, add, remove)| CommandBody::Place {
            epoch_seen,
            add,
            remove
        }),
        (worker(), 1..=5_u64, vec(replica_report(), 0..4))
            .prop_map(|(worker, incarnation, replicas)| CommandBody::ReportReplicas { worker, incarnation, replicas }),
    ];
    prop_oneof![5 => body.prop_map(Step::Body), 2 => Just(Step::Plan), 2 => worker().prop_map(Step::AllReady)]
}

pub(crate) fn take(state: &mut ClusterState, step: &Step) -> Command {
    let body = match step {
        Step::Body(body) => body.clone(),
        Step::Plan => {
            let plan = placement::plan(state, &placement::Policy::default(), &BTreeMap::new());
            CommandBody::Place { epoch_seen: plan.epoch, add: plan.add, remove: plan.remove }
        }
        Step::AllReady(worker) => {
            let replicas = state.replicas_on(worker).map(|(id, replica)| ReplicaReport {
                model: id.model.clone(),
                version: id.version,
                shard: id.shard,
                generation: replica.generation,
                state: ReplicaState::Ready,
                reason: String::new(),
                memory_bytes: 1,
            });
            let incarnation = state.workers.get(worker).map_or(1, |worker| worker.incarnation);
            CommandBody::ReportReplicas { worker: worker.clone(), incarnation, replicas: replicas.collect() }
        }
    };
    let command = Command { id: CommandId((state.remembered.len() as u128).to_be_bytes()), body };
    apply(state, &command);
    command
}

fn check_invariants(state: &ClusterState) {
    for (id, replica) in &state.replicas {
        let worker = state.workers.get(&id.worker).unwrap_or_else(|| panic!("{id:?} on an unknown worker"));
        assert_ne!(worker.state, WorkerState::Dead, "{id:?} on a dead worker");
        let deployment = state.models.get(&id.key()).unwrap_or_else(|| panic!("{id:?} of nothing deployed"));
        assert!(id.shard < deployment.shards, "{id:?}");
        assert!(replica.generation >= deployment.generation, "{id:?} of a past deployment");
        assert!(replica.former < replica.generation, "{id:?}");
        assert!(replica.former == 0 || replica.state != ReplicaState::Ready, "{id:?}");
    }
    for worker in state.workers.values() {
        let fenced = worker.incarnation_floor > worker.incarnation;
        assert_eq!(fenced, worker.state == WorkerState::Dead);
    }
    for (model, labels) in &state.labels {
        assert!(!labels.is_empty());
        for version in labels.values() {
            let deployment = &state.models[&ModelKey { name: model.clone(), version: *version }];
            assert!(!deployment.leaving, "a label on what leaves");
        }
    }
    for (key, deployment) in state.models.iter().filter(|(_, deployment)| deployment.leaving) {
        let stays = state.versions(&key.name).any(|(_, other)| !other.leaving);
        assert!(stays, "{key:?} makes room for nobody: {deployment:?}");
    }
    // A command settles the models that it is about; nothing remains to be settled of the others.
    let mut settled = state.clone();
    state.models.keys().for_each(|key| deployments::settle(&mut settled, &key.name));
    assert!(settled == *state, "something waits for nothing");
    for route in routes::routes(state).models {
        for worker in route.shards.iter().flatten() {
            assert_ne!(state.workers[worker].state, WorkerState::Dead);
        }
    }
}

/// The versions that have a replica which answers.
fn served(table: &routes::RouteTable) -> BTreeSet<ModelKey> {
    table.models.iter().filter(|model| !model.shards[0].is_empty()).map(|model| model.key.clone()).collect()
}

/// What workers and routers are told, without the epoch itself.
fn told(state: &ClusterState) -> (routes::RouteTable, Vec<Vec<routes::Assignment>>) {
    let table = routes::RouteTable { epoch: 0, ..routes::routes(state) };
    let assignments = state.workers.keys().map(|worker| routes::assignments(state, worker));
    (table, assignments.collect())
}

proptest! {
    #[test]
    fn any_history_keeps_the_invariants(steps in vec(step(), 1..60)) {
        let mut state = founded();
        for step in &steps {
            let (epoch_before, told_before) = (state.epoch, told(&state));
            let served_before = served(&told_before.0);
            let leaving: BTreeSet<ModelKey> =
                state.models.iter().filter(|(_, deployment)| deployment.leaving).map(|(key, _)| key.clone()).collect();
            let command = take(&mut state, step);
            check_invariants(&state);
            prop_assert!(state.epoch >= epoch_before);
            prop_assert!(state.epoch > epoch_before || told(&state) == told_before, "nobody would notice {command:?}");
            if matches!(command.body, CommandBody::Deploy(_) | CommandBody::DeploySet(_) | CommandBody::SetLabels { .. }) {
                let names = |table: &routes::RouteTable| -> BTreeSet<String> {
                    let served = table.models.iter().filter(|m| !m.shards.iter().any(Vec::is_empty));
                    served.map(|m| m.key.name.clone()).collect()
                };
                let cut_anew = told_before.0.models.iter().any(|m| m.shards.len() > 1)
                    || told(&state).0.models.iter().any(|m| m.shards.len() > 1);
                prop_assert!(cut_anew || names(&told_before.0).is_subset(&names(&told(&state).0)), "a deployment took a model away");
            }
            if matches!(command.body, CommandBody::Place { .. }) {
                let served_now = served(&told(&state).0);
                // A version that makes room for others may be gone with it, once they answer.
                let taken = served_before.difference(&served_now).find(|key| {
                    !leaving.contains(key) || !served_now.iter().any(|now| now.name == key.name)
                });
                prop_assert!(taken.is_none(), "a plan took the last replica that answers of {taken:?}");
                prop_assert!(served_now.is_subset(&served_before), "a plan answers nobody by itself");
            }
            prop_assert_eq!(&Command::decode(&command.encode()).unwrap(), &command);
            let mut twice = state.clone();
            let (outcome, effects) = apply(&mut twice, &command);
            prop_assert!(effects.is_empty());
            prop_assert_eq!(&Outcome::decode(&outcome.encode()).unwrap(), &outcome);
            prop_assert!(twice == state, "applied twice");
        }
        let mut restored = snapshot::decode(&snapshot::encode(&state)).unwrap();
        restored.members = state.members.clone(); // which Raft writes down
        prop_assert!(restored == state, "a snapshot lacks something");
    }

    #[test]
    fn any_history_leads_to_a_plan_that_is_accepted_whole_and_is_the_last(steps in vec(step(), 1..60), level in 1..=LEVEL_KNOWN) {
        let mut state = ClusterState { level, ..ClusterState::new("test") };
        steps.iter().for_each(|step| { take(&mut state, step); });
        let plan = testkit::plan(&state);
        let before: Vec<ReplicaId> = state.replicas.keys().cloned().collect();
        let outcome = place(&mut state);
        prop_assert!(matches!(outcome, Outcome::Done { .. }), "{:?} for {:?}", outcome, plan);
        // A version that made room for others may go with its last move.
        let kept = |id: &&ReplicaId| !plan.remove.contains(*id) && state.models.contains_key(&id.key());
        let expected: BTreeSet<&ReplicaId> = before.iter().filter(kept).chain(&plan.add).collect();
        prop_assert_eq!(state.replicas.keys().collect::<BTreeSet<_>>(), expected, "a move was refused");
        prop_assert!(placement::tests::only_evens_out(&testkit::plan(&state)));
    }

    #[test]
    fn noise_is_refused_and_never_panics(mut bytes in vec(any::<u8>(), 0..200), framed in any::<bool>()) {
        if framed && !bytes.is_empty() {
            bytes[0] = 1;
        }
        let _ = (Command::decode(&bytes).is_ok(), Outcome::decode(&bytes).is_ok(), snapshot::decode(&bytes).is_ok());
    }

    #[test]
    fn damaged_commands_never_panic(step in step(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let Step::Body(body) = step else { return Ok(()) };
        let mut bytes = Command { id: CommandId([7; 16]), body }.encode();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        if let Ok(command) = Command::decode(&bytes) {
            let mut state = cluster(&["w1", "w2"], "a", 2);
            apply(&mut state, &command);
            check_invariants(&state);
        }
    }
}
