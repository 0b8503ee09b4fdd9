"""A tiny runner for checks against a running cluster, and what all checks share.

A check is a function with `@check`. It runs once through a coordinator and once straight at a worker, and fails by raising.
Coordinators take turns, so that followers are asked as often as the leader.
"""

import argparse
import json
import sys
import time
import traceback

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

# Well above what a check takes, so that a hang fails by name.
DEADLINE_S = 30

_CHECKS = []


def check(function=None, *, at=("coordinator", "worker")):
    """Registers a check; `at` says where it runs."""

    def register(function):
        _CHECKS.append((function, (at,) if isinstance(at, str) else at))
        return function

    return register(function) if function else register


class Endpoint:
    """One address, with NVIDIA's client and with the bare stub."""

    def __init__(self, address):
        self.address = address
        unlimited = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self.channel = grpc.insecure_channel(address, options=unlimited)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)
        self.client = triton.InferenceServerClient(address)

    def infer(self, request, timeout=DEADLINE_S):
        return self.stub.ModelInfer(request, timeout=timeout)

    def stream(self, requests, timeout=DEADLINE_S, metadata=None):
        """All responses to all requests, one after the other on one stream."""
        return list(self.stub.ModelStreamInfer(iter(requests), timeout=timeout, metadata=metadata))


class Place:
    """Where a check runs: a coordinator, or whichever worker holds the model that is asked for."""

    def __init__(self, kind, cluster, turn):
        self.kind = kind
        self._cluster = cluster
        self._turn = turn

    @property
    def settings(self):
        return self._cluster.settings

    def any(self):
        """An endpoint, for calls that name no model."""
        some = self._cluster.coordinators if self.kind == "coordinator" else self._cluster.workers
        return some[self._turn % len(some)]

    def workers(self):
        """All workers, wherever the check runs."""
        return self._cluster.workers

    def of(self, model):
        """An endpoint that answers for the model."""
        return self.any() if self.kind == "coordinator" else self._cluster.worker_of(model)


class Cluster:
    def __init__(self, settings):
        self.settings = settings
        self.coordinators = [Endpoint(address) for address in settings.coordinators.split(",")]
        self.workers = [Endpoint(address) for address in settings.workers.split(",")]
        self._holders = {}

    def worker_of(self, model):
        if model not in self._holders:
            for worker in self.workers:
                index = worker.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), timeout=DEADLINE_S)
                if any(entry.name == model for entry in index.models):
                    self._holders[model] = worker
                    break
            else:
                raise AssertionError(f"no worker says that it holds {model}")
        return self._holders[model]


def arguments():
    parser = argparse.ArgumentParser(description="Checks a running Cresset cluster with NVIDIA's own gRPC client.")
    parser.add_argument("--coordinators", required=True, help="host:port,…")
    parser.add_argument("--workers", required=True, help="host:port,…")
    parser.add_argument("--speech", required=True, help="a WAV file: 16 kHz, mono, 16 bit")
    parser.add_argument("--reference", required=True, help="minilm's reference.json")
    parser.add_argument("--only", default="", help="runs the checks whose names contain this")
    return parser.parse_args()


def run(settings):
    """Runs every check, prints a line for each, and returns the exit code."""
    cluster = Cluster(settings)
    failures = []
    ran = 0
    for turn, (function, kinds) in enumerate(_CHECKS):
        for kind in kinds:
            name = f"{kind}: {function.__module__}.{function.__name__}"
            if settings.only not in name:
                continue
            ran += 1
            begun = time.monotonic()
            try:
                function(Place(kind, cluster, turn))
                verdict = "ok  "
            except Exception:  # every failure is listed, none ends the run
                failures.append((name, traceback.format_exc()))
                verdict = "FAIL"
            print(f"{verdict} {name} ({(time.monotonic() - begun) * 1000:.0f} ms)", flush=True)
    for name, text in failures:
        print(f"\n--- {name}\n{text}")
    print(f"\n{ran} checks, {len(failures)} failed: {', '.join(name for name, _ in failures) or 'none'}")
    sys.stdout.flush()
    return 1 if failures or not ran else 0


# --- what checks say


def equal(got, wanted, what=""):
    assert got == wanted, f"{what}: got {got!r}, wanted {wanted!r}"


def contains(text, *parts):
    for part in parts:
        assert part in text, f"{part!r} is not in {text!r}"


def refused(code, parts, call):
    """The call has to fail with this code, and its message to contain each of these parts."""
    try:
        answer = call()
    except grpc.RpcError as error:
        equal(error.code(), code, error.details())
        contains(error.details(), *parts)
        return error
    except triton.InferenceServerException as error:
        equal(error.status(), str(code), error.message())
        contains(error.message(), *parts)
        return error
    raise AssertionError(f"answered {str(answer)[:200]!r}, wanted {code} {parts}")


# --- requests


def parameter(value):
    """A parameter of the kind that fits the Python value; a pair (kind, value) forces one."""
    if isinstance(value, tuple):
        return pb.InferParameter(**{value[0]: value[1]})
    if isinstance(value, bool):
        return pb.InferParameter(bool_param=value)
    if isinstance(value, int):
        return pb.InferParameter(int64_param=value)
    if isinstance(value, float):
        return pb.InferParameter(double_param=value)
    return pb.InferParameter(string_param=value)


def request(model, inputs, *, version="", id="", outputs=(), parameters=None):
    """A raw request. `inputs` are (name, datatype, shape, bytes)."""
    message = pb.ModelInferRequest(model_name=model, model_version=version, id=id)
    for name, datatype, shape, data in inputs:
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        if data is not None:
            message.raw_input_contents.append(data)
    for output in outputs:
        message.outputs.add(name=output)
    for key, value in (parameters or {}).items():
        message.parameters[key].CopyFrom(parameter(value))
    return message


def simple(rows=1, **options):
    """A good request to `simple`: two INT32 tensors of 16, whose sum and difference come back."""
    data = np.arange(rows * 16, dtype=np.int32).tobytes()
    inputs = [("INPUT0", "INT32", [rows, 16], data), ("INPUT1", "INT32", [rows, 16], data)]
    return request("simple", inputs, **options)


def output(response, index=0, dtype=np.float32):
    """An output of a raw response as an array."""
    tensor = response.outputs[index]
    return np.frombuffer(response.raw_output_contents[index], dtype).reshape(list(tensor.shape))


def reference(settings):
    with open(settings.reference, encoding="utf-8") as file:
        return json.load(file)
