"""The models of the comparison for Triton's Python backend; their twins in TorchScript are in `tests/tests/oracle.rs`.

Each model's folder gets a copy of this file, and the model's name says which function is its `forward`.
"""

import json
import time

import numpy as np
import triton_python_backend_utils as backend

_BUSY_S = 0.5


def _raises(x):
    if x.size and float(x.min()) < 0:
        raise ValueError("a negative element")
    return (x,)


def _busy(x):
    time.sleep(_BUSY_S)
    return (x,)


def _echo(*inputs):
    return inputs


_FORWARD = {
    "simple": lambda a, b: (a + b, a - b),
    "raises": _raises,
    "full": _busy,
    "late": _busy,
    # An input that wasn't sent counts as zeros.
    "optional": lambda x, y=None: (x if y is None else x + y,),
}


class TritonPythonModel:
    def initialize(self, arguments):
        self.name = arguments["model_name"]
        self.config = json.loads(arguments["model_config"])
        self.sums = {}

    def execute(self, requests):
        if self.name == "repeat":
            return self._repeat(requests)
        return [self._answer(request) for request in requests]

    def _inputs(self, request):
        tensors = (backend.get_input_tensor_by_name(request, entry["name"]) for entry in self.config["input"])
        return [tensor.as_numpy() for tensor in tensors if tensor is not None]

    def _answer(self, request):
        try:
            if "sequence_batching" in self.config:
                outputs = self._sum(request)
            else:
                outputs = _FORWARD.get(self.name, _echo)(*self._inputs(request))
        except ValueError as error:
            return backend.InferenceResponse(error=backend.TritonError(str(error)))
        return backend.InferenceResponse([
            backend.Tensor(entry["name"], np.ascontiguousarray(output))
            for entry, output in zip(self.config["output"], outputs)
        ])

    def _sum(self, request):
        """The sum of what this sequence was given."""
        (x,) = self._inputs(request)
        start = backend.get_input_tensor_by_name(request, "START").as_numpy().any()
        # Triton 2.51 refuses its own CORRID tensor of texts after the first ("unexpected number of string elements").
        told = backend.get_input_tensor_by_name(request, "CORRID")
        sequence = told.as_numpy().flatten()[0] if told is not None else request.correlation_id()
        self.sums[sequence] = x + (0 if start else self.sums.get(sequence, 0))
        return (self.sums[sequence],)

    def _repeat(self, requests):
        """Each element of the input in a response of its own."""
        for request in requests:
            sender = request.get_response_sender()
            for value in self._inputs(request)[0].flatten():
                sender.send(backend.InferenceResponse([backend.Tensor("OUT", np.array([value], np.int32))]))
            sender.send(flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        return None
