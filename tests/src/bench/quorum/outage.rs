//! The leader is killed: how long it takes until a write succeeds again, through the members that are left.

use std::time::Duration;

use anyhow::bail;
use rustix::process::Signal;
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval},
};

use super::group::{Client, Group};

/// A write is begun so often, through one survivor after the other, whatever became of those before: how long a system keeps
/// one that it can't answer is not what is measured.
const PROBE_EVERY: Duration = Duration::from_millis(10);
/// Without a leader for longer, something is broken.
const OUTAGE_MAX: Duration = Duration::from_secs(20);
/// When this process was late by more, it stood still, and the measurement with it.
const STOOD_STILL: Duration = Duration::from_millis(200);
/// How often a kill is repeated for that.
const ATTEMPTS_MAX: usize = 10;
/// How long a killed process may take to be gone.
const GONE_TIMEOUT: Duration = Duration::from_secs(5);

/// Kills the leader once, measures, starts it again and waits until it has caught up.
pub(super) async fn measure<C: Client>(group: &mut Group<C>) -> anyhow::Result<Duration> {
    for _ in 0..ATTEMPTS_MAX {
        let leader = group.whole().await?;
        let seen = attempt(group, &leader).await?;
        group.restart(&leader)?;
        group.whole().await?;
        if let Some(outage) = seen {
            return Ok(outage);
        }
    }
    bail!("this machine is too busy to measure: this process stood still in each of {ATTEMPTS_MAX} attempts");
}

/// `None` if this process stood still meanwhile.
async fn attempt<C: Client>(group: &Group<C>, leader: &str) -> anyhow::Result<Option<Duration>> {
    let survivors = group.survivors(leader);
    let process = group.cluster().process(leader)?;
    let mut writing = JoinSet::new();
    let mut probes = interval(PROBE_EVERY);
    probes.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let killed = Instant::now();
    process.signal(Signal::KILL)?;
    let (mut number, mut last_tick, mut stood_still) = (0, killed, false);
    let mut last_error = None;
    let outage = loop {
        if killed.elapsed() > OUTAGE_MAX {
            bail!("{}: no write succeeded for {OUTAGE_MAX:?}; the last said {last_error:?}", C::NAME);
        }
        tokio::select! {
            Some(written) = writing.join_next(), if !writing.is_empty() => match written? {
                Ok(done) => break done - killed,
                Err(status) => last_error = Some(status),
            },
            _ = probes.tick() => {
                stood_still |= last_tick.elapsed() > STOOD_STILL;
                last_tick = Instant::now();
                number += 1;
                let survivor = survivors[number % survivors.len()].clone();
                writing.spawn(async move { survivor.write(number, number as u64).await.map(|()| Instant::now()) });
            }
        }
    };
    stood_still |= last_tick.elapsed() > STOOD_STILL;
    process.wait(GONE_TIMEOUT)?;
    Ok((!stood_still).then_some(outage))
}
