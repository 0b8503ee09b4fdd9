"""Every datatype that libtorch holds, raw and typed, there and back with every bit."""

import grpc
import ml_dtypes
import numpy as np
import tritonclient.grpc as triton
from checks import check, equal, refused, request
from tritonclient.grpc import service_pb2 as pb

# By datatype: bytes of one element, and the bytes of some telling values.
_NUMPY = {
    "BOOL": (np.bool_, [True, False, True, True]),
    "UINT8": (np.uint8, [0, 1, 127, 255]),
    "UINT16": (np.uint16, [0, 1, 2**15, 2**16 - 1]),
    "UINT32": (np.uint32, [0, 1, 2**31, 2**32 - 1]),
    # A model computes with int64, so the upper half of the range is refused.
    "UINT64": (np.uint64, [0, 1, 2**53 + 1, 2**63 - 1]),
    "INT8": (np.int8, [-128, -1, 0, 127]),
    "INT16": (np.int16, [-(2**15), -1, 0, 2**15 - 1]),
    "INT32": (np.int32, [-(2**31), -1, 0, 2**31 - 1]),
    "INT64": (np.int64, [-(2**63), -1, 2**53 + 1, 2**63 - 1]),
    "FP16": (np.float16, [-65504, 6e-8, np.inf, np.nan]),
    "FP32": (np.float32, [-3.4e38, 1e-45, -np.inf, np.nan]),
    "FP64": (np.float64, [-1.7e308, 5e-324, np.inf, np.nan]),
}

_TYPED = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


def _model(datatype):
    return f"echo_{datatype.lower()}"


@check
def raw_bytes_come_back_as_they_went(place):
    samples = {datatype: np.array(values, dtype).tobytes() for datatype, (dtype, values) in _NUMPY.items()}
    # 1.0, -2.0, infinity and a NaN with a payload.
    samples["BF16"] = bytes.fromhex("803f00c0807fc17f")
    for datatype, data in samples.items():
        response = place.of(_model(datatype)).infer(request(_model(datatype), [("x", datatype, [4], data)]))
        (tensor,) = response.outputs
        equal((tensor.name, tensor.datatype, list(tensor.shape)), ("y", datatype, [4]))
        assert not tensor.HasField("contents"), datatype
        equal(list(response.raw_output_contents), [data], datatype)


@check
def arrays_of_the_client_come_back_as_they_went(place):
    for datatype, (dtype, values) in _NUMPY.items():
        data = np.array(values, dtype)
        tensor = triton.InferInput("x", data.shape, datatype)
        tensor.set_data_from_numpy(data)
        result = place.of(_model(datatype)).client.infer(_model(datatype), [tensor])
        got = result.as_numpy("y")
        equal(got.dtype, data.dtype)
        np.testing.assert_array_equal(got, data)
    data = np.array([1.0, -2.5, 2.0**100], ml_dtypes.bfloat16)
    tensor = triton.InferInput("x", data.shape, "BF16")
    tensor.set_data_from_numpy(data)
    got = place.of("echo_bf16").client.infer("echo_bf16", [tensor]).as_numpy("y")
    np.testing.assert_array_equal(got.astype(np.float32), data.astype(np.float32))


@check
def byte_strings_come_back_as_they_went(place):
    for shape, words in {(3,): [b"he\x00llo", b"\x00\x01\x02\x03", b""], (0,): []}.items():
        data = np.array(words, np.object_)
        tensor = triton.InferInput("x", list(shape), "BYTES")
        tensor.set_data_from_numpy(data)
        result = place.of("echo_bytes").client.infer("echo_bytes", [tensor])
        equal(result.as_numpy("y").tolist(), words)


@check
def typed_contents_are_answered_raw(place):
    for datatype, field in _TYPED.items():
        dtype, values = _NUMPY[datatype]
        data = np.array(values, dtype)
        message = pb.ModelInferRequest(model_name=_model(datatype))
        tensor = message.inputs.add(name="x", datatype=datatype, shape=[4])
        getattr(tensor.contents, field).extend(data.tolist())
        response = place.of(_model(datatype)).infer(message)
        np.testing.assert_array_equal(np.frombuffer(response.raw_output_contents[0], dtype), data)
        assert not response.outputs[0].HasField("contents"), datatype


@check
def typed_contents_need_the_right_field_and_range(place):
    def typed(datatype, field, values):
        message = pb.ModelInferRequest(model_name=_model(datatype))
        tensor = message.inputs.add(name="x", datatype=datatype, shape=[len(values)])
        getattr(tensor.contents, field).extend(values)
        return lambda: place.of(_model(datatype)).infer(message)

    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(invalid, ["'x'", "fp32_contents"], typed("FP32", "fp64_contents", [1.0]))
    refused(invalid, ["'x'", "range"], typed("INT8", "int_contents", [128]))
    refused(invalid, ["'x'", "range"], typed("UINT8", "uint_contents", [256]))
    refused(invalid, ["'x'", "range"], typed("UINT16", "uint_contents", [2**16]))
    refused(invalid, ["'x'", str(2**63)], typed("UINT64", "uint64_contents", [2**63]))
    for datatype in ["FP16", "BF16"]:
        refused(invalid, ["raw_input_contents"], typed(datatype, "fp32_contents", [1.0]))


@check
def typed_counts_are_checked(place):
    message = pb.ModelInferRequest(model_name="echo_int64")
    message.inputs.add(name="x", datatype="INT64", shape=[3]).contents.int64_contents.extend([1, 2])
    refused(grpc.StatusCode.INVALID_ARGUMENT, ["Expected 24, got 16"], lambda: place.of("echo_int64").infer(message))


@check
def shapes_with_many_dimensions_and_none_are_kept(place):
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 1, 4)
    request_ = request("echo_shape", [("x", "INT16", list(data.shape), data.tobytes())])
    response = place.of("echo_shape").infer(request_)
    equal(list(response.outputs[0].shape), [2, 3, 1, 4])
    equal(response.raw_output_contents[0], data.tobytes())
    # Written column by column in memory, so the answer has to be put in order: the transpose of each matrix.
    flipped = np.frombuffer(response.raw_output_contents[1], np.int16).reshape(list(response.outputs[1].shape))
    np.testing.assert_array_equal(flipped, data.transpose(3, 2, 1, 0))
