//! Workers for tests: real gRPC on a real socket, a model made of arithmetic, and a script that says what goes wrong.
//!
//! Each stands behind a small TCP relay. [`Fake::die`] drops the relay's sockets at once, which is what the kernel does to the
//! sockets of a process that is killed.
mod coordinator;
mod held;

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use cresset_proto::{
    fleet::v1::{
        ModelRoute, Open, RunRequest, RunResponse, ShardRoute, Step, StepError, TakeRequest, TakeResponse, WatchResponse,
        WorkerRoute, run_request, run_response,
        sequences_service_server::{SequencesService, SequencesServiceServer},
    },
    inference::{
        self, ModelConfig, ModelInferRequest, ModelInferResponse, ModelSequenceBatching, ModelTransactionPolicy,
        grpc_inference_service_server::{GrpcInferenceService, GrpcInferenceServiceServer},
        infer_parameter::ParameterChoice,
        model_config::SchedulingChoice,
    },
    parameters,
    reason::Reason,
};
use futures::{StreamExt, stream::BoxStream};
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{Semaphore, mpsc, watch},
    task::JoinSet,
};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

pub(crate) use self::coordinator::FakeCoordinator;

/// What a worker is about to do.
#[derive(Debug, Clone)]
pub(crate) enum Seen {
    /// A unary request has arrived.
    Infer(ModelInferRequest),
    /// A sequence's stream was opened.
    Open(Open),
    /// A request of a sequence has arrived; by its id.
    Step(u64),
    /// The answer to it has been handed to the connection.
    Answered(u64),
    /// A request of a decoupled model has arrived; by its id.
    Many(u64),
    /// Response number so-and-so to it is next, from 0; by the request's id.
    Response(u64, u64),
    /// It was asked whether it lives.
    Live,
}

/// What the script makes of it.
#[derive(Debug, Clone)]
pub(crate) enum Do {
    /// Go on.
    Go,
    /// Refuse: the call, or the whole stream of a sequence.
    Refuse(Reason),
    /// Answer this request of a sequence with an error.
    Fail(Reason),
    /// The process is killed.
    Die,
    /// Go on when there is a permit.
    WaitFor(Arc<Semaphore>),
    /// Never go on.
    Hang,
}

type Script = dyn Fn(&Seen) -> Do + Send + Sync;

/// One worker.
#[derive(Clone)]
pub(crate) struct Fake {
    pub(crate) id: String,
    pub(crate) incarnation: u64,
    pub(crate) address: SocketAddr,
    inner: Arc<Inner>,
}

struct Inner {
    script: Mutex<Arc<Script>>,
    alive: CancellationToken,
    /// Nothing goes in or out any more, and no connection ends.
    frozen: watch::Sender<bool>,
    seen: watch::Sender<Vec<Seen>>,
    /// Calls that ended before they were answered.
    cancelled: watch::Sender<usize>,
    /// What bounds `count` of a decoupled request.
    responses_max: AtomicU64,
    held: held::Held,
}

impl Fake {
    /// A worker that does what is asked.
    pub(crate) async fn start(id: &str) -> Self {
        Self::scripted(id, |_| Do::Go).await
    }

    /// A worker that asks `script` first.
    pub(crate) async fn scripted(id: &str, script: impl Fn(&Seen) -> Do + Send + Sync + 'static) -> Self {
        let inner = Arc::new(Inner {
            script: Mutex::new(Arc::new(script)),
            alive: CancellationToken::new(),
            frozen: watch::Sender::new(false),
            seen: watch::Sender::new(Vec::new()),
            cancelled: watch::Sender::new(0),
            responses_max: AtomicU64::new(u64::MAX),
            held: held::Held::default(),
        });
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let behind = server.local_addr().unwrap();
        let relay = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = relay.local_addr().unwrap();
        let fake = Self { id: id.into(), incarnation: 1, address, inner };
        let alive = fake.inner.alive.clone();
        let frozen = fake.inner.frozen.subscribe();
        tokio::spawn(alive.clone().run_until_cancelled_owned(relay_all(relay, behind, frozen)));
        let service = tonic::transport::Server::builder()
            .add_service(GrpcInferenceServiceServer::new(fake.clone()))
            .add_service(SequencesServiceServer::new(fake.clone()));
        tokio::spawn(service.serve_with_incoming_shutdown(TcpListenerStream::new(server), alive.cancelled_owned()));
        fake
    }

    /// The process is killed: all its connections break.
    pub(crate) fn die(&self) {
        self.inner.alive.cancel();
    }

    /// The process is stopped, or the cable is cut; and goes on.
    pub(crate) fn freeze(&self, frozen: bool) {
        self.inner.frozen.send_replace(frozen);
    }

    /// Everything that it has seen.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.inner.seen.borrow().clone()
    }

    /// Waits until it has seen something.
    pub(crate) async fn has_seen(&self, what: impl Fn(&Seen) -> bool) {
        self.inner.seen.subscribe().wait_for(|seen| seen.iter().any(&what)).await.unwrap();
    }

    /// Unary requests that it has seen.
    pub(crate) fn infers(&self) -> usize {
        self.seen().iter().filter(|seen| matches!(seen, Seen::Infer(_))).count()
    }

    /// Streams of sequences that were opened on it.
    pub(crate) fn opens(&self) -> Vec<Open> {
        let opened = |seen| match seen {
            Seen::Open(open) => Some(open),
            _ => None,
        };
        self.seen().into_iter().filter_map(opened).collect()
    }

    /// Waits until a call was cancelled.
    pub(crate) async fn cancellation(&self) {
        self.inner.cancelled.subscribe().wait_for(|count| *count > 0).await.unwrap();
    }

    /// Replaces the script.
    pub(crate) fn rescript(&self, script: impl Fn(&Seen) -> Do + Send + Sync + 'static) {
        *lock(&self.inner.script) = Arc::new(script);
    }

    /// Its decoupled model gives no more responses than this, whatever it is asked for.
    pub(crate) fn answers_at_most(&self, count: u64) {
        self.inner.responses_max.store(count, Ordering::SeqCst);
    }

    /// It holds nothing any more of sequences that could be taken up again.
    pub(crate) fn forget(&self) {
        self.inner.held.forget();
    }

    async fn ask(&self, seen: Seen) -> Result<(), Wrong> {
        let script = Arc::clone(&lock(&self.inner.script));
        let todo = script(&seen);
        self.inner.seen.send_modify(|all| all.push(seen));
        match todo {
            Do::Go => Ok(()),
            Do::Refuse(reason) => Err(Wrong::Refused(reason.status(format!("{} refuses", self.id)))),
            Do::Fail(reason) => Err(Wrong::Failed(reason)),
            Do::Die => {
                self.die();
                std::future::pending().await
            }
            Do::WaitFor(permits) => {
                permits.acquire().await.unwrap().forget();
                Ok(())
            }
            Do::Hang => std::future::pending().await,
        }
    }

    /// The life of one sequence's stream.
    async fn run_sequence(
        self,
        mut requests: Streaming<RunRequest>,
        answers: mpsc::Sender<Result<RunResponse, Status>>,
    ) -> Result<(), Status> {
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(run_request::Message::Open(open)) = first else { return Err(Status::internal("the first message is not open")) };
        if open.incarnation != self.incarnation {
            return Err(Reason::Fenced.status("another life"));
        }
        let mut state = open.checkpoint.as_ref().map_or(0, |bytes| u64::from_le_bytes(bytes[..].try_into().unwrap()));
        let mut expected = open.checkpoint_ordinal + 1;
        let tie = open.resumable.clone().map(|resumable| self.inner.held.attach(resumable, state)).transpose()?;
        self.ask(Seen::Open(open)).await.map_err(Wrong::status)?;
        while let Some(request) = requests.message().await? {
            let Some(run_request::Message::Step(step)) = request.message else { return Err(Status::internal("not a step")) };
            assert_eq!(step.ordinal, expected, "ordinals have no gaps");
            expected += 1;
            let id: u64 = step.request.as_ref().unwrap().id.parse().unwrap();
            let failed = match self.ask(Seen::Step(id)).await {
                Ok(()) => None,
                Err(Wrong::Failed(reason)) => Some(reason),
                Err(Wrong::Refused(status)) => return Err(status),
            };
            let said = |key| parameters::number_of(&step.request.as_ref().unwrap().parameters, key);
            let (ordinal, ack) = (said(parameters::keys::ORDINAL), said(parameters::keys::ACK));
            let run = || (self.answer(step, failed, id, &mut state), state);
            let answer = match &tie {
                Some(tie) => self.inner.held.step(tie, ordinal, ack, run),
                None => Some(run().0),
            };
            let Some(answer) = answer else { return Err(Reason::TakenOver.status("another router has it")) };
            if answers.send(Ok(answer)).await.is_err() {
                return Ok(());
            }
            self.ask(Seen::Answered(id)).await.map_err(Wrong::status)?;
        }
        Ok(())
    }

    /// As many responses as the request's parameter `count` says, and the end.
    async fn run_many(
        &self,
        mut requests: Streaming<ModelInferRequest>,
        answers: &mpsc::Sender<Result<inference::ModelStreamInferResponse, Status>>,
    ) -> Result<(), Status> {
        let Some(request) = requests.message().await? else { return Err(Status::internal("no request")) };
        let number = |key: &str| match request.parameters.get(key).and_then(|value| value.parameter_choice.clone()) {
            Some(ParameterChoice::Int64Param(number)) => u64::try_from(number).unwrap(),
            other => panic!("{key} is {other:?}"),
        };
        let (id, count): (u64, u64) = (request.id.parse().unwrap(), number("count"));
        let count = count.min(self.inner.responses_max.load(Ordering::SeqCst));
        self.ask(Seen::Many(id)).await.map_err(Wrong::status)?;
        for index in 0..=count {
            let is_final = index == count;
            if !is_final {
                self.ask(Seen::Response(id, index)).await.map_err(Wrong::status)?;
            }
            let mut response = ModelInferResponse {
                id: request.id.clone(),
                model_name: request.model_name.clone(),
                raw_output_contents: (!is_final).then(|| fold(id, index).to_le_bytes().to_vec().into()).into_iter().collect(),
                ..Default::default()
            };
            response.parameters.insert(parameters::keys::FINAL.into(), parameters::bool_parameter(is_final));
            let message = inference::ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) };
            if answers.send(Ok(message)).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn answer(&self, step: Step, failed: Option<Reason>, id: u64, state: &mut u64) -> RunResponse {
        let ordinal = step.ordinal;
        if let Some(reason) = failed {
            let error = StepError { code: i32::from(reason.code()), reason: reason.to_string(), message: format!("{id} fails") };
            return RunResponse { ordinal, checkpoint: None, result: Some(run_response::Result::Error(error)) };
        }
        *state = fold(*state, id);
        let raw = Bytes::copy_from_slice(&state.to_le_bytes());
        let response = ModelInferResponse {
            id: id.to_string(),
            model_name: step.request.unwrap().model_name,
            raw_output_contents: vec![raw.clone()],
            ..Default::default()
        };
        let checkpoint = step.want_checkpoint.then_some(raw);
        RunResponse { ordinal, checkpoint, result: Some(run_response::Result::Response(response)) }
    }
}

/// The state of a sequence after one more request; also its answer.
pub(crate) fn fold(state: u64, id: u64) -> u64 {
    (state ^ id).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(17)
}

/// The number in an answer of a sequence.
pub(crate) fn number(response: &ModelInferResponse) -> u64 {
    u64::from_le_bytes(response.raw_output_contents[0][..].try_into().unwrap())
}

enum Wrong {
    Refused(Status),
    Failed(Reason),
}

impl Wrong {
    fn status(self) -> Status {
        match self {
            Self::Refused(status) => status,
            Self::Failed(reason) => reason.status("fails"),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap()
}

/// Copies bytes both ways for every connection, until it is dropped.
async fn relay_all(listener: TcpListener, behind: SocketAddr, frozen: watch::Receiver<bool>) {
    let mut connections = JoinSet::new();
    while let Ok((mut near, _)) = listener.accept().await {
        let frozen = frozen.clone();
        connections.spawn(async move {
            near.set_nodelay(true).unwrap();
            let mut far = TcpStream::connect(behind).await.unwrap();
            far.set_nodelay(true).unwrap();
            let ((near_in, near_out), (far_in, far_out)) = (near.split(), far.split());
            // Either side may just break.
            let _ = tokio::try_join!(relay_one(near_in, far_out, frozen.clone()), relay_one(far_in, near_out, frozen));
        });
    }
}

async fn relay_one(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut frozen: watch::Receiver<bool>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let bytes = from.read(&mut buffer).await?;
        // An error means that nobody could thaw it any more, nor has to.
        let _ = frozen.wait_for(|frozen| !frozen).await;
        if bytes == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..bytes]).await?;
    }
}

/// Counts a call that was dropped before it was answered.
struct Cancelled<'a>(&'a watch::Sender<usize>);

impl Drop for Cancelled<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count += 1);
    }
}

#[tonic::async_trait]
impl SequencesService for Fake {
    type RunStream = BoxStream<'static, Result<RunResponse, Status>>;

    async fn run(&self, request: Request<Streaming<RunRequest>>) -> Result<Response<Self::RunStream>, Status> {
        let (answers, outgoing) = mpsc::channel(64);
        let fake = self.clone();
        tokio::spawn(async move {
            if let Err(status) = fake.run_sequence(request.into_inner(), answers.clone()).await {
                // The router may have gone.
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(outgoing).boxed()))
    }

    async fn take(&self, request: Request<TakeRequest>) -> Result<Response<TakeResponse>, Status> {
        self.inner.held.take(request.into_inner()).map(Response::new)
    }
}

macro_rules! inference_service {
    ($($name:ident($request:ident) -> $response:ident;)*) => {
        #[tonic::async_trait]
        impl GrpcInferenceService for Fake {
            type ModelStreamInferStream = BoxStream<'static, Result<inference::ModelStreamInferResponse, Status>>;

            async fn model_infer(&self, request: Request<ModelInferRequest>) -> Result<Response<ModelInferResponse>, Status> {
                let incarnation = request.metadata().get(cresset_proto::metadata::INCARNATION).unwrap().to_str().unwrap();
                assert_eq!(incarnation, self.incarnation.to_string());
                let request = request.into_inner();
                let (id, model_name) = (request.id.clone(), request.model_name.clone());
                let cancelled = Cancelled(&self.inner.cancelled);
                let answer = self.ask(Seen::Infer(request)).await.map_err(Wrong::status);
                std::mem::forget(cancelled);
                answer.map(|()| Response::new(ModelInferResponse { id, model_name, model_version: "1".into(), ..Default::default() }))
            }

            async fn model_stream_infer(
                &self,
                request: Request<Streaming<ModelInferRequest>>,
            ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
                assert_eq!(request.metadata().get("triton_grpc_error").unwrap(), "true", "a reason is lost without it");
                let (answers, outgoing) = mpsc::channel(1);
                let fake = self.clone();
                tokio::spawn(async move {
                    let cancelled = Cancelled(&fake.inner.cancelled);
                    tokio::select! {
                        () = answers.closed() => {}
                        ended = fake.run_many(request.into_inner(), &answers) => {
                            std::mem::forget(cancelled);
                            if let Err(status) = ended {
                                // The router may have gone.
                                let _ = answers.send(Err(status)).await;
                            }
                        }
                    }
                });
                Ok(Response::new(ReceiverStream::new(outgoing).boxed()))
            }

            async fn server_live(
                &self,
                _: Request<inference::ServerLiveRequest>,
            ) -> Result<Response<inference::ServerLiveResponse>, Status> {
                self.inner.seen.send_modify(|all| all.push(Seen::Live));
                Ok(Response::new(inference::ServerLiveResponse { live: true }))
            }

            $(async fn $name(&self, _: Request<inference::$request>) -> Result<Response<inference::$response>, Status> {
                Err(Status::unimplemented("not asked of workers here"))
            })*
        }
    };
}

inference_service! {
    server_ready(ServerReadyRequest) -> ServerReadyResponse;
    model_ready(ModelReadyRequest) -> ModelReadyResponse;
    server_metadata(ServerMetadataRequest) -> ServerMetadataResponse;
    model_metadata(ModelMetadataRequest) -> ModelMetadataResponse;
    model_config(ModelConfigRequest) -> ModelConfigResponse;
    model_statistics(ModelStatisticsRequest) -> ModelStatisticsResponse;
    repository_index(RepositoryIndexRequest) -> RepositoryIndexResponse;
    repository_model_load(RepositoryModelLoadRequest) -> RepositoryModelLoadResponse;
    repository_model_unload(RepositoryModelUnloadRequest) -> RepositoryModelUnloadResponse;
    system_shared_memory_status(SystemSharedMemoryStatusRequest) -> SystemSharedMemoryStatusResponse;
    system_shared_memory_register(SystemSharedMemoryRegisterRequest) -> SystemSharedMemoryRegisterResponse;
    system_shared_memory_unregister(SystemSharedMemoryUnregisterRequest) -> SystemSharedMemoryUnregisterResponse;
    cuda_shared_memory_status(CudaSharedMemoryStatusRequest) -> CudaSharedMemoryStatusResponse;
    cuda_shared_memory_register(CudaSharedMemoryRegisterRequest) -> CudaSharedMemoryRegisterResponse;
    cuda_shared_memory_unregister(CudaSharedMemoryUnregisterRequest) -> CudaSharedMemoryUnregisterResponse;
    trace_setting(TraceSettingRequest) -> TraceSettingResponse;
    log_settings(LogSettingsRequest) -> LogSettingsResponse;
}

/// The models of every table here: plain `plain`, stateful `seq`, decoupled `many`, each on all of `workers`; and `late`,
/// which nobody serves.
pub(crate) fn routes(epoch: u64, workers: &[&Fake], sequence_idle_us: u64) -> WatchResponse {
    let sequences = ModelSequenceBatching { max_sequence_idle_microseconds: sequence_idle_us, ..Default::default() };
    let stateful = ModelConfig { scheduling_choice: Some(SchedulingChoice::SequenceBatching(sequences)), ..Default::default() };
    let decoupled =
        ModelConfig { model_transaction_policy: Some(ModelTransactionPolicy { decoupled: true }), ..Default::default() };
    let route = |model: &str, config: &ModelConfig, ids: Vec<String>| ModelRoute {
        model: model.into(),
        version: 1,
        generation: 1,
        config: config.encode_to_vec().into(),
        shards: vec![ShardRoute { shard: 0, worker_ids: ids }],
    };
    let ids: Vec<String> = workers.iter().map(|worker| worker.id.clone()).collect();
    let models = vec![
        route("plain", &ModelConfig::default(), ids.clone()),
        route("seq", &stateful, ids.clone()),
        route("many", &decoupled, ids),
        route("late", &ModelConfig::default(), Vec::new()),
    ];
    let workers = workers.iter().map(|worker| WorkerRoute {
        worker_id: worker.id.clone(),
        incarnation: worker.incarnation,
        grpc_address: worker.address.to_string(),
        zone: String::new(),
    });
    WatchResponse { epoch, models, workers: workers.collect(), ..Default::default() }
}
