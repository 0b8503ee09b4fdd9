//! `cresset up`: what it promises when it starts, when it can't, and when it ends.

use std::{
    fs,
    net::TcpListener,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use cresset_proto::admin::v1::WorkerState;
use cresset_tests::harness::{Cluster, ClusterFile, ModelRepository, Options, binaries, fp32_model, worker_of};
use cresset_worker::engine::testing::Script;

use crate::support::{PATIENCE, cluster, command, holders, inference, numbers, plus_one, row, until_ready};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigkill_leaves_nothing_behind_and_the_folder_can_be_used_again() {
    let repository = plus_one();
    let folder = tempfile::tempdir().unwrap();
    let options = Options {
        coordinators: 3,
        workers: 1,
        model_repository: repository.path().into(),
        data_dir: Some(folder.path().into()),
        ..Options::deploying(&["plus_one"])
    };
    let mut first = Cluster::start(&options).unwrap();
    first.kill_up().unwrap();
    for id in first.ids() {
        first.process(&id).unwrap().wait(Duration::from_secs(10)).unwrap();
    }
    drop(first);
    // Other ports, the same identity, and nothing to deploy: it is known.
    let second = Cluster::start(&Options { deploy: vec![], ..options }).unwrap();
    until_ready(&second, "plus_one").await;
    let answer = inference(&second, "c2").await.model_infer(row("plus_one", &[1.0])).await.unwrap();
    assert_eq!(numbers(&answer.into_inner()), [2.0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sigterm_ends_everything_in_order() {
    let repository = plus_one();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    let begun = Instant::now();
    assert_eq!(cluster.shut_down().unwrap(), Some(0));
    println!("stopped within {:?}", begun.elapsed());
    for id in cluster.ids() {
        assert!(!cluster.process(&id).unwrap().is_alive(), "{id}");
    }
    assert!(!cluster.data_dir().join("cluster.json").exists());
    let told = fs::read_to_string(cluster.data_dir().join("logs/up.log")).unwrap();
    assert!(!told.contains("had to be killed"), "{told}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_died_is_started_again_where_that_was_asked_for() {
    let repository = plus_one();
    let options =
        Options { coordinators: 1, workers: 2, model_repository: repository.path().into(), ..Options::deploying(&["plus_one"]) };
    let cluster = Cluster::start(&Options { restart: true, ..options }).unwrap();
    let before = worker_of(&cluster.status().await.unwrap(), "w1").unwrap().incarnation;
    cluster.kill("w1").unwrap();
    let back =
        |status: &_| worker_of(status, "w1").filter(|w| w.state() == WorkerState::Ready && w.incarnation > before).map(drop);
    cluster.wait_for("w1 again", PATIENCE, back).await.unwrap();
    until_ready(&cluster, "plus_one").await;
    let now = ClusterFile::read(cluster.data_dir()).unwrap();
    assert_ne!(now.workers[0].pid, cluster.file().workers[0].pid);
    assert_eq!(now.workers[1].pid, cluster.file().workers[1].pid);
}

/// The names and priorities of a process's threads.
fn threads(pid: u32) -> Vec<(String, i32)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let read = |task: &Path| Some((fs::read_to_string(task.join("comm")).ok()?, fs::read_to_string(task.join("stat")).ok()?));
    // A thread may end meanwhile.
    let read = tasks.filter_map(|task| read(&task.ok()?.path()));
    // proc_pid_stat(5): the 19th field is the nice value, the 17th after the name.
    let nice = |stat: &str| stat[stat.rfind(')').unwrap() + 2..].split(' ').nth(16).unwrap().parse().unwrap();
    read.map(|(name, stat)| (name.trim().to_owned(), nice(&stat))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_runs_with_the_priority_of_its_worker_however_it_was_loaded() {
    let repository = plus_one();
    let cluster = cluster(1, 1, &repository, &["plus_one"]);
    until_ready(&cluster, "plus_one").await;
    let threads = threads(cluster.process("w1").unwrap().pid());
    let own = threads.iter().find(|(name, _)| name.starts_with("cresset")).unwrap().1;
    let engines: Vec<_> = threads.iter().filter(|(name, _)| name.starts_with("engine-")).collect();
    assert!(engines.len() >= 2, "the device's and the model's: {threads:?}");
    assert!(engines.iter().all(|(_, nice)| *nice == own), "loading stands back, serving doesn't: {threads:?}");
}

/// Runs `cresset up`, which must end by itself with exit code 1 and say why in one line.
fn refusal(data_dir: &Path, more: &[&str], change: impl FnOnce(&mut Command)) -> String {
    let mut command = binaries::command("cresset");
    command.args(["up", "--coordinators", "1", "--workers", "1", "--device", "cpu"]);
    command.arg("--data-dir").arg(data_dir).args(more);
    change(&mut command);
    let ran = binaries::finish(&mut command).unwrap();
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert_eq!(ran.stdout, "", "it was never ready");
    // What came before is about the processes that were started meanwhile.
    let last = ran.stderr.lines().last().unwrap_or_default().to_owned();
    assert!(last.starts_with("cresset: "), "{ran:?}");
    last
}

#[test]
fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let folder = tempfile::tempdir().unwrap();
    let line = refusal(folder.path(), &["--base-port", &port], |_| {});
    assert!(line.contains(&format!("port {port}")) && line.contains("c1") && line.contains("--base-port"), "{line}");
}

#[test]
fn a_folder_that_cannot_be_written_is_named() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for folder in [file.path().to_owned(), file.path().join("data")] {
        let line = refusal(&folder, &["--base-port", "0"], |_| {});
        assert!(line.contains("data-dir") && line.contains(&folder.display().to_string()), "{line}");
    }
}

#[test]
fn a_missing_model_repository_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("nowhere").display().to_string();
    let line = refusal(&folder.path().join("data"), &["--base-port", "0", "--model-repository", &missing], |_| {});
    assert!(line.contains("model-repository") && line.contains(&missing), "{line}");
}

#[test]
fn a_broken_libtorch_is_named_with_the_way_out() {
    let folder = tempfile::tempdir().unwrap();
    // What the loader finds first: a file of the right name with nothing in it.
    fs::write(folder.path().join("libtorch_cpu.so"), b"").unwrap();
    let line = refusal(&folder.path().join("data"), &["--base-port", "0"], |command| {
        command.env("LD_LIBRARY_PATH", folder.path());
    });
    assert!(line.contains("libtorch") && line.contains("make fetch"), "{line}");
}

#[test]
fn a_model_that_is_not_there_or_cannot_be_loaded_ends_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let repository = plus_one();
    repository.add_bytes("corrupt", &fp32_model(8, ""), b"not a zip").unwrap();
    let models = repository.path().display().to_string();
    let start = |name| refusal(folder.path(), &["--base-port", "0", "--model-repository", &models, "--deploy", name], |_| {});
    let line = start("nobody");
    assert!(line.contains("'nobody'"), "{line}");
    let line = start("corrupt");
    assert!(line.contains("'corrupt'") && line.contains("cut short"), "{line}");
    let log = fs::read_to_string(folder.path().join("logs/w1.log")).unwrap();
    assert!(log.contains("corrupt"), "the worker logged it: {log}");
}

#[test]
fn a_folder_in_use_is_left_alone() {
    let repository = plus_one();
    let mut cluster = cluster(1, 1, &repository, &[]);
    let line = refusal(cluster.data_dir(), &["--base-port", "0"], |_| {});
    assert!(line.contains("in use") && line.contains(&cluster.up_pid().unwrap().to_string()), "{line}");
    assert!(cluster.data_dir().join("cluster.json").exists());
    assert_eq!(cluster.shut_down().unwrap(), Some(0));
}

/// Threads of a process that run models, by their name: one for each of the worker's, and those that libtorch adds to them.
fn engine_threads(pid: u32) -> usize {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path().join("comm"));
    tasks.filter(|comm| fs::read_to_string(comm).is_ok_and(|name| name.starts_with("engine-cpu"))).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_runs_on_as_many_threads_as_the_worker_was_told() {
    let repository = ModelRepository::new().unwrap();
    // MKL's own functions, which don't ask libtorch how many threads they may take.
    let source = "def forward(self, x):\n  m = torch.mm(x.t(), x)\n  for i in range(100):\n    m = torch.tanh(m)\n  return x + m[0:1] * 0\n";
    let tanh = Script::new(source);
    repository.add_script("tanh", &fp32_model(8, ""), &tanh).unwrap();
    // As many workers as the machine has cores, so that one thread is left for each.
    let workers = std::thread::available_parallelism().unwrap().get();
    let cluster = cluster(1, workers, &repository, &[]);
    let without = engine_threads(cluster.process("w1").unwrap().pid());
    let deployed = command(&cluster, &["deploy", "tanh", "--replicas", "1", "--wait"]);
    assert_eq!(deployed.code, Some(0), "{deployed:?}");
    let holder = holders(&cluster.status().await.unwrap(), "tanh")[0].clone();
    let answer = inference(&cluster, &holder).await.model_infer(row("tanh", &[1.0; 16])).await.unwrap();
    assert_eq!(numbers(&answer.into_inner()), [1.0; 16]);
    let with = engine_threads(cluster.process(&holder).unwrap().pid());
    assert_eq!(with, without + 1, "the model's own thread, and none that libtorch brought");
}
