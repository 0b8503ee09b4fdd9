//! Finding a coordinator that answers, whoever leads.
//!
//! A list of addresses, of which the one that answered last is asked first. Followers pass on what only the leader can do,
//! so nothing here knows the leader. The list grows by the addresses that the cluster itself names, so a client that was
//! given one address survives the death of that one.
//!
//! Absent here: what a call means. A call is made again on another coordinator as long as its refusal says that it may be;
//! commands carry an id of their caller's so that this is safe.
use std::{fmt, sync::Arc, time::Duration};

use cresset_proto::{
    admin::v1::admin_service_client::AdminServiceClient,
    fleet::v1::{WatchRequest, WatchResponse, routes_service_client::RoutesServiceClient},
    reason::Reason,
};
use futures::Stream;
use parking_lot::Mutex;
use tokio::{sync::mpsc, time::Instant};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Response, Status, transport::Channel};

use crate::{
    retry::{Failure, PAUSE_MS_MAX, backoff_ms},
    routes::{self, RouteError, RouteSender, Routes},
    workers::ConnectionSettings,
};

/// The most addresses that are kept.
pub const ENDPOINTS_MAX: usize = 32;
/// A watch that lasted so long was a good one, even without news.
const WATCH_GOOD: Duration = Duration::from_secs(1);

/// The coordinators of one cluster. A cheap clone shares connections and the memory of who answered.
#[derive(Debug, Clone)]
pub struct Coordinators(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    settings: ConnectionSettings,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    endpoints: Vec<Endpoint>,
    /// The one that answered last.
    current: usize,
}

#[derive(Debug, Clone)]
struct Endpoint {
    address: String,
    channel: Option<Channel>,
}

/// An endpoint and why it couldn't help.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tried {
    /// `host:port`.
    pub address: String,
    /// The last error there.
    pub error: String,
}

impl fmt::Display for Tried {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.address, self.error)
    }
}

/// A call that no coordinator carried out.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// There is nobody to ask.
    #[error("no endpoints: give at least one host:port of a coordinator")]
    NoEndpoints,
    /// A coordinator answered, and the answer is no.
    #[error("{}", .0.message())]
    Refused(Status),
    /// Nobody could answer in time.
    #[error("no coordinator answered within {} ms; tried {}", .timeout.as_millis(), list(.tried))]
    Unanswered {
        /// How long it was tried.
        timeout: Duration,
        /// Every endpoint with its last error.
        tried: Vec<Tried>,
    },
}

fn list(tried: &[Tried]) -> String {
    tried.iter().map(Tried::to_string).collect::<Vec<_>>().join("; ")
}

impl Coordinators {
    /// The coordinators at these `host:port` addresses. Nothing is connected yet.
    pub fn new(addresses: impl IntoIterator<Item = impl Into<String>>, settings: ConnectionSettings) -> Self {
        let coordinators = Self(Arc::new(Inner { settings, state: Mutex::default() }));
        coordinators.learn(addresses);
        coordinators
    }

    /// Adds addresses that aren't known yet, up to [`ENDPOINTS_MAX`] in all.
    pub fn learn(&self, addresses: impl IntoIterator<Item = impl Into<String>>) {
        let mut state = self.0.state.lock();
        for address in addresses.into_iter().map(Into::into) {
            let known = state.endpoints.iter().any(|endpoint| endpoint.address == address);
            if !known && !address.is_empty() && state.endpoints.len() < ENDPOINTS_MAX {
                state.endpoints.push(Endpoint { address, channel: None });
            }
        }
    }

    /// All known addresses.
    pub fn addresses(&self) -> Vec<String> {
        self.0.state.lock().endpoints.iter().map(|endpoint| endpoint.address.clone()).collect()
    }

    /// The largest message that is taken or sent.
    pub(crate) fn message_bytes_max(&self) -> usize {
        self.0.settings.message_bytes_max
    }

    /// The one to ask first, with a channel to it.
    pub(crate) fn current(&self) -> Result<(String, Channel), Tried> {
        let mut state = self.0.state.lock();
        let index = state.current;
        let nobody = || Tried { address: "nobody".into(), error: "no endpoint is known".into() };
        let endpoint = state.endpoints.get_mut(index).ok_or_else(nobody)?;
        let address = endpoint.address.clone();
        if let Some(channel) = &endpoint.channel {
            return Ok((address, channel.clone()));
        }
        match self.0.settings.channel(&address) {
            Ok(channel) => {
                endpoint.channel = Some(channel.clone());
                Ok((address, channel))
            }
            Err(error) => Err(Tried { address, error: format!("not an address: {error}") }),
        }
    }

    /// Goes on to the next endpoint, unless somebody else has already left `address`. The failed channel is forgotten.
    pub(crate) fn leave(&self, address: &str) {
        let mut state = self.0.state.lock();
        let index = state.current;
        let count = state.endpoints.len().max(1);
        if let Some(endpoint) = state.endpoints.get_mut(index)
            && endpoint.address == address
        {
            endpoint.channel = None;
            state.current = (index + 1) % count;
        }
    }

    /// Makes one admin call, on one coordinator after the other until one carries it out. `call` may run several times: a
    /// command in it must carry the same id each time.
    ///
    /// # Errors
    /// [`CallError::Refused`] with the answer of the coordinator that said no; [`CallError::Unanswered`] after `timeout`,
    /// with everybody that was tried.
    pub async fn admin<T, F, Fut>(&self, timeout: Duration, call: F) -> Result<T, CallError>
    where
        F: Fn(AdminServiceClient<Channel>) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let bytes_max = self.0.settings.message_bytes_max;
        self.call(timeout, |channel| {
            let client = AdminServiceClient::new(channel);
            call(client.max_decoding_message_size(bytes_max).max_encoding_message_size(bytes_max))
        })
        .await
    }

    /// [`admin`](Self::admin) for any service: `call` gets the channel.
    ///
    /// # Errors
    /// As [`admin`](Self::admin).
    pub async fn call<T, F, Fut>(&self, timeout: Duration, call: F) -> Result<T, CallError>
    where
        F: Fn(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let deadline = Instant::now() + timeout;
        let mut tried: Vec<Tried> = Vec::new();
        let mut failures = 0;
        loop {
            let count = self.addresses().len();
            if count == 0 {
                return Err(CallError::NoEndpoints);
            }
            let attempt = match self.current() {
                Ok((address, channel)) => match tokio::time::timeout_at(deadline, call(channel)).await {
                    Ok(Ok(response)) => return Ok(response.into_inner()),
                    Ok(Err(status)) if !may_ask_another(&status) => return Err(CallError::Refused(status)),
                    Ok(Err(status)) => Tried { address, error: describe(&status) },
                    Err(_) => Tried { address, error: "no answer in time".into() },
                },
                Err(tried) => tried,
            };
            self.leave(&attempt.address);
            tried.retain(|earlier| earlier.address != attempt.address);
            tried.push(attempt);
            failures += 1;
            // One round without a pause, so that a dead first address costs nothing; then ever longer pauses.
            let round = u32::try_from(failures / count).unwrap_or(u32::MAX);
            if failures % count == 0 {
                let pause = Duration::from_millis(backoff_ms(round.saturating_add(3)));
                tokio::time::sleep_until(deadline.min(Instant::now() + pause)).await;
            }
            if Instant::now() >= deadline {
                return Err(CallError::Unanswered { timeout, tried });
            }
        }
    }

    /// Keeps a table of routes fresh in a task of its own, across the deaths of coordinators, until `shutdown` or until
    /// nobody holds a receiver. While no coordinator answers, the last table stays.
    pub fn watch_routes(&self, shutdown: CancellationToken) -> Routes {
        let (sender, receiver) = routes::channel();
        let coordinators = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = sender.closed() => {}
                () = coordinators.follow(0, &sender) => {}
            }
        });
        receiver
    }

    /// Everything that routers are told from the epoch `known` on (0 for everything), in the order of epochs and nothing twice, across
    /// the deaths of coordinators: changes, or a whole table where no coordinator remembers enough. Ends never by itself.
    pub fn watch_changes(&self, known: u64) -> impl Stream<Item = WatchResponse> + Send + use<> {
        let (sender, receiver) = mpsc::channel(1);
        let coordinators = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = coordinators.follow(known, &sender) => {}
            }
        });
        ReceiverStream::new(receiver)
    }

    /// Follows one coordinator after the other, for ever. `taker` is given whatever is newer than `known`, and than what it was given
    /// before; where it says why it can't use it, everything is asked for.
    async fn follow(&self, mut known: u64, taker: &impl Taker) {
        let mut failures: usize = 0;
        loop {
            let started = Instant::now();
            let error = match self.current() {
                Ok((address, channel)) => {
                    let error = self.follow_one(channel, &mut known, taker).await;
                    Tried { address, error }
                }
                Err(tried) => tried,
            };
            self.leave(&error.address);
            failures = if started.elapsed() >= WATCH_GOOD { 1 } else { failures + 1 };
            let count = self.addresses().len().max(1);
            if failures == count {
                tracing::warn!(last = %error, "no coordinator sends routes; keeping the last ones");
            } else {
                tracing::debug!(coordinator = %error.address, error = %error.error, "the watch of routes ended");
            }
            if failures.is_multiple_of(count) {
                let round = u32::try_from(failures / count).unwrap_or(u32::MAX);
                let jitter = rand::random::<u64>() % 50;
                let pause = (backoff_ms(round) * 2).min(2 * PAUSE_MS_MAX) + jitter;
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
    }

    /// Takes tables from one coordinator until it fails, and says how.
    async fn follow_one(&self, channel: Channel, known: &mut u64, taker: &impl Taker) -> String {
        let bytes_max = self.0.settings.message_bytes_max;
        let mut client = RoutesServiceClient::new(channel).max_decoding_message_size(bytes_max);
        let mut tables = match client.watch(WatchRequest { epoch: *known, takes_changes: true }).await {
            Ok(response) => response.into_inner(),
            Err(status) => return describe(&status),
        };
        loop {
            match tables.message().await {
                Ok(Some(response)) => {
                    self.learn(response.coordinator_grpc_addresses.iter());
                    let epoch = response.epoch;
                    // A coordinator that was restored from a backup, or hasn't caught up, may say what is known already.
                    if epoch <= *known && *known > 0 {
                        continue;
                    }
                    if let Err(problem) = taker.take(response).await {
                        *known = 0;
                        return problem;
                    }
                    *known = epoch;
                }
                Ok(None) => return "the stream ended".into(),
                Err(status) => return describe(&status),
            }
        }
    }
}

/// Where what a coordinator tells routers goes.
trait Taker: Sync {
    /// Takes it, or says why it can't be used.
    fn take(&self, response: WatchResponse) -> impl Future<Output = Result<(), String>> + Send;
}

/// A router goes by it from now on.
impl Taker for RouteSender {
    async fn take(&self, response: WatchResponse) -> Result<(), String> {
        match self.publish(&response) {
            Ok(is_newer) => tracing::debug!(epoch = response.epoch, since = response.since_epoch, is_newer, "routes"),
            // From a whole table on it will do.
            Err(error @ RouteError::Gap { .. }) => return Err(error.to_string()),
            Err(error) => tracing::error!(epoch = response.epoch, %error, "unusable routes; keeping the last ones"),
        }
        Ok(())
    }
}

/// Somebody reads it. Who reads slowly is told later, and then more at once.
impl Taker for mpsc::Sender<WatchResponse> {
    async fn take(&self, response: WatchResponse) -> Result<(), String> {
        self.send(response).await.map_err(|_| "nobody reads any more".to_owned())
    }
}

/// Whether another coordinator, or the same a little later, may carry out what this one refused.
pub(crate) fn may_ask_another(status: &Status) -> bool {
    match Failure::of(status) {
        Failure::Unreachable | Failure::Broken => true,
        Failure::Refused(reason) => matches!(reason, Reason::NoLeader | Reason::Indeterminate | Reason::Draining),
        Failure::Coded(code) => matches!(code, Code::Unavailable | Code::Cancelled | Code::Unknown | Code::Aborted),
    }
}

/// A status in one line, with the cause that tonic hides behind "transport error".
pub(crate) fn describe(status: &Status) -> String {
    let mut cause = std::error::Error::source(status);
    let mut deepest = None;
    while let Some(error) = cause {
        deepest = Some(error.to_string());
        cause = error.source();
    }
    match deepest {
        Some(deepest) if deepest != status.message() => format!("{} ({deepest})", status.message()),
        _ => status.message().to_owned(),
    }
}

#[cfg(test)]
mod tests;
