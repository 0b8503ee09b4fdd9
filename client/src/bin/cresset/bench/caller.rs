//! One of the requests that are in flight at a time: sends, waits, and keeps its sequence.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::{
    http2::Connection,
    lane::{Lane, Received},
    tally::{Answer, Failure},
    wire::{Head, Payload, Response},
};

static PATH: PathAndQuery = PathAndQuery::from_static("/inference.GRPCInferenceService/ModelInfer");

/// What all callers of a run send.
#[derive(Debug, Clone)]
pub struct Script {
    /// The request but for what differs.
    pub body: Bytes,
    /// How long an answer may take.
    pub limit: Duration,
    /// Whether the server is told so.
    pub tells_deadline: bool,
    /// Requests of one sequence, if they are sequences.
    pub sequence_length: Option<u32>,
    /// The model is decoupled: its last response has to say so.
    pub wants_final: bool,
    /// The first answers, if later ones are compared with them.
    pub first: Option<Arc<FirstAnswers>>,
}

/// The first answer; in a sequence, the first at each position.
#[derive(Debug, Default)]
pub struct FirstAnswers(Mutex<HashMap<u32, Vec<Bytes>>>);

impl FirstAnswers {
    /// Whether these outputs are the same as the first ones at that position.
    fn matches(&self, position: u32, outputs: Vec<Bytes>) -> bool {
        let mut first = self.0.lock();
        match first.get(&position) {
            Some(expected) => *expected == outputs,
            None => {
                // Copies, or each would keep a whole read buffer alive.
                first.insert(position, outputs.iter().map(|output| Bytes::copy_from_slice(output)).collect());
                true
            }
        }
    }
}

/// Numbers that are used once in a thread.
#[derive(Debug)]
pub struct Numbers {
    id: Cell<u64>,
    sequence: Cell<i64>,
}

impl Numbers {
    /// Sequence ids begin after `base`.
    pub fn after(base: i64) -> Self {
        Self { id: Cell::new(0), sequence: Cell::new(base) }
    }

    fn id(&self) -> u64 {
        self.id.set(self.id.get() + 1);
        self.id.get()
    }

    fn sequence(&self) -> i64 {
        self.sequence.set(self.sequence.get() + 1);
        self.sequence.get()
    }
}

/// How requests go.
pub enum Way {
    /// Each a call of its own.
    Unary(Rc<Connection>),
    /// On a stream that several callers share.
    Stream(Rc<RefCell<Lane>>),
}

/// Sends one request at a time.
pub struct Caller {
    script: Rc<Script>,
    numbers: Rc<Numbers>,
    way: Way,
    /// The sequence that is open, and the position of its next request.
    sequence: Option<(i64, u32)>,
}

impl Caller {
    /// A caller that goes this way.
    pub fn new(script: Rc<Script>, numbers: Rc<Numbers>, way: Way) -> Self {
        Self { script, numbers, way, sequence: None }
    }

    /// Sends the next request and waits for all of its answer.
    pub async fn call(&mut self) -> Result<Answer, Failure> {
        let Some(length) = self.script.sequence_length else { return self.send(None, 0).await };
        let (id, position) = self.sequence.take().unwrap_or_else(|| (self.numbers.sequence(), 0));
        let is_last = position + 1 >= length;
        // After a failure the sequence is in no known state: the next request begins another.
        let answer = self.send(Some((id, position == 0, is_last)), position).await?;
        self.sequence = (!is_last).then_some((id, position + 1));
        Ok(answer)
    }

    /// Ends the sequence that is open, so that the server needn't wait for it.
    pub async fn finish(&mut self) {
        if let Some((id, position)) = self.sequence.take() {
            // It is not measured, and a server that has forgotten the sequence is as good.
            let _ = self.send(Some((id, false, true)), position).await;
        }
    }

    async fn send(&mut self, sequence: Option<(i64, bool, bool)>, position: u32) -> Result<Answer, Failure> {
        let script = &self.script;
        let id = if matches!(self.way, Way::Stream(_)) { self.numbers.id() } else { 0 };
        let head = Head { id, sequence, wants_final: script.wants_final && id > 0 };
        let payload = Payload { head: head.encode(), body: script.body.clone() };
        let sent = async {
            match &self.way {
                Way::Unary(connection) => unary(connection, script, payload).await,
                Way::Stream(lane) => {
                    let ticket = lane.borrow_mut().ticket(id);
                    ticket.call(payload).await
                }
            }
        };
        let received = timeout(script.limit, sent).await.map_err(|_| Failure {
            code: "DEADLINE_EXCEEDED",
            message: format!("no answer within {}", crate::output::seconds(script.limit)),
        })??;
        let matches = script.first.as_ref().is_none_or(|first| first.matches(position, received.outputs));
        Ok(Answer { responses: received.responses, matches })
    }
}

async fn unary(connection: &Connection, script: &Script, payload: Payload) -> Result<Received, Failure> {
    let deadline = script.tells_deadline.then_some(script.limit);
    let answer = connection.unary(&PATH, deadline, payload).await?;
    let outputs = match script.first {
        Some(_) => Response::read(answer)?.into_outputs(),
        None => Vec::new(),
    };
    Ok(Received { responses: 1, outputs })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_answer_at_each_position_is_the_measure() {
        let first = FirstAnswers::default();
        let outputs = |text: &'static str| vec![Bytes::from_static(text.as_bytes())];
        assert!(first.matches(0, outputs("a")) && first.matches(1, outputs("b")));
        assert!(first.matches(0, outputs("a")) && !first.matches(1, outputs("a")) && !first.matches(0, vec![]));
    }
}
