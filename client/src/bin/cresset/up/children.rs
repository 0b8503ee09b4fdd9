//! The processes of a local cluster: started, watched, started again where that was asked for, and stopped.
//!
//! Each is a group of its own, so that Ctrl-C reaches this process alone, which then ends them in an orderly way. They
//! die with this process whatever ends it (`--exit-with-parent`), so nothing here has to be cleaned up by a later run.
use std::{
    ffi::OsString,
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::Command,
    sync::mpsc,
    time::{Instant, sleep_until, timeout_at},
};

use super::signals::Signals;

const RESTART_PAUSE_MIN: Duration = Duration::from_millis(500);
const RESTART_PAUSE_MAX: Duration = Duration::from_secs(5);
/// A life this long makes earlier deaths forgotten.
const HEALTHY_LIFE: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// How long coordinators are left to hear of the workers' end.
const WORKERS_AHEAD: Duration = Duration::from_millis(500);
/// The command line's own settings, which mean something else to a coordinator or a worker, and their file: one can't
/// be right for both kinds.
const OWN_VARIABLES: [&str; 4] = ["CRESSET_CONFIG", "CRESSET_ENDPOINTS", "CRESSET_TIMEOUT", "CRESSET_OUTPUT"];

/// One process to run.
#[derive(Debug, Clone)]
pub struct Process {
    pub id: String,
    pub is_coordinator: bool,
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    /// `host:port` of its gRPC service.
    pub grpc: String,
    /// `host:port` of its metrics.
    pub http: String,
    pub log: PathBuf,
}

/// A process couldn't be started.
#[derive(Debug, thiserror::Error)]
#[error("{id} can't be started: {}", crate::settings::plain(error))]
pub struct SpawnError {
    id: String,
    error: io::Error,
}

/// What happened to a process.
#[derive(Debug)]
pub enum Event {
    /// It ended by itself, or by someone else's hand.
    Died { id: String, how: String },
    /// It runs again.
    Restarted { id: String },
    /// It couldn't be started again; that is tried on.
    NotRestarted(SpawnError),
}

struct Exit {
    index: usize,
    status: io::Result<ExitStatus>,
}

struct Entry {
    process: Process,
    /// While it runs.
    pid: Option<Pid>,
    last_pid: u32,
    started: Instant,
    deaths: u32,
    restart_at: Option<Instant>,
}

/// All processes of one cluster.
pub struct Fleet {
    entries: Vec<Entry>,
    restarts: bool,
    exits: mpsc::Receiver<Exit>,
    exits_sender: mpsc::Sender<Exit>,
}

impl Fleet {
    /// Starts nothing yet.
    pub fn new(processes: Vec<Process>, restarts: bool) -> Self {
        // Each process has at most one exit to tell before it is started again.
        let (exits_sender, exits) = mpsc::channel(processes.len().max(1));
        let entry = |process| Entry { process, pid: None, last_pid: 0, started: Instant::now(), deaths: 0, restart_at: None };
        Self { entries: processes.into_iter().map(entry).collect(), restarts, exits, exits_sender }
    }

    /// Starts every process. Those that were started before a failure keep running until [`Fleet::stop`].
    ///
    /// # Errors
    /// [`SpawnError`] of the first that can't be started.
    pub fn start(&mut self) -> Result<(), SpawnError> {
        (0..self.entries.len()).try_for_each(|index| self.spawn(index))
    }

    fn spawn(&mut self, index: usize) -> Result<(), SpawnError> {
        let entry = &mut self.entries[index];
        let mut child = command(&entry.process)
            .and_then(|mut command| command.spawn())
            .map_err(|error| SpawnError { id: entry.process.id.clone(), error })?;
        entry.pid = child.id().and_then(|pid| i32::try_from(pid).ok()).map(Pid::from_raw);
        entry.last_pid = child.id().unwrap_or(0);
        entry.started = Instant::now();
        entry.restart_at = None;
        let exits = self.exits_sender.clone();
        tokio::spawn(async move {
            let status = child.wait().await;
            // Nobody listens any more only when this whole process is about to end.
            let _ = exits.send(Exit { index, status }).await;
        });
        Ok(())
    }

    /// Every process with the id of its last life, which may be over.
    pub fn pids(&self) -> impl Iterator<Item = (&Process, u32)> {
        self.entries.iter().map(|entry| (&entry.process, entry.last_pid))
    }

    /// Does at least one process run, or is about to?
    pub fn is_alive(&self) -> bool {
        self.entries.iter().any(|entry| entry.pid.is_some() || entry.restart_at.is_some())
    }

    /// The next death or restart. Safe to drop and to call again.
    pub async fn next(&mut self) -> Event {
        let due = self.entries.iter().enumerate().filter_map(|(index, entry)| Some((entry.restart_at?, index))).min();
        let restart = async {
            match due {
                Some((at, index)) => {
                    sleep_until(at).await;
                    index
                }
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            Some(exit) = self.exits.recv() => self.died(&exit),
            index = restart => self.restart(index),
        }
    }

    fn died(&mut self, exit: &Exit) -> Event {
        let entry = &mut self.entries[exit.index];
        entry.pid = None;
        entry.deaths = if entry.started.elapsed() >= HEALTHY_LIFE { 1 } else { entry.deaths.saturating_add(1) };
        if self.restarts {
            entry.restart_at = Some(Instant::now() + restart_pause(entry.deaths));
        }
        let how = match &exit.status {
            Ok(status) => ending(*status),
            Err(error) => crate::settings::plain(error),
        };
        Event::Died { id: entry.process.id.clone(), how }
    }

    fn restart(&mut self, index: usize) -> Event {
        match self.spawn(index) {
            Ok(()) => Event::Restarted { id: self.entries[index].process.id.clone() },
            Err(error) => {
                self.entries[index].restart_at = Some(Instant::now() + RESTART_PAUSE_MAX);
                Event::NotRestarted(error)
            }
        }
    }

    /// The last line of a process's log, for a message about its end, and where to read on.
    pub fn last_words(&self, id: &str) -> String {
        let Some(entry) = self.entries.iter().find(|entry| entry.process.id == id) else { return String::new() };
        let log = &entry.process.log;
        match last_line(log) {
            Ok(Some(line)) => format!("\"{line}\"; see {}", log.display()),
            Ok(None) | Err(_) => format!("see {}", log.display()),
        }
    }

    /// Ends every process: asks, waits, and kills what is left, at once where Ctrl-C comes again.
    /// Returns how many had to be killed.
    pub async fn stop(&mut self, signals: &mut Signals) -> usize {
        self.restarts = false;
        for entry in &mut self.entries {
            entry.restart_at = None;
        }
        // Workers first, so that there is a leader to say goodbye to; but a leader that doesn't answer holds nobody up.
        self.signal(Signal::SIGTERM, |process| !process.is_coordinator);
        let mut coordinators_at = Some(Instant::now() + WORKERS_AHEAD);
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.is_alive() {
            let workers_live = self.entries.iter().any(|entry| entry.pid.is_some() && !entry.process.is_coordinator);
            if coordinators_at.take_if(|at| !workers_live || *at <= Instant::now()).is_some() {
                self.signal(Signal::SIGTERM, |process| process.is_coordinator);
            }
            let wake = coordinators_at.unwrap_or(deadline);
            tokio::select! {
                exit = timeout_at(wake, self.exits.recv()) => match exit {
                    Ok(Some(exit)) => drop(self.died(&exit)),
                    Ok(None) => break,
                    Err(_) if wake == deadline => break,
                    Err(_) => {}
                },
                () = signals.next_interrupt() => break,
            }
        }
        let killed = self.signal(Signal::SIGKILL, |_| true);
        let deadline = Instant::now() + STOP_TIMEOUT;
        while self.is_alive() {
            match timeout_at(deadline, self.exits.recv()).await {
                Ok(Some(exit)) => drop(self.died(&exit)),
                Ok(None) | Err(_) => break,
            }
        }
        killed
    }

    /// Sends a signal to everyone of those that runs. A process that ended is taken off first, so that no number that may belong
    /// to someone else by now is ever used: ends are noticed on this thread only.
    fn signal(&mut self, signal: Signal, those: impl Fn(&Process) -> bool) -> usize {
        while let Ok(exit) = self.exits.try_recv() {
            self.died(&exit);
        }
        let those = self.entries.iter().filter(|entry| those(&entry.process));
        those.filter_map(|entry| entry.pid).filter(|pid| kill(*pid, signal).is_ok()).count()
    }
}

fn command(process: &Process) -> io::Result<Command> {
    let log = OpenOptions::new().create(true).append(true).open(&process.log)?;
    let mut command = Command::new(&process.program);
    command.args(&process.arguments).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    for variable in OWN_VARIABLES {
        command.env_remove(variable);
    }
    Ok(command)
}

/// 0.5 s after the first death in a row, then twice as long each time, up to 5 s.
fn restart_pause(deaths: u32) -> Duration {
    (RESTART_PAUSE_MIN * 2u32.saturating_pow(deaths.saturating_sub(1).min(8))).min(RESTART_PAUSE_MAX)
}

/// How a process ended, in words.
pub fn ending(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(number)) => {
            let name = Signal::try_from(number).map_or("unknown", Signal::as_str);
            format!("killed by signal {number} ({name})")
        }
        (None, None) => "ended".to_owned(),
    }
}

fn last_line(log: &Path) -> io::Result<Option<String>> {
    const TAIL_BYTES_MAX: u64 = 8 * 1024;
    let mut file = File::open(log)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(TAIL_BYTES_MAX)))?;
    let mut tail = Vec::new();
    file.take(TAIL_BYTES_MAX).read_to_end(&mut tail)?;
    let text = String::from_utf8_lossy(&tail);
    Ok(text.lines().rev().map(crate::output::one_line).find(|line| !line.is_empty()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(id: &str, script: &str, folder: &Path) -> Process {
        Process {
            id: id.to_owned(),
            is_coordinator: true,
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), script.into()],
            grpc: String::new(),
            http: String::new(),
            log: folder.join(format!("{id}.log")),
        }
    }

    #[test]
    fn restarts_back_off() {
        let pauses: Vec<_> = (1..=6).map(|deaths| restart_pause(deaths).as_millis()).collect();
        assert_eq!(pauses, [500, 1000, 2000, 4000, 5000, 5000]);
        assert_eq!(restart_pause(u32::MAX), RESTART_PAUSE_MAX);
    }

    #[test]
    fn endings_are_told_in_words() {
        assert_eq!(ending(ExitStatus::from_raw(2 << 8)), "exit status 2");
        assert_eq!(ending(ExitStatus::from_raw(9)), "killed by signal 9 (SIGKILL)");
    }

    #[tokio::test]
    async fn a_death_is_reported_once_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(vec![shell("c1", "echo first; echo last words >&2; exit 3", folder.path())], false);
        fleet.start().unwrap();
        let Event::Died { id, how } = fleet.next().await else { panic!("it died") };
        assert_eq!((id.as_str(), how.as_str()), ("c1", "exit status 3"));
        assert!(fleet.last_words("c1").starts_with("\"last words\"; see "), "{}", fleet.last_words("c1"));
        assert!(!fleet.is_alive());
        // 0 would mean the reader's own group to whoever sends it a signal.
        assert!(fleet.pids().all(|(_, pid)| pid != 0));
    }

    #[tokio::test]
    async fn a_process_that_died_runs_again_where_that_was_asked_for() {
        let folder = tempfile::tempdir().unwrap();
        let mut fleet = Fleet::new(vec![shell("c1", "exit 0", folder.path())], true);
        fleet.start().unwrap();
        assert!(matches!(fleet.next().await, Event::Died { .. }));
        assert!(fleet.is_alive());
        assert!(matches!(fleet.next().await, Event::Restarted { .. }));
    }

    #[tokio::test]
    async fn stopping_asks_first_and_a_second_interrupt_kills() {
        let folder = tempfile::tempdir().unwrap();
        let polite = shell("c1", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done", folder.path());
        let log = polite.log.clone();
        let mut fleet = Fleet::new(vec![polite], false);
        fleet.start().unwrap();
        while last_line(&log).unwrap_or_default().is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(fleet.stop(&mut Signals::never()).await, 0);
        assert_eq!(last_line(&log).unwrap().as_deref(), Some("bye"));

        let stubborn = shell("c2", "trap '' TERM; echo up; while :; do sleep 0.01; done", folder.path());
        let log = stubborn.log.clone();
        let mut fleet = Fleet::new(vec![stubborn], false);
        fleet.start().unwrap();
        while last_line(&log).unwrap_or_default().is_none() {
            tokio::task::yield_now().await;
        }
        assert_eq!(fleet.stop(&mut Signals::at_once()).await, 1);
        assert!(!fleet.is_alive());
    }
}
