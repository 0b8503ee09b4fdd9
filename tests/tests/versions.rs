//! Versions, labels and generations of models, on whole clusters: what changes, and that nobody's request pays for it.

use std::{fs, sync::Arc};

use cresset_proto::{
    admin::v1::{Model, ModelState, StatusResponse, WorkerState},
    inference::{
        ModelConfigRequest, ModelInferRequest, ModelMetadataRequest, ModelReadyRequest, ModelRepositoryParameter,
        ModelStatisticsRequest, RepositoryModelLoadRequest, RepositoryModelUnloadRequest,
        grpc_inference_service_client::GrpcInferenceServiceClient, model_repository_parameter::ParameterChoice,
    },
    parameters::{bool_parameter, int64_parameter, keys},
    tensor::{Datatype, Tensor, push_input},
};
use cresset_tests::{
    harness::{Cluster, ModelRepository, fp32_model, worker_of},
    reference::bytes_of,
};
use cresset_worker::engine::testing::{self, Script};
use serde_json::Value;
use tokio::time::timeout;
use tonic::{Code, transport::Channel};

use crate::support::{
    Load, PATIENCE, Target, cluster, cluster_with_env, command, inference, numbers, others, plus_one, row, until_ready,
};

type Service = GrpcInferenceServiceClient<Channel>;

/// Versions of a model with their generations, those that leave included.
fn versions(status: &StatusResponse, name: &str) -> Vec<(u64, u64)> {
    status.models.iter().filter(|model| model.name == name).map(|model| (model.version, model.generation)).collect()
}

fn version_of<'a>(status: &'a StatusResponse, name: &str, version: u64) -> Option<&'a Model> {
    status.models.iter().find(|model| model.name == name && model.version == version)
}

/// Runs `cresset`, which must succeed.
fn done(cluster: &Cluster, args: &[&str]) {
    let ran = command(cluster, args);
    assert_eq!(ran.code, Some(0), "{args:?}: {ran:?}");
}

/// Runs `cresset`, which must fail and say this.
fn refused(cluster: &Cluster, args: &[&str], words: &str) {
    let ran = command(cluster, args);
    assert_eq!(ran.code, Some(1), "{args:?}: {ran:?}");
    assert!(ran.stderr.contains(words), "{args:?}: {ran:?}");
}

/// The same function as `plus_one`, in another file.
fn one_plus() -> Script {
    Script::new("def forward(self, x):\n  return 1 + x\n")
}

/// One request of a sequence.
fn step(version: &str, value: f32, (start, end): (bool, bool)) -> ModelInferRequest {
    let mut request = row("running_sum", &[value]);
    request.model_version = version.into();
    request.inputs[0].shape = vec![1];
    request.parameters.insert(keys::SEQUENCE_ID.into(), int64_parameter(7));
    request.parameters.insert(keys::SEQUENCE_START.into(), bool_parameter(start));
    request.parameters.insert(keys::SEQUENCE_END.into(), bool_parameter(end));
    request
}

fn running_sum_times(factor: u32) -> Script {
    let body =
        format!("def forward(self, x):\n  self.total = self.total + x.sum() * {factor}\n  return self.total.reshape([1])\n");
    Script::new(&body).buffer("total", "torch.zeros([])")
}

fn with_running_sum(repository: ModelRepository, more: &str) -> ModelRepository {
    let config = fp32_model(0, &format!("sequence_batching {{ max_sequence_idle_microseconds: 60000000 }} {more}"));
    repository.with_script("running_sum", &config, &running_sum_times(1)).unwrap()
}

/// Every change of what is deployed, while requests keep coming from a client's router and through a coordinator.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_change_of_a_deployment_costs_a_request() {
    let repository = with_running_sum(plus_one(), "");
    let cluster = cluster(3, 2, &repository, &["plus_one", "running_sum"]);
    let leader = cluster.leader().await.unwrap();
    let mut beside = inference(&cluster, &others(&cluster, &leader)[0]).await;
    let targets = [Target::Client(Arc::new(cluster.client().await.unwrap())), Target::Gateway(beside.clone())];
    let load = Load::start(&targets, 2);
    load.more(200).await;
    let before = versions(&cluster.status().await.unwrap(), "plus_one");

    // Reload in place: other files in the same version.
    repository.add_version("plus_one", 1, &one_plus()).unwrap();
    done(&cluster, &["deploy", "plus_one", "--wait"]);
    let after = versions(&cluster.status().await.unwrap(), "plus_one");
    assert!(after.len() == 1 && after[0].0 == 1 && after[0].1 > before[0].1, "{before:?} {after:?}");
    load.more(200).await;

    // A reload that can't be loaded: the old one serves on, and the status says why.
    let good = fs::read(repository.path().join("plus_one/1/model.pt")).unwrap();
    fs::write(repository.path().join("plus_one/1/model.pt"), b"this is no archive at all").unwrap();
    refused(&cluster, &["deploy", "plus_one", "--wait"], "model 'plus_one' can't be served: ");
    let status = cluster.status().await.unwrap();
    let broken = version_of(&status, "plus_one", 1).unwrap();
    assert_eq!((broken.state(), broken.replicas_ready, broken.stuck), (ModelState::Degraded, 0, true));
    assert!(broken.reason.ends_with("; what was deployed before answers"), "{broken:?}");
    load.more(200).await;
    fs::write(repository.path().join("plus_one/1/model.pt"), good).unwrap();
    done(&cluster, &["deploy", "plus_one", "--wait"]);
    load.more(200).await;

    // A version that takes the other's place, one beside it again, and one that goes.
    repository.add_version("plus_one", 2, &testing::plus_one()).unwrap();
    done(&cluster, &["deploy", "plus_one", "--wait"]);
    let only_two = |status: &_| (versions(status, "plus_one").iter().map(|(v, _)| *v).eq([2])).then_some(());
    cluster.wait_for("version 1 has left", PATIENCE, only_two).await.unwrap();
    load.more(200).await;
    done(&cluster, &["deploy", "plus_one", "--version", "1", "--wait"]);
    load.more(200).await;
    done(&cluster, &["undeploy", "plus_one", "--version", "2", "--wait"]);
    load.more(200).await;
    let left = versions(&cluster.status().await.unwrap(), "plus_one");
    assert!(left.len() == 1 && left[0].0 == 1, "{left:?}");
    let outcome = load.end().await;
    println!("{} answers, slowest {:?}", outcome.answered, outcome.slowest);
    assert_eq!(outcome.failures, Vec::<String>::new());

    // A sequence ends as what it began; the next one is the new model's.
    let sum = async |service: &mut Service, request| numbers(&service.model_infer(request).await.unwrap().into_inner())[0];
    assert_eq!(sum(&mut beside, step("", 1.0, (true, false))).await, 1.0);
    repository.add_version("running_sum", 1, &running_sum_times(10)).unwrap();
    done(&cluster, &["deploy", "running_sum", "--wait"]);
    assert_eq!(sum(&mut beside, step("", 2.0, (false, false))).await, 3.0);
    assert_eq!(sum(&mut beside, step("", 3.0, (false, true))).await, 6.0);
    assert_eq!(sum(&mut beside, step("", 1.0, (true, true))).await, 10.0);
}

/// Asks until the router that is asked has heard of the change.
async fn until_answered_by(service: &mut Service, model: &str, version: &str, expected: &str) {
    let asked = async {
        loop {
            let mut request = row(model, &[1.0]);
            request.model_version = version.into();
            match service.model_infer(request).await {
                Ok(answer) if answer.get_ref().model_version == expected => return,
                Ok(_) | Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    timeout(PATIENCE, asked).await.unwrap_or_else(|_| panic!("'{version}' never became version {expected}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_versions_answer_by_number_and_by_label() {
    let repository = ModelRepository::new().unwrap();
    let config = fp32_model(8, "version_policy { all { } }");
    repository.add_script("plus", &config, &testing::plus_one()).unwrap();
    repository.add_version("plus", 2, &Script::new("def forward(self, x):\n  return x + 100\n")).unwrap();
    let repository = with_running_sum(repository, "version_policy { all { } }");
    repository.add_version("running_sum", 2, &running_sum_times(10)).unwrap();
    let cluster = cluster(3, 2, &repository, &["plus", "running_sum"]);
    done(&cluster, &["label", "plus", "stable=1", "canary=2"]);
    let leader = cluster.leader().await.unwrap();
    let mut service = inference(&cluster, &others(&cluster, &leader)[0]).await;
    until_answered_by(&mut service, "plus", "canary", "2").await;
    for (version, number, answer) in
        [("", "2", 101.0), ("1", "1", 2.0), ("2", "2", 101.0), ("stable", "1", 2.0), ("canary", "2", 101.0)]
    {
        let mut request = row("plus", &[1.0]);
        request.model_version = version.into();
        let told = service.model_infer(request.clone()).await.unwrap().into_inner();
        assert_eq!((told.model_version.as_str(), numbers(&told)), (number, vec![answer]), "'{version}'");
        let mut stream = service.model_stream_infer(tokio_stream::iter([request])).await.unwrap().into_inner();
        let told = stream.message().await.unwrap().unwrap();
        assert_eq!(told.infer_response.unwrap().model_version, number, "'{version}': {}", told.error_message);
        let (name, version) = ("plus".to_owned(), version.to_owned());
        let ready = ModelReadyRequest { name: name.clone(), version: version.clone() };
        assert!(service.model_ready(ready).await.unwrap().into_inner().ready, "'{version}'");
        let metadata = ModelMetadataRequest { name: name.clone(), version: version.clone() };
        let metadata = service.model_metadata(metadata).await.unwrap().into_inner();
        let expected = if version.is_empty() { vec!["1", "2"] } else { vec![number] };
        assert_eq!(metadata.versions, expected, "'{version}'");
        let config = ModelConfigRequest { name: name.clone(), version: version.clone() };
        assert_eq!(service.model_config(config).await.unwrap().into_inner().config.unwrap().name, "plus");
        let statistics = ModelStatisticsRequest { name, version: version.clone() };
        let statistics = service.model_statistics(statistics).await.unwrap().into_inner().model_stats;
        let told: Vec<_> = statistics.iter().map(|one| one.version.as_str()).collect();
        assert_eq!(told, expected, "'{version}'");
    }
    what_is_no_version_is_refused(&cluster, &mut service).await;
    a_label_moves_and_is_shown(&cluster, &mut service).await;
    a_sequence_keeps_its_version(&cluster, &mut service).await;
}

async fn what_is_no_version_is_refused(cluster: &Cluster, service: &mut Service) {
    let ask = |version: &str| {
        let mut request = row("plus", &[1.0]);
        request.model_version = version.into();
        request
    };
    for wrong in ["latest", "1.0"] {
        let told = service.model_infer(ask(wrong)).await.unwrap_err();
        assert_eq!(told.code(), Code::InvalidArgument, "{told:?}");
        let words = format!("failed to get model version from specified version string '{wrong}'");
        assert!(told.message().starts_with(&words), "{told:?}");
    }
    assert_eq!(service.model_infer(ask("9")).await.unwrap_err().code(), Code::NotFound);
    let at_worker = inference(cluster, "w1").await.model_infer(ask("canary")).await.unwrap_err();
    assert_eq!(at_worker.code(), Code::InvalidArgument);
    assert!(at_worker.message().contains("where a coordinator is asked"), "{at_worker:?}");
    refused(cluster, &["label", "plus", "canary=9"], "isn't deployed in version 9");
    refused(cluster, &["label", "nobody", "canary=1"], "'nobody' isn't deployed");
    refused(cluster, &["undeploy", "plus", "--version", "2"], "has the label 'canary'");
    assert_eq!(command(cluster, &["label", "plus", "2=1"]).code, Some(2), "a label that could be a number");
}

async fn a_label_moves_and_is_shown(cluster: &Cluster, service: &mut Service) {
    done(cluster, &["label", "plus", "stable=2", "canary="]);
    until_answered_by(service, "plus", "stable", "2").await;
    let status = command(cluster, &["status", "-o", "json"]).json();
    let labels: Vec<&Value> =
        status["models"].as_array().unwrap().iter().filter(|m| m["name"] == "plus").map(|m| &m["labels"]).collect();
    assert_eq!(labels, [&serde_json::json!([]), &serde_json::json!(["stable"])]);
    let table = command(cluster, &["status"]).stdout;
    assert!(table.contains("LABELS") && table.contains("stable"), "{table}");
}

async fn a_sequence_keeps_its_version(cluster: &Cluster, service: &mut Service) {
    done(cluster, &["label", "running_sum", "live=1"]);
    let first = async {
        loop {
            if let Ok(answer) = service.clone().model_infer(step("live", 1.0, (true, false))).await {
                return answer.into_inner();
            }
        }
    };
    let first = timeout(PATIENCE, first).await.expect("the label becomes known");
    assert_eq!((first.model_version.as_str(), numbers(&first)), ("1", vec![1.0]));
    done(cluster, &["label", "running_sum", "live=2"]);
    let mut other = step("live", 1.0, (true, true));
    other.parameters.insert(keys::SEQUENCE_ID.into(), int64_parameter(8));
    let moved = async {
        while service.clone().model_infer(other.clone()).await.unwrap().into_inner().model_version != "2" {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, moved).await.expect("the label moves");
    let last = service.model_infer(step("live", 2.0, (false, true))).await.unwrap().into_inner();
    assert_eq!((last.model_version.as_str(), numbers(&last)), ("1", vec![3.0]));
}

fn with_null(repository: &ModelRepository) {
    repository.add_bytes("nothing", &fp32_model(8, "").replace("pytorch_libtorch", "null"), b"").unwrap();
    fs::remove_file(repository.path().join("nothing/1/model.pt")).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn packages_and_null_models_are_deployed_like_any_other() {
    let repository = plus_one();
    with_null(&repository);
    let config = "platform: \"torch_aoti\"\nmax_batch_size: 8\n\
        input [ { name: \"x\" data_type: TYPE_FP32 dims: [ 4 ] }, { name: \"state\" data_type: TYPE_FP32 dims: [ 3 ] } ]\n\
        output [ { name: \"total\" data_type: TYPE_FP32 dims: [ 1 ] }, { name: \"new\" data_type: TYPE_FP32 dims: [ 3 ] } ]\n";
    let fixture = cresset_tests::harness::binaries::root().join("worker/tests/fixtures/package");
    fs::create_dir_all(repository.path().join("package/1")).unwrap();
    fs::write(repository.path().join("package/config.pbtxt"), config).unwrap();
    fs::copy(fixture.join("model.pt2"), repository.path().join("package/1/model.pt2")).unwrap();
    let allowed = vec![("CRESSET_NULL_ENGINE".to_owned(), "true".to_owned())];
    let cluster = cluster_with_env(1, 2, &repository, &["package", "nothing"], allowed);
    let mut service = inference(&cluster, "c1").await;
    let cases: Vec<Value> = serde_json::from_str(&fs::read_to_string(fixture.join("reference.json")).unwrap()).unwrap();
    for case in &cases {
        let floats = |name: &str| -> Vec<f32> {
            case[name]["values"].as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
        };
        let mut request = ModelInferRequest { model_name: "package".into(), ..Default::default() };
        for name in ["x", "state"] {
            let shape = case[name]["shape"].as_array().unwrap().iter().map(|dim| dim.as_i64().unwrap()).collect();
            let data = bytes_of(&floats(name));
            push_input(&mut request, Tensor { name: name.into(), datatype: Datatype::Fp32, shape, data });
        }
        let answer = service.model_infer(request).await.unwrap().into_inner();
        let outputs: Vec<_> = answer.raw_output_contents.iter().map(|raw| cresset_tests::reference::floats(raw)).collect();
        assert_eq!(outputs, [floats("total"), floats("new")]);
    }
    let echoed = service.model_infer(row("nothing", &[1.0, 2.0])).await.unwrap().into_inner();
    assert_eq!(echoed.outputs[0].name, "y");
    let config = ModelConfigRequest { name: "package".into(), version: String::new() };
    let config = service.model_config(config).await.unwrap().into_inner().config.unwrap();
    assert_eq!((&*config.platform, &*config.default_model_filename), ("torch_aoti", "model.pt2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_null_model_is_refused_by_workers_that_were_not_told_to_serve_it() {
    let repository = plus_one();
    with_null(&repository);
    let cluster = cluster(1, 1, &repository, &[]);
    refused(&cluster, &["deploy", "nothing", "--wait"], "null-engine");
    let model = cluster.wait_for_model("nothing", ModelState::Failed, PATIENCE).await.unwrap();
    assert!(model.reason.contains("null-engine"), "{model:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_brings_its_own_configuration() {
    let repository = plus_one();
    let cluster = cluster(3, 2, &repository, &["plus_one"]);
    until_ready(&cluster, "plus_one").await;
    let mut service = inference(&cluster, "c2").await;
    let load = |config: Option<&str>| {
        let parameter =
            |text: &str| ModelRepositoryParameter { parameter_choice: Some(ParameterChoice::StringParam(text.into())) };
        let parameters = config.map(|text| ("config".to_owned(), parameter(text))).into_iter().collect();
        RepositoryModelLoadRequest { model_name: "plus_one".into(), parameters, ..Default::default() }
    };
    let batch_max = async |service: &mut Service| {
        let request = ModelConfigRequest { name: "plus_one".into(), version: String::new() };
        service.model_config(request).await.unwrap().into_inner().config.unwrap().max_batch_size
    };
    assert_eq!(batch_max(&mut service).await, 8);
    let json = r#"{"max_batch_size": 2, "input": [{"name": "x", "data_type": "TYPE_FP32", "dims": [-1]}],
        "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}]}"#;
    service.repository_model_load(load(Some(json))).await.unwrap();
    assert_eq!(batch_max(&mut service).await, 2);
    let mut three = row("plus_one", &[1.0, 2.0, 3.0]);
    three.inputs[0].shape = vec![3, 1];
    let told = service.model_infer(three.clone()).await.unwrap_err();
    assert!(told.message().contains("batch-size must be <= 2"), "every replica runs with it: {told:?}");
    for (wrong, words) in
        [("{", "no ModelConfig"), ("{}", "at least one input"), (r#"{"name": "other"}"#, "must be the folder's name")]
    {
        let told = service.repository_model_load(load(Some(wrong))).await.unwrap_err();
        assert_eq!(told.code(), Code::InvalidArgument, "{told:?}");
        assert!(told.message().contains(words), "{told:?}");
    }
    // Without one it is the repository's again.
    service.repository_model_load(load(None)).await.unwrap();
    assert_eq!(batch_max(&mut service).await, 8);
    assert_eq!(numbers(&service.model_infer(three).await.unwrap().into_inner()), [2.0, 3.0, 4.0]);
}

/// The SHA-256 names of what a process keeps.
fn kept(cluster: &Cluster, id: &str) -> Vec<String> {
    let folder = cluster.data_dir().join(id).join("files");
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Looks at the folders, which nobody announces a change of, until they are as they should be.
async fn until_kept(cluster: &Cluster, ids: &[&str], count: usize) {
    let looked = async {
        while ids.iter().any(|id| kept(cluster, id).len() != count) {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, looked).await.unwrap_or_else(|_| panic!("never {count} archives at each of {ids:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_load_brings_its_own_files_to_every_worker() {
    let repository = plus_one();
    let mut cluster = cluster(3, 2, &repository, &["plus_one"]);
    let mut service = inference(&cluster, "c2").await;
    let bytes = |script: Script| {
        let folder = tempfile::tempdir().unwrap();
        script.save(&folder.path().join("model.pt")).unwrap();
        fs::read(folder.path().join("model.pt")).unwrap()
    };
    let text = |text: &str| Some(ParameterChoice::StringParam(text.into()));
    let file = |content: &[u8]| Some(ParameterChoice::BytesParam(content.to_vec().into()));
    let load = |parameters: Vec<(&str, Option<ParameterChoice>)>| {
        let parameter = |(key, choice): (&str, _)| (key.to_owned(), ModelRepositoryParameter { parameter_choice: choice });
        let parameters = parameters.into_iter().map(parameter).collect();
        RepositoryModelLoadRequest { model_name: "sent".into(), parameters, ..Default::default() }
    };
    let (one, hundred) = (bytes(testing::plus_one()), bytes(Script::new("def forward(self, x):\n  return x + 100\n")));
    let json = r#"{"max_batch_size": 8, "version_policy": {"all": {}}, "input": [{"name": "x", "data_type": "TYPE_FP32",
        "dims": [-1]}], "output": [{"name": "y", "data_type": "TYPE_FP32", "dims": [-1]}]}"#;
    for (wrong, words) in [
        (vec![("file:1/model.pt", file(&one))], "need the parameter 'config'"),
        (vec![("config", text(json)), ("file:1/other.pt", file(&one))], "no parameter 'file:1/model.pt'"),
        (vec![("config", text(json)), ("file:1/../../x", file(&one))], "must be 'file:VERSION/NAME'"),
        (vec![("config", text(json)), ("file:model.pt", file(&one))], "must be 'file:VERSION/NAME'"),
        (vec![("config", text(json)), ("file:1/model.pt", text("x"))], "must be bytes"),
    ] {
        let told = service.repository_model_load(load(wrong)).await.unwrap_err();
        assert_eq!(told.code(), Code::InvalidArgument, "{told:?}");
        assert!(told.message().contains(words), "{told:?}");
    }
    let both = vec![("config", text(json)), ("file:1/model.pt", file(&one)), ("file:3/model.pt", file(&hundred))];
    service.repository_model_load(load(both)).await.unwrap();
    for (version, number, answer) in [("", "3", 101.0), ("1", "1", 2.0), ("3", "3", 101.0)] {
        let mut request = row("sent", &[1.0]);
        request.model_version = version.into();
        let told = service.model_infer(request).await.unwrap().into_inner();
        assert_eq!((told.model_version.as_str(), numbers(&told)), (number, vec![answer]));
    }
    let everywhere = ["c1", "c2", "c3", "w1", "w2"];
    let digests = kept(&cluster, "c1");
    assert_eq!(digests.len(), 2, "{digests:?}");
    for id in everywhere {
        assert_eq!(kept(&cluster, id), digests, "{id}");
    }
    // A coordinator that lost its copy gets it from another, and a worker's next life gets it from whom it can.
    for digest in &digests {
        fs::remove_file(cluster.data_dir().join("c3/files").join(digest)).unwrap();
    }
    let before = worker_of(&cluster.status().await.unwrap(), "w1").unwrap().incarnation;
    cluster.kill("w1").unwrap();
    cluster.restart_process("w1").unwrap();
    let back =
        |status: &_| worker_of(status, "w1").filter(|w| w.state() == WorkerState::Ready && w.incarnation > before).map(drop);
    cluster.wait_for("w1 again", PATIENCE, back).await.unwrap();
    let whole = |status: &StatusResponse| {
        let sent = status.models.iter().filter(|model| model.name == "sent");
        (sent.filter(|model| model.state() == ModelState::Ready).count() == 2).then_some(())
    };
    cluster.wait_for("both versions on both workers", PATIENCE, whole).await.unwrap();
    until_kept(&cluster, &everywhere, 2).await;
    let unload = RepositoryModelUnloadRequest { model_name: "sent".into(), ..Default::default() };
    service.repository_model_unload(unload).await.unwrap();
    until_kept(&cluster, &everywhere, 0).await;
}
