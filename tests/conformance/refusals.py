"""The table of wrong requests: the codes of a real Triton, and its words where clients test on them."""

import grpc
import numpy as np
from checks import DEADLINE_S, check, contains, equal, parameter, refused, request, simple
from tritonclient.grpc import service_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
DATA = np.arange(16, dtype=np.int32).tobytes()


def _ints(name, shape=(1, 16), data=DATA, datatype="INT32"):
    return (name, datatype, list(shape), data)


def _simple(*inputs, **options):
    return request("simple", inputs, **options)


def _both(**change):
    """A request whose first input is changed."""
    return _simple(_ints("INPUT0", **change), _ints("INPUT1"))


def _mixed():
    message = simple()
    message.inputs[0].contents.int_contents.extend(range(16))
    return message


def _fewer():
    message = simple()
    del message.raw_input_contents[1:]
    return message


def _none():
    message = simple()
    del message.raw_input_contents[:]
    return message


def _with(**parameters):
    return simple(parameters=parameters)


def _echo(shape, data=b""):
    return request("echo_fp32", [("x", "FP32", shape, data)])


def table():
    """Name, request, code, and what the message contains. The comparison with a real Triton asks them too."""
    huge = 2**32
    nine = [_ints("INPUT0", (9, 16), DATA * 9), _ints("INPUT1", (9, 16), DATA * 9)]
    uneven = [_ints("INPUT0", (2, 16), DATA * 2), _ints("INPUT1")]
    triple = [_ints("INPUT0"), _ints("INPUT1"), _ints("INPUT2")]
    unknown_model = simple()
    unknown_model.model_name = "nope"
    return [
        ("unknown model", unknown_model, NOT_FOUND, ["Request for unknown model: 'nope' is not found"]),
        ("unknown version", simple(version="9"), NOT_FOUND, ["'simple' version 9 is not found"]),
        ("version in words", simple(version="latest"), INVALID, ["failed to get model version from specified version string 'latest'"]),
        ("negative version", simple(version="-1"), INVALID, ["invalid model version specified '-1'"]),
        ("empty model name", pb.ModelInferRequest(), NOT_FOUND, ["unknown model"]),
        ("wrong dtype", _both(datatype="FP32"), INVALID, ["'INPUT0' data-type is 'FP32'", "'simple' expects 'INT32'"]),
        ("no such dtype", _both(datatype="FP99"), INVALID, ["FP99"]),
        ("wrong shape", _both(shape=(1, 8), data=DATA[:32]), INVALID, ["unexpected shape", "Expected [-1,16], got [1,8]"]),
        ("wrong rank", _both(shape=(16,)), INVALID, ["unexpected shape", "Expected [-1,16], got [16]"]),
        ("no shape", _both(shape=(), data=DATA[:4]), INVALID, ["unexpected shape"]),
        ("wrong byte count", _both(data=DATA[:60]), INVALID, ["input byte size mismatch", "Expected 64, got 60"]),
        ("too many bytes", _both(data=DATA + b"x"), INVALID, ["input byte size mismatch", "Expected 64, got 65"]),
        ("missing input", _simple(_ints("INPUT0")), INVALID, ["expected 2 inputs but got 1 inputs", "INPUT1"]),
        ("no inputs", _simple(), INVALID, ["expected 2 inputs but got 0 inputs"]),
        ("extra input", _simple(*triple), INVALID, ["expected 2 inputs but got 3 inputs"]),
        ("unknown input", _simple(_ints("INPUT0"), _ints("NOPE")), INVALID, ["unexpected inference input 'NOPE' for model 'simple'"]),
        ("duplicate input", _simple(_ints("INPUT0"), _ints("INPUT0")), INVALID, ["input 'INPUT0' already exists in request"]),
        ("unknown output", simple(outputs=["NOPE"]), INVALID, ["unexpected inference output 'NOPE' for model 'simple'"]),
        # A test of NVIDIA's compares this word for word.
        (
            "raw and typed",
            _mixed(),
            INVALID,
            ["contents field must not be specified when using raw_input_contents for 'INPUT0' for model 'simple'"],
        ),
        ("fewer raw contents", _fewer(), INVALID, ["unable to find data for input tensor 'INPUT1'"]),
        ("no contents", _none(), INVALID, ["unable to find data for input tensor 'INPUT0'"]),
        ("elements overflow", _echo([huge, huge]), INVALID, ["x"]),
        ("elements overflow to few", _echo([huge, huge, 4], bytes(16)), INVALID, ["x"]),
        ("bytes overflow", _echo([2**62]), INVALID, ["x"]),
        ("huge dimension", _echo([2**63 - 1]), INVALID, ["x"]),
        ("negative dimension", _echo([-1], bytes(4)), INVALID, ["x"]),
        ("two negative dimensions", _echo([-2, -2], bytes(16)), INVALID, ["x"]),
        ("hundred dimensions", _echo([1] * 100, bytes(4)), INVALID, ["x"]),
        ("batch too large", _simple(*nine), INVALID, ["batch-size must be <= 8"]),
        ("batches differ", _simple(*uneven), INVALID, ["batch size does not match other inputs"]),
        ("reserved parameter", _with(triton_x=1), INVALID, ["triton_x"]),
        ("priority of a wrong kind", _with(priority="high"), INVALID, ["priority"]),
        ("negative priority", _with(priority=-1), INVALID, ["priority"]),
        ("timeout of a wrong kind", _with(timeout=1.5), INVALID, ["timeout"]),
        ("start of a wrong kind", _with(sequence_start=1), INVALID, ["sequence_start"]),
        ("end of a wrong kind", _with(sequence_end="true"), INVALID, ["sequence_end"]),
        ("sequence id of a wrong kind", _with(sequence_id=("uint64_param", 7)), INVALID, ["sequence_id"]),
        ("sequence id that is a bool", _with(sequence_id=True), INVALID, ["sequence_id"]),
    ]


def _endpoint(place, message):
    return place.of("echo_fp32" if message.model_name == "echo_fp32" else "simple")


@check
def wrong_requests_get_tritons_code_and_words(place):
    wrong = []
    for name, message, code, parts in table():
        try:
            refused(code, parts, lambda: _endpoint(place, message).infer(message))
        except AssertionError as error:
            wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@check
def wrong_requests_on_a_stream_get_the_same_words_in_their_place(place):
    """All of them on one stream, each between two good ones: the stream survives every kind."""
    wrong = []
    for model in ["simple", "echo_fp32"]:
        good = simple() if model == "simple" else _echo([1], bytes(4))
        rows = [row for row in table() if (row[1].model_name == "echo_fp32") == (model == "echo_fp32")]
        requests = []
        for name, message, _, _ in rows:
            message.id = name
            requests += [message, good]
        responses = place.of(model).stream(requests)
        equal(len(responses), len(requests))
        for (name, _, _, parts), refusal, answer in zip(rows, responses[::2], responses[1::2]):
            try:
                contains(refusal.error_message, *parts)
                equal(refusal.infer_response.id, name)
                equal((answer.error_message, len(answer.infer_response.outputs)), ("", 2 if model == "simple" else 1))
            except AssertionError as error:
                wrong.append(f"{name}: {error}")
    assert not wrong, "\n".join(wrong)


@check
def other_calls_refuse_unknown_models_and_versions_alike(place):
    stub = place.of("simple").stub
    for call, kind in [(stub.ModelMetadata, pb.ModelMetadataRequest), (stub.ModelConfig, pb.ModelConfigRequest)]:
        for name, version, code, part in [
            ("nope", "", NOT_FOUND, "Request for unknown model: 'nope' is not found"),
            ("simple", "9", NOT_FOUND, "'simple' version 9 is not found"),
            ("simple", "latest", INVALID, "failed to get model version from specified version string 'latest'"),
            ("simple", "-1", INVALID, "invalid model version specified '-1'"),
        ]:
            refused(code, [part], lambda: call(kind(name=name, version=version), timeout=DEADLINE_S))
    for version in ["latest", "-1"]:
        message = pb.ModelReadyRequest(name="simple", version=version)
        refused(INVALID, [f"'{version}'"], lambda: stub.ModelReady(message, timeout=DEADLINE_S))


@check
def a_model_that_raises_is_an_internal_error_in_its_own_words(place):
    def raises(*rows):
        data = np.array(rows, np.float32)
        return request("raises", [("x", "FP32", list(data.shape), data.tobytes())])

    endpoint = place.of("raises")
    refused(grpc.StatusCode.INTERNAL, ["a negative element"], lambda: endpoint.infer(raises([-1, 0])))
    equal(len(endpoint.infer(raises([1, 0], [2, 0])).outputs), 1)


@check
def one_that_makes_the_model_raise_does_not_spoil_its_neighbours(place):
    """All at once, so that they share batches."""
    endpoint = place.of("raises")

    def ask(value):
        data = np.array([[value, 0]], np.float32).tobytes()
        return endpoint.stub.ModelInfer.future(request("raises", [("x", "FP32", [1, 2], data)]), timeout=DEADLINE_S)

    values = [-1 if number % 3 == 0 else number for number in range(60)]
    for value, call in [(value, ask(value)) for value in values]:
        if value < 0:
            refused(grpc.StatusCode.INTERNAL, ["a negative element"], call.result)
        else:
            np.testing.assert_array_equal(np.frombuffer(call.result().raw_output_contents[0], np.float32), [value, 0])


@check
def bytes_that_are_no_request_are_refused(place):
    call = place.any().channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda data: data,
        response_deserializer=lambda data: data,
    )
    try:
        call(b"\xff\xff\xff\xff", timeout=DEADLINE_S)
        raise AssertionError("garbage was answered")
    except grpc.RpcError as error:
        assert error.code() in (grpc.StatusCode.INTERNAL, INVALID), error
    assert place.any().client.is_server_live()


@check
def every_kind_of_free_parameter_is_accepted(place):
    message = simple()
    for key, value in {"a": True, "b": -1, "c": "x", "d": 0.5, "e": ("uint64_param", 2**64 - 1)}.items():
        message.parameters[key].CopyFrom(parameter(value))
    message.parameters["f"].CopyFrom(pb.InferParameter())
    equal(len(place.of("simple").infer(message).outputs), 2)
