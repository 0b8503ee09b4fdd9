//! The way to a coordinator: any one that is up will do.
//!
//! Calls go through the library's [`Coordinators`], which tries one after the other within one timeout; it is the caller
//! who makes repeating safe, with a command id. Here is only what the command line adds: requests that must run once, and
//! the status as a stream.
use std::time::Duration;

use cresset_client::{CallError, ConnectionSettings, Coordinators};
use cresset_proto::{
    admin::v1::{CoordinatorRole, StatusResponse, WatchStatusRequest, admin_service_client::AdminServiceClient},
    fleet::v1::WatchResponse,
    reason::Reason,
};
use tokio::time::{Instant, sleep, timeout};
use tonic::{Code, Request, Response, Status, Streaming, transport::Channel};

/// Each coordinator gets at least this long for a call, however many there are.
const SHARE_MIN: Duration = Duration::from_secs(1);
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The coordinators of one cluster, and how long a call may take with all its retries.
#[derive(Debug, Clone)]
pub struct Cluster {
    coordinators: Coordinators,
    timeout: Duration,
}

impl Cluster {
    /// Names the endpoints (`host:port`); nothing is connected yet.
    pub fn new(addresses: Vec<String>, timeout: Duration) -> Self {
        let settings = ConnectionSettings { connect_timeout: Duration::from_secs(2), ..ConnectionSettings::default() };
        Self { coordinators: Coordinators::new(addresses, settings), timeout }
    }

    /// The same endpoints with another timeout.
    pub fn within(&self, timeout: Duration) -> Self {
        Self { timeout, ..self.clone() }
    }

    /// How long a call may take.
    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Asks one coordinator after the other until one answers. `ask` is told how long it may take, and may run again.
    /// Coordinators share the time, since one that is cut off from the others may hold a call for long.
    ///
    /// # Errors
    /// [`CallError`]: one said no for good, or nobody answered in time.
    pub async fn call<T>(&self, ask: impl AsyncFn(Channel, Duration) -> Result<Response<T>, Status>) -> Result<T, CallError> {
        let count = u32::try_from(self.coordinators.addresses().len()).unwrap_or(1).max(1);
        let share = (self.timeout / count).max(SHARE_MIN).min(self.timeout);
        let shared = async |channel, _| match timeout(share, ask(channel, share)).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::unavailable(format!("no answer within {}", crate::output::seconds(share)))),
        };
        self.call_patiently(shared).await
    }

    /// As [`Cluster::call`], for what may take all the time there is.
    ///
    /// # Errors
    /// As [`Cluster::call`].
    pub async fn call_patiently<T>(
        &self,
        ask: impl AsyncFn(Channel, Duration) -> Result<Response<T>, Status>,
    ) -> Result<T, CallError> {
        let (ask, limit) = (&ask, self.timeout);
        self.coordinators.call(limit, move |channel| ask(channel, limit)).await
    }

    /// As [`Cluster::call_patiently`], for what must not run twice: only a coordinator that certainly didn't run it is left for
    /// another.
    ///
    /// # Errors
    /// As [`Cluster::call`].
    pub async fn call_once<T>(
        &self,
        ask: impl AsyncFn(Channel, Duration) -> Result<Response<T>, Status>,
    ) -> Result<T, CallError> {
        let once = async |channel, limit| match ask(channel, limit).await {
            Ok(answer) => Ok(answer.map(Ok)),
            Err(status) if certainly_not_run(&status) => Err(status),
            // An answer, as far as trying on is concerned.
            Err(status) => Ok(Response::new(Err(status))),
        };
        self.call_patiently(once).await?.map_err(CallError::Refused)
    }

    /// Everything that routers are told from an epoch on, on whatever coordinator has it to tell.
    pub fn watch_changes(&self, known: u64) -> impl futures::Stream<Item = WatchResponse> + use<> {
        self.coordinators.watch_changes(known)
    }

    /// Follows the cluster's status, on whatever coordinator has it to tell.
    pub fn watch(&self) -> Watch {
        Watch {
            coordinators: self.coordinators.clone(),
            next: 0,
            stream: None,
            follows_leader: false,
            prefer: None,
            switched_at: None,
            pause: PAUSE_MIN,
            last_error: None,
        }
    }
}

fn certainly_not_run(status: &Status) -> bool {
    let refused = matches!(
        Reason::of(status),
        Some(Reason::NoReplica | Reason::NoLeader | Reason::QueueFull | Reason::SequencesFull | Reason::Draining)
    );
    refused || innermost(status).is_some_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// A request that tells the server how long it has.
pub fn request<T>(message: T, limit: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// The system's error at the bottom of a status that our own end made.
fn innermost<'a>(status: &'a Status) -> Option<&'a std::io::Error> {
    let mut cause: Option<&'a (dyn std::error::Error + 'static)> = std::error::Error::source(status);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref() {
            return Some(io);
        }
        cause = error.source();
    }
    None
}

/// A status in one line.
fn words(status: &Status) -> String {
    match innermost(status) {
        Some(io) => crate::settings::plain(io),
        None => crate::output::one_line(status.message()),
    }
}

/// The cluster's status as it changes. It reconnects by itself, to another coordinator where that helps.
pub struct Watch {
    coordinators: Coordinators,
    next: usize,
    stream: Option<Streaming<StatusResponse>>,
    follows_leader: bool,
    prefer: Option<String>,
    switched_at: Option<Instant>,
    pause: Duration,
    last_error: Option<(String, String)>,
}

impl Watch {
    /// Moves to the leader where another one answered: only the leader knows the workers' counters.
    pub fn follow_leader(mut self) -> Self {
        self.follows_leader = true;
        self
    }

    /// The endpoint that failed last, and how.
    pub fn last_error(&self) -> Option<&(String, String)> {
        self.last_error.as_ref()
    }

    /// The next status. Waits as long as it takes; callers bound it.
    ///
    /// # Errors
    /// Only where no coordinator will ever answer this, as one of another version.
    pub async fn next(&mut self) -> Result<StatusResponse, CallError> {
        const OPEN_TIMEOUT: Duration = Duration::from_secs(3);
        loop {
            let Some(stream) = &mut self.stream else {
                let mut addresses = self.coordinators.addresses();
                let turn = self.next % addresses.len().max(1);
                let Some(address) = self.prefer.take().or_else(|| (!addresses.is_empty()).then(|| addresses.swap_remove(turn)))
                else {
                    return Err(CallError::NoEndpoints);
                };
                match timeout(OPEN_TIMEOUT, open(&address)).await {
                    Ok(Ok((stream, status))) => {
                        self.stream = Some(stream);
                        self.pause = PAUSE_MIN;
                        self.last_error = None;
                        self.coordinators.learn(status.coordinators.iter().map(|coordinator| coordinator.grpc_address.as_str()));
                        self.turn_to_leader(&status);
                        return Ok(status);
                    }
                    Ok(Err(status)) if status.code() == Code::Unimplemented => return Err(CallError::Refused(status)),
                    Ok(Err(status)) => self.failed(address, words(&status)).await,
                    Err(_) => self.failed(address, "no status in time".to_owned()).await,
                }
                continue;
            };
            match stream.message().await {
                Ok(Some(status)) => {
                    self.turn_to_leader(&status);
                    return Ok(status);
                }
                Ok(None) | Err(_) => {
                    self.stream = None;
                    self.next += 1;
                }
            }
        }
    }

    async fn failed(&mut self, address: String, error: String) {
        self.last_error = Some((address, error));
        self.next += 1;
        sleep(self.pause).await;
        self.pause = (self.pause * 2).min(PAUSE_MAX);
    }

    fn turn_to_leader(&mut self, status: &StatusResponse) {
        const SWITCH_PAUSE: Duration = Duration::from_secs(2);
        let leader = status.coordinators.iter().find(|c| c.role() == CoordinatorRole::Leader && !c.grpc_address.is_empty());
        let Some(leader) = leader.filter(|leader| self.follows_leader && leader.id != status.answered_by) else { return };
        if self.switched_at.is_none_or(|at| at.elapsed() >= SWITCH_PAUSE) {
            self.switched_at = Some(Instant::now());
            self.prefer = Some(leader.grpc_address.clone());
            self.stream = None;
        }
    }
}

async fn open(address: &str) -> Result<(Streaming<StatusResponse>, StatusResponse), Status> {
    // A connection of its own: what a stopped process holds is noticed by its pings.
    let channel = ConnectionSettings::default().channel(address).map_err(|error| Status::invalid_argument(error.to_string()))?;
    let mut stream = AdminServiceClient::new(channel).watch_status(WatchStatusRequest {}).await?.into_inner();
    let first = stream.message().await?.ok_or_else(|| Status::unavailable("the stream ended before its first status"))?;
    Ok((stream, first))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn giving_up_names_every_endpoint_and_its_error() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let cluster = Cluster::new(vec![closed.clone()], Duration::from_millis(200));
        let ask = async |channel, _| AdminServiceClient::new(channel).watch_status(WatchStatusRequest {}).await;
        for error in [cluster.call(ask).await.unwrap_err(), cluster.call_once(ask).await.unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains(&closed) && text.to_lowercase().contains("connection refused"), "{text}");
        }
    }

    #[test]
    fn only_certain_refusals_move_a_request_that_must_run_once() {
        assert!(!certainly_not_run(&Status::unavailable("x")));
        assert!(certainly_not_run(&Reason::NoReplica.status("x")));
        assert!(!certainly_not_run(&Reason::ModelFailed.status("x")));
        assert!(!certainly_not_run(&Status::deadline_exceeded("x")));
    }
}
