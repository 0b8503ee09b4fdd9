"""The model repository by Triton's own calls: index, load, unload, and what is wrong with some models."""

import asyncio

import grpc
import tritonclient.grpc.aio as aio
from checks import DEADLINE_S, check, contains, equal, refused, request
from tritonclient.grpc import service_pb2 as pb

INTERNAL = grpc.StatusCode.INTERNAL
LOAD_S = 60


def _states(endpoint, only_ready=False):
    index = endpoint.stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=only_ready), timeout=DEADLINE_S)
    return {model.name: model for model in index.models}


def _echo(endpoint):
    return endpoint.infer(request("spare", [("x", "FP32", [1], bytes(4))]))


@check(at="coordinator")
def the_index_lists_what_is_served_and_what_could_be(place):
    models = _states(place.any())
    equal((models["simple"].state, models["simple"].version), ("READY", "1"))
    equal((models["spare"].state, models["spare"].version), ("", ""))
    contains(models["no_config"].reason, "config.pbtxt")
    ready = _states(place.any(), only_ready=True)
    assert "simple" in ready and "spare" not in ready, sorted(ready)


@check(at="worker")
def a_worker_lists_what_it_holds_and_leaves_placing_to_the_coordinators(place):
    endpoint = place.of("simple")
    equal(_states(endpoint)["simple"].state, "READY")
    for call, message in [
        (endpoint.stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="spare")),
        (endpoint.stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="simple")),
    ]:
        refused(grpc.StatusCode.UNIMPLEMENTED, ["coordinator"], lambda: call(message, timeout=DEADLINE_S))


@check(at="coordinator")
def a_model_is_loaded_served_and_unloaded(place):
    endpoint = place.any()
    client = endpoint.client
    refused(grpc.StatusCode.NOT_FOUND, ["'spare'"], lambda: _echo(endpoint))
    client.load_model("spare", client_timeout=LOAD_S)
    # Loaded means that it answers, at once and through every coordinator that has heard of it.
    assert client.is_model_ready("spare")
    equal(len(_echo(endpoint).outputs), 1)
    equal(_states(endpoint)["spare"].state, "READY")
    # Once more is fine.
    client.load_model("spare", client_timeout=LOAD_S)
    client.unload_model("spare", unload_dependents=True)
    assert not client.is_model_ready("spare")
    refused(grpc.StatusCode.NOT_FOUND, ["'spare'"], lambda: _echo(endpoint))
    assert _states(endpoint)["spare"].state != "READY"
    client.load_model("spare", client_timeout=LOAD_S)
    equal(len(_echo(endpoint).outputs), 1)
    client.unload_model("spare")


@check(at="coordinator")
def the_asynchronous_client_loads_and_unloads(place):
    async def ask():
        async with aio.InferenceServerClient(place.any().address) as client:
            await client.load_model("spare", client_timeout=LOAD_S)
            assert await client.is_model_ready("spare")
            await client.unload_model("spare")
            assert not await client.is_model_ready("spare")

    asyncio.run(ask())


@check(at="coordinator")
def what_is_not_there_cannot_be_loaded_but_unloaded(place):
    client = place.any().client
    words = "failed to load 'nope', failed to poll from model repository"
    refused(INTERNAL, [words], lambda: client.load_model("nope", client_timeout=LOAD_S))
    client.unload_model("nope")


@check(at="coordinator")
def names_that_lead_out_of_the_repository_are_refused(place):
    for name in ["../simple", "/etc", "..", ".", "", "a/b", "a\x00b"]:
        message = pb.RepositoryModelLoadRequest(model_name=name)
        try:
            place.any().stub.RepositoryModelLoad(message, timeout=LOAD_S)
            raise AssertionError(f"{name!r} was loaded")
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.INVALID_ARGUMENT, INTERNAL), (name, error)


@check(at="coordinator")
def a_model_that_cannot_be_served_says_why_and_harms_nobody(place):
    client = place.any().client
    for name, parts in {
        "corrupt": ["load failed for model 'corrupt'"],
        "truncated": ["load failed for model 'truncated'"],
        "wrong_arguments": ["load failed for model 'wrong_arguments'"],
        "texts": ["load failed for model 'texts'", "BYTES"],
        "decoupled": ["load failed for model 'decoupled'", "decoupled"],
    }.items():
        refused(INTERNAL, parts, lambda: client.load_model(name, client_timeout=LOAD_S))
        assert not client.is_model_ready(name), name
        entry = _states(place.any())[name]
        equal(entry.state, "UNAVAILABLE", name)
        assert entry.reason, name
        client.unload_model(name)
    assert client.is_model_ready("simple")


@check(at="coordinator")
def a_configuration_that_does_not_parse_is_refused_with_its_place(place):
    client = place.any().client
    # Line and column of the mistake.
    refused(grpc.StatusCode.INVALID_ARGUMENT, ["3:", "typo"], lambda: client.load_model("typo", client_timeout=LOAD_S))


@check(at="coordinator")
def parameters_of_a_load_are_not_ignored(place):
    client = place.any().client
    wrong = grpc.StatusCode.INVALID_ARGUMENT
    refused(wrong, ["at least one input"], lambda: client.load_model("spare", config="{}", client_timeout=LOAD_S))
    refused(wrong, ["'config'"], lambda: client.load_model("spare", config="{", client_timeout=LOAD_S))
