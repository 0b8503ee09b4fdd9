//! `make bench-quorum`: how fast three coordinators agree, beside three members of etcd on the same disk, and how long each
//! group is without a leader after its leader was killed.
//!
//! | room | its job |
//! | --- | --- |
//! | `group` | three members, whichever system: who leads, who has caught up |
//! | `cresset`, `etcd` | the two systems: how they are started, and what a write is |
//! | `load` | writers in a closed loop |
//! | `outage` | the leader is killed: the time until the next write succeeds |
//! | `report` | the table and the JSON |
//!
//! Both run with the settings that they are shipped with, on loopback, with their logs in folders beside each other, and sync
//! each write. Writers are connected to the leader. What is written has the same size.

mod cresset;
mod etcd;
mod group;
mod load;
mod outage;
pub mod report;

use std::{fs, path::Path, time::Duration};

use anyhow::Context;

use self::{
    group::{Client, Group},
    report::Report,
};
use super::{figures::Part, results::Machine};
use crate::harness::failed;

/// Bytes that each command changes.
pub const COMMAND_BYTES: usize = 256;
/// Writers at once; each level is measured for itself.
pub const WRITERS: [usize; 3] = [1, 16, 64];

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// How often each level is measured on each system, in turns.
    pub rounds: usize,
    /// How long each time.
    pub time: Duration,
    /// How often the leader of each group is killed.
    pub kills: usize,
}

impl Pace {
    /// Some minutes.
    pub const USUAL: Self = Self { rounds: 5, time: Duration::from_secs(3), kills: 50 };
    /// To see that it works.
    pub const QUICK: Self = Self { rounds: 1, time: Duration::from_millis(300), kills: 2 };
}

/// Measures both systems; Cresset alone where etcd isn't installed. `out` is a folder on the disk that is written to.
///
/// # Errors
/// When a group can't be started, or stays without a leader.
pub async fn measure(pace: Pace, out: &Path, say: impl Fn(&str)) -> anyhow::Result<Report> {
    let folder = out.join("quorum-data");
    // What an earlier run left that was killed.
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).map_err(failed(format!("can't make {}", folder.display())))?;
    let measured = measure_in(&folder, pace, say).await;
    fs::remove_dir_all(&folder).with_context(|| format!("can't remove {}", folder.display()))?;
    measured
}

async fn measure_in(folder: &Path, pace: Pace, say: impl Fn(&str)) -> anyhow::Result<Report> {
    let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
    let mut report = Report::new(Machine::ask(cores), pace);
    say("starting three coordinators");
    let mut ours = cresset::start(&folder.join("cresset")).await?;
    let mut theirs = None;
    match etcd::version() {
        Some(version) => {
            say("starting three members of etcd");
            theirs = Some((etcd::start(&folder.join("etcd")).await?, Part::default()));
            report.etcd_version = Some(version);
        }
        None => say("etcd isn't installed (Debian: etcd-server), so there is nothing beside Cresset's figures"),
    }
    for round in 1..=pace.rounds {
        for writers in WRITERS {
            say(&format!("round {round}: {writers} writers"));
            rate(&ours, &mut report.cresset, writers, pace.time).await?;
            if let Some((theirs, part)) = &mut theirs {
                rate(theirs, part, writers, pace.time).await?;
            }
        }
    }
    for kill in 1..=pace.kills {
        say(&format!("killing leaders: {kill} of {}", pace.kills));
        outage(&mut ours, &mut report.cresset).await?;
        if let Some((theirs, part)) = &mut theirs {
            outage(theirs, part).await?;
        }
    }
    report.etcd = theirs.map(|(_, part)| part);
    Ok(report)
}

async fn rate<C: Client>(group: &Group<C>, part: &mut Part, writers: usize, time: Duration) -> anyhow::Result<()> {
    let level = load::measure(group, writers, time).await?;
    part.add(&format!("commands_per_second_at_{writers}"), level.commands_per_second);
    part.add(&format!("p50_us_at_{writers}"), level.p50_us);
    part.add(&format!("p99_us_at_{writers}"), level.p99_us);
    part.add(&format!("cpu_us_at_{writers}"), level.cpu_us);
    Ok(())
}

async fn outage<C: Client>(group: &mut Group<C>, part: &mut Part) -> anyhow::Result<()> {
    let outage = outage::measure(group).await?;
    part.add("outage_ms", outage.as_secs_f64() * 1e3);
    Ok(())
}
