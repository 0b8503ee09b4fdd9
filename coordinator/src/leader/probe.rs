//! Does anybody live at this address?
//!
//! Asked once when a worker's stream broke. A process that was killed refuses the connection at once; a machine that is
//! gone stays silent, and the limit decides.
use std::{sync::Arc, time::Duration};

use cresset_proto::inference::{ServerLiveRequest, grpc_inference_service_client::GrpcInferenceServiceClient};
use futures::future::BoxFuture;
use tokio::time::timeout;
use tonic::{Code, transport::Endpoint};

/// Asks at an address (`host:port`). Boxed, so that tests can answer themselves.
pub type Probe = Arc<dyn Fn(String) -> BoxFuture<'static, bool> + Send + Sync>;

/// Asks over gRPC, and takes any answer of a server within `timeout_ms` for a sign of life.
pub fn over_grpc(timeout_ms: u64) -> Probe {
    let limit = Duration::from_millis(timeout_ms);
    Arc::new(move |address| Box::pin(async move { timeout(limit, answers(address)).await.unwrap_or(false) }))
}

async fn answers(address: String) -> bool {
    let Ok(endpoint) = Endpoint::from_shared(format!("http://{address}")) else { return false };
    let Ok(channel) = endpoint.connect().await else { return false };
    match GrpcInferenceServiceClient::new(channel).server_live(ServerLiveRequest {}).await {
        Ok(_) => true,
        // A server that refuses lives; these codes are what the transport makes up when there is none.
        Err(status) => !matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled | Code::Unknown),
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn nobody_lives_where_the_connection_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        drop(listener);
        assert!(!over_grpc(60_000)(address).await);
    }

    #[tokio::test]
    async fn a_connection_alone_is_no_sign_of_life() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let hang_up = async move { drop(listener.accept().await.unwrap()) };
        let (answered, ()) = tokio::join!(over_grpc(60_000)(address), hang_up);
        assert!(!answered);
    }

    #[tokio::test]
    async fn a_stopped_process_takes_connections_and_stays_silent() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        assert!(!over_grpc(100)(address).await);
    }

    #[tokio::test]
    async fn a_server_that_knows_no_such_call_lives() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = tonic::transport::Server::builder().add_routes(tonic::service::Routes::default());
        let serving = tokio::spawn(server.serve_with_incoming(incoming));
        assert!(over_grpc(60_000)(address).await);
        serving.abort();
    }

    #[tokio::test]
    async fn nonsense_is_no_address() {
        assert!(!over_grpc(60_000)("not an address".into()).await);
    }
}
