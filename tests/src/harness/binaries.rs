//! Where the things under test lie: the binaries, the demo models, the speech.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::LazyLock,
};

use super::{Error, failed};

/// The checkout's root.
pub fn root() -> PathBuf {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    tests.parent().unwrap_or(tests).to_owned()
}

/// The folder of the release binaries: `CRESSET_BIN_DIR`, else the folder that this test was built into, else
/// `target/release`.
pub fn bin_dir() -> PathBuf {
    static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
        if let Some(folder) = std::env::var_os("CRESSET_BIN_DIR").filter(|value| !value.is_empty()) {
            return folder.into();
        }
        let here = std::env::current_exe().unwrap_or_default();
        let built_into = here.ancestors().skip(1).take(2).find(|folder| folder.join("cresset").is_file());
        built_into.map_or_else(|| root().join("target/release"), Path::to_owned)
    });
    DIR.clone()
}

/// The demo models' repository.
pub fn demo_models() -> PathBuf {
    root().join(".cresset/models")
}

/// A command that runs one of our binaries, free of `CRESSET_*` variables of whoever runs the tests.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(bin_dir().join(program));
    without_settings(&mut command);
    command
}

/// Takes `CRESSET_*` variables out of a command's environment.
pub fn without_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CRESSET_") {
            command.env_remove(name);
        }
    }
    // What the user has in their own folder is no test's business.
    command.env("XDG_CONFIG_HOME", root().join("target/no-such-folder"));
}

/// What a program printed, and how it ended.
#[derive(Debug, Clone)]
pub struct Ran {
    /// The exit code; `None` for a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Reads standard output as JSON; `null` if it isn't.
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_default()
    }
}

/// Runs one of our binaries to its end.
///
/// # Errors
/// [`Error::Io`] if it can't be started.
pub fn run<A: AsRef<OsStr>>(program: &str, args: impl IntoIterator<Item = A>) -> Result<Ran, Error> {
    finish(command(program).args(args))
}

/// Runs a command to its end.
///
/// # Errors
/// [`Error::Io`] if it can't be started.
pub fn finish(command: &mut Command) -> Result<Ran, Error> {
    let what = format!("can't run {}", command.get_program().to_string_lossy());
    let Output { status, stdout, stderr } = command.stdin(Stdio::null()).output().map_err(failed(what))?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Ran { code: status.code(), stdout: text(stdout), stderr: text(stderr) })
}
