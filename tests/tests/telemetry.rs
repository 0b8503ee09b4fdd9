//! Traces and metrics, seen from outside: a collector of our own gets the spans, and the HTTP ports are asked.
use std::{collections::BTreeMap, time::Duration};

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
    time::timeout,
};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, transport::Server};

use crate::support::{PATIENCE, cluster_with_env, inference, plus_one, row};

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

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A caller's trace goes on through the coordinator and the worker, and both say what they did.
#[tokio::test(flavor = "multi_thread")]
async fn a_callers_trace_runs_through_coordinator_and_worker() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (sender, mut spans) = mpsc::channel(256);
    let collector = Server::builder().add_service(TraceServiceServer::new(Collector(sender)));
    let collector = tokio::spawn(collector.serve_with_incoming(TcpListenerStream::new(listener)));

    let repository = plus_one();
    let env =
        vec![("OTEL_EXPORTER_OTLP_ENDPOINT".to_owned(), endpoint), ("OTEL_BSP_SCHEDULE_DELAY".to_owned(), "100".to_owned())];
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

async fn get(address: &str, path: &str) -> String {
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
    assert!(worker.contains("cresset_worker_requests_total{model=\"plus_one\",version=\"1\"} 3"), "{worker}");
    assert!(get(cluster.http("c1").unwrap(), "/metrics").await.contains("cresset_leading 1"));
}
