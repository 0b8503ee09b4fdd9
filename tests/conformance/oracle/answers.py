"""Calls whose outcome, good or bad, becomes plain values: what JSON can hold, and nothing that differs from run to run."""

import re

import grpc
from checks import DEADLINE_S
from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as pb

# Triton names the request in front of some messages; the id is compared where it is answered.
_REQUEST_ID = re.compile(r"^\[request id: [^\]]*\] ")


def text(words):
    """A message without what is only decoration."""
    return _REQUEST_ID.sub("", words or "")


def message(answer):
    """A message as plain values. Raw contents are hexadecimal, numbers that a double can't hold are text."""
    if isinstance(answer, bytes):
        return answer.hex()
    if isinstance(answer, pb.ModelInferResponse):
        return _response(answer)
    return json_format.MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=False)


def _response(answer):
    plain = message_of(answer)
    plain.pop("raw_output_contents", None)
    for index, output in enumerate(plain.get("outputs", [])):
        if index < len(answer.raw_output_contents):
            output["raw"] = answer.raw_output_contents[index].hex()
    return plain


def message_of(answer):
    return json_format.MessageToDict(answer, preserving_proto_field_name=True)


def called(call, question, timeout=DEADLINE_S):
    """`code`, and the `answer` or the `message`."""
    try:
        return {"code": "OK", "answer": message(call(question, timeout=timeout))}
    except grpc.RpcError as error:
        return {"code": error.code().name, "message": text(error.details())}


def infer(endpoint, question):
    return called(endpoint.stub.ModelInfer, question)


def stream(endpoint, questions, metadata=None):
    """All responses in order, and how the stream ended."""
    responses = []
    call = endpoint.stub.ModelStreamInfer(iter(questions), timeout=DEADLINE_S, metadata=metadata)
    try:
        for response in call:
            responses.append({"error": text(response.error_message), "response": message(response.infer_response)})
    except grpc.RpcError as error:
        return {"responses": responses, "code": error.code().name, "message": text(error.details())}
    return {"responses": responses, "code": "OK"}
