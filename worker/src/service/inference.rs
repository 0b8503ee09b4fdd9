//! The Open Inference Protocol over this worker's own replicas.
use std::{pin::Pin, sync::Arc};

use cresset_client::predict::until_end;
use cresset_proto::{
    fleet::v1::ReplicaState,
    inference::{grpc_inference_service_server::GrpcInferenceService, repository_index_response::ModelIndex, *},
    model_config::metadata,
    reason::Reason,
};
use cresset_runtime::telemetry::continue_trace;
use futures::Stream;
use tonic::{Request, Response, Status, Streaming};

use super::{deadline, fence, stream};
use crate::predict::Worker;

pub(super) struct Inference {
    pub(super) worker: Arc<Worker>,
}

type Answer<T> = Result<Response<T>, Status>;

/// For calls that a later version serves.
fn not_yet<T>(what: &str) -> Answer<T> {
    Err(Reason::Unsupported.status(format!("{what} is not supported by this server")))
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
        let ready = match self.worker.models.find(&name, &version) {
            Ok(_) => !self.worker.is_draining(),
            Err(error) if error.reason() == Reason::UnknownModel => false,
            Err(error) => return Err(error.status()),
        };
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(ServerMetadataResponse {
            name: "cresset".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            extensions: ["sequence", "sequence(string_id)", "model_configuration", "binary_tensor_data", "parameters"]
                .map(String::from)
                .to_vec(),
        }))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let served = self.worker.models.find(&name, &version).map_err(|error| error.status())?;
        Ok(Response::new(metadata(&served.config, vec![served.key.version.to_string()])))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Answer<ModelInferResponse> {
        fence(&self.worker, request.metadata()).map_err(|error| error.status())?;
        let deadline = deadline(request.metadata());
        let span = self.worker.span(request.get_ref());
        continue_trace(&span, request.metadata());
        let answer = self.worker.begin(request.into_inner(), deadline, span).await;
        answer.map(Response::new).map_err(|error| error.status())
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(&self, request: Request<Streaming<ModelInferRequest>>) -> Answer<Self::ModelStreamInferStream> {
        let deadline = deadline(request.metadata());
        let metadata = request.metadata().clone();
        let responses = stream::answers(Arc::clone(&self.worker), metadata, request.into_inner());
        Ok(Response::new(Box::pin(until_end(responses, deadline.map(Into::into)))))
    }

    async fn model_config(&self, request: Request<ModelConfigRequest>) -> Answer<ModelConfigResponse> {
        let ModelConfigRequest { name, version } = request.into_inner();
        let served = self.worker.models.find(&name, &version).map_err(|error| error.status())?;
        Ok(Response::new(ModelConfigResponse { config: Some(served.config.clone()) }))
    }

    async fn repository_index(&self, request: Request<RepositoryIndexRequest>) -> Answer<RepositoryIndexResponse> {
        let only_ready = request.into_inner().ready;
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
        not_yet("loading a model on one worker; ask a coordinator, which")
    }

    async fn repository_model_unload(&self, _: Request<RepositoryModelUnloadRequest>) -> Answer<RepositoryModelUnloadResponse> {
        not_yet("unloading a model on one worker; ask a coordinator, which")
    }

    async fn model_statistics(&self, _: Request<ModelStatisticsRequest>) -> Answer<ModelStatisticsResponse> {
        not_yet("ModelStatistics")
    }

    async fn system_shared_memory_status(
        &self,
        _: Request<SystemSharedMemoryStatusRequest>,
    ) -> Answer<SystemSharedMemoryStatusResponse> {
        not_yet("system shared memory")
    }

    async fn system_shared_memory_register(
        &self,
        _: Request<SystemSharedMemoryRegisterRequest>,
    ) -> Answer<SystemSharedMemoryRegisterResponse> {
        not_yet("system shared memory")
    }

    async fn system_shared_memory_unregister(
        &self,
        _: Request<SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<SystemSharedMemoryUnregisterResponse> {
        not_yet("system shared memory")
    }

    async fn cuda_shared_memory_status(
        &self,
        _: Request<CudaSharedMemoryStatusRequest>,
    ) -> Answer<CudaSharedMemoryStatusResponse> {
        not_yet("CUDA shared memory")
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<CudaSharedMemoryRegisterRequest>,
    ) -> Answer<CudaSharedMemoryRegisterResponse> {
        not_yet("CUDA shared memory")
    }

    async fn cuda_shared_memory_unregister(
        &self,
        _: Request<CudaSharedMemoryUnregisterRequest>,
    ) -> Answer<CudaSharedMemoryUnregisterResponse> {
        not_yet("CUDA shared memory")
    }

    async fn trace_setting(&self, _: Request<TraceSettingRequest>) -> Answer<TraceSettingResponse> {
        not_yet("TraceSetting")
    }

    async fn log_settings(&self, _: Request<LogSettingsRequest>) -> Answer<LogSettingsResponse> {
        not_yet("LogSettings")
    }
}
