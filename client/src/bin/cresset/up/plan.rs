//! What has to be true before anything is started, each failure in one clear line.
use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Seek, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use cresset_client::backup::{Backup, BackupError, place};

use super::{
    Settings,
    children::Process,
    ports::{self, Block, PortError, Ports},
};
use crate::settings::plain;

const HOST: &str = "127.0.0.1";
const MODELS_DEFAULT: &str = ".cresset/models";

/// Why a cluster can't be started.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    #[error("data-dir: can't write to {}: {}; choose another with --data-dir", path.display(), plain(error))]
    DataDir { path: PathBuf, error: io::Error },
    #[error("data-dir: {} is in use by another `cresset up`{owner}; stop that one, or choose another with --data-dir", path.display())]
    InUse { path: PathBuf, owner: String },
    #[error("data-dir: {} holds a cluster of {found} coordinators, not of {wanted}; start it with --coordinators {found}, or choose another with --data-dir", path.display())]
    OtherCluster { path: PathBuf, found: usize, wanted: usize },
    #[error("model-repository: {}: {}; name a folder with --model-repository", path.display(), plain(error))]
    Repository { path: PathBuf, error: io::Error },
    #[error("{program} is not beside this program (in {}): run `make build`", folder.display())]
    Binary { program: &'static str, folder: PathBuf },
    #[error("libtorch is missing or broken ({0}): run `make fetch`")]
    Libtorch(String),
    #[error("cresset-worker doesn't run: {0}")]
    Worker(String),
    #[error("restore: {0}")]
    Restore(#[from] BackupError),
    #[error(transparent)]
    Ports(#[from] PortError),
}

/// Everything that is needed to start the processes, with the locks that keep others out meanwhile.
#[derive(Debug)]
pub struct Plan {
    pub data_dir: PathBuf,
    pub cluster_id: String,
    pub processes: Vec<Process>,
    _block: Block,
    _lock: File,
}

impl Plan {
    /// Checks folders, binaries, libtorch and ports, and says what to start.
    ///
    /// # Errors
    /// [`PlanError`], one line each.
    pub fn make(settings: &Settings) -> Result<Self, PlanError> {
        let (data_dir, lock) = claim_folder(&settings.data_dir)?;
        let cluster_id = cluster_id(&data_dir, settings.coordinators)?;
        let repository = repository(settings.model_repository.as_deref(), &data_dir)?;
        let programs = Programs::beside_this_one()?;
        check_worker(&programs.worker)?;
        if let Some(file) = &settings.restore {
            let backup = Backup::open(file)?;
            (1..=settings.coordinators).try_for_each(|n| backup.prepare(&data_dir.join(format!("c{n}"))))?;
        }
        let block = ports::claim(settings.base_port, settings.coordinators, settings.workers)?;
        let layout = Layout { settings, data_dir: &data_dir, cluster_id: &cluster_id, repository: &repository, base: block.base };
        let mut processes: Vec<_> = (0..settings.coordinators).map(|n| layout.coordinator(n, &programs.coordinator)).collect();
        processes.extend((0..settings.workers).map(|n| layout.worker(n, &programs.worker)));
        Ok(Self { data_dir, cluster_id, processes, _block: block, _lock: lock })
    }
}

/// Makes the folders and takes them for this process.
fn claim_folder(path: &Path) -> Result<(PathBuf, File), PlanError> {
    let failed = |error| PlanError::DataDir { path: path.to_owned(), error };
    fs::create_dir_all(path.join("logs")).map_err(failed)?;
    let path = path.canonicalize().map_err(failed)?;
    let mut lock =
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path.join("lock")).map_err(failed)?;
    if lock.try_lock().is_err() {
        let mut owner = String::new();
        let known = lock.read_to_string(&mut owner).is_ok() && owner.trim().parse::<u32>().is_ok();
        return Err(PlanError::InUse { path, owner: if known { format!(" (pid {})", owner.trim()) } else { String::new() } });
    }
    let note_pid = |lock: &mut File| {
        lock.set_len(0)?;
        lock.rewind()?;
        writeln!(lock, "{}", std::process::id())
    };
    note_pid(&mut lock).map_err(failed)?;
    Ok((path, lock))
}

/// The identity of the cluster that lives in this folder; a new one for a new folder.
fn cluster_id(data_dir: &Path, coordinators: usize) -> Result<String, PlanError> {
    let failed = |error| PlanError::DataDir { path: data_dir.to_owned(), error };
    let path = data_dir.join("cluster-id");
    match fs::read_to_string(&path) {
        Ok(text) if !text.trim().is_empty() => {
            let found = (1..).take_while(|n| data_dir.join(format!("c{n}")).is_dir()).count();
            if found != 0 && found != coordinators {
                return Err(PlanError::OtherCluster { path: data_dir.to_owned(), found, wanted: coordinators });
            }
            Ok(text.trim().to_owned())
        }
        Ok(_) => new_cluster_id(data_dir).map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => new_cluster_id(data_dir).map_err(failed),
        Err(error) => Err(failed(error)),
    }
}

fn new_cluster_id(data_dir: &Path) -> io::Result<String> {
    let id = format!("local-{:08x}", rand::random::<u32>());
    place(&data_dir.join("cluster-id"), |file| writeln!(file, "{id}"))?;
    Ok(id)
}

fn repository(given: Option<&Path>, data_dir: &Path) -> Result<PathBuf, PlanError> {
    let usual = Path::new(MODELS_DEFAULT);
    let path = match given {
        Some(path) => path.to_owned(),
        None if usual.is_dir() => usual.to_owned(),
        None => {
            let own = data_dir.join("models");
            fs::create_dir_all(&own).map_err(|error| PlanError::DataDir { path: own.clone(), error })?;
            own
        }
    };
    let readable = path.canonicalize().and_then(|whole| fs::read_dir(&whole).map(|_| whole));
    readable.map_err(|error| PlanError::Repository { path, error })
}

struct Programs {
    coordinator: PathBuf,
    worker: PathBuf,
}

impl Programs {
    fn beside_this_one() -> Result<Self, PlanError> {
        let this = std::env::current_exe().map_err(|error| PlanError::Worker(plain(&error)))?;
        let folder = this.parent().unwrap_or(Path::new(".")).to_owned();
        let find = |program: &'static str| {
            let path = folder.join(program);
            if path.is_file() { Ok(path) } else { Err(PlanError::Binary { program, folder: folder.clone() }) }
        };
        Ok(Self { coordinator: find("cresset-coordinator")?, worker: find("cresset-worker")? })
    }
}

/// Starts the worker for its version only: that loads libtorch, or shows why it can't be loaded.
fn check_worker(program: &Path) -> Result<(), PlanError> {
    const VERSION_TIMEOUT: Duration = Duration::from_secs(60);
    const LOOK_EVERY: Duration = Duration::from_millis(5);
    let failed = |error: &io::Error| PlanError::Worker(plain(error));
    let mut command = Command::new(program);
    command.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(|error| failed(&error))?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|error| failed(&error))? {
            break status;
        }
        if begun.elapsed() > VERSION_TIMEOUT {
            let _ = child.kill();
            let _ = child.wait();
            return Err(PlanError::Worker(format!("no version within {} s", VERSION_TIMEOUT.as_secs())));
        }
        std::thread::sleep(LOOK_EVERY);
    };
    if status.success() {
        return Ok(());
    }
    let mut text = String::new();
    if let Some(stderr) = child.stderr.take() {
        // What was cut off or isn't text is no loss here: the first line says it.
        let _ = stderr.take(64 * 1024).read_to_string(&mut text);
    }
    Err(worker_problem(&text, &super::children::ending(status)))
}

/// Tells a loader's failure from the program's own.
fn worker_problem(stderr: &str, ending: &str) -> PlanError {
    let line = crate::output::one_line(stderr.lines().find(|line| !line.trim().is_empty()).unwrap_or_default());
    for mark in ["error while loading shared libraries: ", "symbol lookup error: "] {
        if let Some((_, what)) = line.split_once(mark) {
            return PlanError::Libtorch(what.to_owned());
        }
    }
    PlanError::Worker(if line.is_empty() { ending.to_owned() } else { format!("{ending}: {line}") })
}

/// Where each process lives and what it is told.
struct Layout<'a> {
    settings: &'a Settings,
    data_dir: &'a Path,
    cluster_id: &'a str,
    repository: &'a Path,
    base: u16,
}

impl Layout<'_> {
    fn peer(&self, n: usize) -> String {
        format!("{HOST}:{}", Ports::of(self.base, n).peer)
    }

    fn coordinator(&self, n: usize, program: &Path) -> Process {
        let peers = (0..self.settings.coordinators).map(|n| format!("c{}={}", n + 1, self.peer(n))).collect::<Vec<_>>().join(",");
        let id = format!("c{}", n + 1);
        let more = [
            ("--cluster-id", self.cluster_id.into()),
            ("--peer", self.peer(n).into()),
            ("--peers", peers.into()),
            ("--data-dir", self.data_dir.join(&id).into_os_string()),
        ];
        self.process(id, n, program, more)
    }

    fn worker(&self, n: usize, program: &Path) -> Process {
        let coordinators = (0..self.settings.coordinators).map(|n| self.peer(n)).collect::<Vec<_>>().join(",");
        let id = format!("w{}", n + 1);
        let more = [
            ("--coordinators", coordinators.into()),
            ("--cache-dir", self.data_dir.join(&id).join("files").into_os_string()),
            ("--device", self.settings.device.clone().into()),
            ("--zone", "local".into()),
            // The workers share one machine: more threads than cores would make all of them slower.
            ("--intra-op-threads", self.threads_per_worker().to_string().into()),
        ];
        self.process(id, self.settings.coordinators + n, program, more)
    }

    fn threads_per_worker(&self) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        (cores / self.settings.workers.max(1)).max(1)
    }

    fn process<const N: usize>(
        &self,
        id: String,
        place: usize,
        program: &Path,
        more: [(&str, std::ffi::OsString); N],
    ) -> Process {
        let ports = Ports::of(self.base, place);
        let (grpc, http) = (format!("{HOST}:{}", ports.grpc), format!("{HOST}:{}", ports.http));
        let shared = [
            ("--id", id.clone().into()),
            ("--grpc", grpc.clone().into()),
            ("--http", http.clone().into()),
            ("--model-repository", self.repository.as_os_str().to_owned()),
            ("--exit-with-parent", std::process::id().to_string().into()),
        ];
        let arguments = shared.into_iter().chain(more).flat_map(|(flag, value)| [flag.into(), value]).collect();
        let log = self.data_dir.join("logs").join(format!("{id}.log"));
        Process {
            is_coordinator: place < self.settings.coordinators,
            id,
            program: program.to_owned(),
            arguments,
            grpc,
            http,
            log,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(data_dir: &Path) -> Settings {
        Settings { data_dir: data_dir.to_owned(), ..Settings::default() }
    }

    fn words(process: &Process) -> String {
        process.arguments.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn processes_are_told_where_the_others_are() {
        let settings = Settings { coordinators: 2, workers: 1, device: "cpu".to_owned(), ..settings(Path::new("data")) };
        let layout = Layout {
            settings: &settings,
            data_dir: Path::new("data"),
            cluster_id: "local-1",
            repository: Path::new("models"),
            base: 8001,
        };
        let pid = std::process::id();
        assert_eq!(
            words(&layout.coordinator(1, Path::new("x"))),
            format!(
                "--id c2 --grpc 127.0.0.1:8011 --http 127.0.0.1:8012 --model-repository models --exit-with-parent {pid} \
                 --cluster-id local-1 --peer 127.0.0.1:8013 --peers c1=127.0.0.1:8003,c2=127.0.0.1:8013 --data-dir data/c2"
            )
        );
        let worker = layout.worker(0, Path::new("x"));
        assert_eq!(
            words(&worker),
            format!(
                "--id w1 --grpc 127.0.0.1:8021 --http 127.0.0.1:8022 --model-repository models --exit-with-parent {pid} \
                 --coordinators 127.0.0.1:8003,127.0.0.1:8013 --cache-dir data/w1/files --device cpu --zone local --intra-op-threads {}",
                layout.threads_per_worker()
            )
        );
        assert_eq!(worker.log, Path::new("data/logs/w1.log"));
        assert!(!worker.is_coordinator);
    }

    #[test]
    fn a_folder_belongs_to_one_cluster_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let (path, lock) = claim_folder(folder.path()).unwrap();
        let error = claim_folder(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("in use by another `cresset up` (pid {})", std::process::id())), "{error}");
        drop(lock);
        assert_eq!(claim_folder(&path).unwrap().0, path);
    }

    #[test]
    fn a_cluster_keeps_its_identity_and_its_size() {
        let folder = tempfile::tempdir().unwrap();
        let first = cluster_id(folder.path(), 3).unwrap();
        assert!(
            first.strip_prefix("local-").is_some_and(|hex| hex.len() == 8 && u32::from_str_radix(hex, 16).is_ok()),
            "{first}"
        );
        for n in 1..=3 {
            fs::create_dir(folder.path().join(format!("c{n}"))).unwrap();
        }
        assert_eq!(cluster_id(folder.path(), 3).unwrap(), first);
        let error = cluster_id(folder.path(), 5).unwrap_err().to_string();
        assert!(error.contains("holds a cluster of 3 coordinators, not of 5"), "{error}");
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_one_clear_line() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = claim_folder(&file.join("data")).unwrap_err().to_string();
        assert!(error.starts_with("data-dir: can't write to ") && error.contains("not a directory"), "{error}");
        let error = repository(Some(&folder.path().join("none")), folder.path()).unwrap_err().to_string();
        assert!(error.starts_with("model-repository: ") && error.contains("no such file or directory"), "{error}");
    }

    #[test]
    fn a_missing_libtorch_is_told_from_other_failures() {
        let loader =
            "cresset-worker: error while loading shared libraries: libtorch_cpu.so: cannot open shared object file: No such file";
        let error = worker_problem(loader, "exit status 127").to_string();
        assert_eq!(
            error,
            "libtorch is missing or broken (libtorch_cpu.so: cannot open shared object file: No such file): run `make fetch`"
        );
        let error = worker_problem("\nboom\n", "exit status 1").to_string();
        assert_eq!(error, "cresset-worker doesn't run: exit status 1: boom");
    }
}
