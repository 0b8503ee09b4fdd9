"""What a Triton and Cresset are both asked. A probe returns what was answered, as plain values that can be compared and kept.

A probe runs in order, after those before it. Where the two can't be the same by design (what a worker leaves to the
coordinators, say), the probe runs only at the place that a client of Triton's would go to.
"""

import threading

import numpy as np
import refusals
from checks import DEADLINE_S, parameter, request, simple
from oracle.answers import called, infer, message, stream, text
from tritonclient.grpc import service_pb2 as pb

PROBES = []
LOAD_S = 60


def probe(function=None, *, at=("coordinator", "worker")):
    """Registers a probe under its name."""

    def register(function):
        PROBES.append((function.__name__, function, (at,) if isinstance(at, str) else at))
        return function

    return register(function) if function else register


def floats(model, *rows, name="x", **options):
    data = np.array(rows, np.float32)
    return request(model, [(name, "FP32", list(data.shape), data.tobytes())], **options)


# --- what the server and its models say of themselves


@probe
def liveness(endpoint):
    stub = endpoint.stub
    return {
        "live": called(stub.ServerLive, pb.ServerLiveRequest()),
        "ready": called(stub.ServerReady, pb.ServerReadyRequest()),
        "model": called(stub.ModelReady, pb.ModelReadyRequest(name="simple")),
        "version": called(stub.ModelReady, pb.ModelReadyRequest(name="simple", version="1")),
        "unknown version": called(stub.ModelReady, pb.ModelReadyRequest(name="simple", version="9")),
        "unknown model": called(stub.ModelReady, pb.ModelReadyRequest(name="nope")),
        "version in words": called(stub.ModelReady, pb.ModelReadyRequest(name="simple", version="latest")),
        "negative version": called(stub.ModelReady, pb.ModelReadyRequest(name="simple", version="-1")),
    }


@probe
def server_metadata(endpoint):
    answer = called(endpoint.stub.ServerMetadata, pb.ServerMetadataRequest())
    # The version is what it is; an extension is there or not, in whatever order.
    answer["answer"]["version"] = bool(answer["answer"]["version"])
    answer["answer"]["extensions"] = {name: True for name in answer["answer"]["extensions"]}
    return answer


MODELS = [
    "classes", "datatypes", "echo_bytes", "echo_fp32", "full", "late", "named", "numbered", "optional", "prioritised",
    "raises", "repeat", "reshaped", "simple",
]


@probe
def model_metadata(endpoint):
    ask = {name: pb.ModelMetadataRequest(name=name) for name in [*MODELS, "nope"]}
    ask["version"] = pb.ModelMetadataRequest(name="simple", version="1")
    for what, version in {"unknown version": "9", "version in words": "latest", "negative version": "-1"}.items():
        ask[what] = pb.ModelMetadataRequest(name="simple", version=version)
    return {what: called(endpoint.stub.ModelMetadata, question) for what, question in ask.items()}


@probe
def model_config(endpoint):
    """The effective configuration, with every default that the server fills in."""
    ask = {name: pb.ModelConfigRequest(name=name) for name in [*MODELS, "nope"]}
    for what, version in {"unknown version": "9", "version in words": "latest", "negative version": "-1"}.items():
        ask[what] = pb.ModelConfigRequest(name="simple", version=version)
    return {what: called(endpoint.stub.ModelConfig, question) for what, question in ask.items()}


@probe
def health_and_unknown_methods(endpoint):
    def call(path):
        return endpoint.channel.unary_unary(path, request_serializer=lambda data: data, response_deserializer=lambda data: data)

    service = b"inference.GRPCInferenceService"
    return {
        "server": called(call("/grpc.health.v1.Health/Check"), b""),
        "service": called(call("/grpc.health.v1.Health/Check"), bytes([10, len(service)]) + service),
        "unknown service": called(call("/grpc.health.v1.Health/Check"), b"\x0a\x04nope"),
        "unknown method": called(call("/inference.GRPCInferenceService/Nope"), b""),
    }


# --- predictions


# 2^62 elements of four bytes are 2^64 bytes, which Triton takes for none: its backend's process dies of it.
_KILLS_TRITON = ("bytes overflow",)


def _refused():
    return [(name, question) for name, question, *_ in refusals.table() if name not in _KILLS_TRITON]


@probe
def refused_requests(endpoint):
    return {name: infer(endpoint, question) for name, question in _refused()}


@probe
def refused_requests_on_a_stream(endpoint):
    answers = {}
    for name, question in _refused():
        question.id = name
        answers[name] = stream(endpoint, [question, simple(id="after")])
    return answers


@probe
def good_requests(endpoint):
    more = simple()
    more.raw_input_contents.append(b"more")
    swapped = simple()
    swapped.inputs[0].name, swapped.inputs[1].name = "INPUT1", "INPUT0"
    twice = simple(outputs=["OUTPUT0", "OUTPUT0"])
    return {
        "plain": infer(endpoint, simple()),
        "id": infer(endpoint, simple(id="frage 7 ü")),
        "version": infer(endpoint, simple(version="1")),
        "batch": infer(endpoint, simple(8)),
        "one output": infer(endpoint, simple(outputs=["OUTPUT1"])),
        "outputs the other way round": infer(endpoint, simple(outputs=["OUTPUT1", "OUTPUT0"])),
        "the same output twice": infer(endpoint, twice),
        "inputs the other way round": infer(endpoint, swapped),
        "too many raw contents": infer(endpoint, more),
        "nothing": infer(endpoint, floats("echo_fp32")),
        "no rows": infer(endpoint, simple(0)),
        "an input left out": infer(endpoint, floats("optional", 1, 2)),
        "reshaped": infer(endpoint, floats("reshaped", [1, 2, 3, 4], [5, 6, 7, 8])),
        "the model raises": infer(endpoint, floats("raises", [-1, 0])),
        "a negative element in a batch of two": infer(endpoint, floats("raises", [1, 0], [2, -3])),
    }


@probe
def parameters(endpoint):
    kinds = {
        "free of every kind": {"a": True, "b": -1, "c": "x", "d": 0.5, "e": ("uint64_param", 2**64 - 1)},
        "priority": {"priority": 1},
        "priority uint64": {"priority": ("uint64_param", 1)},
        "priority zero": {"priority": 0},
        "priority of no level": {"priority": 77},
        "timeout": {"timeout": 60_000_000},
        "timeout zero": {"timeout": 0},
        "timeout uint64": {"timeout": ("uint64_param", 60_000_000)},
        "negative timeout": {"timeout": -1},
        "sequence on a plain model": {"sequence_id": 5, "sequence_start": True, "sequence_end": True},
        "text id on a plain model": {"sequence_id": "x"},
        "long text id": {"sequence_id": "x" * 129},
        "empty final response": {"triton_enable_empty_final_response": True},
        "empty final response of a wrong kind": {"triton_enable_empty_final_response": 1},
        "reserved": {"triton_final_response": True},
        "headers": {"headers": "x"},
        "binary data": {"binary_data_output": True},
    }
    answers = {what: infer(endpoint, simple(parameters=values)) for what, values in kinds.items()}
    empty = simple()
    empty.parameters["f"].CopyFrom(pb.InferParameter())
    answers["of no kind"] = infer(endpoint, empty)
    for level in [0, 1, 2, 3]:
        answers[f"level {level}"] = infer(endpoint, floats("prioritised", [1], parameters={"priority": level}))
    return answers


_VALUES = {
    "BOOL": (np.bool_, "bool_contents", [True, False]),
    "UINT8": (np.uint8, "uint_contents", [0, 255]),
    "UINT16": (np.uint16, "uint_contents", [0, 65535]),
    "UINT32": (np.uint32, "uint_contents", [0, 2**32 - 1]),
    "UINT64": (np.uint64, "uint64_contents", [0, 2**63 - 1]),
    "INT8": (np.int8, "int_contents", [-128, 127]),
    "INT16": (np.int16, "int_contents", [-(2**15), 2**15 - 1]),
    "INT32": (np.int32, "int_contents", [-(2**31), 2**31 - 1]),
    "INT64": (np.int64, "int64_contents", [-(2**63), 2**63 - 1]),
    "FP16": (np.float16, None, [1.5, -2]),
    "FP32": (np.float32, "fp32_contents", [1.5, -2]),
    "FP64": (np.float64, "fp64_contents", [1.5, -2]),
}


def _typed(model, name, datatype, field, values, shape=None):
    question = pb.ModelInferRequest(model_name=model)
    tensor = question.inputs.add(name=name, datatype=datatype, shape=shape or [len(values)])
    getattr(tensor.contents, field).extend(values)
    return question


@probe
def datatypes(endpoint):
    raw, typed = [], pb.ModelInferRequest(model_name="datatypes")
    for datatype, (dtype, field, values) in _VALUES.items():
        name = f"x_{datatype.lower()}"
        raw.append((name, datatype, [2], np.array(values, dtype).tobytes()))
        tensor = typed.inputs.add(name=name, datatype=datatype, shape=[2 if field else 0])
        if field:
            getattr(tensor.contents, field).extend(values)
    return {
        "raw": infer(endpoint, request("datatypes", raw)),
        "typed": infer(endpoint, typed),
        "typed float": infer(endpoint, _typed("echo_fp32", "x", "FP32", "fp32_contents", [1, 2.5])),
        "typed, too few": infer(endpoint, _typed("echo_fp32", "x", "FP32", "fp32_contents", [1], [2])),
        "typed, too many": infer(endpoint, _typed("echo_fp32", "x", "FP32", "fp32_contents", [1, 2, 3], [2])),
        "typed in a wrong field": infer(endpoint, _typed("echo_fp32", "x", "FP32", "int_contents", [1, 2])),
        "typed bytes": infer(endpoint, _typed("echo_bytes", "x", "BYTES", "bytes_contents", [b"a", b"", b"\x00\xff"])),
    }


@probe
def byte_strings(endpoint):
    whole = b"\x02\x00\x00\x00ab\x00\x00\x00\x00\x03\x00\x00\x00\x00\xff\x01"
    cases = {
        "three": ([3], whole),
        "none": ([0], b""),
        "fewer than the shape says": ([4], whole),
        "more than the shape says": ([2], whole),
        "cut in a text": ([1], b"\x09\x00\x00\x00abc"),
        "cut in a length": ([1], b"\x09\x00"),
        "a length of 4 GiB": ([1], b"\xff\xff\xff\xff"),
    }
    return {what: infer(endpoint, request("echo_bytes", [("x", "BYTES", shape, data)])) for what, (shape, data) in cases.items()}


@probe
def classification(endpoint):
    def ask(rows, **options):
        question = floats("classes", *rows)
        wanted = question.outputs.add(name="y")
        for key, value in options.items():
            wanted.parameters[key].CopyFrom(parameter(value))
        return infer(endpoint, question)

    row = [0.5, 4, -1, 2]
    on_integers = simple()
    on_integers.outputs.add(name="OUTPUT0").parameters["classification"].int64_param = 2
    return {
        "best two": ask([row], classification=2),
        "more than there are": ask([row], classification=9),
        "two rows": ask([row, row[::-1]], classification=1),
        "zero": ask([row], classification=0),
        "negative": ask([row], classification=-1),
        "of a wrong kind": ask([row], classification="2"),
        "integers": infer(endpoint, on_integers),
        "another parameter of an output": ask([row], nope=1),
    }


# --- streams, decoupled models, sequences


@probe
def streams(endpoint):
    unknown = simple(id="b")
    unknown.model_name = "nope"
    raised = floats("raises", [-1, 0], id="r")
    strict = [("triton_grpc_error", "true")]
    flagged = simple(id="f", parameters={"triton_enable_empty_final_response": True})
    return {
        "good, unknown, good": stream(endpoint, [simple(id="a"), unknown, simple(id="c")]),
        "different models": stream(endpoint, [simple(id="a"), floats("echo_fp32", 1, id="b"), simple(id="c")]),
        "the model raises": stream(endpoint, [floats("raises", [1, 0], id="a"), raised, floats("raises", [2, 0], id="c")]),
        "nothing": stream(endpoint, []),
        "an empty final response asked for": stream(endpoint, [flagged]),
        "strict, the model raises": stream(endpoint, [raised], metadata=strict),
        "strict, good": stream(endpoint, [simple(id="a")], metadata=strict),
        "not strict": stream(endpoint, [raised], metadata=[("triton_grpc_error", "false")]),
    }


def _repeat(values, flag=None, **options):
    flags = {} if flag is None else {"triton_enable_empty_final_response": flag}
    data = np.array(values, np.int32)
    return request("repeat", [("IN", "INT32", [len(values)], data.tobytes())], parameters=flags, **options)


@probe
def decoupled(endpoint):
    return {
        "by ModelInfer": infer(endpoint, _repeat([1])),
        "three": stream(endpoint, [_repeat([1, 2, 3], id="d")]),
        "three and a final one": stream(endpoint, [_repeat([1, 2, 3], True, id="d")]),
        "none": stream(endpoint, [_repeat([], id="d")]),
        "none and a final one": stream(endpoint, [_repeat([], True, id="d")]),
        "refused": stream(endpoint, [request("repeat", [("IN", "FP32", [1], bytes(4))], id="d")]),
    }


def _step(model, sequence, value, *, start=False, end=False, **options):
    flags = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    return floats(model, [value], parameters=flags, **options)


@probe
def sequences(endpoint):
    def run(model, *steps):
        return [infer(endpoint, _step(model, *step[:2], **step[2])) for step in steps]

    first, last = {"start": True}, {"end": True}
    both = {**first, **last}
    two_rows = floats("numbered", [1], [2], parameters={"sequence_id": 9, "sequence_start": True})
    return {
        "numbers": run("numbered", (7, 1, first), (8, 10, first), (7, 2, {}), (8, 20, last), (7, 3, last)),
        "texts": run("named", ("a", 1, first), ("b", 10, first), ("a", 2, last), ("b", 20, last)),
        "a negative number": run("numbered", (-7, 1, first), (-7, 2, last)),
        "one request": run("numbered", (11, 5, both), (11, 6, both)),
        "a second start": run("numbered", (12, 1, first), (12, 5, first), (12, 1, last)),
        "no id": [infer(endpoint, floats("numbered", [1]))],
        "zero": run("numbered", (0, 1, first)),
        "empty": run("named", ("", 1, first)),
        "not started": run("numbered", (13, 1, {}), (13, 1, last)),
        "after the end": run("numbered", (14, 1, both), (14, 1, {})),
        "129 characters": run("named", ("x" * 129, 1, first)),
        "128 characters": run("named", ("x" * 128, 1, both)),
        "two rows": [infer(endpoint, two_rows)],
        "on a stream": stream(endpoint, [
            _step("numbered", 15, 1, start=True, id="a"),
            _step("numbered", 16, 10, start=True, id="b"),
            _step("numbered", 15, 2, end=True, id="c"),
            _step("numbered", 17, 1, id="not started"),
            _step("numbered", 16, 20, end=True, id="d"),
        ]),
    }


# --- queues, counters, settings, the repository


def _at_once(endpoint, question, callers):
    """Every different outcome of calls that are under way together."""
    # Ample: a server may refuse at once what it expects to be late.
    calls = [endpoint.stub.ModelInfer.future(question, timeout=10 * DEADLINE_S) for _ in range(callers)]
    outcomes = set()
    for call in calls:
        error = call.exception()
        outcomes.add((error.code().name, text(error.details())) if error else ("OK", ""))
    return [{"code": code, "message": words} for code, words in sorted(outcomes)]


@probe
def queues(endpoint):
    return {
        "more than the queue holds": _at_once(endpoint, floats("full", [1]), 6),
        "longer than the request's timeout": _at_once(endpoint, floats("late", [1], parameters={"timeout": 100_000}), 4),
    }


def _counted(endpoint, model):
    (told,) = endpoint.stub.ModelStatistics(pb.ModelStatisticsRequest(name=model), timeout=DEADLINE_S).model_stats
    counts = {f"{part.name}.count": getattr(told.inference_stats, part.name).count for part in told.inference_stats.DESCRIPTOR.fields}
    counts.update({"inference_count": told.inference_count, "execution_count": told.execution_count})
    for batch in told.batch_stats:
        counts[f"batch {batch.batch_size}"] = batch.compute_infer.count
    for index, response in told.response_stats.items():
        for part in response.DESCRIPTOR.fields:
            counts[f"response {index}.{part.name}"] = getattr(response, part.name).count
    return counts


def _grown(endpoint, model, questions):
    before = _counted(endpoint, model)
    for question in questions:
        infer(endpoint, question) if model != "repeat" else stream(endpoint, [question])
    after = _counted(endpoint, model)
    return {key: count - before.get(key, 0) for key, count in after.items() if count != before.get(key, 0)}


@probe
def statistics(endpoint):
    def refused(name, version=""):
        return called(endpoint.stub.ModelStatistics, pb.ModelStatisticsRequest(name=name, version=version))

    return {
        "three batches": _grown(endpoint, "simple", [simple(1), simple(1), simple(3)]),
        "refused": _grown(endpoint, "simple", [simple(9)]),
        "failed": _grown(endpoint, "raises", [floats("raises", [1, 0]), floats("raises", [-1, 0])]),
        "of a sequence": _grown(endpoint, "numbered", [_step("numbered", 21, 1, start=True), _step("numbered", 21, 1, end=True)]),
        "unknown model": refused("nope"),
        "unknown version": refused("simple", "9"),
        "negative version": refused("simple", "-1"),
        "version in words": refused("simple", "latest"),
    }


@probe(at="worker")
def statistics_of_decoupled_responses(endpoint):
    return {
        "three responses": _grown(endpoint, "repeat", [_repeat([1, 2, 3])]),
        "no response": _grown(endpoint, "repeat", [_repeat([])]),
    }


@probe
def log_settings(endpoint):
    value = pb.LogSettingsRequest.SettingValue

    def change(**settings):
        return called(endpoint.stub.LogSettings, pb.LogSettingsRequest(settings=settings))

    return {
        "as they are": change(),
        "unknown": change(nope=value(bool_param=True)),
        "of a wrong kind": change(log_info=value(string_param="x")),
        "verbose level of a wrong kind": change(log_verbose_level=value(bool_param=True)),
        "format": change(log_format=value(string_param="x")),
        "file": change(log_file=value(string_param="/tmp/x")),
        "changed": change(log_verbose_level=value(uint32_param=1)),
        "back": change(log_verbose_level=value(uint32_param=0)),
    }


@probe
def trace_settings(endpoint):
    def change(model="", **settings):
        question = pb.TraceSettingRequest(model_name=model)
        for key, values in settings.items():
            question.settings[key].value.extend(values)
        return called(endpoint.stub.TraceSetting, question)

    return {
        "as they are": change(),
        "of a model": change("simple"),
        "of an unknown model": change("nope"),
        "unknown": change(nope=["1"]),
        "two values": change(trace_rate=["5", "6"]),
        "no number": change(trace_rate=["x"]),
        "count below -1": change(trace_count=["-2"]),
        "off and on": change(trace_level=["OFF", "TIMESTAMPS"]),
        "unknown level": change(trace_level=["NOPE"]),
        "file": change(trace_file=["/tmp/x"]),
        "rate": change(trace_rate=["100"]),
        "cleared": change(trace_rate=[]),
    }


@probe(at="worker")
def system_shared_memory(endpoint):
    stub = endpoint.stub
    missing = simple()
    missing.inputs[0].parameters["shared_memory_region"].string_param = "nope"
    missing.inputs[0].parameters["shared_memory_byte_size"].int64_param = 64
    return {
        "none": called(stub.SystemSharedMemoryStatus, pb.SystemSharedMemoryStatusRequest()),
        "unknown": called(stub.SystemSharedMemoryStatus, pb.SystemSharedMemoryStatusRequest(name="nope")),
        "no such key": called(stub.SystemSharedMemoryRegister, pb.SystemSharedMemoryRegisterRequest(name="r", key="/no-such-key", byte_size=64)),
        "unregister unknown": called(stub.SystemSharedMemoryUnregister, pb.SystemSharedMemoryUnregisterRequest(name="nope")),
        "unregister all": called(stub.SystemSharedMemoryUnregister, pb.SystemSharedMemoryUnregisterRequest()),
        "input in an unknown region": infer(endpoint, missing),
    }


@probe
def cuda_shared_memory(endpoint):
    stub = endpoint.stub
    return {
        "none": called(stub.CudaSharedMemoryStatus, pb.CudaSharedMemoryStatusRequest()),
        "unknown": called(stub.CudaSharedMemoryStatus, pb.CudaSharedMemoryStatusRequest(name="nope")),
        "register": called(stub.CudaSharedMemoryRegister, pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"x", byte_size=64)),
        "unregister all": called(stub.CudaSharedMemoryUnregister, pb.CudaSharedMemoryUnregisterRequest()),
    }


@probe(at="coordinator")
def repository(endpoint):
    stub = endpoint.stub

    def entry(name, ready=False):
        index = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready), timeout=DEADLINE_S)
        return [message(model) for model in index.models if model.name == name]

    def load(name, **parameters):
        question = pb.RepositoryModelLoadRequest(model_name=name)
        for key, value in parameters.items():
            question.parameters[key].string_param = value
        return called(stub.RepositoryModelLoad, question, LOAD_S)

    def unload(name, **parameters):
        question = pb.RepositoryModelUnloadRequest(model_name=name)
        for key, value in parameters.items():
            question.parameters[key].bool_param = value
        return called(stub.RepositoryModelUnload, question, LOAD_S)

    spare = floats("spare", 1)
    return {
        "served": entry("simple"),
        "not loaded": entry("spare"),
        "not loaded, only ready ones": entry("spare", ready=True),
        "not loaded, asked": infer(endpoint, spare),
        "load": load("spare"),
        "loaded": entry("spare"),
        "loaded, only ready ones": entry("spare", ready=True),
        "loaded, asked": infer(endpoint, spare),
        "loaded again": load("spare"),
        "unload": unload("spare", unload_dependents=True),
        "unloaded": _settled(lambda: entry("spare")),
        "unloaded, asked": infer(endpoint, spare),
        "unloaded, asked by version": infer(endpoint, floats("spare", 1, version="1")),
        "unloaded, ready": called(stub.ModelReady, pb.ModelReadyRequest(name="spare")),
        "unloaded, metadata": called(stub.ModelMetadata, pb.ModelMetadataRequest(name="spare")),
        "unload again": unload("spare"),
        "load unknown": load("nope"),
        "unload unknown": unload("nope"),
        "load misspelt": load("misspelt"),
        "misspelt": entry("misspelt"),
        "another repository": called(stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(repository_name="r", model_name="spare"), LOAD_S),
        "index of another repository": called(stub.RepositoryIndex, pb.RepositoryIndexRequest(repository_name="r")),
        "unknown parameter of a load": load("spare", nope="1"),
        "config that is no JSON": load("spare", config="{"),
    }


def _settled(look):
    """What is seen when a model that is being unloaded is gone."""
    gone = threading.Event()
    for _ in range(600):
        seen = look()
        if all(model.get("state") != "UNLOADING" for model in seen):
            return seen
        gone.wait(0.05)
    return seen

