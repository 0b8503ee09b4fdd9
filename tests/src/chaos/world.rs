//! The cluster under test: where its processes live, and how each fault is done to them.

use std::{
    collections::BTreeMap,
    fs,
    io::Write,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context, anyhow, bail, ensure};
use cresset_proto::admin::v1::{CoordinatorRole, LabelRequest, ModelState, StatusResponse, WorkerState};
use tempfile::TempDir;
use tokio::time::sleep;

use super::{
    faults::{Fault, Needs, Step},
    launch,
    models::{self, Kind},
    network::{self, Network},
};
use crate::harness::{Cluster, ModelRepository, binaries, leader_of, state_of, worker_of};

const COORDINATORS: usize = 3;
const WORKERS: usize = 3;
/// How long a cluster may take to be whole again.
const WHOLE_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two questions to a coordinator that is coming up; that can't be watched for.
const ASK_AGAIN: Duration = Duration::from_millis(20);
/// The disk of a coordinator: what its log keeps, and as much again.
const DISK_BYTES: u64 = 96 << 20;
/// How long a coordinator without a disk may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(6);
/// Writes that are asked for while a disk is full: some pages of its log.
const WRITES_WHILE_FULL: u64 = 40;
/// How long each may take.
const WRITE_TIMEOUT: Duration = Duration::from_millis(500);

/// A running cluster, and its network where it has one of its own.
#[derive(Debug)]
pub struct World {
    // Processes end before what they live on.
    cluster: Cluster,
    network: Option<Network>,
    has_small_disks: bool,
    labels: u64,
    data_dir: TempDir,
    _repository: ModelRepository,
}

impl World {
    /// Starts it and waits until it serves everything. In namespaces if this process is [`network::apart`], else on loopback.
    ///
    /// # Errors
    /// What couldn't be done.
    pub async fn start(is_apart: bool) -> anyhow::Result<Self> {
        let repository = models::repository()?;
        let data_dir = tempfile::Builder::new().prefix("cresset-chaos-").tempdir()?;
        let ids: Vec<_> = (1..=COORDINATORS).map(|n| format!("c{n}")).chain((1..=WORKERS).map(|n| format!("w{n}"))).collect();
        let network = if is_apart { Some(Network::new(ids.clone())?) } else { None };
        let mut has_small_disks = is_apart;
        for id in &ids[..COORDINATORS] {
            let folder = data_dir.path().join(id);
            fs::create_dir(&folder)?;
            // Where it can't be mounted the folder itself will do, and no disk is filled.
            has_small_disks = has_small_disks && mount(&folder).is_ok();
        }
        let launches = launch::all(&ids, network.as_ref(), data_dir.path(), repository.path())?;
        let cluster = Cluster::launch(data_dir.path(), launches)?;
        let world = Self { cluster, network, has_small_disks, labels: 0, data_dir, _repository: repository };
        world.deploy().await?;
        Ok(world)
    }

    async fn deploy(&self) -> anyhow::Result<()> {
        let workers = |status: &StatusResponse| (status.current && status.workers.len() == WORKERS).then_some(());
        self.cluster.wait_for("all workers", WHOLE_TIMEOUT, workers).await?;
        let endpoints = self.cluster.endpoints().join(",");
        for model in models() {
            let ran = binaries::run("cresset", ["--endpoints", &endpoints, "deploy", model, "--replicas", "2", "--wait"])?;
            ensure!(ran.code == Some(0), "can't deploy {model}: {}", ran.stderr);
        }
        self.whole(Fault::KillEverything, &[], &BTreeMap::new()).await
    }

    /// The cluster.
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// Whether this fault can be done here.
    pub fn can(&self, fault: Fault) -> bool {
        match fault.needs() {
            Needs::Nothing => true,
            Needs::Namespaces => self.network.is_some(),
            Needs::Mount => self.has_small_disks,
        }
    }

    /// Whom a step is done to, now.
    ///
    /// # Errors
    /// Nobody leads.
    pub async fn targets(&self, step: &Step) -> anyhow::Result<Vec<String>> {
        let members = |letter: char| self.cluster.ids().into_iter().filter(move |id| id.starts_with(letter));
        let one = |letter| members(letter).cycle().nth(step.place as usize % COORDINATORS.max(WORKERS));
        Ok(match step.fault {
            Fault::KillWorker
            | Fault::StopWorker
            | Fault::CutWorker
            | Fault::MuteWorker
            | Fault::DeafenWorker
            | Fault::ResetWorker => one('w').into_iter().collect(),
            Fault::KillCoordinator | Fault::ResetCoordinator | Fault::FillDisk => one('c').into_iter().collect(),
            Fault::KillLeader | Fault::StopLeader | Fault::CutLeader | Fault::MuteLeader => vec![self.cluster.leader().await?],
            Fault::KillMajority => {
                let spared = one('c');
                members('c').filter(|id| Some(id) != spared.as_ref()).collect()
            }
            Fault::KillEverything => self.cluster.ids(),
        })
    }

    /// Does a fault.
    ///
    /// # Errors
    /// What couldn't be done.
    pub async fn hurt(&mut self, fault: Fault, targets: &[String]) -> anyhow::Result<()> {
        let first = targets.first().context("nobody to do it to")?;
        match fault {
            _ if fault.kills() => {
                self.cluster.kill_all(targets.iter().map(String::as_str))?;
            }
            Fault::StopWorker | Fault::StopLeader => self.cluster.stop(first)?,
            Fault::CutWorker | Fault::CutLeader => self.network()?.cut(first)?,
            Fault::MuteWorker | Fault::MuteLeader => self.network()?.mute(first)?,
            Fault::DeafenWorker => self.network()?.deafen(first)?,
            Fault::ResetWorker | Fault::ResetCoordinator => self.network()?.reset(first)?,
            Fault::FillDisk => {
                fill(&self.filler(first))?;
                self.write_labels().await;
            }
            other => bail!("{} can't be done", other.name()),
        }
        Ok(())
    }

    /// Undoes it.
    ///
    /// # Errors
    /// What couldn't be done.
    pub fn undo(&mut self, fault: Fault, targets: &[String]) -> anyhow::Result<()> {
        if fault == Fault::FillDisk {
            for id in targets {
                // One that can't write ends by itself, with a moment for its open calls.
                let _ = self.cluster.process(id)?.wait(END_TIMEOUT);
                fs::remove_file(self.filler(id))?;
            }
        }
        for id in targets {
            match fault {
                Fault::StopWorker | Fault::StopLeader => self.cluster.cont(id)?,
                _ if fault.needs() == Needs::Namespaces => self.network()?.heal(id)?,
                _ if !self.cluster.process(id)?.is_alive() => self.cluster.restart_process(id)?,
                _ => {}
            }
        }
        Ok(())
    }

    /// The present lives of the workers.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn incarnations(&self) -> anyhow::Result<BTreeMap<String, u64>> {
        let status = self.cluster.status().await?;
        Ok(status.workers.into_iter().map(|worker| (worker.id, worker.incarnation)).collect())
    }

    /// Waits until everybody is there and serves after a fault; `before` are the lives that workers had until then.
    ///
    /// # Errors
    /// It doesn't become whole, or a process has ended that nobody killed.
    pub async fn whole(&self, fault: Fault, targets: &[String], before: &BTreeMap<String, u64>) -> anyhow::Result<()> {
        let killed = |id: &str| fault.kills() && targets.iter().any(|target| target == id);
        let is_whole = |status: &StatusResponse| {
            let reborn = |id: &String| worker_of(status, id).is_some_and(|worker| Some(&worker.incarnation) > before.get(id));
            (is_whole(status) && before.keys().filter(|id| killed(id)).all(reborn)).then_some(())
        };
        let mut whole = self.cluster.wait_for("a whole cluster", WHOLE_TIMEOUT, is_whole).await.map_err(anyhow::Error::from);
        // The others may not have noticed yet that a coordinator was away.
        for id in targets.iter().filter(|id| id.starts_with('c')) {
            if whole.is_ok() {
                whole = self.answers(id).await;
            }
        }
        for id in self.cluster.ids() {
            if !self.cluster.process(&id)?.is_alive() {
                whole = Err(anyhow!("{id} has ended, {} was done to {}", fault.name(), targets.join(", ")));
            }
        }
        whole.with_context(|| self.cluster.tails())
    }

    /// Waits until a coordinator answers for itself.
    async fn answers(&self, id: &str) -> anyhow::Result<()> {
        let deadline = Instant::now() + WHOLE_TIMEOUT;
        loop {
            match self.cluster.own_status(id).await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error.into()),
                Err(_) => sleep(ASK_AGAIN).await,
            }
        }
    }

    fn network(&self) -> anyhow::Result<&Network> {
        self.network.as_ref().context("there are no namespaces")
    }

    fn filler(&self, id: &str) -> PathBuf {
        self.data_dir.path().join(id).join("filler")
    }

    /// Asks for writes that everybody has to put into their log. Whether they succeed is no matter here.
    async fn write_labels(&mut self) {
        let Ok(client) = self.cluster.client().await else { return };
        for _ in 0..WRITES_WHILE_FULL {
            self.labels += 1;
            let mut command_id = [0; 16];
            command_id[..8].copy_from_slice(&self.labels.to_le_bytes());
            let request = LabelRequest {
                command_id: command_id.to_vec().into(),
                name: Kind::Unary.model().to_owned(),
                labels: [("chaos".to_owned(), self.labels % 2)].into(),
            };
            let ask = client.coordinators().admin(WRITE_TIMEOUT, |mut admin| {
                let request = request.clone();
                async move { admin.label(request).await }
            });
            let _ = ask.await;
        }
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.has_small_disks {
            for member in &self.cluster.file().coordinators {
                // What is still open on it goes on; the folder can be removed.
                let folder = self.data_dir.path().join(&member.id);
                if let Err(error) = network::run(&["umount", "--lazy", &folder.to_string_lossy()]) {
                    eprintln!("chaos: {error:#}");
                }
            }
        }
    }
}

fn models() -> impl Iterator<Item = &'static str> {
    Kind::ALL.into_iter().map(Kind::model).collect::<std::collections::BTreeSet<_>>().into_iter()
}

fn is_whole(status: &StatusResponse) -> bool {
    let coordinators = status.coordinators.iter().filter(|c| c.role() != CoordinatorRole::Unreachable).count();
    let ready = |n: usize| worker_of(status, &format!("w{n}")).is_some_and(|worker| worker.state() == WorkerState::Ready);
    status.current
        && coordinators == COORDINATORS
        && leader_of(status).is_some()
        && (1..=WORKERS).all(ready)
        && models().all(|model| state_of(status, model) == Some(ModelState::Ready))
}

fn mount(folder: &std::path::Path) -> anyhow::Result<()> {
    let size = format!("size={DISK_BYTES}");
    network::run(&["mount", "-t", "tmpfs", "-o", &size, "tmpfs", &folder.to_string_lossy()])
}

/// Writes until nothing more fits.
fn fill(path: &std::path::Path) -> anyhow::Result<()> {
    let mut file = fs::File::create(path)?;
    let block = vec![0; 64 << 10];
    let mut size = block.len();
    while size > 0 {
        match file.write_all(&block[..size]) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::StorageFull => size /= 2,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
