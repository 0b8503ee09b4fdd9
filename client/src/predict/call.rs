//! What comes with a call beside the request: deadline, trace context, and how errors should look.
use cresset_proto::{
    metadata::{RICH_STATUS, retry_pushback},
    reason::Reason,
};
use tokio::time::Instant;
use tonic::{
    Code, Request, Status,
    metadata::{MetadataMap, MetadataValue},
};

use crate::{coordinators::describe, retry::Failure, routes::Replica};

/// Metadata of a caller that goes on to the worker: the trace context of W3C.
const FORWARDED: [&str; 3] = ["traceparent", "tracestate", "baggage"];
/// Triton's key: the first error of a stream ends it with its real status.
pub(super) const STREAM_ERRORS: &str = "triton_grpc_error";

/// What a caller says of a call beside the request itself.
#[derive(Debug, Clone, Default)]
pub struct CallOptions {
    /// When the caller stops waiting. For a stream: all of it. Without one, each request has
    /// [`RouterSettings::request_timeout`](crate::RouterSettings::request_timeout).
    pub deadline: Option<Instant>,
    /// Goes on to the worker as it is; the place for trace context.
    pub metadata: MetadataMap,
    /// Codes that say more than Triton's do: RESOURCE_EXHAUSTED for want of room, DEADLINE_EXCEEDED for a queue's timeout.
    /// On streams, errors also carry `cresset_status_code` and `cresset_reason` parameters.
    pub rich_status: bool,
    /// The first error of a stream ends the stream with its status, instead of standing in its place on it.
    pub stream_errors: bool,
}

impl CallOptions {
    /// Reads the metadata of an incoming gRPC call that arrived at `now`.
    pub fn from_metadata(metadata: &MetadataMap, now: Instant) -> Self {
        let mut forwarded = MetadataMap::new();
        for key in FORWARDED {
            if let Some(value) = metadata.get(key) {
                forwarded.insert(key, value.clone());
            }
        }
        let flag = |key: &str| metadata.get(key).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
        let timeout = cresset_proto::metadata::timeout(metadata);
        Self {
            deadline: timeout.and_then(|timeout| now.checked_add(timeout)),
            metadata: forwarded,
            rich_status: flag(RICH_STATUS),
            stream_errors: flag(STREAM_ERRORS),
        }
    }

    /// A request to a worker with everything that goes along.
    pub(super) fn wrap<T>(&self, message: T, replica: &Replica, deadline: Option<Instant>) -> Request<T> {
        let mut request = Request::new(message);
        *request.metadata_mut() = self.metadata.clone();
        request.metadata_mut().insert(cresset_proto::metadata::INCARNATION, MetadataValue::from(replica.incarnation));
        if let Some(deadline) = deadline {
            request.set_timeout(deadline.saturating_duration_since(Instant::now()));
        }
        request
    }
}

/// The error that a caller sees when a request ended with `failure` for good: nothing of what is between router and worker.
pub(super) fn outcome(status: Status, model: &str) -> Status {
    let nobody = |because: &str| Reason::NoReplica.status(format!("no replica of model '{model}' could answer: {because}"));
    match Failure::of(&status) {
        Failure::Unreachable | Failure::Broken => nobody(&describe(&status)),
        Failure::Refused(Reason::Fenced | Reason::NotHere | Reason::NoReplica | Reason::UnknownModel | Reason::Draining) => {
            nobody(status.message())
        }
        Failure::Refused(reason) => match retry_pushback(status.metadata()) {
            Some(pushback) => reason.status_with_pushback(status.message(), pushback),
            None => reason.status(status.message()),
        },
        Failure::Coded(Code::Unavailable | Code::FailedPrecondition | Code::Aborted | Code::NotFound) => nobody(status.message()),
        Failure::Coded(Code::Unknown | Code::Cancelled) => nobody(status.message()),
        Failure::Coded(code) => Status::new(code, status.message()),
    }
}

/// Nobody could take the request.
pub(super) fn no_replica(model: &str, version: u64, last: Option<&Status>) -> Status {
    let because = last.map(|status| format!(": {}", describe(status))).unwrap_or_default();
    Reason::NoReplica.status(format!("Request for unknown model: '{model}' version {version} is not at ready state{because}"))
}

/// The caller's time is over.
pub(super) fn deadline_exceeded(model: &str) -> Status {
    Reason::DeadlineExceeded.status(format!("the deadline of the request to model '{model}' passed before it was answered"))
}

/// The codes of Triton by default; richer ones for those who asked.
pub(super) fn dress(status: Status, rich: bool) -> Status {
    let code = match Reason::of(&status) {
        Some(Reason::QueueFull | Reason::SequencesFull | Reason::OutOfMemory) if rich => Code::ResourceExhausted,
        Some(Reason::QueueTimeout) if rich => Code::DeadlineExceeded,
        _ => return status,
    };
    Status::with_metadata(code, status.message(), status.metadata().clone())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn options_come_from_metadata_and_only_trace_context_goes_on() {
        let mut metadata = MetadataMap::new();
        metadata.insert("traceparent", MetadataValue::from_static("00-1-2-01"));
        metadata.insert("authorization", MetadataValue::from_static("secret"));
        metadata.insert("cresset-rich-status", MetadataValue::from_static("true"));
        metadata.insert("grpc-timeout", MetadataValue::from_static("2S"));
        let now = Instant::now();
        let options = CallOptions::from_metadata(&metadata, now);
        assert_eq!(options.deadline, Some(now + Duration::from_secs(2)));
        assert!(options.rich_status && !options.stream_errors);
        assert_eq!(options.metadata.len(), 1);
        let request = options.wrap((), &Replica::new("w1", 7, "x:1"), None);
        assert_eq!(request.metadata().get("cresset-incarnation").unwrap(), "7");
        assert!(request.metadata().contains_key("traceparent"));
    }

    #[test]
    fn callers_see_tritons_codes_unless_they_ask_for_more() {
        let full = || Reason::QueueFull.status("Exceeds maximum queue size");
        assert_eq!(dress(full(), false).code(), Code::Unavailable);
        let rich = dress(full(), true);
        assert_eq!((rich.code(), Reason::of(&rich)), (Code::ResourceExhausted, Some(Reason::QueueFull)));
        let fenced = outcome(Reason::Fenced.status("another life"), "m");
        assert_eq!(fenced.code(), Code::Unavailable, "a fence is between router and worker");
    }
}
