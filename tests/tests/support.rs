//! What several tests need: tiny requests, and load.

use std::{
    fs,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use cresset_client::{
    Coordinators, CressetClient,
    retry::{Failure, Point},
};
use cresset_proto::{
    admin::v1::{ModelState, StatusResponse, WorkerState, admin_service_client::AdminServiceClient},
    fleet::v1::ReplicaState,
    inference::{ModelInferRequest, ModelInferResponse, grpc_inference_service_client::GrpcInferenceServiceClient},
    tensor::{Datatype, Tensor, push_input},
};
use cresset_tests::{
    harness::{
        Cluster, ModelRepository, Options,
        binaries::{self, Ran},
        fp32_model,
        launch::{Place, Recipe},
    },
    reference::{bytes_of, floats},
};
use cresset_worker::engine::testing;
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet, time::timeout};
use tonic::{Status, transport::Channel};

/// Long enough for anything that happens at all, on a machine that is busy.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The name of a cluster that `cresset up` doesn't start.
const CLUSTER_ID: &str = "test";

/// A repository with the model `plus_one`.
pub fn plus_one() -> ModelRepository {
    let repository = ModelRepository::new().unwrap();
    repository.with_script("plus_one", &fp32_model(8, "dynamic_batching { }"), &testing::plus_one()).unwrap()
}

/// Starts a cluster of this size that serves these models of a repository.
pub fn cluster(coordinators: usize, workers: usize, repository: &ModelRepository, deploy: &[&str]) -> Cluster {
    cluster_with_env(coordinators, workers, repository, deploy, vec![])
}

/// The same, with variables for its processes.
pub fn cluster_with_env(
    coordinators: usize,
    workers: usize,
    repository: &ModelRepository,
    deploy: &[&str],
    env: Vec<(String, String)>,
) -> Cluster {
    let model_repository = repository.path().into();
    let options = Options { coordinators, workers, model_repository, env, ..Options::deploying(deploy) };
    Cluster::start(&options).unwrap()
}

/// Starts three coordinators without workers, and without `cresset up`. They live as long as the thread that calls.
pub fn coordinators_alone(repository: &ModelRepository) -> (Cluster, TempDir) {
    let folder = tempfile::Builder::new().prefix("cresset-test-").tempdir().unwrap();
    fs::write(folder.path().join("cluster-id"), CLUSTER_ID).unwrap();
    let ids = ["c1", "c2", "c3"].map(str::to_owned);
    let recipe =
        Recipe { cluster_id: CLUSTER_ID, data_dir: folder.path(), repository: repository.path(), coordinator: &[], worker: &[] };
    let launches = recipe.launches(&ids, &Place::free(ids.len()).unwrap());
    (Cluster::launch(folder.path(), launches).unwrap(), folder)
}

/// A request for one of the `fp32_model`s: one row.
pub fn row(model: &str, values: &[f32]) -> ModelInferRequest {
    let mut request = ModelInferRequest { model_name: model.into(), ..Default::default() };
    let shape = vec![1, values.len() as i64];
    push_input(&mut request, Tensor { name: "x".into(), datatype: Datatype::Fp32, shape, data: bytes_of(values) });
    request
}

/// The numbers of a response's only output.
pub fn numbers(response: &ModelInferResponse) -> Vec<f32> {
    assert_eq!(response.raw_output_contents.len(), 1, "{response:?}");
    floats(&response.raw_output_contents[0])
}

async fn channel(address: &str) -> Channel {
    Channel::from_shared(format!("http://{address}")).unwrap().connect().await.unwrap()
}

/// The public inference service of a process, as any client sees it.
pub async fn inference(cluster: &Cluster, id: &str) -> GrpcInferenceServiceClient<Channel> {
    GrpcInferenceServiceClient::new(channel(cluster.grpc(id).unwrap()).await)
}

/// The administration of a coordinator.
pub async fn admin(cluster: &Cluster, id: &str) -> AdminServiceClient<Channel> {
    AdminServiceClient::new(channel(cluster.grpc(id).unwrap()).await)
}

/// Workers on which a model is ready, in the order of their ids.
pub fn holders(status: &StatusResponse, model: &str) -> Vec<String> {
    let living = status.workers.iter().filter(|worker| worker.state() == WorkerState::Ready);
    let holds = living.filter(|worker| worker.replicas.iter().any(|r| r.model == model && r.state() == ReplicaState::Ready));
    let mut ids: Vec<_> = holds.map(|worker| worker.id.clone()).collect();
    ids.sort();
    ids
}

/// The worker with the most live sequences, and how many those are; `None` while there are none.
pub fn busiest(status: &StatusResponse) -> Option<(String, u64)> {
    let busiest = status.workers.iter().max_by_key(|worker| worker.sequences_live)?;
    (busiest.sequences_live > 0).then(|| (busiest.id.clone(), busiest.sequences_live))
}

/// Ids of coordinators other than this one.
pub fn others(cluster: &Cluster, id: &str) -> Vec<String> {
    cluster.file().coordinators.iter().map(|member| member.id.clone()).filter(|other| other != id).collect()
}

/// Waits until a model has all its replicas.
pub async fn until_ready(cluster: &Cluster, model: &str) {
    cluster.wait_for_model(model, ModelState::Ready, PATIENCE).await.unwrap();
}

/// Runs `cresset` against a cluster, given all its endpoints.
pub fn command(cluster: &Cluster, args: &[&str]) -> Ran {
    let endpoints = cluster.endpoints().join(",");
    binaries::run("cresset", ["--endpoints", &endpoints].iter().chain(args)).unwrap()
}

/// Who is asked by a [`Load`].
#[derive(Clone)]
pub enum Target {
    /// The Rust client's router.
    Client(Arc<CressetClient>),
    /// A coordinator's public service.
    Gateway(GrpcInferenceServiceClient<Channel>),
    /// The public services of several coordinators, one after the other until one of them takes the request. That one answers it.
    Doors(Coordinators),
}

impl Target {
    async fn infer(&self, request: ModelInferRequest) -> Result<ModelInferResponse, Status> {
        match self {
            Self::Client(client) => client.infer(request).await,
            Self::Gateway(service) => Ok(service.clone().model_infer(request).await?.into_inner()),
            Self::Doors(coordinators) => {
                let ask = |channel| {
                    let request = request.clone();
                    async move {
                        match GrpcInferenceServiceClient::new(channel).model_infer(request).await {
                            Err(status) if Failure::of(&status).point() == Point::NotSent => Err(status),
                            // The last word, whatever it is.
                            answer => Ok(tonic::Response::new(answer.map(tonic::Response::into_inner))),
                        }
                    }
                };
                coordinators.call(PATIENCE, ask).await.map_err(|error| Status::unavailable(error.to_string()))?
            }
        }
    }
}

#[derive(Default)]
struct Counts {
    answered: AtomicU64,
    failures: Mutex<Vec<String>>,
    slowest_us: AtomicU64,
    over: AtomicBool,
    progress: watch::Sender<u64>,
}

/// Requests to `plus_one`, one after the other on each of several tasks, each checked.
pub struct Load {
    counts: Arc<Counts>,
    tasks: JoinSet<()>,
}

/// What became of a [`Load`].
#[derive(Debug)]
pub struct Outcome {
    /// Right answers.
    pub answered: u64,
    /// Everything else, in words.
    pub failures: Vec<String>,
    /// The slowest answer.
    pub slowest: Duration,
}

impl Load {
    /// Starts `tasks` callers for each target.
    pub fn start(targets: &[Target], tasks: usize) -> Self {
        let counts = Arc::new(Counts::default());
        let mut running = JoinSet::new();
        for (number, target) in targets.iter().flat_map(|target| std::iter::repeat_n(target, tasks)).enumerate() {
            running.spawn(call_on(target.clone(), Arc::clone(&counts), number as f32));
        }
        Self { counts, tasks: running }
    }

    /// Waits for so many answers more.
    pub async fn more(&self, answers: u64) {
        let goal = self.counts.answered.load(Ordering::SeqCst) + answers;
        let mut progress = self.counts.progress.subscribe();
        let reached = timeout(PATIENCE, progress.wait_for(|answered| *answered >= goal)).await;
        assert!(reached.is_ok(), "answers stopped: {:?}", self.counts.failures.lock().unwrap());
    }

    /// Lets every caller finish its request.
    pub async fn end(self) -> Outcome {
        self.counts.over.store(true, Ordering::SeqCst);
        self.tasks.join_all().await;
        let failures = self.counts.failures.lock().unwrap().clone();
        let slowest = Duration::from_micros(self.counts.slowest_us.load(Ordering::SeqCst));
        Outcome { answered: self.counts.answered.load(Ordering::SeqCst), failures, slowest }
    }
}

async fn call_on(target: Target, counts: Arc<Counts>, first: f32) {
    let mut value = first;
    while !counts.over.load(Ordering::SeqCst) {
        let begun = Instant::now();
        let answer = target.infer(row("plus_one", &[value, -value])).await;
        let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        counts.slowest_us.fetch_max(took, Ordering::SeqCst);
        match answer {
            Ok(response) if numbers(&response) == [value + 1.0, 1.0 - value] => {
                let answered = counts.answered.fetch_add(1, Ordering::SeqCst) + 1;
                counts.progress.send_replace(answered);
            }
            Ok(response) => counts.failures.lock().unwrap().push(format!("wrong: {:?}", numbers(&response))),
            Err(status) => {
                counts.failures.lock().unwrap().push(format!("{:?}: {}", status.code(), status.message()));
                // A caller that only fails must not fill the memory.
                tokio::task::yield_now().await;
                if counts.failures.lock().unwrap().len() > 1_000 {
                    return;
                }
            }
        }
        value = (value + 1.0) % 1_000_000.0;
    }
}
