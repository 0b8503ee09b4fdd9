//! Traces and metrics, seen from outside: a collector of our own gets the spans, and the HTTP ports are asked.
use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use cresset_proto::inference::{
    ModelInferRequest, TraceSettingRequest, TraceSettingResponse, trace_setting_request::SettingValue,
};
use cresset_tests::harness::Cluster;
use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::any_value::Value,
    trace::v1::Span,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::timeout,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::support::{PATIENCE, cluster, cluster_with_env, command, inference, plus_one, row};

const TRACE: &str = "0123456789abcdef0123456789abcdef";
const PARENT: &str = "00f067aa0ba902b7";

struct Collector(mpsc::Sender<(String, Span)>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(&self, request: Request<ExportTraceServiceRequest>) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.map(|resource| resource.attributes).unwrap_or_default();
            let name = attributes.iter().find(|attribute| attribute.key == "service.name");
            let service = match name.and_then(|name| name.value.as_ref()?.value.as_ref()) {
                Some(Value::StringValue(text)) => text.clone(),
                other => return Err(Status::invalid_argument(format!("service.name is {other:?}"))),
            };
            for span in resource.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                self.0.send((service.clone(), span)).await.map_err(|_| Status::unavailable("the test is over"))?;
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

type Spans = mpsc::Receiver<(String, Span)>;

/// A collector, the spans that it gets, and what tells processes of it.
async fn collector() -> (Spans, JoinHandle<Result<(), tonic::transport::Error>>, Vec<(String, String)>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, spans) = mpsc::channel(256);
    let collector = Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    let collector = tokio::spawn(collector.serve_with_incoming(TcpListenerStream::new(listener)));
    let env = [("OTEL_EXPORTER_OTLP_ENDPOINT", &*endpoint), ("OTEL_BSP_SCHEDULE_DELAY", "100")];
    (spans, collector, env.map(|(key, value)| (key.to_owned(), value.to_owned())).to_vec())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A caller's trace goes on through the coordinator and the worker, and both say what they did.
#[tokio::test(flavor = "multi_thread")]
async fn a_callers_trace_runs_through_coordinator_and_worker() {
    let (mut spans, collector, env) = collector().await;
    let repository = plus_one();
    let cluster = cluster_with_env(1, 1, &repository, &["plus_one"], env);
    let mut request = Request::new(row("plus_one", &[1.0]));
    request.get_mut().id = "traced".into();
    request.metadata_mut().insert("traceparent", format!("00-{TRACE}-{PARENT}-01").parse().unwrap());
    inference(&cluster, "c1").await.model_infer(request).await.unwrap();

    let mut found: BTreeMap<String, Span> = BTreeMap::new();
    while found.len() < 2 {
        let (service, span) = timeout(PATIENCE, spans.recv()).await.expect("the spans come").expect("the collector lives");
        if hex(&span.trace_id) == TRACE {
            found.insert(format!("{service} {}", span.name), span);
        }
    }
    let (route, predict) = (&found["cresset-coordinator route"], &found["cresset-worker predict"]);
    assert_eq!(hex(&route.parent_span_id), PARENT, "the caller is the coordinator's parent");
    assert_eq!(predict.parent_span_id, route.span_id, "and the coordinator the worker's");
    for (span, keys) in
        [(route, ["coordinator", "epoch", "model", "request"]), (predict, ["worker", "epoch", "model", "request"])]
    {
        for key in keys {
            assert!(span.attributes.iter().any(|attribute| attribute.key == key), "{key} in {span:?}");
        }
    }
    collector.abort();
}

/// Changes a process's trace settings.
async fn sample(cluster: &Cluster, id: &str, settings: &[(&str, &str)]) -> TraceSettingResponse {
    let value = |value: &str| SettingValue { value: vec![value.to_owned()] };
    let settings = settings.iter().map(|(key, text)| ((*key).to_owned(), value(text))).collect();
    let request = TraceSettingRequest { settings, ..Default::default() };
    inference(cluster, id).await.trace_setting(request).await.unwrap().into_inner()
}

/// Which requests leave a trace is changed while the processes run. A request that is sampled at the coordinator is sampled
/// at the worker, whose own rate is for requests that come straight to it.
#[tokio::test(flavor = "multi_thread")]
async fn the_rate_of_traces_changes_at_run_time() {
    let (mut spans, collector, env) = collector().await;
    let repository = plus_one();
    let cluster = cluster_with_env(1, 1, &repository, &["plus_one"], env);
    let mut client = inference(&cluster, "c1").await;
    let settings = sample(&cluster, "c1", &[]).await.settings;
    assert_eq!(
        (&settings["trace_level"].value[..], &settings["trace_rate"].value[..]),
        (&["TIMESTAMPS".into()][..], &["1".into()][..])
    );
    let mut ask = async |first: usize, requests: usize| {
        for number in first..first + requests {
            let request = ModelInferRequest { id: number.to_string(), ..row("plus_one", &[1.0]) };
            client.model_infer(request).await.unwrap();
        }
    };

    sample(&cluster, "c1", &[("trace_rate", "3"), ("trace_count", "2")]).await;
    sample(&cluster, "w1", &[("trace_rate", "1000")]).await;
    ask(0, 9).await;
    assert_eq!(sample(&cluster, "c1", &[]).await.settings["trace_count"].value, ["0"], "two of three are taken");
    sample(&cluster, "c1", &[("trace_level", "OFF"), ("trace_rate", "1"), ("trace_count", "-1")]).await;
    ask(100, 5).await;
    sample(&cluster, "c1", &[("trace_level", "TIMESTAMPS")]).await;
    ask(200, 1).await;

    // The last request's spans end the wait: whatever was sampled before it has been exported before them.
    let mut found: Vec<(String, String)> = vec![];
    while found.iter().filter(|(_, request)| request == "200").count() < 2 {
        let (_, span) = timeout(PATIENCE, spans.recv()).await.expect("the spans come").expect("the collector lives");
        let request = span.attributes.iter().find(|attribute| attribute.key == "request").unwrap();
        let Some(Value::StringValue(request)) = request.value.clone().unwrap().value else { panic!("{span:?}") };
        found.push((span.name, request));
    }
    found.sort();
    let both = |request: &str| ["predict", "route"].map(|name| (name.to_owned(), request.to_owned()));
    let mut wanted = [both("2"), both("5"), both("200")].concat();
    wanted.sort();
    assert_eq!(found, wanted);
    collector.abort();
}

/// Asks a process's HTTP port.
pub async fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(Duration::from_secs(10), stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    answer
}

/// Each process has its metrics and its health on its HTTP port; a collector that isn't there costs nothing.
#[tokio::test(flavor = "multi_thread")]
async fn every_process_shows_its_metrics_and_its_health() {
    let repository = plus_one();
    let nowhere = vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), "http://127.0.0.1:9".to_owned())];
    let cluster = cluster_with_env(1, 1, &repository, &["plus_one"], nowhere);
    let mut client = inference(&cluster, "c1").await;
    for _ in 0..3 {
        client.model_infer(row("plus_one", &[1.0])).await.unwrap();
    }
    for id in ["c1", "w1"] {
        let http = cluster.http(id).unwrap();
        for path in ["/healthz", "/readyz"] {
            let answer = get(http, path).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{id}{path}: {answer}");
        }
    }
    let worker = get(cluster.http("w1").unwrap(), "/metrics").await;
    for line in [
        "cresset_worker_requests_total{model=\"plus_one\",version=\"1\"} 3",
        // The same in Triton's words.
        "nv_inference_request_success{model=\"plus_one\",version=\"1\"} 3",
        "nv_inference_count{model=\"plus_one\",version=\"1\"} 3",
        "nv_inference_request_failure{model=\"plus_one\",reason=\"REJECTED\",version=\"1\"} 0",
        "nv_inference_pending_request_count{model=\"plus_one\",version=\"1\"} 0",
    ] {
        assert!(worker.contains(line), "{line} is missing in {worker}");
    }
    assert!(get(cluster.http("c1").unwrap(), "/metrics").await.contains("cresset_leading 1"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_status_says_how_long_a_model_has_been_idle() {
    let repository = plus_one();
    let cluster = cluster(3, 1, &repository, &["plus_one"]);
    // A worker says it every 5 s.
    let until = async |holds: fn(u64) -> bool| {
        let begun = Instant::now();
        loop {
            let status = command(&cluster, &["status", "-o", "json"]).json();
            if status["models"][0]["idle_s"].as_u64().is_some_and(holds) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{status}");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    };
    until(|idle_s| idle_s >= 6).await;
    inference(&cluster, "c2").await.model_infer(row("plus_one", &[1.0])).await.unwrap();
    until(|idle_s| idle_s < 6).await;
}
