//! The standard request parameters, read and checked in one place for routers and workers alike.
use std::collections::HashMap;

use crate::{
    ids::SequenceId,
    inference::{InferParameter, infer_parameter::ParameterChoice},
    reason::Reason,
};

/// The longest `sequence_id` text, in bytes, as in Triton.
pub const SEQUENCE_ID_BYTES_MAX: usize = 128;

/// The longest `cresset_request_id`, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// The longest `cresset_stream_id`, in bytes.
pub const STREAM_ID_BYTES_MAX: usize = 128;

/// Keys of [`Parameters`] and of responses.
pub mod keys {
    /// Position of a request in a sequence: number or text.
    pub const SEQUENCE_ID: &str = "sequence_id";
    /// First request of a sequence.
    pub const SEQUENCE_START: &str = "sequence_start";
    /// Last request of a sequence.
    pub const SEQUENCE_END: &str = "sequence_end";
    /// 0 is the default level, 1 the highest.
    pub const PRIORITY: &str = "priority";
    /// How long the request may wait in a queue, in µs.
    pub const TIMEOUT: &str = "timeout";
    /// Asks for an empty response that carries the final flag.
    pub const EMPTY_FINAL: &str = "triton_enable_empty_final_response";
    /// On requests of a stream: the answer may overtake others. Ours, not Triton's.
    pub const UNORDERED: &str = "cresset_unordered";
    /// An id that the caller gives a request so that it can send it again. Ours, not Triton's.
    pub const REQUEST_ID: &str = "cresset_request_id";
    /// What a client calls its stream, so that it can go on with it elsewhere. Ours, not Triton's, as the next three.
    pub const STREAM_ID: &str = "cresset_stream_id";
    /// The number that a client gives a request of a sequence.
    pub const ORDINAL: &str = "cresset_ordinal";
    /// What the client has: the number of the last request of the sequence that was answered with a response; for a decoupled
    /// model, how many responses to this request.
    pub const ACK: &str = "cresset_ack";
    /// Which of the client's connections for this stream it is.
    pub const ATTEMPT: &str = "cresset_attempt";
    /// On an error of a stream, for those who asked for rich statuses: its [`Reason`](crate::reason::Reason).
    pub const REASON: &str = "cresset_reason";
    /// On stream responses: the last one of its request.
    pub const FINAL: &str = "triton_final_response";
}

/// What the standard keys of a request say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    /// `sequence_id`; `None` for 0, "" or absent.
    pub sequence_id: Option<SequenceId>,
    /// `sequence_start`.
    pub sequence_start: bool,
    /// `sequence_end`.
    pub sequence_end: bool,
    /// `priority`; 0 is the model's default.
    pub priority: u64,
    /// `timeout` in µs; 0 for none.
    pub timeout_us: u64,
    /// `triton_enable_empty_final_response`.
    pub empty_final_response: bool,
    /// `cresset_unordered`.
    pub unordered: bool,
    /// `cresset_request_id`; `None` for "" or absent.
    pub request_id: Option<String>,
    /// `cresset_stream_id`; `None` for "" or absent.
    pub stream_id: Option<String>,
    /// `cresset_ordinal`; 0 for none.
    pub ordinal: u64,
    /// `cresset_ack`; 0 for none.
    pub ack: u64,
    /// `cresset_attempt`; 0 for none.
    pub attempt: u64,
}

/// A parameter that isn't what its key demands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParameterError {
    /// The value has another kind than the key demands.
    #[error("parameter '{key}' must be {wanted}")]
    Kind {
        /// The key.
        key: String,
        /// The kinds that it takes.
        wanted: &'static str,
    },
    /// A text longer than [`SEQUENCE_ID_BYTES_MAX`].
    #[error("parameter 'sequence_id' is a string of {0} bytes, the limit is {SEQUENCE_ID_BYTES_MAX}")]
    SequenceIdTooLong(usize),
    /// A text longer than [`REQUEST_ID_BYTES_MAX`].
    #[error("parameter 'cresset_request_id' is a string of {0} bytes, the limit is {REQUEST_ID_BYTES_MAX}")]
    RequestIdTooLong(usize),
    /// A text longer than [`STREAM_ID_BYTES_MAX`].
    #[error("parameter 'cresset_stream_id' is a string of {0} bytes, the limit is {STREAM_ID_BYTES_MAX}")]
    StreamIdTooLong(usize),
    /// A `triton_*` key that means nothing.
    #[error("parameter keys starting with 'triton_' are reserved, and '{0}' is not one of them")]
    Reserved(String),
}

impl ParameterError {
    /// The reason to refuse the request with.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Kind { .. } | Self::Reserved(_) | Self::RequestIdTooLong(_) | Self::StreamIdTooLong(_) => {
                Reason::InvalidArgument
            }
            // Triton answers UNIMPLEMENTED here, and clients test for it.
            Self::SequenceIdTooLong(_) => Reason::Unsupported,
        }
    }
}

impl Parameters {
    /// Reads the standard keys; other keys are left to the model.
    ///
    /// # Errors
    /// [`ParameterError`] names the key and what it takes.
    pub fn read(map: &HashMap<String, InferParameter>) -> Result<Self, ParameterError> {
        let mut read = Self::default();
        for (key, parameter) in map {
            let value = parameter.parameter_choice.as_ref();
            match key.as_str() {
                keys::SEQUENCE_ID => read.sequence_id = sequence_id(value)?,
                keys::SEQUENCE_START => read.sequence_start = boolean(key, value)?,
                keys::SEQUENCE_END => read.sequence_end = boolean(key, value)?,
                keys::PRIORITY => read.priority = unsigned(key, value)?,
                keys::TIMEOUT => read.timeout_us = unsigned(key, value)?,
                keys::EMPTY_FINAL => read.empty_final_response = boolean(key, value)?,
                keys::REQUEST_ID => read.request_id = id(key, value, REQUEST_ID_BYTES_MAX, ParameterError::RequestIdTooLong)?,
                keys::STREAM_ID => read.stream_id = id(key, value, STREAM_ID_BYTES_MAX, ParameterError::StreamIdTooLong)?,
                keys::ORDINAL => read.ordinal = unsigned(key, value)?,
                keys::ACK => read.ack = unsigned(key, value)?,
                keys::ATTEMPT => read.attempt = unsigned(key, value)?,
                keys::UNORDERED => read.unordered = boolean(key, value)?,
                other if other.starts_with("triton_") => return Err(ParameterError::Reserved(other.chars().take(80).collect())),
                _ => {}
            }
        }
        Ok(read)
    }
}

fn sequence_id(value: Option<&ParameterChoice>) -> Result<Option<SequenceId>, ParameterError> {
    match value {
        Some(ParameterChoice::Int64Param(0)) => Ok(None),
        Some(ParameterChoice::Int64Param(number)) => Ok(Some(SequenceId::Number(*number))),
        Some(ParameterChoice::StringParam(text)) if text.is_empty() => Ok(None),
        Some(ParameterChoice::StringParam(text)) if text.len() > SEQUENCE_ID_BYTES_MAX => {
            Err(ParameterError::SequenceIdTooLong(text.len()))
        }
        Some(ParameterChoice::StringParam(text)) => Ok(Some(SequenceId::Text(text.clone()))),
        _ => Err(kind(keys::SEQUENCE_ID, "an int64 or a string")),
    }
}

fn id(
    key: &str,
    value: Option<&ParameterChoice>,
    bytes_max: usize,
    too_long: impl Fn(usize) -> ParameterError,
) -> Result<Option<String>, ParameterError> {
    match value {
        Some(ParameterChoice::StringParam(text)) if text.len() > bytes_max => Err(too_long(text.len())),
        Some(ParameterChoice::StringParam(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        _ => Err(kind(key, "a string")),
    }
}

/// A number that a request carries under `key`; 0 where it has none.
pub fn number_of(map: &HashMap<String, InferParameter>, key: &str) -> u64 {
    map.get(key).and_then(|parameter| unsigned(key, parameter.parameter_choice.as_ref()).ok()).unwrap_or(0)
}

fn boolean(key: &str, value: Option<&ParameterChoice>) -> Result<bool, ParameterError> {
    match value {
        Some(ParameterChoice::BoolParam(flag)) => Ok(*flag),
        _ => Err(kind(key, "a bool")),
    }
}

fn unsigned(key: &str, value: Option<&ParameterChoice>) -> Result<u64, ParameterError> {
    match value {
        Some(ParameterChoice::Uint64Param(number)) => Ok(*number),
        Some(ParameterChoice::Int64Param(number)) => u64::try_from(*number).map_err(|_| kind(key, "an int64 of 0 or more")),
        _ => Err(kind(key, "a uint64, or an int64 of 0 or more")),
    }
}

fn kind(key: &str, wanted: &'static str) -> ParameterError {
    ParameterError::Kind { key: key.to_owned(), wanted }
}

/// A bool as a parameter.
pub fn bool_parameter(flag: bool) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(flag)) }
}

/// An int64 as a parameter.
pub fn int64_parameter(number: i64) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(number)) }
}

/// A text as a parameter.
pub fn string_parameter(text: impl Into<String>) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::StringParam(text.into())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(key: &str, value: ParameterChoice) -> Result<Parameters, ParameterError> {
        Parameters::read(&HashMap::from([(key.to_owned(), InferParameter { parameter_choice: Some(value) })]))
    }

    #[test]
    fn sequence_ids_are_numbers_or_texts_and_zero_is_none() {
        assert_eq!(one("sequence_id", ParameterChoice::Int64Param(0)).unwrap().sequence_id, None);
        assert_eq!(one("sequence_id", ParameterChoice::Int64Param(-3)).unwrap().sequence_id, Some(SequenceId::Number(-3)));
        assert_eq!(
            one("sequence_id", ParameterChoice::StringParam("a".into())).unwrap().sequence_id,
            Some(SequenceId::Text("a".into()))
        );
        assert!(one("sequence_id", ParameterChoice::Uint64Param(7)).is_err());
        let long = one("sequence_id", ParameterChoice::StringParam("x".repeat(129))).unwrap_err();
        assert_eq!(long.reason(), Reason::Unsupported);
    }

    #[test]
    fn wrong_kinds_are_named() {
        let error = one("sequence_start", ParameterChoice::Int64Param(1)).unwrap_err();
        assert_eq!(error.to_string(), "parameter 'sequence_start' must be a bool");
        assert!(one("cresset_request_id", ParameterChoice::Int64Param(1)).is_err());
        let long = one("cresset_request_id", ParameterChoice::StringParam("x".repeat(129))).unwrap_err();
        assert_eq!(long.to_string(), "parameter 'cresset_request_id' is a string of 129 bytes, the limit is 128");
        assert!(one("cresset_ack", ParameterChoice::StringParam("1".into())).is_err());
        let long = one("cresset_stream_id", ParameterChoice::StringParam("x".repeat(129))).unwrap_err();
        assert_eq!(long.to_string(), "parameter 'cresset_stream_id' is a string of 129 bytes, the limit is 128");
        assert!(one("priority", ParameterChoice::Int64Param(-1)).is_err());
        assert!(one("timeout", ParameterChoice::StringParam("1".into())).is_err());
    }

    #[test]
    fn reserved_keys_are_refused_and_other_keys_left_alone() {
        assert!(matches!(one("triton_x", ParameterChoice::BoolParam(true)), Err(ParameterError::Reserved(_))));
        assert!(one("temperature", ParameterChoice::DoubleParam(0.5)).is_ok());
        assert!(one("triton_enable_empty_final_response", ParameterChoice::BoolParam(true)).unwrap().empty_final_response);
    }
}
