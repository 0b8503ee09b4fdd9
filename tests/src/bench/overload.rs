//! Three times more than a worker can do: what it accepts is answered in time, the rest hears so at once, and memory stays
//! bounded.

use std::time::Duration;

use anyhow::Context;

use super::{
    figures::Part,
    generator::Level,
    models::MINILM,
    stage::{Stage, WORKER},
};
use crate::harness::Cluster;

/// How long each caller waits.
const DEADLINE: Duration = Duration::from_secs(2);
/// Times the worker's best.
const TOO_MUCH: f64 = 3.0;
const MIB: f64 = (1 << 20) as f64;

/// Measures a model whose calls are all that costs, at its best, then with far too much, then at its best again.
///
/// # Errors
/// When a process fails, or a request other than for want of room.
pub fn measure(stage: &Stage, cluster: &Cluster) -> anyhow::Result<Part> {
    let mut part = Part::default();
    let straight = stage.straight(cluster, MINILM)?;
    let best = straight.lasting(stage.pace.time * 2);
    let before = best.closed(64)?;
    let flood = straight.lasting(stage.pace.overload).within(DEADLINE).open_beyond(before.throughput * TOO_MUCH)?;
    let after = best.closed(64)?;
    for (what, level) in [("before", &before), ("flood", &flood), ("after", &after)] {
        part.raw(what, 0, level);
    }
    let peak = before.throughput.max(after.throughput);
    part.add("peak_requests_per_second", peak);
    part.add("goodput_over_peak", flood.throughput / peak);
    part.add("accepted_p99_over_deadline", flood.latency("p99")? / 1e6 / DEADLINE.as_secs_f64());
    part.add("refused_share", flood.failed as f64 / (flood.failed + flood.answered).max(1) as f64);
    part.add("memory_growth_mib", rss_mib(&flood)? - rss_mib(&before)?);
    part.fact("seconds", stage.pace.overload.as_secs());
    Ok(part)
}

fn rss_mib(level: &Level) -> anyhow::Result<f64> {
    Ok(level.processes.first().with_context(|| format!("{WORKER} wasn't watched"))?.rss_bytes as f64 / MIB)
}
