//! Requests as bytes and answers as little of them as is needed: the generator's own cost is to stay out of the figures.

use bytes::Bytes;
use cresset_proto::{
    inference::{InferParameter, ModelInferRequest, infer_parameter::ParameterChoice},
    parameters::{bool_parameter, int64_parameter, keys},
};
use prost::Message;
use tonic::{Code, Status};

use super::tally::Failure;

/// A request: what differs from one to the next, and what doesn't. Protobuf takes two halves of a message, one after the
/// other, for the whole.
#[derive(Debug, Clone)]
pub struct Payload {
    /// Empty where nothing differs.
    pub head: Vec<u8>,
    /// Encoded once.
    pub body: Bytes,
}

/// What differs between requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Head {
    /// The id that the answer brings back; 0 for none.
    pub id: u64,
    /// `sequence_id`, and whether it is the first and the last request of it.
    pub sequence: Option<(i64, bool, bool)>,
    /// Asks for the empty response that ends a decoupled model's responses.
    pub wants_final: bool,
}

impl Head {
    /// As the beginning of a request.
    pub fn encode(self) -> Vec<u8> {
        let mut request = ModelInferRequest::default();
        if self.id > 0 {
            request.id = self.id.to_string();
        }
        if let Some((id, is_first, is_last)) = self.sequence {
            request.parameters.insert(keys::SEQUENCE_ID.to_owned(), int64_parameter(id));
            request.parameters.insert(keys::SEQUENCE_START.to_owned(), bool_parameter(is_first));
            request.parameters.insert(keys::SEQUENCE_END.to_owned(), bool_parameter(is_last));
        }
        if self.wants_final {
            request.parameters.insert(keys::EMPTY_FINAL.to_owned(), bool_parameter(true));
        }
        request.encode_to_vec()
    }
}

/// The parts of `ModelInferResponse` that are looked at; the rest is skipped.
#[derive(Clone, PartialEq, Message)]
pub struct Response {
    #[prost(string, tag = "3")]
    id: String,
    #[prost(message, repeated, tag = "4")]
    parameters: Vec<Parameter>,
    /// The outputs' names, types and shapes, undecoded.
    #[prost(bytes = "bytes", repeated, tag = "5")]
    outputs: Vec<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "6")]
    raw_output_contents: Vec<Bytes>,
}

/// An entry of a map.
#[derive(Clone, PartialEq, Message)]
struct Parameter {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(message, optional, tag = "2")]
    value: Option<InferParameter>,
}

/// The parts of `ModelStreamInferResponse`.
#[derive(Clone, PartialEq, Message)]
pub struct StreamResponse {
    #[prost(string, tag = "1")]
    error_message: String,
    #[prost(message, optional, tag = "2")]
    infer_response: Option<Response>,
}

impl Response {
    /// Decodes an answer.
    ///
    /// # Errors
    /// A failure of code INTERNAL where the bytes aren't one.
    pub fn read(bytes: Bytes) -> Result<Self, Failure> {
        Self::decode(bytes).map_err(|error| malformed(&error))
    }

    /// The outputs, to be compared with others.
    pub fn into_outputs(self) -> Vec<Bytes> {
        let mut all = self.outputs;
        all.extend(self.raw_output_contents);
        all
    }

    fn final_flag(&self) -> Option<bool> {
        let flag = self.parameters.iter().find(|parameter| parameter.key == keys::FINAL)?;
        match flag.value.as_ref()?.parameter_choice {
            Some(ParameterChoice::BoolParam(flag)) => Some(flag),
            _ => None,
        }
    }
}

/// One response of a stream, read.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamAnswer {
    /// Whose it is; `None` if it doesn't say.
    pub id: Option<u64>,
    /// Whether the request is done with.
    pub is_last: bool,
    /// The outputs; `None` for the empty response that only says that it is the last.
    pub outputs: Result<Option<Response>, Failure>,
}

impl StreamAnswer {
    /// Decodes a response of a stream.
    ///
    /// # Errors
    /// A failure of code INTERNAL where the bytes aren't one.
    pub fn read(bytes: Bytes) -> Result<Self, Failure> {
        let StreamResponse { error_message, infer_response } =
            StreamResponse::decode(bytes).map_err(|error| malformed(&error))?;
        let response = infer_response.unwrap_or_default();
        let id = response.id.parse().ok();
        let is_last = response.final_flag().unwrap_or(true);
        if !error_message.is_empty() {
            let failure = Failure { code: "STREAM_ERROR", message: error_message };
            return Ok(Self { id, is_last: true, outputs: Err(failure) });
        }
        let is_only_a_flag = is_last && response.outputs.is_empty() && response.final_flag().is_some();
        Ok(Self { id, is_last, outputs: Ok((!is_only_a_flag).then_some(response)) })
    }
}

fn malformed(error: &prost::DecodeError) -> Failure {
    Failure { code: "INTERNAL", message: format!("the answer is not a message of the protocol: {error}") }
}

/// A status as a failure.
pub fn failure(status: &Status) -> Failure {
    let code = match status.code() {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    };
    Failure { code, message: crate::output::one_line(status.message()) }
}

#[cfg(test)]
mod tests {
    use cresset_proto::{
        inference::{ModelInferResponse, ModelStreamInferResponse},
        parameters::Parameters,
        tensor::{self, Datatype, Tensor},
    };

    use super::*;

    fn tensor(name: &str, data: &'static [u8]) -> Tensor {
        Tensor { name: name.into(), datatype: Datatype::Uint8, shape: vec![1, data.len() as i64], data: data.into() }
    }

    fn response(id: &str, data: &'static [u8], is_final: Option<bool>) -> ModelInferResponse {
        let mut response = ModelInferResponse { id: id.into(), model_name: "m".into(), ..Default::default() };
        tensor::push_output(&mut response, tensor("y", data));
        if let Some(flag) = is_final {
            response.parameters.insert(keys::FINAL.to_owned(), bool_parameter(flag));
        }
        response
    }

    fn streamed(infer_response: Option<ModelInferResponse>, error_message: &str) -> StreamAnswer {
        let message = ModelStreamInferResponse { error_message: error_message.into(), infer_response };
        StreamAnswer::read(message.encode_to_vec().into()).unwrap()
    }

    #[test]
    fn a_head_and_a_body_are_one_request() {
        let mut body = ModelInferRequest { model_name: "m".into(), ..Default::default() };
        tensor::push_input(&mut body, tensor("x", b"abc"));
        let head = Head { id: 17, sequence: Some((-5, true, false)), wants_final: true };
        let mut bytes = head.encode();
        bytes.extend(body.encode_to_vec());
        let whole = ModelInferRequest::decode(&bytes[..]).unwrap();
        assert_eq!((whole.id.as_str(), &whole.inputs, &whole.raw_input_contents), ("17", &body.inputs, &body.raw_input_contents));
        let read = Parameters::read(&whole.parameters).unwrap();
        assert_eq!((read.sequence_start, read.sequence_end, read.empty_final_response), (true, false, true));
        assert_eq!(read.sequence_id, Some(cresset_proto::ids::SequenceId::Number(-5)));
        assert!(Head::default().encode().is_empty());
    }

    #[test]
    fn outputs_are_compared_and_the_id_is_not() {
        let outputs = |message: ModelInferResponse| Response::read(message.encode_to_vec().into()).unwrap().into_outputs();
        assert_eq!(outputs(response("1", b"ab", None)), outputs(response("2", b"ab", Some(true))));
        assert_ne!(outputs(response("1", b"ab", None)), outputs(response("1", b"ac", None)));
        assert!(Response::read(Bytes::from_static(b"\xff\xff")).is_err());
    }

    #[test]
    fn a_stream_says_whose_answer_is_the_last() {
        let plain = streamed(Some(response("4", b"a", None)), "");
        assert_eq!((plain.id, plain.is_last), (Some(4), true), "one answer, unless it says otherwise");
        let more = streamed(Some(response("4", b"a", Some(false))), "");
        assert!(!more.is_last && more.outputs.unwrap().is_some());
        let flag = ModelInferResponse { outputs: vec![], raw_output_contents: vec![], ..response("4", b"", Some(true)) };
        let end = streamed(Some(flag), "");
        assert!(end.is_last && end.outputs.unwrap().is_none(), "nothing but the flag");
    }

    #[test]
    fn an_error_inside_a_stream_is_a_failure() {
        let error = streamed(Some(ModelInferResponse { id: "9".into(), ..Default::default() }), "no such model");
        assert_eq!((error.id, error.is_last), (Some(9), true));
        assert_eq!(error.outputs.unwrap_err(), Failure { code: "STREAM_ERROR", message: "no such model".into() });
        assert_eq!(streamed(None, "lost").id, None);
    }
}
