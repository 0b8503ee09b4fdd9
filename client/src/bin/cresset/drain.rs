//! `cresset drain`: a worker leaves without anybody noticing.
use std::time::Duration;

use cresset_client::CallError;
use cresset_proto::admin::v1::{DrainWorkerRequest, DrainWorkerResponse, admin_service_client::AdminServiceClient};
use tokio::time::timeout;

use crate::{
    connect::{Cluster, request},
    deploy::{WAIT_DEFAULT, command_id},
    output::{self, Format},
    settings::Settings,
    status::{Report, Worker},
};

/// Flags of `cresset drain`.
#[derive(clap::Args)]
pub struct Args {
    /// The worker
    #[arg(value_name = "WORKER")]
    worker: String,
    /// Wait until it holds nothing any more, so that it can be stopped
    #[arg(long)]
    wait: bool,
}

/// Why a worker hasn't left.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// It died, or was started again, before it had left.
    #[error("worker '{worker}' ended before it had left; what it held is placed elsewhere anyway")]
    Ended { worker: String },
    /// The time is over.
    #[error(
        "worker '{worker}' still holds {held} after {}; it leaves when others can take that over: look at `cresset status`, or give it \
         longer with --timeout",
        output::seconds(*after)
    )]
    TimedOut { worker: String, held: String, after: Duration },
    /// The cluster can't be asked.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Runs `cresset drain`.
///
/// # Errors
/// When it is refused, when nobody answers, and with `--wait` when the worker still holds something as the time is over.
pub async fn run(cluster: &Cluster, args: &Args, settings: &Settings) -> anyhow::Result<()> {
    let message = DrainWorkerRequest { command_id: command_id(), worker_id: args.worker.clone() };
    let ask = async |channel, limit| AdminServiceClient::new(channel).drain_worker(request(message.clone(), limit)).await;
    let accepted: DrainWorkerResponse = cluster.call(ask).await?;
    if args.wait {
        wait_empty(cluster, &args.worker, &accepted, settings.given_timeout.unwrap_or(WAIT_DEFAULT)).await?;
    }
    match settings.output {
        Format::Json => {
            let json = serde_json::json!({
                "worker": args.worker, "incarnation": accepted.incarnation, "epoch": accepted.epoch, "empty": args.wait,
            });
            output::print_json(&json)?;
        }
        Format::Table if args.wait => output::print(&format!("{} holds nothing any more", args.worker))?,
        Format::Table => output::print(&format!("{} is leaving", args.worker))?,
    }
    Ok(())
}

async fn wait_empty(cluster: &Cluster, worker: &str, accepted: &DrainWorkerResponse, limit: Duration) -> Result<(), DrainError> {
    let mut held = "something".to_owned();
    let mut watch = cluster.watch();
    let follow = async {
        loop {
            let report = Report::from(watch.next().await?);
            if report.epoch < accepted.epoch {
                continue;
            }
            let leaving = report.workers.iter().find(|known| known.id == worker && is_life(known, accepted.incarnation));
            let leaving = leaving.ok_or_else(|| DrainError::Ended { worker: worker.to_owned() })?;
            if leaving.replicas.is_empty() {
                return Ok(());
            }
            let names = leaving.replicas.iter().map(|replica| format!("{}/{}", replica.model, replica.version));
            held = names.collect::<Vec<_>>().join(", ");
        }
    };
    let outcome = timeout(limit, follow).await;
    outcome.unwrap_or_else(|_| Err(DrainError::TimedOut { worker: worker.to_owned(), held, after: limit }))
}

/// Whether this life of a worker isn't over.
fn is_life(worker: &Worker, incarnation: u64) -> bool {
    worker.incarnation == incarnation && !worker.is_over()
}
