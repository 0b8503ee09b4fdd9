//! How to start a cluster's processes one by one, where `cresset up` can't put them.

use std::{ffi::OsString, io, net::TcpListener, path::Path};

use super::{Error, Launch, binaries, failed};

/// Where a process listens.
#[derive(Debug, Clone)]
pub struct Place {
    /// `host:port` of the public port.
    pub grpc: String,
    /// `host:port` of metrics and health.
    pub http: String,
    /// `host:port` of other members and workers.
    pub peer: String,
}

impl Place {
    /// Free ports of the loopback interface for so many processes.
    ///
    /// # Errors
    /// [`Error::Io`] when there are none.
    pub fn free(count: usize) -> Result<Vec<Self>, Error> {
        // Held until all are drawn, so that no port is drawn twice.
        let mut held = Vec::new();
        let mut draw = || -> io::Result<String> {
            let listener = TcpListener::bind("127.0.0.1:0")?;
            let address = listener.local_addr()?.to_string();
            held.push(listener);
            Ok(address)
        };
        let mut place = || -> io::Result<Self> { Ok(Self { grpc: draw()?, http: draw()?, peer: draw()? }) };
        (0..count).map(|_| place()).collect::<Result<_, _>>().map_err(failed("no free port"))
    }
}

/// What the processes of one cluster are started with, beside their places.
#[derive(Debug, Clone, Copy)]
pub struct Recipe<'a> {
    /// The cluster's name.
    pub cluster_id: &'a str,
    /// Each process has a folder in it.
    pub data_dir: &'a Path,
    /// The model repository.
    pub repository: &'a Path,
    /// More flags of each coordinator.
    pub coordinator: &'a [(&'a str, &'a str)],
    /// More flags of each worker.
    pub worker: &'a [(&'a str, &'a str)],
}

impl Recipe<'_> {
    /// Says how to start each of these processes: coordinators (`c1`) and workers (`w1`), each at its place.
    pub fn launches(&self, ids: &[String], places: &[Place]) -> Vec<Launch> {
        let coordinators = || ids.iter().zip(places).filter(|(id, _)| id.starts_with('c'));
        let peers = coordinators().map(|(id, place)| format!("{id}={}", place.peer)).collect::<Vec<_>>().join(",");
        let addresses = coordinators().map(|(_, place)| place.peer.clone()).collect::<Vec<_>>().join(",");
        ids.iter().zip(places).map(|(id, place)| self.launch(id, place, &peers, &addresses)).collect()
    }

    fn launch(&self, id: &str, place: &Place, peers: &str, addresses: &str) -> Launch {
        let is_coordinator = id.starts_with('c');
        let program = if is_coordinator { "cresset-coordinator" } else { "cresset-worker" };
        let mut command_line: Vec<OsString> = vec![binaries::bin_dir().join(program).into()];
        let mut flag = |name: &str, value: OsString| command_line.extend([name.into(), value]);
        flag("--id", id.into());
        flag("--grpc", place.grpc.clone().into());
        flag("--http", place.http.clone().into());
        flag("--model-repository", self.repository.into());
        flag("--exit-with-parent", std::process::id().to_string().into());
        let more = if is_coordinator {
            flag("--cluster-id", self.cluster_id.into());
            flag("--peer", place.peer.clone().into());
            flag("--peers", peers.into());
            flag("--data-dir", self.data_dir.join(id).join("log").into());
            self.coordinator
        } else {
            flag("--coordinators", addresses.into());
            flag("--cache-dir", self.data_dir.join(id).join("files").into());
            flag("--device", "cpu".into());
            self.worker
        };
        more.iter().for_each(|(name, value)| flag(name, value.into()));
        Launch { id: id.to_owned(), is_coordinator, grpc: place.grpc.clone(), http: place.http.clone(), command_line }
    }
}
