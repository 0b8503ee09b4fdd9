//! `make bench-scale`: what a large fleet costs the coordinators, and how fast they act for it.
//!
//! | room | its job |
//! | --- | --- |
//! | `state` | the state of such a cluster, and what it costs to plan it, to write it down and to read it back |
//! | `fleet` | workers that join, send heartbeats and take intents, all in this process, and run nothing |
//! | `group` | three coordinators that begin from that state |
//! | `report` | the table, the JSON and the plot |
//!
//! The coordinators are those that are shipped. They begin from a backup of the state, as after a restore, so that a cluster of ten
//! thousand models is there at once; the workers find what they should run in it and say that they run it.

mod fleet;
mod group;
pub mod report;
mod state;

use std::{fs, path::Path, time::Duration};

use anyhow::Context;

use self::{group::Group, report::Report, state::Size};
use super::{figures::Part, results::Machine};
use crate::harness::failed;

/// Models of each worker.
const MODELS_PER_WORKER: usize = 10;

/// How much is measured.
#[derive(Debug, Clone)]
pub struct Pace {
    /// Sizes of the fleet.
    pub workers: Vec<usize>,
    /// How long the coordinators' CPU time in calm is watched.
    pub calm: Duration,
    /// Workers that die, one after the other.
    pub deaths: usize,
    /// How often what needs no processes is measured.
    pub rounds: usize,
}

impl Pace {
    /// Some minutes.
    pub fn usual() -> Self {
        Self { workers: vec![10, 100, 300, 1_000], calm: Duration::from_secs(20), deaths: 5, rounds: 5 }
    }

    /// To see that it works.
    pub fn quick() -> Self {
        Self { workers: vec![3, 6], calm: Duration::from_millis(500), deaths: 2, rounds: 1 }
    }
}

/// Measures each size, up to the first that the coordinators can't do. `out` is a folder on the disk that they write to.
///
/// Returns what was measured, and why that isn't all.
///
/// # Errors
/// When this machine doesn't allow so many connections.
pub async fn measure(pace: &Pace, out: &Path, say: impl Fn(&str)) -> anyhow::Result<(Report, anyhow::Result<()>)> {
    fleet::allow_connections(pace.workers.iter().copied().max().unwrap_or(0))?;
    let cores = std::thread::available_parallelism().map_or(1, |cores| u16::try_from(cores.get()).unwrap_or(u16::MAX));
    let mut report = Report::new(Machine::ask(cores));
    let folder = out.join("scale-data");
    for &workers in &pace.workers {
        let mut part = Part::default();
        let measured = apart(workers, pace, &folder, &mut part, &say).await;
        report.sizes.push((workers, part));
        if measured.is_err() {
            return Ok((report, measured.with_context(|| format!("with {workers} workers"))));
        }
    }
    Ok((report, Ok(())))
}

/// Measures one size, in an empty folder.
async fn apart(workers: usize, pace: &Pace, folder: &Path, part: &mut Part, say: &impl Fn(&str)) -> anyhow::Result<()> {
    // What an earlier run left that was killed.
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).map_err(failed(format!("can't make {}", folder.display())))?;
    one(workers, pace, folder, part, say).await?;
    fs::remove_dir_all(folder).with_context(|| format!("can't remove {}", folder.display()))
}

async fn one(workers: usize, pace: &Pace, folder: &Path, part: &mut Part, say: &impl Fn(&str)) -> anyhow::Result<()> {
    let models = workers * MODELS_PER_WORKER;
    let doors = fleet::doors(workers)?;
    let size = Size { workers: doors.iter().map(|door| door.address.clone()).collect(), models };
    say(&format!("{workers} workers, {models} models: planning from nothing, and the snapshot"));
    let state = state::measure(&size, pace.rounds, part)?;
    say(&format!("{workers} workers: starting three coordinators with that state, and the fleet"));
    let mut group = Group::start(folder, state, doors).await?;
    part.add("whole_ms", group.whole().await?.as_secs_f64() * 1e3);
    say(&format!("{workers} workers: watching the coordinators in calm"));
    group.calm(pace.calm, part).await?;
    // So few that there is room for what they had.
    for death in 1..=(workers / 4).clamp(1, pace.deaths) {
        say(&format!("{workers} workers: death {death}"));
        group.death(part).await?;
    }
    Ok(())
}
