//! What is written down of a run: what each lane sent and got, and what was done to the cluster. Times are µs since the run
//! began, in every process.

use std::fmt;

use bytes::Bytes;

use super::{faults::Fault, models::Kind};

/// Which way a lane's requests go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// The Rust client, whose router talks to workers.
    Client,
    /// Generated code and a list of coordinators' addresses.
    Plain,
    /// Python's tritonclient and a list of coordinators' addresses.
    Triton,
    /// The Rust client's streams by way of coordinators, which outlive them.
    Resumed,
    /// Python's tritonclient with what PROTOCOL.md asks of a client whose streams outlive coordinators.
    ResumedTriton,
}

impl Way {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Client, Self::Plain, Self::Triton, Self::Resumed, Self::ResumedTriton];
    /// Those that single calls go.
    pub const CALLS: [Self; 3] = [Self::Client, Self::Plain, Self::Triton];

    /// Whether Python goes it.
    pub fn is_python(self) -> bool {
        matches!(self, Self::Triton | Self::ResumedTriton)
    }

    /// Whether what is open at a coordinator may end with it.
    pub fn may_move(self) -> bool {
        matches!(self, Self::Plain | Self::Triton)
    }

    /// Whether its streams are at a coordinator and outlive it.
    pub fn resumes(self) -> bool {
        matches!(self, Self::Resumed | Self::ResumedTriton)
    }

    /// Its name in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Plain => "plain",
            Self::Triton => "tritonclient",
            Self::Resumed => "resumed",
            Self::ResumedTriton => "resumed tritonclient",
        }
    }
}

/// Requests of one kind that go one way at a steady pace.
#[derive(Debug, Clone)]
pub struct Lane {
    /// What is asked.
    pub kind: Kind,
    /// Which way.
    pub way: Way,
    /// Which of the kind's scripts it follows.
    pub script: usize,
    /// From one request to the next.
    pub interval_us: u64,
    /// What became of it.
    pub passes: Vec<Pass>,
}

/// One attempt at a request of its own, or one stream from its first request to its last answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Pass {
    /// The coordinator's address; `None` for the Rust client, and for a stream that outlives coordinators.
    pub address: Option<String>,
    /// Where in the script its first request is; the others follow, around the end.
    pub first: usize,
    /// When each request was handed over.
    pub sent: Vec<u64>,
    /// What came back, in the order of delivery.
    pub delivered: Vec<Delivered>,
    /// How it broke, if it did.
    pub broken: Option<Break>,
}

/// One response.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivered {
    /// The request that it says it is for; `None` for an id that nobody gave.
    pub ordinal: Option<usize>,
    /// When.
    pub at_us: u64,
    /// Its output.
    pub output: Bytes,
}

/// The end of a pass that wasn't its last answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Break {
    /// When the caller saw it.
    pub at_us: u64,
    /// The gRPC code, or what the caller itself says.
    pub code: String,
    /// What was said.
    pub message: String,
    /// The caller doesn't try this request again.
    pub gave_up: bool,
}

/// One fault that was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Happened {
    /// What.
    pub fault: Fault,
    /// Ids of the processes that it was done to.
    pub targets: Vec<String>,
    /// When.
    pub begun_us: u64,
    /// When it was undone.
    pub undone_us: u64,
    /// When the cluster was whole again; the end of time if it never was.
    pub whole_us: u64,
}

impl fmt::Display for Happened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |us: u64| us as f64 / 1e6;
        let (at, name, targets) = (seconds(self.begun_us), self.fault.name(), self.targets.join(" "));
        let (lasted, whole) = (seconds(self.undone_us - self.begun_us), seconds(self.whole_us - self.begun_us));
        write!(f, "{at:9.3} s: {name} {targets} for {lasted:.3} s, whole again {whole:.3} s after it began")
    }
}
