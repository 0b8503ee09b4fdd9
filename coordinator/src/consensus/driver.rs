//! The owner of the node: inputs and time go in, messages, answers and published values come out.
//!
//! A task that has a thread for itself, since every step may have to wait for the disk, and nothing else may wait for it. It
//! never waits for the network or for a caller: queues that are full lose messages, which Raft repairs, and refuse callers.
use std::{io, thread, time::Duration};

use cresset_core::{
    CommandId, Effect, PeerId,
    level::{Level, Needs},
    members::MemberChange,
};
use tokio::{
    runtime,
    sync::{broadcast, oneshot},
    time::Instant,
};
use tracing::{debug, error, info, warn};

use super::{
    announced::Announced,
    error::{ProposeError, ReadRefused},
    handle::DriverHandle,
    inbox::{Arrivals, Input},
    log::LogStore,
    machine::{Answer, Shared},
    node::{Envelope, Node, NodeError, NotTaken, Refusal, Role, Sink},
    pending::{Pending, ProposeReply, Reads},
    published::Published,
    settings::Settings,
    space::Space,
    transport::Links,
};

/// Inputs that are taken together, and so share a write and a sync.
const BATCH_INPUTS_MAX: usize = 256;
/// Between two times that a leader without room for its log hands over.
const HAND_OVER_AGAIN: Duration = Duration::from_secs(30);
/// How often the log may do work that needs no batch, and callers that hung up are forgotten.
const HOUSEKEEPING: Duration = Duration::from_secs(1);

/// The owner of the node.
pub(super) struct Driver<L: LogStore> {
    node: Node<L, Shared>,
    arrivals: Arrivals,
    outbox: Outbox,
    published: Published,
    announced: Announced,
    level_known: Level,
    tick: Duration,
    waiters_max: usize,
    space: Space,
    is_braked: bool,
    /// When leadership was last handed over for that.
    handed_over: Option<Instant>,
}

/// Where the node's outputs go.
struct Outbox {
    links: Links,
    pending: Pending,
    reads: Reads,
    effects: broadcast::Sender<(u64, Effect)>,
    lost: Vec<Lost>,
}

/// Something that could not even be queued.
enum Lost {
    Message { to: u64 },
    Snapshot { to: u64 },
}

impl Sink<Answer> for Outbox {
    fn send(&mut self, envelope: Envelope) {
        let to = envelope.to;
        let lost = if envelope.snapshot.is_some() { Lost::Snapshot { to } } else { Lost::Message { to } };
        if !self.links.send(envelope) {
            self.lost.push(lost);
        }
    }

    fn applied(&mut self, index: u64, answer: Answer) {
        self.pending.settle(answer.id, &answer.outcome);
        for effect in answer.effects {
            // Nobody may be listening.
            let _ = self.effects.send((index, effect));
        }
    }

    fn readable(&mut self, context: u64, index: u64) {
        self.reads.settle(context, index);
    }
}

impl<L: LogStore> Driver<L> {
    pub(super) fn new(
        node: Node<L, Shared>,
        arrivals: Arrivals,
        links: Links,
        published: Published,
        announced: Announced,
        settings: &Settings,
    ) -> Self {
        let space = Space::new(&settings.data_dir, settings.disk_kept_bytes);
        let effects = published.effects.clone();
        let (pending, reads) = (Pending::default(), Reads::default());
        let outbox = Outbox { links, pending, reads, effects, lost: Vec::new() };
        Self {
            node,
            arrivals,
            outbox,
            published,
            announced,
            level_known: settings.level_known,
            tick: settings.tick,
            waiters_max: settings.waiters_max,
            space,
            is_braked: false,
            handed_over: None,
        }
    }

    /// Runs until it is told to stop, or until the log fails.
    pub(super) async fn run(mut self) -> Result<(), NodeError> {
        let result = self.turns().await;
        if let Err(error) = &result {
            error!(%error, "consensus has failed; this coordinator can't go on");
        }
        self.outbox.pending.fail(&ProposeError::Indeterminate { leader: None });
        self.outbox.reads.fail(&ReadRefused::Shutdown);
        result
    }

    async fn turns(&mut self) -> Result<(), NodeError> {
        let mut tick_due = Instant::now() + self.tick;
        let mut housekeeping_due = Instant::now() + HOUSEKEEPING;
        self.outbox.links.follow(&self.node.machine().state().read());
        // What was committed before a restart is applied before anybody is let in.
        self.settle()?;
        loop {
            let Ok(mut input) = self.arrivals.next(tick_due).await else { break };
            if input.is_some() {
                self.mind_space();
            }
            for _ in 0..BATCH_INPUTS_MAX {
                match input {
                    Some(Input::Stop) => return Ok(self.node.store_mut().checkpoint()?),
                    Some(other) => self.take(other)?,
                    None => break,
                }
                input = self.arrivals.waiting();
            }
            let now = Instant::now();
            if now >= tick_due {
                self.node.tick();
                // A process that was paused must not live through the lost time in a burst: it would stand for
                // election before it has read what its leader sent meanwhile.
                tick_due = (tick_due + self.tick).max(now);
            }
            self.settle()?;
            if now >= housekeeping_due {
                housekeeping_due = now + HOUSEKEEPING;
                self.outbox.pending.prune();
                self.outbox.reads.prune();
                self.node.store_mut().checkpoint()?;
            }
        }
        Ok(self.node.store_mut().checkpoint()?)
    }

    /// Stops what makes the log grow before its disk is full. A leader hands over to one that may have room; not too often, since
    /// the others may have none either.
    fn mind_space(&mut self) {
        let lacks = self.space.lacks();
        let status = self.node.status();
        if lacks.is_some() != self.is_braked {
            self.is_braked = lacks.is_some();
            self.node.brake(lacks.map(|free_bytes| Refusal::DiskFull { peer: status.id, free_mib: free_bytes >> 20 }));
        }
        let is_due = self.handed_over.is_none_or(|at| at.elapsed() > HAND_OVER_AGAIN);
        if self.is_braked && status.role == Role::Leader && is_due {
            self.handed_over = Some(Instant::now());
            if let Err(why) = self.node.transfer_leader(None) {
                debug!(%why, "leadership isn't handed over");
            }
        }
    }

    fn take(&mut self, input: Input) -> Result<(), NodeError> {
        match input {
            Input::Propose { id, command, needs, change, reply } => self.propose(id, command, needs, change.as_ref(), reply),
            Input::Read { reply } => {
                if self.outbox.reads.waiters() >= self.waiters_max {
                    let _ = reply.send(Err(ReadRefused::Overloaded));
                } else {
                    self.outbox.reads.gather(reply);
                }
            }
            Input::Message { from, message } => {
                if let Err(refused) = self.node.step(from, &message, None) {
                    warn!(%refused, "dropped a message of a peer");
                }
            }
            Input::Snapshot { from, message, data, taken } => {
                let result = self.node.step(from, &message, Some(data));
                // The answer says that it is on the disk, so the disk comes first.
                self.node.on_ready(&mut self.outbox)?;
                let _ = taken.send(result);
            }
            Input::Unreachable { peer } => self.node.report_unreachable(peer),
            Input::SnapshotSent { peer, arrived } => {
                debug!(peer, arrived, "snapshot sent");
                self.node.report_snapshot(peer, arrived);
            }
            Input::TransferLeadership { to, reply } => drop(reply.send(self.node.transfer_leader(to))),
            Input::Members { reply } => drop(reply.send(self.node.members_seen())),
            Input::Removed { by } => {
                warn!(by, "a member of the cluster says that this coordinator was removed");
                return Err(NodeError::Removed { id: self.node.status().id });
            }
            Input::Outdated { by, level } => {
                warn!(
                    by,
                    level, "a member of the cluster says that a feature level is in force that this coordinator doesn't know"
                );
                return Err(NodeError::Outdated { id: self.node.status().id, level, known: self.level_known });
            }
            // Handled by the loop.
            Input::Stop => {}
        }
        Ok(())
    }

    fn propose(&mut self, id: CommandId, command: Vec<u8>, needs: Needs, change: Option<&MemberChange>, reply: ProposeReply) {
        if self.outbox.pending.waiters() >= self.waiters_max {
            return drop(reply.send(Err(ProposeError::Overloaded)));
        }
        if self.outbox.pending.holds(id) {
            return self.outbox.pending.wait(id, reply);
        }
        if let Err(why) = self.check_level(needs, change) {
            return drop(reply.send(Err(why.into())));
        }
        let taken = match change {
            None => self.node.propose(command),
            Some(change) => {
                // What was done is answered as it was then, before it is asked whether it could be done now.
                let answered = self.node.machine().state().read().remembered.get(&id).cloned();
                if let Some(outcome) = answered {
                    return drop(reply.send(Ok(outcome)));
                }
                self.node.propose_change(command, change)
            }
        };
        match taken {
            Ok(()) => self.outbox.pending.wait(id, reply),
            Err(why) => drop(reply.send(Err(why.into()))),
        }
    }

    /// Whether every member can read the command, and a coordinator that is to vote what comes after it. Only a leader that has
    /// applied all that it knows to be committed can tell; another one finds out that it doesn't lead.
    fn check_level(&self, needs: Needs, change: Option<&MemberChange>) -> Result<(), NotTaken> {
        let status = self.node.status();
        if status.role != Role::Leader {
            return Ok(());
        }
        let level = self.node.machine().state().read().level;
        if let Err(too_low) = needs.met_by(level) {
            // A new leader may just not have come to where its predecessor raised it.
            return Err(if self.node.is_current() { Refusal::from(too_low).into() } else { NotTaken::Changing });
        }
        if let Some(MemberChange::Promote { peer: PeerId(peer), .. }) = change
            && let Some(known) = self.announced.last(*peer).filter(|known| *known < level)
        {
            return Err(Refusal::Outdated { peer: *peer, known, level }.into());
        }
        Ok(())
    }

    /// Does what the inputs ask for, and tells everybody where things stand.
    fn settle(&mut self) -> Result<(), NodeError> {
        let node = &mut self.node;
        self.outbox.reads.ask(|context| node.read_index(context));
        node.on_ready(&mut self.outbox)?;
        if node.status().applied != self.published.last().applied {
            self.outbox.links.follow(&node.machine().state().read());
        }
        for lost in std::mem::take(&mut self.outbox.lost) {
            match lost {
                Lost::Message { to } => node.report_unreachable(to),
                Lost::Snapshot { to } => node.report_snapshot(to, false),
            }
        }
        self.publish();
        if self.node.is_removed() {
            return Err(NodeError::Removed { id: self.node.status().id });
        }
        Ok(())
    }

    fn publish(&mut self) {
        let now = self.node.status();
        let before = self.published.last();
        if before == now {
            return;
        }
        if (before.role, before.term, before.leader) != (now.role, now.term, now.leader) {
            let leader = now.leader.map_or_else(|| "nobody".to_owned(), |id| format!("c{id}"));
            info!(role = %now.role, term = now.term, leader, commit = now.commit, "raft role");
        }
        let led = before.role == Role::Leader;
        if led && (now.role != Role::Leader || now.term != before.term) {
            self.outbox.pending.lost_leadership(now.leader);
            self.outbox.reads.fail(&ReadRefused::NotLeader { leader: now.leader });
        }
        let epoch = self.node.machine().state().read().epoch;
        self.published.tell(now, epoch);
    }
}

/// Gives a driver a thread of its own.
///
/// # Errors
/// If there can't be another thread, or no more of what one needs.
pub(super) fn on_own_thread<D>(driver: D) -> io::Result<DriverHandle>
where
    D: Future<Output = Result<(), NodeError>> + Send + 'static,
{
    let (ended_sender, ended) = oneshot::channel();
    let runtime = runtime::Builder::new_current_thread().enable_time().build()?;
    let thread = thread::Builder::new().name("raft".to_owned()).spawn(move || {
        let _abort = AbortOnPanic;
        let _ = ended_sender.send(runtime.block_on(driver));
    })?;
    Ok(DriverHandle { thread: Some(thread), ended })
}

/// A panic in here means that a promise may be broken: nobody may catch it, and the process ends.
struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            error!("consensus panicked; aborting this process, since it can't be trusted any more");
            std::process::abort();
        }
    }
}
