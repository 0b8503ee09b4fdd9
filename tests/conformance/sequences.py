"""Sequences: the unmodified voice model keeps its state inside the module, and speakers must not hear each other."""

import asyncio
import queue
import wave

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from checks import check, equal, output, refused, request

_CHUNK = 512
_CHUNKS = 24
TIMEOUT_S = 30


def _speakers(settings):
    """Four pieces of the recording, in chunks: speech, its end and a pause, a pause and its end, speech again."""
    with wave.open(settings.speech) as file:
        equal((file.getframerate(), file.getnchannels(), file.getsampwidth()), (16000, 1, 2))
        sound = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    pieces = [sound[int(start * 16000) :][: _CHUNKS * _CHUNK] for start in [1, 11.6, 19.6, 33.5]]
    return [piece.reshape(_CHUNKS, 1, _CHUNK) for piece in pieces]


def _step(chunk, sequence, number, last, *, id=""):
    parameters = {"sequence_id": sequence, "sequence_start": number == 0, "sequence_end": number == last}
    return request("silero_vad", [("x", "FP32", list(chunk.shape), chunk.tobytes())], parameters=parameters, id=id)


def _alone(endpoint, chunks, sequence):
    """What the model says when it hears only this."""
    last = len(chunks) - 1
    return [output(endpoint.infer(_step(chunk, sequence, number, last)))[0, 0] for number, chunk in enumerate(chunks)]


def _tensor(chunk):
    tensor = triton.InferInput("x", chunk.shape, "FP32")
    tensor.set_data_from_numpy(np.ascontiguousarray(chunk))
    return [tensor]


@check
def speakers_that_take_turns_are_heard_as_if_alone(place):
    endpoint = place.of("silero_vad")
    speakers = _speakers(place.settings)
    alone = [_alone(endpoint, chunks, 100 + index) for index, chunks in enumerate(speakers)]
    # The recording has speech and pauses, and the model tells them apart; else the test would compare nothing.
    assert max(map(max, alone)) > 0.9, alone
    assert min(map(min, alone)) < 0.1, alone
    together = [[] for _ in speakers]
    for number in range(_CHUNKS):
        for index, chunks in enumerate(speakers):
            step = _step(chunks[number], 200 + index, number, _CHUNKS - 1)
            together[index].append(output(endpoint.infer(step))[0, 0])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@check
def speakers_on_one_stream_are_heard_as_if_alone(place):
    endpoint = place.of("silero_vad")
    speakers = _speakers(place.settings)
    alone = [_alone(endpoint, chunks, 300 + index) for index, chunks in enumerate(speakers)]
    client = triton.InferenceServerClient(endpoint.address)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(_CHUNKS):
        for index, chunks in enumerate(speakers):
            client.async_stream_infer(
                "silero_vad",
                _tensor(chunks[number]),
                request_id=f"{index}-{number}",
                sequence_id=400 + index,
                sequence_start=number == 0,
                sequence_end=number == _CHUNKS - 1,
            )
    together = [[] for _ in speakers]
    for number in range(_CHUNKS):
        for index in range(len(speakers)):
            result, error = answers.get(timeout=TIMEOUT_S)
            assert error is None, error
            response = result.get_response()
            equal(response.id, f"{index}-{number}", "answers keep the order of the requests")
            assert response.parameters["triton_final_response"].bool_param
            together[index].append(result.as_numpy("output")[0, 0])
    client.stop_stream()
    assert answers.empty(), answers.queue
    np.testing.assert_allclose(together, alone, atol=1e-5)


@check
def many_asynchronous_streams_at_once_are_heard_as_if_alone(place):
    endpoint = place.of("silero_vad")
    speakers = _speakers(place.settings)
    alone = [_alone(endpoint, chunks, 500 + index) for index, chunks in enumerate(speakers)]

    async def requests(chunks, sequence):
        for number, chunk in enumerate(chunks):
            yield {
                "model_name": "silero_vad",
                "inputs": _tensor(chunk),
                "sequence_id": sequence,
                "sequence_start": number == 0,
                "sequence_end": number == len(chunks) - 1,
            }

    async def one(client, chunks, sequence):
        heard = []
        async for result, error in client.stream_infer(requests(chunks, sequence)):
            assert error is None, error
            heard.append(result.as_numpy("output")[0, 0])
        return heard

    async def all_of_them():
        async with aio.InferenceServerClient(endpoint.address) as client:
            # Names instead of numbers, three streams for each piece.
            streams = [one(client, chunks, f"speaker {index}-{copy}") for index, chunks in enumerate(speakers) for copy in range(3)]
            return await asyncio.gather(*streams)

    for index, heard in enumerate(asyncio.run(all_of_them())):
        np.testing.assert_allclose(heard, alone[index // 3], atol=1e-5)


def _sum(endpoint, sequence, value, *, start=False, end=False, **more):
    parameters = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end, **more}
    data = np.array([value], np.float32).tobytes()
    return output(endpoint.infer(request("running_sum", [("x", "FP32", [1], data)], parameters=parameters)))[0]


@check
def ids_are_numbers_or_texts_of_either_sign_and_up_to_128_bytes(place):
    endpoint = place.of("running_sum")
    ids = [7, -7, 2**63 - 1, -(2**63), "7", "ü" * 64, "x" * 128]
    for index, sequence in enumerate(ids):
        equal(_sum(endpoint, sequence, index, start=True), index)
    for index, sequence in enumerate(ids):
        equal(_sum(endpoint, sequence, 100, end=True), 100 + index, repr(sequence))


@check
def a_second_start_begins_anew(place):
    endpoint = place.of("running_sum")
    equal(_sum(endpoint, 11, 1, start=True), 1)
    equal(_sum(endpoint, 11, 2), 3)
    equal(_sum(endpoint, 11, 5, start=True), 5)
    equal(_sum(endpoint, 11, 1, end=True), 6)


@check
def one_request_may_be_a_whole_sequence(place):
    endpoint = place.of("running_sum")
    for value in [1, 2, 3]:
        equal(_sum(endpoint, 12, value, start=True, end=True), value)


@check
def a_wrong_request_leaves_the_sequence_as_it_was(place):
    endpoint = place.of("running_sum")
    equal(_sum(endpoint, 13, 1, start=True), 1)
    wrong = request("running_sum", [("x", "FP32", [2], bytes(8))], parameters={"sequence_id": 13})
    refused(grpc.StatusCode.INVALID_ARGUMENT, ["unexpected shape"], lambda: endpoint.infer(wrong))
    equal(_sum(endpoint, 13, 1, end=True), 2)


@check
def a_sequence_needs_an_id_a_start_and_no_more_after_its_end(place):
    endpoint = place.of("running_sum")
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    no_id = "must specify a non-zero or non-empty correlation ID"
    not_started = "must specify the START flag on the first request"
    for sequence in [0, ""]:
        refused(invalid, [no_id], lambda: _sum(endpoint, sequence, 1, start=True))
    bare = request("running_sum", [("x", "FP32", [1], bytes(4))])
    refused(invalid, [no_id], lambda: endpoint.infer(bare))
    for sequence in [4711, "nobody"]:
        refused(invalid, [not_started], lambda: _sum(endpoint, sequence, 1))
        refused(invalid, [not_started], lambda: _sum(endpoint, sequence, 1, end=True))
    _sum(endpoint, 14, 1, start=True, end=True)
    refused(invalid, [not_started], lambda: _sum(endpoint, 14, 1))


@check
def a_sequence_takes_one_row_at_a_time(place):
    endpoint = place.of("batched_sum")

    def step(rows, **flags):
        inputs = [("x", "FP32", [rows, 1], np.ones(rows, np.float32).tobytes())]
        return endpoint.infer(request("batched_sum", inputs, parameters={"sequence_id": 1, **flags}))

    equal(output(step(1, sequence_start=True)).tolist(), [[1]])
    refused(grpc.StatusCode.INVALID_ARGUMENT, ["batch-size 1"], lambda: step(2))
    equal(output(step(1, sequence_end=True)).tolist(), [[2]])


@check
def an_id_that_is_too_long_is_unimplemented(place):
    endpoint = place.of("running_sum")
    refused(grpc.StatusCode.UNIMPLEMENTED, ["128"], lambda: _sum(endpoint, "x" * 129, 1, start=True))


@check
def a_model_that_raises_ends_its_sequence_and_no_other(place):
    endpoint = place.of("brittle_sum")

    def step(sequence, value, **flags):
        parameters = {"sequence_id": sequence, **flags}
        data = np.array([value], np.float32).tobytes()
        return output(endpoint.infer(request("brittle_sum", [("x", "FP32", [1], data)], parameters=parameters)))[0]

    equal(step(1, 1, sequence_start=True), 1)
    equal(step(2, 10, sequence_start=True), 10)
    refused(grpc.StatusCode.INTERNAL, ["not below zero"], lambda: step(1, -1))
    equal(step(2, 10, sequence_end=True), 20)
    if place.kind == "worker":
        # Nobody knows what became of its state.
        refused(grpc.StatusCode.INVALID_ARGUMENT, ["must specify the START flag"], lambda: step(1, 3))
    else:
        # The router still has the state before.
        equal(step(1, 3), 4)
    equal(step(1, 5, sequence_start=True, sequence_end=True), 5)
