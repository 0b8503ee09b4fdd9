//! A coordinator on a simulated host: the shipped driver, peer service and handle, and clients that use the handle.
use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use cresset_coordinator::consensus::{
    Batch, Consensus, LogError, LogStore, ProposeError, Settings, Stored, Surroundings, start_within,
};
use cresset_core::{ClusterState, Command, CommandId, Outcome};
use cresset_runtime::server;
use cresset_tests::{
    linearizability::Action,
    simulation::{disk::Disk, register},
};
use rand::{Rng, SeedableRng, rngs::StdRng, seq::IteratorRandom};
use tokio::{
    task::spawn_local,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::{
    IDS, Planted,
    network::{PORT, Simulated, incoming},
    witness::{WRITES_END, Witness},
};

/// Clients beside each coordinator.
pub const CLIENTS: u64 = 2;
/// Registers.
const KEYS: u32 = 3;
/// How long handing over leadership may take.
const HAND_OVER: Duration = Duration::from_secs(1);
/// How long a client tries before it gives an operation up.
const PATIENCE: Duration = Duration::from_secs(5);

/// What outlives a coordinator's process.
pub struct Shelf {
    pub disk: RefCell<Disk>,
    /// Processes so far.
    pub life: Cell<u64>,
    /// Snapshots that came from a leader.
    pub snapshots: Cell<u64>,
}

/// The disk, in the hands of a process.
struct Borrowed(Rc<Shelf>);

impl LogStore for Borrowed {
    fn load(&mut self) -> Result<Option<Stored>, LogError> {
        self.0.disk.borrow_mut().load()
    }

    fn append(&mut self, batch: &Batch<'_>) -> Result<(), LogError> {
        if batch.clear {
            self.0.snapshots.set(self.0.snapshots.get() + 1);
        }
        self.0.disk.borrow_mut().append(batch)
    }
}

pub fn name(id: u64) -> String {
    format!("c{id}")
}

fn settings(id: u64) -> Settings {
    let peers: BTreeMap<u64, String> = IDS.map(|id| (id, format!("{}:{PORT}", name(id)))).collect();
    // Small, so that who was away for some seconds needs a snapshot.
    Settings { snapshot_entries: 60, keep_entries: 10, disk_kept_bytes: 0, ..Settings::new("wiring", id, peers, "simulated") }
}

/// A process's life. It ends when its disk fails; a crash drops it.
pub async fn run(seed: u64, id: u64, shelf: Rc<Shelf>, witness: Rc<Witness>, planted: Option<Planted>) -> turmoil::Result {
    shelf.life.set(shelf.life.get() + 1);
    let life = shelf.life.get();
    let seed = seed << 16 ^ id << 12 ^ life;
    let random = Mutex::new(StdRng::seed_from_u64(seed));
    let surroundings = Surroundings {
        log: Borrowed(shelf),
        network: Arc::new(Simulated),
        chance: Arc::new(move || random.lock().unwrap().random_range(0.0..1.0)),
    };
    let (consensus, raft, driver) = start_within(&settings(id), ClusterState::new("wiring"), surroundings)?;
    witness.lives(id, consensus.clone());

    let incoming = incoming().await?;
    let never = CancellationToken::new();
    spawn_local(server::serve_connections(incoming, Routes::new(raft), server::Limits::default(), never));
    for number in 0..CLIENTS {
        let random = StdRng::seed_from_u64(seed << 4 ^ number);
        let client = Client { id, number, consensus: consensus.clone(), random, witness: Rc::clone(&witness), planted };
        spawn_local(client.run());
    }
    let ended = driver.await;
    // A process whose log failed has ended: its host does nothing more until it is started again.
    witness.ended(id, &ended);
    Ok(())
}

/// Writes and reads registers through one coordinator, one operation after the other.
///
/// tokio wakes those who wait for the same watch in an order of its own, which no seed decides. So only the first client waits for
/// any; the others write, and try again by themselves.
struct Client {
    id: u64,
    number: u64,
    consensus: Consensus,
    random: StdRng,
    witness: Rc<Witness>,
    planted: Option<Planted>,
}

impl Client {
    async fn run(mut self) {
        loop {
            let key = format!("m{}", self.random.random_range(0..KEYS));
            let may_write = turmoil::sim_elapsed().unwrap_or_default() < WRITES_END;
            if self.number == 0 && self.random.random_ratio(1, 40) {
                self.hand_over().await;
            }
            let reads = self.number == 0 && (!may_write || self.random.random_ratio(1, 2));
            let answered = match (reads, may_write) {
                (true, _) => self.read(key).await,
                (false, true) => self.write(key).await,
                (false, false) => return,
            };
            if answered {
                self.witness.answered(self.id, self.number);
            }
            sleep(Duration::from_millis(self.random.random_range(10..200))).await;
        }
    }

    /// Has leadership handed to somebody, by whoever leads.
    async fn hand_over(&mut self) {
        let to = IDS.choose(&mut self.random);
        if self.consensus.transfer_leadership(to, Instant::now() + HAND_OVER).await.is_ok() {
            self.witness.handed_over();
        }
    }

    async fn write(&mut self, key: String) -> bool {
        let value = self.witness.fresh_value();
        let command = Command { id: CommandId(self.random.random()), body: register::write(&key, value, 1) };
        let operation = self.witness.begun(&key, Action::Write(value));
        let answer = match self.number {
            0 => self.consensus.propose_retrying(&command, Instant::now() + PATIENCE).await,
            _ => self.propose(&command).await,
        };
        match answer.map(Outcome::accepted) {
            Ok(Ok(_)) => self.witness.returned(&key, operation, Action::Write(value)),
            Ok(Err(reject)) => self.witness.fail(format!("a deployment was rejected: {reject}")),
            // Nobody knows, and nobody waits any more.
            Err(_) => return false,
        }
        true
    }

    async fn propose(&mut self, command: &Command) -> Result<Outcome, ProposeError> {
        let begun = Instant::now();
        loop {
            match self.consensus.propose(command).await {
                Err(error) if error.retryable() && begun.elapsed() < PATIENCE => {
                    sleep(Duration::from_millis(self.random.random_range(10..200))).await;
                }
                answer => return answer,
            }
        }
    }

    async fn read(&mut self, key: String) -> bool {
        let operation = self.witness.begun(&key, Action::Read(None));
        let barrier = async {
            match self.planted {
                Some(Planted::ReadWithoutAsking) => Ok(0),
                _ => self.consensus.read_barrier(Instant::now() + PATIENCE).await,
            }
        };
        if barrier.await.is_err() {
            return false;
        }
        let value = register::read(&self.consensus.state(), &key);
        self.witness.returned(&key, operation, Action::Read(value));
        true
    }
}
