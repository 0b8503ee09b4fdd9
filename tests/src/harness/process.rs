//! One process of a cluster, held by a pidfd.

use std::{
    ffi::OsString,
    fs::{self, OpenOptions},
    io,
    os::{fd::OwnedFd, unix::ffi::OsStringExt},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};

use super::{Error, binaries, failed};

/// A process that lives, or one that did.
#[derive(Debug)]
pub struct Process {
    id: String,
    pid: u32,
    pidfd: OwnedFd,
    /// Its program and arguments.
    command_line: Vec<OsString>,
    /// Set when this harness started its present life.
    child: Option<Child>,
}

impl Process {
    /// Takes hold of a process that somebody else started.
    ///
    /// # Errors
    /// [`Error::Io`] if it doesn't live.
    pub fn adopt(id: &str, pid: u32) -> Result<Self, Error> {
        let pidfd = open(pid).map_err(failed(format!("{id} (pid {pid}) doesn't live")))?;
        let path = format!("/proc/{pid}/cmdline");
        let bytes = fs::read(&path).map_err(failed(format!("can't read {path}")))?;
        let mut command_line: Vec<_> = bytes.split(|byte| *byte == 0).map(|part| OsString::from_vec(part.to_vec())).collect();
        // Each argument ends with a zero, the last one too.
        command_line.pop();
        Ok(Self { id: id.to_owned(), pid, pidfd, command_line, child: None })
    }

    /// Starts one, as a child of this process that dies with the calling thread.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn launch(id: &str, command_line: Vec<OsString>, log: &Path) -> Result<Self, Error> {
        let own = std::process::id();
        let pidfd = open(own).map_err(failed("can't watch this process"))?;
        let mut process = Self { id: id.to_owned(), pid: own, pidfd, command_line, child: None };
        process.restart(log)?;
        Ok(process)
    }

    /// The number of its present life, or of the last one.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Its program and arguments.
    pub fn command_line(&self) -> &[OsString] {
        &self.command_line
    }

    /// Sends a signal. One that is gone already needs none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn signal(&self, signal: Signal) -> Result<(), Error> {
        match pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(failed(format!("can't signal {}", self.id))(error.into())),
        }
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// [`Error::TimedOut`].
    pub fn wait(&self, limit: Duration) -> Result<(), Error> {
        if ended(&self.pidfd, limit).map_err(failed(format!("can't watch {}", self.id)))? {
            Ok(())
        } else {
            Err(Error::TimedOut { limit, what: format!("the end of {} (pid {})", self.id, self.pid) })
        }
    }

    /// Does it live?
    pub fn is_alive(&self) -> bool {
        !ended(&self.pidfd, Duration::ZERO).unwrap_or(true)
    }

    /// Starts it again, as a child of this process that dies with the calling thread.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn restart(&mut self, log: &Path) -> Result<(), Error> {
        if let Some(mut child) = self.child.take() {
            let _ = child.wait();
        }
        let Some((program, arguments)) = self.command_line.split_first() else {
            return Err(failed(format!("{} has no command line", self.id))(io::Error::from(io::ErrorKind::NotFound)));
        };
        let log = OpenOptions::new().create(true).append(true).open(log).map_err(failed("can't open the log"))?;
        let stdout = log.try_clone().map_err(failed("can't open the log"))?;
        let mut command = Command::new(program);
        binaries::without_settings(&mut command);
        let mut follows_parent = false;
        for argument in arguments {
            let own = OsString::from(std::process::id().to_string());
            command.arg(if follows_parent { &own } else { argument });
            follows_parent = argument == "--exit-with-parent";
        }
        let child = super::spawn(command.stdout(stdout).stderr(log).stdin(Stdio::null()))?;
        self.pid = child.id();
        self.pidfd = open(self.pid).map_err(failed(format!("can't watch {}", self.id)))?;
        self.child = Some(child);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn ended(pidfd: &OwnedFd, limit: Duration) -> io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    let ready = poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit))?;
    Ok(ready > 0)
}

/// Asks a child to end, kills it when it doesn't, and says with which code it ended.
pub(super) fn end(child: &mut Child, limit: Duration) -> Result<Option<i32>, Error> {
    let pidfd = open(child.id()).map_err(failed("can't watch a child"))?;
    // One that has ended by itself needs no signal.
    let _ = pidfd_send_signal(&pidfd, Signal::TERM);
    let in_time = ended(&pidfd, limit).map_err(failed("can't watch a child"))?;
    if !in_time {
        let _ = child.kill();
    }
    let status = child.wait().map_err(failed("can't wait for a child"))?;
    if in_time { Ok(status.code()) } else { Err(Error::TimedOut { limit, what: "the end of cresset up after SIGTERM".into() }) }
}
