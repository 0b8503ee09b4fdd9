"""ModelStatistics: what requests, rows, executions and failures are counted as."""

import time

import grpc
import numpy as np
from checks import DEADLINE_S, check, equal, refused, request, simple
from tritonclient.grpc import service_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
PARTS = ["queue", "compute_input", "compute_infer", "compute_output"]


def _told(endpoint, model, version=""):
    """What is told of the model by NVIDIA's own client; it has one version."""
    (told,) = endpoint.client.get_inference_statistics(model, version).model_stats
    equal((told.name, told.version), (model, "1"))
    return told


def _batches(told):
    return {batch.batch_size: batch.compute_infer.count for batch in told.batch_stats}


def _fails(values):
    data = np.array([values], np.float32)
    return request("raises", [("x", "FP32", list(data.shape), data.tobytes())])


@check
def requests_rows_and_executions_are_counted(place):
    endpoint = place.of("simple")
    before = _told(endpoint, "simple")
    begun_ms = time.time() * 1000
    for rows in [1, 1, 3]:
        endpoint.infer(simple(rows))
    after = _told(endpoint, "simple", "1")
    equal(after.inference_count - before.inference_count, 5, "rows")
    equal(after.execution_count - before.execution_count, 3, "nobody else asks, so each has a batch to itself")
    batches = _batches(before)
    equal(_batches(after), {**batches, 1: batches.get(1, 0) + 2, 3: batches.get(3, 0) + 1})
    assert begun_ms - 1000 < after.last_inference < time.time() * 1000 + 1000, after.last_inference
    for part in ["success", *PARTS]:
        grown = getattr(after.inference_stats, part).count - getattr(before.inference_stats, part).count
        equal(grown, 3, part)
    # The whole has room for its parts.
    spent = {part: getattr(after.inference_stats, part).ns - getattr(before.inference_stats, part).ns for part in ["success", *PARTS]}
    assert 0 < sum(spent[part] for part in PARTS) <= spent["success"], spent
    assert spent["compute_infer"] > 0, spent


@check
def what_is_refused_is_not_counted_and_what_fails_is(place):
    endpoint = place.of("simple")
    before = _told(endpoint, "simple")
    refused(INVALID, ["batch-size must be <= 8"], lambda: endpoint.infer(simple(9)))
    after = _told(endpoint, "simple")
    equal((after.inference_stats, after.inference_count), (before.inference_stats, before.inference_count))
    endpoint = place.of("raises")
    before = _told(endpoint, "raises")
    endpoint.infer(_fails([1, 0]))
    refused(grpc.StatusCode.INTERNAL, ["a negative element"], lambda: endpoint.infer(_fails([-1, 0])))
    after = _told(endpoint, "raises")
    equal(after.inference_stats.success.count - before.inference_stats.success.count, 1)
    equal(after.inference_stats.fail.count - before.inference_stats.fail.count, 1)
    equal(after.inference_count - before.inference_count, 1)


@check
def requests_of_sequences_are_counted(place):
    endpoint = place.of("running_sum")
    before = _told(endpoint, "running_sum")
    for step in range(3):
        flags = {"sequence_id": 4711, "sequence_start": step == 0, "sequence_end": step == 2}
        endpoint.infer(request("running_sum", [("x", "FP32", [1], np.float32(step).tobytes())], parameters=flags))
    after = _told(endpoint, "running_sum")
    equal(after.inference_stats.success.count - before.inference_stats.success.count, 3)
    equal(after.inference_count - before.inference_count, 3)


@check
def an_empty_name_means_all_models(place):
    told = place.of("simple").client.get_inference_statistics().model_stats
    names = [model.name for model in told]
    assert "simple" in names and names == sorted(names), names
    # Nothing is left out because it is zero: clients subtract.
    for model in told:
        for part in ["success", "fail", "cache_hit", "cache_miss", *PARTS]:
            assert model.inference_stats.HasField(part), (model.name, part)
        assert model.memory_usage and model.memory_usage[0].type, model.name


@check
def what_is_not_served_has_none(place):
    client = place.of("simple").client
    refused(INVALID, ["requested model 'nope' is not available"], lambda: client.get_inference_statistics("nope"))
    words = "requested model version is not available for model 'simple'"
    refused(INVALID, [words], lambda: client.get_inference_statistics("simple", "9"))
    refused(INVALID, ["'-1'"], lambda: client.get_inference_statistics("simple", "-1"))


@check(at="coordinator")
def a_coordinator_tells_the_sum_of_its_workers(place):
    for _ in range(20):
        place.any().infer(simple())
    message = pb.ModelStatisticsRequest(name="simple")
    by_worker = []
    for worker in place.workers():
        try:
            by_worker += worker.stub.ModelStatistics(message, timeout=DEADLINE_S).model_stats
        except grpc.RpcError as error:
            equal(error.code(), INVALID, error.details())
    whole = _told(place.any(), "simple")
    equal(whole.inference_count, sum(told.inference_count for told in by_worker))
    equal(whole.execution_count, sum(told.execution_count for told in by_worker))
    equal(whole.inference_stats.success.ns, sum(told.inference_stats.success.ns for told in by_worker))
    equal(whole.last_inference, max(told.last_inference for told in by_worker))
    sizes = {size for told in by_worker for size in _batches(told)}
    equal(_batches(whole), {size: sum(_batches(told).get(size, 0) for told in by_worker) for size in sizes})
