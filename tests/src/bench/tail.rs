//! The slowest answers: under load, and while another model loads and unloads in the same worker.

use std::time::Duration;

use anyhow::{Context, ensure};
use cresset_proto::admin::v1::{DeployRequest, ModelState, UndeployRequest, admin_service_client::AdminServiceClient};
use tonic::transport::{Channel, Endpoint};

use super::{
    figures::Part,
    generator::{Generator, Level},
    models::{HEAVY, MLP},
    stage::{COORDINATOR, Stage},
};
use crate::harness::{Cluster, model_of};

/// What is told of each latency.
pub const PERCENTILES: [&str; 4] = ["p50", "p90", "p99", "p99.9"];
/// The parts of saturation at which the neighbour is measured, and how the figures say it.
const LOADS: [(f64, &str); 2] = [(0.7, ""), (0.3, "_at_30_percent")];
/// How long the heavy model may take to come or to go.
const MOVE_TIMEOUT: Duration = Duration::from_secs(60);

/// Measures the small model in an open loop, alone and with the heavy model coming and going.
///
/// # Errors
/// When a process fails, or a request.
pub fn measure(stage: &Stage, cluster: &Cluster) -> anyhow::Result<Part> {
    let mut part = Part::default();
    let straight = stage.straight(cluster, MLP)?;
    let longer = straight.lasting(stage.pace.time * 2);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut admin = runtime.block_on(admin(cluster))?;
    for round in 0..stage.pace.rounds {
        let saturated = straight.closed(64)?;
        part.raw("saturated", round, &saturated);
        part.add("saturation_requests_per_second", saturated.throughput);
        for (share, suffix) in LOADS {
            let rate = saturated.throughput * share;
            let alone = longer.open(rate)?;
            let (beside, moves) = runtime.block_on(with_neighbour(&longer, rate, cluster, &mut admin))?;
            part.raw(&format!("alone at {share}"), round, &alone);
            part.raw(&format!("beside at {share}"), round, &beside);
            for percentile in PERCENTILES {
                part.add(&format!("{percentile}_us{suffix}"), alone.latency(percentile)?);
                part.add(&format!("neighbour_{percentile}_us{suffix}"), beside.latency(percentile)?);
            }
            part.add(&format!("p999_over_p50{suffix}"), alone.latency("p99.9")? / alone.latency("p50")?);
            part.add(&format!("neighbour_p99_growth{suffix}"), beside.latency("p99")? / alone.latency("p99")?);
            part.add(&format!("neighbour_moves{suffix}"), f64::from(moves));
        }
    }
    Ok(part)
}

/// An open loop while the heavy model is deployed and undeployed again and again, and how often it came and went.
async fn with_neighbour(
    generator: &Generator,
    rate: f64,
    cluster: &Cluster,
    admin: &mut AdminServiceClient<Channel>,
) -> anyhow::Result<(Level, u32)> {
    let mut running = generator.start_open(rate)?;
    let mut moves = 0;
    while running.is_at_work()? {
        let deploy =
            DeployRequest { command_id: command_id(), name: HEAVY.into(), version: 0, replicas: 1, ..Default::default() };
        admin.deploy(deploy).await?;
        cluster.wait_for_model(HEAVY, ModelState::Ready, MOVE_TIMEOUT).await?;
        admin.undeploy(UndeployRequest { command_id: command_id(), name: HEAVY.into(), version: 0 }).await?;
        let gone = |status: &cresset_proto::admin::v1::StatusResponse| {
            let holds = status.workers.iter().any(|worker| worker.replicas.iter().any(|replica| replica.model == HEAVY));
            (!holds && model_of(status, HEAVY).is_none()).then_some(())
        };
        cluster.wait_for("the heavy model is gone", MOVE_TIMEOUT, gone).await?;
        moves += 1;
    }
    ensure!(moves > 0, "the heavy model never came and went");
    Ok((running.level()?, moves))
}

fn command_id() -> bytes::Bytes {
    rand::random::<[u8; 16]>().to_vec().into()
}

async fn admin(cluster: &Cluster) -> anyhow::Result<AdminServiceClient<Channel>> {
    let endpoint = Endpoint::from_shared(format!("http://{}", cluster.grpc(COORDINATOR)?))?;
    Ok(AdminServiceClient::new(endpoint.connect().await.context("can't reach the coordinator")?))
}
