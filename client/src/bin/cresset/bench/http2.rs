//! gRPC calls over a connection of HTTP/2, with as little between the two as there can be.
//!
//! A general client sends a call's headers, its message and its end one by one, each with a system call here and a wake-up
//! there; measured, that was half of the generator's cost, and a part of the server's. Here a call's beginning is one write.

use std::{cell::RefCell, io, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use h2::{
    RecvStream,
    client::{ResponseFuture, SendRequest},
};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version, uri::PathAndQuery};
use tokio::{
    net::TcpStream,
    sync::{Mutex, mpsc},
    time::timeout,
};
use tonic::Status;

use super::{
    tally::Failure,
    wire::{Payload, failure},
};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// HTTP/2 windows, as large as tensors are.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 64 << 20;
/// Calls given up whose late frames are still known for what they are.
const RESET_STREAMS_MAX: usize = 1024;
/// A message's compression flag and its length stand before it.
const PREFIX_BYTES: usize = 5;
/// Bodies up to this size are copied behind their head; larger ones go as a frame of their own.
const COPIED_BYTES_MAX: usize = 64 << 10;

/// One connection, made anew when it breaks.
#[derive(Debug)]
pub struct Connection {
    address: String,
    sender: RefCell<Option<SendRequest<Bytes>>>,
    /// Held while it is made, so that not everybody makes one.
    making: Mutex<()>,
}

impl Connection {
    /// Connects to `host:port`.
    ///
    /// # Errors
    /// The system's, with what the server's end said.
    pub async fn open(address: &str) -> io::Result<Self> {
        let connection = Self { address: address.to_owned(), sender: RefCell::default(), making: Mutex::default() };
        connection.make().await?;
        Ok(connection)
    }

    async fn make(&self) -> io::Result<SendRequest<Bytes>> {
        let made = timeout(CONNECT_TIMEOUT, async {
            let tcp = TcpStream::connect(&self.address).await?;
            tcp.set_nodelay(true)?;
            let mut builder = h2::client::Builder::new();
            builder.enable_push(false).max_concurrent_reset_streams(RESET_STREAMS_MAX);
            builder.initial_window_size(STREAM_WINDOW_BYTES).initial_connection_window_size(CONNECTION_WINDOW_BYTES);
            builder.handshake::<_, Bytes>(tcp).await.map_err(io::Error::other)
        });
        let (sender, connection) = made.await.map_err(|_| io::ErrorKind::TimedOut)??;
        // It ends with the last of its senders; how it ended is told to each call on it.
        tokio::spawn(connection);
        *self.sender.borrow_mut() = Some(sender.clone());
        Ok(sender)
    }

    async fn sender(&self) -> Result<SendRequest<Bytes>, Failure> {
        let known = || self.sender.borrow().clone();
        let sender = match known() {
            Some(sender) => sender,
            None => {
                let _making = self.making.lock().await;
                match known() {
                    Some(sender) => sender,
                    None => self.make().await.map_err(|error| {
                        let words = crate::settings::plain(&error);
                        Failure { code: "UNAVAILABLE", message: format!("no connection to {}: {words}", self.address) }
                    })?,
                }
            }
        };
        match sender.ready().await {
            Ok(sender) => Ok(sender),
            Err(error) => {
                self.sender.replace(None);
                Err(broken(error))
            }
        }
    }

    /// Begins a call. Its requests go into the stream, its responses come from the other half.
    ///
    /// # Errors
    /// UNAVAILABLE without a connection.
    async fn begin(
        &self,
        path: &PathAndQuery,
        deadline: Option<Duration>,
    ) -> Result<(h2::SendStream<Bytes>, Responses), Failure> {
        let mut sender = self.sender().await?;
        let request = self.head(path, deadline).map_err(|error| Failure { code: "INTERNAL", message: error.to_string() })?;
        let (response, requests) = sender.send_request(request, false).map_err(broken)?;
        Ok((requests, Responses { state: State::Awaited(response), frames: Frames::default() }))
    }

    fn head(&self, path: &PathAndQuery, deadline: Option<Duration>) -> http::Result<Request<()>> {
        let uri = Uri::builder().scheme("http").authority(self.address.as_str()).path_and_query(path.clone()).build()?;
        let mut request = Request::builder().method(Method::POST).version(Version::HTTP_2).uri(uri).body(())?;
        let headers = request.headers_mut();
        headers.insert(http::header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
        headers.insert(http::header::TE, HeaderValue::from_static("trailers"));
        if let Some(deadline) = deadline {
            headers.insert("grpc-timeout", HeaderValue::try_from(format!("{}m", deadline.as_millis()))?);
        }
        Ok(request)
    }

    /// Calls and waits for the one response.
    ///
    /// # Errors
    /// The server's status, or what happened to the connection.
    pub async fn unary(&self, path: &PathAndQuery, deadline: Option<Duration>, payload: Payload) -> Result<Bytes, Failure> {
        let (mut requests, mut responses) = self.begin(path, deadline).await?;
        send(&mut requests, payload, true)?;
        let response = responses.next().await?;
        // The status comes last.
        match (response, responses.next().await?) {
            (Some(response), None) => Ok(response),
            (None, _) => Err(Failure { code: "INTERNAL", message: "no response, and no error".to_owned() }),
            (Some(_), Some(_)) => Err(Failure { code: "INTERNAL", message: "more than one response to a call".to_owned() }),
        }
    }

    /// Runs a stream until the server ends it: sends what comes out of `outgoing` until that is closed, and hands each
    /// response over.
    ///
    /// # Errors
    /// As [`unary`](Self::unary), or what `deliver` says.
    pub async fn stream(
        &self,
        path: &PathAndQuery,
        mut outgoing: mpsc::Receiver<Payload>,
        mut deliver: impl FnMut(Bytes) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let (mut requests, mut responses) = self.begin(path, None).await?;
        let sending = async {
            while let Some(payload) = outgoing.recv().await {
                send(&mut requests, payload, false)?;
            }
            requests.send_data(Bytes::new(), true).map_err(broken)
        };
        let receiving = async {
            while let Some(response) = responses.next().await? {
                deliver(response)?;
            }
            Ok(())
        };
        tokio::pin!(sending, receiving);
        tokio::select! {
            // A server that ends the stream says why; that the other half can't be sent any more says nothing.
            biased;
            received = &mut receiving => received,
            sent = &mut sending => match sent {
                Ok(()) => receiving.await,
                Err(failure) => receiving.await.and(Err(failure)),
            },
        }
    }
}

fn send(requests: &mut h2::SendStream<Bytes>, payload: Payload, is_last: bool) -> Result<(), Failure> {
    let Payload { head, body } = payload;
    let too_long = || Failure { code: "OUT_OF_RANGE", message: "the request is longer than a message can be".to_owned() };
    let length = u32::try_from(head.len() + body.len()).map_err(|_| too_long())?;
    let is_copied = body.len() <= COPIED_BYTES_MAX;
    let mut first = BytesMut::with_capacity(PREFIX_BYTES + head.len() + if is_copied { body.len() } else { 0 });
    first.put_u8(0);
    first.put_u32(length);
    first.put_slice(&head);
    if is_copied {
        first.put_slice(&body);
        return requests.send_data(first.freeze(), is_last).map_err(broken);
    }
    requests.send_data(first.freeze(), false).map_err(broken)?;
    requests.send_data(body, is_last).map_err(broken)
}

/// The server's half of a call.
struct Responses {
    state: State,
    frames: Frames,
}

enum State {
    Awaited(ResponseFuture),
    Open(RecvStream),
    Over,
}

impl Responses {
    /// The next response; `None` after the last, if all went well.
    ///
    /// # Errors
    /// The server's status, or what happened to the connection.
    async fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        loop {
            if let Some(message) = self.frames.next()? {
                return Ok(Some(message));
            }
            match &mut self.state {
                State::Over => return Ok(None),
                State::Awaited(response) => {
                    let (head, body) = response.await.map_err(broken)?.into_parts();
                    if head.status != StatusCode::OK {
                        let message = format!("the server answered with HTTP status {}", head.status);
                        return Err(Failure { code: "UNKNOWN", message });
                    }
                    // Without a message there is only one block of headers, and the status is in it.
                    self.state = if body.is_end_stream() { State::Over } else { State::Open(body) };
                    if matches!(self.state, State::Over) {
                        ended(Some(&head.headers))?;
                    }
                }
                State::Open(body) => match body.data().await {
                    Some(chunk) => {
                        let chunk = chunk.map_err(broken)?;
                        body.flow_control().release_capacity(chunk.len()).map_err(broken)?;
                        self.frames.push(chunk);
                    }
                    None => {
                        let trailers = body.trailers().await.map_err(broken)?;
                        self.state = State::Over;
                        ended(trailers.as_ref())?;
                    }
                },
            }
        }
    }
}

/// The status at the end of a call.
fn ended(headers: Option<&HeaderMap>) -> Result<(), Failure> {
    match headers.and_then(Status::from_header_map) {
        Some(status) if status.code() == tonic::Code::Ok => Ok(()),
        Some(status) => Err(failure(&status)),
        None => Err(Failure { code: "UNKNOWN", message: "the call ended without a status".to_owned() }),
    }
}

/// What happened to a connection or to a call on it.
fn broken(error: h2::Error) -> Failure {
    if error.is_io() || error.is_go_away() {
        return Failure { code: "UNAVAILABLE", message: format!("the connection broke: {error}") };
    }
    failure(&Status::from_error(Box::new(error)))
}

/// Messages out of the chunks in which they come.
#[derive(Debug, Default)]
struct Frames {
    /// A chunk that begins with a message: most often exactly one, which is then not copied.
    chunk: Bytes,
    /// The beginning of a message whose rest is still to come.
    partial: BytesMut,
}

impl Frames {
    fn push(&mut self, chunk: Bytes) {
        if self.partial.is_empty() && self.chunk.is_empty() {
            self.chunk = chunk;
        } else {
            self.partial.extend_from_slice(&std::mem::take(&mut self.chunk));
            self.partial.extend_from_slice(&chunk);
        }
    }

    fn next(&mut self) -> Result<Option<Bytes>, Failure> {
        if self.partial.is_empty() {
            if let Some(length) = length(&self.chunk)? {
                let mut message = self.chunk.split_to(length);
                message.advance(PREFIX_BYTES);
                return Ok(Some(message));
            }
        } else if let Some(length) = length(&self.partial)? {
            let mut message = self.partial.split_to(length).freeze();
            message.advance(PREFIX_BYTES);
            return Ok(Some(message));
        }
        Ok(None)
    }
}

/// The length of the first message with its prefix, if it is all there.
fn length(bytes: &[u8]) -> Result<Option<usize>, Failure> {
    let Some(([flag, length @ ..], _)) = bytes.split_first_chunk::<PREFIX_BYTES>() else { return Ok(None) };
    if *flag != 0 {
        return Err(Failure { code: "UNIMPLEMENTED", message: "the answer is compressed, which nobody asked for".to_owned() });
    }
    let whole = PREFIX_BYTES + u32::from_be_bytes(*length) as usize;
    Ok((bytes.len() >= whole).then_some(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(message: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0];
        bytes.extend((message.len() as u32).to_be_bytes());
        bytes.extend(message);
        bytes
    }

    #[test]
    fn messages_come_out_of_chunks_of_any_size() {
        let messages: [&[u8]; 4] = [b"one", b"", b"three and more", b"4"];
        let all: Vec<u8> = messages.iter().flat_map(|message| framed(message)).collect();
        for size in 1..=all.len() {
            let mut frames = Frames::default();
            let mut seen = Vec::new();
            for chunk in all.chunks(size) {
                frames.push(Bytes::copy_from_slice(chunk));
                while let Some(message) = frames.next().unwrap() {
                    seen.push(message);
                }
            }
            assert_eq!(seen, messages, "in chunks of {size}");
        }
    }

    #[test]
    fn a_whole_message_is_not_copied() {
        let chunk = Bytes::from(framed(b"whole"));
        let mut frames = Frames::default();
        frames.push(chunk.clone());
        let message = frames.next().unwrap().unwrap();
        assert_eq!(message.as_ptr(), chunk[PREFIX_BYTES..].as_ptr());
    }

    #[test]
    fn compressed_answers_are_refused() {
        let mut frames = Frames::default();
        frames.push(Bytes::from_static(&[1, 0, 0, 0, 0]));
        assert_eq!(frames.next().unwrap_err().code, "UNIMPLEMENTED");
    }

    #[test]
    fn the_end_of_a_call_tells_how_it_went() {
        let headers = |pairs: &[(&'static str, &'static str)]| {
            pairs.iter().map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value))).collect::<HeaderMap>()
        };
        assert_eq!(ended(Some(&headers(&[("grpc-status", "0")]))), Ok(()));
        let failed = ended(Some(&headers(&[("grpc-status", "8"), ("grpc-message", "no%20room")]))).unwrap_err();
        assert_eq!(failed, Failure { code: "RESOURCE_EXHAUSTED", message: "no room".into() });
        assert_eq!(ended(None).unwrap_err().code, "UNKNOWN");
    }

    #[tokio::test]
    async fn a_closed_port_is_told_by_its_address() {
        let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let error = Connection::open(&closed).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
