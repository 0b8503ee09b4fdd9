//! `make demo`: streams speech through a cluster while its processes are killed, and counts what that did to the answers.
//!
//! Every output is compared with the same model run in this process without a cluster. Exit code 0 only if nothing was
//! lost, repeated, out of order or different.
#![forbid(unsafe_code)]

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::{Parser, ValueEnum};
use comfy_table::{CellAlignment, Table, presets::NOTHING};
use cresset_proto::{
    admin::v1::{CoordinatorRole, ModelState, StatusResponse, WorkerState},
    fleet::v1::ReplicaState,
    tensor::{Datatype, Tensor},
};
use cresset_tests::{
    harness::{Cluster, Options, binaries, leader_of, model_of, state_of, worker_of},
    reference::Reference,
    speaker::{Speaker, Stage, Way},
    speech::{CHUNK_SAMPLES, RATE, Speech},
    tally::{Pass, Tally, longest_between, median},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::JoinSet,
};

const MODEL: &str = "silero_vad";
const INPUT: &str = "x";
/// How long the cluster may take to be whole again after a kill.
const RECOVERY_TIMEOUT: Duration = Duration::from_secs(60);
/// How long after a kill a pause counts as its own, in µs; sooner if the next kill comes sooner.
const KILL_WINDOW_US: u64 = 5_000_000;

/// Streams speech through a cluster while a worker and then the leading coordinator are killed.
#[derive(Parser)]
#[command(name = "cresset-demo", version)]
struct Args {
    /// How many workers and how many leaders to kill; above 1, what was killed is started again in between
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    kills: u32,
    /// How many sequences stream at once
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=256))]
    sequences: u32,
    /// How many times faster than speech
    #[arg(long, default_value_t = 4.0, value_name = "TIMES")]
    speed: f64,
    /// Which way the sequences go: the Rust client's router, the public service of a coordinator, or half of them each
    #[arg(long, value_enum, default_value_t = Through::Both)]
    through: Through,
    /// The folder of a running cluster to use; without one, or with more than one kill, the demo starts its own
    #[arg(long, default_value = ".cresset/cluster", value_name = "DIR")]
    data_dir: PathBuf,
    /// The model repository with silero_vad
    #[arg(long, value_name = "DIR")]
    model_repository: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Through {
    Direct,
    Gateway,
    Both,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cresset-demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> anyhow::Result<bool> {
    ensure!(args.speed.is_finite() && args.speed > 0.0, "--speed must be above 0");
    // Processes that are started again live as long as the thread that did it, so the kills are made from this one.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        tokio::select! {
            clean = demo(args) => clean,
            _ = terminate.recv() => bail!("stopped by SIGTERM"),
            _ = interrupt.recv() => bail!("stopped by Ctrl-C"),
        }
    })
}

async fn demo(args: &Args) -> anyhow::Result<bool> {
    let repository = args.model_repository.clone().unwrap_or_else(binaries::demo_models);
    let speech = Speech::load()?;
    let mut cluster = cluster(args, &repository).await?;
    let stage = Arc::new(Stage::default());
    let cast = Cast::hire(args, &cluster, &speech, &stage).await?;
    let kills = match kill_all(args, &mut cluster, &stage, &cast).await {
        Ok(kills) => kills,
        Err(error) => {
            eprintln!("cresset-demo: the logs end like this:\n{}", cluster.tails());
            return Err(error);
        }
    };
    if args.kills > 1 {
        stage.end();
    }
    let heard = cast.listen().await?;
    eprintln!("comparing {} outputs with {MODEL} run in this process", heard.iter().map(|h| h.answers()).sum::<usize>());
    let tallies = compare(&repository, &speech, &heard)?;
    print(&heard, &tallies, &kills);
    let together = tallies.iter().fold(Tally::default(), |all, tally| all.and(tally));
    if let Some(error) = &together.first_error {
        eprintln!("the first error: {error}");
    }
    Ok(together.is_clean())
}

/// The running cluster if there is one that can take it, else an own one.
async fn cluster(args: &Args, repository: &Path) -> anyhow::Result<Cluster> {
    if args.kills == 1 && args.data_dir.join("cluster.json").exists() {
        let lack = match Cluster::attach(&args.data_dir) {
            Ok(cluster) => match can_take_it(&cluster.status().await?) {
                Ok(()) => {
                    eprintln!(
                        "using the cluster in {}; it is left with a worker and a coordinator less",
                        args.data_dir.display()
                    );
                    return Ok(cluster);
                }
                Err(lack) => lack,
            },
            Err(error) => format!("isn't whole ({error})"),
        };
        eprintln!("the cluster in {} {lack}, so this starts its own", args.data_dir.display());
    }
    ensure!(repository.join(MODEL).is_dir(), "{} has no {MODEL}: run `make fetch`", repository.display());
    eprintln!("starting a cluster of 3 coordinators and 3 workers");
    let begun = Instant::now();
    let options = Options { model_repository: repository.to_owned(), ..Options::deploying(&[MODEL]) };
    let cluster = tokio::task::block_in_place(|| Cluster::start(&options))?;
    eprintln!("ready after {:.1} s", begun.elapsed().as_secs_f64());
    Ok(cluster)
}

/// Whether a cluster keeps answering when it loses a worker and a coordinator.
fn can_take_it(status: &StatusResponse) -> Result<(), String> {
    let unreachable = status.coordinators.iter().filter(|c| c.role() == CoordinatorRole::Unreachable).count();
    if status.coordinators.len() < 3 || unreachable > 0 || leader_of(status).is_none() {
        return Err("doesn't have all of three coordinators".to_owned());
    }
    match model_of(status, MODEL) {
        None => Err(format!("doesn't serve {MODEL}")),
        Some(model) if model.replicas_ready < 2 => Err(format!("has {} ready replica of {MODEL}", model.replicas_ready)),
        Some(_) => Ok(()),
    }
}

/// The speakers.
struct Cast {
    tasks: JoinSet<(Way, usize, Vec<Pass>)>,
    count: u64,
    /// Chunks that each of them says, unless the stage is over earlier.
    chunks: u64,
    gateway: watch::Sender<String>,
}

/// What one speaker got back.
struct Heard {
    is_direct: bool,
    start: usize,
    passes: Vec<Pass>,
}

impl Heard {
    fn answers(&self) -> usize {
        self.passes.iter().map(|pass| pass.delivered.len()).sum()
    }
}

impl Cast {
    async fn hire(args: &Args, cluster: &Cluster, speech: &Speech, stage: &Arc<Stage>) -> anyhow::Result<Self> {
        let client = Arc::new(cluster.client().await?);
        let gateway = watch::Sender::new(gateway_beside(cluster, &cluster.leader().await?)?);
        let interval = Duration::from_secs_f64(CHUNK_SAMPLES as f64 / f64::from(RATE) / args.speed);
        let mut tasks = JoinSet::new();
        for number in 0..args.sequences as usize {
            let is_direct = match args.through {
                Through::Direct => true,
                Through::Gateway => false,
                Through::Both => number % 2 == 0,
            };
            let way = if is_direct { Way::Direct(Arc::clone(&client)) } else { Way::Gateway(gateway.subscribe()) };
            let start = start_of(speech, number, args.sequences as usize);
            let speaker = Speaker {
                name: format!("s{number}"),
                model: MODEL.to_owned(),
                input: INPUT.to_owned(),
                way: way.clone(),
                chunks: speech.chunks(start, speech.len()),
                interval,
                passes: if args.kills == 1 { 1 } else { usize::MAX },
            };
            let stage = Arc::clone(stage);
            tasks.spawn(async move { (way, start, speaker.speak(stage).await) });
        }
        eprintln!(
            "{} sequences stream speech, a chunk of 32 ms each every {:.1} ms",
            args.sequences,
            interval.as_secs_f64() * 1e3
        );
        Ok(Self { tasks, count: u64::from(args.sequences), chunks: speech.len() as u64, gateway })
    }

    async fn listen(mut self) -> anyhow::Result<Vec<Heard>> {
        let mut heard = Vec::new();
        while let Some(done) = self.tasks.join_next().await {
            let (way, start, passes) = done.context("a speaker broke down")?;
            heard.push(Heard { is_direct: matches!(way, Way::Direct(_)), start, passes });
        }
        Ok(heard)
    }
}

/// Every speaker begins somewhere else in the recording.
fn start_of(speech: &Speech, number: usize, of: usize) -> usize {
    number * speech.len() / of.max(1)
}

/// The public address of a coordinator other than this one.
fn gateway_beside(cluster: &Cluster, id: &str) -> anyhow::Result<String> {
    let other = cluster.file().coordinators.iter().find(|member| member.id != id);
    Ok(other.context("there is only one coordinator")?.grpc.clone())
}

/// One process that was killed.
struct Kill {
    what: &'static str,
    at_us: u64,
}

async fn kill_all(args: &Args, cluster: &mut Cluster, stage: &Stage, cast: &Cast) -> anyhow::Result<Vec<Kill>> {
    let mut kills = Vec::new();
    // A third of the way each, or some 150 chunks of each sequence where it goes on for longer.
    let act = if args.kills == 1 { cast.count * cast.chunks / 3 } else { cast.count * 150 };
    for round in 1..=args.kills {
        ensure!(stage.more(act, RECOVERY_TIMEOUT).await, "the answers stopped coming");
        let (id, held) = a_holder(cluster).await?;
        kills.push(Kill { what: "worker", at_us: stage.now_us() });
        cluster.kill(&id)?;
        eprintln!("{round}: killed worker {id}, which held {held} of the {} sequences", cast.count);
        if args.kills > 1 {
            ensure!(stage.more(act / 2, RECOVERY_TIMEOUT).await, "the answers stopped coming after worker {id} was killed");
            let before = incarnation(&cluster.status().await?, &id);
            cluster.restart_process(&id)?;
            let whole = |status: &StatusResponse| (incarnation(status, &id) > before && is_whole(status)).then_some(());
            cluster.wait_for("the worker back and every replica ready", RECOVERY_TIMEOUT, whole).await?;
        }
        ensure!(stage.more(act, RECOVERY_TIMEOUT).await, "the answers stopped coming");
        let leader = cluster.leader().await?;
        make_way(cluster, stage, cast, &leader).await?;
        kills.push(Kill { what: "leader", at_us: stage.now_us() });
        cluster.kill(&leader)?;
        eprintln!("{round}: killed coordinator {leader}, which led");
        if args.kills > 1 {
            let other = |status: &StatusResponse| leader_of(status).filter(|now| now.id != leader).map(drop);
            cluster.wait_for("another leader", RECOVERY_TIMEOUT, other).await?;
            ensure!(stage.more(act / 2, RECOVERY_TIMEOUT).await, "the answers stopped coming after leader {leader} was killed");
            cluster.restart_process(&leader)?;
            let all = |status: &StatusResponse| {
                let missing = status.coordinators.iter().any(|c| c.role() == CoordinatorRole::Unreachable);
                (!missing && leader_of(status).is_some() && is_whole(status)).then_some(())
            };
            cluster.wait_for("all coordinators", RECOVERY_TIMEOUT, all).await?;
        }
    }
    Ok(kills)
}

/// A worker that holds live sequences, the one with the most, and how many. Only the leader knows.
async fn a_holder(cluster: &Cluster) -> anyhow::Result<(String, u64)> {
    let busiest = |status: &StatusResponse| {
        let holds = |worker: &&cresset_proto::admin::v1::Worker| {
            let ready = |r: &cresset_proto::fleet::v1::ObservedReplica| r.model == MODEL && r.state() == ReplicaState::Ready;
            worker.state() == WorkerState::Ready && worker.sequences_live > 0 && worker.replicas.iter().any(ready)
        };
        let busiest = status.workers.iter().filter(holds).max_by_key(|worker| worker.sequences_live)?;
        Some((busiest.id.clone(), busiest.sequences_live))
    };
    Ok(cluster.wait_for("a worker with live sequences", RECOVERY_TIMEOUT, busiest).await?)
}

fn incarnation(status: &StatusResponse, id: &str) -> u64 {
    worker_of(status, id).filter(|worker| worker.state() == WorkerState::Ready).map_or(0, |worker| worker.incarnation)
}

fn is_whole(status: &StatusResponse) -> bool {
    state_of(status, MODEL) == Some(ModelState::Ready)
}

/// Moves the speakers that go through this coordinator to another one: a plain client's stream ends with its coordinator,
/// by contract, and that isn't what is shown here.
async fn make_way(cluster: &Cluster, stage: &Stage, cast: &Cast, leader: &str) -> anyhow::Result<()> {
    if *cast.gateway.borrow() == cluster.grpc(leader)? {
        cast.gateway.send_replace(gateway_beside(cluster, leader)?);
        ensure!(stage.more(cast.count * 50, RECOVERY_TIMEOUT).await, "the answers stopped coming");
    }
    Ok(())
}

/// Runs the model here, once for each speaker, and counts.
fn compare(repository: &Path, speech: &Speech, heard: &[Heard]) -> anyhow::Result<Vec<Tally>> {
    let mut reference = Reference::load(repository, MODEL)?;
    let mut tallies = Vec::new();
    for heard in heard {
        let longest = heard.passes.iter().map(|pass| pass.sent.len()).max().unwrap_or(0);
        let mut sequence = reference.sequence()?;
        let mut expected: Vec<Bytes> = Vec::with_capacity(longest);
        for chunk in speech.chunks(heard.start, longest) {
            let shape = vec![1, CHUNK_SAMPLES as i64];
            let output = sequence.step(&[Tensor { name: INPUT.to_owned(), datatype: Datatype::Fp32, shape, data: chunk }])?;
            expected.push(output.into_iter().next().context("the model has no output")?.data);
        }
        let mut tally = Tally::default();
        for pass in &heard.passes {
            tally.add(pass, &expected);
        }
        tallies.push(tally);
    }
    Ok(tallies)
}

fn print(heard: &[Heard], tallies: &[Tally], kills: &[Kill]) {
    let groups = [("direct", Some(true)), ("gateway", Some(false)), ("together", None)];
    let groups: Vec<_> = groups
        .into_iter()
        .map(|(name, which)| {
            (name, which, heard.iter().zip(tallies).filter(move |(h, _)| which.is_none_or(|w| h.is_direct == w)))
        })
        .filter(|(_, which, members)| which.is_none() || members.clone().next().is_some())
        .collect();
    let mut table = Table::new();
    table.load_preset(NOTHING);
    let mut row = |name: &str, cells: Vec<String>| {
        table.add_row(std::iter::once(name.to_owned()).chain(cells));
    };
    row("", groups.iter().map(|(name, ..)| (*name).to_owned()).collect());
    let counts: Vec<_> =
        groups.iter().map(|(_, _, members)| members.clone().fold(Tally::default(), |all, (_, tally)| all.and(tally))).collect();
    let each = |of: fn(&Tally) -> String| counts.iter().map(of).collect();
    row("chunks sent", each(|tally| tally.sent.to_string()));
    row("answered", each(|tally| tally.answered.to_string()));
    row("lost", each(|tally| tally.lost.to_string()));
    row("repeated", each(|tally| tally.repeated.to_string()));
    row("out of order", each(|tally| tally.out_of_order.to_string()));
    row("largest difference", each(|tally| format!("{:.1e}", tally.largest_difference)));
    let ms = |us: u64| format!("{:.0}", us as f64 / 1e3);
    let passes: Vec<Vec<&Pass>> =
        groups.iter().map(|(_, _, members)| members.clone().flat_map(|(heard, _)| &heard.passes).collect()).collect();
    let pauses = |passes: &[&Pass], from, to| longest_between(passes.iter().copied(), from, to);
    row("largest pause, ms", passes.iter().map(|passes| ms(pauses(passes, 0, u64::MAX))).collect());
    for what in ["worker", "leader"] {
        let windows: Vec<_> = windows(kills).filter(|(kill, _)| kill.what == what).collect();
        let around = |passes: &[&Pass]| windows.iter().map(|(kill, end)| pauses(passes, kill.at_us, *end)).collect::<Vec<_>>();
        let worst = passes.iter().map(|passes| ms(around(passes).into_iter().max().unwrap_or(0))).collect();
        if windows.len() == 1 {
            row(&format!("  around the {what} kill"), worst);
        } else {
            let middle = passes.iter().map(|passes| ms(median(around(passes)))).collect();
            row(&format!("  around {} {what} kills, median", windows.len()), middle);
            row(&format!("  around {} {what} kills, max", windows.len()), worst);
        }
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{}", table.trim_fmt());
}

/// Each kill with the end of the time in which a pause is its own.
fn windows(kills: &[Kill]) -> impl Iterator<Item = (&Kill, u64)> {
    let next = kills.iter().skip(1).map(|kill| kill.at_us).chain([u64::MAX]);
    kills.iter().zip(next).map(|(kill, next)| (kill, next.min(kill.at_us.saturating_add(KILL_WINDOW_US)).saturating_sub(1)))
}
