//! What a call costs beyond the `forward` inside it: time for the caller, CPU for the processes on its way.

use anyhow::Context;

use super::{
    bare,
    figures::Part,
    inprocess::{Holder, Threads},
    models::MLP,
    stage::Stage,
};
use crate::harness::Cluster;

/// Measures the small model straight and through a coordinator, each beside the same `forward` in process, and beside a call that
/// does nothing.
///
/// # Errors
/// When a process fails, or a request.
pub fn measure(stage: &Stage, cluster: &Cluster) -> anyhow::Result<Part> {
    let mut part = Part::default();
    let mut holders = Vec::new();
    for threads in [stage.one_caller(), Threads { callers: 1, intra: 1 }] {
        holders.push(Holder::start(stage.repository.path(), stage.gpu, &[MLP], threads)?);
    }
    let straight = stage.straight(cluster, MLP)?;
    let through = stage.through_coordinator(cluster, MLP)?;
    for round in 0..stage.pace.rounds {
        let mut forwards = Vec::new();
        for holder in &mut holders {
            let measured = holder.measure(MLP, 1, stage.pace.time / 2)?;
            part.raw("in_process", round, &(holder.threads, measured));
            forwards.push(measured);
        }
        // The reference is libtorch at its best.
        let forward = forwards.into_iter().min_by(|a, b| a.p50_us.total_cmp(&b.p50_us)).context("no reference")?;
        let bare = bare::measure(stage.pace.time / 2)?;
        part.raw("bare", round, &bare);
        part.add("bare_p50_us", bare.p50_us);
        part.add("bare_cpu_us", bare.server_cpu_us);
        part.add("in_process_p50_us", forward.p50_us);
        part.add("in_process_p99_us", forward.p99_us);
        for (name, generator) in [("direct", &straight), ("coordinator", &through)] {
            let alone = generator.closed(1)?;
            part.raw(&format!("{name} at 1"), round, &alone);
            for (percentile, forward_us) in [("p50", forward.p50_us), ("p99", forward.p99_us)] {
                let whole = alone.latency(percentile)?;
                part.add(&format!("{name}_whole_{percentile}_us"), whole);
                part.add(&format!("{name}_{percentile}_us"), whole - forward_us);
            }
            let many = generator.closed(64)?;
            part.raw(&format!("{name} at 64"), round, &many);
            part.add(&format!("{name}_throughput_at_64"), many.throughput);
            // The worker's share is told by the calls that are straight, the coordinator's by the others.
            let (process, place) = if name == "direct" { ("worker", 0) } else { ("coordinator", 1) };
            for (level, suffix) in [(&alone, "_at_1"), (&many, "")] {
                let cost = level.processes.get(place).context("a process wasn't watched")?;
                part.add(&format!("{process}_cpu_us{suffix}"), cost.cpu_us);
            }
        }
    }
    Ok(part)
}
