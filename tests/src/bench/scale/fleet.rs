//! Workers that join, send heartbeats and take intents, and run nothing: as many as a large cluster has, in one process.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    sync::Arc,
    time::{Duration, SystemTime},
};

use anyhow::Context;
use cresset_client::{ConnectionSettings, Coordinators};
use cresset_proto::fleet::v1::{
    Assignment, Device, Heartbeat, JoinRequest, JoinResponse, Observed, ObservedReplica, Registration, ReplicaState,
    join_request, join_response, membership_service_client::MembershipServiceClient,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::{
    sync::{mpsc, watch},
    task::{AbortHandle, JoinSet},
    time::{MissedTickBehavior, interval, sleep},
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{
    Status,
    service::Routes,
    transport::{Channel, Endpoint, Server},
};

use super::state::{INCARNATION, WORKER_BYTES, worker, zone};

/// How long a coordinator may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Before the next coordinator is asked: whether somebody leads can't be watched from here.
const ASK_AGAIN: Duration = Duration::from_millis(50);
/// Messages on their way to the leader.
const MESSAGES_MAX: usize = 16;
/// Descriptors beside those of each worker: where it listens, its connection, and one that a coordinator asks by.
const OTHER_DESCRIPTORS: u64 = 1_024;

/// Lets this process, and those that it starts, have so many connections.
pub(super) fn allow_connections(workers: usize) -> anyhow::Result<()> {
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = workers as u64 * 3 + OTHER_DESCRIPTORS;
    if limit.current.is_some_and(|current| current < wanted) {
        let maximum = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
        limit = Rlimit { current: Some(maximum), ..limit };
        setrlimit(Resource::Nofile, limit).with_context(|| format!("{wanted} open files aren't allowed"))?;
    }
    Ok(())
}

/// Where each worker listens.
pub(super) struct Door {
    listener: TcpListener,
    pub(super) address: String,
}

/// Opens so many.
pub(super) fn doors(workers: usize) -> anyhow::Result<Vec<Door>> {
    let open = |_| {
        let listener = TcpListener::bind("127.0.0.1:0").context("no port is free")?;
        listener.set_nonblocking(true).context("can't listen without waiting")?;
        let address = listener.local_addr().context("a port has no address")?.to_string();
        Ok(Door { listener, address })
    };
    (0..workers).map(open).collect()
}

/// What the fleet has been told, all together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Told {
    /// Workers that are registered with a leader.
    pub(super) registered: usize,
    /// Models that living workers should run.
    pub(super) models: usize,
    /// Workers that have died.
    pub(super) deaths: usize,
    /// When that changed last.
    pub(super) at: SystemTime,
}

/// The workers.
pub(super) struct Fleet {
    told: Arc<watch::Sender<Told>>,
    living: BTreeMap<usize, AbortHandle>,
    _tasks: JoinSet<()>,
}

impl Fleet {
    /// Has a worker behind each door join through these coordinators (`host:port` of their peer ports), and so many routers watch
    /// the routes through these (`host:port` of their public ports).
    pub(super) fn start(doors: Vec<Door>, peers: &[String], routers: usize, coordinators: &[String]) -> Self {
        let told = Arc::new(watch::Sender::new(Told { registered: 0, models: 0, deaths: 0, at: SystemTime::now() }));
        let mut tasks = JoinSet::new();
        let run = |(number, door): (usize, Door)| {
            let worker = Worker {
                number,
                incarnation: INCARNATION,
                address: door.address,
                peers: peers.to_vec(),
                told: Arc::clone(&told),
                registered: false,
                intent: vec![],
            };
            (number, tasks.spawn(worker.run(door.listener)))
        };
        let living = doors.into_iter().enumerate().map(run).collect();
        for number in 0..routers {
            let at = number % coordinators.len();
            let turned = coordinators[at..].iter().chain(&coordinators[..at]);
            let routes = Coordinators::new(turned, ConnectionSettings::default()).watch_routes(CancellationToken::new());
            tasks.spawn(async move {
                // For as long as somebody holds it, it is kept up to date.
                let _routes = routes;
                std::future::pending::<()>().await;
            });
        }
        Self { told, living, _tasks: tasks }
    }

    /// How many live.
    pub(super) fn living(&self) -> usize {
        self.living.len()
    }

    /// What has been told so far, and news of it.
    pub(super) fn told(&self) -> watch::Receiver<Told> {
        self.told.subscribe()
    }

    /// Kills one: its connection breaks, and nobody answers at its address. Returns its id.
    pub(super) fn kill_one(&mut self) -> Option<String> {
        let (number, task) = self.living.pop_first()?;
        task.abort();
        Some(worker(number))
    }
}

struct Worker {
    number: usize,
    incarnation: u64,
    address: String,
    peers: Vec<String>,
    told: Arc<watch::Sender<Told>>,
    registered: bool,
    intent: Vec<Assignment>,
}

impl Worker {
    /// Lives until the task is aborted: then nobody listens at its address any more.
    async fn run(self, listener: TcpListener) {
        // Whoever asks whether it lives is told that there is no such call, which is a sign of life.
        let Ok(listener) = tokio::net::TcpListener::from_std(listener) else { return };
        let answering = Server::builder().add_routes(Routes::default()).serve_with_incoming(TcpListenerStream::new(listener));
        tokio::select! {
            () = self.stay() => {}
            _ = answering => {}
        }
    }

    async fn stay(mut self) {
        let mut turn = self.number;
        let mut hint = None;
        loop {
            let address = hint.take().unwrap_or_else(|| self.peers[turn % self.peers.len()].clone());
            turn += 1;
            // Whatever it was, another coordinator may do better.
            hint = self.join(&address).await.unwrap_or_default();
            self.set_registered(false);
            if hint.is_none() {
                sleep(ASK_AGAIN).await;
            }
        }
    }

    fn set_registered(&mut self, registered: bool) {
        if std::mem::replace(&mut self.registered, registered) != registered {
            self.told.send_modify(|told| {
                told.registered = if registered { told.registered + 1 } else { told.registered - 1 };
                told.at = SystemTime::now();
            });
        }
    }

    fn set_intent(&mut self, intent: Vec<Assignment>) {
        let before = std::mem::replace(&mut self.intent, intent).len();
        self.told.send_modify(|told| {
            told.models = told.models + self.intent.len() - before;
            told.at = SystemTime::now();
        });
    }

    /// Stays joined until that ends. `Ok` with who leads, if it was told.
    async fn join(&mut self, address: &str) -> Result<Option<String>, Status> {
        let (up, messages) = mpsc::channel(MESSAGES_MAX);
        let say = async |message| {
            let sent = up.send(JoinRequest { message: Some(message) }).await;
            sent.map_err(|_| Status::cancelled("the coordinator hung up"))
        };
        say(join_request::Message::Register(self.registration())).await?;
        let mut client = MembershipServiceClient::new(connect(address).await?).max_decoding_message_size(usize::MAX);
        let mut down = client.join(ReceiverStream::new(messages)).await?.into_inner();
        let mut beat = None::<tokio::time::Interval>;
        loop {
            let due = async {
                match &mut beat {
                    Some(beat) => drop(beat.tick().await),
                    None => std::future::pending().await,
                }
            };
            let response = tokio::select! {
                response = down.message() => response?,
                () = due => {
                    say(join_request::Message::Heartbeat(self.heartbeat())).await?;
                    continue;
                }
            };
            match response.and_then(|JoinResponse { message }| message) {
                Some(join_response::Message::Registered(registered)) => {
                    let mut ticks = interval(Duration::from_millis(registered.heartbeat_interval_ms.into()));
                    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
                    beat = Some(ticks);
                    self.set_registered(true);
                }
                Some(join_response::Message::Intent(intent)) => {
                    self.set_intent(intent.assignments);
                    say(join_request::Message::Observed(self.observed())).await?;
                }
                Some(join_response::Message::Redirect(redirect)) => {
                    return Ok(Some(redirect.leader_peer_address).filter(|address| !address.is_empty()));
                }
                Some(join_response::Message::Fenced(fenced)) => {
                    self.incarnation = fenced.incarnation_min.max(self.incarnation + 1);
                    self.set_intent(vec![]);
                    return Err(Status::aborted(fenced.reason));
                }
                None => return Ok(None),
            }
        }
    }

    fn registration(&self) -> Registration {
        Registration {
            worker_id: worker(self.number),
            incarnation: self.incarnation,
            grpc_address: self.address.clone(),
            http_address: self.address.clone(),
            zone: zone(self.number),
            devices: vec![Device { name: "cuda:0".into(), memory_bytes: WORKER_BYTES }],
            software_version: String::new(),
            tags: [].into(),
        }
    }

    fn heartbeat(&self) -> Heartbeat {
        let used_bytes: u64 = self.observed().replicas.iter().map(|replica| replica.memory_bytes).sum();
        Heartbeat { memory_free_bytes: WORKER_BYTES.saturating_sub(used_bytes), ..Default::default() }
    }

    /// Everything that it should run is ready at once.
    fn observed(&self) -> Observed {
        let replicas = self.intent.iter().map(|assignment| ObservedReplica {
            model: assignment.model.clone(),
            version: assignment.version,
            shard: assignment.shard,
            generation: assignment.generation,
            state: ReplicaState::Ready.into(),
            reason: String::new(),
            memory_bytes: super::state::MODEL_BYTES,
        });
        Observed { replicas: replicas.collect() }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.set_registered(false);
        self.set_intent(vec![]);
        self.told.send_modify(|told| told.deaths += 1);
    }
}

async fn connect(address: &str) -> Result<Channel, Status> {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).map_err(|error| Status::internal(error.to_string()))?;
    let connected = endpoint.connect_timeout(CONNECT_TIMEOUT).tcp_nodelay(true).connect().await;
    connected.map_err(|error| Status::unavailable(error.to_string()))
}
