//! `cresset up`: a local cluster in the foreground, as separate processes on loopback.
//!
//! One task owns everything: it starts the processes, follows the cluster's status, shows what happens, and ends what it
//! started. It takes no part in serving; when it is gone, so are they.
mod children;
mod plan;
mod ports;
mod ready;
mod signals;
mod view;

use std::{
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use cresset_client::backup::place;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};

use self::{
    children::{Event, Fleet, Process, SpawnError},
    plan::{Plan, PlanError},
    ready::{Goal, ReadyError, Statuses},
    signals::Signals,
    view::{Narrator, Rates, Screen},
};
use crate::{
    connect::Cluster,
    output,
    settings::{Resolver, plain},
    status::Report,
};

/// Where a local cluster lives, unless told otherwise.
pub const DATA_DIR_DEFAULT: &str = ".cresset/cluster";
const CLUSTER_FILE: &str = "cluster.json";
const COORDINATORS_MAX: usize = 9;
const WORKERS_MAX: usize = 64;
const REPAINT_EVERY: Duration = Duration::from_millis(500);

/// Flags of `cresset up`.
#[derive(clap::Args, Default)]
pub struct Args {
    /// How many coordinators [default: 3]
    #[arg(long, env = "CRESSET_UP_COORDINATORS", value_name = "N")]
    coordinators: Option<String>,
    /// How many workers [default: 3]
    #[arg(long, env = "CRESSET_UP_WORKERS", value_name = "N")]
    workers: Option<String>,
    /// The cluster's folder: state, logs and cluster.json [default: .cresset/cluster]
    #[arg(long, env = "CRESSET_UP_DATA_DIR", value_name = "DIR")]
    data_dir: Option<String>,
    /// The first coordinator's gRPC port, the others follow; 0 finds free ones [default: 8001]
    #[arg(long, env = "CRESSET_UP_BASE_PORT", value_name = "PORT")]
    base_port: Option<String>,
    /// The models, in Triton's layout [default: .cresset/models if it exists, else an empty one]
    #[arg(long, env = "CRESSET_UP_MODEL_REPOSITORY", value_name = "DIR")]
    model_repository: Option<String>,
    /// What workers run on: auto, cpu or cuda [default: auto]
    #[arg(long, env = "CRESSET_UP_DEVICE", value_name = "DEVICE")]
    device: Option<String>,
    /// Models to deploy before the cluster counts as ready
    #[arg(long, env = "CRESSET_UP_DEPLOY", value_name = "NAME", num_args = 1.., value_delimiter = ',')]
    pub deploy: Vec<String>,
    /// Start processes that died again, after 0.5 to 5 seconds
    #[arg(long, env = "CRESSET_UP_RESTART")]
    restart: bool,
    /// Begin a new cluster from a backup, in an empty folder
    #[arg(long, value_name = "FILE")]
    restore: Option<PathBuf>,
}

/// [`Args`], checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub coordinators: usize,
    pub workers: usize,
    pub data_dir: PathBuf,
    /// 0 for any that is free.
    pub base_port: u16,
    pub model_repository: Option<PathBuf>,
    pub device: String,
    pub deploy: Vec<String>,
    pub restart: bool,
    /// The backup to begin from.
    pub restore: Option<PathBuf>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            coordinators: 3,
            workers: 3,
            data_dir: DATA_DIR_DEFAULT.into(),
            base_port: 8001,
            model_repository: None,
            device: "auto".to_owned(),
            deploy: vec![],
            restart: false,
            restore: None,
        }
    }
}

impl Settings {
    /// Takes the settings of `cresset up` out of `resolver`; `None` if one of them is wrong.
    pub fn take(resolver: &mut Resolver, args: &Args) -> Option<Self> {
        let coordinators =
            resolver.take("up.coordinators", args.coordinators.as_deref(), Some("3"), |text| count(text, COORDINATORS_MAX));
        let workers = resolver.take("up.workers", args.workers.as_deref(), Some("3"), |text| count(text, WORKERS_MAX));
        let data_dir =
            resolver.take("up.data-dir", args.data_dir.as_deref(), Some(DATA_DIR_DEFAULT), |text| Ok(PathBuf::from(text)));
        let base_port = resolver.take("up.base-port", args.base_port.as_deref(), Some("8001"), |text| {
            text.parse().map_err(|_| "is not a port, it must be 0 (any) to 65535".to_owned())
        });
        let repository =
            resolver.take("up.model-repository", args.model_repository.as_deref(), None, |text| Ok(PathBuf::from(text)));
        let device = resolver.take("up.device", args.device.as_deref(), Some("auto"), |text| match text {
            "auto" | "cpu" | "cuda" => Ok(text.to_owned()),
            _ => Err("must be auto, cpu or cuda".to_owned()),
        });
        let names = args.deploy.join(",");
        let deploy = resolver.take("up.deploy", Some(&names), None, model_names);
        let restart = resolver.take("up.restart", args.restart.then_some("true"), Some("false"), |text| {
            text.parse().map_err(|_| "must be true or false".to_owned())
        });
        Some(Self {
            coordinators: coordinators??,
            workers: workers??,
            data_dir: data_dir??,
            base_port: base_port??,
            model_repository: repository.map_or(Some(None), |given| given.map(Some))?,
            device: device??,
            deploy: deploy.unwrap_or(Some(vec![]))?,
            restart: restart??,
            restore: args.restore.clone(),
        })
    }
}

fn count(text: &str, max: usize) -> Result<usize, String> {
    text.parse().ok().filter(|count| (1..=max).contains(count)).ok_or_else(|| format!("must be a number from 1 to {max}"))
}

fn model_names(text: &str) -> Result<Vec<String>, String> {
    let mut names: Vec<String> = Vec::new();
    for name in text.split(',').map(str::trim).filter(|name| !name.is_empty()) {
        cresset_proto::ids::check_model_name(name).map_err(|error| format!("has a wrong name: {error}"))?;
        if !names.iter().any(|known| known == name) {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Why `cresset up` ended in failure.
#[derive(Debug, thiserror::Error)]
pub enum UpError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    #[error(transparent)]
    NotReady(#[from] ReadyError),
    #[error("{id} ended while the cluster was starting ({how}): {last_words}")]
    DiedEarly { id: String, how: String, last_words: String },
    #[error("every process of the cluster has ended")]
    AllDead,
    #[error("{what}: {}", plain(error))]
    Io { what: String, error: io::Error },
}

/// `cluster.json`: who runs where. Readers find it whole or not at all.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterFile {
    pub coordinators: Vec<Member>,
    pub workers: Vec<Member>,
}

/// One running process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub id: String,
    pub pid: u32,
    /// `host:port`.
    pub grpc: String,
    /// `host:port`.
    pub http: String,
}

impl ClusterFile {
    fn of(fleet: &Fleet) -> Self {
        let mut file = Self::default();
        for (process, pid) in fleet.pids() {
            let list = if process.is_coordinator { &mut file.coordinators } else { &mut file.workers };
            list.push(Member { id: process.id.clone(), pid, grpc: process.grpc.clone(), http: process.http.clone() });
        }
        file
    }

    /// The cluster that lives in a folder, if one does and says so.
    pub fn read(data_dir: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(data_dir.join(CLUSTER_FILE)).ok()?).ok()
    }

    fn write(&self, data_dir: &Path) -> Result<(), UpError> {
        let path = data_dir.join(CLUSTER_FILE);
        let json = serde_json::to_vec_pretty(self).map_err(io::Error::other);
        let written = json.and_then(|json| place(&path, |file| file.write_all(&json)));
        written.map_err(|error| UpError::Io { what: format!("can't write {}", path.display()), error })
    }

    fn remove(data_dir: &Path) -> Result<(), UpError> {
        let path = data_dir.join(CLUSTER_FILE);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(UpError::Io { what: format!("can't remove {}", path.display()), error })
            }
            _ => Ok(()),
        }
    }
}

/// Runs a local cluster until a signal ends it.
///
/// # Errors
/// When it can't be started, doesn't become ready, or all of it dies. Nothing is left running.
pub async fn run(settings: Settings) -> Result<(), UpError> {
    let mut signals = Signals::install().map_err(|error| UpError::Io { what: "signals".to_owned(), error })?;
    let plan = Plan::make(&settings)?;
    ClusterFile::remove(&plan.data_dir)?;
    let mut up = Up::new(&settings, &plan);
    up.screen.say(&format!(
        "starting {} coordinators and {} workers as {}, logs in {}",
        settings.coordinators,
        settings.workers,
        plan.cluster_id,
        plan.data_dir.join("logs").display()
    ));
    let outcome = up.supervise(&mut signals).await;
    up.screen.clear();
    up.screen.say("stopping");
    let killed = up.fleet.stop(&mut signals).await;
    if killed > 0 {
        up.screen.say(&format!("{killed} processes had to be killed"));
    }
    let removed = ClusterFile::remove(&plan.data_dir);
    outcome.and(removed)
}

struct Up<'a> {
    settings: &'a Settings,
    data_dir: &'a Path,
    fleet: Fleet,
    goal: Goal,
    screen: Screen,
    narrator: Narrator,
    rates: Rates,
    begun: Instant,
    is_ready: bool,
}

impl<'a> Up<'a> {
    fn new(settings: &'a Settings, plan: &'a Plan) -> Self {
        let grpc = |process: &Process| process.grpc.clone();
        let goal = Goal {
            workers: plan.processes.iter().filter(|p| !p.is_coordinator).map(|p| p.id.clone()).collect(),
            incarnation_min: unix_us(),
            deploy: settings.deploy.clone(),
            coordinators: plan.processes.iter().filter(|p| p.is_coordinator).map(grpc).collect(),
        };
        Self {
            settings,
            data_dir: &plan.data_dir,
            fleet: Fleet::new(plan.processes.clone(), settings.restart),
            goal,
            screen: Screen::new(),
            narrator: Narrator::new(settings.workers),
            rates: Rates::default(),
            begun: Instant::now(),
            is_ready: false,
        }
    }

    /// Everything between the start and the end. `Ok`: a signal asked for the end.
    async fn supervise(&mut self, signals: &mut Signals) -> Result<(), UpError> {
        self.fleet.start()?;
        let mut statuses = follow_status(self.goal.coordinators.clone());
        let reaching = ready::reach(self.goal.clone(), statuses.clone());
        tokio::pin!(reaching);
        let mut repaint = interval(REPAINT_EVERY);
        repaint.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                () = signals.next() => return Ok(()),
                event = self.fleet.next() => self.on_event(event)?,
                Ok(()) = statuses.changed() => {
                    let report = statuses.borrow_and_update().clone();
                    if let Some(report) = report {
                        self.on_report(&report);
                    }
                }
                reached = &mut reaching, if !self.is_ready => {
                    reached?;
                    self.became_ready()?;
                }
                _ = repaint.tick() => {
                    let report = statuses.borrow().clone();
                    if let Some(report) = report {
                        self.repaint(&report);
                    }
                }
            }
        }
    }

    fn on_event(&mut self, event: Event) -> Result<(), UpError> {
        match event {
            Event::Died { id, how } => {
                if !self.is_ready && !self.settings.restart {
                    let last_words = self.fleet.last_words(&id);
                    return Err(UpError::DiedEarly { id, how, last_words });
                }
                self.screen.say(&format!("{id} died: {how}; {}", self.fleet.last_words(&id)));
                if !self.fleet.is_alive() {
                    return Err(UpError::AllDead);
                }
            }
            Event::Restarted { id } => {
                self.screen.say(&format!("{id} runs again"));
                if self.is_ready {
                    ClusterFile::of(&self.fleet).write(self.data_dir)?;
                }
            }
            Event::NotRestarted(error) => self.screen.say(&error.to_string()),
        }
        Ok(())
    }

    fn became_ready(&mut self) -> Result<(), UpError> {
        self.is_ready = true;
        ClusterFile::of(&self.fleet).write(self.data_dir)?;
        self.screen.say(&format!("ready after {}", output::seconds(self.begun.elapsed())));
        self.screen.clear();
        let line = format!("ready: grpc {}", self.goal.coordinators.join(","));
        output::print(&line).map_err(|error| UpError::Io { what: "stdout".to_owned(), error })
    }

    fn on_report(&mut self, report: &Report) {
        let now_ms = self.now_ms();
        let starting = (!self.is_ready).then(|| self.goal.of_this_life(report));
        for line in self.narrator.tell(starting.as_ref().unwrap_or(report), now_ms) {
            self.screen.say(&line);
        }
        self.rates.note(report, now_ms);
    }

    fn repaint(&mut self, report: &Report) {
        if self.screen.is_live() {
            self.rates.note(report, self.now_ms());
            self.screen.paint(view::picture(report, &self.rates));
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// A task that keeps the newest status, for as long as someone looks at it.
fn follow_status(coordinators: Vec<String>) -> Statuses {
    let (sender, statuses) = watch::channel(None);
    tokio::spawn(async move {
        let mut watch = Cluster::new(coordinators, Duration::MAX).watch().follow_leader();
        // An error means that no coordinator will ever answer; whoever waits for a status sees the channel close.
        while let Ok(status) = watch.next().await {
            if sender.send(Some(Report::from(status))).is_err() {
                return;
            }
        }
    });
    statuses
}

fn unix_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_have_their_defaults_and_their_bounds() {
        let mut resolver = Resolver::default();
        assert_eq!(Settings::take(&mut resolver, &Args::default()), Some(Settings::default()));
        let args = Args {
            coordinators: Some("0".into()),
            workers: Some("many".into()),
            base_port: Some("70000".into()),
            device: Some("tpu".into()),
            deploy: vec!["../x".into()],
            ..Args::default()
        };
        let mut resolver = Resolver::default();
        assert_eq!(Settings::take(&mut resolver, &args), None);
        let text = resolver.finish().unwrap_err().to_string();
        for name in ["up.coordinators", "up.workers", "up.base-port", "up.device", "up.deploy"] {
            assert!(text.contains(name), "{name} is not in {text}");
        }
    }

    #[test]
    fn the_cluster_file_is_whole_and_readable() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(ClusterFile::read(folder.path()), None);
        let member = Member { id: "c1".into(), pid: 7, grpc: "127.0.0.1:8001".into(), http: "127.0.0.1:8002".into() };
        let file = ClusterFile { coordinators: vec![member], workers: vec![] };
        file.write(folder.path()).unwrap();
        assert_eq!(ClusterFile::read(folder.path()), Some(file));
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(folder.path().join(CLUSTER_FILE)).unwrap()).unwrap();
        let expected = serde_json::json!({
            "coordinators": [{"id": "c1", "pid": 7, "grpc": "127.0.0.1:8001", "http": "127.0.0.1:8002"}],
            "workers": [],
        });
        assert_eq!(json, expected);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        ClusterFile::remove(folder.path()).unwrap();
        ClusterFile::remove(folder.path()).unwrap();
        assert_eq!(ClusterFile::read(folder.path()), None);
    }
}
