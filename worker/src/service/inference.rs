//! The Open Inference Protocol over this worker's own replicas.
use std::{pin::Pin, sync::Arc};

use cresset_client::predict::until_end;
use cresset_proto::{
    answers::{Server, cuda_shared_memory_status, no_cuda_shared_memory, no_trace_settings, server_metadata},
    fleet::v1::ReplicaState,
    inference::{grpc_inference_service_server::GrpcInferenceService, repository_index_response::ModelIndex, *},
    model_config::{effective, metadata},
    reason::Reason,
};
use cresset_runtime::telemetry::continue_trace;
use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{deadline, fence, settings, shared_memory, stream};
use crate::{engine::Device, predict::Worker};

pub(super) struct Inference {
    pub(super) worker: Arc<Worker>,
}

type Answer<T> = Result<Response<T>, Status>;

/// Models are placed by the cluster: a worker that loaded one on its own would unload it again at the next word from the leader.
fn not_here<T>(what: &str) -> Answer<T> {
    Err(Reason::Unsupported.status(format!("{what} a model on one worker is not supported by this server: ask a coordinator")))
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Answer<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Answer<ServerReadyResponse> {
        Ok(Response::new(ServerReadyResponse { ready: !self.worker.is_draining() }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Answer<ModelReadyResponse> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = match self.worker.models.find_to_run(&name, &version) {
            Ok(_) => !self.worker.is_draining(),
            Err(error) if matches!(error.reason(), Reason::UnknownModel | Reason::DeviceUnhealthy) => false,
            Err(error) => return Err(error.status()),
        };
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(server_metadata(Server::Worker, env!("CARGO_PKG_VERSION"))))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let served = self.worker.models.find(&name, &version).map_err(|error| error.status())?;
        let versions = if version.is_empty() { self.worker.models.versions(&name) } else { vec![served.key.version] };
        Ok(Response::new(metadata(&served.config, versions.iter().map(u64::to_string).collect())))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Answer<ModelInferResponse> {
        fence(&self.worker, request.metadata()).map_err(|error| error.status())?;
        let deadline = deadline(request.metadata());
        let is_here = shared_memory::is_here(request.extensions());
        let span = self.worker.span(request.get_ref());
        continue_trace(&span, request.metadata());
        let request = shared_memory::checked(request.into_inner(), is_here)?;
        let answer = self.worker.begin(request, deadline, span).await;
        answer.map(Response::new).map_err(|error| error.status())
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(&self, request: Request<Streaming<ModelInferRequest>>) -> Answer<Self::ModelStreamInferStream> {
        let deadline = deadline(request.metadata());
        let metadata = request.metadata().clone();
        let is_here = shared_memory::is_here(request.extensions());
        let responses = stream::answers(Arc::clone(&self.worker), metadata, is_here, request.into_inner());
        Ok(Response::new(Box::pin(until_end(responses, deadline.map(Into::into)))))
    }

    async fn model_config(&self, request: Request<ModelConfigRequest>) -> Answer<ModelConfigResponse> {
        let ModelConfigRequest { name, version } = request.into_inner();
        let served = self.worker.models.find(&name, &version).map_err(|error| error.status())?;
        let gpu = |device: &Device| match device {
            Device::Cpu => None,
            Device::Cuda(ordinal) => i32::try_from(*ordinal).ok(),
        };
        let gpus: Vec<i32> = served.devices.iter().filter_map(gpu).collect();
        Ok(Response::new(ModelConfigResponse { config: Some(effective(&served.config, &gpus)) }))
    }

    async fn repository_index(&self, request: Request<RepositoryIndexRequest>) -> Answer<RepositoryIndexResponse> {
        let RepositoryIndexRequest { repository_name, ready: only_ready } = request.into_inner();
        if !repository_name.is_empty() {
            return Err(Reason::Unsupported.status("'repository_name' specification is not supported"));
        }
        let models = self.worker.models.observed().into_iter().map(|replica| {
            let state = match replica.state() {
                ReplicaState::Ready => "READY",
                ReplicaState::Failed => "UNAVAILABLE",
                ReplicaState::Unloading => "UNLOADING",
                _ => "LOADING",
            };
            ModelIndex { name: replica.model, version: replica.version.to_string(), state: state.into(), reason: replica.reason }
        });
        let models = models.filter(|model| !only_ready || model.state == "READY").collect();
        Ok(Response::new(RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(&self, _: Request<RepositoryModelLoadRequest>) -> Answer<RepositoryModelLoadResponse> {
        not_here("loading")
    }

    async fn repository_model_unload(&self, _: Request<RepositoryModelUnloadRequest>) -> Answer<RepositoryModelUnloadResponse> {
        not_here("unloading")
    }

    async fn model_statistics(&self, request: Request<ModelStatisticsRequest>) -> Answer<ModelStatisticsResponse> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        self.worker.statistics(&name, &version).map(Response::new)
    }

    async fn system_shared_memory_status(
        &self,
        request: Request<SystemSharedMemoryStatusRequest>,
    ) -> Answer<SystemSharedMemoryStatusResponse> {
        shared_memory::only_here(request.extensions())?;
        shared_memory::status(&self.worker.shared_memory, &request.get_ref().name).map(Response::new)
    }

    async fn system_shared_memory_register(
        &self,
        request: Request<SystemSharedMemoryRegisterRequest>,
    ) -> Answer<SystemSharedMemoryRegisterResponse> {
        shared_memory::only_here(request.extensions())?;
        shared_memory::register(&self.worker.shared_memory, request)?;
        Ok(Response::new(SystemSharedMemoryRegisterResponse {}))
    }

    async fn system_shared_memory_unregister(
        &self,
        request: Request<SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<SystemSharedMemoryUnregisterResponse> {
        shared_memory::only_here(request.extensions())?;
        self.worker.shared_memory.unregister(&request.get_ref().name);
        Ok(Response::new(SystemSharedMemoryUnregisterResponse {}))
    }

    async fn cuda_shared_memory_status(
        &self,
        request: Request<CudaSharedMemoryStatusRequest>,
    ) -> Answer<CudaSharedMemoryStatusResponse> {
        cuda_shared_memory_status(&request.get_ref().name).map(Response::new)
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<CudaSharedMemoryRegisterRequest>,
    ) -> Answer<CudaSharedMemoryRegisterResponse> {
        Err(no_cuda_shared_memory())
    }

    /// Clients clean up before they begin: there is nothing to do, and that is done.
    async fn cuda_shared_memory_unregister(
        &self,
        _: Request<CudaSharedMemoryUnregisterRequest>,
    ) -> Answer<CudaSharedMemoryUnregisterResponse> {
        Ok(Response::new(CudaSharedMemoryUnregisterResponse {}))
    }

    async fn trace_setting(&self, request: Request<TraceSettingRequest>) -> Answer<TraceSettingResponse> {
        let model = &request.get_ref().model_name;
        if !model.is_empty() && self.worker.models.find(model, "").is_err() {
            return Err(no_trace_settings(model));
        }
        settings::trace(request.get_ref()).map(Response::new)
    }

    async fn log_settings(&self, request: Request<LogSettingsRequest>) -> Answer<LogSettingsResponse> {
        settings::log(request.get_ref()).map(Response::new)
    }
}
