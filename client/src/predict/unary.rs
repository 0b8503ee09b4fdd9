//! One request without state, on one replica after the other until it is answered.
use std::{sync::Arc, time::Duration};

use cresset_proto::inference::{
    ModelInferRequest, ModelInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient,
};
use tokio::time::Instant;
use tonic::Status;
use tracing::Instrument;

use super::{
    CallOptions, Inner,
    answered::Key,
    call::{deadline_exceeded, no_replica, outcome},
    failover::Failover,
    hedge::{Attempt, hedged},
    lookup,
    vigil::attended,
};
use crate::{
    retry::{Kind, Verdict},
    routes::{ModelRoute, Replica, Routes, Version},
};

/// An error so close to the deadline is the deadline's: the worker and tonic watch it too, with timers of their own.
const DEADLINE_GRAIN: Duration = Duration::from_millis(2);

/// Runs the request, or says in a caller's words why not. One that has a key is run once.
pub(super) async fn infer(
    router: &Arc<Inner>,
    request: ModelInferRequest,
    version: Version,
    key: Option<Box<Key>>,
    options: &CallOptions,
    deadline: Instant,
) -> Result<ModelInferResponse, Status> {
    let Some(key) = key else { return run(router, request, &version, options, deadline).await };
    let (model, own_id) = (request.model_name.clone(), request.id.clone());
    // Boxed: few requests have one, and the others' futures needn't be any larger for it.
    let once = Box::pin(router.answered.once(*key, || router.now_ms(), run(router, request, &version, options, deadline)));
    let answer = tokio::time::timeout_at(deadline, once).await.unwrap_or_else(|_| Err(deadline_exceeded(&model)))?;
    Ok(ModelInferResponse { id: own_id, ..answer })
}

async fn run(
    router: &Arc<Inner>,
    request: ModelInferRequest,
    version: &Version,
    options: &CallOptions,
    deadline: Instant,
) -> Result<ModelInferResponse, Status> {
    // Only whoever has to wait needs word of newer ones.
    let mut routes: Option<Routes> = None;
    let mut failover = Failover::new(router, Kind::Unary);
    let model = request.model_name.clone();
    let mut last: Option<Status> = None;
    // Runs from the moment when nobody could take the request.
    let mut patience: Option<Instant> = None;
    loop {
        let table = routes.as_mut().map_or_else(|| router.routes.table(), Routes::update);
        let route = lookup(&table, &model, version)?;
        let pause = match failover.pick(router, route) {
            Some(replica) => {
                let span = tracing::debug_span!("attempt", %model, worker = %replica.worker_id, epoch = table.epoch());
                let send = |replica: Arc<Replica>| {
                    let mut request = request.clone();
                    route.address(version, &mut request);
                    once(router, replica, route, &failover, request, options, deadline)
                };
                let Attempt { replica, took, result } = hedged(router, &failover, route, replica, send).instrument(span).await;
                let status = match result {
                    Ok(response) => {
                        replica.note_answer(route, took, router.now_us());
                        return Ok(response);
                    }
                    Err(status) => status,
                };
                if Instant::now() + DEADLINE_GRAIN >= deadline {
                    return Err(deadline_exceeded(&model));
                }
                let verdict = failover.failed(router, Some(route), &replica, &status, deadline);
                let pause = match verdict {
                    Verdict::GiveUp => return Err(outcome(status, &model)),
                    Verdict::Move { after_ms, .. } => after_ms,
                    Verdict::Wait { at_most_ms, .. } => at_most_ms,
                };
                last = Some(status);
                if pause == 0 {
                    continue;
                }
                Some(Duration::from_millis(pause))
            }
            // Nobody is ready; only a newer table can help.
            None => None,
        };
        let now = Instant::now();
        let give_up = deadline.min(*patience.get_or_insert(now + router.settings.route_wait));
        let until = pause.map_or(give_up, |pause| give_up.min(now + pause));
        Box::pin(routes.get_or_insert_with(|| router.routes.since(&table)).newer(until)).await;
        failover.forgive();
        if Instant::now() >= deadline {
            return Err(deadline_exceeded(&model));
        }
        if Instant::now() >= give_up {
            return Err(no_replica(&model, route.version, last.as_ref()));
        }
    }
}

/// One attempt at one replica. Dropping it resets the call there.
async fn once(
    router: &Arc<Inner>,
    replica: Arc<Replica>,
    route: &ModelRoute,
    failover: &Failover,
    request: ModelInferRequest,
    options: &CallOptions,
    deadline: Instant,
) -> Result<ModelInferResponse, Status> {
    let _in_flight = replica.enter();
    let connection = router.workers.connection(&replica)?;
    let bytes_max = router.workers.message_bytes_max();
    let mut client = GrpcInferenceServiceClient::new(connection.channel.clone())
        .max_decoding_message_size(bytes_max)
        .max_encoding_message_size(bytes_max);
    let request = options.wrap(request, &replica, Some(deadline));
    // Boxed: tonic's future is by far the largest part of a request's, and all of those around it would be moved with it.
    let call = Box::pin(async { client.model_infer(request).await.map(tonic::Response::into_inner) });
    let answer = attended(router, &replica, route, failover, deadline, call).await;
    if let Err(status) = &answer {
        router.workers.failed(&connection, status);
    }
    answer
}
