//! The reference: the same models run by libtorch in a process of its own, without a cluster.
//!
//! The bench starts itself as a child for each number of threads, so that libtorch's threads and memory are nobody else's.
//! The child loads its models once, then measures whatever line it is sent: `MODEL ROWS MILLISECONDS`.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context, bail, ensure};
use cresset_proto::tensor::Tensor;
use cresset_worker::engine::{Device, cuda, set_threads};
use serde::{Deserialize, Serialize};

use super::models::Model;
use crate::reference::Reference;

/// Calls before it counts: TorchScript compiles a module within its first ones.
const WARM_CALLS: usize = 3;
/// Unless they take longer than this together.
const WARM_TIME: Duration = Duration::from_millis(500);

/// How many callers run a model at a time, and how many threads each has inside one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::Args)]
pub struct Threads {
    /// Callers, each with a copy of the model.
    #[arg(long, default_value_t = 1)]
    pub callers: u16,
    /// Threads inside one operation.
    #[arg(long, default_value_t = 1)]
    pub intra: u16,
}

impl Threads {
    /// What is worth trying on one GPU, whose kernels are all the parallelism there is: a caller, and one that prepares meanwhile.
    pub const ON_A_GPU: [Self; 2] = [Self { callers: 1, intra: 1 }, Self { callers: 2, intra: 1 }];

    /// What is worth trying on so many cores: all of them in one operation, one each, and what lies between.
    pub fn choices(cores: u16) -> Vec<Self> {
        let callers = (1..=cores).filter(|callers| cores.is_multiple_of(*callers));
        let mut all: Vec<_> = callers.map(|callers| Self { callers, intra: cores / callers }).collect();
        if cores > 1 {
            all.push(Self { callers: 1, intra: 1 });
        }
        all
    }
}

/// What a child measured.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Measured {
    /// Rows that all callers finished per second.
    pub rows_per_second: f64,
    /// Calls.
    pub calls: usize,
    /// The middle of a call's time.
    pub p50_us: f64,
    /// Only one call in a hundred took longer.
    pub p99_us: f64,
}

/// A child that holds models.
#[derive(Debug)]
pub struct Holder {
    child: Child,
    commands: ChildStdin,
    answers: BufReader<ChildStdout>,
    /// Its threads.
    pub threads: Threads,
}

impl Holder {
    /// Starts one, and waits until its models are loaded.
    ///
    /// # Errors
    /// The system's, or the child's.
    pub fn start(repository: &Path, gpu: bool, models: &[Model], threads: Threads) -> anyhow::Result<Self> {
        let names: Vec<_> = models.iter().map(|model| model.name).collect();
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("reference").arg("--repository").arg(repository).args(["--models", &names.join(",")]);
        command.args(gpu.then_some("--gpu"));
        command.args(["--callers", &threads.callers.to_string(), "--intra", &threads.intra.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("can't start the reference")?;
        let (commands, answers) = child.stdin.take().zip(child.stdout.take()).context("the reference has no pipes")?;
        let mut this = Self { child, commands, answers: BufReader::new(answers), threads };
        ensure!(this.line()? == "ready", "the reference didn't load its models");
        Ok(this)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Runs a model for a while.
    ///
    /// # Errors
    /// The child's.
    pub fn measure(&mut self, model: Model, rows: usize, time: Duration) -> anyhow::Result<Measured> {
        writeln!(self.commands, "{} {rows} {}", model.name, time.as_millis())?;
        let line = self.line()?;
        serde_json::from_str(&line).with_context(|| format!("the reference said '{line}'"))
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        if self.answers.read_line(&mut line)? == 0 {
            bail!("the reference ended: {}", self.child.wait()?);
        }
        Ok(line.trim().to_owned())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // It would end by itself with its input; nothing of it is worth waiting for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Flags of the child.
#[derive(Debug, clap::Args)]
pub struct ReferenceArgs {
    /// The model repository
    #[arg(long)]
    repository: PathBuf,
    /// What to load
    #[arg(long, value_delimiter = ',')]
    models: Vec<String>,
    /// On the first GPU instead of the processor
    #[arg(long)]
    gpu: bool,
    #[command(flatten)]
    threads: Threads,
}

/// The child: loads, then obeys line by line until its input ends.
///
/// # Errors
/// The engine's.
pub fn serve(args: &ReferenceArgs) -> anyhow::Result<()> {
    let device = if args.gpu { Device::Cuda(0) } else { Device::Cpu };
    if args.gpu {
        cuda::load(&cresset_worker::libraries_dir())?;
    }
    let mut callers = Vec::new();
    for _ in 0..args.threads.callers {
        let mut models = BTreeMap::new();
        for name in args.models.iter().filter(|name| !name.is_empty()) {
            let model = Model::named(name).with_context(|| format!("no model '{name}'"))?;
            models.insert(model.name, Reference::load_on(device, &args.repository, name)?);
        }
        callers.push(models);
    }
    // Loading set it to 1.
    set_threads(args.threads.intra, 1)?;
    println!("ready");
    for line in std::io::stdin().lines() {
        let line = line?;
        let [name, rows, millis] = line.split(' ').collect::<Vec<_>>()[..] else { bail!("not a command: '{line}'") };
        let model = Model::named(name).with_context(|| format!("no model '{name}'"))?;
        let (inputs, time) = (model.sample(rows.parse()?), Duration::from_millis(millis.parse()?));
        println!("{}", serde_json::to_string(&measure(&mut callers, model.name, &inputs, time)?)?);
    }
    Ok(())
}

fn measure(
    callers: &mut [BTreeMap<&'static str, Reference>],
    name: &str,
    inputs: &[Tensor],
    time: Duration,
) -> anyhow::Result<Measured> {
    let rows = inputs.first().and_then(|input| input.shape.first()).copied().unwrap_or(1) as f64;
    let models = callers.iter_mut().filter_map(|models| models.get_mut(name));
    let runs: Vec<anyhow::Result<Run>> = std::thread::scope(|scope| {
        let threads: Vec<_> = models.map(|model| scope.spawn(|| Run::of(model, inputs, time))).collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(|run| run.unwrap_or_else(|_| bail!("a caller panicked"))).collect()
    });
    let runs = runs.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut calls: Vec<f64> = runs.iter().flat_map(|run| run.calls_us.iter().copied()).collect();
    calls.sort_by(f64::total_cmp);
    let at = |quantile: f64| calls[((calls.len() - 1) as f64 * quantile) as usize];
    ensure!(!calls.is_empty(), "nothing was run");
    Ok(Measured {
        rows_per_second: runs.iter().map(|run| run.calls_us.len() as f64 * rows / run.seconds).sum(),
        calls: calls.len(),
        p50_us: at(0.5),
        p99_us: at(0.99),
    })
}

/// One caller's calls.
struct Run {
    calls_us: Vec<f64>,
    seconds: f64,
}

impl Run {
    fn of(model: &mut Reference, inputs: &[Tensor], time: Duration) -> anyhow::Result<Self> {
        let warming = Instant::now();
        for _ in 0..WARM_CALLS {
            model.infer(inputs)?;
            if warming.elapsed() > WARM_TIME {
                break;
            }
        }
        let begun = Instant::now();
        let mut calls_us = Vec::new();
        while calls_us.is_empty() || begun.elapsed() < time {
            let call = Instant::now();
            std::hint::black_box(model.infer(inputs)?);
            calls_us.push(call.elapsed().as_secs_f64() * 1e6);
        }
        Ok(Self { calls_us, seconds: begun.elapsed().as_secs_f64() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_ways_to_share_the_cores_are_tried() {
        let of = |cores| Threads::choices(cores).iter().map(|t| (t.callers, t.intra)).collect::<Vec<_>>();
        assert_eq!(of(1), [(1, 1)]);
        assert_eq!(of(2), [(1, 2), (2, 1), (1, 1)]);
        assert_eq!(of(4), [(1, 4), (2, 2), (4, 1), (1, 1)]);
    }
}
