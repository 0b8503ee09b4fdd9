//! Configuration: a table of settings, read from a TOML file, `CRESSET_*` variables and flags, in rising precedence.
//!
//! Every fault is collected and all are reported together, so that an operator mends a file once. There is no live reload.
use std::{collections::BTreeMap, ffi::OsString, fmt, fmt::Display, path::PathBuf, str::FromStr};

use clap::{Arg, ArgAction, ArgMatches, Command, parser::ValueSource};

/// One setting of a process: its flag, its variable (`--data-dir` ↔ `CRESSET_DATA_DIR`) and its key in the file.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// In kebab case, as in `data-dir`.
    pub name: &'static str,
    /// `None` where the setting has to be given or may be absent.
    pub default: Option<&'static str>,
    /// What stands for the value in `--help`.
    pub value_name: &'static str,
    /// One line for `--help`.
    pub help: &'static str,
}

impl Setting {
    /// A row of the table: name, default, what stands for the value, help.
    pub const fn new(name: &'static str, default: Option<&'static str>, value_name: &'static str, help: &'static str) -> Self {
        Self { name, default, value_name, help }
    }
}

/// A process's name, purpose and settings.
#[derive(Debug, Clone, Copy)]
pub struct Program {
    /// The binary's name.
    pub name: &'static str,
    /// One line for `--help`.
    pub about: &'static str,
    /// Its version.
    pub version: &'static str,
    /// Everything that can be set.
    pub settings: &'static [Setting],
}

/// What the command line asked for.
#[derive(Debug)]
pub enum Invocation {
    /// Run with these settings.
    Run(Settings),
    /// Only say whether the settings are right (`--check-config`).
    Check(Settings),
    /// Print this and exit with this code: help, version, or a usage error.
    Exit {
        /// What to print; to standard error if the code isn't 0.
        text: String,
        /// 0, or 2 for bad usage.
        code: u8,
    },
}

/// A fault in one setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The setting's name.
    pub setting: String,
    /// Where the value came from.
    pub source: String,
    /// What is wrong with it, and the way out.
    pub text: String,
}

impl Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.setting, self.text)?;
        if self.source.is_empty() { Ok(()) } else { write!(f, " (from {})", self.source) }
    }
}

/// Every fault of a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct Problems(pub Vec<Problem>);

impl Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lines: Vec<String> = self.0.iter().map(|problem| format!("config: {problem}")).collect();
        f.write_str(&lines.join("\n"))
    }
}

/// Values with the place each came from, and the problems found so far.
#[derive(Debug)]
pub struct Settings {
    values: BTreeMap<&'static str, (String, String)>,
    problems: Vec<Problem>,
}

impl Program {
    fn command(&self) -> Command {
        let mut command = Command::new(self.name)
            .about(self.about)
            .version(self.version)
            .after_help("Precedence, rising: defaults, the TOML file, CRESSET_* variables, flags.\nExit codes: 0 done, 1 failed, 2 bad usage or configuration.")
            .arg(
                Arg::new("config")
                    .long("config")
                    .value_name("FILE")
                    .env("CRESSET_CONFIG")
                    .help("A TOML file with any of the settings below, by their names"),
            )
            .arg(
                Arg::new("check-config")
                    .long("check-config")
                    .action(ArgAction::SetTrue)
                    .help("Say whether the configuration is right, then exit"),
            );
        for setting in self.settings {
            let help = match setting.default {
                Some(default) => format!("{} [default: {default}]", setting.help),
                None => setting.help.to_owned(),
            };
            command = command.arg(
                Arg::new(setting.name).long(setting.name).value_name(setting.value_name).env(variable(setting.name)).help(help),
            );
        }
        command
    }

    /// Reads the process's own arguments and environment.
    pub fn invoke(&self) -> Invocation {
        self.invoke_with(std::env::args_os())
    }

    /// Like [`invoke`](Self::invoke), with the arguments given; the first is the program's name.
    pub fn invoke_with(&self, args: impl IntoIterator<Item = OsString>) -> Invocation {
        let matches = match self.command().try_get_matches_from(args) {
            Ok(matches) => matches,
            Err(error) => {
                let code = if error.use_stderr() { 2 } else { 0 };
                return Invocation::Exit { text: error.to_string(), code };
            }
        };
        let settings = self.read(&matches);
        if matches.get_flag("check-config") { Invocation::Check(settings) } else { Invocation::Run(settings) }
    }

    fn read(&self, matches: &ArgMatches) -> Settings {
        let mut settings = Settings { values: BTreeMap::new(), problems: Vec::new() };
        let file = matches.get_one::<String>("config").map(PathBuf::from);
        let table = file.as_ref().map(|path| settings.file(path)).unwrap_or_default();
        for setting in self.settings {
            let flag = matches.get_one::<String>(setting.name).cloned();
            let from_file = table.get(setting.name).map(|value| (value.clone(), "the file".to_owned()));
            let value = match (flag, matches.value_source(setting.name)) {
                (Some(value), Some(ValueSource::EnvVariable)) => Some((value, variable(setting.name))),
                (Some(value), _) => Some((value, format!("--{}", setting.name))),
                (None, _) => from_file.or_else(|| setting.default.map(|value| (value.to_owned(), String::new()))),
            };
            if let Some(value) = value {
                settings.values.insert(setting.name, value);
            }
        }
        for key in table.keys().filter(|key| !self.settings.iter().any(|setting| setting.name == key.as_str())) {
            settings.problems.push(Problem {
                setting: key.clone(),
                source: "the file".to_owned(),
                text: format!("there is no such setting; `{} --help` lists them", self.name),
            });
        }
        settings
    }
}

impl Settings {
    /// Reads a file into flat keys: `[raft] tick-ms = 50` is `raft-tick-ms`, a list is joined by commas.
    fn file(&mut self, path: &PathBuf) -> BTreeMap<String, String> {
        let read = std::fs::read_to_string(path)
            .map_err(|error| error.to_string())
            .and_then(|text| text.parse::<toml::Table>().map_err(|error| error.to_string().trim().replace('\n', "; ")));
        match read {
            Ok(table) => {
                let mut flat = BTreeMap::new();
                flatten("", &table, &mut flat);
                flat
            }
            Err(text) => {
                self.problem("config", format!("can't read {}: {text}", path.display()));
                BTreeMap::new()
            }
        }
    }

    /// A value that has to be there. A fault is remembered, and the type's default stands in until [`finish`](Self::finish).
    pub fn required<T: FromStr + Default>(&mut self, name: &'static str) -> T
    where
        T::Err: Display,
    {
        match self.optional(name) {
            Some(value) => value,
            None => {
                if !self.problems.iter().any(|problem| problem.setting == name) {
                    self.problem(name, format!("is required; set --{name}, {} or `{name}` in the file", variable(name)));
                }
                T::default()
            }
        }
    }

    /// A value that may be absent.
    pub fn optional<T: FromStr>(&mut self, name: &'static str) -> Option<T>
    where
        T::Err: Display,
    {
        let (text, _) = self.values.get(name)?;
        match text.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                let text = format!("'{text}' isn't right: {error}");
                self.problem(name, text);
                None
            }
        }
    }

    /// A list, separated by commas. Empty parts are dropped.
    pub fn list<T: FromStr>(&mut self, name: &'static str) -> Vec<T>
    where
        T::Err: Display,
    {
        let text = self.values.get(name).map(|(text, _)| text.clone()).unwrap_or_default();
        let mut values = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.parse() {
                Ok(value) => values.push(value),
                Err(error) => self.problem(name, format!("'{part}' isn't right: {error}")),
            }
        }
        values
    }

    /// Notes a fault that only the process can see, such as one setting that contradicts another.
    pub fn problem(&mut self, name: &str, text: impl Into<String>) {
        let source = self.values.get(name).map(|(_, source)| source.clone()).unwrap_or_default();
        self.problems.push(Problem { setting: name.to_owned(), source, text: text.into() });
    }

    /// The end of reading.
    ///
    /// # Errors
    /// Every problem that was noted.
    pub fn finish(self) -> Result<(), Problems> {
        if self.problems.is_empty() { Ok(()) } else { Err(Problems(self.problems)) }
    }
}

fn variable(name: &str) -> String {
    format!("CRESSET_{}", name.replace('-', "_").to_ascii_uppercase())
}

fn flatten(prefix: &str, table: &toml::Table, out: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let name = if prefix.is_empty() { key.clone() } else { format!("{prefix}-{key}") };
        match value {
            toml::Value::Table(inner) => flatten(&name, inner, out),
            toml::Value::Array(items) => {
                out.insert(name, items.iter().map(plain).collect::<Vec<_>>().join(","));
            }
            other => {
                out.insert(name, plain(other));
            }
        }
    }
}

fn plain(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const PROGRAM: Program = Program {
        name: "lamp",
        about: "a lamp",
        version: "1",
        settings: &[
            Setting { name: "data-dir", default: None, value_name: "DIR", help: "where data lives" },
            Setting { name: "raft-tick-ms", default: Some("50"), value_name: "MS", help: "one tick" },
            Setting { name: "peers", default: Some(""), value_name: "LIST", help: "the others" },
        ],
    };

    fn run(args: &[&str]) -> Settings {
        let args = std::iter::once("lamp").chain(args.iter().copied()).map(OsString::from);
        match PROGRAM.invoke_with(args) {
            Invocation::Run(settings) => settings,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "data-dir = \"/a\"\npeers = [\"x\", \"y\"]\n[raft]\ntick-ms = 70").unwrap();
        let path = file.path().to_str().unwrap();
        let mut settings = run(&["--config", path, "--data-dir", "/b"]);
        assert_eq!(settings.required::<String>("data-dir"), "/b");
        assert_eq!(settings.required::<u64>("raft-tick-ms"), 70);
        assert_eq!(settings.list::<String>("peers"), ["x", "y"]);
        settings.finish().unwrap();
        assert_eq!(run(&["--data-dir", "/b"]).required::<u64>("raft-tick-ms"), 50);
    }

    #[test]
    fn all_problems_are_reported_at_once_by_name() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "raft-tick-ms = \"soon\"\ncolour = \"red\"").unwrap();
        let mut settings = run(&["--config", file.path().to_str().unwrap()]);
        settings.required::<String>("data-dir");
        settings.required::<u64>("raft-tick-ms");
        let text = settings.finish().unwrap_err().to_string();
        for part in ["data-dir: is required", "raft-tick-ms: 'soon' isn't right", "colour: there is no such setting"] {
            assert!(text.contains(part), "{text}");
        }
        assert_eq!(text.lines().count(), 3, "{text}");
    }

    #[test]
    fn usage_errors_exit_with_2_and_help_with_0() {
        let exit = |arg: &str| match PROGRAM.invoke_with(["lamp", arg].map(OsString::from)) {
            Invocation::Exit { text, code } => (text, code),
            other => panic!("{other:?}"),
        };
        assert_eq!(exit("--colour").1, 2);
        let (help, code) = exit("--help");
        assert_eq!(code, 0);
        assert!(help.contains("CRESSET_DATA_DIR") && help.contains("[default: 50]"), "{help}");
    }
}
