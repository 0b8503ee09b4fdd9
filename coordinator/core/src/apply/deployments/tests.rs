use std::collections::BTreeMap;

use super::*;
use crate::{
    Command, CommandBody, CommandId, placement, routes, snapshot,
    status::{ModelState, ModelStatus, models},
    testkit::{cluster, deploy, fail_version, place, ready, ready_version, registered, replica, run, spec, versions, w},
};

fn deploy_set(state: &mut ClusterState, name: &str, numbers: &[u64], only: bool) -> Outcome {
    run(state, CommandBody::DeploySet(versions(name, numbers, only)))
}

fn set(state: &mut ClusterState, name: &str, labels: &[(&str, u64)]) -> Outcome {
    let labels = labels.iter().map(|(label, version)| ((*label).to_owned(), *version)).collect();
    run(state, CommandBody::SetLabels { name: name.into(), labels })
}

fn served(state: &ClusterState) -> Vec<(u64, Generation, usize)> {
    let table = routes::routes(state);
    table.models.iter().map(|route| (route.key.version, route.generation, route.shards[0].len())).collect()
}

fn statuses(state: &ClusterState) -> Vec<ModelStatus> {
    models(state, &placement::plan(state, &placement::Policy::default(), &BTreeMap::new()))
}

#[test]
fn a_set_of_versions_is_served_side_by_side() {
    let mut state = registered(&["w1", "w2"]);
    let outcome = deploy_set(&mut state, "m", &[1, 2], true);
    assert_eq!(outcome, Outcome::DeployedSet { versions: vec![(1, 1), (2, 2)], epoch: state.epoch });
    place(&mut state);
    ready(&mut state, "w1");
    ready(&mut state, "w2");
    assert_eq!(served(&state), [(1, 1, 2), (2, 2, 2)]);
    assert!(statuses(&state).iter().all(|status| status.state == ModelState::Ready));
}

#[test]
fn a_version_that_makes_room_answers_until_the_others_have_come() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    deploy_set(&mut state, "m", &[2], true);
    assert_eq!(served(&state), [(1, 1, 2), (2, 2, 0)]);
    assert!(statuses(&state)[0].leaving);
    place(&mut state);
    ready_version(&mut state, "w1", 2);
    assert_eq!(served(&state), [(1, 1, 2), (2, 2, 1)], "the other replica is on its way");
    ready_version(&mut state, "w2", 2);
    assert_eq!(served(&state), [(2, 2, 2)]);
    assert!(state.replicas.keys().all(|id| id.version == 2));
}

#[test]
fn a_version_that_cannot_come_up_takes_nobodys_place() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    deploy_set(&mut state, "m", &[2], true);
    place(&mut state);
    fail_version(&mut state, "w1", 2, "model.pt is truncated");
    fail_version(&mut state, "w2", 2, "model.pt is truncated");
    assert_eq!(served(&state), [(1, 1, 2), (2, 2, 0)]);
    let new = &statuses(&state)[1];
    assert_eq!((new.state, new.stuck, new.reason.as_str()), (ModelState::Failed, true, "w1: model.pt is truncated"));
    // Back to what there was: it stays, and the broken one goes at once.
    deploy_set(&mut state, "m", &[1], true);
    assert_eq!(served(&state), [(1, 1, 2)]);
}

#[test]
fn one_version_more_leaves_the_others_alone() {
    let mut state = cluster(&["w1"], "m", 1);
    deploy_set(&mut state, "m", &[7], false);
    place(&mut state);
    ready(&mut state, "w1");
    assert_eq!(served(&state), [(1, 1, 1), (7, 2, 1)]);
    run(&mut state, CommandBody::UndeployVersion { name: "m".into(), version: 1 });
    assert_eq!(served(&state), [(7, 2, 1)]);
    let gone = run(&mut state, CommandBody::UndeployVersion { name: "m".into(), version: 1 });
    assert_eq!(gone, Outcome::Rejected(Reject::UnknownVersion { name: "m".into(), version: 1 }));
}

#[test]
fn a_reload_answers_as_what_it_was_until_the_new_one_is_ready() {
    let mut state = cluster(&["w1", "w2"], "m", 2);
    let other = DeploySpec { config: "other".into(), ..spec("m", 1, 2) };
    run(&mut state, CommandBody::Deploy(other.clone()));
    assert_eq!(served(&state), [(1, 1, 2)], "the old generation, on both");
    assert_eq!(routes::routes(&state).models[0].config, "m 1");
    let status = &statuses(&state)[0];
    assert_eq!((status.state, status.replicas_ready), (ModelState::Degraded, 0));
    assert_eq!(status.reason, "2 replicas are loading; what was deployed before answers");
    ready(&mut state, "w1");
    assert_eq!(served(&state), [(1, 2, 2)], "the new one, and w2 still answers as it can");
    assert_eq!(routes::routes(&state).models[0].config, "other");
    ready(&mut state, "w2");
    assert_eq!(served(&state), [(1, 2, 2)]);
    assert_eq!(state.models.values().next().unwrap().former, None, "nothing is kept of the old one");
    assert_eq!(statuses(&state)[0].state, ModelState::Ready);
}

#[test]
fn a_reload_that_fails_keeps_the_old_one_and_says_why() {
    let mut state = cluster(&["w1"], "m", 1);
    let broken = DeploySpec { digest: "x".into(), ..spec("m", 1, 1) };
    run(&mut state, CommandBody::Deploy(broken.clone()));
    fail_version(&mut state, "w1", 1, "model.pt is truncated");
    assert_eq!(served(&state), [(1, 1, 1)]);
    let status = &statuses(&state)[0];
    assert_eq!((status.state, status.stuck), (ModelState::Degraded, true));
    assert_eq!(status.reason, "w1: model.pt is truncated; what was deployed before answers");
    // The same again is another try, and the old one still answers.
    run(&mut state, CommandBody::Deploy(broken));
    assert_eq!(served(&state), [(1, 1, 1)]);
    // What is loaded dies with its worker's life.
    crate::testkit::register(&mut state, "w1", 2);
    assert_eq!(served(&state), [(1, 2, 0)]);
}

#[test]
fn labels_move_together_or_not_at_all() {
    let mut state = cluster(&["w1"], "m", 1);
    deploy_set(&mut state, "m", &[2], false);
    set(&mut state, "m", &[("stable", 1), ("canary", 2)]);
    let labels = |state: &ClusterState| routes::routes(state).labels;
    let both = vec![("m".to_owned(), "canary".to_owned(), 2), ("m".to_owned(), "stable".to_owned(), 1)];
    assert_eq!(labels(&state), both);
    let epoch = state.epoch;
    let unknown = Outcome::Rejected(Reject::UnknownVersion { name: "m".into(), version: 9 });
    assert_eq!(set(&mut state, "m", &[("canary", 1), ("stable", 9)]), unknown);
    assert_eq!((labels(&state), state.epoch), (both, epoch));
    assert_eq!(set(&mut state, "m", &[("canary", 0), ("stable", 2)]), Outcome::Done { epoch: epoch + 1 });
    assert_eq!(labels(&state), [("m".to_owned(), "stable".to_owned(), 2)]);
    assert_eq!(statuses(&state)[1].labels, ["stable"]);
    for bad in ["", "3", "-1", "1st", "a/b", &"x".repeat(65)] {
        let refused = set(&mut state, "m", &[(bad, 1)]);
        assert!(matches!(refused, Outcome::Rejected(Reject::Invalid { .. })), "{bad}: {refused:?}");
    }
    assert_eq!(set(&mut state, "n", &[("a", 1)]), Outcome::Rejected(Reject::UnknownModel { name: "n".into() }));
    for number in 0..LABELS_MAX - 1 {
        set(&mut state, "m", &[(&format!("l{number}"), 1)]);
    }
    assert!(matches!(set(&mut state, "m", &[("more", 1)]), Outcome::Rejected(Reject::Invalid { .. })));
    run(&mut state, CommandBody::Undeploy { name: "m".into() });
    assert_eq!(*state.labels, BTreeMap::new());
}

#[test]
fn a_version_with_a_label_stays() {
    let mut state = cluster(&["w1"], "m", 1);
    set(&mut state, "m", &[("stable", 1)]);
    let refused = run(&mut state, CommandBody::UndeployVersion { name: "m".into(), version: 1 });
    assert!(matches!(refused, Outcome::Rejected(Reject::Labelled { version: 1, .. })), "{refused:?}");
    deploy_set(&mut state, "m", &[2], true);
    place(&mut state);
    ready(&mut state, "w1");
    assert_eq!(served(&state), [(1, 1, 1), (2, 2, 1)]);
    // A label can't be put on what is on its way out.
    set(&mut state, "m", &[("stable", 0)]);
    deploy_set(&mut state, "m", &[3], true);
    assert!(matches!(set(&mut state, "m", &[("stable", 1)]), Outcome::Rejected(Reject::UnknownVersion { .. })));
}

#[test]
fn a_set_is_checked_as_a_whole() {
    let mut state = registered(&["w1"]);
    let many: Vec<u64> = (1..=VERSIONS_MAX as u64 + 1).collect();
    for numbers in [&[][..], &[1, 1], &[1, 0], &many] {
        let refused = deploy_set(&mut state, "m", numbers, true);
        assert!(matches!(refused, Outcome::Rejected(Reject::Invalid { .. })), "{numbers:?}: {refused:?}");
    }
    assert_eq!(state.models.len(), 0);
}

/// Bytes that the format's first writer left: what was deployed goes on, and the log is understood.
#[test]
fn what_an_earlier_version_wrote_is_read() {
    let mut state = snapshot::decode(include_bytes!("../../formats/snapshot.bin")).unwrap();
    assert_eq!(state.models.len(), 2);
    let (key, deployment) = state.models.iter().next().unwrap();
    assert_eq!((key.name.as_str(), key.version, deployment.leaving, &deployment.former), ("m", 1, false, &None));
    assert_eq!(served(&state)[0], (1, 1, 1), "one of its replicas had failed");
    assert_eq!(state.replicas[&replica("m", 1, "w1")].former, 0);
    let command = |bytes: &[u8]| Command::decode(bytes).unwrap();
    let deploy = command(include_bytes!("../../formats/deploy.bin"));
    assert_eq!(deploy, Command { id: CommandId([9; 16]), body: CommandBody::Deploy(spec("m", 2, 1)) });
    assert!(matches!(crate::apply(&mut state, &deploy).0, Outcome::Deployed { version: 2, .. }));
    let undeploy = command(include_bytes!("../../formats/undeploy.bin"));
    assert!(matches!(crate::apply(&mut state, &undeploy).0, Outcome::Done { .. }));
    assert!(state.versions("m").next().is_none());
    assert_eq!(snapshot::decode(&snapshot::encode(&state)).unwrap(), state);
}

#[test]
fn replicas_of_several_versions_are_each_versions_own() {
    let mut state = registered(&["w1", "w2", "w3"]);
    deploy(&mut state, "m", 1, 1);
    let mut more = versions("m", &[2], false);
    more.versions[0].replicas_wanted = 3;
    run(&mut state, CommandBody::DeploySet(more));
    place(&mut state);
    let hosts = |version| state.replicas.keys().filter(|id| id.version == version).count();
    assert_eq!((hosts(1), hosts(2)), (1, 3));
    assert!(state.replicas.contains_key(&replica("m", 2, "w3")) && w("w3").as_str() == "w3");
}
