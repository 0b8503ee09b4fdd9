//! Writers in a closed loop: each has one command under way at a time, and a connection of its own to the leader.

use std::time::Duration;

use anyhow::bail;
use hdrhistogram::Histogram;
use tokio::{task::JoinSet, time::Instant};
use tonic::Status;

use super::group::{Client, Group};
use crate::bench::usage::cpu_seconds;

/// Before anything is counted, a part of the time that is.
const WARM_UP: u32 = 5;
/// How often a level is measured when leadership changes under it: what was seen then says nothing about rates.
const ATTEMPTS_MAX: usize = 5;

/// What was seen of so many writers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Level {
    pub(super) commands_per_second: f64,
    pub(super) p50_us: f64,
    pub(super) p99_us: f64,
    /// Of all members together, for each command.
    pub(super) cpu_us: f64,
}

/// Measures for so long.
pub(super) async fn measure<C: Client>(group: &Group<C>, writers: usize, time: Duration) -> anyhow::Result<Level> {
    let mut last = None;
    for _ in 0..ATTEMPTS_MAX {
        let leader = group.whole().await?;
        match attempt(group, &leader, writers, time).await? {
            Ok(level) => return Ok(level),
            Err(status) => last = Some(status),
        }
    }
    bail!("{}: writes failed in each of {ATTEMPTS_MAX} attempts, the last with {last:?}", C::NAME);
}

async fn attempt<C: Client>(
    group: &Group<C>,
    leader: &str,
    writers: usize,
    time: Duration,
) -> anyhow::Result<Result<Level, Status>> {
    let counted_from = Instant::now() + time / WARM_UP;
    let until = counted_from + time;
    let mut writing = JoinSet::new();
    for writer in 0..writers {
        writing.spawn(write(group.client(leader)?, writer, counted_from, until));
    }
    let cpu = || group.cluster().ids().iter().map(|id| cpu_seconds(group.cluster().process(id)?.pid())).sum::<Result<f64, _>>();
    tokio::time::sleep_until(counted_from).await;
    let cpu_before = cpu()?;
    let mut took = Histogram::<u64>::new(3)?;
    while let Some(written) = writing.join_next().await {
        match written? {
            Ok(own) => took.add(own)?,
            Err(status) => return Ok(Err(status)),
        }
    }
    let cpu_used = cpu()? - cpu_before;
    let count = took.len() as f64;
    Ok(Ok(Level {
        commands_per_second: count / time.as_secs_f64(),
        p50_us: took.value_at_quantile(0.5) as f64,
        p99_us: took.value_at_quantile(0.99) as f64,
        cpu_us: cpu_used * 1e6 / count.max(1.0),
    }))
}

/// How long each command took that was done in time, in µs.
async fn write<C: Client>(client: C, writer: usize, counted_from: Instant, until: Instant) -> Result<Histogram<u64>, Status> {
    let failed = |error: &dyn std::fmt::Display| Status::internal(error.to_string());
    let mut took = Histogram::new(3).map_err(|error| failed(&error))?;
    for number in 1.. {
        let began = Instant::now();
        client.write(writer, number).await?;
        let done = Instant::now();
        if done >= until {
            break;
        }
        if done >= counted_from {
            let took_us = u64::try_from((done - began).as_micros()).unwrap_or(u64::MAX);
            took.record(took_us).map_err(|error| failed(&error))?;
        }
    }
    Ok(took)
}
