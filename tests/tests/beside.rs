//! Coordinators that `cresset up` doesn't start, and runbooks that are followed to the letter.
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use cresset_tests::harness::{
    Cluster,
    binaries::{self, Ran, bin_dir, root},
};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::support::PATIENCE;

/// A coordinator beside those of `cresset up`, on a loopback address of its own.
pub struct Beside {
    pub folder: TempDir,
    pub host: String,
    child: Option<Child>,
}

impl Beside {
    pub fn new(number: u8) -> Self {
        let [high, low] = (std::process::id() as u16).to_be_bytes();
        let host = format!("127.{}.{}.{}", 192 | (high & 63), low, number);
        Self { folder: tempfile::tempdir().unwrap(), host, child: None }
    }

    pub fn log(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// The settings of a runbook, with other words in the place of its addresses and folders.
    pub fn configure(&self, settings: &str, replaced: &[(&str, &str)]) {
        let data = self.folder.path().join("data");
        let own = [("/var/lib/cresset", data.to_str().unwrap())];
        let text = replaced.iter().chain(&own).fold(settings.to_owned(), |text, (from, to)| text.replace(from, to));
        fs::write(self.folder.path().join("coordinator.toml"), text).unwrap();
    }

    /// Its data folder.
    pub fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    pub fn start(&mut self) {
        let log = fs::File::options().create(true).append(true).open(self.log()).unwrap();
        let mut command = binaries::command("cresset-coordinator");
        command.args(["--config", "coordinator.toml", "--exit-with-parent", &std::process::id().to_string()]);
        command.current_dir(self.folder.path()).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.child = Some(command.spawn().unwrap());
    }

    /// Waits until it has ended by itself, and says how.
    pub async fn ended(&mut self) -> (Option<i32>, String) {
        let mut child = self.child.take().unwrap();
        let wait = tokio::task::spawn_blocking(move || child.wait());
        let code = timeout(PATIENCE, wait).await.expect("it ends").unwrap().unwrap().code();
        (code, fs::read_to_string(self.log()).unwrap())
    }
}

impl Drop for Beside {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            let log = fs::read_to_string(self.log()).unwrap_or_default();
            eprintln!("--- {}\n{log}", self.host);
        }
    }
}

/// Where a coordinator of `cresset up` talks to the others.
pub fn peer_address(cluster: &Cluster, id: &str) -> String {
    let words = cluster.process(id).unwrap().command_line();
    let at = words.iter().position(|word| word == "--peer").unwrap();
    words[at + 1].to_str().unwrap().to_owned()
}

/// What stands between fences of this kind in a runbook, in order.
pub fn blocks(runbook: &str, kind: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(runbook)).unwrap();
    let fence = format!("```{kind}\n");
    text.split(&fence).skip(1).map(|rest| rest.split("```").next().unwrap().to_owned()).collect()
}

/// Runs a block as an operator would, who has these endpoints in their environment.
pub fn shell(block: &str, endpoints: &[String], folder: &Path) -> Ran {
    let path = format!("{}:{}", bin_dir().display(), std::env::var("PATH").unwrap_or_default());
    let mut command = Command::new("sh");
    binaries::without_settings(&mut command);
    command.args(["-ec", block]).env("PATH", path).env("CRESSET_ENDPOINTS", endpoints.join(",")).current_dir(folder);
    binaries::finish(&mut command).unwrap()
}

/// What a command that succeeded printed.
pub fn done(ran: Ran) -> String {
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran.stdout
}
