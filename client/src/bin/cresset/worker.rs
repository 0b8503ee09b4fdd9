//! `cresset worker`: takes workers out of the cluster for good.
use cresset_proto::admin::v1::{RemoveWorkerRequest, RemoveWorkerResponse, admin_service_client::AdminServiceClient};

use crate::{
    connect::{Cluster, request},
    deploy::command_id,
    output::{self, Format},
};

/// Flags of `cresset worker`.
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: WorkerCommand,
}

#[derive(clap::Subcommand)]
enum WorkerCommand {
    /// Remove a worker that is dead, or that was drained and holds nothing any more. If it runs, it stops; started again, it
    /// takes part again
    Remove {
        /// The worker
        worker: String,
    },
}

/// Runs `cresset worker`.
///
/// # Errors
/// When it is refused, or nobody answers.
pub async fn run(cluster: &Cluster, args: &Args, format: Format) -> anyhow::Result<()> {
    let WorkerCommand::Remove { worker } = &args.command;
    let message = RemoveWorkerRequest { command_id: command_id(), worker_id: worker.clone() };
    let ask = async |channel, limit| AdminServiceClient::new(channel).remove_worker(request(message.clone(), limit)).await;
    let accepted: RemoveWorkerResponse = cluster.call(ask).await?;
    match format {
        Format::Json => {
            let json = serde_json::json!({"worker": worker, "incarnation": accepted.incarnation, "epoch": accepted.epoch});
            output::print_json(&json)?;
        }
        Format::Table => output::print(&format!("{worker} is removed"))?,
    }
    Ok(())
}
