//! The worker on GPUs, which are simulated (`worker/native/simulated_gpu.cpp`): the binaries as they are shipped, with that library
//! in the place of libtorch's CUDA half. What a real one makes of it, `tests/gpu.sh` measures where there is one.

use std::{fs, path::Path};

use cresset_proto::{
    admin::v1::StatusResponse,
    inference::{ModelInferRequest, ModelInferResponse},
};
use cresset_tests::harness::{Cluster, ModelRepository, Options, fp32_model};
use cresset_worker::engine::testing::{Script, simulated_gpu};
use serde_json::Value;
use tempfile::TempDir;
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::support::{PATIENCE, inference, numbers, plus_one, row, until_ready};

/// One worker with simulated GPUs, behind one coordinator.
struct Gpus {
    folder: TempDir,
    cluster: Cluster,
}

impl Gpus {
    /// `settings` are those of the simulated GPUs.
    fn start(repository: &ModelRepository, deploy: &[&str], settings: &[(&str, &str)]) -> Self {
        // A worker looks for the CUDA half beside the library that it was linked with, so it needs all of them in one folder; and
        // links of their own, since the kernel names the file behind a symbolic one. In the folder of the build: only within one
        // file system are there such links.
        let folder = tempfile::Builder::new().prefix("gpus-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        for library in fs::read_dir(cresset_worker::libraries_dir()).unwrap() {
            let library = library.unwrap();
            let link = folder.path().join(library.file_name());
            if library.file_type().unwrap().is_file() && fs::hard_link(library.path(), &link).is_err() {
                fs::copy(library.path(), &link).unwrap();
            }
        }
        fs::copy(simulated_gpu(), folder.path().join("libtorch_cuda.so")).unwrap();
        let inside = |name: &str| folder.path().join(name).display().to_string();
        let mut env = vec![
            ("LD_LIBRARY_PATH".to_owned(), inside("")),
            ("SIMULATED_GPU_REPORT".to_owned(), inside("report.json")),
            ("SIMULATED_GPU_BREAKS".to_owned(), inside("broken")),
        ];
        env.extend(settings.iter().map(|(name, value)| (format!("SIMULATED_GPU_{name}"), (*value).to_owned())));
        let model_repository = repository.path().into();
        let options =
            Options { coordinators: 1, workers: 1, model_repository, env, device: "cuda", ..Options::deploying(deploy) };
        Self { cluster: Cluster::start(&options).unwrap(), folder }
    }

    /// A file whose presence breaks device 0.
    fn broken(&self) -> std::path::PathBuf {
        self.folder.path().join("broken")
    }

    /// Asks all of these at once, and gives the answers in order.
    async fn ask(&self, requests: impl IntoIterator<Item = ModelInferRequest>) -> Vec<Result<ModelInferResponse, Status>> {
        let service = inference(&self.cluster, "w1").await;
        let mut asked = JoinSet::new();
        for (number, request) in requests.into_iter().enumerate() {
            let mut service = service.clone();
            asked.spawn(async move { (number, service.model_infer(request).await.map(tonic::Response::into_inner)) });
        }
        let mut answers = asked.join_all().await;
        answers.sort_by_key(|(number, _)| *number);
        answers.into_iter().map(|(_, answer)| answer).collect()
    }

    /// Stops everything; what each device has counted.
    fn report(mut self) -> Vec<Counts> {
        self.cluster.shut_down().unwrap();
        Counts::read(&self.folder.path().join("report.json"))
    }
}

/// What a device has counted.
#[derive(Debug)]
struct Counts(Value);

impl Counts {
    fn read(path: &Path) -> Vec<Self> {
        let report: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        report.as_array().unwrap().iter().cloned().map(Self).collect()
    }

    fn of(&self, name: &str) -> u64 {
        self.0[name].as_u64().unwrap()
    }
}

/// Some operations on each row, of which no value is a fraction, and one number for each.
fn sums() -> Script {
    Script::new("def forward(self, x):\n  return (x * self.two + 1).sum(1, keepdim=True)\n")
        .parameter("two", "torch.full([1], 2.0)")
}

fn summed(values: &[f32]) -> Vec<f32> {
    vec![values.iter().map(|value| value * 2.0 + 1.0).sum()]
}

fn values(seed: usize, count: usize) -> Vec<f32> {
    (0..count).map(|at| ((at * 7 + seed * 13) % 32) as f32).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inputs_are_copied_while_the_batch_before_computes() {
    const VALUES: usize = 5_000;
    let repository = ModelRepository::new().unwrap();
    let repository = repository.with_script("sums", &fp32_model(8, "dynamic_batching { }"), &sums()).unwrap();
    // A full batch of 160 kB takes 20 ms to copy and 30 ms to compute: long enough for the next to be there, however busy the machine.
    let gpus = Gpus::start(&repository, &["sums"], &[("MB_S", "8"), ("OP_US", "10000")]);
    until_ready(&gpus.cluster, "sums").await;
    // What loading has copied is in the counts, too; so is what the first request makes ready.
    let requests = |from: usize| (from..from + 160).map(|seed| row("sums", &values(seed, VALUES)));
    for (seed, answer) in gpus.ask(requests(0)).await.into_iter().enumerate() {
        assert!(numbers(&answer.unwrap()) == summed(&values(seed, VALUES)), "request {seed} has another's answer, or rubbish");
    }
    let report = gpus.report();
    let [gpu] = &report[..] else { panic!("one device: {report:?}") };
    println!("{gpu:?}");
    let batches = gpu.of("pinned_in");
    assert!((20..80).contains(&batches), "most are full: {gpu:?}");
    assert_eq!(gpu.of("pinned_out"), batches, "{gpu:?}");
    assert!(gpu.of("pageable_in") + gpu.of("pageable_out") < 10, "only a load copies other memory: {gpu:?}");
    let overlap = gpu.of("overlap_ns") as f64 / gpu.of("copying_in_ns") as f64;
    // Copies and batches that take turns give nothing.
    assert!(overlap > 0.3, "{:.0} % of the time of copies passed while something was computed: {gpu:?}", overlap * 100.0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn instance_groups_use_every_gpu_or_those_that_they_name() {
    let everywhere = fp32_model(8, "instance_group [ { kind: KIND_GPU count: 2 } ]");
    let second = fp32_model(8, "instance_group [ { kind: KIND_GPU gpus: [ 1 ] } ]");
    let repository = ModelRepository::new().unwrap().with_script("everywhere", &everywhere, &sums()).unwrap();
    let repository = repository.with_script("second", &second, &sums()).unwrap();
    let right = |answers: Vec<Result<ModelInferResponse, Status>>| {
        for (seed, answer) in answers.into_iter().enumerate() {
            assert_eq!(numbers(&answer.unwrap()), summed(&values(seed, 10)));
        }
    };
    for (model, uses) in [("everywhere", [true, true]), ("second", [false, true])] {
        let gpus = Gpus::start(&repository, &[model], &[("COUNT", "2"), ("OP_US", "500")]);
        until_ready(&gpus.cluster, model).await;
        right(gpus.ask((0..64).map(|seed| row(model, &values(seed, 10)))).await);
        let report = gpus.report();
        let computed: Vec<bool> = report.iter().map(|gpu| gpu.of("operations") > 0).collect();
        assert_eq!(computed, uses, "{model}: {report:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_module_keeps_inside_sees_one_call_after_the_other() {
    // It counts its calls in a tensor of its own, which it gives out: while that is copied to the host, nobody may write to it.
    let source = "def forward(self, x):\n  calls = self.calls + 1\n  self.calls.copy_(calls)\n  return self.calls\n";
    let counts = Script::new(source).buffer("calls", "torch.zeros([2000])");
    let repository = ModelRepository::new().unwrap().with_script("counts", &fp32_model(0, ""), &counts).unwrap();
    let gpus = Gpus::start(&repository, &["counts"], &[("MB_S", "4"), ("OP_US", "200")]);
    until_ready(&gpus.cluster, "counts").await;
    let request = || {
        let mut request = row("counts", &[0.0]);
        request.inputs[0].shape = vec![1];
        request
    };
    let answers = gpus.ask((0..100).map(|_| request())).await;
    let mut counted = Vec::new();
    for answer in answers {
        let all = numbers(&answer.unwrap());
        assert_eq!(all.len(), 2000);
        assert!(all.iter().all(|count| *count == all[0]), "two calls in one answer: {} and others", all[0]);
        counted.push(all[0] as usize);
    }
    counted.sort_unstable();
    assert_eq!(counted, (counted[0]..counted[0] + 100).collect::<Vec<_>>(), "each call is counted once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gpu_out_of_memory_is_an_error_of_the_request_that_asked_too_much() {
    let greedy =
        "def forward(self, x):\n  if bool((x < 0).any()):\n    x = torch.empty([1000000000], device=x.device)\n  return x + 1\n";
    let batched = fp32_model(8, "dynamic_batching { }");
    let repository = ModelRepository::new().unwrap().with_script("greedy", &batched, &Script::new(greedy)).unwrap();
    let gpus = Gpus::start(&repository, &["greedy"], &[("OP_US", "2000")]);
    until_ready(&gpus.cluster, "greedy").await;
    let asks_too_much = |number: usize| number % 10 == 5;
    let first = |number: usize| if asks_too_much(number) { -1.0 } else { number as f32 };
    let answers = gpus.ask((0..40).map(|number| row("greedy", &[first(number)]))).await;
    for (number, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(answer) => assert_eq!(numbers(&answer), [number as f32 + 1.0]),
            Err(status) => {
                assert!(asks_too_much(number), "{status:?}");
                // Another worker may have more.
                assert_eq!(status.code(), Code::Unavailable, "{status:?}");
                assert!(status.message().contains("out of memory"), "{status:?}");
            }
        }
    }
}

fn incarnation(status: &StatusResponse) -> Option<u64> {
    status.workers.first().map(|worker| worker.incarnation)
}

/// The worker's life by now.
async fn life(cluster: &Cluster) -> u64 {
    cluster.wait_for("a worker", PATIENCE, incarnation).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_gpu_ends_the_workers_life_and_the_next_one_serves() {
    let repository = plus_one();
    let gpus = Gpus::start(&repository, &["plus_one"], &[]);
    until_ready(&gpus.cluster, "plus_one").await;
    let before = life(&gpus.cluster).await;
    fs::write(gpus.broken(), "").unwrap();
    let failed = gpus.ask([row("plus_one", &[1.0])]).await.remove(0).unwrap_err();
    assert_eq!(failed.code(), Code::Unavailable, "it may go to another worker: {failed:?}");
    assert!(failed.message().contains("CUDA error: an illegal memory access"), "{failed:?}");
    fs::remove_file(gpus.broken()).unwrap();
    let reborn = |status: &StatusResponse| incarnation(status).filter(|incarnation| *incarnation > before);
    gpus.cluster.wait_for("the worker in a new life", PATIENCE, reborn).await.unwrap();
    until_ready(&gpus.cluster, "plus_one").await;
    let mut gateway = inference(&gpus.cluster, "c1").await;
    assert_eq!(numbers(&gateway.model_infer(row("plus_one", &[1.0])).await.unwrap().into_inner()), [2.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waits_behind_a_call_that_never_returns_is_answered_elsewhere() {
    const POISON: f32 = 666.0;
    let hanging = format!("def forward(self, x):\n  while bool((x == {POISON:?}).any()):\n    x = x * 1\n  return x + 1\n");
    let limit = "parameters { key: \"cresset.max_execution_ms\" value: { string_value: \"1500\" } }";
    // Batches of one: the next is staged as soon as it is there.
    let repository = ModelRepository::new().unwrap();
    let repository = repository.with_script("hang", &fp32_model(1, limit), &Script::new(&hanging)).unwrap();
    let gpus = Gpus::start(&repository, &["hang"], &[("OP_US", "1000")]);
    until_ready(&gpus.cluster, "hang").await;
    let before = life(&gpus.cluster).await;
    let gateway = inference(&gpus.cluster, "c1").await;
    let ask = |value: f32| {
        let mut gateway = gateway.clone();
        async move { gateway.model_infer(row("hang", &[value])).await.map(tonic::Response::into_inner) }
    };
    let poisoned = tokio::spawn(ask(POISON));
    // In its batch by now, or right before them.
    let model_runs = |status: &StatusResponse| {
        let busy = status.workers.iter().any(|worker| worker.requests_in_flight > 0);
        busy.then_some(())
    };
    gpus.cluster.wait_for("the poison in its worker", PATIENCE, model_runs).await.unwrap();
    let behind: Vec<_> = (0..3).map(|value| tokio::spawn(ask(value as f32))).collect();
    let held = poisoned.await.unwrap().unwrap_err();
    assert_eq!(held.code(), Code::Internal, "{held:?}");
    assert!(held.message().contains("ran longer than its max_execution_ms, which is 1500"), "{held:?}");
    // They had not begun, so they wait for the worker's next life.
    for (value, answer) in behind.into_iter().enumerate() {
        assert_eq!(numbers(&answer.await.unwrap().unwrap()), [value as f32 + 1.0]);
    }
    assert!(life(&gpus.cluster).await > before);
}
