//! A stream by way of coordinators that outlives each of them.
//!
//! For programs that can't reach the workers themselves: all that goes through a coordinator, and when that one dies the stream
//! goes on at another, nothing lost, repeated or out of order. What it sends is what PROTOCOL.md asks of a client in any
//! language, and nothing else.
pub mod outbox;

use std::time::Duration;

use cresset_proto::{
    inference::{ModelInferRequest, ModelStreamInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient},
    metadata::RICH_STATUS,
    reason::Reason,
};
use futures::{Stream, StreamExt, TryFutureExt, stream, stream::BoxStream};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, metadata::MetadataValue};

use self::outbox::{Came, Limits, Outbox};
use crate::{
    coordinators::{Coordinators, describe, may_ask_another},
    retry::backoff_ms,
};

/// Requests that wait to be written to a coordinator's connection.
const LINK_QUEUE: usize = 16;

/// Bounds of a stream that outlives its coordinators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResumeSettings {
    /// What is kept.
    pub limits: Limits,
    /// How long coordinators are tried one after the other when none goes on with the stream.
    pub patience: Duration,
}

impl Default for ResumeSettings {
    fn default() -> Self {
        Self { limits: Limits::default(), patience: Duration::from_secs(60) }
    }
}

impl Coordinators {
    /// Runs requests as they come, as [`Router::stream`](crate::Router::stream) does, by way of a coordinator, and of another
    /// when that one dies. A sequence goes on too, also when its worker dies at the same time; then it is sent again from its first
    /// request, as far as `settings` allow. Ends with an error when no coordinator could be reached for as long as `settings` say.
    pub fn stream<S>(
        &self,
        requests: S,
        settings: ResumeSettings,
    ) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + Send + use<S>
    where
        S: Stream<Item = ModelInferRequest> + Send + 'static,
    {
        let id = format!("{:032x}", rand::random::<u128>());
        let resumed = Resumed {
            coordinators: self.clone(),
            settings,
            outbox: Outbox::new(id, settings.limits),
            requests: requests.boxed(),
            reading: true,
            link: None,
            failures: 0,
            good_at: Instant::now(),
            resume_at: None,
        };
        stream::unfold(Some(resumed), |resumed| async move {
            let mut resumed = resumed?;
            match resumed.next().await? {
                Ok(answer) => Some((Ok(answer), Some(resumed))),
                Err(status) => Some((Err(status), None)),
            }
        })
    }
}

/// A stream and where it is.
struct Resumed {
    coordinators: Coordinators,
    settings: ResumeSettings,
    outbox: Outbox,
    requests: BoxStream<'static, ModelInferRequest>,
    reading: bool,
    link: Option<Link>,
    /// Connections that failed without an answer in between.
    failures: u32,
    /// When something was last heard, or there was nothing to hear.
    good_at: Instant,
    /// No new connection before this.
    resume_at: Option<Instant>,
}

/// The connection to a coordinator.
struct Link {
    address: String,
    requests: mpsc::Sender<ModelInferRequest>,
    answers: BoxStream<'static, Result<ModelStreamInferResponse, Status>>,
}

/// What happened.
enum Event {
    Answer(Option<Result<ModelStreamInferResponse, Status>>),
    Request(Option<ModelInferRequest>),
    Room,
    Retry,
}

impl Resumed {
    async fn next(&mut self) -> Option<Result<ModelStreamInferResponse, Status>> {
        loop {
            if self.outbox.is_empty() {
                self.good_at = Instant::now();
                if !self.reading {
                    return None;
                }
            }
            if let Err(status) = self.connect() {
                return Some(Err(status));
            }
            match self.event().await {
                Event::Answer(Some(Ok(message))) => {
                    (self.failures, self.good_at) = (0, Instant::now());
                    match self.outbox.receive(message) {
                        Came::Deliver(message) => return Some(Ok(*message)),
                        Came::Nothing => {}
                        Came::Reconnect => self.link = None,
                        Came::Broken(message) => return Some(Err(Reason::SequenceLost.status(message.error_message))),
                    }
                }
                Event::Answer(Some(Err(status))) => {
                    if let Err(status) = self.failed(status) {
                        return Some(Err(status));
                    }
                }
                // Even where everything was answered: there may be more to ask.
                Event::Answer(None) => {
                    if let Err(status) = self.failed(Status::unavailable("the coordinator ended the stream")) {
                        return Some(Err(status));
                    }
                }
                Event::Request(Some(request)) => self.outbox.push(request),
                Event::Request(None) => self.reading = false,
                Event::Room => self.send(),
                Event::Retry => self.resume_at = None,
            }
        }
    }

    async fn event(&mut self) -> Event {
        let can_take = self.reading && self.outbox.has_room();
        let has_more = self.outbox.has_more();
        let resume_at = self.resume_at;
        let (answers, room) = match &mut self.link {
            Some(link) => (Some(&mut link.answers), has_more.then_some(&link.requests)),
            None => (None, None),
        };
        tokio::select! {
            biased;
            answer = maybe(answers.map(StreamExt::next)) => Event::Answer(answer),
            // If it can't be reserved, the connection has ended, and the answers say how.
            Ok(_) = maybe(room.map(mpsc::Sender::reserve)) => Event::Room,
            request = self.requests.next(), if can_take => Event::Request(request),
            () = maybe(resume_at.map(sleep_until)) => Event::Retry,
        }
    }

    /// Makes sure of a connection when something has to be sent and the time for it has come.
    fn connect(&mut self) -> Result<(), Status> {
        if self.link.is_some() || self.resume_at.is_some() || self.outbox.is_empty() {
            return Ok(());
        }
        let (address, channel) = match self.coordinators.current() {
            Ok(current) => current,
            Err(tried) => {
                self.coordinators.leave(&tried.address);
                return self.pause(&Status::unavailable(tried.to_string()));
            }
        };
        let (requests, outgoing) = mpsc::channel(LINK_QUEUE);
        let bytes_max = self.coordinators.message_bytes_max();
        let mut client =
            GrpcInferenceServiceClient::new(channel).max_decoding_message_size(bytes_max).max_encoding_message_size(bytes_max);
        let mut call = Request::new(ReceiverStream::new(outgoing));
        // An error then says its reason.
        call.metadata_mut().insert(RICH_STATUS, MetadataValue::from_static("true"));
        let answers = async move { client.model_stream_infer(call).await.map(Response::into_inner) }.try_flatten_stream().boxed();
        self.link = Some(Link { address, requests, answers });
        self.outbox.connect();
        self.send();
        Ok(())
    }

    /// Gives the connection what it has room for.
    fn send(&mut self) {
        let Some(link) = &self.link else { return };
        while link.requests.capacity() > 0 {
            let Some(request) = self.outbox.send() else { return };
            // It can only fail when the connection has ended, and then the answers say so.
            let _ = link.requests.try_send(request);
        }
    }

    fn failed(&mut self, status: Status) -> Result<(), Status> {
        let Some(link) = self.link.take() else { return Ok(()) };
        if !may_ask_another(&status) {
            return Err(status);
        }
        tracing::debug!(coordinator = %link.address, error = %describe(&status), "a stream goes on at another coordinator");
        self.coordinators.leave(&link.address);
        self.pause(&status)
    }

    /// One round without a pause, then ever longer ones.
    fn pause(&mut self, status: &Status) -> Result<(), Status> {
        self.failures += 1;
        if self.good_at.elapsed() >= self.settings.patience && !self.outbox.is_empty() {
            let text = format!(
                "no coordinator of {} goes on with the stream for {} s; the last said: {}",
                self.coordinators.addresses().join(", "),
                self.settings.patience.as_secs(),
                describe(status)
            );
            return Err(Reason::NoReplica.status(text));
        }
        let count = u32::try_from(self.coordinators.addresses().len()).unwrap_or(1).max(1);
        if self.failures.is_multiple_of(count) {
            self.resume_at = Some(Instant::now() + Duration::from_millis(backoff_ms(self.failures / count + 2)));
        }
        Ok(())
    }
}

/// The future, or none that ever ends.
async fn maybe<F: Future>(future: Option<F>) -> F::Output {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}
