//! Routes for routers outside: the whole table, then again at each change; and what routers say of workers.
use std::{
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use cresset_client::Router;
use cresset_core::{
    WorkerId,
    opinions::{self, WORKERS_MAX},
};
use cresset_proto::{
    fleet::v1::{
        Opinion, ReportRequest, ReportResponse, WatchRequest, WatchResponse, routes_service_client::RoutesServiceClient,
        routes_service_server::RoutesService,
    },
    reason::Reason,
};
use futures::{Stream, StreamExt};
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use super::Context;
use crate::tables::Takes;

/// How long the leader may take to hear one.
const REPORT_TIMEOUT: Duration = Duration::from_millis(500);
/// The longest name of a router, in bytes.
const ROUTER_BYTES_MAX: usize = 128;

impl Context {
    /// Takes note of what a router says, or passes it on to the leader.
    async fn take_report(&self, report: ReportRequest) -> Result<ReportResponse, Status> {
        if report.router.is_empty() || report.router.len() > ROUTER_BYTES_MAX {
            return Err(Reason::InvalidArgument.status(format!("router must have 1 to {ROUTER_BYTES_MAX} bytes")));
        }
        if report.opinions.len() > WORKERS_MAX {
            let text = format!("opinions has {} entries, the limit is {WORKERS_MAX}", report.opinions.len());
            return Err(Reason::InvalidArgument.status(text));
        }
        if let Some(channel) = self.leader_channel() {
            let passed_on = timeout(REPORT_TIMEOUT, RoutesServiceClient::new(channel).report(report)).await;
            let late = |_| Reason::NoLeader.status("the leader didn't take the report in time");
            return passed_on.map_err(late)?.map(Response::into_inner);
        }
        let opinion = |said: &Opinion| {
            let worker = said.worker_id.parse::<WorkerId>().map_err(|error| Reason::InvalidArgument.status(error.to_string()))?;
            Ok((worker, opinions::Opinion { incarnation: said.incarnation, left_alone: said.left_alone }))
        };
        let of = report.opinions.iter().map(opinion).collect::<Result<_, Status>>()?;
        self.fleet.said(&report.router, of);
        Ok(ReportResponse {})
    }

    /// Tells the leader which workers this coordinator's own router leaves alone.
    pub async fn report(self: Arc<Self>, router: Router) {
        let mut reports = pin!(router.reports(self.id.to_string()));
        while let Some(report) = reports.next().await {
            if let Err(status) = self.take_report(report).await {
                tracing::debug!(%status, "the leader didn't take a report");
            }
        }
    }
}

pub(super) struct RouteWatch {
    pub(super) context: Arc<Context>,
}

#[tonic::async_trait]
impl RoutesService for RouteWatch {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<WatchResponse, Status>> + Send>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let WatchRequest { epoch, takes_changes } = request.into_inner();
        let takes = if takes_changes { Takes::Changes } else { Takes::Tables };
        let closing = self.context.closing.clone().cancelled_owned();
        // A caller that reads slowly is told less often, and then all that changed meanwhile.
        let newer = self.context.tables.since(Some(epoch), takes).map(|table| Ok(Arc::unwrap_or_clone(table)));
        Ok(Response::new(Box::pin(newer.take_until(closing))))
    }

    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        self.context.take_report(request.into_inner()).await.map(Response::new)
    }
}
