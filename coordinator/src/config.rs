//! The coordinator's settings.
use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf, time::Duration};

use cresset_client::RouterSettings;
use cresset_proto::ids::{IdError, PeerId};
use cresset_runtime::{
    server::MESSAGE_BYTES_MAX,
    settings::{Problems, Program, Setting, Settings},
};

use crate::consensus;

/// The program and all its settings.
pub const PROGRAM: Program = Program {
    name: "cresset-coordinator",
    about: "A Cresset coordinator: agrees with the others on who runs what, and answers clients",
    version: env!("CARGO_PKG_VERSION"),
    settings: &[
        Setting::new("id", None, "ID", "This coordinator's name among the peers: c1, c2, ..."),
        Setting::new("cluster-id", None, "NAME", "The cluster's name; coordinators of other clusters are refused"),
        Setting::new("peers", None, "LIST", "The coordinators that found the cluster, this one included: c1=HOST:PORT,c2=..."),
        Setting::new(
            "join",
            Some("false"),
            "BOOL",
            "With an empty folder: wait to be added to a running cluster (cresset member add). --peers names its members and this one",
        ),
        Setting::new(
            "force-new-group",
            Some("false"),
            "BOOL",
            "After most coordinators are lost for good: go on alone, as a new cluster, from what this folder holds",
        ),
        Setting::new("data-dir", None, "DIR", "Where the log and the snapshots live"),
        Setting::new("model-repository", None, "DIR", "The model repository's folder"),
        Setting::new("grpc", Some("127.0.0.1:8001"), "HOST:PORT", "The public port: predictions and administration"),
        Setting::new("http", Some("127.0.0.1:8002"), "HOST:PORT", "Where /metrics, /healthz and /readyz are"),
        Setting::new("peer", Some("127.0.0.1:8003"), "HOST:PORT", "Where other coordinators and workers connect"),
        Setting::new(
            "advertise-host",
            Some(""),
            "HOST",
            "The host by which others reach this one; default: the host of each address",
        ),
        Setting::new(
            "zone",
            Some(""),
            "NAME",
            "The failure zone that this coordinator is in: requests that come here go to workers of the same zone where they can",
        ),
        Setting::new(
            "hedging",
            Some("false"),
            "BOOL",
            "Send a unary request that takes longer than 19 of 20 do to a second worker too; at most one request in twenty",
        ),
        Setting::new(
            "tick-ms",
            Some("50"),
            "MS",
            "One tick of consensus: a heartbeat each, an election after 6 to 12 silent ones",
        ),
        Setting::new("snapshot-entries", Some("10000"), "N", "Log entries between two snapshots"),
        Setting::new(
            "disk-kept-mib",
            Some("64"),
            "MIB",
            "Free space that the log leaves on its disk: with less it takes nothing; 0: all",
        ),
        Setting::new("message-mib-max", Some("2047"), "MIB", "The largest message that is taken or sent"),
        Setting::new("grpc-threads", Some("0"), "N", "Threads that serve the public port; 0: one for each core, up to 16"),
        Setting::new("streams-per-connection-max", Some("4096"), "N", "Calls that one connection may have open"),
        Setting::new("drain-ms", Some("3000"), "MS", "How long open calls may go on after a stop was asked for"),
        Setting::new("log", Some("info"), "FILTER", "What is logged, as in info,cresset_coordinator=debug"),
        Setting::new("exit-with-parent", None, "PID", "Die when this parent process dies"),
    ],
};

/// The settings, read and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// This coordinator.
    pub id: PeerId,
    /// The cluster's name.
    pub cluster_id: String,
    /// Peer addresses of the founders; of one that joins, of itself and those that it joins.
    pub peers: BTreeMap<PeerId, String>,
    /// An empty folder joins a cluster, rather than to found one.
    pub join: bool,
    /// This coordinator goes on alone, as a new cluster, from what its folder holds of another.
    pub force_new_group: bool,
    /// Where the log lives.
    pub data_dir: PathBuf,
    /// The model repository's folder.
    pub model_repository: PathBuf,
    /// The public port.
    pub grpc: String,
    /// Metrics and health.
    pub http: String,
    /// Coordinators and workers.
    pub peer: String,
    /// The host by which others reach this one.
    pub advertise_host: String,
    /// The failure zone; empty for none.
    pub zone: String,
    /// Whether requests that take long are sent to a second worker too.
    pub hedging: bool,
    /// One tick of consensus.
    pub tick: Duration,
    /// Log entries between two snapshots.
    pub snapshot_entries: u64,
    /// Free space that the log leaves on its disk, in bytes.
    pub disk_kept_bytes: u64,
    /// The largest message, in bytes.
    pub message_bytes_max: usize,
    /// Threads that serve the public port; 0: one for each core.
    pub grpc_threads: usize,
    /// Calls that one connection may have open.
    pub streams_per_connection_max: u32,
    /// How long open calls may go on at the end.
    pub drain: Duration,
    /// The log filter.
    pub log: String,
    /// The parent to die with.
    pub exit_with_parent: Option<i32>,
}

/// `c1=HOST:PORT`.
#[derive(Debug, Clone)]
struct Peer(PeerId, String);

#[derive(Debug, thiserror::Error)]
enum PeerError {
    #[error("it must be written as c1=HOST:PORT")]
    Form,
    #[error(transparent)]
    Id(#[from] IdError),
}

impl std::str::FromStr for Peer {
    type Err = PeerError;
    fn from_str(text: &str) -> Result<Self, PeerError> {
        let (id, address) = text.split_once('=').ok_or(PeerError::Form)?;
        Ok(Self(id.trim().parse()?, address.trim().to_owned()))
    }
}

impl Config {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// Every problem at once.
    pub fn read(mut settings: Settings) -> Result<Self, Problems> {
        let id_text = settings.required::<String>("id");
        let id = id_text.parse::<PeerId>();
        if let (Err(error), false) = (&id, id_text.is_empty()) {
            settings.problem("id", error.to_string());
        }
        let mut peers = BTreeMap::new();
        for Peer(peer, address) in settings.list::<Peer>("peers") {
            if peers.insert(peer, address).is_some() {
                settings.problem("peers", format!("{peer} is named twice"));
            }
        }
        let model_repository: PathBuf = settings.required("model-repository");
        if !model_repository.as_os_str().is_empty() && !model_repository.is_dir() {
            settings.problem("model-repository", format!("'{}' is not a folder", model_repository.display()));
        }
        let message_mib: usize = settings.required("message-mib-max");
        if message_mib == 0 {
            settings.problem("message-mib-max", "must be at least 1");
        }
        let streams_per_connection_max: u32 = settings.required("streams-per-connection-max");
        if streams_per_connection_max == 0 {
            settings.problem("streams-per-connection-max", "must be at least 1");
        }
        let config = Self {
            id: id.unwrap_or(PeerId(0)),
            cluster_id: settings.required("cluster-id"),
            peers,
            join: settings.required("join"),
            force_new_group: settings.required("force-new-group"),
            data_dir: settings.required("data-dir"),
            model_repository,
            grpc: settings.required("grpc"),
            http: settings.required("http"),
            peer: settings.required("peer"),
            advertise_host: settings.optional("advertise-host").unwrap_or_default(),
            zone: settings.optional("zone").unwrap_or_default(),
            hedging: settings.required("hedging"),
            tick: Duration::from_millis(settings.required("tick-ms")),
            snapshot_entries: settings.required("snapshot-entries"),
            disk_kept_bytes: settings.required::<u64>("disk-kept-mib").saturating_mul(1 << 20),
            message_bytes_max: message_mib.checked_mul(1 << 20).unwrap_or(MESSAGE_BYTES_MAX).min(MESSAGE_BYTES_MAX),
            grpc_threads: settings.required("grpc-threads"),
            streams_per_connection_max,
            drain: Duration::from_millis(settings.required("drain-ms")),
            log: settings.required("log"),
            exit_with_parent: settings.optional("exit-with-parent"),
        };
        if !id_text.is_empty() && !config.cluster_id.is_empty() {
            for problem in config.consensus().check().err().unwrap_or_default() {
                settings.problem(setting_of(problem.field), problem.problem);
            }
        }
        settings.finish()?;
        Ok(config)
    }

    /// The settings of consensus.
    pub fn consensus(&self) -> consensus::Settings {
        let peers = self.peers.iter().map(|(id, address)| (id.0, address.clone())).collect();
        consensus::Settings {
            join: self.join,
            tick: self.tick,
            snapshot_entries: self.snapshot_entries,
            disk_kept_bytes: self.disk_kept_bytes,
            ..consensus::Settings::new(&self.cluster_id, self.id.0, peers, &self.data_dir)
        }
    }

    /// The settings of the router behind the public port.
    pub fn router(&self) -> RouterSettings {
        RouterSettings { zone: self.zone.clone(), hedging: self.hedging, ..RouterSettings::default() }
    }

    /// How others reach a port of this coordinator.
    pub fn advertised(&self, address: &SocketAddr) -> String {
        if self.advertise_host.is_empty() { address.to_string() } else { format!("{}:{}", self.advertise_host, address.port()) }
    }
}

/// The flag behind a field of consensus' settings.
fn setting_of(field: &str) -> &str {
    match field {
        "cluster_id" => "cluster-id",
        "tick" => "tick-ms",
        "snapshot_entries" => "snapshot-entries",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use cresset_runtime::settings::Invocation;

    use super::*;

    fn read(args: &[&str]) -> Result<Config, Problems> {
        match PROGRAM.invoke_with(std::iter::once("cresset-coordinator").chain(args.iter().copied()).map(Into::into)) {
            Invocation::Run(settings) => Config::read(settings),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_full_command_line_is_read() {
        let peers = "c1=127.0.0.1:7001, c2=127.0.0.1:7002";
        let args = ["--id", "c2", "--cluster-id", "x", "--peers", peers, "--data-dir", "d", "--model-repository", "."];
        let config = read(&args).unwrap();
        assert_eq!((config.id, config.peers.len()), (PeerId(2), 2));
        assert_eq!(config.router(), RouterSettings::default());
        let zoned = read(&[&args[..], &["--zone", "rack-1", "--hedging", "true"]].concat()).unwrap();
        assert_eq!((zoned.router().zone.as_str(), zoned.router().hedging), ("rack-1", true));
        assert_eq!(config.advertised(&"127.0.0.1:9".parse().unwrap()), "127.0.0.1:9");
    }

    #[test]
    fn every_problem_is_named() {
        let args = ["--id", "2", "--peers", "c1", "--tick-ms", "soon", "--model-repository", "/nowhere"];
        let text = read(&args).unwrap_err().to_string();
        for name in ["id:", "cluster-id:", "peers:", "data-dir:", "tick-ms:", "model-repository:"] {
            assert!(text.contains(&format!("config: {name}")), "{name} in {text}");
        }
    }

    #[test]
    fn a_coordinator_must_be_among_its_peers() {
        let args = ["--id", "c3", "--cluster-id", "x", "--peers", "c1=h:1", "--data-dir", "d", "--model-repository", "."];
        assert!(read(&args).unwrap_err().to_string().contains("config: peers: lacks c3"));
    }

    #[test]
    fn the_example_in_deploy_is_right_but_for_its_folders() {
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config/coordinator.toml");
        read(&["--config", example, "--model-repository", "."]).unwrap();
    }
}
