//! The open sequences of a router, by model and sequence id.
//!
//! A sequence opens with START, and every later request finds its session here, whether it comes by a unary call or on any
//! stream. The session itself (see `sequence`) is a task; here is only the way into it, with its bounds.
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
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

use super::{CallOptions, Inner, call::deadline_exceeded, sequence::Session};
use crate::routes::{ModelRoute, Version};

/// Where a request's answer goes.
pub(super) type Reply = oneshot::Sender<Result<ModelInferResponse, Status>>;

/// A sequence's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) model: String,
    pub(super) sequence: SequenceId,
}

/// One request on its way into a session.
#[derive(Debug)]
pub(super) struct Ask {
    pub(super) request: ModelInferRequest,
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
    inbox: mpsc::Sender<Ask>,
    requests: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

/// All open sequences.
#[derive(Debug)]
pub(super) struct Sessions {
    table: Mutex<Table>,
    live: watch::Sender<usize>,
    /// Bytes in all journals together.
    pub(super) journals_bytes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Table {
    next_id: u64,
    by_key: HashMap<Key, Handle>,
}

impl Sessions {
    pub(super) fn new() -> Self {
        Self { table: Mutex::default(), live: watch::Sender::new(0), journals_bytes: AtomicUsize::new(0) }
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
    let Some(sequence) = parameters.sequence_id else {
        let text = format!("inference request to model '{}' must specify a non-zero or non-empty correlation ID", route.name);
        return Err(Reason::InvalidArgument.status(text));
    };
    let key = Key { model: route.name.clone(), sequence };
    let handle = if parameters.sequence_start {
        open(router, &key, route, options)?
    } else {
        let wanted = |handle: &Handle| match version {
            // It keeps to the version that it began with, wherever its label points by now.
            Version::Highest | Version::Label(_) => true,
            Version::Exactly(version) => version == handle.version,
        };
        router.sessions.find(&key).filter(wanted).ok_or_else(|| not_started(&key))?
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
    let ask = Ask { request, deadline, reply, permits };
    // There is room: the inbox is as long as there are permits. So a failure means that the session is over.
    handle.inbox.try_send(ask).map_err(|_| not_started(&key))?;
    if parameters.sequence_end {
        router.sessions.close(&key, handle.id);
    }
    Ok(answer)
}

/// Opens a session. An older one of the same name finishes what it has and gets nothing more.
fn open(router: &Arc<Inner>, key: &Key, route: &ModelRoute, options: &CallOptions) -> Result<Handle, Status> {
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
    if replaced {
        tracing::warn!(model = %key.model, sequence = %key.sequence, "START of a sequence that is open; the old one is dropped");
    }
    table.next_id += 1;
    let requests_max = settings.session_requests_max.max(1) as usize;
    let (inbox, asks) = mpsc::channel(requests_max);
    let handle = Handle {
        id: table.next_id,
        version: route.version,
        inbox,
        requests: Arc::new(Semaphore::new(requests_max)),
        bytes: Arc::new(Semaphore::new(settings.session_bytes_max.max(1) as usize)),
    };
    table.by_key.insert(key.clone(), handle.clone());
    router.sessions.live.send_replace(table.by_key.len());
    drop(table);
    let session = Session::new(Arc::clone(router), key.clone(), handle.id, route, options.clone(), asks);
    tokio::spawn(session.run());
    Ok(handle)
}

pub(super) fn not_started(key: &Key) -> Status {
    Reason::SequenceNotStarted.status(format!(
        "inference request for sequence {} to model '{}' must specify the START flag on the first request of the sequence",
        key.sequence, key.model
    ))
}
