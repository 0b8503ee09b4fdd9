//! The command line against a cluster, and commands that are sent twice.

use cresset_proto::{
    admin::v1::{CoordinatorRole, DeployRequest, StatusResponse, UndeployRequest},
    tensor::{Datatype, Tensor},
};
use cresset_tests::{
    harness::{binaries, model_of},
    reference::{Reference, floats},
};
use serde_json::{Value, json};
use tonic::Code;

use crate::support::{PATIENCE, admin, cluster, command, inference, numbers, others, plus_one, row, until_ready};

fn names(list: &Value, key: &str) -> Vec<String> {
    list.as_array().unwrap().iter().map(|item| item[key].as_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_is_deployed_asked_and_undeployed() {
    let repository = plus_one().with_demo("digits").unwrap();
    let cluster = cluster(3, 2, &repository, &[]);
    let listed = command(&cluster, &["repository", "-o", "json"]);
    let listed = listed.json();
    let models = listed.as_array().unwrap_or_else(|| listed["models"].as_array().unwrap());
    assert_eq!(models.iter().map(|model| model["name"].as_str().unwrap()).collect::<Vec<_>>(), ["digits", "plus_one"]);
    assert!(models.iter().all(|model| model["deployed"] == false && model["versions"] == json!([1])), "{models:?}");

    for name in ["plus_one", "digits"] {
        let deployed = command(&cluster, &["deploy", name, "--wait"]);
        assert_eq!(deployed.code, Some(0), "{deployed:?}");
    }
    let status = command(&cluster, &["status", "-o", "json"]);
    assert_eq!(status.code, Some(0), "{status:?}");
    let status = status.json();
    assert_eq!(names(&status["coordinators"], "id"), ["c1", "c2", "c3"]);
    let mut roles = names(&status["coordinators"], "role");
    roles.sort();
    assert_eq!(roles, ["follower", "follower", "leader"]);
    assert_eq!(names(&status["workers"], "id"), ["w1", "w2"]);
    assert_eq!(names(&status["workers"], "state"), ["ready", "ready"]);
    for worker in status["workers"].as_array().unwrap() {
        let mut replicas = worker["replicas"].as_array().unwrap().clone();
        replicas.iter_mut().for_each(|replica| drop(replica.as_object_mut().unwrap().remove("memory_bytes")));
        let replica = |model: &str| json!({"model": model, "version": 1, "shard": 0, "state": "ready"});
        assert_eq!(Value::from(replicas), json!([replica("digits"), replica("plus_one")]));
    }
    assert_eq!(names(&status["models"], "name"), ["digits", "plus_one"]);
    for model in status["models"].as_array().unwrap() {
        assert_eq!((&model["state"], &model["reason"]), (&json!("ready"), &json!("")));
        assert_eq!((&model["replicas_wanted"], &model["replicas_ready"]), (&json!(2), &json!(2)));
    }
    let table = command(&cluster, &["status"]);
    assert!(table.stdout.contains("plus_one") && table.stdout.contains("leader c"), "{table:?}");

    let ink: Vec<f32> = (0..64).map(|pixel| (pixel % 17) as f32).collect();
    let literal = format!("image={:?}", vec![ink.clone()]);
    let predicted = command(&cluster, &["predict", "digits", "--input", &literal, "-o", "json"]);
    assert_eq!(predicted.code, Some(0), "{predicted:?}");
    assert_digits(&predicted.json(), &ink);

    let undeployed = command(&cluster, &["undeploy", "plus_one", "--wait"]);
    assert_eq!(undeployed.code, Some(0), "{undeployed:?}");
    let gone = |status: &StatusResponse| model_of(status, "plus_one").is_none().then_some(());
    cluster.wait_for("plus_one is gone", PATIENCE, gone).await.unwrap();
    let refused = command(&cluster, &["predict", "plus_one", "--input", "x=1"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("plus_one") && refused.stderr.contains("not found"), "{refused:?}");
    let again = command(&cluster, &["undeploy", "plus_one"]);
    assert_eq!(again.code, Some(1), "{again:?}");
    let absent = command(&cluster, &["deploy", "nobody"]);
    assert_eq!(absent.code, Some(1), "{absent:?}");
    assert!(absent.stderr.contains("'nobody'"), "{absent:?}");
}

/// Compares what `cresset predict -o json` printed with the model run here.
fn assert_digits(printed: &Value, ink: &[f32]) {
    let image = Tensor {
        name: "image".into(),
        datatype: Datatype::Fp32,
        shape: vec![1, 64],
        data: cresset_tests::reference::bytes_of(ink),
    };
    let mut reference = Reference::load(&binaries::demo_models(), "digits").unwrap();
    let expected = floats(&reference.infer(&[image]).unwrap()[0].data);
    let output = &printed["outputs"][0];
    assert_eq!((&output["name"], &output["shape"]), (&json!("scores"), &json!([1, 10])), "{printed}");
    let mut flat = Vec::new();
    flatten(&output["data"], &mut flat);
    assert_eq!(flat.len(), expected.len(), "{printed}");
    for (printed, expected) in flat.iter().zip(&expected) {
        assert!((printed - f64::from(*expected)).abs() < 1e-4, "{flat:?} {expected:?}");
    }
}

fn flatten(value: &Value, into: &mut Vec<f64>) {
    match value.as_array() {
        Some(items) => items.iter().for_each(|item| flatten(item, into)),
        None => into.extend(value.as_f64()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_one_coordinator_will_do() {
    let repository = plus_one();
    let cluster = cluster(3, 1, &repository, &[]);
    // The first of the list is the one that is down, and it led.
    let leader = cluster.leader().await.unwrap();
    let mut endpoints = vec![cluster.grpc(&leader).unwrap().to_owned()];
    endpoints.extend(others(&cluster, &leader).iter().map(|id| cluster.grpc(id).unwrap().to_owned()));
    let endpoints = endpoints.join(",");
    cluster.kill(&leader).unwrap();
    let run = |args: &[&str]| binaries::run("cresset", ["--endpoints", &endpoints].iter().chain(args)).unwrap();
    let deployed = run(&["deploy", "plus_one", "--wait"]);
    assert_eq!(deployed.code, Some(0), "{deployed:?}");
    let predicted = run(&["predict", "plus_one", "--input", "x=[[41]]", "-o", "json"]);
    assert_eq!(predicted.code, Some(0), "{predicted:?}");
    let status = run(&["status", "-o", "json"]);
    assert_eq!(status.code, Some(0), "{status:?}");
    let status = status.json();
    let coordinators = status["coordinators"].as_array().unwrap();
    let dead = coordinators.iter().find(|coordinator| coordinator["id"] == leader.as_str()).unwrap();
    assert_eq!(dead["role"], "unreachable", "{status}");
    assert_eq!(coordinators.iter().filter(|coordinator| coordinator["role"] == "leader").count(), 1, "{status}");

    let ids = others(&cluster, &leader);
    cluster.kill_all(ids.iter().map(String::as_str)).unwrap();
    let refused = run(&["--timeout", "1s", "status"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    for endpoint in endpoints.split(',') {
        assert!(refused.stderr.contains(endpoint), "{endpoint} in {refused:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_sent_twice_is_applied_once() {
    let repository = plus_one();
    let cluster = cluster(3, 1, &repository, &[]);
    let leader = cluster.leader().await.unwrap();
    let other = others(&cluster, &leader)[0].clone();
    let (mut at_leader, mut beside) = (admin(&cluster, &leader).await, admin(&cluster, &other).await);
    let deploy = |id: u8| DeployRequest {
        command_id: vec![id; 16].into(),
        name: "plus_one".into(),
        version: 0,
        replicas: 1,
        ..Default::default()
    };
    let first = beside.deploy(deploy(1)).await.unwrap().into_inner();
    let again = at_leader.deploy(deploy(1)).await.unwrap().into_inner();
    assert_eq!(first, again, "the same answer");
    let undeploy = UndeployRequest { command_id: vec![2; 16].into(), name: "plus_one".into(), version: 0 };
    at_leader.undeploy(undeploy).await.unwrap();
    // A late copy of the first command must not bring the model back.
    let late = beside.deploy(deploy(1)).await.unwrap().into_inner();
    assert_eq!(first, late);
    let status = cluster.wait_for("a current status", PATIENCE, |status| status.current.then(|| status.clone())).await.unwrap();
    assert!(model_of(&status, "plus_one").is_none(), "{status:#?}");
    let anew = beside.deploy(deploy(3)).await.unwrap().into_inner();
    assert!(anew.generation > first.generation && anew.epoch > first.epoch, "{anew:?} after {first:?}");
    until_ready(&cluster, "plus_one").await;
    let answer = inference(&cluster, &other).await.model_infer(row("plus_one", &[0.5])).await.unwrap();
    assert_eq!(numbers(&answer.into_inner()), [1.5]);
    let short = DeployRequest { command_id: vec![1; 15].into(), ..deploy(1) };
    assert_eq!(beside.deploy(short).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_coordinator_tells_the_same() {
    let repository = plus_one();
    let cluster = cluster(3, 2, &repository, &["plus_one"]);
    let status = cluster.status().await.unwrap();
    for id in ["c1", "c2", "c3"] {
        let own = cluster.own_status(id).await.unwrap();
        assert_eq!((own.answered_by.as_str(), own.current), (id, false));
        assert_eq!(own.cluster_id, status.cluster_id);
        let roles = own.coordinators.iter().filter(|coordinator| coordinator.role() == CoordinatorRole::Leader);
        assert_eq!(roles.count(), 1);
        assert_eq!(own.workers.len(), 2);
    }
}
