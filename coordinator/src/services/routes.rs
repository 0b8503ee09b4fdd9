//! Routes for routers outside: the whole table, then again at each change.
use std::{pin::Pin, sync::Arc};

use cresset_core::routes::routes;
use cresset_proto::fleet::v1::{WatchRequest, WatchResponse, routes_service_server::RoutesService};
use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status};

use super::Context;

pub(super) struct RouteWatch {
    pub(super) context: Arc<Context>,
}

#[tonic::async_trait]
impl RoutesService for RouteWatch {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let known = request.into_inner().epoch;
        let context = Arc::clone(&self.context);
        // A caller that reads slowly skips tables: only the newest counts.
        let changes = tokio_stream::wrappers::WatchStream::new(context.consensus.applied());
        let closing = context.closing.clone().cancelled_owned();
        let tables = changes
            .scan(known, move |sent, applied| {
                let newer = (applied.epoch > *sent).then(|| {
                    let table = WatchResponse::from(&routes(&context.consensus.state()));
                    *sent = table.epoch;
                    Ok(table)
                });
                std::future::ready(Some(newer))
            })
            .filter_map(std::future::ready)
            .take_until(closing);
        Ok(Response::new(Box::pin(tables)))
    }
}
