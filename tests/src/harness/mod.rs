//! A local cluster of real processes, for one test or one demo.
//!
//! [`Cluster::start`] runs `cresset up` on free ports in a folder of its own and waits until it is ready;
//! dropping it stops everything. Processes are known by the ids of `cluster.json` (`c1`, `w2`) and held by pidfd, so that a
//! signal never hits a stranger who got the same number.
//!
//! Waiting is watching: for a line on stdout, for a status from [`Cluster::wait_for`], for the end of a process.

pub mod binaries;
pub mod launch;
mod process;
mod repository;
mod status;

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    io::{self, BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

use cresset_client::{ConnectError, CressetClient};
use rustix::process::Signal;
use serde::Deserialize;
use tempfile::TempDir;

pub use self::{
    process::Process,
    repository::{ModelRepository, fp32_model},
    status::{Watch, leader_of, model_of, state_of, worker_of},
};

/// How long a cluster may take to become ready.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// How long it may take to stop in order.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// What is shown of each log when a test fails, in lines.
const TAIL_LINES: usize = 15;

/// What went wrong in the harness itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file, a folder or a process.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's words.
        source: io::Error,
    },
    /// `cresset up` ended, or took too long.
    #[error("the cluster isn't ready: {0}")]
    NotReady(String),
    /// There is no such process in this cluster.
    #[error("there is no process '{0}' in this cluster")]
    NoProcess(String),
    /// Nothing that was waited for came in time.
    #[error("not within {} ms: {what}", .limit.as_millis())]
    TimedOut {
        /// How long was waited.
        limit: Duration,
        /// What was waited for, and what was seen instead.
        what: String,
    },
    /// The client.
    #[error(transparent)]
    Connect(#[from] ConnectError),
}

/// Makes an [`Error::Io`] that says what was tried.
pub(crate) fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let what = what.into();
    move |source| Error::Io { what, source }
}

/// A cluster to start.
#[derive(Debug, Clone)]
pub struct Options {
    /// How many coordinators.
    pub coordinators: usize,
    /// How many workers.
    pub workers: usize,
    /// Models that have to answer before the cluster counts as ready.
    pub deploy: Vec<String>,
    /// The model repository; [`binaries::demo_models`] unless told otherwise.
    pub model_repository: PathBuf,
    /// The backup to begin from.
    pub restore: Option<PathBuf>,
    /// Whether `cresset up` starts again what died.
    pub restart: bool,
    /// The cluster's folder; a temporary one unless told otherwise.
    pub data_dir: Option<PathBuf>,
    /// Variables for `cresset up` and its processes.
    pub env: Vec<(String, String)>,
    /// What workers run models on: `cpu`, `cuda` or `auto`.
    pub device: &'static str,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            coordinators: 3,
            workers: 3,
            deploy: vec![],
            model_repository: binaries::demo_models(),
            restore: None,
            restart: false,
            data_dir: None,
            env: vec![],
            device: "cpu",
        }
    }
}

impl Options {
    /// The default with these models.
    pub fn deploying(models: &[&str]) -> Self {
        Self { deploy: models.iter().map(ToString::to_string).collect(), ..Self::default() }
    }
}

/// `cluster.json`, as the issue promises it.
#[derive(Debug, Clone, Deserialize)]
pub struct ClusterFile {
    /// In order of their ids.
    pub coordinators: Vec<Member>,
    /// In order of their ids.
    pub workers: Vec<Member>,
}

/// One process in `cluster.json`.
#[derive(Debug, Clone, Deserialize)]
pub struct Member {
    /// `c1`, `w2`.
    pub id: String,
    /// Its process.
    pub pid: u32,
    /// `host:port`.
    pub grpc: String,
    /// `host:port`.
    pub http: String,
}

/// A process for [`Cluster::launch`].
#[derive(Debug, Clone)]
pub struct Launch {
    /// `c1`, `w2`.
    pub id: String,
    /// What it is.
    pub is_coordinator: bool,
    /// `host:port`.
    pub grpc: String,
    /// `host:port`.
    pub http: String,
    /// Program and arguments.
    pub command_line: Vec<OsString>,
}

impl ClusterFile {
    /// Reads `DIR/cluster.json`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(data_dir: &Path) -> Result<Self, Error> {
        let path = data_dir.join("cluster.json");
        let bytes = fs::read(&path).map_err(failed(format!("can't read {}", path.display())))?;
        serde_json::from_slice(&bytes).map_err(io::Error::from).map_err(failed(format!("can't read {}", path.display())))
    }
}

/// A running cluster. Dropped, it stops; what it left in its folder is shown if a test panicked.
#[derive(Debug)]
pub struct Cluster {
    data_dir: PathBuf,
    temporary: Option<TempDir>,
    /// `cresset up`, if this harness started it.
    up: Option<Child>,
    file: ClusterFile,
    processes: BTreeMap<String, Process>,
}

impl Cluster {
    /// Starts a cluster and waits until it is ready. Blocks.
    ///
    /// # Errors
    /// [`Error::NotReady`] with the words of `cresset up`.
    pub fn start(options: &Options) -> Result<Self, Error> {
        let (data_dir, temporary) = match &options.data_dir {
            Some(folder) => (folder.clone(), None),
            None => {
                let folder = tempfile::Builder::new().prefix("cresset-test-").tempdir().map_err(failed("no temporary folder"))?;
                (folder.path().to_owned(), Some(folder))
            }
        };
        let mut up = Up::spawn(options, &data_dir)?;
        match up.until_ready() {
            Ok(()) => {}
            Err(error) => {
                up.stop();
                return Err(error);
            }
        }
        let mut cluster = Self::of(&data_dir)?;
        cluster.up = Some(up.child);
        cluster.temporary = temporary;
        Ok(cluster)
    }

    /// Takes over a cluster that somebody else runs: it isn't stopped when this is dropped.
    ///
    /// # Errors
    /// [`Error::Io`] if there is no `cluster.json`, or one of its processes doesn't live.
    pub fn attach(data_dir: &Path) -> Result<Self, Error> {
        Self::of(data_dir)
    }

    /// Starts these processes, without `cresset up`: for a cluster whose processes live where that can't put them. Each has
    /// to be told to `--exit-with-parent`. They are stopped, with SIGKILL, when this is dropped.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn launch(data_dir: &Path, launches: Vec<Launch>) -> Result<Self, Error> {
        let logs = data_dir.join("logs");
        fs::create_dir_all(&logs).map_err(failed(format!("can't make {}", logs.display())))?;
        let mut file = ClusterFile { coordinators: vec![], workers: vec![] };
        let mut processes = BTreeMap::new();
        for Launch { id, is_coordinator, grpc, http, command_line } in launches {
            let process = Process::launch(&id, command_line, &logs.join(format!("{id}.log")))?;
            let list = if is_coordinator { &mut file.coordinators } else { &mut file.workers };
            list.push(Member { id: id.clone(), pid: process.pid(), grpc, http });
            processes.insert(id, process);
        }
        Ok(Self { data_dir: data_dir.to_owned(), temporary: None, up: None, file, processes })
    }

    fn of(data_dir: &Path) -> Result<Self, Error> {
        let file = ClusterFile::read(data_dir)?;
        let mut processes = BTreeMap::new();
        for member in file.coordinators.iter().chain(&file.workers) {
            processes.insert(member.id.clone(), Process::adopt(&member.id, member.pid)?);
        }
        Ok(Self { data_dir: data_dir.to_owned(), temporary: None, up: None, file, processes })
    }

    /// The cluster's folder, with `logs/`.
    pub fn data_dir(&self) -> &Path {
        &self.data_dir
    }

    /// `cluster.json`, as it was at the start.
    pub fn file(&self) -> &ClusterFile {
        &self.file
    }

    /// Public gRPC addresses of all coordinators.
    pub fn endpoints(&self) -> Vec<String> {
        self.file.coordinators.iter().map(|member| member.grpc.clone()).collect()
    }

    /// The process with this id.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn process(&self, id: &str) -> Result<&Process, Error> {
        self.processes.get(id).ok_or_else(|| Error::NoProcess(id.to_owned()))
    }

    /// The gRPC address of a process.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn grpc(&self, id: &str) -> Result<&str, Error> {
        self.member(id).map(|member| member.grpc.as_str())
    }

    /// Where a process has its metrics and its health.
    ///
    /// # Errors
    /// [`Error::NoProcess`].
    pub fn http(&self, id: &str) -> Result<&str, Error> {
        self.member(id).map(|member| member.http.as_str())
    }

    fn member(&self, id: &str) -> Result<&Member, Error> {
        let mut members = self.file.coordinators.iter().chain(&self.file.workers);
        members.find(|member| member.id == id).ok_or_else(|| Error::NoProcess(id.to_owned()))
    }

    /// The process id of `cresset up`, if this harness started it.
    pub fn up_pid(&self) -> Option<u32> {
        self.up.as_ref().map(Child::id)
    }

    /// Kills a process with SIGKILL, and waits until it is gone.
    ///
    /// # Errors
    /// [`Error::NoProcess`], or the system's.
    pub fn kill(&self, id: &str) -> Result<(), Error> {
        let process = self.process(id)?;
        process.signal(Signal::KILL)?;
        process.wait(STOP_TIMEOUT)
    }

    /// Kills several processes with SIGKILL, all of them before any is waited for.
    ///
    /// # Errors
    /// As [`Cluster::kill`].
    pub fn kill_all<'a>(&self, ids: impl IntoIterator<Item = &'a str> + Clone) -> Result<(), Error> {
        for id in ids.clone() {
            self.process(id)?.signal(Signal::KILL)?;
        }
        ids.into_iter().try_for_each(|id| self.process(id)?.wait(STOP_TIMEOUT))
    }

    /// Ids of all processes, coordinators first.
    pub fn ids(&self) -> Vec<String> {
        self.file.coordinators.iter().chain(&self.file.workers).map(|member| member.id.clone()).collect()
    }

    /// Stops a process with SIGSTOP: it keeps its connections and says nothing more.
    ///
    /// # Errors
    /// As [`Cluster::kill`].
    pub fn stop(&self, id: &str) -> Result<(), Error> {
        self.process(id)?.signal(Signal::STOP)
    }

    /// Lets a stopped process go on.
    ///
    /// # Errors
    /// As [`Cluster::kill`].
    pub fn cont(&self, id: &str) -> Result<(), Error> {
        self.process(id)?.signal(Signal::CONT)
    }

    /// Starts a process that died again, with the command line it had: same ports, same folder. It dies with the calling
    /// thread.
    ///
    /// # Errors
    /// [`Error::NoProcess`], or the system's.
    pub fn restart_process(&mut self, id: &str) -> Result<(), Error> {
        let log = self.data_dir.join("logs").join(format!("{id}.log"));
        let process = self.processes.get_mut(id).ok_or_else(|| Error::NoProcess(id.to_owned()))?;
        process.restart(&log)
    }

    /// A Rust client of this cluster.
    ///
    /// # Errors
    /// [`Error::Connect`].
    pub async fn client(&self) -> Result<CressetClient, Error> {
        Ok(CressetClient::connect(self.endpoints()).await?)
    }

    /// Kills `cresset up` itself with SIGKILL, and leaves its children to themselves.
    ///
    /// # Errors
    /// The system's.
    pub fn kill_up(&mut self) -> Result<(), Error> {
        let Some(mut up) = self.up.take() else { return Ok(()) };
        up.kill().and_then(|()| up.wait()).map(drop).map_err(failed("can't kill cresset up"))
    }

    /// Asks `cresset up` to stop, and says with which code it ended.
    ///
    /// # Errors
    /// [`Error::TimedOut`], or the system's.
    pub fn shut_down(&mut self) -> Result<Option<i32>, Error> {
        let Some(mut up) = self.up.take() else { return Ok(None) };
        process::end(&mut up, STOP_TIMEOUT)
    }

    /// The end of each log, for a message about a failure.
    pub fn tails(&self) -> String {
        tails(&self.data_dir)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut up) = self.up.take()
            && let Err(error) = process::end(&mut up, STOP_TIMEOUT)
        {
            eprintln!("harness: {error}");
        }
        self.processes.clear();
        if std::thread::panicking() {
            eprintln!("{}", self.tails());
            if let Some(folder) = self.temporary.take() {
                eprintln!("harness: the logs are kept in {}", folder.keep().join("logs").display());
            }
        }
    }
}

fn tails(data_dir: &Path) -> String {
    let mut text = String::new();
    let logs = fs::read_dir(data_dir.join("logs")).into_iter().flatten().flatten();
    let mut paths: Vec<_> = logs.map(|entry| entry.path()).collect();
    paths.sort();
    for path in paths {
        let log = fs::read(&path).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<_> = log.lines().collect();
        text += &format!("--- {}\n", path.display());
        for line in &lines[lines.len().saturating_sub(TAIL_LINES)..] {
            text += &format!("{line}\n");
        }
    }
    text
}

/// `cresset up` on its way.
struct Up {
    child: Child,
    lines: mpsc::Receiver<String>,
    data_dir: PathBuf,
}

impl Up {
    fn spawn(options: &Options, data_dir: &Path) -> Result<Self, Error> {
        let logs = data_dir.join("logs");
        fs::create_dir_all(&logs).map_err(failed(format!("can't make {}", logs.display())))?;
        let stderr = File::options().create(true).append(true).open(logs.join("up.log")).map_err(failed("can't open up.log"))?;
        let mut command = binaries::command("cresset");
        command.args(["up", "--base-port", "0", "--device", options.device]);
        command.args(["--coordinators", &options.coordinators.to_string(), "--workers", &options.workers.to_string()]);
        command.arg("--data-dir").arg(data_dir).arg("--model-repository").arg(&options.model_repository);
        for model in &options.deploy {
            command.args(["--deploy", model]);
        }
        if let Some(backup) = &options.restore {
            command.arg("--restore").arg(backup);
        }
        if options.restart {
            command.arg("--restart");
        }
        command.envs(options.env.iter().cloned());
        let mut child = spawn(command.stdout(Stdio::piped()).stderr(stderr))?;
        let (sender, lines) = mpsc::sync_channel(64);
        if let Some(stdout) = child.stdout.take() {
            // Ends with the process, whose end closes the pipe. Lines that nobody reads are dropped.
            std::thread::spawn(move || {
                for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                    let _ = sender.try_send(line);
                }
            });
        }
        Ok(Self { child, lines, data_dir: data_dir.to_owned() })
    }

    fn until_ready(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + READY_TIMEOUT;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.starts_with("ready: grpc ") => return Ok(()),
                Ok(_) => {}
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    return Err(Error::NotReady(format!("no ready line in {READY_TIMEOUT:?}\n{}", tails(&self.data_dir))));
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    return Err(Error::NotReady(format!("cresset up ended\n{}", tails(&self.data_dir))));
                }
            }
        }
    }

    fn stop(&mut self) {
        if let Err(error) = process::end(&mut self.child, STOP_TIMEOUT) {
            eprintln!("harness: {error}");
        }
    }
}

fn spawn(command: &mut Command) -> Result<Child, Error> {
    let what = format!("can't run {}", command.get_program().to_string_lossy());
    command.stdin(Stdio::null()).spawn().map_err(failed(what))
}
