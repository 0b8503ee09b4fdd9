"""The server's own protocol, as its reflection tells it, against those of NVIDIA's and KServe's clients, field by field."""

import base64

from checks import DEADLINE_S, check
from google.protobuf import descriptor_pb2
from kserve_sdk import kserve
from tritonclient.grpc import model_config_pb2, service_pb2

# What the Open Inference Protocol has and Triton hasn't. Stock clients skip it.
OURS = {"inference.ModelMetadataResponse.properties", "inference.ModelMetadataResponse.PropertiesEntry"}

_Field = descriptor_pb2.FieldDescriptorProto


def _varint(data, at):
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        shift += 7
        if not byte & 0x80:
            return value, at


def _fields(data):
    """The fields of an encoded message that are bytes."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        if tag & 7 == 2:
            length, at = _varint(data, at)
            yield tag >> 3, data[at : at + length]
            at += length
        elif tag & 7 == 0:
            _, at = _varint(data, at)
        else:
            raise AssertionError(f"wire type {tag & 7} in an answer of reflection")


def _files_of(endpoint, symbol):
    call = endpoint.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda data: data,
        response_deserializer=lambda data: data,
    )
    # ServerReflectionRequest.file_containing_symbol = 4
    ask = bytes([4 << 3 | 2, len(symbol)]) + symbol.encode()
    (answer,) = list(call(iter([ask]), timeout=DEADLINE_S))
    # ServerReflectionResponse.file_descriptor_response = 4, and in it file_descriptor_proto = 1
    for number, files in _fields(answer):
        if number == 4:
            for inner, file in _fields(files):
                if inner == 1:
                    yield descriptor_pb2.FileDescriptorProto.FromString(file)


def _describe(files):
    """Everything that matters on the wire, by full name."""
    facts = {}

    def message(scope, proto):
        name = f"{scope}.{proto.name}"
        facts[name] = "map entry" if proto.options.map_entry else "message"
        for field in proto.field:
            oneof = proto.oneof_decl[field.oneof_index].name if field.HasField("oneof_index") else None
            facts[f"{name}.{field.name}"] = (
                field.number,
                _Field.Type.Name(field.type),
                _Field.Label.Name(field.label),
                field.type_name,
                oneof,
                # Explicit presence changes what generated code looks like, and what is sent.
                field.proto3_optional,
                field.options.packed if field.options.HasField("packed") else None,
            )
        for nested in proto.nested_type:
            message(name, nested)
        for enum in proto.enum_type:
            enumeration(name, enum)

    def enumeration(scope, proto):
        facts[f"{scope}.{proto.name}"] = {value.name: value.number for value in proto.value}

    for file in files:
        for proto in file.message_type:
            message(file.package, proto)
        for proto in file.enum_type:
            enumeration(file.package, proto)
        for service in file.service:
            for method in service.method:
                facts[f"{file.package}.{service.name}/{method.name}"] = (
                    method.input_type,
                    method.output_type,
                    method.client_streaming,
                    method.server_streaming,
                )
    return facts


def _served(place):
    symbols = ["inference.GRPCInferenceService", "inference.ModelConfig"]
    return _describe(file for symbol in symbols for file in _files_of(place.any(), symbol))


@check
def every_field_is_tritons(place):
    theirs = []
    for module in [service_pb2, model_config_pb2]:
        file = descriptor_pb2.FileDescriptorProto()
        module.DESCRIPTOR.CopyToProto(file)
        theirs.append(file)
    theirs, ours = _describe(theirs), _served(place)
    assert len(theirs) > 400, f"only {len(theirs)} facts were read from the client's descriptors"
    differing = [
        f"{name}: ours {ours.get(name, 'absent')}, Triton's {theirs.get(name, 'absent')}"
        for name in sorted(theirs.keys() | ours.keys())
        if ours.get(name) != theirs.get(name) and not any(name == own or name.startswith(f"{own}.") for own in OURS)
    ]
    assert not differing, "\n".join([f"{len(differing)} differences", *differing])
    assert not OURS - ours.keys(), "the properties of the Open Inference Protocol are gone"


# Where KServe's protocol contradicts Triton's, which clients in the field are written for: the repository calls.
_KSERVES_OWN = "inference.RepositoryModel"


@check
def every_field_is_kserves_but_for_the_repository_calls(place):
    """What KServe's clients know of the protocol is ours; we have more."""
    file = descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(kserve("descriptor")))
    theirs, ours = _describe([file]), _served(place)
    assert len(theirs) > 80, f"only {len(theirs)} facts were read from KServe's descriptor"
    differing = {name: (fact, ours.get(name, "absent")) for name, fact in theirs.items() if ours.get(name) != fact}
    unexpected = {name: both for name, both in differing.items() if not name.startswith(_KSERVES_OWN)}
    assert not unexpected, "\n".join(f"{name}: KServe's {both[0]}, ours {both[1]}" for name, both in unexpected.items())
    assert any(name.startswith(_KSERVES_OWN) for name in differing), "the repository calls agree by now"
