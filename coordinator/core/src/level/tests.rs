use std::collections::BTreeMap;

use super::*;
use crate::{
    Command, CommandId, DecodeError, Outcome,
    claim::Claim,
    command::{DeploySet, VersionSpec},
    demands::Demands,
    members::{MemberChange, Members},
    placement, snapshot,
    state::{ModelKey, PeerInfo},
    testkit::{self, deploy, drain, mark_dead, place, ready, register, remove_worker, replica, run, spec, versions, w},
};

/// A state with something of everything that a state could hold before there were levels. It is made by commands, as every
/// state is, so that what they leave behind is in it too.
fn story() -> ClusterState {
    let mut state = ClusterState::new("before-levels");
    state.founders = (1..=3).map(PeerId).collect();
    state.origin = "checksum of a backup".into();
    state.members = Members { voters: (1..=3).map(PeerId).collect(), ..Members::default() };
    for peer in 1..=3 {
        let address = |port: u16| format!("host-{peer}:{port}");
        let info = PeerInfo { grpc_address: address(1), http_address: address(2), peer_address: address(3) };
        run(&mut state, CommandBody::AnnouncePeer { peer: PeerId(peer), info });
    }
    run(&mut state, CommandBody::ChangeMembers(MemberChange::Add { peer: PeerId(4), peer_address: "host-4:3".into() }));
    state.members.learners.insert(PeerId(4));
    run(&mut state, CommandBody::ChangeMembers(MemberChange::Remove { peer: PeerId(4) }));
    state.members.learners.clear();
    for worker in ["w1", "w2", "w3", "w4", "w5"] {
        register(&mut state, worker, 1);
    }
    let mut tagged = testkit::registration("w6", 7);
    tagged.tags.insert("gpu".into(), "h200".into());
    run(&mut state, CommandBody::RegisterWorker(tagged));
    run(&mut state, CommandBody::DeploySet(versions("several", &[1, 2], false)));
    run(&mut state, CommandBody::SetLabels { name: "several".into(), labels: BTreeMap::from([("stable".into(), 1)]) });
    let tags = BTreeMap::from([("gpu".to_owned(), "h200".to_owned())]);
    let demanding = VersionSpec {
        version: 1,
        digest: format!("{:064x}", 1),
        size_bytes: testkit::MIB,
        replicas_wanted: 1,
        demands: Demands { tags, ..Demands::default() },
        claim: Claim::default(),
    };
    let demanding = DeploySet { versions: vec![demanding], stored: true, ..DeploySet::from(&spec("demanding", 1, 1)) };
    run(&mut state, CommandBody::DeploySet(demanding));
    place(&mut state);
    for worker in ["w1", "w2", "w3", "w4", "w6"] {
        ready(&mut state, worker);
    }
    testkit::fail(&mut state, "w5", "out of memory");
    // Deployed anew with other content: it answers as what it was.
    run(&mut state, CommandBody::DeploySet(DeploySet { config: "other".into(), ..versions("several", &[2], false) }));
    mark_dead(&mut state, "w5", 1);
    drain(&mut state, "w4", 1);
    place(&mut state);
    deploy(&mut state, "single", 3, 1);
    place(&mut state);
    let single = state.replicas.keys().find(|id| id.model == "single").cloned().expect("it was placed");
    ready(&mut state, single.worker.as_str());
    let relieve = vec![replica("single", 3, single.worker.as_str())];
    let moved = CommandBody::Rearrange { epoch_seen: state.epoch, relieve, add: vec![], remove: vec![] };
    run(&mut state, moved);
    register(&mut state, "gone", 1);
    drain(&mut state, "gone", 1);
    remove_worker(&mut state, "gone", 1);
    run(&mut state, CommandBody::Undeploy { name: "nothing".into() });
    state
}

const SNAPSHOT: &[u8] = include_bytes!("../formats/level-1-snapshot.bin");
const REMOVE_WORKER: &[u8] = include_bytes!("../formats/level-1-remove-worker.bin");
const REARRANGE: &[u8] = include_bytes!("../formats/level-1-rearrange.bin");

fn raise_to(state: &mut ClusterState, level: Level) -> Outcome {
    run(state, CommandBody::RaiseLevel { level })
}

/// The fixtures were written by the last version without levels: the state by [`story`], as it was there, and the commands as
/// they were encoded there. So an upgraded coordinator reads them; and as long as the first level is in force it writes the
/// very same bytes, which those that aren't upgraded yet can read.
#[test]
fn what_was_written_before_there_were_levels_is_read_and_still_written() {
    let state = snapshot::decode(SNAPSHOT).unwrap();
    assert_eq!(state.level, LEVEL_FIRST);
    let again = story();
    assert_eq!(state, ClusterState { members: Members::default(), ..again.clone() }, "members are kept with the log");
    assert!(snapshot::encode(&again) == SNAPSHOT, "a coordinator of before couldn't read this snapshot");
    assert!(state.replicas.values().any(|replica| replica.moving) && state.replicas.values().any(|replica| replica.former > 0));

    // Logs of before have commands of what is the second level now. They were committed, so they are applied.
    let relieve = vec![replica("single", 3, "w1")];
    let rearrange = CommandBody::Rearrange { epoch_seen: 5, relieve, add: vec![], remove: vec![] };
    let remove = CommandBody::RemoveWorker { worker: w("gone"), incarnation: 1 };
    for (bytes, body) in [(REMOVE_WORKER, remove), (REARRANGE, rearrange)] {
        let command = Command::decode(bytes).unwrap();
        assert_eq!(command, Command { id: CommandId([7; 16]), body });
        assert_eq!((bytes[0], command.encode()[0]), (1, 2), "from now on its reader is told what it has to know");
        assert_eq!(command.encode()[1..], bytes[1..]);
    }
}

#[test]
fn a_state_beyond_the_level_that_is_known_is_refused_by_name() {
    let mut state = story();
    raise_to(&mut state, 2);
    let bytes = snapshot::encode(&state);
    assert_eq!(snapshot::decode(&bytes).unwrap().level, 2);
    assert_eq!(
        snapshot::decode_knowing(1, &bytes).unwrap_err().to_string(),
        "snapshot is of feature level 2, this version of Cresset knows levels up to 1; install a later one"
    );
    let raise = Command { id: CommandId([9; 16]), body: CommandBody::RaiseLevel { level: 2 } }.encode();
    let error = Command::decode_knowing(1, &raise).unwrap_err().to_string();
    assert!(error.starts_with("command is of feature level 2, this version of Cresset knows levels up to 1"), "{error}");
    // What a later version wrote may have any shape behind its first byte.
    assert!(matches!(snapshot::decode(&[LEVEL_KNOWN + 1, 0xc1]), Err(DecodeError::Level { .. })));
    assert!(matches!(Command::decode(&[LEVEL_KNOWN + 1]), Err(DecodeError::Level { .. })));
    assert!(matches!(snapshot::decode(&[0, 0xc1]), Err(DecodeError::Level { .. })));
}

#[test]
fn a_level_rises_once_every_member_knows_it_and_never_falls() {
    let mut state = testkit::founded();
    state.level = LEVEL_FIRST;
    let known = |levels: &[(u64, Level)]| levels.iter().map(|(peer, level)| (PeerId(*peer), *level)).collect();
    assert_eq!(to_raise(&state, &known(&[(1, 2), (2, 2)])), None, "the third hasn't said anything");
    assert_eq!(to_raise(&state, &known(&[(1, 2), (2, 2), (3, 1)])), None, "the third isn't upgraded");
    assert_eq!(to_raise(&state, &known(&[(1, 4), (2, 2), (3, 3), (9, 1)])), Some(2), "who isn't a member has no say");
    state.members.learners.insert(PeerId(4));
    assert_eq!(to_raise(&state, &known(&[(1, 2), (2, 2), (3, 2)])), None, "a learner has to read everything too");
    assert_eq!(to_raise(&ClusterState::new("joins"), &known(&[(1, 2)])), None, "it doesn't know yet who the members are");

    let epoch = state.epoch;
    assert_eq!(raise_to(&mut state, 2), Outcome::Done { epoch });
    assert_eq!(raise_to(&mut state, 1), Outcome::Done { epoch });
    assert_eq!(state.level, 2);
    assert_eq!(to_raise(&state, &known(&[(1, 2), (2, 2), (3, 2), (4, 2)])), None);
    assert_eq!(state.clone().reborn("new", "").level, 2, "what was written at a level needs it in the new group too");
}

#[test]
fn what_needs_more_than_is_in_force_is_refused_with_the_way_out() {
    let remove = CommandBody::RemoveWorker { worker: w("w1"), incarnation: 1 };
    assert_eq!(remove.needs().met_by(2), Ok(()));
    assert_eq!(
        remove.needs().met_by(1).unwrap_err().to_string(),
        "removing a worker needs feature level 2, and 1 is in force, since not every coordinator is known to know 2; finish the \
         upgrade: `cresset status` shows who holds it up"
    );
    let mut set = versions("m", &[1], false);
    assert_eq!(CommandBody::DeploySet(set.clone()).needs().met_by(1), Ok(()));
    set.versions[0].claim.priority = 1;
    assert!(CommandBody::DeploySet(set).needs().met_by(1).is_err(), "a reader of before would take no notice of its priority");
    assert_eq!(CommandBody::RaiseLevel { level: 7 }.needs().met_by(1), Ok(()));
    assert_eq!(CommandBody::Undeploy { name: "m".into() }.needs().met_by(1), Ok(()));
}

#[test]
fn how_many_models_there_may_be_is_the_same_for_every_coordinator() {
    let mut state = testkit::registered(&["w1"]);
    deploy(&mut state, "m", 1, 1);
    let like = state.models.values().next().unwrap().clone();
    for number in 1..MODELS_MAX_FIRST {
        state.models.insert(ModelKey { name: format!("m-{number}"), version: 1 }, like.clone());
    }
    let deploys = |state: &ClusterState| run(&mut state.clone(), CommandBody::DeploySet(versions("one-more", &[1], false)));
    state.level = LEVEL_FIRST;
    assert!(matches!(deploys(&state), Outcome::Rejected(_)), "as one that isn't upgraded yet says");
    state.level = LEVEL_MODELS;
    assert!(matches!(deploys(&state), Outcome::DeployedSet { .. }));
}

#[test]
fn before_everybody_can_read_of_a_move_none_is_planned() {
    let mut state = testkit::cluster(&["w1", "w2"], "m", 1);
    let host = state.replicas.keys().next().unwrap().worker.clone();
    let seen = placement::Seen { avoided: [host.clone()].into(), abandoned: [host].into(), ..placement::Seen::default() };
    let plan = |state: &ClusterState| placement::plan_seeing(state, &placement::Policy::default(), &seen);
    assert!(matches!(plan(&state).into_command(), CommandBody::Rearrange { .. }));
    state.level = LEVEL_FIRST;
    assert!(plan(&state).is_empty());
}
