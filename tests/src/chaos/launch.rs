//! The command lines of a cluster whose processes live in namespaces, or on ports of the loopback interface.

use std::{ffi::OsString, net::TcpListener, path::Path};

use super::network::Network;
use crate::harness::{Launch, binaries};

/// Where a process listens.
struct Place {
    grpc: String,
    http: String,
    peer: String,
}

/// Says how to start each of these processes, coordinators (`c1`) and workers (`w1`).
///
/// # Errors
/// No free ports.
pub fn all(ids: &[String], network: Option<&Network>, data_dir: &Path, repository: &Path) -> anyhow::Result<Vec<Launch>> {
    let mut places = Vec::new();
    // Held until all are drawn, so that no port is drawn twice.
    let mut held = Vec::new();
    for id in ids {
        let mut at = |port: u16| match network {
            Some(network) => Ok(format!("{}:{port}", network.address(id))),
            None => {
                let listener = TcpListener::bind("127.0.0.1:0")?;
                let address = listener.local_addr()?.to_string();
                held.push(listener);
                Ok::<_, std::io::Error>(address)
            }
        };
        places.push(Place { grpc: at(8001)?, http: at(8002)?, peer: at(8003)? });
    }
    let coordinators: Vec<_> = ids.iter().zip(&places).filter(|(id, _)| id.starts_with('c')).collect();
    let peers = coordinators.iter().map(|(id, place)| format!("{id}={}", place.peer)).collect::<Vec<_>>().join(",");
    let addresses = coordinators.iter().map(|(_, place)| place.peer.clone()).collect::<Vec<_>>().join(",");
    let launch = |(id, place): (&String, &Place)| {
        let is_coordinator = id.starts_with('c');
        let mut command_line = if network.is_some() { Network::inside(id) } else { vec![] };
        let program = if is_coordinator { "cresset-coordinator" } else { "cresset-worker" };
        command_line.push(binaries::bin_dir().join(program).into());
        let mut flag = |name: &str, value: OsString| command_line.extend([name.into(), value]);
        flag("--id", id.into());
        flag("--grpc", place.grpc.clone().into());
        flag("--http", place.http.clone().into());
        flag("--model-repository", repository.into());
        flag("--exit-with-parent", std::process::id().to_string().into());
        if is_coordinator {
            flag("--cluster-id", "chaos".into());
            flag("--peer", place.peer.clone().into());
            flag("--peers", peers.clone().into());
            flag("--data-dir", data_dir.join(id).join("log").into());
            // Its disk is small.
            flag("--disk-kept-mib", "8".into());
        } else {
            flag("--coordinators", addresses.clone().into());
            flag("--cache-dir", data_dir.join(id).join("files").into());
            flag("--device", "cpu".into());
            flag("--intra-op-threads", "1".into());
        }
        Launch { id: id.clone(), is_coordinator, grpc: place.grpc.clone(), http: place.http.clone(), command_line }
    };
    Ok(ids.iter().zip(&places).map(launch).collect())
}
