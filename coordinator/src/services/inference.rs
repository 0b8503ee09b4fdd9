//! The Open Inference Protocol for the whole cluster, through the router.
use std::{pin::Pin, sync::Arc, time::Duration};

use cresset_client::{CallOptions, LookupError, ModelRoute, Router, Version, repository::archive::is_file_name};
use cresset_core::{
    CommandId,
    status::{ModelState, models},
};
use cresset_proto::{
    answers::{
        Server, cuda_shared_memory_status, no_cuda_shared_memory, no_shared_memory, no_statistics, no_trace_settings,
        server_metadata,
    },
    inference::{grpc_inference_service_server::GrpcInferenceService, repository_index_response::ModelIndex, *},
    model_config::{effective, metadata, parse_json},
    reason::Reason,
};
use cresset_runtime::telemetry::{continue_trace, pass_trace};
use futures::Stream;
use tokio::time::{Instant, timeout_at};
use tonic::{Request, Response, Status, Streaming};
use tracing::{Instrument, Span};

use super::{Context, deadline, deploy::Wanted, settings, statistics::Statistics};

/// How long a load may take for a caller that gives no deadline.
const LOAD_TIMEOUT: Duration = Duration::from_secs(600);

pub(super) struct Inference {
    pub(super) context: Arc<Context>,
    pub(super) router: Router,
    pub(super) statistics: Statistics,
}

type Answer<T> = Result<Response<T>, Status>;

/// A cluster has one model repository, so naming one is an error, in Triton's words, and not passed over.
fn only_repository(name: &str) -> Result<(), Status> {
    if name.is_empty() {
        return Ok(());
    }
    Err(Reason::Unsupported.status("'repository_name' specification is not supported: a cluster has one model repository"))
}

impl Inference {
    /// What comes with a call, with this process's span as the parent of the worker's.
    fn options(&self, metadata: &tonic::metadata::MetadataMap, span: &Span) -> CallOptions {
        let mut options = CallOptions::from_metadata(metadata, Instant::now());
        // A little before the caller's own clock says so, so that it hears it from us, with the right code.
        options.deadline = options.deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(Instant::now());
            deadline - left / 50
        });
        span.in_scope(|| pass_trace(&mut options.metadata));
        options
    }

    fn span(&self, model: &str, version: &str, request: &str) -> Span {
        let (coordinator, epoch) = (self.context.id, self.router.routes().epoch());
        tracing::info_span!("route", %coordinator, epoch, model, version, request)
    }

    fn route(&self, name: &str, version: &str) -> Result<Arc<ModelRoute>, Status> {
        let version = Version::read(version).map_err(|error| LookupError::from(error).status())?;
        self.router.routes().lookup(name, &version).cloned().map_err(|error| error.status())
    }

    /// The GPUs where a model runs: those of one of its replicas, since all workers of a model are alike.
    fn gpus(&self, route: &ModelRoute) -> Vec<i32> {
        let Some(replica) = route.replicas.first() else { return vec![] };
        let state = self.context.consensus.state();
        let worker = state.workers.iter().find(|(id, _)| id.as_str() == replica.worker_id);
        let devices = worker.map_or(&[][..], |(_, worker)| &worker.devices);
        devices.iter().filter_map(|device| device.name.strip_prefix("cuda:")?.parse().ok()).collect()
    }

    /// The routes of a model, of one version of it, or of all models.
    fn routes_of(&self, name: &str, version: &str) -> Result<Vec<Arc<ModelRoute>>, Status> {
        if !name.is_empty() && !version.is_empty() {
            return match self.route(name, version) {
                Ok(route) => Ok(vec![route]),
                Err(status) if Reason::of(&status) == Some(Reason::UnknownModel) => {
                    Err(no_statistics(name, self.router.routes().has_model(name)))
                }
                Err(status) => Err(status),
            };
        }
        let table = self.router.routes();
        Ok(if name.is_empty() { table.models().cloned().collect() } else { table.versions(name).cloned().collect() })
    }

    /// Waits until the router knows what this coordinator knows, so that the caller's next request finds it so.
    async fn routed(&self, deadline: Instant) {
        let epoch = self.context.consensus.state().epoch;
        let _ = timeout_at(deadline, self.router.wait_for_epoch(epoch)).await;
    }
}

/// What a load brings along, in Triton's parameters for it.
fn wanted(request: RepositoryModelLoadRequest) -> Result<Wanted, Status> {
    use model_repository_parameter::ParameterChoice::{BytesParam, StringParam};
    let mut wanted = Wanted { name: request.model_name, ..Default::default() };
    let refuse = |text: String| Err(Reason::InvalidArgument.status(text));
    for (key, parameter) in request.parameters {
        match (key.as_str(), parameter.parameter_choice) {
            ("config", Some(StringParam(text))) => match parse_json(&text) {
                Ok(config) => wanted.config = Some(config),
                Err(error) => {
                    return refuse(format!("parameter 'config' of model '{}' is no ModelConfig: {error}", wanted.name));
                }
            },
            ("config", _) => return refuse("parameter 'config' must be a string: ModelConfig as JSON".to_owned()),
            (file, Some(BytesParam(bytes))) if file.starts_with("file:") => {
                let path = file["file:".len()..].split_once('/');
                let version = path.and_then(|(version, name)| Some((version.parse().ok().filter(|v| *v > 0)?, name)));
                let Some((version, name)) = version.filter(|(_, name)| is_file_name(name)) else {
                    return refuse(format!(
                        "parameter '{key}' must be 'file:VERSION/NAME', with a version from 1 and a file in its folder"
                    ));
                };
                wanted.files.entry(version).or_default().insert(name.to_owned(), bytes);
            }
            (file, _) if file.starts_with("file:") => return refuse(format!("parameter '{key}' must be bytes")),
            _ => return refuse(format!("unrecognized load parameter '{key}'.")),
        }
    }
    Ok(wanted)
}

#[tonic::async_trait]
impl GrpcInferenceService for Inference {
    async fn server_live(&self, _: Request<ServerLiveRequest>) -> Answer<ServerLiveResponse> {
        Ok(Response::new(ServerLiveResponse { live: true }))
    }

    async fn server_ready(&self, _: Request<ServerReadyRequest>) -> Answer<ServerReadyResponse> {
        let ready = self.router.routes().is_received() && !self.context.closing.is_cancelled();
        Ok(Response::new(ServerReadyResponse { ready }))
    }

    async fn model_ready(&self, request: Request<ModelReadyRequest>) -> Answer<ModelReadyResponse> {
        let ModelReadyRequest { name, version } = request.into_inner();
        let ready = match self.route(&name, &version) {
            Ok(route) => !route.replicas.is_empty(),
            Err(status) if Reason::of(&status) == Some(Reason::UnknownModel) => false,
            Err(status) => return Err(status),
        };
        Ok(Response::new(ModelReadyResponse { ready }))
    }

    async fn server_metadata(&self, _: Request<ServerMetadataRequest>) -> Answer<ServerMetadataResponse> {
        Ok(Response::new(server_metadata(Server::Coordinator, env!("CARGO_PKG_VERSION"))))
    }

    async fn model_metadata(&self, request: Request<ModelMetadataRequest>) -> Answer<ModelMetadataResponse> {
        let ModelMetadataRequest { name, version } = request.into_inner();
        let route = self.route(&name, &version)?;
        let mut versions = vec![route.version.to_string()];
        if version.is_empty() && !route.replicas.is_empty() {
            versions = self.router.routes().versions_ready(&name).map(|version| version.to_string()).collect();
        }
        Ok(Response::new(metadata(&route.config, versions)))
    }

    async fn model_infer(&self, request: Request<ModelInferRequest>) -> Answer<ModelInferResponse> {
        let message = request.get_ref();
        let span = self.span(&message.model_name, &message.model_version, &message.id);
        continue_trace(&span, request.metadata());
        let options = self.options(request.metadata(), &span);
        self.router.infer(request.into_inner(), &options).instrument(span).await.map(Response::new)
    }

    type ModelStreamInferStream = Pin<Box<dyn Stream<Item = Result<ModelStreamInferResponse, Status>> + Send>>;

    async fn model_stream_infer(&self, request: Request<Streaming<ModelInferRequest>>) -> Answer<Self::ModelStreamInferStream> {
        let span = self.span("", "", "");
        continue_trace(&span, request.metadata());
        let options = self.options(request.metadata(), &span);
        Ok(Response::new(Box::pin(self.router.stream(request.into_inner(), options))))
    }

    async fn model_config(&self, request: Request<ModelConfigRequest>) -> Answer<ModelConfigResponse> {
        let ModelConfigRequest { name, version } = request.into_inner();
        let route = self.route(&name, &version)?;
        Ok(Response::new(ModelConfigResponse { config: Some(effective(&route.config, &self.gpus(&route))) }))
    }

    async fn repository_index(&self, request: Request<RepositoryIndexRequest>) -> Answer<RepositoryIndexResponse> {
        let RepositoryIndexRequest { repository_name, ready: only_ready } = request.into_inner();
        only_repository(&repository_name)?;
        let repository = self.context.repository.clone();
        let index = tokio::task::spawn_blocking(move || repository.index()).await;
        let index = index.map_err(|error| Reason::Internal.status(error.to_string()))?;
        let index = index.map_err(|error| super::repository_status(&error))?;
        let state = self.context.consensus.view();
        let deployed = models(&state, &self.context.fleet.plan(&state));
        let mut models: Vec<ModelIndex> = deployed
            .iter()
            .map(|model| {
                let word = match model.state {
                    ModelState::Ready | ModelState::Degraded => "READY",
                    ModelState::Loading => "LOADING",
                    ModelState::Failed | ModelState::Evicted => "UNAVAILABLE",
                };
                let version = model.key.version.to_string();
                ModelIndex { name: model.key.name.clone(), version, state: word.into(), reason: model.reason.clone() }
            })
            .collect();
        for entry in index {
            if !deployed.iter().any(|model| model.key.name == entry.name) {
                models.push(ModelIndex { name: entry.name, reason: entry.problem.unwrap_or_default(), ..Default::default() });
            }
        }
        models.retain(|model| !only_ready || model.state == "READY");
        models.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Response::new(RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(&self, request: Request<RepositoryModelLoadRequest>) -> Answer<RepositoryModelLoadResponse> {
        let has_deadline = request.metadata().contains_key("grpc-timeout");
        let deadline = if has_deadline { deadline(request.metadata()) } else { Instant::now() + LOAD_TIMEOUT };
        let request = request.into_inner();
        only_repository(&request.repository_name)?;
        let wanted = wanted(request)?;
        let name = wanted.name.clone();
        let deployed = self.context.deploy(CommandId(rand::random()), wanted, deadline).await;
        let deployed = deployed.map_err(|status| match Reason::of(&status) {
            // Triton's words, and its code.
            Some(Reason::UnknownModel) => Reason::LoadFailed
                .status(format!("failed to load '{name}', failed to poll from model repository: {}", status.message())),
            _ => status,
        })?;
        self.context.until_ready(&name, &deployed.versions, deadline).await?;
        self.routed(deadline).await;
        Ok(Response::new(RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<RepositoryModelUnloadRequest>,
    ) -> Answer<RepositoryModelUnloadResponse> {
        let deadline = deadline(request.metadata());
        let request = request.into_inner();
        only_repository(&request.repository_name)?;
        self.context.undeploy(&request.model_name, deadline).await?;
        self.routed(deadline).await;
        Ok(Response::new(RepositoryModelUnloadResponse {}))
    }

    async fn model_statistics(&self, request: Request<ModelStatisticsRequest>) -> Answer<ModelStatisticsResponse> {
        let ModelStatisticsRequest { name, version } = request.into_inner();
        let models = self.routes_of(&name, &version)?;
        self.statistics.of(&name, &models, &self.router).await.map(Response::new)
    }

    async fn system_shared_memory_status(
        &self,
        _: Request<SystemSharedMemoryStatusRequest>,
    ) -> Answer<SystemSharedMemoryStatusResponse> {
        Err(no_shared_memory())
    }

    async fn system_shared_memory_register(
        &self,
        _: Request<SystemSharedMemoryRegisterRequest>,
    ) -> Answer<SystemSharedMemoryRegisterResponse> {
        Err(no_shared_memory())
    }

    async fn system_shared_memory_unregister(
        &self,
        _: Request<SystemSharedMemoryUnregisterRequest>,
    ) -> Answer<SystemSharedMemoryUnregisterResponse> {
        Err(no_shared_memory())
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
        if !model.is_empty() && !self.router.routes().has_model(model) {
            return Err(no_trace_settings(model));
        }
        settings::trace(request.get_ref()).map(Response::new)
    }

    async fn log_settings(&self, request: Request<LogSettingsRequest>) -> Answer<LogSettingsResponse> {
        settings::log(request.get_ref()).map(Response::new)
    }
}
