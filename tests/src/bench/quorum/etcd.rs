//! Members of etcd, as Debian has it. A write puts a value into a key of the writer's.

use std::{
    ffi::OsString,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use bytes::Bytes;
use tonic::{Request, Response, Status, client::Grpc, codegen::http::uri::PathAndQuery, transport::Channel};
use tonic_prost::ProstCodec;

use super::{
    COMMAND_BYTES,
    group::{Client, Group, Seen, WRITE_TIMEOUT},
};
use crate::harness::{Launch, failed, launch::Place};

const PROGRAM: &str = "etcd";

/// The parts of etcd's protocol that are needed: `etcdserverpb` of its version 3.
mod proto {
    use bytes::Bytes;

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutRequest {
        #[prost(bytes = "bytes", tag = "1")]
        pub(super) key: Bytes,
        #[prost(bytes = "bytes", tag = "2")]
        pub(super) value: Bytes,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct ResponseHeader {
        #[prost(uint64, tag = "2")]
        pub(super) member_id: u64,
        #[prost(int64, tag = "3")]
        pub(super) revision: i64,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct PutResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) header: Option<ResponseHeader>,
    }

    #[derive(Clone, Copy, PartialEq, prost::Message)]
    pub(super) struct StatusRequest {}

    #[derive(Clone, PartialEq, prost::Message)]
    pub(super) struct StatusResponse {
        #[prost(message, optional, tag = "1")]
        pub(super) header: Option<ResponseHeader>,
        #[prost(uint64, tag = "4")]
        pub(super) leader: u64,
        #[prost(uint64, tag = "7")]
        pub(super) raft_applied_index: u64,
    }
}

/// What is installed, if it is.
pub(super) fn version() -> Option<String> {
    let output = Command::new(PROGRAM).arg("--version").stdin(Stdio::null()).output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.lines().next()?.trim_start_matches("etcd Version: ").to_owned())
}

#[derive(Clone)]
pub(super) struct Member(Grpc<Channel>);

/// Starts three.
pub(super) async fn start(data_dir: &Path) -> anyhow::Result<Group<Member>> {
    fs::create_dir_all(data_dir).map_err(failed(format!("can't make {}", data_dir.display())))?;
    let ids = ["c1", "c2", "c3"];
    let places = Place::free(ids.len())?;
    let peers = ids.iter().zip(&places).map(|(id, place)| format!("{id}=http://{}", place.peer));
    let peers = peers.collect::<Vec<_>>().join(",");
    let launches = ids.iter().zip(&places).map(|(id, place)| launch(id, place, &peers, data_dir)).collect();
    Group::start(data_dir, launches, None).await
}

fn launch(id: &str, place: &Place, peers: &str, data_dir: &Path) -> Launch {
    // It doesn't watch its parent by itself.
    let mut command_line: Vec<OsString> = ["setpriv", "--pdeathsig", "KILL", PROGRAM].map(OsString::from).to_vec();
    let mut flag = |name: &str, value: OsString| command_line.extend([name.into(), value]);
    flag("--name", id.into());
    flag("--data-dir", data_dir.join(id).into());
    for (name, address) in [("client", &place.grpc), ("peer", &place.peer)] {
        let url = format!("http://{address}");
        flag(&format!("--listen-{name}-urls"), url.clone().into());
        let advertise = if name == "peer" { "--initial-advertise-peer-urls" } else { "--advertise-client-urls" };
        flag(advertise, url.into());
    }
    flag("--initial-cluster", peers.into());
    flag("--logger", "zap".into());
    flag("--log-outputs", "stderr".into());
    Launch { id: id.to_owned(), is_coordinator: true, grpc: place.grpc.clone(), http: place.http.clone(), command_line }
}

impl Member {
    async fn call<Q, A>(&self, path: &'static str, request: Request<Q>) -> Result<A, Status>
    where
        Q: prost::Message + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut grpc = self.0.clone();
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let answer = grpc.unary(request, PathAndQuery::from_static(path), ProstCodec::default()).await;
        answer.map(Response::into_inner)
    }
}

impl Client for Member {
    const NAME: &'static str = "etcd";

    fn new(channel: Channel) -> Self {
        Self(Grpc::new(channel))
    }

    async fn write(&self, writer: usize, number: u64) -> Result<(), Status> {
        let key = Bytes::from(format!("writer-{writer}"));
        let mut request = Request::new(proto::PutRequest { key, value: format!("{number:0COMMAND_BYTES$}").into() });
        request.set_timeout(WRITE_TIMEOUT);
        self.call::<_, proto::PutResponse>("/etcdserverpb.KV/Put", request).await.map(drop)
    }

    async fn look(&self) -> Result<Seen, Status> {
        let request = Request::new(proto::StatusRequest {});
        let status: proto::StatusResponse = self.call("/etcdserverpb.Maintenance/Status", request).await?;
        let own = status.header.unwrap_or_default().member_id;
        Ok(Seen { leads: status.leader == own, is_led: status.leader != 0, applied: status.raft_applied_index })
    }
}
