"""The table of what Cresset does with the protocol names every RPC and every field of a model's configuration, and no others."""

import os
import re
import unittest

from tritonclient.grpc import model_config_pb2, service_pb2

_TABLE = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "proto", "PROTOCOL.md")


def _section(title):
    """The first cells of a section's table."""
    with open(_TABLE, encoding="utf-8") as file:
        (section,) = [part for part in file.read().split("\n## ") if part.startswith(title)]
    return [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("|")][2:]


def _children(message):
    """The fields of a message; a map's values count as the map itself."""
    return {} if message is None or message.GetOptions().map_entry else {field.name: field.message_type for field in message.fields}


def _missing(message, named, prefix=""):
    """Every field that is neither named itself, nor a part of one that is, nor made of parts that all are."""
    missing = []
    for name, inner in _children(message).items():
        path = prefix + name
        if path in named:
            continue
        deeper = _missing(inner, named, path + ".") if _children(inner) and any(other.startswith(path + ".") for other in named) else [path]
        missing += deeper
    return missing


def _exists(path):
    message = model_config_pb2.ModelConfig.DESCRIPTOR
    for name in path.split("."):
        if name not in _children(message):
            return False
        message = _children(message)[name]
    return True


class Table(unittest.TestCase):
    def test_every_field_of_a_configuration_has_a_row(self):
        named = [name for cell in _section("Fields of `config.pbtxt`") for name in re.findall(r"`([^`]+)`", cell)]
        # Keys of the field `parameters`, which has a row.
        named = [name for name in named if not name.startswith("cresset.") and not name.isupper()]
        self.assertEqual(_missing(model_config_pb2.ModelConfig.DESCRIPTOR, set(named)), [], "without a row")
        self.assertEqual([name for name in named if not _exists(name)], [], "no such fields")
        twice = sorted({name for name in named if named.count(name) > 1 and name != "parameters"})
        self.assertEqual(twice, [], "in two rows")

    def test_a_field_that_is_forgotten_is_found(self):
        named = {"input.name", *_children(model_config_pb2.ModelConfig.DESCRIPTOR)} - {"input", "output"}
        missing = _missing(model_config_pb2.ModelConfig.DESCRIPTOR, named)
        self.assertIn("input.dims", missing)
        self.assertIn("output", missing)
        self.assertNotIn("input.name", missing)

    def test_every_rpc_has_a_row(self):
        # The last row is of other services.
        named = [name.strip() for cell in _section("RPCs") if not cell.startswith("grpc.") for name in cell.split(",")]
        methods = [method.name for method in service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods]
        self.assertEqual(sorted(set(methods) - set(named)), [], "without a row")
        self.assertEqual(len(methods), 20)
        self.assertEqual(sorted(set(named) - set(methods)), [], "no such calls")


if __name__ == "__main__":
    unittest.main()
