"""Unary predictions with the demo models' real weights, by every way that a client has."""

import asyncio
import queue

import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as aio
from checks import check, equal, output, reference, request, simple

TIMEOUT_S = 30


def _sentence_inputs(case):
    ids, mask = np.array(case["input_ids"], np.int64), np.array(case["attention_mask"], np.int64)
    inputs = [triton.InferInput("input_ids", ids.shape, "INT64"), triton.InferInput("attention_mask", mask.shape, "INT64")]
    inputs[0].set_data_from_numpy(ids)
    inputs[1].set_data_from_numpy(mask)
    return inputs


def _simple_inputs(rows=1):
    data = np.arange(rows * 16, dtype=np.int32).reshape(rows, 16)
    inputs = [triton.InferInput(name, data.shape, "INT32") for name in ["INPUT0", "INPUT1"]]
    inputs[0].set_data_from_numpy(data)
    inputs[1].set_data_from_numpy(np.ones_like(data))
    return data, inputs


def _digit():
    """A one: a stroke down the middle."""
    image = np.zeros((8, 8), np.float32)
    image[:, 3:5] = 15
    return image.reshape(1, 64)


@check
def sentences_are_embedded_as_the_reference_says(place):
    reference_values = reference(place.settings)
    for case in reference_values["cases"]:
        result = place.of("minilm").client.infer("minilm", _sentence_inputs(case), client_timeout=TIMEOUT_S)
        embeddings = result.as_numpy("sentence_embedding")
        equal(embeddings.shape, (len(case["input_ids"]), 384))
        wanted = np.array(case["sentence_embedding"], np.float32)
        np.testing.assert_allclose(embeddings, wanted, atol=reference_values["tolerance"])
        np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-4)


@check
def a_digit_gets_a_score_for_each_class_and_batches_agree_with_single_images(place):
    client = place.of("digits").client
    images = np.concatenate([_digit(), _digit()[:, ::-1], np.zeros((1, 64), np.float32)])

    def scores(images):
        tensor = triton.InferInput("image", images.shape, "FP32")
        tensor.set_data_from_numpy(np.ascontiguousarray(images))
        return client.infer("digits", [tensor], client_timeout=TIMEOUT_S).as_numpy("scores")

    together = scores(images)
    equal(together.shape, (3, 10))
    equal(int(np.argmax(together[0])), 1, "a stroke down the middle")
    alone = np.concatenate([scores(image[None]) for image in images])
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


@check
def a_reply_echoes_the_id_and_names_the_version(place):
    endpoint = place.of("simple")
    for version in ["", "1"]:
        _, inputs = _simple_inputs()
        result = endpoint.client.infer("simple", inputs, model_version=version, request_id="frage 7 ü")
        response = result.get_response()
        equal((response.model_name, response.model_version, response.id), ("simple", "1", "frage 7 ü"))
    equal(endpoint.infer(simple()).id, "", "no id")


@check
def outputs_are_all_or_those_that_were_asked_for_in_that_order(place):
    endpoint = place.of("simple")
    data, inputs = _simple_inputs(2)
    result = endpoint.client.infer("simple", inputs)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), data + 1)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), data - 1)
    result = endpoint.client.infer("simple", inputs, outputs=[triton.InferRequestedOutput("OUTPUT1")])
    equal([tensor.name for tensor in result.get_response().outputs], ["OUTPUT1"])
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), data - 1)
    assert result.as_numpy("OUTPUT0") is None
    both = endpoint.infer(simple(outputs=["OUTPUT1", "OUTPUT0"]))
    equal([tensor.name for tensor in both.outputs], ["OUTPUT1", "OUTPUT0"])
    np.testing.assert_array_equal(output(both, 0, np.int32), np.zeros((1, 16), np.int32))


@check
def inputs_may_come_in_any_order(place):
    first, second = np.arange(16, dtype=np.int32), np.full(16, 3, np.int32)
    inputs = [("INPUT1", "INT32", [1, 16], second.tobytes()), ("INPUT0", "INT32", [1, 16], first.tobytes())]
    response = place.of("simple").infer(request("simple", inputs))
    np.testing.assert_array_equal(output(response, 1, np.int32)[0], first - second)


@check
def parameters_of_others_and_metadata_do_no_harm(place):
    _, inputs = _simple_inputs()
    result = place.of("simple").client.infer(
        "simple",
        inputs,
        parameters={"temperature": 0.5, "note": "x", "count": 3, "flag": True},
        headers={"authorization": "nobody", "x-request-source": "tests"},
        priority=1,
        timeout=1_000_000,
        client_timeout=TIMEOUT_S,
    )
    assert result.as_numpy("OUTPUT0") is not None
    # On a model without sequences those parameters mean nothing.
    stray = {"sequence_id": 5, "sequence_end": True, "triton_enable_empty_final_response": False}
    equal(len(place.of("simple").infer(simple(parameters=stray)).outputs), 2)


@check
def raw_contents_that_are_too_many_are_ignored(place):
    message = simple()
    message.raw_input_contents.append(b"more")
    equal(len(place.of("simple").infer(message).outputs), 2)


@check
def nothing_is_a_batch_too(place):
    response = place.of("echo_fp32").infer(request("echo_fp32", [("x", "FP32", [0], b"")]))
    equal(list(response.outputs[0].shape), [0])
    equal(list(response.raw_output_contents), [b""])


@check
def callbacks_get_what_was_asked(place):
    client = place.of("simple").client
    done = queue.Queue()
    wanted = {}
    for number in range(20):
        data, inputs = _simple_inputs(1 + number % 8)
        wanted[str(number)] = data
        client.async_infer("simple", inputs, lambda result, error: done.put((result, error)), request_id=str(number))
    for _ in range(20):
        result, error = done.get(timeout=TIMEOUT_S)
        assert error is None, error
        data = wanted.pop(result.get_response().id)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), data + 1)
    equal(wanted, {})


@check
def many_at_once_through_the_asynchronous_client(place):
    async def ask():
        async with aio.InferenceServerClient(place.of("minilm").address) as client:
            cases = reference(place.settings)["cases"][:3]

            async def one(case):
                return await client.infer("minilm", _sentence_inputs(case), request_id="a", client_timeout=TIMEOUT_S)

            # Different lengths at the same time: requests that can't share a batch.
            for case, result in zip(cases * 5, await asyncio.gather(*map(one, cases * 5))):
                wanted = np.array(case["sentence_embedding"], np.float32)
                np.testing.assert_allclose(result.as_numpy("sentence_embedding"), wanted, atol=1e-4)
                equal(result.get_response().id, "a")

    asyncio.run(ask())
