//! Ports of a local cluster: process k has base+10k for gRPC, the next for HTTP, and a coordinator one more for its peers.
//!
//! Clusters that run side by side choose their own block. A block is held by a locked file as long as its cluster lives,
//! since a port that is free now may be one that a neighbour is about to open.
use std::{
    fs::{File, OpenOptions},
    io,
    net::{Ipv4Addr, TcpListener},
    path::Path,
};

/// Distance between the base ports of two processes.
const STEP: u16 = 10;
/// Where blocks are chosen: above what services usually take, below what the system hands out by itself.
const CHOICE: std::ops::Range<u16> = 10_000..30_000;
/// Blocks start at multiples of this; a big cluster takes several in a row.
const BLOCK: u16 = 100;

/// What one process listens on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    pub grpc: u16,
    pub http: u16,
    /// Coordinators only.
    pub peer: u16,
}

impl Ports {
    /// Ports of the process at that place, coordinators counted before workers.
    pub fn of(base: u16, place: usize) -> Self {
        let grpc = base + STEP * place as u16;
        Self { grpc, http: grpc + 1, peer: grpc + 2 }
    }
}

/// Why a cluster can't have its ports.
#[derive(Debug, thiserror::Error)]
pub enum PortError {
    #[error(
        "port {port} ({role}) is taken: {error}; choose others with --base-port, or let it find free ones with --base-port 0"
    )]
    Taken { port: u16, role: String, error: String },
    #[error("base-port {base} is too high for {processes} processes, at most {highest} will do")]
    TooHigh { base: u16, processes: usize, highest: u16 },
    #[error("no free block of {processes} x {STEP} ports between {} and {}; name one with --base-port", CHOICE.start, CHOICE.end)]
    NoBlock { processes: usize },
}

/// A base port, with the locks that keep its block from other clusters.
#[derive(Debug)]
pub struct Block {
    pub base: u16,
    _locks: Vec<File>,
}

/// Checks the block that the user named, or finds a free one for 0.
///
/// # Errors
/// [`PortError`] names the port and whose it would be.
pub fn claim(base: u16, coordinators: usize, workers: usize) -> Result<Block, PortError> {
    let processes = coordinators + workers;
    if base == 0 {
        return choose(coordinators, workers, &std::env::temp_dir(), rand::random());
    }
    let highest = u16::try_from(usize::from(u16::MAX).saturating_sub(processes * usize::from(STEP))).unwrap_or(0);
    if base > highest {
        return Err(PortError::TooHigh { base, processes, highest });
    }
    for (port, role) in needed(base, coordinators, workers) {
        probe(port).map_err(|error| PortError::Taken { port, role, error: crate::settings::plain(&error) })?;
    }
    Ok(Block { base, _locks: vec![] })
}

/// Every port with its role, for messages.
fn needed(base: u16, coordinators: usize, workers: usize) -> Vec<(u16, String)> {
    let mut all = Vec::new();
    for place in 0..coordinators + workers {
        let ports = Ports::of(base, place);
        let name = if place < coordinators { format!("c{}", place + 1) } else { format!("w{}", place - coordinators + 1) };
        all.push((ports.grpc, format!("gRPC of {name}")));
        all.push((ports.http, format!("HTTP of {name}")));
        if place < coordinators {
            all.push((ports.peer, format!("peers of {name}")));
        }
    }
    all
}

fn probe(port: u16) -> io::Result<()> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, port)).map(drop)
}

fn choose(coordinators: usize, workers: usize, lock_folder: &Path, random: u16) -> Result<Block, PortError> {
    let processes = coordinators + workers;
    let blocks = (CHOICE.end - CHOICE.start) / BLOCK;
    let wanted = (processes * usize::from(STEP)).div_ceil(usize::from(BLOCK));
    let taken = || PortError::NoBlock { processes };
    let wanted = u16::try_from(wanted).ok().filter(|wanted| *wanted <= blocks).ok_or_else(taken)?;
    let starts = blocks - wanted + 1;
    for attempt in 0..starts {
        let base = CHOICE.start + BLOCK * ((random % starts + attempt) % starts);
        let locks: Option<Vec<File>> = (0..wanted).map(|n| lock(lock_folder, base + n * BLOCK)).collect();
        let Some(locks) = locks else { continue };
        if needed(base, coordinators, workers).iter().all(|(port, _)| probe(*port).is_ok()) {
            return Ok(Block { base, _locks: locks });
        }
    }
    Err(taken())
}

/// Holds one block for this process; `None` if another holds it, or the file is another user's.
fn lock(folder: &Path, base: u16) -> Option<File> {
    let path = folder.join(format!("cresset-ports-{base}.lock"));
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(path).ok()?;
    file.try_lock().ok()?;
    Some(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_coordinator_has_the_base_port() {
        assert_eq!(Ports::of(8001, 0), Ports { grpc: 8001, http: 8002, peer: 8003 });
        assert_eq!(Ports::of(8001, 4).grpc, 8041);
        let roles = needed(8001, 1, 1);
        assert_eq!(roles.iter().map(|(port, _)| *port).collect::<Vec<_>>(), [8001, 8002, 8003, 8011, 8012]);
        assert_eq!(roles[2].1, "peers of c1");
        assert_eq!(roles[3].1, "gRPC of w1");
    }

    #[test]
    fn a_taken_port_is_named_with_its_role() {
        let held = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = held.local_addr().unwrap().port();
        let error = claim(port, 1, 0).unwrap_err().to_string();
        assert!(error.starts_with(&format!("port {port} (gRPC of c1) is taken: address already in use")), "{error}");
        assert!(error.contains("--base-port"), "{error}");
    }

    #[test]
    fn a_base_port_leaves_room_for_everyone() {
        let error = claim(65_530, 3, 3).unwrap_err().to_string();
        assert_eq!(error, "base-port 65530 is too high for 6 processes, at most 65475 will do");
    }

    #[test]
    fn two_clusters_never_get_the_same_block() {
        let folder = tempfile::tempdir().unwrap();
        let blocks: Vec<_> = (0..5).map(|_| choose(3, 3, folder.path(), 7).unwrap()).collect();
        let mut bases: Vec<_> = blocks.iter().map(|block| block.base).collect();
        bases.sort_unstable();
        bases.dedup();
        assert_eq!(bases.len(), 5);
        assert!(bases.iter().all(|base| CHOICE.contains(base)));
    }

    #[test]
    fn a_big_cluster_locks_every_block_that_it_reaches_into() {
        let folder = tempfile::tempdir().unwrap();
        let big = choose(5, 20, folder.path(), 0).unwrap();
        let next = choose(3, 3, folder.path(), big.base.wrapping_sub(CHOICE.start) / BLOCK).unwrap();
        assert!(next.base >= big.base + 300 || next.base + 100 <= big.base, "{} {}", big.base, next.base);
    }
}
