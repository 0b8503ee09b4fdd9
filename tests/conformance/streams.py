"""Streams of independent requests: order, errors in place, final flags, strict errors."""

import asyncio
import queue

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from checks import check, contains, equal, output, refused, request, simple


@check
def an_error_stands_in_its_place_and_the_stream_lives(place):
    endpoint = place.of("simple")
    unknown = simple(id="b")
    unknown.model_name = "nope"
    first, second, third = endpoint.stream([simple(id="a"), unknown, simple(id="c")])
    equal([response.error_message for response in [first, third]], ["", ""])
    equal([response.infer_response.id for response in [first, second, third]], ["a", "b", "c"])
    contains(second.error_message, "Request for unknown model: 'nope' is not found")
    equal(len(second.infer_response.outputs), 0)
    for response in [first, second, third]:
        assert response.infer_response.parameters["triton_final_response"].bool_param


@check
def different_models_share_a_stream_in_order(place):
    if place.kind == "worker":
        # One worker may hold only some of them.
        endpoint, models = place.of("simple"), ["simple"]
    else:
        endpoint, models = place.any(), ["simple", "slow", "simple"]
    slow = request("slow", [("x", "FP32", [1, 1], np.ones((1, 1), np.float32).tobytes())])
    responses = endpoint.stream([simple() if model == "simple" else slow for model in models])
    equal([response.infer_response.model_name for response in responses], models)


@check
def half_close_means_finish_what_is_pending(place):
    requests = [simple(id=str(number)) for number in range(300)]
    responses = place.of("simple").stream(requests)
    equal([response.infer_response.id for response in responses], [str(number) for number in range(300)])
    equal({response.error_message for response in responses}, {""})


@check
def a_stream_without_requests_ends_well(place):
    equal(place.any().stream([]), [])


@check
def a_model_that_raises_says_so_in_place(place):
    def raises(value, id):
        data = np.array([[value, 0]], np.float32).tobytes()
        return request("raises", [("x", "FP32", [1, 2], data)], id=id)

    responses = place.of("raises").stream([raises(1, "a"), raises(-1, "b"), raises(2, "c")])
    equal([response.infer_response.id for response in responses], ["a", "b", "c"])
    contains(responses[1].error_message, "a negative element")
    np.testing.assert_array_equal(output(responses[2].infer_response), [[2, 0]])


@check
def strict_errors_end_the_stream_with_their_status(place):
    unknown = simple()
    unknown.model_name = "nope"
    strict = [("triton_grpc_error", "true")]
    endpoint = place.of("simple")
    refused(grpc.StatusCode.NOT_FOUND, ["'nope'"], lambda: endpoint.stream([simple(), unknown, simple()], metadata=strict))


@check
def the_streaming_client_gets_results_and_errors_by_callback(place):
    client = triton.InferenceServerClient(place.of("simple").address)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    data = np.arange(16, dtype=np.int32).reshape(1, 16)
    inputs = [triton.InferInput(name, data.shape, "INT32") for name in ["INPUT0", "INPUT1"]]
    for tensor in inputs:
        tensor.set_data_from_numpy(data)
    for model, flag in [("simple", False), ("nope", False), ("simple", True)]:
        client.async_stream_infer(model, inputs, request_id=model, enable_empty_final_response=flag)
    got = [answers.get(timeout=30) for _ in range(3)]
    client.stop_stream()
    assert answers.empty(), answers.queue
    equal([error is None for _, error in got], [True, False, True])
    contains(got[1][1].message(), "'nope' is not found")
    for result, _ in [got[0], got[2]]:
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), 2 * data)


@check
def a_cancelled_stream_harms_nobody(place):
    endpoint = place.of("slow")
    slow = request("slow", [("x", "FP32", [1, 1], np.ones((1, 1), np.float32).tobytes())])
    call = endpoint.stub.ModelStreamInfer(iter([slow, slow, slow]), timeout=30)
    call.cancel()
    refused(grpc.StatusCode.CANCELLED, [], lambda: next(call))
    client = triton.InferenceServerClient(endpoint.address)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    tensor = triton.InferInput("x", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.ones((1, 1), np.float32))
    client.async_stream_infer("slow", [tensor])
    client.stop_stream(cancel_requests=True)
    equal(len(place.of("simple").infer(simple()).outputs), 2)


@check
def a_stream_has_a_deadline_too(place):
    endpoint = place.of("slow")
    slow = request("slow", [("x", "FP32", [1, 1], np.ones((1, 1), np.float32).tobytes())])
    refused(grpc.StatusCode.DEADLINE_EXCEEDED, [], lambda: endpoint.stream([slow], timeout=0.2))


@check
def the_asynchronous_client_streams(place):
    data = np.arange(16, dtype=np.int32).reshape(1, 16)
    inputs = [triton.InferInput(name, data.shape, "INT32") for name in ["INPUT0", "INPUT1"]]
    for tensor in inputs:
        tensor.set_data_from_numpy(data)

    async def requests():
        for number, model in enumerate(["simple", "nope", "simple"]):
            yield {"model_name": model, "inputs": inputs, "request_id": str(number)}

    async def ask():
        async with aio.InferenceServerClient(place.of("simple").address) as client:
            return [answer async for answer in client.stream_infer(requests())]

    got = asyncio.run(ask())
    equal([error is None for _, error in got], [True, False, True])
    equal([result.get_response().id for result, error in got if error is None], ["0", "2"])
    contains(got[1][1].message(), "'nope' is not found")
