//! Consensus: the coordinators' agreement on the order of commands.
//!
//! [`start`] opens the log in the data folder and gives back a [`Consensus`] handle for the rest of the process, the
//! [`RaftServer`] for the peer port, and a [`DriverHandle`] that tells when it has ended. [`start_within`] does the same in
//! whatever [`Surroundings`] it is given.
//!
//! ```text
//!  callers ── Consensus ──┐                          ┌── watch: raft, applied
//!                         ├─▶ inbox ─▶ driver thread ─┤
//!  peers ── PeerService ──┘            │  Node       └── Links ──▶ peers
//!                                      └─ LogStore (raft-engine + identity.json)
//! ```
//!
//! - `node`: one member as a plain value, without threads, clocks or sockets; `guard` keeps hostile messages from it. What
//!   changes the members is in `node/members`.
//! - `log`, `engine_log`, `identity`: what is on the disk, and the proof that it is all there.
//! - `driver`, `inbox`, `pending`: the task around the node, its inputs, and who waits for what.
//! - `surroundings`: the disk, the network and the chance that it is given.
//! - `transport`, `service`, `handle`: to the peers, from the peers, and the face to the rest of the process.
//! - `announced`: what the peers say that they know.
//!
//! This is the only place that names the crates `raft`, `raft_engine` and `protobuf`. Absent: TLS between peers.
mod announced;
mod driver;
mod engine_log;
mod error;
mod guard;
mod handle;
mod identity;
mod inbox;
mod log;
mod machine;
mod node;
mod pending;
mod published;
mod salvage;
mod service;
mod settings;
mod space;
mod surroundings;
#[cfg(test)]
mod tests;
mod tracing_drain;
mod transport;

use cresset_core::{ClusterState, PeerId};
use tokio_util::sync::CancellationToken;

pub use engine_log::EngineLog;
pub use error::{ProposeError, ReadError, StartError, TransferError};
pub use guard::Refused;
pub use handle::{Consensus, DriverHandle};
pub use log::{Batch, LogError, LogStore, MemoryLog, Stored};
pub use machine::{Answer, Shared, StateMachine};
pub use node::{ElectionDraw, Envelope, MemberSeen, Node, NodeError, NotTaken, RaftStatus, Refusal, Role, Round, Sink};
pub use published::{Applied, Leadership};
pub use salvage::{Salvaged, owner, salvage};
pub use service::{PeerService, RaftServer};
pub use settings::{COMMAND_BYTES_MAX, Problem, SNAPSHOT_BYTES_MAX, Settings};
pub use surroundings::{Chance, Network, Surroundings};
pub use tracing_drain::silent;

/// Effects that wait for the slowest listener.
const EFFECTS_MAX: usize = 1_024;

/// Starts consensus from what the data folder holds. An empty folder is founded with `initial`, which must be the same on
/// every coordinator. Reads the whole log, so it may take a while. Must be called inside a tokio runtime.
///
/// # Errors
/// [`StartError`]; nothing is left running.
pub fn start(settings: &Settings, initial: ClusterState) -> Result<(Consensus, RaftServer, DriverHandle), StartError> {
    check(settings)?;
    let log = EngineLog::open(&settings.data_dir, &settings.cluster_id, settings.id)?;
    let (consensus, server, driver) = start_within(settings, initial, Surroundings::real(log))?;
    let driver = driver::on_own_thread(driver).map_err(StartError::Thread)?;
    Ok((consensus, server, driver))
}

/// The same in other surroundings. The driver is the caller's to run: a future that blocks while it waits for the disk, and
/// ends when consensus does. Dropped, it leaves nothing running.
///
/// # Errors
/// [`StartError`]; nothing is left running.
pub fn start_within<L: LogStore>(
    settings: &Settings,
    mut initial: ClusterState,
    Surroundings { log, network, chance }: Surroundings<L>,
) -> Result<(Consensus, RaftServer, impl Future<Output = Result<(), NodeError>> + use<L>), StartError> {
    check(settings)?;
    if !settings.join {
        initial.founders = settings.peers.keys().copied().map(PeerId).collect();
    }
    let shared = Shared::new(initial).knowing(settings.level_known);
    let draw = surroundings::election_draw(Chance::clone(&chance), settings.election_ticks_min, settings.election_ticks_max);
    let node = Node::new(settings, log, shared.clone(), draw, &tracing_drain::logger())?;

    let (inbox, arrivals) = inbox::Inbox::new();
    let shutdown = CancellationToken::new();
    let (published, watched) = published::Published::new(node.status(), shared.state().read().epoch, EFFECTS_MAX);
    let links = transport::Links::spawn(settings, &inbox, network, Chance::clone(&chance), &shutdown);
    let contacts = links.contacts();
    let announced = announced::Announced::default();
    let driver = driver::Driver::new(node, arrivals, links, published, announced.clone(), settings);
    let ending = shutdown.clone().drop_guard();
    let driver = async move {
        let _ending = ending;
        driver.run().await
    };
    let consensus = Consensus::new(handle::Inner {
        id: settings.id,
        cluster_id: settings.cluster_id.clone(),
        propose_timeout: settings.propose_timeout,
        inbox: inbox.clone(),
        level_known: settings.level_known,
        announced,
        shared,
        contacts,
        watched,
        chance,
        shutdown: shutdown.clone(),
    });
    let server = service::server(consensus.clone(), inbox, shutdown);
    Ok((consensus, server, driver))
}

fn check(settings: &Settings) -> Result<(), StartError> {
    settings.check().map_err(|problems| StartError::Settings { problems })?;
    tokio::runtime::Handle::try_current().map_err(|_| StartError::NoRuntime)?;
    for (peer, address) in &settings.peers {
        transport::endpoint(address).map_err(|error| StartError::Settings {
            problems: vec![Problem { field: "peers", problem: format!("has '{address}' for c{peer}: {error}") }],
        })?;
    }
    Ok(())
}
