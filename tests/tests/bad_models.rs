//! Models that can't be served, beside one that can: each a clear error, and nobody else is harmed.

use std::fs;

use cresset_proto::{admin::v1::ModelState, reason::Reason};
use cresset_tests::harness::{Cluster, ModelRepository, fp32_model};
use cresset_worker::engine::testing::{self, Script};
use tonic::Code;

use crate::support::{PATIENCE, cluster, command, inference, numbers, plus_one, row};

fn repository() -> ModelRepository {
    let batched = fp32_model(8, "dynamic_batching { }");
    let repository = plus_one();
    repository.add_bytes("corrupt", &batched, b"this is no archive at all").unwrap();
    let whole = fs::read(repository.path().join("plus_one/1/model.pt")).unwrap();
    repository.add_bytes("truncated", &batched, &whole[..whole.len() / 2]).unwrap();
    repository.add_script("misspelt", "max_batch_size: 8\ninput [ { naem: \"x\" } ]\n", &testing::plus_one()).unwrap();
    repository.add_script("raises", &batched, &testing::raises_on_negative()).unwrap();
    // Two arguments, of which the configuration knows one.
    repository.add_script("lacking", &batched, &testing::sum_and_difference()).unwrap();
    // Fails in its first call and not before.
    repository.add_script("liar", &batched, &Script::new("def forward(self, x):\n  return x.sum()\n")).unwrap();
    // Wants 4 PB if the first number is negative.
    let greedy = "def forward(self, x):\n  if bool(x.flatten()[0] < 0):\n    x = torch.empty([1000000000000000])\n  return x\n";
    repository.add_script("greedy", &batched, &Script::new(greedy)).unwrap();
    fs::create_dir(repository.path().join("empty")).unwrap();
    repository
}

/// The good model answers, and no process has died.
async fn unharmed(cluster: &Cluster) {
    let answer = inference(cluster, "c1").await.model_infer(row("plus_one", &[1.0, 2.0])).await.unwrap();
    assert_eq!(numbers(&answer.into_inner()), [2.0, 3.0]);
    for id in cluster.ids() {
        assert!(cluster.process(&id).unwrap().is_alive(), "{id} died");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_loaded_is_failed_with_its_reason() {
    let repository = repository();
    let cluster = cluster(1, 2, &repository, &["plus_one"]);
    for name in ["corrupt", "truncated", "lacking"] {
        let deployed = command(&cluster, &["deploy", name, "--wait"]);
        assert_eq!(deployed.code, Some(1), "{name}: {deployed:?}");
        assert!(deployed.stderr.contains(&format!("model '{name}' can't be served: ")), "{deployed:?}");
        println!("{}", deployed.stderr.lines().last().unwrap_or_default());
        cluster.wait_for_model(name, ModelState::Failed, PATIENCE).await.unwrap();
        let status = command(&cluster, &["status", "-o", "json"]).json();
        let model = status["models"].as_array().unwrap().iter().find(|model| model["name"] == name).unwrap();
        assert_eq!(model["state"], "failed");
        assert!(!model["reason"].as_str().unwrap().is_empty());
        let replicas = status["workers"].as_array().unwrap().iter().flat_map(|worker| worker["replicas"].as_array().unwrap());
        let failed: Vec<_> = replicas.filter(|replica| replica["model"] == name).collect();
        assert!(!failed.is_empty(), "{status}");
        for replica in failed {
            assert_eq!(replica["state"], "failed");
            assert!(!replica["reason"].as_str().unwrap().is_empty());
            // Nothing of the server's own file system, and nothing of libtorch's insides.
            let reason = replica["reason"].as_str().unwrap();
            assert!(reason.len() <= 700 && !reason.contains('\n') && !reason.contains(".cpp"), "{reason}");
        }
        let refused = inference(&cluster, "c1").await.model_infer(row(name, &[1.0])).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused:?}");
        unharmed(&cluster).await;
    }
    let mut attempts = 0;
    for id in ["w1", "w2"] {
        let log = fs::read_to_string(cluster.data_dir().join(format!("logs/{id}.log"))).unwrap();
        attempts += log.lines().filter(|line| line.contains("a model can't be served") && line.contains("\"corrupt\"")).count();
    }
    assert_eq!(attempts, 2, "each worker tries it once and says so once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_read_is_refused_at_once() {
    let repository = repository();
    let cluster = cluster(1, 1, &repository, &["plus_one"]);
    let misspelt = command(&cluster, &["deploy", "misspelt"]);
    assert_eq!(misspelt.code, Some(1), "{misspelt:?}");
    assert!(misspelt.stderr.contains("misspelt/config.pbtxt:2:11: "), "line and column: {misspelt:?}");
    for (name, said) in [("empty", "config.pbtxt"), ("nobody", "not in the model repository"), ("../plus_one", "model name")] {
        let refused = command(&cluster, &["deploy", name]);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.stderr.contains(said), "{name}: {refused:?}");
    }
    let listed = command(&cluster, &["repository", "-o", "json"]).json();
    let models = listed.as_array().unwrap_or_else(|| listed["models"].as_array().unwrap());
    let misspelt = models.iter().find(|model| model["name"] == "misspelt").unwrap();
    assert!(misspelt["problem"].as_str().unwrap().contains("config.pbtxt:2:11"), "{misspelt}");
    unharmed(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_raises_says_so_and_serves_on() {
    let repository = repository();
    let cluster = cluster(1, 1, &repository, &["plus_one", "raises", "liar"]);
    let mut service = inference(&cluster, "c1").await;
    for _ in 0..3 {
        let raised = service.model_infer(row("raises", &[-1.0])).await.unwrap_err();
        assert_eq!(raised.code(), Code::Internal, "{raised:?}");
        assert!(raised.message().contains("a negative first element"), "{raised:?}");
        assert!(raised.message().len() <= 1024 && !raised.message().contains('\n'), "{raised:?}");
        let fine = service.model_infer(row("raises", &[1.0])).await.unwrap();
        assert_eq!(numbers(&fine.into_inner()), [1.0]);
    }
    let lied = service.model_infer(row("liar", &[1.0])).await.unwrap_err();
    assert_eq!(lied.code(), Code::Internal, "{lied:?}");
    assert_eq!(service.model_infer(row("nobody", &[1.0])).await.unwrap_err().code(), Code::NotFound);
    let mut short = row("plus_one", &[1.0, 2.0]);
    short.raw_input_contents[0] = vec![0; 7].into();
    assert_eq!(service.model_infer(short).await.unwrap_err().code(), Code::InvalidArgument);
    unharmed(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_finds_no_memory_fails_alone_and_serves_on() {
    let repository = repository();
    let cluster = cluster(1, 1, &repository, &["plus_one", "greedy"]);
    let mut service = inference(&cluster, "c1").await;
    for way in ["c1", "w1"] {
        let mut service = inference(&cluster, way).await;
        let greedy = service.model_infer(row("greedy", &[-1.0])).await.unwrap_err();
        assert_eq!((greedy.code(), Reason::of(&greedy)), (Code::Unavailable, Some(Reason::OutOfMemory)), "{way}: {greedy:?}");
        assert!(greedy.message().contains("out of memory") && greedy.message().len() <= 1024, "{greedy:?}");
    }
    // In one batch with others, it is only the greedy one's.
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..16 {
        let mut service = service.clone();
        let first = if number == 7 { -1.0 } else { number as f32 };
        asked.spawn(async move { (first, service.model_infer(row("greedy", &[first])).await) });
    }
    for (first, answer) in asked.join_all().await {
        match answer {
            Ok(answer) => assert_eq!(numbers(&answer.into_inner()), [first]),
            Err(status) => assert!(first < 0.0 && Reason::of(&status) == Some(Reason::OutOfMemory), "{first}: {status:?}"),
        }
    }
    assert_eq!(numbers(&service.model_infer(row("greedy", &[1.0])).await.unwrap().into_inner()), [1.0]);
    unharmed(&cluster).await;
}
