//! `cresset bench` as the load generator.

use std::{
    collections::BTreeMap,
    process::{Child, Stdio},
    time::Duration,
};

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use super::models::Model;
use crate::harness::{Cluster, Member, binaries};

/// How long a request may take: the largest batches of the slowest model, on a machine that is busy.
const REQUEST_TIMEOUT: &str = "120s";

/// One level of a report. Further keys are kept as they are.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Level {
    /// Good answers per second.
    pub throughput: f64,
    /// Measured requests with a good answer.
    pub answered: u64,
    /// Measured requests without.
    pub failed: u64,
    /// Never sent.
    pub unsent: u64,
    /// By percentile.
    pub latency_us: BTreeMap<String, f64>,
    /// Of the watched processes, in their order.
    pub processes: Vec<Cost>,
    /// Everything else.
    #[serde(flatten)]
    pub more: BTreeMap<String, serde_json::Value>,
}

/// What a process used.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cost {
    /// For each request.
    pub cpu_us: f64,
    /// Resident memory at the end.
    pub rss_bytes: u64,
}

impl Level {
    /// A percentile of the latency in µs, as in `p99`.
    ///
    /// # Errors
    /// If nothing was answered.
    pub fn latency(&self, percentile: &str) -> anyhow::Result<f64> {
        self.latency_us.get(percentile).copied().with_context(|| format!("no {percentile}: nothing was answered"))
    }
}

#[derive(Deserialize)]
struct Report {
    levels: Vec<Level>,
}

/// Load for one model through one process.
#[derive(Debug, Clone)]
pub struct Generator {
    endpoint: String,
    model: Model,
    watched: Vec<u32>,
    warmup: Duration,
    duration: Duration,
    /// How long the server may take for each request, if it is told so.
    deadline: Option<Duration>,
}

/// A generator at work.
#[derive(Debug)]
pub struct Running(Child);

impl Generator {
    /// Load on this model through a process of the cluster, watching the CPU time of that process and of the others named.
    ///
    /// # Errors
    /// If the cluster has no such process.
    pub fn new(cluster: &Cluster, through: &str, model: Model, watched: &[&str]) -> anyhow::Result<Self> {
        let members = || cluster.file().coordinators.iter().chain(&cluster.file().workers);
        let member = |id: &str| -> anyhow::Result<&Member> {
            members().find(|member| member.id == id).with_context(|| format!("no process {id}"))
        };
        Ok(Self {
            endpoint: member(through)?.grpc.clone(),
            model,
            watched: watched.iter().map(|id| Ok(member(id)?.pid)).collect::<anyhow::Result<_>>()?,
            warmup: Duration::from_millis(500),
            duration: Duration::from_secs(2),
            deadline: None,
        })
    }

    /// The same, measured for so long.
    #[must_use]
    pub fn lasting(&self, duration: Duration) -> Self {
        Self { duration, ..self.clone() }
    }

    /// The same, where the server is told that each request may take so long.
    #[must_use]
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline: Some(deadline), ..self.clone() }
    }

    /// The same, measured from the first request.
    #[must_use]
    pub fn unwarmed(&self) -> Self {
        Self { warmup: Duration::ZERO, ..self.clone() }
    }

    /// Keeps so many requests in flight.
    ///
    /// # Errors
    /// The generator's, or if a request failed.
    pub fn closed(&self, concurrency: u32) -> anyhow::Result<Level> {
        self.start(&["--concurrency", &concurrency.to_string()])?.level()
    }

    /// Sends so many requests per second, at random times.
    ///
    /// # Errors
    /// As [`closed`](Self::closed).
    pub fn open(&self, rate: f64) -> anyhow::Result<Level> {
        self.start_open(rate)?.level()
    }

    /// As [`open`](Self::open), where requests may fail.
    ///
    /// # Errors
    /// The generator's.
    pub fn open_beyond(&self, rate: f64) -> anyhow::Result<Level> {
        self.start_open(rate)?.level_with_failures()
    }

    /// As [`open`](Self::open), without waiting for the end.
    ///
    /// # Errors
    /// If it can't be started.
    pub fn start_open(&self, rate: f64) -> anyhow::Result<Running> {
        self.start(&["--rate", &format!("{rate:.3}"), "--inflight-max", "4096"])
    }

    /// Sends so many requests, with these flags besides.
    ///
    /// # Errors
    /// As [`closed`](Self::closed).
    pub fn requests(&self, requests: u64, flags: &[&str]) -> anyhow::Result<Level> {
        let requests = requests.to_string();
        self.start(&[flags, &["--requests", &requests]].concat())?.level()
    }

    fn start(&self, flags: &[&str]) -> anyhow::Result<Running> {
        let millis = |duration: Duration| format!("{}ms", duration.as_millis());
        let pids = self.watched.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut command = binaries::command("cresset");
        let timeout = self.deadline.map_or(REQUEST_TIMEOUT.to_owned(), millis);
        command.args(["--endpoints", &self.endpoint, "--timeout", &timeout, "-o", "json", "bench", self.model.name]);
        command.args(self.deadline.map(|_| "--deadline"));
        command.args(self.model.flags());
        command.args(flags).args(["--seed", "1", "--percentiles", "50,75,90,95,99,99.5,99.9"]);
        if !flags.contains(&"--requests") {
            command.args(["--duration", &millis(self.duration)]);
        }
        let warmup = if self.warmup.is_zero() { "0s".to_owned() } else { millis(self.warmup) };
        command.args(["--warmup", &warmup]);
        if !pids.is_empty() {
            command.args(["--process", &pids]);
        }
        let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        child.map(Running).context("can't start cresset bench")
    }
}

impl Running {
    /// Whether it is still at work.
    ///
    /// # Errors
    /// The system's.
    pub fn is_at_work(&mut self) -> anyhow::Result<bool> {
        Ok(self.0.try_wait()?.is_none())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// The generator's, or if a request failed.
    pub fn level(self) -> anyhow::Result<Level> {
        let level = self.level_with_failures()?;
        let errors = level.more.get("errors");
        ensure!(level.failed == 0, "{} requests failed: {errors:?}", level.failed);
        Ok(level)
    }

    /// Waits for its end, whatever became of the requests.
    ///
    /// # Errors
    /// The generator's.
    pub fn level_with_failures(self) -> anyhow::Result<Level> {
        let output = self.0.wait_with_output()?;
        let stderr = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "cresset bench failed: {}", stderr.trim());
        let mut report: Report = serde_json::from_slice(&output.stdout).context("cresset bench said no JSON")?;
        report.levels.pop().context("cresset bench had no level")
    }
}
