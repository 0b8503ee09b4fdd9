//! What all parts of the bench share: the models, how long things may take, and clusters.

use std::{cell::Cell, fs, io, time::Duration};

use rustix::process::Signal;
use tempfile::TempDir;
use tokio::signal::unix::{SignalKind, signal};

use super::{
    generator::Generator,
    inprocess::Threads,
    models::{self, MODELS, Model},
};
use crate::harness::{Cluster, Error, ModelRepository, Options, Process, failed};

/// The coordinator that requests go through.
pub const COORDINATOR: &str = "c1";
/// The worker.
pub const WORKER: &str = "w1";

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How often everything is measured.
    pub rounds: usize,
    /// How long most things are measured.
    pub time: Duration,
    /// How long a worker is asked for more than it can do.
    pub overload: Duration,
    /// Small requests over which memory has to stay flat.
    pub flat_requests: u64,
    /// Streams over which memory has to stay flat.
    pub flat_streams: u64,
}

impl Pace {
    /// Some minutes.
    pub const USUAL: Self = Self {
        rounds: 3,
        time: Duration::from_secs(2),
        overload: Duration::from_secs(60),
        flat_requests: 200_000,
        flat_streams: 2_000,
    };
    /// To see that it works.
    pub const QUICK: Self = Self {
        rounds: 1,
        time: Duration::from_millis(600),
        overload: Duration::from_secs(3),
        flat_requests: 20_000,
        flat_streams: 500,
    };

    /// As long as the memory's goals ask for.
    #[must_use]
    pub fn deep(self) -> Self {
        Self { flat_requests: 10_000_000, flat_streams: 100_000, ..self }
    }
}

/// The models and the machine.
#[derive(Debug)]
pub struct Stage {
    /// With all models.
    pub repository: ModelRepository,
    /// How much is measured.
    pub pace: Pace,
    /// Whether models run on a GPU, with and without Cresset.
    pub gpu: bool,
    /// Cores of this machine, which the worker, the coordinator and the generator share.
    pub cores: u16,
    /// For the clusters' folders.
    scratch: TempDir,
    clusters: Cell<u32>,
}

impl Stage {
    /// Makes the models.
    ///
    /// # Errors
    /// As [`models::repository`].
    pub fn set(pace: Pace, gpu: bool) -> Result<Self, Error> {
        let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
        let scratch = tempfile::Builder::new().prefix("cresset-bench-").tempdir().map_err(failed("no temporary folder"))?;
        Ok(Self { repository: models::repository()?, pace, gpu, cores, scratch, clusters: Cell::new(0) })
    }

    /// On Ctrl-C and SIGTERM stops what this process has started before the process itself, and removes what was made.
    ///
    /// # Errors
    /// The system's.
    pub fn end_with_signals(&self) -> io::Result<()> {
        const INTERRUPTED: i32 = 130;
        let folders = [self.repository.path().to_owned(), self.scratch.path().to_owned()];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut terminate, mut interrupt) = {
            let _within = runtime.enter();
            (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?)
        };
        std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            });
            end_children();
            folders.iter().for_each(|folder| drop(fs::remove_dir_all(folder)));
            std::process::exit(INTERRUPTED);
        });
        Ok(())
    }

    /// A cluster of one coordinator and one worker that serves all models. Blocks.
    ///
    /// # Errors
    /// As [`Cluster::start`].
    pub fn cluster(&self) -> Result<Cluster, Error> {
        let names: Vec<_> = MODELS.iter().map(|model| model.name).collect();
        let model_repository = self.repository.path().to_owned();
        let number = self.clusters.replace(self.clusters.get() + 1);
        let data_dir = Some(self.scratch.path().join(format!("cluster{number}")));
        let device = if self.gpu { "cuda" } else { "cpu" };
        let env = vec![("CRESSET_UP_DEVICE".to_owned(), device.to_owned())];
        Cluster::start(&Options { coordinators: 1, workers: 1, model_repository, data_dir, env, ..Options::deploying(&names) })
    }

    /// Load straight to the worker.
    ///
    /// # Errors
    /// As [`Generator::new`].
    pub fn straight(&self, cluster: &Cluster, model: Model) -> anyhow::Result<Generator> {
        Ok(Generator::new(cluster, WORKER, model, &[WORKER])?.lasting(self.pace.time))
    }

    /// Load through the coordinator.
    ///
    /// # Errors
    /// As [`Generator::new`].
    pub fn through_coordinator(&self, cluster: &Cluster, model: Model) -> anyhow::Result<Generator> {
        Ok(Generator::new(cluster, COORDINATOR, model, &[WORKER, COORDINATOR])?.lasting(self.pace.time))
    }

    /// One caller with all cores to itself.
    pub fn one_caller(&self) -> Threads {
        Threads { callers: 1, intra: self.cores }
    }
}

/// Asks all children of this process to end, and waits for them.
fn end_children() {
    const STOP_TIMEOUT: Duration = Duration::from_secs(20);
    let lists = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = lists.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let pids: Vec<u32> = lists.flat_map(|list| list.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect();
    let children: Vec<_> = pids.into_iter().filter_map(|pid| Process::adopt("a child", pid).ok()).collect();
    for child in &children {
        let asked = child.signal(Signal::TERM).and_then(|()| child.wait(STOP_TIMEOUT));
        asked.unwrap_or_else(|error| eprintln!("cresset-bench: {error}"));
    }
}
