//! The open sequences of a router, by model and sequence id.
//!
//! A sequence opens with START, and every later request finds its session here, whether it comes by a unary call or on any
//! stream. The session itself (see `sequence`) is a task; here is only the way into it, with its bounds.
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use cresset_proto::{
    ids::SequenceId,
    inference::{ModelInferRequest, ModelInferResponse},
    parameters::Parameters,
    reason::Reason,
};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot, watch},
    time::Instant,
};
use tonic::Status;

use super::{
    CallOptions, Inner,
    call::deadline_exceeded,
    resumable::{self, Mark, Resumable, taken_over},
    sequence::Session,
};
use crate::{
    balance,
    journal::Journal,
    routes::{ModelRoute, Version},
};

/// Where a request's answer goes.
pub(super) type Reply = oneshot::Sender<Result<ModelInferResponse, Status>>;

/// A sequence's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) model: String,
    /// What the client calls its stream, if it can go on with it elsewhere.
    pub(super) stream: Option<String>,
    pub(super) sequence: SequenceId,
}

impl Key {
    /// Where in the order of replicas it belongs.
    pub(super) fn place(&self) -> u64 {
        balance::id_of(&format!("{}/{}", self.model, self.sequence))
    }
}

/// One request on its way into a session.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) request: ModelInferRequest,
    pub(super) mark: Option<Mark>,
    pub(super) deadline: Instant,
    pub(super) reply: Reply,
    /// Held until the answer is there: what bounds the requests under way.
    pub(super) permits: [OwnedSemaphorePermit; 2],
}

#[derive(Debug, Clone)]
struct Handle {
    /// Tells this session from a later one of the same name.
    id: u64,
    version: u64,
    /// Of a client that numbers its requests: its last attempt, and the first ordinal and the last one that were taken.
    attempt: Arc<AtomicU64>,
    first: u64,
    taken: Arc<AtomicU64>,
    inbox: mpsc::Sender<Ask>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

/// All open sequences.
#[derive(Debug)]
pub(super) struct Sessions {
    table: Mutex<Table>,
    live: watch::Sender<usize>,
    /// Bytes in all journals together, with the answers that are kept.
    pub(super) journals_bytes: AtomicUsize,
    checkpoints_bytes: AtomicU64,
    taken_up: AtomicU64,
}

/// What sequences cost and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceFigures {
    /// Sequences that are open.
    pub live: usize,
    /// Bytes that their journals hold, with the answers that are kept.
    pub journals_bytes: usize,
    /// Bytes of checkpoints that came, since the start.
    pub checkpoints_bytes: u64,
    /// Sequences that were taken up again from another router, since the start.
    pub taken_up: u64,
}

#[derive(Debug, Default)]
struct Table {
    next_id: u64,
    by_key: HashMap<Key, Handle>,
}

impl Sessions {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::default(),
            live: watch::Sender::new(0),
            journals_bytes: AtomicUsize::new(0),
            checkpoints_bytes: AtomicU64::new(0),
            taken_up: AtomicU64::new(0),
        }
    }

    pub(super) fn figures(&self) -> SequenceFigures {
        SequenceFigures {
            live: *self.live.borrow(),
            journals_bytes: self.journals_bytes.load(Ordering::Relaxed),
            checkpoints_bytes: self.checkpoints_bytes.load(Ordering::Relaxed),
            taken_up: self.taken_up.load(Ordering::Relaxed),
        }
    }

    /// Counts a checkpoint that came.
    pub(super) fn count_checkpoint(&self, bytes: usize) {
        self.checkpoints_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    pub(super) fn live(&self) -> watch::Receiver<usize> {
        self.live.subscribe()
    }

    /// Takes a session out, if it is still the one of that name.
    pub(super) fn close(&self, key: &Key, id: u64) {
        let mut table = self.table.lock();
        if table.by_key.get(key).is_some_and(|handle| handle.id == id) {
            table.by_key.remove(key);
            self.live.send_replace(table.by_key.len());
        }
    }

    fn find(&self, key: &Key) -> Option<Handle> {
        self.table.lock().by_key.get(key).cloned()
    }

    /// Counts a change of one journal's size.
    pub(super) fn count_bytes(&self, before: usize, after: usize) {
        if after >= before {
            self.journals_bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.journals_bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }
}

/// Hands a request to its session, opening or closing that as the request says. Waits while the session has as much under
/// way as it may; calls that are made one after the other keep their order.
pub(super) async fn submit(
    router: &Arc<Inner>,
    route: &ModelRoute,
    version: Version,
    request: ModelInferRequest,
    parameters: Parameters,
    options: &CallOptions,
    deadline: Instant,
) -> Result<oneshot::Receiver<Result<ModelInferResponse, Status>>, Status> {
    let mark = Mark::read(&parameters)?;
    let Some(sequence) = parameters.sequence_id else {
        let text = format!("inference request to model '{}' must specify a non-zero or non-empty correlation ID", route.name);
        return Err(Reason::InvalidArgument.status(text));
    };
    let key = Key { model: route.name.clone(), stream: parameters.stream_id, sequence };
    let open = router.sessions.find(&key);
    if let (Some(handle), Some(mark)) = (&open, mark)
        && handle.attempt.fetch_max(mark.attempt, Ordering::AcqRel) > mark.attempt
    {
        return Err(taken_over(&key));
    }
    let handle = if parameters.sequence_start {
        open_new(router, &key, route, options, mark)?
    } else {
        let handle = match (open.filter(|handle| mark.is_none_or(|mark| handle.is_up_to(mark))), mark) {
            (Some(handle), _) => handle,
            (None, Some(mark)) => open_again(router, &key, options, mark, deadline).await?,
            (None, None) => return Err(not_started(&key)),
        };
        // It keeps to the version that it began with, wherever its label points by now.
        if matches!(version, Version::Exactly(version) if version != handle.version) {
            return Err(not_started(&key));
        }
        handle
    };
    let bytes = u32::try_from(request.encoded_len()).unwrap_or(u32::MAX).clamp(1, router.settings.session_bytes_max.max(1));
    let acquire = async {
        let one = Arc::clone(&handle.requests).acquire_owned().await;
        let bytes = Arc::clone(&handle.bytes).acquire_many_owned(bytes).await;
        one.and_then(|one| bytes.map(|bytes| [one, bytes]))
    };
    let permits = match tokio::time::timeout_at(deadline, acquire).await {
        Ok(Ok(permits)) => permits,
        Ok(Err(_)) => return Err(not_started(&key)),
        Err(_) => return Err(deadline_exceeded(&key.model)),
    };
    let (reply, answer) = oneshot::channel();
    let ask = Ask { request, mark, deadline, reply, permits };
    // There is room: the inbox is as long as there are permits. So a failure means that the session is over.
    handle.inbox.try_send(ask).map_err(|_| not_started(&key))?;
    handle.taken.fetch_max(mark.map_or(0, |mark| mark.ordinal), Ordering::AcqRel);
    if parameters.sequence_end {
        router.sessions.close(&key, handle.id);
    }
    Ok(answer)
}

impl Handle {
    /// Whether a request that isn't a first one belongs to this session. A client that was elsewhere meanwhile has answers that
    /// this session knows nothing of; and one may go on with what came before a sequence of the same id.
    fn is_up_to(&self, mark: Mark) -> bool {
        mark.ordinal > self.first && mark.ack <= self.taken.load(Ordering::Acquire)
    }
}

/// How a session begins.
pub(super) struct Beginning {
    pub(super) id: u64,
    pub(super) version: u64,
    pub(super) generation: u64,
    pub(super) journal: Journal,
    pub(super) resumable: Option<Resumable>,
    /// The last ordinal that was taken.
    pub(super) taken: u64,
    pub(super) inbox: mpsc::Receiver<Ask>,
}

/// Opens a session with a new sequence.
fn open_new(
    router: &Arc<Inner>,
    key: &Key,
    route: &ModelRoute,
    options: &CallOptions,
    mark: Option<Mark>,
) -> Result<Handle, Status> {
    let journal = Journal::new(router.settings.journal);
    let resumable = mark.and_then(|mark| Resumable::begin(key, mark));
    let mark = mark.unwrap_or(Mark { ordinal: 0, ack: 0, attempt: 0 });
    let deployed = (route.version, route.generation);
    let (beginning, handle) = enroll(router, key, deployed, (mark, mark.ordinal, 0), journal, resumable)?;
    tokio::spawn(Session::new(Arc::clone(router), key.clone(), beginning, route, options.clone()).run());
    Ok(handle)
}

/// Opens a session with a sequence whose router is gone, from what its worker holds.
async fn open_again(
    router: &Arc<Inner>,
    key: &Key,
    options: &CallOptions,
    mark: Mark,
    deadline: Instant,
) -> Result<Handle, Status> {
    let mut held = resumable::take(router, key, mark, deadline).await?;
    let table = router.routes.table();
    let Some(route) = table.model(&key.model, Version::Exactly(held.version)) else {
        let text = format!("version {} of model '{}' isn't served any more", held.version, key.model);
        return Err(Reason::SequenceLost.status(text));
    };
    tracing::debug!(model = %key.model, sequence = %key.sequence, after = held.applied, "a sequence is taken up again");
    router.sessions.taken_up.fetch_add(1, Ordering::Relaxed);
    let resumable = Resumable::again(key, mark, &mut held);
    let journal = match held.checkpoint.take() {
        Some(state) => Journal::from_checkpoint(router.settings.journal, state),
        None => Journal::new(router.settings.journal),
    };
    let deployed = (held.version, held.generation);
    let (beginning, handle) = enroll(router, key, deployed, (mark, held.first, held.applied), journal, resumable)?;
    tokio::spawn(Session::new(Arc::clone(router), key.clone(), beginning, route, options.clone()).run());
    Ok(handle)
}

/// Enters a session into the table. An older one of the same name finishes what it has and gets nothing more.
fn enroll(
    router: &Arc<Inner>,
    key: &Key,
    (version, generation): (u64, u64),
    (mark, first, taken): (Mark, u64, u64),
    journal: Journal,
    resumable: Option<Resumable>,
) -> Result<(Beginning, Handle), Status> {
    let settings = &router.settings;
    let mut table = router.sessions.table.lock();
    let replaced = table.by_key.contains_key(key);
    if !replaced && table.by_key.len() >= settings.sessions_max {
        let text = format!(
            "no room for one more sequence of model '{}': {} are open, the limit is sessions_max; end some, or try again later",
            key.model, settings.sessions_max
        );
        return Err(Reason::SequencesFull.status(text));
    }
    if replaced && resumable.is_none() {
        tracing::warn!(model = %key.model, sequence = %key.sequence, "START of a sequence that is open; the old one is dropped");
    }
    table.next_id += 1;
    let requests_max = settings.session_requests_max.max(1) as usize;
    let (inbox, asks) = mpsc::channel(requests_max);
    let handle = Handle {
        id: table.next_id,
        version,
        attempt: Arc::new(mark.attempt.into()),
        first,
        taken: Arc::new(taken.into()),
        inbox,
        requests: Arc::new(Semaphore::new(requests_max)),
        bytes: Arc::new(Semaphore::new(settings.session_bytes_max.max(1) as usize)),
    };
    table.by_key.insert(key.clone(), handle.clone());
    router.sessions.live.send_replace(table.by_key.len());
    let beginning = Beginning { id: handle.id, version, generation, journal, resumable, taken, inbox: asks };
    Ok((beginning, handle))
}

pub(super) fn not_started(key: &Key) -> Status {
    Reason::SequenceNotStarted.status(format!(
        "inference request for sequence {} to model '{}' must specify the START flag on the first request of the sequence",
        key.sequence, key.model
    ))
}
