//! The command line's own settings: a TOML file, `CRESSET_*` variables and flags, in rising precedence.
//!
//! Every value is read as text and checked here, not by the argument parser, so that all problems are reported at once
//! and each names its setting. clap has already merged variables and flags.
use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use crate::{output::Format, up::ClusterFile};

/// How long a command tries before it gives up, unless told otherwise.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// The public port of the first coordinator, where Triton's users expect it.
pub const ENDPOINT_DEFAULT: &str = "127.0.0.1:8001";

/// Flags that every command takes.
#[derive(clap::Args, Default)]
#[command(next_help_heading = "Global options")]
pub struct GlobalArgs {
    /// Public addresses of coordinators, comma-separated; any one that is up will do [default: 127.0.0.1:8001]
    #[arg(long, global = true, env = "CRESSET_ENDPOINTS", value_name = "HOST:PORT,…")]
    pub endpoints: Option<String>,
    /// How long to try before giving up, as in 500ms, 10s, 2m [default: 10s; 60s for --wait]
    #[arg(long, global = true, env = "CRESSET_TIMEOUT", value_name = "DURATION")]
    pub timeout: Option<String>,
    /// What to print: table or json [default: table]
    #[arg(short, long, global = true, env = "CRESSET_OUTPUT", value_name = "FORMAT")]
    pub output: Option<String>,
    /// A TOML file with the keys endpoints, timeout and output, and a table [up] with the flags of `cresset up`
    #[arg(long, global = true, env = "CRESSET_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Check the settings, print those in effect, and do nothing else
    #[arg(long, global = true)]
    pub check_config: bool,
}

/// What every command needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `host:port` of coordinators, in the order to try them.
    pub endpoints: Vec<String>,
    /// As given by the user, if at all.
    pub given_timeout: Option<Duration>,
    /// How results are printed.
    pub output: Format,
}

impl Settings {
    /// Takes the global settings out of `resolver`; `None` if one of them is wrong.
    pub fn take(resolver: &mut Resolver, args: &GlobalArgs) -> Option<Self> {
        let endpoints = resolver.take("endpoints", args.endpoints.as_deref(), None, endpoints);
        let timeout = resolver.take("timeout", args.timeout.as_deref(), None, duration);
        let output = resolver.take("output", args.output.as_deref(), Some("table"), Format::parse);
        let endpoints = match endpoints {
            Some(given) => given?,
            None => {
                let endpoints = default_endpoints(Path::new(crate::up::DATA_DIR_DEFAULT));
                resolver.note("endpoints", &endpoints.join(","), "default");
                endpoints
            }
        };
        if timeout.is_none() {
            resolver.note("timeout", &format!("{}s", TIMEOUT_DEFAULT.as_secs()), "default");
        }
        Some(Self { endpoints, given_timeout: timeout.map_or(Some(None), |given| given.map(Some))?, output: output?? })
    }

    /// How long a call may take, with all its retries.
    pub fn timeout(&self) -> Duration {
        self.given_timeout.unwrap_or(TIMEOUT_DEFAULT)
    }
}

/// The usual port, and after it the cluster that `cresset up` runs from this very folder, so that the command line keeps
/// working when the first coordinator is down.
fn default_endpoints(data_dir: &Path) -> Vec<String> {
    let mut all = vec![ENDPOINT_DEFAULT.to_owned()];
    if let Some(file) = ClusterFile::read(data_dir) {
        all.extend(file.coordinators.into_iter().map(|member| member.grpc).filter(|address| address != ENDPOINT_DEFAULT));
    }
    all
}

/// Everything that is wrong with the configuration, one line each.
#[derive(Debug, Clone, Default, PartialEq, Eq, thiserror::Error)]
pub struct Problems(Vec<String>);

impl Problems {
    /// A single problem.
    pub fn one(problem: &str) -> Self {
        Self(vec![problem.to_owned()])
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\ncresset: "))
    }
}

/// Collects settings from the file and the command line, and what is wrong with them.
#[derive(Debug, Default)]
pub struct Resolver {
    file: BTreeMap<String, String>,
    source: String,
    effective: Vec<(String, String, String)>,
    problems: Vec<String>,
}

impl Resolver {
    /// Reads the file that the user named, or else the one in the usual place, which need not exist.
    pub fn open(given: Option<&Path>) -> Self {
        let path = match given {
            Some(path) => path.to_owned(),
            None => match usual_place().filter(|path| path.exists()) {
                Some(path) => path,
                None => return Self::default(),
            },
        };
        let mut resolver = Self { source: path.display().to_string(), ..Self::default() };
        match std::fs::read_to_string(&path) {
            Ok(text) => resolver.read(&text),
            Err(error) => resolver.problems.push(format!("config: can't read {}: {}", path.display(), plain(&error))),
        }
        resolver
    }

    fn read(&mut self, text: &str) {
        match text.parse::<toml::Table>() {
            Ok(table) => self.flatten("", table),
            Err(error) => {
                let line = error.span().map_or(1, |span| text[..span.start.min(text.len())].matches('\n').count() + 1);
                self.problems.push(format!("config: {} line {line}: {}", self.source, error.message()));
            }
        }
    }

    fn flatten(&mut self, prefix: &str, table: toml::Table) {
        for (key, value) in table {
            let key = format!("{prefix}{key}");
            let text = match value {
                toml::Value::Table(inner) => {
                    self.flatten(&format!("{key}."), inner);
                    continue;
                }
                toml::Value::Array(items) => items.into_iter().map(scalar_text).collect::<Option<Vec<_>>>().map(|t| t.join(",")),
                scalar => scalar_text(scalar),
            };
            match text {
                Some(text) => drop(self.file.insert(key, text)),
                None => self
                    .problems
                    .push(format!("{key}: must be a string, a number, a boolean or a list of these ({})", self.source)),
            }
        }
    }

    /// Takes one setting. `None`: nobody gave it and it has no default. `Some(None)`: it is wrong, and noted as such.
    pub fn take<T>(
        &mut self,
        key: &str,
        given: Option<&str>,
        default: Option<&str>,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Option<T>> {
        let in_file = self.file.remove(key);
        let (text, origin) = match (given.filter(|text| !text.is_empty()), in_file, default) {
            (Some(text), _, _) => (text.to_owned(), "flag or variable".to_owned()),
            (None, Some(text), _) => (text, self.source.clone()),
            (None, None, Some(text)) => (text.to_owned(), "default".to_owned()),
            (None, None, None) => return None,
        };
        Some(match parse(&text) {
            Ok(value) => {
                self.note(key, &text, &origin);
                Some(value)
            }
            Err(problem) => {
                self.problems.push(format!("{key}: '{text}' {problem} ({origin})"));
                None
            }
        })
    }

    /// Notes a value that has no text of its own to be taken from.
    fn note(&mut self, key: &str, text: &str, origin: &str) {
        self.effective.push((key.to_owned(), text.to_owned(), origin.to_owned()));
    }

    /// The settings in effect as TOML with their origins.
    ///
    /// # Errors
    /// Everything that was wrong, including keys of the file that mean nothing.
    pub fn finish(mut self) -> Result<String, Problems> {
        for key in self.file.keys() {
            self.problems.push(format!("{key}: no such setting ({})", self.source));
        }
        if !self.problems.is_empty() {
            return Err(Problems(self.problems));
        }
        let line = |(key, text, origin): &(String, String, String)| {
            format!("{key} = {}  # {origin}\n", toml::Value::from(text.as_str()))
        };
        Ok(self.effective.iter().map(line).collect())
    }
}

fn scalar_text(value: toml::Value) -> Option<String> {
    match value {
        toml::Value::String(text) => Some(text),
        toml::Value::Integer(number) => Some(number.to_string()),
        toml::Value::Float(number) => Some(number.to_string()),
        toml::Value::Boolean(truth) => Some(truth.to_string()),
        toml::Value::Datetime(_) | toml::Value::Array(_) | toml::Value::Table(_) => None,
    }
}

fn usual_place() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let config = folder("XDG_CONFIG_HOME").or_else(|| Some(folder("HOME")?.join(".config")))?;
    Some(config.join("cresset").join("config.toml"))
}

/// An IO error without the number of the system's table.
pub fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or(&text).to_lowercase()
}

fn endpoints(text: &str) -> Result<Vec<String>, String> {
    text.split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty())
        .map(address)
        .collect::<Result<Vec<_>, _>>()
        .and_then(|all| if all.is_empty() { Err("names no endpoint, give host:port".to_owned()) } else { Ok(all) })
}

/// Reads one `host:port`; a leading `http://` is allowed.
pub fn address(text: &str) -> Result<String, String> {
    let bare = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let wrong = || format!("has an endpoint that isn't host:port: '{text}'");
    let (host, port) = bare.rsplit_once(':').ok_or_else(wrong)?;
    let host_is_plain = !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    let host_is_v6 =
        host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).is_some_and(|h| h.parse::<std::net::Ipv6Addr>().is_ok());
    match port.parse::<u16>() {
        Ok(port) if port > 0 && (host_is_plain || host_is_v6) => Ok(bare.to_owned()),
        _ => Err(wrong()),
    }
}

/// Reads `500ms`, `10s`, `2m`, or a bare number of seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    const TIMEOUT_SECONDS_MAX: f64 = 86_400.0;
    let wrong = || "is not a duration, write it like 500ms, 10s or 2m".to_owned();
    let text = text.trim();
    let unit_at = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit_at);
    let scale = match unit {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let seconds = number.trim().parse::<f64>().map_err(|_| wrong())? * scale;
    if seconds > 0.0 && seconds <= TIMEOUT_SECONDS_MAX {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("is out of range, it must be above 0 and at most 24h".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolver(text: &str) -> Resolver {
        let mut resolver = Resolver { source: "cresset.toml".to_owned(), ..Resolver::default() };
        resolver.read(text);
        resolver
    }

    #[test]
    fn durations_are_read_with_their_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("10s"), Ok(Duration::from_secs(10)));
        assert_eq!(duration("1.5m"), Ok(Duration::from_secs(90)));
        assert_eq!(duration("7"), Ok(Duration::from_secs(7)));
        for wrong in ["", "s", "-1s", "0", "1 fortnight", "1e999", "NaN", "25h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn endpoints_are_hosts_and_ports() {
        assert_eq!(endpoints("a:1, http://[::1]:2/,10.0.0.1:3").unwrap(), ["a:1", "[::1]:2", "10.0.0.1:3"]);
        for wrong in ["", ",", "a", "a:0", "a:99999", ":1", "a b:1", "https://a:1", "::1:2", "a/b:1"] {
            assert!(endpoints(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_flag_wins_over_the_file_and_the_file_over_the_default() {
        let mut both = resolver("endpoints = [\"a:1\", \"b:2\"]\ntimeout = \"3s\"\noutput = \"json\"");
        let args = GlobalArgs { timeout: Some("4s".to_owned()), ..GlobalArgs::default() };
        let settings = Settings::take(&mut both, &args).unwrap();
        assert_eq!(settings.endpoints, ["a:1", "b:2"]);
        assert_eq!(settings.timeout(), Duration::from_secs(4));
        assert_eq!(settings.output, Format::Json);
        let effective = both.finish().unwrap();
        assert!(effective.contains("timeout = \"4s\"  # flag or variable"), "{effective}");
        assert!(effective.contains("endpoints = \"a:1,b:2\"  # cresset.toml"), "{effective}");
    }

    #[test]
    fn all_problems_are_reported_at_once() {
        let mut wrong = resolver("endpoints = \"nowhere\"\ntimeout = \"soon\"\ncolour = 1\n[up]\nmodel = 1979-05-27");
        assert_eq!(Settings::take(&mut wrong, &GlobalArgs { output: Some("xml".into()), ..GlobalArgs::default() }), None);
        let text = wrong.finish().unwrap_err().to_string();
        for name in ["endpoints: 'nowhere'", "timeout: 'soon'", "output: 'xml'", "colour: no such setting", "up.model: must be"] {
            assert!(text.contains(name), "{name} is not in {text}");
        }
    }

    #[test]
    fn a_file_that_does_not_parse_is_a_problem_with_its_line() {
        let text = resolver("endpoints = \"a:1\"\ntimeout = = 3").finish().unwrap_err().to_string();
        assert!(text.starts_with("config: cresset.toml line 2: "), "{text}");
        let text = Resolver::open(Some(Path::new("no/such/file.toml"))).finish().unwrap_err().to_string();
        assert!(text.contains("can't read no/such/file.toml: no such file"), "{text}");
    }
}
