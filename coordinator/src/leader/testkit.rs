//! A cluster that agrees with itself at once, and workers that are streams.
use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use cresset_core::{
    ClusterState, Command, CommandBody, CommandId, Outcome, PeerId, WorkerId, apply,
    command::DeploySpec,
    level::{LEVEL_FIRST, LEVEL_KNOWN, Level},
    state::{Epoch, PeerInfo},
};
use cresset_proto::fleet::v1::{
    Device, Heartbeat, Intent, JoinRequest, JoinResponse, Leaving, Observed, ObservedReplica, Registration, ReplicaState,
    join_request, join_response,
};
use futures::{StreamExt, stream::BoxStream};
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::{Cluster, Fleet, Leader, Membership, Probe, Role, Settings};

#[derive(Clone)]
pub(super) struct Fake(Arc<Inner>);

struct Inner {
    state: Mutex<ClusterState>,
    log: Mutex<Vec<CommandBody>>,
    applied: watch::Sender<u64>,
    epoch: watch::Sender<Epoch>,
    role: watch::Sender<Role>,
    deaf: AtomicBool,
    levels_known: Mutex<BTreeMap<PeerId, Level>>,
}

impl Fake {
    /// The only coordinator, leading.
    pub(super) fn leading() -> Self {
        Self(Arc::new(Inner {
            state: Mutex::new(ClusterState { level: LEVEL_KNOWN, ..ClusterState::new("test") }),
            log: Mutex::default(),
            applied: watch::Sender::new(0),
            epoch: watch::Sender::new(0),
            role: watch::Sender::new(Role { term: 1, leads: true, leader: Some(PeerId(1)) }),
            deaf: AtomicBool::new(false),
            levels_known: Mutex::default(),
        }))
    }

    pub(super) fn apply(&self, body: CommandBody) -> Outcome {
        let mut state = self.0.state.lock();
        self.0.log.lock().push(body.clone());
        let id = CommandId((self.0.log.lock().len() as u128).to_be_bytes());
        let (outcome, _) = apply(&mut state, &Command { id, body });
        self.0.epoch.send_if_modified(|epoch| std::mem::replace(epoch, state.epoch) != state.epoch);
        self.0.applied.send_modify(|applied| *applied += 1);
        outcome
    }

    pub(super) fn deploy(&self, name: &str, replicas_wanted: u32) {
        self.apply(CommandBody::Deploy(DeploySpec {
            name: name.into(),
            version: 1,
            config: "config".into(),
            digest: "digest".into(),
            size_bytes: 1 << 20,
            replicas_wanted,
            shards: 1,
            platform: "pytorch_libtorch".into(),
        }));
    }

    pub(super) fn announce(&self, peer: u64, peer_address: &str) {
        let info = PeerInfo { grpc_address: String::new(), http_address: String::new(), peer_address: peer_address.into() };
        self.0.state.lock().members.voters.insert(PeerId(peer));
        self.apply(CommandBody::AnnouncePeer { peer: PeerId(peer), info });
    }

    /// Another coordinator leads from now on.
    pub(super) fn follow(&self, leader: u64) {
        self.0.role.send_modify(|role| *role = Role { term: role.term + 1, leads: false, leader: Some(PeerId(leader)) });
    }

    pub(super) fn lead_again(&self) {
        self.0.role.send_modify(|role| *role = Role { term: role.term + 1, leads: true, leader: Some(PeerId(1)) });
    }

    /// A coordinator says what it knows.
    pub(super) fn knows(&self, peer: u64, level: Level) {
        self.0.levels_known.lock().insert(PeerId(peer), level);
    }

    /// As a cluster of these coordinators is before its level was ever raised.
    pub(super) fn begins_with(&self, voters: &[u64]) {
        let mut state = self.0.state.lock();
        state.level = LEVEL_FIRST;
        state.members.voters = voters.iter().copied().map(PeerId).collect();
    }

    /// Whether proposals fail.
    pub(super) fn set_deaf(&self, deaf: bool) {
        self.0.deaf.store(deaf, Ordering::Relaxed);
    }

    /// Every command that was applied, in order.
    pub(super) fn log(&self) -> Vec<CommandBody> {
        self.0.log.lock().clone()
    }

    /// Waits for the state to become so.
    pub(super) async fn until(&self, holds: impl Fn(&ClusterState) -> bool) {
        let mut applied = self.0.applied.subscribe();
        while !self.read(&holds) {
            applied.changed().await.unwrap();
        }
    }

    /// Names of the workers that should run the model.
    pub(super) fn hosts(&self, model: &str) -> Vec<String> {
        hosts(&self.0.state.lock(), model)
    }
}

pub(super) fn hosts(state: &ClusterState, model: &str) -> Vec<String> {
    state.replicas.keys().filter(|id| id.model == model).map(|id| id.worker.to_string()).collect()
}

impl Cluster for Fake {
    type ProposeError = &'static str;
    type ReadError = &'static str;

    async fn propose(&self, body: CommandBody) -> Result<Outcome, &'static str> {
        tokio::task::yield_now().await;
        if self.0.deaf.load(Ordering::Relaxed) { Err("deaf") } else { Ok(self.apply(body)) }
    }

    async fn catch_up(&self) -> Result<(), &'static str> {
        Ok(())
    }

    fn read<R>(&self, look: impl FnOnce(&ClusterState) -> R) -> R {
        look(&self.0.state.lock())
    }

    fn view(&self) -> ClusterState {
        self.0.state.lock().without_answers()
    }

    fn levels_known(&self) -> BTreeMap<PeerId, Level> {
        self.0.levels_known.lock().clone()
    }

    fn role(&self) -> Role {
        *self.0.role.borrow()
    }

    fn roles(&self) -> BoxStream<'static, Role> {
        WatchStream::new(self.0.role.subscribe()).boxed()
    }

    fn epochs(&self) -> BoxStream<'static, Epoch> {
        WatchStream::new(self.0.epoch.subscribe()).boxed()
    }

    fn indexes(&self) -> BoxStream<'static, u64> {
        WatchStream::new(self.0.applied.subscribe()).boxed()
    }
}

/// A leading coordinator with its duties running.
pub(super) struct Coordinator {
    pub(super) cluster: Fake,
    pub(super) membership: Membership<Fake>,
    pub(super) fleet: Fleet,
    /// How many probes were asked for.
    pub(super) probes: Arc<AtomicU64>,
    /// What a probe finds.
    pub(super) answer: Arc<AtomicBool>,
    pub(super) shutdown: CancellationToken,
}

impl Coordinator {
    pub(super) fn start() -> Self {
        let (probes, answer) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let probe: Probe = {
            let (probes, answer) = (Arc::clone(&probes), Arc::clone(&answer));
            Arc::new(move |_| {
                probes.fetch_add(1, Ordering::Relaxed);
                let answer = answer.load(Ordering::Relaxed);
                Box::pin(async move { answer })
            })
        };
        let (cluster, shutdown) = (Fake::leading(), CancellationToken::new());
        let (leader, membership, fleet): (Leader<Fake>, _, _) =
            super::new(cluster.clone(), Settings::default(), probe, shutdown.clone());
        tokio::spawn(leader.run(shutdown.clone()));
        Self { cluster, membership, fleet, probes, answer, shutdown }
    }

    /// Opens a stream and introduces a worker on it.
    pub(super) async fn join(&self, name: &str, incarnation: u64) -> Worker {
        let (requests, inbound) = mpsc::channel(64);
        let responses = self.membership.open(ReceiverStream::new(inbound)).unwrap();
        let worker = Worker { requests, responses };
        worker.say(join_request::Message::Register(Registration {
            worker_id: name.into(),
            incarnation,
            grpc_address: format!("{name}:1"),
            http_address: format!("{name}:2"),
            zone: String::new(),
            devices: vec![Device { name: "cpu".into(), memory_bytes: 1 << 30 }],
            software_version: String::new(),
            tags: Default::default(),
        }));
        worker
    }

    /// A worker that does what it is told until it is dropped or silenced.
    pub(super) async fn run_worker(&self, name: &str, incarnation: u64) -> Running {
        let mut worker = self.join(name, incarnation).await;
        assert!(matches!(worker.hear().await, join_response::Message::Registered(_)));
        let (silent, killed) = (CancellationToken::new(), CancellationToken::new());
        let running = Running { silent: silent.clone(), killed: killed.clone().drop_guard() };
        tokio::spawn(async move {
            let mut ticks = tokio::time::interval(std::time::Duration::from_millis(250));
            loop {
                tokio::select! {
                    () = killed.cancelled() => return,
                    () = silent.cancelled(), if !silent.is_cancelled() => {} // looks again at who may speak
                    _ = ticks.tick(), if !silent.is_cancelled() => worker.beat(1 << 30),
                    heard = worker.responses.next() => match heard {
                        Some(Ok(JoinResponse { message: Some(join_response::Message::Intent(intent)) })) => {
                            worker.observe(&intent, ReplicaState::Ready);
                        }
                        Some(Ok(_)) => {}
                        Some(Err(_)) | None => return,
                    },
                }
            }
        });
        running
    }
}

/// A worker's end of its stream.
pub(super) struct Worker {
    requests: mpsc::Sender<Result<JoinRequest, Status>>,
    pub(super) responses: ReceiverStream<Result<JoinResponse, Status>>,
}

impl Worker {
    pub(super) fn say(&self, message: join_request::Message) {
        // The session may have ended, which the test sees in the responses.
        let _ = self.requests.try_send(Ok(JoinRequest { message: Some(message) }));
    }

    pub(super) fn beat(&self, memory_free_bytes: u64) {
        self.say(join_request::Message::Heartbeat(Heartbeat { memory_free_bytes, ..Heartbeat::default() }));
    }

    pub(super) fn leave(&self) {
        self.say(join_request::Message::Leaving(Leaving {}));
    }

    /// Says that everything it was told to run is so.
    pub(super) fn observe(&self, intent: &Intent, state: ReplicaState) {
        let replicas = intent.assignments.iter().map(|assignment| ObservedReplica {
            model: assignment.model.clone(),
            version: assignment.version,
            shard: assignment.shard,
            generation: assignment.generation,
            state: state.into(),
            reason: String::new(),
            memory_bytes: 1,
        });
        self.say(join_request::Message::Observed(Observed { replicas: replicas.collect() }));
    }

    pub(super) async fn hear(&mut self) -> join_response::Message {
        self.responses.next().await.expect("the stream is open").expect("a message").message.expect("a known message")
    }

    /// The next intent; anything else fails the test.
    pub(super) async fn intent(&mut self) -> Intent {
        match self.hear().await {
            join_response::Message::Intent(intent) => intent,
            other => panic!("{other:?}"),
        }
    }
}

/// A worker that runs by itself; dropping it kills it.
pub(super) struct Running {
    /// Cancelled: it goes on without a word.
    pub(super) silent: CancellationToken,
    #[expect(dead_code, reason = "what counts is when it is dropped")]
    killed: tokio_util::sync::DropGuard,
}

pub(super) fn worker_id(name: &str) -> WorkerId {
    name.parse().unwrap()
}
