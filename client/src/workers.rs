//! Connections to workers: one HTTP/2 connection for each life of a worker, shared by all requests.
//!
//! Connections are tuned to notice a dead peer soon: pings every 400 ms even when idle, and no answer for a second ends
//! them. A connection that failed is dropped at once, so the next request makes a new one instead of waiting for the old.
//!
//! Every request looks its connection up, and takes no lock for it: the table of connections is replaced as a whole when one
//! is made or dropped, which is rare.
use std::{collections::HashMap, io, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

use crate::{coalesce::Coalesced, retry::Failure, routes::Replica};

/// What may lie unread of a stream whose reader takes its time, in bytes.
const UNREAD_WINDOW_BYTES: u32 = 256 << 10;

/// How connections behave, to workers and to coordinators alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionSettings {
    /// How long a connection may take to be made.
    pub connect_timeout: Duration,
    /// Pause between pings.
    pub keepalive_interval: Duration,
    /// How long the answer to a ping may take.
    pub keepalive_timeout: Duration,
    /// The largest message either way, in bytes.
    pub message_bytes_max: usize,
    /// HTTP/2 window of one stream, in bytes.
    pub stream_window_bytes: u32,
    /// HTTP/2 window of a connection, in bytes.
    pub connection_window_bytes: u32,
}

impl Default for ConnectionSettings {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_millis(500),
            keepalive_interval: Duration::from_millis(400),
            keepalive_timeout: Duration::from_millis(600),
            message_bytes_max: i32::MAX as usize,
            stream_window_bytes: 8 << 20,
            connection_window_bytes: 64 << 20,
        }
    }
}

impl ConnectionSettings {
    /// For streams whose reader may leave them alone for long. The window is small: it is what such a stream may keep in memory,
    /// and the HTTP/2 library ends a connection on which small messages pile up, whoever else uses it.
    pub(crate) fn for_unread(self) -> Self {
        Self { stream_window_bytes: self.stream_window_bytes.min(UNREAD_WINDOW_BYTES), ..self }
    }

    /// A channel to `host:port` that connects when it is first used.
    ///
    /// # Errors
    /// tonic's, when the address isn't one.
    pub fn channel(&self, address: &str) -> Result<Channel, tonic::transport::Error> {
        let endpoint = Endpoint::from_shared(format!("http://{address}"))?
            .http2_keep_alive_interval(self.keepalive_interval)
            .keep_alive_timeout(self.keepalive_timeout)
            .keep_alive_while_idle(true)
            .initial_stream_window_size(self.stream_window_bytes)
            .initial_connection_window_size(self.connection_window_bytes);
        let timeout = self.connect_timeout;
        Ok(endpoint.connect_with_connector_lazy(tower::service_fn(move |uri| connect(uri, timeout))))
    }
}

async fn connect(uri: http::Uri, timeout: Duration) -> io::Result<TokioIo<Coalesced<TcpStream>>> {
    let address = uri.authority().map_or("", http::uri::Authority::as_str);
    let connected = tokio::time::timeout(timeout, TcpStream::connect(address)).await;
    let stream = connected.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the connection wasn't made in time"))??;
    stream.set_nodelay(true)?;
    Ok(TokioIo::new(Coalesced::new(stream)))
}

/// The pool.
#[derive(Debug)]
pub struct Workers {
    settings: ConnectionSettings,
    /// By the serial number of the replica.
    connections: ArcSwap<HashMap<u64, Connection>>,
    /// The number of the newest connection. Whoever holds it may replace the table.
    newest: Mutex<u64>,
}

/// A channel of the pool.
#[derive(Debug, Clone)]
pub struct Connection {
    /// The channel.
    pub channel: Channel,
    /// Tells this connection from its successor to the same worker.
    id: u64,
    /// How often the replica had been taken out for its silence when it was made.
    silences: u32,
    replica: Arc<Replica>,
}

impl Workers {
    /// An empty pool.
    pub fn new(settings: ConnectionSettings) -> Self {
        Self { settings, connections: ArcSwap::default(), newest: Mutex::new(0) }
    }

    /// The largest message either way, in bytes.
    pub fn message_bytes_max(&self) -> usize {
        self.settings.message_bytes_max
    }

    /// The connection to a replica. The real connecting happens with the first request.
    ///
    /// # Errors
    /// UNAVAILABLE when the replica's address isn't one.
    pub fn connection(&self, replica: &Arc<Replica>) -> Result<Connection, Status> {
        let silences = replica.silences();
        // Half a connection may be all that is wrong with a silent worker.
        let known = |connections: &HashMap<u64, Connection>| {
            connections.get(&replica.serial).filter(|connection| connection.silences == silences).cloned()
        };
        if let Some(connection) = known(&self.connections.load()) {
            return Ok(connection);
        }
        let mut newest = self.newest.lock();
        let connections = self.connections.load();
        // Somebody else may have made it meanwhile.
        if let Some(connection) = known(&connections) {
            return Ok(connection);
        }
        let channel = self.settings.channel(&replica.address).map_err(|error| {
            Status::unavailable(format!("worker {} has no usable address '{}': {error}", replica.worker_id, replica.address))
        })?;
        *newest += 1;
        let connection = Connection { channel, id: *newest, silences, replica: Arc::clone(replica) };
        let kept = connections.iter().filter(|(_, connection)| !connection.replica.is_gone());
        let mut connections: HashMap<_, _> = kept.map(|(serial, connection)| (*serial, connection.clone())).collect();
        connections.insert(replica.serial, connection.clone());
        self.connections.store(Arc::new(connections));
        Ok(connection)
    }

    /// Takes note of a call that failed: a connection that broke or couldn't be made is forgotten.
    pub fn failed(&self, connection: &Connection, status: &Status) {
        if matches!(Failure::of(status), Failure::Unreachable | Failure::Broken) {
            self.drop_connection(connection);
        }
    }

    /// Forgets a connection. Calls under way on it are not touched.
    fn drop_connection(&self, connection: &Connection) {
        let _replacing = self.newest.lock();
        let mut connections = HashMap::clone(&self.connections.load());
        // Several calls fail with one connection; only the first may drop it, or they'd drop each other's new ones.
        if connections.get(&connection.replica.serial).is_some_and(|current| current.id == connection.id) {
            connections.remove(&connection.replica.serial);
            self.connections.store(Arc::new(connections));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_failed_connection_is_dropped_once() {
        let workers = Workers::new(ConnectionSettings::default());
        let replica = Arc::new(Replica::new("w1", 1, "127.0.0.1:1"));
        let first = workers.connection(&replica).unwrap();
        assert_eq!(workers.connection(&replica).unwrap().id, first.id);
        workers.drop_connection(&first);
        let second = workers.connection(&replica).unwrap();
        assert_ne!(second.id, first.id);
        workers.drop_connection(&first);
        assert_eq!(workers.connection(&replica).unwrap().id, second.id);
    }

    #[tokio::test]
    async fn a_worker_without_an_address_is_unavailable() {
        let workers = Workers::new(ConnectionSettings::default());
        let replica = Arc::new(Replica::new("w1", 1, "not an address"));
        let status = workers.connection(&replica).unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(status.message().contains("w1"), "{status}");
    }
}
