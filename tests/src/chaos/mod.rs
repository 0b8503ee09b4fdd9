//! A cluster of real processes, hurt in every way that one machine allows, under load that is checked to the last response.
//!
//! [`faults`] deals a schedule out of a seed; `world` runs the cluster, in network namespaces where that is allowed, and does
//! the faults; `lanes` and `triton` are the load; [`checker`] holds what came back against a run without faults; [`pauses`]
//! measures how long each fault held somebody up; [`report`] says it.
//!
//! What a seed decides is the schedule: which faults, on whom, how long. What the processes make of it is real, so no two runs
//! are the same to the last message. A fault comes only when the cluster is whole again after the one before: two at once are
//! more than is promised, but for those that are meant to be.
pub mod checker;
pub mod faults;
mod lanes;
mod launch;
pub mod models;
pub mod network;
pub mod pauses;
pub mod record;
pub mod report;
mod triton;
mod world;

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, ensure};
use bytes::Bytes;
use cresset_client::{ConnectionSettings, Coordinators};
use tokio::{task::JoinSet, time::sleep};

use self::{
    checker::{Counts, Reference},
    faults::{CALM_MS, Fault, Needs, Step},
    lanes::{Caller, Stage, Target},
    models::{Kind, SCRIPTS},
    record::{Happened, Way},
    report::Report,
    triton::Triton,
    world::World,
};
use crate::speech::Speech;

/// Faults whose promise isn't kept yet, with the reason. They are left out of the everyday run, and of no other.
pub const NOT_YET: [(Fault, &str); 0] = [];

/// How often is looked whether this process runs at all.
const BEAT: Duration = Duration::from_millis(50);
/// The calm at the end, in which everybody gets the last answers.
const LAST_CALM: Duration = Duration::from_secs(2);

/// What to run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Decides the faults.
    pub seed: u64,
    /// About how long.
    pub seconds: u64,
    /// The faults that may come.
    pub allowed: Vec<Fault>,
    /// Faults that were left out before, with the reason.
    pub left_out: Vec<(Fault, String)>,
    /// Streams at once, all ways and kinds together.
    pub streams: usize,
    /// Single calls a second, all ways together.
    pub rate: u32,
    /// Whether this process is [`network::apart`].
    pub is_apart: bool,
}

/// Runs it.
///
/// # Errors
/// What couldn't even be tried; what was found is in the report.
pub async fn run(settings: Settings) -> anyhow::Result<Report> {
    let speech = Speech::load()?;
    let mut world = World::start(settings.is_apart).await?;
    let mut left_out = settings.left_out.clone();
    let mut allowed = settings.allowed.clone();
    allowed.retain(|fault| {
        let can = world.can(*fault);
        if !can {
            let why = if fault.needs() == Needs::Mount { "no file system can be mounted here" } else { "needs namespaces" };
            left_out.push((*fault, why.to_owned()));
        }
        can
    });
    let schedule = faults::schedule(settings.seed, settings.seconds, &allowed);
    eprintln!("seed {}: {} faults in about {} s", settings.seed, schedule.len(), settings.seconds);
    let client = Arc::new(world.cluster().client().await?);
    let reference = reference(&client, &speech).await?;
    let addresses = world.cluster().endpoints();
    let stage = Stage::default();
    let mut running = JoinSet::new();
    let mut by_triton = Vec::new();
    for (way, caller) in callers(&settings, &client, &addresses, &speech) {
        if way.is_python() {
            by_triton.push((way, caller));
        } else {
            running.spawn(caller.call(stage.clone()));
        }
    }
    let still = tokio::spawn(longest_standstill(stage.clone()));
    let triton = Triton::begin(&by_triton, &addresses, &stage).await?;
    let (happened, cut_short) = storm(&mut world, &schedule, &stage).await;
    let end_us = stage.now_us();
    stage.end();
    let stood_still = still.await.context("the watch broke down")?;
    let mut lanes = triton.end().await?;
    while let Some(done) = running.join_next().await {
        lanes.push(done.context("a lane broke down")?);
    }
    let members = &world.cluster().file().coordinators;
    let coordinator: BTreeMap<_, _> = members.iter().map(|member| (member.grpc.clone(), member.id.clone())).collect();
    let mut counts: BTreeMap<(Kind, Way), Counts> = BTreeMap::new();
    for lane in &lanes {
        let counted = checker::check(lane, &reference, &happened, &coordinator);
        let sum = counts.entry((lane.kind, lane.way)).or_default();
        *sum = std::mem::take(sum).and(&counted);
    }
    let report = Report {
        seed: settings.seed,
        seconds: settings.seconds,
        is_apart: settings.is_apart,
        left_out,
        planned: schedule.len(),
        load_planned: report::planned_load(&lanes, &happened, end_us),
        pauses: report::pauses(&lanes, &happened, &coordinator),
        happened,
        counts,
        stood_still,
        cut_short: cut_short.map(|error| format!("{error:#}")),
    };
    Ok(report)
}

/// Does one fault after the other. Ends early when the cluster doesn't become whole again.
async fn storm(world: &mut World, schedule: &[Step], stage: &Stage) -> (Vec<Happened>, Option<anyhow::Error>) {
    sleep(Duration::from_millis(CALM_MS).saturating_sub(Duration::from_micros(stage.now_us()))).await;
    let mut happened = Vec::new();
    for (number, step) in schedule.iter().enumerate() {
        sleep(Duration::from_millis(step.after_ms)).await;
        let ended = strike(world, step, stage, &mut happened).await;
        if let Err(error) = ended {
            return (happened, Some(error.context(format!("fault {}, {}", number + 1, step.fault.name()))));
        }
        if let Some(fault) = happened.last() {
            eprintln!("{:4}/{} {fault}", number + 1, schedule.len());
        }
    }
    sleep(LAST_CALM).await;
    (happened, None)
}

async fn strike(world: &mut World, step: &Step, stage: &Stage, happened: &mut Vec<Happened>) -> anyhow::Result<()> {
    let targets = world.targets(step).await?;
    let before = world.incarnations().await?;
    let begun_us = stage.now_us();
    world.hurt(step.fault, &targets).await?;
    // It counts from now on, whatever becomes of it.
    let unhealed = Happened { fault: step.fault, targets, begun_us, undone_us: u64::MAX, whole_us: u64::MAX };
    happened.push(unhealed);
    let Some(fault) = happened.last_mut() else { return Ok(()) };
    sleep(Duration::from_millis(step.lasts_ms)).await;
    world.undo(step.fault, &fault.targets)?;
    fault.undone_us = stage.now_us();
    world.whole(step.fault, &fault.targets, &before).await?;
    fault.whole_us = stage.now_us();
    Ok(())
}

/// The longest time in which this process itself didn't run, as on a machine that was stopped or does too much else.
async fn longest_standstill(stage: Stage) -> Duration {
    let mut longest = Duration::ZERO;
    while !stage.is_over() {
        let begun = Instant::now();
        sleep(BEAT).await;
        longest = longest.max(begun.elapsed().saturating_sub(BEAT));
    }
    longest
}

/// All lanes: every kind in every way at least once, further streams in turns.
fn callers(
    settings: &Settings,
    client: &Arc<cresset_client::CressetClient>,
    addresses: &[String],
    speech: &Speech,
) -> Vec<(Way, Caller)> {
    let caller = |kind: Kind, way: Way, number: usize, interval: Duration| {
        let target = match way {
            Way::Client => Target::Client(Arc::clone(client)),
            Way::Resumed => {
                let at = number % addresses.len().max(1);
                let turned = addresses[at..].iter().chain(&addresses[..at]);
                Target::Coordinators(Coordinators::new(turned, ConnectionSettings::default()))
            }
            Way::Plain | Way::Triton | Way::ResumedTriton => Target::List(addresses.to_vec()),
        };
        let script = number % SCRIPTS;
        (way, Caller { kind, target, script, inputs: kind.script(script, speech), interval, first_address: number })
    };
    let single = Duration::from_secs(1) * u32::try_from(Way::CALLS.len()).unwrap_or(1) / settings.rate.max(1);
    let mut callers: Vec<_> = Way::CALLS.into_iter().enumerate().map(|(n, way)| caller(Kind::Unary, way, n, single)).collect();
    let streams = Kind::ALL.into_iter().filter(|kind| *kind != Kind::Unary);
    let turns: Vec<_> = streams.flat_map(|kind| Way::ALL.map(|way| (kind, way))).collect();
    for number in 0..settings.streams.max(turns.len()) {
        let (kind, way) = turns[number % turns.len()];
        callers.push(caller(kind, way, number, interval(kind)));
    }
    callers
}

/// How often a stream is asked.
fn interval(kind: Kind) -> Duration {
    match kind {
        // Speech as it is spoken.
        Kind::Speech => Duration::from_millis(32),
        Kind::Decoupled => Duration::from_millis(400),
        Kind::Unary | Kind::Independent | Kind::Implicit => Duration::from_millis(50),
    }
}

/// What every script's answers are without faults, by the Rust client.
async fn reference(client: &Arc<cresset_client::CressetClient>, speech: &Speech) -> anyhow::Result<Reference> {
    let mut reference = Reference::new();
    let stage = Stage::default();
    for kind in Kind::ALL {
        for script in 0..SCRIPTS {
            let inputs = kind.script(script, speech);
            let interval = Duration::from_micros(1);
            let target = Target::Client(Arc::clone(client));
            let pass = Caller { kind, target, script, inputs, interval, first_address: 0 }.once(&stage).await;
            let mut outputs: Vec<Vec<Bytes>> = vec![vec![]; pass.sent.len()];
            for response in &pass.delivered {
                let at = response.ordinal.and_then(|ordinal| outputs.get_mut(ordinal));
                at.context("a stray response in the calm")?.push(response.output.clone());
            }
            let is_whole = pass.broken.is_none() && outputs.iter().all(|parts| parts.len() == kind.parts());
            ensure!(is_whole && outputs.len() == kind.requests(), "{} fails in the calm: {:?}", kind.name(), pass.broken);
            reference.insert((kind, script), outputs);
        }
    }
    Ok(reference)
}
