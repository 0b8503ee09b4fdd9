//! What consensus has to be told, and the relations that its limits must keep.
use std::{collections::BTreeMap, fmt, path::PathBuf, time::Duration};

use cresset_core::{
    command::VOTERS_MAX,
    level::{LEVEL_FIRST, LEVEL_KNOWN, Level},
};

/// Largest encoded command. A model configuration is at most 1 MiB, a plan of 10,000 moves about the same.
pub const COMMAND_BYTES_MAX: usize = 2 << 20;
/// Largest encoded snapshot.
pub const SNAPSHOT_BYTES_MAX: usize = 256 << 20;

/// Everything that [`start`](super::start) needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The cluster's name. Messages of another cluster are refused.
    pub cluster_id: String,
    /// This coordinator's id, one of `peers`; never 0.
    pub id: u64,
    /// `host:port` of the peer service of the coordinators that found the cluster, this one included. Once it is founded, who
    /// the members are is agreed on; the addresses here count until they announce others.
    pub peers: BTreeMap<u64, String>,
    /// An empty folder waits to be added to a cluster, rather than to found one.
    pub join: bool,
    /// Where the log, the snapshots and the identity file live.
    pub data_dir: PathBuf,
    /// How long a tick lasts. Everything in ticks scales with it.
    pub tick: Duration,
    /// Ticks between a leader's heartbeats.
    pub heartbeat_ticks: usize,
    /// Least ticks of silence after which a follower stands for election.
    pub election_ticks_min: usize,
    /// The draw of that silence stays below this many ticks.
    pub election_ticks_max: usize,
    /// Entries applied between two snapshots.
    pub snapshot_entries: u64,
    /// Bytes applied between two snapshots: whichever comes first.
    pub snapshot_bytes: u64,
    /// Entries kept behind a snapshot, so that a peer that was away for a moment needs no snapshot.
    pub keep_entries: u64,
    /// Largest message between peers, unless one entry alone is larger.
    pub message_bytes_max: u64,
    /// Append messages on their way to one peer.
    pub inflight_messages_max: usize,
    /// Bytes of entries that the leader takes before they are committed; more is refused as overload.
    pub uncommitted_bytes_max: u64,
    /// Callers that wait for a proposal or for a read on this coordinator.
    pub waiters_max: usize,
    /// Bytes that stay free in the file system of the data folder: with less the log doesn't grow. 0: that isn't looked at.
    pub disk_kept_bytes: u64,
    /// How long a proposal may wait for its commit before its caller is told that its fate is unknown.
    pub propose_timeout: Duration,
    /// How long one transfer of a snapshot may take.
    pub snapshot_timeout: Duration,
    /// The highest feature level that this coordinator knows. Lower where a test stands in for an earlier version.
    pub level_known: Level,
}

impl Settings {
    /// Settings with the usual timing: a heartbeat each 50 ms, an election after 300 to 600 ms of silence.
    pub fn new(cluster_id: impl Into<String>, id: u64, peers: BTreeMap<u64, String>, data_dir: impl Into<PathBuf>) -> Self {
        Self {
            cluster_id: cluster_id.into(),
            id,
            peers,
            join: false,
            data_dir: data_dir.into(),
            tick: Duration::from_millis(50),
            heartbeat_ticks: 1,
            election_ticks_min: 6,
            election_ticks_max: 12,
            snapshot_entries: 10_000,
            snapshot_bytes: 32 << 20,
            keep_entries: 1_000,
            message_bytes_max: 1 << 20,
            inflight_messages_max: 64,
            uncommitted_bytes_max: 32 << 20,
            waiters_max: 4_096,
            disk_kept_bytes: 64 << 20,
            propose_timeout: Duration::from_secs(5),
            snapshot_timeout: Duration::from_secs(60),
            level_known: LEVEL_KNOWN,
        }
    }

    /// Checks every value and every relation between them.
    ///
    /// # Errors
    /// All problems, not only the first.
    pub fn check(&self) -> Result<(), Vec<Problem>> {
        let mut problems = Vec::new();
        let mut want = |ok: bool, field: &'static str, problem: String| {
            if !ok {
                problems.push(Problem { field, problem });
            }
        };
        let length = self.cluster_id.len();
        want((1..=128).contains(&length), "cluster_id", format!("has {length} bytes, it must have 1 to 128"));
        want(self.id != 0, "id", "must not be 0".to_owned());
        want(self.peers.contains_key(&self.id), "peers", format!("lacks c{}, which is this coordinator", self.id));
        want(!self.peers.contains_key(&0), "peers", "names a peer 0; ids start at 1".to_owned());
        let found = self.peers.len();
        want(found <= VOTERS_MAX, "peers", format!("has {found} members, at most {VOTERS_MAX} can vote"));
        for (id, address) in &self.peers {
            want(is_host_port(address), "peers", format!("has '{address}' for c{id}, it must be host:port"));
        }
        let tick = self.tick;
        let tick_fits = (Duration::from_millis(1)..=Duration::from_secs(10)).contains(&tick);
        want(tick_fits, "tick", format!("is {tick:?}, it must be 1 ms to 10 s"));
        want(self.heartbeat_ticks >= 1, "heartbeat_ticks", "must be at least 1".to_owned());
        let shortest = self.heartbeat_ticks.saturating_mul(3);
        want(
            self.election_ticks_min >= shortest,
            "election_ticks_min",
            format!("must be at least 3 times heartbeat_ticks, which is {shortest}"),
        );
        want(
            self.election_ticks_max > self.election_ticks_min,
            "election_ticks_max",
            format!("must be above election_ticks_min, which is {}", self.election_ticks_min),
        );
        want(self.snapshot_entries >= 1, "snapshot_entries", "must be at least 1".to_owned());
        want(self.snapshot_bytes >= 1 << 10, "snapshot_bytes", "must be at least 1024".to_owned());
        let message = self.message_bytes_max;
        let message_fits = (1 << 10..=2 << 20).contains(&message);
        want(message_fits, "message_bytes_max", format!("is {message}, it must be 1024 to 2097152"));
        want((1..=256).contains(&self.inflight_messages_max), "inflight_messages_max", "must be 1 to 256".to_owned());
        let least = (COMMAND_BYTES_MAX as u64).max(message);
        want(
            self.uncommitted_bytes_max >= least,
            "uncommitted_bytes_max",
            format!("must be at least {least}, the size of the largest command or message"),
        );
        want(self.waiters_max >= 1, "waiters_max", "must be at least 1".to_owned());
        want(!self.propose_timeout.is_zero(), "propose_timeout", "must not be 0".to_owned());
        want(!self.snapshot_timeout.is_zero(), "snapshot_timeout", "must not be 0".to_owned());
        let level_fits = (LEVEL_FIRST..=LEVEL_KNOWN).contains(&self.level_known);
        want(level_fits, "level_known", format!("is {}, it must be {LEVEL_FIRST} to {LEVEL_KNOWN}", self.level_known));
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

fn is_host_port(address: &str) -> bool {
    address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port != 0))
}

/// One thing that is wrong with [`Settings`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Which setting.
    pub field: &'static str,
    /// What is wrong with it, and its limit.
    pub problem: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.field, self.problem)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn three() -> BTreeMap<u64, String> {
        (1..=3).map(|id| (id, format!("127.0.0.1:{}", 7000 + id))).collect()
    }

    #[test]
    fn the_usual_settings_are_accepted() {
        assert_eq!(Settings::new("c", 1, three(), "data").check(), Ok(()));
    }

    #[test]
    fn every_problem_is_reported_at_once() {
        let mut settings = Settings::new("", 0, three(), "data");
        settings.peers.insert(4, "nowhere".to_owned());
        settings.election_ticks_min = 2;
        settings.election_ticks_max = 2;
        settings.uncommitted_bytes_max = 1;
        let problems = settings.check().expect_err("it is full of problems");
        let fields: Vec<_> = problems.iter().map(|problem| problem.field).collect();
        let expected =
            ["cluster_id", "id", "peers", "peers", "election_ticks_min", "election_ticks_max", "uncommitted_bytes_max"];
        assert_eq!(fields, expected, "{problems:?}");
    }
}
