"""System shared memory on a worker's port, with NVIDIA's own helpers; what a coordinator says instead; and CUDA's."""

import contextlib
import secrets

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.utils.shared_memory as shm
from checks import DEADLINE_S, check, contains, equal, output, refused, simple
from tritonclient.grpc import service_pb2 as pb

INVALID = grpc.StatusCode.INVALID_ARGUMENT
INTERNAL = grpc.StatusCode.INTERNAL
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED

FIRST = np.arange(16, dtype=np.int32).reshape(1, 16)
SECOND = np.ones((1, 16), np.int32)
BYTES = 64


@contextlib.contextmanager
def _region(client, byte_size=512):
    """A registered region with the two inputs at its beginning: its name, its key and its handle."""
    name = f"checks-{secrets.token_hex(8)}"
    handle = shm.create_shared_memory_region(name, name, byte_size, create_only=True)
    try:
        shm.set_shared_memory_region(handle, [FIRST, SECOND])
        client.register_system_shared_memory(name, f"/{name}", byte_size)
        yield name, f"/{name}", handle
    finally:
        client.unregister_system_shared_memory(name)
        shm.destroy_shared_memory_region(handle)


def _inputs(name, offsets=(0, BYTES), byte_size=BYTES):
    inputs = [triton.InferInput("INPUT0", [1, 16], "INT32"), triton.InferInput("INPUT1", [1, 16], "INT32")]
    for tensor, offset in zip(inputs, offsets):
        tensor.set_shared_memory(name, byte_size, offset)
    return inputs


def _output(name, region, offset, byte_size=BYTES):
    wanted = triton.InferRequestedOutput(name)
    wanted.set_shared_memory(region, byte_size, offset)
    return wanted


@check(at="worker")
def inputs_come_from_a_region(place):
    client = place.of("simple").client
    with _region(client) as (name, _, _):
        result = client.infer("simple", _inputs(name))
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), FIRST + SECOND)
        # One of them in the request itself, and it alone has a raw entry.
        for shared in [0, 1]:
            inputs = _inputs(name)
            inputs[1 - shared].set_data_from_numpy([FIRST, SECOND][1 - shared])
            result = client.infer("simple", inputs)
            np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)


@check(at="worker")
def outputs_go_to_a_region_and_leave_an_empty_entry(place):
    client = place.of("simple").client
    with _region(client) as (name, _, handle):
        result = client.infer("simple", _inputs(name), outputs=[triton.InferRequestedOutput("OUTPUT1"), _output("OUTPUT0", name, 128)])
        response = result.get_response()
        equal([tensor.name for tensor in response.outputs], ["OUTPUT1", "OUTPUT0"])
        equal([len(contents) for contents in response.raw_output_contents], [BYTES, 0])
        equal((list(response.outputs[1].shape), response.outputs[1].datatype), ([1, 16], "INT32"))
        # Measured on Triton: nothing says where it went, the caller knows.
        equal(dict(response.outputs[1].parameters), {})
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), FIRST - SECOND)
        np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.int32, [1, 16], 128), FIRST + SECOND)
        # More room than is needed is fine, and what isn't needed stays as it was.
        shm.set_shared_memory_region(handle, [np.full(64, 7, np.int32)], 256)
        client.infer("simple", _inputs(name), outputs=[_output("OUTPUT0", name, 256, 128)])
        np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.int32, [16], 256), (FIRST + SECOND)[0])
        np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.int32, [48], 320), np.full(48, 7))


@check(at="worker")
def a_stream_takes_and_fills_regions_too(place):
    endpoint = place.of("simple")
    with _region(endpoint.client) as (name, _, handle):
        shared, lost = _raw(name, offset=0), _raw("nope", offset=0)
        filled = _raw(name, offset=0)
        place_of_output = filled.outputs.add(name="OUTPUT1").parameters
        place_of_output["shared_memory_region"].string_param = name
        place_of_output["shared_memory_offset"].int64_param = 128
        place_of_output["shared_memory_byte_size"].int64_param = BYTES
        answers = endpoint.stream([shared, lost, filled, simple()])
        equal([bool(answer.error_message) for answer in answers], [False, True, False, False])
        contains(answers[1].error_message, "Unable to find shared memory region: 'nope'")
        np.testing.assert_array_equal(output(answers[0].infer_response, 0, np.int32), FIRST + SECOND)
        equal(list(answers[2].infer_response.raw_output_contents), [b""])
        np.testing.assert_array_equal(shm.get_contents_as_numpy(handle, np.int32, [1, 16], 128), FIRST - SECOND)


@check(at="worker")
def a_region_lives_until_it_is_unregistered(place):
    client = place.of("simple").client
    with _region(client) as (name, key, handle):
        (status,) = client.get_system_shared_memory_status(name).regions.values()
        equal((status.name, status.key, status.offset, status.byte_size), (name, key, 0, 512))
        assert name in client.get_system_shared_memory_status().regions
        # Parts of one object under several names, wherever they begin.
        for part, offset in [("a", 64), ("b", 100)]:
            client.register_system_shared_memory(f"{name}-{part}", key, 64, offset)
        shm.set_shared_memory_region(handle, [FIRST], 100)
        result = client.infer("simple", _inputs(f"{name}-b", (0, 0)))
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), FIRST + FIRST)
        client.unregister_system_shared_memory(f"{name}-b")
        words = f"Unable to find shared memory region: '{name}-b'"
        refused(NOT_FOUND, [words], lambda: client.infer("simple", _inputs(f"{name}-b", (0, 0))))
        client.unregister_system_shared_memory()
        equal(dict(client.get_system_shared_memory_status().regions), {})


@check(at="worker")
def wrong_registrations_are_refused(place):
    client = place.of("simple").client
    with _region(client) as (name, key, _):
        register = client.register_system_shared_memory
        exists = grpc.StatusCode.ALREADY_EXISTS
        refused(exists, [f"shared memory region '{name}' already in manager"], lambda: register(name, key, 512))
        missing = "/checks-that-is-not-there"
        refused(INTERNAL, [f"Unable to open shared memory region: '{missing}'"], lambda: register("x", missing, 1))
        for byte_size, offset in [(513, 0), (1, 512), (0, 0), (16, 2**64 - 8)]:
            refused(INVALID, [key], lambda: register("x", key, byte_size, offset))
        for bad in ["/../etc/passwd", "/a/b", "", "/", "..", "/a\x00b"]:
            refused(INVALID, ["key"], lambda: register("x", bad, 1))
        refused(INVALID, ["name"], lambda: register("", key, 1))
    missing = "Unable to find system shared memory region: 'nope'"
    refused(NOT_FOUND, [missing], lambda: client.get_system_shared_memory_status("nope"))
    client.unregister_system_shared_memory("nope")


def _raw(region, *, offset, byte_size=BYTES, **others):
    """A request whose first input is in a region."""
    message = simple()
    del message.raw_input_contents[0]
    message.raw_input_contents[0] = SECOND.tobytes()
    parameters = message.inputs[0].parameters
    parameters["shared_memory_region"].string_param = region
    if byte_size is not None:
        parameters["shared_memory_byte_size"].int64_param = byte_size
    parameters["shared_memory_offset"].int64_param = offset
    for key, (kind, value) in others.items():
        parameters[key].Clear()
        setattr(parameters[key], kind, value)
    return message


@check(at="worker")
def wrong_places_are_refused_in_tritons_words(place):
    endpoint = place.of("simple")
    client = endpoint.client
    with _region(client) as (name, _, _):
        mixed = _raw(name, offset=0)
        mixed.inputs[0].contents.int_contents.extend(range(16))
        nowhere = _raw(name, offset=0)
        del nowhere.inputs[0].parameters["shared_memory_region"]
        for message, code, part in [
            (_raw("zz", offset=0), NOT_FOUND, "Unable to find shared memory region: 'zz'"),
            (_raw(name, offset=500), INVALID, f"Invalid offset + byte size for shared memory region: '{name}'"),
            (_raw(name, offset=2**62), INVALID, f"Invalid offset + byte size for shared memory region: '{name}'"),
            (_raw(name, offset=-8), INVALID, f"Invalid offset for shared memory region: '{name}'"),
            (_raw(name, offset=0, byte_size=60), INVALID, "Expected 64, got 60"),
            (_raw(name, offset=0, byte_size=-1), INVALID, f"Invalid offset + byte size for shared memory region: '{name}'"),
            (_raw(name, offset=0, byte_size=None), INVALID, "'shared_memory_byte_size' must be specified along with"),
            (_raw(name, offset=0, shared_memory_region=("int64_param", 3)), INVALID, "expected string_param."),
            (_raw(name, offset=0, shared_memory_byte_size=("string_param", "64")), INVALID, "expected int64_param."),
            (nowhere, INVALID, "can not be specified without 'shared_memory_region'"),
            (mixed, INVALID, "unexpected 'content' provided when using shared memory for input tensor 'INPUT0'"),
        ]:
            refused(code, [part], lambda: endpoint.infer(message))
        for wanted, code, part in [
            (_output("OUTPUT0", "zz", 0), NOT_FOUND, "Unable to find shared memory region: 'zz'"),
            (_output("OUTPUT0", name, 500), INVALID, f"Invalid offset + byte size for shared memory region: '{name}'"),
            (_output("OUTPUT0", name, 128, 63), INVALID, "for output 'OUTPUT0' (63 bytes) should be at least 64 bytes"),
        ]:
            refused(code, [part], lambda: client.infer("simple", _inputs(name), outputs=[wanted]))
        np.testing.assert_array_equal(client.infer("simple", _inputs(name)).as_numpy("OUTPUT0"), FIRST + SECOND)


@check(at="coordinator")
def a_coordinator_says_where_to_go_instead(place):
    endpoint = place.any()
    client = endpoint.client
    ways_out = ["not supported", "port of a worker on the client's own host"]
    refused(UNIMPLEMENTED, ways_out, lambda: client.register_system_shared_memory("x", "/x", 64))
    refused(UNIMPLEMENTED, ways_out, lambda: client.get_system_shared_memory_status())
    refused(UNIMPLEMENTED, ways_out, lambda: client.unregister_system_shared_memory())
    refused(UNIMPLEMENTED, ways_out, lambda: endpoint.infer(_raw("x", offset=0)))
    inputs = _inputs("x")
    for tensor, data in zip(inputs, [FIRST, SECOND]):
        tensor.set_data_from_numpy(data)
    refused(UNIMPLEMENTED, ways_out, lambda: client.infer("simple", inputs, outputs=[_output("OUTPUT0", "x", 0)]))
    bad, good = endpoint.stream([_raw("x", offset=0), simple()])
    contains(bad.error_message, *ways_out)
    equal(good.error_message, "")


@check
def cuda_shared_memory_has_no_regions(place):
    endpoint = place.any()
    client = endpoint.client
    equal(dict(client.get_cuda_shared_memory_status().regions), {})
    refused(NOT_FOUND, ["Unable to find cuda shared memory region: 'x'"], lambda: client.get_cuda_shared_memory_status("x"))
    message = pb.CudaSharedMemoryRegisterRequest(name="x", raw_handle=b"x", byte_size=1)
    refused(UNIMPLEMENTED, ["not supported"], lambda: endpoint.stub.CudaSharedMemoryRegister(message, timeout=DEADLINE_S))
    # NVIDIA's examples clean up before they begin.
    client.unregister_cuda_shared_memory()
    client.unregister_cuda_shared_memory("x")
