//! What a request pays before it is sent: finding its model's route and choosing a replica, in a large cluster.

use std::{
    collections::BTreeMap,
    hint::black_box,
    sync::Barrier,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context;
use cresset_client::{Router, RouterSettings, Version, routes};
use cresset_proto::fleet::v1::{ModelRoute, ShardRoute, WatchResponse, WorkerRoute};

use super::figures::Part;

/// How large the cluster is.
#[derive(Debug, Clone, Copy)]
pub struct Size {
    /// Workers.
    pub workers: usize,
    /// Models, each on some of them.
    pub models: usize,
    /// Replicas of each model.
    pub replicas: usize,
}

impl Size {
    /// What the design promises a microsecond for.
    pub const LARGE: Self = Self { workers: 1_000, models: 10_000, replicas: 3 };
}

/// So many decisions between two looks at the clock.
const AT_ONCE: u64 = 1_000;

/// The routes of such a cluster, as a coordinator sends them.
fn table(size: Size) -> WatchResponse {
    let worker = |number: usize| format!("worker-{number:04}");
    let workers = (0..size.workers).map(|number| WorkerRoute {
        worker_id: worker(number),
        incarnation: 1,
        grpc_address: format!("10.0.{}.{}:8101", number / 256, number % 256),
        zone: String::new(),
    });
    let models = (0..size.models).map(|number| {
        let worker_ids = (0..size.replicas).map(|replica| worker((number * 7 + replica * 331) % size.workers)).collect();
        ModelRoute {
            model: model(number),
            version: 1,
            generation: 1,
            shards: vec![ShardRoute { shard: 0, worker_ids }],
            ..Default::default()
        }
    });
    WatchResponse { epoch: 1, models: models.collect(), workers: workers.collect(), ..Default::default() }
}

fn model(number: usize) -> String {
    format!("team-{}/model-{number:05}", number % 17)
}

/// Nanoseconds for each lookup and decision, on so many threads at once, in so many rounds: for each round the mean of the thread
/// that was slowest.
///
/// # Errors
/// When the router refuses the table, or a model has no replica in it.
pub fn decisions(size: Size, threads: usize, rounds: usize, time: Duration) -> anyhow::Result<Vec<f64>> {
    let (sender, routes) = routes::channel();
    sender.publish(&table(size))?;
    let router = Router::new(routes, RouterSettings::default());
    let names: Vec<String> = (0..size.models).map(model).collect();
    let round = || -> anyhow::Result<f64> {
        let start = Barrier::new(threads);
        let work = |thread: usize| -> anyhow::Result<f64> {
            start.wait();
            let (begun, mut done) = (Instant::now(), 0_u64);
            // A stride that meets every model, and no two threads at the same.
            let mut number = thread * size.models / threads;
            loop {
                for _ in 0..AT_ONCE {
                    number = (number + 7_919) % size.models;
                    let chosen = router.choose(&names[number], &Version::Highest)?;
                    black_box(chosen.context("a model without a replica")?);
                }
                done += AT_ONCE;
                let took = begun.elapsed();
                if took >= time {
                    return Ok(took.as_nanos() as f64 / done as f64);
                }
            }
        };
        thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|thread| scope.spawn(move || work(thread))).collect();
            let mut slowest: f64 = 0.0;
            for thread in running {
                slowest = slowest.max(thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??);
            }
            Ok(slowest)
        })
    };
    (0..rounds).map(|_| round()).collect()
}

/// Measures the decision alone, on one thread and on two at once, and with every model on every worker.
///
/// # Errors
/// As [`decisions`].
pub fn measure(rounds: usize, time: Duration) -> anyhow::Result<Part> {
    let mut part = Part::default();
    let everywhere = Size { models: 100, replicas: Size::LARGE.workers, ..Size::LARGE };
    let cases = [("one_thread_ns", Size::LARGE, 1), ("two_threads_ns", Size::LARGE, 2), ("everywhere_ns", everywhere, 1)];
    let figures: BTreeMap<_, _> = cases
        .into_iter()
        .map(|(name, size, threads)| Ok((name, decisions(size, threads, rounds, time)?)))
        .collect::<anyhow::Result<_>>()?;
    for (name, values) in figures {
        values.into_iter().for_each(|value| part.add(name, value));
    }
    part.fact("workers", Size::LARGE.workers);
    part.fact("models", Size::LARGE.models);
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_decision_in_a_large_cluster_takes_little() {
        // The quietest of many short rounds: what else the machine does isn't ours. The promise is a microsecond; something that
        // looks at every model or at every worker takes a hundred.
        for (size, threads) in [(Size::LARGE, 1), (Size::LARGE, 2), (Size { models: 10, replicas: 1_000, ..Size::LARGE }, 1)] {
            let rounds = decisions(size, threads, 20, Duration::from_millis(5)).unwrap();
            let least = rounds.into_iter().fold(f64::INFINITY, f64::min);
            assert!(least < 10_000.0, "{size:?} on {threads} threads: {least} ns");
        }
    }
}
