//! Answers of requests that carry an id of their own, `cresset_request_id`: whoever sends such a request again, because it never
//! heard the answer, gets the answer of the first time, and nothing is run twice.
//!
//! The memory is this router's: bounded by bytes and by time, and lost with its process. Errors aren't remembered.
use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use cresset_proto::inference::{ModelInferRequest, ModelInferResponse};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Mutex as AsyncMutex;
use tonic::Status;

/// What one entry takes beside its response, in bytes.
const ENTRY_BYTES: usize = 256;

/// Which request it is: a model, a version as the caller wrote it, and the id.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    model: String,
    version: String,
    id: String,
}

impl Key {
    pub(super) fn of(request: &ModelInferRequest, id: String) -> Self {
        Self { model: request.model_name.clone(), version: request.model_version.clone(), id }
    }
}

/// How much is remembered.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) window: Duration,
    pub(super) bytes_max: usize,
}

/// Where an answer goes. Whoever holds the lock is at work on it.
type Place = AsyncMutex<Option<ModelInferResponse>>;

/// The answers of this router.
#[derive(Debug)]
pub(super) struct Answered(Mutex<Memory>);

impl Answered {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self(Mutex::new(Memory { bounds, places: HashMap::new(), oldest_first: VecDeque::new(), bytes: 0 }))
    }

    /// The answer of the first time, if there was one; else what `run` answers. While another is at work on the same request, waits
    /// for it.
    pub(super) async fn once(
        &self,
        key: Key,
        now_ms: impl Fn() -> u64,
        run: impl Future<Output = Result<ModelInferResponse, Status>>,
    ) -> Result<ModelInferResponse, Status> {
        let place = self.0.lock().place(&key, now_ms());
        let at_work = AtWork { answered: self, key, place };
        let mut answer = at_work.place.lock().await;
        if let Some(known) = &*answer {
            return Ok(known.clone());
        }
        let response = run.await?;
        self.0.lock().remember(&at_work.key, response.encoded_len(), now_ms());
        *answer = Some(response.clone());
        Ok(response)
    }
}

/// Someone who waits for an answer or works on it. Whoever leaves last without one takes the place away.
struct AtWork<'a> {
    answered: &'a Answered,
    key: Key,
    place: Arc<Place>,
}

impl Drop for AtWork<'_> {
    fn drop(&mut self) {
        self.answered.0.lock().leave(&self.key, &self.place);
    }
}

#[derive(Debug)]
struct Memory {
    bounds: Bounds,
    places: HashMap<Key, Arc<Place>>,
    oldest_first: VecDeque<Remembered>,
    bytes: usize,
}

#[derive(Debug)]
struct Remembered {
    key: Key,
    bytes: usize,
    since_ms: u64,
}

impl Memory {
    fn place(&mut self, key: &Key, now_ms: u64) -> Arc<Place> {
        self.forget(now_ms);
        Arc::clone(self.places.entry(key.clone()).or_default())
    }

    fn remember(&mut self, key: &Key, bytes: usize, now_ms: u64) {
        let bytes = bytes + ENTRY_BYTES;
        self.bytes += bytes;
        self.oldest_first.push_back(Remembered { key: key.clone(), bytes, since_ms: now_ms });
        self.forget(now_ms);
    }

    fn leave(&mut self, key: &Key, place: &Arc<Place>) {
        let is_remembered = || place.try_lock().is_ok_and(|answer| answer.is_some());
        // The map's own, and that of the one who leaves.
        if Arc::strong_count(place) <= 2 && !is_remembered() && self.places.get(key).is_some_and(|kept| Arc::ptr_eq(kept, place))
        {
            self.places.remove(key);
        }
    }

    fn forget(&mut self, now_ms: u64) {
        let window_ms = u64::try_from(self.bounds.window.as_millis()).unwrap_or(u64::MAX);
        while let Some(oldest) = self.oldest_first.front()
            && (self.bytes > self.bounds.bytes_max || oldest.since_ms.saturating_add(window_ms) < now_ms)
        {
            self.bytes -= oldest.bytes;
            self.places.remove(&oldest.key);
            self.oldest_first.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use futures::{FutureExt, future::join_all};

    use super::*;

    fn memory(bytes_max: usize) -> Answered {
        Answered::new(Bounds { window: Duration::from_secs(60), bytes_max })
    }

    fn key(id: &str) -> Key {
        Key { model: "m".into(), version: String::new(), id: id.into() }
    }

    fn response(text: &str) -> ModelInferResponse {
        ModelInferResponse { model_name: text.into(), ..Default::default() }
    }

    async fn ask(memory: &Answered, id: &str, now_ms: u64, answer: Result<&str, Status>) -> Result<String, Status> {
        let run = async { answer.map(response) };
        memory.once(key(id), || now_ms, run).await.map(|response| response.model_name)
    }

    #[tokio::test]
    async fn the_same_id_has_the_same_answer_within_the_window() {
        let memory = memory(1 << 20);
        assert_eq!(ask(&memory, "a", 0, Ok("first")).await.unwrap(), "first");
        assert_eq!(ask(&memory, "a", 60_000, Ok("second")).await.unwrap(), "first");
        assert_eq!(ask(&memory, "b", 60_000, Ok("other")).await.unwrap(), "other");
        assert_eq!(ask(&memory, "a", 60_001, Ok("second")).await.unwrap(), "second");
    }

    #[tokio::test]
    async fn whoever_asks_meanwhile_waits_for_the_one_who_is_at_work() {
        let (memory, runs) = (memory(1 << 20), AtomicU32::new(0));
        let run = || async {
            runs.fetch_add(1, Ordering::Relaxed);
            tokio::task::yield_now().await;
            Ok(response("once"))
        };
        let all = join_all((0..10).map(|_| memory.once(key("a"), || 0, run()))).await;
        assert!(all.into_iter().all(|answer| answer.unwrap() == response("once")));
        assert_eq!(runs.load(Ordering::Relaxed), 1);
    }

    #[tokio::test]
    async fn errors_and_callers_who_left_leave_nothing_behind() {
        let memory = memory(1 << 20);
        ask(&memory, "a", 0, Err(Status::internal("no"))).await.unwrap_err();
        let left = memory.once(key("b"), || 0, std::future::pending()).now_or_never();
        assert!(left.is_none() && memory.0.lock().places.is_empty());
        assert_eq!(ask(&memory, "a", 0, Ok("now")).await.unwrap(), "now");
    }

    #[tokio::test]
    async fn one_that_waits_takes_over_when_the_first_fails() {
        let memory = memory(1 << 20);
        let failing = memory.once(key("a"), || 0, async {
            tokio::task::yield_now().await;
            Err(Status::internal("no"))
        });
        let next = ask(&memory, "a", 0, Ok("mine"));
        let (failed, answered) = futures::join!(failing, next);
        assert!(failed.is_err());
        assert_eq!(answered.unwrap(), "mine");
        assert_eq!(ask(&memory, "a", 0, Ok("late")).await.unwrap(), "mine");
    }

    #[tokio::test]
    async fn the_oldest_go_when_there_are_too_many_bytes() {
        let memory = memory(4 * (ENTRY_BYTES + 10));
        for number in 0..100 {
            ask(&memory, &number.to_string(), 0, Ok("x")).await.unwrap();
            assert!(memory.0.lock().bytes <= 4 * (ENTRY_BYTES + 10) && memory.0.lock().places.len() <= 4);
        }
        assert_eq!(ask(&memory, "99", 0, Ok("again")).await.unwrap(), "x");
        assert_eq!(ask(&memory, "0", 0, Ok("again")).await.unwrap(), "again");
    }
}
