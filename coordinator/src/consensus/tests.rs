//! Real drivers with real disks, over real sockets.
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::atomic::{AtomicU16, Ordering},
    time::Duration,
};

use cresset_core::{
    ClusterState, Command, CommandBody, CommandId, Outcome, PeerId,
    command::{CONFIG_BYTES_MAX, DeploySpec},
    state::PeerInfo,
};
use cresset_proto::raft::v1::{DeliverRequest, ReadIndexRequest, raft_service_client::RaftServiceClient};
use tokio::{runtime::Runtime, sync::oneshot, time::Instant};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Code, transport::Server};

use super::*;

mod levels;

const PATIENCE: Duration = Duration::from_secs(30);

/// A cluster whose members have a runtime each, so that one can be dropped with all its sockets and tasks.
struct Cluster {
    folder: tempfile::TempDir,
    addresses: BTreeMap<u64, SocketAddr>,
    members: BTreeMap<u64, Member>,
    adjust: fn(&mut Settings),
}

struct Member {
    runtime: OwnRuntime,
    consensus: Consensus,
    driver: DriverHandle,
}

/// A runtime whose end closes every socket and drops every task, without waiting for any.
struct OwnRuntime(Option<Runtime>);

impl Drop for OwnRuntime {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// An address that no other test of this machine has, so that a member can come back to its port.
fn own_address() -> Ipv4Addr {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let [high, low] = (std::process::id() as u16).to_be_bytes();
    let member = NEXT.fetch_add(1, Ordering::Relaxed);
    Ipv4Addr::new(127, 64 | (high & 63), low, 1 + (member % 250) as u8)
}

impl Cluster {
    async fn new(adjust: fn(&mut Settings)) -> Self {
        let mut addresses = BTreeMap::new();
        for id in 1..=3 {
            let listener = tokio::net::TcpListener::bind((own_address(), 0)).await.unwrap();
            addresses.insert(id, listener.local_addr().unwrap());
        }
        let mut cluster = Self { folder: tempfile::tempdir().unwrap(), addresses, members: BTreeMap::new(), adjust };
        for id in 1..=3 {
            cluster.start(id).await;
        }
        cluster
    }

    fn dir(&self, id: u64) -> PathBuf {
        self.folder.path().join(format!("c{id}"))
    }

    fn settings(&self, id: u64) -> Settings {
        let peers = self.addresses.iter().map(|(&id, address)| (id, address.to_string())).collect();
        let mut settings = Settings::new("test", id, peers, self.dir(id));
        // Shorter than in production, but still far above what an fsync on a busy machine takes.
        settings.tick = Duration::from_millis(25);
        (self.adjust)(&mut settings);
        settings
    }

    async fn start(&mut self, id: u64) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let listener = tokio::net::TcpListener::bind(self.addresses[&id]).await.unwrap().into_std().unwrap();
        let entered = runtime.enter();
        let (consensus, server, driver) = start(&self.settings(id), ClusterState::new("test")).unwrap();
        let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
        runtime.spawn(Server::builder().add_service(server).serve_with_incoming(incoming));
        drop(entered);
        self.members.insert(id, Member { runtime: OwnRuntime(Some(runtime)), consensus, driver });
    }

    /// As near to SIGKILL as it gets within a process: every socket closes, nobody is told.
    async fn kill(&mut self, id: u64) {
        let Member { runtime, consensus, mut driver } = self.members.remove(&id).expect("it runs");
        drop(runtime);
        drop(consensus);
        driver.ended().await.unwrap();
    }

    fn any(&self) -> &Consensus {
        &self.members.values().next().expect("one runs").consensus
    }

    /// Waits for all that run to follow the same leader.
    async fn elected(&self) -> u64 {
        let deadline = Instant::now() + PATIENCE;
        // A read that is confirmed through each of them says more than any status.
        for member in self.members.values() {
            member.consensus.read_barrier(deadline).await.unwrap();
        }
        let leader = self.any().raft().wait_for(|status| status.leader.is_some()).await.unwrap().leader;
        leader.expect("it was waited for")
    }

    /// Waits for all that run to have applied as much, and checks that they agree.
    async fn agreed(&self, epoch: u64) {
        for (id, member) in &self.members {
            let mut applied = member.consensus.applied();
            let reached = tokio::time::timeout(PATIENCE, applied.wait_for(|applied| applied.epoch >= epoch)).await;
            assert!(reached.is_ok(), "c{id} has not reached epoch {epoch}");
        }
        let states: Vec<_> = self.members.values().map(|member| member.consensus.state().clone()).collect();
        assert!(states.iter().all(|state| *state == states[0] && state.epoch == epoch), "{states:#?}");
    }

    async fn propose(&self, through: u64, n: u64) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        self.members[&through].consensus.propose_retrying(&announce(n), deadline).await.unwrap()
    }
}

/// A command that advances the epoch by one. Where the peers reach each other stays as it is: they'd follow.
fn announce(n: u64) -> Command {
    let address = |port: u16| format!("host-{n}:{port}");
    let info = PeerInfo { grpc_address: address(1), http_address: address(2), peer_address: "host:3".to_owned() };
    let mut id = [0; 16];
    id[..8].copy_from_slice(&n.to_be_bytes());
    Command { id: CommandId(id), body: CommandBody::AnnouncePeer { peer: PeerId(1 + n % 3), info } }
}

fn unchanged(_: &mut Settings) {}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_survives_its_leader_and_a_restart_of_everybody() {
    let mut cluster = Cluster::new(unchanged).await;
    let leader = cluster.elected().await;
    let follower = leader % 3 + 1;
    assert_eq!(cluster.propose(follower, 1).await, Outcome::Done { epoch: 1 });
    let read = cluster.members[&follower].consensus.read_barrier(Instant::now() + PATIENCE).await.unwrap();
    assert!(cluster.members[&follower].consensus.applied().borrow().index >= read);
    assert_eq!(cluster.members[&follower].consensus.state().epoch, 1);

    cluster.kill(leader).await;
    assert_eq!(cluster.propose(follower, 2).await, Outcome::Done { epoch: 2 });
    // The same command again, from somebody who never heard the answer.
    assert_eq!(cluster.propose(follower, 2).await, Outcome::Done { epoch: 2 });

    cluster.start(leader).await;
    cluster.agreed(2).await;
    assert_eq!(cluster.propose(leader, 3).await, Outcome::Done { epoch: 3 });

    for id in 1..=3 {
        cluster.kill(id).await;
    }
    for id in 1..=3 {
        cluster.start(id).await;
    }
    cluster.elected().await;
    cluster.agreed(3).await;
    assert_eq!(cluster.any().state().peers[&PeerId(3)].grpc_address, "host-2:1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_was_away_gets_a_snapshot_over_the_wire() {
    let mut cluster = Cluster::new(|settings| (settings.snapshot_entries, settings.keep_entries) = (20, 5)).await;
    let leader = cluster.elected().await;
    let away = leader % 3 + 1;
    cluster.kill(away).await;
    for n in 1..=60 {
        cluster.propose(leader, n).await;
    }
    cluster.start(away).await;
    // Nothing but a snapshot can bring it there: what it lacks is no longer in any log.
    cluster.agreed(60).await;
    cluster.propose(away, 61).await;
    cluster.agreed(61).await;
    cluster.kill(away).await;
    cluster.start(away).await;
    cluster.elected().await;
    cluster.agreed(61).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_callers_at_once_get_one_answer_each() {
    let cluster = Cluster::new(unchanged).await;
    cluster.elected().await;
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..120_u64 {
        let consensus = cluster.members[&(1 + n % 3)].consensus.clone();
        // Each command twice, through different members.
        callers.spawn(async move { consensus.propose_retrying(&announce(n / 2), Instant::now() + PATIENCE).await });
    }
    let mut epochs: Vec<u64> = Vec::new();
    while let Some(answer) = callers.join_next().await {
        let Outcome::Done { epoch } = answer.unwrap().unwrap() else { panic!("nothing is wrong with the commands") };
        epochs.push(epoch);
    }
    epochs.sort_unstable();
    let expected: Vec<u64> = (1..=60).flat_map(|epoch| [epoch, epoch]).collect();
    assert_eq!(epochs, expected);
    cluster.agreed(60).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_whose_disk_is_full_takes_nothing_until_there_is_room() {
    let mut cluster = Cluster::new(unchanged).await;
    let full = cluster.elected().await;
    cluster.propose(full, 1).await;
    // No disk has so much room. It may even be elected, by those that have no more than it; then it hands over.
    cluster.kill(full).await;
    cluster.adjust = |settings| settings.disk_kept_bytes = u64::MAX;
    cluster.start(full).await;
    for n in 2..=20 {
        cluster.propose(full, n).await;
    }
    let there = cluster.members[&full].consensus.applied().borrow().epoch;
    assert!(there < 20, "it has taken {there}");
    let lone = cluster.members[&full].consensus.raft().borrow().role;
    assert_ne!(lone, Role::Leader);

    cluster.kill(full).await;
    cluster.adjust = unchanged;
    cluster.start(full).await;
    cluster.agreed(20).await;
}

/// A command that is as long as they get.
fn deploy_largest(n: u8) -> Command {
    let spec = DeploySpec {
        name: format!("model-{n}"),
        version: 1,
        config: vec![n; CONFIG_BYTES_MAX].into(),
        digest: String::new(),
        size_bytes: 1,
        replicas_wanted: 1,
        shards: 1,
        platform: String::new(),
    };
    Command { id: CommandId([n; 16]), body: CommandBody::Deploy(spec) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_largest_commands_get_through_together_and_as_a_snapshot_in_chunks() {
    let mut cluster = Cluster::new(|settings| settings.snapshot_bytes = 4 << 20).await;
    let leader = cluster.elected().await;
    let away = leader % 3 + 1;
    cluster.kill(away).await;
    let mut callers = tokio::task::JoinSet::new();
    for n in 0..12 {
        let consensus = cluster.any().clone();
        callers.spawn(async move { consensus.propose_retrying(&deploy_largest(n), Instant::now() + PATIENCE).await });
    }
    while let Some(answer) = callers.join_next().await {
        assert!(matches!(answer.unwrap(), Ok(Outcome::Deployed { .. })));
    }
    cluster.start(away).await;
    cluster.agreed(12).await;
    assert_eq!(cluster.members[&away].consensus.state().models.len(), 12);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_majority_nothing_is_answered_wrongly() {
    let mut cluster = Cluster::new(unchanged).await;
    let leader = cluster.elected().await;
    cluster.propose(leader, 1).await;
    for id in (1..=3).filter(|id| *id != leader) {
        cluster.kill(id).await;
    }
    let alone = &cluster.members[&leader].consensus;
    let deadline = Instant::now() + Duration::from_secs(2);
    let command = announce(2);
    let (proposal, read) = tokio::join!(alone.propose_retrying(&command, deadline), alone.read_barrier(deadline));
    // It was in the log of a leader, so nobody may say that it failed.
    assert!(matches!(proposal, Err(ProposeError::Indeterminate { .. })), "{proposal:?}");
    assert!(matches!(read, Err(ReadError::NoLeader { .. })), "{read:?}");
    assert_eq!(alone.state().epoch, 1);
    // With one more it goes on, and the command is applied once, whether or not the first attempt survived.
    let back = leader % 3 + 1;
    cluster.start(back).await;
    cluster.propose(back, 2).await;
    cluster.agreed(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_before_an_orderly_end() {
    let mut cluster = Cluster::new(unchanged).await;
    let leader = cluster.elected().await;
    let Member { runtime, consensus, mut driver } = cluster.members.remove(&leader).unwrap();
    let next = consensus.transfer_leadership(None, Instant::now() + PATIENCE).await.unwrap();
    assert_ne!(next, leader);
    let status = *consensus.raft().borrow();
    assert!(status.role != Role::Leader && status.leader.is_some_and(|next| next != leader), "{status:?}");
    consensus.stop().await;
    driver.ended().await.unwrap();
    assert_eq!(consensus.propose(&announce(1)).await, Err(ProposeError::Shutdown));
    drop(runtime);
    cluster.propose(leader % 3 + 1, 1).await;
    cluster.agreed(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_are_refused() {
    let cluster = Cluster::new(unchanged).await;
    let address = cluster.addresses[&1];
    let mut client = RaftServiceClient::connect(format!("http://{address}")).await.unwrap();
    let foreign = client.read_index(ReadIndexRequest { cluster_id: "other".to_owned() }).await.unwrap_err();
    assert_eq!(foreign.code(), Code::PermissionDenied);
    assert!(foreign.message().contains("this is cluster 'test', the caller is of 'other'"), "{foreign}");
    let honest = DeliverRequest { cluster_id: "test".to_owned(), from_peer: 2, to_peer: 1, ..DeliverRequest::default() };
    let strange = [
        DeliverRequest { cluster_id: "other".to_owned(), ..honest.clone() },
        DeliverRequest { from_peer: 9, ..honest.clone() },
        DeliverRequest { from_peer: 1, ..honest.clone() },
        DeliverRequest { founders: vec![1, 2, 3, 4], ..honest.clone() },
        DeliverRequest { to_peer: 3, ..honest.clone() },
    ];
    for request in strange {
        let status = client.deliver(tokio_stream::iter([honest.clone(), request.clone()])).await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "{request:?}");
    }
    // Nonsense from a member is dropped, and harms nobody.
    let noise = DeliverRequest { messages: vec![vec![0xff; 50].into(), vec![8, 2].into()], ..honest };
    client.deliver(tokio_stream::iter([noise])).await.unwrap();
    cluster.elected().await;
    cluster.propose(2, 1).await;
    cluster.agreed(1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_at_start_is_said_clearly() {
    let cluster = Cluster::new(unchanged).await;
    let error = start(&cluster.settings(1), ClusterState::new("test")).map(|_| ()).unwrap_err();
    assert!(error.to_string().contains("is in use by another process"), "{error}");
    let mut settings = cluster.settings(1);
    (settings.cluster_id, settings.heartbeat_ticks) = (String::new(), 0);
    let error = start(&settings, ClusterState::new("test")).map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("cluster_id has 0 bytes") && error.contains("heartbeat_ticks must be at least 1"), "{error}");
}

/// A disk that fails after some writes.
struct Failing {
    log: MemoryLog,
    writes_left: usize,
}

impl LogStore for Failing {
    fn load(&mut self) -> Result<Option<Stored>, LogError> {
        self.log.load()
    }

    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError> {
        if self.writes_left == 0 {
            let source = std::io::Error::from(std::io::ErrorKind::StorageFull);
            return Err(LogError::Io { path: "disk".into(), action: "write the log", source });
        }
        self.writes_left -= 1;
        self.log.append(batch)
    }
}

#[tokio::test]
async fn a_disk_that_fails_ends_the_driver_and_leaves_no_caller_behind() {
    let peers = BTreeMap::from([(1, "127.0.0.1:1".to_owned())]);
    let settings = Settings { tick: Duration::from_millis(5), waiters_max: 10, ..Settings::new("test", 1, peers, "unused") };
    let shared = Shared::new(ClusterState::new("test"));
    let log = Failing { log: MemoryLog::default(), writes_left: 40 };
    let node = Node::new(&settings, log, shared, Box::new(|_| 6), &tracing_drain::logger()).unwrap();
    let (inbox, arrivals) = inbox::Inbox::new();
    let (published, watched) = published::Published::new(node.status(), 0, 8);
    let mut status = watched.raft;
    let Surroundings { network, chance, .. } = Surroundings::real(());
    let links = transport::Links::spawn(&settings, &inbox, network, chance, &CancellationToken::new());
    let driver = driver::Driver::new(node, arrivals, links, published, announced::Announced::default(), &settings);
    let mut driver = driver::on_own_thread(driver.run()).unwrap();
    status.wait_for(|status| status.role == Role::Leader).await.unwrap();
    let mut answers = Vec::new();
    for n in 0..40 {
        let (reply, answer) = oneshot::channel();
        let command = announce(n);
        let (needs, encoded) = (command.body.needs(), command.encode());
        let input = inbox::Input::Propose { id: command.id, command: encoded, needs, change: None, reply };
        if inbox.put(input).is_err() {
            break;
        }
        // A reply that is dropped says the same as one that says so.
        let answer = answer.await.unwrap_or(Err(ProposeError::Indeterminate { leader: None }));
        let failed = answer.is_err();
        answers.push(answer);
        if failed {
            break;
        }
    }
    let (last, acknowledged) = answers.split_last().expect("there was one at least");
    assert!(matches!(last, Err(ProposeError::Indeterminate { .. })), "{last:?}");
    assert!(!acknowledged.is_empty());
    let error = driver.ended().await.unwrap_err();
    assert!(error.to_string().contains("data folder disk: can't write the log"), "{error}");
}
