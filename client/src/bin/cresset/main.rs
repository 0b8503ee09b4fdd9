//! The command line `cresset`: runs a local cluster, and asks any cluster for its status, deployments and predictions,
//! or loads one.
//!
//! It holds no state of its own. Every command asks one coordinator and moves on to the next where that one doesn't
//! answer ([`connect`]); notes and progress go to stderr, so that stdout carries only what was asked for. Exit codes:
//! 0 done, 1 failed, 2 bad usage or configuration.
#![forbid(unsafe_code)]
#![allow(rustdoc::broken_intra_doc_links, reason = "comments of flags are help texts, in which [up] is a TOML table")]

mod backup;
mod bench;
mod connect;
mod deploy;
mod drain;
mod member;
mod npy;
mod output;
mod predict;
mod settings;
mod status;
mod up;
mod values;
mod watch;
mod worker;

use std::{io, process::ExitCode};

use clap::{CommandFactory, Parser, Subcommand};

use crate::{
    connect::Cluster,
    settings::{GlobalArgs, Problems, Resolver, Settings},
};

/// Serves PyTorch models from a cluster that keeps answering.
#[derive(Parser)]
#[command(name = "cresset", version, max_term_width = 110, after_help = AFTER_HELP)]
struct Cli {
    #[command(flatten)]
    global: GlobalArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

const AFTER_HELP: &str = "Settings come from the TOML file (--config, or ~/.config/cresset/config.toml if it exists), from \
                          CRESSET_* variables and from flags; the later of these wins.\n\
                          Exit codes: 0 done, 1 failed, 2 bad usage or configuration.";

#[derive(Subcommand)]
enum Command {
    /// Run a local cluster in the foreground: coordinators and workers as processes on loopback
    Up(Box<up::Args>),
    /// Show coordinators, workers and models
    Status(status::Args),
    /// Print what changes for routers: models, who serves them, workers, labels; nothing missed and nothing twice, whoever leads
    Watch(watch::Args),
    /// Deploy a model of the repository, again if its files have changed, or change its number of replicas
    Deploy(deploy::DeployArgs),
    /// Take a model out of service, or one version of it
    Undeploy(deploy::UndeployArgs),
    /// Move labels of a model, names that requests can use for a version
    Label(deploy::LabelArgs),
    /// Have a worker leave: what it runs moves elsewhere first
    Drain(drain::Args),
    /// Take workers out of the cluster that are dead or have left
    Worker(worker::Args),
    /// List what the model repository has to deploy
    Repository,
    /// List, add, promote and remove coordinators
    Member(member::MemberArgs),
    /// Back up what the coordinators agree on, look into a backup, begin a new cluster from one
    Backup(backup::BackupArgs),
    /// Hand over leadership of the coordinators
    Leader(member::LeaderArgs),
    /// Run one prediction and print its outputs
    Predict(predict::Args),
    /// Load a model, of any server of the Open Inference Protocol, and report latencies and throughput
    Bench(Box<bench::Args>),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cresset: {error:#}");
            ExitCode::from(if error.is::<Problems>() { 2 } else { 1 })
        }
    }
}

fn run(cli: &Cli) -> anyhow::Result<()> {
    let mut resolver = Resolver::open(cli.global.config.as_deref());
    let settings = Settings::take(&mut resolver, &cli.global);
    let no_args = up::Args::default();
    let up_args = match &cli.command {
        Some(Command::Up(args)) => args,
        _ => &no_args,
    };
    let up_settings = up::Settings::take(&mut resolver, up_args);
    let effective = resolver.finish()?;
    // Both are there when nothing was wrong.
    let (Some(settings), Some(up_settings)) = (settings, up_settings) else { return Err(Problems::default().into()) };
    if cli.global.check_config {
        return Ok(output::print(&effective)?);
    }
    let Some(command) = &cli.command else {
        eprintln!("{}", Cli::command().render_help());
        return Err(Problems::one("no command given, see above for what there is").into());
    };
    // One thread: children are spawned from the main thread, whose end is what they are told to die with.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(dispatch(command, settings, up_settings))
}

async fn dispatch(command: &Command, settings: Settings, up_settings: up::Settings) -> anyhow::Result<()> {
    let cluster = Cluster::new(settings.endpoints.clone(), settings.timeout());
    match command {
        Command::Up(_) => up::run(up_settings).await?,
        Command::Status(args) => status::run(&cluster, args, settings.output).await?,
        Command::Watch(args) => watch::run(&cluster, args, settings.output).await?,
        Command::Deploy(args) => deploy::deploy(&cluster, args, &settings).await?,
        Command::Undeploy(args) => deploy::undeploy(&cluster, args, &settings).await?,
        Command::Label(args) => deploy::set_labels(&cluster, args, settings.output).await?,
        Command::Drain(args) => drain::run(&cluster, args, &settings).await?,
        Command::Worker(args) => worker::run(&cluster, args, settings.output).await?,
        Command::Repository => deploy::repository(&cluster, settings.output).await?,
        Command::Member(args) => member::member(&cluster, args, settings.output).await?,
        Command::Backup(args) => backup::run(&cluster, args, settings.output).await?,
        Command::Leader(args) => member::leader(&cluster, args, settings.output).await?,
        Command::Bench(args) => bench::run(&cluster, args, &settings).await?,
        Command::Predict(args) => predict::run(&cluster, args, settings.output).await?,
    }
    Ok(())
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn deploy_takes_many_names_in_each_usual_form() {
        for line in [
            &["cresset", "up", "--deploy", "a", "b", "--workers", "2"][..],
            &["cresset", "up", "--deploy", "a", "--deploy", "b"],
            &["cresset", "up", "--deploy", "a,b"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            let Some(Command::Up(args)) = cli.command else { panic!("{line:?}") };
            assert_eq!(args.deploy, ["a", "b"], "{line:?}");
        }
    }
}
