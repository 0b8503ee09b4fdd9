"""Compression, big messages, deadlines and cancellation."""

import asyncio
import threading

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from checks import check, equal, output, refused, request, simple

# `slow` takes several times as long.
_SHORT_S = 0.2


def _slow():
    return request("slow", [("x", "FP32", [1, 1], np.ones((1, 1), np.float32).tobytes())])


@check
def compressed_requests_are_understood(place):
    data = np.arange(16, dtype=np.int32).reshape(1, 16)
    inputs = [triton.InferInput(name, data.shape, "INT32") for name in ["INPUT0", "INPUT1"]]
    for tensor in inputs:
        tensor.set_data_from_numpy(data)
    endpoint = place.of("simple")
    for algorithm in ["gzip", "deflate", None]:
        result = endpoint.client.infer("simple", inputs, compression_algorithm=algorithm)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), 2 * data)
    for compression in [grpc.Compression.Gzip, grpc.Compression.Deflate]:
        responses = endpoint.stub.ModelStreamInfer(iter([simple(), simple()]), timeout=30, compression=compression)
        equal([response.error_message for response in responses], ["", ""])


@check
def sixty_four_mebibytes_there_and_back(place):
    data = np.random.default_rng(7).standard_normal(16 << 20, np.float32)
    response = place.of("echo_fp32").infer(request("echo_fp32", [("x", "FP32", [data.size], data.tobytes())]))
    assert response.raw_output_contents[0] == data.tobytes(), "the bytes differ"


@check
def a_deadline_that_passes_is_an_error_of_its_own(place):
    endpoint = place.of("slow")
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, [], lambda: endpoint.infer(_slow(), timeout=_SHORT_S))
    tensor = triton.InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    # The client reports its own deadline in these words.
    try:
        endpoint.client.infer("slow", [tensor], client_timeout=_SHORT_S)
        raise AssertionError("answered in spite of the deadline")
    except triton.InferenceServerException as error:
        equal(error.status(), "StatusCode.DEADLINE_EXCEEDED", error.message())


@check
def the_server_itself_says_that_a_deadline_passed(place):
    """A proxy may pass on a deadline without keeping it: the server has to. The client here waits for as long as it takes."""
    endpoint = place.of("slow")
    call = endpoint.channel.unary_unary(
        "/inference.GRPCInferenceService/ModelInfer",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=lambda data: data,
    )
    # What earlier callers left in the line is gone once this is answered: behind it, the server would refuse at once.
    call(_slow())
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, [], lambda: call(_slow(), metadata=[("grpc-timeout", "200m")]))


@check
def a_cancelled_call_frees_the_caller_and_harms_nobody(place):
    endpoint = place.of("slow")
    call = endpoint.stub.ModelInfer.future(_slow(), timeout=30)
    call.cancel()
    assert call.cancelled()
    tensor = triton.InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    told, came = [], threading.Event()

    def callback(result, error):
        told.append(error)
        came.set()

    endpoint.client.async_infer("slow", [tensor], callback).cancel()
    assert came.wait(5), "no callback after a cancellation"
    equal(told[0].status(), "StatusCode.CANCELLED")
    equal(len(place.of("simple").infer(simple()).outputs), 2)


@check
def the_asynchronous_client_can_cancel(place):
    async def ask():
        async with aio.InferenceServerClient(place.of("slow").address) as client:
            tensor = triton.InferInput("x", [1, 1], "FP32")
            tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
            task = asyncio.create_task(client.infer("slow", [tensor]))
            await asyncio.sleep(0)
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            assert isinstance(outcome, asyncio.CancelledError), outcome

    asyncio.run(ask())


def _count(endpoint, timeout=30, value=0.0):
    """Calls the model that says how often it was run."""
    return endpoint.stub.ModelInfer.future(request("counting", [("x", "FP32", [1], np.float32(value).tobytes())]), timeout=timeout)


@check
def queued_work_whose_caller_left_is_not_run(place):
    """Behind devices that are busy for seconds, forty callers give up: almost none of their requests may be run after all."""
    workers = place.workers()
    before = [output(_count(worker).result())[0] for worker in workers]
    # A negative number takes long.
    busy = [_count(worker, timeout=60, value=-1.0) for worker in workers for _ in range(3)]
    calls = [_count(place.of("counting"), timeout=_SHORT_S) for _ in range(40)]
    left = [call.exception() for call in calls]
    # Whoever couldn't be answered in time hears so at once, or when the time is over.
    said = {error.code() for error in left if error}
    assert said and said <= {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}, said
    for call in busy:
        call.result()
    runs = sum(output(_count(worker).result())[0] for worker in workers) - sum(before) - len(workers) - len(busy)
    answered = left.count(None)
    # What waits at the device itself can't be taken back: one request for each.
    assert runs <= answered + len(workers), f"{runs:.0f} runs, {answered} answers"
