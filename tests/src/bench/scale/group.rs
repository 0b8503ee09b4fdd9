//! Three coordinators that begin from a large state, with a fleet.

use std::{
    fs::{self, File},
    io::BufWriter,
    path::Path,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, bail};
use cresset_client::backup::Backup;
use cresset_coordinator::recovery;
use cresset_core::ClusterState;
use tokio::time::{sleep, timeout};

use super::fleet::{Door, Fleet, Told};
use crate::{
    bench::{figures::Part, usage::cpu_seconds},
    harness::{
        Cluster, ModelRepository, failed,
        launch::{Place, Recipe},
    },
};

/// Between two deaths.
const REST: Duration = Duration::from_secs(1);
/// How long the fleet may take to be told something.
const TOLD_TIMEOUT: Duration = Duration::from_secs(120);
/// Routers that watch the routes, one for so many workers, and at least one for each coordinator.
const WORKERS_PER_ROUTER: usize = 100;
const ROUTERS_MIN: usize = 3;
const DAY_SECONDS: f64 = 86_400.0;
const MS: f64 = 1e3;

/// Coordinators and the fleet.
pub(super) struct Group {
    cluster: Cluster,
    fleet: Fleet,
    models: usize,
    began: Instant,
    _repository: ModelRepository,
}

impl Group {
    /// Starts all of them.
    pub(super) async fn start(folder: &Path, state: ClusterState, doors: Vec<Door>) -> anyhow::Result<Self> {
        let file = folder.join("state.cresset-backup");
        let out = File::create(&file).map_err(failed(format!("can't make {}", file.display())))?;
        recovery::write(&state, folder, BufWriter::new(out))?;
        let backup = Backup::open(&file)?;
        let ids = ["c1", "c2", "c3"].map(str::to_owned);
        for id in &ids {
            backup.prepare(&folder.join(id).join("log"))?;
        }
        let repository = ModelRepository::new()?;
        let recipe =
            Recipe { cluster_id: "scale", data_dir: folder, repository: repository.path(), coordinator: &[], worker: &[] };
        let places = Place::free(ids.len())?;
        let began = Instant::now();
        let cluster = Cluster::launch(folder, recipe.launches(&ids, &places))?;
        let routers = (doors.len() / WORKERS_PER_ROUTER).max(ROUTERS_MIN);
        let peers: Vec<String> = places.iter().map(|place| place.peer.clone()).collect();
        let fleet = Fleet::start(doors, &peers, routers, &cluster.endpoints());
        Ok(Self { cluster, fleet, models: state.models.len(), began, _repository: repository })
    }

    /// Waits until every worker is registered and told what it should run. Returns how long that took since the start.
    pub(super) async fn whole(&self) -> anyhow::Result<Duration> {
        let workers = self.fleet.living();
        self.until(|told| told.registered == workers && told.models == self.models).await?;
        Ok(self.began.elapsed())
    }

    async fn until(&self, is_so: impl Fn(&Told) -> bool) -> anyhow::Result<Told> {
        let mut told = self.fleet.told();
        let reached = timeout(TOLD_TIMEOUT, told.wait_for(|told| is_so(told))).await;
        match reached {
            Ok(told) => Ok(*told?),
            Err(_) => {
                let told = *self.fleet.told().borrow();
                bail!(
                    "{} of {} workers are registered, {} of {} models assigned after {TOLD_TIMEOUT:?}\n{}",
                    told.registered,
                    self.fleet.living(),
                    told.models,
                    self.models,
                    self.cluster.tails()
                )
            }
        }
    }

    /// The coordinators' CPU time while nothing happens but heartbeats.
    pub(super) async fn calm(&self, time: Duration, part: &mut Part) -> anyhow::Result<()> {
        let leader = self.cluster.leader().await?;
        let cpu = |id: &str| cpu_seconds(self.cluster.process(id)?.pid());
        let ids = self.cluster.ids();
        let before = ids.iter().map(|id| cpu(id)).collect::<Result<Vec<_>, _>>()?;
        let began = Instant::now();
        sleep(time).await;
        let seconds = began.elapsed().as_secs_f64();
        for (id, before) in ids.iter().zip(before) {
            let name = if *id == leader { "leader_cores" } else { "follower_cores" };
            part.add(name, (cpu(id)? - before) / seconds);
        }
        if self.cluster.leader().await? != leader {
            bail!("leadership changed while nothing happened\n{}", self.cluster.tails());
        }
        Ok(())
    }

    /// Kills a worker, and measures until what it had is assigned to others.
    pub(super) async fn death(&mut self, part: &mut Part) -> anyhow::Result<()> {
        // What followed the last death, reports and plans, is no part of what this one costs.
        sleep(REST).await;
        let died = SystemTime::now();
        let deaths = self.fleet.told().borrow().deaths + 1;
        let dead = self.fleet.kill_one().context("no worker is left")?;
        let told = self.until(|told| told.deaths == deaths && told.models == self.models).await?;
        let since = |at: SystemTime| told.at.duration_since(at).unwrap_or_default().as_secs_f64() * MS;
        part.add("death_to_assigned_ms", since(died));
        let verdict = self.verdict(&dead)?;
        part.add("verdict_to_assigned_ms", (seconds_of_day(told.at) - verdict).rem_euclid(DAY_SECONDS) * MS);
        Ok(())
    }

    /// When the leader said that a worker is dead, in seconds of the day.
    fn verdict(&self, dead: &str) -> anyhow::Result<f64> {
        let logs = self.cluster.data_dir().join("logs");
        for id in self.cluster.ids() {
            let path = logs.join(format!("{id}.log"));
            let log = fs::read_to_string(&path).map_err(failed(format!("can't read {}", path.display())))?;
            let said = |line: &&str| line.contains("judged a worker dead") && line.contains(dead);
            if let Some(line) = log.lines().rfind(said) {
                return logged_at(line).with_context(|| format!("no time in '{line}'"));
            }
        }
        bail!("no coordinator says that {dead} is dead")
    }
}

fn seconds_of_day(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64().rem_euclid(DAY_SECONDS)
}

/// The seconds of the day in a log line's time, as in `2026-01-31T10:20:30.123456Z`.
fn logged_at(line: &str) -> Option<f64> {
    let (_, time) = line.split_once('T')?;
    let (time, _) = time.split_once('Z')?;
    let parts: Vec<f64> = time.split(':').map(str::parse).collect::<Result<_, _>>().ok()?;
    let [hours, minutes, seconds] = parts.try_into().ok()?;
    Some((hours * 60.0 + minutes) * 60.0 + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_of_a_log_line_is_read() {
        let at = logged_at("2026-01-31T01:02:03.250000Z  WARN cresset: judged a worker dead worker=w1").unwrap();
        assert!((at - 3_723.25).abs() < 1e-9, "{at}");
        assert_eq!(logged_at("no time here"), None);
    }
}
