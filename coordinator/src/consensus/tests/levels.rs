//! Groups of several versions: those of before, whose place is taken by ones that pretend to know no more.
use cresset_core::{
    WorkerId,
    level::{LEVEL_FIRST, LEVEL_KNOWN},
    members::MemberChange,
};

use super::*;
use crate::leader;

/// A third of the group isn't upgraded yet.
fn third_is_old(settings: &mut Settings) {
    frequent_snapshots(settings);
    if settings.id == 3 {
        settings.level_known = LEVEL_FIRST;
    }
}

fn frequent_snapshots(settings: &mut Settings) {
    (settings.snapshot_entries, settings.keep_entries) = (10, 5);
}

/// The last one comes later, and isn't upgraded.
fn fourth_joins_and_is_old(settings: &mut Settings) {
    if settings.id == 4 {
        (settings.join, settings.level_known) = (true, LEVEL_FIRST);
    }
}

impl Cluster {
    /// Has a member do the leader's duties, whenever it leads.
    fn on_duty(&self, id: u64) {
        let Member { runtime, consensus, .. } = &self.members[&id];
        let runtime = runtime.0.as_ref().expect("it runs");
        let (settings, shutdown) = (leader::Settings::default(), CancellationToken::new());
        let _entered = runtime.enter();
        let probe = leader::probe::over_grpc(settings.probe_timeout_ms);
        let (leader, ..) = leader::new(consensus.clone(), settings, probe, shutdown.clone());
        runtime.spawn(leader.run(shutdown));
    }

    async fn level_is(&self, level: u8) {
        for (id, member) in &self.members {
            let mut applied = member.consensus.applied();
            let reached = applied.wait_for(|_| member.consensus.state().level == level);
            let reached = tokio::time::timeout(PATIENCE, reached).await.is_ok();
            assert!(reached, "c{id} isn't at level {level}");
        }
    }

    /// Starts a member that is too old, and says why it ends.
    async fn refuses_to_start(&self, id: u64) -> String {
        match start(&self.settings(id), ClusterState::new("test")) {
            Err(error) => error.to_string(),
            Ok((_consensus, _server, mut driver)) => {
                let ended = tokio::time::timeout(PATIENCE, driver.ended()).await.expect("it goes on");
                ended.unwrap_err().to_string()
            }
        }
    }

    /// Waits until this member hears from so many, itself included.
    async fn hears(&self, id: u64, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.members[&id].consensus.levels_known().len() < count {
            assert!(Instant::now() < deadline, "c{id} hears {:?}", self.members[&id].consensus.levels_known());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A command of the second level. There is no such worker, but that is the state's to say.
fn remove_worker(n: u8) -> Command {
    let worker: WorkerId = "w1".parse().unwrap();
    Command { id: CommandId([n; 16]), body: CommandBody::RemoveWorker { worker, incarnation: 1 } }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rolling_upgrade_ends_with_the_level_that_the_last_one_brings() {
    let mut cluster = Cluster::new(third_is_old).await;
    (1..=3).for_each(|id| cluster.on_duty(id));
    let leader = cluster.elected().await;
    cluster.hears(leader, 3).await;
    for n in 1..=30 {
        cluster.propose(1 + n % 3, n).await;
    }
    // Many times as long as the leader takes to raise it, once it may.
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.level_is(LEVEL_FIRST).await;
    let follower = leader % 3 + 1;
    for through in [leader, follower] {
        let refused = cluster.members[&through].consensus.propose(&remove_worker(200)).await.unwrap_err();
        assert!(
            matches!(&refused, ProposeError::Refused { problem } if problem.contains("removing a worker needs feature level 2, and 1 is in force")),
            "{refused:?}"
        );
    }

    // The last one is upgraded: a later version starts from what the earlier one left.
    cluster.kill(3).await;
    cluster.adjust = frequent_snapshots;
    cluster.start(3).await;
    cluster.on_duty(3);
    cluster.level_is(LEVEL_KNOWN).await;
    cluster.agreed(30).await;
    let through = &cluster.members[&follower].consensus;
    let outcome = through.propose_retrying(&remove_worker(201), Instant::now() + PATIENCE).await.unwrap();
    assert!(matches!(outcome, Outcome::Rejected(cresset_core::Reject::UnknownWorker { .. })), "{outcome:?}");

    // It stays in force for those that start again, and keeps an earlier version from starting: from the log, and from a snapshot.
    cluster.kill(3).await;
    cluster.adjust = third_is_old;
    let refusal = cluster.refuses_to_start(3).await;
    assert!(refusal.contains("of feature level 2, this version of Cresset knows levels up to 1"), "{refusal}");
    cluster.adjust = frequent_snapshots;
    cluster.start(3).await;
    for n in 31..=60 {
        cluster.propose(1 + n % 3, n).await;
    }
    cluster.agreed(60).await;
    cluster.level_is(LEVEL_KNOWN).await;
    cluster.kill(3).await;
    cluster.adjust = third_is_old;
    let refusal = cluster.refuses_to_start(3).await;
    assert!(refusal.contains("snapshot is of feature level 2"), "{refusal}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_joins_and_is_too_old_is_told_so_and_never_votes() {
    let mut cluster = Cluster::new(fourth_joins_and_is_old).await;
    (1..=3).for_each(|id| cluster.on_duty(id));
    cluster.elected().await;
    cluster.level_is(LEVEL_KNOWN).await;

    let listener = tokio::net::TcpListener::bind((own_address(), 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    let change = |n: u8, change| Command { id: CommandId([n; 16]), body: CommandBody::ChangeMembers(change) };
    let add = change(220, MemberChange::Add { peer: PeerId(4), peer_address: address.to_string() });
    let added = cluster.any().propose_retrying(&add, Instant::now() + PATIENCE).await.unwrap();
    assert!(matches!(added, Outcome::Done { .. }), "{added:?}");
    cluster.addresses.insert(4, address);
    cluster.start(4).await;
    let mut fourth = cluster.members.remove(&4).unwrap();
    let error = tokio::time::timeout(PATIENCE, fourth.driver.ended()).await.unwrap().unwrap_err().to_string();
    assert!(error.contains("the cluster is at feature level 2, this coordinator, c4, knows levels up to 1"), "{error}");
    drop(fourth);

    // A version of before levels, which doesn't know to stop by itself: it is refused with the reason, and can't be promoted.
    let leader = cluster.elected().await;
    let mut client = RaftServiceClient::connect(format!("http://{}", cluster.addresses[&leader])).await.unwrap();
    let before = DeliverRequest { cluster_id: "test".to_owned(), from_peer: 4, to_peer: leader, ..DeliverRequest::default() };
    let status = client.deliver(tokio_stream::iter([before])).await.unwrap_err();
    assert_eq!(status.code(), Code::PermissionDenied);
    assert!(status.message().contains("c4 knows feature levels up to 1"), "{status}");
    let promote = change(221, MemberChange::Promote { peer: PeerId(4), replaces: None });
    let refused = cluster.members[&leader].consensus.propose(&promote).await.unwrap_err();
    assert!(
        matches!(&refused, ProposeError::Refused { problem } if problem.contains("c4 knows feature levels up to 1, and 2 is in force")),
        "{refused:?}"
    );
}
