//! Every bound of a router, in one place.
use std::time::Duration;

use crate::{journal::Limits, kept, workers::ConnectionSettings};

/// How a router behaves. The defaults suit a cluster in one data centre.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouterSettings {
    /// Connections to workers.
    pub connection: ConnectionSettings,
    /// The failure zone that the router is in, whose workers it prefers; empty for none.
    pub zone: String,
    /// How long it takes until a replica that has just come gets its full share of requests.
    pub slow_start: Duration,
    /// How long a request without a deadline of its own may take; of a decoupled model: how long it may be silent.
    pub request_timeout: Duration,
    /// How long a unary request waits for a replica when none can take it.
    pub route_wait: Duration,
    /// How long a replica that failed is taken only when nobody else is left.
    pub failing_for: Duration,
    /// How often a unary request may move after it was sent.
    pub moves_max: u32,
    /// How often a request may move because a replica had no room.
    pub overloads_max: u32,
    /// How often a sequence may move without having got an answer in between.
    pub sequence_moves_max: u32,
    /// Sequences that may be open at once.
    pub sessions_max: usize,
    /// Requests of one sequence that may be unanswered.
    pub session_requests_max: u32,
    /// Bytes of requests of one sequence that may be unanswered. A larger request goes alone.
    pub session_bytes_max: u32,
    /// Bytes that the journals of all sequences may keep together.
    pub journals_bytes_max: usize,
    /// Bounds of one sequence's journal.
    pub journal: Limits,
    /// What is kept of the answers of one sequence that its client can take up again.
    pub kept: kept::Limits,
    /// How long workers are asked for such a sequence whose router died.
    pub take_timeout: Duration,
    /// Requests of one stream that may be unanswered.
    pub stream_requests_max: usize,
    /// How long the answer of a request that has a `cresset_request_id` is remembered.
    pub answers_window: Duration,
    /// Bytes of such answers that are remembered.
    pub answers_bytes_max: usize,
    /// Whether a unary request that takes longer than 19 of 20 do is sent to a second replica too, for at most one request in
    /// twenty. The first answer wins.
    pub hedging: bool,
}

impl Default for RouterSettings {
    fn default() -> Self {
        Self {
            connection: ConnectionSettings::default(),
            zone: String::new(),
            slow_start: Duration::from_secs(5),
            request_timeout: Duration::from_secs(60),
            route_wait: Duration::from_secs(5),
            failing_for: Duration::from_secs(1),
            moves_max: 3,
            overloads_max: 2,
            sequence_moves_max: 16,
            sessions_max: 10_000,
            session_requests_max: 64,
            session_bytes_max: 8 << 20,
            journals_bytes_max: 1 << 30,
            journal: Limits::default(),
            kept: kept::Limits::default(),
            take_timeout: Duration::from_secs(3),
            stream_requests_max: 128,
            answers_window: Duration::from_secs(60),
            answers_bytes_max: 64 << 20,
            hedging: false,
        }
    }
}
