//! A coordinator for tests.
use std::net::SocketAddr;

use cresset_proto::{
    admin::v1::{
        self as admin,
        admin_service_server::{AdminService, AdminServiceServer},
    },
    fleet::v1::{
        ReportRequest, ReportResponse, WatchRequest, WatchResponse,
        routes_service_server::{RoutesService, RoutesServiceServer},
    },
    reason::Reason,
};
use futures::{StreamExt, stream::BoxStream};
use tokio::{net::TcpListener, sync::watch};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::relay_all;

/// A coordinator for tests: it sends the tables that it is given, and answers `Status` with its id or not at all.
#[derive(Clone)]
pub(crate) struct FakeCoordinator {
    pub(crate) address: SocketAddr,
    id: String,
    leads: bool,
    alive: CancellationToken,
    tables: watch::Sender<WatchResponse>,
    /// Epochs that watchers said they had.
    pub(crate) watched: watch::Sender<Vec<u64>>,
    /// What clients said of workers.
    pub(crate) reported: watch::Sender<Vec<ReportRequest>>,
}

impl FakeCoordinator {
    pub(crate) async fn start(id: &str, leads: bool, table: WatchResponse) -> Self {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = server.local_addr().unwrap();
        let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let fake = Self {
            address: relay.local_addr().unwrap(),
            id: id.into(),
            leads,
            alive: CancellationToken::new(),
            tables: watch::Sender::new(table),
            watched: watch::Sender::new(Vec::new()),
            reported: watch::Sender::new(Vec::new()),
        };
        let alive = fake.alive.clone();
        tokio::spawn(alive.clone().run_until_cancelled_owned(relay_all(relay, behind, watch::Sender::new(false).subscribe())));
        let service = tonic::transport::Server::builder()
            .add_service(RoutesServiceServer::new(fake.clone()))
            .add_service(AdminServiceServer::new(fake.clone()));
        tokio::spawn(service.serve_with_incoming_shutdown(TcpListenerStream::new(server), alive.cancelled_owned()));
        fake
    }

    pub(crate) fn die(&self) {
        self.alive.cancel();
    }

    pub(crate) fn publish(&self, table: WatchResponse) {
        self.tables.send_replace(table);
    }
}

#[tonic::async_trait]
impl RoutesService for FakeCoordinator {
    type WatchStream = BoxStream<'static, Result<WatchResponse, Status>>;

    async fn watch(&self, request: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let epoch = request.into_inner().epoch;
        self.watched.send_modify(|watched| watched.push(epoch));
        let tables = tokio_stream::wrappers::WatchStream::new(self.tables.subscribe());
        Ok(Response::new(tables.filter(move |table| std::future::ready(table.epoch > epoch)).map(Ok).boxed()))
    }

    async fn report(&self, request: Request<ReportRequest>) -> Result<Response<ReportResponse>, Status> {
        self.reported.send_modify(|reported| reported.push(request.into_inner()));
        Ok(Response::new(ReportResponse {}))
    }
}

#[tonic::async_trait]
impl AdminService for FakeCoordinator {
    type WatchStatusStream = BoxStream<'static, Result<admin::StatusResponse, Status>>;
    type BackupStream = BoxStream<'static, Result<admin::BackupResponse, Status>>;

    async fn backup(&self, _: Request<admin::BackupRequest>) -> Result<Response<Self::BackupStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn status(&self, _: Request<admin::StatusRequest>) -> Result<Response<admin::StatusResponse>, Status> {
        if self.leads {
            Ok(Response::new(admin::StatusResponse { answered_by: self.id.clone(), ..Default::default() }))
        } else {
            Err(Reason::NoLeader.status(format!("{} knows no leader", self.id)))
        }
    }

    async fn watch_status(&self, _: Request<admin::WatchStatusRequest>) -> Result<Response<Self::WatchStatusStream>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn deploy(&self, _: Request<admin::DeployRequest>) -> Result<Response<admin::DeployResponse>, Status> {
        Err(Reason::UnknownModel.status(format!("{} knows no such model", self.id)))
    }

    async fn undeploy(&self, _: Request<admin::UndeployRequest>) -> Result<Response<admin::UndeployResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn label(&self, _: Request<admin::LabelRequest>) -> Result<Response<admin::LabelResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn drain_worker(&self, _: Request<admin::DrainWorkerRequest>) -> Result<Response<admin::DrainWorkerResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn remove_worker(
        &self,
        _: Request<admin::RemoveWorkerRequest>,
    ) -> Result<Response<admin::RemoveWorkerResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn repository(&self, _: Request<admin::RepositoryRequest>) -> Result<Response<admin::RepositoryResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn members(&self, _: Request<admin::MembersRequest>) -> Result<Response<admin::MembersResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn change_members(
        &self,
        _: Request<admin::ChangeMembersRequest>,
    ) -> Result<Response<admin::ChangeMembersResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }

    async fn transfer_leadership(
        &self,
        _: Request<admin::TransferLeadershipRequest>,
    ) -> Result<Response<admin::TransferLeadershipResponse>, Status> {
        Err(Status::unimplemented("not asked here"))
    }
}
