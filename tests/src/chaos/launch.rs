//! The command lines of a cluster whose processes live in namespaces, or on ports of the loopback interface.

use std::path::Path;

use super::network::Network;
use crate::harness::{
    Launch,
    launch::{Place, Recipe},
};

/// Says how to start each of these processes, coordinators (`c1`) and workers (`w1`).
///
/// # Errors
/// No free ports.
pub fn all(ids: &[String], network: Option<&Network>, data_dir: &Path, repository: &Path) -> anyhow::Result<Vec<Launch>> {
    // The coordinators' disks are small.
    let (coordinator, worker) = (&[("--disk-kept-mib", "8")], &[("--intra-op-threads", "1")]);
    let recipe = Recipe { cluster_id: "chaos", data_dir, repository, coordinator, worker };
    let Some(network) = network else { return Ok(recipe.launches(ids, &Place::free(ids.len())?)) };
    let place = |id: &String| {
        let at = |port: u16| format!("{}:{port}", network.address(id));
        Place { grpc: at(8001), http: at(8002), peer: at(8003) }
    };
    let mut launches = recipe.launches(ids, &ids.iter().map(place).collect::<Vec<_>>());
    for launch in &mut launches {
        launch.command_line.splice(0..0, Network::inside(&launch.id));
    }
    Ok(launches)
}
