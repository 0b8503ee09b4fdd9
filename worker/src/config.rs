//! The worker's settings.
use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use cresset_proto::ids::WorkerId;
use cresset_runtime::{
    server::MESSAGE_BYTES_MAX,
    settings::{Problems, Program, Setting, Settings},
};

use crate::{queue::Bounds, sequence::detached};

/// The program and all its settings.
pub const PROGRAM: Program = Program {
    name: "cresset-worker",
    about: "A Cresset worker: runs PyTorch models and answers predictions and streams",
    version: env!("CARGO_PKG_VERSION"),
    settings: &[
        Setting::new("id", None, "ID", "This worker's name in the cluster, as in w1"),
        Setting::new(
            "grpc",
            Some("127.0.0.1:8031"),
            "HOST:PORT",
            "Where predictions are answered; others must reach it by this address",
        ),
        Setting::new("http", Some("127.0.0.1:8032"), "HOST:PORT", "Where /metrics, /healthz and /readyz are"),
        Setting::new("coordinators", None, "LIST", "Peer addresses of the coordinators, HOST:PORT, separated by commas"),
        Setting::new("model-repository", None, "DIR", "The model repository's folder"),
        Setting::new(
            "cache-dir",
            Some(""),
            "DIR",
            "A folder of this worker's own for files that coordinators keep; default: one in the system's temporary folder",
        ),
        Setting::new("device", Some("auto"), "auto|cpu|cuda", "What to run models on"),
        Setting::new("zone", Some(""), "NAME", "The failure zone, such as a rack or an availability zone"),
        Setting::new("tags", Some(""), "LIST", "Facts about this worker that deployments can demand, as in gpu=h100,tier=a"),
        Setting::new("memory-mib", Some("0"), "MIB", "Memory that models may take on the cpu; 0: all of the machine's"),
        Setting::new("intra-op-threads", Some("0"), "N", "Threads inside one operation of libtorch; 0: one for each core"),
        Setting::new("queue-requests-max", Some("4096"), "N", "Requests that may wait for one model"),
        Setting::new("queue-mib-max", Some("512"), "MIB", "Input bytes that may wait for one model"),
        Setting::new(
            "detached-ms",
            Some("30000"),
            "MS",
            "How long a sequence is held for its client to take it up again by way of another coordinator; 0: not at all",
        ),
        Setting::new("detached-sequences-max", Some("10000"), "N", "Sequences that are held so at once; the oldest go first"),
        Setting::new("detached-mib-max", Some("256"), "MIB", "Their states and answers"),
        Setting::new("message-mib-max", Some("2047"), "MIB", "The largest message that is taken or sent"),
        Setting::new(
            "max-execution-ms",
            Some("0"),
            "MS",
            "How long one call of a model may run unless its configuration says; 0: any time",
        ),
        Setting::new(
            "max-load-ms",
            Some("900000"),
            "MS",
            "How long loading a model and warming it up may take before it has failed; 0: any time",
        ),
        Setting::new("grpc-threads", Some("0"), "N", "Threads that serve the gRPC port; 0: one for every two cores, up to 16"),
        Setting::new("streams-per-connection-max", Some("4096"), "N", "Calls that one connection may have open"),
        Setting::new("drain-ms", Some("5000"), "MS", "How long open calls may go on after a stop was asked for"),
        Setting::new("null-engine", Some("false"), "BOOL", "Serve models that answer without a model, for scale tests only"),
        Setting::new("log", Some("info"), "FILTER", "What is logged, as in info,cresset_worker=debug"),
        Setting::new("exit-with-parent", None, "PID", "Die when this parent process dies"),
    ],
};

/// What models run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceChoice {
    /// GPUs if there are any, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// GPUs, or don't start.
    Cuda,
}

impl std::str::FromStr for DeviceChoice {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda),
            _ => Err("it must be auto, cpu or cuda"),
        }
    }
}

/// `gpu=h100`.
struct Tag(String, String);

impl std::str::FromStr for Tag {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((tag, value)) if !tag.trim().is_empty() => Ok(Self(tag.trim().to_owned(), value.trim().to_owned())),
            Some(_) | None => Err("it must be written as TAG=VALUE"),
        }
    }
}

/// The settings, read and checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// This worker's name.
    pub id: WorkerId,
    /// Where predictions are answered.
    pub grpc: String,
    /// Where metrics and health are.
    pub http: String,
    /// Peer addresses of the coordinators.
    pub coordinators: Vec<String>,
    /// The model repository's folder.
    pub model_repository: PathBuf,
    /// What to run models on.
    pub device: DeviceChoice,
    /// The failure zone.
    pub zone: String,
    /// Facts about this worker that deployments can demand.
    pub tags: BTreeMap<String, String>,
    /// Where files that came from coordinators are kept.
    pub cache_dir: PathBuf,
    /// Memory that models may take on the CPU, in bytes; `None`: all of the machine's.
    pub memory_bytes: Option<u64>,
    /// Threads inside one operation.
    pub intra_op_threads: u16,
    /// Bounds of each model's queue.
    pub bounds: Bounds,
    /// Bounds of the sequences that are held for other routers.
    pub detached: detached::Bounds,
    /// The largest message, in bytes.
    pub message_bytes_max: usize,
    /// How long one call of a model may run unless its configuration says, in ms; 0: any time.
    pub execution_max_ms: u64,
    /// How long loading a model and warming it up may take, in ms; 0: any time.
    pub load_max_ms: u64,
    /// Threads that serve the gRPC port; 0: one for every two cores.
    pub grpc_threads: usize,
    /// Calls that one connection may have open.
    pub streams_per_connection_max: u32,
    /// How long open calls may go on at the end.
    pub drain: Duration,
    /// Whether models of the null engine are served.
    pub null_engine: bool,
    /// The log filter.
    pub log: String,
    /// The parent to die with.
    pub exit_with_parent: Option<i32>,
}

impl Config {
    /// Reads and checks the settings.
    ///
    /// # Errors
    /// Every problem at once.
    pub fn read(mut settings: Settings) -> Result<Self, Problems> {
        let id = settings.required::<String>("id");
        let worker_id = id.parse::<WorkerId>();
        if let (Err(error), false) = (&worker_id, id.is_empty()) {
            settings.problem("id", error.to_string());
        }
        let coordinators: Vec<String> = settings.list("coordinators");
        if coordinators.is_empty() {
            settings.problem("coordinators", "is required: at least one peer address of a coordinator, as in 127.0.0.1:8003");
        }
        let model_repository: PathBuf = settings.required("model-repository");
        let given_cache_dir = settings.optional::<PathBuf>("cache-dir").filter(|dir| !dir.as_os_str().is_empty());
        if !model_repository.as_os_str().is_empty() && !model_repository.is_dir() {
            settings.problem("model-repository", format!("'{}' is not a folder", model_repository.display()));
        }
        let mib = |settings: &mut Settings, name: &'static str, max: usize| {
            let mib: usize = settings.required(name);
            mib.checked_mul(1 << 20).unwrap_or(max).min(max)
        };
        let message_bytes_max = mib(&mut settings, "message-mib-max", MESSAGE_BYTES_MAX);
        let memory_bytes = mib(&mut settings, "memory-mib", usize::MAX) as u64;
        let bounds = Bounds {
            requests_max: settings.required("queue-requests-max"),
            bytes_max: mib(&mut settings, "queue-mib-max", usize::MAX),
        };
        let detached = detached::Bounds {
            window: Duration::from_millis(settings.required("detached-ms")),
            sequences_max: settings.required("detached-sequences-max"),
            bytes_max: mib(&mut settings, "detached-mib-max", usize::MAX),
        };
        let mut tags = BTreeMap::new();
        for Tag(tag, value) in settings.list::<Tag>("tags") {
            if tags.insert(tag.clone(), value).is_some() {
                settings.problem("tags", format!("'{tag}' is given twice"));
            }
        }
        let streams_per_connection_max: u32 = settings.required("streams-per-connection-max");
        for (name, is_none) in [
            ("queue-requests-max", bounds.requests_max == 0),
            ("message-mib-max", message_bytes_max == 0),
            ("streams-per-connection-max", streams_per_connection_max == 0),
        ] {
            if is_none {
                settings.problem(name, "must be at least 1");
            }
        }
        let config = Self {
            // A wrong id was noted above, and `finish` below refuses the configuration for it.
            id: worker_id.or_else(|_| "unnamed".parse()).map_err(|_| Problems(vec![]))?,
            grpc: settings.required("grpc"),
            http: settings.required("http"),
            coordinators,
            model_repository,
            device: settings.required("device"),
            zone: settings.optional("zone").unwrap_or_default(),
            tags,
            memory_bytes: (memory_bytes > 0).then_some(memory_bytes),
            intra_op_threads: settings.required("intra-op-threads"),
            bounds,
            detached,
            message_bytes_max,
            execution_max_ms: settings.required("max-execution-ms"),
            load_max_ms: settings.required("max-load-ms"),
            grpc_threads: settings.required("grpc-threads"),
            streams_per_connection_max,
            drain: Duration::from_millis(settings.required("drain-ms")),
            null_engine: settings.required("null-engine"),
            cache_dir: given_cache_dir.unwrap_or_else(|| cache_dir(&id)),
            log: settings.required("log"),
            exit_with_parent: settings.optional("exit-with-parent"),
        };
        settings.finish()?;
        Ok(config)
    }
}

/// A folder that no other worker of this machine has.
fn cache_dir(id: &str) -> PathBuf {
    std::env::temp_dir().join(format!("cresset-worker-{id}-{:016x}", rand::random::<u64>()))
}

#[cfg(test)]
mod tests {
    use cresset_runtime::settings::Invocation;

    use super::*;

    fn read(args: &[&str]) -> Result<Config, Problems> {
        match PROGRAM.invoke_with(std::iter::once("cresset-worker").chain(args.iter().copied()).map(Into::into)) {
            Invocation::Run(settings) => Config::read(settings),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_full_command_line_is_read() {
        let config =
            read(&["--id", "w1", "--coordinators", "127.0.0.1:1,127.0.0.1:2", "--model-repository", ".", "--device", "cpu"]);
        let config = config.unwrap();
        assert_eq!((config.coordinators.len(), config.device, config.memory_bytes), (2, DeviceChoice::Cpu, None));
    }

    #[test]
    fn every_problem_is_named() {
        let text = read(&["--id", "a/b", "--device", "tpu", "--queue-requests-max", "0", "--streams-per-connection-max", "0"])
            .unwrap_err()
            .to_string();
        for name in ["id:", "coordinators:", "model-repository:", "device:", "queue-requests-max:", "streams-per-connection-max:"]
        {
            assert!(text.contains(&format!("config: {name}")), "{name} in {text}");
        }
    }

    #[test]
    fn the_example_in_deploy_is_right_but_for_its_folders() {
        let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/config/worker.toml");
        read(&["--config", example, "--model-repository", "."]).unwrap();
    }
}
