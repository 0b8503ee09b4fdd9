//! Who waits for what: proposals by their command's id, reads by their context.
//!
//! A proposal is answered by its id, never by its place in a queue: after a change of leaders the entry at that place may
//! be somebody else's. A caller is never told that a proposal failed once it is in the log, only that its fate is unknown.
use std::collections::BTreeMap;

use cresset_core::{CommandId, Outcome};
use tokio::sync::oneshot;

use super::error::{ProposeError, ReadRefused};

/// Where the answer to a proposal goes.
pub(super) type ProposeReply = oneshot::Sender<Result<Outcome, ProposeError>>;
/// Where the answer to a read goes.
pub(super) type ReadReply = oneshot::Sender<Result<u64, ReadRefused>>;

/// Callers that wait for the commit of what they proposed here.
#[derive(Debug, Default)]
pub(super) struct Pending {
    replies: BTreeMap<CommandId, Vec<ProposeReply>>,
    waiters: usize,
}

impl Pending {
    /// Callers that wait.
    pub(super) fn waiters(&self) -> usize {
        self.waiters
    }

    /// Whether this command is on its way already.
    pub(super) fn holds(&self, id: CommandId) -> bool {
        self.replies.contains_key(&id)
    }

    /// Somebody waits for this command. A retry may wait beside the first attempt.
    pub(super) fn wait(&mut self, id: CommandId, reply: ProposeReply) {
        self.replies.entry(id).or_default().push(reply);
        self.waiters += 1;
    }

    /// A command was applied.
    pub(super) fn settle(&mut self, id: CommandId, outcome: &Outcome) {
        // Nobody waits here if another peer proposed it, or if its caller hung up.
        for reply in self.replies.remove(&id).into_iter().flatten() {
            self.waiters -= 1;
            let _ = reply.send(Ok(outcome.clone()));
        }
    }

    /// This peer doesn't lead any more: what it has in the log may yet be committed by its successor.
    pub(super) fn lost_leadership(&mut self, leader: Option<u64>) {
        self.fail(&ProposeError::Indeterminate { leader });
    }

    /// Nothing will be told to anybody any more.
    pub(super) fn fail(&mut self, error: &ProposeError) {
        self.waiters = 0;
        for reply in std::mem::take(&mut self.replies).into_values().flatten() {
            let _ = reply.send(Err(error.clone()));
        }
    }

    /// Forgets callers that hung up.
    pub(super) fn prune(&mut self) {
        self.replies.retain(|_, replies| {
            replies.retain(|reply| !reply.is_closed());
            !replies.is_empty()
        });
        self.waiters = self.replies.values().map(Vec::len).sum();
    }
}

/// Callers that wait for an index to read at. Those that come together are asked for together.
#[derive(Debug, Default)]
pub(super) struct Reads {
    context_last: u64,
    gathered: Vec<ReadReply>,
    asked: BTreeMap<u64, Vec<ReadReply>>,
}

impl Reads {
    /// Callers that wait.
    pub(super) fn waiters(&self) -> usize {
        self.gathered.len() + self.asked.values().map(Vec::len).sum::<usize>()
    }

    /// Somebody wants to read.
    pub(super) fn gather(&mut self, reply: ReadReply) {
        self.gathered.push(reply);
    }

    /// Asks for all that were gathered, under one new context.
    pub(super) fn ask<E: Into<ReadRefused>>(&mut self, ask: impl FnOnce(u64) -> Result<(), E>) {
        if self.gathered.is_empty() {
            return;
        }
        let replies = std::mem::take(&mut self.gathered);
        self.context_last += 1;
        match ask(self.context_last) {
            Ok(()) => drop(self.asked.insert(self.context_last, replies)),
            Err(error) => refuse(replies, &error.into()),
        }
    }

    /// The leader confirmed a context.
    pub(super) fn settle(&mut self, context: u64, index: u64) {
        for reply in self.asked.remove(&context).into_iter().flatten() {
            let _ = reply.send(Ok(index));
        }
    }

    /// What was asked for will not be answered any more.
    pub(super) fn fail(&mut self, error: &ReadRefused) {
        refuse(std::mem::take(&mut self.asked).into_values().flatten(), error);
        refuse(std::mem::take(&mut self.gathered), error);
    }

    /// Forgets callers that hung up.
    pub(super) fn prune(&mut self) {
        self.asked.retain(|_, replies| {
            replies.retain(|reply| !reply.is_closed());
            !replies.is_empty()
        });
    }
}

fn refuse(replies: impl IntoIterator<Item = ReadReply>, error: &ReadRefused) {
    for reply in replies {
        let _ = reply.send(Err(error.clone()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(n: u8) -> CommandId {
        CommandId([n; 16])
    }

    #[test]
    fn an_outcome_reaches_its_own_callers_only() {
        let mut pending = Pending::default();
        let (first, mut first_answer) = oneshot::channel();
        let (retry, mut retry_answer) = oneshot::channel();
        let (other, mut other_answer) = oneshot::channel();
        pending.wait(id(1), first);
        pending.wait(id(1), retry);
        pending.wait(id(2), other);
        assert_eq!(pending.waiters(), 3);
        let outcome = Outcome::Done { epoch: 7 };
        pending.settle(id(9), &outcome);
        pending.settle(id(1), &outcome);
        assert_eq!(first_answer.try_recv(), Ok(Ok(outcome.clone())));
        assert_eq!(retry_answer.try_recv(), Ok(Ok(outcome)));
        assert!(other_answer.try_recv().is_err());
        pending.lost_leadership(Some(3));
        assert_eq!(other_answer.try_recv(), Ok(Err(ProposeError::Indeterminate { leader: Some(3) })));
        assert_eq!(pending.waiters(), 0);
    }

    #[test]
    fn callers_that_hung_up_are_forgotten() {
        let mut pending = Pending::default();
        let (reply, answer) = oneshot::channel();
        pending.wait(id(1), reply);
        drop(answer);
        pending.prune();
        assert!(!pending.holds(id(1)));
    }

    #[test]
    fn reads_that_come_together_share_a_context() {
        let mut reads = Reads::default();
        let mut answers = Vec::new();
        for _ in 0..3 {
            let (reply, answer) = oneshot::channel();
            reads.gather(reply);
            answers.push(answer);
        }
        let mut asked = Vec::new();
        reads.ask(|context| {
            asked.push(context);
            Ok::<(), ReadRefused>(())
        });
        reads.ask(|_| -> Result<(), ReadRefused> { panic!("there is nothing left to ask for") });
        assert_eq!(asked, [1]);
        reads.settle(1, 42);
        for mut answer in answers {
            assert_eq!(answer.try_recv(), Ok(Ok(42)));
        }
    }
}
