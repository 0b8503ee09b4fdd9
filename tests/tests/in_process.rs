//! A whole cluster inside this process: three coordinators and two workers, over real sockets and a real log.
use std::{ffi::OsString, time::Duration};

use cresset_client::CressetClient;
use cresset_coordinator as coordinator;
use cresset_proto::admin::v1::{DeployRequest, UndeployRequest};
use cresset_runtime::{
    server::listen,
    settings::{Invocation, Program, Settings},
};
use cresset_tests::harness::ModelRepository;
use cresset_worker as worker;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::support::{PATIENCE, numbers, plus_one, row};

fn settings(program: &Program, args: &[(&str, String)]) -> Settings {
    let flags = args.iter().flat_map(|(name, value)| [OsString::from(format!("--{name}")), value.into()]);
    match program.invoke_with(std::iter::once(program.name.into()).chain(flags)) {
        Invocation::Run(settings) => settings,
        other => panic!("{other:?}"),
    }
}

async fn socket() -> (TcpListener, String) {
    let listener = listen("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

struct InProcess {
    endpoints: Vec<String>,
    stop: CancellationToken,
    parts: JoinSet<()>,
    _data: tempfile::TempDir,
}

impl InProcess {
    async fn start(repository: &ModelRepository) -> Self {
        let data = tempfile::tempdir().unwrap();
        let (stop, mut parts, mut endpoints) = (CancellationToken::new(), JoinSet::new(), vec![]);
        let mut peers = vec![];
        for _ in 0..3 {
            peers.push(socket().await);
        }
        let addresses: Vec<String> = peers.iter().map(|(_, address)| address.clone()).collect();
        let list: Vec<String> = (1..).zip(&addresses).map(|(n, address)| format!("c{n}={address}")).collect();
        let models = repository.path().display().to_string();
        for (n, (peer, _)) in (1..).zip(peers) {
            let args = [
                ("id", format!("c{n}")),
                ("cluster-id", "in-process".into()),
                ("peers", list.join(",")),
                ("data-dir", data.path().join(format!("c{n}")).display().to_string()),
                ("model-repository", models.clone()),
            ];
            let config = coordinator::config::Config::read(settings(&coordinator::config::PROGRAM, &args)).unwrap();
            let ((grpc, address), (http, _)) = (socket().await, socket().await);
            endpoints.push(address);
            let part = coordinator::run(config, coordinator::Listeners { grpc, http, peer }, stop.clone());
            parts.spawn(async move { part.await.unwrap() });
        }
        for n in 1..=2 {
            let args = [
                ("id", format!("w{n}")),
                ("coordinators", addresses.join(",")),
                ("model-repository", models.clone()),
                ("device", "cpu".into()),
                ("intra-op-threads", "1".into()),
                ("drain-ms", "1000".into()),
            ];
            let config = worker::config::Config::read(settings(&worker::config::PROGRAM, &args)).unwrap();
            let ((grpc, _), (http, _)) = (socket().await, socket().await);
            let part = worker::run(config, worker::Listeners { grpc, http }, stop.clone());
            parts.spawn(async move {
                let _ = part.await.unwrap();
            });
        }
        Self { endpoints, stop, parts, _data: data }
    }

    async fn end(mut self) {
        self.stop.cancel();
        while let Some(part) = tokio::time::timeout(PATIENCE, self.parts.join_next()).await.expect("everything stops in time") {
            part.unwrap();
        }
    }
}

/// Deploy, predict, undeploy, stop: every part of the way in one process.
#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_in_one_process_deploys_answers_and_stops() {
    let repository = plus_one();
    let cluster = InProcess::start(&repository).await;
    let client = CressetClient::connect(cluster.endpoints.clone()).await.unwrap();
    let deploy = DeployRequest { command_id: vec![7; 16].into(), name: "plus_one".into(), replicas: 2, ..Default::default() };
    let twice = [deploy.clone(), deploy];
    let mut answers = vec![];
    for request in twice {
        let deployed = client.coordinators().admin(PATIENCE, |mut admin| {
            let request = request.clone();
            async move { admin.deploy(request).await }
        });
        answers.push(deployed.await.unwrap());
    }
    assert_eq!(answers[0], answers[1], "the same command is applied once");

    // The router waits for the first replica by itself.
    assert_eq!(numbers(&client.infer(row("plus_one", &[1.0, 2.0])).await.unwrap()), [2.0, 3.0]);

    let undeploy = UndeployRequest { command_id: vec![8; 16].into(), name: "plus_one".into(), version: 0 };
    let undeployed = client.coordinators().admin(PATIENCE, |mut admin| {
        let request = undeploy.clone();
        async move { admin.undeploy(request).await }
    });
    undeployed.await.unwrap();
    let gone = async {
        loop {
            match client.infer(row("plus_one", &[1.0])).await {
                Err(status) if status.code() == Code::NotFound => return,
                // The news is on its way to this router.
                Ok(_) | Err(_) => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone).await.expect("an undeployed model is unknown");
    cluster.end().await;
}
