//! One request of a decoupled model: any number of responses, on one replica after the other until the last of them.
//!
//! Responses that were delivered are counted. When the replica fails in between, another one runs the request again and as
//! many responses are left out, so the caller sees each once. That is right as long as the model answers the same request in
//! the same way. Nothing is read ahead of the caller beyond the connection's window: who reads slowly slows the model down.
//! These calls have connections of their own, since HTTP/2 ends a connection on which too many small messages lie unread.
use std::{sync::Arc, time::Duration};

use cresset_proto::{
    inference::{
        ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
        grpc_inference_service_client::GrpcInferenceServiceClient, infer_parameter::ParameterChoice,
    },
    parameters::{bool_parameter, keys},
    reason::Reason,
};
use futures::{Stream, StreamExt, TryFutureExt, stream, stream::BoxStream};
use tokio::time::Instant;
use tonic::{Response, Status, metadata::MetadataValue};

use super::{
    CallOptions, Checked, Inner,
    call::{STREAM_ERRORS, deadline_exceeded, no_replica, outcome},
    failover::Failover,
    lookup,
    vigil::attended,
};
use crate::{
    retry::{Kind, Verdict},
    routes::{InFlight, ModelRoute, Replica, Routes, Version},
    workers::Connection,
};

/// The responses to a request, or the error that ended them. The final flag is not among them: the end of the stream is it.
pub(super) fn responses(
    router: Arc<Inner>,
    checked: Checked,
    options: Arc<CallOptions>,
) -> impl Stream<Item = Result<ModelInferResponse, Status>> + Send {
    let Checked { mut request, version, parameters, .. } = checked;
    // Without it, the end of the responses and the loss of some would look alike.
    request.parameters.insert(keys::EMPTY_FINAL.to_owned(), bool_parameter(true));
    let run = Run {
        routes: router.routes.clone(),
        failover: Failover::new(&router, Kind::Decoupled),
        router,
        request,
        version,
        options,
        // A client that lost its router says how far it had come.
        delivered: if parameters.sequence_id.is_none() { parameters.ack } else { 0 },
        link: None,
        last: None,
        patience: None,
    };
    stream::unfold(Some(run), |run| async move {
        let mut run = run?;
        match run.next().await {
            Ok(Some(response)) => Some((Ok(response), Some(run))),
            Ok(None) => None,
            Err(status) => Some((Err(status), None)),
        }
    })
}

/// The request on its way through the replicas.
struct Run {
    router: Arc<Inner>,
    request: ModelInferRequest,
    version: Version,
    options: Arc<CallOptions>,
    routes: Routes,
    failover: Failover,
    /// Responses that the caller has.
    delivered: u64,
    link: Option<Link>,
    last: Option<Status>,
    /// Runs from the moment when nobody could take the request.
    patience: Option<Instant>,
}

/// The replica that runs it now.
struct Link {
    replica: Arc<Replica>,
    route: Arc<ModelRoute>,
    connection: Connection,
    messages: BoxStream<'static, Result<ModelStreamInferResponse, Status>>,
    /// Responses that came from here, delivered before or not.
    came: u64,
    _in_flight: InFlight,
}

/// What came from a replica.
enum Came {
    Response(ModelInferResponse),
    End,
}

impl Run {
    /// The next response that the caller doesn't have; `None` after the last.
    async fn next(&mut self) -> Result<Option<ModelInferResponse>, Status> {
        // Silence counts from now on: until here, the caller was the one that took its time.
        let deadline = self.router.deadline(&self.options);
        loop {
            if self.link.is_none() {
                self.connect(deadline).await?;
            }
            let Some(link) = self.link.as_mut() else { continue };
            let asked = Instant::now();
            let came = link.next(&self.router, &self.failover, deadline).await;
            let status = match came {
                Ok(Came::Response(_)) if link.came <= self.delivered => continue,
                Ok(Came::Response(response)) => {
                    self.delivered = link.came;
                    // What "the highest" or a label means may change; the rest must come from the version that began.
                    self.version = Version::Exactly(link.route.version);
                    link.replica.note_answer(&link.route, asked.elapsed(), self.router.now_us());
                    self.failover.reset(&self.router);
                    self.patience = None;
                    return Ok(Some(response));
                }
                Ok(Came::End) if link.came < self.delivered => {
                    let came = link.came;
                    return Err(self.diverged(came));
                }
                Ok(Came::End) => {
                    link.replica.note_success();
                    return Ok(None);
                }
                Err(status) => status,
            };
            self.failed(status, deadline).await?;
        }
    }

    /// Finds a replica and gives it the request.
    async fn connect(&mut self, deadline: Instant) -> Result<(), Status> {
        let table = self.routes.update();
        let route = lookup(&table, &self.request.model_name, &self.version)?;
        let Some(replica) = self.failover.pick(&self.router, route) else {
            return self.wait(None, deadline).await;
        };
        match self.open(&replica, route) {
            Ok(link) => {
                tracing::debug!(worker = %replica.worker_id, epoch = table.epoch(), delivered = self.delivered, "on a worker");
                self.link = Some(link);
                Ok(())
            }
            Err(status) => self.judge(&replica, status, deadline).await,
        }
    }

    fn open(&self, replica: &Arc<Replica>, route: &Arc<ModelRoute>) -> Result<Link, Status> {
        let connection = self.router.unread.connection(replica)?;
        let bytes_max = self.router.unread.message_bytes_max();
        let mut client = GrpcInferenceServiceClient::new(connection.channel.clone())
            .max_decoding_message_size(bytes_max)
            .max_encoding_message_size(bytes_max);
        let mut request = self.request.clone();
        route.address(&self.version, &mut request);
        let only = stream::iter([request]);
        let mut call = self.options.wrap(only, replica, self.options.deadline);
        // An error then has its reason, instead of its text alone.
        call.metadata_mut().insert(STREAM_ERRORS, MetadataValue::from_static("true"));
        let messages =
            async move { client.model_stream_infer(call).await.map(Response::into_inner) }.try_flatten_stream().boxed();
        Ok(Link {
            replica: Arc::clone(replica),
            route: Arc::clone(route),
            connection,
            messages,
            came: 0,
            _in_flight: replica.enter(),
        })
    }

    async fn failed(&mut self, status: Status, deadline: Instant) -> Result<(), Status> {
        let Some(link) = self.link.take() else { return Ok(()) };
        self.router.unread.failed(&link.connection, &status);
        self.judge(&link.replica, status, deadline).await
    }

    /// After a failure at `replica`: goes on at once or a little later, or says why not.
    async fn judge(&mut self, replica: &Arc<Replica>, status: Status, deadline: Instant) -> Result<(), Status> {
        let model = &self.request.model_name;
        if Instant::now() >= deadline {
            return Err(deadline_exceeded(model));
        }
        let table = self.routes.table();
        let route = lookup(&table, model, &self.version)?;
        let pause_ms = match self.failover.failed(&self.router, Some(route), replica, &status, deadline) {
            Verdict::GiveUp => return Err(outcome(status, model)),
            Verdict::Move { after_ms, .. } => after_ms,
            Verdict::Wait { at_most_ms, .. } => at_most_ms,
        };
        self.last = Some(status);
        if pause_ms == 0 {
            return Ok(());
        }
        self.wait(Some(Duration::from_millis(pause_ms)), deadline).await
    }

    /// Waits for newer routes, at most for `pause`, and then tries everybody again.
    async fn wait(&mut self, pause: Option<Duration>, deadline: Instant) -> Result<(), Status> {
        let now = Instant::now();
        let give_up = deadline.min(*self.patience.get_or_insert(now + self.router.settings.route_wait));
        self.routes.newer(pause.map_or(give_up, |pause| give_up.min(now + pause))).await;
        self.failover.forgive();
        if Instant::now() >= deadline {
            return Err(deadline_exceeded(&self.request.model_name));
        }
        if Instant::now() >= give_up {
            let table = self.routes.table();
            let route = lookup(&table, &self.request.model_name, &self.version)?;
            return Err(no_replica(&route.name, route.version, self.last.as_ref()));
        }
        Ok(())
    }

    fn diverged(&self, came: u64) -> Status {
        Reason::ModelFailed.status(format!(
            "model '{}' gave only {came} responses when the request was run again after {} were delivered; a decoupled model \
             must answer the same request in the same way",
            self.request.model_name, self.delivered
        ))
    }
}

impl Link {
    async fn next(&mut self, router: &Arc<Inner>, failover: &Failover, deadline: Instant) -> Result<Came, Status> {
        let next = async { self.messages.next().await.transpose() };
        let Some(message) = attended(router, &self.replica, &self.route, failover, deadline, next).await? else {
            return Err(Status::unknown("the worker ended the stream before the last response"));
        };
        let Some(mut response) = message.infer_response else {
            return Err(Status::internal("the worker sent a response without contents"));
        };
        let is_final = response.parameters.remove(keys::FINAL).and_then(|value| value.parameter_choice);
        if matches!(is_final, Some(ParameterChoice::BoolParam(true))) {
            return Ok(Came::End);
        }
        self.came += 1;
        Ok(Came::Response(response))
    }
}
