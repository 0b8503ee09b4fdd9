//! A simulated coordinator: the shipped node, and who waits for it.
use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash, Hasher},
    rc::Rc,
};

use bytes::Bytes;
use cresset_coordinator::consensus::{self, ElectionDraw, Envelope, Node, NotTaken, Role, Settings, Sink};
use cresset_core::{Command, CommandId};

use super::{
    MS, Mutant, SECOND, Us,
    clients::Answer,
    disk::{Disk, Knobs},
    fleet::Duties,
    machine::{Applied, Machine},
    network::Address,
    register,
    world::{Event, World},
};

/// A coordinator, alive or not.
pub(super) struct Peer {
    pub(super) life: u32,
    pub(super) node: Option<Node<Disk, Machine>>,
    /// Where its disk is while it is dead.
    disk: Option<Disk>,
    pub(super) knobs: Rc<Knobs>,
    /// The thread is in a sync until then.
    pub(super) busy_until: Us,
    /// The process is stopped until then.
    pub(super) paused_until: Us,
    /// Its clock's seconds, in thousandths of a true one.
    pub(super) rate_permille: u64,
    waiting: BTreeMap<CommandId, Vec<(Address, u64)>>,
    reads: BTreeMap<u64, Read>,
    context: u64,
    pub(super) duties: Option<Duties>,
    /// Its machine, or its part in the cluster, is gone for good.
    pub(super) is_gone: bool,
}

/// What a read is for.
enum Read {
    Client {
        address: Address,
        operation: u64,
        key: String,
        index: Option<u64>,
    },
    /// A new leader wants to know what its predecessors did.
    CatchUp {
        term: u64,
        index: Option<u64>,
    },
}

/// What the node says in one go.
struct Out {
    knobs: Rc<Knobs>,
    sent: Vec<(Us, Envelope)>,
    applied: Vec<(u64, Applied)>,
    readable: Vec<(u64, u64)>,
}

impl Sink<Applied> for Out {
    fn send(&mut self, envelope: Envelope) {
        // What waits for a sync leaves that much later.
        self.sent.push((self.knobs.spent_us.get(), envelope));
    }
    fn applied(&mut self, index: u64, applied: Applied) {
        self.applied.push((index, applied));
    }
    fn readable(&mut self, context: u64, index: u64) {
        self.readable.push((context, index));
    }
}

impl Peer {
    pub(super) fn new(mutant: Option<Mutant>) -> Self {
        let disk = Disk::new(mutant);
        let knobs = Rc::clone(&disk.knobs);
        Self {
            life: 0,
            node: None,
            disk: Some(disk),
            knobs,
            busy_until: 0,
            paused_until: 0,
            rate_permille: 1_000,
            waiting: BTreeMap::new(),
            reads: BTreeMap::new(),
            context: 0,
            duties: None,
            is_gone: false,
        }
    }

    pub(super) fn leads(&self) -> bool {
        self.node.as_ref().is_some_and(|node| node.status().role == Role::Leader)
    }

    /// Milliseconds on its own clock.
    pub(super) fn clock_ms(&self, now: Us) -> u64 {
        now / MS * self.rate_permille / 1_000
    }
}

fn settings(id: u64, founders: u64) -> Settings {
    let join = id > founders;
    let peers = if join { id..=id } else { 1..=founders };
    let mut settings = Settings::new("simulation", id, peers.map(|id| (id, format!("c{id}:1"))).collect(), "simulated");
    settings.join = join;
    settings.snapshot_entries = 150;
    settings.keep_entries = 20;
    settings
}

fn draw(seed: u64) -> ElectionDraw {
    Box::new(move |round| {
        let mut hash = DefaultHasher::new();
        (seed, round.id, round.term, round.number).hash(&mut hash);
        6 + (hash.finish() % 6) as usize
    })
}

impl World {
    /// Starts a coordinator from its disk. One whose disk is full waits.
    pub(super) fn start(&mut self, id: u64) {
        let (seed, mutant, founders) = (self.scenario.seed, self.scenario.mutant, self.founders);
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if peer.node.is_some() || peer.is_gone {
            return;
        }
        if peer.knobs.full.get() {
            self.after(200 * MS, Event::Restart { peer: id });
            return;
        }
        let Some(disk) = peer.disk.take() else { return };
        let life = peer.life;
        peer.knobs.spent_us.set(0);
        match Node::new(&settings(id, founders), disk, Machine::new(mutant), draw(seed ^ u64::from(life)), &consensus::silent()) {
            Ok(node) => {
                self.checks.restarted(id, node.status().applied);
                peer.node = Some(node);
                self.after(0, Event::Tick { peer: id, life });
                self.after(0, Event::Duty { peer: id, life });
            }
            Err(error) => self.checks.fail(format!("c{id} can't start again: {error}")),
        }
    }

    /// Ends a coordinator's life, and begins the next one after `away`.
    pub(super) fn crash(&mut self, id: u64, away: Us) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let Some(node) = peer.node.take() else { return };
        let mut disk = node.into_store();
        disk.crash(&mut self.random);
        peer.disk = Some(disk);
        peer.life += 1;
        (peer.busy_until, peer.paused_until) = (0, 0);
        peer.waiting.clear();
        peer.reads.clear();
        peer.duties = None;
        self.crashes += 1;
        self.after(away, Event::Restart { peer: id });
    }

    /// Gives a node an input and lets it do all that follows. `None` if it isn't alive.
    pub(super) fn with_node<T>(&mut self, id: u64, input: impl FnOnce(&mut Node<Disk, Machine>) -> T) -> Option<T> {
        let peer = self.peers.get_mut(&id)?;
        let node = peer.node.as_mut()?;
        let result = input(node);
        let applied_before = node.status().applied;
        peer.knobs.spent_us.set(0);
        let mut out = Out { knobs: Rc::clone(&peer.knobs), sent: Vec::new(), applied: Vec::new(), readable: Vec::new() };
        let ended = node.on_ready(&mut out);
        peer.busy_until = self.now + peer.knobs.spent_us.get();
        let status = node.status();
        self.checks.status(&status);
        // What left before a failure has left.
        for (spent, envelope) in out.sent {
            self.transmit(id, spent, envelope);
        }
        let last = out.applied.last().map_or(applied_before, |(index, _)| *index);
        for (index, applied) in out.applied {
            self.checks.applied(id, index, &applied);
            self.answer_waiters(id, &applied.command);
        }
        if status.applied > last {
            self.checks.jumped(id, status.applied);
        }
        self.answer_reads(id, out.readable, status.applied);
        let peer = self.peers.get(&id)?;
        let node = peer.node.as_ref()?;
        self.checks.members(id, status.applied, &node.machine().state.members);
        self.operator.saw(status.applied, &node.machine().state.members);
        if node.is_removed() {
            self.retire(id);
            return Some(result);
        }
        if let Err(error) = ended {
            tracing::trace!(id, %error, "the disk ended a life");
            let away = self.between(100 * MS, 2 * SECOND);
            self.crash(id, away);
        }
        Some(result)
    }

    fn transmit(&mut self, from: u64, spent: Us, envelope: Envelope) {
        let Envelope { to, message, snapshot } = envelope;
        let arrivals = self.network.route(from, to, self.now + spent, &mut self.random);
        if arrivals.is_empty() {
            if snapshot.is_some() {
                self.after(SECOND, Event::SnapshotSent { peer: from, to, arrived: false });
            } else if self.network.is_cut(from, to) {
                self.after(5 * MS, Event::Unreachable { peer: from, to });
            }
        }
        for at in arrivals {
            self.at(at, Event::Message { from, to, message: message.clone(), snapshot: snapshot.clone() });
        }
    }

    pub(super) fn on_message(&mut self, from: u64, to: u64, message: &[u8], snapshot: Option<Bytes>) {
        let carries = snapshot.is_some();
        if self.is_shut_out(from, to) {
            return;
        }
        let taken = self.with_node(to, |node| node.step(from, message, snapshot));
        if let Some(Err(refused)) = &taken {
            // Between honest peers nothing has to be refused but what a newer term made old.
            tracing::trace!(%refused, "refused");
        }
        if carries {
            let arrived = matches!(taken, Some(Ok(()))) && !self.network.is_cut(to, from);
            let after = if arrived { MS } else { SECOND };
            self.after(after, Event::SnapshotSent { peer: from, to, arrived });
        }
    }

    /// A client's write reaches a coordinator.
    pub(super) fn on_propose(&mut self, id: u64, address: Address, operation: u64, command: &Command) {
        let bytes = command.encode();
        // Before the proposal: in a group that needs nobody else it may be applied at once.
        if let Some(peer) = self.peers.get_mut(&id) {
            peer.waiting.entry(command.id).or_default().push((address, operation));
        }
        let Some(taken) = self.with_node(id, |node| node.propose(bytes)) else { return };
        match taken {
            Ok(()) if self.scenario.mutant == Some(Mutant::AnswerAtPropose) => self.answer_waiters(id, command),
            Ok(()) => {}
            Err(why) => {
                if let Some(peer) = self.peers.get_mut(&id) {
                    peer.waiting.remove(&command.id);
                }
                self.reply(id, address, operation, refusal(why));
            }
        }
    }

    /// A client's read reaches a coordinator.
    pub(super) fn on_read(&mut self, id: u64, address: Address, operation: u64, key: String) {
        if self.scenario.mutant == Some(Mutant::ReadFromDeposedLeader) && self.peers.get(&id).is_some_and(Peer::leads) {
            let value = self.value(id, &key);
            return self.reply(id, address, operation, Answer::Value(value));
        }
        let read = Read::Client { address, operation, key, index: None };
        if let Err(why) = self.ask_index(id, read) {
            self.reply(id, address, operation, refusal(why));
        }
    }

    /// Asks for an index on behalf of a new leader.
    pub(super) fn catch_up(&mut self, id: u64, term: u64) {
        let _ = self.ask_index(id, Read::CatchUp { term, index: None });
    }

    fn ask_index(&mut self, id: u64, read: Read) -> Result<(), NotTaken> {
        let Some(peer) = self.peers.get_mut(&id) else { return Ok(()) };
        peer.context += 1;
        let context = peer.context;
        peer.reads.insert(context, read);
        let taken = self.with_node(id, |node| node.read_index(context)).unwrap_or(Ok(()));
        if let (Err(_), Some(peer)) = (&taken, self.peers.get_mut(&id)) {
            peer.reads.remove(&context);
        }
        taken
    }

    fn answer_waiters(&mut self, id: u64, command: &Command) {
        let waiters = self.peers.get_mut(&id).and_then(|peer| peer.waiting.remove(&command.id));
        for (address, operation) in waiters.unwrap_or_default() {
            self.reply(id, address, operation, Answer::Written);
        }
    }

    fn answer_reads(&mut self, id: u64, readable: Vec<(u64, u64)>, applied: u64) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        for (context, at) in readable {
            match peer.reads.get_mut(&context) {
                Some(Read::Client { index, .. } | Read::CatchUp { index, .. }) => *index = Some(at),
                None => {}
            }
        }
        let is_due = |read: &Read| match read {
            Read::Client { index, .. } | Read::CatchUp { index, .. } => index.is_some_and(|index| index <= applied),
        };
        let due: Vec<u64> = peer.reads.iter().filter(|(_, read)| is_due(read)).map(|(context, _)| *context).collect();
        for context in due {
            match self.peers.get_mut(&id).and_then(|peer| peer.reads.remove(&context)) {
                Some(Read::Client { address, operation, key, .. }) => {
                    let value = self.value(id, &key);
                    self.reply(id, address, operation, Answer::Value(value));
                }
                Some(Read::CatchUp { term, .. }) => self.caught_up(id, term),
                None => {}
            }
        }
    }

    /// What a key's register holds on a coordinator.
    fn value(&self, id: u64, key: &str) -> Option<u64> {
        register::read(&self.peers.get(&id)?.node.as_ref()?.machine().state, key)
    }
}

fn refusal(why: NotTaken) -> Answer {
    match why {
        NotTaken::NotLeader { leader } => Answer::NotLeader(leader),
        NotTaken::Changing
        | NotTaken::Overloaded
        | NotTaken::TooLarge { .. }
        | NotTaken::MembersChanging
        | NotTaken::Refused(_) => Answer::NotLeader(None),
    }
}
