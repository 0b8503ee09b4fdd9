//! Streams: requests go in one after the other without waiting, answers find their requests by id.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use bytes::Bytes;
use http::uri::PathAndQuery;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use super::{
    http2::Connection,
    tally::Failure,
    wire::{Payload, Response, StreamAnswer},
};

static PATH: PathAndQuery = PathAndQuery::from_static("/inference.GRPCInferenceService/ModelStreamInfer");

/// All responses to one request.
#[derive(Debug, Default, PartialEq)]
pub struct Received {
    /// How many there were.
    pub responses: u32,
    /// Their outputs, if they are to be compared.
    pub outputs: Vec<Bytes>,
}

/// Who waits for the answer.
type Waiter = oneshot::Sender<Result<Received, Failure>>;

/// A place for a stream; when one ends, the next request opens another.
pub struct Lane {
    connection: Rc<Connection>,
    open: Option<Open>,
    /// After how many requests a stream is closed, if ever.
    requests_per_stream: Option<u64>,
    /// How many requests can wait to be sent.
    capacity: usize,
    keeps_outputs: bool,
    tasks: TaskTracker,
    opened: u64,
}

struct Open {
    requests: mpsc::Sender<Payload>,
    waiting: Rc<RefCell<Waiting>>,
    sent: u64,
}

/// Where to send a request, and where its answer will be.
pub struct Ticket {
    requests: mpsc::Sender<Payload>,
    answer: oneshot::Receiver<Result<Received, Failure>>,
    waiting: Rc<RefCell<Waiting>>,
    id: u64,
}

impl Ticket {
    /// Sends the request and waits for all of its answer.
    ///
    /// # Errors
    /// The server's, or how the stream ended.
    pub async fn call(self, payload: Payload) -> Result<Received, Failure> {
        let Self { requests, answer, waiting, id } = self;
        // Nobody waits any more once this is dropped; an answer that comes later is not looked at.
        let _forget = Forget { waiting, id };
        // Where the stream has ended meanwhile, whoever ended it has left the reason in `answer`.
        let _ = requests.send(payload).await;
        // The last request of a stream holds it open until here.
        drop(requests);
        answer.await.unwrap_or_else(|_| Err(Failure { code: "UNAVAILABLE", message: "the stream is gone".to_owned() }))
    }
}

/// Takes a request out of those that wait.
struct Forget {
    waiting: Rc<RefCell<Waiting>>,
    id: u64,
}

impl Drop for Forget {
    fn drop(&mut self) {
        self.waiting.borrow_mut().by_id.remove(&self.id);
    }
}

/// Requests of one stream that have no answer yet.
#[derive(Default)]
struct Waiting {
    by_id: BTreeMap<u64, (Waiter, Received)>,
    /// How the stream ended, if it has.
    end: Option<Failure>,
}

impl Waiting {
    /// Gives a response to its request. One that doesn't say whose it is belongs to the oldest.
    fn deliver(&mut self, answer: StreamAnswer, keeps_outputs: bool) {
        let Some(id) = answer.id.or_else(|| self.by_id.keys().next().copied()) else { return };
        let Some((_, received)) = self.by_id.get_mut(&id) else { return };
        let failed = match answer.outputs {
            Ok(Some(response)) => {
                received.responses += 1;
                if keeps_outputs {
                    received.outputs.extend(Response::into_outputs(response));
                }
                None
            }
            Ok(None) => None,
            Err(failure) => Some(failure),
        };
        if answer.is_last
            && let Some((waiter, received)) = self.by_id.remove(&id)
        {
            // One who went away in this very moment needs no answer.
            let _ = waiter.send(failed.map_or(Ok(received), Err));
        }
    }

    fn end(&mut self, failure: &Failure) {
        for (waiter, _) in std::mem::take(&mut self.by_id).into_values() {
            let _ = waiter.send(Err(failure.clone()));
        }
        self.end = Some(failure.clone());
    }
}

impl Lane {
    /// A lane on this connection, with no stream yet. Its streams run as `tasks`.
    pub fn new(
        connection: Rc<Connection>,
        requests_per_stream: Option<u64>,
        capacity: usize,
        keeps: bool,
        tasks: TaskTracker,
    ) -> Self {
        Self { connection, open: None, requests_per_stream, capacity: capacity.max(1), keeps_outputs: keeps, tasks, opened: 0 }
    }

    /// Streams that were opened.
    pub fn opened(&self) -> u64 {
        self.opened
    }

    /// A place on the stream for the request with this id.
    pub fn ticket(&mut self, id: u64) -> Ticket {
        let mut open = match self.open.take().filter(|open| open.waiting.borrow_mut().end.is_none()) {
            Some(open) => open,
            None => self.open_stream(),
        };
        let (waiter, answer) = oneshot::channel();
        open.waiting.borrow_mut().by_id.insert(id, (waiter, Received::default()));
        let ticket = Ticket { requests: open.requests.clone(), answer, waiting: Rc::clone(&open.waiting), id };
        open.sent += 1;
        // Without this sender the stream ends for the server when the last ticket has sent its request.
        self.open = Some(open).filter(|open| self.requests_per_stream.is_none_or(|most| open.sent < most));
        ticket
    }

    fn open_stream(&mut self) -> Open {
        let (requests, outgoing) = mpsc::channel(self.capacity);
        let waiting = Rc::new(RefCell::new(Waiting::default()));
        let (connection, followed, keeps_outputs) = (Rc::clone(&self.connection), Rc::clone(&waiting), self.keeps_outputs);
        self.tasks.spawn_local(async move {
            let deliver = |bytes| {
                followed.borrow_mut().deliver(StreamAnswer::read(bytes)?, keeps_outputs);
                Ok(())
            };
            let end = match connection.stream(&PATH, outgoing, deliver).await {
                Ok(()) => Failure { code: "UNAVAILABLE", message: "the stream ended before its answer".to_owned() },
                Err(failure) => failure,
            };
            followed.borrow_mut().end(&end);
        });
        self.opened += 1;
        Open { requests, waiting, sent: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(id: Option<u64>, is_last: bool, outputs: Result<Option<Response>, Failure>) -> StreamAnswer {
        StreamAnswer { id, is_last, outputs }
    }

    fn wait(waiting: &mut Waiting, id: u64) -> oneshot::Receiver<Result<Received, Failure>> {
        let (waiter, answer) = oneshot::channel();
        waiting.by_id.insert(id, (waiter, Received::default()));
        answer
    }

    #[test]
    fn answers_find_their_requests_in_any_order() {
        let mut waiting = Waiting::default();
        let (mut first, mut second) = (wait(&mut waiting, 1), wait(&mut waiting, 2));
        waiting.deliver(answer(Some(2), true, Ok(Some(Response::default()))), false);
        assert!(first.try_recv().is_err());
        assert_eq!(second.try_recv().unwrap().unwrap().responses, 1);
        waiting.deliver(answer(Some(2), true, Ok(Some(Response::default()))), false);
        for _ in 0..3 {
            waiting.deliver(answer(Some(1), false, Ok(Some(Response::default()))), false);
        }
        waiting.deliver(answer(Some(1), true, Ok(None)), false);
        assert_eq!(first.try_recv().unwrap().unwrap().responses, 3, "the flag alone is no response");
        assert!(waiting.by_id.is_empty());
    }

    #[test]
    fn an_error_without_an_id_is_the_oldest_ones() {
        let mut waiting = Waiting::default();
        let (mut first, mut second) = (wait(&mut waiting, 1), wait(&mut waiting, 2));
        let failure = Failure { code: "STREAM_ERROR", message: "x".into() };
        waiting.deliver(answer(None, true, Err(failure.clone())), false);
        assert_eq!(first.try_recv().unwrap(), Err(failure));
        let end = Failure { code: "UNAVAILABLE", message: "over".into() };
        waiting.end(&end);
        assert_eq!(second.try_recv().unwrap(), Err(end));
    }
}
