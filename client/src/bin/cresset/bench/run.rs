//! One level of load from its threads' start to their sum.

use std::{
    cell::RefCell,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::Context;
use tokio::{
    sync::{mpsc, oneshot},
    task::{JoinHandle, LocalSet},
    time::sleep_until,
};
use tokio_util::task::TaskTracker;

use super::{
    Load,
    args::Args,
    caller::{Caller, Numbers, Script, Way},
    drive::{self, Clock},
    http2::Connection,
    lane::Lane,
    process::{self, Usage},
    report::Costs,
    schedule::Schedule,
    tally::{Tally, Window},
};

/// From everybody being ready to the common start.
const RUN_UP: Duration = Duration::from_millis(5);
/// How long streams may take to end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// One level of load.
pub struct Run<'a> {
    args: &'a Args,
    load: Load,
    endpoints: &'a [String],
    script: &'a Script,
    window: Window,
}

/// What one thread does.
#[derive(Clone)]
struct Share {
    load: Load,
    script: Script,
    window: Window,
    /// Which of how many threads this is.
    part: u32,
    parts: u32,
    seed: u64,
    /// Requests to measure.
    requests: u64,
    /// Addresses of this thread's connections.
    addresses: Vec<String>,
    /// Streams at a time; 0 for unary calls.
    streams: u32,
    requests_per_stream: Option<u64>,
}

/// The part of `whole` that falls to one of `parts`.
fn part_of(whole: u64, part: u32, parts: u32) -> u64 {
    let (part, parts) = (u64::from(part), u64::from(parts));
    whole / parts + u64::from(part < whole % parts)
}

impl<'a> Run<'a> {
    /// Prepares a level; nothing is connected yet.
    pub fn new(args: &'a Args, load: Load, endpoints: &'a [String], script: &'a Script) -> Self {
        let ns = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let from_ns = ns(args.warmup);
        let until_ns = if args.requests.is_some() { u64::MAX } else { from_ns + ns(args.duration) };
        Self { args, load, endpoints, script, window: Window { from_ns, until_ns } }
    }

    fn shares(&self) -> Vec<Share> {
        let args = self.args;
        // A thread without a connection, or without a request to send, would only wait.
        let most = match self.load {
            Load::Closed { concurrency } => concurrency.min(args.connections),
            Load::Open { inflight_max, .. } => inflight_max.min(args.connections),
        };
        let parts = args.threads.min(most).max(1);
        let share = |part: u32| Share {
            load: self.load,
            script: self.script.clone(),
            window: self.window,
            part,
            parts,
            seed: args.seed,
            requests: args.requests.map_or(u64::MAX, |requests| part_of(requests, part, parts)),
            addresses: (part..args.connections)
                .step_by(parts as usize)
                .map(|number| self.endpoints[number as usize % self.endpoints.len()].clone())
                .collect(),
            streams: match (args.stream, args.streams) {
                (false, _) => 0,
                (true, streams) => (part_of(u64::from(streams.unwrap_or(args.connections)), part, parts) as u32).max(1),
            },
            requests_per_stream: args.requests_per_stream,
        };
        (0..parts).map(share).collect()
    }

    /// Runs the level.
    ///
    /// # Errors
    /// When a server can't be reached, or a watched process is gone.
    pub async fn go(&self) -> anyhow::Result<(Tally, Costs)> {
        self.usages()?;
        let (ready, mut all_ready) = mpsc::channel(1);
        let mut starts = Vec::new();
        let mut threads: Vec<JoinHandle<anyhow::Result<Tally>>> = Vec::new();
        for share in self.shares() {
            let (start, begin) = oneshot::channel();
            let ready = ready.clone();
            starts.push(start);
            // A thread of its own with a runtime of its own: nothing is shared, and nobody is woken across threads.
            threads.push(tokio::task::spawn_blocking(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
                LocalSet::new().block_on(&runtime, share.work(ready, begin))
            }));
        }
        drop(ready);
        for _ in 0..starts.len() {
            // None: a thread failed, and says below why.
            if all_ready.recv().await.is_none() {
                break;
            }
        }
        let start = Instant::now() + RUN_UP;
        for sender in starts {
            // One that failed meanwhile is told nothing.
            let _ = sender.send(start);
        }
        sleep_until((start + self.args.warmup).into()).await;
        let before = self.usages();
        let mut whole: Option<Tally> = None;
        let mut failed = None;
        for thread in threads {
            match thread.await? {
                Ok(tally) => match &mut whole {
                    Some(whole) => whole.merge(&tally),
                    None => whole = Some(tally),
                },
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        let costs = costs(&before?, &self.usages()?);
        Ok((whole.context("there is no thread to send from")?, costs))
    }

    /// This process, then the watched ones.
    fn usages(&self) -> anyhow::Result<Vec<(u32, Usage)>> {
        let pids = std::iter::once(std::process::id()).chain(self.args.processes.iter().copied());
        pids.map(|pid| Ok((pid, process::usage(pid)?))).collect()
    }
}

fn costs(before: &[(u32, Usage)], after: &[(u32, Usage)]) -> Costs {
    let mut used = before
        .iter()
        .zip(after)
        .map(|((_, before), (pid, after))| (*pid, (after.cpu_seconds - before.cpu_seconds).max(0.0), after.rss_bytes));
    let generator_seconds = used.next().map_or(0.0, |(_, seconds, _)| seconds);
    Costs { processes: used.collect(), generator_seconds }
}

impl Share {
    async fn work(self, ready: mpsc::Sender<()>, begin: oneshot::Receiver<Instant>) -> anyhow::Result<Tally> {
        let mut connections = Vec::with_capacity(self.addresses.len());
        for address in &self.addresses {
            let connection = Connection::open(address).await.map_err(|error| {
                // The system's number for it helps nobody.
                anyhow::anyhow!("no connection to {address}: {}", crate::settings::plain(&error))
            })?;
            connections.push(Rc::new(connection));
        }
        let tasks = TaskTracker::new();
        let lanes: Vec<_> = (0..self.streams as usize)
            .map(|number| {
                let connection = Rc::clone(&connections[number % connections.len()]);
                let keeps = self.script.first.is_some();
                Rc::new(RefCell::new(Lane::new(connection, self.requests_per_stream, self.callers_max(), keeps, tasks.clone())))
            })
            .collect();
        let script = Rc::new(self.script.clone());
        let numbers = Rc::new(Numbers::after(first_sequence_id(self.part)));
        let hire = |number: usize| {
            let way = match lanes.len() {
                0 => Way::Unary(Rc::clone(&connections[number % connections.len()])),
                lane_count => Way::Stream(Rc::clone(&lanes[number % lane_count])),
            };
            Caller::new(Rc::clone(&script), Rc::clone(&numbers), way)
        };
        ready.send(()).await.context("the run was given up")?;
        drop(ready);
        let start = begin.await.context("the run was given up")?;
        sleep_until(start.into()).await;
        let clock = Clock(start);
        let mut tally = match self.load {
            Load::Closed { concurrency } => {
                let callers = (0..part_of(u64::from(concurrency), self.part, self.parts) as usize).map(hire).collect();
                drive::closed(clock, callers, self.window, self.requests).await
            }
            Load::Open { rate, arrivals, inflight_max } => {
                let schedule = Schedule::new(arrivals, rate, self.part, self.parts, self.seed);
                let inflight_max = part_of(u64::from(inflight_max), self.part, self.parts) as usize;
                let driven = drive::open(clock, schedule, hire, inflight_max, self.window, self.requests).await;
                driven.context("no timer")?
            }
        };
        tally.streams = lanes.iter().map(|lane| lane.borrow().opened()).sum();
        drop(lanes);
        tasks.close();
        // A server that doesn't end its streams is left behind.
        let _ = tokio::time::timeout(CLOSE_TIMEOUT, tasks.wait()).await;
        Ok(tally)
    }

    /// Callers that this thread may have.
    fn callers_max(&self) -> usize {
        let all = match self.load {
            Load::Closed { concurrency } => concurrency,
            Load::Open { inflight_max, .. } => inflight_max,
        };
        part_of(u64::from(all), self.part, self.parts) as usize
    }
}

/// Sequence ids that no other thread has, and hardly another run.
fn first_sequence_id(part: u32) -> i64 {
    let run = i64::from(rand::random::<u32>() >> 2);
    let thread = i64::from(part) << 24;
    (run << 32) + thread
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_add_up_to_the_whole() {
        for whole in [1u64, 7, 64, 1_000_003] {
            for parts in [1u32, 2, 3, 8] {
                assert_eq!((0..parts).map(|part| part_of(whole, part, parts)).sum::<u64>(), whole);
            }
        }
    }

    #[test]
    fn a_level_costs_what_was_used_meanwhile() {
        let usage = |cpu_seconds, rss_bytes| Usage { cpu_seconds, rss_bytes };
        let before = [(1, usage(2.0, 5)), (2, usage(10.0, 6))];
        let after = [(1, usage(2.5, 7)), (2, usage(13.0, 8))];
        let costs = costs(&before, &after);
        assert_eq!((costs.generator_seconds, costs.processes), (0.5, vec![(2, 3.0, 8)]));
    }
}
