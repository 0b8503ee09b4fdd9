"""What a server says of itself: liveness, metadata, configuration, health, reflection, and what it doesn't do."""

import asyncio

import grpc
import tritonclient.grpc.aio as aio
from checks import DEADLINE_S, check, contains, equal, refused


@check
def is_live_and_ready(place):
    client = place.any().client
    assert client.is_server_live()
    assert client.is_server_ready()


@check
def metadata_names_the_server_and_its_extensions(place):
    metadata = place.any().client.get_server_metadata()
    equal(metadata.name, "cresset")
    assert metadata.version
    both = ["sequence", "sequence(string_id)", "model_configuration", "binary_tensor_data", "parameters", "statistics", "trace", "logging"]
    own = {"coordinator": ["model_repository"], "worker": ["system_shared_memory"]}
    for extension in both + own[place.kind]:
        assert extension in metadata.extensions, extension
    other = own["worker" if place.kind == "coordinator" else "coordinator"]
    assert not set(other) & set(metadata.extensions), metadata.extensions


@check
def models_are_ready_by_name_and_version(place):
    client = place.of("simple").client
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    # Measured on Triton: no error.
    assert not client.is_model_ready("simple", "9")
    assert not client.is_model_ready("nope")


@check
def model_metadata_has_the_batch_dimension(place):
    client = place.of("simple").client
    for version in ["", "1"]:
        metadata = client.get_model_metadata("simple", version)
        equal(metadata.name, "simple")
        equal(list(metadata.versions), ["1"])
        equal(metadata.platform, "pytorch_libtorch")
        inputs = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs]
        equal(inputs, [("INPUT0", "INT32", [-1, 16]), ("INPUT1", "INT32", [-1, 16])])
        outputs = [(tensor.name, tensor.datatype, list(tensor.shape)) for tensor in metadata.outputs]
        equal(outputs, [("OUTPUT0", "INT32", [-1, 16]), ("OUTPUT1", "INT32", [-1, 16])])
    # Without batching the shapes are whole.
    vad = place.of("silero_vad").client.get_model_metadata("silero_vad")
    equal([list(tensor.shape) for tensor in vad.inputs], [[1, 512]])


@check
def model_config_is_what_was_written(place):
    config = place.of("simple").client.get_model_config("simple").config
    equal((config.name, config.max_batch_size), ("simple", 8))
    equal([list(tensor.dims) for tensor in config.input], [[16], [16]])
    assert config.HasField("dynamic_batching")
    vad = place.of("silero_vad").client.get_model_config("silero_vad", "1").config
    equal(vad.sequence_batching.oldest.max_candidate_sequences, 256)
    equal(vad.parameters["cresset.scalar.sr"].string_value, "int:16000")


@check
def model_config_has_the_defaults_that_a_triton_fills_in(place):
    config = place.of("simple").client.get_model_config("simple", as_json=True)["config"]
    wanted = {
        "platform": "pytorch_libtorch",
        "backend": "pytorch",
        "default_model_filename": "model.pt",
        "version_policy": {"latest": {"num_versions": 1}},
        "instance_group": [{"name": "simple", "count": 1, "kind": "KIND_CPU"}],
        "dynamic_batching": {"preferred_batch_size": [8]},
        "optimization": {"input_pinned_memory": {"enable": True}, "output_pinned_memory": {"enable": True}},
    }
    equal({key: config.get(key) for key in wanted}, wanted)
    vad = place.of("silero_vad").client.get_model_config("silero_vad").config
    assert vad.sequence_batching.max_sequence_idle_microseconds > 0


@check
def the_asynchronous_client_sees_the_same(place):
    async def ask():
        async with aio.InferenceServerClient(place.of("simple").address) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("simple")
            equal((await client.get_server_metadata()).name, "cresset")
            equal((await client.get_model_metadata("simple")).name, "simple")
            equal((await client.get_model_config("simple", as_json=True))["config"]["name"], "simple")
            index = await client.get_model_repository_index()
            assert any(model.name == "simple" and model.state == "READY" for model in index.models)

    asyncio.run(ask())


# grpc.health.v1 and reflection, in the few bytes that are needed, since the client's package has neither.
def _text(field, text):
    return bytes([field << 3 | 2, len(text)]) + text.encode()


def _method(place, path, stream=False):
    kinds = place.any().channel
    make = kinds.stream_stream if stream else kinds.unary_unary
    return make(path, request_serializer=lambda data: data, response_deserializer=lambda data: data)


@check
def health_is_served(place):
    call = _method(place, "/grpc.health.v1.Health/Check")
    serving = b"\x08\x01"
    equal(call(b"", timeout=DEADLINE_S), serving, "the whole server")
    refused(grpc.StatusCode.NOT_FOUND, [], lambda: call(_text(1, "nope"), timeout=DEADLINE_S))
    watch = place.any().channel.unary_stream(
        "/grpc.health.v1.Health/Watch", request_serializer=lambda data: data, response_deserializer=lambda data: data
    )
    answers = watch(b"", timeout=DEADLINE_S)
    equal(next(answers), serving, "the first of the watch")
    answers.cancel()


@check
def reflection_lists_the_services_in_both_versions(place):
    for version in ["v1", "v1alpha"]:
        call = _method(place, f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo", stream=True)
        (answer,) = list(call(iter([_text(7, "*")]), timeout=DEADLINE_S))
        contains(answer, b"inference.GRPCInferenceService", b"grpc.health.v1.Health")


@check
def what_is_not_built_is_unimplemented(place):
    unknown = _method(place, "/inference.GRPCInferenceService/Nope")
    refused(grpc.StatusCode.UNIMPLEMENTED, [], lambda: unknown(b"", timeout=DEADLINE_S))
