"""KServe's own InferenceGRPCClient against one address, in a process of its own: its protocol has the same names as NVIDIA's,
and Python's protobuf holds each name once. `kserve.py` runs it, and reads one line of JSON.

    kserve_client.py descriptor          its descriptor, base64
    kserve_client.py ADDRESS             what its calls say
"""

import asyncio
import base64
import importlib.util
import json
import sys
import types


def _import_kserve():
    """The package without its `__init__`, which imports KServe's servers and half a gigabyte with them."""
    spec = importlib.util.find_spec("kserve")
    package = types.ModuleType("kserve")
    package.__path__, package.__spec__ = list(spec.submodule_search_locations), spec
    sys.modules["kserve"] = package


_import_kserve()

import grpc  # noqa: E402
import numpy as np  # noqa: E402
from kserve.inference_client import InferenceGRPCClient  # noqa: E402
from kserve.protocol.grpc import grpc_predict_v2_pb2  # noqa: E402
from kserve.protocol.infer_type import InferInput, InferRequest, RequestedOutput  # noqa: E402

TIMEOUT_S = 30


def _inputs(rows, raw):
    data = np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)
    inputs = [InferInput(name, list(data.shape), "INT32") for name in ["INPUT0", "INPUT1"]]
    for tensor in inputs:
        tensor.set_data_from_numpy(data, binary_data=raw)
    return inputs


async def _predicted(client, request):
    answer = await client.infer(request, timeout=TIMEOUT_S)
    outputs = {output.name: output.as_numpy().tolist() for output in answer.outputs}
    return {"model": answer.model_name, "version": answer.model_version, "id": answer.id, "outputs": outputs}


async def _refused(call):
    try:
        await call
    except grpc.RpcError as error:
        return {"code": error.code().name, "message": error.details()}
    return None


async def _ask(address):
    async with InferenceGRPCClient(address, timeout=TIMEOUT_S) as client:
        texts = InferInput("x", [3], "BYTES")
        texts.set_data_from_numpy(np.array([b"a", b"", b"\xc3\xbc"], dtype=np.object_), binary_data=True)
        one = InferRequest("simple", _inputs(1, True), request_id="one", request_outputs=[RequestedOutput("OUTPUT1")])
        wrong = InferRequest("nope", _inputs(1, True))
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model": await client.is_model_ready("simple"),
            "raw": await _predicted(client, InferRequest("simple", _inputs(2, True), request_id="raw")),
            "typed": await _predicted(client, InferRequest("simple", _inputs(2, False), request_id="typed")),
            "version": await _predicted(client, InferRequest("simple", _inputs(1, True), model_version="1")),
            "one output": await _predicted(client, one),
            "texts": await _predicted(client, InferRequest("echo_bytes", [texts])),
            "unknown": await _refused(client.infer(wrong, timeout=TIMEOUT_S)),
            "many": [answer["id"] for answer in await asyncio.gather(*(
                _predicted(client, InferRequest("simple", _inputs(1 + number % 8, True), request_id=str(number)))
                for number in range(20)
            ))],
        }


def _plain(value):
    return value.decode() if isinstance(value, bytes) else str(value)


if __name__ == "__main__":
    if sys.argv[1] == "descriptor":
        print(json.dumps(base64.b64encode(grpc_predict_v2_pb2.DESCRIPTOR.serialized_pb).decode()))
    else:
        print(json.dumps(asyncio.run(_ask(sys.argv[1])), default=_plain))
