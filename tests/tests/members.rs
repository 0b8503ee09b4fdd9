//! Coordinators come and go, and leadership moves: no caller sees it.

use std::{fs, sync::Arc, time::Duration};

use cresset_proto::{
    admin::v1::{
        AddMember, ChangeMembersRequest, CoordinatorRole, Member, MemberRole, MembersRequest, StatusResponse,
        admin_service_client::AdminServiceClient, change_members_request::Change,
    },
    inference::grpc_inference_service_client::GrpcInferenceServiceClient,
};
use cresset_tests::harness::{Cluster, ModelRepository, leader_of};
use rustix::process::Signal;
use tokio::time::timeout;

use crate::{
    beside::{Beside, blocks, done, peer_address, shell},
    support::{Load, PATIENCE, Target, admin, cluster, command, inference, others, plus_one},
};

const RUNBOOK: &str = "deploy/runbooks/replace-a-dead-coordinator.md";

/// The settings of the runbook, with the addresses and folders of this test.
fn configure(new: &Beside, settings: &str, cluster: &Cluster, repository: &ModelRepository, id: &str) {
    let cluster_id = fs::read_to_string(cluster.data_dir().join("cluster-id")).unwrap();
    let name = format!("\"{}\"", cluster_id.trim());
    let (first, third) = (peer_address(cluster, "c1"), peer_address(cluster, "c3"));
    let replaced = [
        // First: the others bring names that are drawn by chance, and may have a c4 in them.
        ("c4", id),
        ("10.0.0.1:8003", &*first),
        ("10.0.0.3:8003", &third),
        ("10.0.0.4", &new.host),
        ("\"production\"", &name),
        ("/srv/models", repository.path().to_str().unwrap()),
    ];
    new.configure(settings, &replaced);
}

/// Load through the Rust client and through one coordinator.
async fn load(cluster: &Cluster, gateway: &str) -> Load {
    let client = Target::Client(Arc::new(cluster.client().await.unwrap()));
    Load::start(&[client, Target::Gateway(inference(cluster, gateway).await)], 2)
}

async fn members(cluster: &Cluster, through: &str) -> Vec<Member> {
    let answer = admin(cluster, through).await.members(MembersRequest {}).await.unwrap().into_inner();
    assert!(answer.current, "{answer:?}");
    answer.members
}

fn with_role(members: &[Member], role: MemberRole) -> Vec<&str> {
    members.iter().filter(|member| member.role() == role).map(|member| member.id.as_str()).collect()
}

/// Waits until a coordinator is in this role and has all that the leader had when it was looked at.
pub async fn caught_up(cluster: &Cluster, id: &str, role: CoordinatorRole) {
    let is_there = |status: &StatusResponse| {
        let committed = leader_of(status)?.commit_index;
        status.coordinators.iter().find(|c| c.id == id && c.role() == role && c.applied_index >= committed).map(drop)
    };
    cluster.wait_for(&format!("{id} as {}", role.as_str_name()), PATIENCE, is_there).await.unwrap();
}

/// Does what the runbook says when `c2` is lost: a new coordinator takes its place as `c4`.
pub async fn replace_c2(cluster: &Cluster, repository: &ModelRepository, new: &mut Beside) {
    let survivors: Vec<String> = ["c1", "c3"].iter().map(|id| cluster.grpc(id).unwrap().to_owned()).collect();
    let leads = |status: &StatusResponse| leader_of(status).filter(|leader| leader.id != "c2").map(drop);
    cluster.wait_for("a leader that lives", PATIENCE, leads).await.unwrap();

    let [settings] = blocks(RUNBOOK, "toml").try_into().unwrap();
    configure(new, &settings, cluster, repository, "c4");
    let steps: [String; 6] = blocks(RUNBOOK, "sh").try_into().expect("six steps");
    let [look, add, start, wait, promote, last] = steps.map(|step| step.replace("10.0.0.4", &new.host));
    let folder = new.folder.path().to_owned();
    let run = |block: &str| done(shell(block, &survivors, &folder));
    let listed = run(&look);
    assert!(listed.contains("the next to be added is c4"), "{listed}");
    run(&add);
    assert_eq!(start.trim(), "cresset-coordinator --config coordinator.toml");
    new.start();
    caught_up(cluster, "c4", CoordinatorRole::Learner).await;
    let listed = run(&wait);
    let row = listed.lines().find(|line| line.starts_with("c4")).unwrap();
    assert!(row.contains("learner") && row.contains("yes") && row.contains(&format!("{}:8003", new.host)), "{listed}");
    run(&promote);
    let listed = run(&last);
    let voters: Vec<_> = listed.lines().filter(|line| line.contains("voter")).map(|line| &line[..2]).collect();
    assert_eq!(voters, ["c1", "c3", "c4"], "{listed}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_coordinator_is_replaced_as_the_runbook_says() {
    let repository = plus_one();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    let load = load(&cluster, "c1").await;
    load.more(200).await;
    cluster.kill("c2").unwrap();
    let mut new = Beside::new(4);
    replace_c2(&cluster, &repository, &mut new).await;
    let folder = new.folder.path().to_owned();

    // The new one counts: with one more gone, the two that are left agree.
    cluster.kill("c3").unwrap();
    let one = [cluster.grpc("c1").unwrap().to_owned()];
    assert!(done(shell("cresset deploy plus_one --replicas 1 --wait", &one, &folder)).contains("is ready"));
    load.more(200).await;
    let outcome = load.end().await;
    println!("{} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());

    // The dead one comes back, says that it was removed, and ends.
    cluster.restart_process("c2").unwrap();
    let log = cluster.data_dir().join("logs/c2.log");
    cluster.process("c2").unwrap().wait(PATIENCE).unwrap();
    let log = fs::read_to_string(log).unwrap();
    assert!(log.contains("this coordinator, c2, was removed from the cluster"), "{log}");
    let refused = shell(&format!("cresset member add c2 {}:8003", new.host), &one, &folder);
    assert!(refused.code == Some(1) && refused.stderr.contains("take c3 or above"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_learner_serves_clients_and_has_no_vote() {
    let repository = plus_one();
    let cluster = cluster(3, 2, &repository, &["plus_one"]);
    let mut new = Beside::new(5);
    let [settings] = blocks(RUNBOOK, "toml").try_into().unwrap();
    configure(&new, &settings, &cluster, &repository, "c9");
    // The settings name c1 and c3 only, as in the runbook.
    assert_eq!(command(&cluster, &["leader", "transfer", "c1"]).code, Some(0));
    // It may be there before it is added; nobody knows it, and it does nothing.
    new.start();
    let change = Change::Add(AddMember { id: "c9".into(), peer_address: format!("{}:8003", new.host) });
    let request = ChangeMembersRequest { command_id: vec![7; 16].into(), change: Some(change) };
    // Through a follower, and again through another: it is done once.
    let leader = cluster.leader().await.unwrap();
    for through in others(&cluster, &leader) {
        admin(&cluster, &through).await.change_members(request.clone()).await.unwrap();
    }
    caught_up(&cluster, "c9", CoordinatorRole::Learner).await;
    let known = members(&cluster, &leader).await;
    assert_eq!(with_role(&known, MemberRole::Learner), ["c9"]);
    assert_eq!(with_role(&known, MemberRole::Voter), ["c1", "c2", "c3"]);

    let address = format!("http://{}:8001", new.host);
    let gateway = GrpcInferenceServiceClient::connect(address.clone()).await.unwrap();
    let load = Load::start(&[Target::Gateway(gateway)], 2);
    load.more(200).await;
    // It takes writes, by handing them on, and reads what is current.
    let mut beside = AdminServiceClient::connect(address).await.unwrap();
    let listed = beside.members(MembersRequest {}).await.unwrap().into_inner();
    assert_eq!(
        listed.members,
        members(&cluster, &leader).await.into_iter().zip(&listed.members).map(as_told).collect::<Vec<_>>()
    );
    let to_learner = command(&cluster, &["leader", "transfer", "c9"]);
    assert!(to_learner.code == Some(1) && to_learner.stderr.contains("c9 isn't a voter"), "{to_learner:?}");
    // Its end stops nothing.
    let outcome = load.end().await;
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert_eq!(command(&cluster, &["member", "remove", "c9"]).code, Some(0));
    let (code, log) = new.ended().await;
    assert!(code == Some(1) && log.contains("this coordinator, c9, was removed from the cluster"), "{code:?}\n{log}");
    assert_eq!(with_role(&members(&cluster, &leader).await, MemberRole::Learner), Vec::<&str>::new());
}

/// How far a member is changes from one look to the next.
fn as_told((now, told): (Member, &Member)) -> Member {
    Member { behind: told.behind, ..now }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_moves_by_command_and_at_an_orderly_end() {
    let repository = plus_one();
    let cluster = cluster(3, 2, &repository, &["plus_one"]);
    let first = cluster.leader().await.unwrap();
    let [second, third] = others(&cluster, &first).try_into().unwrap();
    let load = load(&cluster, &third).await;
    load.more(200).await;
    let moved = command(&cluster, &["leader", "transfer", &second, "-o", "json"]);
    assert_eq!((moved.code, moved.json()["leader"].as_str()), (Some(0), Some(second.as_str())), "{moved:?}");
    let again = command(&cluster, &["leader", "transfer", &second]);
    assert_eq!((again.code, again.stdout.as_str()), (Some(0), format!("{second} leads\n").as_str()));
    load.more(100).await;

    // It hands over before it goes.
    cluster.process(&second).unwrap().signal(Signal::TERM).unwrap();
    cluster.process(&second).unwrap().wait(PATIENCE).unwrap();
    let log = fs::read_to_string(cluster.data_dir().join(format!("logs/{second}.log"))).unwrap();
    assert!(log.contains("handed over leadership"), "{log}");
    let next = cluster.leader().await.unwrap();
    assert!(next == first || next == third, "{next}");

    // With one gone, the other two are needed, and nobody may take one of them away.
    let silent = |status: &StatusResponse| {
        status.coordinators.iter().find(|c| c.id == second && c.role() == CoordinatorRole::Unreachable).map(drop)
    };
    cluster.wait_for("the silence of one", PATIENCE, silent).await.unwrap();
    let refused = refused_removal(&cluster, &third).await;
    assert!(refused.contains("nothing could be agreed on any more") && refused.contains("2 must"), "{refused}");
    let behind = command(&cluster, &["leader", "transfer", &second]);
    assert!(behind.code == Some(1) && behind.stderr.contains(&format!("{second} doesn't answer")), "{behind:?}");
    assert_eq!(command(&cluster, &["member", "remove", &second]).code, Some(0), "the one that is gone can go");
    load.more(100).await;
    let outcome = load.end().await;
    println!("{} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(outcome.slowest < Duration::from_secs(5), "{:?}", outcome.slowest);
}

/// What is said to who would remove one of the last two that answer. The leader may still count on the one that has just gone;
/// then it isn't asked yet.
async fn refused_removal(cluster: &Cluster, id: &str) -> String {
    let gone = async {
        loop {
            let known = members(cluster, id).await;
            if known.iter().filter(|member| !member.answers).count() == 1 {
                return;
            }
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, gone).await.expect("the leader notices");
    let refused = command(cluster, &["member", "remove", id]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    refused.stderr
}
