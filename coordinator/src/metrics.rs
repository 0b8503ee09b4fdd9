//! Metrics of the coordinator's own. Names are part of what dashboards rely on; the test below pins them.
use std::sync::LazyLock;

use cresset_core::command::Cause;
use cresset_runtime::metrics::register;
use prometheus::{IntCounterVec, IntGauge, Opts};

fn gauge(name: &str, help: &str) -> IntGauge {
    // The names are constants of this file, and the test below makes each of them.
    register(IntGauge::new(name, help).expect("a valid metric"))
}

fn counter(name: &str, help: &str, label: &str) -> IntCounterVec {
    register(IntCounterVec::new(Opts::new(name, help), &[label]).expect("a valid metric"))
}

/// Whether this coordinator leads: 0 or 1.
pub static LEADING: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("cresset_leading", "whether this coordinator does the leader's duties"));

/// Workers that have a stream to this coordinator.
pub static WORKERS_JOINED: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("cresset_workers_joined", "workers with a stream to this coordinator"));

/// Verdicts that were agreed on, by cause.
pub static DEATHS: LazyLock<IntCounterVec> =
    LazyLock::new(|| counter("cresset_workers_judged_dead_total", "workers that were judged dead", "cause"));

/// Replicas that the plans of this coordinator began and ended.
pub static MOVES: LazyLock<IntCounterVec> =
    LazyLock::new(|| counter("cresset_placement_moves_total", "replicas that were placed or taken away", "move"));

/// The label of a cause.
pub fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Silence => "silence",
        Cause::Unreachable => "unreachable",
        Cause::Operator => "operator",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_pinned() {
        LEADING.set(0);
        WORKERS_JOINED.set(0);
        DEATHS.with_label_values(&[cause(Cause::Silence)]).inc();
        MOVES.with_label_values(&["add"]).inc();
        let text = cresset_runtime::metrics::render();
        for name in [
            "cresset_leading",
            "cresset_workers_joined",
            "cresset_workers_judged_dead_total{cause=\"silence\"}",
            "cresset_placement_moves_total{move=\"add\"}",
        ] {
            assert!(text.contains(name), "{name} is missing in\n{text}");
        }
    }
}
