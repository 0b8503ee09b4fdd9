//! Leaders are killed and stopped while clients of three real coordinators deploy, label and read: one order explains all that
//! they saw.
//!
//! Registers are how many replicas a model is to have, and which version a label points at. A write keeps its command id in every
//! retry, as the command line does; one that was never answered may have happened or not. A read counts if the coordinator said
//! that it is current, and tells of all registers at once. Beside each register's own order, the epoch of the whole state never
//! goes back: neither from one read to a later one nor across registers.
use std::{
    collections::BTreeMap,
    fs,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use cresset_core::command::{LABELS_MAX, REPLICAS_MAX, VERSIONS_MAX};
use cresset_proto::admin::v1::{
    CoordinatorRole, DeployRequest, LabelRequest, StatusRequest, StatusResponse, admin_service_client::AdminServiceClient,
};
use cresset_tests::{
    harness::{Cluster, ModelRepository, fp32_model, leader_of},
    linearizability::{Action, Operation, STEPS_MAX, Verdict, check},
};
use rand::Rng;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status, transport::Channel};

use crate::support::{PATIENCE, coordinators_alone};

/// Clients, each with one operation at a time.
const CLIENTS: usize = 6;
/// Each begins one at least so long after the last: more would only make the history long.
const PACE: Duration = Duration::from_millis(20);
/// How long a client waits for a coordinator before it asks the next.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long it tries to have a write done; what it gave up may still happen.
const WRITE_PATIENCE: Duration = Duration::from_secs(6);
/// A read of a stopped coordinator is waited for, since it must not be answered with what was true before the stop.
const READ_TIMEOUT: Duration = Duration::from_secs(3);
/// Writes before, during and after each fault.
const WRITES_PER_STEP: u64 = 40;
/// Models whose replicas are registers, and labels that are written at a time.
const AT_ONCE: u64 = 3;

/// Writes are numbered; each number is a value of one register, and none has a value twice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Register {
    Replicas(String),
    Label(String),
}

/// The register and the value of a write.
fn place(number: u64) -> Option<(Register, u64)> {
    let (turn, half) = (number / 2, number % 2);
    let (lane, round) = (turn % AT_ONCE, turn / AT_ONCE);
    if half == 0 {
        // The first value was written when the model was deployed.
        return (round + 2 <= u64::from(REPLICAS_MAX)).then(|| (Register::Replicas(model(lane)), round + 2));
    }
    let label = round / VERSIONS_MAX as u64 * AT_ONCE + lane;
    let version = round % VERSIONS_MAX as u64 + 1;
    (label < LABELS_MAX as u64).then(|| (Register::Label(format!("label-{label}")), version))
}

fn model(number: u64) -> String {
    format!("model-{number}")
}

/// The model with labels.
const MANY: &str = "many";

/// Something that was seen, with the epoch of the state that it was seen in.
#[derive(Debug, Clone)]
struct Seen {
    invoked_us: u64,
    returned_us: Option<u64>,
    epoch: Option<u64>,
    what: What,
}

#[derive(Debug, Clone)]
enum What {
    Write(Register, u64),
    Read(BTreeMap<Register, u64>),
}

struct Shared {
    began: Instant,
    endpoints: Vec<String>,
    writes_begun: AtomicU64,
    writes_done: watch::Sender<u64>,
    over: CancellationToken,
}

impl Shared {
    fn now_us(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Waits for so many writes more.
    async fn more(&self, writes: u64) {
        let goal = *self.writes_done.borrow() + writes;
        let mut done = self.writes_done.subscribe();
        let reached = timeout(PATIENCE, done.wait_for(|done| *done >= goal)).await;
        assert!(reached.is_ok(), "writes stopped at {}", *self.writes_done.borrow());
    }
}

/// One client until it is over.
async fn run(shared: Arc<Shared>) -> Vec<Seen> {
    let clients: Vec<_> = shared.endpoints.iter().map(|address| AdminServiceClient::new(channel(address))).collect();
    let mut pace = interval(PACE);
    let mut all = Vec::new();
    while !shared.over.is_cancelled() {
        pace.tick().await;
        let first = rand::rng().random_range(0..clients.len());
        if rand::rng().random_bool(0.5) {
            all.extend(write(&shared, &clients, first).await);
        } else {
            all.extend(read(&shared, clients[first].clone()).await);
        }
    }
    all
}

fn channel(address: &str) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect_timeout(ATTEMPT_TIMEOUT).connect_lazy()
}

/// `None` when the values are used up.
async fn write(shared: &Shared, clients: &[AdminServiceClient<Channel>], first: usize) -> Option<Seen> {
    let (register, value) = place(shared.writes_begun.fetch_add(1, Ordering::SeqCst))?;
    let command_id = rand::random::<[u8; 16]>().to_vec();
    let (invoked_us, begun) = (shared.now_us(), Instant::now());
    let mut epoch = None;
    for turn in first.. {
        let client = clients[turn % clients.len()].clone();
        if let Ok(Ok(done)) = timeout(ATTEMPT_TIMEOUT, attempt(client, &command_id, &register, value)).await {
            epoch = Some(done);
            shared.writes_done.send_modify(|done| *done += 1);
            break;
        }
        if begun.elapsed() > WRITE_PATIENCE {
            break;
        }
        tokio::task::yield_now().await;
    }
    let returned_us = epoch.map(|_| shared.now_us());
    Some(Seen { invoked_us, returned_us, epoch, what: What::Write(register, value) })
}

async fn attempt(
    mut client: AdminServiceClient<Channel>,
    command_id: &[u8],
    register: &Register,
    value: u64,
) -> Result<u64, Status> {
    let command_id = command_id.to_vec().into();
    match register {
        Register::Replicas(name) => {
            let replicas = u32::try_from(value).unwrap();
            let request = DeployRequest { command_id, name: name.clone(), version: 0, replicas, ..Default::default() };
            Ok(client.deploy(within(request)).await?.into_inner().epoch)
        }
        Register::Label(label) => {
            let request = LabelRequest { command_id, name: MANY.into(), labels: [(label.clone(), value)].into() };
            Ok(client.label(within(request)).await?.into_inner().epoch)
        }
    }
}

fn within<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ATTEMPT_TIMEOUT);
    request
}

/// `None` for what nobody vouches for.
async fn read(shared: &Shared, mut client: AdminServiceClient<Channel>) -> Option<Seen> {
    let invoked_us = shared.now_us();
    let status = timeout(READ_TIMEOUT, client.status(StatusRequest::default())).await.ok()?.ok()?.into_inner();
    let returned_us = Some(shared.now_us());
    if !status.current {
        return None;
    }
    let mut values = BTreeMap::new();
    for model in &status.models {
        if model.name == MANY {
            values.extend(model.labels.iter().map(|label| (Register::Label(label.clone()), model.version)));
        } else {
            values.insert(Register::Replicas(model.name.clone()), model.replicas_wanted.into());
        }
    }
    Some(Seen { invoked_us, returned_us, epoch: Some(status.epoch), what: What::Read(values) })
}

/// What happened to each register.
fn histories(all: &[Seen]) -> BTreeMap<Register, Vec<Operation>> {
    let mut histories: BTreeMap<Register, Vec<Operation>> = BTreeMap::new();
    for lane in 0..AT_ONCE {
        let first = Operation { invoked: 0, returned: Some(0), action: Action::Write(1) };
        histories.insert(Register::Replicas(model(lane)), vec![first]);
    }
    for seen in all {
        if let What::Write(register, value) = &seen.what {
            let operation = Operation { invoked: seen.invoked_us, returned: seen.returned_us, action: Action::Write(*value) };
            histories.entry(register.clone()).or_default().push(operation);
        }
    }
    for seen in all {
        let What::Read(values) = &seen.what else { continue };
        for (register, history) in &mut histories {
            let action = Action::Read(values.get(register).copied());
            history.push(Operation { invoked: seen.invoked_us, returned: seen.returned_us, action });
        }
    }
    histories
}

/// An operation that saw an earlier epoch than one that had ended before it began.
fn backwards(all: &[Seen]) -> Option<(&Seen, &Seen)> {
    let known = || all.iter().filter(|seen| seen.epoch.is_some());
    let mut ended: Vec<&Seen> = known().filter(|seen| seen.returned_us.is_some()).collect();
    ended.sort_by_key(|seen| seen.returned_us);
    let mut begun: Vec<&Seen> = known().collect();
    begun.sort_by_key(|seen| seen.invoked_us);
    let (mut ended, mut newest) = (ended.into_iter().peekable(), None::<&Seen>);
    for seen in begun {
        while let Some(before) = ended.next_if(|before| before.returned_us < Some(seen.invoked_us)) {
            newest = newest.filter(|newest| newest.epoch >= before.epoch).or(Some(before));
        }
        if let Some(newest) = newest.filter(|newest| newest.epoch > seen.epoch) {
            return Some((newest, seen));
        }
    }
    None
}

#[test]
fn an_epoch_that_goes_back_is_noticed() {
    let seen = |invoked_us, returned_us, epoch| Seen {
        invoked_us,
        returned_us: Some(returned_us),
        epoch: Some(epoch),
        what: What::Read(BTreeMap::new()),
    };
    assert!(backwards(&[seen(0, 9, 7), seen(5, 12, 6), seen(10, 20, 7)]).is_none(), "the first two overlap");
    assert!(backwards(&[seen(0, 9, 7), seen(0, 3, 5), seen(10, 20, 6)]).is_some());
}

#[test]
fn no_value_is_written_twice() {
    let all: Vec<_> = (0..3_800).map_while(place).collect();
    let distinct: std::collections::BTreeSet<_> = all.iter().cloned().collect();
    assert_eq!((all.len(), distinct.len()), (3_800, 3_800));
}

/// A repository with all that is deployed.
fn repository() -> ModelRepository {
    let repository = ModelRepository::new().unwrap();
    for lane in 0..AT_ONCE {
        repository.add_bytes(&model(lane), &fp32_model(8, ""), b"never loaded").unwrap();
    }
    repository.add_bytes(MANY, &fp32_model(8, "version_policy { all { } }"), b"never loaded").unwrap();
    for version in 2..=VERSIONS_MAX {
        let folder = repository.path().join(MANY).join(version.to_string());
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("model.pt"), b"never loaded").unwrap();
    }
    repository
}

async fn deploy(cluster: &Cluster) {
    let leader = cluster.leader().await.unwrap();
    let mut admin = AdminServiceClient::new(channel(cluster.grpc(&leader).unwrap()));
    for name in (0..AT_ONCE).map(model).chain([MANY.to_owned()]) {
        let command_id = rand::random::<[u8; 16]>().to_vec().into();
        admin.deploy(DeployRequest { command_id, name, version: 0, replicas: 1, ..Default::default() }).await.unwrap();
    }
}

/// Hurts whoever leads, waits until the others have agreed on something without it, and lets it come back.
async fn hurt_leader(cluster: &mut Cluster, shared: &Shared, kill: bool) {
    shared.more(WRITES_PER_STEP).await;
    let leader = cluster.leader().await.unwrap();
    if kill {
        cluster.kill(&leader).unwrap()
    } else {
        cluster.stop(&leader).unwrap()
    }
    let next = |status: &StatusResponse| leader_of(status).filter(|now| now.id != leader && status.current).map(drop);
    cluster.wait_for("another leader", PATIENCE, next).await.unwrap();
    shared.more(WRITES_PER_STEP).await;
    if kill {
        cluster.restart_process(&leader).unwrap()
    } else {
        cluster.cont(&leader).unwrap()
    }
    let is_back = |status: &StatusResponse| {
        let own = status.coordinators.iter().find(|coordinator| coordinator.id == leader)?;
        (own.role() == CoordinatorRole::Follower || own.role() == CoordinatorRole::Leader).then_some(())
    };
    cluster.wait_for("its return", PATIENCE, is_back).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_see_of_dying_leaders_has_one_order() {
    let repository = repository();
    let (mut cluster, _folder) = coordinators_alone(&repository);
    deploy(&cluster).await;
    let shared = Arc::new(Shared {
        began: Instant::now(),
        endpoints: cluster.endpoints(),
        writes_begun: AtomicU64::new(0),
        writes_done: watch::Sender::new(0),
        over: CancellationToken::new(),
    });
    let mut clients = JoinSet::new();
    for _ in 0..CLIENTS {
        clients.spawn(run(Arc::clone(&shared)));
    }
    for kill in [true, false, true, false] {
        hurt_leader(&mut cluster, &shared, kill).await;
    }
    shared.more(WRITES_PER_STEP).await;
    shared.over.cancel();
    let mut all: Vec<Seen> = clients.join_all().await.into_iter().flatten().collect();
    let last = AdminServiceClient::new(channel(&shared.endpoints[0]));
    all.push(read(&shared, last).await.expect("a current status when all are back"));

    let unanswered = all.iter().filter(|seen| seen.returned_us.is_none()).count();
    let reads = all.iter().filter(|seen| matches!(seen.what, What::Read(_))).count();
    let seconds = shared.began.elapsed().as_secs_f64();
    println!("{} writes, {unanswered} unanswered, {reads} current reads in {seconds:.1} s", all.len() - reads);
    assert!(reads as u64 > WRITES_PER_STEP, "too few reads to say anything: {reads}");
    if let Some((before, after)) = backwards(&all) {
        panic!("the state went back: {before:?} had ended before this began: {after:?}");
    }
    let histories = histories(&all);
    let verdicts = histories.iter().map(|(register, history)| (register, check(history, STEPS_MAX)));
    let wrong: Vec<_> = verdicts.filter(|(_, verdict)| *verdict != Verdict::Linearizable).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}
