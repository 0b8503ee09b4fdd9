//! The Rust client: coordinators to learn routes from, and a router of its own that talks to workers directly.
use std::{pin::pin, time::Duration};

use cresset_proto::{
    fleet::v1::routes_service_client::RoutesServiceClient,
    inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse},
    parameters::{bool_parameter, int64_parameter, keys},
};
use futures::{Stream, StreamExt};
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::Status;

use crate::{
    coordinators::Coordinators,
    predict::{CallOptions, Router, received},
    routes::RouteTable,
    settings::RouterSettings,
};

/// How long [`CressetClient::connect`] waits for the first routes.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a report may take; the next one says more.
const REPORT_TIMEOUT: Duration = Duration::from_secs(1);

/// A client of one cluster.
///
/// It learns the routes from any coordinator that answers, finds the other coordinators by itself, and sends predictions
/// straight to the workers. It keeps working on the last routes while no coordinator answers.
#[derive(Debug)]
pub struct CressetClient {
    router: Router,
    coordinators: Coordinators,
    /// Ends the watch of routes with the client.
    _watch: DropGuard,
}

/// The cluster couldn't be reached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    /// There is nobody to ask.
    #[error("no endpoints: give at least one host:port of a coordinator")]
    NoEndpoints,
    /// Nobody sent routes in time.
    #[error("no coordinator sent routes within {} ms; tried {}", .timeout.as_millis(), .tried.join(", "))]
    Unanswered {
        /// How long was waited.
        timeout: Duration,
        /// The addresses.
        tried: Vec<String>,
    },
}

impl CressetClient {
    /// Connects to the cluster that has coordinators at these `host:port` addresses; one that lives is enough.
    ///
    /// # Errors
    /// [`ConnectError`] when nobody sends routes within 5 s.
    pub async fn connect(endpoints: impl IntoIterator<Item = impl Into<String>>) -> Result<Self, ConnectError> {
        Self::connect_with(endpoints, RouterSettings::default(), CONNECT_TIMEOUT).await
    }

    /// [`connect`](Self::connect) with other settings.
    ///
    /// # Errors
    /// [`ConnectError`] when nobody sends routes within `timeout`.
    pub async fn connect_with(
        endpoints: impl IntoIterator<Item = impl Into<String>>,
        settings: RouterSettings,
        timeout: Duration,
    ) -> Result<Self, ConnectError> {
        let coordinators = Coordinators::new(endpoints, settings.connection);
        if coordinators.addresses().is_empty() {
            return Err(ConnectError::NoEndpoints);
        }
        let shutdown = CancellationToken::new();
        let mut routes = coordinators.watch_routes(shutdown.clone());
        let guard = shutdown.clone().drop_guard();
        let first = tokio::time::timeout(timeout, routes.wait_for(RouteTable::is_received)).await;
        if !matches!(first, Ok(Some(_))) {
            return Err(ConnectError::Unanswered { timeout, tried: coordinators.addresses() });
        }
        let router = Router::new(routes, settings);
        tokio::spawn(shutdown.run_until_cancelled_owned(report(router.clone(), coordinators.clone())));
        Ok(Self { router, coordinators, _watch: guard })
    }

    /// The router, to share with other tasks. It stops hearing of changes when the client is dropped.
    pub fn router(&self) -> &Router {
        &self.router
    }

    /// The coordinators, for admin calls.
    pub fn coordinators(&self) -> &Coordinators {
        &self.coordinators
    }

    /// Runs one request.
    ///
    /// # Errors
    /// A status with a [`Reason`](cresset_proto::reason::Reason) and a code that says more than Triton's.
    pub async fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
        self.router.infer(request, &own_options()).await
    }

    /// Runs requests as they come; see [`Router::stream`].
    pub fn stream<S>(&self, requests: S) -> impl Stream<Item = Result<ModelStreamInferResponse, Status>> + Send + use<S>
    where
        S: Stream<Item = ModelInferRequest> + Send + 'static,
    {
        self.router.stream(futures::StreamExt::map(requests, Ok), own_options())
    }

    /// A new sequence of a stateful model. Nothing is sent before its first request.
    pub fn sequence(&self, model: impl Into<String>) -> SequenceHandle {
        // Random, so that it names one sequence in every log of the cluster; positive and never 0.
        let id = i64::try_from(rand::random::<u64>() >> 1).unwrap_or(i64::MAX).max(1);
        SequenceHandle { router: self.router.clone(), model: model.into(), id, started: false }
    }
}

/// Tells the leader which workers are left alone here.
async fn report(router: Router, coordinators: Coordinators) {
    let mut reports = pin!(router.reports(format!("client-{:016x}", rand::random::<u64>())));
    while let Some(report) = reports.next().await {
        let call = |channel| {
            let (mut client, report) = (RoutesServiceClient::new(channel), report.clone());
            async move { client.report(report).await }
        };
        if let Err(error) = coordinators.call(REPORT_TIMEOUT, call).await {
            tracing::debug!(%error, "no coordinator took a report");
        }
    }
}

fn own_options() -> CallOptions {
    CallOptions { rich_status: true, ..CallOptions::default() }
}

/// Requests that share state. Dropped without [`finish`](Self::finish), the sequence ends when its idle time is over.
#[derive(Debug)]
pub struct SequenceHandle {
    router: Router,
    model: String,
    id: i64,
    started: bool,
}

impl SequenceHandle {
    /// The sequence's id.
    pub fn id(&self) -> i64 {
        self.id
    }

    /// Hands over the next request; its model and sequence parameters are filled in. The future that comes back is its answer,
    /// and doesn't have to be waited for before the next request. Waits itself while too many requests are unanswered.
    ///
    /// # Errors
    /// The request wasn't taken.
    pub async fn send(&mut self, request: ModelInferRequest) -> Result<SequenceAnswer, Status> {
        self.submit(request, false).await
    }

    /// [`send`](Self::send) for the last request.
    ///
    /// # Errors
    /// As [`send`](Self::send).
    pub async fn finish(mut self, request: ModelInferRequest) -> Result<SequenceAnswer, Status> {
        self.submit(request, true).await
    }

    async fn submit(&mut self, mut request: ModelInferRequest, end: bool) -> Result<SequenceAnswer, Status> {
        request.model_name.clone_from(&self.model);
        request.parameters.insert(keys::SEQUENCE_ID.to_owned(), int64_parameter(self.id));
        request.parameters.insert(keys::SEQUENCE_START.to_owned(), bool_parameter(!self.started));
        request.parameters.insert(keys::SEQUENCE_END.to_owned(), bool_parameter(end));
        let answer = self.router.submit(request, &own_options()).await?;
        self.started = true;
        Ok(SequenceAnswer(Box::pin(received(answer))))
    }
}

/// The answer to one request of a sequence, when it comes.
pub struct SequenceAnswer(futures::future::BoxFuture<'static, Result<ModelInferResponse, Status>>);

impl Future for SequenceAnswer {
    type Output = Result<ModelInferResponse, Status>;

    fn poll(mut self: std::pin::Pin<&mut Self>, context: &mut std::task::Context<'_>) -> std::task::Poll<Self::Output> {
        self.0.as_mut().poll(context)
    }
}

impl std::fmt::Debug for SequenceAnswer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SequenceAnswer")
    }
}

#[cfg(test)]
mod tests;
