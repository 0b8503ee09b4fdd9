//! The cluster's own word about itself, as it changes.

use std::time::Duration;

use cresset_proto::admin::v1::{
    Coordinator, CoordinatorRole, Model, ModelState, StatusRequest, StatusResponse, WatchStatusRequest, Worker,
    admin_service_client::AdminServiceClient,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{
    Status, Streaming,
    transport::{Channel, Endpoint},
};

use super::{Cluster, Error};

/// How long one coordinator may take for its first status.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);
/// Between two rounds in which no coordinator answered; their coming back can't be watched for.
const ROUND_PAUSE: Duration = Duration::from_millis(50);

/// The coordinator that leads.
pub fn leader_of(status: &StatusResponse) -> Option<&Coordinator> {
    status.coordinators.iter().find(|coordinator| coordinator.role() == CoordinatorRole::Leader)
}

/// The deployed model of that name.
pub fn model_of<'a>(status: &'a StatusResponse, name: &str) -> Option<&'a Model> {
    status.models.iter().find(|model| model.name == name)
}

/// The state of a deployed model.
pub fn state_of(status: &StatusResponse, name: &str) -> Option<ModelState> {
    model_of(status, name).map(Model::state)
}

/// The worker of that id.
pub fn worker_of<'a>(status: &'a StatusResponse, id: &str) -> Option<&'a Worker> {
    status.workers.iter().find(|worker| worker.id == id)
}

/// The status as it changes, from whichever coordinator answers.
#[derive(Debug)]
pub struct Watch {
    endpoints: Vec<String>,
    next: usize,
    stream: Option<Streaming<StatusResponse>>,
}

impl Watch {
    /// Watches through these coordinators.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self { endpoints, next: 0, stream: None }
    }

    /// The next status. Waits as long as it takes.
    pub async fn next(&mut self) -> StatusResponse {
        let mut failures = 0;
        loop {
            if let Some(stream) = &mut self.stream {
                match stream.message().await {
                    Ok(Some(status)) => return status,
                    Ok(None) | Err(_) => self.stream = None,
                }
            }
            let address = &self.endpoints[self.next % self.endpoints.len()];
            self.next += 1;
            match timeout(OPEN_TIMEOUT, open(address)).await {
                Ok(Ok(stream)) => self.stream = Some(stream),
                Ok(Err(_)) | Err(_) => {
                    failures += 1;
                    if failures % self.endpoints.len() == 0 {
                        sleep(ROUND_PAUSE).await;
                    }
                }
            }
        }
    }
}

async fn open(address: &str) -> Result<Streaming<StatusResponse>, Status> {
    Ok(AdminServiceClient::new(channel(address)?).watch_status(WatchStatusRequest {}).await?.into_inner())
}

fn channel(address: &str) -> Result<Channel, Status> {
    let endpoint =
        Endpoint::from_shared(format!("http://{address}")).map_err(|error| Status::invalid_argument(error.to_string()))?;
    // What a stopped process holds is noticed by its pings.
    let endpoint = endpoint.connect_timeout(OPEN_TIMEOUT).http2_keep_alive_interval(Duration::from_secs(1));
    Ok(endpoint.keep_alive_timeout(Duration::from_secs(1)).keep_alive_while_idle(true).connect_lazy())
}

impl Cluster {
    /// The status as it changes.
    pub fn watch(&self) -> Watch {
        Watch::new(self.endpoints())
    }

    /// Looks at the status, as often as it changes, until `found` finds something.
    ///
    /// # Errors
    /// [`Error::TimedOut`] with the last status.
    pub async fn wait_for<T>(
        &self,
        what: &str,
        limit: Duration,
        mut found: impl FnMut(&StatusResponse) -> Option<T>,
    ) -> Result<T, Error> {
        let deadline = Instant::now() + limit;
        let mut watch = self.watch();
        let mut last = None;
        while let Ok(status) = timeout_at(deadline, watch.next()).await {
            if let Some(found) = found(&status) {
                return Ok(found);
            }
            last = Some(status);
        }
        Err(Error::TimedOut { limit, what: format!("{what}; the last status was {last:#?}") })
    }

    /// The status now, from the first coordinator that answers.
    ///
    /// # Errors
    /// [`Error::TimedOut`].
    pub async fn status(&self) -> Result<StatusResponse, Error> {
        self.wait_for("a status", Duration::from_secs(10), |status| Some(status.clone())).await
    }

    /// The status that one coordinator alone holds, whoever leads.
    ///
    /// # Errors
    /// [`Error::NoProcess`], [`Error::TimedOut`].
    pub async fn own_status(&self, id: &str) -> Result<StatusResponse, Error> {
        let error = |status: Status| Error::TimedOut { limit: OPEN_TIMEOUT, what: format!("a status of {id}: {status}") };
        let mut client = AdminServiceClient::new(channel(self.grpc(id)?).map_err(error)?);
        let request = StatusRequest { allow_stale: true, only_self: false };
        match timeout(OPEN_TIMEOUT, client.status(request)).await {
            Ok(answer) => answer.map(tonic::Response::into_inner).map_err(error),
            Err(_) => Err(error(Status::deadline_exceeded("no answer"))),
        }
    }

    /// The id of the coordinator that leads; waits for one.
    ///
    /// # Errors
    /// [`Error::TimedOut`].
    pub async fn leader(&self) -> Result<String, Error> {
        self.wait_for("a leader", Duration::from_secs(15), |status| leader_of(status).map(|leader| leader.id.clone())).await
    }

    /// Waits until a model is in a state.
    ///
    /// # Errors
    /// [`Error::TimedOut`].
    pub async fn wait_for_model(&self, name: &str, state: ModelState, limit: Duration) -> Result<Model, Error> {
        let what = format!("{name} in the state {}", state.as_str_name());
        self.wait_for(&what, limit, |status| model_of(status, name).filter(|model| model.state() == state).cloned()).await
    }
}
