//! Many requests and their answers on one ModelStreamInfer.
//!
//! Answers leave in the order of their requests, as in Triton. Those of decoupled models leave as they come; so do those of
//! requests that say `cresset_unordered: true`, except that requests of one sequence keep their order.
use std::sync::Arc;

use cresset_proto::{
    ids::SequenceId,
    inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse},
    parameters::{Parameters, bool_parameter, keys},
};
use cresset_runtime::telemetry::continue_trace;
use futures::{
    FutureExt, Stream, StreamExt,
    future::BoxFuture,
    stream::{self, BoxStream, FuturesOrdered, FuturesUnordered, SelectAll},
};
use tokio_stream::StreamMap;
use tonic::{Status, metadata::MetadataMap};

use super::{fence, shared_memory};
use crate::{
    error::PredictError,
    predict::{Begun, Worker},
};

/// Requests of one stream that may be in flight; beyond them the stream isn't read on.
const STREAM_REQUESTS_MAX: usize = 128;

type Item = Result<ModelStreamInferResponse, Status>;

/// The answers to a stream of requests, with the first error of the stream itself as the last item.
pub(super) fn answers(
    worker: Arc<Worker>,
    metadata: MetadataMap,
    is_here: bool,
    requests: impl Stream<Item = Result<ModelInferRequest, Status>> + Send + 'static,
) -> impl Stream<Item = Item> + Send {
    let strict = metadata.get("triton_grpc_error").is_some_and(|value| value == "true");
    let lane = Lanes {
        worker,
        metadata,
        is_here,
        strict,
        requests: requests.boxed(),
        reading: true,
        in_order: FuturesOrdered::new(),
        any_order: FuturesUnordered::new(),
        sequences: StreamMap::new(),
        many: SelectAll::new(),
    };
    stream::unfold(Some(lane), |lanes| async move {
        let mut lanes = lanes?;
        match lanes.next().await {
            Some(Ok(response)) => Some((Ok(response), Some(lanes))),
            // An error of the stream ends it.
            Some(Err(status)) => Some((Err(status), None)),
            None => None,
        }
    })
}

/// Requests in flight, by the order that their answers keep.
struct Lanes {
    worker: Arc<Worker>,
    metadata: MetadataMap,
    /// The caller is on this host, and may share memory with the worker.
    is_here: bool,
    strict: bool,
    requests: BoxStream<'static, Result<ModelInferRequest, Status>>,
    reading: bool,
    in_order: FuturesOrdered<BoxFuture<'static, Item>>,
    any_order: FuturesUnordered<BoxFuture<'static, Item>>,
    sequences: StreamMap<SequenceId, FuturesOrdered<BoxFuture<'static, Item>>>,
    many: SelectAll<BoxStream<'static, Item>>,
}

impl Lanes {
    fn in_flight(&self) -> usize {
        let sequences: usize = self.sequences.values().map(FuturesOrdered::len).sum();
        self.in_order.len() + self.any_order.len() + sequences + self.many.len()
    }

    async fn next(&mut self) -> Option<Item> {
        loop {
            let may_read = self.reading && self.in_flight() < STREAM_REQUESTS_MAX;
            tokio::select! {
                request = self.requests.next(), if may_read => match request {
                    Some(Ok(request)) => {
                        if let Err(status) = self.begin(request) {
                            return Some(Err(status));
                        }
                    }
                    Some(Err(status)) => return Some(Err(status)),
                    None => self.reading = false,
                },
                Some(item) = self.in_order.next(), if !self.in_order.is_empty() => return Some(item),
                Some(item) = self.any_order.next(), if !self.any_order.is_empty() => return Some(item),
                Some((_, item)) = self.sequences.next(), if !self.sequences.is_empty() => return Some(item),
                Some(item) = self.many.next(), if !self.many.is_empty() => return Some(item),
                else => return None,
            }
        }
    }

    /// Requests enter their lines here, in the order of the stream.
    fn begin(&mut self, request: ModelInferRequest) -> Result<(), Status> {
        let request = shared_memory::checked(request, self.is_here)?;
        // A worker that goes away ends its streams: what was taken is answered, the next request moves.
        fence(&self.worker, &self.metadata).map_err(|error| error.status())?;
        let span = self.worker.span(&request);
        continue_trace(&span, &self.metadata);
        let echo = ModelInferResponse { id: request.id.clone(), model_name: request.model_name.clone(), ..Default::default() };
        let parameters = Parameters::read(&request.parameters).unwrap_or_default();
        let strict = self.strict;
        // The deadline is the stream's and ends it as a whole; dropping a request takes it out of its line.
        match self.worker.begin_any(request, None, span) {
            Begun::One(answer) => {
                let item = async move { item(answer.await, true, echo, strict) }.boxed();
                match (parameters.unordered, parameters.sequence_id) {
                    (false, _) => self.in_order.push_back(item),
                    (true, None) => self.any_order.push(item),
                    (true, Some(id)) => self.enter_sequence(id, item),
                }
            }
            Begun::Many(answers) => {
                let last = parameters.empty_final_response.then(|| Ok(final_response(&echo)));
                let items = answers.map(move |answer| item(answer, false, echo.clone(), strict)).chain(stream::iter(last));
                self.many.push(items.boxed());
            }
        }
        Ok(())
    }

    fn enter_sequence(&mut self, id: SequenceId, item: BoxFuture<'static, Item>) {
        let found = self.sequences.iter_mut().find(|(key, _)| *key == id);
        if let Some((_, line)) = found {
            line.push_back(item);
        } else {
            self.sequences.insert(id, FuturesOrdered::from_iter([item]));
        }
    }
}

fn item(answer: Result<ModelInferResponse, PredictError>, is_last: bool, echo: ModelInferResponse, strict: bool) -> Item {
    let (error_message, mut response, is_last) = match answer {
        Ok(response) => (String::new(), response, is_last),
        Err(error) if strict => return Err(error.status()),
        Err(error) => (error.to_string(), echo, true),
    };
    response.parameters.insert(keys::FINAL.into(), bool_parameter(is_last));
    Ok(ModelStreamInferResponse { error_message, infer_response: Some(response) })
}

/// What tells a caller that asked for it that no response follows.
fn final_response(echo: &ModelInferResponse) -> ModelStreamInferResponse {
    let mut response = echo.clone();
    response.parameters.insert(keys::FINAL.into(), bool_parameter(true));
    ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) }
}
