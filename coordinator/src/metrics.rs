//! Metrics of the coordinator's own. Names are part of what dashboards rely on; the test below pins them.
use std::sync::LazyLock;

use cresset_client::{Router, SequenceFigures, ejection::Cause as Ejected};
use cresset_core::command::Cause;
use cresset_runtime::metrics::register;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts};

fn gauge(name: &str, help: &str) -> IntGauge {
    // The names are constants of this file, and the test below makes each of them.
    register(IntGauge::new(name, help).expect("a valid metric"))
}

fn counter(name: &str, help: &str, label: &str) -> IntCounterVec {
    register(IntCounterVec::new(Opts::new(name, help), &[label]).expect("a valid metric"))
}

fn total(name: &str, help: &str) -> IntCounter {
    register(IntCounter::new(name, help).expect("a valid metric"))
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

/// Sequences that are open at this coordinator.
pub static SEQUENCES: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("cresset_router_sequences", "sequences that are open at this coordinator"));

/// What their journals hold.
pub static JOURNALS_BYTES: LazyLock<IntGauge> = LazyLock::new(|| {
    gauge("cresset_router_journals_bytes", "requests since the last checkpoint and unacknowledged answers of all sequences")
});

/// Checkpoints that came from workers.
pub static CHECKPOINTS_BYTES: LazyLock<IntCounter> =
    LazyLock::new(|| total("cresset_router_checkpoints_bytes_total", "checkpoints that workers sent"));

/// Sequences whose clients came from another coordinator.
pub static TAKEN_UP: LazyLock<IntCounter> =
    LazyLock::new(|| total("cresset_router_sequences_taken_up_total", "sequences that began at another coordinator"));

/// Workers that this coordinator's router leaves alone now.
pub static LEFT_ALONE: LazyLock<IntGauge> =
    LazyLock::new(|| gauge("cresset_workers_left_alone", "workers that this coordinator's router sends nothing to"));

/// How often its router took a worker out, by cause.
pub static EJECTIONS: LazyLock<IntCounterVec> =
    LazyLock::new(|| counter("cresset_worker_ejections_total", "how often the router took a worker out", "cause"));

/// Second copies of requests that took long, and those that answered first.
pub static HEDGES: LazyLock<IntCounterVec> =
    LazyLock::new(|| counter("cresset_hedges_total", "second copies of requests that took long: sent, and won", "event"));

/// Shows what a router has counted.
pub fn show_router(router: &Router) {
    sequences(router.sequence_figures());
    LEFT_ALONE.set(size(router.routes().workers().filter(|worker| worker.out().is_some()).count()));
    for cause in [Ejected::Silence, Ejected::Slow, Ejected::Failures, Ejected::Canary] {
        raise(&EJECTIONS.with_label_values(&[cause.as_str()]), router.counts().ejections(cause));
    }
    for (event, count) in [("sent", router.counts().hedges()), ("won", router.counts().hedges_won())] {
        raise(&HEDGES.with_label_values(&[event]), count);
    }
}

fn sequences(figures: SequenceFigures) {
    SEQUENCES.set(size(figures.live));
    JOURNALS_BYTES.set(size(figures.journals_bytes));
    raise(&CHECKPOINTS_BYTES, figures.checkpoints_bytes);
    raise(&TAKEN_UP, figures.taken_up);
}

fn size(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Brings a counter up to what was counted elsewhere.
fn raise(shown: &IntCounter, counted: u64) {
    shown.inc_by(counted.saturating_sub(shown.get()));
}

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
        sequences(SequenceFigures { live: 2, journals_bytes: 3, checkpoints_bytes: 4, taken_up: 5 });
        sequences(SequenceFigures { live: 1, journals_bytes: 2, checkpoints_bytes: 6, taken_up: 7 });
        LEFT_ALONE.set(0);
        HEDGES.with_label_values(&["won"]).inc();
        EJECTIONS.with_label_values(&[Ejected::Silence.as_str()]).inc();
        let text = cresset_runtime::metrics::render();
        for name in [
            "cresset_leading",
            "cresset_workers_joined",
            "cresset_workers_judged_dead_total{cause=\"silence\"}",
            "cresset_placement_moves_total{move=\"add\"}",
            "cresset_router_sequences 1",
            "cresset_router_journals_bytes 2",
            "cresset_router_checkpoints_bytes_total 6",
            "cresset_router_sequences_taken_up_total 7",
            "cresset_workers_left_alone",
            "cresset_hedges_total{event=\"won\"}",
            "cresset_worker_ejections_total{cause=\"silence\"}",
        ] {
            assert!(text.contains(name), "{name} is missing in\n{text}");
        }
    }
}
