//! Clients that write and read registers, one operation after the other, and write down what they saw.
//!
//! A write keeps its command id in every retry, as the
//! command line does.
use std::collections::BTreeMap;

use cresset_core::{Command, CommandId};
use rand::{Rng, seq::IteratorRandom};

use super::{
    END, MS, SECOND, Us,
    network::Address,
    register,
    world::{Event, Request, World},
};
use crate::linearizability::{Action, Operation};

/// Registers.
const KEYS: u32 = 4;
/// At the end nobody writes, so that there is something to settle.
const SETTLE: Us = 5 * SECOND;
/// How long a client tries before it gives an operation up.
const PATIENCE: Us = 8 * SECOND;

/// What a coordinator answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The write is in force.
    Written,
    /// The register holds this.
    Value(Option<u64>),
    /// Somebody else leads, perhaps this one.
    NotLeader(Option<u64>),
}

/// One client.
#[derive(Debug, Default)]
pub(super) struct Client {
    number: u64,
    attempt: u64,
    target: u64,
    /// Whose turn it is after those that hints lead to.
    turn: u64,
    /// The target is hinted at.
    is_hinted: bool,
    under_way: Option<UnderWay>,
    pub(super) answered_at: Us,
}

#[derive(Debug)]
struct UnderWay {
    key: String,
    invoked: Us,
    what: What,
}

#[derive(Debug)]
enum What {
    Write { command: Command, value: u64 },
    Read,
}

/// What all clients saw, by register.
pub(super) type Histories = BTreeMap<String, Vec<Operation>>;

impl World {
    /// A client's time has come: to begin, to try again, or to give up.
    pub(super) fn on_client(&mut self, address: Address, attempt: u64) {
        let Some(client) = self.clients.get(&address) else { return };
        if client.attempt != attempt {
            return;
        }
        match &client.under_way {
            Some(under_way) if self.now - under_way.invoked > PATIENCE => {
                self.record(address, None);
                let pause = self.between(50 * MS, 300 * MS);
                self.try_in(address, pause);
            }
            Some(_) => self.send(address),
            None => {
                self.begin(address);
                self.send(address);
            }
        }
    }

    fn begin(&mut self, address: Address) {
        let key = format!("m{}", self.random.random_range(0..KEYS));
        let value = self.values_used + 1;
        // A model that is deployed anew all the time never gets to be ready.
        let may_write = self.now < END - SETTLE;
        let what = if may_write && self.random.random_ratio(3, 5) {
            self.values_used = value;
            let body = register::write(&key, value, self.random.random_range(1..=3));
            let id = self.fresh_id();
            What::Write { command: Command { id, body }, value }
        } else {
            What::Read
        };
        let target = self.existing().into_iter().choose(&mut self.random).unwrap_or(1);
        let now = self.now;
        if let Some(client) = self.clients.get_mut(&address) {
            client.number += 1;
            (client.target, client.is_hinted) = (target, false);
            client.under_way = Some(UnderWay { key, invoked: now, what });
        }
    }

    fn send(&mut self, address: Address) {
        let Some(client) = self.clients.get(&address) else { return };
        let Some(under_way) = &client.under_way else { return };
        let (operation, to) = (client.number, client.target);
        let request = match &under_way.what {
            What::Write { command, .. } => Request::Propose { operation, command: command.clone() },
            What::Read => Request::Read { operation, key: under_way.key.clone() },
        };
        // The next attempt, whatever becomes of this one, is made elsewhere: at each in turn, since some that exist belong to nobody.
        let existing = self.existing();
        if let Some(client) = self.clients.get_mut(&address) {
            // Who is hinted at comes out of turn.
            if !std::mem::take(&mut client.is_hinted) {
                client.turn = existing.iter().find(|id| **id > to).or(existing.first()).copied().unwrap_or(1);
            }
            client.target = client.turn;
        }
        self.request(address, to, request);
        self.try_in(address, SECOND);
    }

    /// Has the client look again after a while, unless something happens before.
    fn try_in(&mut self, address: Address, pause: Us) {
        let Some(client) = self.clients.get_mut(&address) else { return };
        client.attempt += 1;
        let attempt = client.attempt;
        self.after(pause, Event::Client { address, attempt });
    }

    pub(super) fn on_answer(&mut self, address: Address, operation: u64, answer: Answer) {
        let Some(client) = self.clients.get(&address) else { return };
        // A late answer to what was given up, or the second answer to one that was sent twice.
        if client.number != operation || client.under_way.is_none() {
            return;
        }
        if let Answer::NotLeader(hint) = answer {
            let pause = self.between(20 * MS, 80 * MS);
            self.try_in(address, pause);
            if let (Some(hint), Some(client)) = (hint, self.clients.get_mut(&address)) {
                (client.target, client.is_hinted) = (hint, true);
            }
            return;
        }
        self.record(address, Some(answer));
        let pause = self.between(20 * MS, 250 * MS);
        self.try_in(address, pause);
    }

    /// Writes down how an operation ended; `None` if nobody knows.
    fn record(&mut self, address: Address, answer: Option<Answer>) {
        let now = self.now;
        let Some(client) = self.clients.get_mut(&address) else { return };
        let Some(UnderWay { key, invoked, what }) = client.under_way.take() else { return };
        let action = match (&what, answer) {
            (What::Write { value, .. }, None | Some(Answer::Written)) => Action::Write(*value),
            (What::Read, Some(Answer::Value(value))) => Action::Read(value),
            // A read that nobody answered says nothing.
            (What::Read, None) => return,
            (_, Some(answer)) => return self.checks.fail(format!("{what:?} was answered by {answer:?}")),
        };
        if answer.is_some() {
            client.answered_at = now;
            self.answered += 1;
            if let What::Write { command, .. } = &what {
                self.checks.acknowledged(command.id);
            }
        }
        let returned = answer.map(|_| now);
        self.histories.entry(key).or_default().push(Operation { invoked, returned, action });
    }

    /// Ends what is under way: nobody will ever know.
    pub(super) fn give_up(&mut self) {
        let addresses: Vec<Address> = self.clients.keys().copied().collect();
        addresses.into_iter().for_each(|address| self.record(address, None));
    }

    pub(super) fn fresh_id(&mut self) -> CommandId {
        let mut id = [0; 16];
        self.random.fill(&mut id);
        CommandId(id)
    }
}
